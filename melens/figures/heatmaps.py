"""Matrices: ratios, changes of a loss, and token 0's activation by block and dim.

Where values span orders of magnitude, the colour shows their logarithm; labels and hover texts show the values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from melens.figures import style
from melens.figures.curves import Panel, add_curve

__all__ = [
    "Heatmap", "dims_heatmap", "dims_surface", "heatmap_over_curves", "heatmap_trace", "heatmap_with_slider",
    "heatmaps", "loss_changes",
]  # fmt: skip


@dataclass(frozen=True)
class Heatmap:
    """A matrix with its axes.

    Attributes:
        title: above it.
        values: `[row, column]`.
        x, y: labels of columns and rows: numbers, or texts.
        x_title, y_title: of the axes.
    """

    title: str
    values: np.ndarray
    x: Sequence[Any]
    y: Sequence[Any]
    x_title: str
    y_title: str


def heatmaps(
    maps: Sequence[Heatmap],
    *,
    title: str,
    note: str = "",
    z_title: str,
    columns: int = 3,
    me_layer: int | None = None,
    text: bool = False,
) -> go.Figure:
    """Draw matrices of ratios in the same colours, logarithmic around 1, so many columns in a row.

    The ME layer is marked on both axes; `text` writes the values into the cells, `z_title` names the colours.
    """
    figure, places = style.panels_in_rows([heatmap.title for heatmap in maps], columns, gap=0.09, row_gap=0.25)
    for heatmap, at in zip(maps, places, strict=True):
        figure.add_trace(_scaled_trace(heatmap, z_title, _log_ratio, "{:.3g}" if text else None), **at)
        figure.update_xaxes(title_text=heatmap.x_title, **at)
        figure.update_yaxes(title_text=heatmap.y_title, autorange="reversed", **at)
        if me_layer is not None:
            figure.add_vline(x=me_layer, line=style.ME_LINE, **at)
            figure.add_hline(y=me_layer, line=style.ME_LINE, **at)
    ticks = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
    colorbar = {"title": z_title, "tickvals": np.log10(ticks), "ticktext": [f"{tick:g}" for tick in ticks]}
    colors = {"colorscale": "RdBu", "cmin": -2, "cmax": 2, "colorbar": colorbar}
    height = 190 + (430 if min(columns, len(maps)) > 1 else 480) * places[-1]["row"]
    return style.finish(figure, title, note, height=height, coloraxis=colors)


def heatmap_with_slider(
    maps: Mapping[str, Heatmap], *, title: str, note: str = "", z_title: str, z_range: Sequence[float | int], start: str
) -> go.Figure:
    """Draw one of several matrices by block, `start` at first, with a slider to choose another.

    All have the same axes; `z_title` and `z_range` are of the colours.
    """
    traces = [heatmap_trace(heatmap, z_title).update(visible=name == start) for name, heatmap in maps.items()]
    figure, names = go.Figure(traces), list(maps)
    figure.update_xaxes(constrain="domain", tickangle=-90)
    figure.update_yaxes(title_text=maps[start].y_title, autorange="reversed", scaleanchor="x", constrain="domain")
    visible = {name: {"visible": [other == name for other in names]} for name in names}
    steps = [{"label": name, "method": "update", "args": [shown]} for name, shown in visible.items()]
    shown_as = {"currentvalue": {"prefix": "after block "}, "pad": {"t": 100}}
    slider = {"active": names.index(start), "steps": steps, **shown_as}
    colors = {"colorscale": "Viridis", "cmin": z_range[0], "cmax": z_range[1], "colorbar": {"title": z_title}}
    return style.finish(figure, title, note, height=760, sliders=[slider], coloraxis=colors)


def heatmap_over_curves(heatmap: Heatmap, panel: Panel, *, title: str, note: str = "", z_title: str) -> go.Figure:
    """Draw a matrix by block above curves by block; arguments as for `heatmaps` and `curves_by_block`."""
    titles = [heatmap.title, panel.title]
    figure = make_subplots(2, 1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.1)
    figure.add_trace(heatmap_trace(heatmap, z_title), row=1, col=1)
    for curve in panel.curves:
        add_curve(figure, curve, {"row": 2, "col": 1}, in_legend=True)
    figure.update_yaxes(title_text=heatmap.y_title, autorange="reversed", row=1, col=1)
    figure.update_yaxes(title_text=panel.y_title, range=panel.y_range, row=2, col=1)
    figure.update_xaxes(title_text=style.BLOCK, row=2, col=1)
    style.mark_me_layer(figure, panel.me_layer, annotation_yanchor="bottom", row=1, col=1)  # above the colours
    style.mark_me_layer(figure, panel.me_layer, row=2, col=1)
    colorbar = {"title": z_title, "len": 0.5, "y": 0.78}
    colors = {"colorscale": "Viridis", "cmin": 0, "cmax": 1, "colorbar": colorbar}
    return style.finish(figure, title, note, height=740, coloraxis=colors, legend=style.legend_below(-0.1))


def loss_changes(maps: Sequence[Heatmap], *, title: str, note: str = "") -> go.Figure:
    """Draw changes of a loss side by side in the same colours, red for worse, with the values in the cells."""
    figure, places = style.panels_in_rows([heatmap.title for heatmap in maps], 3, gap=0.1, row_gap=0.3)
    for heatmap, at in zip(maps, places, strict=True):
        figure.add_trace(_scaled_trace(heatmap, "Δloss", style.signed_log, "{:+.3f}"), **at)
        figure.update_xaxes(title_text=heatmap.x_title, type="category", **at)
        figure.update_yaxes(title_text=heatmap.y_title, type="category", autorange="reversed", **at)
    limit = float(style.signed_log(10))
    colorbar = {"title": "Δloss<br>(nats a token)", **style.signed_ticks()}
    colors = {"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "colorbar": colorbar}
    return style.finish(figure, title, note, height=260 + 230 * places[-1]["row"], coloraxis=colors)


def dims_heatmap(activations: pd.DataFrame, *, me_layer: int | None, title: str) -> go.Figure:
    """Draw token 0's |activation| by block and dim as a heatmap, for the dims that are largest anywhere (figure 5b).

    `activations` has the columns `layer`, `dim` and `abs_activation`, the mean over prompts.
    """
    wide = activations.pivot(index="dim", columns="layer", values="abs_activation")
    wide = wide.loc[wide.max(axis=1).sort_values(ascending=False).index]
    powers = range(-2, int(np.ceil(np.log10(wide.to_numpy().max()))) + 1)
    ticks = {"tickvals": list(powers), "ticktext": [f"10<sup>{power}</sup>" for power in powers]}
    trace = go.Heatmap(x=wide.columns, y=[str(dim) for dim in wide.index], z=np.log10(wide.to_numpy().clip(min=1e-2)))
    trace.update(customdata=wide.to_numpy().tolist(), colorscale="Viridis", colorbar={"title": "|h|", **ticks})
    trace.hovertemplate = "block %{x}, dim %{y}: |h| = %{customdata:.4g}<extra></extra>"
    figure = go.Figure(trace)
    figure.update_xaxes(title_text=style.BLOCK)
    figure.update_yaxes(title_text="dim of the residual stream, largest first", type="category", autorange="reversed")
    style.mark_me_layer(figure, me_layer, annotation_yanchor="bottom")  # above the colours
    return style.finish(figure, title, height=620)


def dims_surface(activations: pd.DataFrame, *, me_layer: int | None, title: str) -> go.Figure:
    """Draw the same as a 3-D surface, as the authors do; arguments as for `dims_heatmap`."""
    wide = activations.pivot(index="dim", columns="layer", values="abs_activation")
    heights, rows = wide.to_numpy(), np.arange(len(wide))
    surface = go.Surface(z=heights, x=wide.columns, y=rows, colorscale="Viridis", showscale=False)
    surface.hovertemplate = "block %{x}: |h| = %{z:.4g}<extra></extra>"
    figure = go.Figure(surface)
    if me_layer is not None:
        above, name = wide[me_layer] + 0.01 * heights.max(), f"ME layer {me_layer}"
        figure.add_scatter3d(x=[me_layer] * len(wide), y=rows, z=above, mode="lines", name=name, showlegend=True)
        figure.data[-1].update(line={"color": "#d62728", "width": 5}, hoverinfo="skip")
    dims = {"tickvals": list(range(0, len(wide), 4)), "ticktext": [str(dim) for dim in wide.index[::4]]}
    axes = {"xaxis": {"title": {"text": style.BLOCK}}, "yaxis": {"title": {"text": "dim"}, **dims}}
    axes["zaxis"] = {"title": {"text": "|h| of token 0"}}
    scene = axes | {"camera": {"eye": {"x": -1.5, "y": -1.6, "z": 0.8}}}
    return style.finish(figure, title, height=700, scene=scene)


def heatmap_trace(heatmap: Heatmap, z_title: str) -> go.Heatmap:
    """Return a matrix as plotly's trace, in the colours that the figures' `coloraxis` sets."""
    return go.Heatmap(
        z=np.asarray(heatmap.values, dtype=np.float32),
        x=list(heatmap.x),
        y=list(heatmap.y),
        coloraxis="coloraxis",
        hovertemplate=f"{heatmap.x_title} %{{x}}<br>{heatmap.y_title} %{{y}}<br>{z_title} %{{z:.4g}}<extra></extra>",
    )


def _log_ratio(values: np.ndarray) -> np.ndarray:
    return np.log10(values.clip(min=1e-6))


def _scaled_trace(
    heatmap: Heatmap, z_title: str, scale: Callable[[np.ndarray], np.ndarray], text: str | None
) -> go.Heatmap:
    """Colour a matrix by its scaled values; show the values themselves, in the cells too where `text` formats them."""
    values = np.asarray(heatmap.values, dtype=np.float32)
    trace = heatmap_trace(heatmap, z_title)
    trace.z = scale(values)
    trace.customdata = values.tolist()  # plotly does not look into packed arrays here
    trace.hovertemplate = str(trace.hovertemplate).replace("%{z:", "%{customdata:")
    if text is not None:
        trace.text = [["" if np.isnan(value) else text.format(value) for value in row] for row in heatmap.values]
        trace.texttemplate = "%{text}"
    return trace
