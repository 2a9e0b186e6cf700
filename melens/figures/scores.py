"""Scores, the trade of loss against sinks, shares of prompts and verdicts on claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from melens.figures.style import FIRST, ME_LINE, OTHERS, finish, legend_below, signed_log, signed_ticks

__all__ = ["loss_over_sinks", "score_differences", "score_table", "shares", "verdicts"]


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
    return finish(figure, title, height=220 + 30 * len(rows))


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
    return finish(figure, title, note, height=inner + 170)


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
        middle, high, low = (signed_log(group[name]) for name in ("dloss", "dloss_high", "dloss_low"))
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
    figure.add_vline(x=sink_mass, line=ME_LINE, annotation_text="no mask", annotation_position="top left")
    figure.update_xaxes(title_text="mean sink mass behind the ME layer", rangemode="tozero")
    figure.update_yaxes(title_text="Δloss (nats a token)", **signed_ticks())
    return finish(figure, title, note, height=620, legend={"x": 1.02, "y": 1})


def shares(table: pd.DataFrame, *, names: Sequence[str], title: str, note: str = "") -> go.Figure:
    """Draw shares that add up to 1 as stacked bars, one a row of the table; `names` are those of its columns."""
    figure = go.Figure()
    for column, name, color in zip(table.columns, names, (FIRST, OTHERS, "#bbbbbb"), strict=False):
        bar = go.Bar(y=list(table.index), x=table[column], name=name, orientation="h", marker={"color": color})
        bar.hovertemplate = f"%{{y}}: %{{x:.0%}}<extra>{name}</extra>"
        figure.add_trace(bar)
    figure.update_xaxes(title_text="share of prompts", range=[0, 1], tickformat=".0%")
    figure.update_yaxes(autorange="reversed", automargin=True)
    legend = {**legend_below(-0.25), "traceorder": "normal"}
    return finish(figure, title, note, height=220 + 55 * len(table), barmode="stack", legend=legend)


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
    return finish(figure, title, height=160 + 34 * len(wide) + 20 * lines)
