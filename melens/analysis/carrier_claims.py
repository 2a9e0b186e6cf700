"""What `carriers` measures, and what three papers say of the few weights that carry the massive activation."""

from __future__ import annotations

from melens.claims.engine import Claim, Judgement, at_least, at_most, number, worst
from melens.report.result import Interval, Metrics

__all__ = ["CLAIMS", "CarrierMetrics"]


class CarrierMetrics(Metrics):
    """What `carriers` measures. Each mean is over texts: prompts, cut short, with distinct first tokens.

    Attributes:
        texts, tokens_per_text: how many there are, and of how many tokens at most.
        found: the super weights, each as block, row (the dim that is written) and column (the neuron that is read).
        scalar: the entry of the ME layer's down projection at its largest output and its largest input.
        scalar_agreement: of the texts, those in which it is this entry.
        share: what that entry times its input is of the output of the down projection at its row.
        weight_rank: how many entries of the same matrix are at least as large as it, itself included.
        left, left_control, left_random: the massive token's largest |h| behind the ME layer with that entry at 0, over
            the intact; with the largest other entry of the matrix at 0; with entries drawn at random at 0.
        dloss, dloss_control, dloss_random: by how much the loss (nats a token) rises then.
        sink_mass, sink_heads: intact, the attention on the massive token in the blocks behind, and the share of heads
            there that pay it over 0.3; `sink_mass_without`, `sink_heads_without`: with the scalar at 0.
        best_factor: the scalar's factor with the least mean loss.
        loss: of the intact model, nats a token.
        top_rows: how many rows of gate and up are the massive weights.
        dloss_top, dloss_rest, dloss_rows_random: by how much the loss rises with these rows at zero, with all other
            rows of the two matrices at zero, and with as many rows drawn at random at zero.
        top_over_rest: the first of these less the second.
        experts: the super experts, each as block and number.
        n_experts: among how many.
        experts_left, experts_left_random: as `left`, without the super experts, and without as many others.
        dloss_experts, dloss_experts_random: by how much the loss rises then.
        scalars_why_not, experts_why_not: why it was not measured.
    """

    experiment = "weights"
    texts: int | None = None
    tokens_per_text: int | None = None
    found: list[list[int]] | None = None
    scalar: list[int] | None = None
    scalar_agreement: float | None = None
    share: float | None = None
    share_interval: Interval | None = None
    weight_rank: int | None = None
    left: float | None = None
    left_interval: Interval | None = None
    left_control: float | None = None
    left_control_interval: Interval | None = None
    left_random: float | None = None
    left_random_interval: Interval | None = None
    dloss: float | None = None
    dloss_interval: Interval | None = None
    dloss_control: float | None = None
    dloss_control_interval: Interval | None = None
    dloss_random: float | None = None
    dloss_random_interval: Interval | None = None
    sink_mass: float | None = None
    sink_mass_without: float | None = None
    sink_heads: float | None = None
    sink_heads_without: float | None = None
    best_factor: float | None = None
    loss: float | None = None
    top_rows: int | None = None
    dloss_top: float | None = None
    dloss_top_interval: Interval | None = None
    dloss_rest: float | None = None
    dloss_rest_interval: Interval | None = None
    dloss_rows_random: float | None = None
    dloss_rows_random_interval: Interval | None = None
    top_over_rest: float | None = None
    top_over_rest_interval: Interval | None = None
    experts: list[list[int]] | None = None
    n_experts: int | None = None
    experts_left: float | None = None
    experts_left_interval: Interval | None = None
    experts_left_random: float | None = None
    experts_left_random_interval: Interval | None = None
    dloss_experts: float | None = None
    dloss_experts_interval: Interval | None = None
    dloss_experts_random: float | None = None
    dloss_experts_random_interval: Interval | None = None
    scalars_why_not: str | None = None
    experts_why_not: str | None = None


BROKEN = 0.69
"""Nats a token: twice the perplexity, the least that can be called broken, as in the claim `zero-harms`."""


def _one_scalar(metrics: CarrierMetrics) -> Judgement:
    m = metrics
    judged = at_least(m.share, m.share_interval, 0.5, partly=0.1, why_not=m.scalars_why_not)
    if m.scalar_agreement is None or m.scalar_agreement == 1:
        return judged
    return judged.noting(f"It is this entry in {m.scalar_agreement:.0%} of the texts.")


def _scalar_makes_it(metrics: CarrierMetrics) -> Judgement:
    m = metrics
    judged = at_most(m.left, m.left_interval, 0.25, partly=0.5, why_not=m.scalars_why_not)
    control = number(m.left_control, "left_control")
    note = f"With the largest other entry of the matrix at 0, {control:.0%} is left."
    return (judged.in_part() if control < 0.5 else judged).noting(note)


