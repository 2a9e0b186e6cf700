"""The figures of a grid of masks, each with what is seen in it, and a configuration in words.

`grid_figures` draws what the table of `grid.py` holds; `attention_figure` and `key_figure` show one mask at work.
"""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from melens.analysis.statistics import with_interval
from melens.analysis.study import Study
from melens.figures.attention import attention_change
from melens.figures.curves import Curve, Panel, curves_by_block, vectors_by_dim
from melens.figures.heatmaps import Heatmap, loss_changes
from melens.figures.scores import loss_over_sinks
from melens.figures.style import COLORS, FIRST, OTHERS, SINK, log_ticks
from melens.masks.grid_metrics import PAPER_RATE, UNMASKED, MaskGridMetrics
from melens.masks.mask import WeMask
from melens.report.result import Figure
from melens.tracing.attention_probes import AttentionMaps
from melens.tracing.trace import trace

__all__ = ["attention_figure", "configuration_in_words", "grid_figures", "key_figure", "nearest_paper_rate"]

SELECT_COLORS = {
    "weight": OTHERS,
    "random": COLORS[3],
    "magnitude": FIRST,
    "weight_low": COLORS[4],
    "massive": SINK,
    "batch_magnitude": COLORS[6],
}
_QUANTITIES = {
    "sink_mass": "sink mass",
    "share_of_heads": "share of heads with a sink",
    "entropy": "entropy of attention (nats)",
    "effective_rank": "effective rank of attention",
    "input_cosine": "cosine of token 0's attention input between texts",
    "key_cosine": "cosine of token 0's key between texts",
}


def grid_figures(
    table: pd.DataFrame, by_block: pd.DataFrame, metrics: MaskGridMetrics, of_texts: str
) -> dict[str, Figure]:
    """Draw a grid.

    Args:
        table: a row a configuration, compared with the unmasked model.
        by_block: as of a `Grid`.
        metrics: of the grid.
        of_texts: model and texts, for the titles.
    """
    n_starts = table["start"].nunique()
    main = table if n_starts == 1 else table[table["start"] == (metrics.me_layer or 0) + 1]
    figures = {}
    if len(main) > 1:
        means = main.groupby("select", sort=False)["dloss"].agg(["min", "max"])
        parts = [f"{select} {row['min']:+.3f} to {row['max']:+.3f}" for select, row in means.iterrows()]
        observed = f"Δloss over the grid: {', '.join(parts)} nats a token."
        expected = "Table 5: weight-guided masks help; random and magnitude masks at the same rate hurt."
        figures["loss_change"] = Figure(_loss_plot(main, of_texts), "table 5", expected, observed)
        plot = _rate_plot(main, of_texts)
        figures["rates"] = Figure(plot, "follow-up question", "One rate a task.", observed)
    if len(main):
        assert metrics.unmasked_sink_mass is not None
        title, note = f"Loss against the sink that is left: {of_texts}", "Whiskers: 95% intervals over texts."
        cells, sink_mass = main.assign(label=main["cell"]), metrics.unmasked_sink_mass
        plot = loss_over_sinks(cells, sink_mass=sink_mass, colors=SELECT_COLORS, title=title, note=note)
        expected = "Moderate attenuation of the sink helps; none and full do not."
        figures["loss_and_sinks"] = Figure(plot, "section 4", expected, _moderation_in_words(main))
        plot = _block_plot(main, by_block, metrics.me_layer, of_texts)
        expected = "The mask weakens the sink and relaxes token 0."
        figures["by_block"] = Figure(plot, "figure 8", expected, _relaxed_in_words(main, by_block, metrics))
    if n_starts > 1:
        plot = _start_plot(table, metrics.me_layer, of_texts)
        expected = "The mask is applied from the ME layer on, nowhere else."
        figures["starts"] = Figure(plot, "follow-up question", expected, f"{n_starts} blocks to start at.")
    return figures


def nearest_paper_rate(table: pd.DataFrame) -> pd.DataFrame:
    """Choose one mask of each selection, for figures that show few: the first of those nearest the paper's rate."""
    nearest = (table["rate"] - PAPER_RATE).abs().to_numpy().argsort(kind="stable")
    return table.iloc[nearest].drop_duplicates("select").sort_index()


