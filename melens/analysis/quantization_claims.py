"""What `quantization` measures, and what others say of massive activations and quantisation: metrics and claims.

The paper itself says nothing of quantisation: it names Bondarenko et al. (2023) and Son et al. (2024) as related work.
"""

from __future__ import annotations

from pydantic import Field

from melens.claims.engine import Claim, Judgement, NotMeasuredError, at_least, at_most
from melens.report.result import Interval, Metrics

__all__ = ["CLAIMS", "HARMLESS", "QuantizationMetrics"]

HARMLESS = 0.01
"""Nats a token: 1% of the perplexity."""


class QuantizationMetrics(Metrics):
    """What `quantization` measures. Each mean is over texts; Δloss is the rise over the same model in full precision.

    "Static" is one scale a layer, fixed on the prompts; "tensor" one a text; "token" one a token. All these are of
    activations at 8 bits, with the weights as they are.

    Attributes:
        texts, tokens_per_text: on which the losses are measured.
        predictions_per_text: how many of a text's predictions count, mean over texts: all but those made from token 0
            and from massive tokens.
        massive_per_text: how many of a text's tokens are massive in the output of any block, mean over texts.
        calibration_prompts: on which the static scales are fixed.
        linear_layers: whose weights and inputs are rounded.
        share_of_weights: of the blocks' weights, that they hold.
        are_of_4_bits: whether the weights were rounded to 4 bits or fewer before, as those of a GGUF.
        has_gates: whether attention is gated; a gate reads the activations before they are rounded.
        bits: that were tried.
        loss: in full precision, nats a token.
        dloss_static, dloss_tensor, dloss_token: Δloss.
        exempt_share_static, exempt_share_tensor: share of it that is gone with the massive tokens in full precision and
            left out of the scales: of the mean over texts, the interval by the delta method.
        prefix: the token put before the texts in full precision, None where they begin with it.
        prefix_is_massive: whether it is massive there.
        massive_behind_prefix: massive tokens of a text behind it, mean over texts.
        prompts_massive_behind_prefix: how many of the prompts on which static scales are fixed have such a token.
        prefix_over_token: Δloss static behind the prefix, less Δloss token without it.
        mask, mask_share: WeMask at the attention input, and the share of Δloss tensor that is gone under it, as above.
        best_mask, best_mask_share: the mask under which most of it is gone.
        exempt_why_not, prefix_why_not, mask_why_not, bits_why_not: why it was not measured.
    """

    experiment = "quantization"
    rests_on_states = False
    texts: int | None = None
    tokens_per_text: int | None = None
    predictions_per_text: float | None = None
    massive_per_text: float | None = None
    calibration_prompts: int | None = None
    linear_layers: int | None = None
    share_of_weights: float | None = None
    are_of_4_bits: bool | None = None
    has_gates: bool | None = None
    bits: list[int] = Field(default_factory=list)
    loss: float | None = None
    dloss_static: float | None = None
    dloss_static_interval: Interval | None = None
    dloss_tensor: float | None = None
    dloss_tensor_interval: Interval | None = None
    dloss_token: float | None = None
    dloss_token_interval: Interval | None = None
    exempt_share_static: float | None = None
    exempt_share_static_interval: Interval | None = None
    exempt_share_tensor: float | None = None
    exempt_share_tensor_interval: Interval | None = None
    prefix: str | None = None
    prefix_is_massive: bool | None = None
    massive_behind_prefix: float | None = None
    prompts_massive_behind_prefix: int | None = None
    prefix_over_token: float | None = None
    prefix_over_token_interval: Interval | None = None
    mask: str | None = None
    mask_share: float | None = None
    mask_share_interval: Interval | None = None
    best_mask: str | None = None
    best_mask_share: float | None = None
    best_mask_share_interval: Interval | None = None
    exempt_why_not: str | None = None
    prefix_why_not: str | None = None
    mask_why_not: str | None = None
    bits_why_not: str | None = None


def _is_due_to_the_massive_token(metrics: QuantizationMetrics) -> Judgement:
    share, interval = metrics.exempt_share_static, metrics.exempt_share_static_interval
    return at_least(share, interval, 0.5, partly=0.1, why_not=metrics.exempt_why_not or metrics.bits_why_not)


