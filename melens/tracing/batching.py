"""Which rows may share a forward pass: those whose numbers are what they are alone.

No real token of a causal model sees padding on its right, but three things may depend on the other rows all the same:
the rotary frequencies of longrope and dynamic NTK on the padded length, the ties that sparse attention breaks on how
many keys there are, and an expert with capacity on the rows that want it, too. `rule_of` reads from the config what it
tells of that, `measured` tries the rest on the model itself, and `BatchRule.groups` keeps to both.

    rule = measured(network, rule_of(network))
    for rows in rule.groups(lengths, max_batch_tokens=4096):
        if rule.remembers:
            forget_longest(network)
        ...  # pad these rows on the right, run them
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from melens.errors import MelensError
from melens.models.devices import input_device
from melens.models.quantization import mixes_rows
from melens.models.view import base_of

__all__ = ["BatchRule", "forget_longest", "measured", "relative_error", "rule_of", "tolerance_of"]

_SELECTED = ("index_topk", "index_topk_blocks", "indexer_budget", "keep_window_size")
"""Names in configs for how many keys, or blocks of keys, sparse attention selects: a shorter row is seen whole."""

_TRIED = (7, 24)
"""Tokens of a short and a long row that `measured` tries."""


@dataclass(frozen=True)
class BatchRule:
    """How rows may be put together.

    Attributes:
        limits: lengths in tokens; a row of at most so many shares no forward pass with a longer one.
        equal_beyond: a row of more tokens shares only with rows of its own length: 0 for all rows, None for none.
        alone: no row shares.
        remembers: the model's numbers depend on the longest row that it saw before; `forget_longest` before each pass.
    """

    limits: tuple[int, ...] = ()
    equal_beyond: int | None = None
    alone: bool = False
    remembers: bool = False

    def may_share(self, lengths: Sequence[int]) -> bool:
        """Tell whether rows of these lengths, in tokens, may share a forward pass."""
        if len(lengths) < 2:
            return True
        shortest, longest = min(lengths), max(lengths)
        if self.alone:
            return False
        if shortest == longest:
            return True
        is_split = any(shortest <= limit < longest for limit in self.limits)
        return not is_split and (self.equal_beyond is None or longest <= self.equal_beyond)

    def groups(
        self, lengths: Sequence[int], *, max_batch_tokens: int, max_padding: float = 0.25, longest_first: bool = False
    ) -> list[list[int]]:
        """Put rows of like length (in tokens) together, and return their indices by group.

        Args:
            max_batch_tokens: of a group, padding included; a longer row is a group by itself.
            max_padding: share of a group that may be padding.
            longest_first: what does not fit into memory then shows at once.
        """
        groups: list[list[int]] = []
        total = 0  # tokens of the last group
        for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=longest_first):
            own = lengths[row]
            ends = [lengths[groups[-1][0]], own] if groups else [own]  # the shortest and the longest, in either order
            padded = (len(groups[-1]) + 1) * max(ends) if groups else 0
            fits = 0 < padded <= max_batch_tokens and total + own >= (1 - max_padding) * padded
            if fits and self.may_share(ends):
                groups[-1].append(row)
                total += own
            else:
                groups.append([row])
                total = own
        return groups


def rule_of(network: Any) -> BatchRule:
    """Read from a transformers model which rows its forward pass tells apart by length, or mixes where quantised."""
    config = network.config.get_text_config()
    limits: set[int] = set()
    equal_beyond = [int(value) for name in _SELECTED if isinstance(value := getattr(config, name, None), int)]
    remembers = False
    for parameters in _ropes_of(config):
        kind = str(parameters.get("rope_type", parameters.get("type", "default")))
        sizes = [parameters.get("original_max_position_embeddings")]
        sizes += [getattr(config, f"{name}max_position_embeddings", None) for name in ("original_", "")]
        own = [int(size) for size in sizes if size]
        if kind in ("longrope", "su"):
            limits |= set(own)  # whichever of them the model takes: one too many costs but a batch
        elif "dynamic" in kind:
            remembers = True
            equal_beyond.append(min(own, default=0))
    alone = mixes_rows(network)  # by outliers, which two prompts drawn at random need not have
    return BatchRule(tuple(sorted(limits)), min(equal_beyond, default=None), remembers=remembers, alone=alone)


def _ropes_of(config: Any) -> Iterator[Mapping[str, Any]]:
    """Give the parameters of each rotary embedding: one for all blocks, or one a type of block."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(parameters, Mapping):
        nested = [own for own in parameters.values() if isinstance(own, Mapping)]
        yield from nested or [parameters]


