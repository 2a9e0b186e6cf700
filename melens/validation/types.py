"""Which values an option or an argument may have: types that carry the words by which a wrong one is refused.

    Share = Annotated[Real, Field(gt=0, le=1), Said("a number over 0 and at most 1")]

A dataclass whose fields have such types checks itself by `check_fields`; the options of the command line
(`experiments/options`) have the same types in pydantic models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import Field, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

from melens.errors import MelensError

__all__ = [
    "SELECTS", "SITES", "Count", "Flag", "Layers", "Name", "Number", "Positions", "Positive", "Rate", "Real", "Said",
    "Select", "Share", "Site", "Start", "Whole", "check_fields", "in_words", "listed", "one_of", "why_not",
]  # fmt: skip


@dataclass(frozen=True)
class Said:
    """What a value must be, in words that follow "it must be"; stands last in an `Annotated` type."""

    phrase: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(handler(source), "not_allowed", custom_error_message=self.phrase)


def one_of(words: Sequence[str]) -> Any:
    """Allow these words alone. (A `Literal` would do but for its own message where annotations are checked.)"""
    return Field(pattern=rf"^({'|'.join(words)})$")


def listed(words: Sequence[str]) -> str:
    """Write words as a sentence lists them: "a, b or c"."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


Real = Annotated[float, Field(strict=True, allow_inf_nan=False)] | Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True), Said("true or false")]
Whole = Annotated[int, Field(strict=True, ge=0), Said("a whole number of at least 0")]
Count = Annotated[int, Field(strict=True, ge=1), Said("a whole number of at least 1")]
Number = Annotated[Real, Field(ge=0), Said("a number of at least 0")]
Positive = Annotated[Real, Field(gt=0), Said("a number over 0")]
Share = Annotated[Real, Field(gt=0, le=1), Said("a number over 0 and at most 1")]
Rate = Annotated[Real, Field(ge=0, le=1), Said("a number from 0 to 1")]
Name = Annotated[str, Field(strict=True, min_length=1), Said("a text")]

# --- Of masks (melens.WeMask) -----------------------------------------------------------------------------------------

SELECTS = ("weight", "weight_low", "random", "magnitude", "massive", "batch_magnitude")
Select = Annotated[str, one_of(SELECTS), Said(listed(SELECTS))]
"""How a block's dims are chosen: the largest |gain of ln1| (the paper), the smallest (a control), at random, the
largest |values| of the token itself at the mask's site, the massive dims; or, as the authors' code does, the largest
|values| averaged over the batch."""

SITES = ("attn_in", "ln1_in", "resid_pre")
Site = Annotated[str, one_of(SITES), Said(listed(SITES))]
"""Where a mask takes hold: what comes out of `ln1`, what goes into it (for attention alone, the residual stream stays
whole), or the residual stream itself before the block."""

_Blocks = Annotated[Sequence[Whole], Field(min_length=1)]
_FromMe = Annotated[str, Field(pattern=r"^me([+-]\d+)?$")]
Start = Annotated[Whole | _FromMe, Said("a block, me, me+1, me-2 and the like")]
_LAYERS, _POSITIONS = ("all", "first"), ("first", "massive", "all", "every_call")
Layers = Annotated[
    Annotated[str, one_of(_LAYERS)] | _Blocks, Said(f"{', '.join(_LAYERS)} or a list of blocks, as [12,13]")
]
Positions = Annotated[
    Annotated[str, one_of(_POSITIONS)] | _Blocks, Said(f"{', '.join(_POSITIONS)} or a list of positions, as [0,5]")
]


# --- Checking ---------------------------------------------------------------------------------------------------------


def check_fields(checked: Any, name: str) -> None:
    """Check the fields of a dataclass that have a type of this module's kind, from its `__post_init__`.

    Raises:
        MelensError: the first value that is not allowed; `name` is what the sentence calls a field: `"training.{}"`.
    """
    of_class: Any = type(checked)
    for field, kind in _kinds(of_class).items():
        value = getattr(checked, field)
        try:
            kind.validate_python(value)
        except ValidationError as error:
            raise MelensError(f"{name.format(field)} is {in_words(value)}; {why_not(error.errors()[0])}.") from None


@cache
def _kinds(checked: type) -> dict[str, TypeAdapter]:
    hints = get_type_hints(checked, include_extras=True).items()
    said = {name: hint for name, hint in hints if Said in map(type, getattr(hint, "__metadata__", ()))}
    return {name: TypeAdapter(hint) for name, hint in said.items()}


def why_not(error: Mapping[str, Any]) -> str:
    """Say what a value must be, from one of pydantic's `errors()`: "it must be a whole number of at least 1"."""
    if error["type"] == "literal_error":
        return f"it must be {error['ctx']['expected'].replace(chr(39), '')}"
    if error["type"] == "not_allowed":
        return f"it must be {error['msg']}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}"


def in_words(value: Any) -> str:
    """Write a value as one types it: null, true, 'text', [1, 2]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(in_words, value))}]"
    return repr(value)
