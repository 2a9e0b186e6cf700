"""Whether token 0's state is the same across inputs and blocks once it is massive: section 3.2, figure 5.

    result = melens.analysis.direction(study)
    result.figures["cosine_by_block"]

1. The states of token 0 after every block come with the study's trace (`TokenVectors`).
2. Prompts that share their first token share its every state, so that statistics take one prompt for each first token;
   the maps of figure 5c show all prompts.
3. "Once it is formed" means from the block that forms the massive state to the last one before the trailing ones
   (`Study.massive_layers`), whose number is fixed in advance: where the norm leaves its plateau earlier, it counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from melens.analysis.metrics import l2_norm, pairwise_cosine
from melens.analysis.statistics import mean_by, mean_interval, mean_of_pairs, tidy
from melens.analysis.study import Study
from melens.analysis.trailing_blocks import find_trailing_blocks
from melens.claims.engine import Claim, Former, Judgement, at_least, at_most, unless_trivial
from melens.figures.curves import Curve, Panel, curves_by_block, vectors_by_dim
from melens.figures.heatmaps import Heatmap, heatmap_by_block
from melens.figures.style import BLOCK, COLORS, FIRST, OTHERS
from melens.printing import paragraph
from melens.report.result import Figure, Interval, Metrics, Result

__all__ = ["CLAIMS", "DirectionMetrics", "direction"]

TRIVIAL = "trivial by construction: all prompts share their first token"


class DirectionMetrics(Metrics):
    """What `direction` measures of token 0's state h, over the blocks from that which forms the massive state on.

    Attributes:
        norm_drift: largest |‖h‖ / ‖h where it is formed‖ - 1|, mean over prompts.
        norm_drift_on_plateau: the same up to the block before `plateau_end`.
        plateau_end: the block from which on the norm is off its plateau for good, if that is before the trailing blocks
            that count apart anyway.
        consecutive_cosine: smallest cosine between the states after consecutive blocks, mean over prompts.
        cosine: mean cosine between the states of two prompts, in the block where it is smallest.
        norm_drift_since_me, consecutive_cosine_since_me, cosine_since_me: the same three from the ME layer on, which in
            a slow climb has not formed the state yet.
        cosine_before: the same, mean over the blocks before the ME layer; None where it is the first.
        least_cosine: smallest cosine between the states of any two prompts in any of the blocks.
    """

    experiment = "direction"
    norm_drift: float | None = None
    norm_drift_interval: Interval | None = None
    norm_drift_on_plateau: float | None = None
    plateau_end: int | None = None
    consecutive_cosine: float | None = None
    consecutive_cosine_interval: Interval | None = None
    cosine: float | None = None
    cosine_interval: Interval | None = None
    norm_drift_since_me: float | None = None
    norm_drift_since_me_interval: Interval | None = None
    consecutive_cosine_since_me: float | None = None
    consecutive_cosine_since_me_interval: Interval | None = None
    cosine_since_me: float | None = None
    cosine_since_me_interval: Interval | None = None
    cosine_before: float | None = None
    least_cosine: float | None = None


def direction(study: Study) -> Result:
    """Compare token 0's states between prompts, and between blocks.

    Args:
        study: as `melens.study` makes it.

    Returns:
        Metrics `DirectionMetrics`; the figures `norms` (figure 5a), `dims_by_block` (5b), `cosine_by_block` (5c) and
        `between_blocks`.

    Example:
        >>> result = melens.analysis.direction(study)
        >>> round(result.metrics.cosine, 2)  # between inputs, behind the ME layer
        1.0
    """
    vectors = study.trace.tensors["token_vectors"][:, :, 0]  # [prompt, layer, d]
    states = vectors[study.distinct_massive_prompts]
    norms = l2_norm(states)
    between_inputs = pairwise_cosine(states.transpose(0, 1))
    to_previous = torch.cosine_similarity(states, states.roll(1, dims=1), dim=-1)
    to_previous[:, 0] = float("nan")  # no block comes before the first
    by_block = {
        "norm": mean_by(tidy(norms.numpy(), "norm"), "norm"),
        "norm_cv": _by_layer(norms.std(dim=0) / norms.mean(dim=0) if len(norms) > 1 else torch.zeros_like(norms[0])),
        "cosine_between_inputs": _mean_between(between_inputs),
        "least_cosine_between_inputs": _by_layer(between_inputs.flatten(1).amin(-1)),
        "cosine_to_previous_block": mean_by(tidy(to_previous.numpy(), "cosine"), "cosine"),
    }
    changes = _Changes(norms.numpy(), to_previous.numpy(), by_block["cosine_between_inputs"].set_index("layer"))
    metrics = study.metrics(DirectionMetrics, **_once_formed(study, changes, by_block))
    n_distinct = len(states)
    note = f"{n_distinct} distinct first token{'s' if n_distinct > 1 else f' ({TRIVIAL})'}."
    findings = _findings(metrics, note)
    observed = paragraph(findings)
    alike = "After the ME layer the norm is large, barely changes, and is alike for all inputs."
    near_1 = "After the ME layer the cosine between any two inputs is about 1."
    settled = "Direction is settled at the ME layer: it barely changes after, whatever the input."
    figures = {
        "norms": Figure(partial(_norms_figure, study, norms, by_block["norm_cv"], note), "figure 5a", alike, observed),
        "dims_by_block": _dims_figure(study, states.mean(0).numpy(), note),
        "cosine_by_block": Figure(partial(_cosine_map, study, between_inputs, note), "figure 5c", near_1, observed),
        "between_blocks": Figure(
            partial(_cosine_figure, study, by_block, note), "figure 5c, by block", settled, observed
        ),
    }
    tables = {"direction_by_block": pd.concat([table.assign(quantity=name) for name, table in by_block.items()])}
    return Result("direction", study.trace.model, metrics, tables, figures, findings)


def _mean_between(cosines: Float[Tensor, "layer n n"]) -> pd.DataFrame:
    """Average over pairs of inputs, by layer; with a single distinct first token there is none but itself: 1."""
    every = np.ones(cosines.shape[1:], dtype=bool)
    of_layers = [mean_of_pairs(of_layer.numpy(), every) for of_layer in cosines]
    rows = [(layer, 1.0 if len(every) == 1 else mean, *both) for layer, (mean, both) in enumerate(of_layers)]
    return pd.DataFrame(rows, columns=["layer", "mean", "low", "high"])


def _by_layer(values: Float[Tensor, " layer"]) -> pd.DataFrame:
    return pd.DataFrame({"layer": range(len(values)), "mean": values.numpy()})


@dataclass(frozen=True)
class _Changes:
    """Norms and cosines to the block before `[prompt, layer]`, and the mean cosine between inputs by layer."""

    norms: np.ndarray
    to_previous: np.ndarray
    between_inputs: pd.DataFrame

    def over(self, layers: Sequence[int], suffix: str = "") -> dict[str, float | Interval | None]:
        """Compute how much norm and direction change over these blocks, the first of which is compared with."""
        measured: dict[str, float | Interval | None] = {}
        if len(layers) > 1:
            drift = _drift(self.norms, layers)
            cosine = self.to_previous[:, layers[1:]].min(axis=1)
            for name, values in (("norm_drift", drift), ("consecutive_cosine", cosine)):
                measured |= {name + suffix: float(values.mean()), f"{name}{suffix}_interval": mean_interval(values)}
        lowest = self.between_inputs.loc[list(layers)].sort_values("mean").iloc[0]
        interval = (float(lowest["low"]), float(lowest["high"]))
        return measured | {f"cosine{suffix}": float(lowest["mean"]), f"cosine{suffix}_interval": interval}


def _drift(norms: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    return np.abs(norms[:, layers] / norms[:, layers[:1]] - 1).max(axis=1)


def _once_formed(
    study: Study, changes: _Changes, by_block: Mapping[str, pd.DataFrame]
) -> dict[str, float | Interval | None]:
    """Compute how much norm and direction change once the massive state is formed, and from the ME layer on."""
    me_layer, layers = study.me.layer, list(study.massive_layers)
    if me_layer is None:
        return {}
    measured: dict[str, float | Interval | None] = {}
    if since_me := list(range(me_layer, study.last_before_trailing + 1)):
        measured |= changes.over(since_me, "_since_me")
    if not layers:
        return measured
    measured |= changes.over(layers)
    end = find_trailing_blocks(changes.norms, layers)
    if end is not None and end <= layers[-1]:
        on_plateau = [layer for layer in layers if layer < end]
        measured |= {"plateau_end": end, "norm_drift_on_plateau": float(_drift(changes.norms, on_plateau).mean())}
    before = changes.between_inputs.loc[: me_layer - 1, "mean"]
    least = by_block["least_cosine_between_inputs"].set_index("layer").loc[layers, "mean"]
    return measured | {
        "cosine_before": float(before.mean()) if len(before) else None,
        "least_cosine": float(least.min()),
    }


def _findings(metrics: DirectionMetrics, note: str) -> list[tuple[str, str]]:
    rests_on = ("rests on", note)
    if metrics.norm_drift is None:
        nothing = "Without an ME layer, and blocks after that which forms it, there is no massive state to follow."
        return [("not measured", nothing), rests_on]
    before = "" if metrics.cosine_before is None else f" ({metrics.cosine_before:.2f} before the ME layer)"
    start = "the ME layer" if metrics.formed == metrics.me_layer else f"block {metrics.formed}, which forms it,"
    norm = f"From {start} to the last two blocks the norm of token 0 changes by {metrics.norm_drift:.1%}"
    by_block = (
        f"From block to block its direction keeps a cosine of {metrics.consecutive_cosine:.6g} or more, mean over "
    )
    by_input = f"Between inputs the cosine is {metrics.cosine:.6g} or more on average{before}, and "
    by_input += f"{metrics.least_cosine:.6g} between the two most different inputs."
    return [
        ("norm", f"{norm}, mean over inputs."),
        ("across blocks", f"{by_block}inputs."),
        ("across inputs", by_input),
        rests_on,
    ]


# --- Figures ----------------------------------------------------------------------------------------------------------


def _norms_figure(study: Study, norms: Float[Tensor, "prompt layer"], variation: pd.DataFrame, note: str) -> go.Figure:
    inputs = [
        Curve("one input", _by_layer(of_prompt), COLORS[6], in_legend=number == 0, thin=True)
        for number, of_prompt in enumerate(norms)
    ]
    inputs.append(Curve("mean over inputs", _by_layer(norms.mean(0)), FIRST))
    spread = [Curve("variation", variation, OTHERS)]
    panels = [
        Panel("Norm of token 0 after each block", "L2 norm", inputs, study.me.layer, log_scale=True),
        Panel("Its coefficient of variation", "standard deviation / mean", spread, study.me.layer),
    ]
    return curves_by_block(panels, title=study.title("Norm of token 0 by input"), note=note)


def _dims_figure(study: Study, mean_states: np.ndarray, note: str) -> Figure:
    """Draw the states `[layer, d]` after a few blocks: around the ME layer, in the middle and at the end."""
    last, me_layer = study.n_layers - 1, study.me.layer
    if me_layer is None:
        blocks = {0, study.n_layers // 2, last}
    else:
        blocks = {me_layer - 1, me_layer, me_layer + 1, (me_layer + study.last_before_trailing) // 2, last}
    shown = {block: mean_states[block] for block in sorted(blocks) if 0 <= block <= last}
    titled = {f"block {block}{' (ME layer)' * (block == me_layer)}": state for block, state in shown.items()}
    title, at_me_layer = study.title("Token 0 by dim, mean over prompts"), f"block {me_layer} (ME layer)"
    plot = partial(vectors_by_dim, titled, highlighted=at_me_layer, title=title, note=note)
    largest = ", ".join(f"{np.abs(state).argmax()} after block {block}" for block, state in shown.items())
    expected = "From the ME layer on the same few dims stand out in every block."
    return Figure(plot, "figure 5b", expected, f"The largest dim is {largest}.")


def _cosine_map(study: Study, between_inputs: Float[Tensor, "layer n n"], note: str) -> go.Figure:
    """Draw by input and block the cosine of its token 0 with that of the other inputs, the mean over these."""
    n = between_inputs.shape[-1]
    to_others = (between_inputs.sum(-1) - 1) / (n - 1) if n > 1 else between_inputs[..., 0]
    prompts = study.trace.prompts.set_index("prompt").loc[study.distinct_massive_prompts]
    firsts = [f"{prompt} {first!r}" for prompt, first in prompts["first_token"].items()]
    title = study.title("Cosine of token 0's state between inputs")
    heatmap = Heatmap("", to_others.T.numpy(), range(study.n_layers), firsts, BLOCK, "input and its first token")
    colors: Any = {"z_title": "cosine", "z_range": (min(0.0, float(to_others.min())), 1)}
    note = f"An input's mean over the other inputs. {note}"
    return heatmap_by_block(heatmap, me_layer=study.me.layer, title=title, note=note, **colors)


def _cosine_figure(study: Study, by_block: Mapping[str, pd.DataFrame], note: str) -> go.Figure:
    names = {
        "cosine_between_inputs": "between inputs, mean",
        "least_cosine_between_inputs": "between inputs, least",
        "cosine_to_previous_block": "to the block before, same input, mean",
    }
    curves = [Curve(text, by_block[name], color) for (name, text), color in zip(names.items(), COLORS, strict=False)]
    panel = Panel("", "cosine similarity", curves, study.me.layer, zero_line=True)
    note = f"Bands: 95% intervals over prompts. {note}"
    return curves_by_block([panel], title=study.title("Cosine of token 0's state"), note=note)


# --- Claims -----------------------------------------------------------------------------------------------------------

NO_BLOCKS = "No block lies between that which forms the massive state and the last two."


def _norm_stable(metrics: DirectionMetrics) -> Judgement:
    judged = at_most(metrics.norm_drift, metrics.norm_drift_interval, 0.1, partly=0.5, why_not=NO_BLOCKS)
    if metrics.plateau_end is None or judged.verdict in ("holds", "not measured"):
        return judged
    note = f"From block {metrics.plateau_end} on the norm is off its plateau, on which it changes by "
    return replace(judged, note=f"{note}{metrics.norm_drift_on_plateau:.2f}.")


def _direction_layers(metrics: DirectionMetrics) -> Judgement:
    cosine, interval = metrics.consecutive_cosine, metrics.consecutive_cosine_interval
    return at_least(cosine, interval, 0.99, partly=0.9, why_not=NO_BLOCKS)


def _direction_inputs(metrics: DirectionMetrics) -> Judgement:
    judged = at_least(metrics.cosine, metrics.cosine_interval, 0.95, partly=0.8, why_not=NO_BLOCKS)
    return unless_trivial(metrics, judged)


FORMER = "2026-11-22 a1bbeb3"
"""Then the three were judged from the ME layer on."""

CLAIMS = (
    Claim(
        id="norm-stable", fixed="2026-11-26 25a77c7",
        source="section 3.2, figure 5a", figure="norms", metrics=DirectionMetrics,
        claim="Once the massive state is formed, its norm barely changes",
        statistic="largest relative change of token 0's norm from the block that forms the massive state to the last "
        "two blocks",
        criterion="≤ 0.1; in part ≤ 0.5",
        why="a tenth cannot be seen on the paper's axes; in a slow climb the ME layer has not formed it yet",
        of_token_0=True, blocks_after=1, judge=_norm_stable,
        former=Former(
            "≤ 0.1; in part ≤ 0.5", FORMER,
            lambda metrics: at_most(
                metrics.norm_drift_since_me, metrics.norm_drift_since_me_interval, 0.1, partly=0.5
            ),
        ),
    ),
    Claim(
        id="direction-layers", fixed="2026-11-26 25a77c7",
        source="section 3.2, figure 5b", figure="between_blocks", metrics=DirectionMetrics,
        claim="Once the massive state is formed, its direction barely changes from block to block",
        statistic="smallest cosine between its states after consecutive blocks, from that which forms it on",
        criterion="≥ 0.99; in part ≥ 0.9", why="0.99 is an angle of 8 degrees",
        of_token_0=True, blocks_after=1, judge=_direction_layers,
        former=Former(
            "≥ 0.99; in part ≥ 0.9", FORMER,
            lambda metrics: at_least(
                metrics.consecutive_cosine_since_me, metrics.consecutive_cosine_since_me_interval, 0.99, partly=0.9
            ),
        ),
    ),
    Claim(
        id="direction-inputs", fixed="2026-11-26 25a77c7",
        source="section 3.2, figure 5c", figure="cosine_by_block", metrics=DirectionMetrics,
        claim="Once the massive state is formed, its direction is the same for all inputs",
        statistic="smallest mean cosine between inputs, over the blocks from that which forms it to the last two",
        criterion="≥ 0.95; in part ≥ 0.8", why="0.95 is an angle of 18 degrees, where random directions have 90",
        of_token_0=True, blocks_after=0, judge=_direction_inputs,
        former=Former(
            "≥ 0.95; in part ≥ 0.8", FORMER,
            lambda metrics: unless_trivial(
                metrics, at_least(metrics.cosine_since_me, metrics.cosine_since_me_interval, 0.95, partly=0.8)
            ),
        ),
    ),
)  # fmt: skip
