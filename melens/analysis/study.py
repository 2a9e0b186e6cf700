"""What every analysis starts from: a model, its prompts as tokens, one trace of them, and the ME layer that it shows.

    study = melens.study(model, prompts)
    study.me                        # block 11 of 30, × 157 (153 to 160), token 0, dim 507
    melens.analysis.sinks(study)

1. The prompts become tokens once; the trace runs them once, with the default probes and those that are asked for.
2. `find_me_layer` reads the ME layer off that trace.
3. An analysis asks `study.traced(probes)` for what else it measures: of a probe that the trace has already nothing is
   run again, any other is traced in one further pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import pandas as pd
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.me_layer import Criterion, CriterionGiven, Emergence, find_me_layer
from melens.models.layout import Layout
from melens.printing import Summary, counted
from melens.report.result import Metrics
from melens.storage.cache import hash_of
from melens.tracing.probes import Probe
from melens.tracing.trace import Progress, Trace, as_tokens, default_probes, trace
from melens.validation.arguments import BosOrNot, Bridge, Probes, Prompts
from melens.validation.signatures import checked
from melens.validation.types import Count, Whole

__all__ = ["Stage", "Study", "probe_key", "study"]

Stage = Callable[[str], Progress]
"""Called as `stage("effective ranks (tokens)")`; returns the progress callback of that stage."""

M = TypeVar("M", bound=Metrics)


def _silent(name: str) -> Progress:
    return lambda done, total: None


@dataclass(frozen=True, eq=False, repr=False)
class Study(Summary):
    """What an analysis works on.

    Attributes:
        model: the bridge.
        tokens: the prompts as token ids, each `[pos]`.
        trace: of all prompts, with the default probes and what was asked for besides.
        me: where the massive activation is born, and where it is formed.
        probes: what the trace holds.
        max_batch_tokens: of a forward pass, padding included.
        seed: of whatever an analysis draws.
        stage: makes the progress callback of a named stage.

    Example:
        >>> study.n_layers == len(model.blocks), study.me.layer, study.position
        (True, 2, 0)
        >>> more = study.traced([melens.AttentionEntropy()])  # in one further pass; `study.trace` stays as it is
        >>> "attention_entropy" in more.tables, "norm" in more.tables
        (True, True)
    """

    model: TransformerBridge
    tokens: Sequence[Int[Tensor, " _"]]
    trace: Trace
    me: Emergence
    probes: Sequence[Probe] = ()
    max_batch_tokens: int = 4096
    seed: int = 0
    stage: Stage = _silent
    _traced: dict[str, Trace] = field(default_factory=dict, repr=False)

    @property
    def n_layers(self) -> int:
        return len(self.model.blocks)

    @cached_property
    def layout(self) -> Layout:
        """Which blocks have attention, and which an FFN, that can be measured."""
        return Layout.of(self.model)

    @property
    def last_before_trailing(self) -> int:
        """The last block before the trailing ones, which count apart (appendix A)."""
        return max(0, self.n_layers - self.me.criterion.trailing_blocks - 1)

    @property
    def massive_layers(self) -> range:
        """The blocks in whose output the massive state is formed, up to `last_before_trailing`."""
        return range(self.me.formed or 0, self.last_before_trailing + 1)

    @cached_property
    def _born(self) -> pd.DataFrame:
        """The rows of `me.per_prompt` whose massive activation is born in the ME layer."""
        return self.me.per_prompt[self.me.per_prompt["layer"] == self.me.layer]

    @cached_property
    def position(self) -> int:
        """Where the massive token most often is once it is formed; 0 without an ME layer."""
        return int(self._born["formed_pos"].mode().iloc[0]) if len(self._born) else 0

    @cached_property
    def massive_prompts(self) -> list[int]:
        """The prompts whose massive activation is born in the ME layer: on token 0, if most are; all without one."""
        if self.me.layer is None:
            return self.trace.prompts["prompt"].tolist()
        born = self._born
        return (born if self.position else born[born["formed_pos"] == 0])["prompt"].tolist()

    @cached_property
    def distinct_massive_prompts(self) -> list[int]:
        """One of them for each first token: in a causal model prompts that share it share its every state."""
        prompts = self.of_massive_prompts(self.trace.prompts)
        return prompts.drop_duplicates("first_token_id")["prompt"].tolist()

    @property
    def massive_states(self) -> list[int]:
        """One prompt for each massive state: `distinct_massive_prompts` where token 0 is the massive one, else all."""
        return self.massive_prompts if self.position else self.distinct_massive_prompts

    def of_massive_prompts(self, table: pd.DataFrame) -> pd.DataFrame:
        """Keep a table's rows of the prompts whose massive activation is born in the ME layer."""
        return table[table["prompt"].isin(self.massive_prompts)]

    def has(self, probes: Sequence[Probe]) -> bool:
        """Tell whether all that these probes measure was traced already."""
        return {probe_key(probe) for probe in probes} <= {
            probe_key(probe) for probe in self.probes
        } | self._traced.keys()

    def traced(self, probes: Sequence[Probe]) -> Trace:
        """Return a trace that holds what these probes measure: the study's own, or another of the same prompts.

        A probe counts as the same if its class and all its settings are.

        Raises:
            MelensError: as `melens.trace`.
        """
        wanted = {probe_key(probe): probe for probe in probes}
        own = {probe_key(probe) for probe in self.probes}
        missing = [probe for key, probe in wanted.items() if key not in own | self._traced.keys()]
        if missing:
            tokens, most, progress = (
                list(self.tokens),
                self.max_batch_tokens,
                self.stage("tracing the prompts again (tokens)"),
            )
            more = trace(self.model, tokens, missing, max_batch_tokens=most, progress=progress)
            self._traced.update({probe_key(probe): more for probe in missing})
        traces = [self._traced[key] for key in wanted if key in self._traced]
        tables = {name: table for each in (self.trace, *traces) for name, table in each.tables.items()}
        tensors = {name: tensor for each in (self.trace, *traces) for name, tensor in each.tensors.items()}
        return replace(self.trace, tables=tables, tensors=tensors) if traces else self.trace

    def title(self, text: str, n_prompts: int | None = None) -> str:
        """Put the model and the number of prompts behind a figure's title; by default that of `massive_prompts`."""
        n_prompts = len(self.massive_prompts) if n_prompts is None else n_prompts
        return f"{text}: {self.trace.model['name']}, {n_prompts} prompt{'s' if n_prompts != 1 else ''}"

    def metrics(self, kind: type[M], /, **own: Any) -> M:
        """Return an experiment's metrics, of its class and with its own fields, and those that give them a meaning."""
        return kind(**self.shared_metrics | own)

    @property
    def shared_metrics(self) -> dict[str, Any]:
        """The fields that every experiment's metrics have."""
        return {
            "me_layer": self.me.layer,
            "formed": self.me.formed,
            "n_prompts": self.me.n_prompts,
            "distinct_first_tokens": self.me.distinct_first_tokens,
            "massive_position": self.position,
            "n_carriers": len(self.massive_prompts),
            "last_lasting_layer": self.last_before_trailing,
        }

    def _heading(self) -> str:
        return f"Study of {self.trace.model['name']} on {counted(self.me.n_prompts, 'prompt')}: {self.me!r}"

    def _details(self) -> list[tuple[str, str]]:
        return [*self.me._details(), *self.trace._rows()]


