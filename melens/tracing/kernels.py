"""The kernels that PyTorch lacks, for GPUs: an exact median without a sort, and predictions compared in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["abs_medians", "against_probabilities"]

_BLOCK = 4096
_SAMPLED = 4096


def abs_medians(hiddens: Sequence[Float[Tensor, "_ d"]]) -> Float[Tensor, " hidden"]:
    """Compute the median of |h| of each bf16 or fp16 tensor, exactly, without waiting for the GPU.

    The magnitudes of floats are ordered like their 15 bits. Where the median lies is guessed from every so many values;
    one pass over all of them counts those below a window around the guess, and those in it by their bits. Should the
    median be in none of the window's bins, it is selected from all values by one program, which takes long.

    PyTorch's own median takes 0.30 ms for a hidden state of 4,096 × 2,560 in bf16 on an H200, this 0.03 ms.
    """
    window = 32 if hiddens[0].dtype == torch.bfloat16 else 256  # a quarter of a binade
    spaces = torch.empty((len(hiddens), window + 4), dtype=torch.int32, device=hiddens[0].device)
    for hidden, space in zip(hiddens, spaces, strict=True):
        bits, n = hidden.flatten().view(torch.int16), hidden.numel()
        step = n // _SAMPLED | 1  # odd: else a step of the width would see one dim alone
        with torch.cuda.device_of(hidden):  # else Triton takes the current one
            _guess_window[(1,)](bits, triton.cdiv(n, step), step, space, WINDOW=window, BLOCK=_BLOCK, num_warps=8)
            _count_window[(triton.cdiv(n, _BLOCK),)](bits, n, space, WINDOW=window, BLOCK=_BLOCK)
            _settle_median[(1,)](bits, n, space, WINDOW=window, BLOCK=_BLOCK)
    return spaces[:, window + 2].short().view(hiddens[0].dtype)


# A tensor's space: how many values have each of the window's bits, how many have lower ones, the window's lowest, the
# median's.


@triton.jit(do_not_specialize=["n_sampled", "step"])
def _guess_window(bits, n_sampled, step, space, WINDOW: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    guess = _select(bits, n_sampled, step, (n_sampled - 1) // 2, BLOCK)
    tl.store(space + tl.arange(0, WINDOW), tl.zeros((WINDOW,), tl.int32))
    tl.store(space + WINDOW, 0)
    tl.store(space + WINDOW + 1, tl.maximum(guess - WINDOW // 2, 0))


@triton.jit
def _count_window(bits, n, space, WINDOW: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lowest = tl.load(space + WINDOW + 1)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    above = (tl.load(bits + offsets, mask=offsets < n, other=0x7FFF).to(tl.int32) & 0x7FFF) - lowest
    is_within = (above >= 0) & (above < WINDOW) & (offsets < n)
    counted = tl.histogram(tl.where(is_within, above, 0), WINDOW)
    counted -= tl.where(tl.arange(0, WINDOW) == 0, tl.sum((~is_within).to(tl.int32), 0), 0)
    tl.atomic_add(space + tl.arange(0, WINDOW), counted, mask=counted > 0)
    tl.atomic_add(space + WINDOW, tl.sum((above < 0).to(tl.int32), 0))


@triton.jit
def _settle_median(bits, n, space, WINDOW: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    rank = (n - 1) // 2
    n_below = tl.load(space + WINDOW)
    up_to = n_below + tl.cumsum(tl.load(space + tl.arange(0, WINDOW)), 0)
    bin_of_median = tl.sum((up_to <= rank).to(tl.int32), 0)
    found = tl.load(space + WINDOW + 1) + bin_of_median
    if (bin_of_median == WINDOW) | (n_below > rank):
        found = _select(bits, n, 1, rank, BLOCK)
    tl.store(space + WINDOW + 2, found)


@triton.jit
def _select(bits, n, step, rank, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Select the magnitude of a rank among `n` values, each `step` apart, by three digits of 5 bits."""
    prefix = 0
    for digit in tl.static_range(3):
        shift = 10 - 5 * digit
        counted = tl.zeros((64,), tl.int32)
        start = 0
        while start < n:
            places = start + tl.arange(0, BLOCK)
            magnitude = tl.load(bits + places * step, mask=places < n, other=0).to(tl.int32) & 0x7FFF
            shares_prefix = (places < n) & ((magnitude >> (shift + 5)) == prefix)
            counted += tl.histogram(tl.where(shares_prefix, (magnitude >> shift) & 31, 63), 64)
            start += BLOCK
        # The digit is the first whose running count exceeds the rank; ranks go on from there.
        is_below = (tl.cumsum(counted, 0) <= rank) & (tl.arange(0, 64) < 32)
        prefix = prefix * 32 + tl.sum(is_below.to(tl.int32), 0)
        rank -= tl.sum(tl.where(is_below, counted, 0), 0)
    return prefix


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
        given = logits, probabilities, log_total, cross, likeliest, logits.stride(0), probabilities.stride(0)
        _against_row[(n_rows,)](*given, N=n_vocabulary, BLOCK=_BLOCK, num_warps=8)
    return log_total, cross, likeliest


@triton.jit
def _against_row(  # type: ignore[no-untyped-def]
    logits, probabilities, log_total, cross, likeliest, logits_stride, probabilities_stride,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
