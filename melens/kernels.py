"""The one kernel that PyTorch lacks: the exact median of |h| in two passes over the memory, without a sort.

PyTorch's own median sorts: 0.3 ms for a hidden state of 4,096 × 2,560 in bf16 on an H200, a third of what the block's
whole attention takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["count_magnitudes"]

_BLOCK = 8192


def count_magnitudes(values: Float[Tensor, " n"]) -> Int[Tensor, "2 256"]:
    """Count the magnitudes of a bf16 or fp16 tensor as far as their median needs, without waiting for the GPU.

    The magnitudes of floats are ordered like their 15 bits. The first row counts by the upper 8 of them; the second
    counts by the lower 7, among the values that share the median's upper bits. `metrics.median_of_counts` reads them.
    """
    counts = torch.zeros((2, 256), dtype=torch.int32, device=values.device)
    bits, n = values.view(torch.int16), values.numel()
    grid = (triton.cdiv(n, _BLOCK),)
    _count_bits[grid](bits, n, (n - 1) // 2, counts, LOWER=False, BLOCK=_BLOCK, num_warps=8)
    _count_bits[grid](bits, n, (n - 1) // 2, counts, LOWER=True, BLOCK=_BLOCK, num_warps=8)
    return counts


@triton.jit
def _count_bits(bits, n, middle, counts, LOWER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    magnitude = tl.load(bits + offsets, mask=offsets < n, other=0x7FFF).to(tl.int32) & 0x7FFF
    if LOWER:
        up_to = tl.cumsum(tl.load(counts + tl.arange(0, 256)), 0)
        upper = tl.sum((up_to <= middle).to(tl.int32), 0)
        bucket = tl.where((magnitude >> 7) == upper, magnitude & 0x7F, 255)
        row = counts + 256
    else:
        bucket = magnitude >> 7
        row = counts
    n_beyond = tl.maximum((tl.program_id(0) + 1) * BLOCK - n, 0)  # they fell into the last bucket
    counted = tl.histogram(bucket, 256) - tl.where(tl.arange(0, 256) == 255, n_beyond, 0)
    tl.atomic_add(row + tl.arange(0, 256), counted, mask=counted != 0)
