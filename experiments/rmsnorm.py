"""What the normalisation before the FFN, and that before attention, does to token 0: figures 2 and 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from transformer_lens.model_bridge import TransformerBridge

from experiments.runner.legacy import RmsnormOptions
from experiments.runner.study import Run as Study
from melens import GainAlignment, MelensError, Probe
from melens.analysis.statistics import bootstrap_mean, mean_by, peak_layer, with_interval
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.style import COLORS, FIRST, OTHERS
from melens.models.layout import Layout
from melens.models.normalization import has_normalization, named_normalization, read_normalization
from melens.report.result import Figure, Result

SITES = ("ln2", "ln1")


def probes(model: TransformerBridge, options: RmsnormOptions) -> list[Probe]:
    """Norm, share on the top gains and KL to the gain of every normalisation's output."""
    gains = {
        (site, layer): read_normalization(model, layer, site).gain
        for site in SITES
        for layer in range(len(model.blocks))
        if has_normalization(model, layer, site)
    }
    if not gains:
        raise MelensError(
            "No block of this model has attention or an FFN with a norm before it that TransformerLens tells apart."
        )
    probe = GainAlignment(gains, tuple(dict.fromkeys([options.top_share, *options.other_shares])))
    probe.may_miss = True
    return [probe]


def run(study: Study, options: RmsnormOptions) -> Result:
    """Set token 0 against the others at each normalisation, by block."""
    probes(study.model, options)  # says why, where there is nothing to measure
    table = study.of_carriers(study.trace["gain_alignment"])
    names = {f"{site}.hook_out": named_normalization(study.model, site) for site in SITES}
    shares = sorted({options.top_share, *options.other_shares})
    by_block = pd.concat([_by_block(table, shares), _weight_norms(table)], ignore_index=True)
    metrics = study.metrics(
        **Layout.of(study.model).metrics(), **_at_me_layer(study, table, options), **_first_to_stand_out(table)
    )
    return Result(
        experiment="rmsnorm",
        model=study.trace.model,
        metrics=metrics,
        tables={"rmsnorm_by_block": by_block},
        figures={
            "weight_norm": Figure(
                _weight_norm_figure(study, by_block, names),
                "figure 2",
                "Token 0 is amplified like the others before the ME layer, and far more there.",
                _weight_norm_in_words(metrics),
            ),
            "gain_alignment": Figure(
                _alignment_figure(study, by_block, names, shares),
                "figure 3",
                "At the ME layer ΔFrac is large and positive, ΔKL negative.",
                _alignment_in_words(metrics, options),
            ),
        },
        findings=[
            ("normalisation", _weight_norm_in_words(metrics)),
            ("along its gain", _alignment_in_words(metrics, options)),
        ],
    )


def _by_block(table: pd.DataFrame, shares: Sequence[float]) -> pd.DataFrame:
    """Average the differences, token 0 minus the others, over prompts."""
    summaries = []
    for column in ("kl", *(f"frac_{share:g}" for share in shares)):
        differences = table.assign(difference=table[column] - table[f"{column}_others"])
        summaries.append(mean_by(differences, "difference", ("site", "layer")).assign(quantity=f"delta_{column}"))
    return pd.concat(summaries, ignore_index=True)


def _weight_norms(table: pd.DataFrame) -> pd.DataFrame:
    ratios = table.assign(weight_norm_ratio=table["weight_norm"] / table["weight_norm_others"])
    quantities = ("weight_norm", "weight_norm_others", "weight_norm_ratio")
    summaries = [mean_by(ratios, name, ("site", "layer")).assign(quantity=name) for name in quantities]
    return pd.concat(summaries, ignore_index=True)


