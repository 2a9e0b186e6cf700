"""What attention pays to keys, read off a block's attention without its S × S pattern, or from the pattern.

Whoever wants it is handed an `Attended` for each block and forward pass and reads what is needed: the attention on a
few keys by query, or on every key summed over the queries. From queries, keys and each query's log-sum-exp, which a
fused kernel returns, the attention on key j is `exp(q·k_j·scale - logsumexp)`: exact, in memory linear in the sequence.
Of attention that is not softmax (`melens.models.attention_kinds`) whole rows are computed anew, a few at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from melens.analysis.metrics import has_triton
from melens.models.attention_kinds import WEIGHTS
from melens.printing import Brief

__all__ = ["Attended", "FromPattern", "FromScores", "FromWeights", "attention_scores", "chunks_of"]

_CHUNK_BYTES = 64 * 2**20  # what the scores of one chunk of queries may take
_MOST_ROWS = 128  # of a chunk whose columns are summed: of more, half would be keys behind the query


@dataclass(frozen=True, eq=False, repr=False)
class FromScores(Brief):
    """The attention of whole sequences by its scores; `logsumexp` has a learned sink's share in it.

    The arguments are as for `melens.tracing.attention.causal_attention`.
    """

    query: Float[Tensor, "batch head pos d_head"]
    key: Float[Tensor, "batch kv_head pos d_head"]
    logsumexp: Float[Tensor, "batch head pos"]
    scale: float
    window: int | None = None
    softcap: float | None = None
    mask: Tensor | None = None

    def on_keys(self, keys: Sequence[int]) -> Float[Tensor, "batch head query key"]:
        """Return each query's attention on some keys in float32, 0 where it does not see the key or there is none."""
        within = [position for position in keys if position < self.query.shape[2]]
        if not within:
            on_keys = self.logsumexp.new_empty((*self.logsumexp.shape, 0), dtype=torch.float32)
        elif self._is_plain_on_gpu:
            from melens.tracing.kernels import on_keys as on_keys_kernel

            on_keys = on_keys_kernel(self.query, self.key, self.logsumexp, within, self.scale, self.window)
        else:
            scores = self._scores(slice(None), within)
            on_keys = scores.sub_(self.logsumexp[..., None]).exp_()
        return _missing_as_zero(on_keys, keys, self.query.shape[2])

    def by_key(self, n_tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch head key 2"]:
        """Return the attention on every key, summed over the first `n_tokens` queries, and how many of them see it."""
        n_tokens = n_tokens.to(self.query.device)
        if self._is_plain_on_gpu:
            from melens.tracing.kernels import by_key

            return by_key(self.query, self.key, self.logsumexp, n_tokens, self.scale, self.window)
        batch, n_heads, n_pos, _ = self.query.shape
        found = self.query.new_zeros((batch, n_heads, n_pos, 2), dtype=torch.float32)
        unseen = float("-inf")
        if self.mask is not None and self.mask.dtype != torch.bool:  # one that adds the dtype's lowest number
            unseen = torch.finfo(self.mask.dtype).min / 2
        is_token = torch.arange(n_pos, device=self.query.device) < n_tokens[:, None]
        for rows, columns in chunks_of(self.query, self.window, sees_ahead=self.mask is not None, most=_MOST_ROWS):
            scores = self._scores(rows, columns)
            counted = is_token[:, None, rows, None]
            found[:, :, columns, 1] += ((scores > unseen) & counted).sum(2)
            paid = scores.sub_(self.logsumexp[:, :, rows, None]).exp_()
            found[:, :, columns, 0] += paid.masked_fill_(~counted, 0).sum(2)
        return found

    @property
    def _is_plain_on_gpu(self) -> bool:
        return self.softcap is None and self.mask is None and self.query.is_cuda and has_triton()

    def _scores(self, rows: slice, columns: slice | list[int]) -> Float[Tensor, "batch head row column"]:
        options: dict[str, Any] = {
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
            "mask": self.mask,
        }
        return attention_scores(self.query, self.key, rows, columns, **options)


@dataclass(frozen=True, eq=False, repr=False)
class FromWeights(Brief):
    """The attention of whole sequences that is not softmax, row by row; its methods do what `FromScores`'s do.

    The arguments are as for `melens.tracing.attention.causal_attention`.
    """

    query: Float[Tensor, "batch head pos d_head"]
    key: Float[Tensor, "batch kv_head pos d_head"]
    kind: str
    scale: float
    window: int | None = None
    softcap: float | None = None
    mask: Tensor | None = None

    def on_keys(self, keys: Sequence[int]) -> Float[Tensor, "batch head query key"]:
        within = [position for position in keys if position < self.query.shape[2]]
        found = self.query.new_zeros((*self.query.shape[:3], len(within)), dtype=torch.float32)
        for rows, columns, _, paid in self._rows():
            inside = [(at, position) for at, position in enumerate(within) if columns.start <= position < columns.stop]
            for at, position in inside:
                found[:, :, rows, at] = paid[..., position - columns.start]
        return _missing_as_zero(found, keys, self.query.shape[2])

    def by_key(self, n_tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch head key 2"]:
        batch, n_heads, n_pos, _ = self.query.shape
        found = self.query.new_zeros((batch, n_heads, n_pos, 2), dtype=torch.float32)
        is_token = torch.arange(n_pos, device=self.query.device) < n_tokens.to(self.query.device)[:, None]
        for rows, columns, scores, paid in self._rows(_MOST_ROWS):
            counted = is_token[:, None, rows, None]
            found[:, :, columns, 1] += ((scores > torch.finfo(scores.dtype).min / 2) & counted).sum(2)
            found[:, :, columns, 0] += paid.masked_fill(~counted, 0).sum(2)
        return found

    def _rows(self, most: int | None = None) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yield a few queries, the keys around those that they see, and their scores and weights."""
        options: dict[str, Any] = {
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
            "mask": self.mask,
        }
        for rows, columns in chunks_of(self.query, self.window, sees_ahead=self.mask is not None, most=most):
            scores = attention_scores(self.query, self.key, rows, columns, **options)
            yield rows, columns, scores, WEIGHTS[self.kind](scores)


@dataclass(frozen=True, eq=False, repr=False)
class FromPattern(Brief):
    """The attention of whole sequences by a pattern that was computed anyway; its methods do what `FromScores`'s do.

    `window` tells which queries see a key where the pattern cannot, since it may pay nothing to a key that is seen: as
    for `melens.tracing.attention.causal_attention`, 0 where all that is seen is paid to.
    """

    pattern: Float[Tensor, "batch head query key"]
    window: int | None = 0

    def on_keys(self, keys: Sequence[int]) -> Float[Tensor, "batch head query key"]:
        within = [position for position in keys if position < self.pattern.shape[-1]]
        return _missing_as_zero(self.pattern[..., within].float(), keys, self.pattern.shape[-1])

    def by_key(self, n_tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch head key 2"]:
        at = torch.arange(self.pattern.shape[-1], device=self.pattern.device)
        n_tokens = n_tokens.to(at.device)[:, None]
        paid = self.pattern.float().masked_fill((at >= n_tokens)[:, None, :, None], 0).sum(2)
        if self.window != 0:
            seen_by = ((at + (self.window or len(at))).clamp(max=n_tokens) - at).clamp(min=0)
            return torch.stack([paid, seen_by[:, None].expand(paid.shape).float()], dim=-1)
        # Which queries see a key is not told: all from the first to the last that pays to it in any head and prompt.
        pays = (self.pattern > 0).any(1).any(0).int()
        first, last = pays.argmax(0), at.max() - pays.flip(0).argmax(0)
        seen_by = ((last + 1).clamp(max=n_tokens) - first).clamp(min=0)
        return torch.stack([paid, seen_by[:, None].expand(paid.shape).float()], dim=-1)


Attended = FromScores | FromWeights | FromPattern


def attention_scores(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    rows: slice,
    columns: slice | list[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Float[Tensor, "batch head row column"]:
    """Compute the scores of some queries on some keys in float32, -inf where a query does not see the key.

    A bf16 score of 20 is off by 0.06, its exponential by 6%. The other arguments are as for `causal_attention`.
    """
    grouped = rearrange(query[..., rows, :], "b (kv group) pos d -> b kv group pos d", kv=key.shape[1])
    scores = (grouped.float() @ key[:, :, None, columns].float().transpose(-1, -2)) * scale
    scores = rearrange(scores, "b kv group query key -> b (kv group) query key")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        seen = mask[..., rows, columns]
        return scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen
    positions = torch.arange(query.shape[2], device=query.device)
    distance = positions[rows, None] - positions[None, columns]
    sees = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return scores.masked_fill(~sees, float("-inf"))


def chunks_of(
    query: Float[Tensor, "batch head pos d_head"], window: int | None, *, sees_ahead: bool, most: int | None = None
) -> Iterator[tuple[slice, slice]]:
    """Yield a few queries at a time, and the keys that they see; all from the window on where a mask decides that.

    At most `most` queries: the fewer, the fewer keys behind them are computed for nothing.
    """
    batch, n_heads, n_pos, _ = query.shape
    span = n_pos if window is None else min(2 * window, n_pos)
    rows = max(1, _CHUNK_BYTES // (4 * batch * n_heads * span))
    rows = min(rows, n_pos if window is None else window, most or n_pos)
    for start in range(0, n_pos, rows):
        stop = min(start + rows, n_pos)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, stop), slice(first, n_pos if sees_ahead else stop)


def _missing_as_zero(
    on_keys: Float[Tensor, "batch head query within"], keys: Sequence[int], n_pos: int
) -> Float[Tensor, "batch head query key"]:
    if on_keys.shape[-1] == len(keys):
        return on_keys
    whole = on_keys.new_zeros((*on_keys.shape[:-1], len(keys)))
    whole[..., [column for column, position in enumerate(keys) if position < n_pos]] = on_keys
    return whole
