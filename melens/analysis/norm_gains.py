"""What the normalisations before the FFN and before attention do to token 0: section 3.1, equations 1 and 2.

    result = melens.analysis.normalization(study)
    result.figures["gain_alignment"]

1. `GainAlignment` measures at every normalisation's output ĥ, of token 0 and of the others: its norm (WeightNorm), its
   share on the dims K with the largest gains (Frac, equation 1), and its KL divergence from the gain (equation 2).
2. Figure 2 shows the norms; figure 3 the differences Δ, token 0 minus the mean of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import plotly.graph_objects as go
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.statistics import mean_by, mean_interval, peak_layer, with_interval
from melens.analysis.study import Study
from melens.claims.engine import Claim, Judgement, at_least, at_most
from melens.errors import MelensError
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.style import COLORS, FIRST, OTHERS
from melens.models.normalization import has_normalization, named_normalization, read_normalization
from melens.report.result import Figure, Interval, Metrics, Result
from melens.tracing.probes import GainAlignment, Probe

__all__ = ["CLAIMS", "RmsnormMetrics", "normalization", "probes"]

SITES = ("ln2", "ln1")
STANDS_OUT = 2
"""Token 0's WeightNorm over the others', from which it is not alike."""
NO_NORM = "The ME layer's FFN has no norm of its own before it."


class RmsnormMetrics(Metrics):
    """What `normalization` measures before the FFN of the ME layer, mean over prompts.

    Attributes:
        top_share: of the width, which are the dims K.
        delta_frac: ΔFrac, token 0's share on the dims K minus the others'.
        delta_frac_top_layer: of the blocks up to the ME layer the one where it is largest.
        delta_frac_by_share: the same for other shares of the width.
        delta_kl: ΔKL in nats: negative where token 0 is closer to the gain than the others.
        weight_norm_ratio: WeightNorm of token 0 over the others'.
        weight_norm_first_layer: the first block where that is at least 2; None where it never is.
    """

    experiment = "rmsnorm"
    top_share: float = 0.01
    delta_frac_top_layer: int | None = None
    delta_frac_by_share: dict[str, float] | None = None
    weight_norm_ratio: float | None = None
    weight_norm_ratio_interval: Interval | None = None
    delta_kl: float | None = None
    delta_kl_interval: Interval | None = None
    delta_frac: float | None = None
    delta_frac_interval: Interval | None = None
    weight_norm_first_layer: int | None = None


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
    """
    trace = study.traced(probes(study.model, top_share, other_shares))
    shares = sorted({top_share, *other_shares})
    table = _compared(study.of_massive_prompts(trace["gain_alignment"]))
    deltas = ["delta_kl", *(f"delta_frac_{share:g}" for share in shares)]
    quantities = [*deltas, "weight_norm", "weight_norm_others", "weight_norm_ratio"]
    means = [mean_by(table, name, ("site", "layer")).assign(quantity=name) for name in quantities]
    by_block = pd.concat(means, ignore_index=True)
    metrics = _metrics(study, table, by_block, top_share, shares)
    norm, along = _in_words(metrics)
    of_norm, of_gain = _weight_norm_figure(study, by_block), _alignment_figure(study, by_block, shares)
    like_others = "Token 0 is amplified like the others before the ME layer, and far more there."
    signs = "At the ME layer ΔFrac is large and positive, ΔKL negative."
    figures = {
        "weight_norm": Figure(of_norm, "figure 2", like_others, norm),
        "gain_alignment": Figure(of_gain, "figure 3", signs, along),
    }
    findings = [("normalisation", norm), ("along its gain", along)]
    return Result("rmsnorm", study.trace.model, metrics, {"rmsnorm_by_block": by_block}, figures, findings)


def _compared(table: pd.DataFrame) -> pd.DataFrame:
    """Add what sets token 0 apart: `delta_<quantity>`, its value minus the others', and `weight_norm_ratio`."""
    columns = [name for name in table if f"{name}_others" in table and name != "weight_norm"]
    deltas = {f"delta_{name}": table[name] - table[f"{name}_others"] for name in columns}
    return table.assign(**deltas, weight_norm_ratio=table["weight_norm"] / table["weight_norm_others"])


def _metrics(
    study: Study, table: pd.DataFrame, by_block: pd.DataFrame, top_share: float, shares: Sequence[float]
) -> RmsnormMetrics:
    ratios = by_block[(by_block["site"] == "ln2.hook_out") & (by_block["quantity"] == "weight_norm_ratio")]
    stands_out = ratios[ratios["mean"] >= STANDS_OUT]["layer"]
    first = int(stands_out.iloc[0]) if len(stands_out) else None
    shared = study.layout.metrics() | {"weight_norm_first_layer": first}
    n_tokens = table["prompt"].map(study.trace.prompts.set_index("prompt")["n_tokens"])
    at_ln2 = table[(table["site"] == "ln2.hook_out") & (n_tokens > 1)]  # else there are no other tokens
    here = at_ln2[at_ln2["layer"] == study.me.layer]
    if here.empty:
        return study.metrics(RmsnormMetrics, **shared, why_not=NO_NORM)
    frac = f"delta_frac_{top_share:g}"
    ratio, kl, delta_frac = (here[name].to_numpy() for name in ("weight_norm_ratio", "delta_kl", frac))
    return study.metrics(
        RmsnormMetrics,
        **shared,
        top_share=top_share,
        delta_frac_top_layer=peak_layer(mean_by(at_ln2[at_ln2["layer"] <= study.me.layer], frac)),
        delta_frac_by_share={f"{share:g}": float(here[f"delta_frac_{share:g}"].mean()) for share in shares},
        weight_norm_ratio=float(ratio.mean()), weight_norm_ratio_interval=mean_interval(ratio),
        delta_kl=float(kl.mean()), delta_kl_interval=mean_interval(kl),
        delta_frac=float(delta_frac.mean()), delta_frac_interval=mean_interval(delta_frac),
    )  # fmt: skip


