"""What the figures share: colours, layout, the mark of the ME layer, and an axis for values of both signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

__all__ = [
    "BLOCK", "COLORS", "FIRST", "ME_LINE", "OTHERS", "SINK", "VERDICTS", "finish", "legend_below", "mark_me_layer",
    "panels_in_rows", "signed_log", "signed_ticks", "whiskers",
]  # fmt: skip

FIRST = "#c1272d"
OTHERS = "#0072b2"
SINK = "#7a4fa3"
COLORS = (FIRST, OTHERS, SINK, "#e69f00", "#009e73", "#56b4e9", "#444444", "#cc79a7")
"""Told apart also by people who see few colours."""
VERDICTS = {
    "holds": ("hold", "good", "green", "#8fd0a9"),
    "holds in part": ("hold in part", "part", "cyan", "#a9cdea"),
    "does not hold": ("do not hold", "bad", "red", "#eea3a3"),
    "trivial here": ("trivial here", "none", "yellow", "#f3e2a5"),
    "not measured": ("not measured", "none", "yellow", "#e4e4e4"),
}
"""How a sentence counts each verdict, its class on a page, its colour on a terminal, and in a figure."""
BLOCK = "block (0-based)"
ME_LINE = {"color": "#444", "width": 1.5, "dash": "dot"}
_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"family": "Helvetica, Arial, sans-serif", "size": 14, "color": "#222"},
    "margin": {"l": 70, "r": 30, "t": 90, "b": 60},
}


def panels_in_rows(
    titles: Sequence[str], columns: int, *, gap: float, row_gap: float
) -> tuple[go.Figure, list[dict[str, int]]]:
    """Make a figure of panels, left to right and top to bottom; return it with the `row` and `col` of each panel.

    `gap` is between columns, as a share of the width; `row_gap` between rows, of a row's height.
    """
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    gaps = {"horizontal_spacing": gap, "vertical_spacing": row_gap / rows}
    figure = make_subplots(rows, columns, subplot_titles=titles, **gaps)
    return figure, [{"row": at // columns + 1, "col": at % columns + 1} for at in range(len(titles))]


def finish(figure: go.Figure, title: str, note: str = "", *, height: int, **layout: Any) -> go.Figure:
    """Return a figure with its title, a note in small below that, fonts, margins and whatever else of the layout."""
    text = f"{title}<br><sub>{note}</sub>" if note else title
    heading = {"text": text, "x": 0.02, "y": 1, "yanchor": "top", "pad": {"t": 20}}
    return figure.update_layout(_LAYOUT).update_layout(title=heading, height=height, **layout)


def legend_below(y: float) -> dict[str, Any]:
    """Lay the legend out in a row below the axes; `y` counts in heights of the panels, from their foot."""
    return {"orientation": "h", "x": 0, "y": y, "yanchor": "top"}


def mark_me_layer(figure: go.Figure, me_layer: int | None, **at: Any) -> None:
    """Draw the ME layer (0-based block) as a dotted line with its name; nothing for a model without one."""
    if me_layer is not None:
        side = "left" if me_layer > 4 else "right"  # where the curves leave room
        note = {"annotation_text": f"ME layer {me_layer}", "annotation_position": f"top {side}"}
        figure.add_vline(x=me_layer, line=ME_LINE, annotation_font_size=12, **note, **at)


def whiskers(middle: Any, low: Any, high: Any) -> dict[str, Any]:
    """Lay intervals out as plotly's error bars."""
    return {"type": "data", "symmetric": False, "array": high - middle, "arrayminus": middle - low}


_SIGNED_TICKS = (-10, -3, -1, -0.3, -0.1, -0.03, 0, 0.03, 0.1, 0.3, 1, 3, 10)
_LINEAR_UP_TO = 0.02


def signed_log(values: Any) -> Any:
    """Scale values of both signs, linear around 0 and logarithmic further out."""
    return np.arcsinh(np.asarray(values, dtype=float) / _LINEAR_UP_TO)


def signed_ticks() -> dict[str, Any]:
    texts = [f"{tick:+g}" if tick else "0" for tick in _SIGNED_TICKS]
    return {"tickvals": signed_log(_SIGNED_TICKS), "ticktext": texts}
