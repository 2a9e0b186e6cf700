"""What `secondary` measures of the tokens behind the first, and what other papers say of them: metrics and claims.

A mean is over prompts. The state of a later token depends on everything before it, so that prompts which share their
first token alone are several; tokens whose whole prefix is the same are one state, and count once.
"""

from __future__ import annotations

from melens.claims.engine import Claim, Judgement, at_least, at_most, number, worst
from melens.report.result import Interval, Metrics

__all__ = ["CLAIMS", "SecondaryMetrics"]

_NONE_FOUND = "No token behind the first is massive where token 0 is; exp.provoke=true adds texts that bring them."


class SecondaryMetrics(Metrics):
    """What `secondary` measures, up to the last two blocks, which count apart.

    Attributes:
        n_tokens: tokens behind the first, of all texts; those of a run of token 0 (`n_in_run`) are not among them.
        n_sinks, n_massive: secondary sinks among them, and those that are massive in some block; the others turned.
        n_shared: tokens that |cos| alone would count, and that are none without what the prompt's tokens share.
        n_in_run: tokens that only repeat token 0 from the start on; without learned positions their states are token
            0's by construction. `least_run_cosine`: the least cosine of one with it, in any block.
        n_heads: of a block.
        n_texts, sink_texts: how many texts there are, and how many with a secondary sink.
        by_kind, by_birth: how many secondary sinks of each kind, and born in each block.
        median_blocks: in how many blocks one lives, median.
        first_delimiter: share of the study's prompts with a period or newline behind token 0 whose first one is
            massive; `first_delimiter_texts`: of how many.
        elsewhere: share of the study's prompts with a token behind the first that has an importance over 0.3 in a tenth
            of the heads of some block; `elsewhere_texts`: of how many, those with tokens that 16 queries see.
        aligned: |cos| with token 0's state of the tokens behind it that are massive where it is too, mean over prompts
            that have some; `aligned_texts`: of how many.
        later, fades: of these tokens the shares that become massive in a later block than token 0, and that stop being
            so in an earlier one, mean over prompts.
        of_first, over_even: the importance of secondary sinks over token 0's in the same blocks, and over what even
            attention pays at that position, mean over prompts.
        repeated: share of the texts with a token that repeats the eight before it which have a secondary sink among
            such tokens; `repeated_texts`: of how many.
        off_tokens: attention that goes to no token, but to a learned sink or nowhere; mean over texts, blocks, heads.
    """

    experiment = "secondary"
    rests_on_states = False
    n_tokens: int | None = None
    n_sinks: int | None = None
    n_massive: int | None = None
    n_shared: int | None = None
    n_in_run: int | None = None
    least_run_cosine: float | None = None
    n_heads: int | None = None
    n_texts: int | None = None
    sink_texts: int | None = None
    by_kind: dict[str, int] | None = None
    by_birth: dict[str, int] | None = None
    median_blocks: float | None = None
    first_delimiter: float | None = None
    first_delimiter_interval: Interval | None = None
    first_delimiter_texts: int | None = None
    elsewhere: float | None = None
    elsewhere_interval: Interval | None = None
    elsewhere_texts: int | None = None
    aligned: float | None = None
    aligned_interval: Interval | None = None
    aligned_texts: int | None = None
    later: float | None = None
    later_interval: Interval | None = None
    fades: float | None = None
    fades_interval: Interval | None = None
    of_first: float | None = None
    of_first_interval: Interval | None = None
    over_even: float | None = None
    over_even_interval: Interval | None = None
    repeated: float | None = None
    repeated_interval: Interval | None = None
    repeated_texts: int | None = None
    off_tokens: float | None = None


# --- Claims -----------------------------------------------------------------------------------------------------------


def _first_delimiters_are_massive(metrics: SecondaryMetrics) -> Judgement:
    why_not = "No prompt has a period or newline behind its first token."
    return at_least(metrics.first_delimiter, metrics.first_delimiter_interval, 0.5, partly=0.1, why_not=why_not)


def _sinks_are_elsewhere_too(metrics: SecondaryMetrics) -> Judgement:
    why_not = "No prompt has a token behind the first that 16 queries see in a block with attention."
    judged = at_least(metrics.elsewhere, metrics.elsewhere_interval, 0.5, partly=0.1, why_not=why_not)
    n_heads = metrics.n_heads or 0
    return judged.noting(f"A tenth is {-(-n_heads // 10)} of {n_heads} heads." if n_heads else "")


def _are_weaker(metrics: SecondaryMetrics) -> Judgement:
    why_not = "No secondary sink is seen by 16 queries in a block with attention behind it."
    weaker = at_most(metrics.of_first, metrics.of_first_interval, 1, why_not=why_not)
    significant = at_least(metrics.over_even, metrics.over_even_interval, 2, why_not=why_not)
    return worst(weaker, significant).noting(
        f"It is {number(metrics.over_even, 'over_even'):.3g} × what even attention pays."
    )


