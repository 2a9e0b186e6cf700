"""Where the massive activation is born: figure 1 (bottom), figures 11-20, table 8."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from transformer_lens.model_bridge import TransformerBridge

from experiments.options.schema import ModelOptions
from experiments.runner.jobs import Job, job_name
from experiments.runner.legacy import EmergenceOptions
from experiments.runner.study import Run as Study
from melens import Emergence, Probe, Trace
from melens.analysis import sink_mass as sinks
from melens.analysis.statistics import bootstrap_mean, with_interval
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.heatmaps import dims_heatmap, dims_surface
from melens.figures.style import FIRST, OTHERS, SINK
from melens.models.layout import Layout, listed
from melens.models.normalization import named_normalization
from melens.report.result import Figure, Result

TABLE8 = (
    "model", "family", "n_layers", "me_layer", "magnification", "magnification_low", "magnification_high",
    "relative_magnification", "share_of_peak", "kind", "agreement", "sink_onset_layer", "n_attending",
    "paper_me_layer", "error",
)  # fmt: skip


def probes(model: TransformerBridge, options: EmergenceOptions) -> list[Probe]:
    """Everything is in the default probes."""
    return []


def run(study: Study, options: EmergenceOptions) -> Result:
    """Draw norms, largest dims and sink mass by block, and put the ME layer in figures."""
    trace, me = study.trace, study.me
    onset = sinks.find_sink_onset(trace, trailing_blocks=me.criterion.trailing_blocks)
    layout = Layout.of(study.model).as_measured(sinks.measured_layers(trace))
    norms = norm_by_block(trace["norm"])
    sink_mass = sinks.sink_mass_by_layer(trace)
    dims = _top_dims(trace, options.top_dims)
    metrics = study.metrics(
        **me.metrics() | layout.metrics(),
        **_shares_of_prompts(me),
        **_second_massive_activation(study, layout),
        sink_onset_layer=onset.layer,
        first_sink_layer=onset.first_layer,
    )
    title = study.title("Token 0's largest dims after each block", me.n_prompts)
    here = _in_words(me)
    return Result(
        experiment="emergence",
        model=trace.model,
        metrics=metrics,
        tables={
            "norm_by_block": norms,
            "sink_mass_by_block": sink_mass,
            "top_dims": dims,
            "per_prompt": trace.prompts.merge(me.per_prompt, on="prompt"),
            "table8": pd.DataFrame([_table8_row(study.cfg.model, trace, me, onset, layout)]),
        },
        figures={
            "emergence": Figure(
                _emergence_figure(study, norms, sink_mass, log_scale=options.log_scale),
                "figure 1 (bottom), figures 11-20",
                "Flat, then one block lifts token 0 by hundreds of times; flat again until the last two blocks.",
                here,
            ),
            "top_dims": Figure(
                dims_heatmap(dims, me_layer=me.layer, title=title),
                "figure 1 (top)",
                "A few dims of the first token hold all of the massive activation.",
                _largest_dim_in_words(dims),
            ),
            "top_dims_surface": Figure(
                dims_surface(dims, me_layer=me.layer, title=title),
                "the authors' 3-D plot",
                "The same dims stand out in every block from the ME layer on.",
                "The data of the figure before, as a surface.",
            ),
        },
        findings=_findings(trace, me, onset, layout),
    )


def norm_by_block(norms: pd.DataFrame) -> pd.DataFrame:
    """Summarise norms for figure 1: by site, layer and token ("first" or "others") the mean and its spread.

    Args:
        norms: the table of the probe `Norms`.

    Returns:
        `site`, `layer`, `token`, `mean`, and `low` and `high`: the 10% and 90% quantiles, over prompts for the first
        token, over all their tokens for the others.
    """
    token = np.where(norms["pos"] == 0, "first", "others")
    grouped = norms.assign(token=token).groupby(["site", "layer", "token"], observed=True)["norm"]
    summary = pd.DataFrame({"mean": grouped.mean(), "low": grouped.quantile(0.1), "high": grouped.quantile(0.9)})
    return summary.reset_index()


def _curves(norms: pd.DataFrame, site: str) -> list[Curve]:
    of_site = norms[norms["site"] == site]
    tokens = (("others", "other tokens", OTHERS), ("first", "token 0", FIRST))
    return [Curve(name, of_site[of_site["token"] == token], color) for token, name, color in tokens]


def _emergence_figure(study: Study, norms: pd.DataFrame, sink_mass: pd.DataFrame, *, log_scale: bool) -> go.Figure:
    panels = [
        Panel(title, "L2 norm", _curves(norms, site), study.me.layer, log_scale=log_scale)
        for site, title in norm_sites(study.model).items()
        if site in set(norms["site"])
    ]
    if not sink_mass.empty:
        curve = Curve("sink mass, mean of heads", sink_mass, SINK)
        panels.append(
            Panel("Attention on token 0 (sink mass)", "share of attention", [curve], study.me.layer, y_range=(0, 1))
        )
    return curves_by_block(
        panels,
        title=study.title("Token 0 against the others by block", study.me.n_prompts),
        note="Lines: means. Bands: 10% to 90% of prompts (token 0), tokens or heads.",
        scale_buttons=True,
    )


def norm_sites(model: TransformerBridge) -> dict[str, str]:
    """Name the panels of figure 1 by what this model's modules are called."""
    before = named_normalization(model, "ln2")
    after = next((block.ln2_post for block in model.blocks if "ln2_post" in block._modules), None)
    return {
        "ln2.hook_out": f"{before} output" if before else "ln2 output",
        "hook_mlp_out": f"FFN output, after {after.name}" if after is not None else "FFN output",
        "hook_resid_post": "Block output",
    }


