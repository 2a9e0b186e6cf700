"""What becomes of massive activations and sinks over a training, from its checkpoints.

    steps = (0, 1_000, 10_000)
    loaded = ((step, melens.load_model("EleutherAI/pythia-160m", revision=f"step{step}")) for step in steps)
    result = melens.analysis.dynamics((step, melens.study(model, prompts)) for step, model in loaded)
    result.figures["dynamics"]

1. Of each checkpoint `measure_checkpoint` keeps a small table: every quantity by block and distinct first token. Its
   model may go before the next is loaded.
2. `compare_checkpoints` lays the tables side by side: a curve a quantity, a map by block, when each appears.
3. `melens.analysis.emergence_curve` fits the ratio in each block, where there are enough checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.dynamics_claims import CLAIMS, DynamicsMetrics
from melens.analysis.dynamics_figures import draw_dynamics, in_words
from melens.analysis.emergence_curve import LEAST_POINTS, CurveFit, fit_curve
from melens.analysis.sink_rate import N_TOKENS, of_long_prompts, share_of_sinks
from melens.analysis.statistics import mean_by, mean_interval, mean_metric
from melens.analysis.study import Study
from melens.errors import MelensError
from melens.printing import Brief
from melens.report.result import Result
from melens.tracing.attention_probes import Importance
from melens.tracing.heads import ValueNorms
from melens.tracing.probes import Probe
from melens.tracing.sites import ATTENTION_ON_KEYS, Sites
from melens.tracing.spectra import Spectrum

__all__ = [
    "CLAIMS", "DynamicsMetrics", "MeasuredCheckpoint", "compare_checkpoints", "dynamics", "measure_checkpoint",
    "probes",
]  # fmt: skip

RATIO, LARGEST, LIFT, RATE, DRAIN, ENTROPY = "ratio", "largest", "lift", "sink_rate", "value_ratio", "matrix_entropy"
ME_LAYER = "me_layer"
_OVER_BLOCKS: dict[str, Callable[..., Any]] = {
    RATIO: np.max,
    LARGEST: np.max,
    RATE: np.mean,
    DRAIN: np.mean,
    ENTROPY: np.min,
}
"""How a quantity of every block becomes one of the model."""

_RISES = {RATIO: 10.0, RATE: 0.1}
"""What counts as a rise over a training, of the ratio as a factor: less may be chance, and has no half way."""

_AS_LARGE = 0.05
"""Gallego-Feliciano et al. (2025, table 2) know a mean ratio to within 5%: what is that near the largest is as large.
"""

ByInput = Float[np.ndarray, "input layer"]


@dataclass(frozen=True, repr=False)
class MeasuredCheckpoint(Brief):
    """What is kept of a checkpoint.

    Attributes:
        step, name, tokens: of the optimiser; of the revision or folder; trained on, as far as it is known.
        by_input: a row a distinct first token (`first_token_id`) and block (`layer`): `ratio`, the largest |h| over the
            median; `largest`, that |h|; `lift`, ‖block output‖ / ‖block input‖ of token 0; and where they can be
            measured `sink_rate` of token 0, `value_ratio`, ‖v‖ of token 0 over the others', and `matrix_entropy` of
            the first 64 tokens.
        me_layer, magnification, magnification_interval: as `find_me_layer` finds them.
        shared: the fields that every experiment's metrics have.
        model: as in `Trace.model`.
    """

    step: int
    name: str
    by_input: pd.DataFrame
    me_layer: int | None
    magnification: float | None
    magnification_interval: tuple[float | None, float | None] | None = None
    tokens: float | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        return int(self.by_input["layer"].max()) + 1

    def values(self, quantity: str) -> ByInput | None:
        """Return a quantity by first token and block, the blocks without it left out; None where no block has it."""
        if quantity not in self.by_input:
            return None
        wide = self.by_input.pivot(index="first_token_id", columns="layer", values=quantity)
        wide = wide.dropna(axis=1, how="all").dropna(axis=0, how="all")
        return wide.to_numpy(dtype=float) if wide.size else None


def dynamics(checkpoints: Mapping[int, Study] | Iterable[tuple[int, Study]]) -> Result:
    """Measure the checkpoints of a training: when massive activations and sinks appear, and what becomes of them.

    Args:
        checkpoints: studies by step, all of the same prompts. An iterator of (step, study) may load one model after the
            other: none is kept. With `melens.analysis.checkpoint_dynamics.probes(model)` among a study's probes nothing
            is traced a second time.

    Returns:
        Metrics `DynamicsMetrics`; the tables `dynamics_by_input`, `dynamics_by_step`, `dynamics_curves` and, from ten
        checkpoints on, `dynamics_fits`; from two on the figures `dynamics` and `dynamics_by_block`, and with a fit
        `dynamics_fits`.

    Raises:
        MelensError: no checkpoint, two of one step, other prompts or another number of blocks than the others', or a
            quantity that is NaN.

    Example:
        >>> result = melens.analysis.dynamics({0: study, 1_000: study})
        >>> sorted(result.figures), result.metrics.n_checkpoints
        (['dynamics', 'dynamics_by_block'], 2)
        >>> result.metrics.me_from  # the first step from which on there is an ME layer
        0
    """
    pairs = checkpoints.items() if isinstance(checkpoints, Mapping) else checkpoints
    return compare_checkpoints([measure_checkpoint(step, study) for step, study in pairs])


def probes(model: TransformerBridge, **options: Any) -> list[Probe]:
    """Return what `measure_checkpoint` reads besides the default probes, as far as the model has it."""
    found, sites = list[Probe]([Spectrum(n_tokens=N_TOKENS)]), Sites.of(model)
    if sites.find(ATTENTION_ON_KEYS):
        found.append(Importance(n_tokens=N_TOKENS))
    if sites.find(ValueNorms.sites[0]):
        found.append(ValueNorms())
    for probe in found:
        probe.may_miss = True
    return found


def measure_checkpoint(step: int, study: Study, name: str = "", tokens: float | None = None) -> MeasuredCheckpoint:
    """Reduce a study to what is kept of a checkpoint; of prompts that share a first token the mean.

    Args:
        step: of the optimiser.
        study: of the checkpoint's model.
        name, tokens: as of `MeasuredCheckpoint`.

    Raises:
        MelensError: as `melens.trace`, or a quantity that is NaN.
    """
    found = study.traced(probes(study.model))
    largest = found["largest"].query("rank == 0").set_index(["prompt", "layer"])["value"].abs()
    table = pd.DataFrame({LARGEST: largest})
    table[RATIO] = largest / found["abs_median"].set_index(["prompt", "layer"])["abs_median"]
    table[LIFT] = _lift(found["norm"])
    if not np.isfinite(table[RATIO]).all():
        raise MelensError(f"A hidden state of step {step:,} is not finite, or 0 in most dims: the training diverged.")
    if "importance" in found.tables and len(long := of_long_prompts(found)):
        table[RATE] = share_of_sinks(long, ["prompt", "layer"])
    if "value_norms" in found.tables:
        values = found["value_norms"]
        ratio = values["value_norm"] / values["value_norm_others"].where(values["value_norm_others"] > 0)
        table[DRAIN] = ratio.groupby([values["prompt"], values["layer"]]).mean()
    table[ENTROPY] = found["spectrum"].set_index(["prompt", "layer"])["matrix_entropy"]
    firsts = found.prompts.set_index("prompt")["first_token_id"]
    table["first_token_id"] = firsts.loc[table.index.get_level_values("prompt")].to_numpy()
    by_input = table.groupby(["first_token_id", "layer"]).mean().reset_index()
    me, interval = study.me, study.me.magnification_interval
    return MeasuredCheckpoint(
        int(step), name or f"step {step:,}", by_input, me.layer,
        me.magnification, interval, tokens, study.shared_metrics | study.layout.metrics(), study.trace.model,
    )  # fmt: skip


def _lift(norms: pd.DataFrame) -> pd.Series:
    """Compute ‖block output‖ / ‖block input‖ of token 0, by prompt and layer."""
    first = norms[norms["pos"] == 0]
    after = first[first["site"] == "hook_resid_post"].set_index(["prompt", "layer"])["norm"]
    before = first[first["site"] == "hook_resid_pre"].set_index(["prompt", "layer"])["norm"]
    moved = after.rename(lambda layer: layer + 1, level="layer")
    return after / pd.concat([before[before.index.get_level_values("layer") == 0], moved]).reindex(after.index)


# --- Side by side -----------------------------------------------------------------------------------------------------


def compare_checkpoints(measured: Sequence[MeasuredCheckpoint], left_out: Sequence[str] = ()) -> Result:
    """Lay measured checkpoints side by side: what `dynamics` returns.

    Args:
        measured: in any order.
        left_out: names of checkpoints that are incomplete, for the record.

    Raises:
        MelensError: none, two of one step, or some of other prompts or models than the others.
    """
    checkpoints = sorted(measured, key=lambda own: own.step)
    _check_alike(checkpoints)
    last = checkpoints[-1]
    steps = np.array([own.step for own in checkpoints])
    curves = _curves(checkpoints)
    by_block = _by_block(checkpoints)
    fits, why_not = _fits(steps, by_block[RATIO])
    metrics = DynamicsMetrics(
        **last.shared,
        n_checkpoints=len(checkpoints),
        first_step=checkpoints[0].step,
        last_step=last.step,
        checkpoints_left_out=list(left_out),
        **_emergence(checkpoints),
        **_ends(checkpoints),
        **_onsets(steps, curves),
        **_middle(by_block[RATIO]),
        **_curve_metrics(fits, why_not),
    )
    tables = {
        "dynamics_by_input": pd.concat([_with_step(own) for own in checkpoints], ignore_index=True),
        "dynamics_by_step": _by_step(checkpoints),
        "dynamics_curves": curves,
    }
    if fits:
        tables["dynamics_fits"] = _fit_table(fits)
    findings = in_words(checkpoints, metrics)
    figures = draw_dynamics(steps, curves, by_block, fits, metrics, last) if len(checkpoints) > 1 else {}
    return Result("dynamics", last.model, metrics, tables, figures, findings)


def _check_alike(checkpoints: Sequence[MeasuredCheckpoint]) -> None:
    if not checkpoints:
        raise MelensError("There is no checkpoint to measure: give studies by step, as {1000: melens.study(...)}.")
    for before, after in pairwise(checkpoints):
        if before.step == after.step:
            raise MelensError(f"Two checkpoints are of step {after.step:,} ({before.name}, {after.name}).")
        if before.n_layers != after.n_layers:
            raise MelensError(
                f"{before.name} has {before.n_layers} blocks and {after.name} {after.n_layers}: they are no "
                "checkpoints of one training."
            )
        inputs = [sorted(set(own.by_input["first_token_id"])) for own in (before, after)]
        if inputs[0] != inputs[1] or before.shared.get("n_prompts") != after.shared.get("n_prompts"):
            raise MelensError(f"{before.name} and {after.name} were measured on different prompts.")


def _by_step(checkpoints: Sequence[MeasuredCheckpoint]) -> pd.DataFrame:
    rows = []
    for own in checkpoints:
        low, high = own.magnification_interval or (None, None)
        named = {"step": own.step, "name": own.name, "tokens": own.tokens, "me_layer": own.me_layer}
        rows.append(named | {"magnification": own.magnification, "magnification_low": low, "magnification_high": high})
    kinds: dict[str, Any] = dict.fromkeys(("tokens", "magnification", "magnification_low", "magnification_high"), float)
    return pd.DataFrame(rows).astype(kinds | {"me_layer": "Int64"})


def _with_step(own: MeasuredCheckpoint) -> pd.DataFrame:
    table = own.by_input.copy()
    table.insert(0, "step", own.step)
    table.insert(1, "name", own.name)
    return table


def _curves(checkpoints: Sequence[MeasuredCheckpoint]) -> pd.DataFrame:
    """Reduce each quantity over blocks, and average it over inputs: `quantity`, `step`, `mean`, `low`, `high`."""
    rows: list[tuple[str, int, float, float, float]] = []
    for own in checkpoints:
        for quantity, over in _OVER_BLOCKS.items():
            if (values := own.values(quantity)) is not None:
                of_inputs = over(values, axis=1)
                rows.append((quantity, own.step, float(of_inputs.mean()), *mean_interval(of_inputs)))
        if own.me_layer is not None:
            rows.append((ME_LAYER, own.step, float(own.me_layer), float("nan"), float("nan")))
    there = next((own.me_layer for own in reversed(checkpoints) if own.me_layer is not None), None)
    if there is not None:  # the block that becomes the ME layer, also where it is none yet
        for own in checkpoints:
            lift = own.by_input[own.by_input["layer"] == there][LIFT].to_numpy()
            rows.append((LIFT, own.step, float(lift.mean()), *mean_interval(lift)))
    return pd.DataFrame(rows, columns=["quantity", "step", "mean", "low", "high"])


def _by_block(checkpoints: Sequence[MeasuredCheckpoint]) -> dict[str, Float[np.ndarray, "layer step"]]:
    """Average each quantity over inputs, by block and checkpoint; NaN in a block without it."""
    layers = range(checkpoints[-1].n_layers)
    found = {}
    for quantity in _OVER_BLOCKS:
        means = [
            mean_by(own.by_input.rename(columns={"first_token_id": "prompt"}), quantity).set_index("layer")["mean"]
            if quantity in own.by_input
            else pd.Series(dtype=float)
            for own in checkpoints
        ]
        if any(len(own) for own in means):
            found[quantity] = np.stack([own.reindex(layers).to_numpy(dtype=float) for own in means], axis=1)
    return found


# --- Metrics ----------------------------------------------------------------------------------------------------------


def _emergence(checkpoints: Sequence[MeasuredCheckpoint]) -> dict[str, Any]:
    """Find the first checkpoint from which on every one has an ME layer."""
    first = None
    for own in reversed(checkpoints):
        if own.me_layer is None:
            break
        first = own
    return {} if first is None else {"me_from": first.step, "me_from_layer": first.me_layer}


def _ends(checkpoints: Sequence[MeasuredCheckpoint]) -> dict[str, Any]:
    """Measure ratio and sink rate at the first and the last checkpoint."""
    measured: dict[str, Any] = {}
    ends = {"first": checkpoints[0], "last": checkpoints[-1]}
    for metric, quantity in (("ratio", RATIO), ("sink_rate", RATE)):
        for end, own in ends.items():
            if (values := own.values(quantity)) is not None:
                measured |= mean_metric(f"{metric}_{end}", _OVER_BLOCKS[quantity](values, axis=1))
    first, last = (own.values(RATIO) for own in ends.values())
    if len(checkpoints) > 1 and first is not None and last is not None:
        measured |= mean_metric("ratio_growth", last.max(axis=1) / first.max(axis=1))
    if "sink_rate_last" not in measured:
        why = "The model has no attention that can be measured"
        has = checkpoints[-1].shared.get("attention_layers")
        measured["sinks_why_not"] = f"{why}." if not has else f"No prompt has {N_TOKENS} tokens."
    return measured


def _onsets(steps: np.ndarray, curves: pd.DataFrame) -> dict[str, Any]:
    """Find when ratio and sink rate are half way up, and by how many checkpoints sinks come later."""
    found: dict[str, Any] = {}
    at: dict[str, int | None] = {}
    for metric, quantity, factor in (("massive", RATIO, True), ("sinks", RATE, False)):
        values = curves[curves["quantity"] == quantity].sort_values("step")["mean"].to_numpy()
        if len(values) < len(steps):
            continue
        least = _RISES[quantity]
        place = _half_way(np.log(values), np.log(least)) if factor else _half_way(values, least)
        at[metric] = place
        if place is not None:
            found[f"{metric}_step"] = int(steps[place])
    massive, sinks = at.get("massive"), at.get("sinks")
    if massive is not None and sinks is not None:
        found["sinks_later"] = sinks - massive
    if massive is None:
        found["massive_why_not"] = f"The ratio of the largest |h| to the median does not rise {_RISES[RATIO]:g}-fold."
    if "sinks" in at and sinks is None:
        found["sinks_why_not"] = f"The sink rate does not rise by {_RISES[RATE]:g}."
    return found


def _half_way(values: Float[np.ndarray, " step"], least: float) -> int | None:
    """Return the first place at least half way from the first value to the largest; None where that is no rise."""
    rise = values.max() - values[0]
    return int(np.argmax(values >= values[0] + rise / 2)) if rise >= least else None


def _middle(ratios: Float[np.ndarray, "layer step"]) -> dict[str, Any]:
    n_layers, n_steps = ratios.shape
    middle = ratios[n_layers // 4 : n_layers - n_layers // 4]
    is_largest = middle[:, -1] >= (1 - _AS_LARGE) * middle.max(axis=1)
    return {"middle_rising": float(is_largest.mean())} if n_steps > 1 else {}


# --- Fits -------------------------------------------------------------------------------------------------------------


def _fits(steps: np.ndarray, ratios: Float[np.ndarray, "layer step"]) -> tuple[dict[int, CurveFit], str | None]:
    """Fit the ratio in each block, and say why there are no fits where there are none."""
    if len(steps) < LEAST_POINTS:
        return {}, f"The curve takes {LEAST_POINTS} checkpoints, two for each parameter; there are {len(steps)}."
    tried = {layer: fit_curve(steps.astype(float), own) for layer, own in enumerate(ratios)}
    fits = {layer: fit for layer, fit in tried.items() if fit is not None}
    return fits, None if fits else "The fit of the curve converged in no block."


def _curve_metrics(fits: Mapping[int, CurveFit], why_not: str | None) -> dict[str, Any]:
    if not fits:
        return {"curve_why_not": why_not}
    return {
        "curve_r2": float(np.mean([fit.r2 for fit in fits.values()])),
        "curve_blocks": len(fits),
        "curve_determined": sum(fit.determined for fit in fits.values()),
    }


def _fit_table(fits: Mapping[int, CurveFit]) -> pd.DataFrame:
    """Lay fits out, a row a block; parameters that the points do not tell are NaN."""
    rows = []
    for layer, fit in fits.items():
        row: dict[str, Any] = {"layer": layer, "r2": fit.r2, "determined": fit.determined, "peak_step": fit.peak}
        row |= fit.of_equation_9 or dict.fromkeys(("A", "lambda", "gamma", "t_0", "K"))
        for name in ("decay", "shift", "scale", "offset", "baseline"):
            low, high = fit.intervals.get(name, (None, None))
            row |= {name: getattr(fit, name) if fit.determined else None, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.astype({name: float for name in table.columns if name not in ("layer", "determined")})
