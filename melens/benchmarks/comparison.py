"""Compare masks on benchmarks: tables 1, 2, 5, 6 and 7.

    configurations = [MaskConfiguration("no mask"), MaskConfiguration("paper", WeMask(0.1, start=12).on(model))]
    result = benchmark(study, {"copy": configurations, "induction": configurations}, data=language_data(model, text))
    result.figures["benchmark_differences"]

1. An `Evaluator` scores every benchmark under every mask, item by item.
2. `summarise` compares each mask with the unmasked model on the same items; `best_rates` finds the best rate.
3. The scores become a table, its figures, findings and the counts that the claims are judged by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import pandas as pd
from pydantic import Field

from melens.analysis.study import Study
from melens.benchmarks.catalog import Benchmark, benchmarks_of
from melens.benchmarks.evaluation import Evaluator, MaskConfiguration
from melens.benchmarks.language import LanguageData
from melens.benchmarks.options import BenchmarkOptions
from melens.benchmarks.scores import best_rates, count_verdicts, summarise
from melens.benchmarks.tables import Layout, lay_out
from melens.claims.engine import Claim, Judgement, Verdict
from melens.data.chat import Chat
from melens.figures.scores import score_differences, score_table
from melens.report.result import Figure, Metrics, Result

__all__ = [
    "CLAIMS", "UNMASKED", "BenchmarkMetrics", "ScoreMetrics", "benchmark", "describe_requests", "judge_comparisons",
    "score_figures", "score_findings",
]  # fmt: skip

UNMASKED = "no mask"
"""The label of the unmasked model."""


class ScoreMetrics(Metrics):
    """What every comparison of scores measures.

    Attributes:
        table: of the paper, whose benchmarks these are.
        left_out: benchmarks of that table whose data only the hub has.
        thinking: whether the model was to think, in words.
        n_unfinished: replies that end inside a thought.
        compared: how many scores were compared (`all`), `better` and `worse`; of `benchmark` by the mask's choice of
            dims, of `training_table` by the kind of row or pair.
    """

    table: int | None = None
    left_out: list[str] = Field(default_factory=list)
    thinking: str | None = None
    n_unfinished: int = 0
    compared: dict[str, dict[str, int]] = Field(default_factory=dict)


class BenchmarkMetrics(ScoreMetrics):
    """What `benchmark` measures.

    Attributes:
        tasks: benchmarks that were scored.
        mode: `generate` or `loglikelihood`.
        runs_kept: runs (of one mask and seed) that were found in the cache.
        masks: by benchmark and label, as `WeMask.to_dict` gives them.
    """

    experiment = "benchmark"
    tasks: list[str] = Field(default_factory=list)
    mode: str = "loglikelihood"
    runs_kept: int = 0
    masks: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)


def benchmark(
    study: Study,
    configurations: Mapping[str, Sequence[MaskConfiguration]],
    options: BenchmarkOptions | None = None,
    *,
    data: LanguageData | None = None,
    masked_blocks: str = "",
    table: int | None = None,
    left_out: Sequence[str] = (),
    keep: bool = False,
) -> Result:
    """Score benchmarks with masks and without, and compare on the same items.

    Args:
        study: of the model.
        configurations: the masks of each benchmark, by its name; `MaskConfiguration("no mask")` is what the others are
            compared with.
        options: how benchmarks are put to the model.
        data: what the benchmarks without data of their own are made of.
        masked_blocks: in words, for the caption.
        table: of the paper, whose benchmarks these are.
        left_out: benchmarks of that table that cannot be scored.
        keep: items in the user's cache, so that a run that was stopped goes on.

    Returns:
        Metrics `BenchmarkMetrics`; the tables `benchmark_items`, `benchmark_scores` (of `summarise`) and `best_rates`;
        the figures `benchmark_table` and `benchmark_differences`; the documents `table.md` and `table.tex`.

    Raises:
        MelensError: as `benchmarks_of`, `Evaluator` and `summarise`.
    """
    options = options or BenchmarkOptions()
    benchmarks = benchmarks_of(list(configurations))
    evaluator = Evaluator(study, benchmarks, options, data, keep=keep)
    scored = [evaluator.score(each, configurations[each.name]) for each in benchmarks]
    items = pd.concat([of_task for of_task, _ in scored], ignore_index=True)
    scores = summarise(items, UNMASKED)
    every = chain.from_iterable(configurations.values())
    masks = [(each.label, each.family, each.rate, each.mask.select) for each in every if each.mask is not None]
    rates = pd.DataFrame(masks, columns=["mask", "family", "rate", "select"]).drop_duplicates()
    best = best_rates(items[items["shown"]], rates, UNMASKED)
    chat, name = evaluator.chat, study.trace.model["name"]
    layout = lay_out(scores, name, describe_requests(benchmarks, options, chat, masked_blocks))
    metrics = study.metrics(
        BenchmarkMetrics,
        tasks=list(configurations),
        left_out=list(left_out),
        table=table,
        mode="generate" if options.generates else "loglikelihood",
        thinking=None if chat is None else chat.in_words(),
        n_unfinished=int(scores.loc[scores["shown"], "n_unfinished"].sum()),
        runs_kept=sum(n_kept for _, n_kept in scored),
        masks={
            task: {each.label: each.mask.to_dict() for each in own if each.mask is not None}
            for task, own in configurations.items()
        },
        compared=count_verdicts(scores.merge(rates, on="mask"), "select"),
    )
    names = ("benchmark_table", "benchmark_differences")
    expected = "WeMask improves the scores; random and magnitude masks harm them."
    return Result(
        "benchmark",
        study.trace.model,
        metrics,
        tables={"benchmark_items": items, "benchmark_scores": scores, **({"best_rates": best} if len(best) else {})},
        figures=score_figures(scores, layout, names, f"Scores of {name}", "tables 1, 2, 5, 6, 7", expected),
        findings=score_findings(scores, layout, metrics, _best_in_words(best)),
        documents={"table.md": layout.markdown(), "table.tex": layout.latex()},
    )


def describe_requests(
    benchmarks: Sequence[Benchmark], options: BenchmarkOptions, chat: Chat | None, masked_blocks: str = ""
) -> str:
    """Say in sentences how a model was scored, for the caption of a table."""
    ways = {
        "answers written" if options.generates and each.kind != "language"
        else "answers written greedily" if each.generates else "log-likelihoods"
        for each in benchmarks
    }  # fmt: skip
    sentences = [f"Zero-shot, {', or '.join(sorted(ways, reverse=True))}."]
    if chat is not None:
        sentences.append(f"Thinking: {chat.in_words()}.")
    if masked_blocks:
        sentences.append(f"Masked: {masked_blocks}.")
    if options.limit is not None:
        sentences.append(f"The first {options.limit} items of each.")
    if options.judge is not None:
        sentences.append(f"Refusals judged by {options.judge}.")
    return " ".join(sentences)


# --- Figures and findings ---------------------------------------------------------------------------------------------


def score_figures(
    scores: pd.DataFrame, layout: Layout, names: tuple[str, str], title: str, source: str, expected: str
) -> dict[str, Figure]:
    """Draw scores as a table, and their differences where some were compared; `names` are those of both figures."""
    table = score_table(layout.columns, layout.rows, layout.cells, layout.best, title=title)
    figures = {names[0]: Figure(table, source, expected, f"{layout.observed} {layout.caption}".lstrip())}
    if layout.n_compared:
        compared = scores[scores["shown"] & scores["p_corrected"].notna()]
        note = f"Filled: shown ({layout.criterion}); hollow: no difference shown."
        plot = score_differences(compared, title=f"Differences to {layout.reference}: {layout.model}", note=note)
        figures[names[1]] = Figure(plot, source, expected, layout.observed)
    return figures


def score_findings(
    scores: pd.DataFrame, layout: Layout, metrics: ScoreMetrics, more: Sequence[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Say each score and its difference, how many differences are shown, `more`, and what was left out."""
    rows: list[tuple[str, ...]] = [("", "score", f"difference to {layout.reference}, on the same items")]
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
    if layout.n_compared:
        rows.append(("in all", layout.observed, ""))
    rows += more
    if metrics.thinking is not None:
        rows.append(("thinking", metrics.thinking, ""))
    if metrics.left_out:
        rows.append(("left out", f"{', '.join(metrics.left_out)}: only the hub has this data", ""))
    return rows


