"""Where attention sinks start, and what becomes of the rank of attention and hidden states: figure 7, section 6.

    result = melens.analysis.sinks(study)
    result.figures["sink_mass"]

1. The sink mass of every block and head comes with the study's trace (`SinkMass`), and shows where they start.
2. Figure 7's maps take one further pass over one prompt: a pattern is quadratic in its length.
3. Ranks take another, over prompts cut to one length: a rank grows with the number of tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from melens.analysis import sink_mass as masses
from melens.analysis.sink_mass import SINK_THRESHOLD, SinkOnset
from melens.analysis.statistics import mean_by, mean_metric, with_interval
from melens.analysis.study import Study
from melens.claims.engine import Claim, Judgement, Verdict, at_most
from melens.errors import MelensError
from melens.figures.attention import attention_maps
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.heatmaps import Heatmap, heatmap_over_curves
from melens.figures.style import BLOCK, COLORS, FIRST, SINK
from melens.models.layout import Layout
from melens.report.result import Figure, Interval, Metrics, Result
from melens.tracing.probes import AttentionMaps, AttentionSpectrum, Probe, Spectrum
from melens.tracing.trace import trace

__all__ = ["CLAIMS", "SinksMetrics", "sinks"]

PATTERN = "attn.hook_pattern"
RANK_TEXTS = {"effective_rank": "effective rank", "first_share": "share of the first singular value"}


class SinksMetrics(Metrics):
    """What `sinks` measures.

    Attributes:
        sink_onset_layer, first_sink_layer: as `SinkOnset`.
        sink_mass_at_me_layer, sink_mass_after: attention that later tokens pay to token 0, mean over heads and prompts,
            in the ME layer and in the next block with attention.
        attention_rank_before, attention_rank_after, attention_rank_ratio: effective rank of the attention matrices
            before and after the ME layer, and the mean over prompts of after / before.
        hidden_rank_before, hidden_rank_after, hidden_rank_ratio: the same of all tokens' hidden states.
        rank_prompts: on how many prompts ranks were measured.
    """

    experiment = "sinks"
    sink_onset_layer: int | None = None
    first_sink_layer: int | None = None
    sink_mass_at_me_layer: float | None = None
    sink_mass_at_me_layer_interval: Interval | None = None
    sink_mass_after: float | None = None
    sink_mass_after_interval: Interval | None = None
    attention_rank_before: float | None = None
    attention_rank_after: float | None = None
    attention_rank_ratio: float | None = None
    attention_rank_ratio_interval: Interval | None = None
    attention_rank_ratio_why_not: str | None = None
    hidden_rank_before: float | None = None
    hidden_rank_after: float | None = None
    hidden_rank_ratio: float | None = None
    hidden_rank_ratio_interval: Interval | None = None
    hidden_rank_ratio_why_not: str | None = None
    rank_prompts: int = 0


def sinks(study: Study, *, map_tokens: int = 40, rank_tokens: int = 128, rank_prompts: int = 8) -> Result:
    """Find the sinks by block and head, draw the maps of the blocks around the ME layer, and measure ranks.

    Args:
        study: as `melens.study` makes it.
        map_tokens: of the prompt whose attention maps are drawn.
        rank_tokens: ranks are measured on prompts cut to this length; shorter ones stay out.
        rank_prompts: on at most so many.

    Returns:
        Metrics `SinksMetrics`; the figures `attention_maps` (figure 7), `sink_mass` and `rank` (section 6).

    Raises:
        MelensError: a model without attention that can be measured, or a rank that is NaN.
    """
    layout = study.layout.as_measured(masses.measured_layers(study.trace))
    if "sink_mass" not in study.trace.tables:
        raise MelensError(f"Sinks cannot be looked for: there is {layout.attention_in_words}.")
    sink_mass = study.of_massive_prompts(study.trace["sink_mass"])
    of_massive = replace(study.trace, tables={"sink_mass": sink_mass})
    by_layer, by_head = masses.sink_mass_by_layer(of_massive), masses.sink_mass_by_head(of_massive)
    onset = masses.find_sink_onset(of_massive, trailing_blocks=study.me.criterion.trailing_blocks)
    ranks = _ranks(study, rank_tokens, rank_prompts)
    why_not = f"Not measured: no prompt has {rank_tokens} tokens (exp.rank_tokens)."
    metrics = study.metrics(
        SinksMetrics,
        sink_onset_layer=onset.layer,
        first_sink_layer=onset.first_layer,
        rank_prompts=ranks["prompt"].nunique(),
        **layout.metrics(),
        **_mass_around_me_layer(study, sink_mass, layout),
        **_compared_ranks(study, ranks, layout) if len(ranks) else {"why_not": why_not},
    )
    observed = _sinks_in_words(metrics, onset, layout)
    figures = {"sink_mass": _sink_mass_figure(study, by_head, by_layer, observed)}
    if (maps := _maps_figure(study, map_tokens)) is not None:
        figures = {"attention_maps": maps, **figures}
    tables = {"sink_mass_by_head": by_head, "sinks_by_block": by_layer}
    if len(ranks):
        by_block = [mean_by(ranks, name, ("of", "layer")).assign(quantity=name) for name in RANK_TEXTS]
        tables["rank_by_block"] = pd.concat(by_block)
        figures["rank"] = _rank_figure(study, tables["rank_by_block"], metrics, rank_tokens)
    findings = [("sinks", observed), ("rank", _ranks_in_words(metrics) if len(ranks) else why_not)]
    return Result("sinks", study.trace.model, metrics, tables, figures, findings)


# --- Sink mass --------------------------------------------------------------------------------------------------------


def _mass_around_me_layer(study: Study, sink_mass: pd.DataFrame, layout: Layout) -> dict[str, Any]:
    if study.me.layer is None:
        return {}
    means = sink_mass.groupby(["layer", "prompt"])["sink_mass"].mean()
    of_layer: dict[Any, pd.Series] = dict(iter(means.groupby("layer")))
    blocks = {"sink_mass_at_me_layer": study.me.layer, "sink_mass_after": layout.next_attention(study.me.layer)}
    measured: dict[str, Any] = {}
    for name, layer in blocks.items():
        if layer in of_layer:
            measured |= mean_metric(name, of_layer[layer].to_numpy())
    return measured


def _sink_mass_figure(study: Study, by_head: pd.DataFrame, by_layer: pd.DataFrame, observed: str) -> Figure:
    wide = by_head.pivot(index="head", columns="layer", values="sink_mass")
    heads = Heatmap("Sink mass by block and head", wide.to_numpy(), list(wide.columns), list(wide.index), BLOCK, "head")
    share = by_layer.assign(mean=by_layer["share_of_heads"])[["layer", "mean"]]
    mass = Curve("sink mass, mean and 10% to 90% of heads", by_layer, SINK)
    curves = [mass, Curve(f"share of heads over {SINK_THRESHOLD:g}", share, FIRST)]
    panel = Panel("By block", "share", curves, study.me.layer, y_range=(0, 1))
    title = study.title("Attention that later tokens pay to position 0")
    plot = heatmap_over_curves(heads, panel, title=title, z_title="sink mass")
    expected = "Sinks start in the block after the ME layer, in many heads at once."
    return Figure(plot, "section 6", expected, observed)


def _sinks_in_words(metrics: SinksMetrics, onset: SinkOnset, layout: Layout) -> str:
    words = "No sink lasts." if onset.looked_at else "Attention is in the last blocks alone, which count apart."
    if onset.layer is not None:
        words = f"Sinks last from block {onset.layer} on."
    if onset.first_layer not in (None, onset.layer):
        words += f" The first are in block {onset.first_layer}."
    is_hybrid = len(layout.attention) < layout.n_layers
    if metrics.sink_mass_at_me_layer is not None and metrics.sink_mass_after is not None:
        words += (
            f" Mean sink mass: {metrics.sink_mass_at_me_layer:.3f} in the ME layer, {metrics.sink_mass_after:.3f} in "
            f"the next{' with attention' if is_hybrid else ''}."
        )
    return f"{words} There is {layout.attention_in_words}." if is_hybrid else words


# --- Maps -------------------------------------------------------------------------------------------------------------


def _maps_figure(study: Study, map_tokens: int) -> Figure | None:
    """Draw figure 7 for the shortest prompt with `map_tokens`, cut to these; None where no block has a pattern."""
    blocks = _blocks_around_me_layer(study)
    if not blocks:
        return None
    lengths = [len(ids) for ids in study.tokens]
    chosen = min(range(len(lengths)), key=lambda row: (lengths[row] < map_tokens, abs(lengths[row] - map_tokens)))
    tokens = study.tokens[chosen][:map_tokens]
    maps = trace(study.model, [tokens], [AttentionMaps(blocks)]).tensors["attention_maps"][0]  # [layer, head, q, k]
    by_block, on_first = {}, []
    for block, of_block in zip(blocks, maps, strict=True):
        by_block[f"block {block}" + " (ME layer)" * (block == study.me.layer)] = of_block.numpy()
        on_first.append(f"{float(of_block[:, 1:, 0].mean()):.2f} in block {block}")
    tokenizer, ids = study.model.tokenizer, tokens.tolist()
    labels = [f"{at}: {i}" if tokenizer is None else f"{at} {tokenizer.decode([i])!r}" for at, i in enumerate(ids)]
    note = f"Prompt {study.trace.prompts['id'][chosen]}, its first {len(tokens)} tokens. Choose a head in the list."
    plot = attention_maps(by_block, labels, title=study.title("Attention maps", 1), note=note)
    expected = "The ME layer has no sink yet; in the next block one column takes it all."
    return Figure(plot, "figure 7", expected, f"Mean attention on token 0: {', '.join(on_first)}.")


def _blocks_around_me_layer(study: Study) -> list[int]:
    """Choose the ME layer and the next block; of a hybrid the last with attention up to it and the first behind."""
    with_pattern = [layer for layer in range(study.n_layers) if f"blocks.{layer}.{PATTERN}" in study.model.hook_dict]
    middle = study.n_layers // 2 if study.me.layer is None else study.me.layer
    before = [layer for layer in with_pattern if layer <= middle]
    behind = [layer for layer in with_pattern if layer > middle]
    return before[-1:] + behind[:1]


# --- Rank -------------------------------------------------------------------------------------------------------------


def _ranks(study: Study, rank_tokens: int, rank_prompts: int) -> pd.DataFrame:
    """Measure effective ranks on prompts of one length: `prompt`, `layer`, `of`, `effective_rank`, `first_share`."""
    columns = ["prompt", "layer", "effective_rank", "first_share"]
    chosen = _across_tasks(study, rank_tokens)[:rank_prompts]
    if not chosen:
        return pd.DataFrame(columns=[*columns, "of"])
    probes: list[Probe] = [Spectrum(), *([AttentionSpectrum()] if _blocks_around_me_layer(study) else [])]
    for probe in probes:
        probe.may_miss = True
    cut = [study.tokens[prompt][:rank_tokens] for prompt in chosen]
    progress = study.stage("ranks: tokens")
    found = trace(study.model, cut, probes, progress=progress, max_batch_tokens=rank_tokens)
    tables = [found["spectrum"][columns].assign(of="hidden states")]
    if "attention_spectrum" in found.tables:
        attention = found["attention_spectrum"]
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


def _across_tasks(study: Study, rank_tokens: int) -> list[int]:
    """List the prompts of enough tokens, one task type after the other."""
    prompts = study.of_massive_prompts(study.trace.prompts)
    prompts = prompts[prompts["n_tokens"] >= rank_tokens]
    turn = prompts.groupby(prompts["task"].fillna(""))["prompt"].rank().to_numpy()
    return prompts.assign(turn=turn).sort_values("turn", kind="stable")["prompt"].tolist()


def _compared_ranks(study: Study, ranks: pd.DataFrame, layout: Layout) -> dict[str, Any]:
    """Compare the mean effective rank after the ME layer with that before, prompt by prompt."""
    if study.me.layer is None:
        return {}
    measured: dict[str, Any] = {}
    for name, of, first_after, why_not in (
        # attention in the ME layer itself still reads states without the massive activation: it counts as before
        ("attention_rank", "attention", study.me.layer + 1, f": there is {layout.attention_in_words}"),
        ("hidden_rank", "hidden states", study.me.layer, ""),
    ):
        table = ranks[(ranks["of"] == of) & (ranks["layer"] <= study.last_before_trailing)]
        is_after = table["layer"] >= first_after
        before, after = (table[side].groupby("prompt")["effective_rank"].mean() for side in (~is_after, is_after))
        if len(before) and len(after):
            measured |= {f"{name}_before": float(before.mean()), f"{name}_after": float(after.mean())}
            measured |= mean_metric(f"{name}_ratio", (after / before).to_numpy(dtype=float))
        else:  # a massive activation of block 0 leaves no block before
            measured[f"{name}_ratio_why_not"] = f"Nothing lies both before and after the ME layer{why_not}."
    return measured


def _rank_figure(study: Study, by_block: pd.DataFrame, metrics: SinksMetrics, rank_tokens: int) -> Figure:
    panels = []
    for of, color in zip(("attention", "hidden states"), COLORS, strict=False):
        for quantity, text in RANK_TEXTS.items():
            points = by_block[(by_block["of"] == of) & (by_block["quantity"] == quantity)]
            if len(points):
                y_range = (0.0, 1.0) if quantity == "first_share" else None
                title = f"{of.capitalize()}: {text}"
                panels.append(Panel(title, text, [Curve(of, points, color)], study.me.layer, y_range=y_range))
    bands = "Bands: 95% intervals over prompts."
    note = f"The first {rank_tokens} tokens of each prompt; attention: mean over heads. {bands}"
    plot = curves_by_block(panels, title=study.title("Rank by block", metrics.rank_prompts), note=note)
    expected = "Attention weights and hidden states both collapse to low rank after the ME layer."
    return Figure(plot, "section 6", expected, _ranks_in_words(metrics))


def _ranks_in_words(metrics: SinksMetrics) -> str:
    m = metrics
    measured = (
        ("attention", m.attention_rank_before, m.attention_rank_after,
         m.attention_rank_ratio, m.attention_rank_ratio_interval),
        ("the hidden states", m.hidden_rank_before, m.hidden_rank_after,
         m.hidden_rank_ratio, m.hidden_rank_ratio_interval),
    )  # fmt: skip
    parts = [
        f"of {what} {before:.3g} before and {after:.3g} after (ratio {with_interval(ratio, interval, '.2f')})"
        for what, before, after, ratio, interval in measured
        if ratio is not None
    ]
    if parts:
        return f"Effective rank {' and '.join(parts)}."
    return metrics.hidden_rank_ratio_why_not or "Without an ME layer there is no before and after."


# --- Claims -----------------------------------------------------------------------------------------------------------


def _starts_in_the_next_block(metrics: SinksMetrics) -> Judgement:
    onset, first = metrics.sink_onset_layer, metrics.first_sink_layer
    me_layer, last = metrics.me_layer, metrics.last_lasting_layer
    if me_layer is None or last is None:
        return Judgement("not measured", note="The result does not say where the ME layer and the last blocks are.")
    attending = range(last + 1) if metrics.attention_layers is None else metrics.attention_layers
    behind = [layer for layer in attending if me_layer < layer <= last]
    if not behind:
        return Judgement("not measured", note="No block between the ME layer and the last two has attention.")
    where = "" if behind[0] == me_layer + 1 else f"The next block with attention is {behind[0]}."
    if onset is None:
        return Judgement("does not hold", note=f"No sink lasts. {where}".strip())
    note = f"Sinks come and go before, first in block {first}." if first is not None and first < onset else ""
    steps = sum(layer <= onset for layer in behind) if onset > me_layer else onset - me_layer
    verdict: Verdict = "does not hold" if steps != 1 else "holds in part" if note else "holds"
    return Judgement(verdict, float(steps), note=f"{note} {where}".strip())


_ATTENTION_RANK = Claim(
    id="attention-rank",
    fixed="2026-11-22 a1bbeb3",
    claim="After the ME layer attention is of lower rank",
    source="section 6",
    metrics=SinksMetrics,
    figure="rank",
    statistic="effective rank of the attention matrices after the ME layer over that before",
    criterion="<= 0.5; in part < 1",
    why="a collapse is at least a halving",
    of_token_0=True,
    blocks_after=1,
    judge=lambda metrics: at_most(
        metrics.attention_rank_ratio,
        metrics.attention_rank_ratio_interval,
        0.5,
        partly=0.999,
        why_not=metrics.attention_rank_ratio_why_not or metrics.why_not,
    ),
)

CLAIMS = (
    Claim(
        id="sink-next",
        fixed="2026-11-22 a1bbeb3",
        claim="The attention sink starts in the block after the ME layer",
        source="section 6, figure 7",
        metrics=SinksMetrics,
        figure="sink_mass",
        statistic="blocks with attention from the ME layer to the first from which the mean sink mass stays over 0.3",
        criterion="1; in part: sinks before that come and go",
        why="0.3 is Gu et al.'s (2024)",
        of_token_0=True,
        blocks_after=1,
        judge=_starts_in_the_next_block,
    ),
    _ATTENTION_RANK,
    replace(
        _ATTENTION_RANK,
        id="hidden-rank",
        fixed="2026-11-22 a1bbeb3",
        claim="After the ME layer the hidden states are of lower rank",
        statistic="effective rank of all tokens' hidden states from the ME layer on over that before",
        blocks_after=0,
        judge=lambda metrics: at_most(
            metrics.hidden_rank_ratio,
            metrics.hidden_rank_ratio_interval,
            0.5,
            partly=0.999,
            why_not=metrics.hidden_rank_ratio_why_not or metrics.why_not,
        ),
    ),
)
