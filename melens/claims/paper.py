"""The claims of the paper and of its review, as data: what is measured, what it must satisfy, and why that threshold.

A claim stands beside what measures it (`melens.analysis.attention_sinks.CLAIMS`); here they are put
in the order of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from melens.analysis.across_inputs import CLAIMS as STABILITY
from melens.analysis.attention_sinks import CLAIMS as SINKS
from melens.analysis.block_ablation import CLAIMS as ABLATION
from melens.analysis.ffn_concentration import CLAIMS as FFN
from melens.analysis.norm_gains import CLAIMS as RMSNORM
from melens.analysis.token_direction import CLAIMS as DIRECTION
from melens.analysis.weights import CLAIMS as WEIGHTS
from melens.benchmarks.comparison import CLAIMS as BENCHMARK
from melens.benchmarks.training_table import CLAIMS as TABLES
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


def _second_massive(metrics: Metrics) -> Judgement:
    last, between = metrics.get("ffn_last_blocks"), metrics.get("ffn_between")
    if last is None or between is None:
        why_not = metrics.get("ffn_last_blocks_why_not", "No blocks lie between the ME layer and the last two.")
        return Judgement("not measured", note=why_not)
    last, between = _number(last, "ffn_last_blocks"), _number(between, "ffn_between")
    verdict: Verdict = "does not hold" if last < 0.1 else "holds" if between < 0.1 else "holds in part"
    return Judgement(verdict, last, None, f"In the blocks between, at most {between:.2g}.")


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
    *RMSNORM,
    *FFN,
    *ABLATION,
    *DIRECTION,
    *STABILITY,
    *SINKS,
    *WEIGHTS,
    *MASKS,
    *BENCHMARK,
    *TABLES,
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
