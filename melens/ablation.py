"""Switch off parts of a block and see what is left of the massive activation: figure 9, and what the review asks for.

A massive token's state depends on no later token, so the prompts are cut after it: the runs are short, and exact, which
the norms of a trace show. A run that changes block l starts there, from the recorded output of the block before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from melens.batching import forget_longest
from melens.devices import input_device
from melens.errors import MelensError
from melens.lean import lean_forward
from melens.metrics import l2_norm
from melens.networks import base_of
from melens.normalization import has_normalization, read_normalization
from melens.replay import Replay
from melens.verification import verified

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


@dataclass
class _Rows:
    """Prompts that share a forward pass.

    Attributes:
        prompts: which, as they were given.
        tokens: of them, cut and padded on the right.
        at: the column of each one's massive token.
        replay: what their blocks returned in the intact run.
    """

    prompts: list[int]
    tokens: Int[Tensor, "row pos"]
    at: Int[Tensor, " row"]
    replay: Replay


class MassiveTokenRuns:
    """Runs of the prompts up to their massive token, intact and with hooks, each from the first block they change.

    Attributes:
        intact: ‖h‖ of the massive token after each block.
        ffn: what each block's FFN writes there, NaN for a block without an FFN.
        is_cut: whether the prompts are cut after their massive token, which changes nothing in most causal models.
        block_evaluations: how many blocks have been run, the intact runs among them.
    """

    intact: Float[Tensor, "prompt layer"]
    ffn: Float[Tensor, "layer prompt d"]

    def __init__(
        self,
        model: TransformerBridge,
        tokens: Sequence[Sequence[int]],
        positions: Sequence[int],
        norms: Float[Tensor, "prompt layer"] | None = None,
    ):
        """Run the prompts intact and record what the others start from.

        Args:
            model: a bridge of a causal model.
            tokens: token ids, a prompt each.
            positions: of each prompt's massive token; what follows it is left out.
            norms: ‖h‖ of the massive token after each block, as a trace of the whole prompts measured it; where the
                cut prompts give others (rotary frequencies and sparse attention may depend on the length), the whole
                prompts are run.

        Raises:
            MelensError: a position beyond its prompt, or norms that whole prompts do not give either.
        """
        if any(not 0 <= at < len(ids) for at, ids in zip(positions, tokens, strict=True)):
            raise MelensError("A massive token's position is beyond its prompt.")
        self._model = model
        self._rule = verified(model, ["hook_resid_post"]).rule
        self.block_evaluations = 0
        self.is_cut = True
        self._run_intact([ids[: at + 1] for ids, at in zip(tokens, positions, strict=True)], positions)
        if norms is not None and not self._agrees_with(norms):
            self.is_cut = False
            self._run_intact(tokens, positions)
            if not self._agrees_with(norms):
                raise MelensError("The massive tokens' norms are not those of the trace: were hooks on the model then?")

    def _run_intact(self, tokens: Sequence[Sequence[int]], positions: Sequence[int]) -> None:
        lengths, device = [len(ids) for ids in tokens], input_device(self._model.original_model)
        self._groups = []
        for prompts in self._rule.groups(lengths, max_batch_tokens=sys.maxsize, max_padding=1.0):
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens[row]) for row in prompts], batch_first=True)
            at = torch.tensor([positions[row] for row in prompts])
            self._groups.append(_Rows(prompts, padded.to(device), at, Replay(self._model)))
        self._now = self._groups[0]
        self.intact, self.ffn = self._run([], 0, record=True)

    def _agrees_with(self, norms: Float[Tensor, "prompt layer"]) -> bool:
        dtype = next(self._model.original_model.parameters()).dtype
        tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 3e-2
        return bool(((self.intact - norms).abs() <= tolerance * norms.abs()).all())

    def run(self, hooks: Sequence[Hook] = (), start: int = 0) -> Float[Tensor, "prompt layer"]:
        """Measure ‖h‖ of the massive token after each block, with hooks on; NaN before `start`.

        Args:
            hooks: what to change.
            start: the first block that the hooks change; the blocks before replay their intact output.
        """
        return self.run_with_ffn(hooks, start)[0]

    def run_with_ffn(
        self, hooks: Sequence[Hook] = (), start: int = 0
    ) -> tuple[Float[Tensor, "prompt layer"], Float[Tensor, "layer prompt d"]]:
        """Do what `run` does, and return what each block's FFN writes at the massive token besides."""
        return self._run(hooks, start)

    @torch.no_grad()
    def _run(
        self, hooks: Sequence[Hook], start: int, *, record: bool = False
    ) -> tuple[Float[Tensor, "prompt layer"], Float[Tensor, "layer prompt d"]]:
        model, n_layers = self._model, len(self._model.blocks)
        n_prompts = sum(len(group.prompts) for group in self._groups)
        norms = torch.full((n_prompts, n_layers), float("nan"))
        ffn = torch.full((n_layers, n_prompts, model.cfg.d_model), float("nan"))

        def norm_after(layer: int, output: Tensor, hook: HookPoint) -> None:
            norms[self._now.prompts, layer] = l2_norm(self.at_massive(output)).cpu()

        def ffn_of(layer: int, output: Tensor, hook: HookPoint) -> None:
            ffn[layer, self._now.prompts] = self.at_massive(output).float().cpu()

        listeners: list[Hook] = []
        for layer in range(start, n_layers):
            listeners.append((f"blocks.{layer}.hook_resid_post", partial(norm_after, layer)))
            if can_ablate(model, layer, "ffn"):
                listeners.append((f"blocks.{layer}.hook_mlp_out", partial(ffn_of, layer)))
        with model.hooks(fwd_hooks=[*hooks, *listeners]):
            for group in self._groups:
                self._now = group
                forget_longest(model.original_model)
                replay = group.replay
                with replay.recording(range(n_layers)) if record else replay.starting_at(start), lean_forward(model):
                    base_of(model.original_model)(input_ids=group.tokens, use_cache=False)
                self.block_evaluations += n_layers - start
        return norms, ffn

    def at_massive(self, activation: Float[Tensor, "row pos d"]) -> Float[Tensor, "row d"]:
        """Select the massive token of each prompt in the forward pass that is under way."""
        return activation[torch.arange(len(self._now.at)), self._now.at.to(activation.device)]

    def patch_ffn(self, layer: int, values: Float[Tensor, "prompt d"]) -> Hook:
        """Return the hook that lets a block's FFN write given values at the massive token."""

        def patch(output: Tensor, hook: HookPoint) -> Tensor:
            patched = output.clone()
            at = self._now.at.to(output.device)
            patched[torch.arange(len(at)), at] = values[self._now.prompts].to(output)
            return patched

        return (f"blocks.{layer}.hook_mlp_out", patch)
