"""EleutherAI's lm-evaluation-harness over a loaded model: its task definitions, prompts, filters and metrics.

The harness pads in two ways, on the right without an attention mask for log-likelihoods and on the left with one for
generation; a `WeMask` finds token 0 in both, and rows that would change each other's numbers are not put together.

It would cut thoughts by one mark, `think_end_token`, and take a reply that ends inside a thought for an answer. So
replies go through `melens.data.chat.read_reply` before its own filters read a letter, a number or a refusal.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import repeat
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from melens.benchmarks.catalog import Benchmark, Metric
from melens.benchmarks.data import harness_row, read_rows
from melens.benchmarks.scores import check_scores
from melens.benchmarks.scoring import Scorer
from melens.data.chat import PLAIN, Chat, Reply, decode_reply, prompt_text, read_reply
from melens.environment.conf import conf_folder
from melens.environment.extras import check_extra
from melens.environment.seeding import seeded
from melens.errors import MelensError
from melens.models.devices import input_device
from melens.tracing.batching import forget_longest, measured, rule_of

__all__ = ["Asking", "HarnessTask", "Progress", "check_thinking", "evaluate", "load_task"]

COLUMNS = (
    "item", "metric", "higher_is_better", "shown", "value", "chance", "prompt", "response", "thoughts", "unfinished",
)  # fmt: skip
"""Of a benchmark's items: `chance` is 1 over the number of choices, NaN without; prompt, response and thoughts are
empty where nothing was written. The answer is read from the response, which is empty where the reply ends inside a
thought: `unfinished`."""

Progress = Callable[[int], None]
"""Called with the number of requests done since the last call."""


@dataclass(frozen=True)
class Asking:
    """How a benchmark is asked.

    Attributes:
        generates: let the model write, where a benchmark leaves the choice; else its choices' log-likelihoods count.
        chat: how each prompt is put into the tokenizer's chat template, of `chat_of`; None for plain text.
        sampling: transformers' generation arguments of samples, None for greedy or what the task itself says.
        max_new_tokens: None for the task's own limit.
        batch_size: prompts that are generated from together.
    """

    generates: bool = False
    chat: Chat | None = None
    sampling: Mapping[str, Any] | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16


@dataclass(frozen=True)
class HarnessTask:
    """A benchmark that the harness can run.

    Attributes:
        benchmark: what it is.
        tasks: the harness's own, by name: several for MMLU.
        metrics: what is counted.
        generates: whether the model writes.
        identity: tells it from what is not the same: versions, the whole definition, data.
    """

    benchmark: Benchmark
    tasks: dict[str, Any]
    metrics: tuple[Metric, ...]
    generates: bool
    identity: str

    def n_requests(self, limit: int | None) -> int:
        """Count about what the model is asked: every choice of every item, where all have as many as the first."""
        total = 0
        for task in self.tasks.values():
            docs = task.eval_docs
            is_choice = task.OUTPUT_TYPE == "multiple_choice"
            per_item = len(task.doc_to_choice(docs[0])) if is_choice else 1
            total += per_item * min(limit or len(docs), len(docs))
        return total


def load_task(benchmark: Benchmark, data_dir: Path | None = None, *, generates: bool = False) -> HarnessTask:
    """Load a benchmark's definition and its data.

    Args:
        benchmark: one that the harness runs.
        data_dir: a folder with local data; None takes it from the hub.
        generates: ask for the letter of a choice, where the benchmark leaves that open.

    Raises:
        MelensError: the harness is not installed, a local file is wrong, or the hub cannot be reached.
    """
    check_extra("benchmark", "This benchmark")
    rows = None if data_dir is None else read_rows(data_dir, benchmark)
    with _quiet():
        writes_letters = generates and benchmark.form == "choices"
        if rows is not None:
            tasks = {benchmark.name: _local_task(benchmark, rows, writes_letters=writes_letters)}
        else:
            tasks = _hub_tasks(benchmark)
            if writes_letters:
                tasks = {name: _asking_letters(name, _as_rows(task)) for name, task in tasks.items()}
        told = [f"{name} {task.VERSION} {_definition(task)} {_told(task.eval_docs)}" for name, task in tasks.items()]
    metrics = (Metric("exact_match", "letter"),) if writes_letters else benchmark.metrics
    identity = f"lm_eval {metadata.version('lm_eval')} {told}"
    return HarnessTask(benchmark, tasks, metrics, writes_letters or benchmark.generates, identity)


def _definition(task: Any) -> str:
    """Write a task's whole definition out: prompts, choices, filters, metrics, what ends a reply."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(task.dump_config()))  # where a function lies; its code goes by version


