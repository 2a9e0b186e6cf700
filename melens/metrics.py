"""The paper's quantities as pure functions of tensors.

All reductions accumulate in float32 without a float32 copy of their input: bf16 norms of 20,000 hide differences of 60.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["abs_max", "abs_median", "bootstrap_mean", "l2_norm", "median_of_counts", "sink_mass"]


def l2_norm(activation: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Compute the L2 norm over the last dimension, in float32 (figures 1 and 5a; at `ln2` figure 2's WeightNorm)."""
    return torch.linalg.vector_norm(activation, dim=-1, dtype=torch.float32)


def abs_max(activation: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Compute max |h| over the last dimension, without a copy of |h|."""
    if activation.is_cuda:  # one pass over the memory, where that is what costs
        return torch.linalg.vector_norm(activation, ord=float("inf"), dim=-1)
    return torch.maximum(activation.amax(dim=-1), -activation.amin(dim=-1))


def abs_median(activation: Float[Tensor, "pos d"]) -> Float[Tensor, ""]:
    """Compute the median of |h| over a whole hidden state (Sun et al. 2024), exactly, in float32.

    With an even number of entries it is the lower of the two in the middle, as in `torch.median`.
    """
    if activation.is_cuda or activation.dtype != torch.float32:
        return activation.abs().median().float()
    # The magnitudes of floats are ordered like their bits: count by the upper half of them, then select among those
    # that share the median's upper half. On a CPU a third of the time of a selection among all.
    magnitudes = activation.flatten().view(torch.int32) & torch.iinfo(torch.int32).max
    upper = magnitudes >> 16
    up_to = torch.bincount(upper, minlength=2**15).cumsum(0)
    middle = (activation.numel() - 1) // 2
    holder = (up_to <= middle).sum()
    held = magnitudes[upper == holder]
    return held.kthvalue(middle - int(up_to[holder]) + len(held) + 1).values.view(torch.float32)


def median_of_counts(counts: Int[Tensor, "*batch 3 64"], dtype: torch.dtype) -> Float[Tensor, "*batch"]:
    """Read the median of |h| off what `kernels.count_magnitudes` counted; `dtype` is that of h."""
    rank = (counts[..., 0, :].sum(-1) - 1) // 2
    magnitude = torch.zeros_like(rank)
    for digit in range(3):
        of_digit = counts[..., digit, :32]
        is_below = of_digit.cumsum(-1) <= rank[..., None]
        magnitude = (magnitude << 5) | is_below.sum(-1)
        rank = rank - (of_digit * is_below).sum(-1)
    return magnitude.to(torch.int16).view(dtype).float()


def sink_mass(
    attention: Float[Tensor, "batch head query"], weights: Float[Tensor, "batch query"]
) -> Float[Tensor, "batch head"]:
    """Average the attention that later queries pay to a key (section 6; Gu et al. 2024). NaN where none follows.

    The key's own query is left out: the first token has no other key to look at.

    Args:
        attention: each query's attention on the key.
        weights: of the queries: equal and of sum 1 after the key, 0 up to it and at padding.
    """
    return (attention * weights[:, None]).sum(dim=-1)


def bootstrap_mean(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of a mean over prompts; (nan, nan) below two values."""
    if len(values) < 2:
        return (float("nan"), float("nan"))
    rows = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(values, dtype=float)[rows].mean(axis=1), [tail, 1 - tail])
    return (float(low), float(high))
