"""A bridge is measured on its plain twin, with every hook that has a place there; else on itself: a line says why."""

import copy
import warnings
from functools import partial

import pytest
import torch
from planted import FAMILIES, bridge, gains_apart, other_model, plain_model
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module

import melens
from melens.models.gates import add_gates, gates_of
from melens.models.view import view_model
from melens.tracing import twin
from melens.tracing.twin import Twin, running

TOKENS = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def recorded(model, site):
    """Run the twin, which must need no warning, and return what passes a hook point."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with running(model, [(model.hook_dict[site], lambda activation: found.append(activation.clone()))]) as network:
            assert network is not model.original_model
            network(input_ids=TOKENS, use_cache=False)
    (activation,) = found
    return activation


def test_the_twin_has_the_bridges_weights_and_none_of_its_components():
    model = bridge(plain_model("llama"))
    with running(model) as network:
        assert not any(isinstance(module, GeneralizedComponent) for module in network.modules())
        own, of_bridge = (sorted(p.data_ptr() for p in net.parameters()) for net in (network, model.original_model))
        assert own == of_bridge
        assert model.original_model.config._attn_implementation == "eager"
        assert model.blocks[0].attn.original_component.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("gpt2", "attn.hook_k"),  # split off a joint projection
        ("gpt2", "attn.hook_z"),
        ("opt", "mlp.hook_pre"),  # in a block that works on [batch · pos, d]
        ("llama4_text in chunks", "hook_mlp_out"),
        ("falcon_h1", "attn.hook_pattern"),
        ("bloom", "attn.hook_pattern"),  # whose attention is not ours
        ("gpt_oss", "attn.hook_pattern"),
    ],
)
def test_what_passes_a_hook_point_passes_its_place_in_the_twin(name, site):
    model = other_model(name)
    found = recorded(model, f"blocks.1.{site}")  # before the bridge runs, which then knows how long the prompts are
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    torch.testing.assert_close(found, cache[f"blocks.1.{site}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["hook_resid_pre", "attn.hook_q", "attn.hook_pattern", "ln2.hook_out"])
def test_a_hook_that_changes_something_changes_the_same_in_the_twin(site):
    model = bridge(plain_model("llama"))
    with model.hooks(fwd_hooks=[(f"blocks.1.{site}", lambda activation, hook: activation.flip(1))]), torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        found = recorded(model, "blocks.3.hook_resid_post")
    torch.testing.assert_close(found, cache["blocks.3.hook_resid_post"], rtol=1e-4, atol=1e-4)


def test_where_the_bridge_has_to_run_one_line_says_why():
    model = bridge(plain_model("llama"))

    def runs_the_bridge():
        with running(model) as network:
            return network is model.original_model

    hook = ("blocks.1.ln1.hook_scale", lambda activation, hook: None)
    with model.hooks(fwd_hooks=[hook]), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert runs_the_bridge()
        assert runs_the_bridge()
    assert [str(one.message) for one in warned] == [
        "This model is run through TransformerLens's own components, in about 4 times the time and in memory quadratic "
        "in the length: blocks.1.ln1.hook_scale is inside one of them."
    ]
    assert not runs_the_bridge()


def test_a_site_whose_tensor_passes_elsewhere_is_measured_in_the_bridge(monkeypatch, tmp_path):
    """GPT-2's FFN is a component of no known kind, so the check compares its hook points with its module."""
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path))
    own = twin.Twin._note

    def misplace(self, component, plain, name):
        own(self, component, plain, name)
        if name.endswith("mlp"):
            key = id(component.hook_out)
            self.places[key] = self.places[key]._replace(is_input=True)

    monkeypatch.setattr(twin.Twin, "_note", misplace)
    model = other_model("gpt2")
    with pytest.warns(UserWarning, match=r"On GPT2LMHeadModel .*hook_mlp_out.* It is therefore run through Transf"):
        norms = melens.trace(model, list(TOKENS), [melens.Norms(("hook_mlp_out",))])
    assert norms.model["verified"]["way"] == "bridge"
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    found = torch.tensor(norms["norm"].query("layer == 1").norm.to_numpy()).view(2, 9)
    torch.testing.assert_close(found, cache["blocks.1.hook_mlp_out"].norm(dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["attn_in", "ln1_in", "resid_pre"])
def test_a_mask_on_a_bridge_is_on_its_twin_too(site):
    model = bridge(gains_apart(plain_model("llama")))
    unmasked = recorded(model, "blocks.3.hook_resid_post")
    with melens.WeMask(0.3, site=site, start=1).applied(model), torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        found = recorded(model, "blocks.3.hook_resid_post")
    torch.testing.assert_close(found, cache["blocks.3.hook_resid_post"], rtol=1e-4, atol=1e-4)
    assert (found - unmasked).abs().max() > 1e-2
    torch.testing.assert_close(recorded(model, "blocks.3.hook_resid_post"), unmasked)


def _replace_module(model):
    parent = model.blocks[1].original_component
    parent.mlp = copy.deepcopy(parent.mlp)


def _replace_weight(model):
    down = model.blocks[1].mlp.out.original_component
    down.weight = torch.nn.Parameter(2 * down.weight.detach())


def _edit_weight(model):
    with torch.no_grad():
        model.blocks[1].mlp.out.original_component.weight.mul_(2)


def _add_gate(model):
    add_gates(view_model(model), "headwise")
    with torch.no_grad():
        for gate in gates_of(view_model(model)).values():
            gate.weight.normal_()


def _change_config(model):
    model.original_model.config.rms_norm_eps = 0.5


@pytest.mark.parametrize(
    ("change", "makes_anew"),
    [
        (_replace_module, True),
        (_replace_weight, False),  # a twin's modules have the bridge's weights, whatever they are
        (_edit_weight, False),
        (_add_gate, True),
        (_change_config, True),
    ],
)
def test_a_twin_lives_with_its_bridge_and_sees_what_was_changed(change, makes_anew):
    model = bridge(gains_apart(plain_model("llama")))
    before, twin = recorded(model, "blocks.3.hook_resid_post"), Twin.of(model)
    assert Twin.of(model) is twin
    change(model)
    assert (Twin.of(model) is not twin) == makes_anew
    found = recorded(model, "blocks.3.hook_resid_post")
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    torch.testing.assert_close(found, cache["blocks.3.hook_resid_post"], rtol=1e-4, atol=1e-4)
    assert ((found - before).abs().max() > 1e-2) == (change not in (_replace_module, _change_config))


def _differences(model, *sites):
    """How far the traced activations are from those of `run_with_cache`, for their size."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _, cache = model.run_with_cache(TOKENS)
        for site in sites:
            found: list[torch.Tensor] = []
            keep = partial(lambda found, activation: found.append(activation.clone()), found)
            with running(model, [(model.hook_dict[site], keep)]) as network:
                network(input_ids=TOKENS, use_cache=False)
            expected = cache[site]
            yield float((found[0].reshape(expected.shape) - expected).abs().max() / expected.abs().max())


def _made(name):
    return bridge(gains_apart(plain_model(name))) if name in FAMILIES else other_model(name)


@pytest.mark.parametrize("part", ["", "mlp", "ln1", "attn.o"])
def test_a_hook_before_a_wrapped_module_changes_what_comes_after_its_hook_point(part):
    model = bridge(gains_apart(plain_model("llama")))
    module = model.blocks[1].get_submodule(part) if part else model.blocks[1]
    module.original_component.register_forward_pre_hook(lambda module, args: (1.5 * args[0], *args[1:]))
    site = f"blocks.1.{part}.hook_in" if part else "blocks.1.hook_in"
    assert max(_differences(model, site, "blocks.1.hook_resid_post")) < 1e-4


def test_what_is_split_off_an_input_is_recorded_after_hooks_on_that_input():
    model = bridge(plain_model("phi3"))
    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_in", lambda activation, hook: 1.5 * activation)]):
        assert max(_differences(model, "blocks.1.mlp.hook_pre")) < 1e-4


@pytest.mark.parametrize("name", ["opt", "llama4_text in chunks"])
def test_a_pattern_hook_changes_nothing_where_the_bridge_discards_its_result(name):
    model = other_model(name)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda pattern, hook: 0.5 * pattern)]):
        assert max(_differences(model, "blocks.1.hook_resid_post")) < 1e-4


def _hook_component(part):
    part.register_forward_hook(lambda module, args, output: 1.5 * output)


def _hook_original(part):
    _hook_component(part.original_component)


def _replace_original(part):
    part._modules["_original_component"] = copy.deepcopy(part.original_component)
    part.original_component.weight = torch.nn.Parameter(2 * part.original_component.weight.detach())


@pytest.mark.parametrize(
    ("name", "part", "change"),
    [
        ("phi3", "attn.q", _hook_original),
        ("phi3", "mlp.gate", _hook_original),
        ("gpt2", "attn.v", _hook_original),
        ("gpt2", "attn.o", _replace_original),
        ("bloom", "attn.v", _hook_component),
        ("bloom", "attn.v", _replace_original),
    ],
)
def test_a_change_to_what_only_the_bridge_calls_takes_effect(name, part, change):
    model = _made(name)
    Twin.of(model)
    before = list(_differences(model, "blocks.1.hook_resid_post"))
    change(model.blocks[1].get_submodule(part))
    assert max(before + list(_differences(model, "blocks.1.hook_resid_post"))) < 1e-5


def test_a_component_class_with_another_forward_is_run_by_the_bridge(monkeypatch):
    model = bridge(plain_model("llama"))
    Twin.of(model)
    kind = type(model.blocks[1].mlp)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: 2 * own(self, *args, **kwargs))
    assert max(_differences(model, "blocks.1.hook_resid_post")) < 1e-4


def test_two_bridges_around_one_model_are_both_measured():
    network = plain_model("llama")
    first, second = (
        build_bridge_from_module(network, type(network).__name__, hf_config=network.config, model_name="tiny").eval()
        for _ in range(2)
    )
    with second.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda activation, hook: 2 * activation)]):
        for model in (first, second):
            assert max(_differences(model, "blocks.1.hook_resid_post")) < 1e-4
