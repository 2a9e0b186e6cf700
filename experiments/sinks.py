"""Where attention sinks start, and what becomes of the rank of attention and hidden states: figure 7, section 6."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

import melens
from experiments.options.schema import SinksOptions
from experiments.runner.study import Study
from melens import AttentionMaps, AttentionSpectrum, MelensError, Probe, Spectrum
from melens.analysis.sink_mass import (
    SINK_THRESHOLD,
    SinkOnset,
    find_sink_onset,
    heard_layers,
    sink_mass_by_head,
    sink_mass_by_layer,
)
from melens.analysis.statistics import bootstrap_mean, mean_by, with_interval
from melens.figures.attention import attention_maps
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.heatmaps import Heatmap, heatmap_over_curves
from melens.figures.style import BLOCK, COLORS, FIRST, SINK
from melens.models.layout import Layout
from melens.report.result import Figure, Result
from melens.tracing.trace import Progress

PATTERN = "attn.hook_pattern"


def probes(model: TransformerBridge, options: SinksOptions) -> list[Probe]:
    """Everything that needs all prompts is in the default probes."""
    return []


def run(study: Study, options: SinksOptions) -> Result:
    """Find the sinks by block and head, draw the maps of the blocks around the ME layer, and measure ranks."""
    layout = Layout.of(study.model).as_heard(heard_layers(study.trace))
    if "sink_mass" not in study.trace.tables:
        raise MelensError(f"Sinks cannot be looked for: there is {layout.attention_in_words}.")
    of_carriers = study.of_carriers(study.trace["sink_mass"])
    trace = replace(study.trace, tables={"sink_mass": of_carriers})
    by_layer = sink_mass_by_layer(trace)
    by_head = sink_mass_by_head(trace)
    onset = find_sink_onset(trace, trailing_blocks=study.me.criterion.trailing_blocks)
    ranks = _ranks(study, options)
    metrics = study.metrics(
        sink_onset_layer=onset.layer,
        first_sink_layer=onset.first_layer,
        **layout.metrics(),
        **_sink_mass_metrics(study, of_carriers, layout),
        **_rank_metrics(study, ranks, layout),
        rank_prompts=int(ranks["prompt"].nunique()) if len(ranks) else 0,
    )
    here = _sinks_in_words(metrics, onset, layout)
    pictures = {"sink_mass": _sink_mass_picture(study, by_head, by_layer, here)}
    if (maps := _maps_picture(study, options)) is not None:
        pictures = {"attention_maps": maps, **pictures}
    tables = {"sink_mass_by_head": by_head, "sinks_by_block": by_layer}
    if len(ranks):
        tables["rank_by_block"] = _rank_summary(ranks)
        pictures["rank"] = _rank_picture(study, tables["rank_by_block"], metrics, options)
    why_not = f"Not measured: no prompt has {options.rank_tokens} tokens (exp.rank_tokens)."
    if not len(ranks):
        metrics["why_not"] = why_not
    findings = [("sinks", here), ("rank", _ranks_in_words(metrics) if len(ranks) else why_not)]
    return Result("sinks", study.trace.model, metrics, tables, pictures, findings)


def _sink_mass_metrics(study: Study, sink_mass: pd.DataFrame, layout: Layout) -> dict[str, Any]:
    if study.me.layer is None:
        return {}
    mass = sink_mass.groupby(["layer", "prompt"])["sink_mass"].mean()
    layers = mass.index.get_level_values("layer")
    metrics: dict[str, Any] = {}
    for name, layer in (("at_me_layer", study.me.layer), ("after", layout.next_attention(study.me.layer))):
        if layer is not None and layer in layers:
            of_prompts = mass[layer].to_numpy()
            metrics[f"sink_mass_{name}"] = float(of_prompts.mean())
            metrics[f"sink_mass_{name}_interval"] = bootstrap_mean(of_prompts)
    return metrics


def _sink_mass_picture(study: Study, by_head: pd.DataFrame, by_layer: pd.DataFrame, here: str) -> Figure:
    wide = by_head.pivot(index="head", columns="layer", values="sink_mass")
    heads = Heatmap("Sink mass by block and head", wide.to_numpy(), list(wide.columns), list(wide.index), BLOCK, "head")
    share = by_layer.assign(mean=by_layer["share_of_heads"])[["layer", "mean"]]
    curves = [
        Curve("sink mass, mean and 10% to 90% of heads", by_layer, SINK),
        Curve(f"share of heads over {SINK_THRESHOLD:g}", share, FIRST),
    ]
    figure = heatmap_over_curves(
        heads,
        Panel("By block", "share", curves, study.me.layer, y_range=(0, 1)),
        title=study.title("Attention that later tokens pay to position 0"),
        z_title="sink mass",
    )
    return Figure(figure, "section 6", "Sinks start in the block after the ME layer, in many heads at once.", here)


def _maps_picture(study: Study, options: SinksOptions) -> Figure | None:
    """Draw figure 7 for the shortest prompt with enough tokens, cut to `exp.map_tokens`."""
    blocks = _map_blocks(study)
    lengths = [len(ids) for ids in study.tokens]
    chosen = min(
        range(len(lengths)), key=lambda row: (lengths[row] < options.map_tokens, abs(lengths[row] - options.map_tokens))
    )
    tokens = torch.tensor(study.tokens[chosen][: options.map_tokens])
    if not blocks:
        return None
    probe = AttentionMaps(blocks)
    trace = melens.trace(study.model, [tokens], [probe])
    maps = trace.tensors["attention_maps"][0]  # [layer, head, query, key]
    words = _token_labels(study, tokens.tolist())
    figure = attention_maps(
        {
            f"block {block}" + (" (ME layer)" if block == study.me.layer else ""): maps[i].numpy()
            for i, block in enumerate(blocks)
        },
        words,
        title=study.title("Attention maps", 1),
        note=f"Prompt {study.trace.prompts['id'][chosen]}, its first {len(tokens)} tokens. Choose a head in the list.",
    )
    on_first = [float(maps[i, :, 1:, 0].mean()) for i in range(len(blocks))]
    here = "Mean attention on token 0: " + ", ".join(
        f"{mass:.2f} in block {block}" for mass, block in zip(on_first, blocks, strict=True)
    )
    return Figure(
        figure, "figure 7", "The ME layer has no sink yet; in the next block one column takes it all.", f"{here}."
    )


def _map_blocks(study: Study) -> list[int]:
    """Choose the ME layer and the next block; of a hybrid the last with attention up to it and the first behind."""
    with_pattern = [layer for layer in range(study.n_layers) if f"blocks.{layer}.{PATTERN}" in study.model.hook_dict]
    middle = study.n_layers // 2 if study.me.layer is None else study.me.layer
    before, behind = ([layer for layer in with_pattern if (layer > middle) == is_behind] for is_behind in (False, True))
    return before[-1:] + behind[:1]


def _token_labels(study: Study, tokens: list[int]) -> list[str]:
    tokenizer = study.model.tokenizer
    texts = [str(token) if tokenizer is None else tokenizer.decode([token]) for token in tokens]
    return [
        f"{position} {text!r}" if tokenizer is not None else f"{position}: {text}"
        for position, text in enumerate(texts)
    ]


# --- Rank -------------------------------------------------------------------------------------------------------------


def _ranks(study: Study, options: SinksOptions) -> pd.DataFrame:
    """Measure effective ranks on prompts cut to one length: `prompt`, `layer`, `of`, `effective_rank`, `first_share`.

    A rank grows with the number of tokens, so prompts that are shorter stay out.
    """
    long_enough = _across_tasks(study, options)
    if not long_enough:
        return pd.DataFrame(columns=["prompt", "layer", "of", "effective_rank", "first_share"])
    cut = [torch.tensor(study.tokens[prompt][: options.rank_tokens]) for prompt in long_enough]
    probes: list[Probe] = [Spectrum()]
    if _map_blocks(study):
        probes.append(AttentionSpectrum())
    for probe in probes:
        probe.may_miss = True
    progress: Progress = study.stage("ranks: tokens")
    trace = melens.trace(study.model, cut, probes, progress=progress, max_batch_tokens=options.rank_tokens)
    columns = ["prompt", "layer", "effective_rank", "first_share"]
    tables = [trace["spectrum"][columns].assign(of="hidden states")]
    if "attention_spectrum" in trace.tables:
        attention = trace["attention_spectrum"]
        _check_ranks(attention)  # before a mean over heads leaves NaN out
        by_prompt = attention.groupby(["prompt", "layer"])[columns[2:]].mean().reset_index()
        tables.append(by_prompt.assign(of="attention"))
    ranks = pd.concat(tables, ignore_index=True)
    _check_ranks(ranks)
    return ranks


def _check_ranks(ranks: pd.DataFrame) -> None:
    for row in ranks[~np.isfinite(ranks["effective_rank"])].head(1).to_dict("records"):
        raise MelensError(
            f"The effective rank of block {row['layer']} is {row['effective_rank']} in prompt {row['prompt']}: look "
            "for NaN in the model's weights, or load it in float32."
        )


def _across_tasks(study: Study, options: SinksOptions) -> list[int]:
    """Choose `exp.rank_prompts` prompts of enough tokens, one task type after the other."""
    prompts = study.of_carriers(study.trace.prompts)
    prompts = prompts[prompts["n_tokens"] >= options.rank_tokens]
    turn = prompts.groupby(prompts["task"].fillna(""))["prompt"].rank().to_numpy()
    chosen: list[int] = prompts.assign(turn=turn).sort_values("turn", kind="stable")["prompt"].tolist()
    return chosen[: options.rank_prompts]


def _rank_summary(ranks: pd.DataFrame) -> pd.DataFrame:
    quantities = ("effective_rank", "first_share")
    return pd.concat([mean_by(ranks, name, ("of", "layer")).assign(quantity=name) for name in quantities])


def _rank_metrics(study: Study, ranks: pd.DataFrame, layout: Layout) -> dict[str, Any]:
    """Compare the mean effective rank after the ME layer with that before, prompt by prompt.

    Attention in the ME layer itself still reads states without the massive activation: it counts as before.
    """
    metrics: dict[str, Any] = {}
    if study.me.layer is None:
        return metrics
    for of, name, first_after in (
        ("attention", "attention", study.me.layer + 1),
        ("hidden states", "hidden", study.me.layer),
    ):
        table = ranks[(ranks["of"] == of) & (ranks["layer"] <= study.last_lasting)]
        is_after = table["layer"] >= first_after
        after = table[is_after].groupby("prompt")["effective_rank"].mean()
        before = table[~is_after].groupby("prompt")["effective_rank"].mean()
        if len(after) and len(before):  # a massive activation of block 0 leaves no block before
            ratio = (after / before).to_numpy(dtype=float)
            metrics |= {
                f"{name}_rank_before": float(before.mean()),
                f"{name}_rank_after": float(after.mean()),
                f"{name}_rank_ratio": float(ratio.mean()),
                f"{name}_rank_ratio_interval": bootstrap_mean(ratio),
            }
        elif len(ranks):
            where = f": there is {layout.attention_in_words}" if of == "attention" else ""
            metrics[f"{name}_rank_ratio_why_not"] = f"Nothing lies both before and after the ME layer{where}."
    return metrics


def _rank_picture(study: Study, summary: pd.DataFrame, metrics: dict[str, Any], options: SinksOptions) -> Figure:
    texts = {"effective_rank": "effective rank", "first_share": "share of the first singular value"}
    panels = []
    for of, color in zip(("attention", "hidden states"), COLORS, strict=False):
        for quantity, text in texts.items():
            points = summary[(summary["of"] == of) & (summary["quantity"] == quantity)]
            if len(points):
                y_range = (0.0, 1.0) if quantity == "first_share" else None
                title = f"{of.capitalize()}: {text}"
                panels.append(Panel(title, text, [Curve(of, points, color)], study.me.layer, y_range=y_range))
    note = (
        f"The first {options.rank_tokens} tokens of each prompt; attention: mean over heads. Bands: 95% bootstrap "
        "intervals over prompts."
    )
    figure = curves_by_block(panels, title=study.title("Rank by block", metrics["rank_prompts"]), note=note)
    paper = "Attention weights and hidden states both collapse to low rank after the ME layer."
    return Figure(figure, "section 6", paper, _ranks_in_words(metrics))


def _sinks_in_words(metrics: dict[str, Any], onset: SinkOnset, layout: Layout) -> str:
    if onset.layer is not None:
        words = f"Sinks last from block {onset.layer} on."
    else:
        words = "No sink lasts." if onset.looked_at else "Attention is in the last blocks alone, which count apart."
    if onset.first_layer not in (None, onset.layer):
        words += f" The first are in block {onset.first_layer}."
    is_hybrid = len(layout.attention) < layout.n_layers
    if "sink_mass_at_me_layer" in metrics and "sink_mass_after" in metrics:
        words += (
            f" Mean sink mass: {metrics['sink_mass_at_me_layer']:.3f} in the ME layer, "
            f"{metrics['sink_mass_after']:.3f} in the next{' with attention' if is_hybrid else ''}."
        )
    return f"{words} There is {layout.attention_in_words}." if is_hybrid else words


def _ranks_in_words(metrics: dict[str, Any]) -> str:
    parts = []
    for name, what in (("attention", "of attention"), ("hidden", "of the hidden states")):
        if f"{name}_rank_ratio" in metrics:
            ratio = with_interval(metrics[f"{name}_rank_ratio"], metrics[f"{name}_rank_ratio_interval"], ".2f")
            parts.append(
                f"{what} {metrics[f'{name}_rank_before']:.3g} before and {metrics[f'{name}_rank_after']:.3g} after "
                f"(ratio {ratio})"
            )
    if parts:
        return f"Effective rank {' and '.join(parts)}."
    return str(metrics.get("hidden_rank_ratio_why_not", "Without an ME layer there is no before and after."))
