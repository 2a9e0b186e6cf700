"""What a run shows at its end: a table of the findings, the verdicts on the claims, and the files that it wrote."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from melens.analysis.statistics import with_interval
from melens.figures.style import VERDICTS

__all__ = ["former_verdict", "number_with_interval", "show_claims", "show_findings", "show_paths", "verdicts_in_words"]


def show_findings(title: str, findings: Sequence[tuple[str, ...]], console: Console) -> None:
    """Print rows of (what, value), or of (what, left, right) with a line below each."""
    side_by_side = any(len(row) > 2 for row in findings)
    table = Table(show_header=False, show_lines=side_by_side, title=title)
    for row in findings:
        table.add_row(*map(Text, row))  # as it is: brackets in it are no markup
    console.print(table)


def show_claims(claims: pd.DataFrame, console: Console) -> None:
    """Print what the paper says, what is measured and the verdict (of `melens.judge`); nothing where there are none."""
    if claims.empty:
        return
    title = f"What the paper says, on this model: {verdicts_in_words(claims['verdict'])}"
    table = Table("the paper says", "measured here", "verdict", title=title, show_lines=True)
    for claim in claims.to_dict("records"):
        number = "" if pd.isna(claim["value"]) else f"[bold]{number_with_interval(claim)}[/]: "
        measured = f"{number}{escape(claim['statistic'])}" + f"\n[dim]{escape(claim['note'])}[/]" * bool(claim["note"])
        verdict = Text(claim["verdict"], VERDICTS[claim["verdict"]][2])
        if (former := former_verdict(claim)) is not None:
            verdict.append(f"\nformerly {former}", "dim")
        table.add_row(escape(claim["claim"]), measured, verdict)
    console.print(table)


def former_verdict(claim: Mapping[Hashable, Any]) -> str | None:
    """Return what a claim comes to by its former threshold, where that is another verdict."""
    former = claim.get("former_verdict")
    return former if isinstance(former, str) and former != claim["verdict"] else None


def verdicts_in_words(verdicts: Iterable[str]) -> str:
    """Count verdicts: "12 hold, 7 hold in part, 2 do not hold"."""
    counts = Counter(verdicts)
    return ", ".join(f"{counts[verdict]} {verb}" for verdict, (verb, *_) in VERDICTS.items() if verdict in counts)


def show_paths(paths: Sequence[Path], console: Console) -> None:
    """Print where the files of a run are."""
    written = (os.path.relpath(path) for path in paths)
    console.print("Written:", *written, sep="\n  ", markup=False, highlight=False, soft_wrap=True)


def number_with_interval(claim: Mapping[Hashable, Any]) -> str:
    """Format a claim's value with its interval, as far as it has them: a cosine near 1 by what it lacks."""
    if pd.isna(claim["value"]):
        return "-"
    form = ".6g" if 0.999 < abs(claim["value"]) < 1 else ".3g"
    return with_interval(claim["value"], None if pd.isna(claim["low"]) else (claim["low"], claim["high"]), form)
