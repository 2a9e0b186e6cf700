"""What attention gets of the massive token: are its input, key and query the same for every prompt (section 4.1)?

1. In a causal model the first tokens of a prompt decide what stands there: prompts are cut to five, and one short pass
   gives token 0's vectors and, as the control, those at position 4.
2. Vectors of two prompts are compared where their tokens there differ: one prompt for each first token.
3. The mean over pairs has a jackknife interval: a prompt is in many pairs, which vary together.
4. Token 0's states before and after the norm (`ln1`) tell what the norm does to their direction and largest dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from melens.analysis.metrics import pairwise_cosine
from melens.analysis.statistics import mean_metric, mean_of_pairs, with_interval
from melens.analysis.study import Study
from melens.claims.engine import Claim, Judgement, NotMeasuredError, at_least, number, unless_trivial
from melens.errors import MelensError
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.style import FIRST, OTHERS
from melens.printing import paragraph
from melens.report.result import Figure, Interval, Metrics
from melens.tracing.probes import Probe, TokenVectors
from melens.tracing.sites import Sites
from melens.tracing.trace import trace

__all__ = ["CLAIMS", "AttentionInputsMetrics", "compare_inputs", "inputs_figure", "inputs_in_words"]

CONTROL = 4
"""Position of the control: behind the first tokens, which may be massive too, and in every prompt of five tokens."""
SITES = {"input": "ln1.hook_out", "key": "attn.k.hook_out", "query": "attn.q.hook_out"}
_NAMES = {"input": "attention input", "key": "key", "query": "query"}


class AttentionInputsMetrics(Metrics):
    """What attention gets of token 0 in the blocks that read its massive state.

    Attributes:
        input_cosine, key_cosine, query_cosine: mean cosine between two inputs of token 0's attention input (output of
            `ln1`), key and query (all heads, as projected), in the block where it is smallest.
        input_cosine_others, ...: the same at position 4 of that block, between prompts with different tokens there.
        input_cosine_before, ...: of token 0, mean over the blocks up to the ME layer.
        own_key_cosine, own_key_cosine_others: cosine of a token's query with its own key, mean over heads and blocks.
        norm_cosine: cosine between token 0's state and what `ln1` makes of it, in the block where it is smallest, mean
            over inputs.
        norm_odds: energy in the largest dim of token 0's state over that in all others, after `ln1` relative to before;
            geometric mean over blocks and inputs.
        few_dims_energy: share of the energy of token 0's massive state in its largest 1% of dims, in the block where it
            is smallest, mean over inputs.
        compared_inputs: on how many inputs it rests, each with another first token.
        inputs_why_not: why nothing was measured.
    """

    experiment = "sinks"
    input_cosine: float | None = None
    input_cosine_interval: Interval | None = None
    input_cosine_others: float | None = None
    input_cosine_before: float | None = None
    key_cosine: float | None = None
    key_cosine_interval: Interval | None = None
    key_cosine_others: float | None = None
    key_cosine_before: float | None = None
    query_cosine: float | None = None
    query_cosine_interval: Interval | None = None
    query_cosine_others: float | None = None
    query_cosine_before: float | None = None
    own_key_cosine: float | None = None
    own_key_cosine_others: float | None = None
    norm_cosine: float | None = None
    norm_cosine_interval: Interval | None = None
    norm_odds: float | None = None
    norm_odds_interval: Interval | None = None
    few_dims_energy: float | None = None
    few_dims_energy_interval: Interval | None = None
    compared_inputs: int | None = None
    inputs_why_not: str | None = None


def compare_inputs(study: Study) -> tuple[dict[str, Any], pd.DataFrame]:
    """Compare token 0's attention inputs, keys and queries between prompts, and with its states before the norm.

    Returns:
        The fields of `AttentionInputsMetrics`, and a table by block: `quantity`, `token` (0 or 4), `layer`, `mean`,
        `low`, `high`.

    Raises:
        MelensError: as `melens.trace`.
    """
    prompts = study.distinct_massive_prompts
    vectors = _vectors(study, prompts)
    blocks = [layer for layer in study.massive_layers if layer - 1 in study.massive_layers]
    by_block = _by_block(study, prompts, vectors)
    if study.me.layer is None or not any((name, layer) in vectors for name in SITES for layer in blocks):
        why_not = "No block between the one that forms the massive state and the last two has `ln1`, keys or queries."
        return {"compared_inputs": len(prompts), "inputs_why_not": why_not}, by_block
    fields: dict[str, Any] = {"compared_inputs": len(prompts)}
    for name in SITES:
        fields |= _least(by_block[by_block["quantity"] == name], name, blocks, study.me.layer)
    states = study.trace.tensors["token_vectors"][prompts, :, 0]  # [prompt, layer, d]
    inputs = {layer: vectors["input", layer][:, 0] for layer in blocks if ("input", layer) in vectors}
    fields |= _norms_work(states, inputs)
    fields |= _own_keys(study.model.cfg, vectors, blocks)
    energy = _share_of_largest(states[:, list(study.massive_layers)]).amin(dim=1)
    return fields | mean_metric("few_dims_energy", energy.numpy()), by_block


def _vectors(study: Study, prompts: list[int]) -> dict[tuple[str, int], Float[Tensor, "prompt 2 _"]]:
    """Trace token 0 and the control by quantity and block: each on its own, as widths may differ between blocks."""
    probes: list[Probe] = []
    for name, site in SITES.items():
        for at in Sites.of(study.model).find(site):
            probe = TokenVectors((0, CONTROL), f"blocks.{at.layer}.{site}").named(f"{name} {at.layer}")
            probe.may_miss = True
            probes.append(probe)
    if not probes:
        return {}
    cut = [study.tokens[prompt][: CONTROL + 1] for prompt in prompts]
    found = trace(study.model, cut, probes, progress=study.stage("attention inputs (tokens)")).tensors
    vectors: dict[tuple[str, int], Tensor] = {}
    for place, tensor in found.items():  # [prompt, 1, token, d]
        name, layer = place.split()
        if not tensor[:, :, 0].isfinite().all():
            where = f"The {_NAMES[name]} of token 0 in block {layer}"
            raise MelensError(f"{where} is no number: look for NaN in the weights.")
        vectors[name, int(layer)] = tensor[:, 0]
    return vectors


# --- Between inputs ---------------------------------------------------------------------------------------------------


def _by_block(study: Study, prompts: list[int], vectors: Mapping[tuple[str, int], Tensor]) -> pd.DataFrame:
    there = [study.tokens[prompt][CONTROL : CONTROL + 1].tolist() for prompt in prompts]
    counts = {
        0: np.ones((len(prompts), len(prompts)), dtype=bool),  # one prompt a first token
        CONTROL: np.array([[bool(a and b and a != b) for b in there] for a in there]),
    }
    rows = []
    for (name, layer), of_tokens in sorted(vectors.items()):
        for column, (token, counted) in enumerate(counts.items()):
            cosines = pairwise_cosine(of_tokens[:, column]).double().numpy()
            mean, (low, high) = mean_of_pairs(cosines, counted)
            if len(prompts) == 1 and token == 0:
                mean = 1.0  # there is no other state but itself
            rows.append((name, token, layer, mean, low, high))
    table = pd.DataFrame(rows, columns=["quantity", "token", "layer", "mean", "low", "high"])
    return table[table["mean"].notna()]


def _least(of_quantity: pd.DataFrame, name: str, blocks: list[int], me_layer: int) -> dict[str, Any]:
    """Look up the block in which token 0's cosine is smallest, the control's there, and token 0's before."""
    first, control = (
        {row["layer"]: row for row in of_quantity[of_quantity["token"] == token].to_dict("records")}
        for token in (0, CONTROL)
    )
    massive = [layer for layer in blocks if layer in first]
    if not massive:
        return {}
    least = min(massive, key=lambda layer: first[layer]["mean"])
    before = [row["mean"] for layer, row in first.items() if layer <= me_layer]
    return {
        f"{name}_cosine": first[least]["mean"],
        f"{name}_cosine_interval": (first[least]["low"], first[least]["high"]),
        f"{name}_cosine_others": control[least]["mean"] if least in control else None,
        f"{name}_cosine_before": float(np.mean(before)) if before else None,
    }


