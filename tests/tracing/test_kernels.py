"""The kernels for GPUs, in Triton's interpreter where there is none."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import melens
from melens.analysis.metrics import abs_median
from melens.tracing.attention import attention_pattern

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels():
    # Read past the hook that checks shapes, whose wrappers Triton cannot compile.
    spec = importlib.util.spec_from_file_location("kernels", Path(melens.__file__).with_name("tracing") / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_medians_are_exact(kernels, dtype):
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn(97, 96, generator=generator) * 3
    ordinary[0, 5] = 20_000
    one_dim_alone = torch.zeros(97, 96)  # half of the others are 0: a guess may be far off
    one_dim_alone[:, ::2] = 7 + torch.rand(97, 48, generator=generator)
    tiny = torch.tensor([[3.0, -1.0], [-2.0, 5.0]])
    batches = [
        (torch.stack([ordinary, one_dim_alone, ordinary]), [97, 97, 50]),
        (tiny[None], [2]),
        (torch.zeros(1, 3, 8), [3]),
    ]
    for batch, lengths in batches:
        hidden = batch.to(DEVICE, dtype)
        found = kernels.abs_medians(hidden, torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
        assert found.float().tolist() == [abs_median(own[:n]).item() for own, n in zip(hidden, lengths, strict=True)]


def test_a_median_far_from_the_guess_is_exact_too(kernels):
    hidden = torch.rand(128, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    hidden.flatten()[:: hidden.numel() // kernels._SAMPLED | 1] = 1_000  # all that the guess sees
    n_tokens = torch.tensor([len(hidden)], dtype=torch.int32, device=DEVICE)
    assert kernels.abs_medians(hidden[None], n_tokens).item() == abs_median(hidden).item() < 1


@pytest.mark.parametrize("n", [5, 4096, 9000])
def test_the_largest_tokens_are_those_of_a_sort(kernels, n):
    sizes = torch.rand(2, n, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sizes[1, 3:] = -1  # padding
    found = kernels.largest_tokens(sizes, 4).tolist()
    order = sizes.sort(dim=-1, descending=True).indices
    assert found[0] == order[0, :4].tolist()
    assert found[1] == [*order[1, :3].tolist(), -1]


def test_the_largest_dims_are_those_of_a_sort_and_missing_where_a_token_is(kernels):
    hidden = torch.randn(2, 6, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    positions = torch.tensor([[5, 0], [2, -1]], dtype=torch.int32, device=DEVICE)
    values, dims = kernels.largest_dims(hidden, positions, 3)
    for row, rank, at in ((0, 0, 5), (0, 1, 0), (1, 0, 2)):
        expected = hidden[row, at].float().abs().sort(descending=True, stable=True).indices[:3]
        assert dims[row, rank].tolist() == expected.tolist()
        assert torch.equal(values[row, rank], hidden[row, at, expected].float())
    assert dims[1, 1].tolist() == [-1] * 3
    assert values[1, 1].isnan().all()


def test_nan_in_a_hidden_state_leaves_positions_within_it(kernels):
    sizes = torch.full((1, 9), float("nan")).to(DEVICE)
    assert all(-1 <= at < 9 for at in kernels.largest_tokens(sizes, 4)[0].tolist())


@pytest.mark.parametrize("window", [None, 4, 66])
def test_attention_on_keys_and_by_key_is_that_of_the_pattern(kernels, window):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 70, heads, 24, generator=generator).to(DEVICE).transpose(1, 2) for heads in (4, 2))
    pattern = attention_pattern(query, key, scale=0.3, window=window)
    scores = (query @ key.repeat_interleave(2, dim=1).mT) * 0.3
    distance = torch.arange(70)[:, None] - torch.arange(70)
    sees = ((distance >= 0) & (distance < (window or 70))).to(DEVICE)
    logsumexp = scores.masked_fill(~sees, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(kernels.on_keys(query, key, logsumexp, [7, 0], 0.3, window), pattern[..., [7, 0]])
    n_tokens = torch.tensor([70, 9], dtype=torch.int32, device=DEVICE)
    found = kernels.by_key(query, key, logsumexp, n_tokens, 0.3, window)
    for row, n in enumerate(n_tokens):
        torch.testing.assert_close(found[row, ..., 0], pattern[row, :, :n].sum(1))
        assert torch.equal(found[row, 3, :, 1], sees[:n].sum(0).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_predictions_are_compared_as_by_their_softmax(kernels, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, 9001, generator=generator) * 4).to(DEVICE, dtype)
    logits[:, 8500] = 30.5
    logits[2, 40] = logits[3, 8501] = 30.5  # of equals the first
    logits[1, 100:200] = float("-inf")  # of a vocabulary cut short
    unmasked = torch.randn(5, 9001, generator=generator).to(DEVICE).softmax(-1)
    unmasked[1, 100:200] = 0
    logits[4, :8000] = float("-inf")
    unmasked[4, :8000] = 0
    log_total, cross, likeliest = kernels.against_probabilities(logits, unmasked)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(log_total, -exact.max(-1).values.float())
    torch.testing.assert_close(
        cross, torch.where(unmasked > 0, unmasked * exact, 0).sum(-1).float(), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(likeliest, logits.argmax(-1))


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from melens.tracing import kernels
block, window, sizes = {"BLOCK": 4096}, {"BLOCK": 4096, "WINDOW": 32}, dict.fromkeys(("WINDOW", "BLOCK"), "constexpr")
median = {"bits": "*i16", "n_tokens": "*i32", "spaces": "*i32", "n_pos": "i32", "d": "i32"} | sizes
tokens = {"sizes": "*bf16", "positions": "*i32", "found": "*fp32", "at": "*i32", "n": "i32", "stride": "i32"}
tokens |= dict.fromkeys(("K", "BLOCK", "IS_FIRST"), "constexpr")
dims = {"hidden": "*bf16", "positions": "*i32", "values": "*fp32", "dims": "*i32", "stride": "i32", "d": "i32"}
dims |= dict.fromkeys(("K", "BLOCK"), "constexpr")
on_key = {name: "i32" for name in kernels._on_key.arg_names} | {"query": "*bf16", "key": "*bf16", "logsumexp": "*fp32"}
on_key |= {"attention": "*fp32", "scale": "fp32"} | dict.fromkeys(("BLOCK", "WIDTH"), "constexpr")
row = {name: "*fp32" for name in ("logits", "probabilities", "log_total", "cross")} | {"likeliest": "*i64"}
row |= {"logits_stride": "i32", "probabilities_stride": "i32", "N": "constexpr", "BLOCK": "constexpr"}
for kernel, signature, constants in (
    (kernels._guess_window, median, window),
    (kernels._count_window, median, window),
    (kernels._count_window, median, window | {"WINDOW": 256}),
    (kernels._settle_median, median, window),
    (kernels._largest_of_block, tokens, block | {"K": 8, "IS_FIRST": True}),
    (kernels._largest_of_block, tokens | {"sizes": "*fp32"}, block | {"K": 8, "IS_FIRST": False}),
    (kernels._largest_of_token, dims, block | {"K": 8}),
    (kernels._on_key, on_key, {"BLOCK": 64, "WIDTH": 128}),
    (kernels._against_row, row, block | {"N": 49152}),
    (kernels._against_row, row | {"logits": "*bf16"}, block | {"N": 151936}),
):
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """What the interpreter runs may be no Triton: the compiler needs no GPU."""
    told = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    told["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=told, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
