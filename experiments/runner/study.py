"""What the experiments of one run share: a model, its prompts, one trace, and what it says of the ME layer."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import melens
from experiments.options import Options
from melens import Criterion, Emergence, MelensError, Probe, Prompt, Trace
from melens.data.prompts import tokenize
from melens.data.texts import cut_texts, read_text
from melens.models.devices import placement
from melens.models.normalization import has_normalization, read_normalization
from melens.report.result import Result
from melens.storage.cache import KEPT, Store, code_version, hash_of, if_it_can_be_kept, store_for
from melens.storage.kept import find_kept, load_result, save_result
from melens.tracing.trace import Progress
from melens.training.recipe import METHODS

__all__ = ["Experiment", "Study", "begin_study", "named_normalization", "run_experiments"]


@dataclass(frozen=True)
class Study:
    """What an experiment works on.

    Attributes:
        model: the bridge.
        tokens: the prompts as token ids.
        cfg: the whole configuration; an experiment's own options come apart.
        trace: of all prompts, with the default probes and those of every experiment of the run.
        me: where the massive activation is born.
        stage: makes the progress callback of a named stage.
        folder: of the run, for what is too large to be a result.
    """

    model: TransformerBridge
    tokens: list[list[int]]
    cfg: Options
    trace: Trace
    me: Emergence
    stage: Callable[[str], Progress]
    folder: Path

    @property
    def n_layers(self) -> int:
        return len(self.model.blocks)

    @property
    def last_lasting(self) -> int:
        """The last block before the trailing ones, which make a second massive activation of their own (appendix A)."""
        return max(0, self.n_layers - self.me.criterion.trailing_blocks - 1)

    @property
    def lasting(self) -> range:
        """The blocks from the ME layer to `last_lasting`."""
        return range(0 if self.me.layer is None else self.me.layer, self.last_lasting + 1)

    @cached_property
    def position(self) -> int:
        """Where the massive token most often is when it is born in the ME layer; 0 without one."""
        positions = self.me.per_prompt[self.me.per_prompt["layer"] == self.me.layer].get(
            "pos", pd.Series([], dtype=int)
        )
        return int(positions.mode().iloc[0]) if len(positions) else 0

    @cached_property
    def carriers(self) -> list[int]:
        """The prompts whose massive activation is born in the ME layer: on token 0, if most are; all without one."""
        if self.me.layer is None:
            return self.trace.prompts["prompt"].tolist()
        born = self.me.per_prompt[self.me.per_prompt["layer"] == self.me.layer]
        return (born if self.position else born[born["pos"] == 0])["prompt"].tolist()

    @cached_property
    def distinct_carriers(self) -> list[int]:
        """One carrier for each first token: in a causal model prompts that share it share its every state."""
        prompts = self.of_carriers(self.trace.prompts)
        return prompts.drop_duplicates("first_token_id")["prompt"].tolist()

    def of_carriers(self, table: pd.DataFrame) -> pd.DataFrame:
        """Keep a table's rows of the carriers."""
        return table[table["prompt"].isin(self.carriers)]

    @cached_property
    def text(self) -> str:
        """The text that a loss is measured on (the node `data`); empty for a model without a tokenizer.

        Raises:
            MelensError: a text is given that the model has no tokenizer to read with.
        """
        data = self.cfg.data
        if self.model.tokenizer is not None:
            return read_text(data.text, split=data.split, column=data.column)
        if data.text is not None:
            raise MelensError(
                "This model has no tokenizer to read data.text with: leave it out, and the loss is measured on random "
                "tokens."
            )
        return ""

    @cached_property
    def texts(self) -> Int[Tensor, "text pos"]:
        """Pieces of that text, of one length; random tokens for a model without a tokenizer."""
        data, bos = self.cfg.data, self.cfg.prompts.bos
        return cut_texts(
            self.model, self.text, n_texts=data.n_texts, n_tokens=data.n_tokens, bos=bos, seed=self.cfg.seed
        )

    def title(self, text: str, n_prompts: int | None = None) -> str:
        """Name the model and the number of prompts behind a figure's title; by default that of the carriers."""
        n_prompts = len(self.carriers) if n_prompts is None else n_prompts
        return f"{text}: {self.trace.model['name']}, {n_prompts} prompt{'s' if n_prompts != 1 else ''}"

    def metrics(self, **own: Any) -> dict[str, Any]:
        """Return an experiment's metrics with those that give them a meaning."""
        shared = {
            "me_layer": self.me.layer,
            "n_prompts": self.me.n_prompts,
            "distinct_first_tokens": self.me.distinct_first_tokens,
            "massive_position": self.position,
            "n_carriers": len(self.carriers),
            "last_lasting_layer": self.last_lasting,
        }
        return shared | own


def named_normalization(model: TransformerBridge, site: str) -> str | None:
    """Name a normalisation as the model does, `RMSNorm post_attention_layernorm (ln2)`; None where no block has it."""
    for layer in range(len(model.blocks)):
        if has_normalization(model, layer, site):
            normalization = read_normalization(model, layer, site)
            return f"{normalization.kind} {normalization.name} ({site})"
    return None


