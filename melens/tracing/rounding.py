"""Simulate quantisation: what enters the linear layers of the blocks, or their weights, rounded to few bits.

    runs = RoundedRuns(model)
    runs.loss(texts, Rounding(bits=8, activations="tensor"))

1. The linear layers are found in the plain twin of a bridge, whatever they are called: q, k, v and o, gate, up and
   down, joint ones (GPT-2's c_attn, Phi-3's gate_up) as they are. Embedding and head are none of them.
2. A hook rounds what enters each, and goes on in float: the numbers are those of integer arithmetic but for its own
   rounding. Hooks of masks and gates come before it. Attention itself, norms and the residual stream stay as they are.
3. Of weights the data are replaced, and are the model's own again when the run ends.
4. Every layer must have been reached, or the run is refused: of a mixture's experts, say, not each is in each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.pytorch_utils import Conv1D

from melens.analysis.metrics import excess_kurtosis, rounded
from melens.errors import MelensError
from melens.models.quantization import describe_quantization
from melens.models.view import base_of, is_whole, view_model
from melens.printing import Brief
from melens.tracing.batching import forget_longest
from melens.tracing.resume import apply_head
from melens.tracing.twin import running
from melens.tracing.verification import verified

__all__ = ["MarkedTexts", "RoundedRuns", "Rounding", "Scales"]


@dataclass(frozen=True, repr=False)
class Rounding(Brief):
    """What is rounded, to how many bits, and which numbers share a scale: the largest of them is the last one told.

    Attributes:
        bits: from 2 to 16.
        activations: `"static"`, one scale a layer, fixed on other texts; `"tensor"`, one a layer and text; `"token"`;
            None for activations as they are.
        weights: `"tensor"`, one scale a layer; `"channel"`, one for each output; None for weights as they are.
        exempt: leave marked tokens in full precision, and out of the scales.
    """

    bits: int
    activations: Literal["static", "tensor", "token"] | None = None
    weights: Literal["tensor", "channel"] | None = None
    exempt: bool = False


class MarkedTexts(NamedTuple):
    """Texts of one length.

    Attributes:
        tokens: their ids.
        exempt: the tokens that `Rounding.exempt` is about.
        counted: the tokens whose predictions count; never the last one.
    """

    tokens: Int[Tensor, "text pos"]
    exempt: Bool[Tensor, "text pos"]
    counted: Bool[Tensor, "text pos"]


class Scales(NamedTuple):
    """The largest |value| that entered each linear layer, by its name, of all tokens and of those not exempt."""

    of_all: dict[str, Float[Tensor, ""]]
    of_others: dict[str, Float[Tensor, ""]]


class _Linear(NamedTuple):
    """A linear layer of a block, and along which dimension of its weight an output's numbers lie."""

    layer: int
    name: str
    module: Any
    dim: int


_See = Callable[[_Linear, Float[Tensor, "row pos d"], Bool[Tensor, "row pos 1"]], Tensor | None]
"""Called with what enters a layer and the marks of exempt tokens; what it returns, if anything, goes on instead."""


