"""What the figures share: colours, layout, the mark of the ME layer, and the numbers on axes.

A figure is laid out for a page about 1,100 pixels wide; `saving.py` fits it into a paper's column and onto a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

__all__ = [
    "BLOCK", "COLORS", "FIRST", "ME_LINE", "OTHERS", "SINK", "VERDICTS", "block_ticks", "finish", "frame_me_layer",
    "in_lines", "legend", "log_ticks", "mark_me_layer", "menu_above", "panels_in_rows", "separate_cells",
    "signed_limit", "signed_log", "signed_ticks", "whiskers",
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
ME_LINE = {"color": "#222", "width": 1.5, "dash": "dot"}
_LINE_CHARACTERS, _NOTE_CHARACTERS = 90, 110
_TITLE_LINE, _PANEL_TITLE = 23, 26
"""Heights in pixels: of a line of the title or note, and of the panels' titles."""
_AXIS: dict[str, Any] = {
    "automargin": True, "showline": True, "linecolor": "#888", "ticks": "outside", "ticklen": 4, "tickcolor": "#888",
    "gridcolor": "#e8e8e8", "zeroline": False, "exponentformat": "none", "separatethousands": True,
    "title": {"font": {"size": 14}, "standoff": 8},
}  # fmt: skip
_COLORBAR = {"title": {"font": {"size": 14}}, "tickfont": {"size": 12}, "thickness": 20}
_LAYOUT: dict[str, Any] = {
    "template": {
        "layout": {"xaxis": _AXIS, "yaxis": _AXIS, "coloraxis": {"colorbar": _COLORBAR}},
        "data": {"heatmap": [{"colorbar": _COLORBAR}]},
    },
    "font": {"family": "Helvetica, Arial, sans-serif", "size": 14, "color": "#222"},
    "margin": {"l": 70, "r": 30, "b": 20},
    "paper_bgcolor": "white",
    "plot_bgcolor": "white",
    "modebar": {"remove": ["zoomIn2d", "zoomOut2d", "autoScale2d", "select2d", "lasso2d"]},
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
    """Return a figure with its title, a note in small below that, fonts, margins and whatever else of the layout.

    Args:
        title, note: broken into lines where they are long.
        height: in pixels, of everything below the title and the note.
        layout: plotly's, by name.
    """
    titles, notes = in_lines(title, _LINE_CHARACTERS), in_lines(note, _NOTE_CHARACTERS)
    text = f"{titles}<br><sub>{notes}</sub>" if note else titles
    heading = {"text": text, "x": 0.02, "y": 1, "yanchor": "top", "pad": {"t": 16}, "font": {"size": 18}}
    above = 22 + _TITLE_LINE * (text.count("<br>") + 1)
    names_above = any(note.text and note.yanchor == "bottom" for note in figure.layout.annotations)
    above += _PANEL_TITLE * (names_above or any(axis.side == "top" for axis in figure.select_xaxes()))
    figure.update_layout(_LAYOUT).update_layout(title=heading, height=height + above, margin={"t": above}, **layout)
    return figure


def in_lines(text: str, characters: int) -> str:
    """Break a text into lines of at most so many characters, as plotly does not; "n = 8" stays in one."""
    whole = text.replace(" = ", "\u00a0=\u00a0")
    lines = wrap(whole, max(characters, 8), break_long_words=False, break_on_hyphens=False)
    return "<br>".join(lines).replace("\u00a0", " ")


def legend() -> dict[str, Any]:
    """Lay the legend out in rows at the foot of the figure, which takes the room for them from the panels."""
    return {"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom"}


def menu_above(**menu: Any) -> dict[str, Any]:
    """Place buttons or a list above the panels' titles, at the right end of the line of the note."""
    return {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": _PANEL_TITLE + 4}, **menu}


def mark_me_layer(figure: go.Figure, me_layer: int | None, at: Mapping[str, Any] | None = None, **line: Any) -> None:
    """Draw the ME layer (0-based block) as a dotted line in a panel (its `row` and `col`); nothing without one.

    `line` is plotly's: its `name`, and whether it has a place in the legend.
    """
    if me_layer is not None:
        figure.add_vline(x=me_layer, line=ME_LINE, **line, **(at or {}))


def frame_me_layer(
    figure: go.Figure, me_layer: int | None, at: Mapping[str, Any] | None = None, *, axes: str = "x", name: bool = True
) -> None:
    """Draw a frame around the ME layer's cells in a heatmap: dark with a white rim, seen on every colour.

    Args:
        me_layer: 0-based block; nothing is drawn without one.
        at: `row` and `col` of the panel.
        axes: on which the blocks are: "x", or "xy" for both.
        name: write it above the cells, where the panel has no title.
    """
    if me_layer is None:
        return
    sides = {"x0": me_layer - 0.5, "x1": me_layer + 0.5}, {"y0": me_layer - 0.5, "y1": me_layer + 0.5}
    for draw, ends in zip((figure.add_vrect, figure.add_hrect), sides[: len(axes)], strict=False):
        for line in ({"color": "white", "width": 3.5}, {**ME_LINE, "width": 1.2}):
            draw(**ends, line=line, fillcolor="rgba(0,0,0,0)", **(at or {}))
    if name:
        note = {"text": f"ME layer {me_layer}", "showarrow": False, "yanchor": "bottom", "font": {"size": 12}}
        figure.add_annotation(x=me_layer, y=1, yref="y domain", **note, **(at or {}))


def separate_cells(figure: go.Figure, rows: int, columns: int) -> None:
    """Draw white lines between the cells of a heatmap of texts.

    Gaps of plotly's own would make it draw the cells as a coarse image, not as one pixel each, which prints sharp.
    """
    for draw, n in ((figure.add_hline, rows), (figure.add_vline, columns)):
        for edge in range(1, n):
            draw(edge - 0.5, line={"color": "white", "width": 2})


def block_ticks(n_blocks: int) -> dict[str, Any]:
    """Return ticks at whole blocks, about ten at most."""
    return {
        "tick0": 0,
        "dtick": next(step for step in (1, 2, 5, 10, 20, 50, 100) if n_blocks <= 8 * step or step == 100),
    }


def log_ticks(values: Any) -> dict[str, Any]:
    """Return the ticks of a logarithmic axis for some values (those above 0 count), all written in one format.

    They are the powers of ten, or further numbers where the values span less than two of them.
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values) or values.max() < 1.2 * values.min():
        return {"tickmode": "auto"}
    low, high = values.min(), values.max()
    steps = ((100, (1,)), (20, (1, 3)), (4, (1, 2, 5)), (1, range(1, 10)))
    digits = next(digits for ratio, digits in steps if high >= ratio * low)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    exponents = range(exponents.start, exponents.stop, -(-len(exponents) // 8))
    as_powers = digits == (1,) and (exponents[0] < -3 or exponents[-1] > 3)
    ticks = [(digit * 10.0**exponent, exponent) for exponent in exponents for digit in digits]
    texts = [f"10<sup>{exponent}</sup>" if as_powers else _plain(value) for value, exponent in ticks]
    return {"tickmode": "array", "tickvals": [value for value, _ in ticks], "ticktext": texts}


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def whiskers(middle: Any, low: Any, high: Any) -> dict[str, Any]:
    """Lay intervals out as plotly's error bars."""
    return {"type": "data", "symmetric": False, "array": high - middle, "arrayminus": middle - low}


_LINEAR_UP_TO = 0.02


def signed_log(values: Any) -> Any:
    """Scale values of both signs, linear around 0 and logarithmic further out."""
    return np.arcsinh(np.asarray(values, dtype=float) / _LINEAR_UP_TO)


def signed_ticks(values: Any) -> dict[str, Any]:
    """Return the ticks of an axis scaled by `signed_log`, about as far as some values reach."""
    limit = signed_limit(values)
    positive: list[float] = []
    for tick in (digit * 10.0**exponent for exponent in range(-6, 6) for digit in (1, 3)):
        gap = signed_log(tick) - (signed_log(positive[-1]) if positive else 0)
        if tick <= limit * 1.001 and gap >= 0.15 * signed_log(limit):
            positive.append(tick)
    ticks = [*(-tick for tick in reversed(positive)), 0, *positive]
    return {
        "tickvals": signed_log(ticks),
        "ticktext": [f"{tick:+g}".replace("-", "−") if tick else "0" for tick in ticks],
    }


def signed_limit(values: Any) -> float:
    """Return the least of 0.001, 0.003, 0.01, 0.03 … that no value exceeds in size."""
    sizes = np.abs(np.asarray(values, dtype=float))
    largest = float(np.nanmax(sizes, initial=0.001))
    return next(limit for e in range(-3, 40) for d in (1.0, 3.0) if (limit := d * 10.0**e) >= largest)
