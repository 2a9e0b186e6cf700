"""Log-probabilities of continuations, where those of one context share its forward pass.

The choices of a question are laid out behind it in one row, and a mask lets each see the question and itself alone, at
the positions that it would have alone: the same numbers as a row a choice, for fewer tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from melens.errors import MelensError
from melens.networks import base_of
from melens.replay import logits_of

__all__ = ["Request", "Scored", "Scorer"]

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, at least one, and of its continuation."""

_LOGIT_ROWS = {"cpu": 256, "cuda": 4096}
"""Tokens whose logits are held together."""


_LEAST_FILLED = 0.85
"""How long a row must be, of the longest one in its batch: padding is computed, too."""


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
            share_contexts: lay the continuations of a context out in one row; None tries with the first such context
                whether this architecture gives the same numbers, and does it if so.
        """
        self._network = network
        self._base = base_of(network)
        self._device = network.device
        self._max_batch_tokens = max_batch_tokens
        self._shares = share_contexts
        self._max_length = max_length

    @torch.no_grad()
    def score(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Scored]:
        """Score continuations.

        Args:
            requests: one that is longer than the model's context loses tokens on the left, as in the harness.
            progress: called with the number of requests done since the last call.

        Returns:
            In the order of the requests, on the CPU.

        Raises:
            MelensError: a continuation without a token or longer than the model's context, or an empty context.
        """
        cut = [self._cut(*request) for request in requests]
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (context, _) in enumerate(cut):
            groups.setdefault(context, []).append(number)
        rows: list[_Row] = []
        for context, numbers in groups.items():
            row = _Row(context, [cut[number][1] for number in numbers], numbers)
            rows += [row] if len(numbers) == 1 or self._can_share(row) else _apart(row)
        scored: dict[int, Scored] = {}
        for batch in self._batches(rows):
            scored |= self._run(batch)
            if progress is not None:
                progress(sum(len(row.requests) for row in batch))
        return [scored[number] for number in range(len(requests))]

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
    def _window(self) -> int:
        """How far back the most short-sighted block sees; a row with several continuations must be shorter."""
        sliding = getattr(self._network.config, "sliding_window", None)
        return min(self._max_length, sliding or self._max_length)

    def _can_share(self, row: _Row) -> bool:
        if self._shares is False or row.length > self._window:
            return False
        if self._shares is None:
            self._shares = self._shares_rightly(row)
        return self._shares

    def _shares_rightly(self, row: _Row) -> bool:
        """Try whether one row gives what a row a continuation gives: not with ALiBi, state spaces, or their like."""
        if "position_ids" not in inspect.signature(self._base.forward).parameters:
            return False
        apart: dict[int, Scored] = {}
        for single in _apart(row):
            apart |= self._run([single])
        try:
            together = self._run([row])
        except (RuntimeError, ValueError, TypeError, IndexError):  # an architecture that takes no such mask
            return False
        tolerance = 1e-3 if next(self._network.parameters()).dtype == torch.float32 else 0.25
        return all((apart[n].log_p - together[n].log_p).abs().max() <= tolerance for n in row.requests)

    def _batches(self, rows: list[_Row]) -> list[list[_Row]]:
        """Put rows of like length together, the longest first: what does not fit into memory shows at once."""
        batches: list[list[_Row]] = []
        for row in sorted(rows, key=lambda row: -row.length):
            longest = batches[-1][0].length if batches else 0
            fits = (len(batches[-1]) + 1) * longest <= self._max_batch_tokens if batches else False
            if fits and row.length >= _LEAST_FILLED * longest:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    # --- Forward passes ---------------------------------------------------------------------------------------------

    def _run(self, rows: list[_Row]) -> dict[int, Scored]:
        length = max(row.length for row in rows)
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        for at, row in enumerate(rows):
            laid_out = [*row.context, *(token for continuation in row.continuations for token in continuation[:-1])]
            tokens[at, : len(laid_out)] = torch.tensor(laid_out)
        arguments: dict[str, Any] = {"input_ids": tokens.to(self._device), "use_cache": False}
        if any(len(row.continuations) > 1 for row in rows):  # else padding on the right is seen by no real token
            positions, may_see = _layout(rows, length)
            dtype = next(self._network.parameters()).dtype
            hidden_from = torch.zeros(may_see.shape, dtype=dtype).masked_fill(~may_see, torch.finfo(dtype).min)
            arguments["position_ids"] = positions.to(self._device)
            arguments["attention_mask"] = hidden_from[:, None].to(self._device)
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


def _apart(row: _Row) -> list[_Row]:
    return [
        _Row(row.context, [continuation], [number])
        for continuation, number in zip(row.continuations, row.requests, strict=True)
    ]


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
