"""How the FFN concentrates token 0 in a few dims and amplifies it: section 3.1, equation 3, figure 4.

    result = melens.analysis.ffn(study)
    result.figures["ffn"]

1. `Concentration` measures, after the gate, up and down projection of every block, the inverse participation ratio of
   token 0 and of the other tokens; figure 4 shows the difference.
2. The amplification is ‖FFN output‖ / ‖FFN input‖ of token 0, from the norms that every study holds.
3. In some families (Gemma) a norm stands behind the FFN, and the residual stream gets what that norm makes of its
   output: the FFN itself and the two together are told apart.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.peaks import by_state, compared_prompts, place_among
from melens.analysis.statistics import mean_by, mean_metric, peak_layer, share_interval, with_interval
from melens.analysis.study import Study
from melens.claims.engine import Claim, Former, Judgement, NotMeasuredError, Verdict, at_least, worst
from melens.errors import MelensError
from melens.figures.curves import ffn_figure
from melens.models.layout import Layout, listed
from melens.printing import paragraph
from melens.report.result import Figure, Interval, Metrics, Result
from melens.tracing.probes import Concentration, Norms, Probe
from melens.tracing.sites import Sites

__all__ = ["CLAIMS", "FfnMetrics", "ffn", "probes"]

PROJECTIONS = ("gate", "up", "down")
WRITTEN, BEHIND = "hook_mlp_out", "the norm behind it"
BEFORE_NORM_BEHIND = "ln2_post.hook_in"
"""What the FFN puts out where a norm stands behind it: `hook_mlp_out` is then that norm's output."""
MOST = 0.5
"""Of the prompts, from which on something is true of most."""


class FfnMetrics(Metrics):
    """What `ffn` measures, one prompt a distinct first token; the trailing blocks count apart in all of it.

    Attributes:
        concentration_peaks: by projection, the block after whose projection the concentration of token 0 exceeds the
            other tokens' most, mean over prompts.
        concentration_peak_behind: the same after the norm behind the FFN; None where no block has one.
        concentration_shares: by projection, of the prompts those in which it exceeds theirs most in the ME layer.
        concentration_together: of the prompts those in which it does after all three.
        missing_projections: by projection, the blocks with an FFN in which it cannot be measured.
        amplification: ‖FFN output‖ / ‖FFN input‖ of token 0 in the ME layer, before any norm behind the FFN.
        amplification_peak: the block of the largest.
        amplification_over_next: that of the ME layer over the largest of any other block, mean over prompts.
        norm_behind: what the norm behind the FFN of the ME layer makes of that output, ‖norm's output‖ / ‖FFN output‖;
            None without one. `norm_behind_name`: what the model calls it.
        with_norm_behind, with_norm_behind_over_next: the amplification of the FFN and that norm together, and as above.
    """

    experiment = "ffn"
    concentration_peaks: dict[str, int | None] | None = None
    concentration_peak_behind: int | None = None
    concentration_shares: dict[str, float] | None = None
    concentration_together: float | None = None
    concentration_together_interval: Interval | None = None
    missing_projections: dict[str, list[int]] | None = None
    amplification: float | None = None
    amplification_interval: Interval | None = None
    amplification_peak: int | None = None
    amplification_over_next: float | None = None
    amplification_over_next_interval: Interval | None = None
    amplification_over_next_why_not: str | None = None
    norm_behind: float | None = None
    norm_behind_interval: Interval | None = None
    norm_behind_name: str | None = None
    with_norm_behind: float | None = None
    with_norm_behind_interval: Interval | None = None
    with_norm_behind_over_next: float | None = None
    with_norm_behind_over_next_interval: Interval | None = None


def probes(model: TransformerBridge) -> list[Probe]:
    """Return what `ffn` needs besides the default probes.

    Raises:
        MelensError: a model without an FFN that can be measured.
    """
    by_layer = _projections(model)
    if not any(by_layer.values()):
        raise MelensError(f"No FFN can be measured: there is {Layout.of(model).ffn_in_words}.")
    places = [f"blocks.{layer}.{site}" for layer, sites in by_layer.items() for site in sites.values()]
    wanted: list[Probe] = [Concentration(places)]
    if behind := [layer for layer, sites in by_layer.items() if BEHIND in sites]:
        wanted.append(Norms(["mlp.hook_in", BEFORE_NORM_BEHIND], behind).named("norm_at_ffn"))
    for probe in wanted:
        probe.may_miss = True
    return wanted


