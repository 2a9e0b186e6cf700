"""Horizontal bars with intervals: differences to the intact model, on an axis for both signs, and shares."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from melens.figures import style

__all__ = ["difference_bars", "share_bars"]


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


def share_bars(shares: pd.DataFrame, *, x_title: str, title: str, note: str = "") -> go.Figure:
    """Draw a horizontal bar a row from 0 to at most 1, with its interval, side by side where rows share a name.

    Args:
        shares: `name`, `group` (in the legend), `mean`, `low` and `high`.
        x_title: what the shares are of.
        title, note: of the figure.
    """
    figure = go.Figure()
    names = list(dict.fromkeys(shares["name"]))
    for (group, own), color in zip(shares.groupby("group", sort=False), style.COLORS[1:], strict=False):
        bar = go.Bar(x=own["mean"], y=own["name"], orientation="h", name=str(group), marker={"color": color})
        bar.error_x = style.whiskers(own["mean"], own["low"], own["high"]) | {"thickness": 1.5}
        bar.hovertemplate = "%{y}: %{x:.3f}<extra></extra>"
        figure.add_trace(bar)
    figure.update_xaxes(title_text=x_title, rangemode="tozero")
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=names)
    n_groups = shares["group"].nunique()
    height = 90 + (25 + 18 * n_groups) * len(names)
    return style.finish(figure, title, note, height=height, showlegend=n_groups > 1, legend=style.legend())