def configuration_in_words(row: dict[Any, Any]) -> str:
    """Say what a configuration does: "Δloss +0.012 (+0.003 to +0.021), p = 0.01, KL 0.021 nats, sink mass × 0.61"."""
    words = f"Δloss {with_interval(row['dloss'], (row['dloss_low'], row['dloss_high']), '+.3f')}"
    if not pd.isna(row["dloss_ties_low"]):
        words += f", {row['dloss_ties_low']:+.3f} to {row['dloss_ties_high']:+.3f} by other choices among equal gains"
    words += "" if pd.isna(row["p_holm"]) else f", p = {row['p_holm']:.2g}"
    words += f", KL {row['kl']:.3f} nats"
    words += "" if np.isnan(row["sink_ratio"]) else f", sink mass × {row['sink_ratio']:.2f}"
    hits = row["massive_hits"]
    return words + ("" if pd.isna(hits) else f", the massive dim masked in {hits:.0f} of {row['n_blocks']} blocks")


# --- Plots of the table -----------------------------------------------------------------------------------------------


def _loss_plot(table: pd.DataFrame, of_texts: str) -> go.Figure:
    maps = []
    for (site, layers), group in table.groupby(["site", "layers"], sort=False):
        wide = group.pivot_table(index="select", columns="rate", values="dloss", aggfunc="mean", sort=False)
        wide = wide[sorted(wide.columns)]
        rates = [f"{rate:g}" for rate in wide.columns]
        maps.append(Heatmap(f"{site}, layers {layers}", wide.to_numpy(), rates, list(wide.index), "rate", ""))
    n_seeds = table.loc[table["select"] == "random", "seed"].nunique()
    note = "Nats a token over the unmasked model on the same tokens."
    note += f" Random: mean over {n_seeds} seeds." if n_seeds > 1 else ""
    return loss_changes(maps, title=f"Change of the loss: {of_texts}", note=note)


def _rate_plot(table: pd.DataFrame, of_texts: str) -> go.Figure:
    panels = []
    for (site, layers), group in table.groupby(["site", "layers"], sort=False):
        of_selects = dict(iter(group.groupby("select")))
        shown = [select for select in SELECT_COLORS if select in of_selects]
        curves = [Curve(each, _mean_points(of_selects[each], "rate", "dloss"), SELECT_COLORS[each]) for each in shown]
        panels.append(Panel(f"{site}, layers {layers}", "Δloss (nats a token)", curves, None, zero_line=True))
    note = "Bands: 95% intervals over texts; for random masks the mean of each seed's."
    rates = {"type": "log", "title": {"text": "mask rate"}, **log_ticks(table["rate"])}
    return curves_by_block(panels, title=f"Loss by mask rate: {of_texts}", note=note, columns=3, x_axis=rates)


def _block_plot(table: pd.DataFrame, by_block: pd.DataFrame, me_layer: int | None, of_texts: str) -> go.Figure:
    """Draw what attention looks like block by block, for one mask of each selection, next to none."""
    shown = nearest_paper_rate(table)
    lines = [(UNMASKED, "#444444"), *zip(shown["cell"], shown["select"].map(SELECT_COLORS), strict=True)]
    panels = []
    for quantity, text in _QUANTITIES.items():
        points = by_block.rename(columns={quantity: "mean"})[["cell", "layer", "mean"]].dropna()
        if len(points):
            curves = [Curve(name, points[points["cell"] == name], color) for name, color in lines]
            y_title = "cosine" if text.startswith("cosine") else text
            panels.append(Panel(text.capitalize(), y_title, curves, me_layer))
    note = "Cosines: mean over pairs of texts that begin differently."
    if by_block["entropy"].notna().any():
        note = f"Entropy and rank: the first two texts, 96 tokens. {note}"
    return curves_by_block(panels, title=f"Attention by block: {of_texts}", note=note)


def _start_plot(table: pd.DataFrame, me_layer: int | None, of_texts: str) -> go.Figure:
    panels = []
    for quantity, text in (("dloss", "Δloss (nats a token)"), ("sink_ratio", "sink mass, relative to unmasked")):
        groups = table.groupby(["select", "site", "layers", "rate"], sort=False)
        curves = []
        for ((select, site, layers, rate), group), color in zip(groups, cycle(COLORS), strict=False):
            name = f"{select}, {site}, layers {layers}, rate {rate:g}"
            curves.append(Curve(name, _mean_points(group, "start", quantity), color))
        panels.append(Panel("", text, curves, me_layer, zero_line=quantity == "dloss"))
    note = "Bands: 95% intervals over texts. Sink mass: mean over the blocks behind the ME layer."
    plot = curves_by_block(panels, title=f"The same mask from each block in turn: {of_texts}", note=note)
    plot.update_xaxes(title_text="first masked block (0-based)")
    return plot


