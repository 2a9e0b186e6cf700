"""Figures of secondary sinks: one prompt by block and token, births and lifetimes by block, rates by kind of token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import pandas as pd

from melens.analysis.me_layer import massive_activations
from melens.analysis.secondary_tables import Texts
from melens.analysis.study import Study
from melens.data.token_kinds import KINDS, token_texts
from melens.figures.bars import share_points
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.heatmaps import Heatmap, heatmap_by_block
from melens.figures.style import BLOCK, COLORS, FIRST, SINK
from melens.printing import counted, paragraph
from melens.report.result import Figure

__all__ = ["lifetimes_figure", "map_figure", "rates_figure"]


def map_figure(study: Study, texts: Texts, prompt: int, sinks: Sequence[int], n_tokens: int) -> Figure:
    """Draw |cos| with token 0's state of a prompt's tokens by block, where token 0 is massive.

    Args:
        study: of the model.
        texts: with the prompt.
        prompt: its number among them.
        sinks: positions of its secondary sinks, in order.
        n_tokens: how many tokens are drawn: token 0, these, their neighbours, and then from the start on.
    """
    ids = texts.tokens[prompt].tolist()
    near = [at for sink in sinks for at in (sink, sink - 1, sink + 1)]
    positions = sorted(list(dict.fromkeys(at for at in (0, *near, *range(len(ids))) if at < len(ids)))[:n_tokens])
    cosines = texts.trace["cosine_with_first"].query("prompt == @prompt and pos in @positions")
    wide = cosines.pivot(index="pos", columns="layer", values="cosine").abs()
    massive = massive_activations(texts.trace, study.me.criterion).query("prompt == @prompt and pos == 0")
    wide.loc[:, ~wide.columns.isin(massive["layer"])] = np.nan
    words = token_texts([ids[at] for at in positions], study.model.tokenizer)
    labels = [f"{at} {word!r}" + " ●" * (at in sinks) for at, word in zip(positions, words, strict=True)]
    heatmap = Heatmap("", wide.to_numpy(), wide.columns.tolist(), labels, BLOCK, "token")
    name = texts.trace.prompts["id"][prompt]
    note = f"Text {name}; ● is a secondary sink. Empty: token 0 is not massive there, and its direction says nothing."
    title = study.title("Tokens with the direction of token 0", 1)
    me_layer = study.me.layer
    plot = heatmap_by_block(heatmap, me_layer=me_layer, title=title, note=note, z_title="|cos|", z_range=(0, 1))
    plot.update_yaxes(dtick=1, tickfont={"size": 11})  # every token's
    observed = f"{counted(len(sinks), 'secondary sink')} in text {name}, at {', '.join(map(str, sinks[:12]))}"
    expected = "Secondary sinks align with the first token's state (Wong et al. 2025)."
    return Figure(plot, "Wong et al. (2025)", expected, f"{observed}{' …' if len(sinks) > 12 else ''}.")


def lifetimes_figure(
    study: Study, alive: pd.DataFrame, by_reader: pd.DataFrame, findings: Sequence[tuple[str, str]]
) -> Figure:
    """Draw by block how many secondary sinks are born, how many there are, and the attention on them.

    Args:
        study: of the model.
        alive: the blocks of each secondary sink, with its `kind`.
        by_reader: the attention on them by reading block.
        findings: what is seen.
    """
    blocks = range(study.last_before_trailing + 1)
    born = alive.groupby(["texts", "prompt", "pos", "kind"])["layer"].min().reset_index()
    kinds = alive.groupby("kind")["pos"].size().sort_values(ascending=False).index.tolist()
    colors = dict(zip(kinds, cycle(COLORS[3:]), strict=False))
    panels = [
        Panel(
            title, "tokens", [_count(of_panel, kind, color, blocks) for kind, color in colors.items()], study.me.layer
        )
        for title, of_panel in (("Become secondary sinks", born), ("Are secondary sinks", alive))
    ]
    if len(by_reader) and by_reader["importance"].notna().any():
        columns = ["importance", "importance_of_first", "even_attention"]
        means = by_reader.groupby("layer")[columns].mean().reindex(range(study.n_layers)).reset_index()
        names = {"importance_of_first": ("token 0", FIRST), "importance": ("secondary sinks", SINK)}
        names["even_attention"] = ("even attention", COLORS[6])
        curves = [
            Curve(name, means[["layer", column]].rename(columns={column: "mean"}), color)
            for column, (name, color) in names.items()
        ]
        panels.append(Panel("Attention on them, mean over heads", "importance", curves, study.me.layer))
    n_texts = len(alive[["texts", "prompt"]].drop_duplicates())
    title = f"Secondary sinks by block: {study.trace.model['name']}, {counted(n_texts, 'text')} with some"
    plot = curves_by_block(panels, title=title)
    expected = "They arise in middle blocks, last a variable number of blocks, and draw less attention than token 0."
    return Figure(plot, "Wong et al. (2025)", expected, paragraph(findings))


def _count(tokens: pd.DataFrame, kind: str, color: str, blocks: range) -> Curve:
    counts = tokens.loc[tokens["kind"] == kind, "layer"].value_counts().reindex(blocks, fill_value=0)
    return Curve(kind, pd.DataFrame({"layer": counts.index, "mean": counts.to_numpy()}), color)


def rates_figure(study: Study, rates: pd.DataFrame, observed: str) -> Figure:
    """Draw the share of tokens of each kind that are secondary sinks."""
    shares = rates.rename(columns={"kind": "name", "texts": "group", "rate": "mean"})
    note = "Mean over the texts that have the kind, with its exact 95% interval; each state once."
    title = f"Which tokens are secondary sinks: {study.trace.model['name']}"
    names = [kind for kind in KINDS if kind in set(shares["name"])]
    groups, x_title = list(dict.fromkeys(shares["group"])), "share of the tokens of a kind"
    plot = share_points(shares, names=names, groups=groups, x_title=x_title, title=title, note=note)
    return Figure(plot, "Sun et al. (2024)", "Delimiters and newlines, and words of little meaning.", observed)
