"""What `valley` measures, and what Queipo-de-Llano et al. (2025) say of it: metrics and claims."""

from __future__ import annotations

from pydantic import Field

from melens.claims.engine import Claim, Judgement, NotMeasuredError, at_least, at_most, number
from melens.models.layout import listed
from melens.report.result import Interval, Metrics

__all__ = ["CLAIMS", "LEAST_FALL", "LEAST_RATE", "ValleyMetrics"]

LEAST_FALL, LEAST_RATE = 0.1, 0.1
"""A fall of the normalised entropy, and a sink rate, below which there is nothing of which a share could be left."""


class ValleyMetrics(Metrics):
    """What `valley` measures. Means are over inputs, distinct first tokens; entropies are normalised, from 0 to 1.

    "Before" is the mean over the blocks before the ME layer, "inside" over `Study.massive_layers`: from where the
    massive state is formed to the last two blocks. "Without" is without token 0's row.

    Attributes:
        inputs, valley_prompts, valley_tokens: distinct first tokens, prompts, and to how many tokens these are cut.
        prompts_with_others: measured prompts in which another token than the first is massive too; only where no
            prompt of that length is without.
        entropy_before, entropy_inside, entropy_before_without, entropy_inside_without: of what leaves a block.
        entropy_ratio: inside / before.
        fall, fall_without: before - inside, with token 0 and without.
        fall_left: fall without token 0 over the fall with it; the divisor is the mean over inputs.
        fall_why_not, left_why_not: why these were not measured.
        valley_begins, valley_ends, massive_ends: by block, how many inputs' valley begins and ends there, and in how
            many token 0 is massive there for the last time. An input's valley is the unbroken run of blocks around the
            one of the least entropy in which it is below half way between its largest and its least.
        earlier_valley: the blocks before it that are below half way too, in the mean over inputs.
        begins_at_me, ends_with_massive: share of inputs whose valley begins from the ME layer to where the state is
            formed, and ends at most one block from the last in which token 0 is massive.
        norm_correlation: Spearman's, of entropy and token 0's norm over the blocks of an input.
        sink_correlation: the same of the entropy of what leaves a block and the sink rate in the next one, which reads
            it; 0 where the sink rate is the same in all blocks.
        sink_correlation_why_not: why not measured.
        bound_before, bound_inside: the largest entropy that the norms and angles of token 0 leave (corollary 2).
        row_share_inside, aligned_share_inside: share of the states' energy in token 0's row, and along its direction.
        removed_layers: the blocks whose FFN write to token 0 is removed.
        norm_left: token 0's norm without it over the intact one, inside.
        entropy_removed, entropy_removed_without: inside, without the FFN write.
        lifted_removed: entropy without the write less the intact one, over what token 0's row takes from the intact one
            (the entropy without token 0 less that with it), mean over inputs.
        sink_rate_intact, sink_rate_removed: in the blocks that read the massive state, up to the last two.
        sinks_stay: in which block without the write most heads have a sink, if over 0.3 of them.
        sinks_left: sink rate without the write over the intact one; the divisor is the mean over inputs.
        removed_why_not, lifted_why_not, sinks_left_why_not: why not measured.
        mask_rate, entropy_masked, entropy_masked_without, sink_rate_masked, lifted_masked: the same under WeMask.
        mask_why_not: why not measured.
    """

    experiment = "valley"
    inputs: int | None = None
    valley_prompts: int | None = None
    valley_tokens: int | None = None
    prompts_with_others: int = 0
    entropy_before: float | None = None
    entropy_before_without: float | None = None
    entropy_inside: float | None = None
    entropy_inside_interval: Interval | None = None
    entropy_inside_without: float | None = None
    entropy_inside_without_interval: Interval | None = None
    entropy_ratio: float | None = None
    entropy_ratio_interval: Interval | None = None
    fall: float | None = None
    fall_interval: Interval | None = None
    fall_without: float | None = None
    fall_without_interval: Interval | None = None
    fall_left: float | None = None
    fall_left_interval: Interval | None = None
    fall_why_not: str | None = None
    left_why_not: str | None = None
    valley_begins: dict[str, int] | None = None
    valley_ends: dict[str, int] | None = None
    massive_ends: dict[str, int] | None = None
    earlier_valley: list[int] = Field(default_factory=list)
    begins_at_me: float | None = None
    begins_at_me_interval: Interval | None = None
    ends_with_massive: float | None = None
    ends_with_massive_interval: Interval | None = None
    norm_correlation: float | None = None
    norm_correlation_interval: Interval | None = None
    sink_correlation: float | None = None
    sink_correlation_interval: Interval | None = None
    sink_correlation_why_not: str | None = None
    bound_before: float | None = None
    bound_inside: float | None = None
    bound_inside_interval: Interval | None = None
    row_share_inside: float | None = None
    aligned_share_inside: float | None = None
    removed_layers: list[int] = Field(default_factory=list)
    norm_left: float | None = None
    norm_left_interval: Interval | None = None
    entropy_removed: float | None = None
    entropy_removed_interval: Interval | None = None
    entropy_removed_without: float | None = None
    entropy_removed_without_interval: Interval | None = None
    lifted_removed: float | None = None
    lifted_removed_interval: Interval | None = None
    sink_rate_intact: float | None = None
    sink_rate_removed: float | None = None
    sinks_stay: str | None = None
    sinks_left: float | None = None
    sinks_left_interval: Interval | None = None
    removed_why_not: str | None = None
    lifted_why_not: str | None = None
    sinks_left_why_not: str | None = None
    mask_rate: float | None = None
    entropy_masked: float | None = None
    entropy_masked_interval: Interval | None = None
    entropy_masked_without: float | None = None
    entropy_masked_without_interval: Interval | None = None
    sink_rate_masked: float | None = None
    lifted_masked: float | None = None
    lifted_masked_interval: Interval | None = None
    mask_why_not: str | None = None


