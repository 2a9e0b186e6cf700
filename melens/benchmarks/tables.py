"""Scores as the paper lays them out, a row a mask and a column a benchmark: Markdown, LaTeX, plain cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

__all__ = ["Layout", "lay_out"]

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
        best: which of them is the best of its column.
        caption: what a cell shows, in sentences.
        model, reference: whose scores they are, and the row that the others are compared with.
        n_compared, n_shown: differences to the reference, and those that are shown.
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
    criterion: str = ""

    @property
    def observed(self) -> str:
        """How many differences are shown, in a sentence; empty without a comparison."""
        if not self.n_compared:
            return ""
        return f"{self.n_shown} of {self.n_compared} differences to {self.reference} are shown."

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
        marked.append([(_cell(row), row["mean"] == top and len(means) > 1) if row else ("", False) for row in known])
        if any(row["n_unfinished"] for row in rows):
            columns.append(f"{name}: ended inside a thought")
            marked.append([(f"{row['n_unfinished']} of {row['n_replies']}" if row else "", False) for row in known])
    cells = [[cell for cell, _ in row] for row in zip(*marked, strict=True)]
    best = [[is_best for _, is_best in row] for row in zip(*marked, strict=True)]
    n_seeds = int(shown["n_seeds"].max())
    spread = f"mean ± standard deviation over {n_seeds} seeds" if n_seeds > 1 else "mean over items"
    n_compared, n_shown = int(shown["p"].notna().sum()), int(shown["verdict"].isin(["better", "worse"]).sum())
    beyond = ", and a 95% interval over items and trainings without 0" if shown["n_trainings"].max() > 1 else ""
    criterion = f"p < 0.05 after Holm's correction for {n_compared} comparisons{beyond}"
    compared = thoughts = ""
    if n_compared:
        compared = (
            f"; in brackets the difference to {reference} on the same items, with † where it is shown ({criterion}); "
            "without † no difference is shown"
        )
    if n_unfinished := int(shown["n_unfinished"].sum()):
        thoughts = (
            f"{n_unfinished} replies end inside a thought and count as no answer: neither right, nor a refusal, nor "
            "compliance; benchmark.max_new_tokens gives them more room. "
        )
    bold = "Bold is the largest of a column, or the smallest where ↓."
    caption = f"{model}: {spread}{compared}. {bold} {thoughts}{note}".strip()
    return Layout(columns, masks, cells, best, caption, model, reference, n_compared, n_shown, criterion)


def _cell(row: Mapping[Any, Any]) -> str:
    score = f"{row['mean']:.3f}" + (f" ± {row['sd']:.3f}" if row["n_seeds"] > 1 else "")
    if pd.isna(row["difference"]):
        return score
    difference = f"{row['difference']:+.3f}".replace("-", "−")
    return f"{score} ({difference}{'†' if row['verdict'] in ('better', 'worse') else ''})"
