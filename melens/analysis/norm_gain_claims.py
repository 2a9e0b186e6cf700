"""What the paper says of the norm before the FFN, judged: section 3.1 and appendix H, figures 2, 3 and 11 to 20.

    melens.analysis.normalization(study).claims

1. The signs of ΔFrac and ΔKL are the paper's, but many blocks have them: a claim asks for the ME layer's place among
   all blocks up to the trailing ones, and for its lead over the next.
2. Thresholds of norms rest on one number: what differs by less than a factor of two is alike.
3. What happens behind the ME layer differs between families: the family decides which of the two the paper says.
"""

from __future__ import annotations

from dataclasses import replace

from melens.analysis.norm_gains import NO_NORM, STANDS_OUT, RmsnormMetrics
from melens.analysis.statistics import with_interval
from melens.claims.engine import Claim, Former, Judgement, at_least, at_most, number
from melens.report.result import Interval

__all__ = ["CLAIMS"]

FEW_OTHERS = 0.1
"""The share of other blocks that may lie further out where one that is not the furthest still stands out."""
MOSTLY_RISING = 0.75
"""The share of pairs of blocks in which the later has the larger norm: half way from no trend, 1/2, to always."""
ANY = 1e-9
"""What a number over 0 is at least."""
NO_OTHER = "No other block has a norm before its FFN to compare with."


def _stands_out_first(metrics: RmsnormMetrics) -> Judgement:
    judged = at_least(metrics.weight_norm_ratio, metrics.weight_norm_ratio_interval, STANDS_OUT, why_not=NO_NORM)
    before, interval = metrics.weight_norm_before, metrics.weight_norm_before_interval
    if before is None:
        return judged.in_part().noting("There is no block before the ME layer to compare with.")
    bounds = (at_least(before, interval, 1 / STANDS_OUT), at_most(before, interval, STANDS_OUT))
    alike = all(bound.verdict == "holds" for bound in bounds)
    times = with_interval(before, interval)
    note = f"Before, it is the least alike in block {metrics.weight_norm_before_layer}: × {times}."
    return (judged if alike else judged.in_part()).noting(note)


def _stood_out_first(metrics: RmsnormMetrics) -> Judgement:
    """Judge `weight-norm` as it was until 2026-11-26: earlier blocks by their means alone, and one way."""
    judged = at_least(metrics.weight_norm_ratio, metrics.weight_norm_ratio_interval, STANDS_OUT, why_not=NO_NORM)
    return judged if metrics.weight_norm_first_layer == metrics.me_layer else judged.in_part()


def _exceeds_others(metrics: RmsnormMetrics) -> Judgement:
    why_not = metrics.why_not or NO_OTHER
    judged = at_least(
        metrics.weight_norm_lead, metrics.weight_norm_lead_interval, STANDS_OUT, partly=1, why_not=why_not
    )
    return judged.noting(f"The next is block {metrics.weight_norm_next_layer}.")


def _special(
    value: float | None,
    interval: Interval | None,
    lead: float | None,
    lead_interval: Interval | None,
    further_out: float | None,
    why_not: str | None,
) -> Judgement:
    """Judge a quantity that must be over 0 in the ME layer, and larger there than in any other block.

    Args:
        value, interval: in the ME layer.
        lead, lead_interval: minus that of the next block.
        further_out: the share of the other blocks with a larger one.
        why_not: why nothing was measured.
    """
    judged = at_least(lead, lead_interval, ANY, why_not=why_not or NO_OTHER)
    signed = at_least(number(value, "value in the ME layer"), interval, ANY)
    is_among_first = signed.verdict == "holds" and number(further_out, "share of blocks further out") <= FEW_OTHERS
    if signed.verdict == "does not hold" or (judged.verdict == "does not hold" and not is_among_first):
        return replace(judged, verdict="does not hold")
    return judged if {signed.verdict, judged.verdict} == {"holds"} else replace(judged, verdict="holds in part")


def _delta_frac(metrics: RmsnormMetrics) -> Judgement:
    m = metrics
    judged = _special(
        m.delta_frac, m.delta_frac_interval, m.delta_frac_lead, m.delta_frac_lead_interval, m.delta_frac_share_larger,
        m.why_not,
    )  # fmt: skip
    note = f"ΔFrac is {m.delta_frac:+.3f}; the next is block {m.delta_frac_next_layer}, and "
    note += f"{m.delta_frac_share_larger:.0%} of the other blocks have a larger one."
    return judged.noting(note, f"Here K was {m.top_share:.2%} of the width." if m.top_share != 0.01 else "")


def _delta_frac_up_to_there(metrics: RmsnormMetrics) -> Judgement:
    """Judge `delta-frac` as it was until 2026-11-26: its sign, and its place among the blocks before."""
    judged = at_least(metrics.delta_frac, metrics.delta_frac_interval, ANY, why_not=metrics.why_not)
    return judged if metrics.delta_frac_top_layer == metrics.me_layer else judged.in_part()


def _delta_kl(metrics: RmsnormMetrics) -> Judgement:
    m = metrics
    low, high = m.delta_kl_interval or (None, None)
    closer = None if m.delta_kl is None else -m.delta_kl
    interval = None if low is None or high is None else (-high, -low)
    judged = _special(
        closer, interval or m.delta_kl_interval, m.delta_kl_lead, m.delta_kl_lead_interval, m.delta_kl_share_lower,
        m.why_not,
    )  # fmt: skip
    note = f"ΔKL is {m.delta_kl:+.3f} nats; the next is block {m.delta_kl_next_layer}, and {m.delta_kl_share_lower:.0%}"
    return judged.noting(f"{note} of the other blocks have a lower one.")