# --- Claims -----------------------------------------------------------------------------------------------------------


def _check_alone(metrics: ValleyMetrics) -> None:
    if metrics.prompts_with_others:
        raise NotMeasuredError("In every prompt another token than the first is massive too, which stays.")


def _check_removed(metrics: ValleyMetrics) -> None:
    """A token that another block makes massive as well is no token without its massive activation."""
    _check_alone(metrics)
    if metrics.norm_left is not None and number(metrics.norm_left, "norm_left") > 0.5:
        raise NotMeasuredError(
            f"Without the FFN write {metrics.norm_left:.0%} of token 0's norm is left: it stays massive."
        )


def _falls(metrics: ValleyMetrics) -> Judgement:
    why_not = metrics.fall_why_not
    return at_most(metrics.entropy_ratio, metrics.entropy_ratio_interval, 0.5, partly=0.8, why_not=why_not)


def _begins(metrics: ValleyMetrics) -> Judgement:
    judged = at_least(
        metrics.begins_at_me, metrics.begins_at_me_interval, 0.8, partly=0.5, why_not=metrics.fall_why_not
    )
    begins = f"It begins {_in_words(metrics.valley_begins)}."
    earlier = metrics.earlier_valley
    return judged.noting(begins, f"The entropy is below half way before too, in {listed(earlier)}." if earlier else "")


def _ends(metrics: ValleyMetrics) -> Judgement:
    interval, why_not = metrics.ends_with_massive_interval, metrics.fall_why_not
    judged = at_least(metrics.ends_with_massive, interval, 0.8, partly=0.5, why_not=why_not)
    ends = f"It ends {_in_words(metrics.valley_ends)}"
    return judged.noting(f"{ends}; token 0 is massive for the last time {_in_words(metrics.massive_ends)}.")


def _in_words(counts: dict[str, int] | None) -> str:
    """Say where: "in block 3 (30 inputs), in block 5 (6)"."""
    (first, n), *others = (counts or {}).items()
    rest = (f"in block {layer} ({times})" for layer, times in others)
    return ", ".join([f"in block {first} ({n} input{'s' if n != 1 else ''})", *rest])


def _is_of_all_tokens(metrics: ValleyMetrics) -> Judgement:
    _check_alone(metrics)
    why_not = metrics.fall_why_not or metrics.left_why_not
    return at_least(metrics.fall_left, metrics.fall_left_interval, 0.5, partly=0.2, why_not=why_not)


def _is_lifted(metrics: ValleyMetrics) -> Judgement:
    _check_removed(metrics)
    why_not = metrics.removed_why_not or metrics.lifted_why_not or metrics.fall_why_not
    return at_least(metrics.lifted_removed, metrics.lifted_removed_interval, 0.8, partly=0.5, why_not=why_not)


def _sinks_go(metrics: ValleyMetrics) -> Judgement:
    _check_removed(metrics)
    why_not = metrics.removed_why_not or metrics.sinks_left_why_not
    judged = at_most(metrics.sinks_left, metrics.sinks_left_interval, 0.1, partly=0.5, why_not=why_not)
    rates = f"The sink rate is {metrics.sink_rate_intact:.2f}, and {metrics.sink_rate_removed:.2f} without what the FFN"
    return judged.noting(f"{rates} of {listed(metrics.removed_layers)} writes to token 0.", metrics.sinks_stay or "")


_PAPER = "Queipo-de-Llano et al. (2025)"

