"""The kernels for GPUs, in Triton's interpreter where there is none."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import melens
from melens.metrics import abs_median, median_of_counts

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels():
    # Read past the hook that checks shapes, whose wrappers Triton cannot compile.
    spec = importlib.util.spec_from_file_location("kernels", Path(melens.__file__).with_name("kernels.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counted_medians_are_exact(kernels, dtype):
    hidden = (torch.randn(2, 97, 96, generator=torch.Generator().manual_seed(0)) * 3).to(DEVICE, dtype)
    hidden[0, 5, 7] = 20_000
    of_both = [hidden[0], hidden[1, :50]]
    found = median_of_counts(kernels.count_magnitudes(of_both), dtype)
    assert found.tolist() == [abs_median(each).item() for each in of_both]


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
from melens import kernels
block = {"BLOCK": 4096}
digit = {"bits": "*i16", "n": "i32", "middle": "i32", "counts": "*i32", "DIGIT": "constexpr", "BLOCK": "constexpr"}
row = {name: "*fp32" for name in ("logits", "probabilities", "log_total", "cross")} | {"likeliest": "*i64"}
row |= {"logits_stride": "i32", "probabilities_stride": "i32", "N": "constexpr", "BLOCK": "constexpr"}
for kernel, signature, constants in (
    *((kernels._count_digit, digit, block | {"DIGIT": at}) for at in range(3)),
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
