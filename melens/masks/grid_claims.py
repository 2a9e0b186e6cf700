"""What the paper claims of masks, and how a grid's numbers (`grid_metrics.py`) decide whether it holds: `CLAIMS`."""

from __future__ import annotations

from dataclasses import replace

from melens.claims.engine import Claim, Former, Judgement, NotMeasuredError, Verdict, at_least, at_most, number, worst
from melens.masks.grid_metrics import SINK_REMOVED, SINK_WEAKENED, MaskGridMetrics

__all__ = ["CLAIMS"]


def _weakens(metrics: MaskGridMetrics) -> Judgement:
    judged = at_most(
        metrics.sink_ratio, metrics.sink_ratio_interval, 0.5, partly=SINK_WEAKENED, why_not=metrics.sink_why_not
    )
    left = number(metrics.sink_ratio, "sink_ratio")
    low, high = judged.interval or (left, left)
    if left < SINK_REMOVED or high >= 1:
        judged = replace(judged, verdict="does not hold")
    elif low < SINK_REMOVED:
        judged = replace(judged, verdict="holds in part")
    return judged.noting(f"At rate {metrics.paper_rate:g}.")


def _weakens_before(metrics: MaskGridMetrics) -> Judgement:
    judged = at_most(metrics.sink_ratio, metrics.sink_ratio_interval, 0.9, why_not=metrics.sink_why_not)
    low, high = judged.interval or (metrics.sink_ratio or 0, metrics.sink_ratio or 0)
    verdict: Verdict = "does not hold" if low < 0.1 or high >= 1 else "holds" if high <= 0.9 else "holds in part"
    return replace(judged, verdict=verdict)


def _harmless(metrics: MaskGridMetrics) -> Judgement:
    if metrics.weight_where_destroyed is None and metrics.controls_dloss is not None:
        most = number(metrics.controls_dloss, "controls_dloss")
        note = f"Random and magnitude masks destroy nowhere in the grid: they cost {most:.2g} nats a token at most."
        return Judgement("does not hold", note=note)
    judged, sites = _harmless_before(metrics), metrics.destroyed_at
    if sites is None:
        return judged
    places = [f"{select} masks destroy at {', '.join(at) or 'no site'}" for select, at in sites.items()]
    shown = judged if all("attn_in" in at for at in sites.values()) else judged.in_part()
    return shown.noting(f"{'; '.join(places)}.")


def _harmless_before(metrics: MaskGridMetrics) -> Judgement:
    judged = at_most(
        metrics.weight_where_destroyed, metrics.weight_where_destroyed_interval, 0.1, why_not=metrics.harm_why_not
    )
    return judged if all((metrics.destroyed_by or {}).values()) else judged.in_part()


def _moderate(metrics: MaskGridMetrics) -> Judgement:
    judged = at_most(metrics.moderate_dloss, metrics.moderate_dloss_interval, 0, why_not=metrics.moderate_why_not)
    over_full = at_most(metrics.moderate_over_full, metrics.moderate_over_full_interval, 0)
    left = at_most(metrics.moderate_sink_ratio, metrics.moderate_sink_ratio_interval, SINK_WEAKENED)
    # at most 0 would hold of a mask that changes nothing
    over_none, over_all = ((each.interval or (0, each.value or 0))[1] for each in (judged, over_full))
    full_is_better = over_full.interval is not None and over_full.interval[0] > 0
    verdict: Verdict = "does not hold"
    if over_none < 0 and not full_is_better and (judged.interval is not None or over_all < 0):
        shown = judged.interval is not None and over_all < 0 and left.verdict == "holds"
        verdict = "holds" if shown else "holds in part"
    more = -(over_full.value or 0)
    return replace(judged, verdict=verdict).noting(
        f"At rate {metrics.moderate_rate:g}, chosen on the other half of the texts, which leaves {left.value:.2g} "
        f"of the sink. Rate 1 leaves {metrics.full_sink_ratio:.2g} and has a loss {abs(more):.2g} nats "
        f"{'higher' if more > 0 else 'lower'} than that."
    )


def _moderate_before(metrics: MaskGridMetrics) -> Judgement:
    judged = at_most(metrics.best_dloss, metrics.best_dloss_interval, 0, why_not=metrics.moderation_why_not)
    verdict: Verdict = "does not hold"
    if number(metrics.best_dloss, "best_dloss") < 0 and not metrics.best_rate_is_largest:
        verdict = "holds" if judged.interval is not None and judged.interval[1] < 0 else "holds in part"
    return replace(judged, verdict=verdict)


def _is_of_the_start(metrics: MaskGridMetrics) -> Judgement:
    if metrics.paper_start_ratio is None:
        return at_least(None, None, 2, why_not=metrics.paper_start_why_not)
    ratio = number(metrics.paper_start_ratio, "paper_start_ratio")
    margin = at_least(metrics.paper_start_margin, metrics.paper_start_margin_interval, 0)
    verdict: Verdict = "holds" if margin.verdict == "holds" else "holds in part" if ratio > 1 else "does not hold"
    note = f"At rate {metrics.paper_start_rate:g}. The strongest elsewhere is in block {metrics.paper_start_strongest}."
    return Judgement(verdict, ratio, note=note).noting(margin.note)


def _is_of_the_start_before(metrics: MaskGridMetrics) -> Judgement:
    judged = at_least(metrics.start_effect_ratio, None, 2, why_not=metrics.start_why_not)
    return replace(judged, verdict="holds in part") if 1 < (judged.value or 0) < 2 else judged


