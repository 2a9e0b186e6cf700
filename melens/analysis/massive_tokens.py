"""Keep massive tokens out of what is trained or measured on hidden states: sparse autoencoders, probes, statistics.

    keep = melens.massive_tokens(study)
    states = hidden[keep(hidden, layer=12)]  # of `blocks.12.hook_resid_post`, without its massive tokens

1. `massive_activations` tells which tokens of the trace are massive in the output of each block (Sun et al. 2024).
2. Of every block the largest |h| of the other tokens and the smallest of the massive ones are read off the trace.
3. The threshold is half way between the two (geometrically), so that telling a token takes its own state alone.
4. Where the two are less than `MIN_MARGIN` apart there is no threshold, and the block is refused.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from jaxtyping import Bool
from pydantic import InstanceOf, PlainValidator
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.me_layer import Criterion, CriterionGiven, massive_activations
from melens.analysis.metrics import abs_max
from melens.analysis.study import Study
from melens.data.prompts import choose_prompts, load_prompts
from melens.errors import MelensError
from melens.models.layout import listed
from melens.printing import Summary
from melens.storage.files import write_text
from melens.tracing.probes import AbsMedian, LargestActivations
from melens.tracing.trace import Trace, trace
from melens.validation.signatures import Layer, checked, given, must_be
from melens.validation.types import Said

__all__ = ["MIN_MARGIN", "BlockThreshold", "MassiveTokens", "massive_tokens"]

MIN_MARGIN = 2.0
"""How many times as large the smallest massive |h| must be as the largest other: √2 from the threshold to either."""

_A_FILE = Annotated[str | Path, Said("the path of a .json file")]


@dataclass(frozen=True)
class BlockThreshold:
    """What a trace shows of the massive tokens in the output of one block.

    Attributes:
        n_massive: how many tokens of the trace are massive there.
        dims: in which dims, those of most prompts first.
        largest_other: the largest |h| of any token that is not massive there, in any dim.
        smallest_massive: the smallest of the massive tokens' largest |h|.
    """

    n_massive: int
    dims: tuple[int, ...]
    largest_other: float
    smallest_massive: float

    @property
    def margin(self) -> float:
        """How many times as large the smallest massive |h| is as the largest other."""
        return self.smallest_massive / self.largest_other if self.largest_other else math.inf

    @property
    def threshold(self) -> float | None:
        """The |h| over which a token is massive; None where the margin is less than `MIN_MARGIN`."""
        return math.sqrt(self.largest_other * self.smallest_massive) if self.margin >= MIN_MARGIN else None


@dataclass(frozen=True, repr=False)
class MassiveTokens(Summary):
    """Tells which tokens are not massive, by the largest |h| of their states. Layers are 0-based blocks.

    `massive_tokens` makes one. A state of NaN is kept, as nothing shows that it is massive; an infinite one is not.

    Attributes:
        model: its name, `n_layers` and `d_model`.
        criterion: of what counts as massive in the trace.
        n_prompts, distinct_first_tokens: of that trace, on which the thresholds rest.
        blocks: those in whose output a token of the trace is massive.

    Example:
        >>> keep = melens.massive_tokens(study)
        >>> hidden = 10 * torch.ones(1, 3, model.cfg.d_model)
        >>> hidden[0, 1, 5] = 5_000
        >>> keep(hidden, layer=2)
        tensor([[ True, False,  True]])
        >>> keep(hidden, layer=1)  # no token is massive there
        tensor([[True, True, True]])
        >>> melens.MassiveTokens.load(keep.save("keep.json")) == keep
        True
    """

    model: dict[str, Any]
    criterion: Criterion
    n_prompts: int
    distinct_first_tokens: int
    blocks: Mapping[int, BlockThreshold]

    @checked
    def __call__(
        self,
        hidden: Annotated[Tensor, InstanceOf(), Said("a tensor of hidden states, [*batch, d_model]")],
        layer: Layer,
        attention_mask: Annotated[Tensor, InstanceOf(), Said("a tensor [*batch]")] | None = None,
    ) -> Bool[Tensor, " *batch"]:
        """Mark the tokens whose state is not massive. Nothing waits for a GPU.

        Args:
            hidden: the residual stream behind a block, `[*batch, d_model]`, such as `[batch, pos, d_model]`, as the
                model computes it: neither normalised nor centred.
            layer: that block: 12 for `blocks.12.hook_resid_post`, and for `blocks.13.hook_resid_pre`.
            attention_mask: `[*batch]`, 0 at padding, which is not kept, as a tokenizer returns it. (The id alone does
                not tell: in many tokenizers padding has that of another token.)

        Returns:
            True for each token to keep, on the device of `hidden`.

        Raises:
            MelensError: another width than the model's, a block that it does not have, or one in which massive tokens
                cannot be told from others.
        """
        width = self.model["d_model"]
        if not hidden.is_floating_point() or hidden.shape[-1:] != (width,):
            raise MelensError(f"hidden is {given(hidden)}; it must be floats [*batch, {width}], the model's width.")
        if attention_mask is not None and attention_mask.shape != hidden.shape[:-1]:
            raise MelensError(
                f"attention_mask has the shape {list(attention_mask.shape)}, but the tokens of hidden have "
                f"{list(hidden.shape[:-1])}."
            )
        threshold = self.threshold(layer)
        if math.isinf(threshold):
            keep = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        else:
            keep = ~(abs_max(hidden.detach()).float() > threshold)
        return keep if attention_mask is None else keep & (attention_mask != 0).to(keep.device)

    @checked
    def threshold(self, layer: Layer) -> float:
        """Return the |h| over which a token is massive in the output of a block; infinite where none of the trace is.

        Raises:
            MelensError: as a call.
        """
        n_layers, block = self.model["n_layers"], self.blocks.get(layer)
        if layer >= n_layers:
            raise MelensError(f"{self.model['name']} has no block {layer}: its blocks are 0 to {n_layers - 1}.")
        if block is None:
            return math.inf
        if block.threshold is None:
            able = [layer for layer, each in self.blocks.items() if each.threshold is not None]
            raise MelensError(
                f"Massive tokens cannot be told from others in the output of block {layer} by their |h|: the smallest "
                f"massive one has {block.smallest_massive:,.0f}, the largest other {block.largest_other:,.0f}, and "
                f"{MIN_MARGIN:g} times that is needed. "
                + (f"They can in {listed(able)}. " if able else "")
                + "Another criterion may count more or fewer tokens as massive here: melens.massive_tokens(study, "
                "melens.Criterion(min_ratio=...))."
            )
        return block.threshold

    @property
    def table(self) -> pd.DataFrame:
        """A row for each block with massive tokens: `layer`, the attributes of its `BlockThreshold`, and its margin."""
        rows = [
            {"layer": layer, **asdict(block), "margin": block.margin, "threshold": block.threshold}
            for layer, block in self.blocks.items()
        ]
        return pd.DataFrame(rows)

    @checked
    def save(self, file: _A_FILE) -> Path:
        """Write the thresholds, and what they rest on, into a JSON file; return its path.

        `blocks` has an entry for each block with massive tokens, by its number; its `threshold` is null where they
        cannot be told from others.

        Raises:
            MelensError: its folder cannot be written to.
        """
        file = Path(file).expanduser()
        if not file.parent.is_dir():
            raise MelensError(f"There is no folder {file.parent} to save {file.name} in.")
        blocks = {layer: asdict(block) | {"threshold": block.threshold} for layer, block in self.blocks.items()}
        content = {"melens": metadata.version("melens"), **asdict(self), "blocks": blocks}
        return write_text(file, json.dumps(content, indent=2) + "\n")

    @classmethod
    @checked
    def load(cls, file: _A_FILE) -> MassiveTokens:
        """Read what `save` wrote.

        Raises:
            MelensError: no such file, or one that `save` did not write.
        """
        file = Path(file).expanduser()
        try:
            content = json.loads(file.read_text("utf-8"))
            return cls(
                {name: kind(content["model"][name]) for name, kind in _OF_MODEL.items()},
                Criterion(**content["criterion"]),
                int(content["n_prompts"]),
                int(content["distinct_first_tokens"]),
                {int(layer): _read_block(block) for layer, block in content["blocks"].items()},
            )
        except OSError as error:
            raise MelensError(f"{file} cannot be read: {error.strerror or error}.") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise MelensError(f"{file} is no file that melens.MassiveTokens.save wrote.") from error

    def _heading(self) -> str:
        told = {layer: block.threshold for layer, block in self.blocks.items() if block.threshold is not None}
        words = f"Massive tokens of {self.model['name']}: "
        if told:
            lowest, highest = (f"{limit:,.0f}" for limit in (min(told.values()), max(told.values())))
            words += f"|h| > {lowest if lowest == highest else f'{lowest} to {highest}'} behind {listed(told)}"
        else:
            words += "none are told" if self.blocks else "none"
        untold = self.blocks.keys() - told.keys()
        return f"{words}; not told from others behind {listed(untold)}" if untold else words

    def _details(self) -> list[tuple[str, str]]:
        return [
            (
                f"block {layer}",
                f"{block.n_massive} massive, |h| {block.smallest_massive:,.0f} or more, others up to "
                f"{block.largest_other:,.0f}",
            )
            for layer, block in self.blocks.items()
        ]


_OF_MODEL = {"name": str, "n_layers": int, "d_model": int}


def _read_block(block: Mapping[str, Any]) -> BlockThreshold:
    return BlockThreshold(
        int(block["n_massive"]),
        tuple(map(int, block["dims"])),
        float(block["largest_other"]),
        float(block["smallest_massive"]),
    )


def _a_source(source: Any) -> Study | Trace | TransformerBridge:
    if not isinstance(source, Study | Trace | TransformerBridge):
        raise must_be("a study, a trace, or a TransformerBridge, as melens.load_model(name) returns it")
    return source


@checked
def massive_tokens(
    source: Annotated[Study | Trace | TransformerBridge, PlainValidator(_a_source)],
    criterion: CriterionGiven | None = None,
) -> MassiveTokens:
    """Learn from a trace how to tell massive tokens from others, block by block, by the largest |h| of their states.

    Three heuristics are in use. Special tokens dropped by their id (SAELens's `exclude_special_tokens`) miss a massive
    token that is no special one, and lose special tokens that are not massive. The first token of each text dropped
    (dictionary_learning's `remove_bos` without a BOS) misses all others. States whose norm is over 10 × the median of
    the batch (its `max_activation_norm_multiple`) depend on what else is in the batch, and are dropped in blocks that
    have no massive activation too. `melens/README.md` has measurements.

    Args:
        source: a study, a trace with the tables of `default_probes()`, or a bridge, which is then traced on the
            project's own prompts.
        criterion: of what counts as massive; by default that of the study, else `Criterion()`.

    Returns:
        A `MassiveTokens`, to be called with hidden states. It keeps all tokens in blocks where none of the trace is
        massive; a warning says so where that is every block.

    Raises:
        MelensError: as `melens.massive_activations`, and of a bridge as `melens.trace`.

    Example:
        >>> keep = melens.massive_tokens(study)
        >>> sorted(keep.blocks), keep.blocks[2].dims
        ([2, 3, 4, 5], (5,))
        >>> _, cache = model.run_with_cache(study.tokens[0][None], names_filter="blocks.2.hook_resid_post")
        >>> keep(cache["blocks.2.hook_resid_post"], layer=2)[0, :4]
        tensor([False,  True,  True,  True])
    """
    if criterion is None:
        criterion = source.me.criterion if isinstance(source, Study) else Criterion()
    if isinstance(source, TransformerBridge):
        probes = [LargestActivations(min_abs=criterion.min_abs), AbsMedian()]
        found = trace(source, choose_prompts(source, load_prompts()), probes)
    else:
        found = source.trace if isinstance(source, Study) else source
    massive = massive_activations(found, criterion)
    largest = found["largest"].query("site == 'hook_resid_post' and pos >= 0")
    if massive.empty:
        warnings.warn(
            f"{found.model['name']} has no massive activation in {len(found.prompts)} prompts (the largest |h| is "
            f"{largest['value'].abs().max():.4g}): no token will be left out.",
            stacklevel=3,
        )
    return MassiveTokens(
        {name: kind(found.model[name]) for name, kind in _OF_MODEL.items()},
        criterion,
        len(found.prompts),
        found.prompts["first_token_id"].nunique(),
        _thresholds(largest, massive, len(found.prompts)),
    )


def _thresholds(largest: pd.DataFrame, massive: pd.DataFrame, n_prompts: int) -> dict[int, BlockThreshold]:
    """Read off a trace how large |h| gets in each block with massive tokens.

    Args:
        largest: rows of the trace's table, of all tokens that it keeps.
        massive: the entries that are massive.
        n_prompts: of the trace.
    """
    token = ["layer", "prompt", "pos"]
    sizes = largest.assign(size=largest["value"].abs()).groupby(token)["size"].max()
    is_massive = sizes.index.isin(pd.MultiIndex.from_frame(massive[token]))
    found = {}
    for layer in sorted(set(massive["layer"].tolist())):
        is_here = sizes.index.get_level_values("layer") == layer
        own, others = sizes[is_here & is_massive], sizes[is_here & ~is_massive]
        largest_other = float(others.max()) if len(others) else 0.0
        if others.index.get_level_values("prompt").nunique() < n_prompts:
            # where all tokens that the trace keeps are massive, the others have up to what it keeps any from
            largest_other = max(largest_other, float(LargestActivations().min_abs))
        entries = massive[(massive["layer"] == layer) & (massive["dim"] >= 0)]
        n_prompts_of_dim = entries.groupby("dim")["prompt"].nunique()
        dims = n_prompts_of_dim.sort_values(ascending=False, kind="stable").index.tolist()
        found[layer] = BlockThreshold(len(own), tuple(dims), largest_other, float(own.min()))
    return found
