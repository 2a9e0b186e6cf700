"""Can the ME layer be predicted from the weights alone, without a forward pass? (the review, the research note)

    melens.score_blocks(model)                  # a row a block
    result = melens.analysis.prediction(study)
    result.metrics.ranks["response"]            # 1: the score names the measured ME layer

1. `score_blocks` reads each block's FFN, the gain of the norm before it folded in, and scores what it could amplify.
2. `prediction` ranks the ME layer, which the study's trace shows, among the scores of all blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.statistics import peak_layer
from melens.analysis.study import Study
from melens.claims.engine import Claim, Judgement, NotMeasuredError, Verdict
from melens.errors import MelensError
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.style import COLORS
from melens.models.devices import weights_here
from melens.models.ffn_weights import ffn_of, has_neurons
from melens.models.layout import listed
from melens.models.normalization import has_normalization, read_normalization
from melens.models.quantization import is_quantized
from melens.printing import paragraph
from melens.report.result import Figure, Metrics, Result
from melens.validation.arguments import Bridge
from melens.validation.signatures import checked

__all__ = ["CLAIMS", "SCORES", "PredictMetrics", "prediction", "rank_of", "score_blocks"]

SCORES = {
    "response": "the FFN's output for the unit-RMS input that its strongest neurons amplify most, ‖FFN(g ⊙ x)‖ / ‖x‖",
    "neuron": "the strongest neuron's largest output: ‖x‖ (‖gate‖ ‖up‖ + |gate · up|) / 2 · ‖down‖, gain folded in",
    "alignment": "outlierness of the neuron whose gate, up and down are large and aligned: largest over median product",
    "down_max": "largest |entry| of the down projection",
    "down_outlierness": "the same over the root mean square of the entries",
}
"""What the columns of `score_blocks` are; in each a larger value points to the ME layer."""

_N_STRONGEST = 64


@checked
@torch.no_grad()
def score_blocks(model: Bridge) -> pd.DataFrame:
    """Score every block by what its FFN's weights could amplify.

    Args:
        model: a bridge.

    Returns:
        A row a block: `layer`, the columns of `SCORES`, and what they predict: the strongest `neuron_index` and the
        `dim` it writes most to. Blocks whose FFN has not one up and one down projection are left out.

    Raises:
        MelensError: no block has such an FFN (mixture of experts, state-space blocks), or the weights are quantised.

    Example:
        >>> melens.score_blocks(model).columns[:4].tolist()
        ['layer', 'response', 'neuron', 'alignment']
    """
    if is_quantized(model.original_model):
        raise MelensError("The weights of this model are quantised, so none can be read: load it without quantisation.")
    rows = [_score(model, layer) for layer in range(len(model.blocks)) if has_neurons(model, layer)]
    if rows:
        return pd.DataFrame(rows)
    raise MelensError(
        "No block of this model has an FFN in which TransformerLens names one up and one down projection, so no block "
        "can be scored."
    )


def rank_of(layer: int, scores: pd.DataFrame, score: str) -> int | None:
    """Rank a block by a score: 1 for the largest; None for a block that has no score."""
    own = scores.loc[scores["layer"] == layer, score]
    return int((scores[score] > own.iloc[0]).sum()) + 1 if len(own) else None


class PredictMetrics(Metrics):
    """What `prediction` measures.

    Attributes:
        n_scored: how many blocks have an FFN that can be scored.
        top_layer: by score, the block with the largest.
        ranks: by score, the ME layer's rank among all scored blocks, 1 for the largest; None where it has no score.
        ranks_without_last_two: the same among the blocks before the trailing ones.
        predicted_dim: the dim that the ME layer's strongest neuron writes most to.
    """

    experiment = "predict"
    rests_on_states = False
    n_scored: int = 0
    top_layer: dict[str, int] | None = None
    ranks: dict[str, int | None] | None = None
    ranks_without_last_two: dict[str, int | None] | None = None
    predicted_dim: int | None = None


def prediction(study: Study) -> Result:
    """Score every block by its weights, and rank the measured ME layer among them.

    Args:
        study: as `melens.study` makes it.

    Returns:
        Metrics `PredictMetrics`; the table `weight_scores`, as `score_blocks` returns it, and the figure `scores`.

    Raises:
        MelensError: as `score_blocks`.

    Example:
        >>> result = melens.analysis.prediction(study)
        >>> result.metrics.n_scored == len(model.blocks)
        True
    """
    scores, me_layer = score_blocks(study.model), study.me.layer
    measured: dict[str, Any] = {"top_layer": {score: peak_layer(scores, score) for score in SCORES}}
    if me_layer is not None:
        tables = {"ranks": scores, "ranks_without_last_two": scores[scores["layer"] <= study.last_before_trailing]}
        measured |= {name: {s: rank_of(me_layer, table, s) for s in SCORES} for name, table in tables.items()}
        measured["predicted_dim"] = next(iter(scores.loc[scores["layer"] == me_layer, "dim"]), None)
    metrics = study.metrics(PredictMetrics, **study.layout.metrics(), n_scored=len(scores), **measured)
    findings, expected = _findings(study, metrics, scores), "The ME layer is found by running the model."
    figure = Figure(_scores_figure(study, scores), "follow-up question", expected, paragraph(findings))
    return Result("predict", study.trace.model, metrics, {"weight_scores": scores}, {"scores": figure}, findings)


# --- Scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Neurons:
    """An FFN's weights by neuron; the gain of the normalisation before it is folded into `gate` and `up`."""

    gate: Float[Tensor, "d neuron"] | None
    up: Float[Tensor, "d neuron"]
    down: Float[Tensor, "neuron d"]


