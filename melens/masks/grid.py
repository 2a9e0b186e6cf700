"""Compare masks on the same texts: loss, predictions, sinks, how rigid token 0 is (section 4, figure 8, table 5).

    masks = [melens.WeMask(rate) for rate in (0.01, 0.1, 0.3)]
    result = melens.analysis.mask_grid(study, masks, texts)

1. `MaskComparison` runs the unmasked model once, and each mask from the first block that it changes.
2. `_lay_out` makes tidy tables of that, a `Grid`: a row a configuration (a mask with all its arguments), text or block.
3. `compare_grid` compares every configuration with the unmasked model, text by text, picks out what the claims are
   about (`grid_metrics.py`) and draws (`grid_figures.py`). It also takes what a sweep's jobs measured, put together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from melens.analysis.metrics import SINK_THRESHOLD
from melens.analysis.statistics import holm, mean_interval, paired_permutation_p
from melens.analysis.study import Study
from melens.errors import MelensError
from melens.masks.comparison import MaskComparison, Measured
from melens.masks.dims import BY_GAIN, tied_dims
from melens.masks.grid_figures import (
    attention_figure,
    configuration_in_words,
    grid_figures,
    key_figure,
    nearest_paper_rate,
)
from melens.masks.grid_metrics import PAPER_RATE, UNMASKED, MaskGridMetrics, claim_metrics
from melens.masks.mask import WeMask
from melens.models.view import ModelView, view_model
from melens.printing import Brief
from melens.report.result import Figure, Result
from melens.storage.cache import Store, hash_of, store_for
from melens.validation.signatures import checked
from melens.validation.types import Count, Flag, Whole

__all__ = ["ARGUMENTS", "Grid", "compare_grid", "mask_grid"]

ARGUMENTS = (
    "cell", "rate", "select", "site", "start", "layers", "positions", "strength", "seed", "n_blocks", "massive_hits",
    "tied_blocks", "dloss_ties_low", "dloss_ties_high",
)  # fmt: skip
"""What distinguishes a configuration from others, and what is known of its dims; `cell` is its name."""
_MOST_SHOWN = 12
_OF_ATTENTION = ("share_of_heads", "entropy", "effective_rank", "input_cosine", "key_cosine")


@dataclass(frozen=True, repr=False)
class Grid(Brief):
    """What was measured of one model, as tidy tables.

    Attributes:
        configurations: a row a mask: its `ARGUMENTS`, with `massive_hits`: in how many of its `n_blocks` blocks the
            largest massive dim is masked (null where the dims depend on the token); `tied_blocks`: in how many the gain
            of the last dim that is masked is also that of one that is not, where the first dims are; `dloss_ties_low`,
            `dloss_ties_high`: the least and the most of the mean Δloss over other choices among these equal gains
            (of the masks by gain at the paper's rate that figures of few masks show).
        by_text: a row a configuration (`cell`) and text, the unmasked model among them: `loss`, `kl`, `agreement`,
            `sink_mass`; `input_cosine`, `key_cosine`: of token 0 with that of the texts that begin differently, mean
            over the blocks of `sink_mass` that can be masked before attention, and `input_cosine_before`,
            `key_cosine_before`: the same where the ME layer's attention reads it (null for a text that begins like one
            before it).
        by_block: a row a configuration and block: `sink_mass`, `share_of_heads`, `entropy`, `effective_rank`,
            `input_cosine`, `key_cosine`.
    """

    configurations: pd.DataFrame
    by_text: pd.DataFrame
    by_block: pd.DataFrame


@checked
def mask_grid(
    study: Study,
    masks: Sequence[WeMask],
    texts: Int[Tensor, "text pos"],
    *,
    text: str = "",
    texts_per_batch: Count = 8,
    map_tokens: Count = 40,
    patterns: Literal["drawn", "all", "none"] = "drawn",
    tie_draws: Whole = 4,
    keep: Flag = True,
) -> Result:
    """Measure every mask on the same tokens, and compare it with the unmasked model.

    Args:
        study: as `melens.study` makes it.
        masks: a `start` counted from the ME layer is taken from the study's.
        texts: token ids, as `melens.data.texts.cut_texts` gives them.
        text: what they are from, for the result.
        texts_per_batch: that share a forward pass.
        map_tokens: of the text whose attention maps are drawn.
        patterns: of which masks attention entropy and rank are measured: `"drawn"` (those that are), `"all"`, `"none"`.
        tie_draws: how many other choices among equal gains are measured, of masks by gain at the paper's rate.
        keep: keep what is measured in the user's cache.

    Returns:
        Metrics `MaskGridMetrics`; the figures `attention_change` and `by_block` (figure 8), `key` and `loss_and_sinks`
        (section 4), of several masks `loss_change` (table 5) and `rates`, of several starts `starts`.

    Raises:
        MelensError: a mask that this model cannot have, or a loss or sink mass that is NaN.

    Example:
        >>> result = melens.analysis.mask_grid(study, [melens.WeMask(rate=0.1)], texts, patterns="none", keep=False)
        >>> sorted(result.tables)
        ['by_block', 'by_text', 'cells']
    """
    model = study.model
    masks = [mask if mask.fixed is not None else mask.at(study.me).on(model) for mask in masks]
    store = store_for("masks", model.original_model, texts, texts_per_batch) if keep else None
    shown = _shown(study, masks)
    starts = {min(mask.blocks(model)) for mask in masks}
    progress = study.stage("texts without a mask")
    comparison = MaskComparison(
        model, texts, starts, texts_per_batch=texts_per_batch, patterns=patterns != "none", store=store
    )
    progress(1, 1)
    with_patterns = {"drawn": shown, "all": masks, "none": []}[patterns]
    measured, kept = _measure(study, comparison, masks, store, with_patterns)
    metrics = study.metrics(
        MaskGridMetrics,
        texts=len(texts),
        tokens_per_text=texts.shape[1],
        text_first_tokens=comparison.distinct_first_tokens,
        text=text,
        sink_layers=_sink_layers(study),
        next_attention=None if study.me.layer is None else study.layout.next_attention(study.me.layer),
        masks={mask_name(mask): mask.to_dict() for mask in masks},
        unmasked_run_was_kept=comparison.shared,
        cells_kept=[mask_name(mask) for mask in kept],
    )
    figures = {}
    # of a hybrid model the first masked block may have no attention: the next one that has is shown
    if masks and (block := study.layout.next_attention(min(shown[0].blocks(model)) - 1)) is not None:
        name = mask_name(shown[0])
        if f"blocks.{block}.attn.hook_pattern" in model.hook_dict:
            figures["attention_change"] = attention_figure(study, shown[0], name, block, texts[0, :map_tokens].cpu())
        keys = [of_model.first_key[block] for of_model in (comparison.unmasked, measured[masks.index(shown[0])])]
        figures["key"] = key_figure(keys[0], keys[1], f"block {block}: {study.trace.model['name']}", name)
    more = []
    if kept:
        names = [mask_name(mask) for mask in kept[:3]] + ([f"and {len(kept) - 3} more"] if len(kept) > 3 else [])
        more = [("measured before", f"{len(kept)} of {len(masks)}: {'; '.join(names)}")]
    grid = _lay_out(study, comparison.unmasked, masks, measured)
    for mask in shown:
        if mask.select in BY_GAIN and mask.rate == PAPER_RATE:
            _measure_ties(study, comparison, mask, grid, store, tie_draws)
    return compare_grid(grid, study.trace.model, metrics, figures, more)


def compare_grid(
    grid: Grid,
    model: dict[str, Any],
    metrics: MaskGridMetrics,
    figures: dict[str, Figure] | None = None,
    more: Sequence[tuple[str, str]] = (),
) -> Result:
    """Compare every configuration with the unmasked model, draw, and put what is seen into words.

    Args:
        grid: what was measured.
        model: as in `Trace.model`.
        metrics: with the fields that say on which texts and blocks.
        figures, more: what else is to be shown, behind what is found.

    Raises:
        MelensError: a loss or a sink mass that is no number, by configuration and text.
    """
    table = _compare(grid, metrics.sink_layers)
    unmasked = grid.by_text[grid.by_text["cell"] == UNMASKED]
    loss, sink_mass = float(unmasked["loss"].mean()), float(unmasked["sink_mass"].mean())
    metrics = MaskGridMetrics(
        **metrics.plain(),
        cells=len(table),
        least_p=min(1.0, len(table) * max(2 / 2**metrics.texts, 1e-4)),  # beyond 13 texts 10,000 signs are drawn
        unmasked_loss=loss,
        unmasked_perplexity=float(np.exp(loss)),
        unmasked_sink_mass=sink_mass,
        **claim_metrics(table, grid.by_text, metrics),
    )
    sinks = "no attention behind the ME layer" if np.isnan(sink_mass) else f"sink mass {sink_mass:.3f}"
    findings = [
        ("no mask", f"loss {loss:.3f} nats a token, perplexity {np.exp(loss):.1f}, {sinks}"),
        *((row["cell"], configuration_in_words(row)) for row in table.head(_MOST_SHOWN).to_dict("records")),
    ]
    if len(table) > _MOST_SHOWN:
        findings.append(("", f"and {len(table) - _MOST_SHOWN} more in cells.parquet"))
    findings += [*_caveats(table, metrics), *more]
    of_texts = f"{model['name']}, {metrics.texts} texts of {metrics.tokens_per_text} tokens"
    figures = (figures or {}) | (grid_figures(table, grid.by_block, metrics, of_texts) if len(table) else {})
    tables = {"cells": table, "by_text": grid.by_text, "by_block": grid.by_block}
    return Result("wemask", model, metrics, tables, figures, findings)


# --- Measuring --------------------------------------------------------------------------------------------------------


def mask_name(mask: WeMask) -> str:
    """Tell a mask from every other on the same model, in words."""
    layers = mask.layers if isinstance(mask.layers, str) else "-".join(map(str, mask.layers))
    name = f"rate={mask.rate:g} {mask.select} {mask.site} start={mask.start} layers={layers}"
    if mask.positions != "first":
        name += f" positions={mask.positions if isinstance(mask.positions, str) else list(mask.positions)}"
    name += "" if mask.strength == 1 else f" strength={mask.strength:g}"
    return name + (f" seed={mask.seed}" if mask.select == "random" else "")


def _shown(study: Study, masks: Sequence[WeMask]) -> list[WeMask]:
    """Return the masks that the figures of few masks show: of each selection one, that starts behind the ME layer."""
    behind = (study.me.layer or 0) + 1
    some = [mask for mask in masks if mask.start == behind] or list(masks)
    rows = pd.DataFrame({"rate": [mask.rate for mask in some], "select": [mask.select for mask in some]})
    return [some[row] for row in nearest_paper_rate(rows).index]


def _measure(
    study: Study,
    comparison: MaskComparison,
    masks: Sequence[WeMask],
    store: Store | None,
    with_patterns: Sequence[WeMask],
    stage: str = "texts with each mask",
) -> tuple[list[Measured], list[WeMask]]:
    """Measure the masks, or find that they were measured before; return those masks too."""
    progress = study.stage(stage)
    measured, kept = [], []
    for done, mask in enumerate(masks, 1):
        patterns = mask in with_patterns
        name = f"mask-{hash_of(mask, patterns)[:24]}"
        found = None if store is None else store.load(name)
        if found is not None:
            measured.append(Measured(**found))
            kept.append(mask)
        else:
            measured.append(comparison.measure(mask, patterns=patterns))
            if store is not None:
                store.save(name, vars(measured[-1]))
        progress(done, len(masks))
    return measured, kept


def _measure_ties(
    study: Study, comparison: MaskComparison, mask: WeMask, grid: Grid, store: Store | None, draws: int
) -> None:
    """Put into a grid's configurations how much Δloss depends on which of equal gains are masked."""
    others = [other for seed in range(draws) if (other := mask.with_ties_drawn(study.model, seed)) is not None]
    if others:
        measured, _ = _measure(study, comparison, others, store, [], "texts with other dims of equal gains masked")
        name = mask_name(mask)
        own = grid.by_text.loc[grid.by_text["cell"] == name, "loss"].to_numpy()
        unmasked = comparison.unmasked.loss.numpy()
        changes = [float((losses - unmasked).mean()) for losses in (own, *(each.loss.numpy() for each in measured))]
        row = grid.configurations["cell"] == name
        grid.configurations.loc[row, ["dloss_ties_low", "dloss_ties_high"]] = min(changes), max(changes)


