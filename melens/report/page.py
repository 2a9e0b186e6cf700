"""One self-contained page of all that a run found: `report.html`."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs

from melens.report.record import PARTIAL, WHOLE, claims_of, number_with_interval, write_text
from melens.report.result import Figure, Result, plain_metrics

__all__ = ["write_report"]

VERDICTS = {
    "holds": ("hold", "good"),
    "holds in part": ("hold in part", "part"),
    "does not hold": ("do not hold", "bad"),
    "trivial here": ("trivial here", "none"),
    "not measured": ("not measured", "none"),
}


def write_report(result: Result, folder: str | Path, *, command: str) -> Path:
    """Write `report.html`, which needs no network: the claims, every figure with what it shows, and the environment.

    Args:
        result: of `results.combine`.
        folder: of the run, which holds its `result.json`, or its `result.partial.json` while there is more to come.
        command: that made it.

    Raises:
        MelensError: the folder cannot be written to.
    """
    whole, partial = Path(folder) / WHOLE, Path(folder) / PARTIAL
    content = json.loads((whole if whole.is_file() else partial).read_text("utf-8"))
    claims = claims_of(result)
    skipped = {
        name: part["not_applicable"] for name, part in plain_metrics(result.metrics).items() if "not_applicable" in part
    }
    page = Template(_PAGE).substitute(
        title=f"Massive activations of {escape(result.model['name'])}",
        style=_STYLE,
        missing=_missing(content),
        summary=_summary(result, claims),
        claims="\n".join(_claim_row(claim, result.figures) for claim in claims.to_dict("records")),
        skipped="".join(f"<p><b>{escape(name)}</b> does not apply: {escape(why)}</p>" for name, why in skipped.items()),
        contents="\n".join(
            f'<li><a href="#{name}">{escape(_heading(picture))}</a> ({escape(picture.source)})</li>'
            for name, picture in result.figures.items()
        ),
        figures="\n".join(_section(name, picture) for name, picture in result.figures.items()),
        environment=_environment(content, command),
        plotly=get_plotlyjs(),
        script=_SCRIPT,
    )
    return write_text(Path(folder) / "report.html", page)


def _missing(content: Mapping[str, Any]) -> str:
    """Say what a run that goes on, or was stopped, has not done yet."""
    if not content.get("missing"):
        return ""
    state = "This run goes on" if content["status"] == "running" else "This run was stopped"
    next_time = " The same command goes on with them." if content["goes_on"] else ""
    names = escape(", ".join(content["missing"]))
    return f'<p class="missing"><b>{state}.</b> Not here are: {names}.{next_time}</p>'


def _summary(result: Result, claims: pd.DataFrame) -> str:
    model = result.model
    metrics = next(iter(plain_metrics(result.metrics).values()))
    of_emergence = result.figures.get("emergence")
    sentences = [
        f"{model['name']} ({model['architecture']}, {model['n_layers']} blocks of width {model['d_model']}, "
        f"{model['dtype']}) was run on {metrics['n_prompts']} prompts with {metrics['distinct_first_tokens']} distinct "
        "first tokens."
    ]
    if of_emergence is not None:
        sentences.append(of_emergence.observed)
    counts = claims["verdict"].value_counts()
    told = [f"{counts[verdict]} {verb}" for verdict, (verb, _) in VERDICTS.items() if verdict in counts]
    if told:
        sentences.append(f"Of {len(claims)} claims of the paper and its review, {', '.join(told)}.")
    return " ".join(f"<span>{escape(sentence)}</span>" for sentence in sentences)


def _claim_row(claim: Mapping[Hashable, Any], pictures: Mapping[str, Figure]) -> str:
    what = escape(claim["claim"])
    if claim["figure"] in pictures:
        what = f'<a href="#{claim["figure"]}">{what}</a>'
    note = f'<div class="note">{escape(claim["note"])}</div>' if claim["note"] else ""
    measure = f"{escape(claim['statistic'])}: {escape(claim['criterion'])}"
    verdict = f'<span class="verdict {VERDICTS[claim["verdict"]][1]}">{claim["verdict"]}</span>'
    cells = (
        verdict,
        f'{what}<div class="note">{escape(claim["source"])}</div>',
        escape(number_with_interval(claim)),
        f'{measure}<div class="note">Why: {escape(claim["why"])}.</div>{note}',
    )
    return f'<tr id="claim-{claim["id"]}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _heading(picture: Figure) -> str:
    """Return the figure's title without the model and the note, which the page says once."""
    return re.split(r"<br>|: ", picture.plot.layout.title.text or "")[0]


