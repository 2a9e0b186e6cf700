"""Where the massive activation is born, in norms, dims and sinks by block: figure 1, figures 11 to 20, table 8.

    result = melens.analysis.emergence(study)
    result.figures["emergence"]

1. Everything comes with the study's trace: norms of token 0 and the others, token 0's states, sink mass; the ME layer
   is the study's own (`find_me_layer`). What the FFNs write to token 0 is asked for besides (`probes`).
2. What the last blocks do to the massive state is followed apart (`trailing_blocks`).
3. Over several models, `compare_models` puts the norms of figure 1 side by side, and `model_in_words` a row of table 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.emergence_claims import EmergenceMetrics
from melens.analysis.sink_mass import SinkOnset, find_sink_onset, measured_layers, sink_mass_by_layer
from melens.analysis.statistics import mean_metric, share_interval, with_interval
from melens.analysis.study import Study
from melens.analysis.trailing_blocks import LastBlocks, follow_last_blocks, last_blocks_figure
from melens.analysis.trailing_blocks import probes as write_probes
from melens.errors import MelensError
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.heatmaps import dims_heatmap
from melens.figures.style import FIRST, OTHERS, SINK
from melens.models.layout import Layout, listed
from melens.models.normalization import named_normalization
from melens.report.result import Figure, Interval, Result
from melens.tracing.probes import Probe

__all__ = ["PAPER_COUNTS", "compare_models", "emergence", "model_in_words", "norm_by_block", "probes", "side_by_side"]

PAPER_COUNTS = (
    "The paper's numbers may count from 1: its code edits `layer == 6`, counted from 0, and masks from 7 on, the block "
    "behind, so that its layer 7 may be block 6 here."
)


def emergence(study: Study, *, log_scale: bool = True, top_dims: int = 24) -> Result:
    """Draw norms, largest dims and sink mass by block, and put the ME layer in figures.

    Args:
        study: as `melens.study` makes it.
        log_scale: of the norms; the figure has a button too.
        top_dims: how many dims of token 0's activation to show.

    Returns:
        Metrics `EmergenceMetrics`; the figures `emergence` (figure 1, bottom), `top_dims` (figure 1, top) and, where
        there is a plateau, `last_blocks` (appendix A); the table `table8`, with the model's row.

    Example:
        >>> result = melens.analysis.emergence(study)
        >>> result.metrics.me_layer, result.metrics.kind
        (2, 'one block')
        >>> result.tables["norm_by_block"].columns.tolist()
        ['site', 'layer', 'token', 'mean', 'low', 'high']
    """
    trace, me = study.trace, study.me
    onset = find_sink_onset(trace, trailing_blocks=me.criterion.trailing_blocks)
    layout = study.layout.as_measured(measured_layers(trace))
    last = follow_last_blocks(study)
    norms, sink_mass, dims = norm_by_block(trace["norm"]), sink_mass_by_layer(trace), _top_dims(study, top_dims)
    metrics = study.metrics(
        EmergenceMetrics,
        **me.metrics() | layout.metrics(),
        **_shares(study),
        **_before(study),
        **_over_others(study),
        **_last_blocks(last),
        **_ffn_norms_in_last_blocks(study, layout),
        sink_onset_layer=onset.layer,
        first_sink_layer=onset.first_layer,
    )
    title = study.title("Token 0's largest dims after each block", me.n_prompts)
    largest = dims.sort_values("abs_activation").iloc[-1]
    by_block = partial(_emergence_figure, study, norms, sink_mass, log_scale=log_scale)
    expected = "Flat, then one block lifts token 0 by hundreds of times; flat again until the last two blocks."
    observed = f"The largest is dim {int(largest['dim'])}, with |h| = {largest['abs_activation']:,.4g} after block "
    observed += f"{int(largest['layer'])} (mean over prompts)."
    heatmap = partial(dims_heatmap, dims, me_layer=me.layer, title=title)
    few = "A few dims of the first token hold the massive activation, the same in all blocks after the ME layer."
    figures = {
        "emergence": Figure(by_block, "figure 1 (bottom), figures 11-20", expected, _in_words(study)),
        "top_dims": Figure(heatmap, "figure 1 (top)", few, observed),
    }
    if last is not None:
        figures["last_blocks"] = last_blocks_figure(study, last)
    tables = {
        "norm_by_block": norms,
        "sink_mass_by_block": sink_mass,
        "top_dims": dims,
        "per_prompt": trace.prompts.merge(me.per_prompt, on="prompt"),
        "table8": pd.DataFrame([_table8_row(study, onset, layout)]),
    }
    return Result("emergence", trace.model, metrics, tables, figures, _findings(study, onset, layout, last))


def probes(model: TransformerBridge, log_scale: bool = True, top_dims: int = 24) -> list[Probe]:
    """Return what `emergence` measures besides the default probes: what each block's FFN writes to token 0."""
    return write_probes(model)


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


