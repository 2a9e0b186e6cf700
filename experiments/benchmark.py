"""`exp=benchmark`: benchmarks with masks and without, on the same items."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.runner.declaration import Experiment, ExperimentOptions
from melens.validation.types import Flag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.options.benchmark import BenchmarkRequest
    from experiments.options.schema import Options
    from experiments.runner.study import Run
    from melens.benchmarks.catalog import Benchmark
    from melens.benchmarks.evaluation import MaskConfiguration
    from melens.benchmarks.language import LanguageData
    from melens.report.result import Result

__all__ = ["EXPERIMENTS", "check_request", "data_for"]


class ReportedOptions(ExperimentOptions):
    name: Literal["benchmark"]
    keep: Flag
    report: Flag


def _request(cfg: Options) -> BenchmarkRequest:
    from experiments.options.benchmark import benchmark_request  # which needs the registry, and that this module

    return benchmark_request(cfg)


def prepare(cfg: Options, folder: Path) -> BenchmarkRequest:
    """Check the request before the model is loaded, which takes longer."""
    request: BenchmarkRequest = cfg.requests["benchmark"]
    check_request(request, cfg)
    return request


def check_request(request: BenchmarkRequest, cfg: Options) -> None:
    """Load the definitions and the data of all benchmarks that have some, and try the chat template on them.

    Raises:
        MelensError: as `check_tasks`.
    """
    from melens.benchmarks.evaluation import check_tasks
    from melens.models.loading import load_tokenizer

    uses_chat = any(map(request.options.in_chat, request.benchmarks))
    tokenizer = load_tokenizer(**cfg.model.model_dump(exclude_unset=True)) if uses_chat else None
    check_tasks(request.benchmarks, request.options, tokenizer)


def run(run: Run, options: ReportedOptions) -> Result:
    """Score each benchmark under each mask, and compare with the unmasked model."""
    from melens.benchmarks.comparison import benchmark

    request: BenchmarkRequest = run.prepared["benchmark"]
    return benchmark(
        run,
        {each.name: _configurations(run, request, each) for each in request.benchmarks},
        request.options,
        data=data_for(run, request.benchmarks),
        masked_blocks=request.masked_blocks,
        table=request.table,
        left_out=request.left_out,
        keep=options.keep,
    )


def data_for(run: Run, benchmarks: Sequence[Benchmark]) -> LanguageData | None:
    """Tokenise the text of the node `data`, if a benchmark is made of it."""
    from melens.benchmarks.language import Needle, language_data

    if all(benchmark.config is not None for benchmark in benchmarks):
        return None
    data, needle = run.cfg.data, Needle(**run.cfg.benchmark.needle.model_dump())
    size, bos = {"n_texts": data.n_texts, "n_tokens": data.n_tokens}, run.cfg.prompts.bos
    return language_data(run.model, run.text, **size, bos=bos, seed=run.seed, needle=needle)


def _configurations(run: Run, request: BenchmarkRequest, benchmark: Benchmark) -> list[MaskConfiguration]:
    """Build the masks of a benchmark: the blocks that they mask depend on its kind (appendix C)."""
    from experiments.runner.masks import masks_of
    from melens.benchmarks.comparison import UNMASKED
    from melens.benchmarks.evaluation import MaskConfiguration

    configurations: dict[str, MaskConfiguration] = {}
    for preset in request.masks:
        options = preset.options.model_copy(update={"layers": request.layers_of(benchmark, preset)})
        found = masks_of(options, run.me, run.model)
        if None in found:
            configurations[UNMASKED] = MaskConfiguration(UNMASKED)
        masks = [mask for mask in found if mask is not None]
        names = ("select", "site", "start", "layers", "seed")
        varied = [name for name in names if len({str(getattr(mask, name)) for mask in masks}) > 1]
        for mask in masks:
            family = " ".join([preset.name, *(f"{name}={getattr(mask, name)}" for name in varied)])
            label = f"{family} rate={float(mask.rate):g}"
            configurations[label] = MaskConfiguration(label, mask, family)
    return list(configurations.values())


EXPERIMENTS = (
    Experiment(
        "benchmark",
        ReportedOptions,
        run,
        nodes=("wemask", "benchmark", "data"),
        request=_request,
        masks=lambda cfg: {preset.name: preset.options for preset in cfg.requests["benchmark"].masks},
        prepare=prepare,
    ),
)
