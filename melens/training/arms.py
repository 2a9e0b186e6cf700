"""Trainings from scratch side by side: what masks, gates and other attention do to loss, massive activations, sinks.

    result = compare_arms(read_arms("outputs/pretrain"))     # python -m melens.training.arms outputs/pretrain
    result.tables["arms"], result.figures["arms"], result.claims

An arm is what a model is trained with: nothing (plain), a mask from a block on, a mask behind the ME layer, gates,
another attention. Its trainings differ in the seed, of the weights and of the order of the text; those of one seed are
compared with each other. All have the same text held out, so that losses are paired by row and by seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from melens.analysis.statistics import mean_interval, two_way_interval, with_interval
from melens.errors import MelensError
from melens.figures.curves import over_steps
from melens.printing import Brief
from melens.report.record import write_tables_and_figures
from melens.report.result import Figure, Result
from melens.training.arms_claims import ARMS, SINK_RATE, ArmsMetrics

__all__ = ["Arm", "arm_of", "compare_arms", "read_arm", "read_arms"]

PLAIN = "plain"
_DRAWN = {"largest_over_median": "largest |h| over the median", "sink_rate": "sink rate of token 0"}


@dataclass(frozen=True, repr=False)
class Arm(Brief):
    """One training from scratch.

    Attributes:
        name: `plain`, one of `ARMS`, or another kind of attention.
        seed: of its weights and of the order of its text.
        model: by name.
        trace: as the table `training_trace` of `melens.analysis.training`.
        validation: as its table `validation`.
    """

    name: str
    seed: int
    model: str
    trace: pd.DataFrame
    validation: pd.DataFrame

    @property
    def as_trained(self) -> pd.DataFrame:
        """Its inspections under the mask that it was trained with; before the mask came on, without it."""
        by_step = self.trace.sort_values("masked").groupby("step")
        return by_step.last().reset_index()

    @property
    def text(self) -> tuple[str, ...]:
        """What is held out: the hash of each row's tokens."""
        return tuple(self.validation.drop_duplicates("row").sort_values("row")["tokens"])

    def loss(self, *, masked: bool) -> np.ndarray:
        """Return the loss of each row held out, with the mask on or off; without a mask both are one."""
        own = self.validation[self.validation["masked"] == masked]
        own = own if len(own) else self.validation
        return own.sort_values("row")["loss"].to_numpy()


def arm_of(metrics: dict[str, Any]) -> str:
    """Name the arm of a training by its metrics."""
    named = []
    if metrics.get("mask_planned"):
        came = "" if metrics.get("training_mask") else ", which never came"  # as there was no ME layer: no such arm
        named.append(f"WeMask behind the ME layer{came}" if metrics.get("mask_follows") else "WeMask")
    if metrics.get("gate"):
        named.append("gates")
    if metrics.get("attention"):
        named.append(str(metrics["attention"]))
    return " and ".join(named) or PLAIN


def read_arms(folder: str | Path) -> list[Arm]:
    """Read the trainings from scratch below a folder, that have ended.

    Raises:
        MelensError: there is none.
    """
    arms = []
    for file in sorted(Path(folder).rglob("result.json")):
        result = json.loads(file.read_text("utf-8"))
        if result.get("experiment") == "pretrain" and result.get("status") == "ok":
            arms.append(read_arm(file.parent, result))
    if not arms:
        raise MelensError(f"There is no run of exp=pretrain below {folder} that ended.")
    return arms


def read_arm(folder: Path, result: dict[str, Any]) -> Arm:
    """Read one training by its folder and its `result.json`."""
    tables = [pd.read_parquet(folder / f"{name}.parquet") for name in ("training_trace", "validation")]
    metrics = result["metrics"]
    return Arm(arm_of(metrics), int(metrics["training_seed"]), str(result["model"]["name"]), *tables)


def compare_arms(arms: Sequence[Arm]) -> Result:
    """Compare the arms of one model.

    Returns:
        Metrics `ArmsMetrics`; the table `arms`, a row a training; the figure `arms`.

    Raises:
        MelensError: trainings of several models, twice the same one, or other text held out.
    """
    models = {arm.model for arm in arms}
    if len(models) != 1:
        raise MelensError(f"Arms are compared within one model; these are of {', '.join(sorted(models))}.")
    by_key = {(arm.name, arm.seed): arm for arm in arms}
    if len(by_key) < len(arms):
        raise MelensError("Two trainings have the same arm and the same seed, so they are one. Leave one out.")
    if len({arm.text for arm in arms}) != 1:
        raise MelensError("These trainings have different text held out, so their losses cannot be compared.")
    table = pd.DataFrame([_row(arm) for arm in arms]).sort_values(["arm", "seed"], ignore_index=True)
    metrics = ArmsMetrics(model_of_arms=models.pop(), seeds=len({arm.seed for arm in arms}), **_measured(by_key))
    return Result(
        "arms",
        {"name": metrics.model_of_arms},
        metrics,
        tables={"arms": table},
        figures={"arms": _figure(arms, table)},
        findings=_findings(table, metrics),
    )


