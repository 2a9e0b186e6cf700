"""Benchmarks with masks and without, on the same items: tables 1, 2, 5, 6 and 7."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from experiments.options import Options
from experiments.options.benchmark import Asked, asked_for
from experiments.runner.legacy import ReportedOptions
from experiments.runner.masks import masks_of
from experiments.runner.study import Run as Study
from melens import MelensError, Probe, WeMask, load_model
from melens.benchmarks.catalog import Benchmark
from melens.benchmarks.harness import RequestOptions, check_thinking, evaluate
from melens.benchmarks.language import Needle, Questions, make_questions, score_questions
from melens.benchmarks.refusals import count_judged, judged_refusals, judging_chat
from melens.benchmarks.scores import best_rates, count_verdicts, summarise
from melens.benchmarks.scoring import Scorer
from melens.benchmarks.tables import lay_out
from melens.benchmarks.tasks import HarnessTask, load_task
from melens.data.chat import Chat, chat_of
from melens.data.texts import bos_prefix
from melens.figures.scores import score_differences, score_table
from melens.models.generation import verify_generation
from melens.models.loading import load_tokenizer
from melens.models.view import plain_twin
from melens.report.result import Figure, Result
from melens.storage.cache import Store, code_version, fingerprint, hash_of, store_for, tokenizer_fingerprint

UNMASKED = "no mask"


def probes(model: TransformerBridge, options: ReportedOptions) -> list[Probe]:
    """The masks only need the ME layer, which the default probes find."""
    return []


def load_tasks(cfg: Options) -> None:
    """Load the definitions and the data of all benchmarks that have some: before the model, which takes longer.

    Raises:
        MelensError: a local file is wrong, the hub cannot be reached, or the model's chat
            template does not take what is asked.
    """
    asked = asked_for(cfg)
    of_harness = [benchmark for benchmark in asked.benchmarks if benchmark.config is not None]
    tasks = [_harness_task(benchmark, asked.data_dir, asked.generates) for benchmark in of_harness]
    chat = _chat(asked, lambda: load_tokenizer(**cfg.model.model_dump(exclude_unset=True)))
    for task in tasks:
        check_thinking(task, chat if asked.in_chat(task.benchmark) else None)


@cache
def _harness_task(benchmark: Benchmark, data_dir: str | None, generates: bool) -> HarnessTask:
    return load_task(benchmark, None if data_dir is None else Path(data_dir).expanduser(), generates=generates)


def _chat(asked: Asked, load: Callable[[], Any]) -> Chat | None:
    """Return how a model is asked in its chat template, None where no benchmark is and no tokenizer needs loading."""
    in_chat = [benchmark.name for benchmark in asked.benchmarks if asked.in_chat(benchmark)]
    if in_chat:
        tokenizer = load()
        if not getattr(tokenizer, "chat_template", None):
            raise MelensError(
                f"{in_chat[0]} is asked in chat, and this model's tokenizer has no chat template; benchmark.chat=false "
                "asks in plain text."
            )
        return chat_of(tokenizer, asked.thinking, option="benchmark.thinking")
    if asked.thinking is not None:
        raise MelensError(
            f"benchmark.thinking is {str(asked.thinking).lower()}, which the chat template is told, but no benchmark "
            "is asked in it: leave thinking at auto, or give benchmark.mode=generate or benchmark.chat=true."
        )
    return None


def run(study: Study, options: ReportedOptions) -> Result:
    """Let the model answer each benchmark under each mask, and compare with the answers that it gives without."""
    asked = asked_for(study.cfg)
    bench = Bench(study, asked, keep=options.keep)
    cells = {benchmark.name: _cells(study, asked, benchmark) for benchmark in asked.benchmarks}
    done = [bench.run(benchmark, cells[benchmark.name]) for benchmark in asked.benchmarks]
    everything = pd.concat([each.items for each in done], ignore_index=True)
    scores = summarise(everything, UNMASKED)
    masked = [(c.label, c.family, c.rate, c.mask.select) for of_task in cells.values() for c in of_task if c.mask]
    masks = pd.DataFrame(masked, columns=["mask", "family", "rate", "select"]).drop_duplicates()
    by_rate = best_rates(everything[everything["shown"]], masks, UNMASKED)
    layout = lay_out(scores, study.trace.model["name"], how_asked(asked, bench.chat))
    metrics = study.metrics(
        tasks=[benchmark.name for benchmark in asked.benchmarks],
        left_out=list(asked.left_out),
        table=asked.table,
        mode="generate" if asked.generates else "loglikelihood",
        thinking=None if bench.chat is None else bench.chat.in_words(),
        n_unfinished=int(scores.loc[scores["shown"], "n_unfinished"].sum()),
        runs_kept=sum(each.n_kept for each in done),
        masks={
            task: {cell.label: cell.mask.to_dict() for cell in of_task if cell.mask} for task, of_task in cells.items()
        },
        compared=count_verdicts(scores.merge(masks, on="mask"), "select"),
    )
    tables = {"benchmark_items": everything, "benchmark_scores": scores}
    if len(by_rate):
        tables["best_rates"] = by_rate
    return Result(
        "benchmark",
        study.trace.model,
        metrics,
        tables,
        _pictures(study, scores, layout),
        _findings(scores, by_rate, asked, bench.chat),
        {"table.md": layout.markdown(), "table.tex": layout.latex()},
    )


# --- Masks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A mask of the table.

    Attributes:
        label: its row.
        family: what it has in common with those that differ in the rate alone.
        rate: of it.
        mask: None for the unmasked model.
    """

    label: str
    family: str
    rate: float
    mask: WeMask | None


