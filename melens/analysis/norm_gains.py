"""What the normalisations before the FFN and before attention do to token 0: section 3.1, equations 1 and 2.

    result = melens.analysis.normalization(study)
    result.figures["gain_alignment"]

1. `GainAlignment` measures at every normalisation's output ĥ, of token 0 and of the others: its norm (WeightNorm), its
   share on the dims K with the largest gains (Frac, equation 1), and its KL divergence from the gain (equation 2).
2. Figure 2 shows the norms; figure 3 the differences Δ, token 0 minus the mean of the others.
3. Before the FFN the ME layer is compared with every other block up to the trailing ones: most blocks have a ΔFrac over
   0, so that the sign alone sets none apart.
4. Behind the ME layer the norm of token 0 falls in some families and rises in others (appendix H).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.peaks import by_state, compared_prompts, geometric_mean, place_among
from melens.analysis.statistics import mean_by, mean_metric, peak_layer, with_interval
from melens.analysis.study import Study
from melens.errors import MelensError
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.style import COLORS, FIRST, OTHERS
from melens.models.normalization import has_normalization, named_normalization, read_normalization
from melens.printing import paragraph
from melens.report.result import Figure, Interval, Metrics, Result
from melens.tracing.probes import GainAlignment, Probe

__all__ = ["RmsnormMetrics", "normalization", "probes"]

SITES = ("ln2", "ln1")
BEFORE_FFN = "ln2.hook_out"
STANDS_OUT = 2
"""Token 0's WeightNorm over the others', from which it is not alike."""
RISING = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
"""The families in which appendix H sees the norm rise behind the ME layer; elsewhere it peaks there."""
NO_NORM = "The ME layer's FFN has no norm of its own before it."


class RmsnormMetrics(Metrics):
    """What `normalization` measures before the FFN, token 0 against the others, one prompt a distinct first token.

    Blocks up to the trailing ones are compared; the next block is the one furthest out among the others.

    Attributes:
        top_share: of the width, which are the dims K.
        delta_frac: ΔFrac in the ME layer, token 0's share on the dims K minus the others'.
        delta_frac_top_layer: of the blocks up to the ME layer the one where it is largest.
        delta_frac_by_share: the same for other shares of the width.
        delta_frac_lead, delta_frac_next_layer: ΔFrac in the ME layer minus that in the next block.
        delta_frac_share_larger: of the other blocks those with a larger one.
        delta_kl: ΔKL there in nats: negative where token 0 is closer to the gain than the others.
        delta_kl_lead, delta_kl_next_layer, delta_kl_share_lower: by how many nats it is lower than in the next block,
            and of the other blocks those with a lower one.
        weight_norm_ratio: WeightNorm of token 0 over the others' in the ME layer.
        weight_norm_first_layer: the first block where that is at least 2; None where it never is.
        weight_norm_before, weight_norm_before_layer: the same ratio in the block before the ME layer in which it is
            furthest from 1, either way.
        weight_norm_lead, weight_norm_next_layer: the ratio in the ME layer over that in the next block (geometric
            mean).
        norm_lead, norm_next_layer: the same of token 0's own WeightNorm ‖ĥ₀‖.
        norm_at_end: ‖ĥ₀‖ in the last block before the trailing ones over that in the ME layer (geometric mean).
        norm_rising: of the pairs of blocks from the ME layer on, those of which the later has the larger ‖ĥ₀‖.
        rises_in_paper: whether appendix H sees ‖ĥ₀‖ rise behind the ME layer in this family; else it peaks there.
    """

    experiment = "rmsnorm"
    top_share: float = 0.01
    delta_frac_top_layer: int | None = None
    delta_frac_by_share: dict[str, float] | None = None
    delta_frac: float | None = None
    delta_frac_interval: Interval | None = None
    delta_frac_lead: float | None = None
    delta_frac_lead_interval: Interval | None = None
    delta_frac_next_layer: int | None = None
    delta_frac_share_larger: float | None = None
    delta_kl: float | None = None
    delta_kl_interval: Interval | None = None
    delta_kl_lead: float | None = None
    delta_kl_lead_interval: Interval | None = None
    delta_kl_next_layer: int | None = None
    delta_kl_share_lower: float | None = None
    weight_norm_ratio: float | None = None
    weight_norm_ratio_interval: Interval | None = None
    weight_norm_first_layer: int | None = None
    weight_norm_before: float | None = None
    weight_norm_before_interval: Interval | None = None
    weight_norm_before_layer: int | None = None
    weight_norm_lead: float | None = None
    weight_norm_lead_interval: Interval | None = None
    weight_norm_next_layer: int | None = None
    norm_lead: float | None = None
    norm_lead_interval: Interval | None = None
    norm_next_layer: int | None = None
    norm_at_end: float | None = None
    norm_at_end_interval: Interval | None = None
    norm_rising: float | None = None
    norm_rising_interval: Interval | None = None
    rises_in_paper: bool = False


def probes(model: TransformerBridge, top_share: float, other_shares: Sequence[float]) -> list[Probe]:
    """Return what `normalization` needs besides the default probes.

    Args:
        model: a bridge.
        top_share, other_shares: as of `normalization`.

    Raises:
        MelensError: a model without such a normalisation.
    """
    gains = {
        (site, layer): read_normalization(model, layer, site).gain
        for site in SITES
        for layer in range(len(model.blocks))
        if has_normalization(model, layer, site)
    }
    if not gains:
        raise MelensError("TransformerLens names no norm before attention or the FFN in any block of this model.")
    probe = GainAlignment(gains, tuple(dict.fromkeys([top_share, *other_shares])))
    probe.may_miss = True
    return [probe]


def normalization(study: Study, *, top_share: float = 0.01, other_shares: Sequence[float] = (0.001, 0.05)) -> Result:
    """Compare token 0 with the others at each normalisation, by block.

    Args:
        study: as `melens.study` makes it.
        top_share: of the width, which are the dims K of equation 1.
        other_shares: shown for comparison.

    Returns:
        Metrics `RmsnormMetrics`; the figures `weight_norm` (figure 2) and `gain_alignment` (figure 3).

    Raises:
        MelensError: a model without such a normalisation.

    Example:
        >>> result = melens.analysis.normalization(study)
        >>> sorted(result.figures)
        ['gain_alignment', 'weight_norm']
    """
    trace = study.traced(probes(study.model, top_share, other_shares))
    shares = sorted({top_share, *other_shares})
    alignment = trace["gain_alignment"]
    table = _compared(alignment[alignment["prompt"].isin(compared_prompts(study))])
    deltas = ["delta_kl", *(f"delta_frac_{share:g}" for share in shares)]
    quantities = [*deltas, "weight_norm", "weight_norm_others", "weight_norm_ratio"]
    means = [mean_by(table, name, ("site", "layer")).assign(quantity=name) for name in quantities]
    by_block = pd.concat(means, ignore_index=True)
    metrics = _metrics(study, table, by_block, top_share, shares)
    norm, along = _in_words(metrics)
    of_norm, of_gain = (
        partial(_weight_norm_figure, study, by_block),
        partial(_alignment_figure, study, by_block, shares),
    )
    like_others = "Token 0 is amplified like the others before the ME layer, and far more there."
    signs = "At the ME layer ΔFrac is large and positive, ΔKL negative."
    figures = {
        "weight_norm": Figure(of_norm, "figure 2", like_others, paragraph(norm)),
        "gain_alignment": Figure(of_gain, "figure 3", signs, paragraph(along)),
    }
    findings = list(dict.fromkeys([*norm, *along]))  # why nothing is compared is said once
    return Result("rmsnorm", study.trace.model, metrics, {"rmsnorm_by_block": by_block}, figures, findings)


def _compared(table: pd.DataFrame) -> pd.DataFrame:
    """Add what sets token 0 apart: `delta_<quantity>`, its value minus the others', and `weight_norm_ratio`."""
    columns = [name for name in table if f"{name}_others" in table and name != "weight_norm"]
    deltas = {f"delta_{name}": table[name] - table[f"{name}_others"] for name in columns}
    return table.assign(**deltas, weight_norm_ratio=table["weight_norm"] / table["weight_norm_others"])


