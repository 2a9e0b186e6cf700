"""The paper's tables with trainings (1 to 4, 6 and 7): scores of models trained plainly, with WeMask and with gates.

1. Each training set has its benchmarks (`ScoredSet`); its rows are compared with plain training (`summarise`).
2. The p-values of all training sets are corrected together, not each set alone (`correct`).
3. Training with WeMask is also compared with WeMask at inference, rate by rate, and with gated attention (`_pairs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from pydantic import Field

from melens.analysis.study import Study
from melens.benchmarks.comparison import judge_comparisons
from melens.benchmarks.scores import correct, count_verdicts, summarise
from melens.benchmarks.tables import lay_out
from melens.claims.engine import Claim
from melens.data.chat import Chat
from melens.figures.scores import score_differences, score_table
from melens.report.result import Figure, Metrics, Result
from melens.training.history import TrainingHistory, average_histories, draw_histories

__all__ = ["CLAIMS", "ScoredSet", "TableMetrics", "training_table"]

_PAIRS = {"training over inference": "inference", "training over gates": "gates"}


class TableMetrics(Metrics):
    """What `training_table` measures.

    Attributes:
        table: its number in the paper.
        method: of the trainings.
        datasets: that were trained on.
        left_out: benchmarks whose data only the hub has.
        n_compared, n_shown: differences to plain training, and those that are shown.
        thinking: whether the models were to think, in words.
        n_unfinished: replies that end inside a thought.
        compared: by the kind of row or pair, how many scores were compared (`all`), `better` and `worse`.
    """

    experiment = "tables"
    table: int | None = None
    method: str = ""
    datasets: list[str] = Field(default_factory=list)
    left_out: list[str] = Field(default_factory=list)
    n_compared: int = 0
    n_shown: int = 0
    thinking: str | None = None
    n_unfinished: int = 0
    compared: dict[str, dict[str, int]] = Field(default_factory=dict)


@dataclass(frozen=True)
class ScoredSet:
    """The scores of all models that were trained on one training set.

    Attributes:
        dataset: the training set.
        items: as `summarise` takes them, with `training` (its seed) and `kind`: `base`, `plain`, `inference`,
            `training` or `gates`.
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
    histories: Sequence[TrainingHistory],
    *,
    left_out: Sequence[str] = (),
) -> Result:
    """Compare the rows of a table.

    Args:
        study: of the model before any training.
        number, method: of the table.
        scored: the training sets.
        histories: of all trainings; those of one name differ in their seeds.
        left_out: benchmarks whose data only the hub has.

    Returns:
        Metrics `TableMetrics`; the tables `table_items`, `table_scores`, `table_pairs`, `training_log` and
        `training_trace`; the figures `table`, `table_differences` and those of `draw_histories`; the documents
        `table.md` and `table.tex`.
    """
    name, source, reference = study.trace.model["name"], f"table {number}", f"{method.upper()} without a mask"
    scores = correct(pd.concat([_scores(own) for own in scored], ignore_index=True))
    pairs = _pairs(scored)
    layout = lay_out(scores, name, " ".join(dict.fromkeys(own.requests for own in scored)), reference)
    compared = scores[scores["shown"] & scores["p_corrected"].notna()]
    n_shown = int((compared["verdict"] != "no difference shown").sum())
    observed = f"{n_shown} of {len(compared)} differences to {reference} are shown."
    expected = "Training with WeMask scores best, WeMask at inference alone comes next."
    plot = score_table(layout.columns, layout.rows, layout.cells, layout.best, title=f"Table {number}: {name}")
    figures = {"table": Figure(plot, source, expected, f"{observed} {layout.caption}")}
    if len(compared):
        plot = score_differences(compared, title=f"Differences to {reference}: {name}")
        figures["table_differences"] = Figure(plot, source, expected, observed)
    figures |= draw_histories(average_histories(histories), f"{source}, {name}", study.me.layer)
    chat = next((own.chat for own in reversed(scored) if own.chat is not None), None)
    metrics = study.metrics(
        TableMetrics,
        table=number,
        method=method,
        datasets=[own.dataset for own in scored],
        left_out=list(left_out),
        n_compared=len(compared),
        n_shown=n_shown,
        thinking=None if chat is None else chat.in_words(),
        n_unfinished=int(scores.loc[scores["shown"], "n_unfinished"].sum()),
        compared=count_verdicts(pd.concat([scores, pairs]), "kind"),
    )
    return Result(
        "tables",
        study.trace.model,
        metrics,
        tables={
            "table_items": pd.concat([own.items.assign(dataset=own.dataset) for own in scored], ignore_index=True),
            "table_scores": scores,
            "table_pairs": pairs,
            "training_log": pd.concat([history.log for history in histories], ignore_index=True),
            "training_trace": pd.concat([history.inspections for history in histories], ignore_index=True),
        },
        figures=figures,
        findings=_findings(scores, observed, metrics),
        documents={"table.md": layout.markdown(), "table.tex": layout.latex()},
    )


