import pytest
import torch
from planted import FAMILIES, bridge, gains_apart, plain_model
from transformers import AutoConfig, AutoModelForCausalLM

import melens
from melens import MelensError
from melens.models.normalization import has_normalization


def raw_norm(network, layer, name):
    return getattr(network.base_model.layers[layer], name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gain_is_the_factor_that_takes_effect(family):
    network = gains_apart(plain_model(family))
    model = bridge(network)
    before_ffn = "pre_feedforward_layernorm" if family == "gemma3" else "post_attention_layernorm"
    for site, name in (("ln1", "input_layernorm"), ("ln2", before_ffn)):
        normalization = melens.read_normalization(model, 2, site)
        weight = raw_norm(network, 2, name).weight
        assert (normalization.name, normalization.kind) == (name, "RMSNorm")
        torch.testing.assert_close(normalization.gain, (weight + 1 if family == "gemma3" else weight).detach())
        assert not normalization.bias.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_of_an_rmsnorm_without_a_part(family):
    network = gains_apart(plain_model(family))
    normalization = melens.read_normalization(bridge(network), 1, "ln2")
    h = 3 * torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = raw_norm(network, 1, normalization.name)(h)
    rms = h.pow(2).mean(-1, keepdim=True).sqrt()
    assert normalization.without("all", h, output) is h
    torch.testing.assert_close(normalization.without("gain", h, output), h / rms, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalization.without("norm", h, output), normalization.gain * h)


def test_a_gain_of_zero_does_not_hide_the_scale():
    network = plain_model("llama")
    raw_norm(network, 0, "post_attention_layernorm").weight.data[:60] = 0
    normalization = melens.read_normalization(bridge(network), 0, "ln2")
    h = torch.randn(1, 3, 64)
    with torch.no_grad():
        output = raw_norm(network, 0, "post_attention_layernorm")(h)
    expected = h / h.pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(normalization.without("gain", h, output), expected, rtol=1e-4, atol=1e-4)


def test_a_layernorm_is_told_from_an_rmsnorm():
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=100)
    network = AutoModelForCausalLM.from_config(config).eval()
    norm = network.transformer.h[1].ln_2
    norm.weight.data, norm.bias.data = torch.rand(64), torch.randn(64)
    normalization = melens.read_normalization(bridge(network), 1, "ln2")
    assert (normalization.name, normalization.kind) == ("ln_2", "LayerNorm")
    torch.testing.assert_close(normalization.gain, norm.weight.detach())
    torch.testing.assert_close(normalization.bias, norm.bias.detach())
    h = torch.randn(2, 64) + 5
    with torch.no_grad():
        without_gain = normalization.without("gain", h, norm(h))
    expected = torch.nn.functional.layer_norm(h, (64,))
    torch.testing.assert_close(without_gain, expected, rtol=1e-4, atol=1e-4)


def test_a_block_without_one_is_told():
    model = melens.load_model("random", model_type="phi", config={"hidden_size": 32, "num_hidden_layers": 1})
    assert has_normalization(model, 0, "ln1")
    assert not has_normalization(model, 0, "ln2")
    with pytest.raises(MelensError, match="no normalisation 'ln2'"):
        melens.read_normalization(model, 0, "ln2")


def test_reading_in_bf16_is_exact():
    network = gains_apart(plain_model("gemma3")).bfloat16()
    model = bridge(network)
    weight = raw_norm(network, 0, "pre_feedforward_layernorm").weight.detach().float()
    torch.testing.assert_close(melens.read_normalization(model, 0, "ln2").gain, 1 + weight)
    assert next(model.original_model.parameters()).dtype == torch.bfloat16
