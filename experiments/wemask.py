"""`exp=wemask`: what masks do to loss, predictions, sinks and token 0, over the grid that the node `wemask` spans."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from experiments.runner.declaration import AtLeast2, Experiment, ExperimentOptions
from melens.validation.types import Count, Flag, Said, Whole

if TYPE_CHECKING:
    from experiments.options.schema import MaskOptions, Options
    from experiments.runner.jobs import Job
    from experiments.runner.study import Run
    from melens.models.loading import PlannedModel
    from melens.report.result import Result

__all__ = ["EXPERIMENTS", "chosen_mask", "merge"]


class WemaskOptions(ExperimentOptions):
    """The arguments of `melens.analysis.mask_grid`, but for masks and texts."""

    name: Literal["wemask"]
    texts_per_batch: Count
    map_tokens: AtLeast2
    patterns: Annotated[Literal["drawn", "all", "none"], Said("drawn, all or none")]
    tie_draws: Whole
    keep: Flag


def _prepare(cfg: Options, folder: Path, planned: PlannedModel) -> None:
    """Try the texts on the model's tokenizer and context."""
    from experiments.runner.texts import texts_of

    texts_of(cfg, planned)


def _run(run: Run, options: WemaskOptions) -> Result:
    from experiments.runner.masks import masks_of
    from experiments.runner.texts import texts_of
    from melens.analysis import mask_grid

    masks = [mask for mask in masks_of(run.cfg.wemask, run.me, run.model) if mask is not None]
    texts, text = texts_of(run.cfg, run.model), run.cfg.data.text or "pydoc_data.topics"
    return mask_grid(run, masks, texts, text=text, **options.own)


def chosen_mask(cfg: Options) -> dict[str, MaskOptions]:
    """Return the masks of the node `wemask`, by the name of its preset."""
    return {str(cfg.given.get("wemask", "paper")): cfg.wemask}


# --- Over a sweep -----------------------------------------------------------------------------------------------------

_TEXTS = ("text", "texts", "tokens_per_text")
_OF_MODEL = (
    "me_layer", "formed", "n_prompts", "distinct_first_tokens", "massive_position", "n_carriers", "last_lasting_layer",
    "text_first_tokens", "sink_layers", "next_attention",
)  # fmt: skip


def merge(jobs: Sequence[Job]) -> list[Result]:
    """Put what a sweep's jobs measured together: a `Result` for each model and text, as one job would have given.

    Of several, tables and figures have the model's name behind theirs, and the size of its text if there are two.
    Jobs that differ in any other option than their masks, as in dtype or seed, are not of one grid.
    """
    from melens.storage.cache import hash_of

    alike: dict[str, list[Job]] = {}
    for job in jobs:
        if job.result["experiment"] == "wemask" and job.is_ok:
            options = {
                name: node for name, node in job.result["config"].items() if name not in ("wemask", "masks", "given")
            }
            same = hash_of(job.result["model"], [job.result["metrics"][name] for name in _TEXTS], options)
            alike.setdefault(same, []).append(job)
    merged: list[Result] = []
    named: set[tuple[Any, ...]] = set()
    for of_grid in alike.values():
        first = of_grid[0]
        name = first.result["model"]["name"]
        if len(alike) > 1:  # as in another dtype
            name = first.named_by([key for key in first.swept if key.split(".")[0] != "wemask"])
        texts = tuple(first.result["metrics"][key] for key in _TEXTS)
        name += f" (job {first.folder.name})" if (name, *texts) in named else ""
        named.add((name, *texts))
        merged.append(_merged(of_grid, first.result["model"] | {"name": name}))
    if len(merged) == 1:
        return merged
    times = Counter(result.model["name"] for result in merged)
    for index, result in enumerate(merged):
        name, metrics = result.model["name"], result.metrics.plain()
        name += f"-{metrics['texts']}x{metrics['tokens_per_text']}" if times[name] > 1 else ""
        behind = re.sub(r"[^\w.=-]+", "-", name)
        tables = {f"{table}-{behind}": content for table, content in result.tables.items()}
        figures = {f"{figure}-{behind}": content for figure, content in result.figures.items()}
        merged[index] = replace(result, tables=tables, figures=figures)
    return merged


def _merged(jobs: Sequence[Job], model: dict[str, Any]) -> Result:
    """Compare the configurations of several jobs with the unmasked model that they share."""
    import pandas as pd

    from melens.masks.grid import ARGUMENTS, Grid, compare_grid
    from melens.masks.grid_metrics import MaskGridMetrics

    cells, by_text, by_block = (
        pd.concat([pd.read_parquet(job.folder / f"{name}.parquet") for job in jobs], ignore_index=True)
        for name in ("cells", "by_text", "by_block")
    )
    grid = Grid(
        cells[list(ARGUMENTS)].drop_duplicates("cell", ignore_index=True),
        by_text.drop_duplicates(["cell", "text"], ignore_index=True),
        by_block.drop_duplicates(["cell", "layer"], ignore_index=True),
    )
    shared = {name: value for name, value in jobs[0].result["metrics"].items() if name in (*_TEXTS, *_OF_MODEL)}
    return compare_grid(grid, model, MaskGridMetrics(**shared))


EXPERIMENTS = (
    Experiment(
        "wemask",
        WemaskOptions,
        _run,
        nodes=("wemask", "data"),
        masks=chosen_mask,
        prepare=_prepare,
        merge=merge,
    ),
)
