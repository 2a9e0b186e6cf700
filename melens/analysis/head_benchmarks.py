"""What benchmarks that need no data score without some heads: a loss alone may hide what a head is for.

Induction heads, say, write little on most texts and carry a model that repeats what it has read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from melens.analysis.head_claims import COMPARED, HeadsMetrics
from melens.analysis.head_zeroing import RANDOM, Heads, sets_of_heads
from melens.analysis.statistics import mean_interval, two_way_interval
from melens.analysis.study import Study
from melens.benchmarks.catalog import BENCHMARKS
from melens.benchmarks.language import HALF, language_data, make_questions, score_questions
from melens.benchmarks.scoring import Scorer
from melens.data.texts import read_text
from melens.tracing.heads import zero_heads
from melens.tracing.twin import running

__all__ = ["HeadTask", "changes_by_heads", "scores_as_metrics", "scores_in_words", "scores_without_heads"]

HeadTask = Literal["induction", "copy"]


@torch.no_grad()
def scores_without_heads(
    study: Study, rankings: dict[str, Heads], tasks: Sequence[HeadTask], *, draws: int, items: int
) -> pd.DataFrame:
    """Score a model intact, and with a tenth of its heads set to zero: the first of each ranking, and random ones.

    Args:
        study: of the model.
        rankings: of heads, as `rank_heads` returns them.
        tasks: benchmarks.
        draws: of random heads.
        items: of each benchmark.

    Returns:
        A row an item: `heads`, `draw`, `n_heads`, `benchmark`, `metric`, `item`, `intact`, `value`.

    Raises:
        MelensError: a text or a context too short for them, or a score that is NaN.
    """
    model = study.model
    data = language_data(model, read_text(), n_texts=items, n_tokens=2 * HALF, seed=study.seed)
    vocabulary = int(model.cfg.d_vocab)
    questions = [
        make_questions(BENCHMARKS[task], model.tokenizer, data, vocabulary=vocabulary, limit=items) for task in tasks
    ]

    def scored(heads: Heads) -> pd.DataFrame:
        with model.hooks(fwd_hooks=zero_heads(model, heads)), running(model) as network:
            limits = {"max_length": int(model.cfg.n_ctx), "max_batch_tokens": study.max_batch_tokens}
            scorer = Scorer(network, share_contexts=False, **limits)
            found = {asked.benchmark.name: score_questions(scorer, asked) for asked in questions}
        return pd.concat(found, names=["benchmark", None]).reset_index("benchmark")[[*_OF_ITEM, "value"]]

    intact = scored([]).rename(columns={"value": "intact"})
    wanted = list(sets_of_heads(rankings, [COMPARED], draws, study.seed))
    progress = study.stage("benchmarks with heads set to zero")
    rows = []
    for done, (name, _, draw, heads) in enumerate(wanted, 1):
        of_set = intact.merge(scored(heads), on=_OF_ITEM)
        rows.append(of_set.assign(heads=name, draw=draw, n_heads=len(heads)))
        progress(done, len(wanted))
    return pd.concat(rows, ignore_index=True)


_OF_ITEM = ["benchmark", "metric", "item"]


def changes_by_heads(scores: pd.DataFrame) -> pd.DataFrame:
    """Average the change over items, of random heads over draws too: `benchmark`, `heads`, `intact`, `mean`, `low`,
    `high`."""
    rows: list[tuple[Any, ...]] = []
    changed = scores.assign(change=scores["value"] - scores["intact"])
    for (benchmark, name), own in changed.groupby(["benchmark", "heads"], sort=False):
        by_draw = own.pivot(index="item", columns="draw", values="change").to_numpy()
        interval = two_way_interval(by_draw) if name == RANDOM else mean_interval(np.asarray(by_draw[:, 0]))
        rows.append((benchmark, name, float(own["intact"].mean()), float(by_draw.mean()), *interval))
    return pd.DataFrame(rows, columns=["benchmark", "heads", "intact", "mean", "low", "high"])


def scores_as_metrics(scores: pd.DataFrame) -> dict[str, Any]:
    """Return the fields of `HeadsMetrics` that are about benchmarks."""
    changes = changes_by_heads(scores)
    by_task = {task: own.set_index("heads")["mean"].to_dict() for task, own in changes.groupby("benchmark")}
    return {"scores_intact": changes.groupby("benchmark")["intact"].first().to_dict(), "score_changes": by_task}


def scores_in_words(metrics: HeadsMetrics) -> str:
    """Say what benchmarks come to without a tenth of the heads."""
    if metrics.scores_intact is None or metrics.score_changes is None:
        return metrics.scores_why_not or metrics.zeroing_why_not or "None was asked for."
    said = []
    for task, intact in metrics.scores_intact.items():
        (metric,) = BENCHMARKS[task].metrics
        change = ", ".join(f"{by:+.3f} without the {name}" for name, by in metrics.score_changes[task].items())
        said.append(f"{task} ({metric.label}) {intact:.3f}: {change.replace('the random', 'as many random')}.")
    return " ".join(said)