_VARIED = ("select", "site", "start", "layers", "seed")


def _cells(study: Study, asked: Asked, benchmark: Benchmark) -> list[Cell]:
    """Put the masks of a benchmark together: which blocks they mask depends on what it asks for (appendix C)."""
    cells: dict[str, Cell] = {}
    for preset in asked.masks:
        options = preset.options.model_copy(update={"layers": asked.layers_of(benchmark, preset)})
        found = masks_of(options, study.me, study.model)
        if None in found:
            cells[UNMASKED] = Cell(UNMASKED, "", 0, None)
        masks = [mask for mask in found if mask is not None]
        varied = [name for name in _VARIED if len({str(getattr(mask, name)) for mask in masks}) > 1]
        for mask in masks:
            family = " ".join([preset.name, *(f"{name}={getattr(mask, name)}" for name in varied)])
            label = f"{family} rate={float(mask.rate):g}"
            cells[label] = Cell(label, family, float(mask.rate), mask)
    return list(cells.values())


# --- Running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Done:
    items: pd.DataFrame
    n_kept: int


class Bench:
    """Runs benchmarks on the model, or finds that they were run before."""

    def __init__(self, study: Study, asked: Asked, *, keep: bool) -> None:
        self._study, self._asked = study, asked
        self._tokenizer = study.model.tokenizer
        self._network = plain_twin(study.model)
        self._check_tokenizer()
        self.chat = _chat(asked, lambda: self._tokenizer)
        self._judge = self._load_judge()
        self._store = self._kept() if keep else None

    def _load_judge(self) -> TransformerBridge | None:
        if self._asked.judge is None or all(benchmark.kind != "safety" for benchmark in self._asked.benchmarks):
            return None
        judge = load_model(self._asked.judge, device=self._study.cfg.model.device)
        judging_chat(judge.tokenizer, self._asked.judge)
        return judge

    def _check_tokenizer(self) -> None:
        for benchmark in self._asked.benchmarks:
            if benchmark.config is not None and self._tokenizer is None:
                raise MelensError(f"{benchmark.name} needs a tokenizer, and this model has none.")

    def _kept(self) -> Store:
        """Return where the items of this model are kept, for all that every benchmark's depend on."""
        judge = None if self._judge is None else fingerprint(self._judge.original_model)
        judge_reads = None if self._judge is None else tokenizer_fingerprint(self._judge.tokenizer)
        reads = tokenizer_fingerprint(self._tokenizer)
        own = code_version(Path(__file__).parent)
        told = [own, reads, self._max_length, self._study.cfg.max_batch_tokens, judge, judge_reads]
        return store_for(
            "benchmarks", self._study.model.original_model, *told, libraries=("lm_eval", "jinja2", "datasets")
        )

    @cached_property
    def _max_length(self) -> int:
        return int(self._study.model.cfg.n_ctx)

    def run(self, benchmark: Benchmark, cells: Sequence[Cell]) -> _Done:
        """Run a benchmark under each mask and with each seed."""
        asked = self._asked
        task = self._prepared(benchmark)
        generates = isinstance(task, HarnessTask) and task.generates
        seeds = asked.seeds if generates and asked.generates else asked.seeds[:1]
        n_requests = len(task.requests) if isinstance(task, Questions) else task.n_requests(asked.limit)
        progress = _Counter(self._study.stage(benchmark.name), n_requests * len(cells) * len(seeds))
        found, n_kept = [], 0
        batch_sizes = {cell.label: self._batch_size(cell.mask) for cell in cells} if generates else {}
        for at, (cell, seed) in enumerate((cell, seed) for cell in cells for seed in seeds):
            name = self._key(benchmark, task, cell, seed)
            items = None if self._store is None else self._store.load_table(name)
            n_kept += items is not None
            if items is None:
                with nullcontext() if cell.mask is None else cell.mask.applied(self._network):
                    items = self._items(task, seed, progress, batch_sizes.get(cell.label))
                if benchmark.kind == "safety" and self._judge is not None:
                    items = self._judged(items, task, self._judge)
                if self._store is not None:
                    self._store.save_table(name, items)
            progress.reach((at + 1) * n_requests)
            found.append(items.assign(task=benchmark.name, mask=cell.label, rate=cell.rate, seed=seed))
        return _Done(pd.concat(found, ignore_index=True), n_kept)

    def _prepared(self, benchmark: Benchmark) -> HarnessTask | Questions:
        if benchmark.config is not None:
            return _harness_task(benchmark, self._asked.data_dir, self._asked.generates)
        ids: list[int] = []
        if benchmark.name == "needle" and self._tokenizer is not None:
            ids = self._tokenizer(self._study.text, add_special_tokens=False)["input_ids"]
        return make_questions(
            benchmark,
            self._tokenizer,
            self._study.texts,
            ids,
            vocabulary=int(self._study.model.cfg.d_vocab),
            bos=bos_prefix(self._tokenizer, self._study.cfg.prompts.bos),
            limit=self._asked.limit,
            seed=self._study.cfg.seed,
            needle=Needle(*self._asked.needle),
        )

    def _asking(self, task: HarnessTask) -> RequestOptions:
        asked = self._asked
        own = getattr(self._network, "generation_config", None)
        sampling = {
            "temperature": asked.temperature or getattr(own, "temperature", None) or 1.0,
            "top_p": asked.top_p or getattr(own, "top_p", None) or 1.0,
        }
        most = asked.max_new_tokens or (task.benchmark.max_new_tokens if asked.generates else None)
        return RequestOptions(
            chat=self.chat if asked.in_chat(task.benchmark) else None,
            sampling=sampling if asked.generates else None,
            max_new_tokens=most,
            batch_size=asked.batch_size,
        )

    def _batch_size(self, mask: WeMask | None) -> int:
        """Return how many prompts may be written from together, as tried on this model under this mask."""
        found = verify_generation(self._network, mask)
        if not found.use_cache:
            raise MelensError(
                "With a cache of keys and values this model writes something else than without, and the harness writes "
                "with one: give benchmark.mode=loglikelihood, and tasks that are scored so."
            )
        return self._asked.batch_size if found.together else 1

    def _items(
        self, task: HarnessTask | Questions, seed: int, progress: _Counter, batch_size: int | None
    ) -> pd.DataFrame:
        most = self._study.cfg.max_batch_tokens
        if isinstance(task, Questions):
            scorer = Scorer(self._network, max_length=self._max_length, max_batch_tokens=most)
            return score_questions(scorer, task, progress)
        asking, limit = self._asking(task), self._asked.limit
        asking = asking if batch_size is None else replace(asking, batch_size=batch_size)
        return evaluate(
            self._network,
            self._tokenizer,
            task,
            asking,
            limit=limit,
            seed=seed,
            max_batch_tokens=most,
            progress=progress,
        )

    def _key(self, benchmark: Benchmark, task: HarnessTask | Questions, cell: Cell, seed: int) -> str:
        """Name a run by what its items depend on besides what all runs of the store share."""
        asked = [task] if isinstance(task, Questions) else [task.benchmark, task.identity, self._asking(task)]
        return f"{benchmark.name}-{hash_of(cell.mask, self._asked.limit, seed, *asked)[:24]}"

    def _judged(self, items: pd.DataFrame, task: HarnessTask | Questions, judge: TransformerBridge) -> pd.DataFrame:
        """Let the judge say which replies refuse, instead of the phrases."""
        assert isinstance(task, HarnessTask)
        (of_harness,) = task.tasks.values()
        prompts = [of_harness.doc_to_text(of_harness.eval_docs[int(item)]) for item in items["item"]]
        refused = judged_refusals(
            plain_twin(judge), judge.tokenizer, int(judge.cfg.n_ctx), prompts, items["response"].tolist()
        )
        judged = zip(items["metric"], items["response"], refused, strict=True)
        return items.assign(value=[count_judged(metric, reply, refused=refusal) for metric, reply, refusal in judged])


