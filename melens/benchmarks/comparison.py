"""Compare masks on benchmarks: tables 1, 2, 5, 6 and 7.

    configurations = [MaskConfiguration("no mask"), MaskConfiguration("paper", WeMask(0.1, start=12).on(model))]
    result = benchmark(study, {"copy": configurations, "induction": configurations}, data=language_data(model, text))
    result.figures["benchmark_differences"]

1. An `Evaluator` scores every benchmark under every mask, item by item.
2. `summarise` compares each mask with the unmasked model on the same items; `best_rates` finds the best rate.
3. The scores become a table, its figures, findings and the counts that the claims are judged by.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import pandas as pd
from pydantic import Field

from melens.analysis.statistics import with_interval
from melens.analysis.study import Study
from melens.benchmarks.catalog import Benchmark, benchmarks_of
from melens.benchmarks.evaluation import Evaluator, MaskConfiguration
from melens.benchmarks.language import LanguageData
from melens.benchmarks.options import BenchmarkOptions
from melens.benchmarks.scores import (
    ALPHA,
    FEW_ITEMS,
    FEW_TRAININGS,
    LEAST_TRAININGS,
    best_rates,
    count_verdicts,
    summarise,
)  # fmt: skip
from melens.benchmarks.tables import Layout, lay_out, trainings_in_words
from melens.claims.engine import Claim, Former, Judgement, Verdict
from melens.data.chat import Chat
from melens.figures.scores import score_differences, score_table
from melens.report.result import Figure, Metrics, Result

__all__ = [
    "CLAIMS", "UNMASKED", "BenchmarkMetrics", "ScoreMetrics", "benchmark", "counted", "describe_requests",
    "judge_comparisons", "judge_each_worse", "judged_before", "score_figures", "score_findings",
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
        compared: what `count_verdicts` gives: how many comparisons were tested (`all`), `better` and `worse`; of how
            many benchmarks (`tasks`); and how many had `too few trainings` or `too few items`. Of `benchmark` by the
            mask's choice of dims, of `training_table` by the kind of row or pair.
        compared_before: the same by the rule until 2026-11-26, which took all differences for tested.
        reach: by the same groups, how far the 95% intervals of the tested differences reach to either side (median).
    """

    table: int | None = None
    left_out: list[str] = Field(default_factory=list)
    thinking: str | None = None
    n_unfinished: int = 0
    compared: dict[str, dict[str, int]] = Field(default_factory=dict)
    compared_before: dict[str, dict[str, int]] = Field(default_factory=dict)
    reach: dict[str, float] = Field(default_factory=dict)


class BenchmarkMetrics(ScoreMetrics):
    """What `benchmark` measures.

    Attributes:
        tasks: benchmarks that were scored.
        mode: `generate` or `loglikelihood`.
        runs_kept: runs (of one mask and seed) that were found in the cache.
        masks: by benchmark and label, as `WeMask.to_dict` gives them.
    """

    experiment = "benchmark"
    rests_on_states = False
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

    Example:
        >>> from melens.benchmarks.evaluation import MaskConfiguration
        >>> from melens.benchmarks.language import language_data
        >>> data = language_data(model, melens.data.texts.read_text()[:2000], n_texts=2, n_tokens=16)
        >>> masks = [MaskConfiguration("no mask"), MaskConfiguration("WeMask", melens.WeMask(0.1, start=3))]
        >>> list(melens.analysis.benchmark(study, {"perplexity": masks}, data=data).figures)
        ['benchmark_table', 'benchmark_differences']
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
        **counted(scores.merge(rates, on="mask"), "select"),
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


def counted(scores: pd.DataFrame, by: str) -> dict[str, Any]:
    """Count the verdicts on compared scores by a column, as fields of `ScoreMetrics`."""
    tested = scores[scores["shown"] & scores["verdict"].isin(["better", "worse", "no difference shown"])]
    reach = (tested["difference_high"] - tested["difference_low"]) / 2
    return {
        "compared": count_verdicts(scores, by),
        "compared_before": count_verdicts(scores, by, "former_verdict"),
        "reach": {str(group): float(own) for group, own in reach.groupby(tested[by], sort=False).median().items()},
    }


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
    compared = scores[scores["shown"] & scores["difference"].notna()]
    if len(compared):
        hollow = "hollow: no difference shown, or too few trainings or items to show one."
        note = f"Filled: shown ({layout.criterion}); {hollow}" if layout.n_compared else hollow.capitalize()
        plot = score_differences(compared, title=f"Differences to {layout.reference}: {layout.model}", note=note)
        figures[names[1]] = Figure(plot, source, expected, layout.observed)
    return figures


