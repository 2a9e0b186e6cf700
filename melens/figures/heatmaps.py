"""Matrices: ratios, changes of a loss, shares of prompts, and token 0's activation by block and dim.

Where values span orders of magnitude, the colour shows their logarithm; labels and hover texts show the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from melens.figures import style
from melens.figures.curves import Panel, add_curve
from melens.printing import Brief

__all__ = [
    "Heatmap", "dims_heatmap", "head_maps", "heatmap_by_block", "heatmap_over_curves", "heatmap_trace", "heatmaps",
    "loss_changes", "shares",
]  # fmt: skip


@dataclass(frozen=True, repr=False)
class Heatmap(Brief):
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
        figure.update_xaxes(title_text=heatmap.x_title, **_cell_axis(heatmap.x), **at)
        figure.update_yaxes(title_text=heatmap.y_title, autorange="reversed", **_cell_axis(heatmap.y), **at)
        style.frame_me_layer(figure, me_layer, at, axes="xy", name=False)
    scale = _log_scale_of([heatmap.values for heatmap in maps])
    colors = {"colorscale": "RdBu", "colorbar": {"title": z_title, **scale.pop("ticks")}, **scale}
    height = 80 + (400 if min(columns, len(maps)) > 1 else 60 * len(maps[0].y)) * places[-1]["row"]
    return style.finish(figure, title, note, height=height, coloraxis=colors)


def heatmap_by_block(
    heatmap: Heatmap, *, me_layer: int | None, title: str, note: str = "", z_title: str, z_range: Sequence[float | int]
) -> go.Figure:
    """Draw a matrix by block; `z_title` and `z_range` are of the colours."""
    figure = go.Figure(heatmap_trace(heatmap, z_title))
    figure.update_xaxes(title_text=heatmap.x_title, **_cell_axis(heatmap.x))
    figure.update_yaxes(title_text=heatmap.y_title, autorange="reversed", **_cell_axis(heatmap.y))
    style.frame_me_layer(figure, me_layer)
    colors = {"colorscale": "Viridis", "cmin": z_range[0], "cmax": z_range[1], "colorbar": {"title": z_title}}
    return style.finish(figure, title, note, height=100 + 15 * max(20, len(heatmap.y)), coloraxis=colors)


def heatmap_over_curves(heatmap: Heatmap, panel: Panel, *, title: str, note: str = "", z_title: str) -> go.Figure:
    """Draw a matrix by block above curves by block; arguments as for `heatmaps` and `curves_by_block`."""
    titles = [heatmap.title, panel.title]
    figure = make_subplots(2, 1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.1)
    figure.add_trace(heatmap_trace(heatmap, z_title), row=1, col=1)
    for curve in panel.curves:
        add_curve(figure, curve, {"row": 2, "col": 1}, in_legend=True)
    figure.update_xaxes(range=[min(heatmap.x) - 0.5, max(heatmap.x) + 0.5], **_cell_axis(heatmap.x))
    figure.update_yaxes(title_text=heatmap.y_title, autorange="reversed", **_cell_axis(heatmap.y), row=1, col=1)
    figure.update_yaxes(title_text=panel.y_title, range=panel.y_range, row=2, col=1)
    figure.update_xaxes(title_text=style.BLOCK, row=2, col=1)
    style.frame_me_layer(figure, panel.me_layer, {"row": 1, "col": 1}, name=False)
    style.mark_me_layer(
        figure, panel.me_layer, {"row": 2, "col": 1}, name=f"ME layer {panel.me_layer}", showlegend=True
    )
    colors = {"colorscale": "Viridis", "cmin": 0, "cmax": 1, "colorbar": {"title": z_title, "len": 0.5, "y": 0.78}}
    return style.finish(figure, title, note, height=640, coloraxis=colors, legend=style.legend())


def head_maps(
    shares: Sequence[Heatmap], ratios: Sequence[Heatmap], *, me_layer: int | None, title: str, note: str = ""
) -> go.Figure:
    """Draw quantities by block and head, two in a row: shares from 0 to 1, then ratios, logarithmic around 1.

    The ME layer is marked.
    """
    maps = [*shares, *ratios]
    figure, places = style.panels_in_rows([heatmap.title for heatmap in maps], 2, gap=0.09, row_gap=0.3)
    bar: dict[str, Any] = {"len": 0.45, "yanchor": "top"}
    of_shares = {"colorscale": "Viridis", "cmin": 0, "cmax": 1, "colorbar": {"title": "share", "y": 1, **bar}}
    colors: dict[str, Any] = {"coloraxis": of_shares}
    if ratios:
        scale = _log_scale_of([heatmap.values for heatmap in ratios], most=1)
        bar |= {"title": "ratio", "y": 0.45, **scale.pop("ticks")}
        colors["coloraxis2"] = {"colorscale": "RdBu", "colorbar": bar, **scale}
    for heatmap, at in zip(maps, places, strict=True):
        of_ratios = heatmap in ratios
        trace = _scaled_trace(heatmap, heatmap.title, _log_ratio if of_ratios else np.asarray, None)
        figure.add_trace(trace.update(coloraxis="coloraxis2" if of_ratios else "coloraxis"), **at)
        figure.update_xaxes(title_text=heatmap.x_title, **_cell_axis(heatmap.x), **at)
        figure.update_yaxes(title_text=heatmap.y_title, autorange="reversed", **_cell_axis(heatmap.y), **at)
        style.frame_me_layer(figure, me_layer, at, name=False)
    return style.finish(figure, title, note, height=60 + 290 * places[-1]["row"], **colors)


def loss_changes(maps: Sequence[Heatmap], *, title: str, note: str = "") -> go.Figure:
    """Draw changes of a loss side by side in the same colours, red for worse, with the values in the cells."""
    figure, places = style.panels_in_rows([heatmap.title for heatmap in maps], 3, gap=0.1, row_gap=0.3)
    for heatmap, at in zip(maps, places, strict=True):
        figure.add_trace(_scaled_trace(heatmap, "Δloss", style.signed_log, "{:+.3f}"), **at)
        figure.update_xaxes(title_text=heatmap.x_title, type="category", **_cell_axis(heatmap.x), **at)
        figure.update_yaxes(
            title_text=heatmap.y_title, type="category", autorange="reversed", **_cell_axis(heatmap.y), **at
        )
    values = [value for heatmap in maps for value in heatmap.values.ravel()]
    limit = float(style.signed_log(style.signed_limit(values)))
    colorbar = {"title": "Δloss (nats)", **style.signed_ticks(values)}
    colors = {"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "colorbar": colorbar}
    return style.finish(figure, title, note, height=150 + 230 * places[-1]["row"], coloraxis=colors)


def shares(table: pd.DataFrame, *, names: Sequence[str], title: str, note: str = "") -> go.Figure:
    """Draw shares that add up to 1 in each row as a table; `names` are those of its columns."""
    trace = go.Heatmap(
        x=[style.in_lines(name, 11) for name in names],
        y=list(table.index),
        z=table.to_numpy(),
        zmin=0,
        zmax=1,
    )
    trace.update(colorscale=[[0, "#f7f7f7"], [1, "#9ecae1"]], showscale=False, texttemplate="%{z:.0%}")
    trace.hovertemplate = "%{y}, %{x}: %{z:.1%}<extra></extra>"
    figure = go.Figure(trace)
    figure.update_xaxes(side="top", **_TABLE_AXIS)
    figure.update_yaxes(autorange="reversed", dtick=1, **_TABLE_AXIS)
    style.separate_cells(figure, len(table), len(names))
    return style.finish(figure, title, note, height=50 + 34 * len(table))


def dims_heatmap(activations: pd.DataFrame, *, me_layer: int | None, title: str) -> go.Figure:
    """Draw token 0's |activation| by block and dim as a heatmap, for the dims that are largest anywhere (figure 5b).

    `activations` has the columns `layer`, `dim` and `abs_activation`, the mean over prompts. The dims are in the order
    of what they hold after the ME layer, or without one of the largest that they hold anywhere.
    """
    wide = activations.pivot(index="dim", columns="layer", values="abs_activation")
    decides = wide.max(axis=1) if me_layer is None else wide[me_layer]
    wide = wide.loc[decides.sort_values(ascending=False).index]
    values = wide.to_numpy().clip(min=1e-2)
    ticks = style.log_ticks(values)
    ticks |= {"tickvals": np.log10(ticks["tickvals"])} if "tickvals" in ticks else {}
    trace = go.Heatmap(x=wide.columns, y=[str(dim) for dim in wide.index], z=np.log10(values))
    trace.update(customdata=wide.to_numpy().tolist(), colorscale="Viridis", colorbar={"title": "|h|", **ticks})
    trace.hovertemplate = "block %{x}, dim %{y}: |h| = %{customdata:.4g}<extra></extra>"
    figure = go.Figure(trace)
    where = "anywhere" if me_layer is None else "after the ME layer"
    figure.update_xaxes(title_text=style.BLOCK, **_cell_axis(list(wide.columns)))
    figure.update_yaxes(title_text=f"dim, largest {where} first", type="category", autorange="reversed", showgrid=False)
    style.frame_me_layer(figure, me_layer)
    return style.finish(figure, title, height=560)


def heatmap_trace(heatmap: Heatmap, z_title: str) -> go.Heatmap:
    """Return a matrix as plotly's trace, in the colours that the figures' `coloraxis` sets."""
    return go.Heatmap(
        z=np.asarray(heatmap.values, dtype=np.float32),
        x=list(heatmap.x),
        y=list(heatmap.y),
        coloraxis="coloraxis",
        hovertemplate=f"{heatmap.x_title} %{{x}}<br>{heatmap.y_title} %{{y}}<br>{z_title} %{{z:.4g}}<extra></extra>",
    )


_TABLE_AXIS: dict[str, Any] = {"showgrid": False, "showline": False, "ticks": ""}


def _cell_axis(labels: Sequence[Any]) -> dict[str, Any]:
    """Return the axis of a matrix's cells: whole numbers where they are blocks or heads, no grid between them."""
    is_numbered = all(isinstance(label, int | np.integer) for label in labels)
    return {"showgrid": False} | (style.block_ticks(len(labels)) if is_numbered else {})


