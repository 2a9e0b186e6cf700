"""The command line: from what was typed to an exit code.

1. `prepare_command` writes what was typed as Hydra reads it; `check_command` refuses a wrong option in a sentence.
2. Hydra composes `conf/` and calls `main` for the run, or for each job of a sweep.
3. `main` checks the job's options, warns of those that change nothing, and runs it (`run_job`).
4. An error is printed as a sentence, and decides the exit code.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.options import read_options
from experiments.options.command_line import check_command, prepare_command
from experiments.options.help import help_text
from experiments.options.reading import CONF, OptionError, compose_options, said_options
from experiments.options.unused import unused_options
from experiments.runner.interrupts import INTERRUPTED, restore_signals
from experiments.runner.locks import locked_job_folder
from experiments.runner.refusals import nothing_left_if_refused
from experiments.runner.registry import EXPERIMENTS
from experiments.runner.sweep import failed_jobs
from melens.environment.versions import warn_untried
from melens.errors import MelensError

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print, and `print_error` prints it
_failures: list[Exception] = []
_printed_warnings: set[str] = set()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    """Run one job. An error is printed here, and in a sweep written beside the results: the other jobs go on."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    _printed_warnings.clear()
    try:
        with locked_job_folder(folder):
            _run(cfg, folder)
    except (MelensError, OSError) as error:  # another run has the folder, and may have a result there
        _failures.append(error)
        print_error(error, verbose=_is_verbose(cfg))


def _run(cfg: DictConfig, folder: Path) -> None:
    hydra_cfg = HydraConfig.get()
    config: Any = OmegaConf.to_container(cfg)
    typed = hydra_cfg.overrides.task
    config |= said_options(config, typed)
    try:
        with nothing_left_if_refused(folder):
            options = read_options(cfg, typed)
            config = options.plain()
            for sentence in unused_options(options):
                print(f"Warning: {sentence}", file=sys.stderr)
            if not os.access(folder, os.W_OK):
                raise MelensError(f"The output folder {folder} cannot be written to.")
            if not sys.stdout.isatty():  # where nothing else shows that something is done
                logging.getLogger(__name__).info("loading torch, transformers and TransformerLens")
            with _importing():
                from experiments.runner.gpus import take_gpu  # takes seconds, which a mistake need not

                take_gpu(options.model)  # before any library starts CUDA
                from experiments.runner.job import run_job

        restore_signals()
        if failed := run_job(options, folder):
            _failures.append(MelensError(f"exp={', '.join(failed)} failed; the other results are written."))
    except Exception as error:
        _failures.append(error)
        message = print_error(error, verbose=_is_verbose(cfg))
        if hydra_cfg.mode == RunMode.MULTIRUN:
            from melens.report.record import write_failure

            write_failure(message, folder, config=config)


def _is_verbose(cfg: DictConfig) -> bool:
    return bool(HydraConfig.get().verbose or cfg.get("verbose"))


@contextmanager
def _importing() -> Iterator[None]:
    """Leave what is imported, and stays, out of Python's search for garbage, now and in the run.

    To go through a million objects again and again takes a third of the import, and a second and a half of a run.
    """
    if "experiments.runner.job" in sys.modules:  # what an earlier job of a sweep left behind must not stay
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # else nanobind, of Triton, takes what is left at the end for leaks and says so
        gc.enable()


def print_error(error: BaseException, *, verbose: bool) -> str:
    """Print an error in a sentence, with its traceback for those who want it or where it is no user's mistake."""
    expected = (MelensError, HydraException, OmegaConfBaseException, OSError)
    if verbose or not isinstance(error, expected):
        traceback.print_exception(error)
    message = str(error) if isinstance(error, expected) else f"{type(error).__name__}: {error}"
    message = _ADVICE.sub("", message)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}."
    print(f"Error: {message}", file=sys.stderr)
    return message


def _print_warning(message: Warning | str, *_: Any, **more: Any) -> None:
    """Print a warning, once in a job: Python forgets what it has said when a library changes its filters."""
    if (sentence := str(message)) not in _printed_warnings:
        _printed_warnings.add(sentence)
        print(f"Warning: {sentence}", file=sys.stderr)


_ADVICE = re.compile(r"\n?To append to your .* use \+.*")
"""Hydra's, for options of its own that do not exist: with a plus they would do nothing."""


def _print_and_let_go(text: str) -> None:
    """Print a text, of which the reader may have enough before its end (`--help | head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end


def _without_model(arguments: Sequence[str]) -> str | None:
    """Do what takes no model, where that is all that was typed, and return what to print."""
    chosen = next((argument for argument in arguments if argument.startswith("exp=")), "")
    experiment = EXPERIMENTS.get(chosen.removeprefix("exp="))
    if experiment is None or experiment.without_model is None:
        return None
    if any(not argument.lstrip("+").startswith(("exp=", "exp.")) for argument in arguments):
        return None  # and its `request` refuses that
    return experiment.without_model(compose_options(*arguments).exp)


def run_command() -> int:
    """Run what was typed, and return the exit code: 2 for a wrong option, 1 for any other error."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        _print_and_let_go(help_text())
        return 0
    logging.raiseExceptions = False  # a screen that nobody reads any more, as of `| head`, is no mistake
    warnings.showwarning = _print_warning
    if int(os.environ.get("RANK", "0")) > 0:  # of processes that accelerate starts, the first alone writes and talks
        warn_untried(lambda sentence: None)
        nowhere = tempfile.mkdtemp(prefix="melens-")
        sys.argv += [f"hydra.run.dir={nowhere}", "hydra.output_subdir=null", "hydra/job_logging=none"]
    warn_untried(lambda sentence: print(f"Warning: {sentence}", file=sys.stderr))
    try:
        sys.argv[1:] = prepare_command(sys.argv[1:])
        if (text := _without_model(sys.argv[1:])) is not None:
            _print_and_let_go(text)
            return 0
        check_command(sys.argv[1:])
        main()
    except KeyboardInterrupt as interrupt:
        print(f"Interrupted: {str(interrupt) or 'no result was written.'}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # before any job: a wrong option, or no place for the output
        print_error(error, verbose=any(argument.endswith("verbose=true") for argument in sys.argv))
        _failures.insert(0, error)
    if not _failures:
        return 1 if failed_jobs else 0
    return 2 if isinstance(_failures[0], OptionError | HydraException | OmegaConfBaseException) else 1
