"""How the FFN concentrates token 0 in a few dims and amplifies it: section 3.1, equation 3, figure 4.

    result = melens.analysis.ffn(study)
    result.figures["ffn"]

1. `Concentration` measures, after the gate, up and down projection of every block, the inverse participation ratio of
   token 0 and of the other tokens; figure 4 shows the difference.
2. The amplification is ‖FFN output‖ / ‖FFN input‖ of token 0, from the norms that every study holds.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.statistics import mean_by, mean_interval, peak_layer, with_interval
from melens.analysis.study import Study
from melens.claims.engine import Claim, Judgement, Verdict, at_least
from melens.errors import MelensError
from melens.figures.curves import ffn_figure
from melens.models.layout import Layout, listed
from melens.report.result import Figure, Interval, Metrics, Result
from melens.tracing.probes import Concentration, Probe

__all__ = ["CLAIMS", "FfnMetrics", "ffn", "probes"]

PROJECTIONS = ("gate", "up", "down")


class FfnMetrics(Metrics):
    """What `ffn` measures; the last two blocks count apart in all of it.

    Attributes:
        concentration_peaks: by projection, the block after whose projection the concentration of token 0 exceeds the
            other tokens' most.
        missing_projections: by projection, the blocks with an FFN in which it cannot be measured.
        amplification: ‖FFN output‖ / ‖FFN input‖ of token 0 in the ME layer, mean over prompts.
        amplification_peak: the block of the largest.
        amplification_over_next: that of the ME layer over the largest of any other block, mean over prompts.
    """

    experiment = "ffn"
    concentration_peaks: dict[str, int | None] | None = None
    missing_projections: dict[str, list[int]] | None = None
    amplification: float | None = None
    amplification_interval: Interval | None = None
    amplification_peak: int | None = None
    amplification_over_next: float | None = None
    amplification_over_next_interval: Interval | None = None
    amplification_over_next_why_not: str | None = None


def probes(model: TransformerBridge) -> list[Probe]:
    """Return what `ffn` needs besides the default probes.

    Raises:
        MelensError: a model without an FFN that can be measured.
    """
    by_layer = _projections(model)
    if not any(by_layer.values()):
        raise MelensError(f"No FFN can be measured: there is {Layout.of(model).ffn_in_words}.")
    probe = Concentration([f"blocks.{layer}.{site}" for layer, sites in by_layer.items() for site in sites.values()])
    probe.may_miss = True
    return [probe]


def ffn(study: Study) -> Result:
    """Compare token 0's concentration with the others', and what the FFN makes of its norm.

    Args:
        study: as `melens.study` makes it.

    Returns:
        Metrics `FfnMetrics`; the figure `ffn` (figure 4).

    Raises:
        MelensError: a model without an FFN that can be measured, or an amplification that is NaN.
    """
    table = study.of_massive_prompts(study.traced(probes(study.model))["concentration"])
    by_layer = _projections(study.model)
    named = {(layer, site): name for layer, sites in by_layer.items() for name, site in sites.items()}
    table = table.assign(
        difference=table["concentration"] - table["concentration_others"],
        after=[named[place] for place in zip(table["layer"], table["site"], strict=True)],
    )
    measured = [name for name in PROJECTIONS if name in set(table["after"])]
    differences = {name: mean_by(table[table["after"] == name], "difference") for name in measured}
    amplification = _amplification(study)
    by_block = mean_by(amplification, "amplification")
    lacking = {name: [layer for layer, has in by_layer.items() if has and name not in has] for name in PROJECTIONS}
    metrics = study.metrics(
        FfnMetrics,
        **study.layout.metrics(),
        concentration_peaks={name: _peak(points, study.last_before_trailing) for name, points in differences.items()},
        missing_projections={name: layers for name, layers in lacking.items() if layers},
        **_amplification_metrics(study, amplification, by_block),
    )
    title = study.title("Concentration of token 0 after the FFN's projections, and the FFN's amplification")
    plot = ffn_figure(differences, by_block, me_layer=study.me.layer, title=title)
    expected = "All three concentrations and the amplification peak together, only at the ME layer."
    observed = _in_words(metrics, study.layout)
    tables = [points.assign(quantity=f"concentration after {name}") for name, points in differences.items()]
    tables.append(by_block.assign(quantity="amplification"))
    figures = {"ffn": Figure(plot, "figure 4", expected, observed)}
    by_block = pd.concat(tables, ignore_index=True)
    return Result("ffn", study.trace.model, metrics, {"ffn_by_block": by_block}, figures, [("FFN", observed)])


def _projections(model: TransformerBridge) -> dict[int, dict[str, str]]:
    """Return, by block, the hook names after the projections of its FFN; a mixture of experts has the last alone."""
    by_layer = {}
    for layer, block in enumerate(model.blocks):
        parts = block._modules
        name = "shared_mlp" if "shared_mlp" in parts and "moe" not in parts else "mlp"  # Granite's where it is dense
        gate, up, down = f"{name}.hook_pre", f"{name}.hook_pre_linear", "hook_mlp_out"
        has = {site for site in (gate, up, down) if f"blocks.{layer}.{site}" in model.hook_dict}
        sites = {}
        if {gate, up} <= has:
            sites = {"gate": gate, "up": up}
        elif gate in has and getattr(parts[name], "in", None) is not None:
            sites = {"up": gate}  # without a gate, hook_pre comes after the up projection
        by_layer[layer] = sites | ({"down": down} if down in has else {})
    return by_layer


def _amplification(study: Study) -> pd.DataFrame:
    """Compute ‖FFN output‖ / ‖FFN input‖ of token 0, of prompts with distinct first tokens: `prompt`, `layer`, ..."""
    norms = study.trace["norm"]
    norms = norms[norms["prompt"].isin(study.distinct_massive_prompts)]
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


def _amplification_metrics(
    study: Study, amplification: pd.DataFrame, by_block: pd.DataFrame
) -> dict[str, float | int | str | Interval | None]:
    wide = amplification.pivot(index="prompt", columns="layer", values="amplification")
    before_trailing = range(study.last_before_trailing + 1)
    others = wide[[layer for layer in before_trailing if layer in wide and layer != study.me.layer]]
    if study.me.layer not in wide.columns or others.empty:
        return {"amplification_over_next_why_not": "The ME layer's FFN has no norm before it, or no other to compare."}
    at_me_layer = wide[study.me.layer].to_numpy(dtype=float)
    over_next = at_me_layer / others.max(axis=1).to_numpy(dtype=float)
    return {
        "amplification": float(at_me_layer.mean()),
        "amplification_interval": mean_interval(at_me_layer),
        "amplification_peak": _peak(by_block, study.last_before_trailing),
        "amplification_over_next": float(over_next.mean()),
        "amplification_over_next_interval": mean_interval(over_next),
    }


def _peak(points: pd.DataFrame, last: int) -> int | None:
    points = points[points["layer"] <= last]
    return peak_layer(points) if len(points) else None


def _in_words(metrics: FfnMetrics, layout: Layout) -> str:
    peaks = ", ".join(f"in block {layer} after {name}" for name, layer in (metrics.concentration_peaks or {}).items())
    words = f"Without the last two blocks, concentration (inverse participation ratio) peaks {peaks}."
    if metrics.amplification is not None:
        lift = with_interval(metrics.amplification, metrics.amplification_interval, ",.4g")
        words += (
            f" The FFN of block {metrics.me_layer} amplifies token 0 by × {lift}, "
            f"{metrics.amplification_over_next:,.3g} times as much as any other."
        )
    for name, layers in (metrics.missing_projections or {}).items():
        where = "any FFN" if set(layers) == set(layout.ffn) else f"the FFN of {listed(layers)}"
        words += f" No {name} projection can be measured in {where}."
    return f"{words} There is {layout.ffn_in_words}." if len(layout.ffn) < layout.n_layers else words


# --- Claims -----------------------------------------------------------------------------------------------------------


def _peak_together(metrics: FfnMetrics) -> Judgement:
    peaks, me_layer = metrics.concentration_peaks or {}, metrics.me_layer
    if len(peaks) < 3 or any(me_layer in layers for layers in (metrics.missing_projections or {}).values()):
        return Judgement("not measured", note="The ME layer's FFN has no gate, up and down projection to tell apart.")
    there = sum(layer == me_layer for layer in peaks.values())
    note = ", ".join(f"{name} at block {layer}" for name, layer in peaks.items())
    verdict: Verdict = "does not hold" if there == 0 else "holds" if there == 3 else "holds in part"
    return Judgement(verdict, float(there), None, f"Peaks: {note}.")


CLAIMS = (
    Claim(
        id="concentration", fixed="2026-11-22 a1bbeb3",
        source="section 3.1, equation 3, figure 4", figure="ffn", metrics=FfnMetrics,
        claim="Gate, up and down concentrate token 0 most at the ME layer",
        statistic="how many of the three concentration differences peak at the ME layer, last two blocks apart",
        criterion="3; in part 1 or 2", why="the last two blocks are a phenomenon of their own (appendix A)",
        of_token_0=True, of_ffn=True, blocks_after=0, judge=_peak_together,
    ),
    Claim(
        id="amplification", fixed="2026-11-22 080be38",
        source="section 3.1, figure 4", figure="ffn", metrics=FfnMetrics,
        claim="The FFN amplifies token 0 most at the ME layer",
        statistic="‖FFN output‖ / ‖FFN input‖ at the ME layer over the largest at another block, last two apart",
        criterion="> 1", why="a peak is a peak",
        of_token_0=True, of_ffn=True, blocks_after=0,
        judge=lambda m: at_least(
            m.amplification_over_next, m.amplification_over_next_interval, 1, why_not=m.amplification_over_next_why_not
        ),
    ),
)  # fmt: skip
