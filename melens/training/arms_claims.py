"""What `compare_arms` measures, and what is claimed of masks, gates and attention in training from scratch.

Appendix A of the paper leaves open what WeMask does in pre-training; of gates Qiu et al. (2025) and of softpick Zuhri
et al. (2025) say that neither massive activations nor sinks come.
"""

from __future__ import annotations

from melens.claims.engine import Claim, Judgement, NotMeasuredError, at_least, at_most, worst
from melens.report.result import Interval, Metrics

__all__ = ["ARMS", "CLAIMS", "SINK_RATE", "ArmsMetrics"]

ARMS = {
    "fixed": "WeMask",
    "following": "WeMask behind the ME layer",
    "gates": "gates",
    "softpick": "softpick",
}
"""Arms that claims are about, by what metrics call them."""

SINK_RATE = 0.1
"""A model has sinks from this sink rate on: ten times what even attention over 64 tokens could give by chance."""

_FEWEST = 3


class ArmsMetrics(Metrics):
    """What `compare_arms` measures. Each number of an arm is a mean over seeds, of pairs with the plain training.

    Attributes:
        model_of_arms: its name.
        seeds: that some arm was trained with.
        plain_trainings, plain_massive: plain trainings, and those that ended with an ME layer.
        plain_over_median, plain_sink_rate: of the plain trainings, largest |h| over the median, and sink rate.
        dloss_...: validation loss as trained (a mask is on), less plain's; nats a token, over rows and seeds.
        massive_left_..., sinks_left_...: largest |h| over the median, and sink rate, as trained, over plain's.
        unmask_...: validation loss without the mask less that under it.
    """

    experiment = "arms"
    rests_on_states = False
    model_of_arms: str = ""
    seeds: int = 0
    plain_trainings: int = 0
    plain_massive: int = 0
    plain_over_median: float | None = None
    plain_sink_rate: float | None = None
    dloss_fixed: float | None = None
    dloss_fixed_interval: Interval | None = None
    massive_left_fixed: float | None = None
    massive_left_fixed_interval: Interval | None = None
    sinks_left_fixed: float | None = None
    sinks_left_fixed_interval: Interval | None = None
    unmask_fixed: float | None = None
    unmask_fixed_interval: Interval | None = None
    dloss_following: float | None = None
    dloss_following_interval: Interval | None = None
    massive_left_following: float | None = None
    massive_left_following_interval: Interval | None = None
    sinks_left_following: float | None = None
    sinks_left_following_interval: Interval | None = None
    unmask_following: float | None = None
    unmask_following_interval: Interval | None = None
    dloss_gates: float | None = None
    dloss_gates_interval: Interval | None = None
    massive_left_gates: float | None = None
    massive_left_gates_interval: Interval | None = None
    sinks_left_gates: float | None = None
    sinks_left_gates_interval: Interval | None = None
    dloss_softpick: float | None = None
    dloss_softpick_interval: Interval | None = None
    massive_left_softpick: float | None = None
    massive_left_softpick_interval: Interval | None = None
    sinks_left_softpick: float | None = None
    sinks_left_softpick_interval: Interval | None = None


def _check_massive(metrics: ArmsMetrics) -> None:
    if metrics.plain_massive < max(_FEWEST, metrics.plain_trainings):
        raise NotMeasuredError(
            f"Of {metrics.plain_trainings} plain trainings {metrics.plain_massive} have a massive activation; it takes "
            f"all of them, and at least {_FEWEST}, to say that something prevents it."
        )


def _check_sinks(metrics: ArmsMetrics) -> None:
    if (metrics.plain_sink_rate or 0.0) < SINK_RATE:
        rate = metrics.plain_sink_rate
        raise NotMeasuredError(
            f"The plain trainings have a sink rate of {0 if rate is None else rate:.3f}, under {SINK_RATE:g}: no sinks."
        )


def _loss(metrics: ArmsMetrics, key: str, *, field: str = "dloss") -> tuple[float | None, Interval | None]:
    return getattr(metrics, f"{field}_{key}"), getattr(metrics, f"{field}_{key}_interval")


_NOT_TRAINED = "No training of this arm has a plain one of the same seed beside it."


def _massive_left(metrics: ArmsMetrics, key: str) -> Judgement:
    _check_massive(metrics)
    return at_most(*_loss(metrics, key, field="massive_left"), 0.1, partly=0.5, why_not=_NOT_TRAINED)


def _sinks_left(metrics: ArmsMetrics, key: str, enough: float, partly: float) -> Judgement:
    _check_sinks(metrics)
    return at_most(*_loss(metrics, key, field="sinks_left"), enough, partly=partly, why_not=_NOT_TRAINED)


