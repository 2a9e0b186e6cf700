"""Rounded linear layers give what a model gives whose layers round by themselves, and are as they were afterwards."""

import copy

import pytest
import torch
from planted import FAMILIES, OTHERS, VOCABULARY, bridge, gains_apart, other_model, plain_model
from scipy.stats import kurtosis
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from melens import MelensError, WeMask
from melens.analysis.metrics import excess_kurtosis, rounded
from melens.tracing.rounding import MarkedTexts, RoundedRuns, Rounding
from melens.tracing.twin import Twin

ROUNDINGS = [
    Rounding(8, "tensor"),
    Rounding(4, "token"),
    Rounding(6, "static", exempt=True),
    Rounding(6, "tensor", exempt=True),
    Rounding(4, weights="channel"),
    Rounding(6, "token", "tensor"),
]


def marked(n=3, length=12, seed=0):
    """Texts of which token 0 is exempt."""
    tokens = torch.randint(10, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))
    exempt = torch.zeros_like(tokens, dtype=torch.bool)
    exempt[:, 0] = True
    counted = ~exempt
    counted[:, -1] = False
    return MarkedTexts(tokens, exempt, counted)


def quantized_by_pytorch(values, largest, bits):
    """Round by PyTorch's own fake quantisation, an output or token at a time where `largest` has several."""
    steps = 2 ** (bits - 1) - 1
    if largest.numel() == 1:
        return torch.fake_quantize_per_tensor_affine(values, float(largest) / steps, 0, -steps, steps)
    rows, scales = values.reshape(largest.numel(), -1), largest.flatten() / steps
    zeros = torch.zeros(len(rows), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(rows, scales, zeros, 0, -steps, steps).reshape(values.shape)


class RoundingLayer(torch.nn.Module):
    """A linear layer that rounds what enters it, and its weight: how one would write it without hooks."""

    def __init__(self, layer, rounding, largest):
        super().__init__()
        self.rounding, self.largest = rounding, largest
        is_transposed = isinstance(layer, Conv1D)
        self.weight, self.bias = layer.weight.data.T if is_transposed else layer.weight.data, layer.bias
        if rounding.weights is not None:
            over = self.weight.abs()
            most = over.amax() if rounding.weights == "tensor" else over.amax(1)
            self.weight = quantized_by_pytorch(self.weight, most, rounding.bits)

    def forward(self, entering):
        own = entering[0]  # a text at a time
        changed = own
        if (kind := self.rounding.activations) is not None:
            sizes = (own[1:] if self.rounding.exempt else own).abs()
            largest = {"tensor": sizes.amax(), "token": own.abs().amax(1), "static": self.largest}[kind]
            changed = quantized_by_pytorch(own, largest, self.rounding.bits)
            if self.rounding.exempt:
                changed = torch.cat([own[:1], changed[1:]])
        return torch.nn.functional.linear(changed, self.weight, self.bias)[None]


@torch.no_grad()
def losses_by_layers_of_their_own(network, texts, rounding, scales):
    network = copy.deepcopy(network)
    blocks = network.base_model.layers if hasattr(network.base_model, "layers") else network.base_model.h
    for number, block in enumerate(blocks):
        for name, layer in [*block.named_modules()]:
            if isinstance(layer, torch.nn.Linear | Conv1D):
                largest = scales.of_others[f"{number}.{name}"]
                block.set_submodule(name, RoundingLayer(layer, rounding, largest))
    losses = []
    for ids in texts.tokens:
        logits = network(ids[None], use_cache=False).logits[0, 1:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[2:]))
    return torch.stack(losses)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_a_rounded_model_is_one_whose_layers_round(family):
    if family == "gpt2":
        model = other_model("gpt2")
        network = Twin.of(model).network
    else:
        network = gains_apart(plain_model(family))
        model = bridge(network)
    texts, prompts, runs = marked(), marked(2, 9, seed=1), RoundedRuns(model, texts_per_batch=2)
    scales = runs.scales([*zip(prompts.tokens, prompts.exempt, strict=True)])
    whole = runs.loss(texts)
    for rounding in ROUNDINGS if family == "llama" else ROUNDINGS[::2]:
        expected = losses_by_layers_of_their_own(network, texts, rounding, scales)
        found = runs.loss(texts, rounding, scales)
        effect = (expected - whole).abs().max()
        assert effect > 1e-4, rounding
        assert (found - expected).abs().max() < 0.1 * effect, rounding  # halves may fall either way
    assert torch.equal(runs.loss(texts), whole)


def test_an_exempt_token_is_one_in_the_cache():
    network = gains_apart(plain_model("llama"))
    model, texts, rounding = bridge(network), marked(), Rounding(4, "tensor")
    found = RoundedRuns(model).loss(texts, Rounding(4, "tensor", exempt=True))
    behind = copy.deepcopy(network)
    for block in behind.model.layers:
        for name, layer in [*block.named_modules()]:
            if isinstance(layer, torch.nn.Linear):
                block.set_submodule(name, RoundingLayer(layer, rounding, None))
    with torch.no_grad():
        for ids, loss in zip(texts.tokens, found, strict=True):
            cache = DynamicCache()
            network(ids[None, :1], past_key_values=cache)
            logits = behind(ids[None, 1:], past_key_values=cache).logits[0, :-1]
            assert float(torch.nn.functional.cross_entropy(logits, ids[2:])) == pytest.approx(float(loss), abs=1e-3)


