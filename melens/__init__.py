"""Massive activations, attention sinks and WeMask, measured on any language model that TransformerLens can bridge."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from melens.ablation import MassiveTokenRuns, ablated
    from melens.claims import judge
    from melens.emergence import Criterion, Emergence, find_me_layer, massive_activations
    from melens.errors import MelensError
    from melens.models import known_models, load_model
    from melens.normalization import read_normalization
    from melens.probes import (
        AbsMedian,
        AttentionEntropy,
        AttentionMaps,
        AttentionSpectrum,
        Batch,
        Concentration,
        GainAlignment,
        LargestActivations,
        Norms,
        Probe,
        SinkByQuery,
        SinkMass,
        Spectrum,
        TokenVectors,
    )
    from melens.prompts import Prompt, load_prompts
    from melens.tracing import Trace, default_probes, trace
    from melens.verification import Verification, verify
    from melens.weights import score_blocks
    from melens.wemask import WeMask

__all__ = [
    "AbsMedian",
    "AttentionEntropy",
    "AttentionMaps",
    "AttentionSpectrum",
    "Batch",
    "Concentration",
    "Criterion",
    "Emergence",
    "GainAlignment",
    "LargestActivations",
    "MassiveTokenRuns",
    "MelensError",
    "Norms",
    "Probe",
    "Prompt",
    "SinkByQuery",
    "SinkMass",
    "Spectrum",
    "TokenVectors",
    "Trace",
    "Verification",
    "WeMask",
    "ablated",
    "default_probes",
    "find_me_layer",
    "judge",
    "known_models",
    "load_model",
    "load_prompts",
    "massive_activations",
    "read_normalization",
    "score_blocks",
    "trace",
    "verify",
]

_MODULES = (
    "errors", "prompts", "probes", "verification", "tracing", "emergence", "models", "claims", "normalization",
    "ablation", "weights", "wemask",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: the bridge takes a second that `import melens` need not."""
    if name in __all__:
        for module in (import_module(f"melens.{module}") for module in _MODULES):
            if name in module.__all__:
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module 'melens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
