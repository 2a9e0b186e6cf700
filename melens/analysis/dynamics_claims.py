"""What `dynamics` measures over the checkpoints of a training, and what it says of other papers' claims."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from melens.claims.engine import Claim, Judgement, NotMeasuredError, at_least, number
from melens.report.result import Interval, Metrics

__all__ = ["CLAIMS", "LEAST_CHECKPOINTS", "DynamicsMetrics"]

LEAST_CHECKPOINTS = 5
"""Fewer say nothing about when something appears."""

_EARLY = 0.01
"""The share of the steps within which the first checkpoint must lie to be taken for the beginning."""

_AS_PAPER = 27
"""Checkpoints that Gallego-Feliciano et al. (2025) fit a curve to, at the least."""


class DynamicsMetrics(Metrics):
    """What `dynamics` measures. Means are over distinct first tokens; fields of every experiment are of the last step.

    Attributes:
        n_checkpoints, first_step, last_step: what the curves rest on.
        me_from, me_from_layer: the first step from which on every checkpoint has an ME layer, and which block it is.
        massive_step, sinks_step: the first step at which the largest ratio (on a logarithmic scale), and the sink rate,
            are half way from the first checkpoint's to their largest; None where the ratio does not rise tenfold, the
            sink rate not by 0.1.
        sinks_later: by how many checkpoints the latter comes after the former.
        ratio_first, ratio_last, ratio_growth: the largest |h| over the median, in the block where that is most, at the
            first and the last checkpoint, and the last over the first.
        sink_rate_first, sink_rate_last: share of prompts, blocks and heads (Gu et al. 2024), likewise.
        middle_rising: share of the middle half of the blocks whose ratio at the last checkpoint is the largest, or
            within 5% of that.
        curve_r2: of equation 9 of Gallego-Feliciano et al. (2025), mean over the blocks that it was fitted to.
        curve_blocks, curve_determined: how many blocks those are, and in how many the points tell all five parameters.
        massive_why_not, sinks_why_not, curve_why_not: why not measured.
        checkpoints_left_out: those that are incomplete.
    """

    experiment = "dynamics"
    rests_on_states = False
    n_checkpoints: int = 0
    first_step: int | None = None
    last_step: int | None = None
    me_from: int | None = None
    me_from_layer: int | None = None
    massive_step: int | None = None
    sinks_step: int | None = None
    sinks_later: int | None = None
    ratio_first: float | None = None
    ratio_first_interval: Interval | None = None
    ratio_last: float | None = None
    ratio_last_interval: Interval | None = None
    ratio_growth: float | None = None
    ratio_growth_interval: Interval | None = None
    sink_rate_first: float | None = None
    sink_rate_first_interval: Interval | None = None
    sink_rate_last: float | None = None
    sink_rate_last_interval: Interval | None = None
    middle_rising: float | None = None
    curve_r2: float | None = None
    curve_blocks: int | None = None
    curve_determined: int | None = None
    massive_why_not: str | None = None
    sinks_why_not: str | None = None
    curve_why_not: str | None = None
    checkpoints_left_out: list[str] = Field(default_factory=list)


def _check_enough(metrics: DynamicsMetrics, *, from_start: bool = False) -> None:
    """Raise where there are too few checkpoints, or none of the beginning where it is needed."""
    if metrics.n_checkpoints < LEAST_CHECKPOINTS:
        verb = "is" if metrics.n_checkpoints == 1 else "are"
        raise NotMeasuredError(f"It takes {LEAST_CHECKPOINTS} checkpoints; there {verb} {metrics.n_checkpoints}.")
    first, last = metrics.first_step or 0, metrics.last_step or 0
    if from_start and first > _EARLY * last:
        raise NotMeasuredError(f"The first checkpoint is of step {first:,} of {last:,}: none is of the first 1%.")


def _sinks_come_with_training(metrics: DynamicsMetrics) -> Judgement:
    _check_enough(metrics, from_start=True)
    if metrics.sink_rate_first is None:
        raise NotMeasuredError(metrics.sinks_why_not or "The result has no sink rate.")
    judged = at_least(metrics.sink_rate_last, metrics.sink_rate_last_interval, 0.1, partly=0.05)
    first = number(metrics.sink_rate_first, "sink_rate_first")
    if first > 0.05 and judged.verdict != "does not hold":
        judged = replace(judged, verdict="does not hold")
    return judged.noting(f"At step {metrics.first_step:,} it is {first:.3f}.")


def _massive_is_learned(metrics: DynamicsMetrics) -> Judgement:
    _check_enough(metrics, from_start=True)
    return at_least(metrics.ratio_growth, metrics.ratio_growth_interval, 10, partly=3, why_not=metrics.massive_why_not)


def _middle_rises(metrics: DynamicsMetrics) -> Judgement:
    _check_enough(metrics)
    if metrics.massive_step is None:
        raise NotMeasuredError(metrics.massive_why_not or "The ratio does not rise.")
    return at_least(metrics.middle_rising, None, 0.8, partly=0.5)


def _curve_fits(metrics: DynamicsMetrics) -> Judgement:
    judged = at_least(metrics.curve_r2, None, 0.9, partly=0.8, why_not=metrics.curve_why_not)
    blocks = f"Fitted in {metrics.curve_blocks} of {metrics.n_layers} blocks; the points tell all five parameters in "
    noted = judged.noting(f"{blocks}{metrics.curve_determined}.")
    if metrics.n_checkpoints >= _AS_PAPER:
        return noted
    few = f"Five parameters for {metrics.n_checkpoints} checkpoints; the paper has {_AS_PAPER} or more."
    return noted.in_part().noting(few)


def _sinks_not_before(metrics: DynamicsMetrics) -> Judgement:
    _check_enough(metrics)
    why_not = metrics.massive_why_not or metrics.sinks_why_not
    later = None if metrics.sinks_later is None else float(metrics.sinks_later)
    judged = at_least(later, None, 0, partly=-1, why_not=why_not)
    steps = f"Massive activations: step {metrics.massive_step:,}; " if metrics.massive_step is not None else ""
    return judged.noting(f"{steps}sinks: step {metrics.sinks_step:,}." if metrics.sinks_step is not None else "")


CLAIMS = (
    Claim(
        id="sinks-learned", fixed="2026-11-27 5da8825",
        source="Gu et al. (2024), abstract", figure="dynamics", metrics=DynamicsMetrics,
        claim="Attention sinks are not there at first: they emerge in training",
        statistic="sink rate of token 0 at the last checkpoint, the first being of the first 1% of the steps",
        criterion="≥ 0.1, and at the first checkpoint ≤ 0.05; in part ≥ 0.05",
        why="the abstract gives no number: a tenth of all heads is a sink that one sees, half of it is next to none",
        needs_me_layer=False, judge=_sinks_come_with_training,
    ),
    Claim(
        id="massive-learned", fixed="2026-11-27 5da8825",
        source="Gallego-Feliciano et al. (2025), results", figure="dynamics", metrics=DynamicsMetrics,
        claim="Massive activations are learned throughout training, and not present at initialisation",
        statistic="ratio of the largest |h| to the median, in the block where it is most, at the last checkpoint over "
        "that at the first, which is of the first 1% of the steps",
        criterion="≥ 10; in part ≥ 3",
        why="the largest of a hidden state of random numbers is five to eight times their median, and the smallest "
        "model of the paper, Pythia-14M, ends at 83: ten times",
        needs_me_layer=False, judge=_massive_is_learned,
    ),
    Claim(
        id="middle-rises", fixed="2026-11-27 5da8825",
        source="Gallego-Feliciano et al. (2025), figure 5b", figure="dynamics_by_block", metrics=DynamicsMetrics,
        claim="In the middle blocks the ratio rises to the end of the training",
        statistic="share of the middle half of the blocks whose ratio at the last checkpoint is the largest, or within "
        "5% of that",
        criterion="≥ 0.8; in part ≥ 0.5",
        why="'middle layers peak at the end of training' allows an exception in five; half of them is the least that "
        "can be called so",
        needs_me_layer=False, judge=_middle_rises,
    ),
    Claim(
        id="emergence-curve", fixed="2026-11-27 5da8825",
        source="Gallego-Feliciano et al. (2025), table 1", figure="dynamics_fits", metrics=DynamicsMetrics,
        claim="A logarithm under an exponential decay describes the ratio over training",
        statistic="R² of their equation 9, mean over the blocks that it was fitted to",
        criterion="≥ 0.9; in part ≥ 0.8, or of fewer than 27 checkpoints",
        why="the least of the paper's nine models is 0.93; they fit 27 checkpoints or more, and five parameters go "
        "near any few points",
        needs_me_layer=False, judge=_curve_fits,
    ),
    Claim(
        id="sinks-not-first", fixed="2026-11-27 5da8825",
        source="follow-up question", figure="dynamics", metrics=DynamicsMetrics,
        claim="Sinks do not appear before massive activations",
        statistic="checkpoints from the one at which the ratio is half way to its largest, logarithmically, to the one "
        "at which the sink rate is",
        criterion="≥ 0; in part ≥ -1",
        why="what follows from another comes at the same checkpoint or later; one checkpoint is the resolution",
        needs_me_layer=False, judge=_sinks_not_before,
    ),
)  # fmt: skip
