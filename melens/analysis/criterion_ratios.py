"""What hinges on the criterion's ratio to the median: the ME layer, and the verdicts that rest on it, for other ratios.

    by_ratio = verdicts_by_ratio(study, (500, 2_000))
    by_ratio.verdicts  # a row a ratio and claim: `changed` where the verdict is another than by the study's criterion

1. `find_me_layer` reads the same trace again with every ratio; all else of the criterion stays.
2. Where it finds the same token in the same block in every prompt, every verdict is the same by construction.
3. Elsewhere the analyses run again that need the study's trace alone: all of `OF_THE_TRACE` in `exp=all`, whose trace
   has what each of them measures; and those `WITH_PASSES` of their own where everything is to be judged again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import pandas as pd

from melens import analysis
from melens.analysis.me_layer import Emergence, find_me_layer
from melens.analysis.study import Study
from melens.claims.engine import judge_parts
from melens.errors import MelensError
from melens.printing import Brief
from melens.report.result import Metrics, Result
from melens.tracing.probes import Probe
from melens.tracing.trace import Trace

__all__ = ["ByRatio", "verdicts_by_ratio"]

OF_THE_TRACE = {"emergence": "emergence", "rmsnorm": "normalization", "ffn": "ffn", "direction": "direction"}
WITH_PASSES = {"sinks": "sinks", "ablation": "ablation", "consequence": "consequence", "predict": "prediction"}
"""The experiments that run again, and their functions in `melens.analysis`."""


@dataclass(frozen=True, repr=False)
class ByRatio(Brief):
    """What each ratio gives.

    Attributes:
        found: the emergence by each ratio.
        layers: a row a ratio: `min_ratio`, `me_layer`, `formed`, `agreeing` (prompts whose massive activation is born
            in that ME layer), `prompts`, and whether it is `same` as by the study's own criterion in every prompt.
        verdicts: a row a ratio and claim: `min_ratio`, `me_layer`, `experiment`, `id`, `claim`, `verdict`,
            `by_criterion` (the verdict by the study's own) and `changed`; empty where every ratio gives the same.
    """

    found: dict[float | int, Emergence]
    layers: pd.DataFrame
    verdicts: pd.DataFrame

    @property
    def me_layers(self) -> dict[str, int | None]:
        """The ME layer by ratio."""
        return {f"{ratio:g}": me.layer for ratio, me in self.found.items()}

    @property
    def changed(self) -> dict[str, list[str]]:
        """The claims whose verdict changes, by ratio."""
        changed = self.verdicts[self.verdicts["changed"].astype(bool)]
        return {f"{ratio:g}": own["id"].tolist() for ratio, own in changed.groupby("min_ratio")}

    def in_words(self) -> str:
        """Say in which ratios what changes."""
        by_layer: dict[int | None, list[str]] = {}
        for ratio, me in self.found.items():
            by_layer.setdefault(me.layer, []).append(f"{ratio:,g}")
        named = {"none" if layer is None else f"block {layer}": ratios for layer, ratios in by_layer.items()}
        layers = ", ".join(f"{name} for {_listed(ratios)}" for name, ratios in named.items())
        words = f"By how many times the median an activation must be to count as massive, the ME layer is {layers}."
        if self.verdicts.empty:
            return f"{words} It is the same in every prompt, and so is every verdict on the paper's claims."
        agreeing = [f"{row.agreeing} ({row.min_ratio:,g})" for row in self.layers.itertuples()]
        words += f" Of {self.layers['prompts'].iloc[0]} prompts so many have that layer: {_listed(agreeing)}."
        judged = f"{self.verdicts['id'].nunique()} verdicts ({', '.join(self.verdicts['experiment'].unique())})"
        ratios_of: dict[str, list[str]] = {}
        for of_changed, own in self.verdicts[self.verdicts["changed"].astype(bool)].groupby("min_ratio"):
            changes = [f"{row['id']} to '{row['verdict']}'" for row in own.to_dict("records")]
            ratios_of.setdefault(", ".join(changes), []).append(f"{of_changed:,g}")
        if not ratios_of:
            return f"{words} Of {judged} on the paper's claims none changes."
        by_ratio = [f"for {_listed(ratios)} {changes}" for changes, ratios in ratios_of.items()]
        return f"{words} Of {judged} on the paper's claims these change: {'; '.join(by_ratio)}."


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def verdicts_by_ratio(study: Study, min_ratios: Sequence[float | int], *, judge_all: bool = False) -> ByRatio:
    """Find the ME layer by other ratios to the median, and judge again what then differs.

    Args:
        study: as `melens.study` makes it.
        min_ratios: in place of `Criterion.min_ratio`.
        judge_all: whether those run again too that take passes of their own.

    Raises:
        MelensError: as `find_me_layer`.
    """
    criterion = study.me.criterion
    found: dict[float | int, Emergence] = {
        ratio: find_me_layer(study.trace, replace(criterion, min_ratio=ratio)) for ratio in min_ratios
    }
    rows = []
    for ratio, me in found.items():
        agreeing = int((me.per_prompt["layer"] == me.layer).sum())
        rows.append((ratio, me.layer, me.formed, agreeing, me.n_prompts, _are_same(me, study.me)))
    columns = ["min_ratio", "me_layer", "formed", "agreeing", "prompts", "same"]
    layers = pd.DataFrame(rows, columns=columns).astype({"me_layer": "Int64", "formed": "Int64"})
    return ByRatio(found, layers, _verdicts(study, found, judge_all))


def _are_same(me: Emergence, other: Emergence) -> bool:
    """Tell whether two ratios find the same tokens in the same blocks: then nothing that is measured differs."""
    return (me.layer, me.dims, me.positions) == (other.layer, other.dims, other.positions) and (
        me.per_prompt.equals(other.per_prompt)
    )


def _verdicts(study: Study, found: dict[float | int, Emergence], judge_all: bool) -> pd.DataFrame:
    columns = ["min_ratio", "me_layer", "experiment", "id", "claim", "verdict", "by_criterion", "changed"]
    if all(_are_same(me, study.me) for me in found.values()):
        return pd.DataFrame(columns=columns)
    by_criterion = _judged(study, judge_all)
    tables, done = [], [(study.me, by_criterion)]
    for ratio, me in found.items():
        judged = next((own for other, own in done if _are_same(me, other)), None)
        if judged is None:
            judged = _judged(replace(study, me=me), judge_all)
            done.append((me, judged))
        verdicts = judged.assign(by_criterion=by_criterion["verdict"], min_ratio=ratio, me_layer=me.layer)
        tables.append(verdicts.assign(changed=verdicts["verdict"] != verdicts["by_criterion"]).reset_index())
    return pd.concat(tables, ignore_index=True)[columns].astype({"me_layer": "Int64"})


def _judged(study: Study, judge_all: bool) -> pd.DataFrame:
    """Judge the claims of `OF_THE_TRACE`, and of `WITH_PASSES`: `experiment`, `claim` and `verdict` by id."""
    results = []
    of_the_trace = _OfTheTrace(**{field.name: getattr(study, field.name) for field in fields(Study)})
    for experiment, function in (OF_THE_TRACE | (WITH_PASSES if judge_all else {})).items():
        try:
            results.append(getattr(analysis, function)(study if judge_all else of_the_trace))
        except _NotTracedError:
            continue
        except MelensError as error:  # it does not apply to this model, which its own run says
            metrics = study.metrics(Metrics, not_applicable=str(error))
            results.append(Result(experiment, study.trace.model, metrics))
    return judge_parts(results).set_index("id")[["experiment", "claim", "verdict"]]


class _NotTracedError(Exception):
    """An analysis measures what the study's trace does not have."""


@dataclass(frozen=True, eq=False)
class _OfTheTrace(Study):
    """A study that traces nothing more."""

    def traced(self, probes: Sequence[Probe]) -> Trace:
        if not self.has(probes):
            raise _NotTracedError
        return super().traced(probes)
