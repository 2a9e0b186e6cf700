"""How an experiment is declared: its options, what it wants measured, and the function that runs it; light to import.

A module of `experiments/` holds `EXPERIMENTS`, from which the command line, `exp=all` and the options' types are made:

    class SinksOptions(AnalysisOptions):
        name: Literal["sinks"]
        map_tokens: AtLeast2

    EXPERIMENTS = (of_analysis("sinks", SinksOptions),)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from melens.validation.types import Flag, Said

if TYPE_CHECKING:
    from pathlib import Path

    from transformer_lens.model_bridge import TransformerBridge

    from experiments.options.schema import MaskOptions, Options
    from experiments.runner.jobs import Job
    from experiments.runner.study import Run
    from melens.models.loading import PlannedModel
    from melens.report.result import Result
    from melens.tracing.probes import Probe

__all__ = ["AS_TYPED", "AnalysisOptions", "AtLeast2", "Experiment", "ExperimentOptions", "Node", "of_analysis"]

AS_TYPED = "as typed"
"""Marks an option that is a text: no number, list or sweep is read out of it."""

AtLeast2 = Annotated[int, Field(strict=True, ge=2), Said("a whole number of at least 2")]


class Node(BaseModel):
    """A group of options."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ExperimentOptions(Node):
    """The options of the experiment `name`, `exp.<option>`: each has its default in `conf/exp/`, with a comment."""

    name: str

    @property
    def is_kept(self) -> bool:
        """Whether what takes long is kept in the user's cache."""
        return bool(getattr(self, "keep", False))

    @property
    def own(self) -> dict[str, Any]:
        """The options by name, without the experiment's."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "name"}


class AnalysisOptions(ExperimentOptions):
    """The arguments of a function of `melens.analysis`, and whether the trace that it rests on is kept."""

    keep: Flag

    @property
    def own(self) -> dict[str, Any]:
        """The arguments by name."""
        return {name: value for name, value in super().own.items() if name != "keep"}


@dataclass(frozen=True)
class Experiment:
    """Something that can be asked for by `exp=`.

    Attributes:
        name: as it is asked for.
        options: their types.
        run: measures, given the run (a `Study`, with all options) and the experiment's own options; a `MelensError`
            says why it does not apply to this model.
        probes: what it wants measured in the pass that all experiments of a run share, beyond the default probes.
        nodes: the nodes of `conf/config.yaml` that it reads, of those that not every experiment does.
        request: puts presets and the user's options together, once for all that follows: `cfg.requests[name]`.
        masks: the masks that it uses, by the name of their preset, given all options; by default none.
        prepare: checks and loads what may be wrong or missing before the weights are read, which takes longer, given
            all options, the run's folder and the model's plan; what it returns is `run.prepared[name]`.
        model_options: what the model is loaded with, given all options; by default the node `model`.
        in_all: whether `exp=all` can hold it.
        can_resume: whether the same command goes on where an interrupt stopped it, rather than from the trace alone.
        trains: whether it trains: accelerate may start several processes of it, with one folder and its checkpoints.
        without_model: what is done instead of a run, given its own options: it has neither a model nor a folder, and
            returns what to print. `run` and `request` then refuse what else was typed.
        reads_checkpoints: whether `model.name` may be a folder of a training's checkpoints.
        merge: puts together what the jobs of a sweep measured, of which some may be of other experiments.
    """

    name: str
    options: type[ExperimentOptions]
    run: Callable[[Run, Any], Result]
    probes: Callable[[TransformerBridge, Any], list[Probe]] | None = None
    nodes: tuple[str, ...] = ()
    request: Callable[[Options], Any] | None = None
    masks: Callable[[Options], dict[str, MaskOptions]] | None = None
    prepare: Callable[[Options, Path, PlannedModel], Any] | None = None
    model_options: Callable[[Options], dict[str, Any]] | None = None
    in_all: bool = True
    can_resume: bool = True
    trains: bool = False
    without_model: Callable[[Any], str] | None = None
    reads_checkpoints: bool = False
    merge: Callable[[Sequence[Job]], list[Result]] | None = None


def of_analysis(
    name: str, options: type[ExperimentOptions], function: str | None = None, *, probes: str = ""
) -> Experiment:
    """Declare the experiment that is a function of `melens.analysis`, called with the options as its arguments.

    The function has the experiment's name unless `function` is given; where `probes` names a module of
    `melens.analysis`, that module's `probes(model, **options)` are what the experiment wants measured.
    """

    def wanted(model: TransformerBridge, options: ExperimentOptions) -> list[Probe]:
        return import_module(f"melens.analysis.{probes}").probes(model, **options.own)

    def run(run: Run, options: ExperimentOptions) -> Result:
        analysis = import_module("melens.analysis")  # takes seconds, which checking options need not
        return getattr(analysis, function or name)(run, **options.own)

    return Experiment(name, options, run, wanted if probes else None)
