"""What masks do to the model: loss, predictions, sinks, how rigid token 0 is (section 4, figure 8, table 5's masks)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import melens
from experiments.mask_grid import ARGUMENTS, UNMASKED, Grid, drawn, report
from experiments.masks import masks_of
from experiments.runner.legacy import WemaskOptions
from experiments.runner.study import Run as Study
from melens import AttentionMaps, Probe, WeMask
from melens.analysis.sink_mass import SINK_THRESHOLD
from melens.figures.attention import attention_change
from melens.figures.curves import vectors_by_dim
from melens.masks.comparison import MaskComparison, Measured
from melens.models.layout import Layout
from melens.report.result import Figure, Result
from melens.storage.cache import Store, hash_of, store_for


def probes(model: TransformerBridge, options: WemaskOptions) -> list[Probe]:
    """The default probes find the ME layer; the rest is measured on the texts."""
    return []


def run(study: Study, options: WemaskOptions) -> Result:
    """Measure every mask of the grid on the same tokens, each from the first block that it changes."""
    model, data = study.model, study.cfg.data
    masks = [mask for mask in masks_of(study.cfg.wemask, study.me, model) if mask is not None]
    texts = study.texts
    store = store_for("masks", model.original_model, texts, options.texts_per_batch) if options.keep else None
    starts = {min(mask.blocks(model)) for mask in masks}
    shown = _shown(study, masks)
    looked_at = {"drawn": shown, "all": masks, "none": []}[options.patterns]
    comparison = MaskComparison(
        model,
        texts,
        starts,
        texts_per_batch=options.texts_per_batch,
        patterns=options.patterns != "none",
        store=store,
    )
    measured, kept = _measure(study, comparison, masks, store, looked_at)
    grid = _lay_out(study, comparison.unmasked, masks, measured)
    metrics = study.metrics(
        texts=len(texts),
        tokens_per_text=texts.shape[1],
        text_first_tokens=comparison.distinct_first_tokens,
        text=data.text or "pydoc_data.topics",
        sink_layers=_sink_layers(study),
        next_attention=None if study.me.layer is None else Layout.of(model).next_attention(study.me.layer),
        masks={mask_name(mask): mask.to_dict() for mask in masks},
        unmasked_run_was_kept=comparison.shared,
        cells_kept=[mask_name(mask) for mask in kept],
    )
    pictures = {}
    if masks and (figure_8 := _figure_8(study, shown[0], texts, options)) is not None:
        pictures["attention_change"] = figure_8
    if masks and _attending_block(study, shown[0]) is not None:
        pictures["key"] = _key_picture(study, shown[0], comparison.unmasked, measured[masks.index(shown[0])])
    findings = [] if not kept else [("measured before", f"{len(kept)} of {len(masks)}: {_listed(kept)}")]
    return report(grid, study.trace.model, metrics, pictures, findings)


def _listed(masks: Sequence[WeMask]) -> str:
    names = [mask_name(mask) for mask in masks[:3]]
    return "; ".join(names) + (f"; and {len(masks) - 3} more" if len(masks) > 3 else "")


# --- Measuring --------------------------------------------------------------------------------------------------------


def mask_name(mask: WeMask) -> str:
    """Tell a mask from every other on the same model, in words."""
    layers = mask.layers if isinstance(mask.layers, str) else "-".join(map(str, mask.layers))
    name = f"rate={mask.rate:g} {mask.select} {mask.site} start={mask.start} layers={layers}"
    if mask.positions != "first":
        name += f" positions={mask.positions if isinstance(mask.positions, str) else list(mask.positions)}"
    name += "" if mask.strength == 1 else f" strength={mask.strength:g}"
    return name + (f" seed={mask.seed}" if mask.select == "random" else "")


def _measure(
    study: Study, comparison: MaskComparison, masks: Sequence[WeMask], store: Store | None, looked_at: Sequence[WeMask]
) -> tuple[list[Measured], list[WeMask]]:
    """Measure the masks, some with attention patterns, or find that they were measured before; returns those too."""
    progress = study.stage("masks")
    measured, kept = [], []
    for done, mask in enumerate(masks, 1):
        patterns = mask in looked_at
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


def _shown(study: Study, masks: Sequence[WeMask]) -> list[WeMask]:
    """Return the masks that the figures of few masks show."""
    behind = (study.me.layer or 0) + 1
    some = [mask for mask in masks if mask.start == behind] or list(masks)
    rows = pd.DataFrame({"rate": [mask.rate for mask in some], "select": [mask.select for mask in some]})
    return [some[row] for row in drawn(rows).index]


def _sink_layers(study: Study) -> list[int]:
    """The blocks behind the ME layer, the last ones left out; all without an ME layer."""
    if study.me.layer is None:
        return list(range(study.n_layers))
    return list(range(study.me.layer + 1, study.last_lasting + 1)) or list(range(study.me.layer + 1, study.n_layers))


def _lay_out(study: Study, unmasked: Measured, masks: Sequence[WeMask], measured: Sequence[Measured]) -> Grid:
    names = [UNMASKED, *map(mask_name, masks)]
    sink_layers = _sink_layers(study)
    attending = set((~unmasked.sink_mass.isnan()).flatten(1).any(1).nonzero()[:, 0].tolist())  # blocks with attention
    by_text, by_block = [], []
    for name, of_cell in zip(names, [unmasked, *measured], strict=True):
        of_texts = {"loss": of_cell.loss, "kl": of_cell.kl, "agreement": of_cell.agreement}
        of_texts["sink_mass"] = of_cell.sink_mass[[layer for layer in sink_layers if layer in attending]].mean((0, 1))
        columns = {key: values.numpy() for key, values in of_texts.items()}
        by_text.append(pd.DataFrame({"cell": name, "text": range(len(of_cell.loss)), **columns}))
        by_head = of_cell.sink_mass.mean(-1)
        of_blocks = {
            "sink_mass": by_head.mean(-1),
            "share_of_heads": (by_head > SINK_THRESHOLD).float().mean(-1),
            "entropy": of_cell.entropy.mean(-1),
            "effective_rank": of_cell.effective_rank.mean(-1),
            "input_cosine": of_cell.input_cosine,
            "key_cosine": of_cell.key_cosine,
        }
        columns = {key: values.numpy() for key, values in of_blocks.items()}
        by_block.append(pd.DataFrame({"cell": name, "layer": range(len(by_head)), **columns}))
    cells = pd.DataFrame([_cell(mask, study.me.dims[:1]) for mask in masks], columns=list(ARGUMENTS))
    return Grid(cells, pd.concat(by_text, ignore_index=True), pd.concat(by_block, ignore_index=True))


def _cell(mask: WeMask, massive: tuple[int, ...]) -> dict[str, Any]:
    assert mask.fixed is not None
    dims = mask.fixed.dims
    return {
        "cell": mask_name(mask),
        "rate": float(mask.rate),
        "select": mask.select,
        "site": mask.site,
        "start": mask.start,
        "layers": mask.layers if isinstance(mask.layers, str) else ", ".join(map(str, mask.layers)),
        "positions": str(mask.positions),
        "strength": float(mask.strength),
        "seed": mask.seed,
        "n_blocks": len(mask.fixed.blocks),
        "massive_hits": math.nan if dims is None else sum(bool({*massive} & {*of_block}) for of_block in dims.values()),
    }


def _attending_block(study: Study, mask: WeMask) -> int | None:
    """Find the first masked block, in a hybrid the first from there on whose attention can be heard."""
    return Layout.of(study.model).next_attention(min(mask.blocks(study.model)) - 1)


def _figure_8(study: Study, mask: WeMask, texts: Int[Tensor, "text pos"], options: WemaskOptions) -> Figure | None:
    """Draw the attention of the first masked block, without the mask and with it."""
    block = _attending_block(study, mask)
    if block is None or f"blocks.{block}.attn.hook_pattern" not in study.model.hook_dict:
        return None
    tokens = texts[0, : options.map_tokens].cpu()

    def maps() -> Any:
        probe = AttentionMaps([block])
        return melens.trace(study.model, [tokens], [probe]).tensors[probe.name][0, 0].numpy()

    unmasked = maps()
    with mask.applied(study.model):
        masked = maps()
    tokenizer = study.model.tokenizer
    words = [
        f"{at} {token if tokenizer is None else repr(tokenizer.decode([token]))}"
        for at, token in enumerate(tokens.tolist())
    ]
    figure = attention_change(
        unmasked,
        masked,
        words,
        title=f"Attention in block {block}: {study.trace.model['name']}",
        note=f"{mask_name(mask)}; the first {len(tokens)} tokens of a text.",
    )
    before, after = (float(values[:, 1:, 0].mean()) for values in (unmasked, masked))
    here = (
        f"Attention on token 0 in block {block}, mean over heads: {before:.3f} without the mask, {after:.3f} with it."
    )
    return Figure(figure, "figure 8", "The sink is weakened, not removed.", here)


def _key_picture(study: Study, mask: WeMask, unmasked: Measured, masked: Measured) -> Figure:
    block = _attending_block(study, mask)
    assert block is not None
    before, after = unmasked.first_key[block], masked.first_key[block]
    figure = vectors_by_dim(
        {"without the mask": before.numpy(), "with it": after.numpy(), "difference": (after - before).numpy()},
        title=f"Key of token 0 in block {block}: {study.trace.model['name']}",
        note=f"{mask_name(mask)}. The heads' keys one after the other.",
    )
    figure.update_xaxes(title_text="dim of the keys", row=3, col=1)
    cosine = float(torch.nn.functional.cosine_similarity(before, after, dim=0))
    angle, size = math.degrees(math.acos(max(-1, min(1, cosine)))), float(after.norm() / before.norm())
    here = f"The key turns by {angle:.1f}° and keeps {size:.2f} of its norm."
    return Figure(figure, "section 4", "The mask relaxes the rigidity of the massive token.", here)
