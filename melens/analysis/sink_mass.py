"""Attention sinks: where they start (section 6, figure 7).

`find_sink_onset` looks at the mean over prompts, `sinks_by_state` at each state of token 0 by itself: in a causal
model prompts that share their first token share token 0's every state, and count once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from melens.analysis.metrics import SINK_THRESHOLD
from melens.errors import MelensError
from melens.tracing.trace import TraceGiven
from melens.validation.signatures import checked
from melens.validation.types import Rate, Whole

__all__ = [
    "SinkOnset", "check_finite", "even_attention", "find_sink_onset", "measured_layers", "sink_mass_by_head",
    "sink_mass_by_layer", "sinks_by_state",
]  # fmt: skip


@dataclass(frozen=True)
class SinkOnset:
    """Where sinks start. Layers are 0-based blocks, None where there is no such block.

    Attributes:
        layer: the first block from which the mean sink mass stays over the threshold, the trailing blocks left out. A
            single block below it between two above is a dip, and moves nothing.
        unbroken_layer: the same where a dip counts.
        first_layer: the first block over the threshold at all: earlier than `layer` where sinks come, go and return.
        threshold: see `SINK_THRESHOLD`; for short prompts twice what even attention pays, where that is more.
        looked_at: the blocks with attention among which `layer` was looked for.
    """

    layer: int | None
    unbroken_layer: int | None
    first_layer: int | None
    threshold: float
    looked_at: tuple[int, ...]


@checked
def measured_layers(trace: TraceGiven) -> list[int]:
    """List the blocks whose attention a trace measured."""
    return sorted(set(trace["sink_mass"]["layer"].tolist())) if "sink_mass" in trace.tables else []


@checked
def sink_mass_by_head(trace: TraceGiven) -> pd.DataFrame:
    """Average the sink mass over prompts: `layer`, `head`, `sink_mass`.

    Raises:
        MelensError: NaN, which pandas would leave out of the mean; every prompt of a trace has a later token.
    """
    check_finite(trace["sink_mass"], "sink_mass", "sink mass")
    return trace["sink_mass"].groupby(["layer", "head"])["sink_mass"].mean().reset_index()


@checked
def sink_mass_by_layer(trace: TraceGiven) -> pd.DataFrame:
    """Summarise the sink mass by block: its `mean`, `low` and `high` (10% and 90% of heads), and `share_of_heads`.

    The last two describe the model's own heads, of which there are no others to infer: they have no interval.

    Raises:
        MelensError: as `sink_mass_by_head`.
    """
    if "sink_mass" not in trace.tables:  # a model without attention
        return pd.DataFrame(columns=["layer", "mean", "low", "high", "share_of_heads"])
    by_layer = sink_mass_by_head(trace).groupby("layer")["sink_mass"]
    share = by_layer.agg(lambda mass: (mass > SINK_THRESHOLD).mean())
    low, high = by_layer.quantile(0.1), by_layer.quantile(0.9)
    return pd.DataFrame({"mean": by_layer.mean(), "low": low, "high": high, "share_of_heads": share}).reset_index()


@checked
def sinks_by_state(trace: TraceGiven) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Average the sink mass over heads and over the prompts that share a first token, and tell where that is a sink.

    Returns:
        The sink mass `[first_token_id, layer]`, and whether it is over the threshold and over twice what even attention
        pays in prompts of that length, which is more in those of fewer than 18 tokens.

    Raises:
        MelensError: as `sink_mass_by_head`.
    """
    check_finite(trace["sink_mass"], "sink_mass", "sink mass")
    by_prompt = trace["sink_mass"].groupby(["prompt", "layer"])["sink_mass"].mean().unstack("layer")
    prompts = trace.prompts.set_index("prompt").loc[by_prompt.index]
    mass = by_prompt.groupby(prompts["first_token_id"]).mean()
    even = prompts["n_tokens"].map(even_attention).groupby(prompts["first_token_id"]).mean()
    return mass, mass.gt((2 * even).clip(lower=SINK_THRESHOLD), axis=0)


def even_attention(n_tokens: int) -> float:
    """Return what later tokens pay to the first where each attends to all keys alike: the mean of 1/2, ..., 1/n."""
    return float(np.mean(1 / np.arange(2, n_tokens + 1)))


@checked
def find_sink_onset(trace: TraceGiven, *, threshold: Rate = SINK_THRESHOLD, trailing_blocks: Whole = 2) -> SinkOnset:
    """Find the block from which the first token is an attention sink.

    Args:
        trace: with the table of the probe `SinkMass`; without it there is no onset.
        threshold: on the sink mass, averaged over prompts and heads.
        trailing_blocks: last blocks, with attention or without, that need not have a sink.

    Raises:
        MelensError: as `sink_mass_by_head`.
    """
    by_layer = sink_mass_by_layer(trace).set_index("layer")["mean"]
    threshold = max(threshold, 2 * float(trace.prompts["n_tokens"].map(even_attention).mean()))
    layers = [int(layer) for layer in by_layer.index]
    over = [layer for layer in layers if by_layer[layer] > threshold]
    looked_at = tuple(layer for layer in layers if layer < trace.model["n_layers"] - trailing_blocks)
    ended = [second for first, second in pairwise(looked_at) if first not in over and second not in over]
    without = [layer for layer in looked_at if layer not in over]
    onset, unbroken = (
        min((layer for layer in looked_at if layer in over and layer > max(before, default=-1)), default=None)
        for before in (ended, without)
    )
    return SinkOnset(onset, unbroken, min(over, default=None), threshold, looked_at)


def check_finite(table: pd.DataFrame, column: str, words: str) -> None:
    """Raise a `MelensError` where a quantity of a head is no number: comparisons would take it for small."""
    for row in table[~np.isfinite(table[column])].head(1).to_dict("records"):
        raise MelensError(
            f"The {words} of block {row['layer']}, head {row['head']} is {row[column]} in prompt "
            f"{row['prompt']}: look for NaN in the model's weights, or load it in float32."
        )
