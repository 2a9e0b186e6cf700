"""Score a model on benchmarks with several masks, always on the same items.

    options = BenchmarkOptions(limit=100)
    evaluator = Evaluator(study, benchmarks_of(["copy", "induction"]), options, language_data(model, text))
    configurations = [MaskConfiguration("no mask"), MaskConfiguration("paper", mask)]
    items, n_kept = evaluator.score(BENCHMARKS["copy"], configurations)

1. A benchmark becomes a task of the harness (`tasks`) or, where it needs no data, a list of questions (`language`).
2. For each mask and each seed of samples, the mask is put on the model and the items are scored (`harness.evaluate`,
   `score_questions`); a judge may decide instead of phrases which replies refuse.
3. The items of each run may be kept in the user's cache, under all that decides them, and are then found there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.study import Study
from melens.benchmarks.catalog import Benchmark
from melens.benchmarks.harness import RequestOptions, check_thinking, evaluate
from melens.benchmarks.language import LanguageData, Questions, make_questions, score_questions
from melens.benchmarks.options import BenchmarkOptions
from melens.benchmarks.refusals import count_judged, judged_refusals, judging_chat
from melens.benchmarks.scoring import Scorer
from melens.benchmarks.tasks import HarnessTask, load_task
from melens.data.chat import Chat, chat_of
from melens.errors import MelensError
from melens.masks.mask import WeMask
from melens.models.generation import verify_generation
from melens.models.loading import load_model
from melens.models.twins import plain_twin
from melens.storage.cache import Store, fingerprint, hash_of, store_for, tokenizer_fingerprint
from melens.tracing.trace import Progress

__all__ = ["Evaluator", "MaskConfiguration", "chat_for", "check_tasks"]


@dataclass(frozen=True)
class MaskConfiguration:
    """A mask of the comparison.

    Attributes:
        label: its row in tables.
        mask: None for the unmasked model.
        family: what it shares with the masks that differ from it in the rate only.
    """

    label: str
    mask: WeMask | None = None
    family: str = ""

    @property
    def rate(self) -> float:
        return 0.0 if self.mask is None else float(self.mask.rate)


def chat_for(benchmarks: Sequence[Benchmark], options: BenchmarkOptions, tokenizer: Any) -> Chat | None:
    """Return how a tokenizer's chat template is used; None where no benchmark uses it.

    Raises:
        MelensError: the tokenizer has no chat template, or the template cannot do what the options want.
    """
    in_chat = next((benchmark.name for benchmark in benchmarks if options.in_chat(benchmark)), None)
    if in_chat is None and options.thinking is not None:
        raise MelensError(
            f"benchmark.thinking is {str(options.thinking).lower()}, but no benchmark uses the chat template, which "
            "would turn thinking on or off. Leave thinking at auto, or set benchmark.mode=generate or "
            "benchmark.chat=true."
        )
    if in_chat is not None and not getattr(tokenizer, "chat_template", None):
        raise MelensError(
            f"{in_chat} uses the chat template, but this model's tokenizer has none. Set benchmark.chat=false to use "
            "plain text."
        )
    return None if in_chat is None else chat_of(tokenizer, options.thinking, option="benchmark.thinking")


def check_tasks(benchmarks: Sequence[Benchmark], options: BenchmarkOptions, tokenizer: Any) -> None:
    """Load the definitions and the data of all benchmarks that have some, and try the chat template on them.

    Raises:
        MelensError: a local file is wrong, the hub cannot be reached, or the chat template cannot do what is wanted.
    """
    of_harness = [benchmark for benchmark in benchmarks if benchmark.config is not None]
    tasks = [_load_once(benchmark, options.data_dir, options.generates) for benchmark in of_harness]
    chat = chat_for(benchmarks, options, tokenizer)
    for task in tasks:
        check_thinking(task, chat if options.in_chat(task.benchmark) else None)


@cache
def _load_once(benchmark: Benchmark, data_dir: str | None, generates: bool) -> HarnessTask:
    """Load a benchmark's task for the harness once in a process: the jobs of a sweep share it."""
    return load_task(benchmark, None if data_dir is None else Path(data_dir).expanduser(), generates=generates)