def test_everything_comes_off_again_after_a_mistake_too():
    model = bridge(plain_model("llama"))
    runs, texts = RoundedRuns(model), marked()
    twin = Twin.of(model)
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in model.original_model.named_parameters()}
    runs.loss(texts, Rounding(4, "tensor", "channel"))
    layer = model.blocks[1].mlp.out.original_component
    kept = layer.weight.data.clone()
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(MelensError, match="The loss of text 0 is NaN"):
        runs.loss(texts, Rounding(4, "tensor", "channel"))
    layer.weight.data.copy_(kept)
    after = dict(model.original_model.named_parameters())
    assert all(after[name].data_ptr() == at and torch.equal(after[name], own) for name, (at, own) in before.items())
    assert not any(module._forward_pre_hooks for module in twin.network.modules())
    assert Twin.of(model) is twin


def test_a_mask_acts_before_what_it_masks_is_rounded():
    model = bridge(gains_apart(plain_model("llama")))
    runs, texts, everything = RoundedRuns(model), marked(), WeMask(rate=1, start=0)
    with everything.applied(model):
        table = runs.inputs(texts)
        masked = runs.loss(texts)
    assert (masked != runs.loss(texts)).all()
    read = table[table["input"] == "q_proj, k_proj, v_proj"]
    plain = runs.inputs(texts)
    assert len(read) == len(plain) / 4 == 3 * len(model.blocks)
    others = plain[plain["input"] == "q_proj, k_proj, v_proj"]["largest_others"].to_numpy()
    assert read[read["layer"] == 0]["largest_others"].to_numpy() == pytest.approx(others[:3])


def test_inputs_are_measured_with_and_without_exempt_tokens():
    model, texts = bridge(plain_model("llama")), marked(2)
    seen = []
    layer = Twin.of(model).network.model.layers[2].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    table = RoundedRuns(model).inputs(texts)
    handle.remove()
    own = table[(table["layer"] == 2) & (table["input"] == "down_proj")]
    for row, values in zip(own.to_dict("records"), seen[-1].double(), strict=True):
        for end, some in (("", values), ("_others", values[1:])):
            assert row[f"kurtosis{end}"] == pytest.approx(kurtosis(some.flatten().numpy()))
            assert row[f"largest{end}"] == pytest.approx(float(some.abs().max()))


def test_static_scales_are_the_largest_of_the_prompts():
    model, prompts = bridge(plain_model("llama")), marked(2)
    runs = RoundedRuns(model)
    table = runs.inputs(prompts)
    scales = runs.scales([*zip(prompts.tokens, prompts.exempt, strict=True)])
    of_block = table[(table["layer"] == 1) & (table["input"] == "o_proj")]
    assert float(scales.of_all["1.self_attn.o_proj"]) == pytest.approx(of_block["largest"].max())
    assert float(scales.of_others["1.self_attn.o_proj"]) == pytest.approx(of_block["largest_others"].max())


def test_layers_that_take_tokens_in_a_row_are_rounded_by_text():
    """OPT's FFN works on `[text · pos, d]`: with one scale a text, a text's loss does not depend on the others."""
    model, texts = other_model("opt"), marked(2)
    together = RoundedRuns(model).loss(texts, Rounding(4, "tensor"))
    alone = RoundedRuns(model, texts_per_batch=1).loss(texts, Rounding(4, "tensor"))
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in OTHERS if name.split()[0] in ("qwen2_moe", "gpt_oss", "jetmoe")])
def test_a_mixture_of_experts_is_refused(name):
    with pytest.raises(MelensError, match=r"experts of a mixture in one matrix|as an expert of a mixture does"):
        RoundedRuns(other_model(name)).loss(marked(2), Rounding(8, "tensor"))


def test_the_weights_tell_whether_they_were_of_4_bits():
    model = bridge(plain_model("llama"))
    assert not RoundedRuns(model).are_of_4_bits
    for layer in Twin.of(model).network.model.layers[0].modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = rounded(layer.weight.data, layer.weight.data.abs().amax(), 4)
    assert RoundedRuns(model).are_of_4_bits


def test_the_formulas_by_hand():
    values = torch.tensor([-7.0, 0.49, 0.5, 1.5, 3.4, 8.0])
    assert rounded(values, torch.tensor(7.0), 4).tolist() == [-7, 0, 0, 2, 3, 7]  # halves to even; beyond, the largest
    assert rounded(torch.zeros(2), torch.tensor(0.0), 8).tolist() == [0, 0]
    assert rounded(values.bfloat16(), torch.tensor(8.0), 8).dtype == torch.bfloat16
    drawn = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    assert excess_kurtosis(drawn) == pytest.approx(kurtosis(drawn.double().flatten().numpy()))
    expected = quantized_by_pytorch(drawn, drawn.abs().amax(1), 6)
    torch.testing.assert_close(rounded(drawn, drawn.abs().amax(1, keepdim=True), 6), expected)