class _Counter:
    """Adds up the requests that are done for a progress bar."""

    def __init__(self, show: Any, total: int) -> None:
        self._show, self._total, self._done = show, total, 0
        show(0, total)

    def __call__(self, done: int) -> None:
        self._done += done
        self._show(min(self._done, self._total), self._total)

    def reach(self, done: int) -> None:
        self._done = done
        self._show(done, self._total)


# --- Telling ----------------------------------------------------------------------------------------------------------


def how_asked(asked: Asked, chat: Chat | None) -> str:
    """Tell in sentences how a model was asked, for the caption of a table."""
    ways = set()
    for benchmark in asked.benchmarks:
        if asked.generates and benchmark.kind != "language":
            ways.add("answers written")
        else:
            ways.add("answers written greedily" if benchmark.generates else "log-likelihoods")
    how = ", or ".join(sorted(ways, reverse=True))
    if isinstance(asked.layers, list):
        where = f"block{'s' * (len(asked.layers) > 1)} {', '.join(map(str, asked.layers))}"
    else:
        where = {
            "all": "all blocks from the start on",
            "first": "the first block from the start on",
            "auto": "all blocks from the start on for knowledge and language, the first alone for maths and safety",
        }[asked.layers]
    limit = "" if asked.limit is None else f" The first {asked.limit} items of each."
    judge = "" if asked.judge is None else f" Refusals judged by {asked.judge}."
    thinking = "" if chat is None else f" Thinking: {chat.in_words()}."
    return f"Zero-shot, {how}.{thinking} Masked: {where}.{limit}{judge}"


