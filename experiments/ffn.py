"""How the FFN concentrates and amplifies token 0: figure 4."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from transformer_lens.model_bridge import TransformerBridge

from experiments.study import Study
from melens import Concentration, MelensError, Probe, figures
from melens.results import Picture, Result
from melens.statistics import bootstrap_mean, mean_by, peak_layer, with_interval

GATE, UP, DOWN = "mlp.hook_pre", "mlp.hook_pre_linear", "hook_mlp_out"


def projections(model: TransformerBridge) -> dict[str, str]:
    """Return the hook names after the projections that this model's FFNs let be told apart."""
    of_block = {name.split(".", 2)[2] for name in model.hook_dict if name.startswith("blocks.")}
    if {GATE, UP} <= of_block:
        return {"gate": GATE, "up": UP, "down": DOWN}
    has_neurons = any(getattr(getattr(block, "mlp", None), "in", None) is not None for block in model.blocks)
    if has_neurons and GATE in of_block:  # without a gate the hook is after the up projection
        return {"up": GATE, "down": DOWN}
    return {"down": DOWN} if DOWN in of_block else {}


def probes(model: TransformerBridge, options: DictConfig) -> list[Probe]:
    """Concentration after each projection."""
    sites = projections(model)
    if not sites:
        raise MelensError("No block of this model has an FFN whose output can be heard.")
    probe = Concentration(tuple(sites.values()))
    probe.may_miss = True
    return [probe]


def run(study: Study, options: DictConfig) -> Result:
    """Set token 0's concentration against the others', and what the FFN makes of its norm."""
    probes(study.model, options)  # says why, where there is nothing to measure
    sites = projections(study.model)
    table = study.trace["concentration"]
    table = table.assign(difference=table["concentration"] - table["concentration_others"])
    differences = {name: mean_by(table[table["site"] == site], "difference") for name, site in sites.items()}
    amplification = _amplification(study)
    by_block = mean_by(amplification, "amplification")
    metrics = study.metrics(
        concentration_peaks={name: _peak(points, study.last_lasting) for name, points in differences.items()},
        missing_projections=[name for name in ("gate", "up", "down") if name not in sites],
        **_amplification_metrics(study, amplification, by_block),
    )
    here = _in_words(metrics)
    summaries = [points.assign(quantity=f"concentration after {name}") for name, points in differences.items()]
    return Result(
        experiment="ffn",
        model=study.trace.model,
        metrics=metrics,
        tables={"ffn_by_block": pd.concat([*summaries, by_block.assign(quantity="amplification")], ignore_index=True)},
        pictures={
            "ffn": Picture(
                figures.ffn_figure(
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


def _amplification(study: Study) -> pd.DataFrame:
    """Compute ‖FFN output‖ / ‖FFN input‖ of token 0: `prompt`, `layer`, `amplification`."""
    norms = study.trace["norm"]
    of_first = norms[norms["pos"] == 0].pivot(index=["prompt", "layer"], columns="site", values="norm")
    if "ln2.hook_out" not in of_first:  # a parallel block: the FFN reads what attention reads
        return pd.DataFrame(columns=["prompt", "layer", "amplification"])
    ratio = of_first["hook_mlp_out"] / of_first["ln2.hook_out"]
    return ratio.rename("amplification").dropna().reset_index()


def _amplification_metrics(study: Study, amplification: pd.DataFrame, by_block: pd.DataFrame) -> dict[str, Any]:
    here = amplification[amplification["layer"] == study.me.layer]["amplification"].to_numpy(dtype=float)
    if not len(here):
        return {}
    others = by_block[(by_block["layer"] != study.me.layer) & (by_block["layer"] <= study.last_lasting)]
    largest = others["mean"].max() if len(others) else np.nan
    low, high = bootstrap_mean(here)
    return {
        "amplification": float(here.mean()),
        "amplification_interval": (low, high),
        "amplification_peak": _peak(by_block, study.last_lasting),
        "amplification_over_next": float(here.mean() / largest),
        "amplification_over_next_interval": (low / largest, high / largest),
    }


def _peak(points: pd.DataFrame, last: int) -> int | None:
    points = points[points["layer"] <= last]
    return peak_layer(points) if len(points) else None


def _in_words(metrics: dict[str, Any]) -> str:
    peaks = ", ".join(f"{name} at block {layer}" for name, layer in metrics["concentration_peaks"].items())
    words = f"The last two blocks apart, concentration peaks after {peaks}."
    if "amplification" in metrics:
        amplification = with_interval(metrics["amplification"], metrics["amplification_interval"], ",.4g")
        words += (
            f" The FFN of block {metrics['me_layer']} amplifies ×{amplification}, "
            f"×{metrics['amplification_over_next']:,.3g} the largest elsewhere."
        )
    if metrics["missing_projections"]:
        words += f" This FFN gives no {' and no '.join(metrics['missing_projections'])} projection to listen to."
    return words