def side_by_side(results: Mapping[str, Result]) -> Figure:
    """Draw the norms of several models side by side (figures 11 to 20), as a sweep over models does.

    Args:
        results: of `emergence`, by the name that stands above the panel.

    Raises:
        MelensError: none, or the result of another analysis.

    Example:
        >>> result = melens.analysis.emergence(study)
        >>> melens.analysis.side_by_side({"mine": result, "again": result}).observed
        '2 runs of 2 models.'
    """
    if not results:
        raise MelensError("There are no results to draw: give some as {'a name': melens.analysis.emergence(study)}.")
    for name, result in results.items():
        if result.experiment != "emergence":
            raise MelensError(f"{name!r} is a result of {result.experiment}; side_by_side takes those of emergence.")
    norms = {name: result.tables["norm_by_block"] for name, result in results.items()}
    return compare_models(norms, {name: result.metrics.me_layer for name, result in results.items()}, list(results))


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
    agree = _agree(row["agreement"], row["n_states"])
    return f"{where}, × {lift}, {row['kind']}, {agree}, {sinks}"


# --- Numbers ----------------------------------------------------------------------------------------------------------


def _one_a_state(study: Study) -> pd.DataFrame:
    """Keep a row of `Emergence.per_prompt` for each state: one a first token, where token 0 is the massive one."""
    rows = study.me.per_prompt.merge(study.trace.prompts[["prompt", "first_token_id"]], on="prompt")
    return rows if study.position else rows.drop_duplicates("first_token_id")


def _shares(study: Study) -> dict[str, Any]:
    """Compute shares of states with their exact intervals, and how many there are."""
    me, states = study.me, _one_a_state(study)
    layers = states["layer"].to_numpy()
    found: dict[str, Any] = {"n_states": len(states)}
    found |= _share("states_with", layers >= 0)
    found |= _share("states_agreeing", layers == (-2 if me.layer is None else me.layer))
    born = me.per_prompt[me.per_prompt["layer"] >= 0]
    if born.empty:
        return found
    found |= _share("share_at_first", (born["pos"] == 0).to_numpy())
    if me.distinct_first_tokens == 1:
        found["share_at_first_interval"] = None  # one state of token 0, seen many times
    if me.layer is None:
        return found
    formed = born[born["n_massive"] > 0].merge(study.trace.prompts[["prompt", "first_token_id"]], on="prompt")
    alone = formed["first_is_massive"] & (formed["n_massive"] == 1)
    by_first = formed.assign(alone=alone).groupby("first_token_id")[["first_is_massive", "alone"]].all()
    found |= _share("first_massive", by_first["first_is_massive"].to_numpy())
    found |= _share("first_alone", by_first["alone"].to_numpy())
    return found | {"most_massive_tokens": int(formed["n_massive"].max())}


def _share(name: str, has: np.ndarray) -> dict[str, float | Interval]:
    return {name: float(has.mean()), f"{name}_interval": share_interval(has)}


def _before(study: Study) -> dict[str, Any]:
    """Compare token 0's norm with the other tokens' in the outputs of the blocks before the ME layer (section 3.1)."""
    norms, me_layer = study.trace["norm"], study.me.layer
    before = norms[(norms["site"] == "hook_resid_post") & (norms["layer"] < (me_layer or 0))]
    longer = study.trace.prompts.query("n_tokens > 1")["prompt"]  # a prompt of one token has no others
    before = before[before["prompt"].isin(study.distinct_massive_prompts) & before["prompt"].isin(longer)]
    if before.empty:
        return {}
    by_token = before.assign(first=before["pos"] == 0).groupby(["prompt", "layer", "first"])["norm"].mean().unstack()
    factors: pd.DataFrame = (by_token.max(axis=1) / by_token.min(axis=1)).unstack("layer")
    furthest = factors.max(axis=1).to_numpy()
    before_layer = int(factors.idxmax(axis=1).mode().iloc[0])
    return mean_metric("before_ratio", furthest) | {"before_layer": before_layer}


def _over_others(study: Study) -> dict[str, Any]:
    """Compare the massive token's norm with the other tokens' of its prompt, where the massive state is formed."""
    chosen = study.massive_prompts if study.position else study.distinct_massive_prompts
    norms = study.trace["norm"].merge(study.me.per_prompt[["prompt", "formed_pos"]], on="prompt")
    norms = norms[(norms["site"] == "hook_resid_post") & (norms["layer"] == study.me.formed)]
    norms = norms[norms["prompt"].isin(chosen)]
    is_massive = norms["pos"] == norms["formed_pos"]
    others = norms[~is_massive].groupby("prompt")["norm"].mean()
    ratios = (norms[is_massive].set_index("prompt")["norm"] / others).dropna()  # a prompt of one token has no others
    return mean_metric("over_others", ratios.to_numpy()) if len(ratios) else {}


