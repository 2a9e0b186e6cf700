"""What trainings went through, step by step: the loss, and what became of the massive activation and the sinks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.runner.jobs import Job
from melens import MelensError
from melens.figures.curves import over_steps
from melens.report.result import Figure, Result

__all__ = ["Course", "averaged", "draw", "merge"]

_LOGGED = {
    "loss": "loss",
    "reward": "reward",
    "rewards/margins": "margin of rewards",
    "mean_token_accuracy": "token accuracy",
}
_SEEN = {"magnification_there": "magnification of block {me} (ME layer)", "sink_mass": "sink mass {where}"}


@dataclass(frozen=True)
class Course:
    """What one training went through.

    Attributes:
        name: among others; empty for one alone.
        log: TRL's numbers, a row a `step`.
        looks: a row for each `step` at which the model was looked into and for each `masked` (without the mask of the
            training, with it): `me_layer`, `magnification`, `magnification_there` (of the ME layer as it was at first),
            `sink_mass`.
    """

    name: str
    log: pd.DataFrame
    looks: pd.DataFrame

    @property
    def ends(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The first and the last look without the mask; both empty where there was none."""
        own = self.looks[~self.looks["masked"]].sort_values("step")
        if not len(own):
            return {}, {}
        first, last = (
            {str(key): None if pd.isna(value) else value for key, value in own.iloc[at].items()} for at in (0, -1)
        )
        return first, last

    def learnt(self) -> str:
        """Say how the loss went."""
        losses = self.log["loss"].dropna() if "loss" in self.log else pd.Series(dtype=float)
        return f"loss from {losses.iloc[0]:.4g} to {losses.iloc[-1]:.4g}" if len(losses) else "no loss was told"

    def moved(self) -> str:
        """Say what became of the massive activation and the sinks."""
        first, last = self.ends
        if not first:
            return "The model was sharded, so that it was not looked into."
        if first["me_layer"] is None and last["me_layer"] is None:
            layers = "no ME layer before or after"
        elif first["me_layer"] == last["me_layer"]:
            layers = f"the ME layer stays block {last['me_layer']}"
        else:
            layers = f"the ME layer goes from {_number(first['me_layer'])} to {_number(last['me_layer'])}"
        sinks = f"{_number(first['sink_mass'], 3)} to {_number(last['sink_mass'], 3)}"
        if first["magnification_there"] is None:
            return f"Without the mask {layers}; the sink mass goes from {sinks}."
        magnification = f"{_number(first['magnification_there'])} to {_number(last['magnification_there'])}"
        return (
            f"Without the mask {layers}; its magnification goes from {magnification}, the sink mass behind it from "
            f"{sinks}."
        )


def _number(value: Any, digits: int = 4) -> str:
    return "none" if value is None else f"{value:.{digits}g}"


def averaged(courses: Sequence[Course]) -> list[Course]:
    """Average what is drawn of those of one name, trained with different seeds.

    An ME layer in which they differ is left out.

    Raises:
        MelensError: a number that some of them lack at a step, and others have.
    """
    found = []
    for name in dict.fromkeys(course.name for course in courses):
        same = [course for course in courses if course.name == name]
        log = _mean([course.log for course in same], ["step"], _LOGGED, name)
        looks = _mean([course.looks for course in same], ["step", "masked"], _SEEN, name)
        by_step = pd.concat([course.looks for course in same]).groupby(["step", "masked"])
        layers = by_step["me_layer"].first().where(by_step["me_layer"].nunique(dropna=False) == 1)
        found.append(Course(name, log, looks.assign(me_layer=layers.astype("Int64").array)))
    return found


def _mean(tables: Sequence[pd.DataFrame], by: list[str], columns: Iterable[str], name: str) -> pd.DataFrame:
    """Average columns over trainings; what none of them has at a step, as some numbers are told rarely, stays NaN."""
    together = pd.concat(tables)
    groups = together.groupby(by)[[column for column in columns if column in together]]
    n_have = groups.count()
    for column, of_column in n_have.items():
        some_have = of_column[(of_column > 0) & (of_column < len(tables))]
        for step in some_have.index.get_level_values("step")[:1]:
            raise MelensError(
                f"{name}: at step {step} only {some_have.iloc[0]} of {len(tables)} trainings have a number as "
                f"{column}, so that there is no mean of it: look for NaN in the others."
            )
    return groups.mean().reset_index()


def draw(courses: Sequence[Course], title: str, me_layer: int | None) -> dict[str, Figure]:
    """Draw the numbers of trainings, and what was seen in their models, over the steps.

    Args:
        courses: under different names.
        title: above.
        me_layer: of the model before training.
    """
    learnt: dict[str, dict[str, pd.DataFrame]] = {}
    seen: dict[str, dict[str, pd.DataFrame]] = {}
    where = "of all blocks" if me_layer is None else f"behind block {me_layer}"
    for course in courses:
        for column, quantity in _LOGGED.items():
            if column in course.log and course.log[column].notna().any():
                learnt.setdefault(quantity, {})[course.name] = _points(course.log, column)
        for column, quantity in _SEEN.items():
            wears_one = course.looks["masked"].any()
            for masked, rows in course.looks.groupby("masked"):
                if rows[column].notna().any():
                    which = ("with the mask" if masked else "without the mask") if wears_one else ""
                    curve = ", ".join(filter(None, [course.name, which]))
                    seen.setdefault(quantity.format(me=me_layer, where=where), {})[curve] = _points(rows, column)
    source = "asked for by the project"
    pictures = {}
    if learnt:
        figure = over_steps(learnt, title=f"Course of training: {title}")
        pictures["training_loss"] = Figure(figure, source, "", _told(courses, [c.learnt() for c in courses]))
    if seen:
        figure = over_steps(seen, title=f"Massive activation and sinks in training: {title}", markers=True)
        pictures["training_trace"] = Figure(figure, source, "", _told(courses, [c.moved() for c in courses]))
    return pictures


def _points(table: pd.DataFrame, name: str) -> pd.DataFrame:
    return table[["step", name]].dropna().rename(columns={name: "value"})


def _told(courses: Sequence[Course], texts: Sequence[str]) -> str:
    said = [f"{course.name}: {text}" if course.name else text for course, text in zip(courses, texts, strict=True)]
    return " ".join(text if text.endswith(".") else f"{text}." for text in said)


def merge(jobs: Sequence[Job]) -> Result | None:
    """Draw the trainings of a sweep side by side; None where it has none."""
    trained = [job for job in jobs if (job.folder / "training_trace.parquet").is_file() and _is_training(job)]
    courses = [
        Course(job.name, *(pd.read_parquet(job.folder / f"training_{kind}.parquet") for kind in ("log", "trace")))
        for job in trained
    ]
    if not courses:
        return None
    me_layers = {job.result["metrics"]["me_layer"] for job in trained}
    methods = sorted({job.result["experiment"].upper() for job in trained})
    title = f"{len(courses)} of {' and '.join(methods)}"
    findings = [(course.name, f"{course.learnt()}. {course.moved()}") for course in courses]
    pictures = draw(courses, title, me_layers.pop() if len(me_layers) == 1 else None)
    return Result("trainings", model={}, metrics={}, figures=pictures, findings=findings)


def _is_training(job: Job) -> bool:
    return job.is_ok and job.result["experiment"] in ("sft", "dpo", "grpo")
