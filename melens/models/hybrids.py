"""Adapters of hybrid models whose attention, or FFN, TransformerLens 4.3 does not tell from their recurrent blocks.

There each block of Nemotron-H has one `mixer`, whatever it is; one of RecurrentGemma, or a hybrid one of Zamba2, has
nothing inside. Here each block has the parts that it is made of, under TransformerLens's usual names, so that sinks,
norms and FFNs are measured where they are. The self-check (`melens.verify`) finds out whether that is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformer_lens.model_bridge import generalized_components as tl
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.nemotron_h import NemotronHArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.recurrent_gemma import RecurrentGemmaArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.zamba2 import Zamba2ArchitectureAdapter

__all__ = ["HYBRIDS", "HybridBlock", "parts_of", "submodule"]


class HybridBlock(tl.BlockBridge):
    """A block that is of one of several kinds, and has the parts of its kind alone."""

    def __init__(self, name: str, config: Any, kinds: Mapping[str, Mapping[str, GeneralizedComponent]]) -> None:
        """Take the parts of each kind of block by a submodule that only such blocks have, in order; `""` is for any."""
        super().__init__(name, config)
        self._kinds = kinds

    def parts(self, block: nn.Module) -> Mapping[str, GeneralizedComponent]:
        """Return the parts that a block of the transformers model has, by TransformerLens's names."""
        return next(parts for mark, parts in self._kinds.items() if submodule(block, mark) is not None)

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        self.submodules = dict(self.parts(original_component))  # before TransformerLens looks for their modules
        within = {alias: target for alias, target in tl.BlockBridge.hook_aliases.items() if self._has_target(target)}
        if "ln1" not in self.submodules:  # what attention writes does not reach the residual stream by itself
            within.pop("hook_attn_out", None)
        mixed = {"hook_mixer_in": "mixer.hook_in", "hook_mixer_out": "mixer.hook_out"}
        self.hook_aliases = within | {alias: target for alias, target in mixed.items() if self._has_target(target)}

    def _has_target(self, target: str) -> bool:
        part, _, rest = target.partition(".")
        return not rest or part in self.submodules


def parts_of(described: Any, block: nn.Module) -> Mapping[str, GeneralizedComponent]:
    """Return the parts of a block of a transformers model, as an adapter describes its blocks."""
    return described.parts(block) if isinstance(described, HybridBlock) else described.submodules


def submodule(block: nn.Module | None, name: str | None) -> nn.Module | None:
    """Return a module inside a block, None where the block, of another kind in a hybrid model, does not have it."""
    try:
        return None if name is None or block is None else block.get_submodule(name)
    except AttributeError:
        return None


def _attention(name: str, config: Any) -> tl.AttentionBridge:
    """Describe attention that transformers' own module computes."""
    projections = {part: tl.LinearBridge(name=f"{part}_proj") for part in "qkvo"}
    return tl.AttentionBridge(
        name=name, config=config, submodules=projections, maintain_native_attention=True, requires_attention_mask=True
    )


class _NemotronH(NemotronHArchitectureAdapter):
    """Nemotron-H, of whose blocks each is attention, an FFN, a mixture of experts or a Mamba-2 mixer."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        of_mamba = self.component_mapping["blocks"].submodules

        def norm() -> tl.RMSNormalizationBridge:
            return tl.RMSNormalizationBridge(name="norm", config=self.cfg)

        neurons = {"in": tl.LinearBridge(name="up_proj"), "out": tl.LinearBridge(name="down_proj")}
        kinds = {
            "mixer.q_proj": {"ln1": norm(), "attn": _attention("mixer", self.cfg)},
            "mixer.experts": {"ln2": norm(), "mlp": tl.MoEBridge(name="mixer", config=self.cfg)},
            "mixer.up_proj": {"ln2": norm(), "mlp": tl.MLPBridge(name="mixer", config=self.cfg, submodules=neurons)},
            "": of_mamba,
        }
        self.component_mapping["blocks"] = HybridBlock("model.layers", self.cfg, kinds)


class _RecurrentGemma(RecurrentGemmaArchitectureAdapter):
    """RecurrentGemma, whose blocks all have an FFN, behind local attention or a linear recurrence."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)

        def with_ffn(**mixer: GeneralizedComponent) -> dict[str, GeneralizedComponent]:
            return {
                "ln1": tl.RMSNormalizationBridge(name="temporal_pre_norm", config=self.cfg),
                **mixer,
                "ln2": tl.RMSNormalizationBridge(name="channel_pre_norm", config=self.cfg),
                "mlp": self._gated_mlp(name="mlp_block"),
            }

        kinds = {
            "temporal_block.q_proj": with_ffn(attn=_attention("temporal_block", self.cfg)),
            "": with_ffn(mixer=GeneralizedComponent(name="temporal_block")),
        }
        self.component_mapping["blocks"] = HybridBlock("model.layers", self.cfg, kinds)


class _Zamba2(Zamba2ArchitectureAdapter):
    """Zamba2, some of whose blocks feed a transformer block that they share to their Mamba-2 mixer.

    What that writes reaches the residual stream through the mixer alone, so its FFN is no `mlp` of the block, and what
    its attention reads is no normalised residual stream, so there is no `ln1`.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        kinds = {
            "shared_transformer": {"attn": _attention("shared_transformer.self_attn", self.cfg)},
            "": self.component_mapping["blocks"].submodules,
        }
        self.component_mapping["blocks"] = HybridBlock("model.layers", self.cfg, kinds)


HYBRIDS: dict[str, type[ArchitectureAdapter]] = {
    "NemotronHForCausalLM": _NemotronH,
    "RecurrentGemmaForCausalLM": _RecurrentGemma,
    "Zamba2ForCausalLM": _Zamba2,
}
"""By architecture, as TransformerLens names it."""
