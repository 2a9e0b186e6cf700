"""One forward pass a batch, every probe fed from it: `trace(model, prompts, probes) -> Trace`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import InstanceOf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from melens.data.prompts import Prompt, TokenizedPrompts, check_length, choose_prompts
from melens.errors import MelensError
from melens.models.folders import local_model
from melens.models.quantization import describe_quantization
from melens.models.view import base_of
from melens.printing import Summary, counted
from melens.storage.files import atomic_folder
from melens.tracing.attended import Attended
from melens.tracing.attention_probes import SinkMass
from melens.tracing.batching import BatchRule, forget_longest
from melens.tracing.captured import ShortPasses
from melens.tracing.probes import AbsMedian, Batch, LargestActivations, Norms, Probe, TokenVectors
from melens.tracing.recording import Recorder, Target, targets_of
from melens.tracing.sites import ATTENTION_ON_KEYS, Sites
from melens.tracing.tables import Grid, Tables, Tensors, grids_of
from melens.tracing.twin import Way, is_hooked, running
from melens.tracing.verification import Verification, verified
from melens.validation.arguments import BosOrNot, Bridge, Probes, Prompts, check_vocabulary
from melens.validation.signatures import Folder, checked, given
from melens.validation.types import Count, Number, Said

__all__ = ["Progress", "Trace", "TraceGiven", "as_tokens", "default_probes", "trace"]

Progress = Callable[[int, int], None]
"""Called as `progress(tokens_done, tokens_in_all)` after each batch."""


@dataclass(frozen=True, repr=False)
class Trace(Summary):
    """What the probes saw: plain tidy data.

    Attributes:
        model: name (of a folder its last part), path (of a folder), architecture, n_layers, d_model, n_heads, dtype,
            quantization (None for plain weights), device, and `verified`: how far a trace of this kind of model agrees
            with transformers (`melens.verify`).
        prompts: a row a prompt: `prompt`, `id`, `task`, `n_tokens`, `first_token`, `first_token_id`.
        tables: by probe, a row for each prompt, layer, site and whatever the probe's index runs over. `layer` is the
            0-based block, -1 outside the blocks.
        tensors: by probe, `[prompt, layer, *index]`.

    Example:
        >>> norms = trace["norm"]  # a DataFrame
        >>> after = norms[(norms["site"] == "hook_resid_post") & (norms["layer"] == 2)]
        >>> after.groupby("prompt")["norm"].idxmax().map(after["pos"]).tolist()  # whose norm is largest
        [0, 0, 0]
    """

    model: dict[str, Any]
    prompts: pd.DataFrame
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, probe: Any) -> pd.DataFrame:
        """Return the table of a probe; a `MelensError` names the probes of this trace if it is not among them."""
        if not isinstance(probe, str) or probe not in self.tables:
            has = [*sorted(self.tables), *(f"trace.tensors[{name!r}]" for name in sorted(self.tensors))]
            raise MelensError(f"The trace has no table {given(probe)}; it has {', '.join(has) or 'none'}.")
        return self.tables[probe]

    def grids(self, probe: str, index: str | None = None) -> list[Grid]:
        """Return a table as arrays, which many prompts are faster to compute with than with its rows.

        Args:
            probe: the table's name.
            index: what its probe's index names; None where there is a row a prompt, block and site.
        """
        if isinstance(self.tables, Tables) and probe in self.tables:
            return self.tables.grids(probe)
        return grids_of(self[probe], self.prompts["n_tokens"].tolist(), index)

    def _heading(self) -> str:
        shortest, longest = self.prompts["n_tokens"].min(), self.prompts["n_tokens"].max()
        tokens = f"{shortest:,} to {longest:,} tokens" if shortest != longest else counted(int(longest), "token")
        prompts, model = counted(len(self.prompts), "prompt"), self.model
        return f"Trace of {prompts} ({tokens}) through {model['name']}, {counted(model['n_layers'], 'block')}"

    def _rows(self) -> list[tuple[str, str]]:  # names alone: a table is only made once it is asked for
        tables = [f"trace[{name!r}]" for name in self.tables]
        tensors = [f"trace.tensors[{name!r}]" for name in self.tensors]
        named = {"prompts": ["trace.prompts"], "tables": tables, "tensors": tensors}
        return [(kind, ", ".join(names)) for kind, names in named.items() if names]

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
        prompts: texts, or the token ids of each (a list, array or tensor `[pos]`); one prompt needs no list. Of the
            project's own (`load_prompts`), those longer than the context are left out with a warning.
        probes: what to measure; by default all that `find_me_layer` needs, as far as the model has it.
        bos: whether to prepend BOS to texts: `"auto"` does as the model's own tokenizer.
        max_batch_tokens: prompts of similar length share a forward pass up to this many tokens, padding included, where
            each then gets the numbers that it has alone (`melens.tracing.batching`).
        progress: called after each batch.

    Returns:
        A `Trace`: the table, or tensor, of each probe by its name.

    Raises:
        MelensError: what is no bridge, prompt or probe; an empty, too short or too long prompt, a token id outside the
            vocabulary, two probes of one name, a site the model does not have, a probe's result of other dimensions
            than its index names, or a model on which no way to run it agrees with transformers (`melens.verify`).

    Example:
        >>> trace = melens.trace(model, [[1, 2, 3], [4, 5]], [melens.Norms("hook_resid_post")])
        >>> trace["norm"].columns.tolist()
        ['prompt', 'layer', 'site', 'pos', 'norm']
        >>> len(trace["norm"]) == len(model.blocks) * 5
        True
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
    recorder = Recorder(probes, [target for probe in probes for target in targets_of(model, probe)])
    verification = verified(model, [site for probe in probes for site in probe.sites])
    groups = verification.rule.groups([len(ids) for ids in tokens], max_batch_tokens=max_batch_tokens)
    with torch.no_grad():
        described = _run(model, given_prompts, groups, recorder, verification, progress)
        recorded = recorder.recorded()
    if progress is not None:
        progress(recorder.n_tokens, recorder.n_tokens)
    tables = Tables(recorded, [probe for probe in probes if probe.kind == "table"])
    tensors = Tensors(recorded, [probe for probe in probes if probe.kind == "tensor"], len(tokens))
    return Trace(*described, tables, tensors)


@checked
def default_probes(model: Bridge, *, min_abs: Number = 100) -> list[Probe]:
    """Return what `find_me_layer` and the emergence figures need, as far as the model has it.

    A parallel block has no `ln2`, a state-space block no attention.

    Args:
        model: a bridge.
        min_abs: every token with an entry |h| over it is kept; as of the `Criterion`.

    Example:
        >>> [probe.name for probe in melens.default_probes(model)]
        ['norm', 'largest', 'abs_median', 'token_vectors', 'sink_mass']
    """
    sites = Sites.of(model)
    probes: list[Probe] = [Norms(), LargestActivations(min_abs=min_abs), AbsMedian(), TokenVectors(), SinkMass()]
    for probe in probes:
        probe.may_miss = True
        probe.sites = tuple(site for site in probe.sites if sites.find(site))
    return [probe for probe in probes if probe.sites]


def as_tokens(model: TransformerBridge, prompts: Any, bos: BosOrNot = "auto") -> TokenizedPrompts:
    """Turn prompts, as `Prompts` lists them, into tokens, which are checked against context and vocabulary."""
    if isinstance(prompts, TokenizedPrompts):
        return prompts
    if isinstance(prompts[0], Prompt):
        return choose_prompts(model, prompts, bos=bos)
    for number, ids in enumerate(prompts):
        check_length(len(ids), f"number {number}", model.cfg.n_ctx)
    check_vocabulary(model, prompts)
    return TokenizedPrompts([Prompt(text="")] * len(prompts), prompts)


def _describe_prompts(model: TransformerBridge, prompts: TokenizedPrompts) -> pd.DataFrame:
    texts, tokens = prompts.prompts, prompts.tokens
    tokenizer, firsts = model.tokenizer, torch.stack([ids[0] for ids in tokens]).tolist()
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


def _run(
    model: TransformerBridge,
    prompts: TokenizedPrompts,
    groups: Sequence[Sequence[int]],
    recorder: Recorder,
    verification: Verification,
    progress: Progress | None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Record a forward pass of each group of prompts, and describe model and prompts while a GPU computes."""
    rule, total = verification.rule, sum(map(len, prompts.tokens))
    short = ShortPasses.of(model, recorder.probes, rule) if verification.way == "fast" else None
    recording = partial(_recording, model, way=verification.way)
    batches = [_batch(model, [prompts.tokens[row] for row in rows], rows, short, rule) for rows in groups]
    replayed = [batch for batch in batches if short and short.replay(batch, recorder)]
    if short and not short.hold(model, replayed, recorder):
        replayed = []
        recorder.forget()
    done = set(map(id, replayed))
    plain = [batch for batch in batches if id(batch) not in done]
    context: AbstractContextManager[Any] = recording(recorder) if plain else nullcontext()
    with context as network:
        for batch in plain:
            if progress is not None:
                progress(recorder.n_tokens, total)
            recorder.begin(batch)
            if rule.remembers:
                forget_longest(network)
            network(input_ids=batch.tokens, use_cache=False)
            recorder.end()
        described = _describe(model, verification), _describe_prompts(model, prompts)
    if short and plain:
        short.note(model, plain[-1], recorder, recording)
    return described


