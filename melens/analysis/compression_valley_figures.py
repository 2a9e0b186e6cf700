"""What `valley` shows and says: curves by block of the intact model, the same of each run, and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from melens.analysis.compression_valley_claims import ValleyMetrics
from melens.analysis.statistics import with_interval
from melens.analysis.study import Study
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.style import COLORS, FIRST, OTHERS, SINK
from melens.models.layout import listed
from melens.printing import paragraph
from melens.report.result import Figure

__all__ = ["INTACT", "MASKED", "REMOVED", "in_words", "runs_figure", "valley_figure"]

INTACT, MASKED, REMOVED = "intact", "WeMask", "FFN write removed from token 0"
_OF_RUNS = ("without the write", "under WeMask")
_SOURCE = "Queipo-de-Llano et al. (2025)"
_ENTROPY = "normalised matrix entropy"

Findings = Sequence[tuple[str, str]]


def valley_figure(study: Study, by_block: pd.DataFrame, metrics: ValleyMetrics, findings: Findings) -> Figure:
    """Draw the intact model: entropy with token 0 and without, its norm, the sink rate, and the entropy's bound."""
    intact = dict(iter(by_block[by_block["run"] == INTACT].groupby("quantity")))
    names = {
        "entropy": ("entropy of all tokens", FIRST), "entropy_without_first": ("entropy without token 0", OTHERS),
        "norm": ("norm of token 0", COLORS[6]), "norm_others": ("norm of other tokens, mean", COLORS[5]),
        "sink_rate": ("sink rate of token 0", SINK), "bound": ("bound by token 0's norm and angles", COLORS[3]),
    }  # fmt: skip
    curves = {name: Curve(words, intact[name], color) for name, (words, color) in names.items() if name in intact}
    panels = {
        ("Entropy of the states", _ENTROPY): ["entropy", "entropy_without_first"],
        ("Norm of states", "‖h‖ after the block"): ["norm", "norm_others"],
        ("Sink rate", "share of heads"): ["sink_rate"],
        ("Entropy and its upper bound", _ENTROPY): ["entropy", "bound"],
    }
    shown = {title: [curves[name] for name in own if name in curves] for title, own in panels.items()}
    expected = "Where token 0's norm jumps, the entropy falls and the sink rate rises."
    observed = paragraph([row for row in findings if row[0] not in _OF_RUNS])
    return _figure(study, "Compression valley", shown, metrics, expected, observed)


def runs_figure(study: Study, by_block: pd.DataFrame, metrics: ValleyMetrics, findings: Findings) -> Figure:
    """Draw each run: entropy with token 0 and without, token 0's norm and the sink rate."""
    by_run = dict(iter(by_block.groupby(["run", "quantity"])))
    colors = {INTACT: FIRST, MASKED: COLORS[4], REMOVED: OTHERS}
    panels = {
        ("Entropy, all tokens", _ENTROPY): "entropy",
        ("Entropy without token 0", _ENTROPY): "entropy_without_first",
        ("Norm of token 0", "‖h‖ after the block"): "norm",
        ("Sink rate", "share of heads"): "sink_rate",
    }
    shown = {
        title: [Curve(run, by_run[run, name], color) for run, color in colors.items() if (run, name) in by_run]
        for title, name in panels.items()
    }
    expected = "Without the FFN's write to token 0 the entropy does not fall, and sinks do not come."
    observed = paragraph([row for row in findings if row[0] in _OF_RUNS])
    return _figure(study, "The valley with the massive activation changed", shown, metrics, expected, observed)


def _figure(
    study: Study,
    title: str,
    shown: Mapping[tuple[str, str], Sequence[Curve]],
    metrics: ValleyMetrics,
    expected: str,
    observed: str,
) -> Figure:
    panels = []
    for (name, y_title), curves in shown.items():
        axis: dict[str, Any] = {"log_scale": True} if name.startswith("Norm") else {"y_range": (0, 1)}
        if curves:  # a model without attention has no sink rate
            panels.append(Panel(name, y_title, curves, study.me.layer, **axis))
    note = f"The first {metrics.valley_tokens} tokens of each prompt; entropy of σ² / Σσ² over log min(T, d). "
    note += "Bands: 95% intervals over prompts."
    heading = study.title(title, metrics.valley_prompts)
    return Figure(partial(curves_by_block, panels, title=heading, note=note), _SOURCE, expected, observed)


# --- Words ------------------------------------------------------------------------------------------------------------


