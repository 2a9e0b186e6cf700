"""Scores as the paper lays them out, a row a mask and a column a benchmark: Markdown, LaTeX, plain cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from melens.benchmarks.scores import ALPHA, FEW_ITEMS, FEW_TRAININGS, LEAST_TRAININGS

__all__ = ["Layout", "lay_out", "trainings_in_words"]

_SHOWN = ("better", "worse")

_METRICS = {
    "acc": "accuracy", "exact_match": "exact match", "loss": "nats a token", "word_perplexity": "nats a word",
    "over_refusal": "over-refusal", "compliance": "compliance", "refusal": "refusals",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A table to print.

    Attributes:
        columns: benchmark, what is counted and which way is better.
        rows: the masks, or other rows.
        cells: `[row][column]`: the score, or the score and its difference to the unmasked model.
        best: which of them is the best of its column, with a difference that is shown.
        caption: what a cell shows, in sentences.
        model, reference: whose scores they are, and the row that the others are compared with.
        n_compared, n_shown, n_better: differences to the reference that were tested, that are shown, and to the good.
        untested: how many differences were not, and why, in a sentence.
        criterion: where a difference is shown, in words.
    """

    columns: list[str]
    rows: list[str]
    cells: list[list[str]]
    best: list[list[bool]]
    caption: str
    model: str = ""
    reference: str = ""
    n_compared: int = 0
    n_shown: int = 0
    n_better: int = 0
    untested: str = ""
    criterion: str = ""

    @property
    def observed(self) -> str:
        """How many differences are shown and how many not tested, in sentences; empty without a comparison."""
        if not self.n_compared:
            return self.untested
        shown = f"{self.n_shown} of {self.n_compared} differences to {self.reference} are shown ({self.criterion})"
        if self.n_shown:
            shown += f": {self.n_better} better, {self.n_shown - self.n_better} worse"
        return f"{shown}. {self.untested}".rstrip()

    def markdown(self) -> str:
        """Return the table in Markdown."""
        columns = [_in_a_cell(column) for column in self.columns]
        lines = ["| |" + "".join(f" {column} |" for column in columns), "| --- |" + " --- |" * len(columns)]
        for name, cells, best in zip(self.rows, self.cells, self.best, strict=True):
            shown = [f"**{cell}**" if is_best else cell for cell, is_best in zip(cells, best, strict=True)]
            lines.append("".join(["| ", " | ".join([_in_a_cell(name), *shown]), " |"]))
        return "\n".join([*lines, "", self.caption, ""])

    def latex(self) -> str:
        """Return the table in LaTeX, for the booktabs package."""
        cells = [
            [rf"\textbf{{{_escaped(cell)}}}" if is_best else _escaped(cell) for cell, is_best in zip(*row, strict=True)]
            for row in zip(self.cells, self.best, strict=True)
        ]
        table = pd.DataFrame(cells, index=[*map(_escaped, self.rows)], columns=[*map(_escaped, self.columns)])
        form, caption = "l" + "r" * len(self.columns), _escaped(self.caption)
        return table.style.to_latex(hrules=True, position_float="centering", column_format=form, caption=caption)


_IN_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
        "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",  # which the old fonts have elsewhere
        "±": r"$\pm$", "×": r"$\times$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "−": "$-$", "†": r"$^\dagger$",
    }
)  # fmt: skip


def _escaped(text: str) -> str:
    """Write text so that LaTeX prints it as it is: all characters at once, as what replaces one has others in it."""
    return text.translate(_IN_LATEX)


def _in_a_cell(text: str) -> str:
    """Write text so that it does not end a cell of a Markdown table."""
    return text.replace("|", r"\|").replace("\n", " ")


