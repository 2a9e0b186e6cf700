"""Differences as points with their intervals, side by side in groups, on an axis for values of both signs."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from melens.figures import style

__all__ = ["grouped_points"]

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "x", "cross", "star")


def grouped_points(
    points: pd.DataFrame, colors: Mapping[str, str], *, x_title: str, y_title: str, title: str, note: str = ""
) -> go.Figure:
    """Draw a panel of points for each kind, those of one place on the x-axis beside each other.

    Args:
        points: `panel`, `x` (a text), `name`, `mean`, `low` and `high`, in the order in which they are drawn.
        colors: of each name, in the order of the legend.
        x_title, y_title: of every panel; of the differences, with the unit.
        title, note: of the figure.
    """
    panels = list(points["panel"].unique())
    figure, places = style.panels_in_rows(panels, 3, gap=0.05, row_gap=0.35)
    named: set[str] = set()
    for panel, at in zip(panels, places, strict=True):
        own = points[points["panel"] == panel]
        for (name, color), symbol in zip(colors.items(), _SYMBOLS, strict=False):
            some = own[own["name"] == name]
            if some.empty:
                continue
            middle, low, high = (style.signed_log(some[column]) for column in ("mean", "low", "high"))
            drawn = go.Scatter(x=some["x"], y=middle, mode="markers", name=name, legendgroup=name, offsetgroup=name)
            drawn.error_y = style.whiskers(middle, low, high) | {"thickness": 1.5, "width": 3}
            drawn.marker = {"color": color, "symbol": symbol, "size": 9}
            drawn.customdata, drawn.showlegend = some["mean"], name not in named
            drawn.hovertemplate = f"{name}, %{{x}}: %{{customdata:+.4f}}<extra></extra>"
            figure.add_trace(drawn, **at)
            named.add(name)
        figure.add_hline(y=0, line={"color": "#888", "width": 1}, **at)
        first = at["col"] == 1
        figure.update_yaxes(title_text=y_title if first else "", showticklabels=first, **at)
    reached = [*points["mean"], *points["low"].dropna(), *points["high"].dropna()]
    span = [style.signed_log(min(0, *reached)), style.signed_log(max(0, *reached))]
    room = 0.05 * (span[1] - span[0] or 1)
    figure.update_yaxes(**style.signed_ticks(reached), range=[span[0] - room, span[1] + room])
    figure.update_xaxes(title_text=x_title, type="category", categoryorder="array", categoryarray=points["x"].unique())
    height = 80 + 330 * places[-1]["row"]
    return style.finish(figure, title, note, height=height, legend=style.legend(), scattermode="group", scattergap=0.3)
