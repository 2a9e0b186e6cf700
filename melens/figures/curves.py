"""Curves by block, by dim or by training step, with their intervals, in one panel or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from melens.figures.style import BLOCK, COLORS, FIRST, finish, legend_below, mark_me_layer, panels_in_rows, whiskers

__all__ = ["Curve", "Panel", "add_curve", "curves_by_block", "ffn_figure", "over_steps", "vectors_by_dim"]


@dataclass(frozen=True)
class Curve:
    """A line by block.

    Attributes:
        name: in the legend; curves of the same name in several panels share an entry.
        points: `layer`, `mean`, and for a band `low` and `high`.
        color: as "#rrggbb".
        in_legend: False for all but one of many alike.
    """

    name: str
    points: pd.DataFrame
    color: str
    in_legend: bool = True


@dataclass(frozen=True)
class Panel:
    """Curves on one pair of axes, with the ME layer (0-based block, or None) marked."""

    title: str
    y_title: str
    curves: Sequence[Curve]
    me_layer: int | None
    log_scale: bool = False
    y_range: tuple[float | int, float | int] | None = None
    zero_line: bool = False


def curves_by_block(
    panels: Sequence[Panel], *, title: str, note: str = "", columns: int = 2, scale_buttons: bool = False
) -> go.Figure:
    """Draw panels of curves by block, so many columns in a row, left to right and top to bottom.

    With `scale_buttons` the reader can switch the panels without a `y_range` between logarithmic and linear.
    """
    figure, places = panels_in_rows([panel.title for panel in panels], columns, gap=0.1, row_gap=0.3)
    in_legend: set[str] = set()
    switched = []
    for number, (panel, at) in enumerate(zip(panels, places, strict=True), 1):
        for curve in panel.curves:
            if panel.log_scale or scale_buttons:
                curve = replace(curve, points=_on_log_scale(curve.points))
            add_curve(figure, curve, at, in_legend=curve.in_legend and curve.name not in in_legend)
            in_legend.add(curve.name)
        figure.update_yaxes(title_text=panel.y_title, range=panel.y_range, **at)
        figure.update_yaxes(**_value_axis(panel.log_scale), **at)
        means = pd.concat([curve.points["mean"] for curve in panel.curves])
        if panel.log_scale and not means.max() >= 30 * means[means > 0].min():
            figure.update_yaxes(dtick="D2", **at)
        if panel.zero_line:
            figure.add_hline(y=0, line={"color": "#888", "width": 1}, **at)
        mark_me_layer(figure, panel.me_layer, **at)
        if panel.y_range is None:
            switched.append(f"yaxis{number}" if number > 1 else "yaxis")
    figure.update_xaxes(title_text=BLOCK, rangemode="tozero")
    height = 170 + 310 * places[-1]["row"]
    below = -55 / (height - 150)  # 55 pixels below the axis, where its title ends
    if scale_buttons:
        figure.update_layout(updatemenus=[_scale_buttons(switched, panels[0].log_scale, below)])
    return finish(figure, title, note, height=height, legend=legend_below(below))


def ffn_figure(
    concentrations: Mapping[str, pd.DataFrame],
    amplification: pd.DataFrame,
    with_norm_behind: pd.DataFrame | None = None,
    *,
    me_layer: int | None,
    title: str,
) -> go.Figure:
    """Draw figure 4: concentration differences as lines, the FFN's amplification as bars on a second axis.

    Args:
        concentrations: by what they are measured after ("gate", "up", "down"): `layer`, `mean`, `low`, `high`.
        amplification: the same of ‖FFN output‖ / ‖FFN input‖ of token 0.
        with_norm_behind: the same of the FFN and a norm behind it together, where blocks have one.
    """
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    bars = [("FFN amplification", amplification, "rgba(120,120,120,0.45)")]
    if with_norm_behind is not None:
        bars.append(("FFN and the norm behind it", with_norm_behind, "rgba(120,170,120,0.45)"))
    for name, points, color in bars:
        points = _on_log_scale(points)
        bar = go.Bar(x=points["layer"], y=points["mean"], name=f"{name} (right axis)", marker={"color": color})
        bar.error_y = whiskers(points["mean"], points["low"], points["high"]) | {"thickness": 1, "width": 2}
        bar.hovertemplate = f"block %{{x}}: ×%{{y:.4g}}<extra>{name}</extra>"
        figure.add_trace(bar, secondary_y=True)
    for (name, points), color in zip(concentrations.items(), COLORS, strict=False):
        add_curve(figure, Curve(f"after {name}", points, color), {"row": 1, "col": 1}, in_legend=True)
    figure.update_yaxes(title_text="concentration, token 0 minus the others", secondary_y=False, zeroline=True)
    ratio = "‖FFN output‖ / ‖FFN input‖ of token 0"
    figure.update_yaxes(title_text=ratio, secondary_y=True, **_value_axis(log_scale=True), showgrid=False)
    figure.update_xaxes(title_text=BLOCK)
    mark_me_layer(figure, me_layer)
    note = "Lines and bars: means over prompts. Bands and whiskers: their 95% intervals."
    return finish(figure, title, note, height=560, legend=legend_below(-0.16), margin={"r": 90})


def vectors_by_dim(vectors: Mapping[str, np.ndarray], *, title: str, note: str = "") -> go.Figure:
    """Draw figure 5b: token 0's activation by dim, a panel for each of a few blocks: by its title, `[d_model]`."""
    figure = make_subplots(len(vectors), 1, shared_xaxes=True, subplot_titles=list(vectors), vertical_spacing=0.06)
    for row, vector in enumerate(vectors.values(), 1):
        line = go.Scatter(x=np.arange(len(vector)), y=vector, mode="lines", showlegend=False)
        line.update(line={"color": FIRST, "width": 1}, hovertemplate="dim %{x}: %{y:.4g}<extra></extra>")
        figure.add_trace(line, row=row, col=1)
        largest = int(np.abs(vector).argmax())
        label = {"showarrow": False, "xanchor": "left", "xshift": 6, "font": {"size": 12}}
        figure.add_annotation(x=largest, y=vector[largest], text=f"dim {largest}", row=row, col=1, **label)
    figure.update_xaxes(title_text="dim of the residual stream", row=len(vectors), col=1)
    figure.update_yaxes(title_text="activation")
    return finish(figure, title, note, height=160 + 170 * len(vectors))


