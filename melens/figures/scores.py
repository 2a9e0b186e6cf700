"""Scores, the trade of loss against sinks, and verdicts on claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from melens.figures import style

__all__ = ["loss_over_sinks", "score_differences", "score_table", "verdicts"]


def score_table(
    columns: Sequence[str],
    rows: Sequence[str],
    scores: Sequence[Sequence[str]],
    best: Sequence[Sequence[bool]],
    *,
    title: str,
) -> go.Figure:
    """Draw a table of scores, the best of each column in bold."""
    shown = [
        [f"<b>{score}</b>" if is_best else score for score, is_best in zip(of_row, are_best, strict=True)]
        for of_row, are_best in zip(scores, best, strict=True)
    ]
    by_column = [list(rows), *map(list, zip(*shown, strict=True))]
    header = {"values": ["", *columns], "align": "left", "fill_color": "#e8ecf1", "height": 30}
    table = go.Table(header=header, cells={"values": by_column, "align": "left", "height": 28})
    table.columnwidth = [2, *[1.6 for _ in columns]]
    return style.finish(go.Figure(table), title, height=70 + 30 * len(rows))


def score_differences(scores: pd.DataFrame, *, title: str, note: str = "") -> go.Figure:
    """Draw the differences of masks to the unmasked model with their intervals, a panel a benchmark.

    `scores` are the compared rows of `benchmarks.scores.summarise`; hollow marks are differences that are not shown, or
    were not tested.
    """
    panels = [own for _, own in scores.groupby(["task", "metric"], sort=False)]
    columns, rows = min(3, len(panels)), -(-len(panels) // 3)
    gap = 110  # pixels
    inner = rows * (40 + 30 * scores["mask"].nunique()) + (rows - 1) * gap
    spacing = {"horizontal_spacing": 0.05, "vertical_spacing": gap / inner if rows > 1 else 0}
    titles = [f"{own['task'].iloc[0]}, {own['metric'].iloc[0].replace('_', ' ')}" for own in panels]
    figure = make_subplots(rows, columns, shared_yaxes=True, subplot_titles=titles, **spacing)
    for index, own in enumerate(panels):
        at = {"row": index // columns + 1, "col": index % columns + 1}
        symbols = ["circle" if verdict in ("better", "worse") else "circle-open" for verdict in own["verdict"]]
        higher = bool(own["higher_is_better"].iloc[0])
        middle, low, high = (own[name] for name in ("difference", "difference_low", "difference_high"))
        points = go.Scatter(x=middle, y=own["mask"], mode="markers", showlegend=False)
        points.error_x = style.whiskers(middle, low, high) | {"thickness": 1.5}
        points.marker = {"size": 9, "color": style.OTHERS, "symbol": symbols}
        p = [f"p = {value:.2g}, " if value == value else "" for value in own["p_corrected"]]  # NaN of no test
        points.customdata = np.stack([p, own["verdict"], own["n"]], axis=-1)
        p_and_n = "%{customdata[0]}n = %{customdata[2]}<br>%{customdata[1]}"
        points.hovertemplate = f"%{{y}}: %{{x:+.3f}}<br>{p_and_n}<extra></extra>"
        figure.add_trace(points, **at)
        figure.add_vline(x=0, line={"color": "#888", "width": 1}, **at)
        figure.update_xaxes(title_text="← worse, better →" if higher else "← better, worse →", **at)
        figure.update_yaxes(autorange="reversed", **at)
    return style.finish(figure, title, note, height=inner + 80)


_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")


def loss_over_sinks(
    masks: pd.DataFrame, *, sink_mass: float, colors: Mapping[str, str], title: str, note: str = ""
) -> go.Figure:
    """Draw the change of the loss against the sink mass that is left, a point a mask.

    Its colour and shape tell its `select`, its filling the `site`.

    Args:
        masks: `select`, `site`, `label`, `sink_mass`, and `dloss` with `dloss_low` and `dloss_high`.
        sink_mass: without a mask.
    """
    figure = go.Figure()
    symbols = dict(zip(masks["select"].unique(), cycle(_SYMBOLS), strict=False))
    inside = dict(zip(masks["site"].unique(), cycle(("", "-open", "-open-dot")), strict=False))
    for (select, site), group in masks.groupby(["select", "site"], sort=False):
        middle, low, high = (style.signed_log(group[name]) for name in ("dloss", "dloss_low", "dloss_high"))
        points = go.Scatter(x=group["sink_mass"], y=middle, mode="markers", name=f"{select}, {site}")
        points.error_y = style.whiskers(middle, low, high)
        points.marker = {"color": colors[str(select)], "symbol": symbols[select] + inside[site], "size": 10}
        points.customdata = np.stack([group["label"], group["dloss"]], axis=-1)
        points.hovertemplate = "%{customdata[0]}<br>sink mass %{x:.3f}, Δloss %{customdata[1]:+.4f}<extra></extra>"
        figure.add_trace(points)
    figure.add_hline(y=0, line={"color": "#888", "width": 1})
    figure.add_vline(x=sink_mass, line=style.ME_LINE, annotation_text="no mask", annotation_position="top left")
    figure.update_xaxes(title_text="mean sink mass behind the ME layer", rangemode="tozero")
    reached = [*masks["dloss"], *masks["dloss_low"].dropna(), *masks["dloss_high"].dropna()]
    figure.update_yaxes(title_text="Δloss (nats a token)", **style.signed_ticks(reached))
    return style.finish(figure, title, note, height=540, legend=style.legend())


def verdicts(claims: pd.DataFrame, *, title: str = "Verdicts on the paper's claims") -> go.Figure:
    """Draw which claim holds of which model, from the rows of `melens.judge`."""
    names = list(style.VERDICTS)
    once = claims.drop_duplicates(["model", "id"])
    models = once["model"].unique()
    wide = once.pivot(index="claim", columns="model", values="verdict").loc[once["claim"].unique(), models]
    codes = [[names.index(verdict) if verdict in names else None for verdict in row] for row in wide.to_numpy()]
    steps = [(edge / len(names), color) for i, (*_, color) in enumerate(style.VERDICTS.values()) for edge in (i, i + 1)]
    trace = go.Heatmap(x=[model.replace(", ", "<br>") for model in models], y=list(wide.index), z=codes)
    trace.update(colorscale=steps, zmin=-0.5, zmax=len(names) - 0.5, showscale=False)
    trace.update(text=wide.fillna("").to_numpy(), texttemplate="%{text}")
    trace.hovertemplate = "%{x}<br>%{y}<br>%{text}<extra></extra>"
    figure = go.Figure(trace)
    rows = list(wide.index)
    wrapped = [style.in_lines(claim, 70) for claim in rows]
    figure.update_yaxes(autorange="reversed", tickvals=rows, ticktext=wrapped, showgrid=False)
    style.separate_cells(figure, *wide.shape)
    lines = max(model.count(", ") for model in models)  # of a job's name, an option each
    figure.update_xaxes(tickangle=0 if lines else None, tickfont={"size": 11} if lines else None, showgrid=False)
    return style.finish(figure, title, height=60 + 34 * len(wide) + 20 * lines)