def _log_ratio(values: np.ndarray) -> np.ndarray:
    return np.log10(values.clip(min=1e-6))


def _log_scale_of(matrices: Sequence[np.ndarray], most: int = 3) -> dict[str, Any]:
    """Return colours as far as ratios go, at most so many decades either way: what lies beyond has the last colour."""
    sizes = np.abs(np.concatenate([_log_ratio(np.asarray(values, dtype=float)).ravel() for values in matrices]))
    largest = float(np.nanmax(sizes, initial=0))
    decades = min(max(1, int(np.ceil(largest - 1e-9))), most)
    ticks = [digit * 10.0**e for e in range(-decades, decades + 1) for digit in ((1, 3) if decades < 3 else (1,))]
    ticks = [tick for tick in ticks if tick <= 10.0**decades]
    texts = [f"{tick:,g}" for tick in ticks]
    if largest > decades:
        texts[0], texts[-1] = f"≤ {texts[0]}", f"≥ {texts[-1]}"
    return {"cmin": -decades, "cmax": decades, "ticks": {"tickvals": np.log10(ticks), "ticktext": texts}}


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
        trace.text = [
            ["" if np.isnan(value) else text.format(value).replace("-", "−") for value in row] for row in heatmap.values
        ]
        trace.texttemplate = "%{text}"
    return trace
