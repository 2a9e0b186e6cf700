"""`exp=tables`: the paper's tables with their trainings. What is trained and scored is kept, and not done twice.

1. `prepare` loads all data, and estimates the memory, before the model.
2. `TableRows` trains what is not in the user's cache, and scores every model under its masks.
3. `melens.benchmarks.training_table` compares the rows.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.benchmark import check_request
from experiments.runner.declaration import Experiment, ExperimentOptions
from experiments.training import model_options, prepare_training
from melens.validation.types import Flag

if TYPE_CHECKING:
    from experiments.options.schema import Options
    from experiments.options.table import TableRequest
    from experiments.runner.study import Run
    from melens.models.loading import PlannedModel
    from melens.report.result import Result

__all__ = ["EXPERIMENTS"]


class TablesOptions(ExperimentOptions):
    name: Literal["tables"]
    keep: Flag
    report: Flag


def _request(cfg: Options) -> TableRequest:
    from experiments.options.table import table_request  # which needs the registry, and that this module

    return table_request(cfg)


def prepare(cfg: Options, folder: Path, planned: PlannedModel) -> TableRequest:
    """Load all data before the model, and estimate the memory.

    Raises:
        MelensError: as `check_request` and `prepare_training`; a cache that cannot be written to.
    """
    from experiments.runner.progress import log_line
    from melens.benchmarks.scores import LEAST_TRAININGS
    from melens.errors import MelensError
    from melens.storage.cache import cache_folder

    kept_in = cache_folder() / "trainings"
    with suppress(OSError):
        kept_in.mkdir(parents=True, exist_ok=True)
    if not os.access(kept_in, os.W_OK):  # the table's rows are read from there
        raise MelensError(
            f"exp=tables keeps trained models in {kept_in}, which cannot be written to. Set MELENS_CACHE to another "
            "folder."
        )
    request: TableRequest = cfg.requests["tables"]
    if (n_seeds := len(request.seeds)) < LEAST_TRAININGS:
        log_line(
            f"The table will have no verdicts: they take {LEAST_TRAININGS} seeds, and training.seed gives {n_seeds}. "
            "Give more, as training.seed=[0,1,2]; what is trained now is kept and counts among them."
        )
    sets = []
    for own in request.sets:
        check_request(own.benchmarks, own.options, planned)
        sets.append(replace(own, training=prepare_training(own.options, own.training, planned.tokenizer)))
    return replace(request, sets=tuple(sets))


def run(run: Run, options: TablesOptions) -> Result:
    """Train what is missing, score every row, and compare the rows."""
    import pandas as pd

    from experiments.runner.table_rows import TableRows
    from melens.benchmarks.comparison import describe_requests
    from melens.benchmarks.training_table import ScoredSet, training_table

    request: TableRequest = run.prepared["tables"]
    scored, histories = [], []
    for own in request.sets:
        rows = TableRows(run, request, own)
        items = pd.concat(list(rows.items()), ignore_index=True)
        asked = own.benchmarks
        requests = describe_requests(asked.benchmarks, asked.options, rows.chat, asked.masked_blocks)
        scored.append(ScoredSet(own.dataset, items, rows.label(request.method.upper()), requests, rows.chat))
        histories += rows.histories
    return training_table(run, request.number, request.method, scored, histories, left_out=request.left_out)


EXPERIMENTS = (
    Experiment(
        "tables",
        TablesOptions,
        run,
        nodes=("wemask", "benchmark", "data", "training", "table"),
        request=_request,
        masks=lambda cfg: {"paper": cfg.wemask.model_copy(update={"rate": list(cfg.requests["tables"].rates)})},
        prepare=prepare,
        model_options=lambda cfg: model_options(cfg, cfg.requests["tables"].sets[0].training.plan),
        in_all=False,
    ),
)
