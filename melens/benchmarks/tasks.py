"""A benchmark's definition from the lm-evaluation-harness, with its data from a local folder or from the hub.

1. The definition is the harness's own YAML file, or ours in `conf/benchmark/tasks/`.
2. Local rows (`melens.benchmarks.data`) replace the hub's data set in that definition.
3. Where the model writes its answers, multiple choice becomes a question for a letter (`choices_generate.yaml`).

    task = load_task(BENCHMARKS["piqa"], Path("my-data"))
    items = melens.benchmarks.harness.evaluate(network, tokenizer, task, RequestOptions())
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from melens.benchmarks.catalog import Benchmark, Metric
from melens.benchmarks.data import harness_row, read_rows
from melens.environment.conf import conf_folder
from melens.environment.extras import check_extra
from melens.errors import MelensError
from melens.printing import Brief

__all__ = ["HarnessTask", "load_task", "quiet_harness"]


@dataclass(frozen=True, repr=False)
class HarnessTask(Brief):
    """A benchmark that the harness can run.

    Attributes:
        tasks: the harness's own tasks by name; MMLU has one for each subject.
        generates: whether the model writes its answers.
        identity: versions, definition and data as text: two tasks are the same where it is equal.
    """

    benchmark: Benchmark
    tasks: dict[str, Any]
    metrics: tuple[Metric, ...]
    generates: bool
    identity: str

    def n_requests(self, limit: int | None) -> int:
        """Estimate the number of requests: as many choices for every item as the first one has."""
        total = 0
        for task in self.tasks.values():
            docs = task.eval_docs
            per_item = len(task.doc_to_choice(docs[0])) if task.OUTPUT_TYPE == "multiple_choice" else 1
            total += per_item * min(limit or len(docs), len(docs))
        return total


def load_task(benchmark: Benchmark, data_dir: Path | None = None, *, generates: bool = False) -> HarnessTask:
    """Load a benchmark's definition and its data.

    Args:
        benchmark: one that the harness runs.
        data_dir: a folder with local data; None loads it from the hub.
        generates: ask for the letter of a choice instead of comparing the choices' log-likelihoods.

    Raises:
        MelensError: the harness is not installed, a local file is wrong, or the hub cannot be reached.
    """
    check_extra("benchmark", "This benchmark")
    rows = None if data_dir is None else read_rows(data_dir, benchmark)
    by_letter = generates and benchmark.form == "choices"
    with quiet_harness():
        if rows is not None:
            tasks = {benchmark.name: _letter_task(benchmark.name, rows) if by_letter else _local_task(benchmark, rows)}
        else:
            tasks = _hub_tasks(benchmark)
            if by_letter:
                tasks = {name: _letter_task(name, _as_rows(task)) for name, task in tasks.items()}
        identity = [f"{name} {task.VERSION} {_definition(task)}" for name, task in tasks.items()]
    return HarnessTask(
        benchmark,
        tasks,
        metrics=(Metric("exact_match", "letter"),) if by_letter else benchmark.metrics,
        generates=by_letter or benchmark.generates,
        identity=f"lm_eval {metadata.version('lm_eval')} {identity}",
    )


def _definition(task: Any) -> str:
    """Write out a task's whole definition (prompts, choices, filters, metrics, stop sequences) and its data."""
    # A function's address changes from run to run; its code is covered by the versions.
    definition = re.sub(r" at 0x[0-9a-f]+", "", str(task.dump_config()))
    docs = [sorted((key, str(value)) for key, value in dict(doc).items()) for doc in task.eval_docs]
    return f"{definition} {docs}"


def _local_task(benchmark: Benchmark, rows: Sequence[dict[str, Any]]) -> Any:
    config = _config_of(benchmark.config)
    if benchmark.form == "choices":
        config |= {"doc_to_choice": "choices", "doc_to_target": "answer"}
    config.pop("should_decontaminate", None)
    return _task(config, [harness_row(row, benchmark) for row in rows])


def _hub_tasks(benchmark: Benchmark) -> dict[str, Any]:
    try:
        if benchmark.name == "mmlu":
            from lm_eval.tasks import TaskManager

            return dict(TaskManager().load(["mmlu"])["tasks"])
        config = _config_of(benchmark.config)
        if benchmark.name == "aime":
            config["process_docs"] = lambda docs: docs.filter(lambda doc: int(doc["Year"]) >= 2022)
        return {benchmark.name: _task(config)}
    except Exception as error:  # the hub's client raises errors of many kinds
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MelensError(
            f"The data of {benchmark.name} could not be loaded from the hub ({why}). Set benchmark.data_dir to a "
            "folder of JSONL files, or set HF_HUB_OFFLINE=1 if the data was loaded before."
        ) from error


def _letter_task(name: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    kept = [{key: row[key] for key in ("question", "choices", "answer")} for row in rows]
    return _task(_config_of("melens/choices_generate.yaml") | {"task": name}, kept)


def _as_rows(task: Any) -> list[dict[str, Any]]:
    """Read question, choices and the right choice's index from a multiple-choice task of the harness."""
    rows = []
    for doc in task.eval_docs:
        text, choices, answer = task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)
        if isinstance(text, int):  # Winogrande: its choices are two beginnings of one sentence
            rows.append({"question": f"... {answer}", "choices": choices, "answer": text})
            continue
        question = str(text).removeprefix("Question: ").removesuffix("\nAnswer:").split("\nA. ")[0]
        right = choices.index(answer) if isinstance(answer, str) and not answer.isdigit() else int(answer)
        texts = doc["choices"] if choices == ["A", "B", "C", "D"] else choices
        rows.append({"question": question, "choices": list(texts), "answer": right})
    return rows


def _config_of(name: str | None) -> dict[str, Any]:
    import lm_eval.tasks  # takes seconds, and only benchmarks need it
    from lm_eval.tasks._yaml_loader import load_yaml

    assert name is not None
    own = name.removeprefix("melens/")
    root = conf_folder("benchmark", "tasks") if own != name else Path(lm_eval.tasks.__file__).parent
    config: dict[str, Any] = load_yaml(root / own)
    config.pop("tag", None)
    return config


def _task(config: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> Any:
    """Return the harness's task, with these rows in place of its own data if there are some."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    if rows is not None:
        dataset = {"test": Dataset.from_list(rows)}
        config |= {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": None}
        config["custom_dataset"] = lambda **_: dataset
    return ConfigurableTask(config=config)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the messages and progress bars of the harness and of `datasets` off the terminal."""
    import datasets
    import lm_eval.api.task

    bar, lm_eval.api.task.tqdm = lm_eval.api.task.tqdm, lambda docs, **_: docs
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    had_bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not had_bars:
            datasets.enable_progress_bars()
