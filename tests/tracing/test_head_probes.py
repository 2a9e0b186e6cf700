"""What heads write and which values they read, against transformers' own modules; and heads set to zero."""

import pytest
import torch
from planted import FAMILIES, LATENT, bridge, gains_apart, other_model, plain_model

import melens
from melens import MelensError
from melens.tracing.heads import zero_heads
from melens.tracing.text_runs import TextRuns

TOKENS = torch.tensor([5, 6, 7, 8, 9, 11, 12])


@torch.no_grad()
def passing(network, modules, entering):
    """What enters, or leaves, some modules of a transformers model in a plain forward pass, `[pos, d]` each."""
    seen = {}
    for number, module in enumerate(modules):

        def see(module, args, output, number=number):
            seen[number] = (args[0] if entering else output)[0]

        module.register_forward_hook(see)
    network(TOKENS[None], use_cache=False)
    return seen


def by_head(table, layer, column):
    return torch.tensor(table[table["layer"] == layer][column].to_numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_values_are_those_of_the_plain_modules(family):
    network = gains_apart(plain_model(family))
    found = melens.trace(
        bridge(network), [TOKENS, TOKENS[:4]], [melens.ValueNorms(), melens.HeadOutputs(bridge(network))]
    )
    attention = [layer.self_attn for layer in network.base_model.layers]
    z = passing(network, [each.o_proj for each in attention], entering=True)
    first = {name: found[name][found[name]["prompt"] == 0] for name in ("head_outputs", "value_norms")}
    for layer, each in enumerate(attention):
        weight = each.o_proj.weight.detach()
        written = torch.stack([(z[layer][:, own] @ weight[:, own].T).norm(dim=1) for own in torch.arange(64).split(16)])
        torch.testing.assert_close(by_head(first["head_outputs"], layer, "output_norm"), written[:, 0])
        others = by_head(first["head_outputs"], layer, "output_norm_others")
        torch.testing.assert_close(others, written[:, 1:].mean(1), rtol=1e-4, atol=1e-6)
    if not hasattr(attention[0], "v_proj"):
        return  # phi3's are joint; that its parts are split rightly is tested with the sites
    values = passing(network, [each.v_proj for each in attention], entering=False)
    for layer in range(len(attention)):
        norms = values[layer].unflatten(1, (2, 16)).norm(dim=2)
        torch.testing.assert_close(by_head(first["value_norms"], layer, "value_norm"), norms[0], rtol=1e-4, atol=1e-6)
        others = by_head(first["value_norms"], layer, "value_norm_others")
        torch.testing.assert_close(others, norms[1:].mean(0), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_bias_of_the_projection_belongs_to_no_head():
    model = other_model("gpt2")  # whose Conv1D holds its weight the other way round
    projection = model.original_model.transformer.h[1].attn.c_proj
    before = melens.trace(model, [TOKENS], melens.HeadOutputs(model))["head_outputs"]
    projection.bias += 100
    after = melens.trace(model, [TOKENS], melens.HeadOutputs(model))["head_outputs"]
    z = passing(model.original_model, [projection], entering=True)[0]
    written = [(z[0, own] @ projection.weight[own]).norm() for own in torch.arange(64).split(16)]
    torch.testing.assert_close(by_head(before, 1, "output_norm"), torch.stack(written), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(by_head(after, 1, "output_norm"), by_head(before, 1, "output_norm"))
    assert not torch.allclose(by_head(after, 2, "output_norm"), by_head(before, 2, "output_norm"))  # which reads it


@torch.no_grad()
def test_heads_of_latent_attention_are_as_wide_as_their_values():
    model = melens.load_model("random", model_type="deepseek_v3", config=LATENT)
    found = melens.trace(model, [TOKENS], melens.HeadOutputs(model))["head_outputs"]
    assert found.groupby("layer")["head"].nunique().tolist() == [4, 4, 4]
    projection = model.original_model.model.layers[1].self_attn.o_proj.original_component
    z = []
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z_, hook: z.append(z_.flatten(2)[0]))]):
        model(TOKENS[None])
    written = [(z[0][0, own] @ projection.weight[:, own].T).norm() for own in torch.arange(64).split(16)]
    torch.testing.assert_close(by_head(found, 1, "output_norm"), torch.stack(written), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_head_set_to_zero_is_one_whose_part_of_the_projection_is_zero(family):
    network = gains_apart(plain_model(family))
    model = bridge(network)
    layers = network.base_model.layers
    layers[1].self_attn.o_proj.weight[:, :16] = 0
    layers[2].self_attn.o_proj.weight[:, 32:] = 0
    expected = network(TOKENS[None], use_cache=False).logits[0]
    hooks = zero_heads(model, [(2, 3), (1, 0), (2, 2)])
    with model.hooks(fwd_hooks=hooks):
        torch.testing.assert_close(model(TOKENS[None])[0], expected, rtol=1e-4, atol=1e-4)
    runs = TextRuns(model, [TOKENS], [0])
    loss = torch.nn.functional.cross_entropy(expected[:-1], TOKENS[1:])
    torch.testing.assert_close(runs.run(hooks).loss, loss[None], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(runs.intact.loss, loss[None], rtol=1e-3)


def test_what_cannot_be_read_or_zeroed_is_told():
    model = bridge(plain_model("llama"))
    for head in ((1, 4), (1, -1), (9, 0)):
        with pytest.raises(MelensError, match=f"Block {head[0]} has no head {head[1]} that TransformerLens names"):
            zero_heads(model, [head])
    with pytest.raises(MelensError, match="names no linear output projection of attention in any block"):
        melens.HeadOutputs(other_model("jetmoe"))  # an expert each