def score_findings(
    scores: pd.DataFrame, layout: Layout, metrics: ScoreMetrics, more: Sequence[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Say how many differences are shown, `more`, what was left out, and each score with its difference."""
    rows: list[tuple[str, ...]] = [("in all", layout.observed)] if layout.observed else []
    rows += more
    if metrics.thinking is not None:
        rows.append(("thinking", metrics.thinking))
    if metrics.left_out:
        rows.append(("left out", f"{', '.join(metrics.left_out)}: only the hub has this data"))
    rows.append(("", "score (95% interval over items)", f"difference to {layout.reference}, on the same items"))
    for row in scores[scores["shown"]].to_dict("records"):
        score = _with_n(row["mean"], (row["low"], row["high"]), row["n"], ".3f")
        if row["n_seeds"] > 1:
            score += f", sd of {row['n_seeds']} seeds {row['sd']:.3f}"
        if row["n_unfinished"]:
            score += f"; {row['n_unfinished']} of {row['n_replies']} replies end inside a thought: no answer"
        difference = ""
        if row["verdict"]:
            interval = (row["difference_low"], row["difference_high"])
            difference = f"{with_interval(row['difference'], interval, '+.3f')}{_p_in_words(row)}"
        rows.append((f"{row['task']}, {row['metric']}: {row['mask']}", score, difference))
    return rows


def _p_in_words(row: Mapping[Any, Any]) -> str:
    """Say the p-value and the verdict, or why there is none."""
    if row["verdict"] == FEW_TRAININGS:
        return f": no verdict from {trainings_in_words(row['n_trainings'])}, of {LEAST_TRAININGS} that it takes"
    p = "" if math.isnan(row["p_corrected"]) else f", p={row['p_corrected']:.2g}"
    if row["verdict"] == FEW_ITEMS:
        return f"{p}: no verdict, as {row['n']} items give no p below {ALPHA} here"
    return f"{p}: {row['verdict']}"


def _with_n(value: float, interval: tuple[float, float], n: int, form: str) -> str:
    """Write a mean with its interval and how many values it is of, which may be too few for an interval."""
    low, high = interval
    return f"{value:{form}} ({'' if math.isnan(low) else f'{low:{form}} to {high:{form}}; '}n={n})"


def _best_in_words(best: pd.DataFrame) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for (task, metric, family), of_family in best.groupby(["task", "metric", "family"], sort=False):
        held_out, same = of_family.sort_values("selection").to_dict("records")
        interval = (held_out["low"], held_out["high"])
        difference = (
            f"{_with_n(held_out['difference'], interval, held_out['n'], '+.3f')}. On the same items the choice would "
            f"be rate {same['rate']:g} with {same['difference']:+.3f}, which is biased by the choice."
        )
        chosen = f"rate {held_out['rate']:g}, chosen on one half of the items and scored on the other"
        rows.append((f"{task}, {metric}: best rate of {family}", chosen, difference))
    return rows


# --- Claims -----------------------------------------------------------------------------------------------------------


_CRITERION_BEFORE = "> 0.5, and worse in none; in part: better in more than worse"
_WORSE_BEFORE = "> 0.5, and better in none; in part: worse in more than better"

LEAST_TASKS = 3
"""What is seen in one or two benchmarks holds in part, as what was measured once or twice does elsewhere."""


def judge_comparisons(metrics: ScoreMetrics, group: str, claimed: Literal["better", "worse"] = "better") -> Judgement:
    """Judge whether most comparisons turn out as claimed and none the other way, of a group of `metrics.compared`."""
    counts = _sum(metrics.compared, [group])
    untested = [f"{counts[why]} have {why}" for why in (FEW_TRAININGS, FEW_ITEMS) if counts[why]]
    if not counts["all"]:
        note = f"No comparison was tested: {', '.join(untested)}." if untested else "There was no such comparison."
        return Judgement("not measured", note=note)
    value, verdict = _most(counts, claimed)
    notes = [_counts_in_words(counts)]
    if counts["tasks"] < LEAST_TASKS:
        verdict = "holds in part" if verdict == "holds" else verdict
        notes.append(f"They are of {counts['tasks']} of the {LEAST_TASKS} benchmarks that it takes.")
    if untested:
        notes.append(f"Not tested: {', '.join(untested)}.")
    if not counts["better"] + counts["worse"] and group in metrics.reach:
        notes.append(f"Their intervals reach {metrics.reach[group]:.3g} to either side: less would not be seen.")
    return Judgement(verdict, value, None, " ".join(notes))


def judge_each_worse(metrics: ScoreMetrics, *groups: str) -> Judgement:
    """Judge whether masks of each group are worse: those of one, or of one alone, show it in part at most."""
    of_each = {group: judge_comparisons(metrics, group, claimed="worse") for group in groups}
    note = " ".join(f"{group.capitalize()} masks: {own.note}" for group, own in of_each.items())
    values = [own.value for own in of_each.values() if own.value is not None]
    if not values:
        return Judgement("not measured", note=note)
    found = {own.verdict for own in of_each.values()}
    verdict: Verdict = "holds" if found == {"holds"} else "holds in part"
    return Judgement(verdict if found & {"holds", "holds in part"} else "does not hold", min(values), None, note)


def judged_before(
    *groups: str, claimed: Literal["better", "worse"] = "better", criterion: str = _CRITERION_BEFORE
) -> Former[Any]:
    """Return how such a claim was judged until 2026-11-26: over items alone, from one training and one benchmark on."""

    def of_before(metrics: ScoreMetrics) -> Judgement:
        counts = _sum(metrics.compared_before, groups)
        if not counts["all"]:
            return Judgement("not measured", note="There was no such comparison.")
        value, verdict = _most(counts, claimed)
        return Judgement(verdict, value, None, _counts_in_words(counts))

    return Former(criterion, "2026-11-23 9e53f2d", of_before)


def _sum(compared: Mapping[str, Mapping[str, int]], groups: Sequence[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for group in groups:
        counts.update(compared.get(group, {}))
    return counts


def _most(counts: Counter[str], claimed: Literal["better", "worse"]) -> tuple[float, Verdict]:
    value, other = counts[claimed] / counts["all"], "worse" if claimed == "better" else "better"
    if counts[claimed] <= counts[other]:
        return value, "does not hold"
    return value, "holds" if value > 0.5 and not counts[other] else "holds in part"


def _counts_in_words(counts: Counter[str]) -> str:
    none = counts["all"] - counts["better"] - counts["worse"]
    return f"{counts['better']} better, {counts['worse']} worse, {none} not shown."


CLAIMS = (
    Claim(
        id="scores-weight-better",
        source="section 5, tables 1, 2, 5, 6 and 7", figure="benchmark_differences", metrics=BenchmarkMetrics,
        claim="Weight-guided masks improve the scores of benchmarks",
        statistic="share of the comparisons with the unmasked model in which a weight-guided mask is shown better",
        criterion="> 0.5, worse in none, of at least three benchmarks; in part: better in more than worse",
        why="most is the least that 'consistently' can mean, and one or two benchmarks show it of those alone; shown "
        "is p < 0.05 over items after correction, as there is one model and no training; what so few items cannot show "
        "does not count",
        judge=lambda metrics: judge_comparisons(metrics, "weight"),
        fixed="2026-11-26 25a77c7", former=judged_before("weight"),
    ),
    Claim(
        id="scores-others-worse", source="appendix E, table 5", figure="benchmark_differences",
        metrics=BenchmarkMetrics, claim="Random and magnitude masks degrade the scores of benchmarks",
        statistic="share of the comparisons with the unmasked model in which a mask is shown to be worse, of random "
        "and of magnitude masks; the smaller",
        criterion="> 0.5, better in none, of at least three benchmarks, for both; in part: worse in more than better, "
        "for one",
        why="as for the claim before; the paper says it of all other masks, so that one kind does not stand for both",
        judge=lambda metrics: judge_each_worse(metrics, "random", "magnitude"),
        fixed="2026-11-26 25a77c7",
        former=judged_before("random", "magnitude", claimed="worse", criterion=_WORSE_BEFORE),
    ),
)  # fmt: skip
"""What the paper says of masks on benchmarks."""
