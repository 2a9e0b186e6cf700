"""Log-probabilities of continuations, where those of one context share its forward pass.

The choices of a question are laid out behind it in one row, and a mask lets each see the question and itself alone, at
the positions that it would have alone: the same numbers as a row a choice, for fewer tokens. A state-space block or
ALiBi does not go by that mask, so the layout is tried on the model at hand before it is used.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, repeat
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from melens.errors import MelensError
from melens.models.devices import input_device
from melens.models.view import base_of
from melens.tracing.batching import BatchRule, forget_longest, measured, relative_error, rule_of, tolerance_of
from melens.tracing.resume import logits_of

__all__ = ["Request", "Scored", "Scorer"]

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, at least one, and of its continuation."""

_LOGIT_ROWS = {"cpu": 256, "cuda": 4096}
"""Tokens whose logits are held together."""

_MAX_PADDING = 0.1
"""Of a batch: padding is computed, too."""

_WINDOWS = (
    "sliding_window", "sliding_windows", "sliding_window_size", "sliding_window_len", "window_size", "attention_window",
    "attention_window_size", "attention_chunk_size", "local_attention",
)  # fmt: skip
"""Names in configs for how far back some blocks see, or how long the chunks are within which they do."""

_TRIED_TOKENS = 4
"""Of each continuation in the row that the layout is tried on: one of a single token takes no place behind its context,
so that nothing could go wrong with it."""

_MAX_LEAK = 1e-3
"""How much of a log-probability may change with another continuation of the same row, in whatever dtype."""


@dataclass(frozen=True)
class Scored:
    """A continuation's tokens, as the model sees them come.

    Attributes:
        log_p: of each token, nats.
        greedy: whether each is the likeliest.
    """

    log_p: Float[Tensor, " token"]
    greedy: Bool[Tensor, " token"]


@dataclass(frozen=True)
class _Row:
    """A context and the continuations behind it.

    Attributes:
        context: token ids.
        continuations: token ids, of each request in `requests`.
        requests: which requests these are.
    """

    context: tuple[int, ...]
    continuations: list[tuple[int, ...]]
    requests: list[int]

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(continuation) - 1 for continuation in self.continuations)


