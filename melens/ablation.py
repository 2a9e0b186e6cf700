"""Switch off parts of a block and see what is left of the massive activation: figure 9, and what the review asks for.

A massive token's state depends on no later token, so the prompts are cut after it: the runs are exact, and short. A run
that changes block l starts there, from the recorded output of the block before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from melens.errors import MelensError
from melens.lean import lean_forward
from melens.metrics import l2_norm
from melens.networks import base_of
from melens.normalization import has_normalization, read_normalization
from melens.replay import Replay

__all__ = ["Hook", "MassiveTokenRuns", "Part", "ablated", "ablation", "can_ablate"]

Part = Literal["ffn", "attention", "ln2_identity", "ln2_no_gain", "ln2_no_norm"]
"""What of a block is switched off: what its FFN or its attention adds to the residual stream, or the normalisation
before the FFN: replaced by the identity, left without its gain, or left with its gain alone."""

Hook = tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]
"""As `model.hooks(fwd_hooks=[...])` takes it."""

_WRITES = {"ffn": "hook_mlp_out", "attention": "hook_attn_out"}
_WITHOUT: dict[str, Literal["all", "gain", "norm"]] = {
    "ln2_identity": "all",
    "ln2_no_gain": "gain",
    "ln2_no_norm": "norm",
}


def can_ablate(model: TransformerBridge, layer: int, part: str) -> bool:
    """Tell whether a block has the part: a parallel block has no `ln2`, a state-space block no attention."""
    if part in _WRITES:
        return f"blocks.{layer}.{_WRITES[part]}" in model.hook_dict
    return has_normalization(model, layer, "ln2")


def ablation(model: TransformerBridge, layer: int, part: str) -> list[Hook]:
    """Return the hooks that switch off a part of a block, at every position.

    Args:
        model: a bridge.
        layer: 0-based block.
        part: one of `Part`.

    Raises:
        MelensError: an unknown part, or a block without it.
    """
    if part not in get_args(Part):
        raise MelensError(f"The part is {part!r}; allowed are {', '.join(get_args(Part))}.")
    if not 0 <= layer < len(model.blocks) or not can_ablate(model, layer, part):
        raise MelensError(f"This model has no block {layer} with the part {part!r}.")
    if part in _WRITES:
        return [(f"blocks.{layer}.{_WRITES[part]}", _zero)]
    normalization = read_normalization(model, layer, "ln2")
    seen: list[Tensor] = []

    def see(h: Tensor, hook: HookPoint) -> None:
        seen[:] = [h]

    def replace(output: Tensor, hook: HookPoint) -> Tensor:
        return normalization.without(_WITHOUT[part], seen.pop(), output)

    return [(f"blocks.{layer}.ln2.hook_in", see), (f"blocks.{layer}.ln2.hook_out", replace)]


def _zero(written: Tensor, hook: HookPoint) -> Tensor:
    return torch.zeros_like(written)


@contextmanager
def ablated(model: TransformerBridge, *parts: tuple[int, str]) -> Iterator[None]:
    """Switch parts of blocks off, each given as `(layer, part)`, for as long as the context lasts.

    `melens.trace`, `run_with_cache` and plain calls inside it see the ablated model.
    """
    with model.hooks(fwd_hooks=[hook for layer, part in parts for hook in ablation(model, layer, part)]):
        yield


class MassiveTokenRuns:
    """Runs of the prompts up to their massive token, intact and with hooks, each from the first block they change.

    Attributes:
        intact: ‖h‖ of the massive token after each block.
        ffn: what each block's FFN writes there, NaN for a block without an FFN.
        block_evaluations: how many blocks have been run, the intact run among them.
    """

    intact: Float[Tensor, "prompt layer"]
    ffn: Float[Tensor, "layer prompt d"]

    def __init__(self, model: TransformerBridge, tokens: Sequence[Sequence[int]], positions: Sequence[int]):
        """Run the prompts intact and record what the others start from.

        Args:
            model: a bridge of a causal model.
            tokens: token ids, a prompt each.
            positions: of each prompt's massive token; what follows it is left out.
        """
        if any(not 0 <= at < len(ids) for at, ids in zip(positions, tokens, strict=True)):
            raise MelensError("A massive token's position is beyond its prompt.")
        self._model = model
        cut = [torch.tensor(ids[: at + 1]) for ids, at in zip(tokens, positions, strict=True)]
        self._tokens = torch.nn.utils.rnn.pad_sequence(cut, batch_first=True).to(model.cfg.device)
        self._at = torch.tensor(positions)
        self._replay = Replay(model)
        self.block_evaluations = 0
        with self._replay.recording(range(len(model.blocks))):
            self.intact, self.ffn = self.run_with_ffn()

    def run(self, hooks: Sequence[Hook] = (), start: int = 0) -> Float[Tensor, "prompt layer"]:
        """Measure ‖h‖ of the massive token after each block, with hooks on; NaN before `start`.

        Args:
            hooks: what to change.
            start: the first block that the hooks change; the blocks before replay their intact output.
        """
        return self.run_with_ffn(hooks, start)[0]

    @torch.no_grad()
    def run_with_ffn(
        self, hooks: Sequence[Hook] = (), start: int = 0
    ) -> tuple[Float[Tensor, "prompt layer"], Float[Tensor, "layer prompt d"]]:
        """Do what `run` does, and return what each block's FFN writes at the massive token besides."""
        model, n_layers = self._model, len(self._model.blocks)
        norms = torch.full((len(self._at), n_layers), float("nan"))
        ffn = torch.full((n_layers, len(self._at), model.cfg.d_model), float("nan"))

        def norm_after(layer: int, output: Tensor, hook: HookPoint) -> None:
            norms[:, layer] = l2_norm(self.at_massive(output)).cpu()

        def ffn_of(layer: int, output: Tensor, hook: HookPoint) -> None:
            ffn[layer] = self.at_massive(output).float().cpu()

        listeners: list[Hook] = []
        for layer in range(start, n_layers):
            listeners.append((f"blocks.{layer}.hook_resid_post", partial(norm_after, layer)))
            if can_ablate(model, layer, "ffn"):
                listeners.append((f"blocks.{layer}.hook_mlp_out", partial(ffn_of, layer)))
        with model.hooks(fwd_hooks=[*hooks, *listeners]), self._replay.starting_at(start), lean_forward(model):
            base_of(model.original_model)(input_ids=self._tokens, use_cache=False)
        self.block_evaluations += n_layers - start
        return norms, ffn

    def at_massive(self, activation: Float[Tensor, "prompt pos d"]) -> Float[Tensor, "prompt d"]:
        """Select the massive token of each prompt."""
        return activation[torch.arange(len(self._at)), self._at.to(activation.device)]

    def patch_ffn(self, layer: int, values: Float[Tensor, "prompt d"]) -> Hook:
        """Return the hook that lets a block's FFN write given values at the massive token."""

        def patch(output: Tensor, hook: HookPoint) -> Tensor:
            patched = output.clone()
            patched[torch.arange(len(self._at)), self._at.to(output.device)] = values.to(output)
            return patched

        return (f"blocks.{layer}.hook_mlp_out", patch)