# --- Within an input --------------------------------------------------------------------------------------------------


def _norms_work(
    states: Float[Tensor, "prompt layer d"], inputs: Mapping[int, Float[Tensor, "prompt d"]]
) -> dict[str, Any]:
    """Measure what `ln1` does to the direction and to the largest dim of token 0's state."""
    if not inputs:
        return {}
    cosines, log_odds = [], []
    for layer, after in inputs.items():
        before = states[:, layer - 1]
        cosines.append(torch.cosine_similarity(before, after, dim=-1))
        largest = before.abs().argmax(dim=-1, keepdim=True)
        log_odds.append(_log_odds(after, largest) - _log_odds(before, largest))
    of_odds = mean_metric("norm_odds", torch.stack(log_odds).mean(dim=0).numpy())
    low, high = of_odds["norm_odds_interval"]
    return mean_metric("norm_cosine", torch.stack(cosines).amin(dim=0).numpy()) | {
        "norm_odds": float(np.exp(of_odds["norm_odds"])),
        "norm_odds_interval": (float(np.exp(low)), float(np.exp(high))),
    }


def _log_odds(vectors: Float[Tensor, "prompt d"], dims: Tensor) -> Float[Tensor, " prompt"]:
    """Return the logarithm of the energy in one dim of each vector over that in all others."""
    energy = vectors.double() ** 2
    inside, outside = energy.gather(-1, dims)[:, 0], energy.scatter(-1, dims, 0).sum(dim=-1)
    return inside.clamp(min=_NONE).log() - outside.clamp(min=_NONE).log()


