"""What `exp=tables` is asked for: the rows and columns of the paper's tables that need a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.options.benchmark import asked_for
from experiments.options.reading import OptionError
from experiments.options.schema import Options
from experiments.options.training import planned_training
from melens.benchmarks.catalog import benchmarks_of
from melens.validation.types import in_words

__all__ = ["Part", "Table", "asked_table", "of_part"]

_KNOWLEDGE = ("mmlu", "piqa", "arc_challenge", "openbookqa", "mathqa", "strategyqa")
_INSTRUCTIONS = ("flan", "openorca")


@dataclass(frozen=True)
class Part:
    """What one training set is for: the benchmarks that its rows are scored on."""

    dataset: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        number: its.
        method: of its trainings.
        parts: its training sets.
        rates: of the masks.
        gates: kinds of gated attention to compare with.
        seeds: of the trainings.
        left_out: benchmarks that local data cannot have.
    """

    number: int
    method: str
    parts: tuple[Part, ...]
    rates: tuple[float | int, ...]
    gates: tuple[str, ...]
    seeds: tuple[int, ...]
    left_out: tuple[str, ...]

    @property
    def shares_tasks(self) -> bool:
        """Whether two parts are scored on the same benchmark."""
        tasks = [task for part in self.parts for task in part.tasks]
        return len(set(tasks)) < len(tasks)


_TABLES: dict[int, tuple[str, tuple[Part, ...]]] = {
    1: ("sft", tuple(Part(dataset, _KNOWLEDGE) for dataset in _INSTRUCTIONS)),
    2: ("sft", (Part("gsm8k", ("gsm8k", "aime", "hendrycks_math500")), Part("hh_rlhf", ("sorry_bench", "xstest")))),
    3: ("dpo", (Part("hh_rlhf", ("xstest", "advbench")),)),
    4: ("grpo", (Part("gsm8k", ("aime", "hendrycks_math500")),)),
    6: ("sft", tuple(Part(dataset, _KNOWLEDGE[:5]) for dataset in _INSTRUCTIONS)),
    7: ("sft", tuple(Part(dataset, (*_KNOWLEDGE[:4], "strategyqa")) for dataset in _INSTRUCTIONS)),
}


def asked_table(options: Options) -> Table:
    """Read what table is wanted, with which training set, benchmarks, rates and seeds.

    Raises:
        MelensError: what a table cannot have.
    """
    if options.table is None:
        raise OptionError(f"table is null; exp=tables needs one of {', '.join(map(str, _TABLES))}, as table=1.")
    method, parts = _TABLES[options.table]
    benchmark, training = options.benchmark, options.training
    if training.dataset is not None:
        every = tuple(dict.fromkeys(task for part in parts for task in part.tasks))
        parts = (Part(training.dataset, every),)
    left_out: tuple[str, ...] = ()
    if benchmark.tasks is not None:
        parts = tuple(Part(part.dataset, tuple(benchmark.tasks)) for part in parts)
    elif benchmark.data_dir is not None:
        names = tuple(dict.fromkeys(task for part in parts for task in part.tasks))
        left_out = tuple(b.name for b in benchmarks_of(names) if b.config and b.file is None)
        parts = tuple(Part(p.dataset, tuple(task for task in p.tasks if task not in left_out)) for p in parts)
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
            raise OptionError(f"A table has trainings, masks and gates of its own: {key} is not for it.")
    table = Table(
        options.table,
        method,
        parts,
        rates=_each_once("wemask.rate", options.wemask.rate),
        gates=("headwise", "elementwise") if options.table == 7 else (),
        seeds=_each_once("training.seed", training.seed),
        left_out=left_out,
    )
    if 0 in table.rates:
        raise OptionError("wemask.rate has a 0, which masks nothing; a table has rows without a mask anyway.")
    for part in parts:
        planned_training(of_part(options, part), method, dataset=part.dataset)
        asked_for(of_part(options, part))
    return table


def _each_once(key: str, given: Any) -> tuple[Any, ...]:
    values = tuple(given) if isinstance(given, list) else (given,)
    if len(set(values)) < len(values):
        raise OptionError(f"{key} is {in_words(given)}; a table needs each once.")
    return values


def of_part(options: Options, part: Part) -> Options:
    """Return the options of one part: its benchmarks, its training set."""
    mode = options.benchmark.mode or "generate"
    return options.changed(
        benchmark={"tasks": list(part.tasks), "masks": ["off"], "mode": mode, "table": None},
        training={"dataset": part.dataset},
    )
