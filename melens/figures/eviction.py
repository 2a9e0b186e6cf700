"""Loss by position in long texts, a line a cache, in a panel without a mask and one with it."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.style import ME_LINE

__all__ = ["loss_by_position"]


def loss_by_position(
    panels: Mapping[str, pd.DataFrame],
    colors: Mapping[str, str],
    *,
    marks: Mapping[str, int],
    title: str,
    note: str = "",
) -> go.Figure:
    """Draw the loss by the position of the query.

    Args:
        panels: by title, `policy`, `position`, `mean`, `low` and `high`.
        colors: by policy, in the order of the legend.
        marks: positions by what happens there, drawn as dotted lines.
        title, note: of the figure.
    """
    drawn = []
    for name, points in panels.items():
        points = points.rename(columns={"position": "layer"})
        curves = [Curve(policy, points[points["policy"] == policy], color) for policy, color in colors.items()]
        drawn.append(Panel(name, "loss (nats a token)", [curve for curve in curves if len(curve.points)], None))
    x_axis = {"title": {"text": "position in the text (tokens)"}, "rangemode": "tozero"}
    figure = curves_by_block(drawn, title=title, note=note, x_axis=x_axis)
    figure.for_each_trace(
        lambda line: line.update(hovertemplate=line.hovertemplate.replace("block", "token", 1)), _IS_LINE
    )
    largest = max(float(points["mean"].max()) for points in panels.values())
    figure.update_yaxes(range=[0, 1.1 * largest])  # the same in both panels, which are compared
    for number, (name, position) in enumerate(marks.items()):
        figure.add_vline(
            position, line=ME_LINE, annotation={"text": name, "yshift": -16 * number, "xanchor": "left"}
        )  # in every panel
    return figure


_IS_LINE = {"hoverinfo": None}
"""What plotly's selector asks of a trace: a band has no hover text."""
