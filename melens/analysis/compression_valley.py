"""The compression valley: entropy of the states by block, beside token 0's norm and the sink rate.

    result = melens.analysis.valley(study)
    result.metrics.fall_left  # of the entropy's fall, without token 0's row

Queipo-de-Llano et al. (2025, "Attention Sinks and Compression Valleys in LLMs are Two Sides of the Same Coin"):

1. Prompts cut to one length are traced intact, under WeMask, and without what the ME layer's FFN writes to token 0.
2. The entropy is that of p_j = σ_j² / Σσ² (von Neumann's, of the Gram matrix), over log min(T, d): from 0 to 1.
3. It is measured without token 0's row as well, since a single row of enormous norm makes any spectrum low-rank.
4. Their bound on it from token 0's norm and the others' angles to it is a theorem: how tight it is, is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from melens.analysis import sink_rate
from melens.analysis.compression_valley_claims import CLAIMS, LEAST_FALL, LEAST_RATE, ValleyMetrics
from melens.analysis.compression_valley_figures import INTACT, MASKED, REMOVED, in_words, runs_figure, valley_figure
from melens.analysis.low_rank import prompts_of_length, trace_cut
from melens.analysis.me_layer import massive_activations
from melens.analysis.metrics import SINK_THRESHOLD, entropy_bound
from melens.analysis.statistics import mean_by, mean_metric, share_interval
from melens.analysis.study import Study
from melens.errors import MelensError
from melens.masks.mask import WeMask
from melens.report.result import Result
from melens.tracing.attention_probes import Importance
from melens.tracing.interventions import Hook, can_ablate
from melens.tracing.probes import Norms, Probe
from melens.tracing.sites import ATTENTION_ON_KEYS, Sites
from melens.tracing.spectra import Spectrum

__all__ = ["CLAIMS", "ValleyMetrics", "valley"]

SITE = "hook_resid_post"
ENTROPY, WITHOUT, RATE = "entropy", "entropy_without_first", "sink_rate"
_QUANTITIES = (
    ENTROPY, WITHOUT, "entropy_unit_rows", "bound", "row_share", "aligned_share", "norm", "norm_others", RATE,
)  # fmt: skip

ByInput = Mapping[str, Float[np.ndarray, "input layer"]]
"""Each quantity of a run, of each input, a distinct first token; NaN in a block where it was not measured."""


def valley(study: Study, *, rank_tokens: int = 64, rank_prompts: int = 24, mask_rate: float = 0.1) -> Result:
    """Measure the entropy of the states by block, with and without token 0 and the massive activation.

    Args:
        study: as `melens.study` makes it.
        rank_tokens: entropies are measured on prompts cut to this length; shorter ones stay out.
        rank_prompts: on at most so many, of distinct first tokens as far as there are.
        mask_rate: of the paper's mask (weight-guided, from the block behind the ME layer on), under which it is
            measured again.

    Returns:
        Metrics `ValleyMetrics`; the figures `valley` and, where something can be changed, `valley_by_run`.

    Raises:
        MelensError: no prompt is long enough, or an entropy or an importance is NaN.

    Example:
        >>> result = melens.analysis.valley(study, rank_tokens=32)
        >>> sorted(result.figures)
        ['valley', 'valley_by_run']
    """
    prompts, is_alone = _prompts(study, rank_tokens, rank_prompts)
    runs, why_not = _runs(study, mask_rate)
    table = pd.concat([_measure(study, prompts, rank_tokens, *run) for run in runs.items()], ignore_index=True)
    inputs = study.trace.prompts.set_index("prompt")["first_token_id"][prompts]
    by_input = {run: _by_input(study, table[table["run"] == run], inputs) for run in runs}
    metrics = study.metrics(
        ValleyMetrics,
        **study.layout.metrics(),
        inputs=inputs.nunique(),
        valley_prompts=len(prompts),
        valley_tokens=rank_tokens,
        prompts_with_others=0 if is_alone else len(prompts),
        **why_not,
        **(_of_valley(study, by_input[INTACT], inputs) if study.me.layer is not None else {}),
        **(_of_changes(study, by_input) if study.me.layer is not None and study.massive_layers else {}),
    )
    measured = [name for name in _QUANTITIES if name in table]
    by_block = pd.concat([mean_by(table, name, ("run", "layer")).assign(quantity=name) for name in measured])
    findings = in_words(metrics)
    figures = {"valley": valley_figure(study, by_block, metrics, findings)}
    if len(runs) > 1:
        figures["valley_by_run"] = runs_figure(study, by_block, metrics, findings)
    tables = {"valley_by_block": by_block, "valley_by_prompt": table}
    return Result("valley", study.trace.model, metrics, tables, figures, findings)


# --- Runs -------------------------------------------------------------------------------------------------------------


def _prompts(study: Study, n_tokens: int, n_prompts: int) -> tuple[list[int], bool]:
    """Choose prompts of enough tokens in which token 0 alone is massive, and tell whether there are any; else all."""
    long = prompts_of_length(study, n_tokens)
    if not long:
        raise MelensError(f"No prompt has {n_tokens} tokens, to which they would be cut (exp.rank_tokens).")
    if study.me.layer is None:
        return long[:n_prompts], True
    massive = massive_activations(study.trace, study.me.criterion)
    others = massive[(massive["pos"] > 0) & (massive["pos"] < n_tokens) & massive["layer"].isin(study.massive_layers)]
    alone = [prompt for prompt in long if prompt not in set(others["prompt"])]
    return (alone or long)[:n_prompts], bool(alone)


def _runs(study: Study, mask_rate: float) -> tuple[dict[str, AbstractContextManager[Any]], dict[str, Any]]:
    """Return what changes the model in each run; of those that cannot be, why not."""
    runs: dict[str, AbstractContextManager[Any]] = {INTACT: nullcontext()}
    me_layer, formed = study.me.layer, study.me.formed
    if me_layer is None or formed is None:
        return runs, {}
    if study.position != 0:
        why_not = f"The massive token is at position {study.position}, not the first."
        return runs, {"mask_why_not": why_not, "removed_why_not": why_not}
    told: dict[str, Any] = {}
    try:
        runs[MASKED] = WeMask(rate=mask_rate).at(study.me).on(study.model).applied(study.model)
        told["mask_rate"] = mask_rate
    except MelensError as error:
        told["mask_why_not"] = str(error)
    removed = [layer for layer in range(me_layer, formed + 1) if can_ablate(study.model, layer, "ffn")]
    if me_layer in removed:
        hooks: list[Hook] = [(f"blocks.{layer}.hook_mlp_out", _nothing_to_first) for layer in removed]
        runs[REMOVED], told["removed_layers"] = study.model.hooks(fwd_hooks=hooks), removed
    else:
        has_ffn = study.layout.ffn_in_words
        told["removed_why_not"] = f"Block {me_layer}, the ME layer, has no FFN output to remove: there is {has_ffn}."
    return runs, told


def _nothing_to_first(written: Float[Tensor, "batch pos d"], hook: HookPoint) -> Float[Tensor, "batch pos d"]:
    return torch.cat([torch.zeros_like(written[:, :1]), written[:, 1:]], dim=1)


def _measure(
    study: Study, prompts: list[int], n_tokens: int, run: str, change: AbstractContextManager[Any]
) -> pd.DataFrame:
    """Trace the prompts in a run: a row for each `prompt` and `layer`, with the columns of `_QUANTITIES`."""
    probes: list[Probe] = [Spectrum((SITE,)), Norms((SITE,))]
    if Sites.of(study.model).find(ATTENTION_ON_KEYS):
        probes.append(Importance(n_tokens=min(sink_rate.N_TOKENS, n_tokens)))
    stage, most = f"entropies, {run} (tokens)", max(n_tokens, study.max_batch_tokens)
    with change:
        traced = trace_cut(study, prompts, n_tokens, probes, stage, max_batch_tokens=most)
    spectrum = traced["spectrum"].set_index(["prompt", "layer"])
    spectrum = spectrum.rename(columns=lambda name: name.replace("matrix_entropy", ENTROPY))
    bound = entropy_bound(
        torch.tensor(spectrum["aligned_share"].to_numpy()), min(n_tokens, study.trace.model["d_model"])
    )
    norms = traced["norm"].assign(is_first=traced["norm"]["pos"] == 0)
    norms = norms.groupby(["prompt", "layer", "is_first"])["norm"].mean().unstack("is_first")
    table = spectrum.assign(run=run, bound=bound.numpy(), norm=norms[True], norm_others=norms[False])
    if "importance" in traced:
        table[RATE] = sink_rate.share_of_sinks(traced["importance"], ["prompt", "layer"])
    return table[["run", *(name for name in _QUANTITIES if name in table)]].reset_index()


def _by_input(study: Study, table: pd.DataFrame, inputs: pd.Series) -> ByInput:
    """Average over the prompts that share a first token, whose state they share in a causal model."""
    means = table.drop(columns="run").groupby([table["prompt"].map(inputs), "layer"]).mean()
    layers = range(study.n_layers)
    return {
        name: means[name].unstack("layer").reindex(columns=layers).to_numpy(dtype=float)
        for name in _QUANTITIES
        if name in means
    }


# --- Metrics ----------------------------------------------------------------------------------------------------------


def _of_valley(study: Study, intact: ByInput, inputs: pd.Series) -> dict[str, Any]:
    """Measure the intact model's valley: how deep, where, what goes with it, and how tight its bound is."""
    measured = mean_metric("norm_correlation", _rank_correlations(intact[ENTROPY], intact["norm"]))
    measured |= _with_sinks(intact)
    inside = list(study.massive_layers)
    if not inside:
        return measured | {"fall_why_not": "The massive state is formed in the last two blocks, which count apart."}
    ends = {ENTROPY: "entropy_inside", WITHOUT: "entropy_inside_without", "bound": "bound_inside"}
    for name, metric in ends.items():
        measured |= mean_metric(metric, intact[name][:, inside].mean(axis=1))
    for name in ("row_share", "aligned_share"):
        measured[f"{name}_inside"] = float(intact[name][:, inside].mean())
    return measured | _extents(study, intact[ENTROPY], inputs) | _falls(study.me.layer or 0, inside, intact)