def _score(model: TransformerBridge, layer: int) -> dict[str, Any]:
    neurons = _read_neurons(model, layer)
    up, down = _norms(neurons.up, 0), _norms(neurons.down, 1)
    radius = model.cfg.d_model**0.5  # of an input whose root mean square is 1
    if neurons.gate is None:
        largest_output, aligned = radius * up * down, up * down
    else:
        gate, overlap = _norms(neurons.gate, 0), (neurons.gate * neurons.up).sum(0, dtype=torch.float32).abs()
        largest_output = radius**2 * (gate * up + overlap) / 2 * down
        aligned = overlap * down
    strongest = int(largest_output.argmax())
    down_max = neurons.down.abs().max().float()
    down_rms = _norms(neurons.down.flatten(), 0) / neurons.down.numel() ** 0.5
    return {
        "layer": layer,
        "response": _response(model, layer, neurons, largest_output) / radius,
        "neuron": float(largest_output[strongest]),
        "alignment": float(aligned.max() / aligned.median()),
        "down_max": float(down_max),
        "down_outlierness": float(down_max / down_rms),
        "neuron_index": strongest,
        "dim": int(neurons.down[strongest].abs().argmax()),
    }


def _read_neurons(model: TransformerBridge, layer: int) -> _Neurons:
    with weights_here(ffn := ffn_of(model, layer)):
        up, down = ffn.W_in.detach(), ffn.W_out.detach()
        gate = ffn.W_gate.detach() if getattr(ffn, "gate", None) is not None else None
    if has_normalization(model, layer, "ln2"):
        gain = read_normalization(model, layer, "ln2").gain.to(up)[:, None]
        up, gate = up * gain, None if gate is None else gate * gain
    return _Neurons(gate, up, down)


def _norms(weights: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(weights, dim=dim, dtype=torch.float32)


def _response(model: TransformerBridge, layer: int, neurons: _Neurons, strength: Float[Tensor, " neuron"]) -> float:
    """Run the FFN, and the norm behind it if there is one, on the inputs that amplify its strongest neurons most.

    Such an input is along `up`, or half way between `gate` and `up`; the largest ‖output‖ is returned.
    """
    block, width = model.blocks[layer], model.cfg.d_model
    strongest = strength.topk(min(_N_STRONGEST, len(strength))).indices
    inputs = torch.nn.functional.normalize(neurons.up[:, strongest].float(), dim=0)
    if neurons.gate is not None:
        gate = torch.nn.functional.normalize(neurons.gate[:, strongest].float(), dim=0)
        inputs = gate + (gate * inputs).sum(0).sign() * inputs
    inputs = width**0.5 * torch.nn.functional.normalize(inputs, dim=0).T  # [input, d]
    if has_normalization(model, layer, "ln2"):
        inputs = inputs * read_normalization(model, layer, "ln2").gain.to(inputs.device)
    output = ffn_of(model, layer).original_component(inputs[None].to(neurons.up))
    if (norm_after := getattr(block, "ln2_post", None)) is not None:
        output = norm_after.original_component(output)
    return float(torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32).max())