def _restores(metrics: MaskGridMetrics) -> Judgement:
    if metrics.text_first_tokens == 1:
        return Judgement("trivial here", note="All texts share their first token, so its states are the same.")
    of_parts = {
        "attention input": (metrics.input_restored, metrics.input_restored_interval, metrics.input_cosines),
        "key": (metrics.key_restored, metrics.key_restored_interval, metrics.key_cosines),
    }
    judged = []
    for share, interval, _ in of_parts.values():
        if share is None:
            continue
        one = at_least(share, interval, 0.5, partly=0.1)
        is_none = one.interval is not None and one.interval[0] <= 0
        judged.append(replace(one, verdict="does not hold") if is_none else one)
    if not judged:
        raise NotMeasuredError(metrics.diversity_why_not or "The result does not have it.")
    said = [
        f"cosine of the {part} {cosines[0]:.4f} at the ME layer, {cosines[1]:.4f} behind it, {cosines[2]:.4f} masked"
        for part, (_, _, cosines) in of_parts.items()
        if cosines is not None
    ]
    return worst(*sorted(judged, key=lambda each: each.value or 0)).noting(f"{'; '.join(said)}.")


CLAIMS: tuple[Claim[MaskGridMetrics], ...] = (
    Claim(
        id="mask-weakens-sink", fixed="2026-11-26 25a77c7",
        source="section 6, figure 8", figure="by_block", metrics=MaskGridMetrics,
        claim="WeMask does not remove the sink but substantially reduces it",
        statistic="sink mass behind the ME layer with the paper's mask, relative to without",
        criterion="from 0.1 to 0.5 with its whole interval; in part: from 0.1 to 0.9 on average, and below 1 with it",
        why="substantially is at least half, so that no more is left than was taken; a tenth less is the least that a "
        "map would show, a tenth left is next to none",
        former=Former("between 0.1 and 0.9; in part below 1", "2026-11-22 aed234a", _weakens_before),
        of_token_0=True, blocks_after=1, judge=_weakens,
    ),
    Claim(
        id="mask-weight-harmless", fixed="2026-11-26 25a77c7",
        source="section 5, table 5, appendix E", figure="loss_change", metrics=MaskGridMetrics,
        claim="Weight-guided masks are harmless or better where random and magnitude masks destroy",
        statistic="largest Δloss of a weight-guided mask where a random or a magnitude mask of its rate and site costs "
        "a nat or more",
        criterion="≤ 0.1 nats, with random and magnitude masks both destroying at attn_in, where WeMask is; in part: "
        "elsewhere, or only one does; not if neither does, at rates up to 0.1 or more",
        why="0.1 nats is a tenth more perplexity; with a nat lost a token has less than 1/e of its probability; that "
        "others destroy is half of the claim, so harmless ones refute it",
        former=Former(
            "≤ 0.1 nats, with random and magnitude masks both destroying somewhere; in part: only one does",
            "2026-11-22 aed234a", _harmless_before,
        ),
        of_token_0=True, judge=_harmless,
    ),
    Claim(
        id="mask-moderate", fixed="2026-11-26 25a77c7",
        source="section 6", figure="loss_and_sinks", metrics=MaskGridMetrics,
        claim="Moderate attenuation of the sink is better than none and than full",
        statistic="Δloss on the odd texts of the rate of the paper's mask that has the lowest loss on the even ones, "
        "of those below 1 that leave 0.1 to 0.9 of the sink",
        criterion="whole interval < 0, of its loss over that of rate 1 too, and of the sink ≤ 0.9; in part: better "
        "than none alone is shown, and full removal is not shown to be better",
        why="better is any lower loss on the same tokens; a rate is judged on texts that did not choose it, as the "
        "lowest of several losses is below 0 by chance; rate 1 is all that the mask can take of token 0",
        former=Former(
            "< 0, at a rate below the largest; in part: on average only", "2026-11-22 aed234a", _moderate_before,
            statistic="lowest Δloss of the paper's mask over the rates",
        ),
        of_token_0=True, judge=_moderate,
    ),
    Claim(
        id="mask-start", fixed="2026-11-26 25a77c7",
        source="follow-up question", figure="starts", metrics=MaskGridMetrics,
        claim="A mask's effect is specific to starting right after the ME layer",
        statistic="change of the sink mass by the paper's mask in the block behind the ME layer alone, over the "
        "largest by the same mask in another block alone",
        criterion="≥ 2, with the whole interval of the one less twice the other over 0; in part > 1",
        why="twice the next is the least that can be called specific",
        former=Former(
            "≥ 2; in part > 1", "2026-11-22 aed234a", _is_of_the_start_before,
            statistic="the same of the first mask of the grid",
        ),
        of_token_0=True, judge=_is_of_the_start,
    ),
    Claim(
        id="mask-restores-diversity", fixed="2026-11-26 25a77c7",
        source="abstract, third contribution, section 4.2", figure="by_block", metrics=MaskGridMetrics,
        claim="WeMask relaxes the rigidity of token 0 and restores the diversity of what attention reads of it",
        statistic="share of the diversity (1 - cosine between texts) that token 0 lost from the ME layer's attention "
        "to those behind it and that the paper's mask gives back: of the attention input or the key, the worse",
        criterion="≥ 0.5; in part: ≥ 0.1 on average, and over 0 with its whole interval",
        why="what is restored was there before: where attention last read token 0 before it was massive; half of it is "
        "more than stays lost, a tenth is the least that one would see",
        of_token_0=True, blocks_after=1, judge=_restores,
    ),
)  # fmt: skip
