"""Whether attention, and the states that enter it, collapse to a lower rank after the ME layer (section 6).

1. A further pass measures prompts cut to one length: a rank grows with the number of tokens.
2. Of attention it measures each head's pattern; of states all tokens of a prompt, as attention reads them (the output
   of `ln1`) and as they leave a block.
3. Of states it also measures the rank without token 0, and of each token's direction: a single row of enormous norm
   makes any spectrum low-rank.
4. The blocks after the ME layer are compared with those before, prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from melens.analysis.statistics import mean_by, mean_metric, with_interval
from melens.analysis.study import Study
from melens.claims.engine import Claim, Former, Judgement, at_most
from melens.errors import MelensError
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.style import COLORS
from melens.models.layout import Layout
from melens.report.result import Figure, Interval, Metrics
from melens.tracing.probes import Probe
from melens.tracing.sites import Sites
from melens.tracing.spectra import AttentionSpectrum, Spectrum
from melens.tracing.trace import trace

__all__ = [
    "CLAIMS", "LowRankMetrics", "compare_ranks", "measure_ranks", "prompts_of_length", "rank_by_block", "rank_figure",
    "ranks_in_words", "trace_cut",
]  # fmt: skip

ATTENTION, INPUTS, OUTPUTS = "attention", "attention inputs", "block outputs"
_SITES = {INPUTS: "ln1.hook_out", OUTPUTS: "hook_resid_post"}
_VARIANTS = {"": "", " without token 0": "_without_first", " on unit rows": "_unit_rows"}
_QUANTITIES = ("effective_rank", "first_share", "matrix_entropy")
_COLUMNS = [f"{name}{suffix}" for suffix in _VARIANTS.values() for name in _QUANTITIES]


class LowRankMetrics(Metrics):
    """What becomes of ranks after the ME layer; each is a mean over blocks of one prompt, then over prompts.

    Attributes:
        attention_rank_before, attention_rank_after, attention_rank_ratio: effective rank (exp of the entropy of σ / Σσ)
            of the attention matrices before and after the ME layer, and the mean of after / before.
        input_rank_before, input_rank_after, input_rank_ratio: the same of what enters attention, `[pos, d]`.
        hidden_rank_before, hidden_rank_after, hidden_rank_ratio: the same of what leaves a block.
        rank_ratios: after / before by kind of states: as they are, without token 0, on unit rows.
        matrix_entropies: before and after by kind, the entropy of σ² / Σσ² over log min(T, d).
        rank_prompts: on how many prompts ranks were measured.
    """

    experiment = "sinks"
    attention_rank_before: float | None = None
    attention_rank_after: float | None = None
    attention_rank_ratio: float | None = None
    attention_rank_ratio_interval: Interval | None = None
    attention_rank_ratio_why_not: str | None = None
    input_rank_before: float | None = None
    input_rank_after: float | None = None
    input_rank_ratio: float | None = None
    input_rank_ratio_interval: Interval | None = None
    input_rank_ratio_why_not: str | None = None
    hidden_rank_before: float | None = None
    hidden_rank_after: float | None = None
    hidden_rank_ratio: float | None = None
    hidden_rank_ratio_interval: Interval | None = None
    hidden_rank_ratio_why_not: str | None = None
    rank_ratios: dict[str, float] | None = None
    matrix_entropies: dict[str, tuple[float, float]] | None = None
    rank_prompts: int = 0


def measure_ranks(study: Study, rank_tokens: int, rank_prompts: int) -> pd.DataFrame:
    """Measure ranks on prompts of one length: `prompt`, `layer`, `of` and the columns of `Spectrum`.

    Args:
        study: as `melens.study` makes it.
        rank_tokens: prompts are cut to this length; shorter ones stay out.
        rank_prompts: at most so many are measured, of distinct first tokens as far as there are, and of all task types.

    Raises:
        MelensError: a rank that is NaN.
    """
    chosen = prompts_of_length(study, rank_tokens)[:rank_prompts]
    if not chosen:
        return pd.DataFrame(columns=["prompt", "layer", "of", *_COLUMNS])
    found_sites = Sites.of(study.model).find
    sites = [site for site in _SITES.values() if found_sites(site)]
    probes: list[Probe] = [Spectrum(sites), *([AttentionSpectrum()] if found_sites("attn.hook_pattern") else [])]
    tables = trace_cut(study, chosen, rank_tokens, probes, "effective ranks (tokens)", max_batch_tokens=rank_tokens)
    kinds = {site: kind for kind, site in _SITES.items()}
    for table in tables.values():  # before a mean over heads leaves NaN out
        for row in table[~np.isfinite(table["effective_rank"])].head(1).to_dict("records"):
            raise MelensError(
                f"The effective rank of block {row['layer']} is {row['effective_rank']} in prompt {row['prompt']}: "
                "look for NaN in the model's weights, or load it in float32."
            )
    ranks = [tables["spectrum"].assign(of=tables["spectrum"]["site"].astype(str).map(kinds)).drop(columns="site")]
    if "attention_spectrum" in tables:
        by_prompt = tables["attention_spectrum"].groupby(["prompt", "layer"])[list(_QUANTITIES)].mean()
        ranks.append(by_prompt.reset_index().assign(of=ATTENTION))
    return pd.concat(ranks, ignore_index=True)


def prompts_of_length(study: Study, n_tokens: int) -> list[int]:
    """List the prompts of at least so many tokens, one first token and one task type after the other."""
    prompts = study.of_massive_prompts(study.trace.prompts)
    prompts = prompts[prompts["n_tokens"] >= n_tokens]
    prompts = prompts.assign(copy=prompts.groupby("first_token_id").cumcount())
    turn = prompts.groupby([prompts["copy"], prompts["task"].fillna("")])["prompt"].rank()
    return prompts.assign(turn=turn).sort_values(["copy", "turn"], kind="stable")["prompt"].tolist()


def trace_cut(
    study: Study, prompts: Sequence[int], n_tokens: int, probes: Sequence[Probe], stage: str, *, max_batch_tokens: int
) -> dict[str, pd.DataFrame]:
    """Trace some of a study's prompts, cut to one length, and return the tables with the study's numbers of them.

    Args:
        study: as `melens.study` makes it.
        prompts: by number, each of `n_tokens` or more.
        n_tokens: of each.
        probes: a site that the model does not have is left out.
        stage: what the progress is called.
        max_batch_tokens: of a forward pass.
    """
    for probe in probes:
        probe.may_miss = True
    cut = [study.tokens[prompt][:n_tokens] for prompt in prompts]
    found = trace(study.model, cut, probes, progress=study.stage(stage), max_batch_tokens=max_batch_tokens)
    of_study = dict(enumerate(prompts))
    return {name: table.assign(prompt=table["prompt"].map(of_study)) for name, table in found.tables.items()}


def compare_ranks(study: Study, ranks: pd.DataFrame, layout: Layout) -> dict[str, Any]:
    """Compare the mean after the ME layer with that before, prompt by prompt: the fields of `LowRankMetrics`.

    Prompts that share their first token share token 0's row, and count once.
    """
    measured: dict[str, Any] = {"rank_prompts": ranks["prompt"].nunique()}
    if study.me.layer is None or not len(ranks):
        return measured
    first_tokens = study.trace.prompts.set_index("prompt")["first_token_id"]
    kinds: dict[str, tuple[float, float, float]] = {}
    for name, of, first_after in (
        # attention in the ME layer itself still reads states without the massive activation: it counts as before
        ("attention_rank", ATTENTION, study.me.layer + 1),
        ("input_rank", INPUTS, study.me.layer + 1),
        ("hidden_rank", OUTPUTS, study.me.layer),
    ):
        table = ranks[(ranks["of"] == of) & (ranks["layer"] <= study.last_before_trailing)]
        is_after = table["layer"] >= first_after
        before, after = (table[side].groupby("prompt")[_COLUMNS].mean() for side in (~is_after, is_after))
        if not (len(before) and len(after)):
            why = f": there is {layout.attention_in_words}" if of == ATTENTION else ""
            # a massive activation of block 0 leaves no before
            measured[f"{name}_ratio_why_not"] = f"Nothing lies both before and after the ME layer{why}."
            continue
        measured[f"{name}_before"] = float(before["effective_rank"].mean())
        measured[f"{name}_after"] = float(after["effective_rank"].mean())
        ratios = (after / before).groupby(first_tokens.loc[before.index]).mean()
        measured |= mean_metric(f"{name}_ratio", ratios["effective_rank"].to_numpy(dtype=float))
        for words, suffix in _VARIANTS.items() if of != ATTENTION else [("", "")]:
            entropy = f"matrix_entropy{suffix}"
            ratio = float(ratios[f"effective_rank{suffix}"].mean())
            kinds[f"{of}{words}"] = (ratio, float(before[entropy].mean()), float(after[entropy].mean()))
    measured["rank_ratios"] = {kind: ratio for kind, (ratio, *_) in kinds.items()}
    measured["matrix_entropies"] = {kind: entropies for kind, (_, *entropies) in kinds.items()}
    return measured


# --- Figure -----------------------------------------------------------------------------------------------------------


def rank_by_block(ranks: pd.DataFrame) -> pd.DataFrame:
    """Average over prompts: `of`, `layer`, `mean`, `low` and `high` of each `quantity`."""
    states = ranks[ranks["of"] != ATTENTION]
    of_columns = {name: ranks if name in _QUANTITIES else states for name in _COLUMNS}
    return pd.concat(mean_by(own, name, ("of", "layer")).assign(quantity=name) for name, own in of_columns.items())


def rank_figure(study: Study, by_block: pd.DataFrame, metrics: LowRankMetrics, rank_tokens: int) -> Figure:
    """Draw effective rank and normalised matrix entropy by block, of attention and of each kind of states."""
    texts = {"effective_rank": "effective rank", "matrix_entropy": "normalised matrix entropy"}
    panels = []
    of_states = [(INPUTS, "", ""), *((OUTPUTS, words, suffix) for words, suffix in _VARIANTS.items())]
    of_attention = [(ATTENTION, "", "")]
    for title, kinds, colors in (("Attention", of_attention, COLORS[4:]), ("States of all tokens", of_states, COLORS)):
        for quantity, text in texts.items():
            curves = []
            for (of, words, suffix), color in zip(kinds, colors, strict=False):
                is_shown = (by_block["of"] == of) & (by_block["quantity"] == f"{quantity}{suffix}")
                if is_shown.any():
                    curves.append(Curve(f"{of}{words}", by_block[is_shown], color))
            if curves:
                y_range = (0.0, 1.0) if quantity == "matrix_entropy" else None
                panels.append(Panel(f"{title}: {text}", text, curves, study.me.layer, y_range=y_range))
    note = f"The first {rank_tokens} tokens of each prompt; attention: mean over heads. "
    note += "Bands: 95% intervals over prompts."
    plot = curves_by_block(panels, title=study.title("Rank by block", metrics.rank_prompts), note=note)
    expected = "Attention weights, and the states that enter attention, both collapse to low rank after the ME layer."
    return Figure(plot, "section 6", expected, ranks_in_words(metrics))


def ranks_in_words(metrics: LowRankMetrics) -> str:
    """Say what the ranks are before and after the ME layer, and what becomes of the other kinds of states."""
    m = metrics
    measured = (
        ("attention", m.attention_rank_before, m.attention_rank_after,
         m.attention_rank_ratio, m.attention_rank_ratio_interval),
        ("what enters attention", m.input_rank_before, m.input_rank_after,
         m.input_rank_ratio, m.input_rank_ratio_interval),
        ("block outputs", m.hidden_rank_before, m.hidden_rank_after,
         m.hidden_rank_ratio, m.hidden_rank_ratio_interval),
    )  # fmt: skip
    parts = [
        f"{what} {before:.3g} and {after:.3g} (ratio {with_interval(ratio, interval, '.2f')})"
        for what, before, after, ratio, interval in measured
        if ratio is not None
    ]
    if not parts:
        return metrics.hidden_rank_ratio_why_not or "Without an ME layer there is no before and after."
    without = {name: (m.rank_ratios or {}).get(f"{OUTPUTS}{name}") for name in (" without token 0", " on unit rows")}
    said = {" on unit rows": " with every token's state scaled to norm 1"}
    others = [f"{ratio:.2f}{said.get(name, name)}" for name, ratio in without.items() if ratio is not None]
    words = f"Mean effective rank of the blocks before the ME layer and after: {'; '.join(parts)}"
    return f"{words}; the ratio of block outputs is {' and '.join(others)}." if others else f"{words}."


# --- Claims -----------------------------------------------------------------------------------------------------------


def _states_collapse(metrics: LowRankMetrics) -> Judgement:
    why_not = metrics.input_rank_ratio_why_not or metrics.why_not
    judged = at_most(metrics.input_rank_ratio, metrics.input_rank_ratio_interval, 0.5, partly=0.8, why_not=why_not)
    ratios = metrics.rank_ratios or {}
    others = [f"{kind} {ratio:.2f}" for kind, ratio in ratios.items() if kind not in (ATTENTION, INPUTS)]
    noted = judged.noting(f"Other kinds of states: {', '.join(others)}." if others else "")
    if judged.verdict != "holds" or ratios.get(f"{INPUTS} without token 0", 0) <= 0.8:
        return noted
    return noted.in_part().noting("It is the norm of token 0's row: the other tokens' states do not collapse.")


_ATTENTION_RANK = Claim(
    id="attention-rank", fixed="2026-11-26 25a77c7",
    source="introduction, section 6", figure="rank", metrics=LowRankMetrics,
    claim="After the ME layer attention is of lower rank",
    statistic="effective rank of the attention matrices after the ME layer over that before",
    criterion="≤ 0.5; in part ≤ 0.8",
    why="a collapse is at least a halving; the loss of less than a fifth is none",
    of_token_0=True, blocks_after=1,
    judge=lambda m: at_most(
        m.attention_rank_ratio, m.attention_rank_ratio_interval, 0.5, partly=0.8,
        why_not=m.attention_rank_ratio_why_not or m.why_not,
    ),
    former=Former(
        "≤ 0.5; in part < 1", "2026-11-22 a1bbeb3",
        lambda m: at_most(m.attention_rank_ratio, m.attention_rank_ratio_interval, 0.5, partly=0.999),
    ),
)  # fmt: skip

CLAIMS = (
    _ATTENTION_RANK,
    replace(
        _ATTENTION_RANK, id="hidden-rank",
        claim="After the ME layer the states of a prompt's tokens collapse before they enter attention",
        source="section 6: 'collapsing representations into a low-dimensional subspace before entering the attention'",
        statistic="effective rank of all tokens' attention inputs (output of ln1) after the ME layer over that before",
        criterion="≤ 0.5; in part ≤ 0.8, or where it is the norm of token 0's row alone",
        judge=_states_collapse,
        former=Former(
            "≤ 0.5; in part < 1", "2026-11-22 a1bbeb3",
            lambda m: at_most(m.hidden_rank_ratio, m.hidden_rank_ratio_interval, 0.5, partly=0.999),
            "effective rank of all tokens' hidden states from the ME layer on over that before",
        ),
    ),
)  # fmt: skip
