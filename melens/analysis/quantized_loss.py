"""Do massive activations hurt quantisation, and does a mask help? Linear layers rounded to few bits, in simulation.

    result = melens.analysis.quantization(study, [melens.WeMask(0.1)], texts)
    result.metrics.exempt_share_static  # of Δloss at 8 bits: what the massive tokens alone are to blame for

1. The texts run in full precision; a trace of them tells which tokens are massive.
2. What enters the linear layers is rounded (`tracing/rounding.py`), with one scale a layer fixed on the prompts of the
   study, one a text or one a token; then the same with the massive tokens alone in full precision. And the weights.
3. The same under each mask, over the masked model in full precision: what the mask itself costs is told apart.
4. The same behind a prefix: a token in full precision before each text, as keys and values in a cache would be (Son et
   al. 2024, CushionCache; Chen et al. 2024, PrefixQuant). In a causal model the two are the same.

Δloss is paired over texts. Predictions made from token 0 and from massive tokens do not count: what becomes of their
own rows is not what is asked. (Token 0 is predicted from nothing.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from melens.analysis.me_layer import massive_activations
from melens.analysis.quantization_claims import HARMLESS, QuantizationMetrics
from melens.analysis.quantization_figures import (
    NO_MASK,
    PREFIX,
    by_bits_figure,
    by_mask_figure,
    findings_of,
    inputs_figure,
)
from melens.analysis.statistics import mean_interval, mean_metric
from melens.analysis.study import Study
from melens.errors import MelensError
from melens.masks.grid import mask_name
from melens.masks.mask import WeMask
from melens.models.gates import gates_of
from melens.models.view import view_model
from melens.report.result import Result
from melens.tracing.probes import AbsMedian, LargestActivations
from melens.tracing.rounding import MarkedTexts, RoundedRuns, Rounding, Scales
from melens.tracing.trace import trace
from melens.validation.signatures import checked
from melens.validation.types import Count, Said

__all__ = ["Bits", "quantization"]

_Bit = Annotated[int, Field(strict=True, ge=2, le=16)]
Bits = Annotated[Sequence[_Bit], Field(min_length=1), Said("a list of whole numbers from 2 to 16")]

_CLAIMED = 8
"""The bits that the claims are about."""


@checked
def quantization(
    study: Study,
    masks: Sequence[WeMask],
    texts: Int[Tensor, "text pos"],
    *,
    bits: Bits = (8, 6, 4),
    n_texts: Count = 12,
    max_tokens: Count = 64,
) -> Result:
    """Measure what quantisation costs in loss with and without massive tokens, under masks and behind a prefix.

    Args:
        study: as `melens.study` makes it; static scales are fixed on its prompts.
        masks: a `start` counted from the ME layer is taken from the study's. Without an ME layer there is nothing to
            mask, and they are left out.
        texts: token ids, as `melens.data.texts.cut_texts` gives them.
        bits: of activations, and of weights.
        n_texts, max_tokens: how many of the texts are run, and how many tokens of each (and of each prompt).

    Returns:
        Metrics `QuantizationMetrics`; the figures `dloss_by_bits`, `dloss_by_mask` and `linear_inputs`; the tables
        `dloss` (a row a condition and rounding), `dloss_by_text` and `linear_inputs`.

    Raises:
        MelensError: texts of fewer than 3 tokens, a mask that this model cannot have, a mixture of experts, weights
            that are quantised already or not in memory, or a loss that is NaN.

    Example:
        >>> result = melens.analysis.quantization(study, [melens.WeMask(rate=0.1)], texts, bits=[8])
        >>> sorted(result.figures)
        ['dloss_by_bits', 'dloss_by_mask', 'linear_inputs']
    """
    texts = texts[:n_texts, :max_tokens]
    if texts.shape[1] < 3:
        raise MelensError(f"The texts have {texts.shape[1]} tokens each; at least 3 are needed.")
    measured = _Measured(study, texts, max_tokens, tuple(dict.fromkeys(bits)))
    has_me_layer = study.me.layer is not None
    fixed = [mask if mask.fixed is not None else mask.at(study.me).on(study.model) for mask in masks if has_me_layer]
    _run_all(measured, fixed)
    by_text, table = measured.by_text, _averaged(measured.by_text)
    metrics = study.metrics(
        QuantizationMetrics, **_of_texts(measured), **_without_a_mask(measured), **_with_masks(measured, fixed)
    )
    figures = {
        "dloss_by_bits": by_bits_figure(study, metrics, table),
        "dloss_by_mask": by_mask_figure(study, metrics, table),
        "linear_inputs": inputs_figure(study, metrics, measured.inputs),
    }
    tables = {"dloss": table, "dloss_by_text": by_text, "linear_inputs": measured.inputs}
    return Result("quantization", study.trace.model, metrics, tables, figures, findings_of(metrics, table))


# --- Runs -------------------------------------------------------------------------------------------------------------


@dataclass
class _Measured:
    """What is run, and what was measured of it."""

    study: Study
    texts: Int[Tensor, "text pos"]
    max_tokens: int
    bits: tuple[int, ...]
    rows: list[pd.DataFrame] = field(default_factory=list)
    seen: list[pd.DataFrame] = field(default_factory=list)

    @cached_property
    def runs(self) -> RoundedRuns:
        return RoundedRuns(self.study.model)

    @cached_property
    def massive(self) -> list[Bool[Tensor, " pos"]]:
        return _massive_in(self.study, list(self.texts))

    @cached_property
    def marked(self) -> MarkedTexts:
        massive = torch.stack(self.massive)
        counted = ~massive
        counted[:, [0, -1]] = False
        if not counted.any(dim=1).all():
            raise MelensError(
                "All tokens of a text are massive, so no prediction is left that quantisation could harm."
            )
        return MarkedTexts(self.texts, massive, counted)

    @cached_property
    def prompts(self) -> list[tuple[Int[Tensor, " _"], Bool[Tensor, " _"]]]:
        """The study's prompts, cut short, with the marks of their massive tokens."""
        massive = massive_activations(self.study.trace, self.study.me.criterion)
        return [
            (ids[: self.max_tokens], _marks(massive, prompt, len(ids))[: self.max_tokens])
            for prompt, ids in enumerate(self.study.tokens)
        ]

    @cached_property
    def prefix(self) -> int | None:
        """The token to put before the texts: BOS, or what the first of them begins with; None if all begin with it."""
        own = getattr(self.study.model.tokenizer, "bos_token_id", None)
        token = int(self.texts[0, 0]) if own is None else int(own)
        return None if bool((self.texts[:, 0] == token).all()) else token

    @cached_property
    def behind_prefix(self) -> MarkedTexts:
        marked = self.marked
        tokens = torch.nn.functional.pad(marked.tokens, (1, 0), value=self.prefix)
        exempt = torch.zeros_like(tokens, dtype=torch.bool)
        exempt[:, 0] = True
        return MarkedTexts(tokens, exempt, torch.nn.functional.pad(marked.counted, (1, 0)))

    @cached_property
    def prompts_behind_prefix(self) -> list[tuple[Int[Tensor, " _"], Bool[Tensor, " _"]]]:
        longer = [torch.nn.functional.pad(ids, (1, 0), value=self.prefix) for ids, _ in self.prompts]
        return [(ids, torch.arange(len(ids)) == 0) for ids in longer]

    @cached_property
    def by_text(self) -> pd.DataFrame:
        return pd.concat(self.rows, ignore_index=True)

    @cached_property
    def inputs(self) -> pd.DataFrame:
        return pd.concat(self.seen, ignore_index=True)

    def dloss(self, rounding: Rounding, condition: str = NO_MASK) -> Float[np.ndarray, " text"]:
        """Return Δloss of each text."""
        own = self.by_text[self.by_text["condition"] == condition]
        for name, value in _settings(rounding).items():
            own = own[own[name] == value]
        return own["dloss"].to_numpy()


