"""What `eviction` measures, and what it says of sinks in the cache and of WeMask on long texts: metrics and claims."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from melens.analysis.massive_state_claims import HARMLESS
from melens.claims.engine import Claim, Judgement, NotMeasuredError, at_least, at_most, number
from melens.report.result import Interval, Metrics

__all__ = ["CLAIMS", "RESTORED", "RISES", "EvictionMetrics"]

RISES = 0.4
"""Nats a token: the least rise in table 2 of Xiao et al. (2023) is Falcon-7B's, ln(17.90 / 12.12); Llama-2's is 5.9."""

RESTORED = 0.05
"""Nats a token, 5% of the perplexity: theirs is 5.40 with four sinks and 5.43 recomputed, but on one set of texts."""


class EvictionMetrics(Metrics):
    """What `eviction` measures. Losses are in nats a token, means over texts, of queries that have lost tokens.

    A rise is that over recomputation: the same tokens with half a cache to a whole one before them, run anew.

    Attributes:
        cache: tokens that the sliding caches hold.
        texts, tokens_per_text, text_first_tokens: what losses were measured on; how many first tokens differ.
        trained_context: tokens of the longest text that the model was trained on, as its config says.
        mask: the mask, in words.
        loss_recomputed, loss_full: without a mask; in the latter every token is kept.
        rise_by_policy, rise_by_policy_masked: by cache, over recomputation, without the mask and under it.
        rise_without, rise_with_four, rise_with_random: with no sink kept, with the first four tokens, and with four
            random early ones, whose interval is over texts and draws.
        rise_without_masked: with no sink kept, under the mask.
        rise_spared: by how much less it rises than without the mask, paired over texts.
        loss_masked_less: with every token kept, the loss under the mask less that without, in the second half of texts.
        needles: how many questions about a number told earlier in a text of twice the cache.
        needle_by_policy, needle_by_policy_masked: by cache, the share answered rightly.
        mask_why_not, needle_why_not: why not measured.
    """

    experiment = "eviction"
    rests_on_states = False
    cache: int = 0
    texts: int = 0
    tokens_per_text: int = 0
    text_first_tokens: int = 0
    trained_context: int | None = None
    mask: str | None = None
    loss_recomputed: float | None = None
    loss_full: float | None = None
    rise_by_policy: dict[str, float] = Field(default_factory=dict)
    rise_by_policy_masked: dict[str, float] | None = None
    rise_without: float | None = None
    rise_without_interval: Interval | None = None
    rise_with_four: float | None = None
    rise_with_four_interval: Interval | None = None
    rise_with_random: float | None = None
    rise_with_random_interval: Interval | None = None
    rise_without_masked: float | None = None
    rise_without_masked_interval: Interval | None = None
    rise_spared: float | None = None
    rise_spared_interval: Interval | None = None
    loss_masked_less: float | None = None
    loss_masked_less_interval: Interval | None = None
    needles: int | None = None
    needle_by_policy: dict[str, float] | None = None
    needle_by_policy_masked: dict[str, float] | None = None
    mask_why_not: str | None = None
    needle_why_not: str | None = None


def _without_is_worse(metrics: EvictionMetrics) -> Judgement:
    return at_least(metrics.rise_without, metrics.rise_without_interval, RISES, partly=RESTORED)


def _rise_to_undo(metrics: EvictionMetrics) -> float:
    rise = number(metrics.rise_without, "rise_without")
    if rise <= RESTORED:
        raise NotMeasuredError(f"Without sinks the loss does not rise ({rise:+.3f} nats), so nothing can undo it.")
    return rise


def _four_restore(metrics: EvictionMetrics) -> Judgement:
    rise = _rise_to_undo(metrics)
    return at_most(
        metrics.rise_with_four, metrics.rise_with_four_interval, RESTORED, partly=max(RESTORED, 0.1 * rise)
    ).noting(f"Without sinks it is {rise:+.3f}.")


def _random_do_not(metrics: EvictionMetrics) -> Judgement:
    rise = _rise_to_undo(metrics)
    return at_least(metrics.rise_with_random, metrics.rise_with_random_interval, rise / 2).noting(
        f"Without any kept it is {rise:+.3f}."
    )


def _mask_helps_eviction(metrics: EvictionMetrics) -> Judgement:
    rise = _rise_to_undo(metrics)
    judged = at_most(
        metrics.rise_without_masked, metrics.rise_without_masked_interval, rise / 2, why_not=metrics.mask_why_not
    )
    spared = (metrics.rise_spared_interval or (None, None))[0]
    if judged.verdict == "does not hold" and spared is not None and spared > 0:  # NaN is not
        judged = replace(judged, verdict="holds in part")
    return judged.noting(f"Without the mask it is {rise:+.3f}.")


def _mask_helps_long_texts(metrics: EvictionMetrics) -> Judgement:
    return at_most(metrics.loss_masked_less, metrics.loss_masked_less_interval, -HARMLESS, why_not=metrics.mask_why_not)


CLAIMS = (
    Claim(
        id="sinks-needed-in-cache", fixed="2026-11-27 d358885",
        source="Xiao et al. (2023), section 3.1, tables 1 and 2", figure="loss_by_position", metrics=EvictionMetrics,
        claim="Without the first tokens the loss explodes once they leave the cache",
        statistic="rise of the loss (nats a token) over recomputation once the cache, which keeps no sinks, has lost "
        "tokens",
        criterion="≥ 0.4; in part: ≥ 0.05",
        why="the least rise that they show, Falcon-7B's, is ln(17.90 / 12.12) = 0.39; 0.05 is 5% of the perplexity",
        needs_me_layer=False, judge=_without_is_worse,
    ),
    Claim(
        id="four-sinks-restore", fixed="2026-11-27 d358885",
        source="Xiao et al. (2023), section 3.2, table 2", figure="loss_rise", metrics=EvictionMetrics,
        claim="Four kept first tokens restore the loss",
        statistic="rise of the loss (nats a token) over recomputation with the first four tokens kept in the cache",
        criterion="≤ 0.05; in part: ≤ a tenth of the rise without",
        why="theirs is a perplexity of 5.40 against 5.43 recomputed; 5% allow for other texts and a shorter cache",
        needs_me_layer=False, judge=_four_restore,
    ),
    Claim(
        id="random-tokens-do-not", fixed="2026-11-27 d358885",
        source="Xiao et al. (2023), section 3.1", figure="loss_rise", metrics=EvictionMetrics,
        claim="It is the first tokens that must be kept: as many other early ones do not restore the loss",
        statistic="rise of the loss (nats a token) over recomputation with four random tokens kept instead, of the "
        "first 64 but token 0",
        criterion="≥ half of the rise without any",
        why="the paper gives no number; what undoes less than half of a rise does not restore",
        needs_me_layer=False, judge=_random_do_not,
    ),
    Claim(
        id="mask-spares-sinks", fixed="2026-11-27 d358885",
        source="follow-up question", figure="loss_rise", metrics=EvictionMetrics,
        claim="With WeMask a cache needs sinks less",
        statistic="rise of the loss (nats a token) over recomputation, both under the mask, with no sinks kept",
        criterion="≤ half of the rise without the mask; in part: less than that, the interval over texts too",
        why="what leaves more than half of a rise does not do away with its cause",
        judge=_mask_helps_eviction,
    ),
    Claim(
        id="mask-helps-long-texts", fixed="2026-11-27 d358885",
        source="follow-up question", figure="loss_by_position", metrics=EvictionMetrics,
        claim="WeMask helps on long texts",
        statistic="loss (nats a token) under the mask less that without, every token kept, in the second half of texts",
        criterion="≤ -0.01",
        why="1% of the perplexity, the most that counts as no change in mean-harmless",
        judge=_mask_helps_long_texts,
    ),
)  # fmt: skip
