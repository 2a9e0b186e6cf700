"""Run an experiment: `python experiments/run.py model=qwen3-4b exp=emergence` (add `-m` for a sweep)."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, we tell

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.options import check_options
from melens.errors import MelensError
from melens.versions import warn_untried

FAILED, WRONG_OPTION = 1, 2
_failures: list[Exception] = []


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Run one job; what goes wrong is told here, and in a sweep recorded, so that it does not end the others."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    try:
        check_options(cfg)
        if not os.access(folder, os.W_OK):
            raise MelensError(f"The output folder {folder} cannot be written to.")
        from experiments.job import run_job  # takes seconds, which a mistake need not

        if failed := run_job(cfg, folder):
            _failures.append(MelensError(f"exp={', '.join(failed)} failed; the other results are written."))
    except Exception as error:
        _failures.append(error)
        message = tell(error, verbose=bool(hydra_cfg.verbose))
        if hydra_cfg.mode == RunMode.MULTIRUN:
            from melens.results import write_failure

            write_failure(message, folder, config=OmegaConf.to_container(cfg))


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


def quiet_other_processes() -> None:
    """Of several processes that accelerate starts, only the first has a folder and talks."""
    if int(os.environ.get("RANK", "0")) > 0:
        warn_untried(lambda sentence: None)
        nowhere = tempfile.mkdtemp(prefix="melens-")
        sys.argv += [f"hydra.run.dir={nowhere}", "hydra.output_subdir=null", "hydra/job_logging=none"]


if __name__ == "__main__":
    quiet_other_processes()
    warn_untried(lambda sentence: print(f"Warning: {sentence}", file=sys.stderr))
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted: no result was written.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # before any job: a wrong option, or no place for the output
        tell(error, verbose="hydra.verbose=true" in sys.argv)
        sys.exit(exit_code(error))
    sys.exit(exit_code(_failures[0]) if _failures else 0)