def _told(docs: Any) -> str:
    return str([sorted((key, str(value)) for key, value in dict(doc).items()) for doc in docs])


def _config_of(benchmark: Benchmark) -> dict[str, Any]:
    import lm_eval.tasks  # seconds, which nobody else needs
    from lm_eval.tasks._yaml_loader import load_yaml

    assert benchmark.config is not None
    own = benchmark.config.removeprefix("melens/")
    root = conf_folder("benchmark", "tasks") if own != benchmark.config else Path(lm_eval.tasks.__file__).parent
    config: dict[str, Any] = load_yaml(root / own)
    config.pop("tag", None)
    return config


def _task(config: dict[str, Any]) -> Any:
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(config=config)


def _with_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    dataset = {"test": Dataset.from_list([dict(row) for row in rows])}
    splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": None}
    return {"custom_dataset": lambda **_: dataset, **splits}


def _local_task(benchmark: Benchmark, rows: list[dict[str, Any]], *, writes_letters: bool) -> Any:
    if writes_letters:
        return _asking_letters(benchmark.name, rows)
    config = _config_of(benchmark) | _with_rows([harness_row(row, benchmark) for row in rows])
    if benchmark.form == "choices":
        config |= {"doc_to_choice": "choices", "doc_to_target": "answer"}
    config.pop("should_decontaminate", None)
    return _task(config)


def _hub_tasks(benchmark: Benchmark) -> dict[str, Any]:
    try:
        if benchmark.name == "mmlu":
            from lm_eval.tasks import TaskManager

            return dict(TaskManager().load(["mmlu"])["tasks"])
        config = _config_of(benchmark)
        if benchmark.name == "aime":
            config["process_docs"] = lambda docs: docs.filter(lambda doc: int(doc["Year"]) >= 2022)
        return {benchmark.name: _task(config)}
    except Exception as error:  # whichever of the hub client's many
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MelensError(
            f"The data of {benchmark.name} could not be loaded from the hub ({why}); without a way to it set "
            "benchmark.data_dir to a folder of JSONL files, or HF_HUB_OFFLINE=1 where they were loaded before."
        ) from error


def _as_rows(task: Any) -> list[dict[str, Any]]:
    """Read question, choices and the right one's index from a multiple-choice task of the harness."""
    rows = []
    for doc in task.eval_docs:
        text = task.doc_to_text(doc)
        choices = task.doc_to_choice(doc)
        if isinstance(text, int):  # Winogrande: the choices are beginnings of one sentence
            rows.append({"question": f"... {task.doc_to_target(doc)}", "choices": choices, "answer": text})
            continue
        question = str(text).removeprefix("Question: ").removesuffix("\nAnswer:").split("\nA. ")[0]
        answer = task.doc_to_target(doc)
        right = choices.index(answer) if isinstance(answer, str) and not answer.isdigit() else int(answer)
        texts = doc["choices"] if choices == ["A", "B", "C", "D"] else choices
        rows.append({"question": question, "choices": list(texts), "answer": right})
    return rows