def _row(arm: Arm) -> dict[str, Any]:
    seen = arm.as_trained
    massive, sinks = seen[seen["me_layer"].notna()], seen[seen["sink_rate"] >= SINK_RATE]
    last = seen.iloc[-1]
    return {
        "arm": arm.name,
        "seed": arm.seed,
        "loss": float(arm.loss(masked=True).mean()),
        "loss_without_mask": float(arm.loss(masked=False).mean()),
        "largest": float(last["largest"]),
        "largest_over_median": float(last["largest_over_median"]),
        "sink_rate": float(last["sink_rate"]),
        "me_layer": None if pd.isna(last["me_layer"]) else int(last["me_layer"]),
        "first_massive_step": int(massive["step"].iloc[0]) if len(massive) else None,
        "first_sink_step": int(sinks["step"].iloc[0]) if len(sinks) else None,
    }


def _measured(by_key: dict[tuple[str, int], Arm]) -> dict[str, Any]:
    """Measure each arm against the plain trainings of the same seeds."""
    rows = {key: _row(arm) for key, arm in by_key.items()}
    plain = {seed: row for (name, seed), row in rows.items() if name == PLAIN}
    measured: dict[str, Any] = {
        "plain_trainings": len(plain),
        "plain_massive": sum(row["me_layer"] is not None for row in plain.values()),
        "plain_over_median": _mean([row["largest_over_median"] for row in plain.values()]),
        "plain_sink_rate": _mean([row["sink_rate"] for row in plain.values()]),
    }
    for key, name in ARMS.items():
        seeds = sorted(seed for own, seed in by_key if own == name and seed in plain)
        if not seeds:
            continue
        own, beside = ([by_key[arm, seed] for seed in seeds] for arm in (name, PLAIN))
        rises = np.stack(
            [arm.loss(masked=True) - other.loss(masked=True) for arm, other in zip(own, beside, strict=True)], axis=1
        )
        measured |= {f"dloss_{key}": float(rises.mean()), f"dloss_{key}_interval": two_way_interval(rises)}
        for metric, column in (("massive_left", "largest_over_median"), ("sinks_left", "sink_rate")):
            left = [rows[name, seed][column] / plain[seed][column] for seed in seeds if plain[seed][column]]
            if left:
                measured |= {f"{metric}_{key}": _mean(left), f"{metric}_{key}_interval": mean_interval(np.array(left))}
        if key in ("fixed", "following"):
            costs = np.stack([arm.loss(masked=False) - arm.loss(masked=True) for arm in own], axis=1)
            measured |= {f"unmask_{key}": float(costs.mean()), f"unmask_{key}_interval": two_way_interval(costs)}
    return measured


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _figure(arms: Sequence[Arm], table: pd.DataFrame) -> Figure:
    seen = pd.concat([arm.as_trained.assign(arm=arm.name, seed=arm.seed) for arm in arms], ignore_index=True)
    said = [
        f"{name}: largest |h| {own['largest_over_median'].mean():.0f} × the median, sink rate "
        f"{own['sink_rate'].mean():.2f}"
        for name, own in table.groupby("arm")
    ]
    means = seen.groupby(["arm", "step"])[[*_DRAWN]].mean().reset_index()
    curves = {
        _DRAWN[column]: {
            str(name): own[["step", column]].rename(columns={column: "value"}) for name, own in means.groupby("arm")
        }
        for column in _DRAWN
    }
    title = f"Trainings from scratch: {arms[0].model}"
    plot = over_steps(curves, title=title, y_titles={quantity: quantity for quantity in curves}, markers=True)
    return Figure(plot, "asked for by the project", "", ". ".join(said) + ".")


def _findings(table: pd.DataFrame, metrics: ArmsMetrics) -> list[tuple[str, str]]:
    findings = []
    for name, own in table.groupby("arm"):
        steps = own["first_massive_step"].dropna()
        since = f", first at step {steps.min():.0f}" if len(steps) else ""
        largest = own["largest_over_median"].mean()
        said = f"Loss {own['loss'].mean():.4f} nats a token; largest |h| {largest:.0f} × the median, "
        said += f"massive in {len(steps)} of {len(own)}{since}; sink rate {own['sink_rate'].mean():.3f}."
        findings.append((str(name), said))
    for key, name in ARMS.items():
        rise, interval = getattr(metrics, f"dloss_{key}"), getattr(metrics, f"dloss_{key}_interval")
        if rise is not None:
            findings.append((f"{name} against plain", f"Δloss {with_interval(rise, interval, '+.4f')}."))
    return findings


def main() -> None:
    """Compare the arms below a folder, write their table and figure into it, and print what they come to."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs")
    arms = read_arms(folder)
    for model in sorted({arm.model for arm in arms}):
        result = compare_arms([arm for arm in arms if arm.model == model])
        plots = {f"{name}-{model}": figure.plot for name, figure in result.figures.items()}
        tables = {f"{name}-{model}": table for name, table in result.tables.items()}
        write_tables_and_figures(tables, plots, folder)
        print(result)
        print(result.claims[["id", "value", "low", "high", "verdict", "note"]].to_string(index=False))


if __name__ == "__main__":
    main()