_NONE = 1e-300  # a state may lie in one dim alone, and a gain be 0


def _share_of_largest(states: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Return the share of the energy in the largest 1% of dims, at least one."""
    energy = states.double() ** 2
    return energy.topk(max(1, states.shape[-1] // 100), dim=-1).values.sum(dim=-1) / energy.sum(dim=-1)


def _own_keys(cfg: Any, vectors: Mapping[tuple[str, int], Tensor], blocks: list[int]) -> dict[str, float]:
    """Average the cosine of a token's query with its own key over heads; at one position rotations cancel out."""
    means = []
    for layer in blocks:
        query, key = (vectors.get((name, layer)) for name in ("query", "key"))
        if query is None or key is None or query.shape[-1] != cfg.n_heads * cfg.d_head:  # it may hold a gate as well
            continue
        query, key = (projected.unflatten(-1, (-1, cfg.d_head)) for projected in (query, key))
        key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)  # heads share keys
        means.append(torch.cosine_similarity(query, key, dim=-1).mean(dim=2).nanmean(dim=0))
    if not means:
        return {}
    of_tokens = dict(zip(("own_key_cosine", "own_key_cosine_others"), torch.stack(means).mean(dim=0), strict=True))
    return {name: float(cosine) for name, cosine in of_tokens.items() if cosine.isfinite()}


# --- Figure -----------------------------------------------------------------------------------------------------------


def inputs_figure(study: Study, by_block: pd.DataFrame, metrics: AttentionInputsMetrics) -> Figure:
    """Draw the cosines between inputs by block, of token 0 and at the control's position."""
    panels = []
    for quantity, name in _NAMES.items():
        by_token = dict(iter(by_block[by_block["quantity"] == quantity].groupby("token")))
        tokens = ((0, "token 0", FIRST), (CONTROL, f"position {CONTROL}", OTHERS))
        curves = [Curve(text, by_token[token], color) for token, text, color in tokens if token in by_token]
        if curves:
            panels.append(Panel(f"{name.capitalize()}: cosine between inputs", "cosine", curves, study.me.layer))
    note = "Mean over pairs of prompts with different tokens there. Bands: 95% intervals over prompts."
    title = study.title("What attention gets of token 0", metrics.compared_inputs)
    expected = "After the ME layer the attention input and the key of token 0 are the same for every input."
    return Figure(
        curves_by_block(panels, title=title, note=note), "section 4.1", expected, paragraph(inputs_in_words(metrics))
    )


