"""Runs of whole texts against plain PyTorch: forward hooks on a transformers model, one text at a time."""

from functools import partial

import pytest
import torch
from planted import N_LAYERS, VOCABULARY, bridge, gains_apart, plain_model

from melens import MelensError
from melens.tracing.text_runs import TextRuns

LENGTHS, POSITIONS = (9, 6, 9), [0, 2, 1]
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = [torch.randint(1, VOCABULARY, (length,), generator=GENERATOR) for length in LENGTHS]
LAYER = 1
VALUES = torch.randn(3, 64, generator=GENERATOR)


def keep(states, module, args, output):
    states.append(output[0] if isinstance(output, tuple) else output)


@torch.no_grad()
def plain_run(network, change=None):
    """Loss, sink mass by block and states by block of each text; `change(text, output)` is what the FFN writes."""
    found = []
    for text, (ids, at) in enumerate(zip(TOKENS, POSITIONS, strict=True)):
        block = network.base_model.layers[LAYER]
        writer = getattr(block, "post_feedforward_layernorm", block.mlp)
        states, handles = [], []
        if change is not None:
            handles.append(writer.register_forward_hook(lambda module, args, output, text=text: change(text, output)))
        for layer in network.base_model.layers:
            handles.append(layer.register_forward_hook(partial(keep, states)))
        output = network(ids[None], labels=ids[None], output_attentions=True)
        for handle in handles:
            handle.remove()
        masses = torch.stack([attention[0, :, at + 1 :, at].mean() for attention in output.attentions])
        found.append((output.loss, masses, torch.stack([state[0, at] for state in states])))
    return [torch.stack(values) for values in zip(*found, strict=True)]


def agree(effects, expected):
    for own, plain in zip((effects.loss, effects.sink_mass, effects.states), expected, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(effects.norms, expected[2].norm(dim=-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # gemma3 normalises what the FFN writes
def test_a_run_equals_plain_pytorch(family):
    network = gains_apart(plain_model(family))
    runs = TextRuns(bridge(network), TOKENS, POSITIONS, starts=[LAYER])
    intact = plain_run(network)
    agree(runs.intact, intact)

    def zero(text, output):
        return torch.where(torch.arange(LENGTHS[text])[None, :, None] == POSITIONS[text], 0, output)

    def others_zero(text, output):
        return torch.where(torch.arange(LENGTHS[text])[None, :, None] == POSITIONS[text], output, 0)

    name = f"blocks.{LAYER}.hook_mlp_out"
    removed = plain_run(network, zero)
    assert not torch.allclose(removed[1][:, LAYER + 1 :], intact[1][:, LAYER + 1 :], rtol=1e-3)
    agree(runs.run([runs.put(name, runs.massive, 0)]), removed)
    agree(runs.run([runs.put(name, runs.massive, 0)], LAYER), removed)
    agree(runs.run([runs.put(name, runs.is_token & ~runs.massive, 0)]), plain_run(network, others_zero))
    agree(runs.run([]), intact)  # the model is as it was


def test_every_text_gets_its_own_values_whatever_shares_its_pass():
    network = gains_apart(plain_model("llama"))
    model = bridge(network)
    runs, alone = TextRuns(model, TOKENS, POSITIONS), TextRuns(model, TOKENS, POSITIONS, max_batch_tokens=1)
    assert len(alone._groups) == 3 > len(runs._groups)
    name, dim = f"blocks.{LAYER}.hook_resid_post", 4
    entry = torch.zeros(3, 9, 64, dtype=torch.bool)
    for text, at in enumerate(POSITIONS):
        entry[text, at, dim] = True
    before = runs.intact
    for each in (runs, alone):
        put, added = each.run([each.put(name, entry, VALUES)]), each.run([each.add(name, each.massive, VALUES)])
        torch.testing.assert_close(put.states[:, LAYER, dim], VALUES[:, dim])
        rest = [other for other in range(64) if other != dim]
        torch.testing.assert_close(put.states[:, LAYER, rest], before.states[:, LAYER, rest])
        torch.testing.assert_close(added.states[:, LAYER], before.states[:, LAYER] + VALUES)
        torch.testing.assert_close(added.states[:, :LAYER], before.states[:, :LAYER])
    assert before.states.shape == (3, N_LAYERS, 64)


def test_a_text_needs_a_token_behind_its_massive_one():
    with pytest.raises(MelensError, match="No token follows position 5 of text 1, of 6 tokens"):
        TextRuns(bridge(plain_model("llama")), TOKENS, [0, 5, 0])


def test_a_loss_that_is_no_number_names_the_text():
    network = plain_model("llama")
    network.lm_head.weight.data[5] = float("nan")
    with pytest.raises(MelensError, match="The loss of text 0 is NaN or infinite"):
        TextRuns(bridge(network), TOKENS, POSITIONS)


def test_a_run_computes_only_the_blocks_from_its_start_on():
    network = gains_apart(plain_model("llama"))
    model, ran = bridge(network), []
    runs = TextRuns(model, TOKENS, POSITIONS, starts=[LAYER])
    for layer in range(N_LAYERS):  # what a block reads passes here if it computes
        model.blocks[layer].ln1.hook_in.add_hook(lambda activation, hook: ran.append(hook.name))
    found = runs.run([], LAYER)
    assert {name.split(".")[1] for name in ran} == {str(layer) for layer in range(LAYER, N_LAYERS)}
    torch.testing.assert_close(found.states, runs.intact.states)
    torch.testing.assert_close(found.sink_mass, runs.intact.sink_mass)
