"""What masks do to a model on the same tokens: loss, predictions, sinks, how rigid token 0 is (section 4, figure 8).

The unmasked model runs once. A mask's run starts at the first block that it changes, from what entered that block in
the unmasked run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.metrics import has_triton, pairwise_cosine
from melens.errors import MelensError
from melens.masks.mask import WeMask
from melens.models.layout import Layout
from melens.models.view import base_of
from melens.printing import Brief, Summary, counted
from melens.storage.cache import Store, hash_of
from melens.tracing.attended import Attended
from melens.tracing.attention_probes import AttentionEntropy
from melens.tracing.batching import forget_longest
from melens.tracing.probes import Probe
from melens.tracing.resume import RecordedBlocks, apply_head
from melens.tracing.sites import Sites
from melens.tracing.spectra import AttentionSpectrum
from melens.tracing.trace import trace
from melens.tracing.twin import running
from melens.tracing.verification import verified

__all__ = ["MaskComparison", "Measured"]

_KEPT_BYTES = 2 * 2**30
"""Up to how much of the unmasked model's next-token probabilities is kept, if not a GPU has more to spare; beyond,
each mask computes them again."""

_ROWS = {"cpu": 64}
"""Tokens whose logits are looked at together, elsewhere 1,024: on a CPU their rows stay in its cache."""


@dataclass(frozen=True, repr=False)
class Measured(Brief):
    """The model on the texts, with a mask or without.

    Attributes:
        loss: nats a token, mean over a text's tokens.
        kl: KL(unmasked ‖ masked) of the next-token distribution in nats, mean over a text's tokens.
        agreement: share of tokens where both predict the same next token.
        sink_mass: attention that later tokens pay to token 0; NaN in a block without attention, as in what follows.
        entropy, effective_rank: of attention on the short texts, mean over texts; NaN where they were not asked for.
        input_cosine, key_cosine: of token 0's attention input, and of its key, in a text and in each other that begins
            differently, mean over those: 1 is the rigidity that the paper blames. Only the first of the texts that
            begin alike has one, else NaN: in a causal model their token 0 is the same by construction. NaN too where
            the vector is zero, which has no direction.
        first_key: token 0's key in the first text.
    """

    loss: Float[Tensor, " text"]
    kl: Float[Tensor, " text"]
    agreement: Float[Tensor, " text"]
    sink_mass: Float[Tensor, "layer head text"]
    entropy: Float[Tensor, "layer head"]
    effective_rank: Float[Tensor, "layer head"]
    input_cosine: Float[Tensor, "layer text"]
    key_cosine: Float[Tensor, "layer text"]
    first_key: Float[Tensor, "layer d_keys"]


class _Predicted(NamedTuple):
    """The unmasked model's next-token distribution p on a batch; Σ p·log p and the likeliest beside it, as each mask's
    run needs them."""

    loss: Float[Tensor, "text pos"]
    probabilities: Float[Tensor, "text pos vocabulary"]
    negentropy: Float[Tensor, "text pos"]
    likeliest: Int[Tensor, "text pos"]


class _Recorded(NamedTuple):
    """What was recorded, by block: a tensor `[text, ...]` a batch."""

    sink_mass: defaultdict[int, list[Float[Tensor, "_ head"]]]
    input: defaultdict[int, list[Float[Tensor, "_ d"]]]
    key: defaultdict[int, list[Float[Tensor, "_ d_keys"]]]


_OF_FIRST = {"input": "ln1.hook_out", "key": "attn.k.hook_out"}
"""Where token 0's attention input and its key pass."""


