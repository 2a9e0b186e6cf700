"""What `emergence` measures, and what it says of the massive activation: metrics and claims (sections 1 and 3).

What is judged of the massive state is read off where it is formed (`Emergence.formed`), and shares count states: in a
causal model prompts that share token 0 share its every state.
"""

from __future__ import annotations

from dataclasses import replace

from melens.analysis.me_layer import Criterion, Kind
from melens.claims.engine import Claim, Former, Judgement, NotMeasuredError, Verdict, at_least, at_most, number
from melens.report.result import Interval, Metrics

__all__ = ["CLAIMS", "EmergenceMetrics"]


class EmergenceMetrics(Metrics):
    """What `emergence` measures.

    Attributes:
        reason, kind, magnification, relative_magnification, share_of_peak, climb, formed, agreement, prompts_with,
            positions, dims, criterion: as of `Emergence`.
        n_states: what the shares of states rest on: one state a distinct first token where token 0 is the massive one
            (prompts that share it share its every state), else one a prompt.
        states_with, states_agreeing: of the states those with a massive token in any block, and those in which the
            first such block is the ME layer.
        share_at_first: of the prompts with a massive token those in which the largest, where it first is, is token 0;
            None without any.
        first_massive, first_alone: of the states with massive tokens in the output of the block `formed` those with
            token 0 among them, and those with no other; a first token is alone if it is in all its prompts.
        most_massive_tokens: how many massive tokens a prompt has there at most.
        before_ratio: ‖h_0‖ over the other tokens' mean norm in the block before the ME layer where it is furthest from
            1, as a factor (1/2 is 2); of blocks' outputs, mean over states. `before_layer`: where it is, most often.
        over_others: ‖h‖ of the massive token over the other tokens' mean in the output of the block `formed`.
        trailing_from: the block from which on token 0's norm is off its plateau for good; None where it stays there.
        second_from, second_layer, second_norm, second_over_others, erased, write_cosine, written, written_by_ffn: as
            `begin`, `layer`, `second` and the others of `LastBlocks`.
        ffn_last_blocks: ‖FFN output‖ of token 0 in the last two blocks over that in the ME layer, the larger of both.
        ffn_between: the same of the blocks between the ME layer and these, the largest.
        sink_onset_layer, first_sink_layer: as `SinkOnset`.
    """

    experiment = "emergence"
    reason: str | None = None
    kind: Kind | None = None
    magnification: float | None = None
    magnification_interval: Interval | None = None
    relative_magnification: float | None = None
    share_of_peak: float | None = None
    share_of_peak_interval: Interval | None = None
    climb: tuple[int, int] | None = None
    agreement: float | None = None
    prompts_with: float | None = None
    positions: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    criterion: Criterion = Criterion()
    n_states: int | None = None
    states_with: float | None = None
    states_with_interval: Interval | None = None
    states_agreeing: float | None = None
    states_agreeing_interval: Interval | None = None
    share_at_first: float | None = None
    share_at_first_interval: Interval | None = None
    first_massive: float | None = None
    first_massive_interval: Interval | None = None
    first_alone: float | None = None
    first_alone_interval: Interval | None = None
    most_massive_tokens: int | None = None
    before_ratio: float | None = None
    before_ratio_interval: Interval | None = None
    before_layer: int | None = None
    over_others: float | None = None
    over_others_interval: Interval | None = None
    trailing_from: int | None = None
    second_from: int | None = None
    second_layer: int | None = None
    second_norm: float | None = None
    second_norm_interval: Interval | None = None
    second_over_others: float | None = None
    erased: float | None = None
    write_cosine: float | None = None
    written: float | None = None
    written_by_ffn: float | None = None
    ffn_last_blocks: float | None = None
    ffn_between: float | None = None
    ffn_last_blocks_why_not: str | None = None
    sink_onset_layer: int | None = None
    first_sink_layer: int | None = None