def _metrics(
    study: Study, table: pd.DataFrame, by_block: pd.DataFrame, top_share: float, shares: Sequence[float]
) -> RmsnormMetrics:
    ratios = by_block[(by_block["site"] == BEFORE_FFN) & (by_block["quantity"] == "weight_norm_ratio")]
    stands_out = ratios[ratios["mean"] >= STANDS_OUT]["layer"]
    first = int(stands_out.iloc[0]) if len(stands_out) else None
    shared = study.layout.metrics() | {"weight_norm_first_layer": first}
    at_ln2 = table[(table["site"] == BEFORE_FFN) & table["weight_norm_others"].notna()]
    here = at_ln2[at_ln2["layer"] == study.me.layer]
    if here.empty:
        return study.metrics(RmsnormMetrics, **shared, why_not=NO_NORM)
    frac = f"delta_frac_{top_share:g}"
    return study.metrics(
        RmsnormMetrics,
        **shared,
        top_share=top_share,
        delta_frac_top_layer=peak_layer(mean_by(at_ln2[at_ln2["layer"] <= study.me.layer], frac)),
        delta_frac_by_share={f"{share:g}": float(here[f"delta_frac_{share:g}"].mean()) for share in shares},
        **mean_metric("delta_frac", here[frac].to_numpy()),
        **mean_metric("delta_kl", here["delta_kl"].to_numpy()),
        **mean_metric("weight_norm_ratio", here["weight_norm_ratio"].to_numpy()),
        **_among_blocks(study, at_ln2, frac),
        **_before(study, at_ln2),
        **_behind(study, at_ln2),
    )