def _pictures(study: Study, scores: pd.DataFrame, layout: Any) -> dict[str, Figure]:
    name = study.trace.model["name"]
    pictures = {}
    compared = scores[scores["shown"] & scores["p_corrected"].notna()]
    n_shown = int((compared["verdict"] != "no difference shown").sum())
    here = f"{n_shown} of {len(compared)} differences to the unmasked model are shown."
    paper = "WeMask improves the scores; random and magnitude masks harm them."
    table = score_table(layout.columns, layout.rows, layout.cells, layout.best, title=f"Scores of {name}")
    pictures["benchmark_table"] = Figure(table, "tables 1, 2, 5, 6, 7", paper, layout.caption)
    if len(compared):
        note = "Filled: shown (p < 0.05 after correction); hollow: no difference shown."
        figure = score_differences(compared, title=f"Differences to the unmasked model: {name}", note=note)
        pictures["benchmark_differences"] = Figure(figure, "tables 1, 2, 5, 6, 7", paper, here)
    return pictures


def _findings(scores: pd.DataFrame, by_rate: pd.DataFrame, asked: Asked, chat: Chat | None) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "score", "difference to no mask, on the same items")]
    for row in scores[scores["shown"]].to_dict("records"):
        score = f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f}; n={row['n']})"
        if row["n_seeds"] > 1:
            score += f", sd of {row['n_seeds']} seeds {row['sd']:.3f}"
        if row["n_unfinished"]:
            score += f"; {row['n_unfinished']} of {row['n_replies']} replies end inside a thought: no answer"
        difference = ""
        if row["verdict"]:
            interval = f"{row['difference_low']:+.3f} to {row['difference_high']:+.3f}"
            difference = f"{row['difference']:+.3f} ({interval}), p={row['p_corrected']:.2g}: {row['verdict']}"
        rows.append((f"{row['task']}, {row['metric']}: {row['mask']}", score, difference))
    for (task, metric, family), of_family in by_rate.groupby(["task", "metric", "family"], sort=False):
        held_out, same = of_family.sort_values("selection").to_dict("records")
        told = f"{held_out['difference']:+.3f} ({held_out['low']:+.3f} to {held_out['high']:+.3f}; n={held_out['n']})"
        chosen = f"rate {held_out['rate']:g}, chosen on one half of the items, scored on the other"
        on_same = f"on the same items it would be {same['rate']:g} and {same['difference']:+.3f}: too good by selection"
        rows.append((f"{task}, {metric}: {family} at its best", chosen, f"{told}; {on_same}"))
    if chat is not None:
        rows.append(("thinking", chat.in_words(), ""))
    if asked.left_out:
        rows.append(("left out", f"{', '.join(asked.left_out)}: only the hub has them", ""))
    return rows
