"""Loss on long texts, token by token, and needles found, under a sliding KV cache or with every token kept.

1. Each text runs alone, once a cache: what a query sees is decided by `melens.tracing.sliding_cache`.
2. The reference is recomputation (Xiao et al. 2023, figure 1c): the text runs anew in pieces as long as the cache that
   overlap by half. Every token has half a cache to a whole one before it, and its piece's first token to attend to.
3. A needle is found if each token of the answer is the likeliest, given those before it.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from melens.benchmarks.language import Questions
from melens.models.view import base_of
from melens.tracing.resume import apply_head
from melens.tracing.sliding_cache import SlidingCache
from melens.tracing.twin import running

__all__ = ["needles_found", "recomputed_losses", "token_losses"]

_HEAD_TOKENS = 256
"""Tokens whose logits are computed together: of a whole long text they would be gigabytes."""


def token_losses(
    model: TransformerBridge, texts: Int[Tensor, "text pos"], cache: SlidingCache | None
) -> Float[Tensor, "text query"]:
    """Return the loss in nats of each query's next token, under a cache or with every token kept (None)."""
    return torch.cat([_losses(model, ids[None], cache) for ids in texts.to(model.cfg.device)]).cpu()


def recomputed_losses(
    model: TransformerBridge, texts: Int[Tensor, "text pos"], size: int, *, max_batch_tokens: int = 4096
) -> Float[Tensor, "text query"]:
    """Return the loss in nats of each query's next token, with the last `size / 2` to `size - 1` tokens run anew.

    Args:
        model: a bridge.
        texts: token ids, at least `size` a text.
        size: tokens of a piece.
        max_batch_tokens: of a forward pass.
    """
    half, losses = size // 2, []
    for ids in texts.to(model.cfg.device):
        padded = torch.nn.functional.pad(ids, (0, -len(ids) % half))  # behind the text, where nothing is predicted
        pieces = padded.unfold(0, 2 * half, half).split(max(1, max_batch_tokens // size))
        of_piece = torch.cat([_losses(model, rows, None) for rows in pieces])
        # of the first piece every token, of each other one those from its middle on
        losses.append(torch.cat([of_piece[0], of_piece[1:, half - 1 :].flatten()])[: len(ids) - 1])
    return torch.stack(losses).cpu()


def needles_found(model: TransformerBridge, questions: Questions, cache: SlidingCache | None) -> Bool[Tensor, " item"]:
    """Tell of each question whether every token of its answer is the likeliest, under a cache or with every token."""
    found = []
    for context, answer in questions.requests:
        ids = torch.tensor([[*context, *answer]], device=model.cfg.device)
        final = _final_states(model, ids[:, :-1], cache)[:, -len(answer) :]
        likeliest = apply_head(model.original_model, final).argmax(-1).to(ids.device)
        found.append(bool((likeliest == ids[:, -len(answer) :]).all()))
    return torch.tensor(found, dtype=torch.bool)


@torch.no_grad()
def _losses(
    model: TransformerBridge, rows: Int[Tensor, "row pos"], cache: SlidingCache | None
) -> Float[Tensor, "row query"]:
    states = _final_states(model, rows[:, :-1], cache).split(_HEAD_TOKENS, dim=1)
    losses = []
    for some, targets in zip(states, rows[:, 1:].split(_HEAD_TOKENS, dim=1), strict=True):
        logits = apply_head(model.original_model, some).float()
        losses.append(torch.nn.functional.cross_entropy(logits.mT, targets.to(logits.device), reduction="none"))
    return torch.cat(losses, dim=1)


@torch.no_grad()
def _final_states(
    model: TransformerBridge, rows: Int[Tensor, "row pos"], cache: SlidingCache | None
) -> Float[Tensor, "row pos d"]:
    with running(model) as network, nullcontext() if cache is None else cache.applied(model):
        return base_of(network)(input_ids=rows, use_cache=False).last_hidden_state