def _exists(metrics: EmergenceMetrics) -> Judgement:
    if metrics.me_layer is None and metrics.states_with is None:
        return Judgement("does not hold")
    judged = at_least(metrics.states_with, metrics.states_with_interval, 0.5)
    criterion = metrics.criterion.min_abs, metrics.criterion.min_ratio
    if criterion != (100, 1_000):
        judged = replace(judged, note="Here the criterion was |h| > {} and > {} × the median.".format(*criterion))
    return judged if metrics.me_layer is not None else replace(judged, verdict="does not hold")


def _single_block(metrics: EmergenceMetrics) -> Judgement:
    judged = at_least(metrics.share_of_peak, metrics.share_of_peak_interval, 0.8)
    if judged.verdict == "does not hold" and metrics.kind == "a few blocks":
        return replace(judged, verdict="holds in part", note="A few blocks bring it together.")
    return judged


def _comparable_before(metrics: EmergenceMetrics) -> Judgement:
    why_not = "No block comes before the ME layer." if metrics.me_layer == 0 else None
    judged = at_most(metrics.before_ratio, metrics.before_ratio_interval, 2, partly=10, why_not=why_not)
    if metrics.before_layer is None or judged.verdict == "holds":
        return judged
    return replace(judged, note=f"It is furthest apart after block {metrics.before_layer}.")


def _first_token(metrics: EmergenceMetrics) -> Judgement:
    alone = at_least(metrics.first_alone, metrics.first_alone_interval, 0.9)
    if alone.verdict == "holds":
        return alone
    first = number(metrics.first_massive, "first_massive")
    verdict: Verdict = "holds in part" if first >= 0.5 else "does not hold"
    if alone.value == 1:
        return replace(alone, verdict=verdict, note="It is so in all; 36 first tokens are needed to show it.")
    most = metrics.most_massive_tokens
    note = f"In {first:.0%} the first token is massive; a prompt has up to {most} massive tokens."
    return replace(alone, verdict=verdict, note=note)


def _former_first_token(metrics: EmergenceMetrics) -> Judgement:
    """Judge the largest massive token of each prompt, where it first is massive."""
    return at_least(metrics.share_at_first, metrics.share_at_first_interval, 0.95, partly=0.5)


def _second_massive(metrics: EmergenceMetrics) -> Judgement:
    if metrics.second_norm is None:
        raise NotMeasuredError("No block lies between that which forms the state and the last two.")
    erased, over_others = number(metrics.erased, "erased"), number(metrics.second_over_others, "second_over_others")
    judged = at_least(metrics.second_norm, metrics.second_norm_interval, 0.1)
    is_in_last_two = metrics.n_layers is None or (metrics.second_from or 0) >= metrics.n_layers - 2
    if metrics.second_norm < erased:
        judged = replace(judged, verdict="does not hold")
    elif not (over_others >= 10 and is_in_last_two):
        judged = judged.in_part()
    return judged.noting(
        f"From block {metrics.second_from} on {erased:.0%} of the first one is erased.",
        f"The new part is largest after block {metrics.second_layer}, × {over_others:.2g} the other tokens.",
    )


def _former_second_massive(metrics: EmergenceMetrics) -> Judgement:
    """Judge norms of what the FFNs write, which have no sign."""
    last, between = metrics.ffn_last_blocks, metrics.ffn_between
    if last is None or between is None:
        raise NotMeasuredError(
            metrics.ffn_last_blocks_why_not or "No blocks lie between the ME layer and the last two."
        )
    last, between = number(last, "ffn_last_blocks"), number(between, "ffn_between")
    verdict: Verdict = "does not hold" if last < 0.1 else "holds" if between < 0.1 else "holds in part"
    return Judgement(verdict, last, None, f"In the blocks between, at most {between:.2g}.")


