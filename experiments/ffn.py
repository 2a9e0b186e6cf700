"""How the FFN concentrates and amplifies token 0: figure 4."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from experiments.runner.legacy import PlainOptions
from experiments.runner.study import Run as Study
from melens import Concentration, MelensError, Probe
from melens.analysis.statistics import bootstrap_mean, mean_by, peak_layer, with_interval
from melens.figures.curves import ffn_figure
from melens.models.layout import Layout, listed
from melens.report.result import Figure, Result

GATE, UP, DOWN = "hook_pre", "hook_pre_linear", "hook_mlp_out"
PROJECTIONS = ("gate", "up", "down")


def projections(model: TransformerBridge, layer: int) -> dict[str, str]:
    """Return the hook names after the projections of a block's FFN; a mixture of experts has the last alone."""
    parts = model.blocks[layer]._modules
    ffn = "shared_mlp" if "shared_mlp" in parts and "moe" not in parts else "mlp"  # Granite's name where it is dense
    gate, up = f"{ffn}.{GATE}", f"{ffn}.{UP}"
    has = {site: f"blocks.{layer}.{site}" in model.hook_dict for site in (gate, up, DOWN)}
    sites = {}
    if has[gate] and has[up]:
        sites = {"gate": gate, "up": up}
    elif has[gate] and getattr(parts[ffn], "in", None) is not None:
        sites = {"up": gate}  # without a gate this hook is after the up projection
    return sites | {"down": DOWN} if has[DOWN] else sites


def probes(model: TransformerBridge, options: PlainOptions) -> list[Probe]:
    """Concentration after each projection."""
    by_layer = {layer: projections(model, layer) for layer in range(len(model.blocks))}
    if not any(by_layer.values()):
        raise MelensError(f"No FFN can be listened to: there is {Layout.of(model).ffn_in_words}.")
    probe = Concentration([f"blocks.{layer}.{site}" for layer, sites in by_layer.items() for site in sites.values()])
    probe.may_miss = True
    return [probe]


def run(study: Study, options: PlainOptions) -> Result:
    """Set token 0's concentration against the others', and what the FFN makes of its norm."""
    probes(study.model, options)  # says why, where there is nothing to measure
    table = study.of_carriers(study.trace["concentration"])
    table = table.assign(difference=table["concentration"] - table["concentration_others"], after=_names(study, table))
    names = [name for name in PROJECTIONS if name in set(table["after"])]
    differences = {name: mean_by(table[table["after"] == name], "difference") for name in names}
    amplification = _amplification(study)
    by_block = mean_by(amplification, "amplification")
    layout = Layout.of(study.model)
    metrics = study.metrics(
        **layout.metrics(),
        concentration_peaks={name: _peak(points, study.last_lasting) for name, points in differences.items()},
        missing_projections=_missing(study),
        **_amplification_metrics(study, amplification, by_block),
    )
    here = _in_words(metrics, layout)
    summaries = [points.assign(quantity=f"concentration after {name}") for name, points in differences.items()]
    return Result(
        experiment="ffn",
        model=study.trace.model,
        metrics=metrics,
        tables={"ffn_by_block": pd.concat([*summaries, by_block.assign(quantity="amplification")], ignore_index=True)},
        figures={
            "ffn": Figure(
                ffn_figure(
                    differences,
                    by_block,
                    me_layer=study.me.layer,
                    title=study.title(
                        "Concentration of token 0 after the FFN's projections, and the FFN's amplification"
                    ),
                ),
                "figure 4",
                "All three concentrations and the amplification peak together, only at the ME layer.",
                here,
            )
        },
        findings=[("FFN", here)],
    )


def _names(study: Study, table: pd.DataFrame) -> pd.Series:
    """Name the projection that each row was measured after."""
    of_site = {
        (layer, site): name for layer in range(study.n_layers) for name, site in projections(study.model, layer).items()
    }
    places = zip(table["layer"], table["site"], strict=True)
    return pd.Series([of_site[place] for place in places], index=table.index, dtype=object)


def _missing(study: Study) -> dict[str, list[int]]:
    """List the blocks whose FFN lacks a projection to listen to, by projection."""
    of_ffn = {layer: projections(study.model, layer) for layer in range(study.n_layers)}
    without = {name: [layer for layer, has in of_ffn.items() if has and name not in has] for name in PROJECTIONS}
    return {name: layers for name, layers in without.items() if layers}


def _amplification(study: Study) -> pd.DataFrame:
    """Compute ‖FFN output‖ / ‖FFN input‖ of token 0: `prompt`, `layer`, `amplification`."""
    norms = study.trace["norm"]
    norms = norms[norms["prompt"].isin(study.distinct_carriers)]
    of_first = norms[norms["pos"] == 0].set_index(["prompt", "layer"])
    written, read = (of_first.loc[of_first["site"] == site, "norm"] for site in ("hook_mlp_out", "ln2.hook_out"))
    has_both = written.index.intersection(read.index)  # a parallel block's FFN reads what attention reads
    table = (written[has_both] / read[has_both]).rename("amplification").reset_index()
    for row in table[~np.isfinite(table["amplification"])].head(1).to_dict("records"):
        raise MelensError(
            f"The FFN of block {row['layer']} amplifies token 0 by {row['amplification']} in prompt {row['prompt']}: "
            "look for NaN in the model's weights, or load it in float32."
        )
    return table


def _amplification_metrics(study: Study, amplification: pd.DataFrame, by_block: pd.DataFrame) -> dict[str, Any]:
    wide = amplification.pivot(index="prompt", columns="layer", values="amplification")
    others = wide[[layer for layer in range(study.last_lasting + 1) if layer in wide and layer != study.me.layer]]
    if study.me.layer not in wide.columns or others.empty:
        return {"amplification_over_next_why_not": "The ME layer's FFN has no norm before it, or no other to compare."}
    here = wide[study.me.layer].to_numpy(dtype=float)
    over_next = here / others.max(axis=1).to_numpy(dtype=float)
    return {
        "amplification": float(here.mean()),
        "amplification_interval": bootstrap_mean(here),
        "amplification_peak": _peak(by_block, study.last_lasting),
        "amplification_over_next": float(over_next.mean()),
        "amplification_over_next_interval": bootstrap_mean(over_next),
    }


def _peak(points: pd.DataFrame, last: int) -> int | None:
    points = points[points["layer"] <= last]
    return peak_layer(points) if len(points) else None


def _in_words(metrics: dict[str, Any], layout: Layout) -> str:
    peaks = ", ".join(f"{name} at block {layer}" for name, layer in metrics["concentration_peaks"].items())
    words = f"The last two blocks apart, concentration peaks after {peaks}."
    if "amplification" in metrics:
        amplification = with_interval(metrics["amplification"], metrics["amplification_interval"], ",.4g")
        words += (
            f" The FFN of block {metrics['me_layer']} amplifies ×{amplification}, "
            f"×{metrics['amplification_over_next']:,.3g} the largest elsewhere."
        )
    for name, layers in metrics["missing_projections"].items():
        where = "any FFN" if set(layers) == set(layout.ffn) else f"the FFN of {listed(layers)}"
        words += f" There is no {name} projection to listen to in {where}."
    return f"{words} There is {layout.ffn_in_words}." if len(layout.ffn) < layout.n_layers else words