def _scalar_breaks(metrics: CarrierMetrics) -> Judgement:
    m = metrics
    judged = at_least(m.dloss, m.dloss_interval, BROKEN, partly=0.1, why_not=m.scalars_why_not)
    control = number(m.dloss_control, "dloss_control")
    note = f"The largest other entry of the matrix costs {control:+.3f}."
    return (judged.in_part() if control >= 0.1 else judged).noting(note)


def _few_rows_matter_most(metrics: CarrierMetrics) -> Judgement:
    m = metrics
    broken = at_least(m.dloss_top, m.dloss_top_interval, BROKEN, partly=0.1, why_not=m.scalars_why_not)
    judged = at_least(m.top_over_rest, m.top_over_rest_interval, 0, why_not=m.scalars_why_not)
    top, rest = number(m.dloss_top, "dloss_top"), number(m.dloss_rest, "dloss_rest")
    note = f"The top {m.top_rows} rows at zero cost {top:+.3f}, all others {rest:+.3f}."
    verdict = worst(judged, broken).verdict
    return Judgement(verdict, judged.value, judged.interval, judged.note).noting(note)


def _experts_make_it(metrics: CarrierMetrics) -> Judgement:
    m = metrics
    judged = at_most(m.experts_left, m.experts_left_interval, 0.1, partly=0.5, why_not=m.experts_why_not)
    control = number(m.experts_left_random, "experts_left_random")
    note = f"Without as many other experts {control:.0%} is left."
    return (judged.in_part() if control < 0.5 else judged).noting(note)


CLAIMS = (
    Claim(
        id="one-scalar", fixed="2026-11-27 22c0757",
        source="Yu et al. (2024)", figure="scalars", metrics=CarrierMetrics,
        claim="One scalar of the down projection brings the massive activation",
        statistic="w · x of the entry of the ME layer's down projection at its largest output and its largest input, "
        "over that output",
        criterion="≥ 0.5; in part ≥ 0.1",
        why="Yu et al. read the scalar off the two spikes because the product dominates the sum: it is more than all "
        "else together; a tenth of it is still a thousand times an entry's fair share",
        of_ffn=True, judge=_one_scalar,
    ),
    Claim(
        id="scalar-makes-massive", fixed="2026-11-27 22c0757",
        source="Yu et al. (2024), abstract", figure="scaling", metrics=CarrierMetrics,
        claim="Without that scalar the massive activation falls",
        statistic="largest |h| of the massive token behind the ME layer with the scalar at 0, over the intact",
        criterion="≤ 0.25, and ≥ 0.5 with the largest other entry of the matrix at 0; in part ≤ 0.5",
        why="Yu et al. say that the weight induces the activation, so what else does leaves a quarter at most; half of "
        "it is no longer the same activation; what any large entry does is no effect of this one",
        of_ffn=True, judge=_scalar_makes_it,
    ),
    Claim(
        id="scalar-breaks", fixed="2026-11-27 22c0757",
        source="Yu et al. (2024), abstract", figure="scaling", metrics=CarrierMetrics,
        claim="Without that scalar the model is broken",
        statistic="rise of the loss (nats a token) with the scalar at 0",
        criterion="≥ 0.69, and < 0.1 with the largest other entry of the matrix at 0; in part ≥ 0.1",
        why="0.69 doubles the perplexity, the least that can be called broken (Yu et al. see it rise a thousandfold); "
        "0.1 is a tenth more; other large entries do little",
        of_ffn=True, judge=_scalar_breaks,
    ),
    Claim(
        id="few-rows", fixed="2026-11-27 22c0757",
        source="Oh et al. (2024), abstract", figure="massive_weights", metrics=CarrierMetrics,
        claim="The few rows of gate and up that feed the largest neurons matter more than all others",
        statistic="rise of the loss (nats a token) with these rows at zero, less that with all other rows of the ME "
        "layer's gate and up at zero",
        criterion="≥ 0, and ≥ 0.69 with these rows at zero; in part ≥ 0.1 with them",
        why="Oh et al. call the one entirely disruptive and the other a minor drop: at least the order must hold, and "
        "disruptive is at least twice the perplexity",
        of_ffn=True, judge=_few_rows_matter_most,
    ),
    Claim(
        id="super-experts", fixed="2026-11-27 22c0757",
        source="Su et al. (2025), abstract", figure="experts", metrics=CarrierMetrics,
        claim="A few experts of a mixture make the massive activation",
        statistic="largest |h| of the massive token behind the ME layer without the super experts, over the intact",
        criterion="≤ 0.1, and ≥ 0.5 without as many other experts; in part ≤ 0.5",
        why="Su et al. see it vanish: a tenth is an order of magnitude less; half of it is no longer the same "
        "activation; what any expert does is no effect of these",
        judge=_experts_make_it,
    ),
)  # fmt: skip
