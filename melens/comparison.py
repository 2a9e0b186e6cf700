"""What masks do to a model on the same tokens: loss, predictions, sinks, how rigid token 0 is (section 4, figure 8).

The unmasked model runs once. A mask's run starts at the first block that it changes, from what entered that block in
the unmasked run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from melens.cache import Store
from melens.errors import MelensError
from melens.lean import lean_forward
from melens.metrics import pairwise_cosine
from melens.probes import AttentionEntropy, AttentionSpectrum, Probe, TokenVectors
from melens.replay import Replay, logits_of
from melens.tracing import trace
from melens.wemask import WeMask

__all__ = ["MaskComparison", "Measured"]

_KEPT_BYTES = 2 * 2**30
"""Up to how much of the unmasked model's next-token probabilities is kept, if not a GPU has more to spare; beyond,
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
        entropy, effective_rank: of attention on the short texts, mean over texts; NaN where they were not asked for.
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


class _Predicted(NamedTuple):
    """The unmasked model's next-token distribution on a batch: Σ p·log p beside p, as a mask's run needs both."""

    probabilities: Float[Tensor, "text pos vocabulary"]
    negentropy: Float[Tensor, "text pos"]
    likeliest: Int[Tensor, "text pos"]


class _Keys(TokenVectors):
    name = "keys"


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
        self._kept: dict[int, _Predicted] = {}
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
        compared = self._against_unmasked(lambda number: logits_of(self._model.original_model, self._finals[number]))
        self.unmasked = self._finish(compared, sink_mass, 0)

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

    def _predictions(self, number: int) -> _Predicted:
        """Return what the unmasked model predicts on a batch."""
        if number in self._kept:
            return self._kept[number]
        log_probabilities = logits_of(self._model.original_model, self._finals[number])[:, :-1].log_softmax(
            -1, dtype=torch.float32
        )
        likeliest = log_probabilities.argmax(-1)
        probabilities = log_probabilities.exp()
        predicted = _Predicted(probabilities, _row_dots(probabilities, log_probabilities), likeliest)
        del log_probabilities
        limit = _KEPT_BYTES
        if probabilities.is_cuda:
            limit = max(limit, torch.cuda.mem_get_info(probabilities.device)[0] // 4)
        if sum(kept.probabilities.nbytes for kept in self._kept.values()) + probabilities.nbytes <= limit:
            self._kept[number] = predicted
        return predicted

    # --- With one -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, mask: WeMask, *, patterns: bool = True) -> Measured:
        """Measure the masked model.

        Args:
            mask: with its start a block, one of `starts`.
            patterns: look at entropy and effective rank of attention, which take a GPU longer than all the rest.

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
            return self._finish(compared, sink_mass, start, patterns=patterns)

    @contextmanager
    def _starting(self, replay: Replay, start: int) -> Iterator[None]:
        with ExitStack() as stack:
            if start:
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
            for text, logits, *before in zip(tokens, logits_of(number), *predictions, strict=True):
                n_rows = _ROWS.get(logits.device.type, 64)
                rows = (of_text.split(n_rows) for of_text in (logits[:-1], text[1:], *before))
                parts = [_compare_rows(*each) for each in zip(*rows, strict=True)]
                for values, each in zip(quantities.values(), zip(*parts, strict=True), strict=True):
                    values.append(torch.cat(each).mean())
        return {name: torch.stack(values).cpu() for name, values in quantities.items()}

    def _finish(
        self, compared: dict[str, Tensor], sink_mass: Sequence[dict[int, Tensor]], start: int, *, patterns: bool = True
    ) -> Measured:
        """Put a run's quantities together; blocks before `start` are those of the unmasked run.

        Args:
            compared: what `_against_unmasked` returned.
            sink_mass: of each batch, by block `[text, head]`.
            start: the block that the run began with.
            patterns: as for `measure`.
        """
        by_layer = {layer: torch.cat([batch[layer].float().cpu() for batch in sink_mass]).T for layer in sink_mass[0]}
        own = {"sink_mass": self._stacked(by_layer), **self._rigidity(start)}
        if patterns:
            own |= self._patterns(start)
        for name, values in own.items():
            if start:
                own[name] = torch.cat([getattr(self.unmasked, name)[:start], values[start:]])
        for name in ("entropy", "effective_rank"):
            own.setdefault(name, torch.full_like(own["sink_mass"][..., 0], float("nan")))
        return Measured(**compared, **own)

    def _stacked(self, by_layer: dict[int, Tensor]) -> Tensor:
        if not by_layer:
            raise MelensError("No block of this model tells what its attention looks at.")
        missing = torch.full_like(next(iter(by_layer.values())), float("nan"))
        return torch.stack([by_layer.get(layer, missing) for layer in range(len(self._model.blocks))])

    def _patterns(self, start: int) -> dict[str, Tensor]:
        """Look at the attention patterns of the first texts, cut short: `[layer, head]` of each quantity."""
        probes: list[Probe] = [AttentionEntropy(), AttentionSpectrum()]
        for probe in probes:
            probe.may_miss = True
            probe.layers = range(start, len(self._model.blocks))
        n_rows, n_tokens = self._short
        with self._starting(Replay.cut(self._model, self._replays[:1], range(n_rows), n_tokens), start):
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

    def _rigidity(self, start: int) -> dict[str, Tensor]:
        """Compare token 0 between texts: it sees no other token, so two tokens of each are enough."""
        first_token = self._texts[:, 0].tolist()
        distinct = [first_token.index(token) for token in dict.fromkeys(first_token)]
        short = list(self._texts[distinct, :2].cpu())
        found, n, n_layers = {}, len(short), len(self._model.blocks)
        probes: dict[str, Probe] = {
            "input": TokenVectors([0], site="ln1.hook_out"),
            "key": _Keys([0], site="attn.k.hook_out"),
        }
        heard = {
            name: [at for at in range(start, n_layers) if f"blocks.{at}.{probe.sites[0]}" in self._model.hook_dict]
            for name, probe in probes.items()
        }
        for name, probe in probes.items():
            probe.layers = heard[name]
        with self._starting(Replay.cut(self._model, self._replays, distinct, 2), start):
            present = [probe for name, probe in probes.items() if heard[name]]
            traced = trace(self._model, short, present, max_batch_tokens=2**31) if present else None
        for name, probe in probes.items():
            vectors = torch.full((n, n_layers, 1), float("nan"))
            if traced is not None and heard[name]:
                of_heard = traced.tensors[probe.name][:, :, 0]
                vectors = torch.full((n, n_layers, of_heard.shape[-1]), float("nan"))
                vectors[:, heard[name]] = of_heard
            cosines = pairwise_cosine(vectors.transpose(0, 1))
            found[f"{name}_cosine"] = (cosines.sum((1, 2)) - n) / max(1, n * (n - 1))
        return found | {"first_key": vectors[0]}

    @cached_property
    def distinct_first_tokens(self) -> int:
        """Tell on how many different first tokens the cosines rest."""
        return len(set(self._texts[:, 0].tolist()))


def _compare_rows(
    logits: Float[Tensor, "pos vocabulary"],
    targets: Int[Tensor, " pos"],
    unmasked: Float[Tensor, "pos vocabulary"],
    negentropy: Float[Tensor, " pos"],
    likeliest: Int[Tensor, " pos"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, KL(unmasked ‖ these) and whether both predict the same, a token each."""
    own = logits.log_softmax(-1, dtype=torch.float32)
    loss = -own.gather(-1, targets[:, None])[:, 0]
    kl = (negentropy - _row_dots(unmasked, own)).clamp(min=0)
    return loss, kl, (own.argmax(-1) == likeliest).float()


def _row_dots(a: Float[Tensor, "*row d"], b: Float[Tensor, "*row d"]) -> Float[Tensor, "*row"]:
    return (a[..., None, :] @ b[..., :, None])[..., 0, 0]
