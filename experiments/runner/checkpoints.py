"""The checkpoints of a training one after the other: loaded, measured, freed, and kept in the user's cache.

What is kept of a checkpoint is a table of some hundred rows. It is found again by what identifies the weights, the
prompts and everything else that decides it, and is taken only if its contents have the hash that was written with it.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

import melens
from experiments.runner.jobs import Job
from experiments.runner.study import Run
from melens.analysis.checkpoint_dynamics import MeasuredCheckpoint, measure_checkpoint, probes
from melens.errors import MelensError
from melens.models.loading import PlannedModel
from melens.models.quantization import is_quantized
from melens.models.revisions import Checkpoint
from melens.report.result import Metrics
from melens.storage.cache import Store, cache_folder, code_version, hash_of, library_versions

__all__ = ["free_weights", "measure_or_find", "read_measured"]

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
    with suppress(ValueError, LookupError, TypeError):
        content = json.loads(text)
        if content["hash"] == _hash(table, content["rest"]):
            return MeasuredCheckpoint(
                checkpoint.step, checkpoint.name, table, tokens=checkpoint.tokens, **content["rest"]
            )
    return None


def _rest(own: MeasuredCheckpoint) -> dict[str, Any]:
    names = ("me_layer", "magnification", "magnification_interval", "shared", "model")
    return json.loads(json.dumps({name: getattr(own, name) for name in names}, default=lambda value: value.item()))


def _hash(table: pd.DataFrame, rest: Mapping[str, Any]) -> str:
    return hash_of({name: table[name].tolist() for name in table.columns}, json.dumps(rest, sort_keys=True))


# --- Jobs of a sweep --------------------------------------------------------------------------------------------------


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