def _prevents_both(metrics: ArmsMetrics, key: str) -> Judgement:
    massive, sinks = _massive_left(metrics, key), _sinks_left(metrics, key, 0.1, 0.5)
    judged = worst(massive, sinks)
    return Judgement(judged.verdict, massive.value, massive.interval).noting(
        f"Of the sink rate {sinks.value:.0%} is left."
    )


CLAIMS = (
    Claim(
        id="pretrain-mask-harmless", fixed="2026-11-27 79f3dff",
        source="follow-up question: appendix A", figure="arms", metrics=ArmsMetrics,
        claim="WeMask in pre-training costs no loss",
        statistic="validation loss (nats a token) of a model pre-trained with WeMask from a block on, less that of a "
        "plain one; over rows and seeds",
        criterion="≤ 0.01; in part ≤ 0.05",
        why="1% of the perplexity is no change in mean-harmless; 5% is what a few per cent of the weights are worth",
        needs_me_layer=False,
        judge=lambda metrics: at_most(*_loss(metrics, "fixed"), 0.01, partly=0.05, why_not=_NOT_TRAINED),
    ),
    Claim(
        id="pretrain-mask-prevents", fixed="2026-11-27 79f3dff",
        source="follow-up question: appendix A", figure="arms", metrics=ArmsMetrics,
        claim="WeMask in pre-training prevents massive activations",
        statistic="largest |h| over the median |h| at the end of a pre-training with WeMask, over that of a plain one",
        criterion="≤ 0.1; in part ≤ 0.5",
        why="a tenth is what is left of a massive activation that has vanished in the paper's appendix B; half is less",
        needs_me_layer=False, judge=lambda metrics: _massive_left(metrics, "fixed"),
    ),
    Claim(
        id="pretrain-following-prevents", fixed="2026-11-27 79f3dff",
        source="follow-up question: appendix A", figure="arms", metrics=ArmsMetrics,
        claim="WeMask that follows the ME layer in pre-training does away with the massive activation",
        statistic="largest |h| over the median |h| at the end of a pre-training with WeMask behind the ME layer, over "
        "that of a plain one",
        criterion="≤ 0.1; in part ≤ 0.5", why="as of pretrain-mask-prevents",
        needs_me_layer=False, judge=lambda metrics: _massive_left(metrics, "following"),
    ),
    Claim(
        id="pretrain-mask-weakens-sinks", fixed="2026-11-27 79f3dff",
        source="follow-up question: appendix A", figure="arms", metrics=ArmsMetrics,
        claim="WeMask in pre-training weakens the sinks",
        statistic="sink rate of token 0 at the end of a pre-training with WeMask, over that of a plain one",
        criterion="≤ 0.5; in part ≤ 0.9",
        why="as of mask-weakens-sink, substantially is at least half; a tenth can be seen",
        needs_me_layer=False, judge=lambda metrics: _sinks_left(metrics, "fixed", 0.5, 0.9),
    ),
    Claim(
        id="pretrain-unmasking-hurts", fixed="2026-11-27 79f3dff",
        source="follow-up question: appendix A", figure="arms", metrics=ArmsMetrics,
        claim="A model that was pre-trained with WeMask needs it afterwards",
        statistic="validation loss (nats a token) without the mask, less that under it, of a model pre-trained with it",
        criterion="≥ 0.01", why="1% of the perplexity is no change in mean-harmless",
        needs_me_layer=False,
        judge=lambda metrics: at_least(*_loss(metrics, "fixed", field="unmask"), 0.01, why_not=_NOT_TRAINED),
    ),
    Claim(
        id="pretrain-gates-prevent", fixed="2026-11-27 79f3dff",
        source="Qiu et al. (2025), abstract", figure="arms", metrics=ArmsMetrics,
        claim="Gated attention in pre-training prevents massive activations and sinks",
        statistic="largest |h| over the median |h| with gates, over that of a plain one; and the same of the sink rate",
        criterion="both ≤ 0.1; in part both ≤ 0.5", why="they call it sink-free; a tenth is next to none, half is less",
        needs_me_layer=False, judge=lambda metrics: _prevents_both(metrics, "gates"),
    ),
    Claim(
        id="pretrain-softpick-prevents", fixed="2026-11-27 79f3dff",
        source="Zuhri et al. (2025), abstract", figure="arms", metrics=ArmsMetrics,
        claim="Softpick in pre-training prevents massive activations and sinks",
        statistic="largest |h| over the median |h| with softpick, over that of a plain one; the same of the sink rate",
        criterion="both ≤ 0.1; in part both ≤ 0.5",
        why="they see no sinks and far smaller activations; a tenth is next to none, half is less",
        needs_me_layer=False, judge=lambda metrics: _prevents_both(metrics, "softpick"),
    ),
)  # fmt: skip
