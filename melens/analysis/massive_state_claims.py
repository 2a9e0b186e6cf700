"""What `consequence` measures, and what it says of sinks and of the massive entries: metrics and claims."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from melens.analysis.metrics import SINK_THRESHOLD
from melens.claims.engine import Claim, Judgement, NotMeasuredError, at_least, at_most, number, unless_trivial
from melens.models.layout import listed
from melens.report.result import Interval, Metrics

__all__ = ["CLAIMS", "ConsequenceMetrics"]

HARMLESS = 0.01
"""Nats a token: 1% of the perplexity, below the second decimal in which Sun et al. report no difference."""


class ConsequenceMetrics(Metrics):
    """What `consequence` measures. Each mean is over texts: prompts, cut short, with distinct first tokens.

    Attributes:
        texts, tokens_per_text: how many there are, and of how many tokens at most.
        removed_layers: the blocks whose FFN write is removed, from the ME layer to where the massive state is formed.
        norm_left: ‖h‖ / ‖h intact‖ of the massive token without that write, mean over `Study.massive_layers`.
        sink_layers, sink_layers_before: the blocks behind in which the intact sink mass is over 0.3, and those before
            the massive activation is read: up to the ME layer.
        sink_mass_intact, sink_mass_without, sink_mass_control, sink_mass_zero: in `sink_layers`, intact, without the
            FFN write to the massive token, without that to all other tokens, and with the massive entries set to zero.
        sinks_left: (sink mass without the write - equal attention) / (intact sink mass - equal attention); the divisor
            is the mean over texts. Equal attention is what a token gets if every query attends to all tokens alike.
        sinks_left_control, sinks_left_zero: the same without the write to all other tokens, and with the massive
            entries alone set to zero.
        sink_layers_left: the blocks of `sink_layers` with a sink mass over 0.3 without the write.
        written_at: the block at whose output the token gets what the blocks of `removed_layers` add to it.
        earlier_layers: the blocks with attention that read it there and none intact, up to the ME layer.
        sink_mass_before, sink_mass_earlier: sink mass in these blocks, intact and with the token massive.
        earlier_sink_layers: the blocks of `earlier_layers` with a sink mass over 0.3 then.
        loss: of the intact model, nats a token.
        dloss_removed, dloss_zero, dloss_mean: by how much the loss rises without the FFN write to the massive token,
            and with the massive entries set to zero, and to their mean over the other texts.
        sinks_why_not, earlier_why_not, mean_why_not: why it was not measured.
    """

    experiment = "consequence"
    texts: int | None = None
    tokens_per_text: int | None = None
    removed_layers: list[int] | None = None
    norm_left: float | None = None
    norm_left_interval: Interval | None = None
    sink_layers: list[int] = Field(default_factory=list)
    sink_layers_before: list[int] = Field(default_factory=list)
    sink_mass_intact: float | None = None
    sink_mass_without: float | None = None
    sink_mass_control: float | None = None
    sink_mass_zero: float | None = None
    sinks_left: float | None = None
    sinks_left_interval: Interval | None = None
    sinks_left_control: float | None = None
    sinks_left_control_interval: Interval | None = None
    sinks_left_zero: float | None = None
    sinks_left_zero_interval: Interval | None = None
    sink_layers_left: list[int] = Field(default_factory=list)
    written_at: int | None = None
    earlier_layers: list[int] = Field(default_factory=list)
    sink_mass_before: float | None = None
    sink_mass_earlier: float | None = None
    sink_mass_earlier_interval: Interval | None = None
    earlier_sink_layers: list[int] = Field(default_factory=list)
    loss: float | None = None
    dloss_removed: float | None = None
    dloss_removed_interval: Interval | None = None
    dloss_zero: float | None = None
    dloss_zero_interval: Interval | None = None
    dloss_mean: float | None = None
    dloss_mean_interval: Interval | None = None
    sinks_why_not: str | None = None
    earlier_why_not: str | None = None
    mean_why_not: str | None = None


def _sinks_follow(metrics: ConsequenceMetrics) -> Judgement:
    if metrics.norm_left is not None and number(metrics.norm_left, "norm_left") > 0.5:
        raise NotMeasuredError(
            f"Without the FFN write {metrics.norm_left:.0%} of the massive token's norm is left: it stays massive."
        )
    judged = at_most(metrics.sinks_left, metrics.sinks_left_interval, 0.1, partly=0.5, why_not=metrics.sinks_why_not)
    against = []
    if metrics.sink_layers_left:
        against.append(f"A sink stays in {listed(metrics.sink_layers_left)}.")
    if metrics.sink_layers_before:
        against.append(f"There is one before, in {listed(metrics.sink_layers_before)}.")
    if number(metrics.sinks_left_control, "sinks_left_control") < 0.5:
        against.append(f"Without the write to all other tokens {metrics.sinks_left_control:.0%} is left as well.")
    judged = (judged.in_part() if against else judged).noting(*against)
    if metrics.sinks_left_zero is None:
        return judged
    return judged.noting(f"With the massive entries alone set to zero {metrics.sinks_left_zero:.0%} is left.")


def _sinks_come_earlier(metrics: ConsequenceMetrics) -> Judgement:
    if not metrics.sink_layers and metrics.sinks_why_not is not None:
        raise NotMeasuredError(metrics.sinks_why_not)
    judged = at_least(
        metrics.sink_mass_earlier, metrics.sink_mass_earlier_interval, SINK_THRESHOLD, why_not=metrics.earlier_why_not
    )
    if judged.verdict == "does not hold" and metrics.earlier_sink_layers:
        judged = replace(judged, verdict="holds in part")
    if len(metrics.earlier_sink_layers) < len(metrics.earlier_layers):
        where = listed(metrics.earlier_sink_layers) if metrics.earlier_sink_layers else "no block"
        judged = replace(judged, note=f"Over {SINK_THRESHOLD:g} in {where} of {listed(metrics.earlier_layers)}.")
    return judged


def _mean_is_enough(metrics: ConsequenceMetrics) -> Judgement:
    zero = metrics.dloss_zero
    if zero is not None and number(zero, "dloss_zero") <= HARMLESS:
        raise NotMeasuredError(f"Zero does no harm either ({zero:+.3f}), so the mean saves nothing.")
    partly = None if zero is None else 0.1 * zero
    judged = at_most(
        metrics.dloss_mean, metrics.dloss_mean_interval, HARMLESS, partly=partly, why_not=metrics.mean_why_not
    )
    return judged if metrics.massive_position != 0 else unless_trivial(metrics, judged)


CLAIMS = (
    Claim(
        id="sinks-follow", fixed="2026-11-26 25a77c7",
        source="section 6, 4th contribution", figure="sinks_by_run", metrics=ConsequenceMetrics,
        claim="Attention sinks are a consequence of the massive activation",
        statistic="what is left of the sink mass behind, beyond equal attention, when the FFN write that makes the "
        "token massive is taken from it alone",
        criterion="≤ 0.1, no sink over 0.3 left in any block nor there before, and ≥ 0.5 left where all other tokens "
        "lose that write instead; in part ≤ 0.5",
        why="a consequence goes with its cause and comes after it: a tenth is an order of magnitude less; equal "
        "attention is no sink, 0.3 is Gu et al.'s (2024); what any loss of the write does is no effect of this token's",
        of_ffn=True, blocks_after=1, judge=_sinks_follow,
    ),
    Claim(
        id="sinks-earlier", fixed="2026-11-26 25a77c7",
        source="section 6, the converse", figure="sinks_by_run", metrics=ConsequenceMetrics,
        claim="Where the massive activation is written earlier, sinks come earlier",
        statistic="sink mass, in the blocks up to the ME layer that then read it and have no sink intact, with the "
        "massive state added half way to the ME layer",
        criterion="≥ 0.3; in part: in some of these blocks", why="0.3 is Gu et al.'s (2024)",
        judge=_sinks_come_earlier,
    ),
    Claim(
        id="zero-harms", fixed="2026-11-26 25a77c7",
        source="Sun et al. (2024), table 3", figure="loss_by_run", metrics=ConsequenceMetrics,
        claim="Set to zero, the massive activations take the model down",
        statistic="rise of the loss (nats a token) with the massive entries set to zero where they are formed",
        criterion="≥ 0.69; in part ≥ 0.1",
        why="0.69 doubles the perplexity, the least that can be called broken; 0.1 is a tenth of it more",
        judge=lambda metrics: at_least(metrics.dloss_zero, metrics.dloss_zero_interval, 0.69, partly=0.1),
    ),
    Claim(
        id="mean-harmless", fixed="2026-11-26 25a77c7",
        source="Sun et al. (2024), table 3", figure="loss_by_run", metrics=ConsequenceMetrics,
        claim="Set to their mean over other inputs, the massive activations do the model no harm",
        statistic="rise of the loss (nats a token) with the massive entries set to their mean over the other texts",
        criterion="≤ 0.01; in part ≤ a tenth of what zero costs",
        why="1% of the perplexity; Sun et al. see no change in the second decimal (5.47 on WikiText)",
        judge=_mean_is_enough,
    ),
)  # fmt: skip
