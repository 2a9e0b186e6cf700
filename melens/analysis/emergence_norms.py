"""Where the massive activation is born, in norms, dims and sinks by block: figure 1, figures 11 to 20, table 8.

    result = melens.analysis.emergence(study)
    result.figures["emergence"]

1. Everything comes with the study's trace: norms of token 0 and the others, token 0's states, sink mass; the ME layer
   is the study's own (`find_me_layer`).
2. Over several models, `compare_models` puts the norms of figure 1 side by side, and `model_in_words` a row of table 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from melens.analysis.me_layer import Criterion, Emergence, Kind
from melens.analysis.sink_mass import SinkOnset, find_sink_onset, measured_layers, sink_mass_by_layer
from melens.analysis.statistics import share_interval, with_interval
from melens.analysis.study import Study
from melens.claims.engine import Claim, Judgement, Verdict, at_least, number
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.heatmaps import dims_heatmap, dims_surface
from melens.figures.style import FIRST, OTHERS, SINK
from melens.models.layout import Layout, listed
from melens.models.normalization import named_normalization
from melens.report.result import Figure, Interval, Metrics, Result

__all__ = ["CLAIMS", "EmergenceMetrics", "compare_models", "emergence", "model_in_words", "norm_by_block"]


class EmergenceMetrics(Metrics):
    """What `emergence` measures.

    Attributes:
        reason, kind, magnification, relative_magnification, share_of_peak, climb, agreement, prompts_with, positions,
            dims, criterion: as of `Emergence`.
        share_at_first: of the prompts with a massive token those in which it is the first; None without any.
        ffn_last_blocks: ‖FFN output‖ of token 0 in the last two blocks over that in the ME layer, the larger of both.
        ffn_between: the same of the blocks between the ME layer and these, the largest.
        sink_onset_layer, first_sink_layer: as `SinkOnset`.
    """

    experiment = "emergence"
    reason: str | None = None
    kind: Kind | None = None
    magnification: float | None = None
    magnification_interval: Interval | None = None
    relative_magnification: float | None = None
    share_of_peak: float | None = None
    share_of_peak_interval: Interval | None = None
    climb: tuple[int, int] | None = None
    agreement: float | None = None
    prompts_with: float | None = None
    positions: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    criterion: Criterion = Criterion()
    prompts_with_interval: Interval | None = None
    agreement_interval: Interval | None = None
    share_at_first: float | None = None
    share_at_first_interval: Interval | None = None
    ffn_last_blocks: float | None = None
    ffn_between: float | None = None
    ffn_last_blocks_why_not: str | None = None
    sink_onset_layer: int | None = None
    first_sink_layer: int | None = None


def emergence(study: Study, *, log_scale: bool = True, top_dims: int = 24) -> Result:
    """Draw norms, largest dims and sink mass by block, and put the ME layer in figures.

    Args:
        study: as `melens.study` makes it.
        log_scale: of the norms; the figure has a button too.
        top_dims: how many dims of token 0's activation to show.

    Returns:
        Metrics `EmergenceMetrics`; the figures `emergence` (figure 1, bottom), `top_dims` (figure 1, top) and
        `top_dims_surface`; the table `table8`, with the model's row.
    """
    trace, me = study.trace, study.me
    onset = find_sink_onset(trace, trailing_blocks=me.criterion.trailing_blocks)
    layout = study.layout.as_measured(measured_layers(trace))
    norms, sink_mass, dims = norm_by_block(trace["norm"]), sink_mass_by_layer(trace), _top_dims(study, top_dims)
    metrics = study.metrics(
        EmergenceMetrics,
        **me.metrics() | layout.metrics(),
        **_shares_of_prompts(me),
        **_second_massive_activation(study, layout),
        sink_onset_layer=onset.layer,
        first_sink_layer=onset.first_layer,
    )
    title = study.title("Token 0's largest dims after each block", me.n_prompts)
    largest = dims.sort_values("abs_activation").iloc[-1]
    by_block = _emergence_figure(study, norms, sink_mass, log_scale=log_scale)
    expected = "Flat, then one block lifts token 0 by hundreds of times; flat again until the last two blocks."
    observed = (
        f"The largest is dim {int(largest['dim'])}, with |h| = {largest['abs_activation']:,.4g} after block "
        f"{int(largest['layer'])} (mean over prompts)."
    )
    heatmap = dims_heatmap(dims, me_layer=me.layer, title=title)
    surface = dims_surface(dims, me_layer=me.layer, title=title)
    few = "A few dims of the first token hold all of the massive activation."
    same = "The same dims stand out in every block from the ME layer on."
    figures = {
        "emergence": Figure(by_block, "figure 1 (bottom), figures 11-20", expected, _in_words(me)),
        "top_dims": Figure(heatmap, "figure 1 (top)", few, observed),
        "top_dims_surface": Figure(
            surface, "the authors' 3-D plot", same, "The data of the figure before, as a surface."
        ),
    }
    tables = {
        "norm_by_block": norms,
        "sink_mass_by_block": sink_mass,
        "top_dims": dims,
        "per_prompt": trace.prompts.merge(me.per_prompt, on="prompt"),
        "table8": pd.DataFrame([_table8_row(study, onset, layout)]),
    }
    return Result("emergence", trace.model, metrics, tables, figures, _findings(study, onset, layout))


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


def compare_models(
    norms: Mapping[str, pd.DataFrame], me_layers: Mapping[str, int | None], models: Sequence[str]
) -> Figure:
    """Draw the norms of several models side by side (figures 11 to 20).

    Args:
        norms: by run, the table `norm_by_block` of its `emergence`; a run is named by its model, or by more.
        me_layers: of the same runs.
        models: of which the runs are, each once.
    """
    panels = [
        Panel(run, "L2 norm of the block output", _curves(table, "hook_resid_post"), me_layers[run], log_scale=True)
        for run, table in norms.items()
    ]
    title = f"Token 0 against the others: {models[0] if len(models) == 1 else 'model by model'}"
    note = "Lines: means. Bands: 10% to 90% of prompts (token 0) or tokens."
    plot = curves_by_block(panels, title=title, note=note, columns=3)
    expected = "Every model has an ME layer, the same within a family."
    return Figure(plot, "figures 11-20, table 8", expected, f"{len(norms)} runs of {len(models)} models.")


def model_in_words(row: Mapping[Any, Any]) -> str:
    """Put a row of `table8` in words."""
    if pd.isna(row["me_layer"]):
        return f"no ME layer among {row['n_layers']} blocks"
    interval = None if pd.isna(row["magnification_low"]) else (row["magnification_low"], row["magnification_high"])
    lift = with_interval(row["magnification"], interval, ",.1f")
    sinks = "no sinks" if row["n_attending"] != 0 else "no attention that can be measured"
    if not pd.isna(row["sink_onset_layer"]):
        sinks = f"sinks from block {row['sink_onset_layer']}"
    where = f"block {row['me_layer']} of {row['n_layers']}"
    return f"{where}, × {lift}, {row['kind']}, {row['agreement']:.0%} of prompts agree, {sinks}"


# --- Numbers ----------------------------------------------------------------------------------------------------------


def _shares_of_prompts(me: Emergence) -> dict[str, float | Interval | None]:
    """Compute the share of prompts whose massive token is the first, and the intervals of all such shares."""
    layers = me.per_prompt["layer"]
    at_first = (me.per_prompt.loc[layers >= 0].get("pos", pd.Series()) == 0).to_numpy(dtype=float)
    share: dict[str, float | Interval | None] = {"share_at_first": float(at_first.mean()) if len(at_first) else None}
    if me.distinct_first_tokens == 1:  # one state of token 0, seen many times
        return share
    return share | {
        "prompts_with_interval": share_interval((layers >= 0).to_numpy()),
        "agreement_interval": share_interval((layers == me.layer).to_numpy()),
        "share_at_first_interval": share_interval(at_first),
    }


def _second_massive_activation(study: Study, layout: Layout) -> dict[str, float | str]:
    """Compare what the FFNs of the last blocks write to token 0 with what that of the ME layer writes (appendix A)."""
    last, me_layer = study.last_before_trailing, study.me.layer
    if not set(range(last + 1, study.n_layers)) <= set(layout.ffn):
        why_not = f"The last blocks do not all have an FFN that can be measured: there is {layout.ffn_in_words}."
        return {"ffn_last_blocks_why_not": why_not}
    norms = study.trace["norm"]
    of_ffn = norms[(norms["site"] == "hook_mlp_out") & (norms["pos"] == 0)].groupby("layer")["norm"].mean()
    if me_layer is None or me_layer not in of_ffn.index:
        return {}
    relative = (of_ffn / of_ffn[me_layer])[of_ffn.index > me_layer]
    between, trailing = relative[relative.index <= last], relative[relative.index > last]
    if between.empty or trailing.empty:
        return {}
    return {"ffn_last_blocks": float(trailing.max()), "ffn_between": float(between.max())}


def _top_dims(study: Study, n_dims: int) -> pd.DataFrame:
    """Average |h_0| over prompts and keep the dims that are largest at any block: `layer`, `dim`, `abs_activation`."""
    by_layer = study.trace.tensors["token_vectors"][:, :, 0].abs().mean(dim=0)
    dims = by_layer.amax(dim=0).topk(min(n_dims, by_layer.shape[1])).indices.tolist()
    wide = pd.DataFrame(by_layer[:, dims].numpy(), columns=dims).rename_axis("layer").reset_index()
    return wide.melt("layer", var_name="dim", value_name="abs_activation")


def _table8_row(study: Study, onset: SinkOnset, layout: Layout) -> dict[str, Any]:
    me, model = study.me, study.trace.model
    low, high = me.magnification_interval or (None, None)
    lift = {"magnification": me.magnification, "magnification_low": low, "magnification_high": high}
    names = ("relative_magnification", "share_of_peak", "kind", "agreement")
    row = {"model": model["name"], "family": model.get("family"), "n_layers": me.n_layers, "me_layer": me.layer}
    row |= lift | {name: getattr(me, name) for name in names}
    return row | {"sink_onset_layer": onset.layer, "n_attending": len(layout.attention)}


# --- Words ------------------------------------------------------------------------------------------------------------


def _in_words(me: Emergence) -> str:
    if me.layer is None:
        return me.reason
    return (
        f"Block {me.layer} lifts the token at position {me.positions[0]} by × {me.magnification:,.0f}: {me.kind}, with "
        f"{me.share_of_peak:.0%} of the peak norm; {me.agreement:.0%} of prompts agree."
    )


def _findings(study: Study, onset: SinkOnset, layout: Layout) -> list[tuple[str, str]]:
    model, me = study.trace.model, study.me
    rows = [("model", f"{model['name']} ({me.n_layers} blocks, {model['dtype']})")]
    if me.layer is None or me.magnification is None:
        rows.append(("ME layer", f"none: {me.reason}"))
    else:
        rows += [
            ("ME layer", f"block {me.layer} (layer {me.layer + 1} counting from 1)"),
            ("how it emerges", f"{me.kind}: the ME layer alone brings {me.share_of_peak:.0%} of the peak norm"),
            ("magnification", f"× {with_interval(me.magnification, me.magnification_interval, ',.1f')}"),
            ("against other tokens", f"× {me.relative_magnification:,.1f}"),
            ("agreement", f"{me.agreement:.0%} of {me.n_prompts} prompts. {me.reason}"),
            ("where", f"position {_some(me.positions)}, dim {_some(me.dims)}"),
        ]
    distinct = me.distinct_first_tokens
    trivial = ": token 0 is the same in every prompt, so agreement is trivial" if distinct == 1 else ""
    rows.append(("first tokens", f"{distinct} distinct{trivial}"))
    if 0 < len(layout.attention) < layout.n_layers:
        rows.append(("layout", f"{layout.attention_in_words}; {layout.ffn_in_words}"))
    return [*rows, ("sinks start", _sinks_start(onset, layout))]


def _sinks_start(onset: SinkOnset, layout: Layout) -> str:
    if not layout.attention:
        return f"not measured: there is {layout.attention_in_words}"
    is_first = onset.first_layer == onset.layer
    earlier = "" if is_first else f" (over {onset.threshold:g} first at block {onset.first_layer})"
    if onset.layer is not None:
        return f"block {onset.layer}{earlier}"
    if not onset.looked_at:
        return f"not measured: attention is in {listed(layout.attention)} alone, among the last{earlier}"
    where = "" if len(layout.attention) == layout.n_layers else f"; there is {layout.attention_in_words}"
    return f"nowhere{earlier}{where}"


def _some(numbers: Sequence[int], most: int = 4) -> str:
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")


# --- Figures ----------------------------------------------------------------------------------------------------------


def _emergence_figure(study: Study, norms: pd.DataFrame, sink_mass: pd.DataFrame, *, log_scale: bool) -> go.Figure:
    before = named_normalization(study.model, "ln2")
    after = next((block.ln2_post.name for block in study.model.blocks if "ln2_post" in block._modules), None)
    sites = {
        "ln2.hook_out": f"{before} output",
        "hook_mlp_out": f"FFN output, after {after}" if after else "FFN output",
        "hook_resid_post": "Block output",
    }
    panels = [
        Panel(title, "L2 norm", _curves(norms, site), study.me.layer, log_scale=log_scale)
        for site, title in sites.items()
        if site in set(norms["site"])
    ]
    if not sink_mass.empty:
        curve = Curve("sink mass, mean of heads", sink_mass, SINK)
        title = "Attention on token 0 (sink mass)"
        panels.append(Panel(title, "share of attention", [curve], study.me.layer, y_range=(0, 1)))
    title = study.title("Token 0 against the others by block", study.me.n_prompts)
    note = "Lines: means. Bands: 10% to 90% of prompts (token 0), tokens or heads."
    return curves_by_block(panels, title=title, note=note, scale_buttons=True)


def _curves(norms: pd.DataFrame, site: str) -> list[Curve]:
    of_site = norms[norms["site"] == site]
    tokens = (("others", "other tokens", OTHERS), ("first", "token 0", FIRST))
    return [Curve(name, of_site[of_site["token"] == token], color) for token, name, color in tokens]


# --- Claims -----------------------------------------------------------------------------------------------------------


def _exists(metrics: EmergenceMetrics) -> Judgement:
    judged = at_least(metrics.prompts_with, metrics.prompts_with_interval, 0.5)
    criterion = metrics.criterion.min_abs, metrics.criterion.min_ratio
    if criterion != (100, 1_000):
        judged = replace(judged, note="Here the criterion was |h| > {} and > {} × the median.".format(*criterion))
    return judged if metrics.me_layer is not None else replace(judged, verdict="does not hold")


def _single_block(metrics: EmergenceMetrics) -> Judgement:
    judged = at_least(metrics.share_of_peak, metrics.share_of_peak_interval, 0.8)
    if judged.verdict == "does not hold" and metrics.kind == "a few blocks":
        return replace(judged, verdict="holds in part", note="A few blocks bring it together.")
    return judged


def _second_massive(metrics: EmergenceMetrics) -> Judgement:
    last, between = metrics.ffn_last_blocks, metrics.ffn_between
    if last is None or between is None:
        why_not = metrics.ffn_last_blocks_why_not or "No blocks lie between the ME layer and the last two."
        return Judgement("not measured", note=why_not)
    last, between = number(last, "ffn_last_blocks"), number(between, "ffn_between")
    verdict: Verdict = "does not hold" if last < 0.1 else "holds" if between < 0.1 else "holds in part"
    return Judgement(verdict, last, None, f"In the blocks between, at most {between:.2g}.")


CLAIMS = (
    Claim(
        id="exists", fixed="2026-11-22 a1bbeb3",
        source="section 1, figure 1", figure="top_dims", metrics=EmergenceMetrics,
        claim="Some token carries massive activations",
        statistic="share of prompts with an entry |h| > 100 and > 1,000 × the median |h|",
        criterion=">= 0.5", why="the criterion is Sun et al.'s (2024); a property of the model shows in most inputs",
        needs_me_layer=False, judge=_exists,
    ),
    Claim(
        id="single-block", fixed="2026-11-22 a1bbeb3",
        source="section 3, figure 1", figure="emergence", metrics=EmergenceMetrics,
        claim="A single block brings the massive activation; it does not build up",
        statistic="share of the peak norm that the ME layer alone adds",
        criterion=">= 0.8; in part: a few blocks", why="what other blocks add is then less than a quarter of it",
        judge=_single_block,
    ),
    Claim(
        id="magnification", fixed="2026-11-22 a1bbeb3",
        source="section 1, table 8", figure="emergence", metrics=EmergenceMetrics,
        claim="That block magnifies the token hundreds of times",
        statistic="‖h_out‖ / ‖h_in‖ at the ME layer",
        criterion=">= 100; in part >= 10",
        why="the smallest number that can be called hundreds; 10 is still an order of magnitude",
        judge=lambda metrics: at_least(metrics.magnification, metrics.magnification_interval, 100, partly=10),
    ),
    Claim(
        id="first-token", fixed="2026-11-22 a1bbeb3", source="section 3.1", figure="top_dims", metrics=EmergenceMetrics,
        claim="The massive token is the first one",
        statistic="share of prompts whose massive token is at position 0",
        criterion=">= 0.95; in part >= 0.5", why="1 in 20 may differ before 'consistently' is wrong",
        judge=lambda metrics: at_least(metrics.share_at_first, metrics.share_at_first_interval, 0.95, partly=0.5),
    ),
    Claim(
        id="second-massive", fixed="2026-11-22 a1bbeb3",
        source="appendix A, figure 1", figure="emergence", metrics=EmergenceMetrics,
        claim="The last two blocks make a second massive activation",
        statistic="largest ‖FFN output‖ of token 0 in the last two blocks, relative to the ME layer's",
        criterion=">= 0.1, and < 0.1 between; in part: >= 0.1", why="within an order of magnitude of the first",
        of_token_0=True, of_ffn=True, judge=_second_massive,
    ),
)  # fmt: skip
