"""Where the massive activation is born: figure 1 (bottom), figures 11-20, table 8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import melens
from melens import Criterion, Emergence, Prompt, Trace, figures, sinks
from melens.claims import judge_emergence
from melens.results import Result
from melens.tracing import Progress

TABLE8 = (
    "model", "family", "n_layers", "me_layer", "magnification", "magnification_low", "magnification_high",
    "relative_magnification", "share_of_peak", "kind", "agreement", "sink_onset_layer", "paper_me_layer", "error",
)  # fmt: skip


def run(
    model: TransformerBridge, prompts: Sequence[Prompt] | Sequence[Tensor], cfg: DictConfig, progress: Progress
) -> Result:
    """Measure norms, largest activations and sink mass in one pass, find the ME layer, draw."""
    criterion = Criterion(**cfg.exp.criterion)
    trace = melens.trace(model, prompts, bos=cfg.prompts.bos, max_batch_tokens=cfg.max_batch_tokens, progress=progress)
    me = melens.find_me_layer(trace, criterion)
    onset = sinks.find_sink_onset(trace, trailing_blocks=criterion.trailing_blocks)
    metrics = me.metrics() | {"sink_onset_layer": onset.layer, "first_sink_layer": onset.first_layer}
    norms = figures.norm_by_block(trace["norm"])
    sink_mass = sinks.sink_mass_by_layer(trace)
    dims = _top_dims(trace, cfg.exp.top_dims)
    of_model = f"{trace.model['name']}, {me.n_prompts} prompts"
    title = f"Token 0 against the others by block: {of_model}"
    return Result(
        experiment="emergence",
        model=trace.model,
        metrics=metrics,
        claims=judge_emergence(me, onset),
        tables={
            "norm_by_block": norms,
            "sink_mass_by_block": sink_mass,
            "top_dims": dims,
            "per_prompt": trace.prompts.merge(me.per_prompt, on="prompt"),
            "table8": pd.DataFrame([_table8_row(cfg.model, trace, me, onset)]),
        },
        figures={
            "emergence": figures.emergence_figure(
                norms, sink_mass, me_layer=me.layer, title=title, log_scale=cfg.exp.log_scale
            ),
            "top_dims": figures.dims_heatmap(
                dims, me_layer=me.layer, title=f"Token 0's largest dims after each block: {of_model}"
            ),
            "top_dims_surface": figures.dims_surface(
                dims, title=f"Token 0's largest dims after each block: {of_model}"
            ),
        },
        findings=_findings(trace, me, onset),
    )


def merge(jobs: dict[Path, dict[str, Any]]) -> Result:
    """Merge the jobs of a sweep over models: table 8, grouped by family, and the norm curves side by side.

    Args:
        jobs: each job's `result.json` by its folder, the failed ones among them.
    """
    rows: list[dict[Any, Any]] = []
    curves, me_layers = {}, {}
    for folder, result in jobs.items():
        model = result["config"]["model"]
        if result["status"] == "failed":
            rows.append({"model": model["name"], "family": model.get("family"), "error": result["error"]})
            continue
        rows.append(pd.read_parquet(folder / "table8.parquet").iloc[0].to_dict())
        label = model["name"] if model["name"] not in curves else f"{model['name']} (job {folder.name})"
        curves[label] = pd.read_parquet(folder / "norm_by_block.parquet")
        me_layers[label] = result["metrics"]["me_layer"]
    table8 = pd.DataFrame(rows, columns=TABLE8).sort_values("family", kind="stable").reset_index(drop=True)
    table8 = table8.astype({name: "Int64" for name in TABLE8 if name.endswith("_layer") or name == "n_layers"})
    return Result(
        experiment="table 8",
        model={},
        metrics={},
        tables={"table8": table8},
        figures={"norms_side_by_side": figures.compare_norms(curves, me_layers, log_scale=True)} if curves else {},
        findings=[(row["model"], _in_a_line(row)) for row in table8.to_dict("records")],
    )


def _in_a_line(row: Mapping[Any, Any]) -> str:
    if not pd.isna(row["error"]):
        return f"failed: {row['error']}"
    if pd.isna(row["me_layer"]):
        return f"no ME layer among {row['n_layers']} blocks"
    onset = "no sinks" if pd.isna(row["sink_onset_layer"]) else f"sinks from block {row['sink_onset_layer']}"
    return (
        f"block {row['me_layer']} of {row['n_layers']}, ×{row['magnification']:,.1f} "
        f"({row['magnification_low']:,.1f} to {row['magnification_high']:,.1f}), {row['kind']}, "
        f"{row['agreement']:.0%} agree, {onset}"
    )


def _top_dims(trace: Trace, n_dims: int) -> pd.DataFrame:
    """Average |h_0| over prompts and keep the dims that are largest at any block: `layer`, `dim`, `abs_activation`."""
    by_layer = trace.tensors["token_vectors"][:, :, 0].abs().mean(dim=0)
    dims = by_layer.amax(dim=0).topk(min(n_dims, by_layer.shape[1])).indices.tolist()
    wide = pd.DataFrame(by_layer[:, dims].numpy(), columns=dims).rename_axis("layer").reset_index()
    return wide.melt("layer", var_name="dim", value_name="abs_activation")


def _table8_row(model_cfg: DictConfig, trace: Trace, me: Emergence, onset: sinks.SinkOnset) -> dict[str, Any]:
    low, high = me.magnification_interval or (None, None)
    return {
        "model": trace.model["name"],
        "family": model_cfg.get("family"),
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
        "paper_me_layer": model_cfg.get("paper_me_layer"),
        "error": None,
    }


def _findings(trace: Trace, me: Emergence, onset: sinks.SinkOnset) -> list[tuple[str, str]]:
    rows = [("model", f"{trace.model['name']} ({trace.model['n_layers']} blocks, {trace.model['dtype']})")]
    if me.layer is None or me.magnification_interval is None or me.climb is None:
        rows.append(("ME layer", f"none: {me.reason}"))
    else:
        low, high = me.magnification_interval
        rows += [
            ("ME layer", f"block {me.layer} (layer {me.layer + 1} counting from 1)"),
            ("how it emerges", f"{me.kind}: that block brings {me.share_of_peak:.0%} of the peak norm"),
            ("magnification", f"×{me.magnification:,.1f} (95% interval {low:,.1f} to {high:,.1f})"),
            ("against other tokens", f"×{me.relative_magnification:,.1f}"),
            ("agreement", f"{me.agreement:.0%} of {me.n_prompts} prompts. {me.reason}"),
            ("where", f"position {_some(me.positions)}, dim {_some(me.dims)}"),
        ]
    distinct = me.distinct_first_tokens
    trivial = ": the same token 0 in every prompt, so agreement is trivial" if distinct == 1 else ""
    rows.append(("first tokens", f"{distinct} distinct{trivial}"))
    earlier = (
        f" (over {onset.threshold:g} first at block {onset.first_layer})" if onset.first_layer != onset.layer else ""
    )
    rows.append(("sinks start", f"block {onset.layer}{earlier}" if onset.layer is not None else f"nowhere{earlier}"))
    return rows


def _some(numbers: Sequence[int], most: int = 4) -> str:
    return ", ".join(str(number) for number in numbers[:most]) + (", ..." if len(numbers) > most else "")
