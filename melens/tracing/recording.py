"""Record what passes in forward passes: give it to the probes, and bring what they make of it to the CPU.

1. `Recorder.record` takes the activation of a site. Small ones are copied, so that a probe reduces several blocks at
   once (`Probe.by_row`): where a block takes little, a call for each takes longer than the block.
2. What the probes return stays where it is up to a few MiB, and is then copied to the CPU, while the model goes on.
3. `Recorder.recorded` waits for the copies, and lays out each probe's results by site and block, a `Chunk` a batch.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from melens.errors import MelensError
from melens.models.layout import listed
from melens.tracing.probes import Batch, Probe
from melens.tracing.sites import Sites
from melens.validation.signatures import given

__all__ = ["Chunk", "Recorder", "Reduced", "Target", "targets_of"]

_PENDING_BYTES = 8 * 2**20
"""Up to how much a site's activations wait to be reduced together."""

_KEPT_BYTES = 16 * 2**20
"""Up to how much reduced results stay on a GPU."""

Reduced = dict[str, Tensor]
"""What a probe's `reduce` returns."""


@dataclass(slots=True, eq=False)
class Target:
    """One probe at one site of one block; without a hook point it is what attention pays to keys."""

    probe: Probe
    site: str
    layer: int
    hook_point: HookPoint | None


def targets_of(model: TransformerBridge, probe: Probe) -> list[Target]:
    """Return where a probe measures in a model, by site and block.

    Raises:
        MelensError: layers or sites that the model does not have.
    """
    n_layers = len(model.blocks)
    layers = range(n_layers) if probe.layers is None else probe.layers
    if any(not 0 <= layer < n_layers for layer in layers):
        raise MelensError(
            f"The probe {probe.name!r} measures layers {list(layers)}; the model has 0 to {n_layers - 1}."
        )
    found: list[Target] = []
    wanted = {-1, *layers}
    for site in probe.sites:  # one named with its block is wanted whatever the layers are
        everywhere = Sites.of(model).find(site)
        places = [place for place in everywhere if place.layer in wanted or place.site != site]
        if not places:
            has = [place.layer for place in everywhere]
            where = f" in {listed(layers)}; this model has it in {listed(has)}" if has else ", which no block here has"
            raise MelensError(f"The probe {probe.name!r} measures at {site!r}{where}.")
        found += [Target(probe, *place) for place in places]
    return found


@dataclass
class Chunk:
    """One probe's results of one batch.

    Attributes:
        lengths, prompts: as those of the `Batch`.
        places: site and block of each place, in the order of the probe's sites.
    """

    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    places: list[tuple[str, int]]
    _probe: Probe
    _pieces: list[Reduced]
    _order: list[int]

    @property
    def shape(self) -> tuple[int, ...]:
        """What follows place and batch in the first quantity."""
        return tuple(next(iter((self._pieces or [self.quantities])[0].values())).shape[2:])

    @cached_property
    def quantities(self) -> Reduced:
        """The probe's quantities on the CPU, each `[place, batch, *index]`."""
        whole = _joined(self._pieces)
        if self._order != sorted(self._order):
            whole = {name: values[self._order] for name, values in whole.items()}
        quantities = self._probe.complete(dict(whole))
        for name, values in quantities.items():
            _check_dims(self._probe, name, values[0], (len(self.lengths), max(self.lengths)))
        self._pieces.clear()
        return quantities


@dataclass
class _OfProbe:
    """What a probe returned in the batch that runs: by piece the targets, and the results `[place, batch, ...]`."""

    targets: list[Target] = field(default_factory=list)
    kept: list[Reduced] = field(default_factory=list)
    on_cpu: list[Reduced] = field(default_factory=list)


