"""The checkpoints of a training one after the other: loaded, measured, freed, and kept in the user's cache.

What is kept of a checkpoint is a table of some hundred rows. It is found again by what identifies the weights, the
prompts and everything else that decides it, and is taken only if its contents have the hash that was written with it.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

import melens
from experiments.runner.jobs import Job, job_name
from experiments.runner.study import Run
from melens.analysis.checkpoint_dynamics import MeasuredCheckpoint, measure_checkpoint, probes
from melens.errors import MelensError
from melens.models.folders import step_of
from melens.models.loading import PlannedModel
from melens.models.quantization import is_quantized
from melens.models.revisions import Checkpoint
from melens.report.result import Metrics
from melens.storage.cache import Store, cache_folder, code_version, hash_of, library_versions

__all__ = ["emergences", "free_weights", "measure_or_find", "read_measured", "training_of"]

_EXPERIMENTS = Path(__file__).parents[1]
_TABLE, _REST = "by_input", "checkpoint"


def measure_or_find(
    run: Run, checkpoint: Checkpoint, planned: PlannedModel, identity: str | None, *, keep: bool
) -> MeasuredCheckpoint:
    """Measure a checkpoint on the run's prompts, or find what an earlier run kept of it.

    Args:
        run: whose prompts and options it is measured with.
        checkpoint, planned: which one, and how it is loaded.
        identity: of its weights; of one without nothing is kept.
        keep: whether it is kept, and looked for.

    Raises:
        MelensError: as `load_model` and `melens.trace`, with the checkpoint's name.
    """
    store = _store(run, identity) if keep and identity is not None else None
    if store is not None and (found := _load(store, checkpoint)) is not None:
        return found
    try:
        model = planned.load()
        try:
            own = melens.study(
                model, list(run.tokens), probes(model), criterion=run.me.criterion,
                max_batch_tokens=run.max_batch_tokens, seed=run.seed,
            )  # fmt: skip
            measured = measure_checkpoint(checkpoint.step, own, checkpoint.name, checkpoint.tokens)
        finally:
            is_whole = not is_quantized(model.original_model)
            free_weights(model)
    except MelensError as error:
        raise MelensError(f"Checkpoint {checkpoint.name}: {error}") from error
    if store is not None and is_whole:
        _save(store, measured)
    return measured


def free_weights(model: TransformerBridge) -> None:
    """Let go of a model's weights, which all modules that share them then lack: the next checkpoint needs the room."""
    with torch.no_grad():
        for weight in (*model.parameters(), *model.original_model.parameters()):
            if not weight.is_meta:
                weight.data = weight.data.new_empty(0)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- What is kept -----------------------------------------------------------------------------------------------------


def _store(run: Run, identity: str) -> Store:
    options = run.cfg.model.model_dump(include={"dtype", "quantize", "device_map", "trust_remote_code"})
    decides = [
        identity, options, list(run.tokens), run.me.criterion, run.max_batch_tokens, run.trace.model["device"],
        code_version(), code_version(_EXPERIMENTS), library_versions(), torch.get_float32_matmul_precision(),
    ]  # fmt: skip
    return Store(cache_folder() / "checkpoints" / hash_of(*decides)[:24])


def _save(store: Store, own: MeasuredCheckpoint) -> None:
    store.save_table(_TABLE, own.by_input)
    rest = _rest(own)
    store.save_text(_REST, json.dumps({"rest": rest, "hash": _hash(own.by_input, rest)}))


def _load(store: Store, checkpoint: Checkpoint) -> MeasuredCheckpoint | None:
    """Read what was kept; None where there is nothing, or not what was written."""
    table, text = store.load_table(_TABLE), store.load_text(_REST)
    if table is None or text is None:
        return None
    try:
        content = json.loads(text)
        rest = content["rest"]
        is_as_written = content["hash"] == _hash(table, rest)
    except (ValueError, LookupError, TypeError):  # no JSON, or other JSON
        return None
    if not is_as_written:
        return None
    interval = rest.pop("magnification_interval")
    interval = None if interval is None else tuple(interval)
    own = {"tokens": checkpoint.tokens, "magnification_interval": interval, **rest}
    return MeasuredCheckpoint(checkpoint.step, checkpoint.name, table, **own)


def _rest(own: MeasuredCheckpoint) -> dict[str, Any]:
    names = ("me_layer", "magnification", "magnification_interval", "shared", "model")
    return json.loads(json.dumps({name: getattr(own, name) for name in names}, default=lambda value: value.item()))


def _hash(table: pd.DataFrame, rest: Mapping[str, Any]) -> str:
    return hash_of({name: table[name].tolist() for name in table.columns}, json.dumps(rest, sort_keys=True))


# --- Jobs of a sweep --------------------------------------------------------------------------------------------------


def training_of(job: Job) -> str:
    """Name the training that a checkpoint is of: its model or folder, and what else was swept than the revision."""
    name = Path(job.model).expanduser()
    training = str(name.parent) if name.is_dir() and step_of(name.name) is not None else job.model
    others = {key: value for key, value in job.swept.items() if key not in ("model.revision", "dynamics.revisions")}
    return job_name(training, others)


def emergences(jobs: Sequence[Job]) -> pd.DataFrame:
    """Lay out by step what jobs of `exp=emergence` found, those whose model's name or revision tells its step."""
    rows = []
    for job in jobs:
        options = job.result["config"]["model"]
        step = step_of(options.get("revision") or Path(job.model).name)
        if step is None or not (job.folder / "table8.parquet").is_file():
            continue
        found = pd.read_parquet(job.folder / "table8.parquet").iloc[0]
        norms = pd.read_parquet(job.folder / "norm_by_block.parquet").query("site == 'hook_resid_post'")
        wide = norms.pivot(index="layer", columns="token", values="mean")
        sinks = pd.read_parquet(job.folder / "sink_mass_by_block.parquet")
        rows.append(
            {
                "step": step,
                "me_layer": found["me_layer"],
                "magnification": found["magnification"],
                "low": found["magnification_low"],
                "high": found["magnification_high"],
                "norm_ratio": float((wide["first"] / wide["others"]).max()),
                "sink_mass": float(sinks["mean"].mean()) if len(sinks) else None,
            }
        )
    table = pd.DataFrame(rows)
    if table.empty or table["step"].duplicated().any():
        return pd.DataFrame()
    kinds = {name: float for name in table.columns if name not in ("step", "me_layer")}
    return table.astype(kinds | {"me_layer": "Int64"}).sort_values("step", ignore_index=True)


def read_measured(job: Job) -> list[MeasuredCheckpoint]:
    """Read the checkpoints that a job of `exp=dynamics` measured; none of another experiment."""
    files = [job.folder / f"dynamics_{name}.parquet" for name in ("by_input", "by_step")]
    if job.result["experiment"] != "dynamics" or not all(file.is_file() for file in files):
        return []
    by_input, by_step = (pd.read_parquet(file) for file in files)
    own = {name: value for name, value in job.result["metrics"].items() if name in Metrics.model_fields}
    found = []
    for row in by_step.to_dict("records"):
        table = by_input[by_input["step"] == row["step"]].drop(columns=["step", "name"]).reset_index(drop=True)
        told: dict[str, Any] = {str(name): None if pd.isna(value) else value for name, value in row.items()}
        interval = (told.pop("magnification_low"), told.pop("magnification_high"))
        shared = own | {"me_layer": told["me_layer"]}
        model = job.result["model"]
        found.append(
            MeasuredCheckpoint(by_input=table, magnification_interval=interval, shared=shared, model=model, **told)
        )
    return found
