"""Fit a figure into a narrow width: the columns of a paper, and a phone.

1. The title and the note go: a caption, or the page, says them. So do the buttons, for which paper has no use. On paper
   what bands mean stays, below the legend.
2. Every text gets one size; lines and markers shrink with it; titles of panels and axes are broken into lines.
3. Panels that would be too narrow side by side go below one another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from melens.figures.style import in_lines

__all__ = ["fit", "in_columns"]

_INCHES = {1: 3.25, 2: 6.75}
"""The width of one and of two columns of a paper: ICML's and ACL's; NeurIPS's text is 5.5 inches wide."""
_INCH, _POINT = 96, 96 / 72  # in pixels, as browsers count
_LONGEST = 8.0 * _INCH  # of a column: a page has room for a caption below it
_BUILT_WITH = 14  # the text size for which `style.py` lays figures out
_NARROWEST, _BETWEEN_COLUMNS = 12.5, 5.5  # of panels: in text sizes
_CHARACTER = 0.55  # the width of a character on average, of its height


def in_columns(figure: go.Figure, columns: int) -> go.Figure:
    """Return a copy of a figure for one or two columns of a paper, in 8-point text; 96 of its pixels are an inch.

    Its title, in plain words, is in `layout.meta`, for the metadata of a file.
    """
    width = _INCHES[columns] * _INCH
    title, _, note = (figure.layout.title.text or "").partition("<br><sub>")
    alone = go.Figure(figure)
    alone.update_traces(legendgroup=None, selector={"type": "scatter"})  # groups are rows of their own in a legend
    alone.update_shapes(legendgroup=None)
    text = 8 * _POINT
    bands = re.search("Bands: [^.<]*", note.replace("<br>", " "))
    foot = "" if bands is None else _wrapped(bands[0], width - text, text)
    more_lines = foot.count("<br>")
    room = 0.0 if bands is None else 1.4 * text * (1 + more_lines)
    fitted = fit(alone, width, text, longest=_LONGEST - room)
    meta = {"title": re.sub("<[^>]*>", " ", title)}
    fitted.update_layout(width=width, height=round(fitted.layout.height + room), meta=meta)
    if bands is None:
        return fitted
    below = room / fitted.layout.height
    pad = {"l": 4, "t": text * more_lines}  # by which plotly sets the first of several lines too high
    at = {"yref": "container", "y": below, "yanchor": "top", "x": 0, "pad": pad}
    return fitted.update_layout(title={"text": foot, "font": {"size": text}, **at}, legend_y=below)


def fit(figure: go.Figure, width: float, text: float, *, longest: float = math.inf) -> go.Figure:
    """Return a copy of a figure, without its title, for a width and a text size in pixels.

    Where it would be higher than `longest`, its panels are lower, as far as they can be read.
    """
    fitted = go.Figure(figure)
    was_high = (fitted.layout.height or 500) - (fitted.layout.margin.t or 0) - 80
    _shrink(fitted, text)
    panels = _panels(fitted)
    if not panels:  # a table
        fitted.update_traces(header_font_size=text, cells_font_size=text)
        return fitted.update_layout(margin={"l": 4, "r": 4, "t": 4, "b": 4}, height=round(was_high + 80))
    inner = width - text * (2 + 5 * bool(_colorbars(fitted)) + max(panel.left for panel in panels))
    rows = _in_rows(panels, inner, text)
    shape = 0.62 if len(rows) > 2 else 0.9  # height over width, at most: a page has room for so many rows
    heights = [max(_height(row, was_high * text / _BUILT_WITH, shape), text * _lowest(row)) for row in rows]
    if _colorbars(fitted) and len(rows) == 1:
        heights = [max(heights[0], 13 * text)]
    above = [text * (0.8 + 1.4 * max(panel.title_lines(text) for panel in row)) for row in rows]
    below = [text * max(panel.below for panel in row) for row in rows]
    heading, foot = round(above[0] + _above_first_row(fitted, text)), below[-1] + _legend_height(fitted, inner, text)
    spare = min(1.0, (longest - heading - foot - sum(above[1:]) - sum(below[:-1])) / sum(heights))
    heights = [
        max(high * spare, min(high, 6 * text), text * _lowest(row)) for high, row in zip(heights, rows, strict=True)
    ]
    total = sum(heights) + sum(above[1:]) + sum(below[:-1])
    top = total
    for row, high, room, next_room in zip(rows, heights, below, [*above[1:], 0.0], strict=True):
        for panel in row:
            panel.move((max(0.0, (top - high) / total), top / total), high, text)
        top -= high + room + next_room
    margin = {"l": 4, "r": 4, "t": heading, "b": 4}
    return fitted.update_layout(margin=margin, height=round(heading + total + foot))