# --- What no config says ----------------------------------------------------------------------------------------------


_MEASURED: WeakKeyDictionary[nn.Module, dict[tuple[BatchRule, str], BatchRule]] = WeakKeyDictionary()
"""By model, what rules became that were narrowed, for padding on either side."""


@torch.no_grad()
def measured(network: Any, rule: BatchRule, *, padding: Literal["right", "left"] = "right") -> BatchRule:
    """Narrow a rule by what a model does: run two rows of a few tokens together and alone.

    If the longer row gives other numbers beside the shorter one, each row is run alone; if only the shorter one does,
    rows of equal length share. It takes three short forward passes, once a model: call it before hooks are on it that
    must not take part.

    Args:
        network: a causal language model of transformers.
        rule: of `rule_of`.
        padding: on the right, without an attention mask, or on the left with one, as for generation.
    """
    known = _MEASURED.setdefault(network, {})
    if (rule, padding) not in known:
        known[rule, padding] = _measure(network, rule, on_left=padding == "left")
    return known[rule, padding]


def _measure(network: Any, rule: BatchRule, *, on_left: bool) -> BatchRule:
    short, long = _TRIED
    long = min(long, getattr(network.config.get_text_config(), "max_position_embeddings", None) or long)
    if not rule.may_share((short, long)):
        short = long
    vocabulary = len(network.get_input_embeddings().weight)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary // 2, (2, long), generator=generator)  # images' ids are among the last
    base, tokens = base_of(network), tokens.to(input_device(network))
    own = slice(long - short, None) if on_left else slice(short)  # of the first row; its other tokens are its padding
    is_real = torch.ones_like(tokens)
    is_real[0] = 0
    is_real[0, own] = 1

    def final(rows: Int[Tensor, "row pos"], **arguments: Tensor) -> Float[Tensor, "row pos d"]:
        if rule.remembers:
            forget_longest(network)
        try:
            return base(input_ids=rows, use_cache=False, **arguments).last_hidden_state
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the model's own modules, which nothing of melens is in
            reason = str(error).strip().partition("\n")[0]
            raise MelensError(
                f"This {type(network).__name__} does not run in transformers itself ({reason}): its config asks for "
                "what the model cannot do, or a package is of a wrong version."
            ) from error

    masked = {"attention_mask": is_real}
    if "position_ids" in inspect.signature(base.forward).parameters:
        masked["position_ids"] = (is_real.cumsum(-1) - 1).clamp(min=0)
    together = final(tokens, **masked) if on_left else final(tokens)
    tolerance = tolerance_of(together.dtype)
    if relative_error(together[1:], final(tokens[1:])) > tolerance:
        return replace(rule, alone=True)
    if relative_error(together[:1, own], final(tokens[:1, own])) > tolerance:
        return replace(rule, equal_beyond=0) if short < long else replace(rule, alone=True)
    return rule


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    scale = expected.abs().max().float().clamp(min=torch.finfo(torch.float32).tiny)
    return float((found.float() - expected.float()).abs().max() / scale)


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative error up to which two ways to compute the same may differ by rounding."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 3e-2


def forget_longest(network: nn.Module) -> None:
    """Let dynamic rotary embeddings forget the longest row so far, whose frequencies they would go on using."""
    for module in network.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in kinds.items() if isinstance(kinds, Mapping) else [(None, kinds)]:
            if "dynamic" in str(kind) and hasattr(module, "original_max_seq_len"):
                prefix = "" if layer_type is None else f"{layer_type}_"
                buffer = getattr(module, f"{prefix}inv_freq")
                setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(buffer.device))
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
