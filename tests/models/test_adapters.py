"""Architectures whose adapter melens corrects give transformers' own numbers, through the bridge's components too."""

import pytest
import torch
from planted import bridge, gains_apart
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconAttention

import melens
from melens import MelensError
from melens.models import adapters
from melens.models.twins import plain_twin

_SIZES = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_FALCON = _SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2}
_GPT = {"vocab_size": 200, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
_GRANITE = _SIZES | {
    "num_key_value_heads": 2, "intermediate_size": 96, "shared_intermediate_size": 96, "num_local_experts": 0,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "max_position_embeddings": 64,
}  # fmt: skip
_GEMMA = _SIZES | {
    "num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 200, "sliding_window": 8, "max_position_embeddings": 64,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip
ARCHITECTURES = {
    "falcon": _FALCON,
    "falcon with a bias": _FALCON | {"bias": True},
    "falcon with one norm": _FALCON | {"num_ln_in_parallel_attn": 1},
    "falcon with one key-value head": _FALCON | {"num_kv_heads": 1},
    "openai-gpt": _GPT,
    "codegen": _GPT | {"rotary_dim": 8},
    "granitemoehybrid": _GRANITE | {"layer_types": ["attention"] * 3, "position_embedding_type": None},
    "granitemoehybrid and mamba": _GRANITE
    | {"layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "nope"},
    "gemma4_text": _GEMMA | {"global_head_dim": 32},
}
"""By model type; of Gemma 4 the heads differ by layer."""


def plain(name):
    config = AutoConfig.for_model(name.split()[0], **ARCHITECTURES[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return gains_apart(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())


@pytest.mark.newest
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_way_to_run_it_gives_transformers_numbers(name):
    network = plain(name)
    prompt = torch.arange(3, 25)[None]
    with torch.no_grad():
        expected = network(prompt).logits
        model = bridge(network)
        torch.testing.assert_close(model(prompt), expected)
        torch.testing.assert_close(plain_twin(model)(prompt).logits, expected)
    found = melens.verify(model)
    assert (found.way, found.why_not) == ("fast", "")
    assert found.worst["error"] < 1e-4
    assert {"hook_resid_pre", "hook_resid_post"} <= set(found.errors["site"])


def test_a_random_model_whose_heads_differ_by_layer_is_made_from_its_fields():
    model = melens.load_model("random", model_type="gemma4_text", config=_GEMMA, device="cpu")
    assert model.cfg.n_layers == 3


@pytest.mark.newest
@pytest.mark.parametrize("name", ["falcon", "falcon with a bias", "falcon with one key-value head"])
def test_falcons_queries_keys_and_values_are_those_that_transformers_splits(name):
    network = plain(name)
    attention, hidden = network.transformer.h[1].self_attention, torch.randn(1, 6, 64)
    query, key, value = attention._split_heads(attention.query_key_value(hidden))
    group = 4 // attention.num_kv_heads
    own = bridge(network).blocks[1].attn
    for projection, expected in ((own.q, query), (own.k, key[:, :, ::group]), (own.v, value[:, :, ::group])):
        torch.testing.assert_close(projection.original_component(hidden), expected.flatten(2))


def test_falcon_with_alibi_is_refused_where_transformers_two_attentions_differ(monkeypatch):
    options = {"model_type": "falcon", "config": _FALCON | {"alibi": True}, "device": "cpu"}
    monkeypatch.setattr(adapters, "_falcons_agree", lambda: False)
    with pytest.raises(MelensError, match="adds Falcon's ALiBi twice in its eager attention"):
        melens.load_model("random", **options)
    monkeypatch.setattr(adapters, "_falcons_agree", lambda: True)
    assert melens.load_model("random", **options).cfg.n_layers == 3


def test_that_falcons_two_attentions_differ_is_found_out(monkeypatch):
    own = FalconAttention.forward

    def counting(times):
        def forward(self, hidden_states, alibi, attention_mask, **rest):
            if self.config._attn_implementation == "eager":  # whose mask holds it already
                alibi = (times - 1) * alibi
            return own(self, hidden_states, alibi, attention_mask, **rest)

        return forward

    monkeypatch.setattr(FalconAttention, "forward", counting(1))
    assert adapters._falcons_agree.__wrapped__()
    monkeypatch.setattr(FalconAttention, "forward", counting(2))
    assert not adapters._falcons_agree.__wrapped__()


def test_a_config_that_transformers_itself_cannot_run_is_told():
    config = _FALCON | {"parallel_attn": False}  # blocks with two norms one after the other look for those side by side
    model = melens.load_model("random", model_type="falcon", config=config, device="cpu")
    with pytest.raises(MelensError, match=r"FalconForCausalLM does not run in transformers itself \(.*ln_attn"):
        melens.trace(model, [torch.arange(3, 25)])
