"""What `exp=benchmark` is asked for, with the presets of the paper's tables: benchmarks, masks, and how to ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.options.masks import Preset, presets_of
from experiments.options.schema import Options
from melens.benchmarks.catalog import Benchmark, benchmarks_of
from melens.environment.extras import check_extra

__all__ = ["Asked", "asked_for"]

_DEFAULT_TASKS = ("perplexity", "induction", "copy", "needle")
_DEFAULT_MASKS = ("off", "paper", "random", "magnitude")
_KNOWLEDGE = ("mmlu", "piqa", "arc_challenge", "openbookqa")


@dataclass(frozen=True)
class _Table:
    """What the rows and columns of a table of the paper need without training."""

    tasks: tuple[str, ...]
    masks: tuple[str, ...] = ("off", "paper")
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.2)  # the text names none and reports the best of several


TABLES = {
    1: _Table((*_KNOWLEDGE, "mathqa", "strategyqa")),
    2: _Table(("gsm8k", "aime", "hendrycks_math500", "sorry_bench", "xstest")),
    5: _Table((*_KNOWLEDGE, "mathqa", "strategyqa"), masks=_DEFAULT_MASKS),
    6: _Table((*_KNOWLEDGE, "mathqa")),
    7: _Table((*_KNOWLEDGE, "strategyqa"), rates=(0.1,)),
}


@dataclass(frozen=True)
class Asked:
    """The node `benchmark` of a configuration, with the presets of its table filled in.

    Attributes:
        left_out: benchmarks of the table that local data cannot have.
        needle: lengths and depths.
        The others are the keys of the node.
    """

    benchmarks: tuple[Benchmark, ...]
    left_out: tuple[str, ...]
    masks: tuple[Preset, ...]
    table: int | None
    generates: bool
    layers: Any
    limit: int | None
    seeds: tuple[int, ...]
    data_dir: str | None
    chat: bool | None
    thinking: bool | None
    temperature: float | None
    top_p: float | None
    max_new_tokens: int | None
    batch_size: int
    judge: str | None
    needle: tuple[tuple[int, ...], tuple[float, ...]]

    def in_chat(self, benchmark: Benchmark) -> bool:
        """Tell whether a benchmark is asked in the chat template: what the model writes freely, unless told else."""
        if benchmark.config is None:
            return False
        writes = self.generates or benchmark.kind == "safety"
        return writes if self.chat is None else self.chat

    def layers_of(self, benchmark: Benchmark, preset: Preset) -> Any:
        """Return which blocks to mask: by what the benchmark asks for (appendix C), or as told."""
        if self.layers != "auto":
            return self.layers
        if preset.has_own_layers:
            return preset.options.layers
        return "first" if benchmark.kind in ("maths", "safety") else "all"


def asked_for(options: Options) -> Asked:
    """Fill the presets of a table, or the defaults, into the node `benchmark`.

    Raises:
        MelensError: no such benchmark or mask.
    """
    node = options.benchmark
    table = None if node.table is None else TABLES[node.table]
    benchmarks = benchmarks_of(node.tasks or (_DEFAULT_TASKS if table is None else table.tasks))
    left_out: list[str] = []
    if node.data_dir is not None and node.tasks is None:  # those of a table
        left_out = [benchmark.name for benchmark in benchmarks if benchmark.config and benchmark.file is None]
        benchmarks = [benchmark for benchmark in benchmarks if benchmark.name not in left_out]
    if any(benchmark.config for benchmark in benchmarks):
        check_extra("benchmark", "benchmark.tasks")
    mode = node.mode or ("loglikelihood" if table is None else "generate")
    names = node.masks or (_DEFAULT_MASKS if table is None else table.masks)
    masks = presets_of(names, options, key="benchmark.masks", rates=None if table is None else table.rates)
    return Asked(
        benchmarks=tuple(benchmarks),
        left_out=tuple(left_out),
        masks=tuple(masks),
        table=node.table,
        generates=mode == "generate",
        layers=node.layers,
        limit=node.limit,
        seeds=tuple(node.seeds),
        data_dir=node.data_dir,
        chat=None if node.chat == "auto" else node.chat,
        thinking=None if node.thinking == "auto" else node.thinking,
        temperature=node.temperature,
        top_p=node.top_p,
        max_new_tokens=None if node.max_new_tokens == "auto" else node.max_new_tokens,
        batch_size=node.batch_size,
        judge=node.judge,
        needle=(tuple(node.needle.lengths), tuple(node.needle.depths)),
    )
