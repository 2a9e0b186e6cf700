"""Curves by block, by dim or by training step, with their intervals, in one panel or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from melens.figures.style import (
    BLOCK,
    COLORS,
    FIRST,
    block_ticks,
    finish,
    legend,
    log_ticks,
    mark_me_layer,
    menu_above,
    panels_in_rows,
)
from melens.printing import Brief

__all__ = ["Curve", "Panel", "add_curve", "curves_by_block", "ffn_figure", "over_steps", "vectors_by_dim"]


@dataclass(frozen=True, repr=False)
class Curve(Brief):
    """A line by block.

    Attributes:
        name: in the legend; curves of the same name in several panels share an entry.
        points: `layer`, `mean`, and for a band `low` and `high`.
        color: as "#rrggbb"; the markers and dashes that go with it tell lines apart in print without colours.
        in_legend: False for all but one of many alike.
        thin: one of many alike: a faint line without markers.
    """

    name: str
    points: pd.DataFrame
    color: str
    in_legend: bool = True
    thin: bool = False


@dataclass(frozen=True, repr=False)
class Panel(Brief):
    """Curves on one pair of axes, with the ME layer (0-based block, or None) marked."""

    title: str
    y_title: str
    curves: Sequence[Curve]
    me_layer: int | None
    log_scale: bool = False
    y_range: tuple[float | int, float | int] | None = None
    zero_line: bool = False


def curves_by_block(
    panels: Sequence[Panel],
    *,
    title: str,
    note: str = "",
    columns: int = 2,
    scale_buttons: bool = False,
    x_axis: Mapping[str, Any] | None = None,
) -> go.Figure:
    """Draw panels of curves by block, so many columns in a row, left to right and top to bottom.

    With `scale_buttons` the reader can switch the panels without a `y_range` between logarithmic and linear. `x_axis`
    is plotly's, where a curve's `layer` is no block.
    """
    figure, places = panels_in_rows([panel.title for panel in panels], columns, gap=0.1, row_gap=0.3)
    in_legend: set[str] = set()
    me_layers = [panel.me_layer for panel in panels if panel.me_layer is not None]
    me_name = (
        f"ME layer {me_layers[0]}" if len(set(me_layers)) == 1 else "ME layer"
    )  # one for all panels, or each its own
    switched = {}
    for number, (panel, at) in enumerate(zip(panels, places, strict=True), 1):
        for curve in panel.curves:
            if panel.log_scale or scale_buttons:
                curve = replace(curve, points=_on_log_scale(curve.points))
            add_curve(figure, curve, at, in_legend=curve.in_legend and curve.name not in in_legend)
            in_legend.add(curve.name)
        means = pd.concat([curve.points["mean"] for curve in panel.curves])
        y_title = panel.y_title if panel.y_title.lower() != panel.title.lower() else ""  # which says it already
        figure.update_yaxes(title_text=y_title, range=panel.y_range, **_value_axis(means, panel.log_scale), **at)
        if panel.zero_line:
            figure.add_hline(y=0, line={"color": "#888", "width": 1}, **at)
        mark_me_layer(
            figure, panel.me_layer, at, name=me_name, showlegend=me_name not in in_legend, legendgroup=me_name
        )
        in_legend |= {me_name} if panel.me_layer is not None else set()
        if panel.y_range is None:
            switched[f"yaxis{number}" if number > 1 else "yaxis"] = means
    figure.update_xaxes(_block_axis(panels) if x_axis is None else x_axis)
    menus = [_scale_buttons(switched, panels[0].log_scale)] if scale_buttons else []
    height = 80 + 300 * places[-1]["row"]
    return finish(figure, title, note, height=height, legend=legend(), updatemenus=menus)


def ffn_figure(
    concentrations: Mapping[str, pd.DataFrame],
    amplification: pd.DataFrame,
    with_norm_behind: pd.DataFrame | None = None,
    *,
    me_layer: int | None,
    title: str,
) -> go.Figure:
    """Draw figure 4: concentration differences in one panel, the FFN's amplification in another.

    Args:
        concentrations: by what they are measured after ("gate", "up", "down"): `layer`, `mean`, `low`, `high`.
        amplification: the same of ‖FFN output‖ / ‖FFN input‖ of token 0.
        with_norm_behind: the same of the FFN and a norm behind it together, where blocks have one.
    """
    after = [
        Curve(f"after {name}", points, color)
        for (name, points), color in zip(concentrations.items(), COLORS, strict=False)
    ]
    ratios = [Curve("FFN", amplification, COLORS[6])]
    if with_norm_behind is not None:
        ratios.append(Curve("FFN and the norm behind it", with_norm_behind, COLORS[4]))
    panels = [
        Panel("Concentration of the projections", "token 0 minus the others", after, me_layer, zero_line=True),
        Panel("Amplification by the FFN", "‖FFN output‖ / ‖FFN input‖", ratios, me_layer, log_scale=True),
    ]
    note = "Lines: means over prompts. Bands: their 95% intervals."
    return curves_by_block([panel for panel in panels if panel.curves], title=title, note=note)


def vectors_by_dim(
    vectors: Mapping[str, np.ndarray], *, highlighted: str | None = None, title: str, note: str = ""
) -> go.Figure:
    """Draw figure 5b: token 0's activation by dim, a panel for each of a few blocks.

    Args:
        vectors: `[d_model]`, by the panel's title.
        highlighted: the panel in another colour: the ME layer's.
        title, note: of the figure.
    """
    figure = make_subplots(len(vectors), 1, shared_xaxes=True, subplot_titles=list(vectors), vertical_spacing=0.06)
    for row, (name, vector) in enumerate(vectors.items(), 1):
        # dims have no order: a bar each, from 0, as one path, which thousands of bars would not be
        bars = go.Scatter(x=np.arange(len(vector)), y=vector, mode="lines", showlegend=False)
        color = FIRST if name == highlighted else COLORS[6]
        bars.update(line={"color": color, "width": 1, "shape": "hvh"}, fill="tozeroy", fillcolor=color)
        bars.hovertemplate = "dim %{x}: %{y:.4g}<extra></extra>"
        figure.add_trace(bars, row=row, col=1)
        largest = int(np.abs(vector).argmax())
        is_right = largest > 0.8 * len(vector)
        label: dict[str, Any] = {
            "showarrow": False,
            "xanchor": "right" if is_right else "left",
            "xshift": -6 if is_right else 6,
        }
        label |= {"font": {"size": 12}, "text": f"dim {largest}"}
        figure.add_annotation(x=largest, y=vector[largest], row=row, col=1, **label)
    figure.update_xaxes(title_text="dim of the residual stream", row=len(vectors), col=1)
    figure.update_xaxes(range=[-0.01 * len(vector), 1.01 * len(vector)])
    figure.update_yaxes(title_text="activation")
    return finish(figure, title, note, height=70 + 170 * len(vectors))


def over_steps(
    panels: Mapping[str, Mapping[str, pd.DataFrame]], *, title: str, y_titles: Mapping[str, str], markers: bool = False
) -> go.Figure:
    """Draw what changes in a training, a panel a quantity.

    Args:
        panels: by the quantity's name, by the curve's name (empty for a lone one), `step` and `value`.
        title: of the figure.
        y_titles: by the quantity's name, with the unit.
        markers: for curves of few points.
    """
    figure = make_subplots(1, len(panels), subplot_titles=list(panels), horizontal_spacing=0.12)
    in_legend: set[str] = set()
    for column, (quantity, curves) in enumerate(panels.items(), 1):
        for number, (name, points) in enumerate(curves.items()):
            color = COLORS[number % len(COLORS)]
            line = go.Scatter(x=points["step"], y=points["value"], mode="lines+markers" if markers else "lines")
            line.update(name=name, legendgroup=name, showlegend=bool(name) and name not in in_legend)
            line.hovertemplate = f"step %{{x}}: %{{y:.4g}}<extra>{name}</extra>"
            line.update(line={"color": color, "width": 2, "dash": _DASHES[number % len(_DASHES)]})
            line.marker.symbol = _SYMBOLS[number % len(_SYMBOLS)]
            figure.add_trace(line, row=1, col=column)
            in_legend.add(name)
        values = pd.concat([points["value"] for points in curves.values()])
        figure.update_yaxes(title_text=y_titles[quantity], range=_not_zoomed(values), row=1, col=column)
    last = max(points["step"].max() for curves in panels.values() for points in curves.values())
    figure.update_xaxes(title_text="training step", **({"dtick": 1} if last < 8 else {}))
    return finish(figure, title, height=360, legend=legend())


_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "x", "cross", "star")
_DASHES = ("solid", "6px,2px", "9px,2px,2px,2px", "3px,2px", "12px,3px", "5px,2px,1px,2px", "solid", "2px,2px")


def add_curve(figure: go.Figure, curve: Curve, at: dict[str, int], *, in_legend: bool) -> None:
    """Add a line to a panel (its `row` and `col`), with a band where its points have intervals."""
    points, layers = curve.points, curve.points["layer"]
    red, green, blue = (int(curve.color[i : i + 2], 16) for i in (1, 3, 5))
    if "low" in points and points["low"].notna().any():
        band = go.Scatter(x=[*layers, *layers[::-1]], y=[*points["high"], *points["low"][::-1]], mode="lines")
        band.update(fill="toself", fillcolor=f"rgba({red},{green},{blue},0.15)", line={"width": 0})
        band.update(hoverinfo="skip", showlegend=False, legendgroup=curve.name)
        figure.add_trace(band, **at)
    line = go.Scatter(x=layers, y=points["mean"], mode="lines" if curve.thin else "lines+markers")
    line.update(name=curve.name, legendgroup=curve.name, showlegend=in_legend)
    if curve.thin:
        line.line = {"color": f"rgba({red},{green},{blue},0.6)", "width": 1.2}
    else:
        number = COLORS.index(curve.color) if curve.color in COLORS else 0
        line.line = {"color": curve.color, "width": 2, "dash": _DASHES[number]}
        line.marker = {"size": 5, "symbol": _SYMBOLS[number]}
    line.cliponaxis = False
    line.hovertemplate = f"block %{{x}}: %{{y:.4g}}<extra>{curve.name}</extra>"
    figure.add_trace(line, **at)


def _block_axis(panels: Sequence[Panel]) -> dict[str, Any]:
    """Return the axis of the blocks that the panels show, with room for the first and the last marker."""
    layers = pd.concat([curve.points["layer"] for panel in panels for curve in panel.curves])
    marked = [panel.me_layer for panel in panels if panel.me_layer is not None]
    first, last = int(min([layers.min(), *marked])), int(max([layers.max(), *marked]))
    room = 0.5 + 0.01 * (last - first)
    return {"title": {"text": BLOCK}, "range": [first - room, last + room], **block_ticks(last - first + 1)}


def _on_log_scale(points: pd.DataFrame) -> pd.DataFrame:
    """Cut low ends of intervals a decade below the curve: of a few prompts they may be under 0, off any log axis."""
    positive = points["mean"][points["mean"] > 0]
    if "low" not in points or positive.empty:
        return points
    return points.assign(low=points["low"].clip(lower=positive.min() / 10))


def _value_axis(values: Any, log_scale: bool) -> dict[str, Any]:
    return {"type": "log", **log_ticks(values)} if log_scale else {"type": "linear", "tickmode": "auto"}


def _not_zoomed(values: pd.Series) -> list[float] | None:
    """Return a range for values that differ by less than a tenth of their size, which no axis should blow up.

    Of nothing but zeros, as shares may be, an axis of plotly's own would go down to -1.
    """
    low, high = float(values.min()), float(values.max())
    room = 0.1 * max(abs(low), abs(high))
    if not room:
        return [-0.05, 1.0]
    return None if high - low >= room else [low - room, high + room]


def _scale_buttons(axes: Mapping[str, pd.Series], log_scale: bool) -> dict[str, Any]:
    buttons = []
    for label, is_log in (("log", True), ("linear", False)):
        then = {axis: _value_axis(means, is_log) for axis, means in axes.items()}
        changes = {f"{axis}.{key}": value for axis, values in then.items() for key, value in values.items()}
        buttons.append({"label": label, "method": "relayout", "args": [changes]})
    look = {"type": "buttons", "direction": "right", "active": 0 if log_scale else 1, "buttons": buttons}
    return menu_above(**look)
