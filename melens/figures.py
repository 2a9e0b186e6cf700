"""Plotly figures from tidy data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

__all__ = ["compare_norms", "dims_heatmap", "dims_surface", "emergence_figure", "norm_by_block"]

FIRST = "#c1272d"
OTHERS = "#0072b2"
SINK = "#7a4fa3"
_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"family": "Helvetica, Arial, sans-serif", "size": 14, "color": "#222"},
    "margin": {"l": 70, "r": 30, "t": 90, "b": 60},
}
PANELS = {
    "ln2.hook_out": "RMSNorm output (ln2)",
    "hook_mlp_out": "FFN output",
    "hook_resid_post": "Block output",
}


def norm_by_block(norms: pd.DataFrame) -> pd.DataFrame:
    """Summarise norms for figure 1: by site, layer and token ("first" or "others") the mean and its spread.

    Args:
        norms: the table of the probe `Norms`.

    Returns:
        `site`, `layer`, `token`, `mean`, and `low` and `high`: the 10% and 90% quantiles, over prompts for the first
        token, over all their tokens for the others.
    """
    token = np.where(norms["pos"] == 0, "first", "others")
    grouped = norms.assign(token=token).groupby(["site", "layer", "token"], observed=True)["norm"]
    summary = pd.DataFrame({"mean": grouped.mean(), "low": grouped.quantile(0.1), "high": grouped.quantile(0.9)})
    return summary.reset_index()


def emergence_figure(
    norms: pd.DataFrame, sink_mass: pd.DataFrame, *, me_layer: int | None, title: str, log_scale: bool = True
) -> go.Figure:
    """Draw figure 1 (bottom) and 11-20: norms by block, and below them the sink mass, with the ME layer marked.

    Args:
        norms: from `norm_by_block`.
        sink_mass: from `sinks.sink_mass_by_layer`.
        me_layer: 0-based block, or None.
        title: above the figure.
        log_scale: of the norms; a button in the figure changes it.
    """
    panels = [*PANELS.values(), "Attention on token 0 (sink mass)"]
    figure = make_subplots(2, 2, subplot_titles=panels, horizontal_spacing=0.1, vertical_spacing=0.16)
    for index, site in enumerate(PANELS):
        at = {"row": index // 2 + 1, "col": index % 2 + 1}
        of_site = norms[norms["site"] == site]
        for token, name, color in (("others", "other tokens", OTHERS), ("first", "token 0", FIRST)):
            _add_curve(figure, of_site[of_site["token"] == token], name, color, at, in_legend=index == 0)
        figure.update_yaxes(title_text="L2 norm", **at)
    _add_curve(figure, sink_mass, "sink mass, mean of heads", SINK, {"row": 2, "col": 2}, in_legend=True)
    figure.update_yaxes(title_text="share of attention", range=[0, 1], row=2, col=2)
    figure.update_xaxes(title_text="block (0-based)", rangemode="tozero")
    _mark_me_layer(figure, me_layer)
    norm_axes = ("yaxis", "yaxis2", "yaxis3")
    for axis in norm_axes:
        figure.layout[axis].update(_norm_axis(log_scale))
    figure.update_layout(
        **_LAYOUT,
        title=_title(f"{title}<br><sub>Lines: means. Bands: 10% to 90% of prompts (token 0), tokens or heads.</sub>"),
        height=780,
        legend={"orientation": "h", "x": 0, "y": -0.1},
        updatemenus=[_scale_buttons(norm_axes, log_scale)],
    )
    return figure


def compare_norms(curves: dict[str, pd.DataFrame], me_layers: dict[str, int | None], *, log_scale: bool) -> go.Figure:
    """Draw the block-output norms of several models side by side, each with its ME layer marked.

    Args:
        curves: by model, from `norm_by_block`.
        me_layers: by model.
        log_scale: of the norms.
    """
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = make_subplots(rows, columns, subplot_titles=list(curves), vertical_spacing=0.32 / rows)
    for index, (model, norms) in enumerate(curves.items()):
        at = {"row": index // columns + 1, "col": index % columns + 1}
        of_site = norms[norms["site"] == "hook_resid_post"]
        for token, name, color in (("others", "other tokens", OTHERS), ("first", "token 0", FIRST)):
            _add_curve(figure, of_site[of_site["token"] == token], name, color, at, in_legend=index == 0)
        _mark_me_layer(figure, me_layers[model], **at)
    figure.update_xaxes(title_text="block (0-based)", rangemode="tozero")
    figure.update_yaxes(**_norm_axis(log_scale))
    figure.update_yaxes(title_text="L2 norm of the block output", col=1)
    figure.update_layout(**_LAYOUT, height=160 + 300 * rows, legend={"orientation": "h", "x": 0, "y": -0.3 / rows})
    return figure


def dims_heatmap(activations: pd.DataFrame, *, me_layer: int | None, title: str) -> go.Figure:
    """Draw token 0's |activation| by block and dim as a heatmap, for the dims that are largest anywhere (figure 5b).

    Args:
        activations: `layer`, `dim`, `abs_activation`, the mean over prompts.
        me_layer: 0-based block, or None.
        title: above the figure.
    """
    wide = _by_block_and_dim(activations)
    figure = go.Figure(
        go.Heatmap(
            z=np.log10(wide.to_numpy().clip(min=1e-2)),
            x=wide.columns,
            y=[str(dim) for dim in wide.index],
            customdata=wide.to_numpy(),
            hovertemplate="block %{x}, dim %{y}: |h| = %{customdata:.4g}<extra></extra>",
            colorscale="Viridis",
            colorbar={"title": "|h|", **_powers_of_ten(wide.to_numpy())},
        )
    )
    figure.update_xaxes(title_text="block (0-based)")
    figure.update_yaxes(title_text="dim of the residual stream, largest first", type="category", autorange="reversed")
    _mark_me_layer(figure, me_layer, annotation_yanchor="bottom")  # above the colours
    figure.update_layout(**_LAYOUT, title=_title(title), height=620)
    return figure


def dims_surface(activations: pd.DataFrame, *, title: str) -> go.Figure:
    """Draw the same as a 3-D surface, as the authors do; arguments as for `dims_heatmap`."""
    wide = _by_block_and_dim(activations).sort_index()
    figure = go.Figure(
        go.Surface(
            z=wide.to_numpy(),
            x=wide.columns,
            y=np.arange(len(wide)),
            colorscale="Viridis",
            showscale=False,
            hovertemplate="block %{x}: |h| = %{z:.4g}<extra></extra>",
        )
    )
    figure.update_layout(
        **_LAYOUT,
        title=_title(title),
        height=700,
        scene={
            "xaxis": {"title": {"text": "block (0-based)"}},
            "yaxis": {
                "title": {"text": "dim"},
                "tickvals": list(range(0, len(wide), 4)),
                "ticktext": [str(dim) for dim in wide.index[::4]],
            },
            "zaxis": {"title": {"text": "|h| of token 0"}},
            "camera": {"eye": {"x": -1.5, "y": -1.6, "z": 0.8}},
        },
    )
    return figure


def _add_curve(
    figure: go.Figure, summary: pd.DataFrame, name: str, color: str, at: dict[str, int], *, in_legend: bool
) -> None:
    """Add a line through `mean` and a band from `low` to `high`, by `layer`."""
    layers = summary["layer"]
    band = go.Scatter(
        x=[*layers, *layers[::-1]],
        y=[*summary["high"], *summary["low"][::-1]],
        mode="lines",
        fill="toself",
        fillcolor=_transparent(color),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        legendgroup=name,
    )
    line = go.Scatter(
        x=layers,
        y=summary["mean"],
        name=name,
        legendgroup=name,
        showlegend=in_legend,
        mode="lines+markers",
        line={"color": color, "width": 2},
        marker={"size": 5},
        hovertemplate=f"block %{{x}}: %{{y:.4g}}<extra>{name}</extra>",
    )
    figure.add_traces([band, line], rows=[at["row"]] * 2, cols=[at["col"]] * 2)


def _transparent(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def _title(text: str) -> dict[str, Any]:
    return {"text": text, "x": 0.02, "y": 0.97, "yanchor": "top"}


def _mark_me_layer(figure: go.Figure, me_layer: int | None, **at: Any) -> None:
    if me_layer is not None:
        line = {"color": "#444", "width": 1.5, "dash": "dot"}
        side = "left" if me_layer > 4 else "right"  # where the curves leave room
        note = {"annotation_text": f"ME layer {me_layer}", "annotation_position": f"top {side}"}
        figure.add_vline(x=me_layer, line=line, annotation_font_size=12, **note, **at)


def _norm_axis(log_scale: bool) -> dict[str, Any]:
    return {"type": "log", "exponentformat": "power", "dtick": 1} if log_scale else {"type": "linear", "dtick": None}


def _scale_buttons(axes: Sequence[str], log_scale: bool) -> dict[str, Any]:
    def button(label: str, log: bool) -> dict[str, Any]:
        changes = {f"{axis}.{key}": value for axis in axes for key, value in _norm_axis(log).items()}
        return {"label": label, "method": "relayout", "args": [changes]}

    return {
        "type": "buttons",
        "direction": "right",
        "active": 0 if log_scale else 1,
        "buttons": [button("log", True), button("linear", False)],
        "x": 1,
        "xanchor": "right",
        "y": -0.08,
        "yanchor": "top",
    }


def _by_block_and_dim(activations: pd.DataFrame) -> pd.DataFrame:
    wide = activations.pivot(index="dim", columns="layer", values="abs_activation")
    return wide.loc[wide.max(axis=1).sort_values(ascending=False).index]


def _powers_of_ten(values: np.ndarray) -> dict[str, Any]:
    ticks = list(range(-2, int(np.ceil(np.log10(values.max()))) + 1))
    return {"tickvals": ticks, "ticktext": [f"10<sup>{tick}</sup>" for tick in ticks]}
