"""Run whole texts, intact and with chosen tokens changed: what they predict, and who attends to the massive token.

    runs = TextRuns(model, tokens, positions, starts=[11])
    runs.intact.loss
    without = runs.run([runs.put("blocks.11.hook_mlp_out", runs.massive, 0)], 11)  # its FFN writes nothing there

1. Texts of like length share a forward pass, in which each gets the numbers that it has alone (`batching`).
2. A hook of `put` or `add` knows which texts are in the pass, and changes the marked tokens of each.
3. Of every text three things are kept: its loss, the attention on its massive token, and that token's states.
4. A run that starts at a block takes what the blocks before it gave in the intact run (`resume`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.metrics import SINK_THRESHOLD, l2_norm, sink_mass
from melens.errors import MelensError
from melens.models.view import base_of
from melens.printing import Brief
from melens.tracing.attended import Attended
from melens.tracing.batching import forget_longest
from melens.tracing.interventions import Hook
from melens.tracing.probes import Batch
from melens.tracing.resume import RecordedBlocks, apply_head
from melens.tracing.twin import running
from melens.tracing.verification import verified

__all__ = ["TextEffects", "TextRuns"]


@dataclass(frozen=True, repr=False)
class TextEffects(Brief):
    """What a run gives of each text.

    Attributes:
        loss: nats a token, mean over all tokens but the first.
        sink_mass: attention that later tokens pay to the massive token, mean over them and over heads; NaN in a block
            without attention.
        sink_heads: share of heads in which it is over Gu et al.'s threshold; NaN likewise.
        states: the massive token's hidden state after each block.
    """

    loss: Float[Tensor, " text"]
    sink_mass: Float[Tensor, "text layer"]
    sink_heads: Float[Tensor, "text layer"]
    states: Float[Tensor, "text layer d"]

    @property
    def norms(self) -> Float[Tensor, "text layer"]:
        """‖h‖ of the massive token after each block."""
        return l2_norm(self.states)


class TextRuns:
    """Texts with a massive token each, and runs of them with hooks on.

    Attributes:
        massive: marks each text's massive token.
        is_token: marks the tokens of each text, which may be shorter than the longest.
    """

    massive: Bool[Tensor, "text pos 1"]
    is_token: Bool[Tensor, "text pos 1"]

    def __init__(
        self,
        model: TransformerBridge,
        tokens: Sequence[Int[Tensor, " _"]],
        positions: Sequence[int],
        *,
        max_batch_tokens: int = 4096,
        starts: Collection[int] = (),
    ) -> None:
        """Take the texts, and run them intact.

        Args:
            model: a bridge of a causal model.
            tokens: token ids of each text.
            positions: of each text's massive token, which others must follow.
            max_batch_tokens: of a forward pass, padding included.
            starts: blocks that runs will start at.

        Raises:
            MelensError: a massive token that no other follows, or as `run`.
        """
        self._model, self._tokens, self._positions = model, list(tokens), torch.tensor(positions)
        lengths = torch.tensor([len(ids) for ids in tokens])
        for text in (self._positions >= lengths - 1).nonzero()[:1].flatten().tolist():
            raise MelensError(f"No token follows position {positions[text]} of text {text}, of {lengths[text]} tokens.")
        self._verified = verified(model, ["hook_resid_post"])
        self._groups = self._verified.rule.groups(lengths.tolist(), max_batch_tokens=max_batch_tokens)
        self._now = self._groups[0]
        columns = torch.arange(int(lengths.max()))
        self.massive = (columns == self._positions[:, None])[..., None]
        self.is_token = (columns < lengths[:, None])[..., None]
        self._blocks = [RecordedBlocks(model) for _ in self._groups]
        self.intact = self._run((), 0, record=[start - 1 for start in starts if start > 0])

    def run(self, hooks: Sequence[Hook], start: int = 0) -> TextEffects:
        """Run all texts with hooks on.

        Args:
            hooks: what to change.
            start: the first block that they change, one of `starts` or 0.

        Raises:
            MelensError: a loss or a state that is NaN or infinite.
        """
        return self._run(hooks, start)

    @torch.no_grad()
    def _run(self, hooks: Sequence[Hook], start: int, *, record: Sequence[int] = ()) -> TextEffects:
        n_texts, n_layers = len(self._tokens), len(self._model.blocks)
        loss = torch.full((n_texts,), float("nan"))
        sinks, sink_heads = torch.full((2, n_texts, n_layers), float("nan"))
        states = torch.full((n_texts, n_layers, self._model.cfg.d_model), float("nan"))
        if start:
            for now, intact in ((sinks, "sink_mass"), (sink_heads, "sink_heads"), (states, "states")):
                now[:, :start] = getattr(self.intact, intact)[:, :start]

        def keep_state(layer: int, output: Float[Tensor, "row pos d"], hook: HookPoint) -> None:
            at = self._positions[self._now].to(output.device)
            states[self._now, layer] = output[torch.arange(len(at), device=at.device), at].float().cpu()

        keepers = [(f"blocks.{layer}.hook_resid_post", partial(keep_state, layer)) for layer in range(start, n_layers)]
        with self._model.hooks(fwd_hooks=[*hooks, *keepers]):  # the hooks first: their changes are kept
            for texts, blocks in zip(self._groups, self._blocks, strict=True):
                self._now = texts
                with blocks.recording(record):
                    loss[texts] = self._run_group(sinks, sink_heads, blocks, start)
        for name, values in (("loss", loss), ("massive token's state", states)):
            for text in (~values.isfinite().reshape(n_texts, -1).all(dim=1)).nonzero()[:1].flatten().tolist():
                raise MelensError(f"The {name} of text {text} is NaN or infinite: load the model in float32.")
        return TextEffects(loss, sinks, sink_heads, states)

    def _run_group(
        self,
        sinks: Float[Tensor, "text layer"],
        sink_heads: Float[Tensor, "text layer"],
        blocks: RecordedBlocks,
        start: int,
    ) -> Float[Tensor, " row"]:
        """Run the texts of a forward pass, and return the loss of each."""
        tokens = [self._tokens[text] for text in self._now]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(self._model.cfg.device)
        batch = Batch(padded, tuple(map(len, tokens)), tuple(self._now))
        positions = self._positions[self._now]
        keys: list[int] = positions.unique().tolist()

        def keep_sinks(layer: int, attended: Attended) -> None:
            attention = attended.on_keys(keys)
            for column, key in enumerate(keys):
                weights = batch.weights_after(key).to(attention.device)
                of_key = sink_mass(attention[..., column], weights).cpu()
                rows = (positions == key).nonzero().flatten().tolist()
                texts = [self._now[row] for row in rows]
                sinks[texts, layer] = of_key[rows].mean(dim=1)
                sink_heads[texts, layer] = (of_key[rows] > SINK_THRESHOLD).float().mean(dim=1)

        with running(self._model, (), keep_sinks, way=self._verified.way) as network:
            if self._verified.rule.remembers:
                forget_longest(network)
            with blocks.resuming_at(start, network):
                final = base_of(network)(input_ids=padded, use_cache=False).last_hidden_state
            of_text = []
            for own, ids in zip(final, tokens, strict=True):  # the logits of all would be hundreds of megabytes
                logits = apply_head(network, own[None, : len(ids) - 1])[0].float()
                of_text.append(torch.nn.functional.cross_entropy(logits, ids[1:].to(logits.device)))
        return torch.stack(of_text).cpu()

    def read(self, *names: str, start: int = 0) -> list[Float[Tensor, "text _"]]:
        """Return what passes each of these hook points at the massive token of every text, as the model is now."""
        read: dict[str, dict[int, Tensor]] = {name: {} for name in names}

        def keep(name: str, activation: Float[Tensor, "row pos _"], hook: HookPoint) -> None:
            for row, text in enumerate(self._now):
                read[name][text] = activation[row, self._positions[text]].float().cpu()

        self._run([(name, partial(keep, name)) for name in names], start)
        return [torch.stack([of_text[text] for text in sorted(of_text)]) for of_text in read.values()]

    # --- What to change -----------------------------------------------------------------------------------------------

    def put(self, name: str, where: Bool[Tensor, "text pos #d"], values: Float[Tensor, "text d"] | float | int) -> Hook:
        """Return the hook that puts values in place of the marked entries of an activation `[row, pos, d]`.

        Args:
            name: of the hook point, such as `blocks.3.hook_mlp_out`.
            where: the entries, or with a last dimension of 1 the whole tokens.
            values: of each text, the same at every marked token; or one for all.
        """

        def put(output: Float[Tensor, "row pos d"], hook: HookPoint) -> Float[Tensor, "row pos d"]:
            return torch.where(self._marked(where, output), self._given(values, output), output)

        return (name, put)

    def add(self, name: str, where: Bool[Tensor, "text pos #d"], values: Float[Tensor, "text d"]) -> Hook:
        """Return the hook that adds values to the marked entries; the arguments are those of `put`."""

        def add(output: Float[Tensor, "row pos d"], hook: HookPoint) -> Float[Tensor, "row pos d"]:
            return output + self._marked(where, output) * self._given(values, output)

        return (name, add)

    def _marked(self, where: Bool[Tensor, "text longest #d"], output: Tensor) -> Bool[Tensor, "row pos #d"]:
        return where[self._now, : output.shape[1]].to(output.device)

    def _given(self, values: Float[Tensor, "text d"] | float | int, output: Tensor) -> Float[Tensor, "#row 1 #d"]:
        if not isinstance(values, Tensor):
            return torch.full((1, 1, 1), values, dtype=output.dtype, device=output.device)
        return values[self._now, None].to(output)
