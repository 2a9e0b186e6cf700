"""The arguments that public functions share: models, prompts, probes. See `melens.validation.signatures`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Int
from pydantic import BeforeValidator, PlainValidator
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from melens.data.prompts import Bos, Prompt, TokenizedPrompts
from melens.errors import MelensError
from melens.tracing.probes import Probe
from melens.validation.signatures import given, must_be

__all__ = ["BosOrNot", "Bridge", "Probes", "Prompts", "TokenLists", "check_layer", "check_vocabulary"]


def _a_bridge(model: Any) -> Any:
    if isinstance(model, str):
        raise must_be(f"a TransformerBridge: melens.load_model({model!r}) returns one")
    if not isinstance(model, TransformerBridge):
        if isinstance(model, nn.Module):
            made_by = "TransformerBridge.boot_transformers(name, hf_model=model)"
            raise must_be(f"a TransformerBridge: {made_by} makes one of a transformers model")
        raise must_be("a TransformerBridge, as melens.load_model(name) returns it")
    if not hasattr(model, "blocks"):
        raise must_be("of a decoder; TransformerLens gives this model no blocks")
    return model


Bridge = Annotated[TransformerBridge, BeforeValidator(_a_bridge)]
"""A bridge of a model with blocks."""


def check_layer(model: TransformerBridge, layer: int) -> None:
    """Raise a `MelensError` for a block that the model does not have."""
    if not 0 <= layer < len(model.blocks):
        raise MelensError(f"This model has no block {layer}: its blocks are 0 to {len(model.blocks) - 1}.")


# --- Prompts ----------------------------------------------------------------------------------------------------------


def _token_ids(prompt: Any, number: int) -> Int[Tensor, " pos"]:
    """Return the token ids of one prompt, a list, array or tensor, as a tensor on the CPU."""
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # texts, lists in a list, more than 64 bits
        ids = torch.empty(0, 0)
    is_whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim != 1 or (len(ids) and not is_whole):
        raise MelensError(f"Prompt number {number} is {given(prompt)}; it must be a list of token ids: whole numbers.")
    return ids.long().cpu()


def check_vocabulary(model: TransformerBridge, prompts: Sequence[Int[Tensor, " _"]]) -> None:
    """Raise a `MelensError` for the first prompt with a token that the model does not know."""
    every = torch.cat(list(prompts))
    if len(every) and not 0 <= int(every.min()) <= int(every.max()) < model.cfg.d_vocab:
        is_known = [bool(((ids >= 0) & (ids < model.cfg.d_vocab)).all()) for ids in prompts]
        number = is_known.index(False)
        raise MelensError(f"Prompt number {number} has token ids outside the vocabulary of {model.cfg.d_vocab:,}.")


def _listed_ids(prompts: Any) -> list[Int[Tensor, " pos"]]:
    listed = _listed_prompts(prompts)
    if isinstance(listed, TokenizedPrompts):
        return listed.tokens
    if isinstance(listed[0], Prompt):
        raise must_be("token ids of each prompt, not texts")
    return listed


def _listed_prompts(prompts: Any) -> list[Any] | TokenizedPrompts:
    """List prompts, of which one may come alone, as `Prompt`s or as tensors of token ids."""
    if isinstance(prompts, TokenizedPrompts):
        return prompts
    is_array = isinstance(prompts, np.ndarray | Tensor)
    if isinstance(prompts, str | Prompt) or (is_array and prompts.ndim < 2 and not _holds_texts(prompts)):
        several = [prompts]
    elif isinstance(prompts, Iterable) and not isinstance(prompts, Mapping | bytes):
        several = list(prompts)
    else:
        raise must_be("texts, or token ids of each prompt")
    if several and isinstance(several[0], int):
        several = [several]
    if not several:
        raise must_be("at least one prompt")
    if not isinstance(several[0], str | Prompt):
        return [_token_ids(prompt, number) for number, prompt in enumerate(several)]
    for number, prompt in enumerate(several):
        if not isinstance(prompt, str | Prompt):
            raise MelensError(f"Prompt number {number} is {given(prompt)}; it must be a text, like the first one.")
    texts = [Prompt(text=prompt) if isinstance(prompt, str) else prompt for prompt in several]
    for number, prompt in enumerate(texts):
        if not isinstance(prompt.text, str):
            raise MelensError(f"The text of prompt number {number} is {given(prompt.text)}; it must be a string.")
    return texts


def _holds_texts(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind in "OUT"


TokenLists = Annotated[Sequence[Sequence[int]] | Sequence[Tensor], PlainValidator(_listed_ids)]
"""The token ids of each prompt."""

Prompts = Annotated[
    str | Prompt | TokenizedPrompts | Tensor | Sequence[str | Prompt] | Sequence[Sequence[int]] | Sequence[Tensor],
    PlainValidator(_listed_prompts),
]
"""Texts (`str` or `Prompt`), or the token ids of each prompt: a list, array or tensor `[pos]`; one may come alone."""


def _as_word(bos: Any) -> Any:
    return str(bos).lower() if isinstance(bos, bool) else bos


BosOrNot = Annotated[Bos, BeforeValidator(_as_word)]
"""Whether to prepend BOS: a word, or True or False."""


# --- Probes -----------------------------------------------------------------------------------------------------------


def _a_probe(probe: Any) -> Any:
    if isinstance(probe, type) and issubclass(probe, Probe):
        raise must_be(f"a probe: {probe.__name__}() makes one")
    if not isinstance(probe, Probe):
        raise must_be("a probe, such as melens.Norms()")
    for name, kind in (("name", str), ("sites", tuple | list), ("index", tuple | list), ("keys", tuple | list)):
        if not isinstance(value := getattr(probe, name, None), kind):
            raise must_be(f"a probe whose {name} is a {'text' if kind is str else 'tuple'}, not {given(value)}")
    if not probe.sites:
        raise must_be("a probe with at least one site")
    if probe.kind not in ("table", "tensor"):
        raise must_be(f"a probe whose kind is table or tensor, not {given(probe.kind)}")
    return probe


def _listed_probes(probes: Any) -> Any:
    if isinstance(probes, Probe | type) or not isinstance(probes, Iterable):
        return None if probes is None else [probes]
    if not (several := list(probes)):
        raise must_be("at least one probe")
    return several


Probes = Annotated[Sequence[Annotated[Probe, BeforeValidator(_a_probe)]] | None, BeforeValidator(_listed_probes)]
