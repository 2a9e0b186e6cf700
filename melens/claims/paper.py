"""The claims of the paper and of its review, as data: what is measured, what it must satisfy, and why that threshold.

A claim stands beside what measures it (`melens.analysis.attention_sinks.CLAIMS`); here they are put
in the order of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from melens.analysis.attention_sinks import CLAIMS as SINKS
from melens.analysis.ffn_concentration import CLAIMS as FFN
from melens.analysis.token_direction import CLAIMS as DIRECTION
from melens.analysis.weights import CLAIMS as WEIGHTS
from melens.claims.engine import Claim, Judgement, NotANumberError, Verdict
from melens.masks.grid_claims import CLAIMS as MASKS

__all__ = ["CLAIMS", "FAMILY_CLAIM", "judge_families"]

Metrics = Mapping[str, Any]


def _number(value: Any, name: str) -> float | int:
    if value is None or math.isnan(value):
        raise NotANumberError(f"The result's {name} is no number (NaN).")
    number: float | int = value
    return number


def _interval(metrics: Metrics, name: str) -> tuple[float, float] | None:
    """Read an interval, as an experiment returns it or as JSON holds it: there NaN is null. One prompt has none."""
    low, high = metrics.get(f"{name}_interval") or (None, None)
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return None
    return float(low), float(high)


def _missing(metrics: Metrics, name: str) -> Judgement:
    """Say why a metric is not there: an experiment tells it of that metric, or of all."""
    whys = (metrics.get(f"{name}_why_not"), metrics.get("why_not"))
    return Judgement("not measured", note=next((why for why in whys if why), f"The result has no {name}."))


def _at_least(metrics: Metrics, name: str, enough: float | int, *, partly: float | int | None = None) -> Judgement:
    """Judge a mean over prompts: its whole interval must reach `enough`; in part its mean, or `partly`."""
    if metrics.get(name) is None:
        return _missing(metrics, name)
    value, interval = _number(metrics[name], name), _interval(metrics, name)
    low = value if interval is None else interval[0]
    if low >= enough:
        verdict: Verdict = "holds"
    else:
        verdict = "holds in part" if value >= (enough if partly is None else min(partly, enough)) else "does not hold"
    return Judgement(verdict, value, interval)


def _at_most(metrics: Metrics, name: str, enough: float | int, *, partly: float | int | None = None) -> Judgement:
    """Judge the other way round: the whole interval must stay at or below `enough`."""
    if metrics.get(name) is None:
        return _missing(metrics, name)
    value, interval = _number(metrics[name], name), _interval(metrics, name)
    mirrored = {name: -value, f"{name}_interval": None if interval is None else (-interval[1], -interval[0])}
    judged = _at_least(mirrored, name, -enough, partly=None if partly is None else -partly)
    return Judgement(judged.verdict, value, interval)


def _unless_trivial(metrics: Metrics, judgement: Judgement) -> Judgement:
    """Mark what follows from the design: in a causal model prompts that share token 0 share its every state."""
    if metrics.get("distinct_first_tokens") != 1 or judgement.verdict == "not measured":
        return judgement
    note = "All prompts share their first token, so its states are the same by construction."
    return replace(judgement, verdict="trivial here", note=note)


def _exists(metrics: Metrics) -> Judgement:
    judged = _at_least(metrics, "prompts_with", 0.5)
    criterion = metrics.get("criterion", {})
    if (criterion.get("min_abs", 100), criterion.get("min_ratio", 1_000)) != (100, 1_000):
        note = f"Here the criterion was |h| > {criterion['min_abs']} and > {criterion['min_ratio']} × the median."
        judged = replace(judged, note=note)
    return judged if metrics.get("me_layer") is not None else replace(judged, verdict="does not hold")


def _single_block(metrics: Metrics) -> Judgement:
    judged = _at_least(metrics, "share_of_peak", 0.8)
    if judged.verdict == "does not hold" and metrics["kind"] == "a few blocks":
        return replace(judged, verdict="holds in part", note="A few blocks bring it together.")
    return judged


def _stands_out_first(metrics: Metrics) -> Judgement:
    ratio, first = metrics.get("weight_norm_ratio"), metrics.get("weight_norm_first_layer")
    if ratio is None:
        return Judgement("not measured", note="The ME layer's FFN has no norm of its own before it.")
    note = f"Twice the others' first at block {first}." if first is not None else "Twice the others' at no block."
    judged = _at_least(metrics, "weight_norm_ratio", 2)
    if judged.verdict == "holds" and first != metrics["me_layer"]:
        return replace(judged, verdict="holds in part", note=note)
    return replace(judged, note=note)


def _delta_frac(metrics: Metrics) -> Judgement:
    judged = _at_least(metrics, "delta_frac", 1e-9)
    top = metrics.get("delta_frac_top_layer")
    if judged.verdict == "holds" and top != metrics["me_layer"]:
        judged = replace(judged, verdict="holds in part", note=f"Positive, but larger at block {top}.")
    if metrics.get("top_share", 0.01) != 0.01:
        judged = replace(judged, note=f"{judged.note} Here K was {metrics['top_share']:.2%} of the width.".strip())
    return judged


def _persists_smaller(metrics: Metrics) -> Judgement:
    left: Mapping[str, float] = metrics["left_without_norm"]
    over_others: Mapping[str, float] = metrics["over_others_without_norm"]
    if not left:
        return Judgement("not measured", note="The ME layer's FFN has no norm of its own before it.")
    for sense in left:
        _number(left[sense], f"left_without_norm, {sense},")
        _number(over_others[sense], f"over_others_without_norm, {sense},")
    agree = [sense for sense in left if left[sense] <= 0.5 and over_others[sense] >= 10]
    note = ", ".join(f"{sense}: {share:.3g} of intact" for sense, share in left.items())
    verdict: Verdict = "holds" if len(agree) == len(left) else "holds in part" if agree else "does not hold"
    return Judgement(verdict, left["identity"], _interval(metrics, "left_identity"), f"{note}.")


def _same_everywhere(metrics: Metrics) -> Judgement:
    if metrics["n_tasks"] < 2 or metrics["n_length_bins"] < 2:
        return Judgement("not measured", note="It takes prompts of at least two task types and two lengths.")
    judged = _at_least(metrics, "least_agreement", 0.95, partly=0.5)
    return judged if metrics["massive_position"] != 0 else _unless_trivial(metrics, judged)


def _second_massive(metrics: Metrics) -> Judgement:
    last, between = metrics.get("ffn_last_blocks"), metrics.get("ffn_between")
    if last is None or between is None:
        why_not = metrics.get("ffn_last_blocks_why_not", "No blocks lie between the ME layer and the last two.")
        return Judgement("not measured", note=why_not)
    last, between = _number(last, "ffn_last_blocks"), _number(between, "ffn_between")
    verdict: Verdict = "does not hold" if last < 0.1 else "holds" if between < 0.1 else "holds in part"
    return Judgement(verdict, last, None, f"In the blocks between, at most {between:.2g}.")


def _only_causal(metrics: Metrics) -> Judgement:
    others = [layer for layer in metrics["causal_layers"] if layer != metrics["me_layer"]]
    is_causal = metrics["me_layer"] in metrics["causal_layers"]
    note = f"Halved as well without the FFN of block {', '.join(map(str, others))}." if others else ""
    verdict: Verdict = "does not hold"
    if is_causal:
        verdict = (
            "holds" if not others else "holds in part" if metrics["strongest_cause"] == metrics["me_layer"] else verdict
        )
    return Judgement(verdict, float(len(others)), None, note)


def _scores_better(metrics: Metrics) -> Judgement:
    return _of_comparisons(metrics["compared"].get("weight"), "better", "worse")


def _scores_worse(metrics: Metrics) -> Judgement:
    counts = [metrics["compared"][select] for select in ("random", "magnitude") if select in metrics["compared"]]
    together = {key: sum(count[key] for count in counts) for key in counts[0]} if counts else None
    return _of_comparisons(together, "worse", "better")


def _of_comparisons(counts: Mapping[str, int] | None, claimed: str, other: str) -> Judgement:
    """Judge whether most comparisons turn out as claimed, and none the other way."""
    if counts is None or not counts["all"]:
        return Judgement("not measured", note="There was no such comparison.")
    value = counts[claimed] / counts["all"]
    verdict: Verdict = "does not hold"
    if counts[claimed] > counts[other]:
        verdict = "holds" if value > 0.5 and not counts[other] else "holds in part"
    none = counts["all"] - counts[claimed] - counts[other]
    return Judgement(verdict, value, None, f"{counts[claimed]} {claimed}, {counts[other]} {other}, {none} not shown.")


def _claim_of_tables(
    name: str,
    claim: str,
    statistic: str,
    *,
    rows: str,
    figure: str = "table",
    source: str = "section 5, tables 1 to 4, 6 and 7",
) -> Claim:
    """Make a claim about trainings, judged by how one kind of comparison in a table turned out."""
    return Claim(
        id=name,
        claim=claim,
        source=source,
        experiment="tables",
        figure=figure,
        statistic=statistic,
        criterion="> 0.5, and worse in none; in part: better in more than worse",
        why="most is the least that 'consistently' can mean; shown is p < 0.05 after correction, and more than "
        "trainings differ among themselves",
        judge=lambda metrics: _of_comparisons(metrics["compared"].get(rows), "better", "worse"),
    )


CLAIMS: tuple[Claim[Any], ...] = (
    Claim(
        id="exists",
        claim="Some token carries massive activations",
        source="section 1, figure 1",
        experiment="emergence",
        figure="top_dims",
        statistic="share of prompts with an entry |h| > 100 and > 1,000 × the median |h|",
        criterion=">= 0.5",
        why="the criterion is Sun et al.'s (2024); a property of the model shows in most inputs",
        judge=_exists,
        needs_me_layer=False,
    ),
    Claim(
        id="single-block",
        claim="A single block brings the massive activation; it does not build up",
        source="section 3, figure 1",
        experiment="emergence",
        figure="emergence",
        statistic="share of the peak norm that the ME layer alone adds",
        criterion=">= 0.8; in part: a few blocks",
        why="what other blocks add is then less than a quarter of it",
        judge=_single_block,
    ),
    Claim(
        id="magnification",
        claim="That block magnifies the token hundreds of times",
        source="section 1, table 8",
        experiment="emergence",
        figure="emergence",
        statistic="‖h_out‖ / ‖h_in‖ at the ME layer",
        criterion=">= 100; in part >= 10",
        why="the smallest number that can be called hundreds; 10 is still an order of magnitude",
        judge=lambda metrics: _at_least(metrics, "magnification", 100, partly=10),
    ),
    Claim(
        id="first-token",
        claim="The massive token is the first one",
        source="section 3.1",
        experiment="emergence",
        figure="top_dims",
        statistic="share of prompts whose massive token is at position 0",
        criterion=">= 0.95; in part >= 0.5",
        why="1 in 20 may differ before 'consistently' is wrong",
        judge=lambda metrics: _at_least(metrics, "share_at_first", 0.95, partly=0.5),
    ),
    Claim(
        id="second-massive",
        claim="The last two blocks make a second massive activation",
        source="appendix A, figure 1",
        experiment="emergence",
        figure="emergence",
        statistic="largest ‖FFN output‖ of token 0 in the last two blocks, relative to the ME layer's",
        criterion=">= 0.1, and < 0.1 between; in part: >= 0.1",
        why="within an order of magnitude of the first",
        of_token_0=True,
        of_ffn=True,
        judge=_second_massive,
    ),
    Claim(
        id="weight-norm",
        claim="The norm before the FFN makes token 0 stand out, at the ME layer first",
        source="section 3.1, figure 2",
        experiment="rmsnorm",
        figure="weight_norm",
        statistic="WeightNorm of token 0 over the others' mean at the ME layer",
        criterion=">= 2 there and at no earlier block; in part: >= 2 there",
        why="alike is taken as less than twice",
        of_token_0=True,
        of_ffn=True,
        judge=_stands_out_first,
    ),
    Claim(
        id="delta-frac",
        claim="There its output lies more on the dims with the largest gains",
        source="section 3.1, equation 1, figure 3",
        experiment="rmsnorm",
        figure="gain_alignment",
        statistic="ΔFrac at the ME layer, K = 1% of the width",
        criterion="> 0 and the largest up to there; in part: > 0",
        why="the sign is the paper's; 'far exceeds other layers' its words",
        of_token_0=True,
        of_ffn=True,
        judge=_delta_frac,
    ),
    Claim(
        id="delta-kl",
        claim="There its output is closer to the distribution of the gains",
        source="section 3.1, equation 2, figure 3",
        experiment="rmsnorm",
        figure="gain_alignment",
        statistic="ΔKL at the ME layer, nats",
        criterion="< 0",
        why="the sign is the paper's",
        of_token_0=True,
        of_ffn=True,
        judge=lambda metrics: _at_most(metrics, "delta_kl", -1e-9),
    ),
    *FFN,
    Claim(
        id="ffn-needed",
        claim="Without the ME layer's FFN the massive activation vanishes",
        source="appendix B, figure 9",
        experiment="ablation",
        figure="removed",
        statistic="norm of the token afterwards, relative to intact",
        criterion="<= 0.1; in part <= 0.5",
        why="a tenth is an order of magnitude less",
        of_ffn=True,
        judge=lambda metrics: _at_most(metrics, "left_without_ffn", 0.1, partly=0.5),
    ),
    Claim(
        id="norm-scales",
        claim="Without the norm before that FFN it persists, but far smaller",
        source="appendix B, figure 9",
        experiment="ablation",
        figure="removed",
        statistic="norm of the token afterwards, relative to intact, norm replaced by the identity",
        criterion="<= 0.5 of intact and >= 10 × the other tokens in every sense of 'without'; in part: in some sense",
        why="half is the least that can be called far smaller; 10 × is still another order of magnitude",
        of_ffn=True,
        judge=_persists_smaller,
    ),
    Claim(
        id="only-me-causal",
        claim="Only the ME layer is causal for it",
        source="the review, point 1",
        experiment="ablation",
        figure="causality",
        statistic="how many other blocks' FFNs halve it when removed",
        criterion="0; in part: the ME layer's does most",
        why="a block without which half is gone is a cause",
        of_ffn=True,
        judge=_only_causal,
    ),
    *DIRECTION,
    Claim(
        id="same-layer",
        claim="The ME layer is the same for all task types and lengths",
        source="appendix D, figure 10",
        experiment="stability",
        figure="norms_by_task",
        statistic="smallest share of prompts with that ME layer in any task type or length",
        criterion=">= 0.95; in part >= 0.5",
        why="1 in 20 may differ",
        judge=_same_everywhere,
    ),
    *SINKS,
    *WEIGHTS,
    *MASKS,
    Claim(
        id="scores-weight-better",
        claim="Weight-guided masks improve the scores of benchmarks",
        source="section 5, tables 1, 2, 5, 6 and 7",
        experiment="benchmark",
        figure="benchmark_differences",
        statistic="share of the comparisons with the unmasked model in which a weight-guided mask is shown better",
        criterion="> 0.5, and worse in none; in part: better in more than worse",
        why="most is the least that 'consistently' can mean; shown is p < 0.05 after correction",
        judge=_scores_better,
    ),
    Claim(
        id="scores-others-worse",
        claim="Random and magnitude masks degrade the scores of benchmarks",
        source="appendix E, table 5",
        experiment="benchmark",
        figure="benchmark_differences",
        statistic="share of the comparisons with the unmasked model in which a random or magnitude mask is shown to be "
        "worse",
        criterion="> 0.5, and better in none; in part: worse in more than better",
        why="as for the claim before",
        judge=_scores_worse,
    ),
    _claim_of_tables(
        "inference-over-none",
        "Masking a trained model at inference alone improves its scores",
        "share of the comparisons with plain training in which the same model under WeMask is shown better",
        rows="inference",
        figure="table_differences",
    ),
    _claim_of_tables(
        "training-over-none",
        "Training with WeMask gives better scores than training without",
        "share of the comparisons with plain training in which training with WeMask is shown better",
        rows="training",
        figure="table_differences",
    ),
    _claim_of_tables(
        "training-over-inference",
        "Training with WeMask gives better scores than WeMask at inference alone",
        "share of the comparisons at equal rates in which training with WeMask is shown better",
        rows="training over inference",
    ),
    _claim_of_tables(
        "training-over-gates",
        "Training with WeMask gives better scores than training with gated attention",
        "share of the comparisons in which training with WeMask is shown better",
        rows="training over gates",
        source="appendix G, table 7",
    ),
)
"""What the paper and its review say of one model, in the order of the paper."""


FAMILY_CLAIM: Claim[Any] = Claim(
    id="same-in-family",
    claim="Models of one family have the same ME layer",
    source="appendix H, table 8",
    experiment="emergence",
    figure="emergence",
    statistic="share of a family's models with its most frequent ME layer",
    criterion="1",
    why="'the same' leaves no exception",
    judge=lambda metrics: Judgement("not measured", note="It takes a sweep over models."),
)


def judge_families(me_layers: Mapping[str, int | None], models: Mapping[str, Mapping[str, Any]]) -> list[Judgement]:
    """Judge `FAMILY_CLAIM` for each family with two models.

    Args:
        me_layers: by model as it is labelled.
        models: the same ones, each with its `name` and perhaps a `family`.
    """
    layers: dict[str, dict[str, int | None]] = {}
    for label, me_layer in me_layers.items():
        family = models[label].get("family")
        if family is not None:
            layers.setdefault(family, {}).setdefault(models[label]["name"], me_layer)
    judged = []
    for family, found in layers.items():
        known = [layer for layer in found.values() if layer is not None]
        if len(found) < 2 or not known:
            continue
        most = max(map(known.count, known)) / len(found)
        note = f"Family {family}: " + ", ".join(
            f"{name} {'none' if layer is None else f'block {layer}'}" for name, layer in found.items()
        )
        judged.append(Judgement("holds" if most == 1 else "does not hold", most, None, f"{note}."))
    return judged or [Judgement("not measured", note="No family has two models, of which one has an ME layer.")]