def _sink_layers(study: Study) -> list[int]:
    """The blocks behind the ME layer, the last ones left out; all without an ME layer."""
    if study.me.layer is None:
        return list(range(study.n_layers))
    first = study.me.layer + 1
    return list(range(first, study.last_before_trailing + 1)) or list(range(first, study.n_layers))


def _lay_out(study: Study, unmasked: Measured, masks: Sequence[WeMask], measured: Sequence[Measured]) -> Grid:
    view = view_model(study.model)
    has_attention = (~unmasked.sink_mass.isnan()).flatten(1).any(1)
    behind = [layer for layer in _sink_layers(study) if has_attention[layer]]
    masked = [layer for layer in behind if view.can_mask_attention(layer)]
    before = [layer for layer in study.layout.attention if study.me.layer is not None and layer <= study.me.layer]
    by_text: list[pd.DataFrame] = []
    by_block: list[pd.DataFrame] = []
    for name, found in zip([UNMASKED, *map(mask_name, masks)], [unmasked, *measured], strict=True):
        by_head = found.sink_mass.mean(-1)
        of_texts = {"loss": found.loss, "kl": found.kl, "agreement": found.agreement}
        of_texts["sink_mass"] = found.sink_mass[behind].mean((0, 1))
        for quantity, cosines in (("input_cosine", found.input_cosine), ("key_cosine", found.key_cosine)):
            of_texts[quantity] = cosines[masked].mean(0)
            of_texts[f"{quantity}_before"] = cosines[before[-1:]].mean(0)
        of_blocks = {
            "sink_mass": by_head.mean(-1), "share_of_heads": (by_head > SINK_THRESHOLD).float().mean(-1),
            "entropy": found.entropy.mean(-1), "effective_rank": found.effective_rank.mean(-1),
            "input_cosine": found.input_cosine.nanmean(-1), "key_cosine": found.key_cosine.nanmean(-1),
        }  # fmt: skip
        for rows, column, values in ((by_text, "text", of_texts), (by_block, "layer", of_blocks)):
            numbers = {quantity: each.numpy() for quantity, each in values.items()}
            rows.append(pd.DataFrame({"cell": name, column: range(len(next(iter(numbers.values())))), **numbers}))
    configurations = pd.DataFrame([_configuration(mask, study, view) for mask in masks], columns=list(ARGUMENTS))
    return Grid(configurations, pd.concat(by_text, ignore_index=True), pd.concat(by_block, ignore_index=True))


