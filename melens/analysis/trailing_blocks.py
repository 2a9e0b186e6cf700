"""What the last blocks do to the massive state: make a second massive activation, or erase the first one (appendix A).

    last = follow_last_blocks(study)
    last.begin, last.second, last.erased      # 28, 0.19, 0.87: from block 28 on most of the first one is erased

1. The states of token 0 after every block come with the trace; what a block writes is the difference of two of them.
2. The trailing blocks are found from the norm of token 0: they begin where it leaves its plateau for good.
3. A norm has no sign: a write as large as the one that made the massive activation may erase it. So each state behind
   is split along the last one of the plateau, into what is left of the first massive activation and what is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.metrics import l2_norm
from melens.analysis.statistics import mean_by, mean_interval, tidy
from melens.analysis.study import Study
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.style import COLORS, FIRST, OTHERS
from melens.printing import Brief
from melens.report.result import Figure, Interval
from melens.tracing.probes import Probe, TokenVectors
from melens.tracing.sites import Sites

__all__ = ["LastBlocks", "find_trailing_blocks", "follow_last_blocks", "last_blocks_figure", "probes"]

OFF_PLATEAU = 0.1
"""The norm leaves its plateau where it changes by more than a tenth, which cannot be seen on the paper's axes."""

_FFN = "hook_mlp_out"


@dataclass(frozen=True, repr=False)
class LastBlocks(Brief):
    """What token 0's state becomes behind its plateau, relative to the norm that it had there; means over states.

    Attributes:
        found: the block that leaves the plateau for good; None where none does, or there is no plateau.
        begin: `found`, or else the first of the last blocks that count apart.
        layer: the block from `begin` on after which the new part is largest.
        second, second_interval: that part's norm: what is across the plateau's direction, longer than the plateau's
            state along it, or turned around.
        second_over_others: the same part's norm over the mean norm of the other tokens after that block.
        erased: how much of the first massive activation is gone after the block from `begin` on after which most is,
            from 0 to 1.
        write_cosine: the cosine of what the blocks from `begin` to `layer` write together with the plateau's state.
        written, written_by_ffn: what they write along its direction, and what their FFNs do; negative is against it.
            The rest is attention's. None where one of them has no FFN that can be measured.
        by_block: `layer`, `norm` (of the state), `written`, `written_by_ffn` (along the direction), for the figure.
    """

    found: int | None
    begin: int
    layer: int
    second: float
    second_interval: Interval
    second_over_others: float
    erased: float
    write_cosine: float
    written: float
    written_by_ffn: float | None
    by_block: pd.DataFrame

    @property
    def what(self) -> Literal["erase the massive activation", "make a second one", "leave it as it is"]:
        """What the blocks do."""
        if max(self.second, self.erased) < OFF_PLATEAU:
            return "leave it as it is"
        return "make a second one" if self.second >= self.erased else "erase the massive activation"

    def in_words(self, n_layers: int, n_apart: int) -> str:
        """Say which of the two it is, and by what.

        Args:
            n_layers: of the model.
            n_apart: how many last blocks count apart elsewhere, `Criterion.trailing_blocks`.
        """
        where, what = f"blocks {self.begin} to {n_layers - 1}", str(self.what)
        if self.begin == n_layers - 1:
            verb, _, rest = self.what.partition(" ")
            where, what = f"block {self.begin}", f"{verb}s {rest}"
        by_ffn = "" if self.written_by_ffn is None else f", of which their FFNs {self.written_by_ffn:+.2f}"
        words = (
            f"{where} {what}: {self.erased:.0%} of its norm is gone, and what is new is {self.second:.0%} of it after "
            f"block {self.layer}. Up to there they write {self.written:+.2f} of its norm along it{by_ffn} (the cosine "
            f"of the whole with it is {self.write_cosine:+.2f})."
        )
        if (more := n_layers - self.begin) <= n_apart:
            return words
        return f"{words} They are {more}; elsewhere {n_apart} count apart (criterion.trailing_blocks)."


def probes(model: TransformerBridge) -> list[Probe]:
    """Return what tells the FFNs' writes from attention's: nothing else is missing without it."""
    if not Sites.of(model).find(_FFN):
        return []
    probe = TokenVectors(site=_FFN).named("ffn_writes")
    probe.may_miss = True
    return [probe]


def find_trailing_blocks(norms: Float[np.ndarray, "prompt layer"], plateau: Sequence[int]) -> int | None:
    """Find the first block that takes token 0's norm off its plateau for good; None where it stays there.

    It changes the norm by more than a tenth (a drift does not), and from there on the norm stays more than a tenth away
    from what it was before, and from the plateau.

    Args:
        norms: ‖h‖ of token 0 after each block.
        plateau: the blocks that are taken for its level, their median; later ones may still be on it.
    """
    relative = (norms / np.median(norms[:, list(plateau)], axis=1, keepdims=True)).mean(axis=0)
    for block in range(plateau[0] + 1, norms.shape[1]):
        behind, before = relative[block:], relative[block - 1]
        if (abs(behind / before - 1) > OFF_PLATEAU).all() and (abs(behind - 1) > OFF_PLATEAU).all():
            return block
    return None