def _last_blocks(last: LastBlocks | None) -> dict[str, Any]:
    if last is None:
        return {}
    names = ("second_over_others", "erased", "write_cosine", "written", "written_by_ffn")
    return {name: getattr(last, name) for name in names} | {
        "trailing_from": last.found, "second_from": last.begin, "second_layer": last.layer,
        "second_norm": last.second, "second_norm_interval": last.second_interval,
    }  # fmt: skip


def _ffn_norms_in_last_blocks(study: Study, layout: Layout) -> dict[str, float | str]:
    """Compare the norms, which have no sign, of what the last blocks' FFNs and the ME layer's write to token 0."""
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
    row |= {"formed": me.formed, "n_states": len(_one_a_state(study))}
    return row | {"sink_onset_layer": onset.layer, "n_attending": len(layout.attention)}


# --- Words ------------------------------------------------------------------------------------------------------------


def _in_words(study: Study) -> str:
    me = study.me
    if me.layer is None:
        return f"No ME layer. {me.reason}"
    formed = "" if me.formed == me.layer else f" The massive state is formed in block {me.formed}."
    agree = _agree(me.agreement, len(_one_a_state(study)), me.n_prompts)
    return (
        f"Block {me.layer} lifts the token at position {me.lifted_position} by × {me.magnification:,.0f}: {me.kind}, "
        f"with {me.share_of_peak:.0%} of the peak norm; {agree}.{formed}"
    )


def _agree(share: float, n_states: int, n_prompts: int | None = None) -> str:
    """Say how many prompts agree on the ME layer, or which share, and whether they could do otherwise."""
    trivial = " (trivial: they share their first token, and with it its every state)" if n_states == 1 else ""
    agreeing = f"{share:.0%} of" if n_prompts is None else f"{round(share * n_prompts)} of {n_prompts}"
    return f"{agreeing} prompts agree{trivial}"


def _findings(study: Study, onset: SinkOnset, layout: Layout, last: LastBlocks | None) -> list[tuple[str, str]]:
    """Say what was found, first what the paper's abstract is about."""
    model, me = study.trace.model, study.me
    rows = [("model", f"{model['name']} ({me.n_layers} blocks, {model['dtype']})")]
    sinks = ("sinks start", _sinks_start(onset, layout))
    if me.layer is None or me.magnification is None:
        rows += [("ME layer", f"none: {me.reason}"), sinks]
    else:
        rows += [
            ("ME layer", f"block {me.layer} (layer {me.layer + 1} counting from 1)"),
            ("how it emerges", f"{me.kind}: the ME layer alone brings {me.share_of_peak:.0%} of the peak norm"),
            ("magnification", f"× {with_interval(me.magnification, me.magnification_interval, ',.1f')}"),
            sinks,
            ("against other tokens", f"× {me.relative_magnification:,.1f}"),
            ("agreement", f"{_agree(me.agreement, len(_one_a_state(study)), me.n_prompts)}. {me.reason}"),
            ("formed", f"in block {me.formed}: position {_some(me.positions)}, dim {_some(me.dims)}"),
        ]
    if last is not None:
        rows.append(("last blocks", last.in_words(study.n_layers, me.criterion.trailing_blocks)))
    rows.append(("first tokens", f"{me.distinct_first_tokens} distinct"))
    if 0 < len(layout.attention) < layout.n_layers:
        rows.append(("layout", f"{layout.attention_in_words}; {layout.ffn_in_words}"))
    return rows


def _sinks_start(onset: SinkOnset, layout: Layout) -> str:
    if not layout.attention:
        return f"not measured: there is {layout.attention_in_words}"
    is_first = onset.first_layer == onset.layer
    earlier = "" if is_first else f"; a first, passing one in block {onset.first_layer}"
    if onset.layer is not None:
        return f"{'lasting from ' * bool(earlier)}block {onset.layer}{earlier}"
    if not onset.looked_at:
        return f"not measured: attention is in {listed(layout.attention)} alone, among the last{earlier}"
    where = "" if len(layout.attention) == layout.n_layers else f"; there is {layout.attention_in_words}"
    return f"{'no lasting one' if earlier else 'nowhere'}{earlier}{where}"


def _some(numbers: Sequence[int], most: int = 4) -> str:
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")


# --- Figures ----------------------------------------------------------------------------------------------------------


def _emergence_figure(study: Study, norms: pd.DataFrame, sink_mass: pd.DataFrame, *, log_scale: bool) -> go.Figure:
    norm = named_normalization(study.model, "ln2")
    after = next((block.ln2_post.name for block in study.model.blocks if "ln2_post" in block._modules), None)
    sites = {
        "ln2.hook_out": "FFN norm (ln2) output",
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
    note += f" The FFN's norm is {norm.removesuffix(' (ln2)')}." if norm else ""
    return curves_by_block(panels, title=title, note=note, scale_buttons=True)


def _curves(norms: pd.DataFrame, site: str) -> list[Curve]:
    of_site = norms[norms["site"] == site]
    tokens = (("others", "other tokens", OTHERS), ("first", "token 0", FIRST))
    return [Curve(name, of_site[of_site["token"] == token], color) for token, name, color in tokens]