def _configuration(mask: WeMask, study: Study, view: ModelView) -> dict[str, Any]:
    assert mask.fixed is not None
    dims, massive = mask.fixed.dims, {*study.me.dims[:1]}
    return mask.to_dict() | {
        "cell": mask_name(mask),
        "rate": float(mask.rate),
        "layers": mask.layers if isinstance(mask.layers, str) else ", ".join(map(str, mask.layers)),
        "positions": str(mask.positions),
        "strength": float(mask.strength),
        "n_blocks": len(mask.fixed.blocks),
        "massive_hits": math.nan if dims is None else sum(bool(massive & {*of_block}) for of_block in dims.values()),
        "tied_blocks": len(tied_dims(view, mask.fixed)) if mask.select in BY_GAIN else math.nan,
        "dloss_ties_low": math.nan,
        "dloss_ties_high": math.nan,
    }


# --- Comparing --------------------------------------------------------------------------------------------------------


def _compare(grid: Grid, sink_layers: Sequence[int]) -> pd.DataFrame:
    """Add to each configuration its means over texts, the paired difference to the unmasked model, and p-values."""
    _check_texts(grid.by_text)
    by_text = dict(iter(grid.by_text.set_index("text").groupby("cell")))
    unmasked = by_text[UNMASKED]
    # NaN, which these means leave out, is a block without attention or what was not asked for: `Measured` has no other
    behind = grid.by_block[grid.by_block["layer"].isin(list(sink_layers))].groupby("cell").mean(numeric_only=True)
    rows = []
    for configuration in grid.configurations.to_dict("records"):
        own = by_text[configuration["cell"]]
        dloss = (own["loss"] - unmasked["loss"]).to_numpy()
        row: dict[Any, Any] = configuration | {
            "loss": float(own["loss"].mean()),
            "perplexity": float(np.exp(own["loss"].mean())),
        }
        row |= _with_interval("dloss", dloss) | {"p": paired_permutation_p(dloss)}
        row |= _with_interval("kl", own["kl"].to_numpy())
        row |= {"agreement": float(own["agreement"].mean()), "sink_mass": float(own["sink_mass"].mean())}
        row |= _with_interval("sink_ratio", (own["sink_mass"] / unmasked["sink_mass"]).to_numpy())
        rows.append(row | behind.loc[configuration["cell"], list(_OF_ATTENTION)].to_dict())
    if not rows:
        return grid.configurations
    table = pd.DataFrame(rows)
    table.insert(list(table).index("p") + 1, "p_holm", holm(table["p"].to_numpy()))
    return table


