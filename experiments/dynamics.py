"""`exp=dynamics`: when massive activations and sinks appear over a training, from its checkpoints.

1. The checkpoints are chosen before anything is loaded: revisions of the hub, or subfolders of a folder. The run's own
   model is the last of them.
2. `prepare` looks at every one without its weights: a name that does not exist, another architecture or another
   tokenizer is refused, an incomplete folder left out with a warning.
3. The run's model is measured and its weights are freed; then each other checkpoint is loaded, measured and freed, or
   found in the user's cache under the bytes of its weights, or its commit on the hub.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.runner.declaration import Experiment, ExperimentOptions
from melens.errors import MelensError
from melens.models.folders import checkpoint_folders, step_of
from melens.validation.types import Flag

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from experiments.options.schema import Options
    from experiments.runner.jobs import Job
    from experiments.runner.study import Run
    from melens.models.loading import PlannedModel
    from melens.models.revisions import Checkpoint
    from melens.report.result import Result
    from melens.tracing.probes import Probe

__all__ = ["EXPERIMENTS"]

_LOG = logging.getLogger(__name__)


class DynamicsOptions(ExperimentOptions):
    """Its own options beside the node `dynamics`."""

    name: Literal["dynamics"]
    keep: Flag


@dataclass(frozen=True, eq=False)
class CheckpointRequest:
    """The checkpoints that a run asks for.

    Attributes:
        options: of the run.
        left_out: names of folders that are incomplete; known once `checkpoints` is.
    """

    options: Options
    left_out: list[str]

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """What is to be measured, by step; looks into the folder, or asks the hub.

        Raises:
            MelensError: no checkpoint, or names that do not tell their steps.
        """
        from melens.models.revisions import hub_revisions, in_order, spread

        asked, model = self.options.dynamics, self.options.model
        if folders := checkpoint_folders(model.name):
            names = self._complete(folders if asked.revisions is None else asked.revisions)
        elif asked.revisions is not None:
            names = asked.revisions
        elif asked.pattern is not None:
            names = hub_revisions(model.hub_id or model.name, asked.pattern)
        else:
            names = [model.revision or Path(model.name).name]
            if asked.steps is None and step_of(names[0]) is None:
                raise MelensError(
                    "exp=dynamics takes checkpoints: dynamics.revisions=[step0,step1000] of a model on the hub, a "
                    "series as dynamics=pythia, or model=hub model.name= a folder that holds checkpoint-100 and others."
                )
        found = in_order(names, asked.steps, asked.tokens_per_step)
        return found if asked.most == "all" or asked.revisions is not None else spread(found, asked.most)

    def _complete(self, names: Sequence[str]) -> list[str]:
        """Leave out folders that a killed training left incomplete, with a warning: the others make the curve."""
        from melens.models.revisions import why_incomplete

        folder = Path(os.path.expanduser(self.options.model.name))
        for name in names:
            if not (folder / name).is_dir():
                raise MelensError(f"{folder} has no checkpoint {name!r}.")
        lacking = {name: why for name in names if (why := why_incomplete(folder / name)) is not None}
        for name, why in lacking.items():
            _LOG.warning("The checkpoint %s is incomplete (%s), and left out.", folder / name, why)
        self.left_out[:] = lacking
        if not (complete := [name for name in names if name not in lacking]):
            raise MelensError(f"No checkpoint in {folder} is complete: {', '.join(sorted(set(lacking.values())))}.")
        return complete

    def model_options(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return what a checkpoint is loaded with."""
        options = self.options.model.model_dump(exclude_unset=True)
        if checkpoint_folders(options["name"]):
            return options | {"name": str(Path(os.path.expanduser(options["name"])) / checkpoint.name)}
        is_one = self.options.dynamics.revisions is None and self.options.dynamics.pattern is None
        return options if is_one else options | {"revision": checkpoint.name}


def _request(cfg: Options) -> CheckpointRequest:
    asked, model = cfg.dynamics, cfg.model
    if model.source != "hub":
        raise MelensError(
            f"{model.name} has no checkpoints. exp=dynamics takes model=hub model.name= a model of the hub with "
            "revisions, or a folder that holds checkpoint-100 and others."
        )
    is_local = Path(os.path.expanduser(model.name)).exists()
    if is_local and asked.revisions is not None and not checkpoint_folders(model.name):
        raise MelensError(f"dynamics.revisions are of a model on the hub, or subfolders; {model.name} has neither.")
    if model.revision is not None and (asked.revisions is not None or asked.pattern is not None):
        raise MelensError("model.revision is one checkpoint: leave it out where dynamics names several.")
    if asked.repos is not None and model.name not in asked.repos and model.hub_id not in asked.repos:
        series = f"dynamics={cfg.given.get('dynamics', 'own')}"
        raise MelensError(
            f"{series} is not of {model.name}, but of {', '.join(asked.repos)}. Give one of these as model=hub "
            "model.name=, or dynamics.repos=null to take its names all the same."
        )
    return CheckpointRequest(cfg, [])


