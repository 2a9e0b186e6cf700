"""Differences to the intact model as bars, one an intervention, on an axis for values of both signs."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from melens.figures import style

__all__ = ["difference_bars"]


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