def _asking_letters(name: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    template = Benchmark(name, "knowledge", config="melens/choices_generate.yaml")
    kept = [{key: row[key] for key in ("question", "choices", "answer")} for row in rows]
    return _task(_config_of(template) | {"task": name} | _with_rows(kept))


# --- Running ----------------------------------------------------------------------------------------------------------


def _language_model(network: Any, tokenizer: Any, asking: Asking, max_batch_tokens: int, progress: Progress) -> Any:
    """Return the harness's view of a model: its own tokenisation and generation, our log-likelihoods."""
    from lm_eval.models.huggingface import HFLM

    class MelensLM(HFLM):
        @property
        def device(self) -> torch.device:
            return input_device(network)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            # The harness would leave a system message out where the template takes none
            assert asking.chat is not None
            assert add_generation_prompt
            return prompt_text(self.tokenizer, chat_history, asking.chat)

        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
            if skip_special_tokens and isinstance(tokens, list):
                return decode_reply(self.tokenizer, tokens)
            return str(super().tok_decode(tokens, skip_special_tokens=skip_special_tokens))

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            self._asked: Iterable[Any] = requests
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            found = []
            for request in requests:  # one by one, so that all windows are of it
                self._asked = repeat(request)
                found += super().loglikelihood_rolling([request], disable_tqdm=True)
            return found

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            self._task = requests[0].task_name
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = True, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            scorer = Scorer(network, max_length=self.max_length, max_batch_tokens=max_batch_tokens)
            pairs = [(context, continuation) for _, context, continuation in requests]
            names = [f"{of.task_name}, item {of.doc_id}" for of, _ in zip(self._asked, pairs, strict=False)]
            scored = scorer.score(pairs, progress, names=names)
            return [(float(each.log_p.sum()), bool(each.greedy.all())) for each in scored]

        def _model_generate(
            self, context: Tensor, max_length: int, stop: list[str], *, attention_mask: Tensor, **arguments: Any
        ) -> Tensor:
            width = context.shape[1]
            written = context.new_full((len(context), max_length), self.tokenizer.pad_token_id)
            written[:, :width] = context
            for rows, length in _alike(network, attention_mask.sum(-1).tolist(), max_length - width):
                forget_longest(network)
                own, mask = context[rows, width - length :], attention_mask[rows, width - length :]
                arguments["logits_processor"] = [_FiniteLogits(self._task, own, self.tokenizer)]
                most = max_length - width + length
                found = super()._model_generate(own, most, stop, attention_mask=mask, **arguments)[:, length:]
                written[rows, width : width + found.shape[1]] = found
                progress(len(rows))
            return written

    return MelensLM(pretrained=network, tokenizer=tokenizer, backend="causal", batch_size=asking.batch_size)


def _alike(network: Any, lengths: Sequence[int], n_new: int) -> list[tuple[list[int], int]]:
    """Group prompts that may be generated from together, padded on the left, each group with its longest's tokens."""
    rule = measured(network, rule_of(network), padding="left")
    if not rule.may_share([min(lengths), max(lengths) + n_new]):  # rows grow, and pass a limit one by one
        rule = replace(rule, equal_beyond=0)
    groups = rule.groups(lengths, max_batch_tokens=sys.maxsize, max_padding=1.0, longest_first=True)
    return [(rows, max(lengths[row] for row in rows)) for rows in groups]


class _FiniteLogits:
    """Stops a generation whose logits hold NaN: greedy decoding would take its place for the likeliest token."""

    def __init__(self, task: str, context: Tensor, tokenizer: Any) -> None:
        self._task, self._context, self._tokenizer = task, context, tokenizer

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        broken = logits.isnan().any(-1).nonzero()
        if len(broken):
            prompt = self._tokenizer.decode(self._context[int(broken[0])], skip_special_tokens=True)
            item = f"that begins {' '.join(prompt.split())[:50]!r}"
            check_scores(self._task, [item], [float("nan")], "logit of a next token")
        return logits


def evaluate(
    network: Any,
    tokenizer: Any,
    task: HarnessTask,
    asking: Asking,
    *,
    limit: int | None = None,
    seed: int = 0,
    max_batch_tokens: int = 4096,
    progress: Progress = lambda done: None,
) -> pd.DataFrame:
    """Run a benchmark on a model as it stands, with the mask that is on it.

    Args:
        network, tokenizer: a causal language model of transformers.
        task: of `load_task`.
        asking: how.
        limit: only the first so many items, of each of MMLU's subjects.
        seed: of samples.
        max_batch_tokens: in a forward pass for log-likelihoods.
        progress: hears of the requests done.

    Returns:
        A row an item and metric, in the columns `COLUMNS`.

    Raises:
        MelensError: a log-likelihood, a logit or a score that is NaN or infinite, by task and item; a chat template
            that does not take a prompt, or that lets a model think whose log-likelihoods are asked for.
    """
    check_thinking(task, asking)
    from lm_eval.evaluator import evaluate as run

    with _quiet(), seeded(seed), ExitStack() as stack:
        lm = _language_model(network, tokenizer, asking, max_batch_tokens, progress)
        readers = {}
        for name, of_harness in task.tasks.items():
            of_harness.set_config("num_fewshot", 0)
            of_harness.set_fewshot_seed(seed)
            if task.generates:
                readers[name] = stack.enter_context(_generating(of_harness, asking, lm.max_length))
        results = run(
            lm,
            {"tasks": task.tasks, "groups": {}},
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=asking.chat is not None,
        )
    rows = [row for name, own in results["samples"].items() for row in _rows(name, own, task, readers.get(name))]
    items = pd.DataFrame(rows, columns=list(COLUMNS))
    check_scores(task.benchmark.name, items["item"], items["value"], "score")
    return items


def check_thinking(task: HarnessTask, asking: Asking) -> None:
    """Raise a `MelensError` where choices would be scored as the beginning of a thought."""
    chat = asking.chat
    if chat is not None and not task.generates and (chat.thinking or chat.opened):
        remedy = "benchmark.thinking=false" if chat.thinking else "benchmark.chat=false"
        raise MelensError(
            f"{task.benchmark.name} is scored by the log-likelihoods of its answers, behind which there is no room for "
            f"thoughts, and thinking is {chat.in_words()}: give benchmark.mode=generate, or {remedy}."
        )


_Reader = Callable[[str], Reply]
"""Takes the thoughts out of a reply, and what follows the end of its answer."""


def _reader(asking: Asking, until: Any) -> _Reader:
    from lm_eval.models.utils import postprocess_generated_text

    def read(text: str) -> Reply:
        reply = read_reply(text, (asking.chat or PLAIN).opened)
        return replace(reply, answer=postprocess_generated_text(reply.answer, until, None))

    return read


@contextmanager
def _generating(of_harness: Any, asking: Asking, max_length: int) -> Iterator[_Reader]:
    """Let a task be answered as asked, and its filters read the answers alone.

    Its own arguments and filters come back, as the next model or job may be asked otherwise.
    """
    before = of_harness.config.generation_kwargs
    own = dict(before or {})
    read = _reader(asking, own.get("until"))
    if asking.chat is not None:
        own["until"] = []  # what ends an answer, as "Question:", may stand in a thought, and ends nothing there
    most = asking.max_new_tokens or own.get("max_gen_toks", 256)
    own["max_gen_toks"] = min(most, max_length // 2)
    if asking.sampling is not None:
        own |= {"do_sample": True, **asking.sampling}
    of_harness.set_config("generation_kwargs", own)
    filters = [ensemble.filters for ensemble in of_harness._filters]
    for ensemble in of_harness._filters:
        ensemble.filters = [lambda: _Answers(read), *ensemble.filters]
    try:
        yield read
    finally:
        of_harness.set_config("generation_kwargs", before)
        for ensemble, own_filters in zip(of_harness._filters, filters, strict=True):
            ensemble.filters = own_filters


class _Answers:
    """A filter of the harness, before all others: of each reply the answer alone."""

    def __init__(self, read: _Reader) -> None:
        self._read = read

    def apply(self, replies: Iterable[Sequence[str]], docs: Sequence[Any]) -> list[list[str]]:
        return [[self._read(reply).answer for reply in of_doc] for of_doc in replies]


def _rows(
    name: str, samples: Sequence[Mapping[str, Any]], task: HarnessTask, read: _Reader | None
) -> Iterator[dict[str, Any]]:
    """Lay the harness's records of one task out; without a reader, nothing was written."""
    prefix = "" if name == task.benchmark.name else f"{name}/"
    for sample in samples:
        n_choices = len(sample["arguments"])
        reply = Reply("") if read is None else read(str(sample["resps"][0][0]))
        for metric in task.metrics:
            if metric.name not in sample or sample["filter"] != metric.filter:
                continue
            value = sample[metric.name]
            if metric.name == "word_perplexity":  # log-likelihood and number of words
                value = -value[0] / value[1]
            yield {
                "item": f"{prefix}{sample['doc_id']}",
                "metric": metric.label,
                "higher_is_better": metric.higher_is_better,
                "shown": metric.shown,
                "value": float(value),
                "chance": 1 / n_choices if n_choices > 1 else float("nan"),
                "prompt": str(sample["arguments"][0][0]) if task.generates else "",
                "response": reply.answer,
                "thoughts": reply.thoughts,
                "unfinished": not reply.is_finished,
            }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's and the datasets' own messages and bars off the terminal."""
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