def _shares_of_prompts(me: Emergence) -> dict[str, Any]:
    """Compute the share of prompts whose massive token is the first, and the intervals of all such shares."""
    born = me.per_prompt[me.per_prompt["layer"] >= 0]
    at_first = (born["pos"] == 0).to_numpy(dtype=float) if len(born) else np.zeros(0)
    if me.distinct_first_tokens == 1:  # one state of token 0, seen many times
        return {"share_at_first": float(at_first.mean()) if len(born) else None}
    return {
        "prompts_with_interval": bootstrap_mean((me.per_prompt["layer"] >= 0).to_numpy(dtype=float)),
        "agreement_interval": bootstrap_mean((me.per_prompt["layer"] == me.layer).to_numpy(dtype=float)),
        "share_at_first": float(at_first.mean()) if len(born) else None,
        "share_at_first_interval": bootstrap_mean(at_first),
    }


def _second_massive_activation(study: Study, layout: Layout) -> dict[str, Any]:
    """Compare what the FFNs of the last blocks write to token 0 with what that of the ME layer writes (appendix A)."""
    if not set(range(study.last_lasting + 1, study.n_layers)) <= set(layout.ffn):
        return {"ffn_last_blocks_why_not": f"The last blocks are not all heard: {layout.ffn_in_words}."}
    norms, me_layer = study.trace["norm"], study.me.layer
    of_ffn = norms[(norms["site"] == "hook_mlp_out") & (norms["pos"] == 0)].groupby("layer")["norm"].mean()
    if me_layer is None or me_layer not in of_ffn.index:
        return {}
    relative = of_ffn / of_ffn[me_layer]
    last = relative[(relative.index > study.last_lasting) & (relative.index > me_layer)]
    between = relative[(relative.index > me_layer) & (relative.index <= study.last_lasting)]
    if last.empty or between.empty:
        return {}
    return {"ffn_last_blocks": float(last.max()), "ffn_between": float(between.max())}


def _in_words(me: Emergence) -> str:
    if me.layer is None:
        return me.reason
    return (
        f"Block {me.layer} lifts the token at position {me.positions[0]} by ×{me.magnification:,.0f}: {me.kind}, with "
        f"{me.share_of_peak:.0%} of the peak norm; {me.agreement:.0%} of prompts agree."
    )


def _largest_dim_in_words(dims: pd.DataFrame) -> str:
    largest = dims.sort_values("abs_activation").iloc[-1]
    return (
        f"The largest is dim {int(largest['dim'])}, with |h| = {largest['abs_activation']:,.4g} after block "
        f"{int(largest['layer'])} (mean over prompts)."
    )


def merge(jobs: Sequence[Job]) -> Result:
    """Merge the jobs of a sweep over models: table 8, grouped by family, and the norm curves side by side."""
    jobs = [job for job in jobs if job.result["experiment"] in ("emergence", "all")]
    rows: list[dict[Any, Any]] = []
    curves, me_layers = {}, {}
    swept = dict.fromkeys(key for job in jobs for key in job.swept)
    times = Counter(job.model for job in jobs)
    for job in jobs:
        told = job.swept_in_words
        label = job.model if times[job.model] == 1 else job.name
        if not job.is_ok:
            family = job.result["config"]["model"].get("family")
            rows.append({"model": job.model, "family": family, "error": job.result["error"], **told})
            continue
        if not (job.folder / "table8.parquet").is_file():  # exp=all without this experiment
            continue
        rows.append(pd.read_parquet(job.folder / "table8.parquet").iloc[0].to_dict() | told)
        curves[label] = pd.read_parquet(job.folder / "norm_by_block.parquet")
        me_layer = rows[-1]["me_layer"]
        me_layers[label] = None if pd.isna(me_layer) else int(me_layer)
    table8 = (
        pd.DataFrame(rows, columns=[*TABLE8[:1], *swept, *TABLE8[1:]])
        .sort_values("family", kind="stable")
        .reset_index(drop=True)
    )
    table8 = table8.astype({name: "Int64" for name in TABLE8 if name.endswith("_layer") or name == "n_layers"})
    return Result(
        experiment="table 8",
        model={},
        metrics={},
        tables={"table8": table8},
        figures={"norms_side_by_side": _side_by_side(curves, me_layers, list(times))} if curves else {},
        findings=[
            (job_name(row["model"], {key: row[key] for key in swept}), _in_a_line(row))
            for row in table8.to_dict("records")
        ],
    )


