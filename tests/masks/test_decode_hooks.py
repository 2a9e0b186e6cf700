"""A decode step runs without a mask's hooks in the blocks, and whatever comes between, the next prompt is masked."""

import threading
from contextlib import contextmanager

import pytest
import torch
from planted import gains_apart, plain_model

from melens import WeMask

TOKENS = torch.tensor([[5, 17, 101, 33, 8, 64, 150]])
NEXT = torch.tensor([[3]])
SITES = ("attn_in", "ln1_in", "resid_pre")

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.* is deprecated")


@pytest.fixture
def network():
    with torch.no_grad():
        yield gains_apart(plain_model("llama")).eval()


@pytest.fixture
def mask():
    return WeMask(0.5, start=1)


def entries(network, site):
    parts = {"attn_in": "self_attn", "ln1_in": "input_layernorm", "resid_pre": ""}
    return [block.get_submodule(parts[site]) for block in network.base_model.layers]


@contextmanager
def called_in_block_0(network, function):
    """Call a function in the middle of each forward pass, before the first masked block."""
    handle = network.base_model.layers[0].mlp.register_forward_hook(lambda *_: function())
    yield
    handle.remove()


@pytest.mark.parametrize("site", SITES)
def test_hooks_are_off_in_a_decode_step_alone(network, site):
    seen = []
    with (
        WeMask(0.5, start=1, site=site).applied(network),
        called_in_block_0(network, lambda: seen.append(len(entries(network, site)[2]._forward_pre_hooks))),
    ):
        network(TOKENS)
        cache = network(TOKENS, use_cache=True).past_key_values
        network(NEXT, past_key_values=cache)
        assert seen == [1, 1, 0]
        assert [len(entry._forward_pre_hooks) for entry in entries(network, site)] == [0, 1, 1, 1]


def test_a_decode_step_that_raises_or_is_interrupted_leaves_the_mask_on(network, mask):
    def raises(error):
        raise error

    for error in (RuntimeError, KeyboardInterrupt):
        with mask.applied(network):
            expected = network(TOKENS).logits
            cache = network(TOKENS, use_cache=True).past_key_values
            with called_in_block_0(network, lambda error=error: raises(error)), pytest.raises(error):
                network(NEXT, past_key_values=cache)
            assert torch.equal(network(TOKENS).logits, expected)


@pytest.mark.parametrize("when", ["before", "after", "in the decode step"])
def test_what_is_hooked_beside_a_mask_keeps_its_place(network, mask, when):
    seen = []
    entry = entries(network, "attn_in")[2]

    def hook():
        entry.register_forward_pre_hook(lambda *given: seen.append(given[2]["hidden_states"][0, 0]), with_kwargs=True)

    if when == "before":
        hook()
    mask.install(network)
    if when == "after":
        hook()
    cache = network(TOKENS, use_cache=True).past_key_values
    with called_in_block_0(network, hook if when == "in the decode step" else lambda: None):
        network(NEXT, past_key_values=cache)
    seen.clear()
    network(TOKENS)
    assert (seen[0] == 0).sum() == (0 if when == "before" else 32)  # half of the width


@pytest.mark.parametrize("at", ["block 0", "the end"])
def test_a_mask_that_is_removed_in_a_decode_step_does_not_come_back(network, mask, at):
    unmasked, masks = network(TOKENS).logits, []
    if at == "the end":
        network.base_model.register_forward_hook(lambda *_: masks.pop().remove() if masks else None)
    installed = mask.install(network)
    cache = network(TOKENS, use_cache=True).past_key_values
    masks.append(installed)
    with called_in_block_0(network, installed.remove if at == "block 0" else lambda: None):
        network(NEXT, past_key_values=cache)
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert torch.equal(network(TOKENS).logits, unmasked)


def test_prompts_and_decode_steps_of_several_threads_do_not_disturb_each_other(network, mask):
    """One thread's call is held in its middle, while the other runs from begin to end."""
    with mask.applied(network):
        expected = network(TOKENS).logits
        cache = network(TOKENS, use_cache=True).past_key_values
        stepped = network(NEXT, past_key_values=cache).logits
        cache.crop(-1)
        for held_is_step in (True, False):
            is_in_the_middle, may_go_on = threading.Event(), threading.Event()

            def hold(held=held_is_step, begun=is_in_the_middle, go_on=may_go_on):
                if threading.current_thread() is not threading.main_thread():
                    begun.set()
                    assert go_on.wait(60), held

            found = {}

            @torch.no_grad()
            def prompt(found=found):
                found["prompt"] = network(TOKENS).logits

            @torch.no_grad()
            def step(found=found):
                found["step"] = network(NEXT, past_key_values=cache).logits

            with called_in_block_0(network, hold):
                thread = threading.Thread(target=step if held_is_step else prompt)
                thread.start()
                assert is_in_the_middle.wait(60)
                (prompt if held_is_step else step)()
                may_go_on.set()
                thread.join()
            cache.crop(-1)
            assert torch.equal(found["prompt"], expected)
            assert torch.equal(found["step"], stepped)


@pytest.mark.parametrize("compiled", ["model", "blocks"])
def test_code_that_was_compiled_for_a_call_without_a_mask_is_not_taken_for_another(network, mask, compiled):
    with mask.applied(network):
        expected = network(TOKENS).logits
    for module in [network] if compiled == "model" else network.base_model.layers:
        module.compile(backend="eager")
    with mask.applied(network):
        network(TOKENS, attention_mask=torch.zeros_like(TOKENS))  # padding alone: nothing to mask
        torch.testing.assert_close(network(TOKENS, attention_mask=torch.ones_like(TOKENS)).logits, expected)