@dataclass
class _Panel:
    """One pair of axes, and the annotation that is its title; `x` and `y` are its sides, as shares of all panels."""

    xaxis: Any
    yaxis: Any
    title: Any
    x: tuple[float, float]
    y: tuple[float, float]
    labels: Sequence[str] = ()
    is_map: bool = False
    width: float = 0.0

    @property
    def left(self) -> float:
        """The room that the labels and the title of the y-axis need, in text sizes."""
        return 1.5 * bool(self.yaxis.title.text) + _CHARACTER * max(map(_longest_line, self.labels), default=6)

    @property
    def below(self) -> float:
        """The same of the x-axis."""
        if self.xaxis.showticklabels is False or self.xaxis.side == "top":
            return 0.8
        labels = _CHARACTER * max(map(_longest_line, self.labels), default=6) if self.xaxis.tickangle == -90 else 1.4
        return 1.2 + labels + 1.6 * bool(self.xaxis.title.text)

    def title_lines(self, text: float) -> int:
        if self.title is None or not self.title.text:
            return 0
        self.title.text = _wrapped(self.title.text, self.width, text)
        return self.title.text.count("<br>") + 1

    def move(self, y: tuple[float, float], height: float, text: float) -> None:
        """Put the panel between `x` and `y`, its title above it, and break the titles of its axes into lines."""
        self.xaxis.domain, self.yaxis.domain = self.x, y
        if self.title is not None:
            self.title.update(x=sum(self.x) / 2, y=y[1])
        for axis, length in ((self.xaxis, self.width), (self.yaxis, height)):
            if axis.title.text:
                axis.title.text = _wrapped(axis.title.text, length, text)


def _longest_line(label: str) -> int:
    return max(map(len, label.split("<br>")))


def _wrapped(words: str, length: float, text: float) -> str:
    return in_lines(words.replace("<br>", " "), int(length / (_CHARACTER * text)))


def _panels(figure: go.Figure) -> list[_Panel]:
    """List the panels left to right and top to bottom."""
    titles = [note for note in figure.layout.annotations if note.xref == note.yref == "paper"]
    panels = []
    used = {trace.yaxis or "y" for trace in figure.data if hasattr(trace, "yaxis")}
    for name in sorted(used):
        yaxis = figure.layout["yaxis" + name[1:]]
        xaxis = figure.layout["xaxis" + (yaxis.anchor or "x")[1:]]
        x, y = xaxis.domain or (0.0, 1.0), yaxis.domain or (0.0, 1.0)
        own = [note for note in titles if abs(note.x - sum(x) / 2) < 0.01 and abs(note.y - y[1]) < 0.01]
        traces = [trace for trace in figure.data if hasattr(trace, "yaxis") and (trace.yaxis or "y") == name]
        labels, is_map = _break_labels(yaxis, traces[0].y), traces[0].type == "heatmap"
        panels.append(_Panel(xaxis, yaxis, own[0] if own else None, tuple(x), tuple(y), labels, is_map))
    return sorted(panels, key=lambda panel: (-round(panel.y[1], 3), panel.x[0]))


def _break_labels(yaxis: Any, along: Any) -> list[str]:
    """Break the texts along an axis into lines, and return them; none where there are numbers."""
    if along is None or not all(isinstance(label, str) for label in along):
        return []
    labels = {label: in_lines(label, 24 if len(along) < 20 else 44) for label in along}
    if yaxis.dtick == 1 or yaxis.tickvals is not None or len(labels) < 12:
        yaxis.update(tickmode="array", tickvals=list(labels), ticktext=list(labels.values()))
    return list(labels.values())


