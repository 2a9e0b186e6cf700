"""Run an experiment: `python experiments/run.py model=qwen3-4b exp=emergence` (add `-m` for a sweep)."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, we tell

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from experiments.study import begin_study, experiments_of, run_experiments
from melens.errors import MelensError
from melens.models import load_model
from melens.prompts import Bos, Prompt, load_prompts, random_tokens, tokenize
from melens.report import write_report
from melens.results import check_png, combine, show_result, write_failure, write_result

FAILED, WRONG_OPTION = 1, 2
_failures: list[Exception] = []


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Run one job; what goes wrong is told here, and in a sweep recorded, so that it does not end the others."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    try:
        run_job(cfg, folder)
    except Exception as error:
        _failures.append(error)
        message = tell(error, verbose=bool(hydra_cfg.verbose))
        if hydra_cfg.mode == RunMode.MULTIRUN:
            write_failure(message, folder, config=OmegaConf.to_container(cfg))


def run_job(cfg: DictConfig, folder: Path) -> None:
    """Load model and prompts, run the experiment, write and show its result."""
    start = time.perf_counter()
    check_options(cfg)
    give_freed_memory_back()
    if not os.access(folder, os.W_OK):
        raise MelensError(f"The output folder {folder} cannot be written to.")
    if cfg.png:
        check_png()
        logging.getLogger("choreographer").setLevel(logging.WARNING)  # it tells of every temporary folder
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)
    prompts = load_prompts(cfg.prompts.file, cfg.prompts.tasks)
    console = Console()
    with console.status(f"Loading {cfg.model.name}"):
        model = load_model(**config["model"])
    with _stages(console) as stage:
        study = begin_study(model, choose_prompts(model, prompts, cfg), cfg, stage)
        results = run_experiments(study)
    result = results[0] if len(results) == 1 else combine(results)
    paths = write_result(result, folder, config=config, duration=time.perf_counter() - start, png=cfg.png)
    if len(results) > 1:
        paths.append(write_report(result, folder, command=" ".join(["python", *sys.argv])))
    show_result(result, paths, console)
    if failed := [part.experiment for part in results if part.metrics.get("failed")]:
        _failures.append(RuntimeError(f"exp={', '.join(failed)} failed"))


def give_freed_memory_back() -> None:
    """Let glibc return large freed blocks to the system: else small results that lie between them pin gigabytes."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold = -3
        libc.mallopt(mmap_threshold, 4 * 2**20)


@contextmanager
def _stages(console: Console) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Show a bar for each named stage of a run, for as long as the context lasts."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:

        def stage(name: str) -> Callable[[int, int], None]:
            bar = bars.add_task(name, total=None)
            return lambda done, total: bars.update(bar, completed=done, total=total)

        yield stage


OPTIONS = {
    "max_batch_tokens": (int, "a whole number"),
    "seed": (int, "a whole number"),
    "png": (bool, "true or false"),
    "prompts.max_tokens": (int, "a whole number or null"),
    "model.seed": (int, "a whole number"),
}


def check_options(cfg: DictConfig) -> None:
    """Check the options that Hydra knows only as some value, and let `prompts.bos` and `.tasks` be given plainly."""
    for key, (kind, allowed) in OPTIONS.items():
        value = OmegaConf.select(cfg, key)
        may_be_absent = "." in key
        wrong_kind = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
        if (value is None and not may_be_absent) or (value is not None and (wrong_kind or (kind is int and value < 0))):
            raise MelensError(f"{key} is {value!r}; it must be {allowed}.")
    if len(cfg.exp.get("experiments", [""])) == 0:
        raise MelensError("exp.experiments is empty; it must name at least one experiment.")
    for name in cfg.exp.get("experiments", []):
        if not OmegaConf.is_dict(cfg.exp.get(name)):
            allowed = ", ".join(str(key) for key, value in cfg.exp.items() if OmegaConf.is_dict(value))
            raise MelensError(f"exp.experiments names {name!r}; allowed are {allowed}.")
    for name, options in experiments_of(cfg).items():
        for key, value in options.items():
            check_experiment_option(name, str(key), value)
    cfg.prompts.bos = str(cfg.prompts.bos).lower()
    if cfg.prompts.bos not in get_args(Bos):
        raise MelensError(f"prompts.bos is {cfg.prompts.bos!r}; allowed are {', '.join(get_args(Bos))}.")
    if isinstance(cfg.prompts.tasks, str):
        cfg.prompts.tasks = [cfg.prompts.tasks]


LEAST = {
    "top_dims": 1, "map_tokens": 2, "rank_tokens": 2, "rank_prompts": 1, "max_position": 1, "n_prompts": 1,
    "max_tokens": 2, "n_first_tokens": 1,
}  # fmt: skip


def check_experiment_option(experiment: str, key: str, value: Any) -> None:
    """Check an option of an experiment."""
    if key == "log_scale" and not isinstance(value, bool):
        raise MelensError(f"exp.{key} of {experiment} is {value!r}; it must be true or false.")
    if key in LEAST and not (isinstance(value, int) and not isinstance(value, bool) and value >= LEAST[key]):
        raise MelensError(
            f"exp.{key} of {experiment} is {value!r}; it must be a whole number of at least {LEAST[key]}."
        )
    shares = {"top_share": [value], "other_shares": value}.get(key, [])
    if not all(isinstance(share, float | int) and 0 < share <= 1 for share in shares):
        raise MelensError(f"exp.{key} of {experiment} is {value}; a share of the width is over 0 and at most 1.")
    if key == "length_bins" and not (all(isinstance(n, int) and n > 0 for n in value) and value == sorted(set(value))):
        raise MelensError(f"exp.{key} of {experiment} is {value}; it must be rising whole numbers of tokens.")


def choose_prompts(model: Any, prompts: list[Prompt], cfg: DictConfig) -> list[Prompt] | list[Tensor]:
    """Keep the prompts of the wanted length; a model without a tokenizer gets random tokens in their place."""
    if model.tokenizer is None:
        n_prompts, n_tokens = min(len(prompts), model.cfg.d_vocab), min(128, model.cfg.n_ctx)
        return random_tokens(n_prompts, n_tokens, model.cfg.d_vocab, seed=cfg.seed)
    lengths = [len(tokens) for tokens in tokenize(model, prompts, bos=cfg.prompts.bos)]
    most = cfg.prompts.max_tokens or max(lengths)
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= most]
    if not kept:
        raise MelensError(f"prompts.max_tokens is {most}, but the shortest prompt has {min(lengths)} tokens.")
    return kept


def tell(error: BaseException, *, verbose: bool) -> str:
    """Print an error in a sentence, with its traceback for those who want it or where it is no user's mistake."""
    expected = (MelensError, HydraException, OmegaConfBaseException, OSError)
    if verbose or not isinstance(error, expected):
        traceback.print_exception(error)
    message = str(error) if isinstance(error, expected) else f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}."
    print(f"Error: {message}", file=sys.stderr)
    return message


def exit_code(error: BaseException) -> int:
    """Return 2 for a wrong option, 1 for anything else."""
    return WRONG_OPTION if isinstance(error, HydraException | OmegaConfBaseException) else FAILED


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted: no result was written.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # before any job: a wrong option, or no place for the output
        tell(error, verbose="hydra.verbose=true" in sys.argv)
        sys.exit(exit_code(error))
    sys.exit(exit_code(_failures[0]) if _failures else 0)