def _among_blocks(study: Study, table: pd.DataFrame, frac: str) -> dict[str, Any]:
    """Compare ΔFrac, ΔKL, the ratio of WeightNorms and token 0's own in the ME layer with the next block's."""

    def of_states(value: str) -> pd.DataFrame:
        return by_state(table, value, up_to=study.last_before_trailing)

    found: dict[str, Any] = {}
    further_out = {"delta_frac": ("share_larger", of_states(frac)), "delta_kl": ("share_lower", -of_states("delta_kl"))}
    for name, (share, values) in further_out.items():
        if (place := place_among(values, study.me.layer)) is not None:
            found |= {f"{name}_lead": place.lead, f"{name}_lead_interval": place.lead_interval}
            found |= {f"{name}_next_layer": place.next_layer, f"{name}_{share}": place.share_larger}
    for name, value in {"weight_norm": "weight_norm_ratio", "norm": "weight_norm"}.items():
        values = of_states(value)
        if (place := place_among(values.apply(np.log), study.me.layer)) is not None:
            lead, interval = geometric_mean((values[study.me.layer] / values[place.next_layer]).to_numpy())
            found |= {f"{name}_lead": lead, f"{name}_lead_interval": interval, f"{name}_next_layer": place.next_layer}
    return found


def _before(study: Study, table: pd.DataFrame) -> dict[str, Any]:
    """Find the block before the ME layer in which token 0's WeightNorm is least like the others', either way."""
    means = mean_by(table[table["layer"] < study.me.layer], "weight_norm_ratio")
    if means.empty:
        return {}
    least_alike = means.loc[np.log(means["mean"]).abs().idxmax()]
    return {
        "weight_norm_before": float(least_alike["mean"]),
        "weight_norm_before_interval": (float(least_alike["low"]), float(least_alike["high"])),
        "weight_norm_before_layer": int(least_alike["layer"]),
    }


def _behind(study: Study, table: pd.DataFrame) -> dict[str, Any]:
    """Measure whether token 0's WeightNorm rises from the ME layer on (appendix H), and whether the paper says so."""
    model = study.trace.model
    family = model.get("family")
    is_rising = model.get("architecture") in RISING.values() if family is None else family in RISING
    values = by_state(table[table["layer"] >= study.me.layer], "weight_norm", up_to=study.last_before_trailing)
    if len(values.columns) < 2:
        return {"rises_in_paper": is_rising}
    norms = values.to_numpy(dtype=float)
    earlier, later = np.triu_indices(norms.shape[1], k=1)
    rising = (norms[:, later] > norms[:, earlier]).mean(axis=1)
    at_end, interval = geometric_mean(norms[:, -1] / norms[:, 0])
    of_end = {"norm_at_end": at_end, "norm_at_end_interval": interval, "rises_in_paper": is_rising}
    return of_end | mean_metric("norm_rising", rising)


