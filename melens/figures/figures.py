"""Plotly figures from tidy data: curves by block, heatmaps, and the few that fit neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

__all__ = [
    "COLORS",
    "FIRST",
    "OTHERS",
    "SINK",
    "Curve",
    "Heatmap",
    "Panel",
    "attention_change",
    "attention_maps",
    "curves_by_block",
    "dims_heatmap",
    "dims_surface",
    "ffn_figure",
    "heatmap_over_curves",
    "heatmap_with_slider",
    "heatmaps",
    "loss_changes",
    "loss_over_sinks",
    "over_steps",
    "score_differences",
    "score_table",
    "shares",
    "vectors_by_dim",
    "verdicts",
]

FIRST = "#c1272d"
OTHERS = "#0072b2"
SINK = "#7a4fa3"
COLORS = (FIRST, OTHERS, SINK, "#e69f00", "#009e73", "#56b4e9", "#444444", "#cc79a7")
"""Told apart also by people who see few colours."""

_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"family": "Helvetica, Arial, sans-serif", "size": 14, "color": "#222"},
    "margin": {"l": 70, "r": 30, "t": 90, "b": 60},
}
BLOCK = "block (0-based)"
_BELOW = 55  # pixels from the axis to what stands below its title


@dataclass(frozen=True)
class Curve:
    """A line by block.

    Attributes:
        name: in the legend; curves of the same name in several panels share an entry.
        points: `layer`, `mean`, and for a band `low` and `high`.
        color: as CSS.
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
    """Draw panels of curves by block.

    Args:
        panels: left to right, top to bottom.
        title: above the figure, and `note` below it in small: what lines and bands are.
        columns: panels in a row.
        scale_buttons: let the reader switch the panels without a `y_range` between logarithmic and linear.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    titles = [panel.title for panel in panels]
    figure = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.3 / rows)
    in_legend: set[str] = set()
    switched = []
    for index, panel in enumerate(panels):
        at = {"row": index // columns + 1, "col": index % columns + 1}
        for curve in panel.curves:
            _add_curve(figure, curve, at, in_legend=curve.in_legend and curve.name not in in_legend)
            in_legend.add(curve.name)
        figure.update_yaxes(title_text=panel.y_title, range=panel.y_range, **at)
        figure.update_yaxes(**_value_axis(panel.log_scale), **at)
        if panel.log_scale and _spread(panel) < 30:
            figure.update_yaxes(dtick="D2", **at)
        if panel.zero_line:
            figure.add_hline(y=0, line={"color": "#888", "width": 1}, **at)
        _mark_me_layer(figure, panel.me_layer, **at)
        if panel.y_range is None:
            switched.append("yaxis" + (str(index + 1) if index else ""))
    figure.update_xaxes(title_text=BLOCK, rangemode="tozero")
    height = 170 + 310 * rows
    figure.update_layout(
        **_LAYOUT,
        title=_title(title, note),
        height=height,
        legend={"orientation": "h", "x": 0, "y": -_BELOW / (height - 150), "yanchor": "top"},
    )
    if scale_buttons:
        figure.update_layout(updatemenus=[_scale_buttons(switched, panels[0].log_scale, -_BELOW / (height - 150))])
    return figure


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
    """Draw matrices of ratios side by side in the same colours, logarithmic around 1.

    Args:
        maps: left to right, top to bottom.
        title, note: above the figure.
        z_title: of the colours.
        columns: maps in a row.
        me_layer: 0-based block to mark on both axes.
        text: write the values into the cells.
    """
    columns = min(columns, len(maps))
    rows = -(-len(maps) // columns)
    titles = [heatmap.title for heatmap in maps]
    figure = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=0.09, vertical_spacing=0.25 / rows)
    for index, heatmap in enumerate(maps):
        at = {"row": index // columns + 1, "col": index % columns + 1}
        figure.add_trace(_ratio_trace(heatmap, z_title, text=text), **at)
        figure.update_xaxes(title_text=heatmap.x_title, **at)
        figure.update_yaxes(title_text=heatmap.y_title, autorange="reversed", **at)
        if me_layer is not None:
            figure.add_vline(x=me_layer, line=_ME_LINE, **at)
            figure.add_hline(y=me_layer, line=_ME_LINE, **at)
    ticks = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
    figure.update_layout(
        **_LAYOUT,
        title=_title(title, note),
        height=190 + (430 if columns > 1 else 480) * rows,
        coloraxis={
            "colorscale": "RdBu",
            "cmin": -2,
            "cmax": 2,
            "colorbar": {"title": z_title, "tickvals": np.log10(ticks), "ticktext": [f"{tick:g}" for tick in ticks]},
        },
    )
    return figure


def heatmap_with_slider(
    maps: Mapping[str, Heatmap],
    *,
    title: str,
    note: str = "",
    z_title: str,
    z_range: tuple[float | int, float | int],
    start: str,
) -> go.Figure:
    """Draw one of several matrices, with a slider to choose the block.

    Args:
        maps: by block, all with the same axes.
        title, note: above the figure.
        z_title, z_range: of the colours.
        start: the one that is shown first.
    """
    names = list(maps)
    figure = go.Figure([_heatmap_trace(heatmap, z_title) for heatmap in maps.values()])
    for name, trace in zip(names, figure.data, strict=True):
        trace.visible = name == start
    first = maps[start]
    figure.update_xaxes(constrain="domain", tickangle=-90)
    figure.update_yaxes(title_text=first.y_title, autorange="reversed", scaleanchor="x", constrain="domain")
    steps = [
        {"label": name, "method": "update", "args": [{"visible": [other == name for other in names]}]} for name in names
    ]
    value = {"prefix": "after block "}
    slider = {"active": names.index(start), "steps": steps, "currentvalue": value, "pad": {"t": 100}}
    figure.update_layout(
        **_LAYOUT,
        title=_title(title, note),
        height=760,
        sliders=[slider],
        coloraxis={"colorscale": "Viridis", "cmin": z_range[0], "cmax": z_range[1], "colorbar": {"title": z_title}},
    )
    return figure


def heatmap_over_curves(heatmap: Heatmap, panel: Panel, *, title: str, note: str = "", z_title: str) -> go.Figure:
    """Draw a matrix by block above curves by block; arguments as for `heatmaps` and `curves_by_block`."""
    titles = [heatmap.title, panel.title]
    figure = make_subplots(2, 1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.1)
    figure.add_trace(_heatmap_trace(heatmap, z_title), row=1, col=1)
    for curve in panel.curves:
        _add_curve(figure, curve, {"row": 2, "col": 1}, in_legend=True)
    figure.update_yaxes(title_text=heatmap.y_title, autorange="reversed", row=1, col=1)
    figure.update_yaxes(title_text=panel.y_title, range=panel.y_range, row=2, col=1)
    figure.update_xaxes(title_text=BLOCK, row=2, col=1)
    _mark_me_layer(figure, panel.me_layer, annotation_yanchor="bottom", row=1, col=1)  # above the colours
    _mark_me_layer(figure, panel.me_layer, row=2, col=1)
    figure.update_layout(
        **_LAYOUT,
        title=_title(title, note),
        height=740,
        coloraxis={
            "colorscale": "Viridis",
            "cmin": 0,
            "cmax": 1,
            "colorbar": {"title": z_title, "len": 0.5, "y": 0.78},
        },
        legend={"orientation": "h", "x": 0, "y": -0.1, "yanchor": "top"},
    )
    return figure


def attention_maps(maps: Mapping[str, np.ndarray], tokens: Sequence[str], *, title: str, note: str) -> go.Figure:
    """Draw figure 7: attention maps side by side, the mean over heads, with a list to choose a head.

    Args:
        maps: by the panel's title, `[head, query, key]`.
        tokens: labels of the positions.
        title, note: above the figure.
    """
    figure = make_subplots(1, len(maps), subplot_titles=list(maps), horizontal_spacing=0.12)
    n_heads = next(iter(maps.values())).shape[0]
    for column, of_heads in enumerate(maps.values(), 1):
        for values in (of_heads.mean(0), *of_heads):
            causal = np.where(np.tri(len(values), dtype=bool), values, np.nan)
            heatmap = Heatmap("", causal, tokens, tokens, "key", "query")
            figure.add_trace(_heatmap_trace(heatmap, "attention"), row=1, col=column)
        figure.update_xaxes(title_text="key", tickangle=-90, tickfont={"size": 9}, row=1, col=column)
        figure.update_yaxes(title_text="query", autorange="reversed", tickfont={"size": 9}, row=1, col=column)
    per_map = n_heads + 1
    for index, trace in enumerate(figure.data):
        trace.visible = index % per_map == 0
    labels = ["mean over heads", *(f"head {head}" for head in range(n_heads))]
    buttons = [
        {
            "label": label,
            "method": "update",
            "args": [{"visible": [i % per_map == shown for i in range(len(figure.data))]}],
        }
        for shown, label in enumerate(labels)
    ]
    figure.update_layout(
        **_LAYOUT,
        title=_title(title, note),
        height=720,
        coloraxis={"colorscale": "Viridis", "cmin": 0, "cmax": 1, "colorbar": {"title": "attention"}},
        updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.1, "yanchor": "bottom"}],
    )
    figure.update_layout(margin={"b": 110, "l": 110})
    return figure


def attention_change(
    unmasked: np.ndarray, masked: np.ndarray, tokens: Sequence[str], *, title: str, note: str
) -> go.Figure:
    """Draw figure 8: attention maps without a mask, with it, and their difference, with a list to choose a head.

    Args:
        unmasked, masked: `[head, query, key]`.
        tokens: labels of the positions.
        title, note: above the figure.
    """
    panels = {"without the mask": unmasked, "with the mask": masked, "difference": masked - unmasked}
    figure = attention_maps(panels, tokens, title=title, note=note)
    for trace in figure.data[2 * (len(unmasked) + 1) :]:
        trace.coloraxis = "coloraxis2"
    figure.update_yaxes(showticklabels=False, title_text="", col=2)
    figure.update_yaxes(showticklabels=False, title_text="", col=3)
    figure.update_layout(
        coloraxis={"colorbar": {"x": 1.0, "len": 0.5, "y": 0.76}},
        coloraxis2={
            "colorscale": "RdBu_r",
            "cmin": -0.5,
            "cmax": 0.5,
            "colorbar": {"title": "difference", "x": 1.0, "len": 0.5, "y": 0.24},
        },
    )
    return figure


_SIGNED_TICKS = (-10, -3, -1, -0.3, -0.1, -0.03, 0, 0.03, 0.1, 0.3, 1, 3, 10)
_LINEAR_UP_TO = 0.02


def _signed_log(values: Any) -> Any:
    """Scale values of both signs, linear around 0 and logarithmic further out."""
    return np.arcsinh(np.asarray(values, dtype=float) / _LINEAR_UP_TO)


def _signed_ticks() -> dict[str, Any]:
    return {
        "tickvals": _signed_log(_SIGNED_TICKS),
        "ticktext": [f"{tick:+g}" if tick else "0" for tick in _SIGNED_TICKS],
    }


def loss_changes(maps: Sequence[Heatmap], *, title: str, note: str = "") -> go.Figure:
    """Draw changes of a loss side by side in the same colours, red for worse, with the values in the cells."""
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    titles = [heatmap.title for heatmap in maps]
    figure = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.3 / rows)
    for index, heatmap in enumerate(maps):
        at = {"row": index // columns + 1, "col": index % columns + 1}
        trace = _heatmap_trace(heatmap, "Δloss")
        trace.z = _signed_log(heatmap.values)
        trace.customdata = np.asarray(heatmap.values, dtype=float).tolist()
        trace.hovertemplate = str(trace.hovertemplate).replace("%{z:", "%{customdata:")
        trace.text = [["" if np.isnan(value) else f"{value:+.3f}" for value in row] for row in heatmap.values]
        trace.texttemplate = "%{text}"
        figure.add_trace(trace, **at)
        figure.update_xaxes(title_text=heatmap.x_title, type="category", **at)
        figure.update_yaxes(title_text=heatmap.y_title, type="category", autorange="reversed", **at)
    limit = float(_signed_log(10))
    figure.update_layout(
        **_LAYOUT,
        title=_title(title, note),
        height=260 + 230 * rows,
        coloraxis={
            "colorscale": "RdBu_r",
            "cmin": -limit,
            "cmax": limit,
            "colorbar": {"title": "Δloss<br>(nats a token)", **_signed_ticks()},
        },
    )
    return figure


_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")


def loss_over_sinks(
    cells: pd.DataFrame, *, sink_mass: float, colors: Mapping[str, str], title: str, note: str = ""
) -> go.Figure:
    """Draw the change of the loss against the sink mass that is left, a point a mask.

    Args:
        cells: `select`, `site`, `label`, `sink_mass`, and `dloss` with `dloss_low` and `dloss_high`.
        sink_mass: without a mask.
        colors: by select.
        title, note: above the figure.
    """
    figure = go.Figure()
    for (select, site), group in cells.groupby(["select", "site"], sort=False):
        middle, high, low = (_signed_log(group[name]) for name in ("dloss", "dloss_high", "dloss_low"))
        symbol = _SYMBOLS[list(dict.fromkeys(cells["site"])).index(site) % len(_SYMBOLS)]
        figure.add_trace(
            go.Scatter(
                x=group["sink_mass"],
                y=middle,
                error_y={"type": "data", "symmetric": False, "array": high - middle, "arrayminus": middle - low},
                mode="markers",
                name=f"{select}, {site}",
                marker={"color": colors[str(select)], "symbol": symbol, "size": 10},
                customdata=np.stack([group["label"], group["dloss"]], axis=-1),
                hovertemplate="%{customdata[0]}<br>sink mass %{x:.3f}, Δloss %{customdata[1]:+.4f}<extra></extra>",
            )
        )
    figure.add_hline(y=0, line={"color": "#888", "width": 1})
    figure.add_vline(x=sink_mass, line=_ME_LINE, annotation_text="no mask", annotation_position="top left")
    figure.update_xaxes(title_text="mean sink mass behind the ME layer", rangemode="tozero")
    figure.update_yaxes(title_text="Δloss (nats a token)", **_signed_ticks())
    figure.update_layout(**_LAYOUT, title=_title(title, note), height=620)
    figure.update_layout(legend={"x": 1.02, "y": 1})
    return figure


def shares(table: pd.DataFrame, *, names: Sequence[str], title: str, note: str = "") -> go.Figure:
    """Draw shares that add up to 1 as stacked bars, one a row of the table; `names` are those of its columns."""
    figure = go.Figure()
    for column, name, color in zip(table.columns, names, (FIRST, OTHERS, "#bbbbbb"), strict=False):
        bar = go.Bar(y=list(table.index), x=table[column], name=name, orientation="h", marker={"color": color})
        bar.hovertemplate = f"%{{y}}: %{{x:.0%}}<extra>{name}</extra>"
        figure.add_trace(bar)
    figure.update_xaxes(title_text="share of prompts", range=[0, 1], tickformat=".0%")
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(
        **_LAYOUT,
        title=_title(title, note),
        barmode="stack",
        height=220 + 55 * len(table),
        legend={"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top", "traceorder": "normal"},
    )
    return figure


def score_table(
    columns: Sequence[str],
    rows: Sequence[str],
    cells: Sequence[Sequence[str]],
    best: Sequence[Sequence[bool]],
    *,
    title: str,
) -> go.Figure:
    """Draw a table of scores, the best of each column in bold."""
    shown = [
        [f"<b>{cell}</b>" if is_best else cell for cell, is_best in zip(of_row, are_best, strict=True)]
        for of_row, are_best in zip(cells, best, strict=True)
    ]
    table = go.Table(
        columnwidth=[2, *[1.6 for _ in columns]],
        header={"values": ["", *columns], "align": "left", "fill_color": "#e8ecf1", "height": 30},
        cells={"values": [list(rows), *map(list, zip(*shown, strict=True))], "align": "left", "height": 28},
    )
    figure = go.Figure(table)
    figure.update_layout(**_LAYOUT, title=_title(title), height=220 + 30 * len(rows))
    return figure


def score_differences(scores: pd.DataFrame, *, title: str, note: str = "") -> go.Figure:
    """Draw the differences of masks to the unmasked model with their intervals, a panel a benchmark.

    Args:
        scores: of `benchmarks.scores.summarise`, the compared rows; hollow marks are differences not shown.
        title, note: above.
    """
    places = list(dict.fromkeys(zip(scores["task"], scores["metric"], strict=True)))
    columns = min(3, len(places))
    rows = -(-len(places) // columns)
    row_height, gap = 40 + 30 * scores["mask"].nunique(), 110  # pixels
    inner = rows * row_height + (rows - 1) * gap
    figure = make_subplots(
        rows,
        columns,
        shared_yaxes=True,
        subplot_titles=[f"{task}, {metric.replace('_', ' ')}" for task, metric in places],
        vertical_spacing=gap / inner if rows > 1 else 0,
        horizontal_spacing=0.05,
    )
    for index, (task, metric) in enumerate(places):
        at = {"row": index // columns + 1, "col": index % columns + 1}
        own = scores[(scores["task"] == task) & (scores["metric"] == metric)]
        is_shown = own["verdict"] != "no difference shown"
        higher = bool(own["higher_is_better"].iloc[0])
        figure.add_trace(
            go.Scatter(
                x=own["difference"],
                y=own["mask"],
                mode="markers",
                error_x={
                    "array": own["difference_high"] - own["difference"],
                    "arrayminus": own["difference"] - own["difference_low"],
                    "thickness": 1.5,
                },
                marker={"size": 9, "color": OTHERS, "symbol": ["circle" if s else "circle-open" for s in is_shown]},
                customdata=own[["p_corrected", "verdict", "n"]],
                hovertemplate="%{y}: %{x:+.3f}<br>p = %{customdata[0]:.2g}, n = %{customdata[2]}<br>%{customdata[1]}"
                "<extra></extra>",
                showlegend=False,
            ),
            **at,
        )
        figure.add_vline(x=0, line={"color": "#888", "width": 1}, **at)
        figure.update_xaxes(title_text="← worse, better →" if higher else "← better, worse →", **at)
        figure.update_yaxes(autorange="reversed", automargin=True, **at)
    figure.update_layout(**_LAYOUT, title=_title(title, note), height=inner + 170)
    return figure


def over_steps(panels: Mapping[str, Mapping[str, pd.DataFrame]], *, title: str, markers: bool = False) -> go.Figure:
    """Draw what changes in a training, a panel a quantity.

    Args:
        panels: by the quantity's name, by the curve's name (empty for a lone one), `step` and `value`.
        title: above.
        markers: for curves of few points.
    """
    figure = make_subplots(1, len(panels), subplot_titles=list(panels), horizontal_spacing=0.12)
    in_legend: set[str] = set()
    for column, curves in enumerate(panels.values(), 1):
        for number, (name, points) in enumerate(curves.items()):
            figure.add_trace(
                go.Scatter(
                    x=points["step"],
                    y=points["value"],
                    mode="lines+markers" if markers else "lines",
                    name=name,
                    showlegend=bool(name) and name not in in_legend,
                    legendgroup=name,
                    line={"color": COLORS[number % len(COLORS)], "width": 2},
                    hovertemplate="step %{x}: %{y:.4g}<extra>" + name + "</extra>",
                ),
                row=1,
                col=column,
            )
            in_legend.add(name)
    figure.update_xaxes(title_text="step", rangemode="tozero")
    figure.update_layout(
        **_LAYOUT, title=_title(title), height=430, legend={"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"}
    )
    return figure


_VERDICT_COLORS = {
    "holds": "#8fd0a9",
    "holds in part": "#a9cdea",
    "does not hold": "#eea3a3",
    "trivial here": "#f3e2a5",
    "not measured": "#e4e4e4",
}


def verdicts(claims: pd.DataFrame, *, title: str = "Verdicts on the paper's claims") -> go.Figure:
    """Draw which claim holds of which model, from the rows of `melens.judge`."""
    names = list(_VERDICT_COLORS)
    once = claims.drop_duplicates(["model", "id"])
    models = list(dict.fromkeys(once["model"]))
    wide = once.pivot(index="claim", columns="model", values="verdict").loc[list(dict.fromkeys(once["claim"])), models]
    codes = [[names.index(verdict) if verdict in names else None for verdict in row] for row in wide.to_numpy()]
    steps = [(edge / len(names), color) for i, color in enumerate(_VERDICT_COLORS.values()) for edge in (i, i + 1)]
    figure = go.Figure(
        go.Heatmap(
            z=codes,
            x=[model.replace(", ", "<br>") for model in models],
            y=list(wide.index),
            text=[[verdict if verdict in names else "" for verdict in row] for row in wide.to_numpy()],
            texttemplate="%{text}",
            hovertemplate="%{x}<br>%{y}<br>%{text}<extra></extra>",
            colorscale=steps,
            zmin=-0.5,
            zmax=len(names) - 0.5,
            showscale=False,
            xgap=2,
            ygap=2,
        )
    )
    figure.update_yaxes(autorange="reversed", automargin=True, dtick=1)
    lines = max(model.count(", ") for model in models)  # of a job's name, an option each
    figure.update_xaxes(tickangle=0 if lines else None, tickfont={"size": 11} if lines else None, automargin=True)
    figure.update_layout(**_LAYOUT, title=_title(title), height=160 + 34 * len(wide) + 20 * lines)
    return figure


def ffn_figure(
    concentrations: Mapping[str, pd.DataFrame], amplification: pd.DataFrame, *, me_layer: int | None, title: str
) -> go.Figure:
    """Draw figure 4: concentration differences as lines, the FFN's amplification as bars on a second axis.

    Args:
        concentrations: by projection ("gate", "up", "down"): `layer`, `mean`, `low`, `high`.
        amplification: the same of ‖FFN output‖ / ‖FFN input‖ of token 0.
        me_layer: 0-based block, or None.
        title: above the figure.
    """
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    figure.add_trace(
        go.Bar(
            x=amplification["layer"],
            y=amplification["mean"],
            name="FFN amplification (right axis)",
            marker={"color": "rgba(120,120,120,0.45)"},
            error_y=_error_bars(amplification),
            hovertemplate="block %{x}: ×%{y:.4g}<extra>FFN amplification</extra>",
        ),
        secondary_y=True,
    )
    for (name, points), color in zip(concentrations.items(), COLORS, strict=False):
        _add_curve(figure, Curve(f"after {name}", points, color), {"row": 1, "col": 1}, in_legend=True)
    figure.update_yaxes(title_text="concentration, token 0 minus the others", secondary_y=False, zeroline=True)
    figure.update_yaxes(
        title_text="‖FFN output‖ / ‖FFN input‖ of token 0", secondary_y=True, type="log", dtick=1, showgrid=False
    )
    figure.update_yaxes(exponentformat="power", secondary_y=True)
    figure.update_xaxes(title_text=BLOCK)
    _mark_me_layer(figure, me_layer)
    figure.update_layout(
        **_LAYOUT,
        title=_title(title, "Lines and bars: means over prompts. Bands and whiskers: their 95% bootstrap intervals."),
        height=560,
        legend={"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top"},
    )
    figure.update_layout(margin={"r": 90})
    return figure


def vectors_by_dim(vectors: Mapping[str, np.ndarray], *, title: str, note: str = "") -> go.Figure:
    """Draw figure 5b: token 0's activation by dim, one panel for each of a few blocks.

    Args:
        vectors: by the panel's title, `[d_model]`.
        title, note: above the figure.
    """
    figure = make_subplots(len(vectors), 1, shared_xaxes=True, subplot_titles=list(vectors), vertical_spacing=0.06)
    for row, vector in enumerate(vectors.values(), 1):
        line = go.Scatter(
            x=np.arange(len(vector)), y=vector, mode="lines", line={"color": FIRST, "width": 1}, showlegend=False
        )
        line.hovertemplate = "dim %{x}: %{y:.4g}<extra></extra>"
        figure.add_trace(line, row=row, col=1)
        largest = int(np.abs(vector).argmax())
        label = {"showarrow": False, "xanchor": "left", "xshift": 6, "font": {"size": 12}}
        figure.add_annotation(x=largest, y=vector[largest], text=f"dim {largest}", row=row, col=1, **label)
    figure.update_xaxes(title_text="dim of the residual stream", row=len(vectors), col=1)
    figure.update_yaxes(title_text="activation")
    figure.update_layout(**_LAYOUT, title=_title(title, note), height=160 + 170 * len(vectors))
    return figure


def dims_heatmap(activations: pd.DataFrame, *, me_layer: int | None, title: str) -> go.Figure:
    """Draw token 0's |activation| by block and dim as a heatmap, for the dims that are largest anywhere (figure 5b).

    Args:
        activations: `layer`, `dim`, `abs_activation`, the mean over prompts.
        me_layer: 0-based block, or None.
        title: above the figure.
    """
    wide = _by_block_and_dim(activations)
    figure = go.Figure(
        go.Heatmap(
            z=np.log10(wide.to_numpy().clip(min=1e-2)),
            x=wide.columns,
            y=[str(dim) for dim in wide.index],
            customdata=wide.to_numpy().tolist(),
            hovertemplate="block %{x}, dim %{y}: |h| = %{customdata:.4g}<extra></extra>",
            colorscale="Viridis",
            colorbar={"title": "|h|", **_powers_of_ten(wide.to_numpy())},
        )
    )
    figure.update_xaxes(title_text=BLOCK)
    figure.update_yaxes(title_text="dim of the residual stream, largest first", type="category", autorange="reversed")
    _mark_me_layer(figure, me_layer, annotation_yanchor="bottom")  # above the colours
    figure.update_layout(**_LAYOUT, title=_title(title), height=620)
    return figure


def dims_surface(activations: pd.DataFrame, *, me_layer: int | None, title: str) -> go.Figure:
    """Draw the same as a 3-D surface, as the authors do; arguments as for `dims_heatmap`."""
    wide = _by_block_and_dim(activations).sort_index()
    figure = go.Figure(
        go.Surface(
            z=wide.to_numpy(),
            x=wide.columns,
            y=np.arange(len(wide)),
            colorscale="Viridis",
            showscale=False,
            hovertemplate="block %{x}: |h| = %{z:.4g}<extra></extra>",
        )
    )
    if me_layer is not None:
        along = {
            "x": [me_layer] * len(wide),
            "y": np.arange(len(wide)),
            "z": wide[me_layer] + 0.01 * wide.to_numpy().max(),
        }
        me_line = {"mode": "lines", "line": {"color": "#d62728", "width": 5}, "hoverinfo": "skip"}
        figure.add_scatter3d(**along, **me_line, name=f"ME layer {me_layer}", showlegend=True)
    figure.update_layout(
        **_LAYOUT,
        title=_title(title),
        height=700,
        scene={
            "xaxis": {"title": {"text": BLOCK}},
            "yaxis": {
                "title": {"text": "dim"},
                "tickvals": list(range(0, len(wide), 4)),
                "ticktext": [str(dim) for dim in wide.index[::4]],
            },
            "zaxis": {"title": {"text": "|h| of token 0"}},
            "camera": {"eye": {"x": -1.5, "y": -1.6, "z": 0.8}},
        },
    )
    return figure


def _add_curve(figure: go.Figure, curve: Curve, at: dict[str, int], *, in_legend: bool) -> None:
    points, layers = curve.points, curve.points["layer"]
    if "low" in points and points["low"].notna().any():
        band = go.Scatter(
            x=[*layers, *layers[::-1]],
            y=[*points["high"], *points["low"][::-1]],
            mode="lines",
            fill="toself",
            fillcolor=_transparent(curve.color),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=curve.name,
        )
        figure.add_trace(band, **at)
    line = go.Scatter(
        x=layers,
        y=points["mean"],
        name=curve.name,
        legendgroup=curve.name,
        showlegend=in_legend,
        mode="lines+markers",
        line={"color": curve.color, "width": 2},
        marker={"size": 5},
        hovertemplate=f"block %{{x}}: %{{y:.4g}}<extra>{curve.name}</extra>",
    )
    figure.add_trace(line, **at)


def _heatmap_trace(heatmap: Heatmap, z_title: str) -> go.Heatmap:
    return go.Heatmap(
        z=np.asarray(heatmap.values, dtype=np.float32),
        x=list(heatmap.x),
        y=list(heatmap.y),
        coloraxis="coloraxis",
        hovertemplate=f"{heatmap.x_title} %{{x}}<br>{heatmap.y_title} %{{y}}<br>{z_title} %{{z:.4g}}<extra></extra>",
    )


def _ratio_trace(heatmap: Heatmap, z_title: str, *, text: bool) -> go.Heatmap:
    """Colour by the logarithm, show the ratio."""
    trace = _heatmap_trace(heatmap, z_title)
    ratios = np.asarray(heatmap.values, dtype=np.float32)
    trace.z = np.log10(np.clip(ratios, 1e-6, None))
    trace.customdata = ratios.tolist()  # plotly does not look into packed arrays here
    trace.hovertemplate = str(trace.hovertemplate).replace("%{z:", "%{customdata:")
    if text:
        trace.text = [["" if np.isnan(ratio) else f"{ratio:.3g}" for ratio in row] for row in ratios]
        trace.texttemplate = "%{text}"
    return trace


def _error_bars(points: pd.DataFrame) -> dict[str, Any]:
    above, below = points["high"] - points["mean"], points["mean"] - points["low"]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1, "width": 2}


def _transparent(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def _title(text: str, note: str = "") -> dict[str, Any]:
    return {"text": f"{text}<br><sub>{note}</sub>" if note else text, "x": 0.02, "y": 0.97, "yanchor": "top"}


_ME_LINE = {"color": "#444", "width": 1.5, "dash": "dot"}


def _mark_me_layer(figure: go.Figure, me_layer: int | None, **at: Any) -> None:
    if me_layer is not None:
        side = "left" if me_layer > 4 else "right"  # where the curves leave room
        note = {"annotation_text": f"ME layer {me_layer}", "annotation_position": f"top {side}"}
        figure.add_vline(x=me_layer, line=_ME_LINE, annotation_font_size=12, **note, **at)


def _spread(panel: Panel) -> float:
    """Compute by which factor the values of a panel differ."""
    means = pd.concat([curve.points["mean"] for curve in panel.curves])
    positive = means[means > 0]
    return float(positive.max() / positive.min()) if len(positive) else 1.0


def _value_axis(log_scale: bool) -> dict[str, Any]:
    return {"type": "log", "exponentformat": "power", "dtick": 1} if log_scale else {"type": "linear", "dtick": None}


def _scale_buttons(axes: Sequence[str], log_scale: bool, y: float) -> dict[str, Any]:
    def button(label: str, log: bool) -> dict[str, Any]:
        changes = {f"{axis}.{key}": value for axis in axes for key, value in _value_axis(log).items()}
        return {"label": label, "method": "relayout", "args": [changes]}

    return {
        "type": "buttons",
        "direction": "right",
        "active": 0 if log_scale else 1,
        "buttons": [button("log", True), button("linear", False)],
        "x": 1,
        "xanchor": "right",
        "y": y,
        "yanchor": "top",
    }


def _by_block_and_dim(activations: pd.DataFrame) -> pd.DataFrame:
    wide = activations.pivot(index="dim", columns="layer", values="abs_activation")
    return wide.loc[wide.max(axis=1).sort_values(ascending=False).index]


def _powers_of_ten(values: np.ndarray) -> dict[str, Any]:
    ticks = list(range(-2, int(np.ceil(np.log10(values.max()))) + 1))
    return {"tickvals": ticks, "ticktext": [f"10<sup>{tick}</sup>" for tick in ticks]}
