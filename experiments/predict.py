"""Can the ME layer be told from the weights alone, without a forward pass? (the review, the research note)"""

from __future__ import annotations

from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from experiments.runner.legacy import PlainOptions
from experiments.runner.study import Run as Study
from melens import Probe
from melens.analysis.statistics import peak_layer
from melens.analysis.weights import SCORES, rank_of, score_blocks
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.style import COLORS
from melens.models.layout import Layout, listed
from melens.report.result import Figure, Result


def probes(model: TransformerBridge, options: PlainOptions) -> list[Probe]:
    """The trace only says which block is right."""
    return []


def run(study: Study, options: PlainOptions) -> Result:
    """Score every block by its weights, and see where the measured ME layer ranks."""
    scores = score_blocks(study.model)
    lasting = scores[scores["layer"] <= study.last_lasting]
    metrics = study.metrics(
        **Layout.of(study.model).metrics(),
        n_scored=len(scores),
        top_layer={score: peak_layer(scores, score) for score in SCORES},
    )
    if study.me.layer is not None:
        metrics["ranks"] = {score: rank_of(study.me.layer, scores, score) for score in SCORES}
        metrics["ranks_without_last_two"] = {score: rank_of(study.me.layer, lasting, score) for score in SCORES}
        here = scores[scores["layer"] == study.me.layer]
        metrics["predicted_dim"] = int(here["dim"].iloc[0]) if len(here) else None
    words = _in_words(study, metrics, scores)
    return Result(
        experiment="predict",
        model=study.trace.model,
        metrics=metrics,
        tables={"weight_scores": scores},
        figures={
            "scores": Figure(
                _figure(study, scores),
                "asked for by the review",
                "The ME layer is found by running the model.",
                words,
            )
        },
        findings=[("from the weights", words)],
    )


def _figure(study: Study, scores: pd.DataFrame) -> Any:
    panels = [
        Panel(
            score.replace("_", " "),
            score.replace("_", " "),
            [Curve(score, _points(scores, score), color, False)],
            study.me.layer,
            log_scale=not score.startswith("down"),  # which spans less than a decade
        )
        for score, color in zip(SCORES, COLORS, strict=False)
    ]
    title = f"What the FFN's weights could amplify: {study.trace.model['name']}, no forward pass"
    note = "The ME layer marked is the measured one. response: of the whole FFN; neuron, alignment: of its strongest."
    return curves_by_block(panels, title=title, note=note, columns=3)


def _points(scores: pd.DataFrame, score: str) -> pd.DataFrame:
    return scores.rename(columns={score: "mean"})[["layer", "mean"]]


def _in_words(study: Study, metrics: dict[str, Any], scores: pd.DataFrame) -> str:
    if study.me.layer is None:
        return "The model has no ME layer to be told."
    if metrics["predicted_dim"] is None:
        scored = listed(scores["layer"])
        return f"Block {study.me.layer}, the ME layer, has no FFN whose weights could be scored; {scored} have."
    ranks = ", ".join(
        f"{score.replace('_', ' ')} {rank} ({metrics['ranks_without_last_two'][score]} without the last two blocks)"
        for score, rank in metrics["ranks"].items()
    )
    dim = metrics["predicted_dim"]
    hit = "the measured massive dim" if dim in study.me.dims[:1] else "not the measured one"
    told = f"Block {study.me.layer} ranks, of {metrics['n_scored']}: {ranks}."
    return f"{told} Its strongest neuron writes dim {dim}, {hit}."