def _best_in_words(best: pd.DataFrame) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for (task, metric, family), of_family in best.groupby(["task", "metric", "family"], sort=False):
        held_out, same = of_family.sort_values("selection").to_dict("records")
        difference = (
            f"{held_out['difference']:+.3f} ({held_out['low']:+.3f} to {held_out['high']:+.3f}; n={held_out['n']}). On "
            f"the same items the choice would be rate {same['rate']:g} with {same['difference']:+.3f}, which is biased "
            "by the choice."
        )
        chosen = f"rate {held_out['rate']:g}, chosen on one half of the items and scored on the other"
        rows.append((f"{task}, {metric}: best rate of {family}", chosen, difference))
    return rows


# --- Claims -----------------------------------------------------------------------------------------------------------


def judge_comparisons(metrics: ScoreMetrics, *groups: str, claimed: Literal["better", "worse"] = "better") -> Judgement:
    """Judge whether most comparisons turn out as claimed and none the other way, of groups of `metrics.compared`."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts.update(metrics.compared.get(group, {}))
    if not counts["all"]:
        return Judgement("not measured", note="There was no such comparison.")
    value, other = counts[claimed] / counts["all"], "worse" if claimed == "better" else "better"
    verdict: Verdict = "does not hold"
    if counts[claimed] > counts[other]:
        verdict = "holds" if value > 0.5 and not counts[other] else "holds in part"
    none = counts["all"] - counts[claimed] - counts[other]
    return Judgement(verdict, value, None, f"{counts[claimed]} {claimed}, {counts[other]} {other}, {none} not shown.")


CLAIMS = (
    Claim(
        id="scores-weight-better",
        source="section 5, tables 1, 2, 5, 6 and 7", figure="benchmark_differences", metrics=BenchmarkMetrics,
        claim="Weight-guided masks improve the scores of benchmarks",
        statistic="share of the comparisons with the unmasked model in which a weight-guided mask is shown better",
        criterion="> 0.5, and worse in none; in part: better in more than worse",
        why="most is the least that 'consistently' can mean; shown is p < 0.05 after correction",
        judge=lambda metrics: judge_comparisons(metrics, "weight"),
    ),
    Claim(
        id="scores-others-worse", source="appendix E, table 5", figure="benchmark_differences",
        metrics=BenchmarkMetrics, claim="Random and magnitude masks degrade the scores of benchmarks",
        statistic="share of the comparisons with the unmasked model in which a random or magnitude mask is shown to be "
        "worse",
        criterion="> 0.5, and better in none; in part: worse in more than better", why="as for the claim before",
        judge=lambda metrics: judge_comparisons(metrics, "random", "magnitude", claimed="worse"),
    ),
)  # fmt: skip
"""What the paper says of masks on benchmarks."""