def _falls(me_layer: int, inside: list[int], intact: ByInput) -> dict[str, Any]:
    if me_layer == 0:
        return {"fall_why_not": "No block lies before the ME layer."}
    before = {name: intact[name][:, :me_layer].mean(axis=1) for name in (ENTROPY, WITHOUT, "bound")}
    after = {name: intact[name][:, inside].mean(axis=1) for name in (ENTROPY, WITHOUT)}
    fall, fall_without = (before[name] - after[name] for name in (ENTROPY, WITHOUT))
    measured = {
        "entropy_before": float(before[ENTROPY].mean()),
        "entropy_before_without": float(before[WITHOUT].mean()),
        "bound_before": float(before["bound"].mean()),
        **mean_metric("entropy_ratio", after[ENTROPY] / before[ENTROPY]),
        **mean_metric("fall", fall),
        **mean_metric("fall_without", fall_without),
    }
    if (mean := float(fall.mean())) < LEAST_FALL:
        return measured | {"left_why_not": f"The entropy falls by {mean:.2f}: there is no valley."}
    return measured | mean_metric("fall_left", fall_without / mean)


def _extents(study: Study, entropy: Float[np.ndarray, "input layer"], inputs: pd.Series) -> dict[str, Any]:
    """Find where each input's valley begins and ends, and compare it with where token 0 is massive."""
    begins, ends = np.array([_extent(of_input) for of_input in entropy]).T
    mean = entropy.mean(axis=0)
    is_low = mean <= (mean.max() + mean.min()) / 2
    measured: dict[str, Any] = {
        "valley_begins": _counts(begins),
        "valley_ends": _counts(ends),
        "earlier_valley": np.flatnonzero(is_low[: _extent(mean)[0]]).tolist(),
    }
    massive = massive_activations(study.trace, study.me.criterion)
    massive = massive[(massive["pos"] == 0) & massive["prompt"].isin(inputs.index)]
    last = massive.groupby(massive["prompt"].map(inputs))["layer"].max().to_numpy()
    if len(last) < len(entropy) or study.me.layer is None or study.me.formed is None:
        return measured  # another token than the first is massive
    at_me = (begins >= study.me.layer) & (begins <= study.me.formed)
    with_massive = np.abs(ends - last) <= 1
    return measured | {
        "massive_ends": _counts(last),
        "begins_at_me": float(at_me.mean()),
        "begins_at_me_interval": share_interval(at_me),
        "ends_with_massive": float(with_massive.mean()),
        "ends_with_massive_interval": share_interval(with_massive),
    }


