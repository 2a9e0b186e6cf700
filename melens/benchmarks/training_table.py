"""The paper's tables with trainings (1 to 4, 6 and 7): scores of models trained plainly, with WeMask and with gates.

1. Each training set has its benchmarks (`ScoredSet`); its rows are compared with plain training (`summarise`).
2. The p-values of all training sets are corrected together, not each set alone (`correct`).
3. Training with WeMask is also compared with WeMask at inference, rate by rate, and with gated attention (`_pairs`).

Trainings are sampled as items are: each difference is tested over both, and with fewer than three trainings it has no
verdict. What a mask does to one trained model, whatever others would do, is `comparison`'s to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pydantic import Field

from melens.analysis.study import Study
from melens.benchmarks.comparison import (
    ScoreMetrics,
    counted,
    judge_comparisons,
    judged_before,
    score_figures,
    score_findings,
)  # fmt: skip
from melens.benchmarks.scores import FEW_ITEMS, FEW_TRAININGS, correct, summarise
from melens.benchmarks.tables import lay_out
from melens.claims.engine import Claim
from melens.data.chat import Chat
from melens.errors import MelensError
from melens.printing import Brief
from melens.report.result import Result
from melens.training.history import TrainingHistory, average_histories, draw_histories

__all__ = ["CLAIMS", "ScoredSet", "TableMetrics", "training_table"]

_PAIRS = {"training over inference": "inference", "training over gates": "gates"}


class TableMetrics(ScoreMetrics):
    """What `training_table` measures.

    Attributes:
        method: of the trainings.
        datasets: that were trained on.
        n_compared, n_shown: differences to plain training that were tested, and those that are shown.
    """

    experiment = "tables"
    rests_on_states = False
    method: str = ""
    datasets: list[str] = Field(default_factory=list)
    n_compared: int = 0
    n_shown: int = 0


@dataclass(frozen=True, repr=False)
class ScoredSet(Brief):
    """The scores of all models that were trained on one training set.

    Attributes:
        items: as `summarise` takes them, with `training` (its seed) and `kind`: `base` (before any training), `plain`,
            `inference`, `training` or `gates`.
        reference: the row of plain training, by its label.
        requests: how the models were scored, in sentences.
        chat: how the chat template was used; None where it was not.
    """

    dataset: str
    items: pd.DataFrame
    reference: str
    requests: str
    chat: Chat | None


def training_table(
    study: Study,
    number: int,
    method: str,
    scored: Sequence[ScoredSet],
    histories: Sequence[TrainingHistory] = (),
    *,
    left_out: Sequence[str] = (),
) -> Result:
    """Compare the rows of a table.

    Args:
        study: of the model before any training.
        number, method: of the table.
        scored: the training sets.
        histories: of all trainings, to draw them; those of one name differ in their seeds.
        left_out: benchmarks whose data only the hub has.

    Returns:
        Metrics `TableMetrics`; the tables `table_items`, `table_scores`, `table_pairs`, `training_log` and
        `training_trace`; the figures `table`, `table_differences` and those of `draw_histories`; the documents
        `table.md` and `table.tex`.

    Raises:
        MelensError: as `summarise`; a row of other trainings than the plain ones, which could be told from none.

    Example:
        >>> rows = [("base", "base", 0.0, 0), ("SFT", "plain", 0.0, 0), ("WeMask 0.1", "training", 0.1, 0)]
        >>> items = pd.DataFrame(rows, columns=["mask", "kind", "rate", "training"]).merge(
        ...     pd.DataFrame({"item": ["a", "b", "c"], "value": [1.0, 0.0, 1.0]}), how="cross"
        ... )
        >>> items = items.assign(task="piqa", metric="acc", seed=0, unfinished=False, chance=0.5, shown=True)
        >>> scored = ScoredSet("mine", items.assign(higher_is_better=True), "SFT", "Zero-shot.", None)
        >>> list(melens.analysis.training_table(study, 7, "sft", [scored]).figures)
        ['table', 'table_differences']
    """
    for own in scored:
        _check_trainings(own)
    name = study.trace.model["name"]
    items = pd.concat([own.items.assign(dataset=own.dataset) for own in scored], ignore_index=True)
    kinds = items[["dataset", "mask", "kind"]].drop_duplicates()
    by_set = [summarise(own.items, own.reference).assign(dataset=own.dataset) for own in scored]
    scores, pairs = correct(pd.concat(by_set).merge(kinds, on=["dataset", "mask"])), _pairs(scored)
    requests = " ".join(dict.fromkeys(own.requests for own in scored))
    layout = lay_out(scores, name, requests, f"{method.upper()} without a mask")
    chat = next((own.chat for own in reversed(scored) if own.chat is not None), None)
    metrics = study.metrics(
        TableMetrics,
        table=number,
        method=method,
        datasets=[own.dataset for own in scored],
        left_out=list(left_out),
        n_compared=layout.n_compared,
        n_shown=layout.n_shown,
        thinking=None if chat is None else chat.in_words(),
        n_unfinished=int(scores.loc[scores["shown"], "n_unfinished"].sum()),
        **counted(pd.concat([scores, pairs]), "kind"),
    )
    of_pairs = {kind: metrics.compared[kind] for kind in _PAIRS if kind in metrics.compared}
    more = [(kind, _count_in_words(counts)) for kind, counts in of_pairs.items()]
    if scores["mask"].str.contains("(TF)", regex=False).any():
        more.append(("(TF)", "training-free: the mask is on at inference alone"))
    expected = "Training with WeMask scores best, WeMask at inference alone comes next."
    names, source = ("table", "table_differences"), f"table {number}"
    figures = score_figures(scores, layout, names, f"Table {number}: {name}", source, expected)
    return Result(
        "tables",
        study.trace.model,
        metrics,
        tables={
            "table_items": items,
            "table_scores": scores,
            "table_pairs": pairs,
            "training_log": _together([history.log for history in histories]),
            "training_trace": _together([history.inspections for history in histories]),
        },
        figures=figures | draw_histories(average_histories(histories), f"{source}, {name}", study.me.layer),
        findings=score_findings(scores, layout, metrics, more),
        documents={"table.md": layout.markdown(), "table.tex": layout.latex()},
    )


def _check_trainings(own: ScoredSet) -> None:
    """Check that a single training of one row is not taken for many beside those of another."""
    trained = own.items[own.items["kind"] != "base"]
    by_mask = trained.groupby("mask", sort=False)["training"]
    by_row = {str(mask): sorted(set(of_row.tolist())) for mask, of_row in by_mask}
    expected = by_row[own.reference]
    for row, trainings in by_row.items():
        if trainings != expected:
            raise MelensError(
                f"{own.dataset}: the row {row!r} has the trainings {trainings}, but {own.reference!r} has {expected}. "
                "Train and score every row with the same seeds."
            )


def _together(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _count_in_words(counts: Mapping[str, int]) -> str:
    told = f"{counts['better']} better and {counts['worse']} worse of {counts['all']} tested"
    return ", ".join([told, *(f"{counts[why]} have {why}" for why in (FEW_TRAININGS, FEW_ITEMS) if counts[why])])


def _pairs(scored: Sequence[ScoredSet]) -> pd.DataFrame:
    """Compare training with WeMask, row by row, with WeMask at inference of the same rate and with gated attention.

    Returns:
        As `summarise`, with `kind` (of `_PAIRS`) and `reference`, what is compared with; empty without such rows.
    """
    found = []
    for own in scored:
        rows = own.items[["mask", "kind", "rate"]].drop_duplicates()
        for trained in rows[rows["kind"] == "training"].itertuples():
            for kind, other_kind in _PAIRS.items():
                others = rows[(rows["kind"] == other_kind) & ((rows["rate"] == trained.rate) | (other_kind == "gates"))]
                for other in others["mask"]:
                    scores = summarise(own.items[own.items["mask"].isin([trained.mask, other])], other)
                    found.append(scores[scores["mask"] == trained.mask].assign(kind=kind, reference=other))
    return correct(pd.concat(found, ignore_index=True)) if found else pd.DataFrame()


# --- Claims -----------------------------------------------------------------------------------------------------------

_BETTER: dict[str, Any] = {
    "metrics": TableMetrics,
    "criterion": "> 0.5, worse in none, of at least three benchmarks; in part: better in more than worse",
    "why": "most is the least that 'consistently' can mean, and one or two benchmarks show it of those alone; shown is "
    "p < 0.05 over items and trainings after correction; a difference of fewer than three trainings is not tested, as "
    "trainings differ by chance however many items there are",
    "fixed": "2026-11-26 25a77c7",
}
_SECTION_5 = "section 5, tables 1 to 4, 6 and 7"

CLAIMS: tuple[Claim[TableMetrics], ...] = (
    Claim(
        id="inference-over-none", source=_SECTION_5, figure="table_differences", **_BETTER,
        claim="Masking a trained model at inference alone improves its scores",
        statistic="share of the comparisons with plain training in which the same model under WeMask is shown better",
        judge=lambda metrics: judge_comparisons(metrics, "inference"), former=judged_before("inference"),
    ),
    Claim(
        id="training-over-none", source=_SECTION_5, figure="table_differences", **_BETTER,
        claim="Training with WeMask gives better scores than training without",
        statistic="share of the comparisons with plain training in which training with WeMask is shown better",
        judge=lambda metrics: judge_comparisons(metrics, "training"), former=judged_before("training"),
    ),
    Claim(
        id="training-over-inference", source=_SECTION_5, figure="table", **_BETTER,
        claim="Training with WeMask gives better scores than WeMask at inference alone",
        statistic="share of the comparisons at equal rates in which training with WeMask is shown better",
        judge=lambda metrics: judge_comparisons(metrics, "training over inference"),
        former=judged_before("training over inference"),
    ),
    Claim(
        id="training-over-gates", source="appendix G, table 7", figure="table", **_BETTER,
        claim="Training with WeMask gives better scores than training with gated attention",
        statistic="share of the comparisons in which training with WeMask is shown better",
        judge=lambda metrics: judge_comparisons(metrics, "training over gates"),
        former=judged_before("training over gates"),
    ),
)  # fmt: skip
"""What the paper says of trainings with WeMask."""
