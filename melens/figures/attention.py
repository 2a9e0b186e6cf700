"""Attention maps of a prompt, and what a mask changes in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from melens.figures.heatmaps import Heatmap, heatmap_trace
from melens.figures.style import finish, menu_above

__all__ = ["attention_change", "attention_maps"]


def attention_maps(maps: Mapping[str, np.ndarray], tokens: Sequence[str], *, title: str, note: str) -> go.Figure:
    """Draw figure 7: attention maps side by side, the mean over heads, with a list to choose a head.

    Args:
        maps: by the panel's title, `[head, query, key]`.
        tokens: labels of the positions.
    """
    tokens = [token if len(token) <= _LONGEST else f"{token[: _LONGEST - 1]}…" for token in tokens]
    figure = make_subplots(1, len(maps), subplot_titles=list(maps), horizontal_spacing=0.06)
    n_heads = next(iter(maps.values())).shape[0]
    for column, of_heads in enumerate(maps.values(), 1):
        for values in (of_heads.mean(0), *of_heads):
            causal = np.where(np.tri(len(values), dtype=bool), values, np.nan)
            heatmap = Heatmap("", causal, tokens, tokens, "key", "query")
            figure.add_trace(heatmap_trace(heatmap, "attention"), row=1, col=column)
        # square cells, whose labels plotly thins out where they do not fit
        square = {"scaleanchor": f"x{column if column > 1 else ''}", "constraintoward": "top"}
        figure.update_xaxes(title_text="key", tickangle=-90, row=1, col=column, **_TOKENS)
        figure.update_yaxes(autorange="reversed", row=1, col=column, **_TOKENS, **square)
        figure.update_yaxes({"title_text": "query"} if column == 1 else {"showticklabels": False}, row=1, col=column)
    buttons: list[dict[str, Any]] = []
    for shown, label in enumerate(["mean over heads", *(f"head {head}" for head in range(n_heads))]):
        visible = [index % (n_heads + 1) == shown for index in range(len(figure.data))]
        buttons.append({"label": label, "method": "update", "args": [{"visible": visible}]})
    for trace, is_mean in zip(figure.data, buttons[0]["args"][0]["visible"], strict=True):
        trace.visible = is_mean
    colorbar = {"title": "attention", "y": 1, "yanchor": "top", "lenmode": "pixels", "len": 220}
    colors = {"colorscale": "Viridis", "cmin": 0, "cmax": 1, "colorbar": colorbar}
    layout = {"coloraxis": colors, "updatemenus": [menu_above(buttons=buttons)]}
    return finish(figure, title, note, height=120 + (480 if len(maps) < 3 else 280), **layout)


_LONGEST = 14  # of a label, with the position before the token
_TOKENS: dict[str, Any] = {"constrain": "domain", "showgrid": False, "tickfont": {"size": 12}}


def attention_change(
    unmasked: np.ndarray, masked: np.ndarray, tokens: Sequence[str], *, title: str, note: str
) -> go.Figure:
    """Draw figure 8: maps `[head, query, key]` without a mask, with it, and their difference; as `attention_maps`."""
    panels = {"unmasked": unmasked, "masked": masked, "difference": masked - unmasked}
    figure = attention_maps(panels, tokens, title=title, note=note)
    for trace in figure.data[2 * (len(unmasked) + 1) :]:
        trace.coloraxis = "coloraxis2"
    limit = max(0.05, float(np.abs(panels["difference"].mean(0)).max()))
    lower = {"title": "difference", "y": 0, "yanchor": "bottom"}  # where the panels are stacked, beside the difference
    changes = {"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "colorbar": lower}
    figure.update_layout(coloraxis2=changes)
    for axis in figure.select_coloraxes():
        axis.colorbar.update(lenmode="pixels", len=140)
    return figure
