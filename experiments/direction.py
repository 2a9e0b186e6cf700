"""Whether token 0's state is the same across inputs and blocks once it is massive: figure 5."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from experiments.runner.legacy import PlainOptions
from experiments.runner.study import Run as Study
from melens import Probe
from melens.analysis.metrics import l2_norm, pairwise_cosine
from melens.analysis.statistics import bootstrap_mean, mean_by, tidy
from melens.figures.curves import Curve, Panel, curves_by_block, vectors_by_dim
from melens.figures.heatmaps import Heatmap, heatmap_with_slider
from melens.figures.style import COLORS, FIRST, OTHERS
from melens.report.result import Figure, Result

TRIVIAL = "trivial by construction: all prompts share their first token"


def probes(model: TransformerBridge, options: PlainOptions) -> list[Probe]:
    """Everything is in the default probes."""
    return []


def run(study: Study, options: PlainOptions) -> Result:
    """Compare token 0's states between prompts, and between blocks."""
    vectors = study.trace.tensors["token_vectors"][:, :, 0]  # [prompt, layer, d]
    states = vectors[study.distinct_carriers]
    distinct = study.distinct_carriers
    norms = tidy(l2_norm(states).numpy(), "norm")
    cosines = pairwise_cosine(vectors[study.carriers].transpose(0, 1))
    apart = pairwise_cosine(states.transpose(0, 1))
    to_others = tidy(_mean_to_others(apart).numpy(), "cosine")
    to_previous = torch.cosine_similarity(states, states.roll(1, dims=1), dim=-1)
    to_previous[:, 0] = float("nan")  # no block comes before the first
    between = tidy(to_previous.numpy(), "cosine")
    metrics = study.metrics(**_metrics(study, norms, to_others, between))
    if study.me.layer is not None and study.lasting:
        metrics["least_cosine"] = float(apart[list(study.lasting)].min())
    by_block = {
        "norm": mean_by(norms, "norm"),
        "norm_cv": _coefficient_of_variation(states),
        "cosine_between_inputs": mean_by(to_others, "cosine"),
        "least_cosine_between_inputs": _least(apart),
        "cosine_to_previous_block": mean_by(between, "cosine"),
    }
    trivial = f" ({TRIVIAL})" if len(distinct) == 1 else ""
    rests_on = f"{len(distinct)} distinct first token{'s' if len(distinct) > 1 else ''}{trivial}."
    here = f"{_in_words(metrics)} It rests on {rests_on}"
    me_layer = "" if study.me.layer is None else f"; the ME layer is {study.me.layer}"
    return Result(
        experiment="direction",
        model=study.trace.model,
        metrics=metrics,
        tables={"direction_by_block": pd.concat([table.assign(quantity=name) for name, table in by_block.items()])},
        figures={
            "norms": Figure(
                _norms_figure(study, norms, by_block["norm_cv"], rests_on),
                "figure 5a",
                "After the ME layer the norm is large, barely changes, and is alike for all inputs.",
                here,
            ),
            "dims_by_block": Figure(
                vectors_by_dim(
                    _some_blocks(study, states), title=study.title("Token 0 by dim, mean over prompts"), note=rests_on
                ),
                "figure 5b",
                "From the ME layer on the same few dims stand out in every block.",
                _same_dims_in_words(study, states),
            ),
            "cosine_by_block": Figure(
                heatmap_with_slider(
                    _cosine_maps(study, cosines),
                    title=study.title("Cosine of token 0's state between inputs"),
                    note=f"{rests_on} Move the slider through the blocks{me_layer}.",
                    z_title="cosine",
                    z_range=(min(0.0, float(cosines.min())), 1),
                    start=str(study.n_layers // 2 if study.me.layer is None else study.me.layer),
                ),
                "figure 5c",
                "After the ME layer the cosine between any two inputs is about 1.",
                here,
            ),
            "between_blocks": Figure(
                _cosine_figure(study, by_block, rests_on),
                "figure 5c, by block",
                "Direction is settled at the ME layer: it barely changes after, whatever the input.",
                here,
            ),
        },
        findings=[("direction", here)],
    )


def _mean_to_others(cosines: Float[Tensor, "layer n n"]) -> Float[Tensor, "n layer"]:
    """Average each prompt's cosine to the others; with a single distinct first token there is none but itself: 1."""
    n = cosines.shape[1]
    if n == 1:
        return torch.ones(1, cosines.shape[0])
    return ((cosines.sum(-1) - cosines.diagonal(dim1=-2, dim2=-1)) / (n - 1)).T


def _least(cosines: Float[Tensor, "layer n n"]) -> pd.DataFrame:
    least = cosines.flatten(1).amin(-1)
    return pd.DataFrame({"layer": range(len(least)), "mean": least.numpy()})


def _coefficient_of_variation(states: Float[Tensor, "n layer d"]) -> pd.DataFrame:
    norms = l2_norm(states)
    spread = norms.std(dim=0) / norms.mean(dim=0) if len(norms) > 1 else torch.zeros(norms.shape[1])
    return pd.DataFrame({"layer": range(norms.shape[1]), "mean": spread.numpy()})


def _metrics(study: Study, norms: pd.DataFrame, to_others: pd.DataFrame, between: pd.DataFrame) -> dict[str, Any]:
    lasting = study.lasting
    if study.me.layer is None or not lasting:
        return {}
    metrics: dict[str, Any] = {}
    if len(lasting) > 1:
        wide = norms[norms["layer"].isin(lasting)].pivot(index="prompt", columns="layer", values="norm").to_numpy()
        drift = np.abs(wide / wide[:, :1] - 1).max(axis=1)
        after = between[between["layer"].isin(lasting[1:])].groupby("prompt")["cosine"].min().to_numpy()
        metrics = {
            "norm_drift": float(drift.mean()),
            "norm_drift_interval": bootstrap_mean(drift),
            "consecutive_cosine": float(after.mean()),
            "consecutive_cosine_interval": bootstrap_mean(after),
        }
    by_block = mean_by(to_others[to_others["layer"].isin(lasting)], "cosine")
    lowest = by_block.sort_values("mean").iloc[0]
    before = to_others[to_others["layer"] < study.me.layer]["cosine"]
    return metrics | {
        "cosine": float(lowest["mean"]),
        "cosine_interval": (float(lowest["low"]), float(lowest["high"])),
        "cosine_before": float(before.mean()) if len(before) else None,
    }


def _norms_figure(study: Study, norms: pd.DataFrame, variation: pd.DataFrame, rests_on: str) -> Any:
    inputs = [
        Curve(
            "token 0, one line a first token", of_prompt.rename(columns={"norm": "mean"}), FIRST, in_legend=prompt == 0
        )
        for prompt, of_prompt in norms.groupby("prompt")
    ]
    panels = [
        Panel("Norm of token 0 after each block", "L2 norm", inputs, study.me.layer, log_scale=True),
        Panel(
            "Its coefficient of variation",
            "standard deviation / mean",
            [Curve("variation", variation, OTHERS)],
            study.me.layer,
        ),
    ]
    return curves_by_block(panels, title=study.title("Norm of token 0 by input"), note=rests_on)


def _cosine_figure(study: Study, by_block: dict[str, pd.DataFrame], rests_on: str) -> Any:
    names = {
        "cosine_between_inputs": "between inputs, mean",
        "least_cosine_between_inputs": "between inputs, least",
        "cosine_to_previous_block": "to the block before, same input, mean",
    }
    curves = [Curve(text, by_block[name], color) for (name, text), color in zip(names.items(), COLORS, strict=False)]
    panel = Panel("", "cosine similarity", curves, study.me.layer, zero_line=True)
    note = f"Bands: 95% bootstrap intervals over prompts. {rests_on}"
    return curves_by_block([panel], title=study.title("Cosine of token 0's state"), note=note)


def _shown_blocks(study: Study) -> list[int]:
    if study.me.layer is None:
        return sorted({0, study.n_layers // 2, study.n_layers - 1})
    middle = (study.me.layer + study.last_lasting) // 2
    blocks = {study.me.layer - 1, study.me.layer, study.me.layer + 1, middle, study.n_layers - 1}
    return sorted(block for block in blocks if 0 <= block < study.n_layers)


def _some_blocks(study: Study, states: Float[Tensor, "prompt layer d"]) -> dict[str, np.ndarray]:
    mark = {study.me.layer: " (ME layer)"}
    return {f"block {block}{mark.get(block, '')}": states[:, block].mean(0).numpy() for block in _shown_blocks(study)}


def _same_dims_in_words(study: Study, states: Float[Tensor, "prompt layer d"]) -> str:
    dims = {block: int(states[:, block].mean(0).abs().argmax()) for block in _shown_blocks(study)}
    return "The largest dim is " + ", ".join(f"{dim} after block {block}" for block, dim in dims.items()) + "."


def _cosine_maps(study: Study, cosines: Float[Tensor, "layer n n"]) -> dict[str, Heatmap]:
    prompts = study.of_carriers(study.trace.prompts)
    firsts = [f"{row.prompt} {row.first_token!r}" for row in prompts.itertuples()]
    return {
        str(layer): Heatmap("", cosine.numpy(), firsts, firsts, "prompt", "prompt and its first token")
        for layer, cosine in enumerate(cosines)
    }


def _in_words(metrics: dict[str, Any]) -> str:
    if "norm_drift" not in metrics:
        return "Without an ME layer and blocks after it there is nothing to be settled."
    before = "" if metrics["cosine_before"] is None else f" (before it {metrics['cosine_before']:.2f} on average)"
    return (
        f"From the ME layer to the last two blocks, mean over inputs: the norm changes by {metrics['norm_drift']:.1%}, "
        f"the cosine from block to block falls to {metrics['consecutive_cosine']:.4f}, that between inputs to "
        f"{metrics['cosine']:.4f}{before}; between the two most different inputs it is {metrics['least_cosine']:.4f}."
    )