class MaskComparison(Summary):
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
        patterns: bool = True,
        store: Store | None = None,
    ) -> None:
        """Run the model without a mask, or find in the store that it was run before.

        Args:
            model: a bridge of a causal language model.
            texts: token ids, at least three a text.
            starts: first blocks of the masks to come.
            texts_per_batch: in a forward pass.
            short_texts, short_tokens: on how much of the texts the attention patterns are looked at.
            patterns: look at them; then `measure` can too.
            store: where the unmasked run is kept, for this model alone, as `store_for` gives one.

        Raises:
            MelensError: texts that are too short, or a loss or attention that is NaN or infinite.
        """
        if texts.shape[1] < 3:
            raise MelensError(f"The texts have {texts.shape[1]} tokens each; at least 3 are needed.")
        self._model = model
        found = {name: Sites.of(model).find(site) for name, site in _OF_FIRST.items()}
        self._of_first = [(name, at.layer, at.hook_point) for name, places in found.items() for at in places]
        self._verified = verified(model, ["hook_resid_post", *(_OF_FIRST[name] for name in found if found[name])])
        texts_per_batch = 1 if self._verified.rule.alone else texts_per_batch
        self._texts = texts.to(model.cfg.device)
        self._batches = self._texts.split(texts_per_batch)
        self._short = (min(short_texts, texts_per_batch, len(texts)), min(short_tokens, texts.shape[1]))
        first_tokens = texts[:, 0].tolist()
        self._distinct = [first_tokens.index(token) for token in dict.fromkeys(first_tokens)]
        self._with_patterns = patterns
        self._before_starts = sorted({start - 1 for start in starts} - {-1})
        self._blocks: list[RecordedBlocks] = []
        self._finals: list[Tensor] = []
        self._kept: dict[int, _Predicted] = {}
        name = f"unmasked-{hash_of(texts, self._before_starts, texts_per_batch, self._short, patterns)[:24]}"
        kept = None if store is None else store.load(name, model.cfg.device)
        self.shared = kept is not None
        if kept is not None:
            self._take(kept)
        else:
            self._run_unmasked(patterns=patterns)
            if store is not None:
                store.save(name, self._to_keep())

    def _heading(self) -> str:
        texts, tokens = self._texts.shape
        return f"MaskComparison on {counted(texts, 'text')} of {counted(tokens, 'token')}, unmasked {self.unmasked!r}"

    # --- Without a mask -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _run_unmasked(self, *, patterns: bool) -> None:
        with self._recording(0) as (network, recorded):
            for tokens in self._batches:
                blocks = RecordedBlocks(self._model)
                with blocks.recording(self._before_starts):
                    output = self._run(base_of(network), tokens)
                self._finals.append(output.last_hidden_state)
                self._blocks.append(blocks)
        loss = torch.cat([self._predictions(number).loss.mean(-1) for number in range(len(self._batches))]).cpu()
        compared = {"loss": loss, "kl": torch.zeros(len(loss)), "agreement": torch.ones(len(loss))}
        _check_finite(compared, "the unmasked model")
        self.unmasked = self._finish(compared, recorded, 0, patterns=patterns)

    def _to_keep(self) -> dict[str, Tensor]:
        """Return the unmasked run as tensors by name."""
        kept = {f"measured.{name}": values for name, values in vars(self.unmasked).items()}
        for number, (final, blocks) in enumerate(zip(self._finals, self._blocks, strict=True)):
            kept[f"final.{number}"] = final
            for layer, output in blocks.outputs.items():
                kept[f"output.{layer}.{number}"] = output[0] if isinstance(output, tuple) else output
                kept[f"in_tuple.{layer}.{number}"] = torch.tensor(isinstance(output, tuple))
        return kept

    def _take(self, kept: dict[str, Tensor]) -> None:
        cpu = {name.removeprefix("measured."): values.cpu() for name, values in kept.items() if "measured." in name}
        self.unmasked = Measured(**cpu)
        for number in range(len(self._batches)):
            self._finals.append(kept[f"final.{number}"])
            outputs: dict[int, Any] = {}
            for layer in self._before_starts:
                output = kept[f"output.{layer}.{number}"]
                outputs[layer] = (output,) if kept[f"in_tuple.{layer}.{number}"] else output
            self._blocks.append(RecordedBlocks(self._model, outputs))

    def _predictions(self, number: int) -> _Predicted:
        """Return what the unmasked model predicts on a batch."""
        if number in self._kept:
            return self._kept[number]
        logits = apply_head(self._model.original_model, self._finals[number])[:, :-1].to(self._texts.device)
        probabilities = logits.new_empty(logits.shape, dtype=torch.float32)
        found = []
        for own, targets, of_text in zip(logits, self._batches[number][:, 1:], probabilities, strict=True):
            torch.softmax(own, -1, dtype=torch.float32, out=of_text)  # of all texts at once it would copy the logits
            found.append(_predict(own, targets, of_text))
        loss, negentropy, likeliest = map(torch.stack, zip(*found, strict=True))
        predicted = _Predicted(loss, probabilities, negentropy, likeliest)
        del logits, own
        limit = _KEPT_BYTES
        if probabilities.is_cuda:
            limit = max(limit, torch.cuda.mem_get_info(probabilities.device)[0] // 4)
        if sum(kept.probabilities.nbytes for kept in self._kept.values()) + probabilities.nbytes <= limit:
            self._kept[number] = predicted
        return predicted

    # --- With one -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, mask: WeMask, *, patterns: bool | None = None) -> Measured:
        """Measure the masked model.

        Args:
            mask: with its start a block, one of `starts`.
            patterns: look at entropy and effective rank of attention, which take a GPU longer than all the rest; by
                default if the comparison does.

        Raises:
            MelensError: a mask that the model cannot have, patterns where the comparison has none, or a loss, a KL or
                attention that is NaN or infinite.
        """
        patterns = self._with_patterns if patterns is None else patterns
        if patterns and not self._with_patterns:
            raise MelensError("This comparison was made without attention patterns.")
        start = min(mask.blocks(self._model))
        if start and start - 1 not in self._before_starts:
            raise MelensError(f"The mask starts in block {start}, which is none of the starts of this comparison.")
        texts: list[Tensor] = []
        with mask.applied(self._model):
            with self._recording(start) as (network, recorded):
                for number, tokens in enumerate(self._batches):
                    with self._blocks[number].resuming_at(start, network) if start else nullcontext():
                        output = self._run(network, tokens)
                    texts += self._against_unmasked(number, output.logits.to(self._texts.device))
            compared = dict(zip(("loss", "kl", "agreement"), torch.stack(texts, dim=1).cpu(), strict=True))
            _check_finite(compared, f"the mask select={mask.select} rate={mask.rate:g}")
            return self._finish(compared, recorded, start, patterns=patterns)

    @contextmanager
    def _recording(self, start: int) -> Iterator[tuple[Any, _Recorded]]:
        """Record, from a block on, the attention that later tokens pay to token 0, and token 0's input and key."""
        recorded = _Recorded(defaultdict(list), defaultdict(list), defaultdict(list))

        def record_sinks(layer: int, attended: Attended) -> None:
            recorded.sink_mass[layer].append(attended.on_keys([0])[:, :, 1:, 0].mean(-1).to(self._texts.device))

        def record(kept: dict[int, list[Tensor]], layer: int, activation: Float[Tensor, "text pos *d"]) -> None:
            kept[layer].append(activation[:, 0].flatten(1).to(self._texts.device, copy=True))

        recorders = [
            (hook_point, partial(record, getattr(recorded, name), layer))
            for name, layer, hook_point in self._of_first
            if layer >= start
        ]
        with running(self._model, recorders, record_sinks, way=self._verified.way) as network:
            yield network, recorded

    def _run(self, network: nn.Module, tokens: Int[Tensor, "text pos"]) -> Any:
        if self._verified.rule.remembers:
            forget_longest(network)
        return network(input_ids=tokens, use_cache=False)

    def _against_unmasked(
        self, number: int, logits: Float[Tensor, "text pos vocabulary"]
    ) -> list[Float[Tensor, " quantity"]]:
        """Compare the logits of a batch with what the unmasked model predicts: loss, KL and agreement of each text."""
        found = []
        for text, masked, *before in zip(self._batches[number], logits, *self._predictions(number)[1:], strict=True):
            probabilities, negentropy, likeliest = before
            loss, cross, own_likeliest = _predict(masked[:-1], text[1:], probabilities)
            agreement = (own_likeliest == likeliest).float()
            found.append(torch.stack([loss.mean(), (negentropy - cross).clamp(min=0).mean(), agreement.mean()]))
        return found

    def _finish(self, compared: dict[str, Tensor], recorded: _Recorded, start: int, *, patterns: bool) -> Measured:
        """Put together what was compared by text and recorded by batch; before `start`, blocks are as if unmasked."""
        if not start and not recorded.sink_mass:
            raise MelensError(f"No sinks can be compared: there is {Layout.of(self._model).attention_in_words}.")
        own = {"sink_mass": self._gathered(recorded.sink_mass).mT}
        of_first = {name: self._gathered(getattr(recorded, name)) for name in _OF_FIRST}
        own |= {f"{name}_cosine": self._cosines_with_others(vectors) for name, vectors in of_first.items()}
        own["first_key"] = of_first["key"][:, 0]
        own = {name: values.cpu() for name, values in own.items()}
        if patterns:
            own |= self._patterns(start)
        for name, values in own.items():
            if start:
                before, after = getattr(self.unmasked, name)[:start], values[start:]
                if after.shape[1:] != before.shape[1:]:  # in a hybrid no block may attend from here on
                    after = before.new_full((len(after), *before.shape[1:]), float("nan"))
                own[name] = torch.cat([before, after])
        for name in ("entropy", "effective_rank"):
            own.setdefault(name, torch.full_like(own["sink_mass"][..., 0], float("nan")))
        return Measured(**compared, **own)

    def _cosines_with_others(self, vectors: Float[Tensor, "layer text d"]) -> Float[Tensor, "layer text"]:
        """Average the cosines of a text's vector with those of the others, over the texts that begin differently."""
        cosines = vectors.new_full(vectors.shape[:2], float("nan"))
        n = len(self._distinct)
        if n > 1:
            distinct = vectors[:, self._distinct]
            with_all = pairwise_cosine(distinct).masked_fill((distinct == 0).all(-1)[:, None, :], float("nan"))
            with_itself = with_all.diagonal(dim1=1, dim2=2)
            cosines[:, self._distinct] = (with_all.sum(-1) - with_itself) / (n - 1)
        return cosines

    def _gathered(self, by_layer: Mapping[int, Sequence[Float[Tensor, "_ d"]]]) -> Float[Tensor, "layer text d"]:
        """Put what was recorded in each batch together; NaN in blocks where nothing was."""
        n_layers, layers, device = len(self._model.blocks), list(by_layer), self._texts.device
        if not layers:
            return torch.full((n_layers, len(self._texts), 1), float("nan"), device=device)
        values = torch.stack([torch.cat([*of_layer]) for of_layer in by_layer.values()])
        whole = torch.full((n_layers, *values.shape[1:]), float("nan"), device=device)
        broken = ~values.isfinite().flatten(1).all(1)
        if broken.any():  # else it would pass for a block where nothing was recorded
            layer = layers[int(broken.nonzero()[0])]
            raise MelensError(f"What attention reads or makes in block {layer} is NaN or infinite: {_LOOK}")
        whole[layers] = values.float()
        return whole

    def _patterns(self, start: int) -> dict[str, Tensor]:
        """Look at the attention patterns of the first texts, cut short: `[layer, head]` of each quantity."""
        missing = torch.full((len(self._model.blocks), 1), float("nan"))
        if not any(layer >= start for layer in Layout.of(self._model).attention):
            return {"entropy": missing, "effective_rank": missing}
        probes: list[Probe] = [AttentionEntropy(), AttentionSpectrum()]
        for probe in probes:
            probe.may_miss = True
            probe.layers = range(start, len(self._model.blocks))
        n_rows, n_tokens = self._short
        # rotary frequencies may depend on the length: then a text cut short begins anew
        resumes = start and self._verified.rule.may_share([n_tokens, self._texts.shape[1]])
        blocks = RecordedBlocks.cut(self._model, self._blocks[:1], range(n_rows), n_tokens)
        with blocks.resuming_at(start) if resumes else nullcontext():
            traced = trace(self._model, list(self._texts[:n_rows, :n_tokens].cpu()), probes, max_batch_tokens=2**31)
        found = {}
        for name, table in (("entropy", "attention_entropy"), ("effective_rank", "attention_spectrum")):
            if table in traced.tables:
                if not traced[table][name].notna().all():  # which the mean over texts would leave out
                    raise MelensError(f"The {name} of an attention pattern is NaN; {_LOOK}")
                wide = traced[table].groupby(["layer", "head"])[name].mean().unstack()
                values = wide.reindex(range(len(self._model.blocks))).to_numpy()
                found[name] = torch.tensor(values, dtype=torch.float32)
        entropy = found.get("entropy", missing)
        rank = found.get("effective_rank", torch.full_like(entropy, float("nan")))
        return {"entropy": entropy, "effective_rank": rank}

    @property
    def distinct_first_tokens(self) -> int:
        """Tell on how many different first tokens the cosines rest."""
        return len(self._distinct)


_LOOK = "look for NaN in the model's weights, or load it in float32."


def _check_finite(compared: dict[str, Tensor], whose: str) -> None:
    """Raise a `MelensError` for the first text whose loss or KL is no number: one NaN or -inf logit is enough."""
    for name in ("loss", "kl"):
        for text in (~compared[name].isfinite()).nonzero()[:1]:
            raise MelensError(f"Text {int(text)}: the {name} of {whose} is {float(compared[name][text])}; {_LOOK}")


def _predict(
    logits: Float[Tensor, "pos vocabulary"], targets: Int[Tensor, " pos"], unmasked: Float[Tensor, "pos vocabulary"]
) -> tuple[Float[Tensor, " pos"], Float[Tensor, " pos"], Int[Tensor, " pos"]]:
    """Return the loss, Σ p·log q against the unmasked probabilities p, and the likeliest next token, a token each."""
    if logits.is_cuda and has_triton():
        from melens.tracing.kernels import against_probabilities

        log_total, cross, likeliest = against_probabilities(logits, unmasked)
        largest, of_target = (logits.gather(-1, tokens[:, None])[:, 0].float() for tokens in (likeliest, targets))
        return log_total + (largest - of_target), cross, likeliest
    parts = []
    n_rows = _ROWS.get(logits.device.type, 1024)
    rows = zip(*(each.split(n_rows) for each in (logits, targets, unmasked)), strict=True)
    for some, their_targets, probabilities in rows:
        own = some.log_softmax(-1, dtype=torch.float32)
        cross = (probabilities[:, None] @ own[..., None])[:, 0, 0]
        parts.append((-own.gather(-1, their_targets[:, None])[:, 0], cross, own.argmax(-1)))
    loss, cross, likeliest = map(torch.cat, zip(*parts, strict=True))
    return loss, cross, likeliest
