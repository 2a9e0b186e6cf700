"""One run: the study that its experiments share, from one trace, and the experiments one after the other."""

from __future__ import annotations

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
from melens.analysis.study import Stage, Study
from melens.data.prompts import TokenizedPrompts
from melens.models.devices import placement
from melens.report.result import Metrics, Result
from melens.storage.cache import RUN_CACHE, Store, code_version, hash_of, store_for, warn_if_not_cached
from melens.storage.results import load_cached, load_result, save_result
from melens.tracing.sites import Sites
from melens.tracing.trace import as_tokens
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
        _verify_at_once(model, probes)
    trace = _find_or_trace(model, tokenized, probes, cfg, stage)
    of_run = {"family": cfg.model.family, "placement": placement(model.original_model)}
    trace = replace(trace, model=trace.model | of_run)
    me = find_me_layer(trace, Criterion(**cfg.criterion.model_dump()))
    return Run(
        model, tokenized.tokens, trace, me, probes, cfg.max_batch_tokens, cfg.seed, stage,
        cfg=cfg, folder=folder, prepared=prepared or {},
    )  # fmt: skip


def _find_or_trace(
    model: TransformerBridge, prompts: TokenizedPrompts, probes: Sequence[Probe], cfg: Options, stage: Stage
) -> Trace:
    """Trace the prompts, or find the trace that an earlier run on them, or another job of a sweep, has kept."""

    def traced() -> Trace:
        progress = stage("tracing the prompts (tokens)")
        return melens.trace(model, prompts, probes, max_batch_tokens=cfg.max_batch_tokens, progress=progress)

    RUN_CACHE.has_trace, RUN_CACHE.found_trace = cfg.exp.is_kept, False
    if not cfg.exp.is_kept:
        return traced()
    of_probes = [[type(probe).__qualname__, vars(probe)] for probe in probes]
    decides = [model.cfg.model_name, prompts.tokens, prompts.prompts, cfg.max_batch_tokens, of_probes]
    folder = store_for("traces", model.original_model, *decides, code_version(_EXPERIMENTS)).folder
    trace = load_cached(folder, Trace.load)
    RUN_CACHE.found_trace = trace is not None
    if trace is None:
        trace = traced()
        with warn_if_not_cached():
            trace.save(folder, replace=False)  # another job, that was faster, has readers by now
    return trace


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
    if len(chosen) == 1:
        yield from (EXPERIMENTS[name].run(run, options) for name, options in chosen.items())
        return
    store = None
    if run.cfg.exp.is_kept:  # under all that every experiment depends on
        apart = ("exp", "figures", "given", "typed", "verbose")
        shared = {node: own for node, own in run.cfg.plain().items() if node not in apart}
        decides = [run.tokens, run.trace.prompts.to_dict("list"), shared, code_version(_EXPERIMENTS)]
        store = store_for("experiments", run.model.original_model, *decides, libraries=("plotly",))
    for name, options in chosen.items():
        ended = run.stage(f"exp={name}")
        result = _find_or_run(run, name, options, store)
        ended(1, 1)
        yield result


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