class Scorer:
    """Scores continuations with a model as it stands: with the masks that are on it."""

    def __init__(
        self, network: Any, *, max_length: int, max_batch_tokens: int = 4096, share_contexts: bool | None = None
    ) -> None:
        """Get ready.

        Args:
            network: a causal language model of transformers.
            max_length: its context.
            max_batch_tokens: in a forward pass, padding included.
            share_contexts: lay the continuations of a context out in one row; None tries with the longest such row
                whether this model gives the same numbers, and does it if so.
        """
        self._network = network
        self._base = base_of(network)
        self._device = input_device(network)
        self._max_batch_tokens = max_batch_tokens
        self._share_contexts = share_contexts
        self._max_length = max_length
        self._tried = 0  # tokens of the longest row that was tried
        self._agrees = True

    @torch.no_grad()
    def score(
        self,
        requests: Sequence[Request],
        progress: Callable[[int], None] | None = None,
        *,
        names: Sequence[str] | None = None,
    ) -> list[Scored]:
        """Score continuations.

        Args:
            requests: one that is longer than the model's context loses tokens on the left, as in the harness.
            progress: called with the number of requests done since the last call.
            names: what an error calls each request.

        Returns:
            In the order of the requests, on the CPU.

        Raises:
            MelensError: a continuation without a token or longer than the model's context, or an empty context; a
                log-probability that is NaN or infinite.
        """
        cut = [self._cut(*request) for request in requests]
        of_context: dict[tuple[int, ...], list[int]] = {}
        for number, (context, _) in enumerate(cut):
            of_context.setdefault(context, []).append(number)
        rows = [_Row(context, [cut[n][1] for n in numbers], numbers) for context, numbers in of_context.items()]
        scored: dict[int, Scored] = {}
        for batch in self._batches(self._laid_out(rows)):
            scored |= self._run(batch)
            if progress is not None:
                progress(sum(len(row.requests) for row in batch))
        in_order = [scored[number] for number in range(len(requests))]
        _check_finite(in_order, names or [f"Request {number}" for number in range(len(requests))])
        return in_order

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not context or not continuation:
            raise MelensError("A context and its continuation need at least one token each.")
        if len(continuation) > self._max_length:
            raise MelensError(
                f"A continuation has {len(continuation)} tokens, but the model's context is {self._max_length}."
            )
        room = self._max_length + 1 - len(continuation)
        return tuple(context)[-room:], tuple(continuation)

    # --- Rows -------------------------------------------------------------------------------------------------------

    @cached_property
    def _rule(self) -> BatchRule:
        return measured(self._network, rule_of(self._network))

    @cached_property
    def _window(self) -> int:
        """How far back the most short-sighted block sees: the layout's mask stands in for the windows and chunks."""
        config = self._network.config.get_text_config()
        found = [getattr(config, name, None) for name in _WINDOWS]
        sizes = chain.from_iterable(size if isinstance(size, list | tuple) else [size] for size in found)
        return min([self._max_length, *(size for size in sizes if isinstance(size, int) and size > 0)])

    def _laid_out(self, rows: list[_Row]) -> list[_Row]:
        """Take rows with several continuations apart, unless the model gives the same numbers for them together."""
        longest = max(filter(self._may_share, rows), key=lambda row: row.length, default=None)
        if longest is None or not self._shares_up_to(longest):
            return [single for row in rows for single in _apart(row)]
        return [part for row in rows for part in ([row] if self._may_share(row) else _apart(row))]

    def _may_share(self, row: _Row) -> bool:
        """Tell whether the model could not tell the continuations of a row from rows of their own by their length."""
        lengths = [row.length, *(single.length for single in _apart(row))]
        return len(row.requests) > 1 and row.length <= self._window and self._rule.may_share(lengths)

    def _shares_up_to(self, longest: _Row) -> bool:
        """Try the layout, anew where a row is longer than any that was tried."""
        if self._share_contexts is not None:
            return self._share_contexts
        if self._agrees and longest.length > self._tried:
            trial = _trial(longest)
            self._agrees = self._may_share(trial) and self._agrees_on(trial)
            self._tried = longest.length
        return self._agrees

    def _agrees_on(self, trial: _Row) -> bool:
        """Tell whether one row gives what a row a continuation gives: not with ALiBi, state spaces, or their like."""
        if "position_ids" not in inspect.signature(self._base.forward).parameters:
            return False
        alone = self._log_p(*_apart(trial))
        first, *others = trial.continuations
        vocabulary = len(self._network.get_input_embeddings().weight)
        changed = tuple((token + 1) % vocabulary for token in first)
        try:
            together = self._log_p(trial)
            after_change = self._log_p(_Row(trial.context, [changed, *others], trial.requests))
        except (RuntimeError, ValueError, TypeError, IndexError):  # an architecture that takes no such mask
            return False
        # Rounding hides a small leak in bf16, but not here: where nothing leaks, both passes compute the very same
        leak = relative_error(after_change[len(first) :], together[len(first) :])
        tolerance = tolerance_of(next(self._network.parameters()).dtype)
        return leak <= min(tolerance, _MAX_LEAK) and relative_error(together, alone) <= tolerance

    def _log_p(self, *rows: _Row) -> Float[Tensor, " token"]:
        """Score rows, each in a pass of its own."""
        scored: dict[int, Scored] = {}
        for row in rows:
            scored |= self._run([row])
        return torch.cat([scored[number].log_p for number in sorted(scored)])

    def _batches(self, rows: list[_Row]) -> list[list[_Row]]:
        """Put rows of like length together, the longest first: what does not fit into memory shows at once."""
        groups = self._rule.groups(
            [row.length for row in rows],
            max_batch_tokens=self._max_batch_tokens,
            max_padding=_MAX_PADDING,
            longest_first=True,
        )
        return [[rows[number] for number in group] for group in groups]

    # --- Forward passes ---------------------------------------------------------------------------------------------

    def _run(self, rows: list[_Row]) -> dict[int, Scored]:
        length = max(row.length for row in rows)
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        for at, row in enumerate(rows):
            laid_out = [*row.context, *(token for continuation in row.continuations for token in continuation[:-1])]
            tokens[at, : len(laid_out)] = torch.tensor(laid_out)
        arguments: dict[str, Any] = {"input_ids": tokens.to(self._device), "use_cache": False}
        if any(len(row.continuations) > 1 for row in rows):  # else the causal mask is all that these rows need
            positions, may_see = _layout(rows, length)
            dtype = next(self._network.parameters()).dtype
            hidden_from = torch.zeros(may_see.shape, dtype=dtype).masked_fill(~may_see, torch.finfo(dtype).min)
            arguments["position_ids"] = positions.to(self._device)
            arguments["attention_mask"] = hidden_from[:, None].to(self._device)
        if self._rule.remembers:
            forget_longest(self._network)
        final = self._base(**arguments).last_hidden_state
        return self._read(rows, final)

    def _read(self, rows: list[_Row], final: Float[Tensor, "row pos d"]) -> dict[int, Scored]:
        """Look at the states that each continuation's tokens are foretold from, and at no others."""
        places: list[tuple[int, int]] = []
        targets: list[int] = []
        sizes: list[int] = []
        for at, row in enumerate(rows):
            begin = len(row.context)
            for continuation in row.continuations:
                own = [len(row.context) - 1, *range(begin, begin + len(continuation) - 1)]
                begin += len(continuation) - 1
                places += [(at, place) for place in own]
                targets += continuation
                sizes.append(len(continuation))
        rows_at, columns = torch.tensor(places, device=final.device).T
        wanted = torch.tensor(targets, device=final.device)
        states = final[rows_at, columns]
        n_rows = _LOGIT_ROWS.get(final.device.type, 256)
        log_p, greedy = [], []
        for some, of_some in zip(states.split(n_rows), wanted.split(n_rows), strict=True):
            logits = logits_of(self._network, some[None])[0].log_softmax(-1, dtype=torch.float32)
            log_p.append(logits.gather(-1, of_some[:, None])[:, 0])
            greedy.append(logits.argmax(-1) == of_some)
        requests = [number for row in rows for number in row.requests]
        parts = zip(torch.cat(log_p).cpu().split(sizes), torch.cat(greedy).cpu().split(sizes), strict=True)
        return {number: Scored(*part) for number, part in zip(requests, parts, strict=True)}