CLAIMS = (
    Claim(
        id="valley-falls", fixed="2026-11-27 6a63426", figure="valley", metrics=ValleyMetrics,
        source=f"{_PAPER}, abstract: 'massive activations necessarily produce representational compression'",
        claim="Where the massive activation is, the entropy of the states falls into a valley",
        statistic="normalised matrix entropy of all tokens' states, from the block that forms the massive state to the "
        "last two, over that before the ME layer",
        criterion="≤ 0.5; in part ≤ 0.8",
        why="as of hidden-rank: a collapse is at least a halving; the loss of less than a fifth is none",
        of_token_0=True, blocks_after=1, judge=_falls,
    ),
    Claim(
        id="valley-begins", fixed="2026-11-27 6a63426", figure="valley", metrics=ValleyMetrics,
        source=f"{_PAPER}, abstract: 'both compression valleys and attention sinks emerge simultaneously'",
        claim="The valley begins where the massive activation emerges",
        statistic="share of inputs in which the blocks that are below half way from the least to the largest entropy, "
        "around the one of the least, begin at the ME layer, or up to the block that forms the massive state",
        criterion="≥ 0.8; in part ≥ 0.5",
        why="in the paper's figures both come in one block; as of sink-next 17 inputs of 17 show 0.8; half way needs "
        "no threshold of entropy",
        of_token_0=True, blocks_after=1, judge=_begins,
    ),
    Claim(
        id="valley-ends", fixed="2026-11-27 6a63426", figure="valley", metrics=ValleyMetrics,
        source=f"{_PAPER}, Mix-Compress-Refine: the last phase begins where the first token's norm falls back",
        claim="The valley ends where the massive activation does",
        statistic="share of inputs in which those blocks end at most one block from the last in which token 0 is "
        "massive",
        criterion="≥ 0.8; in part ≥ 0.5",
        why="as of valley-begins; one block, since the criterion of massive is none of half a fall",
        of_token_0=True, blocks_after=1, judge=_ends,
    ),
    Claim(
        id="valley-norm", fixed="2026-11-27 6a63426", figure="valley", metrics=ValleyMetrics,
        source=f"{_PAPER}, section 3: r = -0.9 ± 0.18 over six models",
        claim="The entropy falls as token 0's norm rises, block by block",
        statistic="Spearman's rank correlation of entropy and token 0's norm over all blocks, mean over inputs",
        criterion="≤ -0.72; in part ≤ -0.5",
        why="a standard deviation weaker than the paper's mean, which is Pearson's; -0.5 is a quarter of the variance",
        of_token_0=True,
        judge=lambda m: at_most(m.norm_correlation, m.norm_correlation_interval, -0.72, partly=-0.5, why_not=m.why_not),
    ),
    Claim(
        id="valley-sinks", fixed="2026-11-27 6a63426", figure="valley", metrics=ValleyMetrics,
        source=f"{_PAPER}, title: 'two sides of the same coin'; section 3: r = 0.58 ± 0.25 of norm and sink rate",
        claim="Attention sinks are where the entropy is low, block by block",
        statistic="Spearman's rank correlation of the entropy of what leaves a block and the sink rate in the next, "
        "mean over inputs",
        criterion="≤ -0.58; in part ≤ -0.33",
        why="what the paper has between norm and sink rate (Pearson's), of which entropy is the other side, and a "
        "standard deviation less",
        of_token_0=True,
        judge=lambda m: at_most(
            m.sink_correlation, m.sink_correlation_interval, -0.58, partly=-0.33,
            why_not=m.sink_correlation_why_not or m.why_not,
        ),
    ),
    Claim(
        id="valley-tokens", fixed="2026-11-27 6a63426", figure="valley", metrics=ValleyMetrics,
        source=f"{_PAPER}, abstract: 'compressed computation with limited mixing in the middle layers'",
        claim="In the valley the tokens' states are compressed, not one row alone",
        statistic="fall of the entropy of the states without token 0, over the fall of that of all states",
        criterion="≥ 0.5; in part ≥ 0.2",
        why="a single row of enormous norm makes any spectrum low-rank: half of the valley must be left without it; "
        "less than a fifth is nothing, as of hidden-rank",
        of_token_0=True, blocks_after=1, judge=_is_of_all_tokens,
    ),
    Claim(
        id="valley-lifted", fixed="2026-11-27 6a63426", figure="valley_by_run", metrics=ValleyMetrics,
        source=f"{_PAPER}, ablation (figure 4): 'targeted ablation validates our theoretical predictions'",
        claim="Without what the ME layer's FFN writes to token 0 the valley is gone",
        statistic="entropy without that write less the intact one, over the intact entropy without token 0 less that "
        "with it",
        criterion="≥ 0.8; in part ≥ 0.5",
        why="gone is all but a fifth of what token 0's row takes from the entropy; in Llama-3-8B it rises from 0.02 to "
        "0.4 to 0.5",
        of_token_0=True, of_ffn=True, blocks_after=1, judge=_is_lifted,
    ),
    Claim(
        id="valley-sinks-go", fixed="2026-11-27 6a63426", figure="valley_by_run", metrics=ValleyMetrics,
        source=f"{_PAPER}, ablation (figure 4): the sink rate falls to zero in Llama-3-8B, not in Pythia-410M",
        claim="Without what the ME layer's FFN writes to token 0 the sinks are gone with the valley",
        statistic="sink rate without that write over the intact one, in the blocks that read the massive state",
        criterion="≤ 0.1; in part ≤ 0.5",
        why="as of sinks-follow: a tenth is an order of magnitude less",
        of_token_0=True, of_ffn=True, blocks_after=1, judge=_sinks_go,
    ),
)  # fmt: skip