def over_steps(panels: Mapping[str, Mapping[str, pd.DataFrame]], *, title: str, markers: bool = False) -> go.Figure:
    """Draw what changes in a training, a panel a quantity.

    Args:
        panels: by the quantity's name, by the curve's name (empty for a lone one), `step` and `value`.
        markers: for curves of few points.
    """
    figure = make_subplots(1, len(panels), subplot_titles=list(panels), horizontal_spacing=0.12)
    in_legend: set[str] = set()
    for column, curves in enumerate(panels.values(), 1):
        for number, (name, points) in enumerate(curves.items()):
            line = go.Scatter(x=points["step"], y=points["value"], mode="lines+markers" if markers else "lines")
            line.update(name=name, legendgroup=name, showlegend=bool(name) and name not in in_legend)
            line.hovertemplate = f"step %{{x}}: %{{y:.4g}}<extra>{name}</extra>"
            line.line = {"color": COLORS[number % len(COLORS)], "width": 2}
            figure.add_trace(line, row=1, col=column)
            in_legend.add(name)
    figure.update_xaxes(title_text="step", rangemode="tozero")
    return finish(figure, title, height=430, legend=legend_below(-0.22))


def add_curve(figure: go.Figure, curve: Curve, at: dict[str, int], *, in_legend: bool) -> None:
    """Add a line to a panel (its `row` and `col`), with a band where its points have intervals."""
    points, layers = curve.points, curve.points["layer"]
    if "low" in points and points["low"].notna().any():
        red, green, blue = (int(curve.color[i : i + 2], 16) for i in (1, 3, 5))
        band = go.Scatter(x=[*layers, *layers[::-1]], y=[*points["high"], *points["low"][::-1]], mode="lines")
        band.update(fill="toself", fillcolor=f"rgba({red},{green},{blue},0.15)", line={"width": 0})
        band.update(hoverinfo="skip", showlegend=False, legendgroup=curve.name)
        figure.add_trace(band, **at)
    line = go.Scatter(x=layers, y=points["mean"], mode="lines+markers", marker={"size": 5})
    line.update(name=curve.name, legendgroup=curve.name, showlegend=in_legend, line={"color": curve.color, "width": 2})
    line.hovertemplate = f"block %{{x}}: %{{y:.4g}}<extra>{curve.name}</extra>"
    figure.add_trace(line, **at)


def _on_log_scale(points: pd.DataFrame) -> pd.DataFrame:
    """Cut low ends of intervals a decade below the curve: of a few prompts they may be under 0, off any log axis."""
    positive = points["mean"][points["mean"] > 0]
    if "low" not in points or positive.empty:
        return points
    return points.assign(low=points["low"].clip(lower=positive.min() / 10))


def _value_axis(log_scale: bool) -> dict[str, Any]:
    return {"type": "log", "exponentformat": "power", "dtick": 1} if log_scale else {"type": "linear", "dtick": None}


def _scale_buttons(axes: Sequence[str], log_scale: bool, y: float) -> dict[str, Any]:
    buttons = []
    for label, is_log in (("log", True), ("linear", False)):
        changes = {f"{axis}.{key}": value for axis in axes for key, value in _value_axis(is_log).items()}
        buttons.append({"label": label, "method": "relayout", "args": [changes]})
    place = {"x": 1, "xanchor": "right", "y": y, "yanchor": "top"}
    return {"type": "buttons", "direction": "right", "active": 0 if log_scale else 1, "buttons": buttons, **place}