@dataclass(frozen=True)
class PlannedCheckpoint:
    """A checkpoint that was looked at, and by what its weights are known: None where nothing tells."""

    checkpoint: Checkpoint
    planned: PlannedModel
    identity: str | None


def prepare(cfg: Options, folder: Path, planned: PlannedModel) -> list[PlannedCheckpoint]:
    """Look at each checkpoint without its weights.

    Raises:
        MelensError: one that is not there, or is of another architecture or has another tokenizer than the last.
    """
    from melens.models.loading import plan_model
    from melens.storage.cache import tokenizer_fingerprint

    request: CheckpointRequest = cfg.requests["dynamics"]
    *earlier, last = request.checkpoints
    found = []
    for checkpoint in earlier:
        try:
            own = plan_model(**request.model_options(checkpoint))
        except MelensError as error:
            raise MelensError(f"Checkpoint {checkpoint.name}: {error}") from error
        for what, of in (
            ("architecture or size", _shape),
            ("tokenizer", lambda one: tokenizer_fingerprint(one.tokenizer)),
        ):
            if of(own) != of(planned) and not (what == "tokenizer" and own.tokenizer is None):
                raise MelensError(
                    f"{checkpoint.name} has another {what} than {last.name}: they are no checkpoints of one training."
                )
        found.append(PlannedCheckpoint(checkpoint, own, _identity(request.model_options(checkpoint))))
    return [*found, PlannedCheckpoint(last, planned, None)]


def _shape(planned: PlannedModel) -> list[Any]:
    weights = planned.network.named_parameters()
    return [type(planned.network).__name__, *((name, tuple(weight.shape)) for name, weight in weights)]


def _identity(options: dict[str, Any]) -> str | None:
    """Name a checkpoint by the bytes of its files, or its commit: what a revision was before does not count."""
    from melens.models.revisions import commit_of, hash_of_weights

    place = Path(os.path.expanduser(options["name"]))
    if place.is_dir():
        return hash_of_weights(place)
    return commit_of(options.get("hub_id") or options["name"], options.get("revision"))


def _probes(model: TransformerBridge, options: DynamicsOptions) -> list[Probe]:
    from melens.analysis.checkpoint_dynamics import probes

    return probes(model)


def _run(run: Run, options: DynamicsOptions) -> Result:
    from experiments.runner.checkpoints import free_weights, measure_or_find
    from melens.analysis.checkpoint_dynamics import compare_checkpoints, measure_checkpoint

    request: CheckpointRequest = run.cfg.requests["dynamics"]
    *earlier, last = run.prepared["dynamics"]
    of_last = last.checkpoint
    measured = [measure_checkpoint(of_last.step, run, of_last.name, of_last.tokens)]
    if earlier:
        free_weights(run.model)
    progress = run.stage("measuring the other checkpoints")
    for number, own in enumerate(earlier):
        progress(number, len(earlier))
        measured.append(measure_or_find(run, own.checkpoint, own.planned, own.identity, keep=options.keep))
    if earlier:
        progress(len(earlier), len(earlier))
    return compare_checkpoints(measured, request.left_out)


def _merge(jobs: Sequence[Job]) -> list[Result]:
    """Draw the checkpoints that the jobs of a sweep measured as one run over all of them, a training each.

    Jobs of `exp=emergence` over several checkpoints give what they have of it.
    """
    from experiments.runner.checkpoints import emergences, read_measured, training_of
    from melens.analysis.checkpoint_dynamics import compare_checkpoints
    from melens.report.result import Metrics, Result

    trainings: dict[str, list[Job]] = {}
    for job in (job for job in jobs if job.is_ok):
        trainings.setdefault(training_of(job), []).append(job)
    merged = []
    for name, own in trainings.items():
        measured = [checkpoint for job in own for checkpoint in read_measured(job)]
        try:
            if len(measured) > 1:
                merged.append(compare_checkpoints(measured))
            elif len(rows := emergences(own)) > 1:
                from melens.analysis.dynamics_figures import draw_emergences

                figures = {"dynamics": draw_emergences(rows)}
                merged.append(Result("emergence", {}, Metrics(), {"dynamics_by_step": rows}, figures))
        except MelensError as error:
            merged.append(Result("dynamics", {}, Metrics(), findings=[(name, f"not merged: {error}")]))
    return merged if len(merged) < 2 else [_numbered(result, number) for number, result in enumerate(merged)]


def _numbered(result: Result, number: int) -> Result:
    """Name the files of a result so that several lie in one folder."""
    tables = {f"{name}_{number}": table for name, table in result.tables.items()}
    return replace(result, tables=tables, figures={f"{name}_{number}": own for name, own in result.figures.items()})


EXPERIMENTS = (
    Experiment(
        "dynamics",
        DynamicsOptions,
        _run,
        _probes,
        nodes=("dynamics",),
        request=_request,
        prepare=prepare,
        model_options=lambda cfg: cfg.requests["dynamics"].model_options(cfg.requests["dynamics"].checkpoints[-1]),
        in_all=False,
        reads_checkpoints=True,
        merge=_merge,
    ),
)
