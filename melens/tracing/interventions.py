"""Switch off parts of a block and see what is left of the massive activation: figure 9, and what the review asks for.

A massive token's state depends on no later token, so the prompts are cut after it: the runs are short, and exact, which
the norms of a trace show. A run that changes block l starts there, from the recorded output of the block before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
from jaxtyping import Float, Int
from pydantic import BeforeValidator
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.metrics import l2_norm
from melens.errors import MelensError
from melens.models.devices import input_device
from melens.models.normalization import has_normalization, read_normalization
from melens.models.view import base_of
from melens.printing import Summary, counted
from melens.tracing.batching import forget_longest
from melens.tracing.resume import RecordedBlocks
from melens.tracing.sites import Sites
from melens.tracing.twin import running
from melens.tracing.verification import limit_of, verified
from melens.validation.arguments import Bridge, TokenLists, check_layer, check_vocabulary
from melens.validation.signatures import Layer, PositionList, checked, must_be
from melens.validation.types import Said

__all__ = ["Hook", "MassiveTokenRuns", "Part", "ablated", "ablation", "can_ablate"]

Part = Literal["ffn", "attention", "ln2_identity", "ln2_no_gain", "ln2_no_norm"]
"""What of a block is switched off: what its FFN or its attention adds to the residual stream, or the normalisation
before the FFN: replaced by the identity, left without its gain, or left with its gain alone."""

Hook = tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]
"""As `model.hooks(fwd_hooks=[...])` takes it."""

_WRITES = {"ffn": "hook_mlp_out", "attention": "hook_attn_out"}
_WITHOUT: dict[str, Any] = {"ln2_identity": "all", "ln2_no_gain": "gain", "ln2_no_norm": "norm"}


def can_ablate(model: TransformerBridge, layer: int, part: str) -> bool:
    """Tell whether a block has the part: a parallel block has no `ln2`, a state-space block no attention."""
    if part in _WRITES:
        return bool(Sites.of(model).find(f"blocks.{layer}.{_WRITES[part]}"))
    return has_normalization(model, layer, "ln2")


@checked
def ablation(model: Bridge, layer: Layer, part: Part) -> list[Hook]:
    """Return the hooks that switch off a part (one of `Part`) of a block (0-based), at every position.

    Raises:
        MelensError: an unknown part, or a block without it.
    """
    check_layer(model, layer)
    if not can_ablate(model, layer, part):
        raise MelensError(f"Block {layer} of this model has no part {part!r} that TransformerLens names.")
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


def _on_rows(hook: Hook, rows: slice) -> Hook:
    """Let a hook see and change some rows of an activation alone."""
    name, change = hook

    def change_rows(activation: Float[Tensor, "row pos d"], hook: HookPoint) -> Tensor | None:
        changed = change(activation[rows], hook)
        return None if changed is None else torch.cat([activation[: rows.start], changed, activation[rows.stop :]])

    return (name, change_rows)


def _a_pair(part: Any) -> Any:
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise must_be("a pair (layer, part): melens.ablated(model, (3, 'ffn'), (4, 'attention'))")
    return tuple(part)


@checked
@contextmanager
def ablated(model: Bridge, *parts: Annotated[tuple[Layer, Part], BeforeValidator(_a_pair)]) -> Iterator[None]:
    """Switch parts of blocks off, at every position, for as long as the context lasts (figure 9).

    `melens.trace`, `run_with_cache` and plain calls inside it see the ablated model.

    Args:
        model: a bridge.
        parts: pairs of a block, counted from 0, and `"ffn"` or `"attention"` (adds nothing to the residual stream),
            `"ln2_identity"` (the norm before the FFN is replaced by the identity), `"ln2_no_gain"` (left without its
            gain) or `"ln2_no_norm"` (left with its gain alone).

    Raises:
        MelensError: what is no such pair, no such block, or a block without that part.

    Example:
        >>> with melens.ablated(model, (2, "ffn")):
        ...     print(melens.find_me_layer(melens.trace(model, prompts)).layer)
        None
    """
    with model.hooks(fwd_hooks=[hook for layer, part in parts for hook in ablation(model, layer, part)]):
        yield


_MOST_TOKENS = 4096
"""Of a forward pass in which several changes share it."""


@dataclass
class _Rows:
    """Prompts that share a forward pass, by number, with their tokens, cut and padded on the right."""

    prompts: list[int]
    tokens: Int[Tensor, "row pos"]
    at: Int[Tensor, " row"]  # the column of each one's massive token
    blocks: RecordedBlocks  # what they returned in the intact run
    _massive: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def massive(self, device: torch.device) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
        """Index the massive tokens; each device gets the index once, as a GPU stands still until it has it."""
        if device not in self._massive:
            self._massive[device] = torch.arange(len(self.at), device=device), self.at.to(device)
        return self._massive[device]

    def gather(
        self,
        by_layer: dict[int, Float[Tensor, "change row d"]],
        reduce: Callable[[Tensor], Tensor],
        *,
        into: Float[Tensor, "change layer prompt *d"],
    ) -> None:
        """Move the massive tokens of all blocks, reduced, to where they belong, in one transfer."""
        if by_layer:
            states = torch.stack([of_layer.to(self.tokens.device) for of_layer in by_layer.values()], dim=1)
            into[:, torch.tensor([*by_layer])[:, None], torch.tensor(self.prompts)] = reduce(states).cpu()
            by_layer.clear()


PromptsByLayers = Annotated[Float[Tensor, "prompt layer"], Said("a float tensor [prompt, layer]")]
HookList = Annotated[Sequence[Hook], Said("a list of (name of a hook point, function of an activation and the hook)")]

Changes = Annotated[Sequence[Sequence[Hook]], Said("a list of lists as `run` takes one")]

_NormsAndFFN = tuple[Float[Tensor, "prompt layer"], Float[Tensor, "layer prompt d"]]


class MassiveTokenRuns(Summary):
    """Runs of the prompts up to their massive token, intact and with hooks, each from the first block they change.

    Attributes:
        intact: ‖h‖ of the massive token after each block, `[prompt, layer]`.
        ffn: what each block's FFN writes there, `[layer, prompt, d]`; NaN for a block without an FFN.
        is_cut: whether the prompts are cut after their massive token, which changes nothing in most causal models.
        block_evaluations: how many blocks have been run, the intact runs among them.

    Example:
        >>> runs = melens.MassiveTokenRuns(model, study.tokens, positions=[0, 0, 0])
        >>> runs.intact.shape == (3, len(model.blocks))
        True
        >>> without_ffn = runs.run([("blocks.2.hook_mlp_out", lambda write, hook: 0 * write)], start=2)
        >>> bool((without_ffn[:, 2] < 0.1 * runs.intact[:, 2]).all())
        True
    """

    intact: Float[Tensor, "prompt layer"]
    ffn: Float[Tensor, "layer prompt d"]

    @checked
    def __init__(
        self, model: Bridge, tokens: TokenLists, positions: PositionList, norms: PromptsByLayers | None = None
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
            MelensError: no prompts of token ids, a position beyond its prompt or missing, or norms of other prompts or
                that whole prompts do not give either.
        """
        tokens = cast(Sequence[Tensor], tokens)  # which they are once they are checked
        if len(positions) != len(tokens):
            raise MelensError(f"{len(tokens)} prompts need as many positions; {len(positions)} are given.")
        check_vocabulary(model, tokens)
        for number, (at, ids) in enumerate(zip(positions, tokens, strict=True)):
            if not 0 <= at < len(ids):
                raise MelensError(
                    f"The massive token's position {at} is beyond its prompt, number {number}, of {len(ids)} tokens."
                )
        if norms is not None and tuple(norms.shape) != (len(tokens), len(model.blocks)):
            raise MelensError(
                f"The norms are of {norms.shape[0]} prompts and {norms.shape[1]} blocks; "
                f"here are {len(tokens)} prompts and {len(model.blocks)} blocks."
            )
        self._model = model
        self._verified = verified(model, ["hook_resid_post"])
        self.block_evaluations = 0
        self.is_cut = True
        self._run_intact([ids[: at + 1] for ids, at in zip(tokens, positions, strict=True)], positions)
        if norms is not None and not self._agrees_with(norms):
            self.is_cut = False
            self._run_intact(tokens, positions)
            if not self._agrees_with(norms):
                raise MelensError("The massive tokens' norms are not those of the trace: were hooks on the model then?")

    def _heading(self) -> str:
        prompts, blocks = self.intact.shape
        cut = "up to" if self.is_cut else "beyond"
        return f"MassiveTokenRuns of {counted(prompts, 'prompt')} {cut} their massive token, {counted(blocks, 'block')}"

    def _run_intact(self, tokens: Sequence[Int[Tensor, " _"]], positions: Sequence[int]) -> None:
        lengths, device = [len(ids) for ids in tokens], input_device(self._model.original_model)
        self._groups = []
        for prompts in self._verified.rule.groups(lengths, max_batch_tokens=sys.maxsize, max_padding=1.0):
            padded = torch.nn.utils.rnn.pad_sequence([tokens[row] for row in prompts], batch_first=True)
            at = torch.tensor([positions[row] for row in prompts])
            self._groups.append(_Rows(prompts, padded.to(device), at, RecordedBlocks(self._model)))
        self._now = self._groups[0]
        (self.intact,), (self.ffn,) = self._run([[]], 0, with_ffn=True, record=True)

    def _agrees_with(self, norms: Float[Tensor, "prompt layer"]) -> bool:
        limit = limit_of(next(self._model.original_model.parameters()).dtype)
        return bool(((self.intact - norms).abs() <= limit * norms.abs()).all())

    @checked
    def run(self, hooks: HookList = (), start: Layer = 0) -> Float[Tensor, "prompt layer"]:
        """Measure ‖h‖ of the massive token after each block, with hooks on; NaN before `start`.

        Args:
            hooks: what to change.
            start: the first block that the hooks change; the blocks before return their intact output.

        Raises:
            MelensError: no pairs of a hook point's name and a function, or a block that the model does not have.
        """
        return self.run_each([hooks], start)[0]

    @checked
    def run_each(self, changes: Changes, start: Layer = 0) -> list[Float[Tensor, "prompt layer"]]:
        """Do what `run` does for several changes, each by itself, that start in one block: they share forward passes.

        Args:
            changes: the hooks of each.
            start: the first block that any of them changes.
        """
        self._check(changes, start)
        return list(self._run(changes, start)[0])

    @checked
    def run_with_ffn(self, hooks: HookList = (), start: Layer = 0) -> _NormsAndFFN:
        """Do what `run` does, and return what each block's FFN writes at the massive token besides."""
        self._check([hooks], start)
        norms, ffn = self._run([hooks], start, with_ffn=True)
        return norms[0], ffn[0]

    def _check(self, changes: Sequence[Sequence[Hook]], start: int) -> None:
        check_layer(self._model, start)
        for name in (name for hooks in changes for name, _ in hooks if not Sites.of(self._model).find(name)):
            raise MelensError(f"This model has no hook point {name!r}; names are like 'blocks.3.hook_mlp_out'.")

    def _run(
        self, changes: Sequence[Sequence[Hook]], start: int, *, with_ffn: bool = False, record: bool = False
    ) -> tuple[Float[Tensor, "change prompt layer"], Float[Tensor, "change _ prompt d"]]:
        """Run all prompts with each change; of FFN outputs there are none unless they are asked for: they take time."""
        n_layers, n_prompts = len(self._model.blocks), sum(len(group.prompts) for group in self._groups)
        norms = torch.full((len(changes), n_layers, n_prompts), float("nan"))
        n_written = n_layers if with_ffn else 0
        ffn = torch.full((len(changes), n_written, n_prompts, self._model.cfg.d_model), float("nan"))
        for group in self._groups:
            most = 1 if self._verified.rule.alone else max(1, _MOST_TOKENS // group.tokens.numel())
            for first in range(0, len(changes), most):
                some = slice(first, first + most)
                with group.blocks.recording(range(n_layers)) if record else nullcontext():
                    self._run_group(group, changes[some], start, norms[some], ffn[some])
        return norms.mT, ffn

    @torch.no_grad()
    def _run_group(
        self,
        group: _Rows,
        changes: Sequence[Sequence[Hook]],
        start: int,
        norms: Float[Tensor, "change layer prompt"],
        ffn: Float[Tensor, "change _ prompt d"],
    ) -> None:
        """Run the prompts of a group once for each change, in one forward pass: the rows of a change lie together."""
        self._now, n_rows = group, len(group.prompts)
        hooks = [
            hook if len(changes) == 1 else _on_rows(hook, slice(number * n_rows, (number + 1) * n_rows))
            for number, of_change in enumerate(changes)
            for hook in of_change
        ]
        after: dict[int, Tensor] = {}
        written: dict[int, Tensor] = {}

        def keep(kept: dict[int, Tensor], layer: int, activation: Float[Tensor, "change_row pos d"]) -> None:
            kept[layer] = activation.unflatten(0, (-1, n_rows))[:, *group.massive(activation.device)]

        sites = {"hook_resid_post": after} | ({"hook_mlp_out": written} if ffn.shape[1] else {})
        recorders = [
            (at.hook_point, partial(keep, kept, at.layer))
            for site, kept in sites.items()
            for at in Sites.of(self._model).find(site)
            if at.layer >= start and at.hook_point is not None
        ]
        way = self._verified.way
        with self._model.hooks(fwd_hooks=hooks), running(self._model, recorders, way=way) as network:
            if self._verified.rule.remembers:
                forget_longest(network)
            with group.blocks.resuming_at(start, network, times=len(changes)):
                base_of(network)(input_ids=group.tokens.repeat(len(changes), 1), use_cache=False)
        group.gather(after, l2_norm, into=norms)
        group.gather(written, Tensor.float, into=ffn)
        self.block_evaluations += (len(self._model.blocks) - start) * len(changes)

    def at_massive(self, activation: Float[Tensor, "row pos d"]) -> Float[Tensor, "row d"]:
        """Select the massive token of each prompt in the forward pass that is under way."""
        return activation[self._now.massive(activation.device)]

    @checked
    def patch_ffn(
        self, layer: Layer, values: Annotated[Float[Tensor, "prompt d"], Said("a float tensor [prompt, d]")]
    ) -> Hook:
        """Return the hook that lets a block's FFN write given values at the massive token.

        Raises:
            MelensError: a block without an FFN to patch, or values of other dimensions.
        """
        check_layer(self._model, layer)
        if not can_ablate(self._model, layer, "ffn"):
            raise MelensError(f"Block {layer} of this model has no FFN that TransformerLens names.")
        if (shape := tuple(values.shape)) != (wanted := tuple(self.ffn.shape[1:])):
            raise MelensError(f"The values are {list(shape)}; here are {wanted[0]} prompts of width {wanted[1]}.")

        def patch(output: Tensor, hook: HookPoint) -> Tensor:
            patched = output.clone()
            patched[self._now.massive(output.device)] = values[self._now.prompts].to(output)
            return patched

        return (f"blocks.{layer}.hook_mlp_out", patch)