class RoundedRuns:
    """Runs of texts through a model with rounded linear layers; masks on the model take effect as in any run.

    Attributes:
        n_layers: how many linear layers there are.
        share_of_weights: of the blocks' weights, that they hold.
        are_of_4_bits: whether the weights, by those of the first block, were rounded to 4 bits or fewer before, in
            groups of 32 as in a GGUF.
    """

    def __init__(self, model: TransformerBridge, *, texts_per_batch: int = 8) -> None:
        """Find the linear layers.

        Args:
            model: a bridge of a causal language model.
            texts_per_batch: that share a forward pass; each gets the numbers that it has alone.

        Raises:
            MelensError: weights that are quantised already or not here in full, experts in one matrix, or a model that
                has no plain twin.
        """
        if (kind := describe_quantization(model.original_model)) is not None:
            raise MelensError(f"This model is quantised already ({kind}): load it without model.quantize.")
        if not is_whole(model.original_model):
            raise MelensError("Some weights of this model are offloaded: load it where it fits into memory.")
        self._model, self._verified = model, verified(model, ["hook_resid_post"])
        self._texts_per_batch = 1 if self._verified.rule.alone else texts_per_batch
        with self._running() as network:
            blocks = [block.module for block in view_model(network).blocks]
            self._linear = [linear for layer, block in enumerate(blocks) for linear in _linear_in(layer, block)]
            total = sum(weight.numel() for block in blocks for weight in block.parameters())
        self.n_layers = len(self._linear)
        self.share_of_weights = sum(linear.module.weight.numel() for linear in self._linear) / total
        self.are_of_4_bits = all(_is_of_4_bits(linear) for linear in self._linear if linear.layer == 0)

    # --- Runs ---------------------------------------------------------------------------------------------------------

    def loss(
        self, texts: MarkedTexts, rounding: Rounding | None = None, scales: Scales | None = None
    ) -> Float[Tensor, " text"]:
        """Measure the loss in nats a token, mean over the predictions of a text that count.

        Args:
            texts: what is run.
            rounding: None for full precision.
            scales: as `scales` returns them, for static ones.

        Raises:
            MelensError: a layer that was not reached, or a loss that is NaN or infinite.
        """
        see = None
        if rounding is not None and rounding.activations is not None:
            see = partial(_round_input, rounding, scales)
        losses: list[Tensor] = []
        with self._running() as network, ExitStack() as stack:
            if rounding is not None and rounding.weights is not None:
                for linear in self._linear:
                    stack.callback(setattr, linear.module.weight, "data", linear.module.weight.data)
                    linear.module.weight.data = _rounded_weight(linear, rounding)
            for rows in torch.arange(len(texts.tokens)).split(self._texts_per_batch):
                some = MarkedTexts(*(marks[rows] for marks in texts))
                losses += self._losses(network, some, self._states(network, some.tokens, some.exempt, see))
        loss = torch.stack(losses).cpu()
        for text in (~loss.isfinite()).nonzero()[:1].flatten().tolist():
            raise MelensError(f"The loss of text {text} is NaN or infinite: load the model in float32.")
        return loss

    def scales(self, prompts: Sequence[tuple[Int[Tensor, " _"], Bool[Tensor, " _"]]]) -> Scales:
        """Find the largest |value| that enters each layer in prompts, each with the marks of its exempt tokens."""
        found = Scales({}, {})

        def see(linear: _Linear, entering: Tensor, exempt: Tensor) -> None:
            for largest, values in zip(found, (entering, entering.masked_fill(exempt, 0)), strict=True):
                name, own = f"{linear.layer}.{linear.name}", values.abs().amax().float()
                largest[name] = torch.maximum(largest.get(name, own), own)

        with self._running() as network:
            for tokens, exempt in prompts:
                self._states(network, tokens[None], exempt[None], see)
        return found

    def inputs(self, texts: MarkedTexts) -> pd.DataFrame:
        """Measure the outliers of what enters the linear layers, in full precision.

        Returns:
            A row a text, block and input: `layer`, `input` (the layers that read it), `text`, `kurtosis` (excess, over
            all entries) and `largest` (|value|), and `kurtosis_others` and `largest_others` without exempt tokens.
        """
        rows: list[dict[str, Any]] = []
        last: list[Any] = [torch.empty(0), []]  # what entered the layer before, which q, k and v read alike; its rows
        done = 0

        def see(linear: _Linear, entering: Tensor, exempt: Tensor) -> None:
            name = linear.name.rpartition(".")[2]
            if entering.data_ptr() == last[0].data_ptr():
                for row in last[1]:
                    row["input"] += f", {name}"
                return
            own = [{"layer": linear.layer, "input": name, "text": done + at} for at in range(len(entering))]
            for row, values, marks in zip(own, entering, exempt, strict=True):
                for end, some in (("", values), ("_others", values[~marks[:, 0]])):
                    row |= {f"kurtosis{end}": excess_kurtosis(some), f"largest{end}": float(some.abs().amax())}
            last[:] = entering, own  # kept, so that nothing else gets its memory
            rows.extend(own)

        with self._running() as network:
            for rows_of_batch in torch.arange(len(texts.tokens)).split(self._texts_per_batch):
                self._states(network, texts.tokens[rows_of_batch], texts.exempt[rows_of_batch], see)
                done += len(rows_of_batch)
        return pd.DataFrame(rows)

    # --- A forward pass -----------------------------------------------------------------------------------------------

    @contextmanager
    def _running(self) -> Iterator[Any]:
        with torch.no_grad(), running(self._model, way=self._verified.way) as network:
            if network is self._model.original_model:
                raise MelensError(
                    "Quantisation cannot be simulated where a model runs through TransformerLens's own components "
                    "alone: melens.verify(model) says why this one does."
                )
            yield network

    def _states(
        self, network: Any, tokens: Int[Tensor, "row pos"], exempt: Bool[Tensor, "row pos"], see: _See | None
    ) -> Float[Tensor, "row pos d"]:
        """Run texts with a function called at the input of each layer; return their final states."""
        reached: set[int] = set()
        with ExitStack() as stack:
            if see is not None:
                for linear in self._linear:
                    enter = partial(_enter, see, linear, exempt[..., None], reached)
                    stack.callback(linear.module.register_forward_pre_hook(enter).remove)
            if self._verified.rule.remembers:
                forget_longest(network)
            tokens = tokens.to(self._model.cfg.device)
            states: Tensor = base_of(network)(input_ids=tokens, use_cache=False).last_hidden_state
        for linear in self._linear if see is not None else ():
            if id(linear.module) not in reached:
                raise MelensError(f"{_called(linear)} was not run, so its quantisation cannot be simulated.")
        return states

    def _losses(self, network: Any, texts: MarkedTexts, final: Float[Tensor, "text pos d"]) -> list[Tensor]:
        losses = []
        for own, ids, counted in zip(final, texts.tokens, texts.counted, strict=True):
            at = counted.nonzero().flatten()
            logits = apply_head(network, own[None, at.to(own.device)])[0].float()
            losses.append(nn.functional.cross_entropy(logits, ids[at + 1].to(logits.device)))
        return losses


