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
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from melens.claims.sentences import sentences
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
    page = render(
        "report.html", content=content, summary=_summary(content, parts[0].metrics, figures), verdicts=VERDICTS,
        sentences=_sentences(content), skipped=skipped, figures=figures, command=command, plotly=get_plotlyjs(),
        heading=_heading, in_script=_in_script, number_with_interval=number_with_interval,
    )  # fmt: skip
    return write_text(Path(folder) / "report.html", page)


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


def _sentences(content: Mapping[str, Any]) -> list[dict[Any, Any]]:
    """Return the statements of the paper with their verdicts; none where few claims were judged."""
    if content["experiment"] != "all":
        return []
    claims = pd.DataFrame(content["claims"], columns=["id", "verdict"])
    return sentences(claims).to_dict("records")


def _heading(figure: Figure) -> str:
    """Return the figure's title without the model and the note, which the page says once."""
    return re.split(r"<br>|: ", figure.plot.layout.title.text or "")[0]


def _in_script(plot: go.Figure) -> Markup:
    """Write a figure as JSON into a script element, which a "<" in one of its texts could end."""
    return Markup(plot.to_json().replace("<", r"\u003c"))
