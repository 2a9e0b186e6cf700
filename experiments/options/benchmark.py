"""The request of `exp=benchmark`: the node `benchmark` with the presets of the paper's tables filled in."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from experiments.options.masks import Preset, presets_of
from experiments.options.schema import Options
from melens.benchmarks.catalog import Benchmark, benchmarks_of
from melens.benchmarks.data import read_rows
from melens.benchmarks.options import BenchmarkOptions
from melens.environment.extras import check_extra

__all__ = ["KNOWLEDGE", "BenchmarkRequest", "benchmark_request"]

_DEFAULT_TASKS = ("perplexity", "induction", "copy", "needle")
_DEFAULT_MASKS = ("off", "paper", "random", "magnitude")
KNOWLEDGE = ("mmlu", "piqa", "arc_challenge", "openbookqa", "mathqa", "strategyqa")


@dataclass(frozen=True)
class _Table:
    """The benchmarks and masks of a table of the paper, without its trainings."""

    tasks: tuple[str, ...]
    masks: tuple[str, ...] = ("off", "paper")
    rates: tuple[float, ...] | None = (0.01, 0.03, 0.1, 0.2)  # the text names none and reports the best of several


_TABLES = {
    1: _Table(KNOWLEDGE),
    2: _Table(("gsm8k", "aime", "hendrycks_math500", "sorry_bench", "xstest")),
    5: _Table(KNOWLEDGE, masks=_DEFAULT_MASKS),
    6: _Table(KNOWLEDGE[:5]),
    7: _Table((*KNOWLEDGE[:4], "strategyqa"), rates=(0.1,)),
}


@dataclass(frozen=True)
class BenchmarkRequest:
    """Which benchmarks are scored with which masks, and how.

    Attributes:
        left_out: benchmarks of the table that local data cannot have.
        layers: which blocks are masked: `auto`, `all`, `first` or a list.
    """

    benchmarks: tuple[Benchmark, ...]
    left_out: tuple[str, ...]
    masks: tuple[Preset, ...]
    table: int | None
    layers: Any
    options: BenchmarkOptions

    def layers_of(self, benchmark: Benchmark, preset: Preset) -> Any:
        """Return which blocks are masked: as the options say, else by the kind of benchmark (appendix C)."""
        if self.layers != "auto":
            return self.layers
        if preset.has_own_layers:
            return preset.options.layers
        return "first" if benchmark.kind in ("maths", "safety") else "all"

    @property
    def masked_blocks(self) -> str:
        """Which blocks are masked, in words."""
        if isinstance(self.layers, list):
            return f"block{'s' * (len(self.layers) > 1)} {', '.join(map(str, self.layers))}"
        return {
            "all": "all blocks from the start on",
            "first": "the first block from the start on",
            "auto": "all blocks from the start on for knowledge and language, the first alone for maths and safety",
        }[self.layers]


def benchmark_request(options: Options) -> BenchmarkRequest:
    """Fill the presets of a table, or the defaults, into the node `benchmark`.

    Raises:
        MelensError: a benchmark or a mask is unknown.
    """
    node = options.benchmark
    table = _TABLES[node.table] if node.table is not None else _Table(_DEFAULT_TASKS, _DEFAULT_MASKS, None)
    benchmarks = benchmarks_of(node.tasks or table.tasks)
    left_out: list[str] = []
    if node.data_dir is not None and node.tasks is None:  # the user did not name them
        left_out = [benchmark.name for benchmark in benchmarks if benchmark.config and benchmark.file is None]
        benchmarks = [benchmark for benchmark in benchmarks if benchmark.name not in left_out]
    if any(benchmark.config for benchmark in benchmarks):
        check_extra("benchmark", "benchmark.tasks")
    if node.data_dir is not None:
        for benchmark in benchmarks:
            if benchmark.config:
                read_rows(Path(os.path.expanduser(node.data_dir)), benchmark)
    masks = presets_of(node.masks or table.masks, options, key="benchmark.masks", rates=table.rates)
    as_given = node.model_dump(include={field.name for field in fields(BenchmarkOptions)})
    auto = {name: None for name in ("chat", "thinking", "max_new_tokens") if as_given[name] == "auto"}
    return BenchmarkRequest(
        benchmarks=tuple(benchmarks),
        left_out=tuple(left_out),
        masks=tuple(masks),
        table=node.table,
        layers=node.layers,
        options=BenchmarkOptions(
            **as_given | auto | {"seeds": tuple(node.seeds)},
            generates=(node.mode or ("loglikelihood" if node.table is None else "generate")) == "generate",
            judge_device=options.model.device,
        ),
    )
