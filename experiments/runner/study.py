"""One run: the study that its experiments share, from one trace, and the experiments one after the other."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

import melens
from experiments.options.schema import Options
from experiments.runner.registry import EXPERIMENTS
from melens import Criterion, MelensError, Probe, Trace, default_probes, find_me_layer
from melens.analysis.study import Stage, Study, probe_key
from melens.data.prompts import TokenizedPrompts
from melens.models.devices import placement
from melens.report.result import Metrics, Result
from melens.storage.cache import RUN_CACHE, Store, code_version, hash_of, store_for, warn_if_not_cached
from melens.storage.results import load_cached, load_result, save_result
from melens.tracing.sites import Sites
from melens.tracing.trace import as_tokens
from melens.tracing.twin import how_run
from melens.tracing.verification import verified

__all__ = ["Run", "begin_study", "run_experiments"]

_EXPERIMENTS = Path(__file__).parents[1]


@dataclass(frozen=True, eq=False)
class Run(Study):
    """What an experiment of the command line works on: a study, with all options of the command.

    Attributes:
        cfg: the whole configuration; an experiment's own options come apart.
        folder: of the run, for what is too large to be a result.
        prepared: by experiment, what its `prepare` returned.
    """

    cfg: Options = field(kw_only=True)
    folder: Path = field(default=Path(), kw_only=True)
    prepared: Mapping[str, Any] = field(default_factory=dict, kw_only=True)


def begin_study(
    model: TransformerBridge,
    prompts: Any,
    cfg: Options,
    stage: Stage,
    folder: Path = Path(),
    prepared: Mapping[str, Any] | None = None,
) -> Run:
    """Trace all prompts once, with what every experiment of the run wants measured, and find the ME layer.

    Prompts are as `choose_prompts` returns them, or token ids; `stage` makes the progress callback of a named stage.
    """
    tokenized = as_tokens(model, prompts, cfg.prompts.bos)
    wanted = [probe for name, options in cfg.experiments.items() for probe in _probes(model, name, options)]
    probes = [*default_probes(model, min_abs=cfg.criterion.min_abs), *wanted]
    if len(cfg.experiments) > 1:
        checked = stage("comparing this kind of model with transformers")
        _verify_at_once(model, probes)
        checked(1, 1)
    trace = _find_or_trace(model, tokenized, probes, cfg, stage)
    of_run = {"family": cfg.model.family, "placement": placement(model.original_model)}
    trace = replace(trace, model=trace.model | of_run)
    found = stage("finding the ME layer")
    me = find_me_layer(trace, Criterion(**cfg.criterion.model_dump()))
    found(1, 1)
    return Run(
        model, tokenized.tokens, trace, me, probes, cfg.max_batch_tokens, cfg.seed, stage,
        cfg=cfg, folder=folder, prepared=prepared or {},
    )  # fmt: skip


def _find_or_trace(
    model: TransformerBridge, prompts: TokenizedPrompts, probes: Sequence[Probe], cfg: Options, stage: Stage
) -> Trace:
    """Trace the prompts, or find a trace that an earlier run on them, or another job of a sweep, has kept."""

    def traced() -> Trace:
        progress = stage("tracing the prompts (tokens)")
        return melens.trace(model, prompts, probes, max_batch_tokens=cfg.max_batch_tokens, progress=progress)

    RUN_CACHE.has_trace, RUN_CACHE.found_trace = cfg.exp.is_kept, False
    if not cfg.exp.is_kept:
        return traced()
    decides = [model.cfg.model_name, prompts.tokens, prompts.prompts, cfg.max_batch_tokens]
    store = store_for("traces", model.original_model, *decides, code_version(_EXPERIMENTS))
    trace = _kept_trace(model, probes, store)
    RUN_CACHE.found_trace = trace is not None
    if trace is None:
        trace = traced()
        listed = _listed(probes)
        name = hash_of(sorted(listed))[:24]
        with warn_if_not_cached():
            trace.save(store.folder / name, replace=False)  # another job, that was faster, has readers by now
            store.save_text(name, json.dumps(listed))
    return trace


def _kept_trace(model: TransformerBridge, probes: Sequence[Probe], store: Store) -> Trace | None:
    """Find a trace that holds at least these probes; what else it holds is left out.

    One that holds more is taken only if the further probes changed nothing about how the model was run.
    """
    wanted, names = _listed(probes), [probe.name for probe in probes]
    for path in sorted(store.folder.glob("*.json"), key=lambda path: path.stat().st_size):
        listed: _Listed = {}
        with suppress(ValueError):  # of a damaged file
            listed = json.loads(store.load_text(path.stem) or "{}")
        if not wanted.keys() <= listed.keys():
            continue
        trace = load_cached(path.with_suffix(""), Trace.load)
        if trace is not None and (len(listed) == len(wanted) or _is_run_alike(model, wanted, listed, trace)):
            tables = {name: trace.tables[name] for name in names if name in trace.tables}
            tensors = {name: trace.tensors[name] for name in names if name in trace.tensors}
            return replace(trace, tables=tables, tensors=tensors)
    return None


_Listed = Mapping[str, Mapping[str, list[Any]]]
"""Sites and keys of each probe, by what names it."""


def _listed(probes: Sequence[Probe]) -> _Listed:
    return {probe_key(probe): {"sites": list(probe.sites), "keys": list(probe.keys)} for probe in probes}


def _is_run_alike(model: TransformerBridge, wanted: _Listed, listed: _Listed, trace: Trace) -> bool:
    """Tell whether the model would be run for the wanted probes alone as it was for all."""
    checked = trace.model["verified"]
    if checked["way"] != "fast" or checked["prompts_share_passes"]["alone"]:
        return False  # perhaps for a place that the wanted ones do not need
    keys = [{key for probe in each.values() for key in probe["keys"]} for each in (wanted, listed)]
    sites = [{site for probe in each.values() for site in probe["sites"]} for each in (wanted, listed)]
    return keys[0] == keys[1] and how_run(model, sites[0]) == how_run(model, sites[1])


def _verify_at_once(model: TransformerBridge, probes: Sequence[Probe]) -> None:
    """Check all places that the experiments measure at once: each check on its own would build a bridge for itself."""
    sites = Sites.of(model)
    wanted = [*(site for probe in probes for site in probe.sites), *(site for site in _LATER if sites.find(site))]
    with suppress(MelensError):  # each then asks for its own sites, of which not all need be wrong
        verified(model, wanted)


_LATER = ("attn.hook_pattern", "attn.k.hook_out", "attn.q.hook_out", "hook_resid_post", "ln1.hook_out")
"""Sites of the passes that some experiments take after the one that all share."""


def _probes(model: TransformerBridge, name: str, options: Any) -> list[Probe]:
    wanted = EXPERIMENTS[name].probes
    try:
        return wanted(model, options) if wanted is not None else []
    except Exception:  # it does not apply or is broken, which its run will say
        return []


def run_experiments(run: Run) -> Iterator[Result]:
    """Run every experiment of the configuration, and yield what each found as it ends.

    Of several, one that does not apply, or fails, has the reason in its metrics (`not_applicable`). The results of
    several are kept, so that a run that was stopped goes on with the next.
    """
    chosen = run.cfg.experiments
    of_several, store = len(chosen) > 1, None
    if of_several and run.cfg.exp.is_kept:  # under all that every experiment depends on
        apart = ("exp", "figures", "given", "typed", "verbose")
        shared = {node: own for node, own in run.cfg.plain().items() if node not in apart}
        decides = [run.tokens, run.trace.prompts.to_dict("list"), shared, code_version(_EXPERIMENTS)]
        store = store_for("experiments", run.model.original_model, *decides, libraries=("plotly",))
    for name, options in chosen.items():
        ended = run.stage(f"exp={name}")
        result = _find_or_run(run, name, options, store) if of_several else EXPERIMENTS[name].run(run, options)
        yield result
        ended(1, 1)  # once it is written


def _find_or_run(run: Run, name: str, options: Any, store: Store | None) -> Result:
    reads_files = bool(EXPERIMENTS[name].nodes)  # it keeps its own parts, under what is in them
    if store is None or reads_files or not options.is_kept:
        return _run_one_of_several(run, name, options)
    folder = store.folder / f"{name}-{hash_of(options.model_dump())[:24]}"
    found = load_cached(folder, load_result)
    if found is not None:
        metrics = found.metrics.model_copy(update={"measured_before": True})
        return replace(found, model=run.trace.model, metrics=metrics)
    result = _run_one_of_several(run, name, options)
    if result.metrics.not_applicable is None:
        with warn_if_not_cached():
            save_result(result, folder)
    return result


def _run_one_of_several(run: Run, name: str, options: Any) -> Result:
    try:
        return EXPERIMENTS[name].run(run, options).draw()  # here, where a mistake in a figure costs this one alone
    except MelensError as error:
        metrics, finding = run.metrics(Metrics, not_applicable=str(error)), f"does not apply: {error}"
    except Exception as error:  # a mistake of ours should not cost the user the other experiments
        logging.getLogger(__name__).exception("exp=%s failed", name)
        finding = f"failed with {type(error).__name__}: {error}"
        metrics = run.metrics(Metrics, not_applicable=f"It {finding}", failed=True)
    return Result(name, run.trace.model, metrics, findings=[(name, finding)])
