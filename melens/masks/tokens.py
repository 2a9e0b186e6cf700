"""Which tokens of each forward call a mask is for, as the call's arguments tell.

Token 0 is the first that is no padding, at its absolute position: padding on either side, a prompt fed in chunks and
decoding with a cache lead to the same states as the bare prompt without a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from melens.errors import MelensError

__all__ = ["Call", "TokenFinder"]


class Call:
    """What a mask does in one forward call. (No dataclass: FSDP copies those that it finds among a block's arguments.)

    Attributes:
        where: index of the tokens into `[batch, pos]`; None masks nothing.
        detect: find massive tokens in what enters the first masked block, among `real` ones (None: all are).
        n_tokens: how many tokens a row has in this call; None where `where` is for whatever a block gets.
        masked: the blocks that have been masked so far.
    """

    def __init__(
        self,
        where: tuple[Any, ...] | None = None,
        *,
        detect: bool = False,
        real: Bool[Tensor, "batch pos"] | None = None,
        n_tokens: int | None = None,
    ) -> None:
        self.where, self.detect, self.real, self.n_tokens = where, detect, real, n_tokens
        self.masked: set[int] = set()

    def n_left_out(self, hidden: Float[Tensor, "batch pos d"]) -> int:
        """Tell how many tokens a block is not given: with shared keys and values it may get the last few alone.

        Raises:
            MelensError: a hidden state of another form, in which token 0 cannot be found.
        """
        if self.n_tokens is None:
            return 0
        if hidden.ndim != 3 or hidden.shape[1] > self.n_tokens:
            raise MelensError(
                f"A masked block gets a hidden state of shape {list(hidden.shape)} for {self.n_tokens} tokens: a "
                "WeMask cannot tell token 0 in it."
            )
        return self.n_tokens - hidden.shape[1]

    def where_in(self, hidden: Float[Tensor, "batch pos d"]) -> tuple[Any, ...] | None:
        """Index the tokens in what a block is given; None where it is given none of them."""
        left_out = self.n_left_out(hidden)
        if self.where is None or len(self.where) == 1:  # none, or all
            return self.where
        rows, columns = self.where
        if isinstance(columns, int):
            return (rows, columns - left_out) if columns >= left_out else None
        rows, columns = rows.to(hidden.device), columns.to(hidden.device)  # of a model on several GPUs
        if left_out == 0:  # without waiting for the GPU
            return rows, columns
        given = columns >= left_out
        return (rows[given], columns[given] - left_out) if given.any() else None


class TokenFinder:
    """Finds the tokens that a mask is for in each forward call of a model.

    Attributes:
        detects: whether they only show in what enters the first masked block.
    """

    def __init__(self, positions: str | Sequence[int], *, caches_by_default: bool = True) -> None:
        """Take the `positions` of a `WeMask`, and whether the model makes a cache if a call does not say."""
        self.detects = positions == "massive"
        self._positions = positions
        self._caches_by_default = caches_by_default
        self._offsets = [0] if isinstance(positions, str) else sorted(positions)
        self._started: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def find(self, arguments: Mapping[str, Any]) -> Call:
        """Read from the arguments of a model's forward call which of its tokens are masked.

        Raises:
            MelensError: an attention mask that does not tell where the sequences begin.
        """
        inputs = arguments.get("input_ids")
        inputs = arguments.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            raise MelensError("A masked model needs input_ids or inputs_embeds.")
        n_rows, n_tokens = inputs.shape[:2]
        cache = _cache_among(arguments)
        past = 0 if cache is None else int(cache.get_seq_length())
        if self._positions == "all":
            return Call((slice(None),))
        if self._positions == "every_call":
            return Call((slice(None), 0))
        mask = arguments.get("attention_mask")
        if self.detects:
            is_decoding = past > 0 and n_tokens == 1
            keys = None if is_decoding else _real_keys(mask)
            real = None if keys is None else keys[:, past : past + n_tokens]
            return Call(detect=not is_decoding, real=real, n_tokens=n_tokens)
        if past > 0 and past > self._started.get(cache, past) + self._offsets[-1]:
            return Call()
        use_cache = arguments.get("use_cache")
        has_cache = cache is not None or (self._caches_by_default if use_cache is None else use_cache)
        position_ids = None if has_cache else arguments.get("position_ids")  # with a cache nothing is packed
        starts = _starts(mask, position_ids, n_rows, n_tokens, past)
        if cache is not None and all(starts):
            self._started[cache] = max(max(of_row) for of_row in starts)
        return Call(self._places(starts, n_tokens, past, inputs.device), n_tokens=n_tokens)

    def _places(
        self, starts: Sequence[Sequence[int]], n_tokens: int, past: int, device: torch.device
    ) -> tuple[Any, ...] | None:
        columns = [
            [
                start + offset - past
                for start, end in zip(of_row, [*of_row[1:], past + n_tokens], strict=False)
                for offset in self._offsets
                if past <= start + offset < end
            ]
            for of_row in starts
        ]
        if not any(columns):
            return None
        if len(columns[0]) == 1 and all(of_row == columns[0] for of_row in columns):
            return (slice(None), columns[0][0])
        rows = [row for row, of_row in enumerate(columns) for _ in of_row]
        flat = [column for of_row in columns for column in of_row]
        return (torch.tensor(rows, device=device), torch.tensor(flat, device=device))


def _cache_among(arguments: Mapping[str, Any]) -> Any:
    """Return the cache of keys and values that a forward call is given, by whatever name; None without one.

    (It is `cache` since transformers 5.24, and was `past_key_values`, `cache_params` or `layer_past` before.)

    Raises:
        MelensError: a cache that does not tell how many tokens it holds.
    """
    caches = [given for given in arguments.values() if hasattr(given, "get_seq_length")]
    if caches:
        return caches[0]
    unknown = [name for name in _CACHE_NAMES if arguments.get(name) is not None]
    if unknown:
        kind = type(arguments[unknown[0]]).__name__
        raise MelensError(f"A WeMask cannot read a cache of type {kind} ({unknown[0]}): give a transformers Cache.")
    return None


_CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "cache_params", "layer_past", "state")


def _real_keys(mask: Any) -> Bool[Tensor, "batch key"] | None:
    """Read from an attention mask of whatever form which keys are no padding; None if all are."""
    if isinstance(mask, Mapping):  # by type of block
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask != 0
    if isinstance(mask, Tensor) and mask.ndim == 4:
        may_attend = mask if mask.dtype == torch.bool else mask >= 0
        return may_attend.any(dim=(1, 2))
    raise MelensError(
        "A WeMask cannot read from an attention mask of this form where the sequences begin: give the tokenizer's "
        "[batch, pos] mask."
    )


def _starts(mask: Any, position_ids: Any, n_rows: int, n_tokens: int, past: int) -> list[list[int]]:
    """Find where each row's sequences begin, counted from the first token in the cache; nothing for padding alone."""
    keys = _real_keys(mask)
    if keys is not None:
        if keys.shape[1] < past + n_tokens:
            raise MelensError(
                f"The attention mask is for {keys.shape[1]} tokens, but with the cache there are {past + n_tokens}."
            )
        first = torch.where(keys.any(dim=1), keys.int().argmax(dim=1), -1).expand(n_rows).tolist()
        return [[start] if start >= 0 else [] for start in first]
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2:  # perhaps several packed into a row
        begins = torch.ones_like(position_ids, dtype=torch.bool)
        begins[:, 1:] = position_ids.diff(dim=-1) != 1
        packed = [of_row.nonzero().flatten().tolist() for of_row in begins.cpu()]
        return packed if len(packed) == n_rows else packed * n_rows
    return [[0] for _ in range(n_rows)]
