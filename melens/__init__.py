"""Massive activations, attention sinks and WeMask, measured on any language model that TransformerLens can bridge.

    model = melens.load_model("smollm2-135m")  # a TransformerBridge
    study = melens.study(model, melens.load_prompts())  # one trace, the ME layer
    melens.analysis.sinks(study).figures["sink_mass"]

- A model and prompts: `load_model`, `known_models`, `load_prompts`
- Measure: `trace`, with a `Probe` of melens or your own; `find_me_layer`; `study`, which `melens.analysis` starts from
- Change the model: `WeMask`, `ablated`, `MassiveTokenRuns`
- Leave massive tokens out of autoencoders and probes: `massive_tokens`
- Read weights, judge claims, check the numbers: `read_normalization`, `score_blocks`, `judge`, `verify`

The examples know a tiny `model` by that name, three `prompts`, a study and a trace of them; its ME layer is block 2.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from melens.analysis.massive_tokens import MassiveTokens, massive_tokens
    from melens.analysis.me_layer import Criterion, Emergence, find_me_layer, massive_activations
    from melens.analysis.study import Study, study
    from melens.analysis.weights import score_blocks
    from melens.claims.engine import judge
    from melens.data.prompts import Prompt, load_prompts
    from melens.errors import MelensError
    from melens.masks.mask import WeMask
    from melens.models.loading import known_models, load_model
    from melens.models.normalization import read_normalization
    from melens.tracing.attention_probes import (
        AttentionEntropy,
        AttentionMaps,
        AttentionOffTokens,
        Importance,
        ImportanceByKey,
        SinkByQuery,
        SinkMass,
    )
    from melens.tracing.heads import HeadOutputs, ValueNorms
    from melens.tracing.interventions import MassiveTokenRuns, ablated
    from melens.tracing.probes import (
        AbsMedian,
        Batch,
        Concentration,
        CosineWithFirst,
        GainAlignment,
        LargestActivations,
        Norms,
        Probe,
        TokenVectors,
    )
    from melens.tracing.spectra import AttentionSpectrum, Spectrum
    from melens.tracing.trace import Trace, default_probes, trace
    from melens.tracing.verification import Verification, verify

__all__ = [
    "AbsMedian",
    "AttentionEntropy",
    "AttentionMaps",
    "AttentionOffTokens",
    "AttentionSpectrum",
    "Batch",
    "Concentration",
    "CosineWithFirst",
    "Criterion",
    "Emergence",
    "GainAlignment",
    "HeadOutputs",
    "Importance",
    "ImportanceByKey",
    "LargestActivations",
    "MassiveTokenRuns",
    "MassiveTokens",
    "MelensError",
    "Norms",
    "Probe",
    "Prompt",
    "SinkByQuery",
    "SinkMass",
    "Spectrum",
    "Study",
    "TokenVectors",
    "Trace",
    "ValueNorms",
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
    "massive_tokens",
    "read_normalization",
    "score_blocks",
    "study",
    "trace",
    "verify",
]

_MODULES = (
    "errors", "data.prompts", "tracing.probes", "tracing.attention_probes", "tracing.spectra", "tracing.verification",
    "tracing.trace", "analysis.me_layer", "models.loading", "claims.engine", "models.normalization",
    "tracing.interventions", "tracing.heads", "analysis.weights", "masks.mask", "analysis.study",
    "analysis.massive_tokens",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: the bridge takes a second that `import melens` need not."""
    if name == "analysis":
        return import_module("melens.analysis")
    if name in __all__:
        for module in (import_module(f"melens.{module}") for module in _MODULES):
            if name in module.__all__:
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module 'melens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
