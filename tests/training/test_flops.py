"""The arithmetic of a training step, counted by hand and as PyTorch counts it."""

import pytest
import torch
from planted import plain_model
from torch.utils.flop_counter import FlopCounterMode

import melens
from melens.models.twins import plain_twin
from melens.training import flops
from melens.training.flops import flops_per_token, peak_flops


def tiny(**config):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64}
    return plain_twin(melens.load_model("tiny", config=sizes | config))


def test_the_operations_of_a_token_by_hand():
    of_block = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96  # queries, keys and values, output, FFN
    norms = (2 * 3 + 1) * 64
    attention = 12 * 16 * (4 * 16) * 3
    assert flops_per_token(tiny(), 16) == 6 * (3 * of_block + norms + 300 * 64) + attention
    tied = tiny(tie_word_embeddings=True)
    assert flops_per_token(tied, 16) == flops_per_token(tiny(), 16)  # one matrix, multiplied once


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_the_operations_are_those_that_are_counted(family):
    model = plain_model(family)
    model.set_attn_implementation("eager")
    ids = torch.arange(48).view(2, 24)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert flops_per_token(model, 24) * ids.numel() == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GTX 970", None),
    ],
)
def test_the_peak_is_told_of_gpus_that_are_known(monkeypatch, name, peak):
    monkeypatch.setattr(flops.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda: name)
    assert peak_flops() == peak