def follow_last_blocks(study: Study) -> LastBlocks | None:
    """Split token 0's states behind its plateau into what is left of the massive one, and what is new.

    Prompts that share their first token count once. None where token 0 is not the massive token, or no block lies
    between that in which the state is formed and the trailing ones.
    """
    layers = study.massive_layers
    if study.me.layer is None or study.position != 0 or not layers or layers[-1] == study.n_layers - 1:
        return None
    chosen = study.distinct_massive_prompts
    states = study.trace.tensors["token_vectors"][chosen, :, 0].float()
    found = find_trailing_blocks(l2_norm(states).numpy().astype(float), layers)
    begin = layers[-1] + 1 if found is None else found
    plateau = states[:, begin - 1]
    size = l2_norm(plateau)
    along, across = _split(states, plateau)
    new = (across**2 + ((along - 1).clamp(min=0) + (-along).clamp(min=0)) ** 2).sqrt()
    layer = begin + int(new[:, begin:].mean(dim=0).argmax())
    second = new[:, layer].numpy()
    norms = study.trace["norm"]
    others = norms[(norms["site"] == "hook_resid_post") & (norms["layer"] == layer) & (norms["pos"] > 0)]
    by_prompt = others.groupby("prompt")["norm"].mean().reindex(chosen).to_numpy()
    written = along.diff(dim=1, prepend=torch.full_like(along[:, :1], float("nan")))
    by_ffn = _written_by_ffn(study, chosen, plateau)
    drawn = {"norm": l2_norm(states) / size[:, None], "written": written}
    drawn |= {} if by_ffn is None else {"written_by_ffn": by_ffn}
    means = [mean_by(tidy(own.numpy(), "value"), "value").assign(quantity=name) for name, own in drawn.items()]
    by_block = pd.concat(means, ignore_index=True)
    at = list(range(begin, layer + 1))
    of_ffn = float("nan") if by_ffn is None else float(by_ffn[:, at].sum(dim=1).mean())
    return LastBlocks(
        found=found,
        begin=begin,
        layer=layer,
        second=float(second.mean()),
        second_interval=mean_interval(second),
        second_over_others=float(pd.Series(second * size.numpy() / by_prompt).mean()),  # of one token there are none
        erased=float((1 - along[:, begin:]).clamp(0, 1).mean(dim=0).max()),
        write_cosine=float(torch.cosine_similarity(states[:, layer] - plateau, plateau, dim=-1).mean()),
        written=float(written[:, at].sum(dim=1).mean()),
        written_by_ffn=None if np.isnan(of_ffn) else of_ffn,
        by_block=by_block[by_block["layer"] > layers[0]].reset_index(drop=True),
    )


def _split(
    vectors: Float[Tensor, "prompt layer d"], plateau: Float[Tensor, "prompt d"]
) -> tuple[Float[Tensor, "prompt layer"], Float[Tensor, "prompt layer"]]:
    """Return how far vectors go along a prompt's state of the plateau, and across it, in units of its norm."""
    size = l2_norm(plateau)[:, None]
    direction = (plateau / size)[:, None]
    along = (vectors * direction).sum(dim=-1)
    return along / size, l2_norm(vectors - along[..., None] * direction) / size


def _written_by_ffn(
    study: Study, chosen: Sequence[int], plateau: Float[Tensor, "prompt d"]
) -> Float[Tensor, "prompt layer"] | None:
    """Return what each block's FFN writes along the plateau's state; NaN for blocks without one, None without any."""
    wanted = probes(study.model)
    writes = study.traced(wanted).tensors.get("ffn_writes") if wanted else None
    if writes is None:
        return None
    found = torch.full((len(chosen), study.n_layers), float("nan"))
    found[:, [site.layer for site in Sites.of(study.model).find(_FFN)]] = _split(writes[chosen, :, 0], plateau)[0]
    return found


def last_blocks_figure(study: Study, last: LastBlocks) -> Figure:
    """Draw token 0's norm behind the block that formed its state, and what each block writes along that state."""
    named = {"norm": ("norm of token 0", FIRST), "written": ("what the block adds in its direction", OTHERS)}
    named["written_by_ffn"] = ("what the FFN adds in its direction", COLORS[3])
    by_quantity = dict(iter(last.by_block.groupby("quantity")))
    curves = [Curve(text, by_quantity[name], color) for name, (text, color) in named.items() if name in by_quantity]
    panel = Panel("", "relative to the plateau's norm", curves, study.me.layer, zero_line=True)
    note = f"The state's direction is that after block {last.begin - 1}. Bands: 95% intervals over first tokens."
    title = study.title("What is written along the massive state")
    plot = partial(curves_by_block, [panel], title=title, note=note)
    expected = "The last two blocks make a massive activation again."
    said = last.in_words(study.n_layers, study.me.criterion.trailing_blocks)
    return Figure(plot, "appendix A", expected, f"{said[0].upper()}{said[1:]}")
