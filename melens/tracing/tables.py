"""What the probes of a trace recorded, as tidy tables: laid out when somebody first asks, since many are never read.

`Tables` and `Tensors` are mappings by probe. `Grid` is the same as arrays `[place, prompt, *index]`, which is what
whoever computes with many prompts reads: a table of 500 prompts has a million rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from melens.errors import MelensError
from melens.printing import Brief
from melens.tracing.probes import Probe
from melens.tracing.recording import Chunk

__all__ = ["Grid", "Tables", "Tensors", "grids_of"]

_Made = TypeVar("_Made")


@dataclass(frozen=True, repr=False)
class Grid(Brief):
    """A probe's quantities of some prompts, as arrays.

    Attributes:
        prompts, lengths: of each prompt its row among the trace's and its number of tokens.
        places: site and block of each place.
        quantities: by name, `[place, prompt, *index]`; behind the end of a shorter prompt they mean nothing.
    """

    prompts: np.ndarray
    lengths: np.ndarray
    places: list[tuple[str, int]]
    quantities: Mapping[str, np.ndarray]

    def at(self, quantity: str, site: str) -> tuple[list[int], np.ndarray]:
        """Return the blocks that have a site, in order, and the quantity there."""
        found = sorted((layer, place) for place, (own, layer) in enumerate(self.places) if own == site)
        places = [place for _, place in found]
        if not places:
            return [], self.quantities[quantity][:0]
        together = slice(places[0], places[-1] + 1) if places == list(range(places[0], places[-1] + 1)) else places
        return [layer for layer, _ in found], self.quantities[quantity][together]


class _Lazy(Mapping[str, _Made]):
    """Values by probe, each made when it is first asked for."""

    def __init__(self, make: Mapping[str, Callable[[], _Made]]) -> None:
        self._make = make
        self._made: dict[str, _Made] = {}

    def __getitem__(self, probe: str) -> _Made:
        if probe not in self._made:
            self._made[probe] = self._make[probe]()
        return self._made[probe]

    def __contains__(self, probe: object) -> bool:  # `Mapping`'s would make it
        return probe in self._make

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


class Tables(_Lazy[pd.DataFrame]):
    """The tables of a trace by probe."""

    def __init__(self, recorded: Mapping[str, list[Chunk]], probes: Sequence[Probe]) -> None:
        kept = [copy.copy(probe) for probe in probes if probe.name in recorded]  # they may change
        self._recorded = {probe.name: recorded[probe.name] for probe in kept}
        super().__init__({probe.name: partial(self._table, probe) for probe in kept})

    def grids(self, probe: str) -> list[Grid]:
        """Return a probe's quantities as arrays, by batch."""
        return [
            Grid(np.asarray(chunk.prompts), np.asarray(chunk.lengths), chunk.places, _arrays(chunk))
            for chunk in self._recorded[probe]
        ]

    def _table(self, probe: Probe) -> pd.DataFrame:
        chunks = self._recorded[probe.name]
        sites = list(dict.fromkeys(site for chunk in chunks for site, _ in chunk.places))
        columns = _tidy(chunks, probe.index, sites)
        if (np.diff(columns["prompt"]) < 0).any():  # batches are put together by length
            order = np.argsort(columns["prompt"], kind="stable")
            columns = {name: values[order] for name, values in columns.items()}
        of_site: Any = pd.Categorical.from_codes(columns["site"], categories=pd.Index(sites), validate=False)
        return pd.DataFrame(columns | {"site": of_site}, copy=False)


class Tensors(_Lazy[Tensor]):
    """The tensors of a trace by probe."""

    def __init__(self, recorded: Mapping[str, list[Chunk]], probes: Sequence[Probe], n_prompts: int) -> None:
        made = {}
        for probe in probes:
            if probe.name in recorded:
                _check_one_length(probe, recorded[probe.name])
                made[probe.name] = partial(_tensor, recorded[probe.name], n_prompts)
        super().__init__(made)


def _check_one_length(probe: Probe, chunks: Sequence[Chunk]) -> None:
    shapes = {tuple(chunk.shape) for chunk in chunks}
    if len(shapes) > 1:
        raise MelensError(f"The probe {probe.name!r} takes prompts of one length: its results lie in one tensor.")


