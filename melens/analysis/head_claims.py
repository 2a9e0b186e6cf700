"""What `heads` measures, and what it says of values, sink heads and idle heads: metrics and claims."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from melens.analysis.massive_state_claims import HARMLESS
from melens.claims.engine import Claim, Judgement, NotMeasuredError, at_most, number
from melens.printing import counted
from melens.report.result import Interval, Metrics

__all__ = ["CLAIMS", "COMPARED", "DRAINED", "HeadsMetrics"]

COMPARED = 0.1
"""The share of all heads that is compared: Sandoval-Segura et al. (2025) find more than 12% inactive on average over 14
models; a tenth is below that."""

DRAINED = 0.5
"""Of the norm of other tokens' values, and of other heads' outputs: half is the most that can be called small."""


class HeadsMetrics(Metrics):
    """What `heads` measures. Means are over inputs, distinct first tokens; those of losses over held-out prompts.

    Attributes:
        n_heads: how many heads were measured.
        inputs: distinct first tokens that they were measured on.
        heads_per_value: how many heads read one value head: one number where it is the same in all blocks.
        sink_heads: heads with a mean sink mass over 0.3 (in short prompts over twice even attention).
        value_drain: ‖v_0‖ over the mean ‖v‖ of the other tokens, mean over the value heads that serve a sink head.
        value_drain_share: share of these value heads in which it is at most a half.
        value_ratio_elsewhere: the same ratio in the value heads that serve no sink head.
        compared_heads: how many heads a tenth of all are.
        sink_output: the tenth of heads with the largest sink mass: output norm over their block's mean over heads.
        rank_correlation: Spearman's, of sink mass and that relative output norm over all heads, of each input.
        rank_correlation_within: the same within blocks, mean over blocks with more than one head.
        overlap: how many of that tenth are among the tenth with the least relative output norm.
        overlap_by_chance, overlap_p: how many two sets drawn at random share on average, and how often as many or more.
        chosen_on, texts, tokens_per_text: on how many prompts idle heads were chosen; on how many others, of how many
            tokens at most, losses were measured.
        loss: of the intact model, nats a token.
        zeroed_heads: by share, how many heads were set to zero.
        dloss_idle, dloss_sinks, dloss_random: by share, by how much the loss rises with the idlest heads, the strongest
            sink heads, and random heads (mean over draws) set to zero.
        dloss_idle_tenth, dloss_idle_less_random: with the idlest tenth set to zero, and that less the rise with as many
            random heads; the interval of the latter is over prompts and draws.
        scores_intact, score_changes: by benchmark, the score of the intact model, and by how much it changes without a
            tenth of the heads, by which.
        values_why_not, outputs_why_not, correlation_why_not, entropy_why_not, zeroing_why_not, scores_why_not: why not
            measured.
    """

    experiment = "heads"
    rests_on_states = False
    n_heads: int = 0
    inputs: int | None = None
    heads_per_value: list[int] = Field(default_factory=list)
    sink_heads: int | None = None
    value_drain: float | None = None
    value_drain_interval: Interval | None = None
    value_drain_share: float | None = None
    value_ratio_elsewhere: float | None = None
    compared_heads: int | None = None
    sink_output: float | None = None
    sink_output_interval: Interval | None = None
    rank_correlation: float | None = None
    rank_correlation_interval: Interval | None = None
    rank_correlation_within: float | None = None
    rank_correlation_within_interval: Interval | None = None
    overlap: int | None = None
    overlap_by_chance: float | None = None
    overlap_p: float | None = None
    chosen_on: int | None = None
    texts: int | None = None
    tokens_per_text: int | None = None
    loss: float | None = None
    zeroed_heads: dict[str, int] | None = None
    dloss_idle: dict[str, float] | None = None
    dloss_sinks: dict[str, float] | None = None
    dloss_random: dict[str, float] | None = None
    dloss_idle_tenth: float | None = None
    dloss_idle_tenth_interval: Interval | None = None
    dloss_idle_less_random: float | None = None
    dloss_idle_less_random_interval: Interval | None = None
    values_why_not: str | None = None
    outputs_why_not: str | None = None
    correlation_why_not: str | None = None
    entropy_why_not: str | None = None
    zeroing_why_not: str | None = None
    scores_intact: dict[str, float] | None = None
    score_changes: dict[str, dict[str, float]] | None = None
    scores_why_not: str | None = None


def _is_below_zero(interval: Interval | None) -> bool:
    high = (interval or (None, None))[1]
    return high is not None and high < 0  # NaN is not


def _values_drain(metrics: HeadsMetrics) -> Judgement:
    judged = at_most(metrics.value_drain, metrics.value_drain_interval, DRAINED, why_not=metrics.values_why_not)
    if judged.verdict == "does not hold" and (metrics.value_drain_share or 0) >= 0.5:
        judged = replace(judged, verdict="holds in part")
    of_heads = f"It is at most a half in {number(metrics.value_drain_share, 'value_drain_share'):.0%} of them."
    elsewhere = metrics.value_ratio_elsewhere
    return judged.noting(of_heads, "" if elsewhere is None else f"In all other value heads it is {elsewhere:.2f}.")


def _sink_heads_are_dormant(metrics: HeadsMetrics) -> Judgement:
    if (metrics.sink_heads or 0) < (metrics.compared_heads or 0):
        some = counted(metrics.sink_heads or 0, "head")
        raise NotMeasuredError(f"{some} of {metrics.n_heads} have a sink, fewer than the tenth that is compared.")
    judged = at_most(metrics.sink_output, metrics.sink_output_interval, DRAINED, why_not=metrics.outputs_why_not)
    if judged.verdict == "does not hold" and _is_below_zero(metrics.rank_correlation_interval):
        judged = replace(judged, verdict="holds in part")
    correlation = metrics.rank_correlation
    words = f"Of {metrics.compared_heads} heads {metrics.overlap} are among the idlest as well, by chance "
    words += f"{number(metrics.overlap_by_chance, 'overlap_by_chance'):.1f}."
    return judged.noting(words, "" if correlation is None else f"Rank correlation: {correlation:.2f}.")


def _idle_heads_can_go(metrics: HeadsMetrics) -> Judgement:
    why_not = metrics.zeroing_why_not
    random = (metrics.dloss_random or {}).get(f"{COMPARED:g}")
    if random is not None and number(random, "dloss_random") <= HARMLESS:
        raise NotMeasuredError(
            f"As many random heads do no harm either ({random:+.3f}), so it says nothing of idle ones."
        )
    judged = at_most(metrics.dloss_idle_tenth, metrics.dloss_idle_tenth_interval, HARMLESS, why_not=why_not)
    less = metrics.dloss_idle_less_random
    if judged.verdict == "does not hold" and _is_below_zero(metrics.dloss_idle_less_random_interval):
        judged = replace(judged, verdict="holds in part")
    return judged if less is None else judged.noting(f"That is {less:+.3f} against as many random heads.")


CLAIMS = (
    Claim(
        id="values-drain", fixed="2026-11-27 da568a3",
        source="Guo et al. (2024), value-state drains", figure="head_map", metrics=HeadsMetrics,
        claim="Values drain at the sink: token 0 has a far smaller value vector than other tokens",
        statistic="‖v_0‖ over the mean ‖v‖ of the other tokens, in the value heads that serve a head with a sink mass "
        "over 0.3",
        criterion="≤ 0.5; in part: in half of these value heads",
        why="the paper gives no number; half as long is the most that can be called drained; 0.3 is Gu et al.'s",
        needs_me_layer=False, judge=_values_drain,
    ),
    Claim(
        id="sinks-dormant", fixed="2026-11-27 da568a3",
        source="Guo et al. (2024), active-dormant heads", figure="output_over_sinks", metrics=HeadsMetrics,
        claim="Sink heads are dormant: they write little",
        statistic="output norm of the tenth of all heads with the largest sink mass, over their block's mean",
        criterion="≤ 0.5; in part: the rank correlation of sink mass and output norm is below 0, its interval too",
        why="no paper gives a number for all models: a half is the most that can be called little; Sandoval-Segura et "
        "al. (2025) find more than 12% of heads inactive, and a tenth is below that",
        needs_me_layer=False, judge=_sink_heads_are_dormant,
    ),
    Claim(
        id="idle-harmless", fixed="2026-11-27 da568a3",
        source="Sandoval-Segura et al. (2025), abstract", figure="loss_without_heads", metrics=HeadsMetrics,
        claim="The heads that write least can be set to zero with little loss",
        statistic="rise of the loss (nats a token) on other prompts with the idlest tenth of all heads set to zero",
        criterion="≤ 0.01; in part: less than with as many random heads, the interval of the difference too",
        why="they keep accuracy within 1%; its counterpart here is 1% of the perplexity, as of mean-harmless",
        needs_me_layer=False, judge=_idle_heads_can_go,
    ),
)  # fmt: skip
