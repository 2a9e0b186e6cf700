"""What masks do to a model on the same tokens: loss, predictions, sinks, how rigid token 0 is (section 4, figure 8).

The unmasked model runs once. A mask's run starts at the first block that it changes, from what entered that block in
the unmasked run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.modeling_outputs import BaseModelOutputWithPast

from melens.cache import Store
from melens.errors import MelensError
from melens.lean import lean_forward
from melens.metrics import pairwise_cosine
from melens.probes import AttentionEntropy, AttentionSpectrum, Probe, TokenVectors
from melens.replay import Replay
from melens.tracing import trace
from melens.wemask import WeMask

__all__ = ["MaskComparison", "Measured"]

_KEPT_BYTES = 2 * 2**30
"""Up to how much of the unmasked model's next-token log-probabilities is kept, if not a GPU has more to spare; beyond,
each mask computes them again."""

_ROWS = {"cpu": 64, "cuda": 1024}
"""Tokens whose logits are looked at together: on a CPU their rows stay in its cache."""


@dataclass(frozen=True)
class Measured:
    """The model on the texts, with a mask or without.

    Attributes:
        loss: nats a token, mean over a text's tokens.
        kl: KL(unmasked ‖ masked) of the next-token distribution in nats, mean over a text's tokens.
        agreement: share of tokens where both predict the same next token.
        sink_mass: attention that later tokens pay to token 0; NaN in a block without attention, as in what follows.
        entropy, effective_rank: of attention on the short texts, mean over texts; the rank is NaN where it was not
            asked for.
        input_cosine, key_cosine: of the attention inputs, and of the keys, of token 0 in every two texts that begin
            differently, mean over pairs: 1 is the rigidity that the paper blames.
        first_key: token 0's key in the first text.
    """

    loss: Float[Tensor, " text"]
    kl: Float[Tensor, " text"]
    agreement: Float[Tensor, " text"]
    sink_mass: Float[Tensor, "layer head text"]
    entropy: Float[Tensor, "layer head"]
    effective_rank: Float[Tensor, "layer head"]
    input_cosine: Float[Tensor, " layer"]
    key_cosine: Float[Tensor, " layer"]
    first_key: Float[Tensor, "layer d_keys"]


class _Keys(TokenVectors):
    name = "keys"


class _Given(nn.Module):
    """Stands where a model without its head stands, and returns a final hidden state that is known."""

    def __init__(self, final: Float[Tensor, "text pos d"]) -> None:
        super().__init__()
        self._output = BaseModelOutputWithPast(last_hidden_state=final)

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return self._output


class MaskComparison:
    """Texts of one length, the unmasked model on them, and `measure(mask)`.

    Attributes:
        unmasked: what was measured without a mask.
        shared: whether the unmasked run was found in the store.
    """

    def __init__(
        self,
        model: TransformerBridge,
        texts: Int[Tensor, "text pos"],
        starts: Iterable[int],
        *,
        texts_per_batch: int = 8,
        short_texts: int = 2,
        short_tokens: int = 96,
        store: Store | None = None,
    ) -> None:
        """Run the model without a mask, or find in the store that it was run before.

        Args:
            model: a bridge of a causal language model.
            texts: token ids, at least three a text.
            starts: first blocks of the masks to come.
            texts_per_batch: in a forward pass.
            short_texts, short_tokens: on how much of the texts the attention patterns are looked at.
            store: where the unmasked run is kept, for these starts and texts of this model alone.
        """
        if texts.shape[1] < 3:
            raise MelensError(f"The texts have {texts.shape[1]} tokens each; at least 3 are needed.")
        self._model = model
        self._texts = texts.to(model.cfg.device)
        self._batches = self._texts.split(texts_per_batch)
        self._short = (min(short_texts, texts_per_batch, len(texts)), min(short_tokens, texts.shape[1]))
        self._recorded = sorted({start - 1 for start in starts} - {-1})
        self._replays: list[Replay] = []
        self._finals: list[Tensor] = []
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        name = "unmasked-" + "-".join(map(str, self._recorded))
        found = None if store is None else store.load(name, model.cfg.device)
        self.shared = found is not None
        if found is not None:
            self._take(found)
        else:
            self._run_unmasked()
            if store is not None:
                store.save(name, self._to_keep())

    # --- Without a mask -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _run_unmasked(self) -> None:
        sink_mass = []
        for tokens in self._batches:
            replay = Replay(self._model)
            with replay.recording(self._recorded), self._hearing_sinks() as sinks:
                output = self._model.original_model.base_model(input_ids=tokens, use_cache=False)
            self._finals.append(output.last_hidden_state)
            self._replays.append(replay)
            sink_mass.append(sinks)
        compared = self._against_unmasked(lambda number: self._logits(self._finals[number]))
        self.unmasked = self._finish(compared, sink_mass, None, 0)

    def _to_keep(self) -> dict[str, Tensor]:
        """Return the unmasked run as tensors by name."""
        kept = {f"measured.{name}": values for name, values in vars(self.unmasked).items()}
        for number, (final, replay) in enumerate(zip(self._finals, self._replays, strict=True)):
            kept[f"final.{number}"] = final
            for layer, output in replay.outputs.items():
                kept[f"output.{layer}.{number}"] = output[0] if isinstance(output, tuple) else output
                kept[f"in_tuple.{layer}.{number}"] = torch.tensor(isinstance(output, tuple))
        return kept

    def _take(self, kept: dict[str, Tensor]) -> None:
        cpu = {name.removeprefix("measured."): values.cpu() for name, values in kept.items() if "measured." in name}
        self.unmasked = Measured(**cpu)
        for number in range(len(self._batches)):
            self._finals.append(kept[f"final.{number}"])
            outputs: dict[int, Any] = {}
            for layer in self._recorded:
                output = kept[f"output.{layer}.{number}"]
                outputs[layer] = (output,) if kept[f"in_tuple.{layer}.{number}"] else output
            self._replays.append(Replay(self._model, outputs))

    @torch.no_grad()
    def _logits(self, final: Float[Tensor, "text pos d"]) -> Float[Tensor, "text pos vocabulary"]:
        """Let the model's own head, soft caps and all, turn final hidden states into logits."""
        network = self._model.original_model
        base = network._modules[network.base_model_prefix]
        network._modules[network.base_model_prefix] = _Given(final)
        try:
            logits: Tensor = network(input_ids=self._texts[: len(final)], use_cache=False).logits
            return logits
        finally:
            network._modules[network.base_model_prefix] = base

    def _predictions(self, number: int) -> tuple[Float[Tensor, "text pos vocabulary"], Int[Tensor, "text pos"]]:
        """Return the unmasked model's log-probabilities of the next token on a batch, float32, and the likeliest."""
        if number in self._kept:
            return self._kept[number]
        logits = self._logits(self._finals[number])[:, :-1]
        log_probabilities = logits.log_softmax(-1, dtype=torch.float32)
        predictions = (log_probabilities, log_probabilities.argmax(-1))
        limit = _KEPT_BYTES
        if log_probabilities.is_cuda:
            limit = max(limit, torch.cuda.mem_get_info(log_probabilities.device)[0] // 4)
        if sum(kept.nbytes for kept, _ in self._kept.values()) + log_probabilities.nbytes <= limit:
            self._kept[number] = predictions
        return predictions

    # --- With one -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, mask: WeMask, *, ranks: bool = True) -> Measured:
        """Measure the masked model.

        Args:
            mask: with its start a block, one of `starts`.
            ranks: measure the effective rank of attention, whose singular values take a GPU longer than all the rest.

        Raises:
            MelensError: a mask that the model cannot have.
        """
        start = min(mask.blocks(self._model))
        if start and start - 1 not in self._recorded:
            raise MelensError(f"The mask starts in block {start}, which is none of the starts of this comparison.")
        sink_mass: list[dict[int, Tensor]] = []

        def masked_logits(number: int) -> Tensor:
            with self._starting(self._replays[number], start), self._hearing_sinks() as sinks:
                output = self._model.original_model(input_ids=self._batches[number], use_cache=False)
            sink_mass.append(sinks)
            logits: Tensor = output.logits
            return logits

        with mask.applied(self._model):
            compared = self._against_unmasked(masked_logits)
            return self._finish(compared, sink_mass, self._replays[0], start, ranks=ranks)

    @contextmanager
    def _starting(self, replay: Replay | None, start: int) -> Iterator[None]:
        with ExitStack() as stack:
            if start and replay is not None:
                stack.enter_context(replay.starting_at(start))
            yield

    @contextmanager
    def _hearing_sinks(self) -> Iterator[dict[int, Float[Tensor, "text head"]]]:
        """Collect, block by block, the attention that the later tokens of each text pay to token 0."""
        heard: dict[int, Tensor] = {}

        def hear(layer: int, attention: Float[Tensor, "text head query 1"]) -> None:
            heard[layer] = attention[:, :, 1:, 0].mean(-1)

        with lean_forward(self._model, keys=[0], key_listener=hear):
            yield heard

    @torch.no_grad()
    def _against_unmasked(self, logits_of: Callable[[int], Float[Tensor, "text pos vocabulary"]]) -> dict[str, Tensor]:
        """Compare the logits of each batch with what the unmasked model predicts: `[text]` means of each quantity."""
        quantities: dict[str, list[Tensor]] = {"loss": [], "kl": [], "agreement": []}
        for number, tokens in enumerate(self._batches):
            predictions = self._predictions(number)
            for text, logits, before, likeliest in zip(tokens, logits_of(number), *predictions, strict=True):
                n_rows = _ROWS.get(logits.device.type, 64)
                rows = (of_text.split(n_rows) for of_text in (logits[:-1], before, likeliest, text[1:]))
                parts = [_compare_rows(*each) for each in zip(*rows, strict=True)]
                for values, each in zip(quantities.values(), zip(*parts, strict=True), strict=True):
                    values.append(torch.cat(each).mean())
        return {name: torch.stack(values).cpu() for name, values in quantities.items()}

    def _finish(
        self,
        compared: dict[str, Tensor],
        sink_mass: Sequence[dict[int, Tensor]],
        replay: Replay | None,
        start: int,
        *,
        ranks: bool = True,
    ) -> Measured:
        """Put a run's quantities together; blocks before `start` are those of the unmasked run.

        Args:
            compared: what `_against_unmasked` returned.
            sink_mass: of each batch, by block `[text, head]`.
            replay, start: what the run started from.
            ranks: as for `measure`.
        """
        by_layer = {layer: torch.cat([batch[layer].float().cpu() for batch in sink_mass]).T for layer in sink_mass[0]}
        short = None if replay is None else replay.cut(self._model, *self._short)
        own = {
            "sink_mass": self._stacked(by_layer),
            **self._patterns(short, start, ranks=ranks),
            **self._rigidity(),
        }
        for name, values in own.items():
            if start:
                own[name] = torch.cat([getattr(self.unmasked, name)[:start], values[start:]])
        return Measured(**compared, **own)

    def _stacked(self, by_layer: dict[int, Tensor]) -> Tensor:
        if not by_layer:
            raise MelensError("No block of this model tells what its attention looks at.")
        missing = torch.full_like(next(iter(by_layer.values())), float("nan"))
        return torch.stack([by_layer.get(layer, missing) for layer in range(len(self._model.blocks))])

    def _patterns(self, replay: Replay | None, start: int, *, ranks: bool) -> dict[str, Tensor]:
        """Look at the attention patterns of the first texts, cut short: `[layer, head]` of each quantity."""
        probes: list[Probe] = [AttentionEntropy(), *([AttentionSpectrum()] if ranks else [])]
        for probe in probes:
            probe.may_miss = True
        n_rows, n_tokens = self._short
        with self._starting(replay, start):
            traced = trace(self._model, list(self._texts[:n_rows, :n_tokens].cpu()), probes, max_batch_tokens=2**31)
        found = {}
        for name, table in (("entropy", "attention_entropy"), ("effective_rank", "attention_spectrum")):
            if table in traced.tables:
                wide = traced[table].groupby(["layer", "head"])[name].mean().unstack()
                values = wide.reindex(range(len(self._model.blocks))).to_numpy()
                found[name] = torch.tensor(values, dtype=torch.float32)
        missing = torch.full((len(self._model.blocks), 1), float("nan"))
        entropy = found.get("entropy", missing)
        return {
            "entropy": entropy,
            "effective_rank": found.get("effective_rank", torch.full_like(entropy, float("nan"))),
        }

    def _rigidity(self) -> dict[str, Tensor]:
        """Compare token 0 between texts: it sees no other token, so two tokens of each are enough."""
        first_token = self._texts[:, 0].tolist()
        distinct = [first_token.index(token) for token in dict.fromkeys(first_token)]
        short = list(self._texts[distinct, :2].cpu())
        probes: list[Probe] = [TokenVectors([0], site="ln1.hook_out"), _Keys([0], site="attn.k.hook_out")]
        for probe in probes:
            probe.may_miss = True
        present = [probe for probe in probes if any(name.endswith(probe.sites[0]) for name in self._model.hook_dict)]
        traced = trace(self._model, short, present) if present else None
        found = {}
        for name, probe in zip(("input", "key"), probes, strict=True):
            vectors = torch.full((len(short), len(self._model.blocks), 1), float("nan"))
            if traced is not None and probe.name in traced.tensors:
                vectors = traced.tensors[probe.name][:, :, 0]
            n = len(vectors)
            cosines = pairwise_cosine(vectors.transpose(0, 1))
            found[f"{name}_cosine"] = (cosines.sum((1, 2)) - n) / max(1, n * (n - 1))
        return found | {"first_key": vectors[0]}

    @cached_property
    def distinct_first_tokens(self) -> int:
        """Tell on how many different first tokens the cosines rest."""
        return len(set(self._texts[:, 0].tolist()))


def _compare_rows(
    logits: Float[Tensor, "pos vocabulary"],
    unmasked: Float[Tensor, "pos vocabulary"],
    likeliest: Int[Tensor, " pos"],
    targets: Int[Tensor, " pos"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, KL(unmasked ‖ these) and whether both predict the same, a token each; `unmasked` are logarithms."""
    own = logits.log_softmax(-1, dtype=torch.float32)
    loss = -own.gather(-1, targets[:, None])[:, 0]
    kl = (unmasked.exp() * (unmasked - own)).sum(-1)
    return loss, kl, (own.argmax(-1) == likeliest).float()