def _side_by_side(curves: dict[str, pd.DataFrame], me_layers: dict[str, int | None], models: Sequence[str]) -> Figure:
    panels = [
        Panel(model, "L2 norm of the block output", _curves(norms, "hook_resid_post"), me_layers[model], log_scale=True)
        for model, norms in curves.items()
    ]
    note = "Lines: means. Bands: 10% to 90% of prompts (token 0) or tokens."
    title = f"Token 0 against the others: {models[0] if len(models) == 1 else 'model by model'}"
    figure = curves_by_block(panels, title=title, note=note, columns=3)
    paper = "Every model has an ME layer, the same within a family."
    return Figure(figure, "figures 11-20, table 8", paper, f"{len(curves)} runs of {len(models)} models.")


def _in_a_line(row: Mapping[Any, Any]) -> str:
    if not pd.isna(row["error"]):
        return f"failed: {row['error']}"
    if pd.isna(row["me_layer"]):
        return f"no ME layer among {row['n_layers']} blocks"
    onset = "no sinks" if row["n_attending"] != 0 else "no attention that can be heard"
    if not pd.isna(row["sink_onset_layer"]):
        onset = f"sinks from block {row['sink_onset_layer']}"
    interval = None if pd.isna(row["magnification_low"]) else (row["magnification_low"], row["magnification_high"])
    return (
        f"block {row['me_layer']} of {row['n_layers']}, ×{with_interval(row['magnification'], interval, ',.1f')}, "
        f"{row['kind']}, "
        f"{row['agreement']:.0%} agree, {onset}"
    )


def _top_dims(trace: Trace, n_dims: int) -> pd.DataFrame:
    """Average |h_0| over prompts and keep the dims that are largest at any block: `layer`, `dim`, `abs_activation`."""
    by_layer = trace.tensors["token_vectors"][:, :, 0].abs().mean(dim=0)
    dims = by_layer.amax(dim=0).topk(min(n_dims, by_layer.shape[1])).indices.tolist()
    wide = pd.DataFrame(by_layer[:, dims].numpy(), columns=dims).rename_axis("layer").reset_index()
    return wide.melt("layer", var_name="dim", value_name="abs_activation")


def _table8_row(
    model_cfg: ModelOptions, trace: Trace, me: Emergence, onset: sinks.SinkOnset, layout: Layout
) -> dict[str, Any]:
    low, high = me.magnification_interval or (None, None)
    return {
        "model": trace.model["name"],
        "family": model_cfg.family,
        "n_layers": trace.model["n_layers"],
        "me_layer": me.layer,
        "magnification": me.magnification,
        "magnification_low": low,
        "magnification_high": high,
        "relative_magnification": me.relative_magnification,
        "share_of_peak": me.share_of_peak,
        "kind": me.kind,
        "agreement": me.agreement,
        "sink_onset_layer": onset.layer,
        "n_attending": len(layout.attention),
        "paper_me_layer": model_cfg.paper_me_layer,
        "error": None,
    }


def _findings(trace: Trace, me: Emergence, onset: sinks.SinkOnset, layout: Layout) -> list[tuple[str, str]]:
    rows = [("model", f"{trace.model['name']} ({trace.model['n_layers']} blocks, {trace.model['dtype']})")]
    if me.layer is None or me.magnification is None:
        rows.append(("ME layer", f"none: {me.reason}"))
    else:
        magnification = with_interval(me.magnification, me.magnification_interval, ",.1f")
        rows += [
            ("ME layer", f"block {me.layer} (layer {me.layer + 1} counting from 1)"),
            ("how it emerges", f"{me.kind}: that block brings {me.share_of_peak:.0%} of the peak norm"),
            ("magnification", f"×{magnification}"),
            ("against other tokens", f"×{me.relative_magnification:,.1f}"),
            ("agreement", f"{me.agreement:.0%} of {me.n_prompts} prompts. {me.reason}"),
            ("where", f"position {_some(me.positions)}, dim {_some(me.dims)}"),
        ]
    distinct = me.distinct_first_tokens
    trivial = ": the same token 0 in every prompt, so agreement is trivial" if distinct == 1 else ""
    rows.append(("first tokens", f"{distinct} distinct{trivial}"))
    if 0 < len(layout.attention) < layout.n_layers:
        rows.append(("layout", f"{layout.attention_in_words}; {layout.ffn_in_words}"))
    rows.append(("sinks start", _sinks_start(onset, layout)))
    return rows


def _sinks_start(onset: sinks.SinkOnset, layout: Layout) -> str:
    if not layout.attention:
        return f"not measured: there is {layout.attention_in_words}"
    earlier = (
        f" (over {onset.threshold:g} first at block {onset.first_layer})" if onset.first_layer != onset.layer else ""
    )
    if onset.layer is not None:
        return f"block {onset.layer}{earlier}"
    if not onset.looked_at:
        return f"not measured: attention only in {listed(layout.attention)}, among the last{earlier}"
    where = "" if len(layout.attention) == layout.n_layers else f"; there is {layout.attention_in_words}"
    return f"nowhere{earlier}{where}"


def _some(numbers: Sequence[int], most: int = 4) -> str:
    return ", ".join(str(number) for number in numbers[:most]) + (", ..." if len(numbers) > most else "")