def _check_finite(scored: Sequence[Scored], names: Sequence[str]) -> None:
    """Stop where logits are NaN: no token is the likeliest there, so that an accuracy would be 0, and a number."""
    for each, name in zip(scored, names, strict=True):
        log_p = float(each.log_p.sum())
        if not math.isfinite(log_p):
            raise MelensError(
                f"{name}: the log-likelihood is {log_p}; look for NaN in the model's weights, or load it in float32."
            )


def _apart(row: _Row) -> list[_Row]:
    return [
        _Row(row.context, [continuation], [number])
        for continuation, number in zip(row.continuations, row.requests, strict=True)
    ]


def _trial(row: _Row) -> _Row:
    """Return a row of the same length in which each continuation has enough tokens for the layout to fail."""
    continuations = [
        (*own, *islice(chain.from_iterable(repeat(row.context)), max(0, _TRIED_TOKENS - len(own))))
        for own in row.continuations
    ]
    added = sum(map(len, continuations)) - sum(map(len, row.continuations))
    return _Row(row.context[min(added, len(row.context) - 1) :], continuations, row.requests)


def _layout(rows: list[_Row], length: int) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos pos"]]:
    """Return each token's position in its own text, and which tokens it may see: the context, and its own before it."""
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    part = torch.full((len(rows), length), -1)  # of the row: 0 the context, then the continuations; -1 padding
    for at, row in enumerate(rows):
        end = len(row.context)
        positions[at, :end], part[at, :end] = torch.arange(end), 0
        for number, continuation in enumerate(row.continuations, 1):
            begin, end = end, end + len(continuation) - 1
            positions[at, begin:end] = len(row.context) + torch.arange(end - begin)
            part[at, begin:end] = number
    of_context = part[:, None, :] == 0
    of_own = part[:, None, :] == part[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return positions, (of_context | of_own) & causal & (part[:, :, None] >= 0)
