"""Pages that need no network: `report.html`, with all that a run found, and others from the same base.

    write_report(record.parts, record.content, folder, command="python experiments/run.py exp=all")

The pages are jinja2 templates in `templates/`, which escape whatever they are given; `base.html` has what they share.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from melens.claims.engine import when_set
from melens.claims.sentences import sentences
from melens.figures.saving import for_screens
from melens.figures.style import VERDICTS
from melens.report.result import Figure, Metrics, Result
from melens.report.terminal import claims_in_words, number_with_interval
from melens.storage.files import write_text

__all__ = ["render", "write_report"]

_LOADER = PackageLoader("melens.report")
_TEMPLATES = Environment(loader=_LOADER, autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def render(template: str, **content: Any) -> str:
    """Fill a template of `templates/`; whatever text it is given is escaped."""
    return _TEMPLATES.get_template(template).render(**content)


def write_report(parts: Sequence[Result], content: Mapping[str, Any], folder: str | Path, *, command: str) -> Path:
    """Write `report.html`: the claims, every figure with what it shows, and the environment.

    Args:
        parts: what the experiments of a run found so far.
        content: what their `result.json` holds, or `result.partial.json` while there is more to come.

    Raises:
        MelensError: the folder cannot be written to.
    """
    figures = {name: figure for part in parts for name, figure in part.figures.items()}
    skipped = {part.experiment: part.metrics.not_applicable for part in parts if part.metrics.not_applicable}
    drawings, plotly = {name: Markup(for_screens(figure.plot)) for name, figure in figures.items()}, get_plotlyjs()
    page = render(
        "report.html", content=content, title=_title(content, figures), parts=parts, figures=figures,
        summary=_summary(content, parts[0].metrics, figures), first=_first(content, figures), drawings=drawings,
        verdicts=VERDICTS, size=f"{(len(plotly) + sum(map(len, drawings.values()))) / 1e6:.1f}",
        sentences=_sentences(content), skipped=skipped, command=command, plotly=plotly, heading=_heading, note=_note,
        number_with_interval=number_with_interval, when_set=when_set, not_measured=_not_measured(content),
    )  # fmt: skip
    return write_text(Path(folder) / "report.html", page)


def _title(content: Mapping[str, Any], figures: Mapping[str, Figure]) -> str:
    """Return what the page is about: of a single experiment what its first figure shows."""
    name = content["model"]["name"]
    of_one = content["experiment"] != "all" and figures
    return f"{_heading(next(iter(figures.values())))}: {name}" if of_one else f"Massive activations of {name}"


def _first(content: Mapping[str, Any], figures: Mapping[str, Figure]) -> str | None:
    """Return the figure that stands before the claims of several experiments."""
    return next(iter(figures), None) if content["experiment"] == "all" else None


def _summary(content: Mapping[str, Any], metrics: Metrics, figures: Mapping[str, Figure]) -> list[str]:
    model = content["model"]
    sentences = [
        f"{model['name']} ({model['architecture']}, {model['n_layers']} blocks of width {model['d_model']}, "
        f"{model['dtype']}) was run on {metrics.n_prompts} prompts with {metrics.distinct_first_tokens} distinct "
        "first tokens."
    ]
    if "emergence" in figures:
        sentences.append(figures["emergence"].observed)
    if claims := content["claims"]:
        sentences.append(claims_in_words(claim["verdict"] for claim in claims))
    return sentences


def _not_measured(content: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the claims that were not measured, by the reason."""
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for claim in content["claims"]:
        if claim["verdict"] == "not measured":
            by_reason.setdefault(claim["note"], []).append(claim)
    return by_reason


def _sentences(content: Mapping[str, Any]) -> list[dict[Any, Any]]:
    """Return the statements of the paper with their verdicts; none where few claims were judged."""
    if content["experiment"] != "all":
        return []
    claims = pd.DataFrame(content["claims"], columns=["id", "verdict"])
    return sentences(claims).to_dict("records")


def _heading(figure: Figure) -> str:
    """Return the figure's title without the model and the note, which the page says once."""
    return re.split(r"<br>|: ", figure.plot.layout.title.text or "")[0]


def _note(figure: Figure) -> str:
    """Return the small print below a figure's title."""
    _, _, note = (figure.plot.layout.title.text or "").partition("<br><sub>")
    return str(note.replace("</sub>", "").replace("<br>", " "))
