"""Adapters of architectures that TransformerLens 4.3 describes otherwise than transformers 5.24 builds them.

Each is TransformerLens's own adapter with the part corrected that would end in an error, and is registered in its
place. The self-check (`melens.verify`) finds out whether the result is transformers' own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from einops import rearrange
from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.generalized_components import NormalizationBridge
from transformer_lens.model_bridge.supported_architectures.codegen import CodeGenArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.falcon import FalconArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.granite_moe_hybrid import GraniteMoeHybridArchitectureAdapter
from transformers import FalconConfig, FalconModel

from melens.environment.seeding import seeded
from melens.errors import MelensError
from melens.models.hybrids import HYBRIDS

__all__ = ["register_adapters"]


class _Falcon(FalconArchitectureAdapter):
    """Falcon-40B's `new_decoder_architecture`, where each key-value head lies behind the queries that it serves.

    transformers ignores `multi_query` there, whose default is true, and gives a parallel block two norms unless
    `num_ln_in_parallel_attn` is 1 (Falcon2-11B).
    """

    def __init__(self, cfg: Any) -> None:
        if getattr(cfg, "alibi", False) and not _falcons_agree():
            raise MelensError(
                f"transformers {transformers.__version__} adds Falcon's ALiBi twice in its eager attention, which "
                "melens measures. Falcon with alibi=true needs another version of transformers."
            )
        is_new = getattr(cfg, "new_decoder_architecture", False)
        if is_new:
            cfg.multi_query = False
        super().__init__(cfg)
        if not is_new:
            return
        parts = self.component_mapping["blocks"].submodules
        is_parallel = getattr(cfg, "parallel_attn", True)
        if is_parallel and (getattr(cfg, "num_ln_in_parallel_attn", None) or 2) == 2:
            parts["ln2"] = NormalizationBridge(name="ln_mlp", config=self.cfg)
        else:
            parts["ln1"] = NormalizationBridge(name="input_layernorm", config=self.cfg)

    def _split_falcon_qkv(self, attention: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        if not self._is_new_arch:
            split: tuple[nn.Linear, nn.Linear, nn.Linear] = super()._split_falcon_qkv(attention)
            return split
        joint = attention.query_key_value
        weights = self._of_each(joint.weight)
        biases = (None,) * 3 if joint.bias is None else self._of_each(joint.bias)
        query, key, value = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        return query, key, value

    def _of_each(self, joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_head, n_kv = self.cfg.d_model // self.cfg.n_heads, self.cfg.n_key_value_heads or self.cfg.n_heads
        by_group = rearrange(joint.detach(), "(kv group d) ... -> kv group d ...", kv=n_kv, d=d_head)
        query, key, value = by_group[:, :-2], by_group[:, -2:-1], by_group[:, -1:]
        return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)


@cache
def _falcons_agree() -> bool:
    """Tell whether transformers' two ways to compute Falcon's attention with ALiBi give the same."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "alibi": True}
    with seeded(0), torch.no_grad():
        fused, eager = (
            FalconModel._from_config(FalconConfig(**sizes, initializer_range=1.0), attn_implementation=name).eval()
            for name in ("sdpa", "eager")
        )
        eager.load_state_dict(fused.state_dict())
        tokens = torch.arange(16)[None]
        return torch.allclose(fused(tokens)[0], eager(tokens)[0], rtol=1e-3, atol=1e-4)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous())
    return linear


class _CodeGen(CodeGenArchitectureAdapter):
    """CodeGen, whose attention modules have no rotary table and no divisor of the scores since transformers 5.24."""

    def prepare_model(self, hf_model: Any) -> None:
        super().prepare_model(hf_model)
        if not hasattr(hf_model.transformer, "rotary_emb"):
            return
        table = hf_model.transformer.rotary_emb.embed_positions
        for block in hf_model.transformer.h:
            # Past nn.Module, which would save them with the weights.
            vars(block.attn).update(embed_positions=table, scale_attn=block.attn.head_dim**0.5)


class _GraniteMoeHybrid(GraniteMoeHybridArchitectureAdapter):
    """Granite 4, which has rotary embeddings only where its config says "rope", and none where it says nothing."""

    def prepare_model(self, hf_model: Any) -> None:
        super().prepare_model(hf_model)
        if getattr(hf_model.model, "rotary_emb", None) is None:
            self.cfg.positional_embedding_type = "none"
            self.component_mapping.pop("rotary_emb", None)


def register_adapters() -> None:
    """Let TransformerLens use these adapters in place of its own."""
    corrected: dict[str, Any] = {"FalconForCausalLM": _Falcon, "CodeGenForCausalLM": _CodeGen, **HYBRIDS}
    corrected["GraniteMoeHybridForCausalLM"] = _GraniteMoeHybrid
    for architecture, adapter in corrected.items():
        ArchitectureAdapterFactory.register_adapter(architecture, adapter)