class Recorder:
    """Lets probes reduce what passes, and keeps their results."""

    def __init__(self, probes: Sequence[Probe], expected: list[Target], *, sends: bool = True) -> None:
        """Take the probes, where they measure, and whether what they return goes to the CPU by itself."""
        self.probes, self.expected = probes, expected
        self._sends = sends
        self.forget()

    def forget(self) -> None:
        """Forget what was recorded."""
        self.n_tokens = 0
        self._batch: Batch | None = None
        self._pending: dict[tuple[str, ...], tuple[list[list[Target]], list[Tensor]]] = {}
        self._of_probe: dict[str, _OfProbe] = {}
        self._kept_bytes = 0
        self._devices: set[torch.device] = set()
        self._chunks: dict[str, list[Chunk]] = {probe.name: [] for probe in self.probes}

    @property
    def batch(self) -> Batch:
        """The batch that runs."""
        assert self._batch is not None
        return self._batch

    def begin(self, batch: Batch) -> None:
        self._batch = batch
        self._of_probe = defaultdict(_OfProbe)

    def record(self, targets: Sequence[Target], activation: Tensor) -> None:
        """Take what passes at a site of a block, for all the probes there."""
        together = [target for target in targets if _takes_several(target.probe)]
        for target in targets:
            if not _takes_several(target.probe):
                self._reduce([target], activation, n=1)
        if not together:
            return
        if 2 * activation.nbytes > _PENDING_BYTES:
            self._reduce(together, activation, n=1)
            return
        key = (together[0].site, *(target.probe.name for target in together))
        waiting, activations = self._pending.setdefault(key, ([], []))
        if activations and not _are_alike(activation, activations[0]):
            self._flush(key)
            waiting, activations = self._pending.setdefault(key, ([], []))
        waiting.append(together)
        activations.append(activation.clone())
        if (len(activations) + 1) * activation.nbytes > _PENDING_BYTES:
            self._flush(key)

    def _flush(self, key: tuple[str, ...]) -> None:
        waiting, activations = self._pending.pop(key)
        whole = activations[0] if len(activations) == 1 else torch.cat(activations)
        self._reduce([target for of_probe in zip(*waiting, strict=True) for target in of_probe], whole, len(waiting))

    def _reduce(self, targets: Sequence[Target], activation: Tensor, n: int) -> None:
        """Let each probe reduce an activation of `n` blocks; `targets` has the n of a probe one after the other."""
        batch = self.batch.times(n)
        for start in range(0, len(targets), n):
            first, probe = targets[start], targets[start].probe
            reduced = probe.reduce_at(first.site, first.layer, activation, batch)
            of_probe = self._of_probe[probe.name]
            before = of_probe.targets[0] if of_probe.targets else first
            _check_results(first, reduced, batch.tokens.shape)
            piece = {name: values.unflatten(0, (n, -1)) for name, values in reduced.items()}
            _check_alike(before, first, piece, [*of_probe.kept, *of_probe.on_cpu])
            of_probe.targets += targets[start : start + n]
            of_probe.kept.append(piece)
            self._kept_bytes += sum(values.nbytes for values in piece.values())
        if self._sends and self._kept_bytes > _KEPT_BYTES:
            self._send()

    def _send(self) -> None:
        """Start to copy what is kept to the CPU, one copy a quantity."""
        for of_probe in self._of_probe.values():
            if not of_probe.kept:
                continue
            whole = _joined(of_probe.kept)
            self._devices |= {values.device for values in whole.values()}
            of_probe.on_cpu.append({name: _start_transfer(values) for name, values in whole.items()})
            of_probe.kept.clear()
        self._kept_bytes = 0

    def reduced(self) -> dict[str, tuple[list[Target], Reduced]]:
        """Reduce what waits, and return each probe's targets and results `[place, batch, ...]`, where they are."""
        for key in list(self._pending):
            self._flush(key)
        self._check_each_recorded_once()
        return {name: (of_probe.targets, _joined(of_probe.kept)) for name, of_probe in self._of_probe.items()}

    def take(self, reduced: Mapping[str, tuple[list[Target], Reduced]]) -> None:
        """Take for the batch what another recorder of the same targets has `reduced`."""
        own = {(target.probe.name, target.site, target.layer): target for target in self.expected}
        for name, (targets, results) in reduced.items():
            mine = [own[target.probe.name, target.site, target.layer] for target in targets]
            self._of_probe[name] = _OfProbe(mine, [results])

    def end(self) -> None:
        """End a batch: reduce what waits, and start to copy everything to the CPU."""
        batch = self.batch
        for key in list(self._pending):
            self._flush(key)
        self._check_each_recorded_once()
        self._send()
        for name, of_probe in self._of_probe.items():
            probe = of_probe.targets[0].probe
            at = {id(target): place for place, target in enumerate(of_probe.targets)}
            targets = [target for target in self.expected if target.probe is probe and id(target) in at]
            places = [(target.site, target.layer) for target in targets]
            order = [at[id(target)] for target in targets]
            as_it_is = copy.copy(probe)  # which may be changed before its results are read
            self._chunks[name].append(Chunk(batch.lengths, batch.prompts, places, as_it_is, of_probe.on_cpu, order))
        self.n_tokens += sum(batch.lengths)
        self._batch = None

    def recorded(self) -> dict[str, list[Chunk]]:
        """Wait for the copies, and return each probe's results by batch."""
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        in_order = {name: sorted(chunks, key=_order) for name, chunks in self._chunks.items()}
        return {name: chunks for name, chunks in in_order.items() if chunks}

    def last_equals(self, other: Recorder) -> bool:
        """Tell whether another recorder's last batch gave the same, bit for bit."""
        for each in (self, other):
            each.recorded()  # waits
        own, others = ({name: chunks[-1] for name, chunks in each._chunks.items() if chunks} for each in (self, other))
        return own.keys() == others.keys() and all(
            own[name].places == others[name].places and _are_equal(own[name].quantities, others[name].quantities)
            for name in own
        )

    def _check_each_recorded_once(self) -> None:
        times = Counter(id(target) for of_probe in self._of_probe.values() for target in of_probe.targets)
        for target in self.expected:
            if times[id(target)] > 1 or not (times[id(target)] or target.probe.may_miss):
                raise MelensError(
                    f"The probe {target.probe.name!r} cannot measure {target.site!r} in block {target.layer}: it needs "
                    f"one activation a forward pass, and this model has {times[id(target)]} there."
                )