def _peaks_or_rises(metrics: RmsnormMetrics) -> Judgement:
    why_not = metrics.why_not or NO_OTHER
    peaks = at_least(metrics.norm_lead, metrics.norm_lead_interval, STANDS_OUT, partly=1, why_not=why_not)
    rises = at_least(metrics.norm_at_end, metrics.norm_at_end_interval, 1, why_not=why_not)
    mostly = at_least(metrics.norm_rising, metrics.norm_rising_interval, MOSTLY_RISING)
    rises = rises if mostly.verdict == "holds" else rises.in_part()
    found = (
        f"The norm in the ME layer is × {peaks.value:.3g} that in block {metrics.norm_next_layer}, the next largest. "
        f"In the last block before the trailing ones it is × {rises.value:.3g} that in the ME layer, and of two blocks "
        f"from there on the later has the larger one in {metrics.norm_rising:.0%} of pairs."
    )
    judged, as_in = (rises, "Llama and Mistral, a rise") if metrics.rises_in_paper else (peaks, "Qwen3, a peak")
    return judged.noting(f"Judged as the paper's {as_in}.", found)


CLAIMS = (
    Claim(
        id="weight-norm", fixed="2026-11-26 25a77c7",
        source="section 3.1, figure 2", figure="weight_norm", metrics=RmsnormMetrics,
        claim="The norm before the FFN makes token 0 stand out, at the ME layer first",
        statistic="WeightNorm of token 0 over the others' mean, at the ME layer and in every block before",
        criterion="≥ 2 there, and between 1/2 and 2 in every block before; in part: ≥ 2 there",
        why="'to a similar extent' before is taken as less than twice either way, 'much larger' as more",
        of_token_0=True, of_ffn=True, judge=_stands_out_first,
        former=Former(
            "≥ 2 there and at no earlier block; in part: ≥ 2 there", "2026-11-22 a1bbeb3", _stood_out_first,
            statistic="WeightNorm of token 0 over the others' mean at the ME layer",
        ),
    ),
    Claim(
        id="weight-norm-peak", fixed="2026-11-26 25a77c7",
        source="section 3.1, figure 2", figure="weight_norm", metrics=RmsnormMetrics,
        claim="The norm before the FFN amplifies token 0 at the ME layer far more than in other blocks",
        statistic="token 0's WeightNorm over the others' at the ME layer, over the same in the block with the next "
        "largest, trailing blocks apart",
        criterion="≥ 2; in part ≥ 1",
        why="'far exceeds that of other layers': as where tokens are compared, less than twice is alike",
        of_token_0=True, of_ffn=True, blocks_after=0, judge=_exceeds_others,
    ),
    Claim(
        id="delta-frac", fixed="2026-11-26 25a77c7",
        source="section 3.1, equation 1, figure 3", figure="gain_alignment", metrics=RmsnormMetrics,
        claim="The output of the norm before the FFN lies on the dims with the largest gains most at the ME layer",
        statistic="ΔFrac at the ME layer minus that in the block with the next largest, trailing blocks apart; "
        "K = 1% of the width",
        criterion="> 0, and ΔFrac > 0; in part: ΔFrac > 0 and larger in at most a tenth of the other blocks",
        why="the paper calls it large at the ME layer, and most blocks have one over 0: its place among them says it",
        of_token_0=True, of_ffn=True, blocks_after=0, judge=_delta_frac,
        former=Former(
            "> 0 and the largest up to there; in part: > 0", "2026-11-22 a1bbeb3", _delta_frac_up_to_there,
            statistic="ΔFrac at the ME layer, K = 1% of the width",
        ),
    ),
    Claim(
        id="delta-kl", fixed="2026-11-26 25a77c7",
        source="section 3.1, equation 2, figure 3", figure="gain_alignment", metrics=RmsnormMetrics,
        claim="The output of the norm before the FFN is closest to the distribution of the gains at the ME layer",
        statistic="by how many nats ΔKL at the ME layer is lower than in the block with the next lowest, trailing "
        "blocks apart",
        criterion="> 0, and ΔKL < 0; in part: ΔKL < 0 and lower in at most a tenth of the other blocks",
        why="a negative sign alone is nothing of the ME layer's own: its place among the blocks is",
        of_token_0=True, of_ffn=True, blocks_after=0, judge=_delta_kl,
        former=Former(
            "< 0", "2026-11-22 a1bbeb3",
            lambda metrics: at_most(metrics.delta_kl, metrics.delta_kl_interval, -ANY, why_not=metrics.why_not),
            statistic="ΔKL at the ME layer, nats",
        ),
    ),
    Claim(
        id="rmsnorm-peak", fixed="2026-11-26 25a77c7",
        source="appendix H, figures 11-20", figure="weight_norm", metrics=RmsnormMetrics,
        claim="The output of the norm before the FFN is largest at the ME layer, a sharp peak; in Llama and Mistral it "
        "keeps rising behind it",
        statistic="‖ĥ₀‖ at the ME layer over that in the block with the next largest; in Llama and Mistral that in the "
        "last block over that at the ME layer; trailing blocks apart",
        criterion="≥ 2, in part ≥ 1; in Llama and Mistral ≥ 1, and in 3/4 of the pairs of blocks from the ME layer "
        "on the later has the larger one, in part without that",
        why="a sharp peak is more than alike, which is less than twice; 'continues to increase' is nearer to always "
        "than to no trend, where it is half of the pairs",
        of_token_0=True, of_ffn=True, blocks_after=1, judge=_peaks_or_rises,
    ),
)  # fmt: skip