def _repetitions_bring_them(metrics: SecondaryMetrics) -> Judgement:
    why_not = "No text repeats a token eight times in a row, behind other text; exp.provoke=true adds some."
    return at_least(metrics.repeated, metrics.repeated_interval, 0.5, partly=0.1, why_not=why_not)


CLAIMS = (
    Claim(
        id="secondary-delimiter", fixed="2026-11-27 f634f9f",
        source="Sun et al. (2024), figure 1: 'the starting token, and the first period (.) or newline token'",
        figure="secondary_rates", metrics=SecondaryMetrics,
        claim="The first period or newline is massive besides the starting token",
        statistic="share of prompts with a period or newline behind token 0 whose first one is massive in some block",
        criterion="≥ 0.5; in part ≥ 0.1",
        why="a rule covers most prompts; in part where one prompt in ten shows it, as in some of their models alone",
        judge=_first_delimiters_are_massive,
    ),
    Claim(
        id="secondary-elsewhere", fixed="2026-11-27 f634f9f",
        source="Yu et al. (2024), abstract: sinks 'also within later tokens of the input'",
        figure="secondary_lifetimes", metrics=SecondaryMetrics,
        claim="Attention sinks occur within later tokens of the input as well",
        statistic="share of prompts with a token behind the first that has an importance over 0.3 in a tenth of the "
        "heads of some block",
        criterion="≥ 0.5; in part ≥ 0.1",
        why="0.3 is Gu et al.'s for a sink of a head; a tenth, as one head may be over it by chance",
        needs_me_layer=False, judge=_sinks_are_elsewhere_too,
    ),
    Claim(
        id="secondary-aligned", fixed="2026-11-27 f634f9f",
        source="Wong et al. (2025), abstract: vectors that 'align with the direction of the primary sink'",
        figure="secondary_map", metrics=SecondaryMetrics,
        claim="Secondary sinks have the direction of the first token's state",
        statistic="|cos| of the tokens that are massive behind a massive token 0 with its state, mean over prompts",
        criterion="≥ 0.9; in part ≥ 0.7",
        why="massive tokens are chosen by |h| alone, so that their cosine is free; 0.9 is 26 degrees",
        of_token_0=True,
        judge=lambda metrics: at_least(
            metrics.aligned, metrics.aligned_interval, 0.9, partly=0.7, why_not=_NONE_FOUND
        ),
    ),
    Claim(
        id="secondary-later", fixed="2026-11-27 f634f9f",
        source="Wong et al. (2025), abstract: 'arise primarily in middle layers', and not at the primary sink's",
        figure="secondary_lifetimes", metrics=SecondaryMetrics,
        claim="Secondary sinks arise in later blocks than the first",
        statistic="share of the tokens that are massive behind a massive token 0 that become so in a later block",
        criterion="≥ 0.5; in part: mean over prompts",
        why="'primarily' is most of them; of earlier work the abstract says 'they emerge at the same layer'",
        of_token_0=True,
        judge=lambda metrics: at_least(metrics.later, metrics.later_interval, 0.5, why_not=_NONE_FOUND),
    ),
    Claim(
        id="secondary-fades", fixed="2026-11-27 f634f9f",
        source="Wong et al. (2025), abstract: 'can persist for a variable number of layers'",
        figure="secondary_lifetimes", metrics=SecondaryMetrics,
        claim="Secondary sinks end before the first does",
        statistic="share of the tokens that are massive behind a massive token 0 that stop being so earlier than it",
        criterion="≥ 0.5; in part: mean over prompts",
        why="as of secondary-later: earlier work has them 'persist throughout the network'",
        of_token_0=True,
        judge=lambda metrics: at_least(metrics.fades, metrics.fades_interval, 0.5, why_not=_NONE_FOUND),
    ),
    Claim(
        id="secondary-weaker", fixed="2026-11-27 f634f9f",
        source="Wong et al. (2025), abstract: 'a smaller, but still significant, amount of attention mass'",
        figure="secondary_lifetimes", metrics=SecondaryMetrics,
        claim="Secondary sinks draw less attention than the first, and more than an ordinary token",
        statistic="importance of secondary sinks over token 0's in the same blocks, mean over prompts",
        criterion="≤ 1, and ≥ 2 × what even attention pays at that position",
        why="'smaller' is below the first token's; twice even attention is what melens asks of a sink in short prompts",
        of_token_0=True, judge=_are_weaker,
    ),
    Claim(
        id="secondary-repeats", fixed="2026-11-27 f634f9f",
        source="Yona et al. (2025), abstract: 'long repetitions disrupt' the circuit of attention sinks",
        figure="secondary_rates", metrics=SecondaryMetrics,
        claim="A token repeated in a row becomes a sink, wherever the repetition begins",
        statistic="share of texts with a token repeated eight times behind other text that have a secondary sink there",
        criterion="≥ 0.5; in part ≥ 0.1",
        why="most texts; behind other text, as a run from the start on has token 0's states by construction",
        judge=_repetitions_bring_them,
    ),
)  # fmt: skip