def _tensor(chunks: Sequence[Chunk], n_prompts: int) -> Tensor:
    """Put a probe's batches together to float32 `[prompt, layer, *index]`."""
    (name,) = chunks[0].quantities
    first = chunks[0].quantities[name]
    whole = torch.full((n_prompts, first.shape[0], *first.shape[2:]), float("nan"))
    for chunk in chunks:
        whole[list(chunk.prompts)] = chunk.quantities[name].float().transpose(0, 1)
    return whole


def _arrays(chunk: Chunk) -> dict[str, np.ndarray]:
    return {
        name: (values.float() if values.is_floating_point() else values).numpy()
        for name, values in chunk.quantities.items()
    }


def _tidy(chunks: Sequence[Chunk], index: tuple[str, ...], sites: list[str]) -> dict[str, np.ndarray]:
    """Lay `[place, batch, *index]` arrays out as columns, without the rows of padded positions."""
    laid_out = [_broadcast(chunk, index, sites) for chunk in chunks]
    n_rows = [next(iter(columns.values())).size if real is None else int(real.sum()) for columns, real in laid_out]
    tidy = {name: np.empty(sum(n_rows), dtype=values.dtype) for name, values in laid_out[0][0].items()}
    start = 0
    for (columns, real), n in zip(laid_out, n_rows, strict=True):
        for name, values in columns.items():
            if real is None:
                tidy[name][start : start + n].reshape(values.shape)[...] = values
            else:
                tidy[name][start : start + n] = values[real]
        start += n
    return tidy


def _broadcast(
    chunk: Chunk, index: tuple[str, ...], sites: list[str]
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Give every column the shape of the quantities, and tell which entries are no padding; None where all are."""
    quantities = _arrays(chunk)
    shape = next(iter(quantities.values())).shape
    axes: dict[str, tuple[int, np.ndarray]] = {
        "prompt": (1, np.asarray(chunk.prompts, dtype=np.int32)),
        "layer": (0, np.asarray([layer for _, layer in chunk.places], dtype=np.int32)),
        "site": (0, np.asarray([sites.index(site) for site, _ in chunk.places], dtype=np.int8)),
        **{name: (2 + i, np.arange(shape[2 + i], dtype=np.int32)) for i, name in enumerate(index)},
    }
    columns = {name: np.broadcast_to(_along(values, axis, len(shape)), shape) for name, (axis, values) in axes.items()}
    is_padded = "pos" in index and min(chunk.lengths) < shape[axes["pos"][0]]
    real = columns["pos"] < _along(np.asarray(chunk.lengths), 1, len(shape)) if is_padded else None
    return columns | quantities, real


def _along(values: np.ndarray, axis: int, n_axes: int) -> np.ndarray:
    return values.reshape([-1 if i == axis else 1 for i in range(n_axes)])


def grids_of(table: pd.DataFrame, lengths: Sequence[int], index: str | None) -> list[Grid]:
    """Turn a tidy table into arrays, a grid a prompt; of positions only the places that have a row for each.

    Args:
        lengths: of each prompt, in tokens.
        index: the column that counts along a third dimension; None without one.
    """
    names = [str(name) for name in table if name not in ("prompt", "layer", "site", index)]
    grids = []
    for prompt in sorted(set(table["prompt"])):
        rows = table[table["prompt"] == prompt]
        at_place, places = pd.MultiIndex.from_arrays([rows["site"].astype(str), rows["layer"]]).factorize()
        if index is None:
            at = np.zeros(len(rows), dtype=int)
        else:
            at = (rows[index] if index in rows else rows.groupby(at_place).cumcount()).to_numpy()
        quantities = {}
        for name in names:
            values = rows[name].to_numpy()
            missing = np.nan if values.dtype.kind == "f" else -1
            whole = np.full((len(places), 1, int(at.max()) + 1), missing, dtype=values.dtype)
            whole[at_place, 0, at] = values
            quantities[name] = whole if index else whole[..., 0]
        is_whole = np.ones(len(places), dtype=bool)
        if index == "pos":
            is_whole = np.bincount(at_place, minlength=len(places)) == lengths[prompt]
        found = [(str(site), int(layer)) for (site, layer), whole in zip(places, is_whole, strict=True) if whole]
        kept = {name: values[is_whole] for name, values in quantities.items()}
        grids.append(Grid(np.asarray([prompt]), np.asarray([lengths[prompt]]), found, kept))
    return grids