def _is_as_good_with_a_prefix(metrics: QuantizationMetrics) -> Judgement:
    more, interval = metrics.prefix_over_token, metrics.prefix_over_token_interval
    why_not = metrics.prefix_why_not or metrics.bits_why_not
    if metrics.prefix_is_massive is False:
        raise NotMeasuredError(f"The prefix {metrics.prefix} is not massive, so it takes no other token's place.")
    judged = at_most(more, interval, HARMLESS, partly=0.1, why_not=why_not)
    if not metrics.prompts_massive_behind_prefix:
        return judged
    left, prompts = metrics.prompts_massive_behind_prefix, metrics.calibration_prompts
    return judged.noting(f"{left} of {prompts} prompts have a massive token behind it, to which scales are fixed.")


def _is_easier_under_the_mask(metrics: QuantizationMetrics) -> Judgement:
    share, interval = metrics.mask_share, metrics.mask_share_interval
    judged = at_least(share, interval, 0.5, partly=0.1, why_not=metrics.mask_why_not or metrics.bits_why_not)
    if metrics.best_mask in (None, metrics.mask):
        return judged
    return judged.noting(f"Most of it, {metrics.best_mask_share:.0%}, is gone under {metrics.best_mask}.")


CLAIMS = (
    Claim(
        id="quant-fails", fixed="2026-11-27 4c6223b",
        source="follow-up question: Bondarenko et al. (2023), Son et al. (2024)",
        figure="dloss_by_bits", metrics=QuantizationMetrics,
        claim="Activations at 8 bits with one fixed scale for a tensor do the model harm",
        statistic="rise of the loss (nats a token) with what enters each linear layer at 8 bits, one scale a layer "
        "that was fixed on other texts",
        criterion="≥ 0.1; in part ≥ 0.01",
        why="a tenth more perplexity is a smaller model's; 1% is the second decimal of a perplexity around 5",
        judge=lambda metrics: at_least(
            metrics.dloss_static, metrics.dloss_static_interval, 0.1, partly=HARMLESS, why_not=metrics.bits_why_not
        ),
    ),
    Claim(
        id="quant-massive", fixed="2026-11-27 4c6223b",
        source="follow-up question: Son et al. (2024), Chen et al. (2024, PrefixQuant)",
        figure="dloss_by_bits", metrics=QuantizationMetrics,
        claim="The outliers of the massive token are why",
        statistic="share of that rise that is gone with the massive tokens alone in full precision, and left out of "
        "the scales",
        criterion="≥ 0.5; in part ≥ 0.1", why="'the' cause makes most of it, a cause a tenth",
        judge=_is_due_to_the_massive_token,
    ),
    Claim(
        id="quant-token", fixed="2026-11-27 4c6223b",
        source="follow-up question: Chen et al. (2024, PrefixQuant), on earlier work",
        figure="dloss_by_bits", metrics=QuantizationMetrics,
        claim="A scale for each token makes activations at 8 bits harmless",
        statistic="rise of the loss (nats a token) with what enters each linear layer at 8 bits, one scale a token",
        criterion="≤ 0.01; in part ≤ 0.1", why="as of quant-fails: 1% of the perplexity, and a tenth",
        judge=lambda metrics: at_most(
            metrics.dloss_token, metrics.dloss_token_interval, HARMLESS, partly=0.1, why_not=metrics.bits_why_not
        ),
    ),
    Claim(
        id="quant-prefix", fixed="2026-11-27 4c6223b",
        source="follow-up question: Chen et al. (2024, PrefixQuant), 'static quantization beats dynamic'",
        figure="dloss_by_mask", metrics=QuantizationMetrics,
        claim="Behind a massive token in the cache, one fixed scale for a tensor is as good as one for each token",
        statistic="rise of the loss (nats a token) at 8 bits with fixed scales behind the prefix, less that with a "
        "scale for each token and no prefix",
        criterion="≤ 0.01; in part ≤ 0.1", why="as of quant-token; they train scales besides, and see it at 4 bits",
        judge=_is_as_good_with_a_prefix,
    ),
    Claim(
        id="quant-mask", fixed="2026-11-27 4c6223b",
        source="follow-up question: the paper masks massive activations and says nothing of quantisation",
        figure="dloss_by_mask", metrics=QuantizationMetrics,
        claim="WeMask makes a model easier to quantise",
        statistic="share of the rise of the loss with activations at 8 bits, one scale a text, that is gone under "
        "WeMask at the attention input",
        criterion="≥ 0.5; in part ≥ 0.1", why="as of quant-massive, whose cause it would take away",
        judge=_is_easier_under_the_mask,
    ),
)  # fmt: skip