def _order(chunk: Chunk) -> tuple[int, int]:
    """As batches are put together: by length, then by prompt, whichever of them ran first."""
    return chunk.lengths[0], chunk.prompts[0]


def _joined(pieces: Sequence[Reduced]) -> Reduced:
    """Put a probe's results together, on the device of the first."""
    if len(pieces) == 1:
        return pieces[0]
    return {name: torch.cat([piece[name].to(first.device) for piece in pieces]) for name, first in pieces[0].items()}


def _are_equal(results: Reduced, others: Reduced) -> bool:
    """Tell whether results are the same bit for bit; NaN is NaN."""
    return results.keys() == others.keys() and all(
        values.shape == others[name].shape and bool(torch.isclose(values, others[name], 0, 0, equal_nan=True).all())
        for name, values in results.items()
    )


def _takes_several(probe: Probe) -> bool:
    """Tell whether a probe takes the activations of several blocks at once: if that is said of the `reduce` that runs.

    A class that inherits `by_row` and has another `reduce` does not say so, nor does one that must know the block.
    """
    own = next(kind for kind in type(probe).__mro__ if "by_row" in vars(kind) or "reduce" in vars(kind))
    is_plain = "reduce" not in vars(probe) and getattr(probe.reduce_at, "__func__", None) is Probe.reduce_at
    return is_plain and probe.by_row and "by_row" in vars(own)


def _are_alike(activation: Tensor, other: Tensor) -> bool:
    return (activation.shape, activation.dtype, activation.device) == (other.shape, other.dtype, other.device)


def _start_transfer(values: Tensor) -> Tensor:
    """Bring results to the CPU; from a GPU the copy is complete once the GPU has been waited for."""
    if values.device.type == "cpu":
        return values.clone()  # it may be a part of an activation
    if not values.is_cuda:
        return values.cpu()
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values, non_blocking=True)


def _check_results(target: Target, reduced: object, shape: Sequence[int]) -> None:
    """Raise a `MelensError` where a probe's results are no tensors by name, or not of the dimensions of its index.

    Args:
        shape: number of rows and of positions of the activation's batch.
    """
    probe = target.probe
    named = dict(reduced) if isinstance(reduced, Mapping) else {}
    if not named or not all(isinstance(values, Tensor) for values in named.values()):
        raise MelensError(
            f"The probe {probe.name!r} returns {given(reduced)} at {target.site!r} in block {target.layer}; "
            "its reduce must return a dict of tensors, such as {'norm': norms}."
        )
    if probe.kind == "tensor" and len(named) > 1:
        raise MelensError(
            f"The probe {probe.name!r} of kind 'tensor' returns {', '.join(named)}; it must return one tensor."
        )
    if type(probe).complete is Probe.complete:  # else these are not yet the quantities
        for name, values in named.items():
            _check_dims(probe, name, values, shape)


def _check_dims(probe: Probe, name: str, values: Tensor, shape: Sequence[int]) -> None:
    """Raise a `MelensError` where results `[row, *index]` do not have the dimensions that the probe's index names."""
    n_rows, n_pos = shape
    indexed = dict(zip(probe.index, values.shape[1:], strict=False))
    reaches_over_tokens = indexed.get("pos", n_pos) >= n_pos or probe.kind == "tensor"
    if values.ndim != 1 + len(probe.index) or len(values) != n_rows or not reaches_over_tokens:
        raise MelensError(
            f"The probe {probe.name!r} returns {name!r} of shape {list(values.shape)} for {n_rows} prompts of "
            f"up to {n_pos} tokens; its index {list(probe.index)} must name each dimension after the prompts'."
        )


def _check_alike(first: Target, target: Target, piece: Reduced, before: Sequence[Reduced]) -> None:
    """Raise a `MelensError` where a probe's results cannot lie in one table with those before."""
    for name, values in piece.items() if before else ():
        if before[0][name].shape[1:] != values.shape[1:]:
            raise MelensError(
                f"The probe {target.probe.name!r} returns {name!r} of shape {list(before[0][name].shape[1:])} at "
                f"{first.site!r} in block {first.layer} and of shape {list(values.shape[1:])} at {target.site!r} in "
                f"block {target.layer}: trace these sites with a probe each."
            )
