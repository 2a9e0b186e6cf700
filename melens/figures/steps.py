"""Quantities over the checkpoints of a training: curves on a logarithmic axis that holds step 0, and maps by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from melens.figures import style
from melens.figures.curves import Panel, curves_by_block
from melens.printing import Brief

__all__ = ["StepMap", "curves_over_steps", "maps_over_steps", "place_of"]

STEP = "training step"


@dataclass(frozen=True, repr=False)
class StepMap(Brief):
    """A quantity `[block, checkpoint]`; `log_scale` colours its logarithm, else colours go from 0 to 1."""

    title: str
    values: np.ndarray
    log_scale: bool = False


def place_of(steps: Sequence[int]) -> dict[int, float]:
    """Place steps on a logarithmic axis: step 0 lies left of the first other one, as far as the axis needs to show."""
    positive = sorted({step for step in steps if step > 0})
    places = {step: float(np.log10(step)) for step in positive}
    if 0 in steps:
        span = places[positive[-1]] - places[positive[0]] if positive else 0.0
        places[0] = (places[positive[0]] if positive else 0.0) - max(0.3, 0.08 * span)
    return places


def curves_over_steps(
    panels: Sequence[Panel], steps: Sequence[int], *, title: str, note: str = "", columns: int = 3
) -> go.Figure:
    """Draw panels of curves whose points have a `step` where those by block have a `layer`.

    Args:
        panels: as for `curves_by_block`.
        steps: all that a curve may have.
        title, note, columns: likewise.
    """
    places = place_of(steps)
    step_at = {place: step for step, place in places.items()}
    placed = []
    for panel in panels:
        curves = [replace(own, points=own.points.assign(layer=own.points["step"].map(places))) for own in panel.curves]
        placed.append(replace(panel, curves=curves))
    figure = curves_by_block(placed, title=title, note=note, columns=columns, x_axis=_step_axis(places))
    for line in figure.select_traces({"type": "scatter"}):
        if line.hovertemplate:
            line.customdata = [step_at[place] for place in line.x]
            line.hovertemplate = line.hovertemplate.replace("block %{x}", "step %{customdata:,}")
    return figure


def _step_axis(places: dict[int, float]) -> dict[str, Any]:
    positive = [step for step in places if step > 0]
    ticks = style.log_ticks(positive)
    values, texts = list(ticks.get("tickvals", positive[:1])), ticks.get("ticktext")
    shown = dict(zip(values, texts or [f"{value:,}" for value in values], strict=True))
    first, last = min(places.values()), max(places.values())
    room = 0.15 + 0.02 * (last - first)
    at = {float(np.log10(value)): text for value, text in shown.items()}
    at = {place: text for place, text in at.items() if first - room <= place <= last + room}
    if 0 in places:
        at = {place: text for place, text in at.items() if place > places[0] + 0.1} | {places[0]: "0"}
    ticks = {"tickmode": "array", "tickvals": list(at), "ticktext": list(at.values())}
    return {"title": {"text": STEP}, "range": [first - room, last + room], **ticks}


def maps_over_steps(maps: Sequence[StepMap], steps: Sequence[int], *, title: str, note: str = "") -> go.Figure:
    """Draw matrices by block and checkpoint, two in a row, each in its own colours; a column a checkpoint."""
    figure, places = style.panels_in_rows([own.title for own in maps], 2, gap=0.2, row_gap=0.3)
    names = [f"{step:,}" for step in steps]
    colors: dict[str, dict[str, Any]] = {}
    for number, (own, at) in enumerate(zip(maps, places, strict=True), 1):
        axis, values = f"coloraxis{number if number > 1 else ''}", np.asarray(own.values, dtype=float)
        shown = np.log10(np.where(values > 0, values, np.nan)) if own.log_scale else values
        trace = go.Heatmap(z=shown, x=names, y=list(range(len(values))), coloraxis=axis, customdata=values.tolist())
        trace.hovertemplate = f"step %{{x}}, block %{{y}}: %{{customdata:.4g}}<extra>{own.title}</extra>"
        figure.add_trace(trace, **at)
        figure.update_xaxes(title_text=STEP, type="category", showgrid=False, nticks=12, **at)
        ticks = style.block_ticks(len(values))
        figure.update_yaxes(title_text=style.BLOCK, showgrid=False, **ticks, **at)
        scale = _scale(own, values)
        bar = _bar(figure, at) | scale.pop("ticks")
        colors[axis] = {"colorscale": "Viridis", "colorbar": bar, **scale}
    return style.finish(figure, title, note, height=60 + 330 * places[-1]["row"], **colors)


def _bar(figure: go.Figure, at: dict[str, int]) -> dict[str, Any]:
    """Lay a bar of colours out beside a panel, as high as that."""
    cell: Any = figure.get_subplot(at["row"], at["col"])
    (_, right), (low, high) = cell.xaxis.domain, cell.yaxis.domain
    return {"x": right + 0.01, "y": (low + high) / 2, "len": high - low, "thickness": 14, "lenmode": "fraction"}


def _scale(own: StepMap, values: np.ndarray) -> dict[str, Any]:
    if not own.log_scale:
        return {"cmin": 0, "cmax": 1, "ticks": {}}
    ticks = style.log_ticks(values)
    return {"ticks": ticks | ({"tickvals": np.log10(ticks["tickvals"]).tolist()} if "tickvals" in ticks else {})}