def _massive_in(study: Study, tokens: list[Tensor]) -> list[Bool[Tensor, " pos"]]:
    """Mark the tokens of texts that are massive in the output of any block."""
    probes = [LargestActivations(min_abs=study.me.criterion.min_abs), AbsMedian()]
    found = trace(study.model, tokens, probes, max_batch_tokens=study.max_batch_tokens)
    massive = massive_activations(found, study.me.criterion)
    return [_marks(massive, text, len(ids)) for text, ids in enumerate(tokens)]


def _marks(massive: pd.DataFrame, prompt: int, length: int) -> Bool[Tensor, " pos"]:
    marks = torch.zeros(length, dtype=torch.bool)
    marks[massive[massive["prompt"] == prompt]["pos"].tolist()] = True
    return marks


def _run_all(measured: _Measured, masks: Sequence[WeMask]) -> None:
    """Run the texts without a mask, with each and behind a prefix, in full precision and rounded in each way."""
    whole: list[Rounding] = []
    for bits in measured.bits:
        exempt = [False, True] if bool(measured.marked.exempt.any()) else [False]
        whole += [Rounding(bits, kind, exempt=each) for kind in ("static", "tensor", "token") for each in exempt]
        whole += [Rounding(bits, weights=kind) for kind in ("channel", "tensor")]
        whole += [Rounding(bits, kind, "channel") for kind in ("tensor", "token")]
    dynamic = [Rounding(bits, kind) for bits in measured.bits for kind in ("tensor", "token")]
    # the prefix is in full precision, as if it were in a cache
    cached = [Rounding(bits, kind, exempt=True) for bits in measured.bits for kind in ("static", "tensor", "token")]
    has_prefix = measured.prefix is not None and measured.texts.shape[1] < measured.study.model.cfg.n_ctx
    total = len(whole) + len(masks) * len(dynamic) + has_prefix * len(cached) + len(masks) + 1 + has_prefix
    progress, done = measured.study.stage("texts with rounded layers"), 0

    def run(condition: str, texts: MarkedTexts, roundings: Sequence[Rounding], scales: Callable[[], Scales]) -> None:
        nonlocal done
        found = scales() if any(each.activations == "static" for each in roundings) else None
        measured.seen.append(measured.runs.inputs(texts).assign(condition=condition))
        losses = {}
        for rounding in (None, *roundings):
            losses[rounding] = measured.runs.loss(texts, rounding, found).double().numpy()
            progress(done := done + 1, total)
        for rounding in roundings:
            own = {"condition": condition, **_settings(rounding), "text": range(len(texts.tokens))}
            own |= {"loss": losses[rounding], "dloss": losses[rounding] - losses[None]}
            measured.rows.append(pd.DataFrame(own))

    run(NO_MASK, measured.marked, whole, lambda: measured.runs.scales(measured.prompts))
    for mask in masks:
        with mask.applied(measured.study.model):
            run(mask_name(mask), measured.marked, dynamic, lambda: measured.runs.scales(measured.prompts))
    if has_prefix:
        prompts = measured.prompts_behind_prefix
        run(PREFIX, measured.behind_prefix, cached, lambda: measured.runs.scales(prompts))