def lay_out(scores: pd.DataFrame, model: str, note: str = "", reference: str = "the unmasked model") -> Layout:
    """Lay scores out.

    Args:
        scores: of `scores.summarise`; only the metrics that tables show.
        model: its name, for the caption.
        note: more for the caption: how it was asked.
        reference: the row that the others are compared with.
    """
    shown = scores[scores["shown"]]
    masks = list(dict.fromkeys(shown["mask"]))
    places = list(dict.fromkeys(zip(shown["task"], shown["metric"], strict=True)))
    by_place = {(row["task"], row["metric"], row["mask"]): row for row in shown.to_dict("records")}
    columns: list[str] = []
    marked: list[list[tuple[str, bool]]] = []  # [column][row]: a cell, and whether it is the best
    for task, metric in places:
        known = [by_place.get((task, metric, mask)) for mask in masks]
        rows = [row for row in known if row is not None]
        name, higher = f"{task}, {_METRICS.get(metric, metric)}", bool(rows[0]["higher_is_better"])
        means = {row["mean"] for row in rows}
        top = max(means) if higher else min(means)
        columns.append(f"{name} {'↑' if higher else '↓'} (n={rows[0]['n']})")
        marked.append(
            [(_cell(row), row["mean"] == top and row["verdict"] in _SHOWN) if row else ("", False) for row in known]
        )
        if any(row["n_unfinished"] for row in rows):
            columns.append(f"{name}: ended inside a thought")
            marked.append([(f"{row['n_unfinished']} of {row['n_replies']}" if row else "", False) for row in known])
    cells = [[cell for cell, _ in row] for row in zip(*marked, strict=True)]
    best = [[is_best for _, is_best in row] for row in zip(*marked, strict=True)]
    n_seeds = int(shown["n_seeds"].max())
    spread = f"mean ± standard deviation over {n_seeds} seeds" if n_seeds > 1 else "mean over items"
    tested = shown[shown["verdict"].isin([*_SHOWN, "no difference shown"])]
    n_compared, n_shown = len(tested), int(tested["verdict"].isin(_SHOWN).sum())
    criterion, compared, thoughts = _criterion(shown), "", ""
    if n_compared:
        compared = (
            f"; in brackets the difference to {reference} on the same items, with † where it is shown ({criterion}); "
            "without † no difference is shown"
        )
    elif shown["difference"].notna().any():
        compared = f"; in brackets the difference to {reference} on the same items, of which none could be tested"
    untested = _untested(shown, reference)
    if n_unfinished := int(shown["n_unfinished"].sum()):
        thoughts = (
            f"{n_unfinished} replies end inside a thought and count as no answer: neither right, nor a refusal, nor "
            "compliance; benchmark.max_new_tokens gives them more room. "
        )
    bold = "Bold is the largest of a column, or the smallest where ↓, if its difference is shown." if n_shown else ""
    said = " ".join(filter(None, [f"{model}: {spread}{compared}.", untested, bold, f"{thoughts}{note}"])).strip()
    counts = {"n_compared": n_compared, "n_shown": n_shown, "n_better": int((tested["verdict"] == "better").sum())}
    return Layout(columns, masks, cells, best, said, model, reference, untested=untested, criterion=criterion, **counts)


def _criterion(shown: pd.DataFrame) -> str:
    n_corrected, of_trainings = int(shown["p_corrected"].notna().sum()), shown["n_trainings"].max() > 0
    sampled = "over items and trainings" if of_trainings else "over items, of this model alone"
    return f"p < {ALPHA} {sampled}, after Holm's correction for {n_corrected} comparisons"


def _untested(shown: pd.DataFrame, reference: str) -> str:
    """Say which differences could not be shown, whatever their size."""
    sentences = []
    if n_few := int((shown["verdict"] == FEW_TRAININGS).sum()):
        sentences.append(
            f"{n_few} differences to {reference} have no verdict: fewer than {LEAST_TRAININGS} trainings tell nothing "
            "of others. Give more seeds (training.seed)."
        )
    few = shown[shown["verdict"] == FEW_ITEMS]
    if len(few):
        sizes = ", ".join(f"{row.task} (n={row.n})" for row in few[["task", "n"]].drop_duplicates().itertuples())
        sentences.append(
            f"{len(few)} differences to {reference} have no verdict: so few items give no p below {ALPHA} in {sizes}, "
            "as the least is 2 / 2^n before the correction."
        )
    return " ".join(sentences)


def _cell(row: Mapping[Any, Any]) -> str:
    score = f"{row['mean']:.3f}" + (f" ± {row['sd']:.3f}" if row["n_seeds"] > 1 else "")
    more = []
    if not pd.isna(row["difference"]):
        more.append(f"{row['difference']:+.3f}".replace("-", "−") + ("†" if row["verdict"] in _SHOWN else ""))
    if 0 < row["n_trainings"] < LEAST_TRAININGS:
        more.append(trainings_in_words(row["n_trainings"]))
    return f"{score} ({', '.join(more)})" if more else score


def trainings_in_words(n: int) -> str:
    """Count trainings."""
    return f"{n} training" if n == 1 else f"{n} trainings"