CLAIMS = (
    Claim(
        id="exists", fixed="2026-11-22 a1bbeb3",
        source="section 1, figure 1", figure="top_dims", metrics=EmergenceMetrics,
        claim="Some token carries massive activations",
        statistic="share of states (one a first token) with an entry |h| > 100 and > 1,000 × the median |h|",
        criterion="≥ 0.5", why="the criterion is Sun et al.'s (2024); a property of the model shows in most inputs",
        needs_me_layer=False, judge=_exists,
    ),
    Claim(
        id="single-block", fixed="2026-11-22 a1bbeb3",
        source="section 3, figure 1", figure="emergence", metrics=EmergenceMetrics,
        claim="A single block brings the massive activation; it does not build up",
        statistic="share of the peak norm that the ME layer alone adds",
        criterion="≥ 0.8; in part: a few blocks", why="what other blocks add is then less than a quarter of it",
        judge=_single_block,
    ),
    Claim(
        id="magnification", fixed="2026-11-22 a1bbeb3",
        source="section 1, table 8", figure="emergence", metrics=EmergenceMetrics,
        claim="The ME layer magnifies the token hundreds of times",
        statistic="‖h_out‖ / ‖h_in‖ at the ME layer",
        criterion="≥ 100; in part ≥ 10",
        why="the smallest number that can be called hundreds; 10 is still an order of magnitude",
        judge=lambda metrics: at_least(metrics.magnification, metrics.magnification_interval, 100, partly=10),
    ),
    Claim(
        id="over-others", fixed="2026-11-26 25a77c7",
        source="section 3.1: 'hundreds or even thousands of times greater than those of other tokens'",
        figure="emergence", metrics=EmergenceMetrics,
        claim="The massive token is hundreds of times as large as other tokens",
        statistic="norm of the massive token over the other tokens' mean, where the massive state is formed",
        criterion="≥ 100; in part ≥ 10",
        why="as of the magnification, which compares the token with itself before and not with others",
        judge=lambda metrics: at_least(
            metrics.over_others, metrics.over_others_interval, 100, partly=10,
            why_not="No prompt has a token beside the massive one.",
        ),
    ),
    Claim(
        id="comparable-before", fixed="2026-11-26 25a77c7",
        source="section 3.1, figure 1", figure="emergence", metrics=EmergenceMetrics,
        claim="Before the ME layer the tokens' activations are comparable",
        statistic="‖h₀‖ over the other tokens' mean norm, or the inverse, in the block's output before the ME layer "
        "where that is largest",
        criterion="≤ 2; in part ≤ 10",
        why="less than twice either way is alike, as with the output of the RMSNorm (figure 2); up to ten times is the "
        "same order of magnitude. The sentence is about figure 1, which begins with the output of block 0",
        of_token_0=True, judge=_comparable_before,
    ),
    Claim(
        id="first-token", fixed="2026-11-26 25a77c7",
        source="section 3.1", figure="top_dims", metrics=EmergenceMetrics,
        claim="The massive token is the first one, alone",
        statistic="share of first tokens that are the only massive one of their prompts, where the state is formed",
        criterion="≥ 0.9; in part: the first is among the massive ones in ≥ 0.5",
        why="'consistently' and 'isolated' leave 1 in 10 at most, which 36 of 36 show (0.90 to 1) and 35 of 36 do not",
        judge=_first_token,
        former=Former("≥ 0.95; in part ≥ 0.5", "2026-11-22 a1bbeb3", _former_first_token),
    ),
    Claim(
        id="second-massive", fixed="2026-11-26 25a77c7",
        source="appendix A, figure 1", figure="last_blocks", metrics=EmergenceMetrics,
        claim="The last two blocks make a second massive activation",
        statistic="norm of what is new in token 0's state behind its plateau, over its norm on the plateau",
        criterion="≥ 0.1, at least as much as they erase of the first one, ≥ 10 × the other tokens, and in the last "
        "two blocks; in part: the first two of these four",
        why="within an order of magnitude of the first one, and more than one above the other tokens; a large write "
        "against the first one takes it away and makes none",
        of_token_0=True, judge=_second_massive,
        former=Former("≥ 0.1, and < 0.1 between; in part: ≥ 0.1", "2026-11-22 a1bbeb3", _former_second_massive),
    ),
)  # fmt: skip
