"""Loss by position in long texts, and its rise over a reference: a line a cache, without a mask and with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.style import ME_LINE

__all__ = ["loss_by_position"]


def loss_by_position(
    losses: Mapping[str, pd.DataFrame],
    rises: Mapping[str, pd.DataFrame],
    colors: Mapping[str, str],
    *,
    marks: Mapping[str, int],
    title: str,
    note: str = "",
) -> go.Figure:
    """Draw the loss by the position of the query, and below it its rise.

    Args:
        losses, rises: by the panel's title, `policy`, `position` and `mean`; of rises `low` and `high` too.
        colors: by policy, in the order of the legend.
        marks: positions by what happens there, drawn as dotted lines.
        title, note: of the figure.
    """
    panels = []
    for of_titles, y_title in ((losses, "loss (nats a token)"), (rises, "rise of the loss (nats a token)")):
        y_range = _range([*of_titles.values()])  # one for both panels of a row, which are compared
        for name, points in of_titles.items():
            points = points.rename(columns={"position": "layer"})
            curves = [Curve(policy, points[points["policy"] == policy], color) for policy, color in colors.items()]
            drawn = [curve for curve in curves if len(curve.points)]
            panels.append(Panel(name, y_title, drawn, None, y_range=y_range, zero_line=of_titles is rises))
    x_axis = {"title": {"text": "position in the text (tokens)"}, "rangemode": "tozero"}
    figure = curves_by_block(panels, title=title, note=note, columns=len(losses), x_axis=x_axis)
    figure.for_each_trace(
        lambda line: line.update(hovertemplate=line.hovertemplate.replace("block", "token", 1)), _IS_LINE
    )
    for number, (name, position) in enumerate(marks.items()):
        figure.add_vline(
            position, line=ME_LINE, annotation={"text": name, "yshift": -16 * number, "xanchor": "left"}
        )  # in every panel
    return figure


def _range(panels: Sequence[pd.DataFrame]) -> tuple[float, float]:
    """Return from where to where panels reach, with their intervals where they have them, from 0 on at least."""
    reached = pd.concat([points[name] for points in panels for name in ("mean", "low", "high") if name in points])
    low, high = min(0.0, float(reached.min())), float(reached.max())
    return low - (0.05 * (high - low) if low else 0.0), high + 0.1 * (high - low)


_IS_LINE = {"hoverinfo": None}
"""What plotly's selector asks of a trace: a band has no hover text."""
