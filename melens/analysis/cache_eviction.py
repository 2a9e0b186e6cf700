"""What a sliding KV cache costs on long texts: with sinks kept, with other tokens kept, and each under WeMask.

    result = melens.analysis.eviction(study, cache=128)
    result.figures["loss_by_position"]

1. `check_cache` refuses a model in which a cache cannot be simulated in one pass.
2. Texts run once a cache (`melens.analysis.cache_losses`): with every token kept, recomputed in pieces, with 0, 1 and 4
   first tokens kept, and with four random early ones: a few draws, and under the mask the first of them.
3. A query counts from position `cache` on: by then every sliding cache has lost tokens.
4. Questions about a number told earlier in a longer text are answered under the same caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from melens.analysis.cache_eviction_claims import CLAIMS, EvictionMetrics
from melens.analysis.cache_losses import needles_found, recomputed_losses, token_losses
from melens.analysis.statistics import (
    mean_by,
    mean_interval,
    mean_metric,
    share_interval,
    two_way_interval,
    with_interval,
)
from melens.analysis.study import Study
from melens.benchmarks.catalog import BENCHMARKS
from melens.benchmarks.language import LanguageData, Needle, Questions, make_questions
from melens.data.prompts import Bos
from melens.data.texts import bos_prefix, cut_texts, read_text
from melens.errors import MelensError
from melens.figures.bars import difference_bars
from melens.figures.eviction import loss_by_position
from melens.figures.style import COLORS
from melens.masks.mask import WeMask
from melens.printing import counted
from melens.report.result import Figure, Result
from melens.tracing.sliding_cache import SlidingCache, check_cache

__all__ = ["CLAIMS", "EvictionMetrics", "eviction", "long_texts"]

FULL, RECOMPUTED, RANDOM = "every token kept", "recomputed", "4 random tokens"

_EARLY = 64
"""Random tokens are drawn from so many first ones, but token 0."""

_Losses = dict[tuple[str, bool, int], Float[np.ndarray, "text query"]]
"""By cache, whether under the mask, and draw: the loss of each query's next token, in nats."""


@dataclass(frozen=True)
class _Policy:
    """What a cache keeps: a cache a draw, None for no cache that slides."""

    name: str
    caches: Sequence[SlidingCache | None]


def eviction(
    study: Study,
    mask: WeMask | None = None,
    *,
    text: str | None = None,
    bos: Bos = "auto",
    cache: int = 128,
    sinks: Sequence[int] = (0, 1, 4),
    draws: int = 3,
    n_texts: int = 5,
    n_tokens: int = 512,
    needles: int = 5,
) -> Result:
    """Measure loss by position and needles found under a sliding cache with and without sinks, unmasked and masked.

    Args:
        study: as `melens.study` makes it.
        mask: at a block; by default the paper's, and none for a model without an ME layer.
        text: a long one, of which texts are cut; by default `melens.data.texts.read_text()`.
        bos: as for prompts.
        cache: tokens that the sliding cache holds, the query's own among them.
        sinks: how many first tokens it keeps; 0 and 4, which the claims are about, are always among them.
        draws: of the four random early tokens that are kept instead.
        n_texts, n_tokens: how many texts, and of how many tokens, at least two caches.
        needles: questions about a number in a text of twice the cache; 0 for none.

    Returns:
        Metrics `EvictionMetrics`; the tables `loss_by_position`, `loss_rise` and, with needles, `needles`; the figures
        `loss_by_position` and `loss_rise`.

    Raises:
        MelensError: a model in which no cache can be simulated, a text that is too short, sizes that do not fit, or a
            loss that is NaN.

    Example:
        >>> text = " ".join(prompts)
        >>> result = melens.analysis.eviction(study, text=text, cache=16, n_texts=3, n_tokens=48, draws=1, needles=0)
        >>> sorted(result.figures)
        ['loss_by_position', 'loss_rise']
        >>> result.tables["loss_rise"].columns.tolist()
        ['policy', 'masked', 'mean', 'low', 'high']
    """
    policies = _policies(cache, sinks, draws, study.seed)
    texts, ids = long_texts(
        study.model, text, cache=cache, n_texts=n_texts, n_tokens=n_tokens, bos=bos, seed=study.seed
    )
    check_cache(study.model, cache, n_tokens)
    if mask is None and study.me.layer is not None:
        mask = WeMask().at(study.me)
    questions, why_no_needles = _questions(study, ids, bos, cache, needles)
    losses, found = _run(study, policies, mask, texts, questions, cache)
    by_position, rises = _by_position(losses, cache), _rises(losses, cache)
    measured = _losses_as_metrics(losses, rises, cache)
    measured |= (
        {"mask": repr(mask)} if mask is not None else {"mask_why_not": "The model has no ME layer to mask from."}
    )
    measured |= _needles_as_metrics(found) if questions else {"needle_why_not": why_no_needles}
    metrics = study.metrics(
        EvictionMetrics,
        cache=cache,
        texts=n_texts,
        tokens_per_text=n_tokens,
        text_first_tokens=len(texts[:, 0].unique()),
        trained_context=int(study.model.cfg.n_ctx),
        **measured,
    )
    tables = {"loss_by_position": by_position, "loss_rise": rises} | ({"needles": found} if questions else {})
    figures = _figures(study, by_position, rises, metrics)
    return Result("eviction", study.trace.model, metrics, tables, figures, _findings(metrics))


