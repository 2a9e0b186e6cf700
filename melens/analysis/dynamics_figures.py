"""The figures and sentences of `dynamics`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float

from melens.analysis.dynamics_claims import LEAST_CHECKPOINTS, DynamicsMetrics
from melens.analysis.emergence_curve import CurveFit
from melens.analysis.statistics import with_interval
from melens.figures.curves import Curve, Panel
from melens.figures.steps import StepMap, curves_over_steps, maps_over_steps
from melens.figures.style import BLOCK, COLORS, FIRST, OTHERS, SINK
from melens.printing import counted, paragraph
from melens.report.result import Figure

if TYPE_CHECKING:
    from melens.analysis.checkpoint_dynamics import MeasuredCheckpoint

__all__ = ["draw_dynamics", "draw_emergences", "in_words"]

_PANELS = {
    "ratio": ("Largest |h| over the median, any block", "ratio", FIRST, True),
    "largest": ("Largest |h|, any block", "|h|", FIRST, True),
    "me_layer": ("ME layer", BLOCK, COLORS[6], False),
    "lift": ("Magnification of token 0 in block {me}", "‖output‖ / ‖input‖", COLORS[3], True),
    "sink_rate": ("Sink rate of token 0, all blocks", "share of heads", SINK, False),
    "value_ratio": ("‖v‖ of token 0 over the others'", "mean over blocks", OTHERS, False),
    "matrix_entropy": ("Matrix entropy, least over blocks", "share of log 64", COLORS[4], False),
}
"""By quantity: title, y axis, colour, and whether that is logarithmic."""

_MAPS = {
    "ratio": ("Largest |h| over the median", True),
    "sink_rate": ("Sink rate of token 0", False),
    "value_ratio": ("‖v‖ of token 0 over the others'", True),
    "matrix_entropy": ("Matrix entropy", False),
}
_MOST_FITS = 6
"""Blocks whose fit is drawn."""

_SOURCE = "Gallego-Feliciano et al. (2025)"


def draw_dynamics(
    steps: np.ndarray,
    curves: pd.DataFrame,
    by_block: Mapping[str, Float[np.ndarray, "layer step"]],
    fits: Mapping[int, CurveFit],
    metrics: DynamicsMetrics,
    last: MeasuredCheckpoint,
) -> dict[str, Figure]:
    """Draw the curves, the maps by block and, where there are some, the fits."""
    name = f"{last.model.get('name', '')}, {counted(len(steps), 'checkpoint')}"
    shown = steps.tolist()
    said = paragraph([("", _massive_in_words(metrics)), ("", _sinks_in_words(metrics))])
    expected = "Massive activations and sinks are not there at first; both are learned."
    note = "Bands: 95% intervals over first tokens. Step 0 stands apart, left of the logarithmic axis."
    plot = curves_over_steps(_panels(curves, metrics), shown, title=f"Over the training: {name}", note=note)
    figures = {"dynamics": Figure(plot, f"{_SOURCE}, Gu et al. (2024)", expected, said)}
    maps = [StepMap(title, by_block[own], is_log) for own, (title, is_log) in _MAPS.items() if own in by_block]
    plot = maps_over_steps(maps, shown, title=f"By block over the training: {name}", note="Means over first tokens.")
    rises = "Middle blocks rise to the end; the first and the last peak early."
    figures["dynamics_by_block"] = Figure(plot, f"{_SOURCE}, figure 5", rises, _middle_in_words(metrics))
    if fits:
        panels = _fit_panels(steps, by_block["ratio"], fits)
        note = f"f(t) = A exp(-λ x) log(x) + K with x = γ t + t₀ ({_SOURCE}, equation 9)."
        plot = curves_over_steps(panels, sorted({*shown, *_dense(steps)}), title=f"Fits by block: {name}", note=note)
        expected = "The mean R² over blocks is 0.93 or more in each of nine models."
        figures["dynamics_fits"] = Figure(plot, f"{_SOURCE}, figures 6 and 7", expected, _curve_in_words(metrics))
    return figures


def _panels(curves: pd.DataFrame, metrics: DynamicsMetrics) -> list[Panel]:
    panels = []
    for quantity, (title, y_title, color, log_scale) in _PANELS.items():
        points = curves[curves["quantity"] == quantity].sort_values("step")
        if len(points):
            where = title.format(me=metrics.me_layer if metrics.me_layer is not None else "of the ME layer")
            y_range = (-0.02, 1.02) if quantity in ("sink_rate", "matrix_entropy") else None
            if quantity == "me_layer":
                y_range = (-0.5, (metrics.n_layers or 1) - 0.5)
            curve = Curve(where, points, color, in_legend=False)
            panels.append(Panel(where, y_title, [curve], None, log_scale=log_scale, y_range=y_range))
    return panels


def _dense(steps: np.ndarray) -> list[int]:
    """Return steps at which a fitted curve looks smooth on a logarithmic axis."""
    positive = steps[steps > 0]
    return sorted({*steps.tolist(), *np.geomspace(positive.min(), positive.max(), 80).astype(int).tolist()})


def _fit_panels(
    steps: np.ndarray, ratios: Float[np.ndarray, "layer step"], fits: Mapping[int, CurveFit]
) -> list[Panel]:
    layers = list(fits)
    chosen = sorted({layers[at] for at in np.linspace(0, len(layers) - 1, min(_MOST_FITS, len(layers))).astype(int)})
    panels = []
    for layer in chosen:
        dense = np.array(_dense(steps))
        measured = Curve("measured", pd.DataFrame({"step": steps, "mean": ratios[layer]}), FIRST)
        fitted = pd.DataFrame({"step": dense, "mean": fits[layer].at(dense.astype(float))})
        curve = Curve("fit", fitted, COLORS[6], thin=True)
        panels.append(Panel(f"Block {layer}: R² {fits[layer].r2:.3f}", "ratio to the median", [measured, curve], None))
    return panels


def draw_emergences(rows: pd.DataFrame) -> Figure:
    """Draw what a sweep of `emergence` over checkpoints found.

    Args:
        rows: a row a checkpoint: `step`, `me_layer`, `magnification` with `low` and `high`, `norm_ratio`, `sink_mass`.
    """
    texts = {
        "norm_ratio": ("Norm of token 0 over the others', any block", "ratio", FIRST, True),
        "me_layer": ("ME layer", BLOCK, COLORS[6], False),
        "magnification": ("Magnification in the ME layer", "‖output‖ / ‖input‖", COLORS[3], True),
        "sink_mass": ("Sink mass of token 0, all blocks", "share of attention", SINK, False),
    }
    panels = []
    for quantity, (title, y_title, color, log_scale) in texts.items():
        points = rows[["step", quantity]].dropna().rename(columns={quantity: "mean"}).astype({"mean": float})
        if quantity == "magnification":
            points = points.join(rows[["low", "high"]])
        if len(points):
            panels.append(Panel(title, y_title, [Curve(title, points, color, in_legend=False)], None, log_scale))
    steps = sorted(rows["step"].tolist())
    plot = curves_over_steps(panels, steps, title=f"Over the training: {counted(len(steps), 'checkpoint')}", columns=2)
    return Figure(plot, _SOURCE, "Massive activations are not there at first.", "")


# --- Words ------------------------------------------------------------------------------------------------------------


def in_words(checkpoints: Sequence[MeasuredCheckpoint], metrics: DynamicsMetrics) -> list[tuple[str, str]]:
    """Say what was measured, when each appears, and how well the curve fits."""
    first, last = checkpoints[0], checkpoints[-1]
    if len(checkpoints) == 1:
        said = f"One checkpoint ({last.name}, step {last.step:,}) makes no curve: give more of the training."
        return [("checkpoints", said), ("massive activations", _at_last(metrics))]
    said = f"{len(checkpoints)} from step {first.step:,} to {last.step:,}"
    said += f" ({last.tokens:.3g} tokens)." if last.tokens else "."
    if metrics.checkpoints_left_out:
        said += f" Incomplete and left out: {', '.join(metrics.checkpoints_left_out)}."
    if len(checkpoints) < LEAST_CHECKPOINTS:
        said += f" No claim is judged on fewer than {LEAST_CHECKPOINTS}."
    return [
        ("checkpoints", said),
        ("massive activations", _massive_in_words(metrics)),
        ("sinks", _sinks_in_words(metrics)),
        ("blocks", _middle_in_words(metrics)),
        ("curve", _curve_in_words(metrics)),
    ]


def _at_last(metrics: DynamicsMetrics) -> str:
    ratio = with_interval(metrics.ratio_last or 0, metrics.ratio_last_interval, ",.3g")
    layer = "no ME layer" if metrics.me_layer is None else f"the ME layer is block {metrics.me_layer}"
    return f"The largest |h| is {ratio} times the median; {layer}."


def _massive_in_words(metrics: DynamicsMetrics) -> str:
    m = metrics
    first = with_interval(m.ratio_first or 0, m.ratio_first_interval, ",.3g")
    last = with_interval(m.ratio_last or 0, m.ratio_last_interval, ",.3g")
    words = f"The largest |h| goes from {first} to {last} times the median"
    words += f", half way (logarithmically) at step {m.massive_step:,}." if m.massive_step is not None else "."
    if m.me_from is None:
        last_layer = "The last checkpoint has no ME layer" if m.me_layer is None else "An ME layer comes and goes"
        return f"{words} {last_layer} by the criterion."
    if m.me_from == m.first_step:
        return f"{words} Every checkpoint has an ME layer, the last one block {m.me_layer}."
    moved = "" if m.me_from_layer == m.me_layer else f", at the end block {m.me_layer}"
    return f"{words} From step {m.me_from:,} on there is an ME layer, block {m.me_from_layer}{moved}."


def _sinks_in_words(metrics: DynamicsMetrics) -> str:
    m = metrics
    if m.sink_rate_first is None or m.sink_rate_last is None:
        return m.sinks_why_not or "The sink rate was not measured."
    first = with_interval(m.sink_rate_first, m.sink_rate_first_interval, ".3f")
    words = f"The sink rate goes from {first} to {with_interval(m.sink_rate_last, m.sink_rate_last_interval, '.3f')}"
    if m.sinks_step is None:
        return f"{words}."
    words += f", half way at step {m.sinks_step:,}"
    if m.sinks_later is None:
        return f"{words}."
    if m.sinks_later == 0:
        return f"{words}, the same checkpoint as the ratio."
    side = "after" if m.sinks_later > 0 else "before"
    return f"{words}, {counted(abs(m.sinks_later), 'checkpoint')} {side} the ratio."


def _middle_in_words(metrics: DynamicsMetrics) -> str:
    share = metrics.middle_rising or 0
    words = f"In {share:.0%} of the middle half of the blocks the ratio is largest at the last checkpoint"
    return f"{words}, or within 5% of that."


def _curve_in_words(metrics: DynamicsMetrics) -> str:
    m = metrics
    if m.curve_r2 is None:
        return m.curve_why_not or "The curve was not fitted."
    return (
        f"R² of the fitted curve: {m.curve_r2:.3f}, mean over {m.curve_blocks} of {m.n_layers} blocks. In "
        f"{m.curve_determined} of them the checkpoints tell all five parameters; elsewhere no decay is told from a "
        "slower logarithm."
    )
