"""`exp=benchmark`: benchmarks with masks and without, on the same items."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.runner.declaration import Experiment, ExperimentOptions
from melens.validation.types import Flag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.options.benchmark import BenchmarkRequest
    from experiments.options.schema import MaskOptions, Options
    from experiments.runner.study import Run
    from melens.benchmarks.catalog import Benchmark
    from melens.benchmarks.evaluation import MaskConfiguration
    from melens.benchmarks.language import LanguageData
    from melens.models.loading import PlannedModel
    from melens.report.result import Result

__all__ = ["EXPERIMENTS", "check_request", "data_for"]


class ReportedOptions(ExperimentOptions):
    name: Literal["benchmark"]
    keep: Flag
    report: Flag


def _request(cfg: Options) -> BenchmarkRequest:
    from experiments.options.benchmark import benchmark_request  # which needs the registry, and that this module

    return benchmark_request(cfg)


def _masks(cfg: Options) -> dict[str, MaskOptions]:
    request: BenchmarkRequest = cfg.requests["benchmark"]
    layers = {} if request.layers == "auto" else {"layers": request.layers}  # auto differs by benchmark
    return {preset.name: preset.options.model_copy(update=layers) for preset in request.masks}


def prepare(cfg: Options, folder: Path, planned: PlannedModel) -> BenchmarkRequest:
    """Check the request before the weights are read, which takes longer."""
    request: BenchmarkRequest = cfg.requests["benchmark"]
    check_request(request, cfg, planned)
    return request


def check_request(request: BenchmarkRequest, cfg: Options, planned: PlannedModel) -> None:
    """Load the definitions and the data of all benchmarks, and try them on the model's tokenizer and context.

    Raises:
        MelensError: as `check_tasks` and `language_data`; a judge without a chat template.
    """
    from melens.benchmarks.evaluation import check_tasks
    from melens.benchmarks.refusals import judging_chat
    from melens.models.loading import load_tokenizer

    data_for(cfg, request.benchmarks, planned)
    check_tasks(request.benchmarks, request.options, planned.tokenizer)
    judge = request.options.judge
    if judge is not None and any(benchmark.kind == "safety" for benchmark in request.benchmarks):
        judging_chat(load_tokenizer(judge), judge)


def run(run: Run, options: ReportedOptions) -> Result:
    """Score each benchmark under each mask, and compare with the unmasked model."""
    from melens.benchmarks.comparison import benchmark

    request: BenchmarkRequest = run.prepared["benchmark"]
    return benchmark(
        run,
        {each.name: _configurations(run, request, each) for each in request.benchmarks},
        request.options,
        data=data_for(run.cfg, request.benchmarks, run.model),
        masked_blocks=request.masked_blocks,
        table=request.table,
        left_out=request.left_out,
        keep=options.keep,
    )


def data_for(cfg: Options, benchmarks: Sequence[Benchmark], model: Any) -> LanguageData | None:
    """Tokenise the text of the node `data` for a model, or its plan, if a benchmark is made of it."""
    from experiments.runner.texts import text_of
    from melens.benchmarks.language import Needle, language_data

    made_here = [benchmark.name for benchmark in benchmarks if benchmark.config is None]
    if not made_here:
        return None
    needle = Needle(**cfg.benchmark.needle.model_dump()) if "needle" in made_here else None
    size = {"n_texts": cfg.data.n_texts, "n_tokens": cfg.data.n_tokens}
    text = text_of(cfg, model.tokenizer)
    return language_data(model, text, **size, bos=cfg.prompts.bos, seed=cfg.seed, needle=needle)


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
        masks=_masks,
        prepare=prepare,
    ),
)
