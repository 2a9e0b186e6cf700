"""What `ablation` measures, and what it says of the parts of a block: metrics and claims (appendix B, the review)."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from melens.analysis.norm_gains import NO_NORM
from melens.claims.engine import Claim, Former, Judgement, NotMeasuredError, Verdict, at_least, at_most, number, worst
from melens.report.result import Interval, Metrics

__all__ = ["CLAIMS", "AblationMetrics"]


class AblationMetrics(Metrics):
    """What `ablation` measures. What is left is relative to the intact run, a mean over prompts.

    Attributes:
        ablation_prompts: how many prompts were run.
        left_without_ffn: what is left without the ME layer's FFN.
        highest_without_ffn, highest_without_ffn_layer: without it, the token's norm over the mean norm of the other
            tokens, intact, where that is highest from the ME layer to the last block before the trailing ones; and the
            block where the norm itself is highest, median over prompts.
        risen_without_ffn: its highest norm then over that in the block before the ME layer; None where there is none.
        end_without_ffn: its norm after the last of these blocks over the highest.
        left_without_norm: what is left by sense of "without the norm before it" (identity, no_gain, no_norm).
        over_others_without_norm: by sense, the massive token's norm over the mean norm of the other tokens, intact.
        causal_layers: the blocks without whose FFN at most half is left.
        strongest_cause: the block without whose FFN least is left.
        left_by_cause: by part (ffn, ln2_no_gain, attention) and block, what is left without it, from that block on.
        left_by_ffn_intervals: of the part ffn.
        block_evaluations: how many blocks were run for all causes.
        block_evaluations_from_the_start: how many it had been if every run began at block 0.
    """

    experiment = "ablation"
    ablation_prompts: int | None = None
    left_without_ffn: float | None = None
    left_without_ffn_interval: Interval | None = None
    highest_without_ffn: float | None = None
    highest_without_ffn_interval: Interval | None = None
    highest_without_ffn_layer: int | None = None
    risen_without_ffn: float | None = None
    risen_without_ffn_interval: Interval | None = None
    end_without_ffn: float | None = None
    end_without_ffn_interval: Interval | None = None
    left_without_norm: dict[str, float | None] = Field(default_factory=dict)
    left_without_norm_intervals: dict[str, Interval] = Field(default_factory=dict)
    over_others_without_norm: dict[str, float | None] = Field(default_factory=dict)
    over_others_without_norm_intervals: dict[str, Interval] = Field(default_factory=dict)
    causal_layers: list[int] | None = None
    strongest_cause: int | None = None
    left_by_cause: dict[str, dict[int, float | None]] = Field(default_factory=dict)
    left_by_ffn_intervals: dict[int, Interval] = Field(default_factory=dict)
    block_evaluations: int | None = None
    block_evaluations_from_the_start: int | None = None


_SENSES = {
    "identity": "without the norm", "no_gain": "without its gain alone", "no_norm": "without its normalisation alone",
}  # fmt: skip
_NONE: Interval = (None, None)
"""Of a mean of one or two."""


def _emerges_then_fades(metrics: AblationMetrics) -> Judgement:
    emerges = at_least(metrics.highest_without_ffn, metrics.highest_without_ffn_interval, 10)
    fades = at_most(metrics.end_without_ffn, metrics.end_without_ffn_interval, 0.1, partly=0.5)
    note = f"At most × {emerges.value:,.3g} the other tokens; highest in block {metrics.highest_without_ffn_layer}"
    if metrics.risen_without_ffn is None:
        return replace(fades, verdict=worst(emerges, fades).verdict).noting(f"{note}.")
    rises = at_least(metrics.risen_without_ffn, metrics.risen_without_ffn_interval, 2)
    note += f", × {rises.value:,.3g} its norm before the ME layer."
    return replace(fades, verdict=worst(emerges, rises, fades).verdict).noting(note)


def _persists_smaller(metrics: AblationMetrics, *, on_average: bool = False) -> Judgement:
    """Judge every sense of "without"; `on_average` as until 2026-11-26, by its means alone."""
    if not metrics.left_without_norm:
        raise NotMeasuredError(NO_NORM)
    verdicts = set[Verdict]()
    for sense, left in metrics.left_without_norm.items():
        over_others = number(metrics.over_others_without_norm.get(sense), f"over_others_without_norm, {sense},")
        intervals = metrics.left_without_norm_intervals, metrics.over_others_without_norm_intervals
        of_left, of_others = (None if on_average else each.get(sense, _NONE) for each in intervals)
        smaller = at_most(number(left, f"left_without_norm, {sense},"), of_left, 0.5)
        verdicts.add(worst(smaller, at_least(over_others, of_others, 10)).verdict)
    of_identity = metrics.left_without_norm["identity"], metrics.left_without_norm_intervals.get("identity", _NONE)
    note = ", ".join(f"{_SENSES[sense]}: × {left:.3g}" for sense, left in metrics.left_without_norm.items())
    verdict: Verdict = "holds in part" if len(verdicts) > 1 else verdicts.pop()
    return replace(at_most(*of_identity, 0.5), verdict=verdict, note=f"{note[0].upper()}{note[1:]}.")


def _only_me_layer(metrics: AblationMetrics) -> Judgement:
    judged, left = _only_me_layer_on_average(metrics), metrics.left_by_cause.get("ffn", {})
    if judged.verdict != "holds":
        others = {layer: metrics.left_by_ffn_intervals.get(layer, _NONE) for layer in left if layer != metrics.me_layer}
        is_shown = any(at_most(left[layer], interval, 0.5).verdict == "holds" for layer, interval in others.items())
        return replace(judged, verdict="does not hold") if is_shown else judged
    unclear = [] if metrics.me_layer in left else [metrics.me_layer]
    for layer, value in left.items():
        clears = at_most if layer == metrics.me_layer else at_least
        interval = metrics.left_by_ffn_intervals.get(layer, _NONE)
        if clears(number(value, f"left_by_cause, block {layer},"), interval, 0.5).verdict != "holds":
            unclear.append(layer)
    if not unclear:
        return judged
    note = f"What is left without the FFN of block {', '.join(map(str, unclear))} has an interval that holds 0.5."
    return replace(judged, verdict="holds in part", note=note)


def _only_me_layer_on_average(metrics: AblationMetrics) -> Judgement:
    if metrics.causal_layers is None:
        raise NotMeasuredError("The result has no causal_layers.")
    others = [layer for layer in metrics.causal_layers if layer != metrics.me_layer]
    verdict: Verdict = "does not hold"
    if metrics.me_layer in metrics.causal_layers and metrics.strongest_cause == metrics.me_layer:
        verdict = "holds in part"
    if metrics.causal_layers == [metrics.me_layer]:
        verdict = "holds"
    note = f"Halved as well without the FFN of block {', '.join(map(str, others))}." if others else ""
    return Judgement(verdict, float(len(others)), note=note)


CLAIMS = (
    Claim(
        id="ffn-needed", fixed="2026-11-22 a1bbeb3",
        source="appendix B, figure 9", figure="removed", metrics=AblationMetrics,
        claim="Without the ME layer's FFN the massive activation vanishes",
        statistic="norm of the token afterwards, relative to intact",
        criterion="≤ 0.1; in part ≤ 0.5", why="a tenth is an order of magnitude less",
        of_ffn=True,
        judge=lambda metrics: at_most(metrics.left_without_ffn, metrics.left_without_ffn_interval, 0.1, partly=0.5),
    ),
    Claim(
        id="ffn-fades", fixed="2026-11-26 25a77c7",
        source="appendix B, figure 9", figure="removed", metrics=AblationMetrics,
        claim="Without the ME layer's FFN the massive activation still emerges, then fades",
        statistic="norm of the token after the last block before the trailing ones, over its highest from the ME layer "
        "on, without that FFN",
        criterion="at its highest ≥ 10 × the other tokens and ≥ 2 × its norm before the ME layer; at the end ≤ 0.1 "
        "of its highest, in part ≤ 0.5",
        why="elevated is an order of magnitude over the others, and what was so before the ME layer does not emerge "
        "behind; 'gradually vanish' is a tenth, an order less, and half the least that can be called fading",
        of_ffn=True, blocks_after=1, judge=_emerges_then_fades,
    ),
    Claim(
        id="norm-scales", fixed="2026-11-26 25a77c7",
        source="appendix B, figure 9", figure="removed", metrics=AblationMetrics,
        claim="Without the norm before the ME layer's FFN the massive activation persists, but far smaller",
        statistic="norm of the token afterwards, relative to intact, norm replaced by the identity",
        criterion="≤ 0.5 of intact and ≥ 10 × the other tokens, the whole intervals, in every sense of 'without'; in "
        "part: on average, or in some sense",
        why="half is the least that can be called far smaller; 10 × is still another order of magnitude",
        of_ffn=True, judge=_persists_smaller,
        former=Former(
            "≤ 0.5 of intact and ≥ 10 × the other tokens in every sense of 'without'; in part: in some sense",
            "2026-11-22 a1bbeb3", lambda metrics: _persists_smaller(metrics, on_average=True),
        ),
    ),
    Claim(
        id="only-me-causal", fixed="2026-11-26 25a77c7",
        source="follow-up question", figure="causality", metrics=AblationMetrics,
        claim="Only the ME layer is causal for the massive activation",
        statistic="how many other blocks' FFNs halve it when removed",
        criterion="0, none with 0.5 in its interval; in part: the ME layer's does most, and no other's is shown",
        why="a block without which half is gone is a cause",
        of_ffn=True, judge=_only_me_layer,
        former=Former("0; in part: the ME layer's does most", "2026-11-22 a1bbeb3", _only_me_layer_on_average),
    ),
)  # fmt: skip