def probe_key(probe: Probe) -> str:
    """Name what a probe measures: of two with one key, of one class and with the same settings, one is enough."""
    settings = {name: value for name, value in vars(probe).items() if name != "may_miss"}  # which changes no number
    return hash_of(type(probe).__qualname__, settings)


@checked
def study(
    model: Bridge,
    prompts: Prompts,
    probes: Probes = None,
    *,
    bos: BosOrNot = "auto",
    criterion: CriterionGiven | None = None,
    max_batch_tokens: Count = 4096,
    seed: Whole = 0,
    stage: Stage = _silent,
) -> Study:
    """Trace the prompts once and find the ME layer: what every function of `melens.analysis` takes.

    Args:
        model: a bridge of a causal language model.
        prompts: as for `melens.trace`.
        probes: what to measure in the same pass besides what `find_me_layer` needs.
        bos: whether to prepend BOS to texts: `"auto"` does as the model's own tokenizer.
        criterion: of what counts as massive.
        max_batch_tokens: of a forward pass, padding included.
        seed: of whatever an analysis draws.
        stage: makes the progress callback of a named stage, for who wants to show it.

    Returns:
        A `Study`: the tokens, the trace and the ME layer.

    Raises:
        MelensError: as `melens.trace` and `melens.find_me_layer`.

    Example:
        >>> study = melens.study(model, prompts, [melens.SinkByQuery()])
        >>> study.me.layer, "sink_by_query" in study.trace.tables
        (2, True)
    """
    criterion = criterion or Criterion()
    everything = [*default_probes(model, min_abs=criterion.min_abs), *(probes or ())]
    tokenized = as_tokens(model, prompts, bos)
    found = trace(
        model, tokenized, everything, max_batch_tokens=max_batch_tokens, progress=stage("tracing the prompts (tokens)")
    )
    me = find_me_layer(found, criterion)
    return Study(model, tokenized.tokens, found, me, everything, max_batch_tokens, seed, stage)
