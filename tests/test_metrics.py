import numpy as np
import pytest
import torch

from melens import Batch, metrics


def test_l2_norm_of_bf16_accumulates_in_float32():
    activation = torch.full((1, 4096), 3.0, dtype=torch.bfloat16)
    assert metrics.l2_norm(activation).item() == pytest.approx(3 * 64)
    assert metrics.l2_norm(torch.tensor([[3.0, -4.0]])).tolist() == [5.0]


def test_abs_max_sees_negative_values():
    assert metrics.abs_max(torch.tensor([[1.0, -7.0, 3.0], [0.5, 0.25, -0.125]])).tolist() == [7.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5), (40, 33)])
def test_abs_median_is_exact(dtype, shape):
    activation = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert metrics.abs_median(activation).item() == activation.abs().median().item()


def test_abs_median_by_hand():
    assert metrics.abs_median(torch.tensor([[-5.0, 1.0], [2.0, -3.0]])).item() == 2  # the lower of 2 and 3
    assert metrics.abs_median(torch.tensor([[0.0, -0.0, 0.0, 9.0]])).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 7, 5001])
def test_median_of_counts_reads_what_the_kernel_counts(dtype, n):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    magnitudes = (values.view(torch.int16) & 0x7FFF).long()
    median = int(magnitudes.sort().values[(n - 1) // 2])
    counts = torch.zeros((2, 3, 64), dtype=torch.int32)
    for digit, shift in enumerate((10, 5, 0)):
        shares_prefix = (magnitudes >> (shift + 5)) == (median >> (shift + 5))
        counts[:, digit] = torch.bincount((magnitudes[shares_prefix] >> shift) & 31, minlength=64)
    expected = values.abs().median().item()
    assert metrics.median_of_counts(counts, dtype).tolist() == [expected, expected]


def test_sink_mass_averages_the_later_queries_and_leaves_out_padding():
    batch = Batch(torch.zeros((2, 4), dtype=torch.long), lengths=(3, 1), prompts=(0, 1))
    attention = torch.tensor([[[1.0, 0.6, 0.2, 0.9]], [[1.0, 0.5, 0.5, 0.5]]])
    of_first, of_second = metrics.sink_mass(attention, batch.weights_after(0))
    assert of_first.tolist() == [pytest.approx(0.4)]
    assert of_second.isnan().all()


def test_bootstrap_interval_holds_the_mean_and_is_repeatable():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    low, high = statistics.bootstrap_mean(values)
    assert 1 < low < 2.5 < high < 4
    assert statistics.bootstrap_mean(values) == (low, high)
    assert all(np.isnan(statistics.bootstrap_mean(values[:1])))
