"""Merge what the jobs of a sweep (`-m`) left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class MergeSweep(Callback):
    """Runs once all jobs of a sweep have ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from experiments.merging import merge_jobs  # Hydra makes this object before it looks at the options

        merge_jobs(Path(config.hydra.sweep.dir))