# --- Figure and words -------------------------------------------------------------------------------------------------


def _scores_figure(study: Study, scores: pd.DataFrame) -> go.Figure:
    panels = []
    for score, color in zip(SCORES, COLORS, strict=False):
        name, points = score.replace("_", " "), scores[["layer"]].assign(mean=scores[score])
        is_log = not score.startswith("down")  # which spans less than a decade
        panels.append(Panel(name, name, [Curve(score, points, color, False)], study.me.layer, log_scale=is_log))
    title = f"What the FFN's weights could amplify: {study.trace.model['name']}, no forward pass"
    note = "The ME layer marked is the measured one. response: of the whole FFN; neuron, alignment: of its strongest."
    return curves_by_block(panels, title=title, note=note, columns=3)


def _findings(study: Study, metrics: PredictMetrics, scores: pd.DataFrame) -> list[tuple[str, str]]:
    if metrics.ranks is None or metrics.ranks_without_last_two is None:
        return [("not measured", "The model has no ME layer to predict.")]
    if metrics.predicted_dim is None:
        scored = listed(scores["layer"])
        none = f"Block {study.me.layer}, the ME layer, has no FFN whose weights can be scored; {scored} have."
        return [("not measured", none)]
    without = metrics.ranks_without_last_two
    ranks = {score: f"{rank} ({without[score]} without the last two)" for score, rank in metrics.ranks.items()}
    response = (
        f"By how strongly its FFN can respond to an input, read off the weights alone, block {study.me.layer}, the "
    )
    response += f"ME layer, ranks {ranks['response']} of {metrics.n_scored} blocks; 1 is the strongest."
    others = ", ".join(f"{words} {ranks[score]}" for score, words in _OTHER_SCORES.items())
    hit = "the measured massive dim" if metrics.predicted_dim in study.me.dims[:1] else "not the measured one"
    return [
        ("rank by response", response),
        ("by other scores", f"It ranks by {others}."),
        ("predicted dim", f"Its strongest neuron writes dim {metrics.predicted_dim}, {hit}."),
    ]


_OTHER_SCORES = {
    "neuron": "the largest output of one neuron",
    "alignment": "the alignment of a neuron's gate, up and down weights",
    "down_max": "the largest entry of down",
    "down_outlierness": "that over the entries' root mean square",
}
"""What the scores beside `response` are called where they are told."""


# --- Claims -----------------------------------------------------------------------------------------------------------


def _ranks_first(metrics: PredictMetrics) -> Judgement:
    ranks, n_scored = metrics.ranks or {}, metrics.n_scored
    if (rank := ranks.get("response")) is None:
        raise NotMeasuredError("The ME layer's FFN has no score.")
    if n_scored < 2:
        raise NotMeasuredError("Only one block has an FFN that can be scored.")
    verdict: Verdict = "holds" if rank == 1 else "holds in part" if rank <= 3 < n_scored else "does not hold"
    by_score = ", ".join(f"{score} {place}" for score, place in ranks.items())
    return Judgement(verdict, float(rank), note=f"Ranks: {by_score}, of {n_scored}.")


CLAIMS = (
    Claim(
        id="predictable", fixed="2026-11-22 a1bbeb3",
        source="follow-up question", figure="scores", metrics=PredictMetrics,
        claim="The ME layer can be predicted from the weights alone",
        statistic="rank of the ME layer by the FFN's response to its most amplified input",
        criterion="1; in part ≤ 3", why="a prediction names one block",
        of_ffn=True, judge=_ranks_first,
    ),
)  # fmt: skip