def _extent(entropy: Float[np.ndarray, " layer"]) -> tuple[int, int]:
    """Return the first and the last block of the run below half way to the largest entropy, around the least."""
    lowest, high = int(entropy.argmin()), np.flatnonzero(entropy > (entropy.max() + entropy.min()) / 2)
    return int(max(high[high < lowest], default=-1)) + 1, int(min(high[high > lowest], default=len(entropy))) - 1


def _counts(layers: np.ndarray) -> dict[str, int]:
    return {str(layer): number for layer, number in Counter(layers.tolist()).most_common()}


def _with_sinks(intact: ByInput) -> dict[str, Any]:
    """Correlate the entropy after a block with the sink rate in the next one, which reads these states."""
    if RATE not in intact:
        return {"sink_correlation_why_not": "The model has no attention that can be measured."}
    read, rate = intact[ENTROPY][:, :-1], intact[RATE][:, 1:]
    attends = ~np.isnan(rate).any(axis=0)
    if attends.sum() < 3:
        return {"sink_correlation_why_not": "A rank correlation takes three blocks with attention."}
    return mean_metric("sink_correlation", _rank_correlations(read[:, attends], rate[:, attends]))


def _rank_correlations(
    first: Float[np.ndarray, "input layer"], second: Float[np.ndarray, "input layer"]
) -> Float[np.ndarray, " input"]:
    """Compute Spearman's over the blocks of each input; 0 where either is the same in all, and goes with nothing."""
    ranks = [pd.DataFrame(values).rank(axis=1).to_numpy() for values in (first, second)]
    centred = [own - own.mean(axis=1, keepdims=True) for own in ranks]
    sizes = np.linalg.norm(centred[0], axis=1) * np.linalg.norm(centred[1], axis=1)
    return (centred[0] * centred[1]).sum(axis=1) / np.where(sizes == 0, 1, sizes)


