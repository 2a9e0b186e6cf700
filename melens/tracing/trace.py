"""One forward pass a batch, every probe fed from it: `trace(model, prompts, probes) -> Trace`."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import InstanceOf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from melens.data.prompts import Prompt, TokenizedPrompts, check_length, tokenize
from melens.errors import MelensError
from melens.models.layout import listed
from melens.models.quantization import describe_quantization
from melens.models.view import base_of
from melens.storage.files import atomic_folder
from melens.tracing.batching import forget_longest
from melens.tracing.probes import AbsMedian, Batch, LargestActivations, Norms, Probe, SinkMass, TokenVectors
from melens.tracing.sites import Sites
from melens.tracing.twin import Way, is_hooked, running
from melens.tracing.verification import Verification, verified
from melens.validation.arguments import BosOrNot, Bridge, Probes, Prompts, check_vocabulary
from melens.validation.signatures import Folder, checked, given
from melens.validation.types import Count, Number, Said

__all__ = ["Progress", "Trace", "TraceGiven", "as_tokens", "default_probes", "trace"]

Progress = Callable[[int, int], None]
"""Called as `progress(tokens_done, tokens_in_all)` after each batch."""


@dataclass(frozen=True)
class Trace:
    """What the probes saw: plain tidy data.

    Attributes:
        model: name, architecture, n_layers, d_model, n_heads, dtype, quantization (None for plain weights), device, and
            `verified`: how far a trace of this kind of model agrees with transformers (`melens.verify`).
        prompts: a row a prompt: `prompt`, `id`, `task`, `n_tokens`, `first_token`, `first_token_id`.
        tables: by probe, a row for each prompt, layer, site and whatever the probe's index runs over. `layer` is the
            0-based block, -1 outside the blocks.
        tensors: by probe, `[prompt, layer, *index]`.
    """

    model: dict[str, Any]
    prompts: pd.DataFrame
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, probe: Any) -> pd.DataFrame:
        """Return the table of a probe; a `MelensError` names the probes of this trace if it is not among them."""
        if not isinstance(probe, str) or probe not in self.tables:
            has = [*sorted(self.tables), *(f"trace.tensors[{name!r}]" for name in sorted(self.tensors))]
            raise MelensError(f"The trace has no table {given(probe)}; it has {', '.join(has) or 'none'}.")
        return self.tables[probe]

    @checked
    def save(self, folder: Folder, *, replace: bool = True) -> Path:
        """Write the trace as a folder of parquet tables, safetensors and JSON, which is whole or not there.

        Args:
            replace: where a saved trace is there, put this one in its place; else that one stays.

        Raises:
            MelensError: a folder that holds anything but a saved trace.
            OSError: a folder that cannot be written to.
        """
        folder = Path(folder).resolve()
        _check_replaceable(folder)
        with atomic_folder(folder, replace=replace) as partial:
            self.prompts.to_parquet(partial / "prompts.parquet")
            for name, table in self.tables.items():
                table.to_parquet(partial / f"{name}.table.parquet")
            tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
            save_file(tensors, partial / "tensors.safetensors")
            (partial / "model.json").write_text(json.dumps(self.model, indent=2), "utf-8")
            files = sorted(path.name for path in partial.iterdir())
            (partial / _MARK).write_text(json.dumps({"written_by": _WRITER, "files": files}, indent=2), "utf-8")
        return folder

    @classmethod
    @checked
    def load(cls, folder: Folder) -> Trace:
        """Read what `save` wrote."""
        folder = Path(folder)
        if not (folder / "model.json").is_file():
            raise MelensError(f"{folder} holds no saved trace (it has no model.json).")
        tables = {path.name.removesuffix(".table.parquet"): path for path in sorted(folder.glob("*.table.parquet"))}
        return cls(
            model=json.loads((folder / "model.json").read_text("utf-8")),
            prompts=pd.read_parquet(folder / "prompts.parquet"),
            tables={name: pd.read_parquet(path) for name, path in tables.items()},
            tensors=load_file(folder / "tensors.safetensors"),
        )


TraceGiven = Annotated[Trace, InstanceOf(), Said("a Trace: melens.trace(model, prompts) returns one")]

_MARK, _WRITER = "melens_trace.json", "melens.Trace.save"
"""The file in the folder of a saved trace that lists the trace's files, and the writer that it names."""


