"""The paper's quantities as pure functions of tensors.

All reductions accumulate in float32 without a float32 copy of their input: bf16 norms of 20,000 hide differences of 60.
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "abs_max", "abs_median", "concentration", "cosine_with_first", "effective_rank", "energy_share", "entropy_bound",
    "excess_kurtosis", "first_share", "kl_to_gain", "l2_norm", "matrix_entropy", "pairwise_cosine", "rounded",
    "sink_mass",
]  # fmt: skip

SINK_THRESHOLD = 0.3
"""A head, or a block on average, has a sink where queries pay more than this to a key: ε of Gu et al. (2024).

Attention that makes no difference between keys pays the first 0.21 in a prompt of 10 tokens: see `even_attention`."""


@cache
def has_triton() -> bool:
    """Whether `melens.tracing.kernels` can be imported."""
    return importlib.util.find_spec("triton") is not None


def l2_norm(activation: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Compute the L2 norm over the last dimension, in float32 (figures 1 and 5a; at `ln2` figure 2's WeightNorm).

    Example:
        >>> l2_norm(torch.tensor([3.0, 4.0]))
        tensor(5.)
    """
    return torch.linalg.vector_norm(activation, dim=-1, dtype=torch.float32)


def abs_max(activation: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Compute max |h| over the last dimension, without a copy of |h|.

    Example:
        >>> abs_max(torch.tensor([1.0, -3.0]))
        tensor(3.)
    """
    if activation.is_cuda:  # one pass over the memory, where that is what costs
        return torch.linalg.vector_norm(activation, ord=float("inf"), dim=-1)
    return torch.maximum(activation.amax(dim=-1), -activation.amin(dim=-1))


def abs_median(hidden: Float[Tensor, "*batch pos d"]) -> Float[Tensor, "*batch"]:
    """Compute the median of |h| over whole hidden states (Sun et al. 2024), exactly, in float32.

    With an even number of entries it is the lower of the two in the middle, and with a NaN it is NaN, as in
    `torch.median`.

    Example:
        >>> abs_median(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        tensor(2.)
    """
    if hidden.device.type != "cpu":
        return hidden.abs().flatten(-2).median(-1).values.float()
    # The magnitudes of floats are ordered like their bits, and NumPy selects among integers by vector instructions.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[hidden.element_size()]
    magnitudes = hidden.flatten(-2).view(bits) & torch.iinfo(bits).max
    middle = (magnitudes.shape[-1] - 1) // 2
    halves = np.partition(magnitudes.numpy(), middle, axis=-1)[
        ..., middle:
    ]  # the median, then what is larger: NaN last
    is_nan = torch.as_tensor(halves.max(-1), dtype=bits).view(hidden.dtype).isnan()
    median = torch.as_tensor(halves[..., 0], dtype=bits).view(hidden.dtype).float()
    return median.masked_fill(is_nan, float("nan"))


def sink_mass(
    attention: Float[Tensor, "batch head query"], weights: Float[Tensor, "batch query"]
) -> Float[Tensor, "batch head"]:
    """Average the attention that later queries pay to a key (section 6). NaN where none follows.

    The key's own query is left out: the first token has no other key to look at. The importance score of Gu et al.
    (2024), which counts it, is `melens.Importance`.

    Args:
        attention: each query's attention on the key.
        weights: of the queries: equal and of sum 1 after the key, 0 up to it and at padding.

    Example:
        >>> sink_mass(torch.tensor([[[1.0, 0.5, 0.3]]]), torch.tensor([[0.0, 0.5, 0.5]]))
        tensor([[0.4000]])
    """
    return (attention.float() @ weights.float()[..., None])[..., 0]


def energy_share(activation: Float[Tensor, "*batch d"], dims: Bool[Tensor, " d"]) -> Float[Tensor, "*batch"]:
    """Compute the share of the squared norm that lies in some dims: equation 1's Frac, with K the top gains.

    Example:
        >>> energy_share(torch.tensor([3.0, 4.0]), torch.tensor([False, True]))
        tensor(0.6400)
    """
    return (l2_norm(activation[..., dims]) / l2_norm(activation)) ** 2


def kl_to_gain(activation: Float[Tensor, "*batch d"], gain: Float[Tensor, " d"]) -> Float[Tensor, "*batch"]:
    """Compute KL(p || g) in nats, p = ĥ² / Σ ĥ² of an RMSNorm's output ĥ and g = w² / Σ w² of its gain (equation 2).

    Example:
        >>> kl_to_gain(torch.tensor([[2.0, 0.0]]), torch.tensor([1.0, 1.0]))  # all in one of two dims: log 2
        tensor([0.6931])
    """
    reference = (gain.float() ** 2 / (gain.float() ** 2).sum()).to(activation.device)
    rows = activation.reshape(-1, activation.shape[-1])
    divergences = []
    for some in rows.split(max(1, _CHUNK // rows.shape[1])):  # logarithms need a float32 copy: of a little at a time
        energy = some.float() ** 2
        share = energy / energy.sum(-1, keepdim=True)
        divergences.append((torch.xlogy(share, share) - torch.xlogy(share, reference)).sum(-1))
    return torch.cat(divergences).reshape(activation.shape[:-1])


_CHUNK = 2**18  # entries: what a core keeps at hand


def concentration(activation: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Compute the inverse participation ratio Σ (h_i² / Σ h_j²)², which the paper calls concentration (equation 3).

    It runs from 1/d (spread evenly) to 1 (all in one dim).

    Example:
        >>> concentration(torch.tensor([[0.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
        tensor([1.0000, 0.2500])
    """
    rows = activation.reshape(-1, activation.shape[-1])
    found = []
    for some in rows.split(max(1, _CHUNK // rows.shape[1])):  # squares need a float32 copy: of a little at a time
        energy = some.float() ** 2
        found.append((l2_norm(energy) / energy.sum(-1)) ** 2)
    return torch.cat(found).reshape(activation.shape[:-1])


def cosine_with_first(
    hidden: Float[Tensor, "batch pos d"], weights: Float[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """Compute the cosine of each token's state with token 0's, as it is and without what all tokens share.

    The second takes the mean direction of the other tokens from both unit vectors first. A large component that all
    states of a block share brings the first close to 1 everywhere, and the second close to 0; a state that has turned
    to token 0's has both close to 1. (The mean is of directions, as one massive state would be a mean of states.)

    Args:
        hidden: hidden states; a state of zeros has the cosine 0.
        weights: of the tokens in that mean: equal and of sum 1 behind token 0, 0 for it and at padding.

    Example:
        >>> states = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [0.0, 2.0], [5.0, 0.0]]])
        >>> cosine, centred = cosine_with_first(states, torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3]]))
        >>> cosine
        tensor([[1., 0., 0., 1.]])
        >>> centred
        tensor([[ 1., -1., -1.,  1.]])
    """
    norms = l2_norm(hidden).clamp(min=torch.finfo(torch.float32).tiny)
    step = max(1, 8 * _CHUNK // (hidden.shape[0] * hidden.shape[2]))  # float32 copies: of a little at a time
    pieces = list(zip(hidden.split(step, dim=1), norms.split(step, dim=1), weights.split(step, dim=1), strict=True))
    directions = [torch.einsum("bp,bpd->bd", weight / norm, some.float()) for some, norm, weight in pieces]
    shared = torch.stack(directions).sum(0)
    first = hidden[:, 0].float() / norms[:, :1]
    first_centred = torch.nn.functional.normalize(first - shared, dim=-1)
    cosines, centred = [], []
    for some, norm, _ in pieces:
        unit = some.float() / norm[..., None]
        cosines.append(torch.einsum("bpd,bd->bp", unit, first))
        unit = torch.nn.functional.normalize(unit - shared[:, None], dim=-1)
        centred.append(torch.einsum("bpd,bd->bp", unit, first_centred))
    return torch.cat(cosines, dim=1), torch.cat(centred, dim=1)


def effective_rank(singular_values: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch"]:
    """Compute exp(entropy) of the singular values' distribution σ / Σσ (Roy & Vetterli 2007), for section 6.

    Example:
        >>> effective_rank(torch.tensor([1.0, 1.0, 0.0]))
        tensor(2.)
    """
    share = singular_values / singular_values.sum(-1, keepdim=True)
    return (-torch.xlogy(share, share).sum(-1)).exp()


def first_share(singular_values: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch"]:
    """Compute the share of the largest singular value in their sum, for section 6.

    Example:
        >>> first_share(torch.tensor([3.0, 1.0]))
        tensor(0.7500)
    """
    return singular_values.amax(-1) / singular_values.sum(-1)


def matrix_entropy(singular_values: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch"]:
    """Compute the entropy of σ² / Σσ² over the logarithm of how many σ there are, min(T, d) of a matrix `[T, d]`.

    It runs from 0 (one direction, and so for a single σ) to 1 (all directions alike). Where it is low in the middle of
    a model the literature speaks of a compression valley (Skean et al. 2025; Queipo-de-Llano et al. 2025).

    Example:
        >>> matrix_entropy(torch.tensor([[1.0, 1.0], [3.0, 1.0]]))
        tensor([1.0000, 0.4690])
    """
    energy = singular_values**2 / (singular_values**2).sum(-1, keepdim=True)
    return -torch.xlogy(energy, energy).sum(-1) / math.log(max(2, singular_values.shape[-1]))


def entropy_bound(share: Float[Tensor, "*batch"], n: int) -> Float[Tensor, "*batch"]:
    """Compute the largest `matrix_entropy` of n directions of which one has at least a share p of the energy.

    `(-p log p - (1 - p) log (1 - p) + (1 - p) log (n - 1)) / log n` (Queipo-de-Llano et al. 2025, corollary 2). With
    p ≤ 1 / n all directions may be alike: there the formula would be too low, and the bound is 1.

    Example:
        >>> entropy_bound(torch.tensor([0.9, 0.5, 0.1]), 2)
        tensor([0.4690, 1.0000, 1.0000])
    """
    p = share.clamp(min=1 / n, max=1)
    two = -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)
    return (two + (1 - p) * math.log(max(1, n - 1))) / math.log(max(2, n))


def pairwise_cosine(vectors: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n n"]:
    """Compute the cosine similarity of every two vectors (figure 5c).

    Example:
        >>> pairwise_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    return unit @ unit.mT


def excess_kurtosis(values: Float[Tensor, "*n"]) -> float:
    """Compute E[(x - μ)⁴] / σ⁴ - 3 over all entries: 0 of a normal distribution, large with outliers.

    Bondarenko et al. (2023) measure by it how hard activations are to quantise. NaN where all entries are alike.

    Example:
        >>> excess_kurtosis(torch.tensor([0.0, 0.0, 0.0, 4.0]))  # μ = 1, σ² = 3: 21 / 9 - 3
        -0.6666666666666665
    """
    squared = (values.double() - values.double().mean()) ** 2
    variance = float(squared.mean())
    return float((squared**2).mean()) / variance**2 - 3 if variance else math.nan


def rounded(values: Float[Tensor, "*n"], largest: Float[Tensor, "*#n"], bits: int) -> Float[Tensor, "*n"]:
    """Round values to as many as `bits` tell apart, evenly around 0, and return them as floats (fake quantisation).

    ``scale = largest / (2^(bits - 1) - 1)``; ``scale * clamp(round(values / scale))``, halves to even. What is beyond
    `largest` becomes `largest`.

    Args:
        values: in any dtype, which the result has too; rounded in float32.
        largest: the |value| that the last number stands for.
        bits: at least 2.

    Example:
        >>> rounded(torch.tensor([0.4, -1.1, 3.0, 9.0]), torch.tensor(3.0), bits=3)  # the scale is 1
        tensor([ 0., -1.,  3.,  3.])
    """
    steps = 2 ** (bits - 1) - 1
    scale = (largest.float() / steps).clamp(min=torch.finfo(torch.float32).tiny)  # of zeros alone it would be 0
    return ((values.float() / scale).round_().clamp_(-steps, steps) * scale).to(values.dtype)