def _in_rows(panels: Sequence[_Panel], inner: float, text: float) -> list[list[_Panel]]:
    """Lay panels out in as many columns as they had, or in fewer where they would be narrower than is readable."""
    columns = max(sum(panel.y == other.y for other in panels) for panel in panels)
    columns = max(1, min(columns, int((inner + _BETWEEN_COLUMNS * text) / ((_NARROWEST + _BETWEEN_COLUMNS) * text))))
    gap = _BETWEEN_COLUMNS * text / inner
    wide = (1 - gap * (columns - 1)) / columns
    for number, panel in enumerate(panels):
        left = number % columns * (wide + gap)
        panel.x, panel.width = (left, min(1.0, left + wide)), wide * inner
        if number % columns == 0:  # it may have shared the labels of a panel on its left
            panel.yaxis.showticklabels = True
    rows = [list(panels[at : at + columns]) for at in range(0, len(panels), columns)]
    for row, below in pairwise(rows):
        for panel, lower in zip(row, below, strict=False):
            if panel.xaxis.title.text == lower.xaxis.title.text:
                panel.xaxis.title.text = None
    return rows


def _height(row: Sequence[_Panel], was_high: float, shape: float) -> float:
    """Return the height of a row in pixels: what its panels had, or what goes with their width."""
    high = max((panel.y[1] - panel.y[0]) * was_high for panel in row)
    width = row[0].width
    if any(panel.yaxis.scaleanchor for panel in row):
        return width
    return min(high, width * (0.9 if any(panel.is_map for panel in row) else shape))


def _lowest(row: Sequence[_Panel]) -> float:
    """Return the height in text sizes that the rows of labels along the y-axis need, where each is written."""
    labels = [label for panel in row if panel.yaxis.tickmode == "array" for label in panel.labels]
    return len(labels) * (0.5 + 1.4 * max((label.count("<br>") + 1 for label in labels), default=0))


def _shrink(figure: go.Figure, text: float) -> None:
    """Give every text one size, and make lines, markers and colour bars smaller in the same measure."""
    size, scale = {"size": text}, text / _BUILT_WITH
    figure.update_layout(title=None, font=size)
    figure.layout.updatemenus = figure.layout.sliders = ()
    figure.update_annotations(font=size)
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(title_font=size, tickfont=size, title_standoff=3, ticklen=3)
    for bar in _colorbars(figure):
        bar.update(thickness=text, title_font=size, tickfont=size, xpad=4)
        if bar.lenmode == "pixels":
            bar.len *= scale
    for trace in figure.select_traces({"type": "scatter"}):
        trace.line.width = (2 if trace.line.width is None else trace.line.width) * scale
        trace.marker.size = (6 if trace.marker.size is None else trace.marker.size) * scale
    for shape in figure.layout.shapes:
        shape.line.width *= scale


def _colorbars(figure: go.Figure) -> list[Any]:
    shared = [axis.colorbar for axis in figure.select_coloraxes() if axis.cmin is not None]
    cells = figure.select_traces({"type": "heatmap"})
    return shared + [trace.colorbar for trace in cells if trace.coloraxis is None and trace.showscale is not False]


def _above_first_row(figure: go.Figure, text: float) -> float:
    """Return the height of what stands above the first panels: the name of a line over cells, and a table's header."""
    names = any(note.yanchor == "bottom" and note.yref != "paper" for note in figure.layout.annotations)
    return 1.4 * text * (names or any(axis.side == "top" for axis in figure.select_xaxes()))


def _legend_height(figure: go.Figure, inner: float, text: float) -> float:
    """Break the legend's names into lines, and return its height, as plotly lays it out."""
    for trace in figure.select_traces({"type": "scatter"}):
        if trace.name and trace.showlegend is not False:
            trace.name = _wrapped(trace.name, inner - 4 * text, text)
    names = {trace.name for trace in figure.select_traces({"type": "scatter"}) if trace.showlegend is not False}
    names |= {line.name for line in figure.layout.shapes if line.showlegend}
    names.discard(None)
    if not names:
        return 0.0
    figure.update_layout(legend_tracegroupgap=0)
    entry = text * (_CHARACTER * max(map(_longest_line, names)) + 4)
    n_lines = max(name.count("<br>") + 1 for name in names)
    n_rows = -(-len(names) // max(1, int(inner / entry)))
    return 10.0 + n_rows * (max(16.0, 1.3 * text * n_lines) + 3)
