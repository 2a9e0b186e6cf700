"""Options that were typed and change nothing in this run: a warning names each, as somebody expects something of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.options.benchmark import BenchmarkRequest
from experiments.options.masks import masks_in_use
from experiments.options.schema import Options
from experiments.options.table import TableRequest
from experiments.options.training import TrainingRequest
from experiments.runner.registry import EXPERIMENTS
from melens.benchmarks.catalog import Benchmark
from melens.data.reading import has_columns, names_file
from melens.training.plan import TrainingPlan
from melens.training.recipe import known_datasets
from melens.validation.types import in_words

__all__ = ["unused_options"]


def unused_options(options: Options) -> Iterator[str]:
    """Yield a sentence for each typed option that this run does not use."""
    read = {node for name in options.experiments for node in EXPERIMENTS[name].nodes}
    not_always_read = {node for experiment in EXPERIMENTS.values() for node in experiment.nodes}
    for key in options.typed:
        node = key.partition(".")[0]
        part = key.split(".")[1] if key.startswith("exp.") and key.count(".") == 2 else None
        if part is not None and part not in options.experiments:
            yield f"{key} is given, but exp.experiments does not name {part}."
        elif node in not_always_read - read:
            yield f"{key} is given, but exp={options.exp.name} does not use it."
        else:
            for keys, is_used, why in _RULES:
                if any(key == one or key.startswith(f"{one}.") for one in keys) and not is_used(options):
                    yield f"{key} is given but changes nothing: {why}."


def _plans(options: Options) -> list[TrainingPlan]:
    """Return the trainings of a run."""
    requests = list(options.requests.values())
    plans = [request.plan for request in requests if isinstance(request, TrainingRequest)]
    return plans + [own.training.plan for each in requests if isinstance(each, TableRequest) for own in each.sets]


def _method(options: Options) -> str:
    return str(_plans(options)[0].recipe.method)


def _trains_on_hub(options: Options) -> bool:
    for plan in _plans(options):
        is_file = plan.dataset == "sums" or names_file(plan.dataset)
        if plan.data_dir is None if plan.dataset in known_datasets() else not is_file:
            return True
    return False


def _reads_dataset(options: Options) -> bool:
    return options.data.text is not None and not names_file(options.data.text)


def _reads_columns(options: Options) -> bool:
    return _reads_dataset(options) or (options.data.text is not None and has_columns(Path(options.data.text)))


def _of_benchmarks(is_used: Callable[[BenchmarkRequest, Benchmark], bool]) -> Callable[[Options], bool]:
    """Look at the benchmarks, of which one is enough; tables choose theirs by training set."""

    def is_used_by_any(options: Options) -> bool:
        request = options.requests.get("benchmark")
        return request is None or any(is_used(request, benchmark) for benchmark in request.benchmarks)

    return is_used_by_any


_RULES: tuple[tuple[tuple[str, ...], Callable[[Options], bool], str], ...] = (
    (
        ("wemask",),
        lambda options: options.wemask.rate == 0 or any(mask.rate != 0 for mask in masks_in_use(options).values()),
        "this run has no mask",
    ),
    (("training.epochs",), lambda options: options.training.steps is None, "training.steps is given"),
    (
        ("wemask.seed",),
        lambda options: any("random" in in_words(mask.select) for mask in masks_in_use(options).values()),
        "it is of random dims, and no mask has some",
    ),
    (("data.split",), _reads_dataset, "it is of a dataset of the hub"),
    (("data.column",), _reads_columns, "it is of a dataset of the hub, or of a file that has columns"),
    (("training.split",), _trains_on_hub, "it is of a dataset of the hub"),
    (("training.lora",), lambda options: options.training.peft == "lora", "training.peft=lora uses it"),
    (
        ("training.rollouts", "training.max_new_tokens", "training.temperature", "training.format_weight"),
        lambda options: _method(options) == "grpo",
        "it is of exp=grpo and table=4",
    ),
    (("training.beta",), lambda options: _method(options) in ("dpo", "grpo"), "it is of exp=dpo and exp=grpo"),
    (
        ("training.held_out", "training.validation"),
        lambda options: _method(options) == "pretrain",
        "it is of exp=pretrain",
    ),
    (("training.held_out",), lambda options: options.training.validation is None, "training.validation is given"),
    (("training.chat",), lambda options: _method(options) != "pretrain", "exp=pretrain learns from texts as they are"),
    (
        ("model.seed",),
        lambda options: not any(plan.recipe.method == "pretrain" for plan in _plans(options)),
        "training.seed is that of the weights too",
    ),
    (("training.max_length",), lambda options: _method(options) != "grpo", "exp=grpo has training.max_new_tokens"),
    (
        ("generate.temperature", "generate.top_p", "generate.seeds"),
        lambda options: options.generate.sample,
        "generate.sample is false",
    ),
    (
        ("benchmark.temperature", "benchmark.top_p", "benchmark.seeds"),
        _of_benchmarks(lambda request, own: request.options.generates and bool(own.config)),
        "nothing is sampled; benchmark.mode=generate does, for benchmarks with data",
    ),
    (
        ("benchmark.mode", "benchmark.chat", "benchmark.data_dir"),
        _of_benchmarks(lambda _, own: bool(own.config)),
        "no benchmark here has data",
    ),
    (("benchmark.judge",), _of_benchmarks(lambda _, own: own.kind == "safety"), "no benchmark here is of safety"),
    (
        ("benchmark.needle",),
        _of_benchmarks(lambda _, own: own.name == "needle"),
        "benchmark.tasks does not have needle",
    ),
)
