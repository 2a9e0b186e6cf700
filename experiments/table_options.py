"""What `exp=tables` is asked for: the rows and columns of the paper's tables that need a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.benchmark_options import asked_for
from experiments.training_options import planned_training
from melens.benchmarks.catalog import benchmarks_of
from melens.errors import MelensError

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


def asked_table(cfg: DictConfig) -> Table:
    """Read and check what table is wanted, with which training set, benchmarks, rates and seeds.

    Raises:
        MelensError: what is not allowed, in a sentence.
    """
    if cfg.table not in _TABLES:
        raise MelensError(
            f"table is {cfg.table!r}; it must be one of {', '.join(map(str, _TABLES))} (5 is exp=benchmark's)."
        )
    method, parts = _TABLES[cfg.table]
    tasks = cfg.benchmark.tasks
    if tasks is not None:
        tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    if cfg.training.dataset is not None:
        every = tuple(dict.fromkeys(task for part in parts for task in part.tasks))
        parts = (Part(str(cfg.training.dataset), every),)
    left_out: tuple[str, ...] = ()
    if tasks is not None:
        parts = tuple(Part(part.dataset, tasks) for part in parts)
    elif cfg.benchmark.data_dir is not None:
        names = tuple(dict.fromkeys(task for part in parts for task in part.tasks))
        left_out = tuple(b.name for b in benchmarks_of(names) if b.config and b.file is None)
        parts = tuple(Part(p.dataset, tuple(task for task in p.tasks if task not in left_out)) for p in parts)
    for key in ("mask", "gate"):
        if OmegaConf.select(cfg, f"training.{key}") not in ("off", "none", False):
            raise MelensError(f"A table trains with masks and gates of its own: training.{key} is not for it.")
    rates = OmegaConf.to_container(cfg.wemask.rate) if OmegaConf.is_list(cfg.wemask.rate) else [cfg.wemask.rate]
    are_rates = all(isinstance(rate, int | float) and 0 < rate <= 1 for rate in rates)
    if not rates or not are_rates or len(set(rates)) < len(rates):
        raise MelensError(f"wemask.rate is {rates!r}; a table needs rates over 0 and at most 1, each once.")
    gates = ("headwise", "elementwise") if cfg.table == 7 else ()
    seeds = OmegaConf.to_container(cfg.training.seed) if OmegaConf.is_list(cfg.training.seed) else [cfg.training.seed]
    if not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise MelensError(f"training.seed is {seeds!r}; a table needs whole numbers, each once.")
    table = Table(cfg.table, method, parts, tuple(rates), gates, tuple(seeds), left_out)
    for part in parts:
        planned_training(of_part(cfg, part), method, dataset=part.dataset)
        asked_for(of_part(cfg, part))
    return table


def of_part(cfg: DictConfig, part: Part) -> DictConfig:
    """Return the configuration of one part: its benchmarks, its training set."""
    mode: Any = cfg.benchmark.mode or "generate"
    own = {"benchmark": {"tasks": list(part.tasks), "masks": ["off"], "mode": mode, "table": None}}
    merged: Any = OmegaConf.merge(cfg, own, {"training": {"dataset": part.dataset}})
    return merged
