"""Rows with intervals: differences to the intact model as bars, on an axis for both signs, and shares as points."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from melens.figures import style

__all__ = ["difference_bars", "share_points"]


def difference_bars(differences: pd.DataFrame, *, x_title: str, title: str, note: str = "") -> go.Figure:
    """Draw a horizontal bar a row, with its interval where it has one.

    Args:
        differences: `name`, `mean`, `low` and `high`.
        x_title: what the differences are of, with the unit.
        title, note: of the figure.
    """
    figure = go.Figure()
    middle, low, high = (style.signed_log(differences[column]) for column in ("mean", "low", "high"))
    bar = go.Bar(x=middle, y=differences["name"], orientation="h", marker={"color": style.OTHERS}, width=0.6)
    bar.error_x = style.whiskers(middle, low, high) | {"thickness": 1.5}
    bar.customdata = differences["mean"]
    bar.hovertemplate = "%{y}: %{customdata:+.4f}<extra></extra>"
    figure.add_trace(bar)
    figure.add_vline(x=0, line={"color": "#888", "width": 1})
    figure.update_xaxes(title_text=x_title, **style.signed_ticks([*differences["low"], *differences["high"]]))
    figure.update_yaxes(autorange="reversed")
    return style.finish(figure, title, note, height=90 + 45 * len(differences))


def share_points(
    shares: pd.DataFrame, *, names: Sequence[str], groups: Sequence[str], x_title: str, title: str, note: str = ""
) -> go.Figure:
    """Draw shares as points with their intervals, a row a name, those of several groups one above the other.

    Args:
        shares: `name`, `group`, `mean`, `low` and `high`.
        names, groups: in the order of the rows and of the legend.
        x_title: what the shares are of.
        title, note: of the figure.
    """
    figure = go.Figure()
    for group, color in zip(groups, style.COLORS[1:], strict=False):
        own = shares[shares["group"] == group]
        points = go.Scatter(x=own["mean"], y=own["name"], mode="markers", orientation="h", name=group)
        points.marker = {"color": color, "size": 8}
        points.error_x = style.whiskers(own["mean"], own["low"], own["high"]) | {"thickness": 1.5}
        points.hovertemplate = "%{y}: %{x:.4f}<extra></extra>"
        figure.add_trace(points)
    figure.update_xaxes(title_text=x_title, range=[-0.02, 1.02])
    figure.update_yaxes(autorange="reversed", type="category", categoryorder="array", categoryarray=list(names))
    height = 90 + (25 + 15 * len(groups)) * len(names)
    legend = {"showlegend": len(groups) > 1, "legend": style.legend()}
    return style.finish(figure, title, note, height=height, scattermode="group", **legend)
