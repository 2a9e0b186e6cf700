"""Which weights carry the massive activation: one scalar, a few rows, or a few experts of a mixture.

    result = melens.analysis.carriers(study)
    result.metrics.scalar, result.metrics.share  # block, row, column; what w · x is of the output there

1. The largest input and output of each block's down projection name the super weight (Yu et al. 2024); it, the largest
   other entry of its matrix and random ones are multiplied by factors from 0 to 2.
2. The rows of gate and up that feed the largest neurons are set to zero, or all others (Oh et al. 2024).
3. Of a mixture, the experts with the largest outputs are taken out, or as many others (Su et al. 2025).
Each change is in place and undone at once (`melens.models.ffn_weights`), and is compared on the same texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from melens.analysis.carrier_claims import CarrierMetrics
from melens.analysis.carrier_figures import RANDOM_EXPERTS, SUPER_EXPERTS, draw, in_words
from melens.analysis.generated_texts import Decoding, write
from melens.analysis.massive_texts import MassiveTexts, massive_texts
from melens.analysis.statistics import mean_metric
from melens.analysis.study import Study
from melens.analysis.super_experts import SuperExperts
from melens.analysis.super_weights import RANDOM, REST, TOP, Changed, SuperWeights, scan, spiking
from melens.data.prompts import Prompt, tokenize
from melens.errors import MelensError
from melens.models.ffn_weights import experts_of, ffn_weights, has_neurons, scaled, without_expert
from melens.models.generation import verify_generation
from melens.report.result import Result
from melens.tracing.text_runs import TextEffects

__all__ = ["carriers"]

ENTRIES = (4, 5)
"""Rows and columns of the table of scalars."""


def carriers(
    study: Study,
    *,
    factors: Sequence[float | int] = (0, 0.25, 0.5, 0.75, 1, 1.5, 2),
    n_scalars: int = 2,
    n_rows: int = 5,
    n_random: int = 3,
    n_prompts: int = 16,
    max_tokens: int = 64,
    prompt: str = "Summer is hot. Winter is",
    new_tokens: int = 16,
) -> Result:
    """Scale the scalars that bring the massive activation, zero rows and take experts out, and see what that costs.

    Args:
        study: as `melens.study` makes it.
        factors: of each scalar; 0 and 1 are always among them.
        n_scalars: how many super weights are scaled: the ME layer's first, then those of other blocks that spike.
        n_rows: how many rows of gate and up are the massive weights.
        n_random: how many draws a random control is the mean of.
        n_prompts: how many prompts are run, those with most tokens first, one for each massive state.
        max_tokens: of each of them.
        prompt: is continued greedily under each factor, by `new_tokens` tokens, if the model has a tokenizer.
        new_tokens: at most.

    Returns:
        Metrics `CarrierMetrics`. Of a dense FFN the figures `scan` and `scalars` (what is found), `scaling` and
        `massive_weights`; of a mixture `experts`. Each has its table; `texts` has what was written.

    Raises:
        MelensError: no massive activation, weights that cannot be changed (quantised, offloaded, folded, shared), an ME
            layer that has neither a dense FFN nor experts that are called by number, no fewer rows than there are, a
            prompt that is too long, or a loss that is NaN.

    Example:
        >>> result = melens.analysis.carriers(study, factors=[0], n_random=1, new_tokens=2)
        >>> result.metrics.scalar, result.metrics.share > 0.9
        ([2, 5, 0], True)
    """
    _check(study, n_rows)
    writes = _how_to_write(study, prompt, new_tokens)
    texts = massive_texts(study, n_prompts, max_tokens)
    measured: dict[str, Any] = {"texts": len(texts.prompts), "tokens_per_text": max(map(len, texts.tokens))}
    tables: dict[str, pd.DataFrame] = {}
    if _is_dense(study):
        found = scan(study)
        blocks = spiking(found, study.last_before_trailing)
        weights = SuperWeights(study, texts, blocks, n_scalars)
        scaling = _scale(study, weights, sorted({0, 1, *factors}), n_random)
        rows = _zero_rows(study, weights, n_rows, n_random)
        measured |= _of_scalars(study, weights, blocks, texts, scaling) | _of_rows(rows, n_rows)
        tables |= {"scan": found, "scan_by_block": blocks, "scalars": _largest_products(weights), "scaling": scaling}
        tables |= {"massive_weights": rows}
        if writes is not None:
            tables["texts"] = _written(study, weights, sorted({0, 1, *factors}), writes)
    else:
        measured["scalars_why_not"] = f"Block {study.me.layer}, the ME layer, has no FFN with one down projection."
    if _layers_with_experts(study):
        experts = SuperExperts(study, texts)
        tables |= {"experts": experts.outputs, "without_experts": _without_experts(study, experts, n_random)}
        measured |= _of_experts(experts, tables["without_experts"])
    else:
        measured["experts_why_not"] = "No block up to the ME layer has experts that are called by number."
    metrics = study.metrics(CarrierMetrics, **study.layout.metrics(), **measured)
    findings = in_words(metrics, tables)
    return Result("weights", study.trace.model, metrics, tables, draw(study, metrics, tables, findings), findings)


def _is_dense(study: Study) -> bool:
    return study.me.layer is not None and has_neurons(study.model, study.me.layer)


def _layers_with_experts(study: Study) -> list[int]:
    last = -1 if study.me.formed is None else study.me.formed
    return [layer for layer in range(last + 1) if experts_of(study.model, layer) is not None]


def _check(study: Study, n_rows: int) -> None:
    """Raise what can be said before anything is run."""
    if study.me.layer is None:
        raise MelensError(f"There is no massive activation that any weight could carry: {study.me.reason}")
    if _is_dense(study):
        n_neurons = len(ffn_weights(study.model, study.me.layer).down)
        if n_rows >= n_neurons:
            raise MelensError(f"n_rows is {n_rows}; it must be less than the {n_neurons} rows of gate and up.")
    elif not _layers_with_experts(study):
        raise MelensError(
            f"Block {study.me.layer}, the ME layer, has neither an FFN with one down projection nor experts that are "
            f"called by number: there is {study.layout.ffn_in_words}."
        )
    for layer in _layers_with_experts(study)[:1]:
        without_expert(study.model, layer, 0)


@dataclass(frozen=True)
class _Writing:
    """How a prompt is continued: its tokens, how many more, and whether keys and values are kept."""

    ids: list[int]
    decoding: Decoding
    use_cache: bool


def _how_to_write(study: Study, prompt: str, new_tokens: int) -> _Writing | None:
    """Try out how the prompt can be continued; None for a model that has no tokenizer or writes no text.

    Raises:
        MelensError: a prompt that with its continuation is longer than the context, or of fewer than two tokens.
    """
    model: Any = study.model
    if model.tokenizer is None or not model.original_model.can_generate():
        return None
    (ids,) = tokenize(model, [Prompt(prompt)])
    if (room := model.cfg.n_ctx - len(ids)) < new_tokens:
        raise MelensError(f"new_tokens is {new_tokens}, but the prompt leaves {room} tokens of the model's context.")
    return _Writing(ids, Decoding(new_tokens), verify_generation(model).use_cache)


# --- What became of the texts -----------------------------------------------------------------------------------------


def _outcome(study: Study, changed: Changed, intact: TextEffects) -> pd.DataFrame:
    """Lay out what a run gives of each text: `largest` |h|, `sink_mass`, `sink_heads`, `loss`, `dloss`."""
    assert study.me.formed is not None
    layers = list(study.massive_layers) or [study.me.formed]
    behind = [layer for layer in study.layout.attention if layers[0] < layer <= study.last_before_trailing]
    effects = changed.effects
    mass, heads = (of[:, behind].mean(dim=1) for of in (effects.sink_mass, effects.sink_heads))
    values = {
        "largest": effects.states[:, layers].abs().amax(dim=(1, 2)),
        "largest_intact": intact.states[:, layers].abs().amax(dim=(1, 2)),
        "sink_mass": mass,
        "sink_heads": heads,
        "loss": effects.loss,
        "dloss": effects.loss.double() - intact.loss.double(),
    }
    columns = {name: value.double().numpy() for name, value in values.items()}
    return pd.DataFrame({"text": range(len(effects.loss)), "what": changed.what, "factor": changed.factor, **columns})


def _scale(study: Study, weights: SuperWeights, factors: Sequence[float | int], n_random: int) -> pd.DataFrame:
    """Run the texts with each scalar multiplied by each factor; the random ones by the least and the largest alone."""
    scalars, progress = [*weights.scalars, *weights.controls(n_random)], study.stage("texts with scalars scaled")
    tables = []
    for done, scalar in enumerate(scalars, 1):
        for factor in factors if scalar.kind != "random" else (factors[0], 1, factors[-1]):
            outcome = _outcome(study, weights.scale(scalar, factor), weights.runs.intact)
            place = {"layer": scalar.layer, "row": scalar.row, "column": scalar.column}
            tables.append(outcome.assign(kind=scalar.kind, **place))
        progress(done, len(scalars))
    return pd.concat(tables, ignore_index=True)


def _zero_rows(study: Study, weights: SuperWeights, n_rows: int, n_random: int) -> pd.DataFrame:
    changes = weights.zero_rows(n_rows, n_random)
    return pd.concat([_outcome(study, changed, weights.runs.intact) for changed in changes], ignore_index=True)


def _without_experts(study: Study, experts: SuperExperts, n_random: int) -> pd.DataFrame:
    """Run the texts without the super experts, and without as many others."""
    draws = [(RANDOM_EXPERTS, drawn) for drawn in experts.random(n_random)]
    changes = [experts.without(name, pairs) for name, pairs in [(SUPER_EXPERTS, experts.chosen), *draws]]
    return pd.concat([_outcome(study, changed, experts.runs.intact) for changed in changes], ignore_index=True)


def _largest_products(weights: SuperWeights) -> pd.DataFrame:
    """Share the output of the rows with the largest |output| out among the columns with the largest |input|."""
    n_rows, n_columns = ENTRIES
    rows = weights.outputs.abs().mean(dim=0).topk(min(n_rows, weights.outputs.shape[1])).indices.tolist()
    columns = weights.inputs.abs().mean(dim=0).topk(min(n_columns, weights.inputs.shape[1])).indices.tolist()
    shares = weights.shares(rows, columns).mean(dim=0).numpy()
    of_row = zip(rows, shares, strict=True)
    return pd.DataFrame(
        [{"row": row, "column": column, "share": share}
         for row, own in of_row for column, share in zip(columns, own.tolist(), strict=True)]
    )  # fmt: skip


def _written(study: Study, weights: SuperWeights, factors: Sequence[float | int], writes: _Writing) -> pd.DataFrame:
    """Continue the prompt greedily with the first scalar at each factor, and with the largest other entry at 0."""
    scalar, control = weights.scalars[0], weights.controls(0)[0]
    rows = []
    for changed, factor in [*((scalar, factor) for factor in factors), (control, 0)]:
        with scaled(weights.scaling(changed, factor)):
            new, _ = write(study.model, writes.ids, writes.decoding, use_cache=writes.use_cache)
        rows.append({"what": changed.name, "factor": factor, "text": study.model.tokenizer.decode(new)})
    return pd.DataFrame(rows)


# --- Metrics ----------------------------------------------------------------------------------------------------------


def _mean_of_draws(outcomes: pd.DataFrame) -> pd.DataFrame:
    """Average the draws of a control for each text, so that texts are what is sampled."""
    return outcomes.groupby("text")[["largest", "largest_intact", "sink_mass", "sink_heads", "loss", "dloss"]].mean()


def _left(outcomes: pd.DataFrame) -> np.ndarray:
    return (outcomes["largest"] / outcomes["largest_intact"]).to_numpy()


def _of_scalars(
    study: Study, weights: SuperWeights, blocks: pd.DataFrame, texts: MassiveTexts, scaling: pd.DataFrame
) -> dict[str, Any]:
    scalar, found = weights.scalars[0], blocks[blocks["spikes"]]
    here = blocks[blocks["layer"] == weights.layer].iloc[0]
    shares = weights.shares([scalar.row], [scalar.column])[:, 0, 0].double().numpy()
    own = scaling[scaling["what"] == scalar.name]
    intact, without = own[own["factor"] == 1], own[own["factor"] == 0]
    means = own.groupby("factor", as_index=False)["loss"].mean()
    measured: dict[str, Any] = {
        "found": found[["layer", "row", "column"]].to_numpy().tolist(),
        "scalar": [scalar.layer, scalar.row, scalar.column],
        "scalar_agreement": float(here["agreement"]),
        "weight_rank": weights.weight_rank(),
        "loss": float(intact["loss"].mean()),
        "best_factor": float(means["factor"][means["loss"].idxmin()]),
        **mean_metric("share", shares),
        **mean_metric("left", _left(without)),
        **mean_metric("dloss", without["dloss"].to_numpy()),
    }
    for name in ("sink_mass", "sink_heads"):
        if intact[name].notna().all():
            measured |= {name: float(intact[name].mean()), f"{name}_without": float(without[name].mean())}
    for kind, end in (("largest other", "control"), ("random", "random")):
        control = scaling[(scaling["kind"] == kind) & (scaling["factor"] == 0)]
        if len(control):
            of_text = _mean_of_draws(control)
            measured |= mean_metric(f"left_{end}", _left(of_text))
            measured |= mean_metric(f"dloss_{end}", of_text["dloss"].to_numpy())
    return measured


def _of_rows(outcomes: pd.DataFrame, n_rows: int) -> dict[str, Any]:
    rises = {name: _mean_of_draws(own)["dloss"].to_numpy() for name, own in outcomes.groupby("what")}
    measured: dict[str, Any] = {"top_rows": n_rows, **mean_metric("top_over_rest", rises[TOP] - rises[REST])}
    for name, field in ((TOP, "dloss_top"), (REST, "dloss_rest"), (RANDOM, "dloss_rows_random")):
        measured |= mean_metric(field, rises[name])
    return measured


def _of_experts(experts: SuperExperts, outcomes: pd.DataFrame) -> dict[str, Any]:
    measured: dict[str, Any] = {"experts": [list(pair) for pair in experts.chosen], "n_experts": len(experts.outputs)}
    for name, end in ((SUPER_EXPERTS, ""), (RANDOM_EXPERTS, "_random")):
        of_text = _mean_of_draws(outcomes[outcomes["what"] == name])
        measured |= mean_metric(f"experts_left{end}", _left(of_text))
        measured |= mean_metric(f"dloss_experts{end}", of_text["dloss"].to_numpy())
    return measured