def inputs_in_words(metrics: AttentionInputsMetrics) -> list[tuple[str, str]]:
    """Say how alike token 0's attention inputs, keys and queries are between inputs, and what the norm does to them."""
    m = metrics
    if m.inputs_why_not is not None:
        return [("attention inputs", m.inputs_why_not)]
    parts = [
        f"{_NAMES[quantity]} {with_interval(cosine, interval, '.4f')}"
        + ("" if others is None else f" (token {CONTROL}: {others:.2f})")
        for quantity, (cosine, interval, others, _) in _between_inputs(m).items()
        if cosine is not None
    ]
    words = f"Between {m.compared_inputs} inputs token 0 keeps at least this mean cosine after the ME layer: "
    words += f"{'; '.join(parts)}."
    if m.compared_inputs == 1:
        words = "There is one first token alone, and no other input to compare with."
    rows = [("between inputs", words)]
    if m.norm_cosine is not None and m.norm_odds is not None:
        norm = (
            f"The norm before attention (ln1) keeps token 0's direction to a cosine of {m.norm_cosine:.2f}, and makes "
        )
        norm += f"the energy of its largest dim, over that of all others, × {m.norm_odds:.2g} of what it was."
        rows.append(("norm before attention", norm))
    return rows


# --- Claims -----------------------------------------------------------------------------------------------------------


_Cosines = tuple[float | None, Interval | None, float | None, float | None]
"""Token 0's cosine between inputs with its interval, the control's, and token 0's before."""


def _between_inputs(m: AttentionInputsMetrics) -> dict[str, _Cosines]:
    return {
        "input": (m.input_cosine, m.input_cosine_interval, m.input_cosine_others, m.input_cosine_before),
        "key": (m.key_cosine, m.key_cosine_interval, m.key_cosine_others, m.key_cosine_before),
        "query": (m.query_cosine, m.query_cosine_interval, m.query_cosine_others, m.query_cosine_before),
    }


def _same_for_every_input(metrics: AttentionInputsMetrics, quantity: str) -> Judgement:
    cosine, interval, others, before = _between_inputs(metrics)[quantity]
    judged = at_least(cosine, interval, 0.95, partly=0.8, why_not=metrics.inputs_why_not)
    if metrics.compared_inputs == 1 and metrics.distinct_first_tokens != 1:
        raise NotMeasuredError("One input alone has the massive state: there is none to compare it with.")
    if others is None:
        judged = judged.in_part().noting("There is no other token to compare with.")
    else:
        alike = 1 - number(cosine, "cosine between inputs") <= 0.5 * (1 - others)
        judged = (judged if alike else judged.in_part()).noting(f"At position {CONTROL} it is {others:.3f}.")
    up_to = "" if before is None else f"Up to the ME layer token 0's is {before:.3f} on average."
    return unless_trivial(metrics, judged.noting(up_to))


def _query_is_the_same(m: AttentionInputsMetrics) -> Judgement:
    judged = _same_for_every_input(m, "query")
    if m.own_key_cosine is None or m.own_key_cosine_others is None:
        return judged
    return judged.noting(
        f"Its cosine with its own key is {m.own_key_cosine:.2f}, at position {CONTROL} {m.own_key_cosine_others:.2f}."
    )


def _lies_in_few_dims(m: AttentionInputsMetrics) -> Judgement:
    judged = at_least(m.few_dims_energy, m.few_dims_energy_interval, 0.9, partly=0.5, why_not=m.inputs_why_not)
    # normal entries have 2.2 squared medians each on average: 1e6 / (1e6 + 2.2 * 4,096)
    return judged.noting(
        "What is massive mostly is so by definition: among 4,096 normal entries one of 1,000 × their median has 99%."
    )


