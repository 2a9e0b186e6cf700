"""One job: a model, its prompts, the experiments that were asked for, and what they leave."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.benchmark import load_tasks
from experiments.generate import check_chat
from experiments.options import Options
from experiments.options.masks_asked import mask_in_words, masks_asked
from experiments.study import begin_study, run_experiments
from experiments.tables import prepare_table
from experiments.training import model_options, prepare_training
from melens import load_model, load_prompts
from melens.prompts import choose_prompts
from melens.report import write_report
from melens.results import combine, show_result, write_result
from melens.training.recipe import METHODS

__all__ = ["run_job"]


def run_job(cfg: Options, folder: Path) -> list[str]:
    """Load model and prompts, run the experiments, write and show their result.

    Args:
        cfg: with its options checked.
        folder: where the result goes.

    Returns:
        The names of experiments that failed where others did not.
    """
    start = time.perf_counter()
    give_freed_memory_back()
    if cfg.png:
        logging.getLogger("choreographer").setLevel(logging.WARNING)  # it tells of every temporary folder
    masks = masks_asked(cfg)
    config = cfg.plain() | {"masks": {name: mask.model_dump() for name, mask in masks.items()}}
    if "benchmark" in cfg.experiments:
        load_tasks(cfg)
    if "generate" in cfg.experiments:
        check_chat(cfg)
    if cfg.exp.name in METHODS:
        folder = shared_folder(folder)
        config["model"] = model_options(cfg, prepare_training(cfg, cfg.exp.name, folder=folder))
    if cfg.exp.name == "tables":
        config["model"] = model_options(cfg, prepare_table(cfg))
    prompts = load_prompts(cfg.prompts.file, cfg.prompts.tasks)
    console = Console(quiet=not is_first_process())
    for name, mask in masks.items():
        console.print(f"mask {name}: {mask_in_words(mask)}", markup=False, highlight=False)
    with console.status(escape(f"Loading {cfg.model.name}")):
        model = load_model(**config["model"])
    with _stages(console) as stage:
        given = cfg.prompts
        chosen = choose_prompts(
            model, prompts, bos=given.bos, max_tokens=given.max_tokens, are_own=given.file is None, seed=cfg.seed
        )
        study = begin_study(model, chosen, cfg, stage, folder)
        results = run_experiments(study)
    result = results[0] if len(results) == 1 else combine(results)
    if not is_first_process():
        return []
    paths = write_result(result, folder, config=config, duration=time.perf_counter() - start, png=cfg.png)
    if len(results) > 1 or cfg.exp.has_report:
        paths.append(write_report(combine(results), folder, command=" ".join(["python", *sys.argv])))
    show_result(result, paths, console)
    return [part.experiment for part in results if part.metrics.get("failed")]


def give_freed_memory_back() -> None:
    """Let glibc return large freed blocks to the system: else small results that lie between them pin gigabytes."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold = -3
        libc.mallopt(mmap_threshold, 4 * 2**20)


def is_first_process() -> bool:
    """Tell whether this is the process that writes and talks, of those that accelerate may have started."""
    return int(os.environ.get("RANK", "0")) == 0


def shared_folder(folder: Path) -> Path:
    """Return the first process's folder to all of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return folder
    PartialState(cpu=not torch.cuda.is_available())
    return Path(broadcast_object_list([str(folder)])[0])


@contextmanager
def _stages(console: Console) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Show a bar for each named stage of a run, for as long as the context lasts."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:

        def stage(name: str) -> Callable[[int, int], None]:
            bar = bars.add_task(name, total=None)
            return lambda done, total: bars.update(bar, completed=done, total=total)

        yield stage