def _mean_points(group: pd.DataFrame, x: str, quantity: str) -> pd.DataFrame:
    """Average a quantity and the ends of its interval over seeds, as a `Curve` has its points."""
    points = group.groupby(x)[[quantity, f"{quantity}_low", f"{quantity}_high"]].mean().reset_index()
    return points.set_axis(["layer", "mean", "low", "high"], axis=1)


def _moderation_in_words(table: pd.DataFrame) -> str:
    best = table.iloc[table["dloss"].argmin()]
    words = f"The lowest loss is with {best['cell']}: {configuration_in_words(best.to_dict())}."
    if best["dloss"] >= 0:
        return f"No mask lowers the loss. {words}"
    return f"{words} The lowest of {len(table)} is low by chance too." if len(table) > 1 else words


def _relaxed_in_words(table: pd.DataFrame, by_block: pd.DataFrame, metrics: MaskGridMetrics) -> str:
    name = nearest_paper_rate(table)["cell"].iloc[0]
    behind = by_block[by_block["layer"].isin(metrics.sink_layers)].groupby("cell").mean(numeric_only=True)
    before, after = behind.loc[UNMASKED], behind.loc[name]
    if np.isnan(before["sink_mass"]):
        return "No block behind the ME layer has attention."
    words = f"{name}: sink mass {before['sink_mass']:.3f} to {after['sink_mass']:.3f}"
    if metrics.text_first_tokens == 1:
        return f"{words}; all texts share their first token, so that token 0 is the same in each by construction."
    for quantity, what in (("input_cosine", "attention input"), ("key_cosine", "key")):
        if not np.isnan(before[quantity] + after[quantity]):
            words += f"; cosine of token 0's {what} between texts {before[quantity]:.4f} to {after[quantity]:.4f}"
    return f"{words}."


# --- One mask on the model --------------------------------------------------------------------------------------------


def attention_figure(study: Study, mask: WeMask, name: str, block: int, tokens: Int[Tensor, " pos"]) -> Figure:
    """Draw the attention maps of a block, without a mask and with it (figure 8).

    Args:
        study, mask, name: which model, which mask, and what it is called.
        block: has an attention pattern.
        tokens: the beginning of a text.
    """
    probe = AttentionMaps([block])
    unmasked = trace(study.model, [tokens], [probe]).tensors[probe.name][0, 0].numpy()
    with mask.applied(study.model):
        masked = trace(study.model, [tokens], [probe]).tensors[probe.name][0, 0].numpy()
    tokenizer = study.model.tokenizer
    ids = tokens.tolist()
    words = [f"{at} {i if tokenizer is None else repr(tokenizer.decode([i]))}" for at, i in enumerate(ids)]
    title = f"Attention in block {block}: {study.trace.model['name']}"
    note = f"{name}; the first {len(tokens)} tokens of a text."
    plot = attention_change(unmasked, masked, words, title=title, note=note)
    before, after = (float(maps[:, 1:, 0].mean()) for maps in (unmasked, masked))
    observed = f"Attention on token 0 in block {block}, mean over heads: {before:.3f} without the mask, "
    observed += f"{after:.3f} with it."
    return Figure(plot, "figure 8", "The sink is weakened, not removed.", observed)


def key_figure(before: Float[Tensor, " d_keys"], after: Float[Tensor, " d_keys"], where: str, name: str) -> Figure:
    """Draw the key of token 0 without a mask and with it (section 4).

    Args:
        before, after: the heads' keys one after the other.
        where: block and model, for the title.
        name: of the mask.
    """
    plot = vectors_by_dim(
        {"without the mask": before.numpy(), "with it": after.numpy(), "difference": (after - before).numpy()},
        title=f"Key of token 0 in {where}",
        note=f"{name}. The heads' keys one after the other.",
    )
    plot.update_xaxes(title_text="dim of the keys", row=3, col=1)
    cosine = float(torch.nn.functional.cosine_similarity(before, after, dim=0))
    angle, size = math.degrees(math.acos(max(-1, min(1, cosine)))), float(after.norm() / before.norm())
    observed = f"The key turns by {angle:.1f}° and keeps {size:.2f} of its norm."
    return Figure(plot, "section 4", "The mask relaxes the rigidity of the massive token.", observed)
