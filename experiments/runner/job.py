"""One job: a model, its prompts, the experiments that are asked for, and what they write.

1. The model is planned from its config and tokenizer. The prompts, the masks and what each experiment's `prepare`
   checks are held against the plan: a run that is refused here leaves nothing behind.
2. The weights are loaded, and `begin_study` traces the prompts once for all experiments.
3. Each experiment runs on that study; its result is judged and written as it ends.
4. The terminal shows findings, verdicts and paths.

Nothing here depends on an experiment's name: what differs is a field of `Experiment`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from experiments.options import Options
from experiments.options.masks import mask_in_words, masks_in_use
from experiments.runner.interrupts import sigterm_interrupts
from experiments.runner.locks import locked_folder
from experiments.runner.masks import check_masks
from experiments.runner.processes import is_first_process, shared_folder
from experiments.runner.progress import show_stages
from experiments.runner.refusals import nothing_left_if_refused
from experiments.runner.registry import EXPERIMENTS
from experiments.runner.study import begin_study, run_experiments
from experiments.runner.writing import finish, note_if_stopped, write_part
from melens import load_prompts
from melens.analysis.study import Stage
from melens.data.prompts import TokenizedPrompts, choose_prompts
from melens.models.loading import PlannedModel, plan_model
from melens.report.record import Record
from melens.report.terminal import show_claims, show_findings, show_paths
from melens.storage.cache import RUN_CACHE

__all__ = ["run_job"]


_LOG = logging.getLogger(__name__)
FEWEST = 3
"""First tokens, of which means have an interval (`melens.analysis.statistics`)."""


def run_job(cfg: Options, folder: Path) -> list[str]:
    """Load model and prompts, run the experiments, write and show what they find; return which of them failed."""
    began = time.perf_counter()
    give_freed_memory_back()
    transformers.utils.logging.disable_progress_bar()  # stages have their own
    if cfg.figures:
        for drawer in ("kaleido", "choreographer"):  # they log each step of each figure
            logging.getLogger(drawer).setLevel(logging.WARNING)
    masks = masks_in_use(cfg)
    config = cfg.plain() | {"masks": {name: mask.model_dump() for name, mask in masks.items()}}
    if any(EXPERIMENTS[name].trains for name in cfg.experiments):
        folder = shared_folder(folder)
    console = Console(quiet=not is_first_process())
    for name, mask in masks.items() if cfg.verbose else ():
        console.print(f"mask {name}: {mask_in_words(mask)}", markup=False, highlight=False)
    with sigterm_interrupts(), lock_resumed(cfg), show_stages(console) as stage:
        with nothing_left_if_refused(folder):
            for name in cfg.experiments:
                if (loaded_with := EXPERIMENTS[name].model_options) is not None:
                    config["model"] = loaded_with(cfg)
            planned = plan_model(**config["model"])
            chosen = _chosen_prompts(planned, cfg)
            if len(cfg.experiments) == 1:  # of several one may fail
                for mask in masks.values():
                    check_masks(mask, planned)
            prepared = _prepare(cfg, folder, planned, stage)
        record = Record(folder, config=config, experiments=list(cfg.experiments), images=cfg.figures, began=began)
        loaded = stage(f"loading {config['model']['name']}")
        model = planned.load()
        loaded(1, 1)
        with note_if_stopped(record, cfg):
            for part in run_experiments(begin_study(model, chosen, cfg, stage, folder, prepared)):
                write_part(record, part, cfg)
                give_freed_memory_back()
            ended = stage("writing the report")
            paths = finish(record, cfg)
            ended(1, 1)
    if not is_first_process():
        return []
    findings = [row for part in record.parts if part.metrics.not_applicable is None for row in part.findings]
    show_findings(_title(record), findings, console, verbose=cfg.verbose)
    for part in record.parts:
        if part.metrics.not_applicable is not None:
            (_, said), *_ = part.findings
            console.print(f"exp={part.experiment} {said}", markup=False, highlight=False)
    show_claims(record.claims, console, verbose=cfg.verbose)
    show_paths(paths, console, verbose=cfg.verbose)
    before = ["the trace"] * RUN_CACHE.found_trace
    before += [part.experiment for part in record.parts if part.metrics.measured_before]
    if before:
        console.print(f"Measured before, and kept: {', '.join(before)} (exp.keep=false measures anew).")
    return [part.experiment for part in record.parts if part.metrics.failed]


def _title(record: Record) -> str:
    layer = record.parts[0].metrics.me_layer
    return (
        f"{record.parts[0].model['name']}, exp={record.name}, ME layer: {'none' if layer is None else f'block {layer}'}"
    )


def _chosen_prompts(planned: PlannedModel, cfg: Options) -> TokenizedPrompts:
    prompts = load_prompts(cfg.prompts.file, cfg.prompts.tasks)
    bos, max_tokens = cfg.prompts.bos, cfg.prompts.max_tokens
    chosen = choose_prompts(planned, prompts, bos=bos, max_tokens=max_tokens, seed=cfg.seed)
    _warn_of_few(chosen, getattr(planned.tokenizer, "bos_token_id", None))
    return chosen


def _warn_of_few(chosen: TokenizedPrompts, bos_id: int | None) -> None:
    """Warn where prompts have too few first tokens for an interval, unless all begin with BOS, as some models need."""
    firsts = {int(ids[0]) for ids in chosen.tokens}
    if len(firsts) >= FEWEST or firsts == {bos_id}:
        return
    has = "a single first token" if len(firsts) == 1 else f"{len(firsts)} different first tokens"
    _LOG.warning(
        "The prompts have %s. Token 0 sees only itself, so most verdicts need prompts with at least %d: with fewer no "
        "mean has an interval, and no claim about it holds more than in part.", has, FEWEST,
    )  # fmt: skip


def _prepare(cfg: Options, folder: Path, planned: PlannedModel, stage: Stage) -> dict[str, Any]:
    """Return what each experiment that has a `prepare` prepares."""
    prepares = {name: prepare for name in cfg.experiments if (prepare := EXPERIMENTS[name].prepare) is not None}
    if not prepares:
        return {}
    loaded = stage("reading the data")
    prepared = {name: prepare(cfg, folder, planned) for name, prepare in prepares.items()}
    loaded(1, 1)
    return prepared


def lock_resumed(cfg: Options) -> AbstractContextManager[None]:
    """Keep other runs out of the folder of a training that is resumed; one without checkpoints is refused later."""
    folder = Path(os.path.expanduser(cfg.training.resume or ""))
    is_there = cfg.training.resume is not None and (folder / "checkpoints").is_dir()
    return locked_folder(folder) if is_there and is_first_process() else nullcontext()


def give_freed_memory_back() -> None:
    """Let freed memory go back to the system: else small results that lie between what is freed pin gigabytes.

    Large blocks then come anew from the system each time, which takes a fifth of a trace's time in small pages. By that
    variable PyTorch asks for huge ones.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_threshold = -3
        libc.mallopt(mmap_threshold, 2 * 2**20)
        libc.malloc_trim(0)
