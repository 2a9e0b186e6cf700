"""The verdicts as a document: `claims.md` of a run, the table of several models, and the project's findings.

    python experiments/run.py exp=all exp.stability.judge_all=true hydra.run.dir=outputs/findings
    python -m melens.report.ledger outputs/findings   # puts them into the documents, and keeps what they rest on

1. `claims_in_markdown` writes the claims of one `result.json`, by verdict: every number in it is read from there.
2. `claims_by_model` lays the claims of several models side by side, what holds in all of them first.
3. `update_findings` fills the marked parts of `README.md` and `experiments/FINDINGS.md` from a result, of which `KEPT`
   holds what they need. A test compares the documents with `KEPT`, and `KEPT` with a new run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from melens.errors import MelensError
from melens.figures.style import VERDICTS
from melens.report.terminal import claims_in_words, former_verdict, number_with_interval
from melens.storage.files import write_text

__all__ = ["KEPT", "claims_by_model", "claims_in_markdown", "marked_parts", "update_findings", "write_claims"]

KEPT = ".github/findings.json"
"""The claims of the model in the documents, and what the README's figure shows: a part of a `result.json`."""
_RATIOS = ("me_layer_by_ratio", "changed_by_ratio")


def claims_in_markdown(content: Mapping[str, Any]) -> str:
    """Write the claims of one model as Markdown, a table a verdict.

    Args:
        content: what `result.json` holds.
    """
    claims = content["claims"]
    lines = [claims_in_words(claim["verdict"] for claim in claims), *_by_ratio(content)]
    for verdict in VERDICTS:
        rows = [claim for claim in claims if claim["verdict"] == verdict]
        if rows:
            lines += ["", f"| {verdict} | measured here |", "| --- | --- |", *map(_row, rows)]
    return "\n".join(lines) + "\n"


def write_claims(content: Mapping[str, Any], folder: str | Path) -> Path:
    """Write `claims.md` into the folder of a run.

    Raises:
        MelensError: the folder cannot be written to.
    """
    name = content["model"]["name"]
    return write_text(Path(folder) / "claims.md", f"# The paper's claims on {name}\n\n{claims_in_markdown(content)}")


def claims_by_model(claims: pd.DataFrame) -> pd.DataFrame:
    """Lay the verdicts of several models side by side.

    Args:
        claims: of `melens.judge`.

    Returns:
        A row a claim with `claim`, `source`, `holds_in` (how many models it holds in) and `of` (in how many it was
        measured), and a column a model with its verdict; what holds in all of them first, then in most.
    """
    own = claims[claims["model"] != "all models"]
    wide = own.pivot(index="id", columns="model", values="verdict").fillna("not measured")
    wide = wide.loc[own["id"].unique(), own["model"].unique()]
    said = own.drop_duplicates("id").set_index("id")[["claim", "source"]]
    holds, measured = (wide == "holds").sum(axis=1), (wide != "not measured").sum(axis=1)
    table = said.assign(holds_in=holds, of=measured).join(wide)
    order = pd.DataFrame({"in_all": (holds == measured) & (measured > 0), "holds": holds})
    order = order.sort_values(["in_all", "holds"], ascending=False, kind="stable")
    return table.loc[order.index].reset_index()


def marked_parts(kept: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Write what the documents say of a model, by file and by the name in the part's mark `<!-- findings: name -->`."""
    model, observed = kept["model"], kept["figures"]
    caption = f"*{model['name']}. {observed['emergence']['here']} {observed['sink_mass']['here']}*\n"
    summary = f"**{model['name']}**: {claims_in_words(claim['verdict'] for claim in kept['claims'])}\n"
    return {
        "README.md": {"caption": caption, "summary": summary},
        "experiments/FINDINGS.md": {"claims": claims_in_markdown(kept)},
    }


def update_findings(folder: str | Path, root: str | Path = ".") -> None:
    """Fill the marked parts of the documents from the result of `exp=all`, and keep what they rest on in `KEPT`.

    Raises:
        MelensError: the folder holds no finished result of `exp=all`, or a document has no such marks.
    """
    path = Path(folder) / "result.json"
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise MelensError(f"{path} cannot be read: give the folder of a finished run of exp=all.") from None
    if content["experiment"] != "all" or content["status"] != "ok":
        raise MelensError(f"{path} is of exp={content['experiment']}: give the folder of a finished run of exp=all.")
    if missing := {"emergence", "sinks", "stability"} - set(content["metrics"]):
        raise MelensError(f"{path} has no {' and '.join(sorted(missing))}: run exp=all with all its experiments.")
    names, figures = ("name", "n_layers", "dtype"), ("emergence", "sink_mass")
    kept = {
        "model": {name: content["model"][name] for name in names},
        "figures": {name: content["figures"][name] for name in figures},
        "claims": content["claims"],
        "metrics": {"stability": {name: content["metrics"]["stability"][name] for name in _RATIOS}},
        "environment": {name: content["environment"][name] for name in ("git_commit", "finished")},
    }
    written = {Path(root) / name: _filled(Path(root) / name, parts) for name, parts in marked_parts(kept).items()}
    write_text(Path(root) / KEPT, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    for path, text in written.items():
        write_text(path, text)


def _filled(path: Path, parts: Mapping[str, str]) -> str:
    """Return the text of a document with its marked parts written anew."""
    text = path.read_text("utf-8")
    for name, part in parts.items():
        begin, end = f"<!-- findings: {name} -->\n", "<!-- end -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise MelensError(f"{path} has no part between {begin.strip()} and {end}.")
        text = f"{before}{begin}{part}{end}{after}"
    return text


def _by_ratio(content: Mapping[str, Any]) -> list[str]:
    """Say how ME layer and verdicts change with the ratio to the median from which on an entry is massive."""
    stability = content.get("metrics", {}).get("stability", {})
    if not (me_layers := stability.get("me_layer_by_ratio")):
        return []
    n_changed = {ratio: len(ids) for ratio, ids in stability["changed_by_ratio"].items()}
    found = []
    for ratio, layer in me_layers.items():
        me_layer = "there is no ME layer" if layer is None else f"the ME layer is block {layer}"
        n = n_changed.get(ratio)
        changed = f", and {n} {'verdict changes' if n == 1 else 'verdicts change'}" if n else ""
        found.append(f"at {int(ratio):,} {me_layer}{changed}")
    return ["", f"By how many medians an entry must exceed to be massive: {'; '.join(found)}."]


def _row(claim: Mapping[Hashable, Any]) -> str:
    number = "" if pd.isna(claim["value"]) else f"**{number_with_interval(claim)}**: "
    before = "" if (former := former_verdict(claim)) is None else f"By the former threshold: {former}."
    fine = " ".join(filter(None, (f"Threshold: {claim['criterion']}.", claim["note"], before)))
    said = f"{claim['claim']} ({claim['source']})"
    measured = f"{number}{claim['statistic']}. {fine}"
    return f"| {_escaped(said)} | {_escaped(measured)} |"


def _escaped(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ").replace("<", "&lt;")


if __name__ == "__main__":
    try:
        update_findings(*sys.argv[1:])
    except (MelensError, TypeError) as error:
        sys.exit(str(error) if isinstance(error, MelensError) else "Give the folder of a finished run of exp=all.")
