"""Entries of an FFN's weights changed for a while: in what is computed, and gone afterwards to the bit."""

import copy

import pytest
import torch
from planted import FAMILIES, bridge, other_model, plain_model

import melens
from melens import MelensError
from melens.models import ffn_weights as room
from melens.models.ffn_weights import Scaling, experts_of, ffn_weights, has_neurons, scaled, without_expert

TOKENS = torch.tensor([[7, 8, 9, 10]])


def bits_of(model):
    return {name: weight.detach().clone() for name, weight in model.original_model.named_parameters()}


def is_untouched(model, before):
    return all(torch.equal(weight, before[name]) for name, weight in model.original_model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scaled_weight_is_in_what_is_computed_and_comes_back_to_the_bit(family):
    network = plain_model(family)
    model = bridge(network)
    before = bits_of(model)
    weights, rows = ffn_weights(model, 1), [3, 5]
    with scaled(Scaling(weights.down, (4, 21), 2.5), Scaling(weights.gate, (slice(None), rows), 0)):
        mine = copy.deepcopy(network)
        mlp = mine.base_model.layers[1].mlp
        with torch.no_grad():
            mlp.down_proj.weight[21, 4] *= 2.5
            gate = mlp.gate_up_proj.weight[:96] if family == "phi3" else mlp.gate_proj.weight
            gate[rows] = 0
            torch.testing.assert_close(model.original_model(TOKENS).logits, mine(TOKENS).logits)
            trace = melens.trace(model, [TOKENS[0]], melens.Norms(["hook_resid_post"]))
            theirs = melens.trace(bridge(mine), [TOKENS[0]], melens.Norms(["hook_resid_post"]))
        assert trace["norm"].norm.tolist() == pytest.approx(theirs["norm"].norm.tolist(), rel=1e-5)
        assert not is_untouched(model, before)
    assert is_untouched(model, before)


def test_whatever_happens_inside_and_however_often_an_entry_is_named_all_is_put_back():
    model = bridge(plain_model("llama"))
    before, down = bits_of(model), ffn_weights(model, 2).down
    entry = float(down[4, 21])
    twice = [Scaling(down, (4, 21), 3), Scaling(down, (4, slice(None)), 0.1)]

    def stop():
        assert down[4, 21] == pytest.approx(0.3 * entry)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), scaled(*twice):
        stop()
    assert is_untouched(model, before)
    with pytest.raises(IndexError), scaled(Scaling(down, (4, 21), 3), Scaling(down, (4, 9_999), 3)):
        pass
    assert is_untouched(model, before)


def test_reduced_precision_comes_back_too():
    model = bridge(plain_model("llama").to(torch.bfloat16))
    before = bits_of(model)
    with scaled(Scaling(ffn_weights(model, 0).down, (slice(None), 5), 0.3)):
        assert not is_untouched(model, before)
    assert is_untouched(model, before)


def test_gpt2s_matrices_lie_the_other_way_round():
    model = other_model("gpt2")
    weights = ffn_weights(model, 1)
    assert weights.gate is None
    own = model.original_model.transformer.h[1].mlp
    with scaled(Scaling(weights.down, (200, 21), 0)):
        weight = dict(own.named_parameters())[next(name for name, _ in own.named_parameters() if "c_proj" in name)]
        assert weight[200, 21] == 0


@pytest.mark.parametrize("name", ["qwen2_moe with a window", "gpt_oss"])
def test_an_expert_that_is_taken_out_writes_nothing(name):
    model = other_model(name)
    experts, before = experts_of(model, 1), bits_of(model)
    assert not has_neurons(model, 1)
    hidden, index = torch.randn(5, 64), torch.full((5, 1), 2)
    arguments = (hidden, index, torch.ones(5, 1))
    with torch.no_grad():
        assert type(experts).forward(experts, *arguments).abs().max() > 0
        with scaled(*without_expert(model, 1, 2)):
            assert type(experts).forward(experts, *arguments).abs().max() == 0
            assert type(experts).forward(experts, hidden, index + 1, torch.ones(5, 1)).abs().max() > 0
    assert is_untouched(model, before)


def test_what_would_change_more_or_nothing_is_refused(monkeypatch):
    shared = plain_model("llama")
    shared.base_model.layers[3].mlp.down_proj.weight = shared.base_model.layers[1].mlp.down_proj.weight
    with pytest.raises(MelensError, match="Blocks 1 and 3 share FFN weights"):
        ffn_weights(bridge(shared), 1)
    copied = bridge(plain_model("phi3"))
    up = getattr(copied.blocks[1].mlp, "in").original_component
    up.weight = torch.nn.Parameter(up.weight.detach().clone())
    with pytest.raises(MelensError, match="holds a copy of the in projection of block 1"):
        ffn_weights(copied, 1)
    with pytest.raises(MelensError, match="Block 1 of this model has no experts that are called by number"):
        without_expert(bridge(plain_model("llama")), 1, 0)
    plain = bridge(plain_model("llama"))
    with monkeypatch.context() as patch:
        patch.setattr(room, "is_whole", lambda module: False)
        with pytest.raises(MelensError, match="offloaded or sharded"):
            ffn_weights(plain, 1)
    with monkeypatch.context() as patch:
        patch.setattr(room, "is_quantized", lambda network: True)
        with pytest.raises(MelensError, match="quantised, so no entry of them can be changed"):
            ffn_weights(plain, 1)
    plain.compatibility_mode = True
    with pytest.raises(MelensError, match="were folded"):
        ffn_weights(plain, 1)