def in_words(metrics: ValleyMetrics) -> list[tuple[str, str]]:
    """Say what the intact model shows, then what becomes of it in each run."""
    m = metrics
    if m.me_layer is None:
        return [("valley", "There is no ME layer at which one could begin; the figure has the entropies by block.")]
    found = [("valley", m.fall_why_not or _fall_in_words(m))]
    if m.fall_why_not is None:
        found.append(("without token 0", _without_in_words(m)))
    found.append(("norm and sinks", _together_in_words(m)))
    if m.bound_inside is not None:
        found.append(("upper bound", _bound_in_words(m)))
    return [*found, (_OF_RUNS[0], _removed_in_words(m)), (_OF_RUNS[1], _masked_in_words(m))]


def _fall_in_words(m: ValleyMetrics) -> str:
    ratio = with_interval(m.entropy_ratio or 0.0, m.entropy_ratio_interval, ".2f")
    words = (
        f"The normalised entropy of {m.valley_tokens} tokens' states goes from {m.entropy_before:.3f} before the ME "
    )
    words += (
        f"layer to {m.entropy_inside:.3f} behind, × {ratio}. It is below half way from {_most(m.valley_begins)} to "
    )
    words += _most(m.valley_ends)
    words += f"; token 0 is massive for the last time in {_most(m.massive_ends)}." if m.massive_ends else "."
    return f"{words} Before, it is below half way in {listed(m.earlier_valley)}." if m.earlier_valley else words


def _most(counts: Mapping[str, int] | None) -> str:
    """Say where most inputs have it: "block 11 (22 of 23 inputs)"."""
    counts = counts or {}
    layer, n = next(iter(counts.items()))
    return f"block {layer} ({n} of {sum(counts.values())} inputs)"


def _without_in_words(m: ValleyMetrics) -> str:
    words = f"Without token 0's row it goes from {m.entropy_before_without:.3f} to {m.entropy_inside_without:.3f}"
    if m.fall_left is None:
        return f"{words}. {m.left_why_not}"
    left = with_interval(m.fall_left, m.fall_left_interval, ".0%")
    words += f": {left} of the fall of {m.fall:.3f} is left."
    return words if not m.prompts_with_others else f"{words} In every prompt another token is massive too, which stays."


def _together_in_words(m: ValleyMetrics) -> str:
    rho = with_interval(m.norm_correlation or 0.0, m.norm_correlation_interval, ".2f")
    words = f"Over an input's blocks the entropy has a rank correlation of {rho} with token 0's norm"
    if m.sink_correlation is None:
        return f"{words}. With the sink rate: {m.sink_correlation_why_not}"
    rho = with_interval(m.sink_correlation, m.sink_correlation_interval, ".2f")
    return f"{words}, and of {rho} with the sink rate in the next block."


def _bound_in_words(m: ValleyMetrics) -> str:
    words = (
        f"Token 0's row has {m.row_share_inside:.1%} of the energy there, {m.aligned_share_inside:.1%} is along its "
    )
    words += f"direction. That leaves an entropy of {m.bound_inside:.3f} at most, "
    words += f"{(m.bound_inside or 0.0) - (m.entropy_inside or 0.0):.3f} above the measured one"
    if m.bound_before is None:
        return f"{words}."
    return f"{words}; before the ME layer {m.bound_before - (m.entropy_before or 0.0):.3f} above it."


def _removed_in_words(m: ValleyMetrics) -> str:
    if m.entropy_removed is None:
        return m.removed_why_not or m.fall_why_not or ""
    words = f"Without what the FFN of {listed(m.removed_layers)} writes to token 0, of whose norm {m.norm_left:.1%} is "
    words += f"left, the entropy there is {m.entropy_removed:.3f}, and {m.entropy_removed_without:.3f} without token 0"
    if m.lifted_removed is None:
        return f"{words}. {m.lifted_why_not} {_rates_in_words(m, m.sink_rate_removed)}".strip()
    lifted = with_interval(m.lifted_removed, m.lifted_removed_interval, ".0%")
    words += f": {lifted} of what token 0's row takes is given back. {_rates_in_words(m, m.sink_rate_removed)}"
    return f"{words} {m.sinks_stay}" if m.sinks_stay else words.strip()


def _masked_in_words(m: ValleyMetrics) -> str:
    if m.entropy_masked is None:
        return m.mask_why_not or m.fall_why_not or ""
    words = f"With {m.mask_rate:.0%} of token 0's dims masked before attention the entropy there is "
    words += (
        f"{m.entropy_masked:.3f} instead of {m.entropy_inside:.3f}, and {m.entropy_masked_without:.3f} without token "
    )
    words += f"0 instead of {m.entropy_inside_without:.3f}. {_rates_in_words(m, m.sink_rate_masked)}"
    return words.strip()


def _rates_in_words(m: ValleyMetrics, changed: float | None) -> str:
    return "" if changed is None else f"The sink rate goes from {m.sink_rate_intact:.2f} to {changed:.2f}."
