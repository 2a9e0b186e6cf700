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
    hiddens = [each.to(DEVICE, dtype) for each in (ordinary, one_dim_alone, tiny, torch.zeros(3, 8), ordinary[:50])]
    found = kernels.abs_medians(hiddens)
    assert found.float().tolist() == [abs_median(each).item() for each in hiddens]


def test_a_median_far_from_the_guess_is_exact_too(kernels):
    hidden = torch.rand(128, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    hidden.flatten()[:: hidden.numel() // kernels._SAMPLED | 1] = 1_000  # all that the guess sees
    assert kernels.abs_medians([hidden]).item() == abs_median(hidden).item() < 1


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
guess = {"bits": "*i16", "n_sampled": "i32", "step": "i32", "space": "*i32"} | sizes
count = {"bits": "*i16", "n": "i32", "space": "*i32"} | sizes
row = {name: "*fp32" for name in ("logits", "probabilities", "log_total", "cross")} | {"likeliest": "*i64"}
row |= {"logits_stride": "i32", "probabilities_stride": "i32", "N": "constexpr", "BLOCK": "constexpr"}
for kernel, signature, constants in (
    (kernels._guess_window, guess, window),
    (kernels._count_window, count, window),
    (kernels._count_window, count, window | {"WINDOW": 256}),
    (kernels._settle_median, count, window),
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