def _section(name: str, picture: Figure) -> str:
    # "</" would end the script element that holds the figure.
    data = picture.plot.to_json().replace("</", "<\\/")
    heading = escape(_heading(picture))
    paper = f"<b>Paper:</b> {escape(picture.expected)}<br>" if picture.expected else ""
    return (
        f'<section id="{name}" tabindex="-1"><h2>{heading} <small>{escape(picture.source)}</small></h2>'
        f"<p>{paper}<b>Here:</b> {escape(picture.observed)}</p>"
        f'<div class="scroll"><div class="figure" role="img" aria-label="{heading}" '
        f'style="height:{picture.plot.layout.height or 600}px"></div></div>'
        f'<script type="application/json">{data}</script>'
        f'<p class="note"><a href="#claims">Back to the claims</a></p></section>'
    )


def _environment(content: Mapping[str, Any], command: str) -> str:
    environment = content["environment"]
    rows = {
        "command": command,
        "device and dtype": f"{environment['device']}, {environment['dtype']}",
        "seed": environment["seed"],
        "commit": environment["git_commit"],
        "took": f"{environment['duration_s']} s, finished {environment['finished']}",
        "versions": ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
    }
    return "\n".join(f"<tr><th>{name}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items())


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<a class="skip" href="#claims">To the claims</a>
<main>
<h1>$title</h1>
$missing
<p class="summary">$summary</p>
<p class="note">Blocks are counted from 0. The ME layer is the first block whose output holds a massive activation.
Intervals are 95% bootstrap intervals over prompts. Thresholds were fixed in advance, the same for every model.</p>
<section id="claims" tabindex="-1"><h2>The paper's claims on this model</h2>
<table class="claims">
<thead><tr><th>Verdict</th><th>Claim</th><th>Value</th><th>Measured by, and criterion</th></tr></thead>
<tbody>
$claims
</tbody></table>
$skipped</section>
<nav aria-label="Figures"><h2>Figures</h2><ol>
$contents
</ol></nav>
$figures
<section id="environment"><h2>Environment</h2><table class="environment">
$environment
</table></section>
</main>
<script>$plotly</script>
<script>$script</script>
</body>
</html>
"""

_STYLE = """
body { margin: 0; font: 16px/1.5 Helvetica, Arial, sans-serif; color: #222; background: #fff }
main { max-width: 1120px; margin: 0 auto; padding: 16px }
h1 { font-size: 1.7em; line-height: 1.2 } h2 { font-size: 1.25em; margin: 2em 0 .4em }
h2 small { font-weight: normal; color: #666; font-size: .75em }
.missing { background: #f8d9d9; color: #7d1313; padding: 8px 12px }
.summary { font-size: 1.1em } .note { color: #5a5a5a; font-size: .85em }
a { color: #00538a } a:focus-visible { outline: 3px solid #e69f00 }
.skip { position: absolute; left: -999em } .skip:focus { left: 8px; top: 8px; background: #fff; padding: 4px }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: 7px 10px; border-bottom: 1px solid #ddd }
.environment { table-layout: fixed } .environment th { width: 9em } .environment td { overflow-wrap: anywhere }
.number { white-space: nowrap }
.verdict { display: inline-block; white-space: nowrap; border-radius: 3px; padding: 1px 8px; font-size: .9em }
.good { background: #d5efdf; color: #0b5227 } .part { background: #d9e9f6; color: #0b3f66 }
.bad { background: #f8d9d9; color: #7d1313 } .none { background: #eee; color: #444 }
.scroll { overflow-x: auto } .figure { min-width: 640px }
@media (max-width: 700px) {
  .claims thead { display: none } .claims tr { display: block; border-bottom: 2px solid #bbb; padding: 6px 0 }
  .claims td { display: block; border: 0; padding: 2px 0 }
}
@media print {
  .skip, nav { display: none } section, .claims tr { break-inside: avoid } #claims { break-inside: auto }
  .scroll { overflow: visible }
  .figure { min-width: 0 } a { color: inherit; text-decoration: none } .modebar { display: none }
}
"""

_SCRIPT = """
const figures = [...document.querySelectorAll('.figure')];
function draw(index) {
  if (index === figures.length) { document.body.dataset.drawn = 'all'; return; }
  const element = figures[index];
  const { data, layout } = JSON.parse(element.closest('section').querySelector('script').textContent);
  Plotly.newPlot(element, data, layout, { responsive: true, displaylogo: false })
    .then(() => setTimeout(draw, 0, index + 1));
}
draw(0);
window.addEventListener('beforeprint', () => figures.forEach((element) => Plotly.Plots.resize(element)));
"""
