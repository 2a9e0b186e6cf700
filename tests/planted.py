"""Tiny random models of each family, and the same with a massive activation built into a known block."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import AutoConfig, AutoModelForCausalLM

import melens

N_LAYERS, D_MODEL, VOCABULARY = 4, 64, 200
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": D_MODEL, "intermediate_size": 96, "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral", "sliding_window": 10},
    "phi3": {"model_type": "phi3"},
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 10,
        "layer_types": ["sliding_attention", "full_attention"] * (N_LAYERS // 2),
        "query_pre_attn_scalar": 16,
    },
}

SMALL: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LONGROPE: dict[str, Any] = SMALL | {
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 24,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "factor": 2.6,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 24,
    },
}
LATENT: dict[str, Any] = SMALL | {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "first_k_dense_replace": 3, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32,
}  # fmt: skip
"""Of a DeepSeek-V3 without experts: heads whose queries and keys are 16 wide, values too, cached in 16 dims."""
GPT2: dict[str, Any] = {"vocab_size": 200, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
FALCON: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "multi_query": True,
    "parallel_attn": True,
    "alibi": False,
    "bias": False,
    "new_decoder_architecture": False,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2 with scaled layers": GPT2 | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "opt": {
        "vocab_size": 200,
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 64,
    },
    "gptj": GPT2 | {"rotary_dim": 8},
    "bloom": {"vocab_size": 200, "hidden_size": 64, "n_layer": 3, "n_head": 4},
    "llama4_text in chunks": SMALL
    | {"head_dim": 16, "num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 96},
    "qwen2_moe with a window": SMALL
    | _EXPERTS
    | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "falcon_h1": SMALL
    | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16},
    "exaone4 with some windows": SMALL | {"sliding_window": 8, "sliding_window_pattern": 2},
    "gemma3_text both ways": SMALL | {"head_dim": 16, "sliding_window": 8, "use_bidirectional_attention": True},
    "jetmoe": {
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "kv_channels": 16,
        "max_position_embeddings": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt_oss": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
}
"""Architectures with attention of other kinds, by `other_model`; chunks and windows are of 8 tokens."""


def other_model(name: str) -> TransformerBridge:
    """A bridge of one of the `OTHERS`."""
    return melens.load_model("random", model_type=name.split()[0], config=OTHERS[name])


def plain_model(family: str, seed: int = 0, **config: Any) -> Any:
    """A transformers model of the family with random weights, in eager attention; `config` changes its sizes."""
    options = _COMMON | FAMILIES[family] | config
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def gains_apart(network: Any, seed: int = 0) -> Any:
    """Draw the norms' weights at random: fresh ones are all alike, and nothing would tell a gain from none."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if "norm" in name and weight.ndim == 1:
            weight.data = 0.5 + torch.rand(weight.shape, generator=generator)
    return network


def bridge(network: Any) -> TransformerBridge:
    """Bridge a copy of a transformers model."""
    network = copy.deepcopy(network)
    architecture = type(network).__name__
    return build_bridge_from_module(network, architecture, hf_config=network.config, model_name="tiny").eval()


@torch.no_grad()
def plant(network: Any, *, block: int, token: int, dim: int, source_dim: int = 3) -> None:
    """Let the FFN of `block` write a massive value to `dim` wherever the input is `token`, and nowhere else.

    Only that token's embedding has a component along `source_dim`, and nothing else writes there. One neuron of the
    block's FFN reads it and alone writes `dim`.
    """
    embedding = network.get_input_embeddings().weight
    embedding[:, source_dim] = 0
    embedding[token, source_dim] = 10
    for layer in network.base_model.layers:
        layer.self_attn.o_proj.weight[source_dim] = 0
        layer.mlp.down_proj.weight[source_dim] = 0
    mlp = network.base_model.layers[block].mlp
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj.weight.chunk(2)
    else:
        gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    for projection in (gate, up):
        projection[0] = 0
        projection[0, source_dim] = 4
    mlp.down_proj.weight[dim] = 0
    mlp.down_proj.weight[dim, 0] = 5_000
    norm_after = getattr(network.base_model.layers[block], "post_feedforward_layernorm", None)
    if norm_after is not None:  # Gemma normalises what the FFN writes: there the gain makes it massive
        norm_after.weight[dim] = 5_000


def shared_keys_model(seed: int = 0) -> Any:
    """A Gemma 4 whose last three blocks share keys and values: with `logits_to_keep` they get a few tokens."""
    sharing = {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    }
    sizes = {"global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
    config = AutoConfig.for_model("gemma4_text", **_COMMON | sharing | sizes | {"sliding_window": 16})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