def ffn(study: Study) -> Result:
    """Compare token 0's concentration with the others', and what the FFN makes of its norm.

    Args:
        study: as `melens.study` makes it.

    Returns:
        Metrics `FfnMetrics`; the figure `ffn` (figure 4).

    Raises:
        MelensError: a model without an FFN that can be measured, or an amplification that is NaN.

    Example:
        >>> result = melens.analysis.ffn(study)
        >>> result.metrics.concentration_peaks["down"]
        2
    """
    trace = study.traced(probes(study.model))
    by_layer = _projections(study.model)
    named = {(layer, site): name for layer, sites in by_layer.items() for name, site in sites.items()}
    table = trace["concentration"][trace["concentration"]["prompt"].isin(compared_prompts(study))]
    table = table.assign(
        difference=table["concentration"] - table["concentration_others"],
        after=[named[place] for place in zip(table["layer"], table["site"], strict=True)],
    )
    measured = [name for name in (*PROJECTIONS, BEHIND) if name in set(table["after"])]
    differences = {name: mean_by(table[table["after"] == name], "difference") for name in measured}
    amplification = _amplification(study)
    by_block = {name: mean_by(amplification, name) for name in ("amplification", "with_norm_behind")}
    lacking = {name: [layer for layer, has in by_layer.items() if has and name not in has] for name in PROJECTIONS}
    metrics = study.metrics(
        FfnMetrics,
        **study.layout.metrics(),
        missing_projections={name: layers for name, layers in lacking.items() if layers},
        **_concentration_metrics(study, table, differences),
        **_amplification_metrics(study, amplification, by_block["amplification"]),
    )
    n_states = len(study.distinct_massive_prompts)
    title = study.title("Token 0 in the FFN: concentration and amplification", n_states)
    behind = by_block["with_norm_behind"] if amplification["with_norm_behind"].notna().any() else None
    plot = partial(ffn_figure, differences, by_block["amplification"], behind, me_layer=study.me.layer, title=title)
    expected = "All three concentrations and the amplification peak together, only at the ME layer."
    findings = _findings(metrics, study.layout)
    tables = [points.assign(quantity=f"concentration after {name}") for name, points in differences.items()]
    tables += [points.assign(quantity=name) for name, points in by_block.items()]
    figures = {"ffn": Figure(plot, "figure 4", expected, paragraph(findings))}
    table = pd.concat([points for points in tables if len(points)], ignore_index=True)
    return Result("ffn", study.trace.model, metrics, {"ffn_by_block": table}, figures, findings)


def _projections(model: TransformerBridge) -> dict[int, dict[str, str]]:
    """Return, by block, the hook names after the projections of its FFN, and after a norm behind it.

    A mixture of experts has the last projection alone.
    """
    by_layer = {}
    for layer, block in enumerate(model.blocks):
        parts = block._modules
        name = "shared_mlp" if "shared_mlp" in parts and "moe" not in parts else "mlp"  # Granite's where it is dense
        gate, up, down = f"{name}.hook_pre", f"{name}.hook_pre_linear", WRITTEN
        hooks = (gate, up, down, BEFORE_NORM_BEHIND)
        has = {site for site in hooks if Sites.of(model).find(f"blocks.{layer}.{site}")}
        sites = {}
        if {gate, up} <= has:
            sites = {"gate": gate, "up": up}
        elif gate in has and getattr(parts[name], "in", None) is not None:
            sites = {"up": gate}  # without a gate, hook_pre comes after the up projection
        if {down, BEFORE_NORM_BEHIND} <= has:
            sites |= {"down": BEFORE_NORM_BEHIND, BEHIND: down}
        elif down in has:
            sites |= {"down": down}
        by_layer[layer] = sites
    return by_layer