def _scores(scored: ScoredSet) -> pd.DataFrame:
    kinds = scored.items[["mask", "kind"]].drop_duplicates()
    return summarise(scored.items, scored.reference).merge(kinds, on="mask").assign(dataset=scored.dataset)


def _pairs(scored: Sequence[ScoredSet]) -> pd.DataFrame:
    """Compare training with WeMask, row by row, with WeMask at inference of the same rate and with gated attention.

    Returns:
        As `summarise`, with `kind` (of `_PAIRS`) and `reference`, what is compared with.
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
    return correct(pd.concat(found, ignore_index=True))


def _findings(scores: pd.DataFrame, observed: str, metrics: TableMetrics) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("in all", observed, "")]
    for kind in _PAIRS:
        if kind in metrics.compared:
            count = metrics.compared[kind]
            rows.append((kind, f"{count['better']} better and {count['worse']} worse of {count['all']}", ""))
    for row in scores[scores["shown"]].to_dict("records"):
        score = f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f}; n={row['n']}, {row['n_seeds']} seeds)"
        difference = ""
        if row["verdict"]:
            interval = f"{row['difference_low']:+.3f} to {row['difference_high']:+.3f}"
            difference = f"{row['difference']:+.3f} ({interval}): {row['verdict']}"
        rows.append((f"{row['task']}, {row['metric']}: {row['mask']}", score, difference))
    if metrics.left_out:
        rows.append(("left out", f"{', '.join(metrics.left_out)}: only the hub has this data", ""))
    return rows


# --- Claims -----------------------------------------------------------------------------------------------------------


def _claim(
    name: str,
    claim: str,
    statistic: str,
    *,
    rows: str,
    figure: str = "table",
    source: str = "section 5, tables 1 to 4, 6 and 7",
) -> Claim[TableMetrics]:
    """Make a claim about trainings, judged by how one kind of comparison in a table turned out."""
    return Claim(
        id=name,
        claim=claim,
        source=source,
        metrics=TableMetrics,
        figure=figure,
        statistic=statistic,
        criterion="> 0.5, and worse in none; in part: better in more than worse",
        why="most is the least that 'consistently' can mean; shown is p < 0.05 after correction, and more than "
        "trainings differ among themselves",
        judge=lambda metrics: judge_comparisons(metrics.compared.get(rows), "better", "worse"),
    )


CLAIMS = (
    _claim(
        "inference-over-none",
        "Masking a trained model at inference alone improves its scores",
        "share of the comparisons with plain training in which the same model under WeMask is shown better",
        rows="inference",
        figure="table_differences",
    ),
    _claim(
        "training-over-none",
        "Training with WeMask gives better scores than training without",
        "share of the comparisons with plain training in which training with WeMask is shown better",
        rows="training",
        figure="table_differences",
    ),
    _claim(
        "training-over-inference",
        "Training with WeMask gives better scores than WeMask at inference alone",
        "share of the comparisons at equal rates in which training with WeMask is shown better",
        rows="training over inference",
    ),
    _claim(
        "training-over-gates",
        "Training with WeMask gives better scores than training with gated attention",
        "share of the comparisons in which training with WeMask is shown better",
        rows="training over gates",
        source="appendix G, table 7",
    ),
)
"""What the paper says of trainings with WeMask."""
