"""Where attention sinks start, what attention gets of token 0, and ranks: figure 7, sections 4.1 and 6.

    result = melens.analysis.sinks(study)
    result.figures["sink_mass"]

1. The sink mass of every block and head comes with the study's trace (`SinkMass`). Each input, one for each first
   token, tells for itself in which block its sink comes first: a later dip does not move it.
   `melens.analysis.sink_rate` has the rate of Gu et al. (2024), of token 0 and of every other.
2. Figure 7's maps take one further pass over one prompt: a pattern is quadratic in its length.
3. `melens.analysis.low_rank` measures ranks, `melens.analysis.attention_inputs` inputs, keys and queries.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from melens.analysis import attention_inputs, low_rank, sink_rate
from melens.analysis import sink_mass as masses
from melens.analysis.metrics import SINK_THRESHOLD
from melens.analysis.sink_mass import SinkOnset
from melens.analysis.statistics import mean_metric, share_interval, with_interval
from melens.analysis.study import Study
from melens.claims.engine import Claim, Former, Judgement, NotMeasuredError, Verdict, at_least, number
from melens.errors import MelensError
from melens.figures.attention import attention_maps
from melens.figures.curves import Curve, Panel
from melens.figures.heatmaps import Heatmap, heatmap_over_curves
from melens.figures.style import BLOCK, FIRST, SINK
from melens.models.layout import Layout
from melens.printing import paragraph
from melens.report.result import Figure, Interval, Result
from melens.tracing.attention_probes import AttentionMaps
from melens.tracing.sites import Sites
from melens.tracing.trace import trace

__all__ = ["CLAIMS", "SinksMetrics", "sinks"]

PATTERN = "attn.hook_pattern"
CONSISTENT = 0.9
"""The share of blocks that must have a sink: 'consistently' leaves one in ten out at most."""


class SinksMetrics(low_rank.LowRankMetrics, attention_inputs.AttentionInputsMetrics, sink_rate.SinkRateMetrics):
    """What `sinks` measures, with the fields of `LowRankMetrics`, `AttentionInputsMetrics` and `SinkRateMetrics`.

    A block has a sink for an input where the attention that later tokens pay to token 0, mean over heads, is over 0.3
    (in short prompts over twice that of even attention, if that is more).

    Attributes:
        sink_onset_layer, unbroken_sink_layer, first_sink_layer: as `SinkOnset`, of the mean over prompts.
        sink_inputs: how many inputs the following rest on: distinct first tokens.
        first_sinks: by block, for how many inputs the first sink is there; "none" where an input has none.
        sink_rises_next: share of inputs whose first sink is in the first block with attention behind the ME layer.
        sink_returns_next: share of inputs with a sink there and none in the ME layer, whatever was before; in a hybrid
            none in the last block with attention up to it.
        sink_rises_why_not: why neither was measured.
        sink_blocks: share of the blocks with attention behind the ME layer that have a sink, mean over inputs.
        sink_in_most_blocks: share of inputs with a sink in at least nine tenths of these blocks.
        sink_at_me_layer: share of inputs with a sink in the ME layer.
        sink_mass_at_me_layer, sink_mass_after: sink mass in the ME layer and in the next block with attention, mean
            over inputs.
    """

    experiment = "sinks"
    sink_onset_layer: int | None = None
    unbroken_sink_layer: int | None = None
    first_sink_layer: int | None = None
    sink_inputs: int | None = None
    first_sinks: dict[str, int] | None = None
    sink_rises_next: float | None = None
    sink_rises_next_interval: Interval | None = None
    sink_returns_next: float | None = None
    sink_rises_why_not: str | None = None
    sink_blocks: float | None = None
    sink_in_most_blocks: float | None = None
    sink_in_most_blocks_interval: Interval | None = None
    sink_at_me_layer: float | None = None
    sink_at_me_layer_interval: Interval | None = None
    sink_mass_at_me_layer: float | None = None
    sink_mass_at_me_layer_interval: Interval | None = None
    sink_mass_after: float | None = None
    sink_mass_after_interval: Interval | None = None


def sinks(study: Study, *, map_tokens: int = 40, rank_tokens: int = 128, rank_prompts: int = 8) -> Result:
    """Find the sinks by block and head, draw the maps of the blocks around the ME layer, and measure ranks.

    Args:
        study: as `melens.study` makes it.
        map_tokens: of the prompt whose attention maps are drawn.
        rank_tokens: ranks are measured on prompts cut to this length; shorter ones stay out.
        rank_prompts: on at most so many.

    Returns:
        Metrics `SinksMetrics`; the figures `attention_maps` (figure 7), `sink_mass`, `sink_rate`, `rank` (section
        6) and `inputs` (section 4.1).

    Raises:
        MelensError: a model without attention that can be measured, or a number that is NaN.

    Example:
        >>> result = melens.analysis.sinks(study)
        >>> sorted(result.figures)
        ['attention_maps', 'inputs', 'sink_mass', 'sink_rate']
        >>> result.figures["sink_mass"].save("sink_mass.html").name
        'sink_mass.html'
    """
    layout = study.layout.as_measured(masses.measured_layers(study.trace))
    if "sink_mass" not in study.trace.tables:
        raise MelensError(f"Sinks cannot be looked for: there is {layout.attention_in_words}.")
    of_massive = replace(study.trace, tables={"sink_mass": study.of_massive_prompts(study.trace["sink_mass"])})
    by_layer, by_head = masses.sink_mass_by_layer(of_massive), masses.sink_mass_by_head(of_massive)
    onset = masses.find_sink_onset(of_massive, trailing_blocks=study.me.criterion.trailing_blocks)
    rates = study.traced(sink_rate.probes(study.model))
    ranks = low_rank.measure_ranks(study, rank_tokens, rank_prompts)
    inputs, cosines = attention_inputs.compare_inputs(study)
    why_not = f"Not measured: no prompt has {rank_tokens} tokens (exp.rank_tokens)."
    metrics = study.metrics(
        SinksMetrics,
        sink_onset_layer=onset.layer,
        unbroken_sink_layer=onset.unbroken_layer,
        first_sink_layer=onset.first_layer,
        **layout.metrics(),
        **_sinks_by_input(study, *masses.sinks_by_state(of_massive), layout),
        **sink_rate.measure_sink_rate(rates),
        **low_rank.compare_ranks(study, ranks, layout),
        **inputs,
        **({} if len(ranks) else {"why_not": why_not}),
    )
    findings = _sinks_in_words(metrics, onset, layout)
    figures = {"sink_mass": _sink_mass_figure(study, by_head, by_layer, paragraph(findings))}
    if (maps := _maps_figure(study, map_tokens)) is not None:
        figures = {"attention_maps": maps, **figures}
    by_block, observed_rate = sink_rate.sink_rate_by_block(rates), sink_rate.sink_rate_in_words(metrics)
    if (rate := sink_rate.sink_rate_figure(study, by_block, observed_rate)) is not None:
        figures["sink_rate"] = rate
    tables = {"sink_mass_by_head": by_head, "sinks_by_block": by_layer, "sink_rate_by_block": by_block}
    findings.append(("sink rate", observed_rate))
    findings.append(("effective rank", low_rank.ranks_in_words(metrics) if len(ranks) else why_not))
    if len(ranks):
        tables["rank_by_block"] = low_rank.rank_by_block(ranks)
        figures["rank"] = low_rank.rank_figure(study, tables["rank_by_block"], metrics, rank_tokens)
    if len(cosines):
        tables["inputs_by_block"] = cosines
        figures["inputs"] = attention_inputs.inputs_figure(study, cosines, metrics)
    if study.me.layer is not None:
        findings += attention_inputs.inputs_in_words(metrics)
    return Result("sinks", study.trace.model, metrics, tables, figures, findings)


# --- Sink mass --------------------------------------------------------------------------------------------------------


def _sinks_by_input(study: Study, mass: pd.DataFrame, is_sink: pd.DataFrame, layout: Layout) -> dict[str, Any]:
    """Find in which block each input, a row of `[layer]`, has its first sink, and what is around the ME layer."""
    me_layer = study.me.layer
    measured: dict[str, Any] = {"sink_inputs": len(mass)}
    if me_layer is None:
        return measured
    layers = [int(layer) for layer in mass.columns]
    by_layer = dict(zip(layers, mass.to_numpy(dtype=float).T, strict=True))
    sinks_of = dict(zip(layers, is_sink.to_numpy(dtype=bool).T, strict=True))
    for name, at in (("sink_mass_at_me_layer", me_layer), ("sink_mass_after", layout.next_attention(me_layer))):
        if at in by_layer:
            measured |= mean_metric(name, by_layer[at])
    if me_layer in sinks_of:
        measured |= _share("sink_at_me_layer", sinks_of[me_layer])
    has_sink = {layer: has for layer, has in sinks_of.items() if layer <= study.last_before_trailing}
    firsts = [next((layer for layer, has in has_sink.items() if has[row]), None) for row in range(len(mass))]
    counted = Counter(firsts).most_common()
    measured["first_sinks"] = {"none" if layer is None else str(layer): number for layer, number in counted}
    before = [layer for layer in has_sink if layer <= me_layer]
    behind = [layer for layer in has_sink if layer > me_layer]
    if not behind:
        return measured | {"sink_rises_why_not": "No block between the ME layer and the last two has attention."}
    share_of_blocks = np.mean([has_sink[layer] for layer in behind], axis=0)
    measured |= {"sink_blocks": float(share_of_blocks.mean())}
    measured |= _share("sink_in_most_blocks", share_of_blocks >= CONSISTENT)
    if not before:
        why_not = f"No block up to the ME layer has attention: a sink in block {behind[0]} need not be new."
        return measured | {"sink_rises_why_not": why_not}
    return measured | {
        **_share("sink_rises_next", np.array([first == behind[0] for first in firsts])),
        "sink_returns_next": float((has_sink[behind[0]] & ~has_sink[before[-1]]).mean()),
    }


def _share(name: str, has: np.ndarray) -> dict[str, Any]:
    return {name: float(has.mean()), f"{name}_interval": share_interval(has)}


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


def _sinks_in_words(metrics: SinksMetrics, onset: SinkOnset, layout: Layout) -> list[tuple[str, str]]:
    words = "No sink lasts." if onset.looked_at else "Attention is in the last blocks alone, which count apart."
    if onset.layer is not None:
        words = f"Sinks last from block {onset.layer} on."
    if metrics.first_sinks and onset.looked_at:
        words += f" {_first_sinks_in_words(metrics)}"
    rows = [("sinks", words)]
    is_hybrid = len(layout.attention) < layout.n_layers
    if metrics.sink_mass_at_me_layer is not None and metrics.sink_mass_after is not None:
        at, after = (
            with_interval(mass, interval, ".3f")
            for mass, interval in (
                (metrics.sink_mass_at_me_layer, metrics.sink_mass_at_me_layer_interval),
                (metrics.sink_mass_after, metrics.sink_mass_after_interval),
            )
        )
        the_next = f"the next{' with attention' if is_hybrid else ''}"
        rows.append(("attention on token 0", f"Mean sink mass: {at} in the ME layer, {after} in {the_next}."))
    return [*rows, ("layout", f"There is {layout.attention_in_words}.")] if is_hybrid else rows


def _first_sinks_in_words(metrics: SinksMetrics) -> str:
    """Say where they are: "First sink of the 35 prompts that agree on the ME layer: block 12 in 19, block 3 in 16."."""
    first_sinks = metrics.first_sinks or {}
    total = sum(first_sinks.values())
    # prompts that share a first token share its states, and count once
    among = f"the {total} prompts" if total == metrics.n_carriers else f"the {total} first tokens of the prompts"
    among += " that agree on the ME layer"
    if first_sinks.get("none") == total:
        return f"None of {among} has a sink."
    listed = ", ".join(f"{'none' if layer == 'none' else f'block {layer}'} in {n}" for layer, n in first_sinks.items())
    return f"First sink of {among}: {listed}."


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
    note = f"Prompt {study.trace.prompts['id'][chosen]}, its first {len(tokens)} tokens."
    plot = attention_maps(by_block, labels, title=study.title("Attention maps", 1), note=note)
    expected = "A sink in the layer after the ME layer; the text sees one at the ME layer, 'layer 7', as well."
    return Figure(plot, "figure 7", expected, f"Mean attention on token 0: {', '.join(on_first)}.")


def _blocks_around_me_layer(study: Study) -> list[int]:
    """Choose the ME layer and the next block; of a hybrid the last with attention up to it and the first behind."""
    with_pattern = [at.layer for at in Sites.of(study.model).find(PATTERN)]
    middle = study.n_layers // 2 if study.me.layer is None else study.me.layer
    before = [layer for layer in with_pattern if layer <= middle]
    behind = [layer for layer in with_pattern if layer > middle]
    return before[-1:] + behind[:1]


# --- Claims -----------------------------------------------------------------------------------------------------------

MOST = 0.8


def _rises_in_the_next_block(metrics: SinksMetrics) -> Judgement:
    why_not = metrics.sink_rises_why_not
    judged = at_least(metrics.sink_rises_next, metrics.sink_rises_next_interval, MOST, why_not=why_not)
    notes = [_first_sinks_in_words(metrics) if metrics.first_sinks else ""]
    if judged.verdict == "does not hold" and (metrics.sink_returns_next or 0) >= MOST:
        judged = replace(judged, verdict="holds in part")
        notes.append(f"Earlier ones are gone in the ME layer and back in the next in {metrics.sink_returns_next:.0%}.")
    attending = [layer for layer in metrics.attention_layers or () if layer > (metrics.me_layer or 0)]
    if attending and attending[0] != (metrics.me_layer or 0) + 1:
        notes.append(f"The next block with attention is {attending[0]}.")
    return judged.noting(*notes)


def _is_at_the_me_layer(metrics: SinksMetrics) -> Judgement:
    why_not = "The ME layer has no attention that can be measured."
    judged = at_least(metrics.sink_at_me_layer, metrics.sink_at_me_layer_interval, MOST, partly=0.5, why_not=why_not)
    mass = metrics.sink_mass_at_me_layer
    return judged if mass is None else judged.noting(f"The mean sink mass there is {mass:.2f}.")


def _is_in_the_blocks_behind(metrics: SinksMetrics) -> Judgement:
    interval, why_not = metrics.sink_in_most_blocks_interval, metrics.sink_rises_why_not
    judged = at_least(metrics.sink_in_most_blocks, interval, MOST, why_not=why_not)
    of_blocks = number(metrics.sink_blocks, "sink_blocks")
    if judged.verdict == "does not hold" and of_blocks >= 0.5:
        judged = replace(judged, verdict="holds in part")
    return judged.noting(f"It is in {of_blocks:.0%} of these blocks, mean over inputs.")


def _lasts_from_the_next_block(metrics: SinksMetrics) -> Judgement:
    """The former way: the first block from which the mean over prompts stays over 0.3 must be the next."""
    onset, first = metrics.unbroken_sink_layer, metrics.first_sink_layer
    me_layer, last = metrics.me_layer, metrics.last_lasting_layer
    if me_layer is None or last is None:
        raise NotMeasuredError("The result does not say where the ME layer and the last blocks are.")
    attending = range(last + 1) if metrics.attention_layers is None else metrics.attention_layers
    behind = [layer for layer in attending if me_layer < layer <= last]
    if not behind:
        raise NotMeasuredError("No block between the ME layer and the last two has attention.")
    if onset is None:
        return Judgement("does not hold", note="No sink lasts.")
    steps = sum(layer <= onset for layer in behind) if onset > me_layer else onset - me_layer
    came_and_went = first is not None and first < onset
    verdict: Verdict = "does not hold" if steps != 1 else "holds in part" if came_and_went else "holds"
    return Judgement(verdict, float(steps))


CLAIMS = (
    Claim(
        id="sink-next", fixed="2026-11-26 25a77c7",
        source="introduction: 'in the layer immediately following the ME Layer'; figure 7b",
        figure="sink_mass", metrics=SinksMetrics,
        claim="Attention sinks emerge in the layer right after the ME layer",
        statistic="share of inputs whose first block with a mean sink mass over 0.3 is the next one with attention",
        criterion="≥ 0.8; in part: there, and none in the ME layer, but some earlier",
        why="to emerge is to come first, and a later dip is no return; 0.3 is Gu et al.'s; 17 inputs of 17 show 0.8",
        of_token_0=True, blocks_after=1,
        judge=_rises_in_the_next_block,
        former=Former(
            "1; in part: sinks before that come and go", "2026-11-22 a1bbeb3", _lasts_from_the_next_block,
            "blocks with attention from the ME layer to the first from which the mean sink mass stays over 0.3",
        ),
    ),
    Claim(
        id="sink-at-me", fixed="2026-11-26 25a77c7",
        source="section 6, on figure 7: 'the attention sink observed at the ME Layer is not caused by the FFN output'",
        figure="attention_maps", metrics=SinksMetrics,
        claim="There is a sink at the ME layer itself, where the FFN has not written yet",
        statistic="share of inputs with a sink mass over 0.3 in the ME layer",
        criterion="≥ 0.8; in part ≥ 0.5",
        why="as of sink-next, which it contradicts, unless figure 7's 'layer 7' is the block after the ME layer; 0.3 "
        "is Gu et al.'s, in short prompts it is twice even attention",
        of_token_0=True, judge=_is_at_the_me_layer,
    ),
    Claim(
        id="sink-blocks", fixed="2026-11-26 25a77c7",
        source="section 6: 'consistently appear in layers following the onset of massive activation'",
        figure="sink_mass", metrics=SinksMetrics,
        claim="Attention sinks consistently appear in the layers after the ME layer",
        statistic="share of inputs with a sink mass over 0.3 in at least nine tenths of the blocks with attention "
        "behind the ME layer",
        criterion="≥ 0.8; in part: in half of these blocks, mean over inputs",
        why="'consistently' leaves one block in ten out at most, and one input in five: 17 of 17 show it",
        of_token_0=True, blocks_after=1, judge=_is_in_the_blocks_behind,
    ),
    *low_rank.CLAIMS,
    *attention_inputs.CLAIMS,
)  # fmt: skip
