"""From a measured value to a verdict: a claim is data with a threshold fixed in advance, `judge(results)` decides.

    melens.judge(result)  # a row a claim: claim, statistic, criterion, value, low, high, verdict, note

1. Results come as `Result`, or as what their `result.json` holds; those of one model belong together.
2. The metrics become the class that the claim is about, so that a claim reads fields and not keys.
3. What was not measured, and why, is found first; then the claim's own `judge` decides, mostly by `at_least`.
4. Over several models, the claim about families is judged as well.

To add a claim: append a `Claim` to `CLAIMS` beside what measures it, as in `melens/analysis/attention_sinks.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import pandas as pd
from pydantic import ValidationError

from melens.errors import MelensError
from melens.printing import Brief
from melens.report.result import Interval, Metrics, Result
from melens.validation.signatures import given

__all__ = [
    "Claim", "Former", "Judgement", "NotMeasuredError", "Verdict", "at_least", "at_most", "judge", "judge_parts",
    "number", "unless_trivial", "when_set", "worst",
]  # fmt: skip

Verdict = Literal["holds", "holds in part", "does not hold", "trivial here", "not measured"]
M = TypeVar("M", bound=Metrics)


@dataclass(frozen=True)
class Judgement:
    """What a claim comes to on a model.

    Attributes:
        verdict: what it comes to.
        value, interval: what was measured, with its 95% interval where it is a mean over prompts.
        note: what else a reader should know, or why nothing was measured.
    """

    verdict: Verdict
    value: float | int | None = None
    interval: tuple[float, float] | None = None
    note: str = ""

    def noting(self, *notes: str) -> Judgement:
        """Put notes behind its own; empty ones say nothing."""
        return replace(self, note=" ".join(filter(None, (self.note, *notes))))

    def in_part(self) -> Judgement:
        """Take what holds as holding in part."""
        return replace(self, verdict="holds in part") if self.verdict == "holds" else self


@dataclass(frozen=True, repr=False)
class Former(Brief, Generic[M]):
    """How a claim was judged before its threshold was changed: both verdicts are shown.

    Attributes:
        criterion, fixed: what had to be satisfied, word by word as it stood, and when that was fixed.
        judge: gives the verdict by it, from the same metrics.
        statistic: what was measured then, where that was changed too.
    """

    criterion: str
    fixed: str
    judge: Callable[[M], Judgement]
    statistic: str = ""


@dataclass(frozen=True, repr=False)
class Claim(Brief, Generic[M]):
    """A claim of the paper, or of its review.

    Attributes:
        id, claim, source: a short name, the claim in our words, and where it is made.
        metrics, figure: the class of metrics of the experiment that measures it, and which of its figures shows it.
        statistic, criterion, why: what is measured, what it must satisfy, and why that threshold.
        judge: gives the verdict from the experiment's metrics.
        fixed: the date and the commit that fixed the criterion, `2026-11-22 a1bbeb3`.
        former: how it was judged before.
        of_token_0: whether it is measured on token 0, whatever token is massive.
        of_ffn: whether it is about the ME layer's FFN, which in a hybrid not every block has.
        blocks_after: how many blocks it takes between the ME layer and the last two; None if it does not matter.
        needs_me_layer: whether without an ME layer there is nothing to measure.
    """

    id: str
    claim: str
    source: str
    figure: str
    statistic: str
    criterion: str
    why: str
    metrics: type[M]
    judge: Callable[[M], Judgement]
    fixed: str = ""
    former: Former[M] | None = None
    of_token_0: bool = False
    of_ffn: bool = False
    blocks_after: int | None = None
    needs_me_layer: bool = True

    @property
    def experiment(self) -> str:
        """The experiment that measures it."""
        return self.metrics.experiment


_COLUMNS = ("id", "claim", "source", "experiment", "figure", "statistic", "criterion", "fixed", "why")
_JUDGED = ("value", "low", "high", "verdict", "note", "former_criterion", "former_verdict")


def judge(results: Any) -> pd.DataFrame:
    """Judge every claim on every model.

    Args:
        results: `Result`s that experiments returned, or the content of their `result.json`, or one of them; those of
            one model (by name) belong together. With several models the claim about families is judged as well.

    Returns:
        A row for each model and claim: `model`, `id`, `claim`, `source`, `experiment`, `figure`, `statistic`,
        `criterion`, `fixed`, `why`, `value`, `low`, `high`, `verdict`, `note`; where the threshold was changed, also
        `former_criterion` and `former_verdict`.

    Raises:
        MelensError: what is no result.

    Example:
        >>> verdicts = melens.judge(melens.analysis.direction(study))
        >>> verdicts.columns[:4].tolist()
        ['model', 'id', 'claim', 'source']
    """
    from melens.claims.paper import CLAIMS, FAMILY_CLAIM, judge_families  # whose analyses use this module

    by_model: dict[str, dict[str, Any]] = {}
    models: dict[str, dict[str, Any]] = {}
    for content in _contents(results):
        experiment, model, metrics = (content[name] for name in ("experiment", "model", "metrics"))
        name = model.get("label", model["name"])
        by_model.setdefault(name, {}).update(metrics if experiment == "all" else {experiment: metrics})
        models[name] = model
    judged = [(name, claim, _judge_one(claim, parts)) for name, parts in by_model.items() for claim in CLAIMS]
    if len(by_model) > 1:
        me_layers = {name: _of(Metrics, next(iter(parts.values()), {})).me_layer for name, parts in by_model.items()}
        judged += [("all models", FAMILY_CLAIM, one) for one in judge_families(me_layers, models)]
    rows = []
    for name, claim, one in judged:
        former: tuple[str | None, str | None] = (None, None)
        if claim.former is not None and name in by_model:
            before = replace(claim, judge=claim.former.judge)
            earlier = f"{claim.former.statistic}: {claim.former.criterion}".removeprefix(": ")
            former = (f"{earlier} ({when_set(claim.former.fixed)})", _judge_one(before, by_model[name]).verdict)
        of_claim, interval = (getattr(claim, column) for column in _COLUMNS), one.interval or (None, None)
        rows.append((name, *of_claim, one.value, *interval, one.verdict, one.note, *former))
    return pd.DataFrame(rows, columns=["model", *_COLUMNS, *_JUDGED])


def when_set(fixed: str) -> str:
    """Say when a threshold was fixed: "set on 2026-11-22, commit a1bbeb3"."""
    date, _, commit = fixed.partition(" ")
    return f"set on {date}" + f", commit {commit}" * bool(commit)


def judge_parts(results: Sequence[Result]) -> pd.DataFrame:
    """Judge only the claims that these results of one model measure, in the columns of `judge`."""
    claims = judge(results)
    return claims[claims["experiment"].isin({result.experiment for result in results})]


def _contents(results: Any) -> Iterator[Mapping[str, Any]]:
    """Read results, of which one may come alone, as what their `result.json` holds, but for jobs that failed."""
    is_one = isinstance(results, Mapping | Result)
    if isinstance(results, str) or not (is_one or isinstance(results, Iterable)):
        raise MelensError(
            f"judge: results is {given(results)}; it must be results, or what json.loads reads from their result.json."
        )
    for position, result in enumerate([results] if is_one else results):
        content = result if isinstance(result, Mapping) else getattr(result, "__dict__", {})
        if content.get("status", "ok") != "ok":
            continue
        has = {
            "experiment": isinstance(content.get("experiment"), str),
            "model": isinstance(content.get("model"), Mapping),
        }
        parts = {"metrics": content.get("metrics")}
        if content.get("experiment") == "all" and isinstance(parts["metrics"], Mapping):
            parts |= {f"metrics.{name}": part for name, part in parts["metrics"].items()}
        has |= {name: isinstance(part, Mapping | Metrics) for name, part in parts.items()}
        names = {"name": None, **content["model"]} if has["model"] else {}
        has |= {f"model.{name}": isinstance(names[name], str) for name in ("name", "label") if name in names}
        for name in [name for name, is_there in has.items() if not is_there][:1]:
            raise MelensError(
                f"judge: results[{position}] is {given(result)}; it must be a result, which has a field {name!r}."
            )
        yield content


def _judge_one(claim: Claim[Any], measured: Mapping[str, Any]) -> Judgement:
    try:
        if (found := measured.get(claim.experiment)) is None:
            raise NotMeasuredError(f"exp={claim.experiment} was not run.")
        shared = _of(Metrics, found)
        _check_measured(claim, shared)
        judged = claim.judge(_of(claim.metrics, found))
    except KeyError as missing:
        return Judgement("not measured", note=f"The result has no metric {missing}.")
    except NotMeasuredError as error:
        return Judgement("not measured", note=str(error))
    notes = [judged.note]
    n_ffn, n_layers = len(shared.ffn_layers or ()), shared.n_layers or 0
    if claim.of_ffn and judged.verdict != "not measured" and 0 < n_ffn < n_layers:
        notes.append(f"Of {n_layers} blocks {n_ffn} have an FFN that can be measured.")
    of_one_state = shared.n_prompts == 1 or (shared.massive_position == 0 and shared.distinct_first_tokens == 1)
    if of_one_state and claim.metrics.rests_on_states and judged.verdict in ("holds", "holds in part"):
        judged = judged.in_part()  # one state shows nothing of others
        notes.append(f"It rests on a single {'first token' if shared.massive_position == 0 else 'prompt'}.")
    if shared.n_prompts == 1 and claim.metrics.rests_on_states and judged.verdict == "does not hold":
        judged = replace(judged, verdict="not measured")  # nor does it refute anything of others
        notes.append(
            "It does not hold for the only prompt, which is no evidence: give prompts with other first tokens too."
        )
    return replace(judged, note=" ".join(dict.fromkeys(note for note in notes if note)))


def _of(kind: type[M], found: Any) -> M:
    """Return metrics as fields of a class, as an experiment returns them or as JSON holds them."""
    if isinstance(found, kind):
        return found
    values = found if isinstance(found, Mapping) else found.plain()
    try:
        return kind.model_validate({name: value for name, value in values.items() if name in kind.model_fields})
    except ValidationError as error:
        wrong = error.errors()[0]
        raise MelensError(
            f"judge: the metric {'.'.join(map(str, wrong['loc']))} is {given(wrong['input'])}, which no melens of this "
            "version writes: run the experiment again."
        ) from None


def _check_measured(claim: Claim[Any], metrics: Metrics) -> None:
    if metrics.not_applicable is not None:
        raise NotMeasuredError(metrics.not_applicable)
    if not claim.needs_me_layer:
        return
    if metrics.me_layer is None:
        raise NotMeasuredError("The model has no ME layer.")
    if claim.of_token_0 and metrics.massive_position != 0:
        at = metrics.massive_position
        raise NotMeasuredError(f"It is measured on token 0; the massive token is at position {at}.")
    if claim.of_ffn and metrics.ffn_layers is not None and metrics.me_layer not in metrics.ffn_layers:
        raise NotMeasuredError(f"Block {metrics.me_layer}, the ME layer, has no FFN that can be measured.")
    last = metrics.last_lasting_layer
    if claim.blocks_after is not None and last is not None and metrics.me_layer + claim.blocks_after > last:
        raise NotMeasuredError("The ME layer is too near the end: the last two blocks count apart (appendix A).")


# --- For the claims' own judges ---------------------------------------------------------------------------------------


class NotMeasuredError(Exception):
    """Why what a claim rests on was not measured, which is then the verdict; `_judge_one` catches it."""


def number(value: float | None, name: str) -> float:
    """Return a number that a claim rests on.

    Raises:
        NotMeasuredError: it is NaN, with which every comparison is false, or null where JSON has no NaN.
    """
    if value is None or math.isnan(value):
        raise NotMeasuredError(f"The result's {name} is no number (NaN).")
    return value


TOO_FEW = "It was measured fewer than three times, which gives no interval."


def at_least(
    value: float | None,
    interval: Interval | None,
    enough: float | int,
    *,
    partly: float | int | None = None,
    why_not: str | None = None,
) -> Judgement:
    """Judge a mean over prompts: its whole interval must reach `enough`; in part its mean, or `partly`.

    Args:
        value: None where nothing was measured.
        interval: None where it is no mean but a number of the whole model. That of one or two prompts is (NaN, NaN):
            they can show a claim in part at most.
        enough, partly: thresholds.
        why_not: why nothing was measured.

    Raises:
        NotMeasuredError: nothing was measured, or NaN.
    """
    if value is None:
        raise NotMeasuredError(why_not or "The result does not have it.")
    value, measured = number(value, "value"), _measured(interval)
    in_part = value >= (enough if partly is None else min(partly, enough))
    verdict: Verdict = "holds in part" if in_part else "does not hold"
    if measured is not None or interval is None:
        reached = value if measured is None else measured[0]
        return Judgement("holds" if reached >= enough else verdict, value, measured)
    return Judgement(verdict, value, note=TOO_FEW)


def at_most(
    value: float | None,
    interval: Interval | None,
    enough: float | int,
    *,
    partly: float | int | None = None,
    why_not: str | None = None,
) -> Judgement:
    """Judge the other way round: the whole interval must stay at or below `enough`."""
    measured = _measured(interval)
    mirrored = interval if measured is None else (-measured[1], -measured[0])
    negative, partly = None if value is None else -value, None if partly is None else -partly
    judged = at_least(negative, mirrored, -enough, partly=partly, why_not=why_not)
    return replace(judged, value=value, interval=measured)


def worst(*judged: Judgement) -> Judgement:
    """Return the judgement with the worst verdict, of equal ones the first."""
    return min(judged, key=lambda each: ("does not hold", "holds in part", "holds").index(each.verdict))


def _measured(interval: Interval | None) -> tuple[float, float] | None:
    """Read an interval, as an experiment returns it or as JSON holds it, where NaN is null. Of one or two is none."""
    low, high = interval or (None, None)
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return None
    return float(low), float(high)


def unless_trivial(metrics: Metrics, judgement: Judgement) -> Judgement:
    """Mark what follows from the design: in a causal model prompts that share token 0 share its every state."""
    if metrics.distinct_first_tokens != 1:
        return judgement
    note = "All prompts share their first token, so its states are the same by construction."
    return replace(judgement, verdict="trivial here", note=note)