class Evaluator:
    """Scores the model of a study on benchmarks, or finds the items of an earlier run.

    Attributes:
        chat: how the chat template is used; None where it is not.
    """

    def __init__(
        self,
        study: Study,
        benchmarks: Sequence[Benchmark],
        options: BenchmarkOptions,
        data: LanguageData | None = None,
        *,
        keep: bool = False,
    ) -> None:
        """Check what the benchmarks need, and load the judge.

        Args:
            study: of the model.
            benchmarks: that will be scored.
            options: how they are put to the model.
            data: what benchmarks without data of their own are made of.
            keep: items in the user's cache.

        Raises:
            MelensError: the model has no tokenizer or chat template where one is needed, or the judge cannot judge.
        """
        self._study, self._options, self._data = study, options, data
        self._network, self._tokenizer = plain_twin(study.model), study.model.tokenizer
        self._max_length = int(study.model.cfg.n_ctx)
        for benchmark in benchmarks:
            if benchmark.config is not None and self._tokenizer is None:
                raise MelensError(f"{benchmark.name} needs a tokenizer, and this model has none.")
        self.chat = chat_for(benchmarks, options, self._tokenizer)
        self._judge: TransformerBridge | None = None
        if options.judge is not None and any(benchmark.kind == "safety" for benchmark in benchmarks):
            self._judge = load_model(options.judge, device=options.judge_device)
            judging_chat(self._judge.tokenizer, options.judge)
        self._store = self._items_store() if keep else None

    def score(self, benchmark: Benchmark, configurations: Sequence[MaskConfiguration]) -> tuple[pd.DataFrame, int]:
        """Score a benchmark under each mask and with each seed.

        Returns:
            The items, with the columns of `harness.COLUMNS` and `task`, `mask`, `rate`, `seed`; and how many runs (of
            one mask and seed) were found in the cache.
        """
        task = self._task(benchmark)
        generates = isinstance(task, HarnessTask) and task.generates
        seeds = self._options.seeds if generates and self._options.generates else self._options.seeds[:1]
        n_requests = len(task.requests) if isinstance(task, Questions) else task.n_requests(self._options.limit)
        stage = self._study.stage(f"answers to {benchmark.name}")
        progress = _RequestCounter(stage, n_requests * len(configurations) * len(seeds))
        found, n_kept = [], 0
        for configuration in configurations:
            batch_size = self._batch_size(configuration.mask) if generates else 1
            for seed in seeds:
                name = self._key(task, configuration.mask, seed)
                items = None if self._store is None else self._store.load_table(name)
                n_kept += items is not None
                if items is None:
                    items = self._score(task, configuration.mask, seed, batch_size, progress)
                    if self._store is not None:
                        self._store.save_table(name, items)
                label, rate = configuration.label, configuration.rate
                found.append(items.assign(task=benchmark.name, mask=label, rate=rate, seed=seed))
                progress.reach(len(found) * n_requests)
        return pd.concat(found, ignore_index=True), n_kept

    def _task(self, benchmark: Benchmark) -> HarnessTask | Questions:
        if benchmark.config is not None:
            return _load_once(benchmark, self._options.data_dir, self._options.generates)
        assert self._data is not None, f"{benchmark.name} is made of texts"
        vocabulary = int(self._study.model.cfg.d_vocab)
        return make_questions(benchmark, self._tokenizer, self._data, vocabulary=vocabulary, limit=self._options.limit)

    def _score(
        self, task: HarnessTask | Questions, mask: WeMask | None, seed: int, batch_size: int, progress: _RequestCounter
    ) -> pd.DataFrame:
        most = self._study.max_batch_tokens
        with nullcontext() if mask is None else mask.applied(self._network):
            if isinstance(task, Questions):
                scorer = Scorer(self._network, max_length=self._max_length, max_batch_tokens=most)
                return score_questions(scorer, task, progress)
            requests = replace(self._request_options(task), batch_size=batch_size)
            how: dict[str, Any] = {"limit": self._options.limit, "seed": seed, "max_batch_tokens": most}
            items = evaluate(self._network, self._tokenizer, task, requests, **how, progress=progress)
        judges = task.benchmark.kind == "safety" and self._judge is not None
        return self._judged(items, task) if judges else items

    def _request_options(self, task: HarnessTask) -> RequestOptions:
        options, own = self._options, getattr(self._network, "generation_config", None)
        sampling = {
            name: getattr(options, name) or getattr(own, name, None) or 1.0 for name in ("temperature", "top_p")
        }
        return RequestOptions(
            chat=self.chat if options.in_chat(task.benchmark) else None,
            sampling=sampling if options.generates else None,
            max_new_tokens=options.max_new_tokens or (task.benchmark.max_new_tokens if options.generates else None),
            batch_size=options.batch_size,
        )

    def _batch_size(self, mask: WeMask | None) -> int:
        """Return how many replies may be written together, as tried on this model under this mask."""
        found = verify_generation(self._network, mask)
        if not found.use_cache:
            raise MelensError(
                "This model writes something else with a cache of keys and values than without, and the harness always "
                "uses a cache. Set benchmark.mode=loglikelihood, and leave out tasks whose answers are written."
            )
        return self._options.batch_size if found.together else 1

    def _judged(self, items: pd.DataFrame, task: HarnessTask) -> pd.DataFrame:
        """Score replies by what the judge, instead of the phrases, says of them."""
        assert self._judge is not None
        (of_harness,) = task.tasks.values()
        prompts = [of_harness.doc_to_text(of_harness.eval_docs[int(item)]) for item in items["item"]]
        network, n_ctx = plain_twin(self._judge), int(self._judge.cfg.n_ctx)
        refused = judged_refusals(network, self._judge.tokenizer, n_ctx, prompts, items["response"].tolist())
        judged = zip(items["metric"], items["response"], refused, strict=True)
        return items.assign(value=[count_judged(metric, reply, refused=refusal) for metric, reply, refusal in judged])

    def _items_store(self) -> Store:
        """Return where items are kept, by all that decides those of every benchmark."""
        of_judge = None
        if (judge := self._judge) is not None:
            of_judge = [fingerprint(judge.original_model), tokenizer_fingerprint(judge.tokenizer)]
        tokenizer = tokenizer_fingerprint(self._tokenizer)
        decides = [tokenizer, self._max_length, self._study.max_batch_tokens, of_judge]
        libraries = ("lm_eval", "jinja2", "datasets")
        return store_for("benchmarks", self._study.model.original_model, *decides, libraries=libraries)

    def _key(self, task: HarnessTask | Questions, mask: WeMask | None, seed: int) -> str:
        """Name a run by what decides its items besides what all runs of the store share."""
        own = [task] if isinstance(task, Questions) else [task.benchmark, task.identity, self._request_options(task)]
        return f"{task.benchmark.name}-{hash_of(mask, self._options.limit, seed, *own)[:24]}"


class _RequestCounter:
    """Adds up the requests that are done, for a progress bar."""

    def __init__(self, show: Progress, total: int) -> None:
        self._show, self._total, self._done = show, total, 0
        show(0, total)

    def __call__(self, done: int) -> None:
        self.reach(min(self._done + done, self._total))

    def reach(self, done: int) -> None:
        self._done = done
        self._show(done, self._total)
