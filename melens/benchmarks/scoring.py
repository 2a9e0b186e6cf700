"""Log-probabilities of continuations; continuations of one context share its forward pass.

1. `score` groups the requests by context. The choices of a question stand behind it in one row (`_Row`), and an
   attention mask lets each choice see the question and itself only, at the positions that it would have alone
   (`_layout`): the same numbers as with a row for each choice, from fewer tokens.
2. A state-space block or ALiBi ignores that mask. So the layout is first tried on the model at hand (`_agrees_on`), and
   where the numbers differ, every choice gets a row of its own.
3. Rows of similar length form a batch, one forward pass runs it (`_run`), and the logits are computed only
   where a continuation's tokens are predicted (`_read`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, repeat
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from melens.benchmarks.scores import check_scores
from melens.errors import MelensError
from melens.models.devices import input_device
from melens.models.view import base_of
from melens.printing import Brief
from melens.tracing.batching import BatchRule, forget_longest, measured, relative_error, rule_of, tolerance_of
from melens.tracing.resume import apply_head

__all__ = ["Request", "Scored", "Scorer"]

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, at least one, and of its continuation."""

_LOGIT_ROWS = {"cpu": 256, "cuda": 4096}
"""Tokens whose logits are in memory at a time."""

_MAX_PADDING = 0.1
"""Share of a batch that may be padding, which costs as much as other tokens."""

_WINDOWS = (
    "sliding_window", "sliding_windows", "sliding_window_size", "sliding_window_len", "window_size", "attention_window",
    "attention_window_size", "attention_chunk_size", "local_attention",
)  # fmt: skip
"""Names that configs give to the length of a sliding window or of a chunk of attention."""

_TRIED_TOKENS = 4
"""Tokens of each continuation in the row that the layout is tried on. A continuation of one token takes no position
behind its context, so a row of such continuations would agree on any model."""

_MAX_LEAK = 1e-3
"""Largest relative change of a log-probability when another continuation of its row changes, in any dtype."""


@dataclass(frozen=True, repr=False)
class Scored(Brief):
    """What the model predicts at a continuation's tokens.

    Attributes:
        log_p: log-probability of each token, nats.
        greedy: whether each token is the likeliest.
    """

    log_p: Float[Tensor, " token"]
    greedy: Bool[Tensor, " token"]


@dataclass(frozen=True)
class _Row:
    """A context and the continuations behind it, in token ids; a continuation for each index in `requests`."""

    context: tuple[int, ...]
    continuations: list[tuple[int, ...]]
    requests: list[int]

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(continuation) - 1 for continuation in self.continuations)


