"""What the figures share: colours, layout, the mark of the ME layer, and an axis for values of both signs."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

__all__ = [
    "BLOCK",
    "COLORS",
    "FIRST",
    "LAYOUT",
    "ME_LINE",
    "OTHERS",
    "SINK",
    "heading",
    "mark_me_layer",
    "signed_log",
    "signed_ticks",
]


FIRST = "#c1272d"
OTHERS = "#0072b2"
SINK = "#7a4fa3"
COLORS = (FIRST, OTHERS, SINK, "#e69f00", "#009e73", "#56b4e9", "#444444", "#cc79a7")
"""Told apart also by people who see few colours."""
BLOCK = "block (0-based)"
LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"family": "Helvetica, Arial, sans-serif", "size": 14, "color": "#222"},
    "margin": {"l": 70, "r": 30, "t": 90, "b": 60},
}
ME_LINE = {"color": "#444", "width": 1.5, "dash": "dot"}


def heading(text: str, note: str = "") -> dict[str, Any]:
    return {"text": f"{text}<br><sub>{note}</sub>" if note else text, "x": 0.02, "y": 0.97, "yanchor": "top"}


def mark_me_layer(figure: go.Figure, me_layer: int | None, **at: Any) -> None:
    if me_layer is not None:
        side = "left" if me_layer > 4 else "right"  # where the curves leave room
        note = {"annotation_text": f"ME layer {me_layer}", "annotation_position": f"top {side}"}
        figure.add_vline(x=me_layer, line=ME_LINE, annotation_font_size=12, **note, **at)


_SIGNED_TICKS = (-10, -3, -1, -0.3, -0.1, -0.03, 0, 0.03, 0.1, 0.3, 1, 3, 10)
_LINEAR_UP_TO = 0.02


def signed_log(values: Any) -> Any:
    """Scale values of both signs, linear around 0 and logarithmic further out."""
    return np.arcsinh(np.asarray(values, dtype=float) / _LINEAR_UP_TO)


def signed_ticks() -> dict[str, Any]:
    return {
        "tickvals": signed_log(_SIGNED_TICKS),
        "ticktext": [f"{tick:+g}" if tick else "0" for tick in _SIGNED_TICKS],
    }