def _batch(
    model: TransformerBridge, own: Sequence[Tensor], rows: Sequence[int], short: ShortPasses | None, rule: BatchRule
) -> Batch:
    """Pad the tokens of some prompts on the right."""
    lengths = tuple(map(len, own))
    n_pos = max(lengths) if short is None else short.padded_length(lengths, rule, model.cfg.n_ctx)
    padded = torch.stack([nn.functional.pad(ids, (0, n_pos - len(ids))) for ids in own])
    batch = Batch(padded.to(model.cfg.device), lengths, tuple(rows))
    batch.n_tokens  # noqa: B018 - before the GPU has anything to do, as a copy to it waits
    return batch


@contextmanager
def _recording(model: TransformerBridge, recorder: Recorder, *, way: Way) -> Iterator[Any]:
    """Let every probe reduce what passes in the model that is given, of which nothing runs that nobody needs."""
    at_attention: dict[int, dict[tuple[Any, ...], list[Target]]] = defaultdict(lambda: defaultdict(list))
    at_points: dict[int, list[Target]] = defaultdict(list)
    for target in recorder.expected:
        if target.hook_point is None:
            at_attention[target.layer][target.site, *target.probe.keys].append(target)
        else:
            at_points[id(target.hook_point)].append(target)

    def record_attention(layer: int, attended: Attended) -> None:
        for (site, *keys), targets in at_attention[layer].items():
            n_tokens = recorder.batch.n_tokens
            paid = attended.on_keys(keys) if site == ATTENTION_ON_KEYS else attended.by_key(n_tokens)
            recorder.record(targets, paid)

    recorders = [(at[0].hook_point, partial(recorder.record, at)) for at in at_points.values() if at[0].hook_point]
    at_head = [module for module in model.unembed.modules() if isinstance(module, HookPoint)]
    wants_logits = any(id(hook_point) in at_points or is_hooked(hook_point) for hook_point in at_head)
    with running(model, recorders, record_attention if at_attention else None, way=way) as network:
        yield network if wants_logits else base_of(network)


def _describe(model: TransformerBridge, checked: Verification) -> dict[str, Any]:
    cfg, place = model.cfg, local_model(str(model.cfg.model_name))
    return {
        "name": cfg.model_name if place is None else place.name,
        "path": None if place is None else str(place),
        "architecture": cfg.architecture,
        "n_layers": int(cfg.n_layers),
        "d_model": int(cfg.d_model),
        "n_heads": int(getattr(cfg, "n_heads", None) or 0),
        "dtype": str(next(model.original_model.parameters()).dtype).removeprefix("torch."),
        "quantization": describe_quantization(model.original_model),
        "device": str(cfg.device),
        "verified": checked.summary,
    }
