"""Short forward passes as CUDA graphs: on a GPU against the plain run, elsewhere what decides whether one may run."""

import pytest
import torch
from planted import VOCABULARY, bridge, plain_model

import melens
from melens import Probe
from melens.tracing.batching import BatchRule
from melens.tracing.captured import ShortPasses, _settings_of, _State
from melens.tracing.probes import Batch
from melens.tracing.recording import Recorder, targets_of
from melens.tracing.twin import Twin

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def changes():
    def of(change):
        return pytest.param(change, id=change.__name__)

    def a_weight_was_replaced(model):
        norm = model.original_model.model.layers[1].input_layernorm
        norm._original_component.weight = torch.nn.Parameter(norm.weight.detach().clone() * 2)

    def a_weight_got_other_memory(model):
        weight = model.original_model.model.layers[2].mlp.down_proj.weight
        weight.data = weight.data * 2

    def a_number_was_changed(model):
        model.original_model.model.layers[1].input_layernorm._original_component.variance_epsilon = 0.5

    def a_setting_was_changed(model):
        torch.backends.cuda.enable_flash_sdp(False)

    return [
        of(a_weight_was_replaced),
        of(a_weight_got_other_memory),
        of(a_number_was_changed),
        of(a_setting_was_changed),
    ]


@pytest.fixture(autouse=True)
def settings_of_torch():
    flash = torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cuda.enable_flash_sdp(flash)


@pytest.mark.parametrize("change", changes())
def test_a_model_that_was_changed_is_in_another_state(change):
    model = bridge(plain_model("llama"))
    before = _State.of(model)
    assert before is not None
    assert before == _State.of(model)
    melens.trace(model, [torch.arange(1, 20)])  # which leaves it as it was
    assert before == _State.of(model)
    change(model)
    assert _State.of(model) != before


def test_what_a_graph_would_not_run_is_no_state():
    model = bridge(plain_model("llama"))
    handle = model.blocks[1].hook_resid_post.add_hook(lambda activation, hook: None)
    assert _State.of(model) is None
    model.reset_hooks()
    assert _State.of(model) is not None
    handle = model.original_model.model.layers[0].mlp.down_proj._original_component.register_forward_hook(
        lambda module, args, output: None
    )
    assert _State.of(model) is None
    handle.remove()


def test_hooks_that_transformers_leaves_behind_do_nothing():
    model = bridge(plain_model("llama"))
    model.run_with_cache(torch.arange(1, 20)[None])
    assert any(module._forward_hooks for module in Twin.of(model).network.modules())
    assert _State.of(model) is not None


def test_probes_are_known_by_their_settings():
    assert _settings_of(melens.Norms()) == _settings_of(melens.Norms())
    assert _settings_of(melens.Norms()) != _settings_of(melens.Norms(("ln1.hook_out",)))
    assert _settings_of(melens.LargestActivations(min_abs=5)) != _settings_of(melens.LargestActivations())


def test_lengths_are_rounded_up_where_padding_changes_nothing():
    short = ShortPasses.__new__(ShortPasses)
    assert short.padded_length([70, 100], BatchRule(), 2048) == 128
    assert short.padded_length([70, 100], BatchRule(equal_beyond=0), 2048) == 100  # prompts of other lengths may not
    assert short.padded_length([100], BatchRule(limits=(110,)), 2048) == 100
    assert short.padded_length([100], BatchRule(), 120) == 120  # of the model's context
    assert short.padded_length([2000], BatchRule(), 4096) == 2000
    assert short.padded_length([100] * 9, BatchRule(), 4096) == 100  # where it would take time


def test_what_one_recorder_reduced_another_takes():
    model, prompts = bridge(plain_model("llama")), [torch.arange(1, 20), torch.arange(5, 24)]
    probes = melens.default_probes(model)
    recorders = [Recorder(probes, [at for probe in probes for at in targets_of(model, probe)]) for _ in range(3)]
    batch = Batch(torch.stack(prompts), (19, 19), (0, 1))
    own, other, taker = recorders
    for recorder, tokens in ((own, batch.tokens), (other, batch.tokens.flip(0))):
        with torch.no_grad(), melens.tracing.trace._recording(model, recorder, way="fast") as network:
            recorder.begin(batch)
            network(input_ids=tokens, use_cache=False)
            if recorder is own:
                reduced = recorder.reduced()
            recorder.end()
    taker.begin(batch)
    taker.take(reduced)
    taker.end()
    assert taker.last_equals(own)
    assert not taker.last_equals(other)


# --- On a GPU ---------------------------------------------------------------------------------------------------------


def on_the_gpu():
    return bridge(plain_model("llama").to("cuda", torch.bfloat16))


def some(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def n_graphs(model):
    return len(ShortPasses._known[model]._graphs)


def same(one, other):
    for name in one.tables:
        for column in one[name]:
            if one[name][column].dtype.kind == "f":
                torch.testing.assert_close(
                    *(torch.tensor(each[name][column].to_numpy()) for each in (one, other)), equal_nan=True
                )
            else:
                assert one[name][column].equals(other[name][column])
    torch.testing.assert_close(one.tensors["token_vectors"], other.tensors["token_vectors"])


@on_gpu
@pytest.mark.parametrize("lengths", [(20,), (64, 33, 7)])
def test_a_captured_pass_gives_what_a_plain_one_gives_for_other_prompts(lengths):
    model, fresh = on_the_gpu(), on_the_gpu()
    for seed in range(3):
        melens.trace(model, some(lengths, seed))
    assert n_graphs(model) == 1
    torch.cuda.empty_cache()  # nothing that the graph reads is in memory that was given back
    for others in (some(lengths, 7), some([max(2, n - 5) for n in lengths], 8)):
        same(melens.trace(model, others), melens.trace(fresh, others))
        ShortPasses._known.pop(fresh)


@on_gpu
@pytest.mark.parametrize("change", changes())
def test_a_captured_pass_is_not_run_on_a_model_that_was_changed(change):
    model, fresh, prompts = on_the_gpu(), on_the_gpu(), some((20,), 0)
    before = [melens.trace(model, prompts) for _ in range(3)][-1]
    change(model)
    change(fresh)
    after = melens.trace(model, prompts)
    same(after, melens.trace(fresh, prompts))
    if change.__name__ != "a_setting_was_changed":
        assert not after["norm"]["norm"].equals(before["norm"]["norm"])


@on_gpu
def test_a_probe_of_others_is_not_captured():  # it may read lengths in Python, or anything else
    class Lengths(Probe):
        name, sites, by_row = "lengths", ("hook_resid_post",), True

        def reduce(self, activation, batch):
            return {"n": torch.full((len(activation),), float(batch.lengths[0]), device=activation.device)}

    model = on_the_gpu()
    for seed in range(4):
        found = melens.trace(model, some((20 + seed,), seed), [Lengths()])["lengths"]
        assert (found["n"] == 20 + seed).all()
    assert model not in ShortPasses._known


@on_gpu
def test_hooks_on_a_model_take_effect_after_a_pass_was_captured():
    model, prompts = on_the_gpu(), some((20,), 0)
    before = [melens.trace(model, prompts) for _ in range(3)][-1]
    with model.hooks([("blocks.1.hook_resid_post", lambda activation, hook: activation * 2)]):
        assert not melens.trace(model, prompts)["norm"]["norm"].equals(before["norm"]["norm"])
    assert melens.trace(model, prompts)["norm"]["norm"].equals(before["norm"]["norm"])