def _settings(rounding: Rounding) -> dict[str, Any]:
    """Return a rounding as columns: full precision is a word too, which tables sort and group by."""
    return {
        "activations": rounding.activations or "full", "weights": rounding.weights or "full", "bits": rounding.bits,
        "exempt": rounding.exempt,
    }  # fmt: skip


def _averaged(by_text: pd.DataFrame) -> pd.DataFrame:
    """Average over texts: a row a condition and rounding, with `dloss`, its interval, and the `loss` itself."""
    rows = []
    names = ["condition", "activations", "weights", "bits", "exempt"]
    for settings, own in by_text.groupby(names, sort=False):
        low, high = mean_interval(own["dloss"].to_numpy())
        rows.append((*settings, own["loss"].mean(), own["dloss"].mean(), low, high))
    return pd.DataFrame(rows, columns=[*names, "loss", "dloss", "low", "high"])


# --- Metrics ----------------------------------------------------------------------------------------------------------


def _of_texts(measured: _Measured) -> dict[str, Any]:
    marked, runs = measured.marked, measured.runs
    own = measured.by_text[measured.by_text["condition"] == NO_MASK]
    return {
        "texts": len(marked.tokens),
        "tokens_per_text": marked.tokens.shape[1],
        "predictions_per_text": float(marked.counted.sum(dim=1).double().mean()),
        "massive_per_text": float(marked.exempt.sum(dim=1).double().mean()),
        "calibration_prompts": len(measured.prompts),
        "linear_layers": runs.n_layers,
        "share_of_weights": runs.share_of_weights,
        "are_of_4_bits": runs.are_of_4_bits,
        "has_gates": bool(gates_of(view_model(measured.study.model))),
        "bits": list(measured.bits),
        "loss": float((own["loss"] - own["dloss"]).mean()),
    }


