"""Rows that share a forward pass give what each gives alone, whatever the model tells apart."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from melens.models.view import base_of
from melens.tracing import batching
from melens.tracing.batching import BatchRule, forget_longest, measured, relative_error, rule_of

SMALL = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "head_dim": 8,
    "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1,
    "topk_group": 1, "num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 16,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
MODELS = {
    "llama": {"model_type": "llama"},
    "phi3 with longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": 16,
        "rope_parameters": LONGROPE,
    },
    "llama with dynamic rope": {"model_type": "llama", "max_position_embeddings": 16, "rope_parameters": DYNAMIC},
    "glm_moe_dsa": EXPERTS
    | LATENT
    | {"model_type": "glm_moe_dsa", "index_topk": 4, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v4": EXPERTS
    | LATENT
    | {
        "model_type": "deepseek_v4",
        "num_key_value_heads": 1,
        "head_dim": 16,
        "index_topk": 2,
        "o_lora_rank": 16,
        "o_groups": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"]},
    "falcon_h1": {
        "model_type": "falcon_h1",
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "gemma3_text both ways": {
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "use_bidirectional_attention": True,
        "query_pre_attn_scalar": 16,
    },
}
LENGTHS = [5, 9, 9, 12, 16, 17, 17, 21, 40, 40]


def model(name, seed=0):
    return model_of(MODELS[name], seed)


def model_of(options, seed=0):
    """A tiny transformers model with random weights, from a model type and what differs from `SMALL`."""
    options = SMALL | options
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def rows_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 200, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def final_of(network, rows, rule):
    if rule.remembers:
        forget_longest(network)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    states = base_of(network)(input_ids=padded, use_cache=False).last_hidden_state
    return [state[: len(row)] for state, row in zip(states, rows, strict=True)]


def alone_of(name, rows):
    """Final states of each row alone, the shortest first, so that no longer one was seen before."""
    fresh = model(name)
    return [final_of(fresh, [row], BatchRule())[0] for row in rows]


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_share_a_pass_give_what_each_gives_alone(name):
    network = model(name)
    rule = measured(network, rule_of(network))
    rows = rows_of(LENGTHS)
    alone = alone_of(name, rows)
    groups = rule.groups(LENGTHS, max_batch_tokens=200, max_padding=0.9, longest_first=True)
    for group in groups:
        for row, state in zip(group, final_of(network, [rows[row] for row in group], rule), strict=True):
            assert relative_error(state, alone[row]) < 1e-4
    assert sorted(row for group in groups for row in group) == list(range(len(rows)))
    assert len(groups) < len(rows)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("llama", "lfm2", "falcon_h1")])
def test_without_a_rule_the_same_rows_give_other_numbers(name):
    network, rows = model(name), rows_of(LENGTHS)
    together = final_of(network, rows, BatchRule())
    assert max(map(relative_error, together, alone_of(name, rows))) > 1e-2


def test_a_batch_goes_up_to_its_size_and_little_of_it_is_padding():
    groups = BatchRule().groups([10, 2, 9, 10, 100], max_batch_tokens=20)
    assert groups == [[1], [2, 0], [3], [4]]
    assert BatchRule().groups([10, 2, 9, 10, 100], max_batch_tokens=20, longest_first=True) == [[4], [0, 3], [2], [1]]
    assert BatchRule().groups([10, 7, 8], max_batch_tokens=100, max_padding=0.25) == [[1, 2, 0]]
    assert BatchRule().groups([10, 7, 8], max_batch_tokens=100, max_padding=0.1) == [[1, 2], [0]]
    assert BatchRule().groups([], max_batch_tokens=20) == []


@pytest.mark.parametrize(
    ("rule", "groups"),
    [
        (BatchRule(), [[0, 1, 2, 3, 4, 5]]),
        (BatchRule(limits=(6,)), [[0, 1, 2], [3, 4, 5]]),
        (BatchRule(equal_beyond=5), [[0, 1], [2], [3, 4], [5]]),
        (BatchRule(equal_beyond=0), [[0], [1], [2], [3, 4], [5]]),
        (BatchRule(alone=True), [[0], [1], [2], [3], [4], [5]]),
    ],
)
def test_a_rule_keeps_apart_what_a_model_tells_apart(rule, groups):
    assert rule.groups([4, 5, 6, 7, 7, 8], max_batch_tokens=1000, max_padding=0.9) == groups


def config(**options):
    own = SimpleNamespace(max_position_embeddings=64, **options)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: own))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, BatchRule()),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 16}}, BatchRule()),
        ({"rope_parameters": LONGROPE}, BatchRule(limits=(16, 64))),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 32}, BatchRule(limits=(32, 64))),
        ({"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": {}}}, BatchRule(limits=(16, 64))),
        ({"rope_parameters": DYNAMIC}, BatchRule(equal_beyond=64, remembers=True)),
        ({"index_topk": 8, "rope_parameters": DYNAMIC}, BatchRule(equal_beyond=8, remembers=True)),
    ],
)
def test_a_rule_is_read_from_the_config(options, rule):
    assert rule_of(config(**options)) == rule


@torch.no_grad()
@pytest.mark.parametrize(
    ("disturb", "rule"),
    [
        (lambda states: states + states.mean(0, keepdim=True), BatchRule(alone=True)),  # experts with capacity
        (lambda states: states / states.shape[1], BatchRule(equal_beyond=0)),
        (lambda states: states * 2, BatchRule()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_no_config_tells_is_measured_once(monkeypatch, disturb, rule, dtype):
    network = model("llama").to(dtype)
    network.model.layers[1].register_forward_hook(lambda module, args, output: disturb(output))
    assert measured(network, BatchRule()) == rule
    monkeypatch.setattr(batching, "_measure", None)  # a second time, nothing is run
    assert measured(network, BatchRule()) == rule


RECURRENT = {"model_type": "recurrent_gemma", "attention_window_size": 64, "lru_width": 32}


@pytest.mark.parametrize(
    ("options", "on_left"), [(RECURRENT, BatchRule(equal_beyond=0)), (MODELS["falcon_h1"], BatchRule())]
)
def test_a_model_that_sees_padding_on_its_left_is_noticed(options, on_left):
    network = model_of(options)
    assert measured(network, BatchRule()) == BatchRule()
    assert measured(network, BatchRule(), padding="left") == on_left
