"""What a run shows at its end: what it found in five lines, how many claims hold, and the page to open.

`verbose` shows the rest: every finding, each claim with what was measured, and every file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from melens.analysis.statistics import with_interval
from melens.figures.saving import IMAGES
from melens.figures.style import VERDICTS

__all__ = [
    "claims_in_words", "former_verdict", "number_with_interval", "path_from_here", "show_claims", "show_findings",
    "show_paths", "verdicts_in_words",
]  # fmt: skip

N_SHOWN = 5
"""Findings that are shown without `verbose`: the first ones."""
N_CLAIMS_SHOWN = 12
"""So many claims are named one by one without `verbose`, which is all of any experiment; more are on the report."""


def show_findings(title: str, findings: Sequence[tuple[str, ...]], console: Console, *, verbose: bool = False) -> None:
    """Print rows of (what, value), and of (what, left, right) with a line below each: the first ones, or all."""
    most = N_SHOWN + sum(not what for what, *_ in findings[:N_SHOWN])  # a line of headings is no finding
    shown = findings if verbose or len(findings) <= most + 1 else findings[:most]
    heading: str | None = title
    for n_columns, rows in groupby(shown, len):
        table = Table(show_header=False, show_lines=n_columns > 2, title=heading)
        for row in rows:
            table.add_row(*map(Text, row))  # as it is: brackets in it are no markup
        console.print(table)
        heading = None
    if n_more := len(findings) - len(shown):
        console.print(f"{n_more} more findings: add verbose=true to see them here.", highlight=False)


def show_claims(claims: pd.DataFrame, console: Console, *, verbose: bool = False) -> None:
    """Print how many claims hold (`melens.judge`) and, of few, which, or each with what is measured.

    Those that were not measured for one reason share a line.
    """
    if claims.empty:
        return
    console.print(claims_in_words(claims["verdict"]), highlight=False)
    if not verbose:
        if len(claims) <= N_CLAIMS_SHOWN:
            few = Table.grid(padding=(0, 2))
            missing = claims["verdict"] == "not measured"
            named = [*zip(claims["verdict"][~missing], claims["claim"][~missing], strict=True)]
            for why, own in claims[missing].groupby("note", sort=False):
                words = own["claim"].iloc[0] if len(own) == 1 else f"{len(own)} claims: {why}"
                named.append(("not measured", words))
            for verdict, words in named:
                few.add_row("", Text(verdict, VERDICTS[verdict][2]), Text(words))
            console.print(few)
        return
    table = Table("the paper says", "measured here", "verdict", show_lines=True)
    for claim in claims.to_dict("records"):
        number = "" if pd.isna(claim["value"]) else f"[bold]{number_with_interval(claim)}[/]: "
        measured = f"{number}{escape(claim['statistic'])}" + f"\n[dim]{escape(claim['note'])}[/]" * bool(claim["note"])
        verdict = Text(claim["verdict"], VERDICTS[claim["verdict"]][2])
        if (former := former_verdict(claim)) is not None:
            verdict.append(f"\nby its former threshold: {former}", "dim")
        table.add_row(escape(claim["claim"]), measured, verdict)
    console.print(table)


def show_paths(paths: Sequence[Path], console: Console, *, verbose: bool = False) -> None:
    """Print where the page of a run is, its figures for a paper, and its folder or, if asked for all, each file."""
    pages = [path for path in paths if path.suffix == ".html"]
    lines = []
    if pages:
        report = [path for path in pages if path.name == "report.html"]
        lines.append(f"Page:   {path_from_here((report or pages)[0])}")
    kinds = dict.fromkeys((path.parent, path.suffix) for path in paths if path.suffix.removeprefix(".") in IMAGES)
    lines += [f"Figures: {path_from_here(folder)}/*{suffix}" for folder, suffix in kinds]
    if verbose:
        lines += ["Files:", *(f"  {path_from_here(path)}" for path in paths)]
    elif paths:
        lines.append(f"Folder: {path_from_here(paths[0].parent)}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def path_from_here(path: Path) -> str:
    """Return a path as it is typed from the working folder: relative if it lies below, else whole."""
    path, here = Path(path).absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def former_verdict(claim: Mapping[Hashable, Any]) -> str | None:
    """Return what a claim comes to by its former threshold, where that is another verdict."""
    former = claim.get("former_verdict")
    return former if isinstance(former, str) and former != claim["verdict"] else None


def claims_in_words(verdicts: Iterable[str]) -> str:
    """Say how many claims there are and what they come to: "Of 3 claims, 2 hold, 1 does not hold."."""
    verdicts = list(verdicts)
    return f"Of {len(verdicts)} claim{'' if len(verdicts) == 1 else 's'}, {verdicts_in_words(verdicts)}."


def verdicts_in_words(verdicts: Iterable[str]) -> str:
    """Count verdicts: "12 hold, 7 hold in part, 1 does not hold"."""
    counts = Counter(verdicts)
    return ", ".join(
        f"{counts[verdict]} {verdict if counts[verdict] == 1 else verb}"
        for verdict, (verb, *_) in VERDICTS.items()
        if verdict in counts
    )


def number_with_interval(claim: Mapping[Hashable, Any]) -> str:
    """Format a claim's value with its interval, as far as it has them: a cosine near 1 by what it lacks."""
    if pd.isna(claim["value"]):
        return "-"
    form = ".6g" if 0.999 < abs(claim["value"]) < 1 else ".3g"
    return with_interval(claim["value"], None if pd.isna(claim["low"]) else (claim["low"], claim["high"]), form)
