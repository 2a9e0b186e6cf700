"""Experiments that are not declared in their own module yet (while they are being moved)."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, create_model

from experiments.runner.declaration import AtLeast2, Experiment, ExperimentOptions
from melens.validation.types import Count, Flag, Said, Share

MODULES = (
    "emergence", "rmsnorm", "ablation", "stability", "benchmark", "generate",
    "tables", "training", "verify", "training_report",
)  # fmt: skip


PlainOptions = ExperimentOptions


class EmergenceOptions(ExperimentOptions):
    name: Literal["emergence"]
    log_scale: Flag
    top_dims: Count


class RmsnormOptions(ExperimentOptions):
    name: Literal["rmsnorm"]
    top_share: Annotated[Share, Said("a share of the width, over 0 and at most 1")]
    other_shares: Annotated[list[Share], Said("a list of shares of the width, each over 0 and at most 1")]


class AblationOptions(ExperimentOptions):
    name: Literal["ablation"]
    max_position: Count


def _rising(bins: list[int]) -> list[int]:
    if bins != sorted(set(bins)):
        raise ValueError
    return bins


class StabilityOptions(ExperimentOptions):
    name: Literal["stability"]
    length_bins: Annotated[list[Count], AfterValidator(_rising), Said("a list of rising whole numbers of tokens")]
    n_prompts: Count
    max_tokens: AtLeast2
    n_first_tokens: Count


class KeptOptions(ExperimentOptions):
    name: Literal["generate"]
    keep: Flag


class ReportedOptions(ExperimentOptions):
    name: Literal["benchmark"]
    keep: Flag
    report: Flag


class TablesOptions(ReportedOptions):
    name: Literal["tables"]  # type: ignore[assignment]


def _plain(name: str) -> Any:
    own: Any = {"name": (Literal[name], ...)}
    return create_model("PlainOptions", __base__=ExperimentOptions, **own)


def _experiment(name: str, options: Any = None, *, in_all: bool = True) -> Experiment:
    module = "training" if name in ("sft", "dpo", "grpo") else name

    def run(run: Any, own: Any) -> Any:
        return import_module(f"experiments.{module}").run(run, own)

    def probes(model: Any, own: Any) -> Any:
        return import_module(f"experiments.{module}").probes(model, own)

    return Experiment(name, options or _plain(name), run, probes, in_all=in_all)


EXPERIMENTS = (
    _experiment("emergence", EmergenceOptions),
    _experiment("rmsnorm", RmsnormOptions),
    _experiment("ablation", AblationOptions),
    _experiment("stability", StabilityOptions),
    _experiment("benchmark", ReportedOptions),
    _experiment("generate", KeptOptions, in_all=False),
    _experiment("tables", TablesOptions, in_all=False),
    _experiment("sft", in_all=False),
    _experiment("dpo", in_all=False),
    _experiment("grpo", in_all=False),
    _experiment("verify", in_all=False),
)
