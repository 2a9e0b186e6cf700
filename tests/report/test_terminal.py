"""What a run shows at its end: five findings, the verdicts and the page; with `verbose` all of it."""

from io import StringIO

import pandas as pd
import pytest
from rich.console import Console

from melens.report.terminal import N_CLAIMS_SHOWN, claims_in_words, show_claims, show_findings, show_paths

FINDINGS = [(f"number {n}", f"value {n}") for n in range(8)]


def claims_of(n):
    row = {"claim": "It [b]is[/b] large", "statistic": "its size", "value": 4.0, "low": 3.5, "high": 4.5, "note": ""}
    return pd.DataFrame([row | {"verdict": "holds" if n else "does not hold"} for n in range(n)])


def shown(show, *given, verbose=False):
    show(*given, console := Console(file=StringIO(), width=100), verbose=verbose)
    return console.file.getvalue()


def test_the_first_findings_are_shown_and_how_to_see_the_rest():
    brief, whole = shown(show_findings, "t", FINDINGS), shown(show_findings, "t", FINDINGS, verbose=True)
    assert "value 4" in brief
    assert "value 5" not in brief
    assert "3 more findings: add verbose=true to see them here." in brief
    assert "value 7" in whole
    assert "more findings" not in whole
    assert "value 5" in shown(show_findings, "t", FINDINGS[:6])  # for one more, no second run


def test_headings_are_no_findings_and_columns_are_those_of_the_rows():
    rows = [("in all", "two of two"), ("", "left", "right"), *((f"number {n}", f"value {n}", "x") for n in range(6))]
    brief = shown(show_findings, "t", rows)
    assert "value 3" in brief
    assert "value 4" not in brief
    assert "2 more findings" in brief
    first = next(line for line in brief.splitlines() if "two of two" in line)
    assert first.count("│") == 3  # two columns, which have the width of three


def test_few_claims_are_named_with_their_verdicts_and_many_are_counted():
    few = shown(show_claims, claims_of(3)).splitlines()
    assert [line.rstrip() for line in few] == [
        "Of 3 claims, 2 hold, 1 does not hold.",
        "  does not hold  It [b]is[/b] large",
        *["  holds          It [b]is[/b] large"] * 2,
    ]
    long = shown(show_claims, claims_of(1).assign(claim="a word " * 20)).splitlines()
    assert {line.index("a") for line in long[1:]} == {len("  does not hold  ")}
    missing = claims_of(4).assign(verdict=["holds", *["not measured"] * 3], note=["", "none", "none", "short"])
    assert [line.rstrip() for line in shown(show_claims, missing).splitlines()[1:]] == [
        "  holds         It [b]is[/b] large",
        "  not measured  2 claims: none",
        "  not measured  It [b]is[/b] large",
    ]
    many = claims_of(N_CLAIMS_SHOWN + 1)
    assert shown(show_claims, many).splitlines() == ["Of 13 claims, 12 hold, 1 does not hold."]
    assert "4 (3.5 to 4.5): its size" in shown(show_claims, claims_of(1).assign(former_verdict=None), verbose=True)
    assert shown(show_claims, claims_of(0)) == ""


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (["holds"], "Of 1 claim, 1 holds."),
        (["does not hold", "holds", "holds"], "Of 3 claims, 2 hold, 1 does not hold."),
    ],
)
def test_one_claim_has_a_verb_of_its_own(verdicts, words):
    assert claims_in_words(verdicts) == words


def test_paths_are_as_they_are_typed_from_here(tmp_path, monkeypatch):
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    inside = [here / "outputs" / name for name in ("norms.html", "norms.parquet", "report.html", "result.json")]
    assert shown(show_paths, inside) == "Page:   outputs/report.html\nFolder: outputs\n"
    assert shown(show_paths, inside[:2]) == "Page:   outputs/norms.html\nFolder: outputs\n"
    images = [here / "outputs" / f"norms-{columns}col.pdf" for columns in (1, 2)]
    assert shown(show_paths, images) == "Figures: outputs/*.pdf\nFolder: outputs\n"
    assert "  outputs/norms.parquet\n" in shown(show_paths, inside, verbose=True)
    assert shown(show_paths, [tmp_path / "elsewhere" / "result.json"]) == f"Folder: {tmp_path}/elsewhere\n"
