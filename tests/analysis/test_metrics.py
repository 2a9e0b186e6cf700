import numpy as np
import pytest
import torch

from melens import Batch
from melens.analysis import metrics


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_median_of_a_state_with_nan_is_nan_and_of_others_is_not(dtype):
    hidden = torch.tensor([[[1.0, -2.0], [3.0, float("nan")]], [[1.0, -2.0], [3.0, float("inf")]]]).to(dtype)
    found = metrics.abs_median(hidden)
    assert found[0].isnan()
    assert found[1].item() == 2


def test_sink_mass_averages_the_later_queries_and_leaves_out_padding():
    batch = Batch(torch.zeros((2, 4), dtype=torch.long), lengths=(3, 1), prompts=(0, 1))
    attention = torch.tensor([[[1.0, 0.6, 0.2, 0.9]], [[1.0, 0.5, 0.5, 0.5]]])
    of_first, of_second = metrics.sink_mass(attention, batch.weights_after(0))
    assert of_first.tolist() == [pytest.approx(0.4)]
    assert of_second.isnan().all()


def test_the_energy_share_of_two_dims_by_hand():
    activation = torch.tensor([[3.0, 4.0, 0.0, 12.0]])
    share = metrics.energy_share(activation, torch.tensor([True, True, False, False]))
    assert share.tolist() == [pytest.approx(25 / 169)]


def test_kl_to_the_gain_by_hand():
    gain = torch.tensor([1.0, -1.0, 2.0])  # g = 1/6, 1/6, 2/3: signs do not count
    activation = torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, 2.0]])  # p = 1/2, 1/2, 0, then g itself
    spread, aligned = metrics.kl_to_gain(activation, gain).tolist()
    assert spread == pytest.approx(np.log(3))
    assert aligned == pytest.approx(0, abs=1e-6)


def test_kl_is_the_same_for_little_and_much_at_a_time(monkeypatch):
    activation, gain = torch.randn(2, 5, 8), torch.randn(8)
    whole = metrics.kl_to_gain(activation, gain)
    monkeypatch.setattr(metrics, "_CHUNK", 16)
    assert metrics.kl_to_gain(activation, gain).shape == (2, 5)
    torch.testing.assert_close(metrics.kl_to_gain(activation, gain), whole)


def test_concentration_runs_from_even_to_one_dim():
    even, one, by_hand = torch.ones(8), torch.eye(8)[2], torch.tensor([1.0, 2.0, 0, 0, 0, 0, 0, 0])
    concentrations = metrics.concentration(torch.stack([even, one, by_hand])).tolist()
    assert concentrations == [pytest.approx(1 / 8), pytest.approx(1), pytest.approx((1 / 5) ** 2 + (4 / 5) ** 2)]


def test_concentration_of_large_bf16_values_does_not_overflow():
    activation = torch.full((1, 1000), 30_000.0, dtype=torch.bfloat16)
    assert metrics.concentration(activation).item() == pytest.approx(1e-3, rel=1e-2)


def test_effective_rank_and_first_share_by_hand():
    spectra = torch.tensor([[2.0, 2.0, 2.0, 2.0], [5.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert metrics.effective_rank(spectra).tolist() == pytest.approx([4, 1, np.exp(entropy)], rel=1e-5)
    assert metrics.first_share(spectra).tolist() == pytest.approx([0.25, 1, 0.75])


def test_matrix_entropy_is_of_energies_and_runs_from_0_to_1():
    spectra = torch.tensor([[2.0, 2.0, 2.0, 2.0], [5.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]])
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))  # of 9 / 10 and 1 / 10
    assert metrics.matrix_entropy(spectra).tolist() == pytest.approx([1, 0, entropy / np.log(4)], abs=1e-6)
    assert metrics.matrix_entropy(torch.tensor([7.0])).item() == 0


def test_cosines_by_hand():
    cosines = metrics.pairwise_cosine(torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, -3.0]]))
    assert cosines[0].tolist() == pytest.approx([1, np.sqrt(0.5), 0])
    assert cosines[1, 2].item() == pytest.approx(-np.sqrt(0.5))