def _linear_in(layer: int, block: nn.Module) -> Iterator[_Linear]:
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield _Linear(layer, name, module, 0 if isinstance(module, Conv1D) else 1)
        elif any(weight.ndim > 2 for weight in module.parameters(recurse=False)) and not isinstance(module, nn.Conv1d):
            raise MelensError(
                f"Block {layer} holds the experts of a mixture in one matrix ({name}), which is no linear layer: what "
                "its quantisation costs cannot be simulated."
            )


def _called(linear: _Linear) -> str:
    return f"The linear layer {linear.name} of block {linear.layer}"


def _enter(
    see: _See, linear: _Linear, exempt: Bool[Tensor, "row pos 1"], reached: set[int], module: Any, args: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Give what enters a layer as `[row, pos, d]`: some work on `[row · pos, d]` (OPT's FFN)."""
    entering, (rows, positions) = args[0], exempt.shape[:2]
    if entering[..., 0].numel() != rows * positions:
        raise MelensError(
            f"{_called(linear)} gets some of the tokens alone, as an expert of a mixture does: what its quantisation "
            "costs cannot be simulated."
        )
    reached.add(id(module))
    changed = see(linear, entering.reshape(rows, positions, -1), exempt.to(entering.device))
    return None if changed is None else (changed.reshape(entering.shape), *args[1:])


def _round_input(
    rounding: Rounding, scales: Scales | None, linear: _Linear, entering: Tensor, exempt: Tensor
) -> Float[Tensor, "row pos d"]:
    if rounding.activations == "static":
        assert scales is not None
        found = scales.of_others if rounding.exempt else scales.of_all
        largest = found[f"{linear.layer}.{linear.name}"].to(entering.device)
    else:
        counted = entering.masked_fill(exempt, 0) if rounding.exempt else entering
        largest = counted.abs().amax(dim=(1, 2) if rounding.activations == "tensor" else 2, keepdim=True)
    changed = rounded(entering, largest, rounding.bits)
    return torch.where(exempt, entering, changed) if rounding.exempt else changed


def _rounded_weight(linear: _Linear, rounding: Rounding) -> Float[Tensor, "_ _"]:
    weight = linear.module.weight.data
    sizes = weight.abs()
    largest = sizes.amax() if rounding.weights == "tensor" else sizes.amax(dim=linear.dim, keepdim=True)
    return rounded(weight, largest, rounding.bits)


def _is_of_4_bits(linear: _Linear) -> bool:
    """Tell whether no 32 weights that follow each other in an output have more than 16 different values."""
    weight = linear.module.weight.data if linear.dim else linear.module.weight.data.T
    if weight.shape[1] % 32:
        return False
    in_order = weight.unflatten(1, (-1, 32)).sort(dim=-1).values
    return bool(((in_order.diff(dim=-1) != 0).sum(dim=-1) < 16).all())
