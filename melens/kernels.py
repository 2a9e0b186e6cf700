"""The kernels that PyTorch lacks, for GPUs: an exact median without a sort, and predictions compared in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["against_probabilities", "count_magnitudes"]

_BLOCK = 4096


def count_magnitudes(hiddens: Sequence[Float[Tensor, "_ d"]]) -> Int[Tensor, "hidden 3 64"]:
    """Count the magnitudes of bf16 or fp16 tensors as far as their medians need, without waiting for the GPU.

    The magnitudes of floats are ordered like their 15 bits, taken as three digits of 5 bits. The first row counts the
    values by their first digit; the second by the second digit, among those that share the median's first; the third
    by the last, among those that share the median's first two. `metrics.median_of_counts` reads the median off.

    PyTorch's own median takes 0.30 ms for a hidden state of 4,096 × 2,560 in bf16 on an H200, this 0.07 ms.
    """
    counts = torch.zeros((len(hiddens), 3, 64), dtype=torch.int32, device=hiddens[0].device)
    for hidden, of_hidden in zip(hiddens, counts, strict=True):
        bits, n = hidden.flatten().view(torch.int16), hidden.numel()
        with torch.cuda.device_of(hidden):  # else Triton takes the current one
            for digit in range(3):
                _count_digit[(triton.cdiv(n, _BLOCK),)](bits, n, (n - 1) // 2, of_hidden, DIGIT=digit, BLOCK=_BLOCK)
    return counts


@triton.jit
def _count_digit(bits, n, middle, counts, DIGIT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    prefix = 0
    rank = middle
    for earlier in tl.static_range(DIGIT):
        # The median's digit is the first whose running count exceeds the rank; ranks go on from there.
        of_digit = tl.load(counts + earlier * 64 + tl.arange(0, 64))
        is_below = (tl.cumsum(of_digit, 0) <= rank) & (tl.arange(0, 64) < 32)
        prefix = prefix * 32 + tl.sum(is_below.to(tl.int32), 0)
        rank = rank - tl.sum(tl.where(is_below, of_digit, 0), 0)
    shift: tl.constexpr = 10 - 5 * DIGIT
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    magnitude = tl.load(bits + offsets, mask=offsets < n, other=0).to(tl.int32) & 0x7FFF
    shares_prefix = (offsets < n) & ((magnitude >> (shift + 5)) == prefix)
    counted = tl.histogram(tl.where(shares_prefix, (magnitude >> shift) & 31, 63), 64)
    is_digit = tl.arange(0, 64) < 32
    tl.atomic_add(counts + DIGIT * 64 + tl.arange(0, 64), counted, mask=is_digit & (counted > 0))


def against_probabilities(
    logits: Float[Tensor, "row vocabulary"], probabilities: Float[Tensor, "row vocabulary"]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"], Int[Tensor, " row"]]:
    """Compare next-token logits with another model's probabilities p: log Σ exp(logits - max), Σ p·log q, the argmax.

    Each is read once, in whatever precision it is; what is computed from them is in float32.
    """
    logits, probabilities = logits.contiguous(), probabilities.contiguous()
    n_rows, n_vocabulary = logits.shape
    log_total, cross = (torch.empty(n_rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    likeliest = torch.empty(n_rows, dtype=torch.int64, device=logits.device)
    with torch.cuda.device_of(logits):  # else Triton takes the current one
        _against_row[(n_rows,)](
            logits,
            probabilities,
            log_total,
            cross,
            likeliest,
            logits.stride(0),
            probabilities.stride(0),
            N=n_vocabulary,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return log_total, cross, likeliest


@triton.jit
def _against_row(  # type: ignore[no-untyped-def]
    logits,
    probabilities,
    log_total,
    cross,
    likeliest,
    logits_stride,
    probabilities_stride,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = -3.0e38
    largest_at = 0
    total = 0.0  # of exp(x - largest)
    mass = 0.0  # of p
    product = 0.0  # of p (x - largest), small whatever the size of the logits
    for start in range(0, N, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        within = offsets < N
        x = tl.load(logits + row * logits_stride + offsets, mask=within, other=float("-inf")).to(tl.float32)
        p = tl.load(probabilities + row * probabilities_stride + offsets, mask=within, other=0.0)
        here, here_at = tl.max(x, 0, return_indices=True)
        largest_at = tl.where(here > largest, start + here_at, largest_at)
        before = largest
        largest = tl.maximum(largest, here)
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), 0)
        product += tl.where(mass > 0, mass * (before - largest), 0.0) + tl.sum(
            tl.where(p > 0, p * (x - largest), 0.0), 0
        )
        mass += tl.sum(p, 0)
    tl.store(log_total + row, tl.log(total))
    tl.store(cross + row, product - mass * tl.log(total))
    tl.store(likeliest + row, largest_at)
