"""The history of a training, step by step: the loss, and what became of the massive activation and the sinks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from melens.errors import MelensError
from melens.figures.curves import over_steps
from melens.printing import Brief
from melens.report.result import Figure, Metrics, Result
from melens.training.recipe import METHODS

__all__ = [
    "TrainingHistory", "average_histories", "compare_trainings", "draw_histories", "method_in_words", "trainings",
]  # fmt: skip

_LOGGED = {
    "loss": "loss",
    "reward": "reward",
    "rewards/margins": "margin of rewards",
    "mean_token_accuracy": "token accuracy",
}
_Y_TITLES = {
    "loss": "loss (nats)",
    "rewards/margins": "chosen minus rejected",
    "mean_token_accuracy": "share of tokens",
    "magnification_there": "‖block output‖ / ‖block input‖",
    "sink_mass": "share of attention",
    "largest_over_median": "largest |h| over the median",
    "sink_rate": "share of heads",
}
_INSPECTED = {"magnification_there": "magnification of block {me} (ME layer)", "sink_mass": "sink mass {where}"}
_FROM_SCRATCH = {"largest_over_median": "largest |h| over the median", "sink_rate": "sink rate of token 0"}
"""Of a model that has no ME layer before its training."""


@dataclass(frozen=True, repr=False)
class TrainingHistory(Brief):
    """What one training logged, and what its inspections measured.

    Attributes:
        name: among other trainings; empty for one alone.
        log: TRL's numbers, a row for each logged `step`.
        inspections: a row for each inspected `step` and each `masked` (without the training's mask, with it):
            `me_layer`, `magnification`, `magnification_there` (of the block that was the ME layer before the training),
            `sink_mass` (mean over the blocks after it).
        n_trainings: of which these are the means.
    """

    name: str
    log: pd.DataFrame
    inspections: pd.DataFrame
    n_trainings: int = 1

    @property
    def ends(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The first and the last inspection without the mask; both empty where there was none."""
        own = self.inspections[~self.inspections["masked"]].sort_values("step")
        if not len(own):
            return {}, {}
        first, last = (
            {str(key): None if pd.isna(value) else value for key, value in own.iloc[at].items()} for at in (0, -1)
        )
        return first, last

    def loss_in_words(self) -> str:
        """Say how the loss went."""
        losses = self.log["loss"].dropna() if "loss" in self.log else pd.Series(dtype=float)
        return f"loss from {losses.iloc[0]:.4g} to {losses.iloc[-1]:.4g}" if len(losses) else "no loss was logged"

    def change_in_words(self) -> str:
        """Say what became of the massive activation and the sinks."""
        first, last = self.ends
        if not first:
            return "The model was sharded, so it was not inspected."
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


def trainings(results: Mapping[str, Result]) -> Result:
    """Draw several trainings side by side, as a sweep of trainings does.

    Args:
        results: of `melens.analysis.training`, by the name that a curve gets.

    Returns:
        The figures `training_loss` and `training_trace`.

    Raises:
        MelensError: none, or the result of another analysis.

    Example:
        >>> from melens.training.plan import TrainingPlan
        >>> from melens.training.recipe import Recipe
        >>> plan = TrainingPlan(Recipe("sft", batch_size=2, micro_batch_size=2, lr=0.01, steps=2), "sums", limit=8)
        >>> before = melens.study(melens.load_model("tiny"), prompts)
        >>> plain = melens.analysis.training(before, plan, "trained")
        >>> list(melens.analysis.trainings({"plain": plain, "again": plain}).figures)
        ['training_loss', 'training_trace']
    """
    if not results:
        raise MelensError("There are no trainings to draw: give some as {'a name': melens.analysis.training(...)}.")
    for name, result in results.items():
        if result.experiment not in METHODS:
            raise MelensError(f"{name!r} is a result of {result.experiment}; trainings takes those of trainings.")
    histories = [
        TrainingHistory(name, result.tables["training_log"], result.tables["training_trace"])
        for name, result in results.items()
    ]
    methods, me_layers = zip(
        *((result.experiment, result.metrics.me_layer) for result in results.values()), strict=True
    )
    return compare_trainings(histories, set(methods), set(me_layers))


def compare_trainings(
    histories: Sequence[TrainingHistory], methods: Collection[str], me_layers: Collection[int | None]
) -> Result:
    """Draw trainings side by side, of these methods, of models that had these ME layers before; each method once."""
    (me_layer,) = me_layers if len(me_layers) == 1 else (None,)
    title = f"{len(histories)} of {' and '.join(sorted(map(method_in_words, methods)))}"
    findings = [(own.name, f"{own.loss_in_words()}. {own.change_in_words()}") for own in histories]
    return Result("trainings", {}, Metrics(), figures=draw_histories(histories, title, me_layer), findings=findings)


def method_in_words(method: str) -> str:
    """Return what a title calls a method."""
    return "training from scratch" if method == "pretrain" else method.upper()


def average_histories(histories: Sequence[TrainingHistory]) -> list[TrainingHistory]:
    """Average what is drawn over trainings of one name, which differ in their seeds.

    An ME layer in which they differ is left out.

    Raises:
        MelensError: some trainings lack a number at a step where others have it.
    """
    averages = []
    for name in dict.fromkeys(history.name for history in histories):
        same = [history for history in histories if history.name == name]
        log = _mean([history.log for history in same], ["step"], _LOGGED, name)
        inspections = _mean([history.inspections for history in same], ["step", "masked"], _INSPECTED, name)
        by_step = pd.concat([history.inspections for history in same]).groupby(["step", "masked"])
        layers = by_step["me_layer"].first().where(by_step["me_layer"].nunique(dropna=False) == 1)
        inspections = inspections.assign(me_layer=layers.astype("Int64").array)
        averages.append(TrainingHistory(name, log, inspections, len(same)))
    return averages


def _mean(tables: Sequence[pd.DataFrame], by: list[str], columns: Iterable[str], name: str) -> pd.DataFrame:
    """Average columns over trainings; a number that none of them logged at a step stays NaN."""
    together = pd.concat(tables)
    groups = together.groupby(by)[[column for column in columns if column in together]]
    n_have = groups.count()
    for column, of_column in n_have.items():
        some_have = of_column[(of_column > 0) & (of_column < len(tables))]
        for step in some_have.index.get_level_values("step")[:1]:
            raise MelensError(
                f"{name}: only {some_have.iloc[0]} of {len(tables)} trainings have the number {column} at step {step}, "
                "so it has no mean. Look for NaN in the others."
            )
    return groups.mean().reset_index()


def draw_histories(histories: Sequence[TrainingHistory], title: str, me_layer: int | None) -> dict[str, Figure]:
    """Draw the logged numbers of trainings, and what their inspections measured, over the steps.

    Args:
        histories: under different names.
        title: above the figures.
        me_layer: of the model before training.

    Returns:
        The figures `training_loss` and `training_trace`, each if there is something to draw.
    """
    y_titles: dict[str, str] = {}
    logged: dict[str, dict[str, pd.DataFrame]] = {}
    inspected: dict[str, dict[str, pd.DataFrame]] = {}
    where = "of all blocks" if me_layer is None else f"behind block {me_layer}"
    for history in histories:
        for column, quantity in _LOGGED.items():
            if column in history.log and history.log[column].notna().any():
                logged.setdefault(quantity, {})[history.name] = _points(history.log, column)
                y_titles[quantity] = _Y_TITLES.get(column, quantity)
        has_mask = history.inspections["masked"].any()
        for column, quantity in (_INSPECTED | _FROM_SCRATCH).items() if me_layer is None else _INSPECTED.items():
            quantity = quantity.format(me=me_layer, where=where)
            y_titles[quantity] = _Y_TITLES[column]
            for masked, rows in history.inspections.groupby("masked"):
                if rows[column].notna().any():
                    which = ("with the mask" if masked else "without the mask") if has_mask else ""
                    curve = ", ".join(filter(None, [history.name, which]))
                    inspected.setdefault(quantity, {})[curve] = _points(rows, column)
    source = "asked for by the project"
    figures = {}
    if logged:
        plot = over_steps(logged, title=f"Training curves: {title}", y_titles=y_titles)
        observed = _observed(histories, [history.loss_in_words() for history in histories])
        figures["training_loss"] = Figure(plot, source, "", observed)
    if inspected:
        heading = f"Massive activation and sinks in training: {title}"
        plot = over_steps(inspected, title=heading, y_titles=y_titles, markers=True)
        observed = _observed(histories, [history.change_in_words() for history in histories])
        figures["training_trace"] = Figure(plot, source, "", observed)
    return figures


def _points(table: pd.DataFrame, name: str) -> pd.DataFrame:
    return table[["step", name]].dropna().rename(columns={name: "value"})


def _observed(histories: Sequence[TrainingHistory], sentences: Sequence[str]) -> str:
    """Say of each history what it is a mean of; one or two trainings side by side do not tell what others would do."""
    said = []
    for own, sentence in zip(histories, sentences, strict=True):
        mean = f" (mean of {own.n_trainings} trainings)" if own.n_trainings > 1 else ""
        text = f"{own.name}{mean}: {sentence}" if own.name else sentence
        said.append(text if text.endswith(".") else f"{text}.")
    fewest = min(own.n_trainings for own in histories)
    if len(histories) > 1 and fewest < 3:
        said.append(f"Curves of {'one training' if fewest == 1 else 'two trainings'} also differ by chance.")
    return " ".join(said)