def _in_words(metrics: RmsnormMetrics) -> tuple[str, str]:
    """Say what figures 2 and 3 show."""
    ratio, frac, kl = metrics.weight_norm_ratio, metrics.delta_frac, metrics.delta_kl
    if ratio is None or frac is None or kl is None:
        nothing = "Without an ME layer, or without a normalisation before its FFN, there is no block to compare in."
        return nothing, nothing
    first = metrics.weight_norm_first_layer
    where = f"it is first twice theirs in block {first}" if first is not None else "in no block is it twice theirs"
    times = with_interval(ratio, metrics.weight_norm_ratio_interval)
    share = with_interval(frac, metrics.delta_frac_interval, "+.3f")
    nats = with_interval(kl, metrics.delta_kl_interval, "+.3f")
    return (
        f"In block {metrics.me_layer} the norm of token 0 is {times} times the others'; {where}.",
        f"In block {metrics.me_layer} ΔFrac (K = {metrics.top_share:.1%} of the width) is {share}, ΔKL {nats} nats.",
    )


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
    title = study.title("Norm of the normalisations' outputs")
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
    note = (
        "Token 0 minus the mean of the others. Lines: means over prompts. Bands: their 95% intervals. "
        "K: the dims with the largest gains."
    )
    return curves_by_block(panels, title=study.title("How far token 0 lies along the gain"), note=note)


# --- Claims -----------------------------------------------------------------------------------------------------------


def _stands_out_first(metrics: RmsnormMetrics) -> Judgement:
    judged = at_least(metrics.weight_norm_ratio, metrics.weight_norm_ratio_interval, STANDS_OUT, why_not=NO_NORM)
    if judged.value is None:
        return judged
    first = metrics.weight_norm_first_layer
    note = f"Twice the others' first at block {first}." if first is not None else "Twice the others' at no block."
    if judged.verdict == "holds" and first != metrics.me_layer:
        return replace(judged, verdict="holds in part", note=note)
    return replace(judged, note=note)


def _delta_frac(metrics: RmsnormMetrics) -> Judgement:
    judged = at_least(metrics.delta_frac, metrics.delta_frac_interval, 1e-9, why_not=metrics.why_not)
    top = metrics.delta_frac_top_layer
    if judged.verdict == "holds" and top != metrics.me_layer:
        judged = replace(judged, verdict="holds in part", note=f"Positive, but larger at block {top}.")
    if metrics.top_share != 0.01:
        judged = replace(judged, note=f"{judged.note} Here K was {metrics.top_share:.2%} of the width.".strip())
    return judged


CLAIMS = (
    Claim(
        id="weight-norm", fixed="2026-11-22 a1bbeb3",
        source="section 3.1, figure 2", figure="weight_norm", metrics=RmsnormMetrics,
        claim="The norm before the FFN makes token 0 stand out, at the ME layer first",
        statistic="WeightNorm of token 0 over the others' mean at the ME layer",
        criterion=">= 2 there and at no earlier block; in part: >= 2 there", why="alike is taken as less than twice",
        of_token_0=True, of_ffn=True, judge=_stands_out_first,
    ),
    Claim(
        id="delta-frac", fixed="2026-11-22 a1bbeb3",
        source="section 3.1, equation 1, figure 3", figure="gain_alignment", metrics=RmsnormMetrics,
        claim="There its output lies more on the dims with the largest gains",
        statistic="ΔFrac at the ME layer, K = 1% of the width",
        criterion="> 0 and the largest up to there; in part: > 0",
        why="the sign is the paper's; 'far exceeds other layers' its words",
        of_token_0=True, of_ffn=True, judge=_delta_frac,
    ),
    Claim(
        id="delta-kl", fixed="2026-11-22 b7ed470",
        source="section 3.1, equation 2, figure 3", figure="gain_alignment", metrics=RmsnormMetrics,
        claim="There its output is closer to the distribution of the gains",
        statistic="ΔKL at the ME layer, nats",
        criterion="< 0", why="the sign is the paper's",
        of_token_0=True, of_ffn=True,
        judge=lambda metrics: at_most(metrics.delta_kl, metrics.delta_kl_interval, -1e-9, why_not=metrics.why_not),
    ),
)  # fmt: skip
