"""The arguments of a public function, checked against its signature: a mistake gets one sentence.

    @checked
    def read_normalization(model: Bridge, layer: Layer, site: Literal["ln1", "ln2"]) -> Normalization: ...

    read_normalization(model, 3, "ln3")  # MelensError: read_normalization: site is 'ln3'; it must be ln1 or ln2.

The types here take what is meant where that is plain: numpy's integers, one name where several may be given.
"""

from __future__ import annotations

import functools
import inspect
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, validate_call
from pydantic_core import PydanticCustomError

from melens.errors import MelensError
from melens.validation.types import Said, Share, why_not

__all__ = [
    "Folder", "Layer", "LayerList", "Position", "PositionList", "ShareList", "SiteList", "WholeNumber", "checked",
    "given", "must_be",
]  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function raise a `MelensError` for the first argument that is not of its type in the signature.

    What a type converts (`LayerList`: 3 to (3,)) the function gets converted. It costs some microseconds a call.
    """

    @functools.cache  # at the first call, when every name in the annotations is there
    def reader() -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        @functools.wraps(function)
        def read(*args: Any, **kwargs: Any) -> Any:
            return args, kwargs

        return validate_call(config=ConfigDict(arbitrary_types_allowed=True, strict=True))(read)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            read_args, read_kwargs = reader()(*args, **kwargs)
        except ValidationError as error:
            inspect.signature(function).bind(*args, **kwargs)  # one too many or too few is Python's own TypeError
            raise MelensError(_sentence(function, error)) from None
        return function(*read_args, **read_kwargs)

    return call


def must_be(phrase: str) -> PydanticCustomError:
    """Make the error that a validator raises for a value, in words that follow "it must be"."""
    return PydanticCustomError("not_allowed", "{phrase}", {"phrase": phrase})


def given(value: Any) -> str:
    """Write a value in a few words, for a sentence that says what is wrong with it."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | list | tuple | dict | set):
        return reprlib.repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # an array of whichever library
        return f"a {type(value).__name__} of {value.dtype} and shape {list(value.shape)}"
    return f"of type {type(value).__name__}"


def _sentence(function: Callable[..., Any], error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "value_error":  # a MelensError of a validator: a sentence already
        return str(first["ctx"]["error"])
    name = function.__qualname__.removesuffix(".__init__")
    return f"{name}: {_where(function, first['loc'])} is {given(first['input'])}; {why_not(first)}."


def _where(function: Callable[..., Any], place: tuple[int | str, ...]) -> str:
    """Name an argument as the signature does, and the entry in it; pydantic counts those given by position."""
    argument, *entries = place
    if isinstance(argument, int):
        names = list(inspect.signature(function).parameters.values())
        n_single = sum(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in names)
        entries = entries if argument < n_single else [argument - n_single, *entries]
        argument = names[min(argument, n_single)].name
    return argument + "".join(f"[{entry!r}]" for entry in entries)


# --- Types ------------------------------------------------------------------------------------------------------------


def as_integer(value: Any) -> Any:
    """Take numpy's integers and tensors of one integer, but no truth value and no float."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def _several(value: Any) -> Any:
    """Take one where several may be given, and whatever several come in."""
    if value is None or isinstance(value, Mapping):
        return value
    if isinstance(value, str) or not isinstance(value, Iterable):
        return (value,)
    return tuple(value.tolist() if hasattr(value, "tolist") else value)


WholeNumber = Annotated[int, BeforeValidator(as_integer)]
Layer = Annotated[WholeNumber, Field(ge=0), Said("a block, counted from 0")]
Position = Annotated[WholeNumber, Field(ge=0), Said("a position: a whole number of at least 0")]
OneOrMore = Annotated[Sequence[T], BeforeValidator(_several), Field(min_length=1)]
LayerList = Annotated[OneOrMore[Layer], Said("blocks, counted from 0")]
PositionList = Annotated[OneOrMore[WholeNumber], Said("positions, -1 for the last")]
SiteList = Annotated[OneOrMore[str], Said("hook names, such as 'hook_resid_post'")]
ShareList = Annotated[OneOrMore[Share], Said("numbers over 0 and at most 1")]
Folder = Annotated[str | Path, Said("the path of a folder")]