def _check_replaceable(folder: Path) -> None:
    """Raise a `MelensError` for a folder with files in it that no `Trace.save` wrote."""
    if folder.exists() and not folder.is_dir():
        raise MelensError(f"A trace is saved in a folder, and {folder} is a file: give another name.")
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if others := sorted(there - _files_of_trace(folder)):
        raise MelensError(
            f"{folder} holds {others[0]!r}, which is no part of a saved trace, so it is not replaced: save into "
            "another folder."
        )


def _files_of_trace(folder: Path) -> set[str]:
    try:
        mark = json.loads((folder / _MARK).read_text("utf-8"))
        return {_MARK, *mark["files"]} if mark["written_by"] == _WRITER else set()
    except (OSError, ValueError, LookupError, TypeError):  # it is not there, or somebody else's
        return set()


@checked
def trace(
    model: Bridge,
    prompts: Prompts,
    probes: Probes = None,
    *,
    bos: BosOrNot = "auto",
    max_batch_tokens: Count = 4096,
    progress: Progress | None = None,
) -> Trace:
    """Run the prompts through the model once and let every probe reduce the activations as they pass.

    Hooks that are already on the model stay and take effect. Whatever happens, the model is left as it was.

    Args:
        model: a bridge of a causal language model.
        prompts: texts, or the token ids of each (a list, array or tensor `[pos]`); one prompt needs no list.
        probes: what to measure; by default all that `find_me_layer` needs, as far as the model has it.
        bos: whether to prepend BOS to texts: `"auto"` does as the model's own tokenizer.
        max_batch_tokens: prompts of similar length share a forward pass up to this many tokens, padding included, where
            each then gets the numbers that it has alone (`melens.tracing.batching`).
        progress: called after each batch.

    Raises:
        MelensError: what is no bridge, prompt or probe; an empty, too short or too long prompt, a token id outside the
            vocabulary, two probes of one name, a site the model does not have, a probe's result of other dimensions
            than its index names, or a model on which no way to run it agrees with transformers (`melens.verify`).
    """
    probes = default_probes(model) if probes is None else list(probes)
    names = [probe.name for probe in probes]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise MelensError(f"Two probes have the name {twice!r}: give one another, probe.named('{twice}_2').")
    given_prompts = as_tokens(model, prompts, bos)
    tokens = given_prompts.tokens
    for probe in probes:
        if probe.keys and max(probe.keys) >= (longest := max(map(len, tokens))):
            raise MelensError(
                f"The probe {probe.name!r} asks for the key at position {max(probe.keys)}; the longest prompt has "
                f"{longest} tokens."
            )
    recorder = _Recorder(probes, [target for probe in probes for target in _targets(model, probe)])
    verification = verified(model, [site for probe in probes for site in probe.sites])
    total, rule = sum(map(len, tokens)), verification.rule
    groups = rule.groups([len(ids) for ids in tokens], max_batch_tokens=max_batch_tokens)
    with torch.no_grad():
        with _recording(model, recorder, verification.way) as network:
            for rows in groups:
                padded = torch.nn.utils.rnn.pad_sequence([tokens[row] for row in rows], batch_first=True)
                lengths = tuple(len(tokens[row]) for row in rows)
                batch = Batch(padded.to(model.cfg.device), lengths, tuple(rows))
                recorder.begin(batch)
                if rule.remembers:
                    forget_longest(network)
                if progress is not None:
                    progress(recorder.n_tokens, total)
                network(input_ids=batch.tokens, use_cache=False)
            described = _describe(model, verification), _describe_prompts(model, given_prompts)  # while a GPU computes
        recorder.end()
    if progress is not None:
        progress(recorder.n_tokens, total)
    recorded = [probe for probe in probes if recorder.has(probe)]
    tables = {probe.name: partial(recorder.table, probe) for probe in recorded if probe.kind == "table"}
    tensors = {probe.name: recorder.tensor(probe, len(tokens)) for probe in recorded if probe.kind == "tensor"}
    return Trace(*described, _Tables(tables), tensors)


@checked
def default_probes(model: Bridge, *, min_abs: Number = 100) -> list[Probe]:
    """Return what `find_me_layer` and the emergence figures need, as far as the model has it.

    A parallel block has no `ln2`, a state-space block no attention. Every token with an entry over `min_abs`, the
    criterion's, is kept.
    """
    sites = Sites.of(model)
    probes: list[Probe] = [Norms(), LargestActivations(min_abs=min_abs), AbsMedian(), TokenVectors(), SinkMass()]
    for probe in probes:
        probe.may_miss = True
        probe.sites = tuple(site for site in probe.sites if sites.find(site))
    return [probe for probe in probes if probe.sites]


