"""A sliding KV cache with kept tokens, in one forward pass instead of one a token (StreamingLLM, Xiao et al. 2023).

    cache = SlidingCache(256, kept=(0, 1, 2, 3))
    cache.seen_by(1000)  # tokens 0 to 3 and 749 to 1000
    with running(model) as network, cache.applied(model): ...

1. Query i sees the `size - len(kept)` tokens up to its own, the window, and every kept token that has left it. The
   slots of kept tokens are reserved: they are empty until then.
2. Positions are counted in the cache: kept tokens behind the window stand at 0, 1, 2, ..., those of the window follow,
   the query is last. Within the window distances are what they are in the text, so the model's own attention holds.
3. For the scores on kept keys each attention module runs once more, with the rotations of the positions in the cache:
   whatever the layout of rotary dims, it is the module's own. Both parts are put together by their log-sum-exp.
4. Keys and values are those that a real cache holds, as each token's were computed under the same cache. `check_cache`
   compares each block with the plain model on the tokens in the cache alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from melens.errors import MelensError
from melens.models.layout import Layout
from melens.models.view import base_of
from melens.tracing.attended import FromScores, attention_scores
from melens.tracing.attention import causal_attention, weigh_values
from melens.tracing.batching import tolerance_of
from melens.tracing.twin import Inputs, Twin, hidden_of, running
from melens.tracing.verification import verified

__all__ = ["SlidingCache", "check_cache"]

_CHECKED = ((8, ()), (8, (0, 1)), (8, (1, 3)))
"""Sizes and kept tokens of the caches that `check_cache` tries, on a text of 24 tokens."""

_CHECKED_TOKENS = 24


@dataclass(frozen=True)
class SlidingCache:
    """A KV cache of `size` entries that keeps some early tokens.

    Attributes:
        size: of the cache, in tokens; the query's own is one of them.
        kept: positions of tokens that stay, in order; all are in the window of the first `size - len(kept)` tokens.

    Raises:
        MelensError: kept tokens that are none of the first window.

    Example:
        >>> SlidingCache(6, kept=(0, 1)).seen_by(9)
        [0, 1, 6, 7, 8, 9]
    """

    size: int
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if list(self.kept) != sorted(set(self.kept)) or not all(0 <= token < self.window for token in self.kept):
            raise MelensError(
                f"A cache of {self.size} tokens cannot keep the tokens {list(self.kept)}: kept tokens stand in order "
                f"and before position {self.window}, the cache's size less their number."
            )

    @property
    def window(self) -> int:
        """How many tokens a query sees up to its own, whether kept or not."""
        return self.size - len(self.kept)

    def seen_by(self, query: int) -> list[int]:
        """List the tokens that a query sees, in the order of their positions in the cache."""
        begin = max(0, query - self.window + 1)
        return [*(token for token in self.kept if token < begin), *range(begin, query + 1)]

    def slots(self, n_tokens: int) -> Int[Tensor, " pos"]:
        """Return where each token stands in the cache: a kept one as a key behind the window, others as a query.

        A kept token needs no place as a query: it stands in the first window, from which it sees no key beyond.
        """
        tokens, kept = torch.arange(n_tokens), torch.tensor(self.kept, dtype=torch.long)
        kept = kept[kept < n_tokens]
        n_behind = (tokens[:, None] - kept >= self.window).sum(1)
        slots = torch.minimum(tokens, self.window - 1 + n_behind)
        slots[kept] = torch.arange(len(kept))
        return slots

    @contextmanager
    def applied(self, model: TransformerBridge) -> Iterator[None]:
        """Let the plain twin of a model attend as from this cache, within `running`, for as long as the context lasts.

        Raises:
            MelensError: in a forward pass, a model whose positions `check_cache` would refuse; at the end, that
                something else than the twin ran, without the cache.
        """
        modules = set(Twin.of(model).attention.values())
        reached: set[nn.Module] = set()
        with ExitStack() as stack:
            for attention in modules:
                pass_on = partial(self._pass_on, reached)
                stack.callback(attention.register_forward_pre_hook(pass_on, with_kwargs=True).remove)
            yield
        if reached != modules:
            raise MelensError(
                "The cache did not reach the attention of every block: a hook, or a module that was replaced, makes "
                "the model run through TransformerLens's own components. Take it off."
            )

    def _pass_on(
        self, reached: set[nn.Module], attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Inputs:
        """Give an attention module what its attention function is to do instead."""
        reached.add(attention)
        in_cache: list[Tensor] = []  # queries and keys, rotated by their positions in the cache
        if self.kept:
            rotations = _at_slots(kwargs.get("position_embeddings"), self.slots(hidden_of(args, kwargs).shape[1]))
            noting = {"melens_attend": partial(_note, in_cache), "melens_record": None}
            attention.forward(*args, **kwargs | noting | {"position_embeddings": rotations})  # past its hooks
        return args, kwargs | {"melens_attend": partial(self._attend, in_cache)}

    def _attend(
        self,
        in_cache: Sequence[Tensor],
        query: Float[Tensor, "batch head pos d_head"],
        key: Float[Tensor, "batch kv_head pos d_head"],
        value: Float[Tensor, "batch kv_head pos d_value"],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sink_logits: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Float[Tensor, "batch head pos d_value"], FromScores]:
        """Compute attention from the cache; what is read afterwards is right for the keys of the window alone."""
        if mask is not None or (window is not None and window < self.size):
            own = "attends in chunks or both ways" if window is None else f"has sliding windows of {window} tokens"
            raise MelensError(f"A cache of {self.size} tokens makes no sense in this model: it {own} itself.")
        shared: dict[str, Any] = {"scale": scale, "softcap": softcap}
        output, read = causal_attention(query, key, value, window=self.window, sink_logits=sink_logits, **shared)
        kept = [token for token in self.kept if token < query.shape[2]]
        if not kept:
            return output, read
        query_in_cache, key_in_cache = in_cache
        scores = attention_scores(query_in_cache, key_in_cache, slice(None), kept, **shared)
        behind = torch.arange(query.shape[2])[:, None] - torch.tensor(kept) >= self.window
        scores = scores.masked_fill(~behind.to(scores.device), float("-inf"))
        total = torch.logaddexp(read.logsumexp, torch.logsumexp(scores, dim=-1))
        output = output * torch.exp(read.logsumexp - total)[..., None].to(output.dtype)
        output = output + weigh_values(torch.exp(scores - total[..., None]), value[:, :, kept])
        return output, replace(read, logsumexp=total)


def _note(
    in_cache: list[Tensor], query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> tuple[Tensor, FromScores | None]:
    """Note queries and keys instead of attending."""
    in_cache[:] = query, key
    return value.new_zeros((*query.shape[:3], value.shape[-1])), None


def _at_slots(rotations: Any, slots: Int[Tensor, " pos"]) -> Any:
    """Return what a module is handed to rotate queries and keys with, of other positions."""
    parts = rotations if isinstance(rotations, tuple | list) else [rotations]
    for part in parts:
        if not isinstance(part, Tensor) or part.ndim != 3 or part.shape[1] != len(slots):
            raise MelensError(
                "A sliding cache counts positions anew, which takes rotary positions that each block's attention is "
                "handed as `position_embeddings`; this model has none."
            )
    moved = [part[:, slots.to(part.device)] for part in parts]
    return moved[0] if isinstance(rotations, Tensor) else tuple(moved)


# --- Against a real cache ---------------------------------------------------------------------------------------------


@torch.no_grad()
def check_cache(model: TransformerBridge, size: int, n_tokens: int) -> None:
    """Check on the spot that caches are simulated as a real one would be, on a short text and small caches.

    Args:
        model: a bridge.
        size: of the cache to come.
        n_tokens: of the texts to come.

    Raises:
        MelensError: a model without rotary positions, with own windows below the cache, with blocks that keep evicted
            tokens otherwise, whose rotations change with the length of the text, or where the two ways differ.
    """
    layout = Layout.of(model)
    if len(layout.attention) < layout.n_layers or model.original_model._is_stateful:
        raise MelensError(
            "A cache can evict tokens of attention alone, and this model has recurrent blocks, or blocks whose "
            f"attention cannot be measured: there is {layout.attention_in_words}."
        )
    found = verified(model, ["hook_resid_pre", "hook_resid_post"])
    if found.way != "fast" or not Twin.of(model).is_fused:
        raise MelensError("A cache cannot be simulated in this model: transformers computes its attention eagerly.")
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.cfg.d_vocab) // 2  # images' ids are among the last
    tokens = torch.randint(vocabulary, (1, _CHECKED_TOKENS), generator=generator).to(model.cfg.device)
    with running(model) as network, SlidingCache(size, (0,)).applied(model):  # refuses what has no such cache
        base_of(network)(input_ids=tokens[:, :2], use_cache=False)
    limits = [*found.rule.limits, *([] if found.rule.equal_beyond is None else [found.rule.equal_beyond])]
    if n_tokens > min(limits, default=n_tokens):
        raise MelensError(
            f"Beyond {min(limits):,} tokens this model rotates, or selects, keys by the length of the whole text, "
            f"which no cache does. Give texts of at most {min(limits):,} tokens."
        )
    for cache in (SlidingCache(*checked) for checked in _CHECKED):
        error = _largest_error(model, tokens, cache)
        if not error <= tolerance_of(next(model.original_model.parameters()).dtype):  # nor NaN
            raise MelensError(
                f"A cache that keeps {list(cache.kept) or 'no tokens'} cannot be simulated in this model: in one pass "
                f"a block's output differs by {error:.1e} from that with a real cache."
            )


def _largest_error(model: TransformerBridge, tokens: Int[Tensor, "1 pos"], cache: SlidingCache) -> float:
    """Compare each block with itself on the tokens in the cache alone: the largest relative error of a token's output.

    Each block gets what entered it in the one pass, for the tokens that the query sees, at positions 0, 1, 2, ..., and
    runs as it is. Errors do not add up over blocks, of which some amplify bf16's roundings a thousandfold.
    """
    full = [query for query in range(tokens.shape[1]) if len(cache.seen_by(query)) == cache.size]
    seen = torch.tensor([cache.seen_by(query) for query in full], device=tokens.device)
    entered: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    errors: list[Tensor] = []

    def keep(kept: dict[str, Tensor], states: Float[Tensor, "1 pos d"], hook: HookPoint) -> None:
        kept[str(hook.name)] = states[0]

    def put(states: Float[Tensor, "query size d"], hook: HookPoint) -> Tensor:
        return entered[str(hook.name)][seen.to(states.device)]

    def compare(states: Float[Tensor, "query size d"], hook: HookPoint) -> None:
        at_once, alone = left[str(hook.name)][full].float(), states[:, -1].float()
        errors.append(((at_once - alone).norm(dim=-1) / alone.norm(dim=-1)).max().cpu())

    def hooks(on_input: Any, on_output: Any) -> list[tuple[str, Any]]:
        blocks = [f"blocks.{layer}.hook_resid" for layer in range(len(model.blocks))]
        return [(f"{block}_{end}", hook) for block in blocks for end, hook in (("pre", on_input), ("post", on_output))]

    keepers = hooks(partial(keep, entered), partial(keep, left))
    with model.hooks(fwd_hooks=keepers), running(model) as network, cache.applied(model):
        base_of(network)(input_ids=tokens, use_cache=False)
    with model.hooks(fwd_hooks=hooks(put, compare)), running(model) as network:
        base_of(network)(input_ids=tokens[0][seen], use_cache=False)
    return float(torch.stack(errors).max())