def _concentration_metrics(study: Study, table: pd.DataFrame, differences: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Find the peak of each mean curve, and in how many states it is in the ME layer, alone and for all three."""
    last, there = study.last_before_trailing, {}
    for name in differences:
        values = by_state(table[table["after"] == name], "difference", up_to=last)
        if (place := place_among(values, study.me.layer)) is not None:
            there[name] = place.is_largest
    shares = {name: float(is_largest.mean()) for name, is_largest in there.items()}
    peaks = {name: _peak(points, last) for name, points in differences.items()}
    found: dict[str, Any] = {"concentration_peak_behind": peaks.pop(BEHIND, None)}
    found |= {"concentration_peaks": peaks, "concentration_shares": shares}
    if set(PROJECTIONS) <= set(there):
        together = np.logical_and.reduce([there[name] for name in PROJECTIONS])
        found["concentration_together"] = float(together.mean())
        found["concentration_together_interval"] = share_interval(together)
    return found


def _amplification(study: Study) -> pd.DataFrame:
    """Compute what the FFN makes of token 0's norm, of prompts with distinct first tokens.

    Returns:
        `prompt`, `layer`, `amplification`, ‖FFN output‖ / ‖FFN input‖; `with_norm_behind`, the same of what the norm
        behind the FFN writes, NaN where there is none.
    """
    tables = study.traced(probes(study.model)).tables
    norms = pd.concat([tables[name] for name in ("norm", "norm_at_ffn") if name in tables], ignore_index=True)
    norms = norms[norms["prompt"].isin(study.distinct_massive_prompts) & (norms["pos"] == 0)]
    of_first = norms.set_index(["prompt", "layer"])
    read, given, put_out, written = (
        of_first.loc[of_first["site"] == site, "norm"]
        for site in ("ln2.hook_out", "mlp.hook_in", BEFORE_NORM_BEHIND, WRITTEN)
    )
    read, output = _rather(read, given), _rather(put_out, written)
    both = output.index.intersection(read.index)  # a parallel block's FFN reads what attention reads
    table = (output[both] / read[both]).rename("amplification").to_frame()
    has_norm_behind = both.intersection(put_out.index)
    table["with_norm_behind"] = written.reindex(has_norm_behind) / read[has_norm_behind]
    table = table.reset_index()
    for row in table[~np.isfinite(table["amplification"])].head(1).to_dict("records"):
        raise MelensError(
            f"The FFN of block {row['layer']} amplifies token 0 by {row['amplification']} in prompt {row['prompt']}: "
            "look for NaN in the model's weights, or load it in float32."
        )
    return table


def _rather(first: pd.Series[float], second: pd.Series[float]) -> pd.Series[float]:
    """Take the first where it was measured, even as NaN, else the second."""
    joined = pd.concat([first, second])
    return joined[~joined.index.duplicated()]


def _amplification_metrics(study: Study, amplification: pd.DataFrame, by_block: pd.DataFrame) -> dict[str, Any]:
    me_layer, last = study.me.layer, study.last_before_trailing
    values = by_state(amplification, "amplification", up_to=last)
    if me_layer not in values.columns or len(values.columns) < 2:
        why_not = "The input of the ME layer's FFN cannot be measured, or there is no other to compare with."
        return {"amplification_over_next_why_not": why_not}
    here, others = values[me_layer], values.drop(columns=me_layer)
    found = {"amplification_peak": _peak(by_block, last), **mean_metric("amplification", here.to_numpy())}
    found |= mean_metric("amplification_over_next", (here / others.max(axis=1)).to_numpy())
    # where only some blocks have a norm behind the FFN, the others write what the FFN puts out
    of_both = amplification["with_norm_behind"].fillna(amplification["amplification"])
    written = by_state(amplification.assign(written=of_both), "written", up_to=last)
    if amplification.loc[amplification["layer"] == me_layer, "with_norm_behind"].notna().all():
        together = written[me_layer]
        over_next = together / written.drop(columns=me_layer).max(axis=1)
        found |= mean_metric("norm_behind", (together / here).to_numpy())
        found |= mean_metric("with_norm_behind", together.to_numpy())
        found |= mean_metric("with_norm_behind_over_next", over_next.to_numpy())
        found |= {"norm_behind_name": getattr(study.model.blocks[me_layer]._modules.get("ln2_post"), "name", None)}
    return found


def _peak(points: pd.DataFrame, last: int) -> int | None:
    points = points[points["layer"] <= last]
    return peak_layer(points) if len(points) else None


def _findings(metrics: FfnMetrics, layout: Layout) -> list[tuple[str, str]]:
    peaks = ", ".join(f"in block {layer} after {name}" for name, layer in (metrics.concentration_peaks or {}).items())
    peaked = "Token 0 is concentrated on few dims most, compared with the other tokens (inverse participation ratio), "
    peaked += f"{peaks}; the last blocks are left out."
    if metrics.concentration_together is not None:
        peaked += f" All three are largest in the ME layer in {metrics.concentration_together:.0%} of prompts."
    if metrics.concentration_peak_behind is not None:
        peaked += f" After the norm behind the FFN it is in block {metrics.concentration_peak_behind}."
    rows = [("concentration", peaked)]
    if metrics.amplification is not None:
        lift = with_interval(metrics.amplification, metrics.amplification_interval, ",.4g")
        amplified = f"The FFN of block {metrics.me_layer} amplifies token 0 by × {lift}, its output's norm over its "
        amplified += f"input's; that is {metrics.amplification_over_next:,.3g} times as much as in any other block."
        rows.append(("amplification", f"{amplified}{_norm_behind_in_words(metrics)}"))
    for name, layers in (metrics.missing_projections or {}).items():
        where = "any FFN" if set(layers) == set(layout.ffn) else f"the FFN of {listed(layers)}"
        rows.append(("not measured", f"No {name} projection can be measured in {where}."))
    if len(layout.ffn) < layout.n_layers:
        rows.append(("layout", f"There is {layout.ffn_in_words}."))
    return rows


def _norm_behind_in_words(metrics: FfnMetrics) -> str:
    if metrics.norm_behind is None:
        return ""
    name = f"The norm behind it ({metrics.norm_behind_name})" if metrics.norm_behind_name else "The norm behind it"
    times = with_interval(metrics.norm_behind, metrics.norm_behind_interval, ",.4g")
    return (
        f" {name} makes that × {times}: together × {metrics.with_norm_behind:,.4g}, "
        f"{metrics.with_norm_behind_over_next:,.3g} times as much as in any other block."
    )


# --- Claims -----------------------------------------------------------------------------------------------------------


def _peak_together(metrics: FfnMetrics) -> Judgement:
    _check_projections(metrics)
    shares, peaks = metrics.concentration_shares or {}, metrics.concentration_peaks or {}
    judged = at_least(metrics.concentration_together, metrics.concentration_together_interval, MOST)
    if judged.verdict == "does not hold" and any(shares[name] > MOST for name in PROJECTIONS):
        judged = replace(judged, verdict="holds in part")
    each = ", ".join(f"{name} in {shares[name]:.0%} (on average at block {peaks[name]})" for name in PROJECTIONS)
    return judged.noting(f"Largest at the ME layer: {each}.")


def _check_projections(metrics: FfnMetrics) -> None:
    is_missing = any(metrics.me_layer in layers for layers in (metrics.missing_projections or {}).values())
    if is_missing or len(metrics.concentration_peaks or {}) < 3:
        raise NotMeasuredError("The ME layer's FFN has no gate, up and down projection to tell apart.")


def _mean_curves_peak_together(metrics: FfnMetrics) -> Judgement:
    """Judge `concentration` as it was until 2026-11-26: by the peaks of the three mean curves."""
    _check_projections(metrics)
    there = sum(layer == metrics.me_layer for layer in (metrics.concentration_peaks or {}).values())
    verdict: Verdict = "does not hold" if there == 0 else "holds" if there == 3 else "holds in part"
    return Judgement(verdict, float(there))


def _amplifies_most(metrics: FfnMetrics) -> Judgement:
    m = metrics
    judged = at_least(
        m.amplification_over_next, m.amplification_over_next_interval, 1, why_not=m.amplification_over_next_why_not
    )
    itself = at_least(m.amplification, m.amplification_interval, 1)
    note = f"The FFN itself: × {m.amplification:,.4g}.{_norm_behind_in_words(m)}"
    return replace(judged, verdict=worst(judged, itself).verdict).noting(note)


def _writes_most(metrics: FfnMetrics) -> Judgement:
    """Judge `amplification` as it was until 2026-11-26: a norm behind the FFN counted as part of it."""
    over_next, interval = metrics.amplification_over_next, metrics.amplification_over_next_interval
    if metrics.norm_behind is not None:
        over_next, interval = metrics.with_norm_behind_over_next, metrics.with_norm_behind_over_next_interval
    return at_least(over_next, interval, 1, why_not=metrics.amplification_over_next_why_not)


CLAIMS = (
    Claim(
        id="concentration", fixed="2026-11-26 25a77c7",
        source="section 3.1, equation 3, figure 4", figure="ffn", metrics=FfnMetrics,
        claim="Gate, up and down concentrate token 0 most at the ME layer",
        statistic="share of prompts in which the concentration difference after each of the three is largest at the ME "
        "layer, trailing blocks apart",
        criterion="≥ 1/2; in part: after one or two of the three in more than half of the prompts",
        why="'simultaneously reach its maximum' is said of an average and must be true of most prompts, which takes "
        "six of six to show",
        of_token_0=True, of_ffn=True, blocks_after=0, judge=_peak_together,
        former=Former(
            "3; in part 1 or 2", "2026-11-22 a1bbeb3", _mean_curves_peak_together,
            statistic="how many of the three concentration differences peak at the ME layer, last two blocks apart",
        ),
    ),
    Claim(
        id="amplification", fixed="2026-11-26 25a77c7",
        source="section 3.1, figure 4", figure="ffn", metrics=FfnMetrics,
        claim="The FFN amplifies token 0 most at the ME layer",
        statistic="‖FFN output‖ / ‖FFN input‖ at the ME layer over the largest at another block, trailing blocks "
        "apart; the output is that before any norm behind the FFN",
        criterion="≥ 1, and the amplification itself ≥ 1",
        why="a peak is a peak, but what makes token 0 smaller amplifies nothing, and what a norm behind it does is not "
        "the FFN's",
        of_token_0=True, of_ffn=True, blocks_after=0, judge=_amplifies_most,
        former=Former(
            "> 1", "2026-11-22 a1bbeb3", _writes_most,
            statistic="‖FFN output‖ / ‖FFN input‖ at the ME layer over the largest at another block, last two apart; a "
            "norm behind the FFN counted as part of it",
        ),
    ),
)  # fmt: skip
