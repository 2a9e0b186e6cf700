"""Attention heads: maps of several quantities by block and head, two of them as points, and the loss without heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from melens.figures import style

__all__ = ["head_points", "loss_without_heads"]

_SYMBOLS = ("circle", "diamond", "square", "x", "triangle-up")


def head_points(
    groups: Mapping[str, pd.DataFrame], colors: Sequence[str], *, x_title: str, y_title: str, title: str, note: str = ""
) -> go.Figure:
    """Draw a point a head, on a logarithmic y-axis, in the colours of a few groups of heads.

    Args:
        groups: by name, `layer`, `head`, `x` and `y` of the heads; the last lie on top.
        colors: of the groups.
        x_title, y_title: of the axes.
        title, note: of the figure.
    """
    figure = go.Figure()
    for (name, heads), color, symbol in zip(groups.items(), colors, _SYMBOLS, strict=False):
        points = go.Scatter(x=heads["x"], y=heads["y"], mode="markers", name=name)
        points.marker = {"color": color, "symbol": symbol, "size": 8, "opacity": 0.8}
        points.customdata = heads[["layer", "head"]].to_numpy()
        where = "block %{customdata[0]}, head %{customdata[1]}"
        points.hovertemplate = f"{where}<br>{x_title} %{{x:.3f}}<br>{y_title} %{{y:.3g}}<extra></extra>"
        figure.add_trace(points)
    values = pd.concat([heads["y"] for heads in groups.values()])
    figure.add_hline(y=1, line={"color": "#888", "width": 1})
    figure.update_xaxes(title_text=x_title, rangemode="tozero")
    figure.update_yaxes(title_text=y_title, type="log", **style.log_ticks(values))
    return style.finish(figure, title, note, height=480, legend=style.legend())


def loss_without_heads(rises: pd.DataFrame, colors: Mapping[str, str], *, title: str, note: str = "") -> go.Figure:
    """Draw the rise of the loss by the share of heads set to zero, on an axis for values of both signs.

    Args:
        rises: `heads`, `share`, `n_heads`, `mean`, `low` and `high`.
        colors: by `heads`, in the order of the legend.
        title, note: of the figure.
    """
    figure = go.Figure()
    apart = 0.007 * rises["share"].max()  # whiskers at one place would hide one another
    for number, ((name, color), symbol) in enumerate(zip(colors.items(), _SYMBOLS, strict=False)):
        own = rises[rises["heads"] == name].sort_values("share")
        middle, low, high = (style.signed_log(own[column]) for column in ("mean", "low", "high"))
        shares = own["share"] + apart * (number - (len(colors) - 1) / 2)
        line = go.Scatter(x=shares, y=middle, mode="lines+markers", name=name, line={"color": color})
        line.marker = {"symbol": symbol, "size": 9}
        line.error_y = style.whiskers(middle, low, high) | {"thickness": 1.5}
        line.customdata = own[["n_heads", "mean", "share"]].to_numpy()
        where = f"%{{customdata[2]:.0%}}, %{{customdata[0]}} heads, {name}"
        line.hovertemplate = f"{where}: %{{customdata[1]:+.4f}}<extra></extra>"
        figure.add_trace(line)
    figure.add_hline(y=0, line={"color": "#888", "width": 1})
    figure.update_xaxes(title_text="share of all heads set to zero", tickformat=".0%", rangemode="tozero")
    reached = [*rises["mean"], *rises["low"].dropna(), *rises["high"].dropna()]
    figure.update_yaxes(title_text="Δloss (nats a token)", **style.signed_ticks(reached))
    return style.finish(figure, title, note, height=440, legend=style.legend())