def _in_words(metrics: RmsnormMetrics) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Say what figures 2 and 3 show, in rows of findings."""
    ratio, frac, kl = metrics.weight_norm_ratio, metrics.delta_frac, metrics.delta_kl
    if ratio is None or frac is None or kl is None:
        nothing = "Without an ME layer, or without a normalisation before its FFN, there is no block to compare in."
        return [("not measured", nothing)], [("not measured", nothing)]
    first = metrics.weight_norm_first_layer
    where = f"it is twice as large first in block {first}" if first is not None else "it is twice as large in no block"
    times = with_interval(ratio, metrics.weight_norm_ratio_interval)
    against_others = (
        f"In block {metrics.me_layer}, the ME layer, the output of the norm before the FFN is {times} times "
    )
    norm = [("against others", f"{against_others}as large for token 0 as for the other tokens; {where}.")]
    if metrics.norm_lead is not None:
        own = f"For token 0 it is × {metrics.norm_lead:.3g} that in block {metrics.norm_next_layer}, the largest of "
        norm.append(("against other blocks", f"{own}the other blocks, the last ones left out."))
    share = with_interval(frac, metrics.delta_frac_interval, "+.3f")
    nats = with_interval(kl, metrics.delta_kl_interval, "+.3f")
    frac_against = _against_next(metrics.delta_frac_lead, metrics.delta_frac_next_layer, "more", "less")
    kl_against = _against_next(metrics.delta_kl_lead, metrics.delta_kl_next_layer, "lower", "higher")
    on_dims = (
        f"On the {metrics.top_share:.1%} of dims with the largest gains (K), token 0's share of the output's squared "
    )
    along_gain = "The KL divergence of the output's distribution over dims from that of the gains is, for token 0 "
    return norm, [
        ("ΔFrac", f"{on_dims}norm minus the other tokens' is {share} in block {metrics.me_layer}{frac_against}."),
        ("ΔKL", f"{along_gain}minus the other tokens, {nats} nats in block {metrics.me_layer}{kl_against}."),
    ]


def _against_next(lead: float | None, next_layer: int | None, beyond: str, short: str) -> str:
    return "" if lead is None else f", {abs(lead):.3f} {beyond if lead > 0 else short} than in block {next_layer}"


# --- Figures ----------------------------------------------------------------------------------------------------------


def _curve(by_block: pd.DataFrame, site: str, quantity: str, name: str, color: str) -> Curve:
    return Curve(name, by_block[(by_block["site"] == site) & (by_block["quantity"] == quantity)], color)


def _named_sites(study: Study) -> list[tuple[str, str]]:
    """List the normalisations' hook names and what this model calls them."""
    names = ((f"{site}.hook_out", named_normalization(study.model, site)) for site in SITES)
    return [(hook, name) for hook, name in names if name is not None]


def _weight_norm_figure(study: Study, by_block: pd.DataFrame) -> go.Figure:
    panels = []
    for site, name in _named_sites(study):
        others = _curve(by_block, site, "weight_norm_others", "other tokens", OTHERS)
        first = _curve(by_block, site, "weight_norm", "token 0", FIRST)
        panels.append(Panel(f"Output of {name}", "WeightNorm ‖ĥ‖", [others, first], study.me.layer, log_scale=True))
    note = "Lines: means over prompts. Bands: their 95% intervals."
    title = study.title("Norm of the normalisations' outputs", len(compared_prompts(study)))
    return curves_by_block(panels, title=title, note=note, scale_buttons=True)


def _alignment_figure(study: Study, by_block: pd.DataFrame, shares: Sequence[float]) -> go.Figure:
    panels = []
    for site, name in _named_sites(study):
        fractions = [
            _curve(by_block, site, f"delta_frac_{share:g}", f"K = {share:.1%} of the width", color)
            for share, color in zip(shares, COLORS, strict=False)
        ]
        divergence = _curve(by_block, site, "delta_kl", "ΔKL", COLORS[-2])
        panels += [
            Panel(f"ΔFrac at {name}", "ΔFrac", fractions, study.me.layer, zero_line=True),
            Panel(f"ΔKL at {name}", "ΔKL (nats)", [divergence], study.me.layer, zero_line=True),
        ]
    note = "Token 0 minus the mean of the others. Lines: means over prompts. Bands: their 95% intervals. "
    note += "K: the dims with the largest gains."
    title = study.title("How far token 0 lies along the gain", len(compared_prompts(study)))
    return curves_by_block(panels, title=title, note=note)
