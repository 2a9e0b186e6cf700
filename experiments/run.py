"""Run an experiment: `python experiments/run.py model=qwen3-4b exp=emergence` (add `-m` for a sweep)."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, who tell them in a sentence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from melens.errors import MelensError

FAILED, WRONG_OPTION = 1, 2
_failures: list[str] = []


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Run one job; in a sweep a job that fails is recorded and does not end the others."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    if hydra_cfg.mode == RunMode.RUN:
        run_job(cfg, folder)
        return
    try:
        run_job(cfg, folder)
    except Exception as error:
        from melens.results import write_failure

        _failures.append(tell(error, verbose=bool(hydra_cfg.verbose)))
        write_failure(_failures[-1], folder, config=OmegaConf.to_container(cfg, resolve=True))


def run_job(cfg: DictConfig, folder: Path) -> None:
    """Load model and prompts, run the experiment, write and show its result."""
    start = time.perf_counter()
    if not os.access(folder, os.W_OK):
        raise MelensError(f"The output folder {folder} cannot be written to.")
    from melens.models import load_model
    from melens.prompts import load_prompts
    from melens.results import write_result

    experiment = importlib.import_module(f"experiments.{cfg.exp.name}")
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)
    prompts = load_prompts(cfg.prompts.file, cfg.prompts.tasks)
    console = Console()
    with console.status(f"Loading {cfg.model.name}"):
        model = load_model(**config["model"])
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        bar = bars.add_task(f"{cfg.exp.name}: tokens", total=None)
        result = experiment.run(
            model,
            choose_prompts(model, prompts, cfg),
            cfg,
            lambda done, total: bars.update(bar, completed=done, total=total),
        )
    paths = write_result(result, folder, config=config, duration=time.perf_counter() - start)
    show(result, paths, console)


def choose_prompts(model: Any, prompts: list[Any], cfg: DictConfig) -> list[Any]:
    """Keep the prompts of the wanted length; a model without a tokenizer gets random tokens in their place."""
    from melens.prompts import random_tokens, tokenize

    if model.tokenizer is None:
        return random_tokens(len(prompts), 128, model.cfg.d_vocab, seed=cfg.seed)
    lengths = [len(tokens) for tokens in tokenize(model, prompts, bos=cfg.prompts.bos)]
    most = cfg.prompts.max_tokens or max(lengths)
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= most]
    if not kept:
        raise MelensError(f"prompts.max_tokens is {most}, but the shortest prompt has {min(lengths)} tokens.")
    return kept


def show(result: Any, paths: list[Path], console: Console) -> None:
    """Print a short table of the findings, the verdicts and the paths."""
    table = Table(show_header=False, title=f"{result.experiment}")
    for row in result.findings:
        table.add_row(*row)
    console.print(table)
    colors = {"holds": "green", "does not hold": "red", "not testable": "yellow"}
    for claim in result.claims:
        console.print(f"[{colors[claim.verdict]}]{claim.verdict:>13}[/]  {claim.claim} ({claim.source})")
    console.print("Written:", *(str(path) for path in paths), sep="\n  ")


def tell(error: BaseException, *, verbose: bool) -> str:
    """Print an error in a sentence, with its traceback for those who want it or where it is no user's mistake."""
    if verbose or not isinstance(error, MelensError | HydraException | OmegaConfBaseException | OSError):
        traceback.print_exception(error)
    message = str(error) if isinstance(error, MelensError) else f"{type(error).__name__}: {error}"
    print(f"Error: {message}", file=sys.stderr)
    return message


if __name__ == "__main__":
    verbose = any(argument.lower() in ("hydra.verbose=true", "hydra.verbose=1") for argument in sys.argv)
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted: nothing was written.", file=sys.stderr)
        sys.exit(130)
    except (HydraException, OmegaConfBaseException) as error:
        if verbose:
            traceback.print_exception(error)
        print(error, file=sys.stderr)
        sys.exit(WRONG_OPTION)
    except Exception as error:
        tell(error, verbose=verbose)
        sys.exit(FAILED)
    sys.exit(FAILED if _failures else 0)
