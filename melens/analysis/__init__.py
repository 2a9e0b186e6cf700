"""Measure a model: each of the paper's figures as a function of a `Study`, without Hydra.

    study = melens.study(model, prompts)
    result = melens.analysis.sinks(study)
    result.figures["sink_mass"]

Each takes the study first and returns a `Result`: figures, tables, metrics, and the claims that rest on them. What a
sweep shows is drawn from results instead: `side_by_side` models, `trainings`, and the `verdicts` of `melens.judge`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from melens.environment.extras import check_extra

if TYPE_CHECKING:
    from melens.analysis.across_inputs import stability
    from melens.analysis.attention_sinks import sinks
    from melens.analysis.block_ablation import ablation
    from melens.analysis.cache_eviction import eviction
    from melens.analysis.checkpoint_dynamics import dynamics
    from melens.analysis.compression_valley import valley
    from melens.analysis.emergence_norms import emergence, side_by_side
    from melens.analysis.ffn_concentration import ffn
    from melens.analysis.generated_texts import generate
    from melens.analysis.head_idleness import heads
    from melens.analysis.massive_state import consequence
    from melens.analysis.norm_gains import normalization
    from melens.analysis.quantized_loss import quantization
    from melens.analysis.secondary_sinks import secondary
    from melens.analysis.self_check import verification
    from melens.analysis.token_direction import direction
    from melens.analysis.weight_carriers import carriers
    from melens.analysis.weights import prediction
    from melens.benchmarks.comparison import benchmark
    from melens.benchmarks.training_table import training_table
    from melens.masks.grid import mask_grid
    from melens.report.verdicts import verdicts
    from melens.training.history import trainings
    from melens.training.runs import training

__all__ = [
    "ablation", "benchmark", "carriers", "consequence", "direction", "dynamics", "emergence", "eviction", "ffn",
    "generate", "heads", "mask_grid", "normalization", "prediction", "quantization", "secondary", "side_by_side",
    "sinks", "stability", "training", "training_table", "trainings", "valley", "verdicts", "verification",
]  # fmt: skip

_MODULES = {
    "ablation": "block_ablation",
    "benchmark": ".benchmarks.comparison",
    "carriers": "weight_carriers",
    "consequence": "massive_state",
    "direction": "token_direction",
    "dynamics": "checkpoint_dynamics",
    "emergence": "emergence_norms",
    "eviction": "cache_eviction",
    "ffn": "ffn_concentration",
    "generate": "generated_texts",
    "heads": "head_idleness",
    "mask_grid": ".masks.grid",
    "normalization": "norm_gains",
    "prediction": "weights",
    "quantization": "quantized_loss",
    "secondary": "secondary_sinks",
    "side_by_side": "emergence_norms",
    "sinks": "attention_sinks",
    "stability": "across_inputs",
    "training": ".training.runs",
    "training_table": ".benchmarks.training_table",
    "trainings": ".training.history",
    "valley": "compression_valley",
    "verdicts": ".report.verdicts",
    "verification": "self_check",
}
"""Where each function stands, from here: in no module of its own name, which would hide it."""


def __getattr__(name: str) -> Any:
    """Import a function when it is asked for: `melens.analysis.metrics` alone needs none of them."""
    if name not in _MODULES:
        raise AttributeError(f"module 'melens.analysis' has no attribute {name!r}")
    if name == "training":
        check_extra("train", "melens.analysis.training")
    globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return globals()[name]
