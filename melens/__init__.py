"""Massive activations, attention sinks and WeMask, measured on any language model that TransformerLens can bridge."""

from melens.emergence import Criterion, Emergence, find_me_layer, massive_activations
from melens.errors import MelensError
from melens.models import known_models, load_model
from melens.probes import (
    AbsMedian,
    Batch,
    LargestActivations,
    Norms,
    Probe,
    SinkByQuery,
    SinkMass,
    TokenVectors,
    default_probes,
)
from melens.prompts import Prompt, load_prompts
from melens.trace import Trace, trace

__all__ = [
    "AbsMedian",
    "Batch",
    "Criterion",
    "Emergence",
    "LargestActivations",
    "MelensError",
    "Norms",
    "Probe",
    "Prompt",
    "SinkByQuery",
    "SinkMass",
    "TokenVectors",
    "Trace",
    "default_probes",
    "find_me_layer",
    "known_models",
    "load_model",
    "load_prompts",
    "massive_activations",
    "trace",
]