class Experiment(Protocol):
    """A module in `experiments/`: measure, draw, and say what is seen."""

    def probes(self, model: TransformerBridge, options: Any) -> list[Probe]:
        """Return what it wants measured in the shared trace, beyond the default probes."""

    def run(self, study: Study, options: Any) -> Result:
        """Return what it found; a `MelensError` says why it does not apply to this model."""


def _module(name: str) -> Experiment:
    module = "training" if name in METHODS else name
    experiment: Any = importlib.import_module(f"experiments.{module}")
    return experiment


def begin_study(
    model: TransformerBridge,
    prompts: Sequence[Prompt] | Sequence[Tensor],
    cfg: Options,
    stage: Callable[[str], Progress],
    folder: Path = Path(),
) -> Study:
    """Trace all prompts once, with what every experiment of the run wants measured, and find the ME layer."""
    texts = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
    tokens = (
        tokenize(model, texts, bos=cfg.prompts.bos)
        if texts
        else [ids.tolist() for ids in prompts if isinstance(ids, Tensor)]
    )
    wanted = [probe for name, options in cfg.experiments.items() for probe in _probes(model, name, options)]
    kept_in = None
    if cfg.exp.is_kept:  # the jobs of a sweep, and a run that goes on, need not trace the same prompts again
        of_probes = [[type(probe).__qualname__, vars(probe)] for probe in wanted]
        told = [model.cfg.model_name, tokens, texts, cfg.max_batch_tokens, cfg.criterion.min_abs, of_probes, _code()]
        kept_in = store_for("traces", model.original_model, *told).folder
    trace = None if kept_in is None else find_kept(kept_in, Trace.load)
    if trace is None:
        trace = melens.trace(
            model,
            prompts,
            [*melens.default_probes(model, min_abs=cfg.criterion.min_abs), *wanted],
            bos=cfg.prompts.bos,
            max_batch_tokens=cfg.max_batch_tokens,
            progress=stage("tokens traced"),
        )
        if kept_in is not None:
            with if_it_can_be_kept():
                trace.save(kept_in, replace=False)  # another job, that was faster, has readers by now
    KEPT.has_begun = kept_in is not None
    of_run = {"family": cfg.model.family, "placement": placement(model.original_model)}
    trace = replace(trace, model=trace.model | of_run)
    me = melens.find_me_layer(trace, Criterion(**cfg.criterion.model_dump()))
    return Study(model, tokens, cfg, trace, me, stage, folder)


def _code() -> str:
    return code_version(Path(__file__).parents[1])


def _probes(model: TransformerBridge, name: str, options: Any) -> list[Probe]:
    try:
        return _module(name).probes(model, options)
    except Exception:  # it does not apply or is broken, which its run will say
        return []


def run_experiments(study: Study) -> Iterator[Result]:
    """Run every experiment of the configuration, and yield what each found as it ends.

    One of several that does not apply, or fails, tells in its metrics. What each of several found is kept, so that a
    run that was stopped goes on with the next.
    """
    chosen = study.cfg.experiments
    if len(chosen) == 1:
        yield from (_module(name).run(study, options) for name, options in chosen.items())
        return
    store = _store_of_results(study) if study.cfg.exp.is_kept else None
    for name, options in chosen.items():
        ended = study.stage(f"exp={name}")
        result = _find_or_run(study, name, options, store)
        ended(1, 1)
        yield result


def _store_of_results(study: Study) -> Store:
    """Return where the results of this model, prompts and options are kept; those of each experiment come apart."""
    shared = {node: value for node, value in study.cfg.plain().items() if node not in ("exp", "png", "given", "typed")}
    told = [study.tokens, study.trace.prompts.to_dict("list"), shared, _code()]
    return store_for("experiments", study.model.original_model, *told, libraries=("plotly",))


def _find_or_run(study: Study, name: str, options: Any, store: Store | None) -> Result:
    if store is None or hasattr(options, "keep"):  # which keeps its own parts, under what is in the files that it reads
        return _run_one_of_several(study, name, options)
    folder = store.folder / f"{name}-{hash_of(options.model_dump())[:24]}"
    found = find_kept(folder, load_result)
    if found is not None:
        return replace(found, model=study.trace.model, metrics=found.metrics | {"measured_before": True})
    result = _run_one_of_several(study, name, options)
    if "not_applicable" not in result.metrics:
        with if_it_can_be_kept():
            save_result(result, folder)
    return result


def _run_one_of_several(study: Study, name: str, options: Any) -> Result:
    try:
        return _module(name).run(study, options)
    except MelensError as error:
        metrics = study.metrics(not_applicable=str(error))
        return Result(name, study.trace.model, metrics, findings=[(name, f"does not apply: {error}")])
    except Exception as error:  # a mistake of ours should not cost the user the other experiments
        logging.getLogger(__name__).exception("exp=%s failed", name)
        why = f"It failed with {type(error).__name__}: {error}"
        metrics = study.metrics(not_applicable=why, failed=True)
        return Result(name, study.trace.model, metrics, findings=[(name, why)])