class _Tables(Mapping[str, pd.DataFrame]):
    """Tables by probe, each laid out when it is first asked for."""

    def __init__(self, make: Mapping[str, Callable[[], pd.DataFrame]]):
        self._make = make
        self._made: dict[str, pd.DataFrame] = {}

    def __getitem__(self, probe: str) -> pd.DataFrame:
        if probe not in self._made:
            self._made[probe] = self._make[probe]()
        return self._made[probe]

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


def as_tokens(model: TransformerBridge, prompts: Any, bos: BosOrNot = "auto") -> TokenizedPrompts:
    """Turn prompts, as `Prompts` lists them, into tokens, which are checked against context and vocabulary."""
    if isinstance(prompts, TokenizedPrompts):
        return prompts
    if isinstance(prompts[0], Prompt):
        return TokenizedPrompts(prompts, [torch.tensor(ids) for ids in tokenize(model, prompts, bos=bos)])
    for number, ids in enumerate(prompts):
        check_length(len(ids), f"number {number}", model.cfg.n_ctx)
        check_vocabulary(model, ids, number)
    return TokenizedPrompts([Prompt(text="") for _ in prompts], prompts)


def _describe_prompts(model: TransformerBridge, prompts: TokenizedPrompts) -> pd.DataFrame:
    texts, tokens = prompts.prompts, prompts.tokens
    tokenizer, firsts = model.tokenizer, [int(ids[0]) for ids in tokens]
    return pd.DataFrame(
        {
            "prompt": np.arange(len(tokens), dtype=np.int32),
            "id": [prompt.id or str(row) for row, prompt in enumerate(texts)],
            "task": [prompt.task for prompt in texts],
            "n_tokens": [len(ids) for ids in tokens],
            "first_token": [str(first) if tokenizer is None else tokenizer.decode([first]) for first in firsts],
            "first_token_id": firsts,
        }
    )


# --- What to record ---------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Target:
    """One probe at one site of one block; without a hook point it is the attention on the probe's keys."""

    probe: Probe
    site: str
    layer: int
    hook_point: HookPoint | None


def _targets(model: TransformerBridge, probe: Probe) -> list[_Target]:
    n_layers = len(model.blocks)
    layers = range(n_layers) if probe.layers is None else probe.layers
    if any(not 0 <= layer < n_layers for layer in layers):
        raise MelensError(
            f"The probe {probe.name!r} measures layers {list(layers)}; the model has 0 to {n_layers - 1}."
        )
    found: list[_Target] = []
    wanted = {-1, *layers}
    for site in probe.sites:  # one named with its block is wanted whatever the layers are
        everywhere = Sites.of(model).find(site)
        places = [place for place in everywhere if place.layer in wanted or place.site != site]
        if not places:
            has = [place.layer for place in everywhere]
            where = f" in {listed(layers)}; this model has it in {listed(has)}" if has else ", which no block here has"
            raise MelensError(f"The probe {probe.name!r} measures at {site!r}{where}.")
        found += [_Target(probe, *place) for place in places]
    return found


@contextmanager
def _recording(model: TransformerBridge, recorder: _Recorder, way: Way) -> Iterator[Any]:
    """Let every probe reduce what passes in the model that is given, of which nothing runs that nobody needs."""
    at_keys: dict[int, list[_Target]] = defaultdict(list)
    for target in recorder.expected:
        if target.hook_point is None:
            at_keys[target.layer].append(target)
    keys = sorted({key for targets in at_keys.values() for target in targets for key in target.probe.keys})

    def record_attention(layer: int, attention: Tensor) -> None:
        for target in at_keys[layer]:
            columns = [attention[..., keys.index(key)] for key in target.probe.keys]  # in the probe's own order
            recorder.add(target, attention if list(target.probe.keys) == keys else torch.stack(columns, dim=-1))

    recorders = [(at.hook_point, partial(recorder.add, at)) for at in recorder.expected if at.hook_point is not None]
    recorded = {id(hook_point) for hook_point, _ in recorders}
    at_head = [module for module in model.unembed.modules() if isinstance(module, HookPoint)]
    wants_logits = any(id(hook_point) in recorded or is_hooked(hook_point) for hook_point in at_head)
    with running(model, recorders, keys, record_attention if at_keys else None, way=way) as network:
        yield network if wants_logits else base_of(network)