def _without_a_mask(measured: _Measured) -> dict[str, Any]:
    if _CLAIMED not in measured.bits:
        return {"bits_why_not": f"{_CLAIMED} bits were not tried."}
    found: dict[str, Any] = {}
    has_massive = bool(measured.marked.exempt.any())
    for kind in ("static", "tensor", "token"):
        rise = measured.dloss(Rounding(_CLAIMED, kind))
        found |= mean_metric(f"dloss_{kind}", rise)
        if kind != "token" and has_massive:
            left = measured.dloss(Rounding(_CLAIMED, kind, exempt=True))
            found |= _share_gone(f"exempt_share_{kind}", "exempt_why_not", rise, left)
    if not has_massive:
        found["exempt_why_not"] = "No token of the texts is massive."
    return found | _behind_the_prefix(measured)


def _behind_the_prefix(measured: _Measured) -> dict[str, Any]:
    if measured.prefix is None:
        return {"prefix_why_not": "The texts all begin with the token that would be the prefix."}
    if not (measured.by_text["condition"] == PREFIX).any():
        return {"prefix_why_not": "With a prefix the texts are longer than the model's context."}
    tokenizer = measured.study.model.tokenizer
    words = str(measured.prefix) if tokenizer is None else repr(tokenizer.decode([measured.prefix]))
    massive = torch.stack(_massive_in(measured.study, list(measured.behind_prefix.tokens)))
    of_prompts = _massive_in(measured.study, [ids for ids, _ in measured.prompts_behind_prefix])
    static = measured.dloss(Rounding(_CLAIMED, "static", exempt=True), PREFIX)
    return {
        "prefix": words,
        "prefix_is_massive": bool(massive[:, 0].all()),
        "massive_behind_prefix": float(massive[:, 1:].sum(dim=1).double().mean()),
        "prompts_massive_behind_prefix": sum(bool(marks[1:].any()) for marks in of_prompts),
        **mean_metric("prefix_over_token", static - measured.dloss(Rounding(_CLAIMED, "token"))),
    }


def _with_masks(measured: _Measured, masks: Sequence[WeMask]) -> dict[str, Any]:
    if _CLAIMED not in measured.bits:
        return {}
    if not masks:
        return {
            "mask_why_not": "There is no mask: none was asked for, or there is no ME layer behind which one begins."
        }
    rounding = Rounding(_CLAIMED, "tensor")
    rise = measured.dloss(rounding)
    found: dict[str, Any] = {}
    best = min(masks, key=lambda mask: measured.dloss(rounding, mask_name(mask)).mean())
    own = next((mask for mask in masks if mask.select == "weight" and mask.site == "attn_in"), None)
    for name, mask in (("mask", own), ("best_mask", best)):
        if mask is not None:
            left = measured.dloss(rounding, mask_name(mask))
            found |= {name: mask_name(mask), **_share_gone(f"{name}_share", "mask_why_not", rise, left)}
    return found if own else found | {"mask_why_not": "None of the masks is WeMask at the attention input."}


def _share_gone(name: str, why_not: str, rise: np.ndarray, left: np.ndarray) -> dict[str, Any]:
    """Return the share of a mean rise that is gone where another is left, with its interval by the delta method.

    Texts differ more in their rise than in the share of it: with the divisor taken for fixed, as if it had no error of
    its own, the interval would be several times as wide.
    """
    if not mean_interval(rise)[0] > HARMLESS:  # also NaN, of fewer than three texts
        return {
            why_not: f"No rise of the loss over {HARMLESS:g} is shown at {_CLAIMED} bits, of which a share could be."
        }
    share = 1 - left.mean() / rise.mean()
    return mean_metric(name, share + (rise - left - share * rise) / rise.mean())
