"""The request of `exp=tables`: the trainings and the benchmarks of the paper's tables that need a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.options.benchmark import KNOWLEDGE, BenchmarkRequest, benchmark_request
from experiments.options.reading import OptionError
from experiments.options.schema import Options
from experiments.options.training import TrainingRequest, training_request
from melens.benchmarks.catalog import benchmarks_of
from melens.validation.types import in_words

__all__ = ["TableRequest", "TrainingSet", "table_request"]

_INSTRUCTIONS = ("flan", "openorca")

_TasksOf = dict[str, tuple[str, ...]]
_TABLES: dict[int, tuple[str, _TasksOf]] = {
    1: ("sft", dict.fromkeys(_INSTRUCTIONS, KNOWLEDGE)),
    2: ("sft", {"gsm8k": ("gsm8k", "aime", "hendrycks_math500"), "hh_rlhf": ("sorry_bench", "xstest")}),
    3: ("dpo", {"hh_rlhf": ("xstest", "advbench")}),
    4: ("grpo", {"gsm8k": ("aime", "hendrycks_math500")}),
    6: ("sft", dict.fromkeys(_INSTRUCTIONS, KNOWLEDGE[:5])),
    7: ("sft", dict.fromkeys(_INSTRUCTIONS, (*KNOWLEDGE[:4], "strategyqa"))),
}
"""The method of a table, and its training sets with the benchmarks that models trained on them are scored on."""


@dataclass(frozen=True)
class TrainingSet:
    """A training set of a table by name, with the benchmarks that the models are scored on, and the first training.

    Attributes:
        options: of the run, with the training set and its benchmarks filled in.
    """

    dataset: str
    options: Options
    benchmarks: BenchmarkRequest
    training: TrainingRequest


@dataclass(frozen=True)
class TableRequest:
    """A table of the paper, by its number: its trainings, the masks' rates, and what is compared and left out.

    Attributes:
        gates: kinds of gated attention to compare with.
        left_out: benchmarks that local data cannot have.
    """

    number: int
    method: str
    sets: tuple[TrainingSet, ...]
    rates: tuple[float | int, ...]
    gates: tuple[str, ...]
    seeds: tuple[int, ...]
    left_out: tuple[str, ...]

    @property
    def shares_benchmarks(self) -> bool:
        """Whether two training sets are scored on the same benchmark."""
        names = [benchmark.name for own in self.sets for benchmark in own.benchmarks.benchmarks]
        return len(set(names)) < len(names)


def table_request(options: Options) -> TableRequest:
    """Read which table is wanted, and its training sets, benchmarks, rates and seeds.

    Raises:
        MelensError: an option is one that a table cannot have.
    """
    if options.table is None:
        raise OptionError(f"table is null; exp=tables needs one of {', '.join(map(str, _TABLES))}, as table=1.")
    _check_given(options)
    method, tasks_of = _TABLES[options.table]
    rates, seeds = _each_once("wemask.rate", options.wemask.rate), _each_once("training.seed", options.training.seed)
    if 0 in rates:
        raise OptionError("wemask.rate has a 0, which masks nothing. Leave it out: a table has rows without a mask.")
    tasks_of, left_out = _chosen_tasks(options, tasks_of)
    sets, scored = [], {"masks": ["off"], "mode": options.benchmark.mode or "generate", "table": None}
    for dataset, tasks in tasks_of.items():
        own = options.changed(benchmark={"tasks": list(tasks), **scored}, training={"dataset": dataset})
        sets.append(TrainingSet(dataset, own, benchmark_request(own), training_request(own, method, dataset=dataset)))
    gates = ("headwise", "elementwise") if options.table == 7 else ()
    return TableRequest(options.table, method, tuple(sets), rates, gates, seeds, left_out)


def _chosen_tasks(options: Options, tasks_of: _TasksOf) -> tuple[_TasksOf, tuple[str, ...]]:
    """Return the benchmarks of each training set as the user chose them, and those that local data cannot have."""
    benchmark, every = options.benchmark, tuple(dict.fromkeys(task for own in tasks_of.values() for task in own))
    if options.training.dataset is not None:
        tasks_of = {options.training.dataset: every}
    if benchmark.tasks is not None:
        return dict.fromkeys(tasks_of, tuple(benchmark.tasks)), ()
    if benchmark.data_dir is None:
        return tasks_of, ()
    left_out = tuple(each.name for each in benchmarks_of(every) if each.config and each.file is None)
    return {name: tuple(task for task in own if task not in left_out) for name, own in tasks_of.items()}, left_out


def _check_given(options: Options) -> None:
    benchmark, training = options.benchmark, options.training
    chosen = options.given.get("wemask", "paper")
    for key, is_given in (
        ("training.mask", training.mask not in ("off", "none")),
        ("training.gate", training.gate != "none"),
        ("training.resume", training.resume is not None),
        ("benchmark.masks", benchmark.masks is not None and "benchmark.masks" in options.typed),
        ("benchmark.table", benchmark.table is not None),
        ("wemask.select", "wemask.select" in options.given),
        (f"wemask={chosen}", chosen != "paper"),
    ):
        if is_given:
            raise OptionError(f"A table has its own trainings, masks and gates; leave {key} out.")


def _each_once(key: str, given: Any) -> tuple[Any, ...]:
    values = tuple(given) if isinstance(given, list) else (given,)
    if len(set(values)) < len(values):
        raise OptionError(f"{key} is {in_words(given)}; a table needs each value once.")
    return values