# --- Recording --------------------------------------------------------------------------------------------------------


@dataclass
class _Chunk:
    """One probe's quantities of one batch, each `[place, batch, *index]`."""

    batch: Batch
    places: list[tuple[str, int]]
    quantities: dict[str, np.ndarray]


class _Recorder:
    """Lets probes reduce what passes, and lays their results out as tables."""

    def __init__(self, probes: Sequence[Probe], expected: list[_Target]) -> None:
        self.n_tokens = 0
        self.expected = expected
        self._batch: Batch | None = None
        self._reduced: dict[str, list[tuple[_Target, dict[str, Tensor]]]] = {probe.name: [] for probe in probes}
        self._chunks: dict[str, list[_Chunk]] = {probe.name: [] for probe in probes}

    def begin(self, batch: Batch) -> None:
        if self._batch is not None:
            self.end()
        self._batch = batch

    def add(self, target: _Target, activation: Tensor) -> None:
        assert self._batch is not None
        reduced = target.probe.reduce_at(target.site, target.layer, activation, self._batch)
        self._reduced[target.probe.name].append((target, reduced))

    def end(self) -> None:
        """Bring the batch's results to the CPU, one transfer a quantity, once all of them are under way."""
        batch, self._batch = self._batch, None
        assert batch is not None
        self._check_each_recorded_once()
        finished = []
        of_probes = [recorded for recorded in self._reduced.values() if recorded]
        for recorded in sorted(of_probes, key=lambda recorded: recorded[0][0].probe.waits):
            probe, first = recorded[0][0].probe, recorded[0][1]
            _check_alike(probe, recorded)
            device = next(iter(first.values())).device
            stacked = {key: torch.stack([reduced[key].to(device) for _, reduced in recorded]) for key in first}
            places = [(target.site, target.layer) for target, _ in recorded]
            quantities = probe.finish(stacked, batch)
            _check_dims(probe, quantities, len(places), batch)
            on_cpu = {key: _start_transfer(values) for key, values in quantities.items()}
            finished.append((probe.name, places, on_cpu, device))
            recorded.clear()
        for device in {device for *_, device in finished if device.type == "cuda"}:
            torch.cuda.synchronize(device)
        for name, places, on_cpu, _ in finished:
            arrays = {key: values.numpy() for key, values in on_cpu.items()}
            self._chunks[name].append(_Chunk(batch, places, arrays))
        self.n_tokens += sum(batch.lengths)

    def _check_each_recorded_once(self) -> None:
        times = Counter(id(target) for recorded in self._reduced.values() for target, _ in recorded)
        for target in self.expected:
            if times[id(target)] > 1 or not (times[id(target)] or target.probe.may_miss):
                raise MelensError(
                    f"The probe {target.probe.name!r} cannot measure {target.site!r} in block {target.layer}: it needs "
                    f"one activation a forward pass, and this model has {times[id(target)]} there."
                )

    def has(self, probe: Probe) -> bool:
        return bool(self._chunks[probe.name])

    def table(self, probe: Probe) -> pd.DataFrame:
        sites = list(dict.fromkeys(site for chunk in self._chunks[probe.name] for site, _ in chunk.places))
        chunks = [_tidy(chunk, probe.index, sites) for chunk in self._chunks[probe.name]]
        columns = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        of_site: Any = pd.Categorical.from_codes(columns["site"].astype(np.int8), categories=pd.Index(sites))
        return pd.DataFrame(columns | {"site": of_site}, copy=False)

    def tensor(self, probe: Probe, n_prompts: int) -> Tensor:
        chunks = self._chunks[probe.name]
        (quantity,) = chunks[0].quantities
        shape = chunks[0].quantities[quantity].shape
        if any(chunk.quantities[quantity].shape[2:] != shape[2:] for chunk in chunks):
            raise MelensError(f"The probe {probe.name!r} takes prompts of one length: its results lie in one tensor.")
        whole = torch.full((n_prompts, shape[0], *shape[2:]), float("nan"))
        for chunk in chunks:
            whole[list(chunk.batch.prompts)] = torch.from_numpy(chunk.quantities[quantity]).float().transpose(0, 1)
        return whole