def _caveats(table: pd.DataFrame, metrics: MaskGridMetrics) -> list[tuple[str, str]]:
    """Say what p-values of so few texts cannot show, and what the choice among equal gains changes."""
    said = []
    if metrics.least_p is not None and metrics.least_p >= 0.05:
        words = f"{metrics.texts} texts and {len(table)} masks give no p below {metrics.least_p:.2g}, so that no "
        words += "difference can be shown at 0.05. Give more texts (data.n_texts) or fewer masks."
        said.append(("p", words))
    for row in table.dropna(subset=["dloss_ties_low"]).to_dict("records"):
        words = f"In {row['tied_blocks']:.0f} of {row['n_blocks']} blocks equal gains decide which dims come last in "
        words += f"{row['cell']}: the first are masked. By other choices Δloss is {row['dloss_ties_low']:+.4f} to "
        said.append(("equal gains", f"{words}{row['dloss_ties_high']:+.4f}."))
    return said


def _check_texts(by_text: pd.DataFrame) -> None:
    has_sinks = by_text["sink_mass"].notna().any()  # else no block behind the start has attention
    names = ["loss", "kl", "agreement", *(["sink_mass"] if has_sinks else [])]
    broken = by_text[~np.isfinite(by_text[names].to_numpy(dtype=float)).all(axis=1)]
    for row in broken.head(1).to_dict("records"):
        values = ", ".join(f"{name} {row[name]:g}" for name in names)
        raise MelensError(
            f"Text {row['text']} has {values} in the configuration {row['cell']}: look for NaN in the model's weights, "
            "or load it in float32."
        )


def _with_interval(name: str, values: np.ndarray) -> dict[str, float]:
    """Return a mean over texts with its interval; NaN, which was not measured in any text, has none."""
    low, high = (math.nan, math.nan) if np.isnan(values).all() else mean_interval(values)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