def _of_changes(study: Study, by_input: Mapping[str, ByInput]) -> dict[str, Any]:
    """Measure what becomes of entropy, norm and sinks where the massive activation is removed, and under the mask."""
    inside = list(study.massive_layers)
    of_runs = {
        run: {name: own[name][:, inside].mean(axis=1) for name in (ENTROPY, WITHOUT, "norm")}
        for run, own in by_input.items()
    }
    intact, measured = of_runs[INTACT], dict[str, Any]()
    taken = float((intact[WITHOUT] - intact[ENTROPY]).mean())
    if taken < LEAST_FALL:
        measured["lifted_why_not"] = f"Token 0's row takes {taken:.2f} from the entropy: no valley is its own."
    for run, end in ((REMOVED, "removed"), (MASKED, "masked")):
        if run in of_runs:
            measured |= mean_metric(f"entropy_{end}", of_runs[run][ENTROPY])
            measured |= mean_metric(f"entropy_{end}_without", of_runs[run][WITHOUT])
            if taken >= LEAST_FALL:
                measured |= mean_metric(f"lifted_{end}", (of_runs[run][ENTROPY] - intact[ENTROPY]) / taken)
    if REMOVED in of_runs:
        measured |= mean_metric("norm_left", of_runs[REMOVED]["norm"] / intact["norm"])
    return measured | _sinks_of_changes(study, by_input)


def _sinks_of_changes(study: Study, by_input: Mapping[str, ByInput]) -> dict[str, Any]:
    """Average the sink rate over the blocks that read a massive state, up to the last two."""
    rate = by_input[INTACT].get(RATE, np.full((1, study.n_layers), np.nan))
    reading = [layer for layer in study.massive_layers[1:] if not np.isnan(rate[:, layer]).any()]
    if not reading:
        return {"sinks_left_why_not": "No block between the ME layer and the last two has attention."}
    rates = {run: own[RATE][:, reading].mean(axis=1) for run, own in by_input.items()}
    ends = {INTACT: "intact", REMOVED: "removed", MASKED: "masked"}
    measured: dict[str, Any] = {f"sink_rate_{ends[run]}": float(rate.mean()) for run, rate in rates.items()}
    if REMOVED in rates:
        by_block = by_input[REMOVED][RATE][:, reading].mean(axis=0)
        if (most := float(by_block.max())) > SINK_THRESHOLD:
            measured["sinks_stay"] = f"In block {reading[by_block.argmax()]} it is {most:.2f} then."
    if (intact := measured["sink_rate_intact"]) < LEAST_RATE:
        return measured | {"sinks_left_why_not": f"The sink rate of the intact model is {intact:.2f} there."}
    return measured | (mean_metric("sinks_left", rates[REMOVED] / intact) if REMOVED in rates else {})
