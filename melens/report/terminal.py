"""What a run shows at its end: a table of the findings, the verdicts on the claims, and the files that it wrote."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from melens.analysis.statistics import with_interval
from melens.figures.style import VERDICTS

__all__ = ["number_with_interval", "show_claims", "show_findings", "show_paths"]


def show_findings(title: str, findings: Sequence[tuple[str, ...]], console: Console) -> None:
    """Print rows of (what, value), or of (what, left, right) with a line below each."""
    side_by_side = any(len(row) > 2 for row in findings)
    table = Table(show_header=False, show_lines=side_by_side, title=title)
    for row in findings:
        table.add_row(*map(Text, row))  # as it is: brackets in it are no markup
    console.print(table)


def show_claims(claims: pd.DataFrame, console: Console) -> None:
    """Print the verdicts on claims (of `melens.judge`); nothing where there are none."""
    if claims.empty:
        return
    table = Table("verdict", "claim", "value", title="The paper's claims on this model")
    for claim in claims.to_dict("records"):
        verdict = Text(claim["verdict"], VERDICTS[claim["verdict"]][2])
        measured = f"{claim['statistic']}: {claim['criterion']}. {claim['note']}".strip()
        what = f"{claim['claim']} ({claim['source']})\n[dim]{escape(measured)}[/]"
        table.add_row(verdict, what, number_with_interval(claim))
    console.print(table)


def show_paths(paths: Sequence[Path], console: Console) -> None:
    """Print where the files of a run are."""
    written = (os.path.relpath(path) for path in paths)
    console.print("Written:", *written, sep="\n  ", markup=False, highlight=False, soft_wrap=True)


def number_with_interval(claim: Mapping[Hashable, Any]) -> str:
    """Format a claim's value with its interval, as far as it has them."""
    if pd.isna(claim["value"]):
        return "-"
    return with_interval(claim["value"], None if pd.isna(claim["low"]) else (claim["low"], claim["high"]))