_NO_NORM = "The model has no norm before attention (ln1)."

_SAME_INPUT = Claim(
    id="input-same", fixed="2026-11-26 25a77c7",
    source="section 4.1: 'a highly similar direction across different inputs'",
    figure="inputs", metrics=AttentionInputsMetrics,
    claim="After the ME layer the attention input of token 0 is the same for every input",
    statistic="smallest mean cosine between inputs of token 0's ln1 output, over blocks that read the massive state",
    criterion="≥ 0.95, and at most half as far from 1 as at position 4; in part ≥ 0.8",
    why="0.95 is an angle of 18 degrees; other tokens' may be alike as well, by a common mean or a bias of the keys",
    of_token_0=True, blocks_after=1,
    judge=lambda m: _same_for_every_input(m, "input"),
)  # fmt: skip

CLAIMS = (
    Claim(
        id="few-dims", fixed="2026-11-26 25a77c7",
        source="section 4.1: 'highly concentrate along a small subset of dimensions'",
        figure="inputs", metrics=AttentionInputsMetrics,
        claim="After the ME layer the massive state lies in few dims",
        statistic="share of the energy of token 0's state in its largest 1% of dims, in the block where it is smallest",
        criterion="≥ 0.9; in part ≥ 0.5",
        why="a random state has 8% there; nine tenths leave its direction to them",
        of_token_0=True, blocks_after=1,
        judge=_lies_in_few_dims,
    ),
    Claim(
        id="norm-direction", fixed="2026-11-26 25a77c7",
        source="section 4.2: 'Pre-attention RMSNorm preserves direction'",
        figure="inputs", metrics=AttentionInputsMetrics,
        claim="The norm before attention preserves the direction of the massive state",
        statistic="smallest cosine between token 0's state and the output of ln1, over the blocks that read it",
        criterion="≥ 0.95; in part ≥ 0.8",
        why="0.95 is an angle of 18 degrees, 0.8 one of 37",
        of_token_0=True, blocks_after=1,
        judge=lambda m: at_least(
            m.norm_cosine, m.norm_cosine_interval, 0.95, partly=0.8, why_not=m.inputs_why_not or _NO_NORM
        ),
    ),
    Claim(
        id="norm-amplifies", fixed="2026-11-26 25a77c7",
        source="section 4.1: 'dimension-wise scaling primarily amplifies already dominant components'",
        figure="inputs", metrics=AttentionInputsMetrics,
        claim="The norm before attention amplifies the dims that dominate the massive state",
        statistic="energy in the largest dim of token 0's state over that in all others, after ln1 relative to before",
        criterion="≥ 1.1",
        why="a gain alike in all dims gives 1, and one that takes the massive dim back less",
        of_token_0=True, blocks_after=1,
        judge=lambda m: at_least(m.norm_odds, m.norm_odds_interval, 1.1, why_not=m.inputs_why_not or _NO_NORM),
    ),
    _SAME_INPUT,
    replace(
        _SAME_INPUT, id="key-same",
        claim="After the ME layer the key of token 0 is the same for every input",
        source="section 4.1: 'an approximately fixed position in the attention similarity space'; section 6",
        statistic="smallest mean cosine between inputs of token 0's key, over blocks that read the massive state",
        judge=lambda m: _same_for_every_input(m, "key"),
    ),
    replace(
        _SAME_INPUT, id="query-same",
        claim="After the ME layer the query of token 0 is the same for every input",
        source="section 6: 'highly similar keys and queries for the first token'",
        statistic="smallest mean cosine between inputs of token 0's query, over blocks that read the massive state",
        why="similar between inputs, as the collapse is that it follows from; how like its own key: see the note",
        judge=_query_is_the_same,
    ),
)  # fmt: skip
