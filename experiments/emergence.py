"""`exp=emergence`: where the massive activation is born (figure 1, table 8), and over a sweep in which models where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from experiments.runner.declaration import AnalysisOptions, Experiment
from melens.validation.types import Count, Flag

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from experiments.runner.jobs import Job
    from experiments.runner.study import Run
    from melens.report.result import Result
    from melens.tracing.probes import Probe

__all__ = ["EXPERIMENTS"]


class EmergenceOptions(AnalysisOptions):
    """The arguments of `melens.analysis.emergence`."""

    name: Literal["emergence"]
    log_scale: Flag
    top_dims: Count


def _run(run: Run, options: EmergenceOptions) -> Result:
    from melens.analysis import emergence
    from melens.analysis.emergence_norms import PAPER_COUNTS

    result = emergence(run, **options.own)
    named = run.cfg.model.paper_me_layer
    table8 = result.tables["table8"].assign(paper_me_layer=named, error=None)
    said = [] if named is None else [("in the paper", f"layer {named}. {PAPER_COUNTS}")]
    return replace(result, tables=result.tables | {"table8": table8}, findings=[*result.findings, *said])


def _probes(model: TransformerBridge, options: EmergenceOptions) -> list[Probe]:
    from melens.analysis.emergence_norms import probes

    return probes(model, **options.own)


# --- Over a sweep -----------------------------------------------------------------------------------------------------

TABLE8 = (
    "model", "family", "n_layers", "me_layer", "magnification", "magnification_low", "magnification_high",
    "relative_magnification", "share_of_peak", "kind", "formed", "agreement", "n_states", "sink_onset_layer",
    "n_attending", "paper_me_layer", "error",
)  # fmt: skip


def _merge(jobs: Sequence[Job]) -> list[Result]:
    """Merge the jobs of a sweep over models: table 8, grouped by family, and the norm curves side by side."""
    import pandas as pd

    from experiments.runner.jobs import job_name
    from melens.analysis.emergence_norms import PAPER_COUNTS, compare_models, model_in_words
    from melens.report.result import Metrics, Result

    jobs = [job for job in jobs if job.result["experiment"] in ("emergence", "all")]
    if not jobs:
        return []
    swept = dict.fromkeys(key for job in jobs for key in job.swept)
    times = Counter(job.model for job in jobs)
    rows: list[dict[Any, Any]] = []
    norms, me_layers = {}, {}
    for job in jobs:
        if not job.is_ok:
            family = job.result["config"]["model"].get("family")
            rows.append({"model": job.model, "family": family, "error": job.result["error"], **job.swept_in_words})
        elif (job.folder / "table8.parquet").is_file():  # else exp=all without this experiment
            rows.append(pd.read_parquet(job.folder / "table8.parquet").iloc[0].to_dict() | job.swept_in_words)
            label = job.model if times[job.model] == 1 else job.name
            norms[label] = pd.read_parquet(job.folder / "norm_by_block.parquet")
            me_layers[label] = None if pd.isna(rows[-1]["me_layer"]) else int(rows[-1]["me_layer"])
    table8 = pd.DataFrame(rows, columns=[*TABLE8[:1], *swept, *TABLE8[1:]])
    table8 = table8.sort_values("family", kind="stable").reset_index(drop=True)
    counts = ("n_layers", "formed", "n_states")
    table8 = table8.astype({name: "Int64" for name in TABLE8 if name.endswith("_layer") or name in counts})
    findings = []
    for row in table8.to_dict("records"):
        if pd.isna(row["error"]):
            findings.append((job_name(row["model"], {key: row[key] for key in swept}), model_in_words(row)))
    if table8["paper_me_layer"].notna().any():
        findings.append(("the paper's layer", PAPER_COUNTS))
    figures = {"norms_side_by_side": compare_models(norms, me_layers, list(times))} if norms else {}
    return [Result("table 8: the ME layer", {}, Metrics(), {"table8": table8}, figures, findings)]


EXPERIMENTS = (Experiment("emergence", EmergenceOptions, _run, _probes, merge=_merge),)