def _at_me_layer(study: Study, table: pd.DataFrame, options: RmsnormOptions) -> dict[str, Any]:
    n_tokens = table["prompt"].map(study.trace.prompts.set_index("prompt")["n_tokens"])
    at_ln2 = table[(table["site"] == "ln2.hook_out") & (n_tokens > 1)]  # else there are no other tokens
    here = at_ln2[at_ln2["layer"] == study.me.layer]
    if here.empty:
        return {"why_not": "There is no norm of its own before the ME layer's FFN."}
    frac = f"frac_{options.top_share:g}"
    up_to_here = at_ln2[at_ln2["layer"] <= study.me.layer]
    differences = up_to_here.assign(difference=up_to_here[frac] - up_to_here[f"{frac}_others"])
    values = {
        "weight_norm_ratio": here["weight_norm"] / here["weight_norm_others"],
        "delta_kl": here["kl"] - here["kl_others"],
        "delta_frac": here[frac] - here[f"{frac}_others"],
    }
    metrics: dict[str, Any] = {
        "top_share": options.top_share,
        "delta_frac_top_layer": peak_layer(mean_by(differences, "difference")),
    }
    metrics["delta_frac_by_share"] = {
        f"{share:g}": float((here[f"frac_{share:g}"] - here[f"frac_{share:g}_others"]).mean())
        for share in sorted({options.top_share, *options.other_shares})
    }
    for name, of_prompts in values.items():
        metrics |= {name: float(of_prompts.mean()), f"{name}_interval": bootstrap_mean(of_prompts.to_numpy())}
    return metrics


def _first_to_stand_out(table: pd.DataFrame) -> dict[str, Any]:
    """Find the first block whose WeightNorm of token 0 is twice the others' (mean over prompts)."""
    at_ln2 = table[table["site"] == "ln2.hook_out"]
    ratios = (at_ln2["weight_norm"] / at_ln2["weight_norm_others"]).groupby(at_ln2["layer"]).mean()
    twice = ratios[ratios >= 2]
    return {"weight_norm_first_layer": int(twice.index[0]) if len(twice) else None}


def _select(by_block: pd.DataFrame, site: str, quantity: str) -> pd.DataFrame:
    return by_block[(by_block["site"] == site) & (by_block["quantity"] == quantity)]


def _weight_norm_figure(study: Study, by_block: pd.DataFrame, names: dict[str, str | None]) -> go.Figure:
    panels = [
        Panel(
            f"Output of {name}",
            "WeightNorm ‖ĥ‖",
            [
                Curve("other tokens", _select(by_block, site, "weight_norm_others"), OTHERS),
                Curve("token 0", _select(by_block, site, "weight_norm"), FIRST),
            ],
            study.me.layer,
            log_scale=True,
        )
        for site, name in names.items()
        if name is not None
    ]
    note = "Lines: means over prompts. Bands: their 95% bootstrap intervals."
    title = study.title("Norm of what the normalisations put out")
    return curves_by_block(panels, title=title, note=note, scale_buttons=True)


def _alignment_figure(
    study: Study, by_block: pd.DataFrame, names: dict[str, str | None], shares: Sequence[float]
) -> go.Figure:
    panels = []
    for site, name in names.items():
        if name is None:
            continue
        fractions = [
            Curve(f"K = {share:.1%} of the width", _select(by_block, site, f"delta_frac_{share:g}"), color)
            for share, color in zip(shares, COLORS, strict=False)
        ]
        divergence = Curve("ΔKL", _select(by_block, site, "delta_kl"), COLORS[-2])
        panels += [
            Panel(f"ΔFrac at {name}", "ΔFrac", fractions, study.me.layer, zero_line=True),
            Panel(f"ΔKL at {name}", "ΔKL (nats)", [divergence], study.me.layer, zero_line=True),
        ]
    note = (
        "Token 0 minus the mean of the others. Lines: means over prompts. Bands: their 95% bootstrap intervals. "
        "K: the dims with the largest gains."
    )
    return curves_by_block(panels, title=study.title("How far token 0 lies along the gain"), note=note)


def _weight_norm_in_words(metrics: dict[str, Any]) -> str:
    if "weight_norm_ratio" not in metrics:
        return "Without an ME layer, or without a normalisation before its FFN, there is no block to compare at."
    ratio = with_interval(metrics["weight_norm_ratio"], metrics["weight_norm_ratio_interval"])
    first = metrics["weight_norm_first_layer"]
    where = f"block {first}" if first is not None else "no block"
    return f"At block {metrics['me_layer']} token 0's norm is ×{ratio} the others'; twice theirs first at {where}."


def _alignment_in_words(metrics: dict[str, Any], options: RmsnormOptions) -> str:
    if "delta_frac" not in metrics:
        return "Without an ME layer, or without a normalisation before its FFN, there is no block to compare at."
    frac = with_interval(metrics["delta_frac"], metrics["delta_frac_interval"], "+.3f")
    kl = with_interval(metrics["delta_kl"], metrics["delta_kl_interval"], "+.3f")
    return f"At block {metrics['me_layer']} ΔFrac (K = {options.top_share:.1%}) is {frac}, ΔKL {kl} nats."