def long_texts(
    model: Any, text: str | None, *, cache: int, n_texts: int, n_tokens: int, bos: Bos = "auto", seed: int = 0
) -> tuple[Int[Tensor, "text pos"], list[int]]:
    """Cut texts out of a long one, which may go beyond the context that the model was trained on.

    Args:
        model: a bridge or a `PlannedModel`; without a tokenizer the texts are random tokens.
        text, cache, n_texts, n_tokens, bos: as for `eviction`.
        seed: of random tokens.

    Returns:
        Token ids, and those of the whole text without BOS.

    Raises:
        MelensError: a text that is too short, or texts that are too short for the cache.
    """
    if n_tokens < 2 * cache:
        raise MelensError(
            f"Texts of {n_tokens:,} tokens are too short for a cache of {cache:,}: give n_tokens={2 * cache} or more, "
            "or a smaller cache."
        )
    if model.tokenizer is None:
        return cut_texts(model, "", n_texts=n_texts, n_tokens=n_tokens, seed=seed, beyond_context=True), []
    ids = model.tokenizer(read_text() if text is None else text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < n_texts * n_tokens:
        raise MelensError(
            f"The text has {len(ids):,} tokens, too few for {n_texts} of {n_tokens:,}: lower n_texts or n_tokens, or "
            "give a longer one."
        )
    return cut_texts(model, ids, n_texts=n_texts, n_tokens=n_tokens, bos=bos, seed=seed, beyond_context=True), ids


# --- What is run ------------------------------------------------------------------------------------------------------


def _policies(cache: int, sinks: Sequence[int], draws: int, seed: int) -> list[_Policy]:
    policies = [_Policy(FULL, [None]), _Policy(RECOMPUTED, [None])]
    for n_sinks in sorted({0, 4, *sinks}):
        policies.append(_Policy(_sinks_in_words(n_sinks), [SlidingCache(cache, tuple(range(n_sinks)))]))
    generator = np.random.default_rng(seed)
    early = np.arange(1, min(_EARLY, cache - 4))
    kept = [sorted(generator.choice(early, 4, replace=False).tolist()) for _ in range(draws)]
    return [*policies, _Policy(RANDOM, [SlidingCache(cache, tuple(tokens)) for tokens in kept])]


def _sinks_in_words(n_sinks: int) -> str:
    return f"{counted(n_sinks, 'sink')} kept" if n_sinks else "no sinks"


def _questions(
    study: Study, ids: Sequence[int], bos: Bos, cache: int, needles: int
) -> tuple[Questions | None, str | None]:
    """Hide numbers in texts of twice the cache; or say why not."""
    tokenizer, length = study.model.tokenizer, 2 * cache
    if not needles:
        return None, "No needles were asked for."
    if tokenizer is None:
        return None, "The model has no tokenizer to ask for a number with."
    if length < 64:
        return None, f"A cache of {cache} tokens is too short for the question."
    bos_ids, none = bos_prefix(tokenizer, bos), torch.empty((0, 0), dtype=torch.long)
    data = LanguageData(none, ids, bos_ids, study.seed, Needle([length]))
    return make_questions(
        BENCHMARKS["needle"], tokenizer, data, vocabulary=study.model.cfg.d_vocab, limit=needles
    ), None


def _run(
    study: Study,
    policies: Sequence[_Policy],
    mask: WeMask | None,
    texts: Int[Tensor, "text pos"],
    questions: Questions | None,
    size: int,
) -> tuple[_Losses, pd.DataFrame]:
    """Return the losses, and a row a question: `policy`, `masked`, `item`, `found`."""
    wanted = list(_runs(policies, masked=mask is not None))
    progress = study.stage("long texts under each cache")
    losses: _Losses = {}
    found = []
    for done, (name, is_masked, draw, cache) in enumerate(wanted, 1):
        with mask.applied(study.model) if mask is not None and is_masked else nullcontext():
            if name == RECOMPUTED:
                own = recomputed_losses(study.model, texts, size, max_batch_tokens=study.max_batch_tokens)
            else:
                own = token_losses(study.model, texts, cache)
            if questions is not None and name != RECOMPUTED and draw == 0:
                right = needles_found(study.model, questions, cache).numpy()
                columns = {"policy": name, "masked": is_masked, "item": questions.items, "found": right}
                found.append(pd.DataFrame(columns))
        if not own.isfinite().all():
            raise MelensError(f"A loss with {name} is NaN or infinite: load the model in float32.")
        losses[name, is_masked, draw] = own.double().numpy()
        progress(done, len(wanted))
    return losses, pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _runs(policies: Sequence[_Policy], *, masked: bool) -> Iterator[tuple[str, bool, int, SlidingCache | None]]:
    """List policies and draws, without the mask and with it, which gets one draw alone."""
    for is_masked in (False, True)[: 1 + masked]:
        for policy in policies:
            for draw, cache in enumerate(policy.caches[:1] if is_masked else policy.caches):
                yield policy.name, is_masked, draw, cache


# --- What comes of it -------------------------------------------------------------------------------------------------


def _by_position(losses: _Losses, cache: int) -> pd.DataFrame:
    """Average over half caches, of which `position` is the middle; `rise` is over recomputation of the same text."""
    width, rows = cache // 2, []
    for (policy, masked, draw), values in losses.items():
        for begin in range(0, values.shape[1], width):
            own, reference = (each[:, begin : begin + width] for each in (values, losses[RECOMPUTED, masked, 0]))
            part = pd.DataFrame({"policy": policy, "masked": masked, "draw": draw, "text": range(len(own))})
            part = part.assign(position=begin + own.shape[1] / 2, n_tokens=own.shape[1])
            rows.append(part.assign(loss=own.mean(1), rise=(own - reference).mean(1)))
    return pd.concat(rows, ignore_index=True)


def _behind(losses: _Losses, policy: str, masked: bool, cache: int) -> Float[np.ndarray, "text draw"]:
    """Return the mean loss of the queries that have lost tokens, by text and draw, over recomputation's."""
    draws = [values[:, cache:].mean(1) for (name, *at, _), values in losses.items() if [name, *at] == [policy, masked]]
    return np.stack(draws, axis=1) - losses[RECOMPUTED, masked, 0][:, cache:].mean(1)[:, None]


def _rises(losses: _Losses, cache: int) -> pd.DataFrame:
    rows = []
    for policy, masked in dict.fromkeys((name, masked) for name, masked, _ in losses if name != RECOMPUTED):
        rises = _behind(losses, policy, masked, cache)
        rows.append((policy, masked, float(rises.mean()), *_interval(rises)))
    return pd.DataFrame(rows, columns=["policy", "masked", "mean", "low", "high"])


def _interval(rises: Float[np.ndarray, "text draw"]) -> tuple[float, float]:
    return mean_interval(rises[:, 0]) if rises.shape[1] == 1 else two_way_interval(rises)


def _losses_as_metrics(losses: _Losses, rises: pd.DataFrame, cache: int) -> dict[str, Any]:
    def by_policy(masked: bool) -> dict[str, float]:
        own = rises[rises["masked"] == masked]
        return dict(zip(own["policy"], own["mean"], strict=True))

    without = _behind(losses, _sinks_in_words(0), False, cache)[:, 0]
    random = _behind(losses, RANDOM, False, cache)
    measured = {
        "loss_recomputed": float(losses[RECOMPUTED, False, 0][:, cache:].mean()),
        "loss_full": float(losses[FULL, False, 0][:, cache:].mean()),
        "rise_by_policy": by_policy(False),
        **mean_metric("rise_without", without),
        **mean_metric("rise_with_four", _behind(losses, _sinks_in_words(4), False, cache)[:, 0]),
        "rise_with_random": float(random.mean()),
        "rise_with_random_interval": _interval(random),
    }
    if (FULL, True, 0) in losses:
        masked = _behind(losses, _sinks_in_words(0), True, cache)[:, 0]
        half = losses[FULL, False, 0].shape[1] // 2
        full = [losses[FULL, is_masked, 0][:, half:].mean(1) for is_masked in (False, True)]
        measured |= {"rise_by_policy_masked": by_policy(True), **mean_metric("rise_without_masked", masked)}
        measured |= mean_metric("rise_spared", without - masked) | mean_metric("loss_masked_less", full[1] - full[0])
    return measured


def _needles_as_metrics(found: pd.DataFrame) -> dict[str, Any]:
    shares = found.groupby(["masked", "policy"], sort=False)["found"].mean()
    measured: dict[str, Any] = {"needles": found["item"].nunique(), "needle_by_policy": shares[False].to_dict()}
    return measured | ({"needle_by_policy_masked": shares[True].to_dict()} if found["masked"].any() else {})


# --- Figures and words ------------------------------------------------------------------------------------------------


def _figures(
    study: Study, by_position: pd.DataFrame, rises: pd.DataFrame, metrics: EvictionMetrics
) -> dict[str, Figure]:
    texts = f"{study.trace.model['name']}, {counted(metrics.texts, 'text')} of {metrics.tokens_per_text:,} tokens"
    line = _position_plot(by_position, metrics, f"Loss by position: {texts}")
    rows = rises.assign(name=rises["policy"] + np.where(rises["masked"], ", masked", ""))
    x_title, title = "rise of the loss over recomputation (nats a token)", f"What a cache costs: {texts}"
    note = f"Cache of {metrics.cache} tokens; queries that have lost tokens. Whiskers: 95% intervals over texts, of "
    bars = difference_bars(rows, x_title=x_title, title=title, note=f"{note}random tokens over draws too.")
    observed = (
        f"Rise: {', '.join(f'{name} {rise:+.3f}' for name, rise in metrics.rise_by_policy.items())} nats a token."
    )
    expected = "Without sinks the loss explodes once the cache is full, with four it stays flat."
    return {
        "loss_by_position": Figure(line, "Xiao et al. (2023), figure 3", expected, observed),
        "loss_rise": Figure(bars, "Xiao et al. (2023), table 2", "Four sinks restore the loss.", observed),
    }


def _position_plot(by_position: pd.DataFrame, metrics: EvictionMetrics, title: str) -> go.Figure:
    of_text = ["policy", "masked", "text", "position"]
    over_draws = by_position.groupby(of_text, sort=False)[["loss", "rise"]].mean().reset_index()
    losses, rises = {}, {}
    for masked, own in over_draws.rename(columns={"text": "prompt"}).groupby("masked"):
        name = "With the mask" if masked else "Without a mask"
        losses[name] = mean_by(own, "loss", ("policy", "position")).drop(columns=["low", "high"])
        others = own[own["policy"] != RECOMPUTED]
        rises[f"{name}, over recomputation"] = mean_by(others, "rise", ("policy", "position"))
    colors = dict(zip(by_position["policy"].unique(), (COLORS[6], COLORS[7], *COLORS[:6]), strict=False))
    marks = {"the cache is full": metrics.cache}
    if metrics.trained_context and metrics.trained_context < metrics.tokens_per_text:
        marks["context trained on"] = metrics.trained_context
    note = f"Points: means over {metrics.cache // 2} tokens and over texts. Bands: 95% intervals over texts."
    return loss_by_position(losses, rises, colors, marks=marks, title=title, note=note)


def _findings(metrics: EvictionMetrics) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [
        ("loss, recomputed", f"{metrics.loss_recomputed:.3f} nats a token behind {metrics.cache} tokens")
    ]
    rises = (
        ("no sinks", "rise_without"), ("4 sinks kept", "rise_with_four"), ("4 random tokens", "rise_with_random"),
        ("no sinks, masked", "rise_without_masked"), ("mask, every token kept", "loss_masked_less"),
    )  # fmt: skip
    for name, key in rises:
        if (value := getattr(metrics, key)) is not None:
            found.append((name, f"Δloss {with_interval(value, getattr(metrics, f'{key}_interval'), '+.3f')}"))
    for name, shares in (("needles", metrics.needle_by_policy), ("needles, masked", metrics.needle_by_policy_masked)):
        if shares is not None and metrics.needles:
            parts = []
            for policy, share in shares.items():
                low, high = share_interval(
                    np.repeat([1, 0], [n := round(share * metrics.needles), metrics.needles - n])
                )
                parts.append(f"{policy} {share:.0%} ({low:.0%} to {high:.0%})")
            found.append((name, f"of {metrics.needles}: {', '.join(parts)}"))
    return found