def _check_alike(probe: Probe, recorded: Sequence[tuple[_Target, Any]]) -> None:
    """Raise a `MelensError` where a probe's results are no tensors by name, or cannot lie in one table."""
    first, of_first = recorded[0]
    for target, reduced in recorded:
        named = reduced.values() if isinstance(reduced, Mapping) else ()
        if not named or not all(isinstance(values, Tensor) for values in named):
            raise MelensError(
                f"The probe {probe.name!r} returns {given(reduced)} at {target.site!r} in block {target.layer}; "
                "its reduce must return a dict of tensors, such as {'norm': norms}."
            )
    for target, reduced in recorded[1:]:
        for name, values in reduced.items():
            if of_first[name].shape != values.shape:
                raise MelensError(
                    f"The probe {probe.name!r} returns {name!r} of shape {list(of_first[name].shape)} at "
                    f"{first.site!r} in block {first.layer} and of shape {list(values.shape)} at {target.site!r} in "
                    f"block {target.layer}: trace these sites with a probe each."
                )


def _check_dims(probe: Probe, quantities: Mapping[str, Tensor], n_places: int, batch: Batch) -> None:
    """Raise a `MelensError` where the dimensions of a probe's results are not those that its index names."""
    n_rows, n_pos = batch.tokens.shape
    if probe.kind == "tensor" and len(quantities) > 1:
        raise MelensError(
            f"The probe {probe.name!r} of kind 'tensor' returns {', '.join(quantities)}; it must return one tensor."
        )
    for name, values in quantities.items():
        named = dict(zip(probe.index, values.shape[2:], strict=False))
        is_of_batch = tuple(values.shape[:2]) == (n_places, n_rows)
        reaches_over_tokens = named.get("pos", n_pos) == n_pos or probe.kind == "tensor"
        if values.ndim != 2 + len(probe.index) or not is_of_batch or not reaches_over_tokens:
            raise MelensError(
                f"The probe {probe.name!r} returns {name!r} of shape {list(values.shape[1:])} for {n_rows} prompts of "
                f"up to {n_pos} tokens; its index {list(probe.index)} must name each dimension after the prompts'."
            )


def _start_transfer(values: Tensor) -> Tensor:
    """Bring a quantity to the CPU; from a GPU the copy is complete once the GPU has been waited for."""
    values = values.float() if values.is_floating_point() else values
    if not values.is_cuda:
        return values.cpu()
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values, non_blocking=True)


def _tidy(chunk: _Chunk, index: tuple[str, ...], sites: list[str]) -> dict[str, np.ndarray]:
    """Lay `[place, batch, *index]` arrays out as columns, without the rows of padded positions."""
    shape = next(iter(chunk.quantities.values())).shape
    axes: dict[str, tuple[int, np.ndarray]] = {
        "prompt": (1, np.asarray(chunk.batch.prompts, dtype=np.int32)),
        "layer": (0, np.asarray([layer for _, layer in chunk.places], dtype=np.int32)),
        "site": (0, np.asarray([sites.index(site) for site, _ in chunk.places], dtype=np.int8)),
        **{name: (2 + i, np.arange(shape[2 + i], dtype=np.int32)) for i, name in enumerate(index)},
    }
    columns = {name: np.broadcast_to(_along(values, axis, len(shape)), shape) for name, (axis, values) in axes.items()}
    columns |= chunk.quantities
    if "pos" in index and min(chunk.batch.lengths) < shape[axes["pos"][0]]:
        real = columns["pos"] < _along(np.asarray(chunk.batch.lengths), 1, len(shape))
        return {name: values[real] for name, values in columns.items()}
    return {name: values.reshape(-1) for name, values in columns.items()}


def _along(values: np.ndarray, axis: int, n_axes: int) -> np.ndarray:
    return values.reshape([-1 if i == axis else 1 for i in range(n_axes)])


def _describe(model: TransformerBridge, checked: Verification) -> dict[str, Any]:
    cfg = model.cfg
    return {
        "name": cfg.model_name,
        "architecture": cfg.architecture,
        "n_layers": int(cfg.n_layers),
        "d_model": int(cfg.d_model),
        "n_heads": int(getattr(cfg, "n_heads", None) or 0),
        "dtype": str(next(model.original_model.parameters()).dtype).removeprefix("torch."),
        "quantization": describe_quantization(model.original_model),
        "device": str(cfg.device),
        "verified": checked.summary,
    }
