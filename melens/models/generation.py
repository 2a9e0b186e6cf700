"""Check on the spot that text may be written with a cache of keys and values, and several prompts in a batch.

Each step of a generation gets one token, the keys and values of those before, and its position. A
library that names one of these anew, or a mask that takes the step for a beginning, changes the text without an error.
So before a kind of model writes, with a mask or without, two prompts of unequal length are continued by four tokens and
the logits of these steps compared with those of the whole sequence, alone and without a cache. What disagrees is not
used: first several prompts in a batch, then the cache. The answer is kept in the user's cache.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from melens.errors import MelensError
from melens.masks.mask import WeMask
from melens.models.devices import input_device
from melens.models.kv_cache import find_cache_by_any_name
from melens.storage.cache import hash_of, store_for_kind
from melens.tracing.verification import is_reduced, limit_of, two_prompts

__all__ = ["Generation", "verify_generation"]

_NEW = 4
"""Tokens that are written."""


@dataclass(frozen=True)
class Generation:
    """How a kind of model may write.

    Attributes:
        use_cache: with a cache of keys and values.
        together: prompts of unequal length in a batch, padded on the left.
        error: of the logits, relative to the largest, in the way that is taken; NaN where the model's own logits are,
            which is no fault of the way.
    """

    use_cache: bool
    together: bool
    error: float


_KNOWN: WeakKeyDictionary[nn.Module, dict[str, Generation]] = WeakKeyDictionary()


def verify_generation(model: Any, mask: WeMask | None = None) -> Generation:
    """Return how a kind of model may write under a mask, as this process or the user's cache knows, or by trying it.

    Args:
        model: a bridge or a transformers model that can generate, without the mask.
        mask: to be put on; one on `every_call` masks each new token, which no whole sequence does, and is not tried.

    Raises:
        MelensError: no way agrees with the whole sequence.
    """
    if isinstance(model, TransformerBridge):
        find_cache_by_any_name(model)
    network = model.original_model if isinstance(model, TransformerBridge) else model
    mask = None if mask is None or mask.positions == "every_call" else mask
    mask_options = None if mask is None else mask.to_dict()
    known = _KNOWN.setdefault(network, {})
    key = hash_of(mask_options)
    if key not in known:
        store = store_for_kind("generation", network, type(model).__name__, mask_options)
        kept = store.load_text("generation")
        with torch.random.fork_rng(devices=[]), nullcontext() if mask is None else mask.applied(model):
            found = _try(network, masked=mask is not None) if kept is None else Generation(**json.loads(kept))
        known[key] = found
        if not math.isnan(found.error):
            store.save_text("generation", json.dumps(asdict(found)))
    return known[key]


_WAYS = ((True, True), (True, False), (False, False))
"""`use_cache` and `together`, the fastest first."""


def _try(network: Any, *, masked: bool) -> Generation:
    errors = []
    for use_cache, together in _WAYS:
        error, limit = _error(network, use_cache=use_cache, together=together)
        errors.append(error)
        if error <= limit or math.isnan(limit):
            if not together:
                warnings.warn(f"{_complaint(network, errors[0], masked)} {_INSTEAD[use_cache]}", stacklevel=4)
            return Generation(use_cache, together, error)
    raise MelensError(f"{_complaint(network, errors[0], masked)} No slower way agrees either, so no text is generated.")


_INSTEAD = {
    True: "Prompts are therefore continued one by one.",
    False: "Texts are therefore written without a cache, which takes longer.",
}


def _complaint(network: Any, error: float, masked: bool) -> str:
    way = "With this mask, a cache and several prompts in a batch" if masked else "With a cache and prompts in a batch"
    off = f"differ from those of the whole sequence by {error:.2g} of the largest logit"
    return f"{way}, the logits of {type(network).__name__} {off}."


@torch.no_grad()
def _error(network: Any, *, use_cache: bool, together: bool) -> tuple[float, float]:
    """Return the error of a few steps' logits, and its limit; both are NaN where the whole sequence's logits are."""
    errors: list[Tensor] = []
    dtype = torch.float32
    both = two_prompts(network, room=_NEW)
    for prompts in [both] if together else [[prompt] for prompt in both]:
        sequences, logits = _write(network, prompts, use_cache=use_cache)
        for row, prompt in enumerate(prompts):
            sequence = sequences[row, -len(prompt) - _NEW :]
            whole = network(input_ids=sequence[None, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
            dtype = whole.dtype
            if whole.isnan().any():
                return float("nan"), float("nan")
            errors.append((logits[:, row].float() - whole.float()).abs().amax(-1) / whole.float().abs().amax())
    # In reduced precision a token may go to another expert in one step; a cache that is not read is off in all.
    error = torch.stack(errors)[:, 1:].median() if is_reduced(dtype) else torch.stack(errors).max()
    return float(error), limit_of(dtype)


def _write(network: Any, prompts: Sequence[Tensor], *, use_cache: bool) -> tuple[Tensor, Tensor]:
    """Continue prompts greedily: `[row, pos]`, padded on the left, and the logits `[step, row, vocabulary]`."""
    longest = max(map(len, prompts))
    ids = torch.stack([nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    real = torch.stack([nn.functional.pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts])
    device = input_device(network)
    done = network.generate(
        ids.to(device),
        attention_mask=real.to(device),
        max_new_tokens=_NEW,
        min_new_tokens=_NEW,
        do_sample=False,
        temperature=1.0,  # whatever a checkpoint has for samples
        top_p=1.0,
        top_k=50,
        num_beams=1,
        use_cache=use_cache,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return done.sequences, torch.stack(done.logits)