class Scorer:
    """Scores continuations with a model as it stands, with the mask that is on it."""

    def __init__(
        self, network: Any, *, max_length: int, max_batch_tokens: int = 4096, share_contexts: bool | None = None
    ) -> None:
        """Prepare to score.

        Args:
            network: a causal language model of transformers.
            max_length: tokens of its context.
            max_batch_tokens: in a forward pass, padding included.
            share_contexts: put the continuations of a context into one row; None does so if this model gives the same
                numbers for the longest such row.
        """
        self._network, self._base, self._device = network, base_of(network), input_device(network)
        self._max_length, self._max_batch_tokens = max_length, max_batch_tokens
        self._share_contexts = share_contexts
        self._agrees, self._tried = True, 0  # tokens of the longest row that was tried

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
            requests: one that is longer than the model's context is cut on the left, as in the harness.
            progress: called with the number of requests done since the last call.
            names: what an error calls each request.

        Returns:
            In the order of the requests, on the CPU.

        Raises:
            MelensError: a context or a continuation is empty, a continuation is longer than the model's context, or a
                log-probability is NaN or infinite.
        """
        cut = [self._cut(*request) for request in requests]
        of_context: dict[tuple[int, ...], list[int]] = {}
        for number, (context, _) in enumerate(cut):
            of_context.setdefault(context, []).append(number)
        rows = [_Row(context, [cut[n][1] for n in numbers], numbers) for context, numbers in of_context.items()]
        rows, most = self._laid_out(rows), self._max_batch_tokens
        # The longest first: then a lack of memory shows at once.
        how: dict[str, Any] = {"max_batch_tokens": most, "max_padding": _MAX_PADDING, "longest_first": True}
        scored: dict[int, Scored] = {}
        for group in self._rule.groups([row.length for row in rows], **how):
            batch = [rows[number] for number in group]
            scored |= self._run(batch)
            if progress is not None:
                progress(sum(len(row.requests) for row in batch))
        in_order = [scored[number] for number in range(len(requests))]
        # At NaN no token is the likeliest, so the accuracy would be 0, which looks like a result.
        log_p = [float(each.log_p.sum()) for each in in_order]
        check_scores(names or [f"Request {number}" for number in range(len(requests))], log_p, "log-likelihood")
        return in_order

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not context or not continuation:
            raise MelensError("A context or a continuation is empty; each needs at least one token.")
        if len(continuation) > self._max_length:
            raise MelensError(
                f"A continuation has {len(continuation)} tokens, more than the model's context of {self._max_length}."
            )
        room = self._max_length + 1 - len(continuation)
        return tuple(context)[-room:], tuple(continuation)

    # --- Rows -------------------------------------------------------------------------------------------------------

    @cached_property
    def _rule(self) -> BatchRule:
        return measured(self._network, rule_of(self._network))

    @cached_property
    def _window(self) -> int:
        """The shortest window or chunk of any block: the layout's mask replaces the model's own."""
        config = self._network.config.get_text_config()
        found = [getattr(config, name, None) for name in _WINDOWS]
        sizes = chain.from_iterable(size if isinstance(size, list | tuple) else [size] for size in found)
        return min([self._max_length, *(size for size in sizes if isinstance(size, int) and size > 0)])

    def _laid_out(self, rows: list[_Row]) -> list[_Row]:
        """Split rows with several continuations, unless the model gives the same numbers for them together."""
        longest = max(filter(self._may_share, rows), key=lambda row: row.length, default=None)
        if longest is None or not self._shares_up_to(longest):
            return [single for row in rows for single in _apart(row)]
        return [part for row in rows for part in ([row] if self._may_share(row) else _apart(row))]

    def _may_share(self, row: _Row) -> bool:
        """Return whether a row and its continuations alone lie on one side of every length limit of the model."""
        lengths = [row.length, *(single.length for single in _apart(row))]
        return len(row.requests) > 1 and row.length <= self._window and self._rule.may_share(lengths)

    def _shares_up_to(self, longest: _Row) -> bool:
        """Return whether the layout agrees up to this row's length; a longer row than any before is tried."""
        if self._share_contexts is not None:
            return self._share_contexts
        if self._agrees and longest.length > self._tried:
            trial = _trial(longest)
            self._agrees = self._may_share(trial) and self._agrees_on(trial)
            self._tried = longest.length
        return self._agrees

    def _agrees_on(self, trial: _Row) -> bool:
        """Return whether one row gives the numbers of a row for each continuation; ALiBi and state spaces do not."""
        if "position_ids" not in inspect.signature(self._base.forward).parameters:
            return False
        alone = self._log_p(*_apart(trial))
        first, *others = trial.continuations
        vocabulary = len(self._network.get_input_embeddings().weight)
        changed = tuple((token + 1) % vocabulary for token in first)
        try:
            together = self._log_p(trial)
            after_change = self._log_p(_Row(trial.context, [changed, *others], trial.requests))
        except (RuntimeError, ValueError, TypeError, IndexError):  # the architecture takes no such mask
            return False
        # In bf16 rounding hides a small leak from the comparison with rows of their own, but not from this one: without
        # a leak both passes compute the very same numbers.
        leak = relative_error(after_change[len(first) :], together[len(first) :])
        tolerance = tolerance_of(next(self._network.parameters()).dtype)
        return leak <= min(tolerance, _MAX_LEAK) and relative_error(together, alone) <= tolerance

    def _log_p(self, *rows: _Row) -> Float[Tensor, " token"]:
        """Score rows, each in a pass of its own."""
        scored = {number: found for row in rows for number, found in self._run([row]).items()}
        return torch.cat([scored[number].log_p for number in sorted(scored)])

    # --- Forward passes ---------------------------------------------------------------------------------------------

    def _run(self, rows: list[_Row]) -> dict[int, Scored]:
        length = max(row.length for row in rows)
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        for at, row in enumerate(rows):
            laid_out = [*row.context, *(token for continuation in row.continuations for token in continuation[:-1])]
            tokens[at, : len(laid_out)] = torch.tensor(laid_out)
        arguments: dict[str, Any] = {"input_ids": tokens.to(self._device), "use_cache": False}
        if any(len(row.continuations) > 1 for row in rows):  # other rows need the causal mask only
            positions, may_see = _layout(rows, length)
            dtype = next(self._network.parameters()).dtype
            hidden_from = torch.zeros(may_see.shape, dtype=dtype).masked_fill(~may_see, torch.finfo(dtype).min)
            arguments["position_ids"] = positions.to(self._device)
            arguments["attention_mask"] = hidden_from[:, None].to(self._device)
        if self._rule.remembers:
            forget_longest(self._network)
        return self._read(rows, self._base(**arguments).last_hidden_state)

    def _read(self, rows: list[_Row], final: Float[Tensor, "row pos d"]) -> dict[int, Scored]:
        """Compute logits from the states that predict a continuation's tokens, and from no others."""
        places: list[tuple[int, int]] = []
        continuations = [continuation for row in rows for continuation in row.continuations]
        for at, row in enumerate(rows):
            begin = len(row.context)
            for continuation in row.continuations:
                end = begin + len(continuation) - 1
                places += [(at, place) for place in (len(row.context) - 1, *range(begin, end))]
                begin = end
        rows_at, columns = torch.tensor(places, device=final.device).T
        wanted = torch.tensor([*chain.from_iterable(continuations)], device=final.device)
        states = final[rows_at, columns]
        n_rows = _LOGIT_ROWS.get(final.device.type, 256)
        log_p, greedy = [], []
        for some, of_some in zip(states.split(n_rows), wanted.split(n_rows), strict=True):
            logits = apply_head(self._network, some[None])[0].log_softmax(-1, dtype=torch.float32)
            log_p.append(logits.gather(-1, of_some[:, None])[:, 0])
            greedy.append(logits.argmax(-1) == of_some)
        requests = [number for row in rows for number in row.requests]
        sizes = [*map(len, continuations)]
        parts = zip(torch.cat(log_p).cpu().split(sizes), torch.cat(greedy).cpu().split(sizes), strict=True)
        return {number: Scored(*part) for number, part in zip(requests, parts, strict=True)}


def _apart(row: _Row) -> list[_Row]:
    return [
        _Row(row.context, [continuation], [number])
        for continuation, number in zip(row.continuations, row.requests, strict=True)
    ]


def _trial(row: _Row) -> _Row:
    """Return a row of the same length whose continuations are long enough for the layout to fail."""
    continuations = [
        (*own, *islice(chain.from_iterable(repeat(row.context)), max(0, _TRIED_TOKENS - len(own))))
        for own in row.continuations
    ]
    added = sum(map(len, continuations)) - sum(map(len, row.continuations))
    return _Row(row.context[min(added, len(row.context) - 1) :], continuations, row.requests)


def _layout(rows: list[_Row], length: int) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos pos"]]:
    """Return each token's position in its own text, and what it may see: the context and its own continuation."""
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    part = torch.full((len(rows), length), -1)  # -1 padding, 0 the context, 1... the continuations
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
