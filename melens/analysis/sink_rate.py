"""The sink rate as defined by Gu et al. (2024, "When Attention Sink Emerges in Language Models", section 3.1).

A key's importance score α is the mean attention of the queries from the key on, its own included, over the first T
tokens of a sample; the sink rate is the share of samples, blocks and heads with α over ε (T = 64, ε = 0.3). It is
another number than the share of heads with a sink mass over 0.3 (`melens.analysis.sink_mass`), which leaves the key's
own query out, takes the prompts whole and averages them before it compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from melens.analysis.metrics import SINK_THRESHOLD
from melens.analysis.sink_mass import check_finite
from melens.analysis.statistics import mean_metric, with_interval
from melens.analysis.study import Study
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.style import FIRST, OTHERS, SINK
from melens.printing import counted
from melens.report.result import Figure, Interval, Metrics
from melens.tracing.attention_probes import AttentionOffTokens, Importance, ImportanceByKey
from melens.tracing.probes import Probe
from melens.tracing.sites import ATTENTION_ON_KEYS, Sites
from melens.tracing.trace import Trace

__all__ = [
    "N_TOKENS", "SinkRateMetrics", "measure_sink_rate", "of_long_prompts", "other_keys", "probes", "share_of_sinks",
    "sink_rate_by_block", "sink_rate_figure", "sink_rate_in_words",
]  # fmt: skip

N_TOKENS = 64
"""T of Gu et al."""

SEEN_BY = 16
"""So many queries must see a key for it to count among the others: the last of a prompt is seen by itself alone."""

_ROUNDING = 1e-3
"""Attention that sums to 1 lacks no more than this, in bf16."""


class SinkRateMetrics(Metrics):
    """Sink rates, over all prompts.

    Attributes:
        sink_rate: share of prompts, blocks and heads with an importance of token 0 over 0.3 in the first 64 tokens.
        sink_rate_prompts: of how many prompts, those with 64 tokens.
        sink_rate_elsewhere: of whole prompts, the same share of the other key that has most, among those that 16
            queries see; mean over prompts.
        off_tokens: attention that goes to no token, but to a learned sink (GPT-OSS) or nowhere (softpick, off by one);
            mean over prompts, blocks, heads.
        off_tokens_rate: share of prompts, blocks and heads where that is over 0.3.
    """

    sink_rate: float | None = None
    sink_rate_interval: Interval | None = None
    sink_rate_prompts: int | None = None
    sink_rate_elsewhere: float | None = None
    sink_rate_elsewhere_interval: Interval | None = None
    off_tokens: float | None = None
    off_tokens_rate: float | None = None


def probes(model: Any, **options: Any) -> list[Probe]:
    """Return what `measure_sink_rate` reads, as far as the model has attention."""
    wanted = [Importance(n_tokens=N_TOKENS), ImportanceByKey(), AttentionOffTokens()]
    return wanted if Sites.of(model).find(ATTENTION_ON_KEYS) else []


def measure_sink_rate(trace: Trace) -> dict[str, Any]:
    """Compute the fields of `SinkRateMetrics`.

    Args:
        trace: with the tables of `probes`.

    Raises:
        MelensError: an importance that is NaN.
    """
    off = trace["off_tokens"]["off_tokens"]
    measured: dict[str, Any] = {
        "off_tokens": float(off.mean()),
        "off_tokens_rate": float((off > SINK_THRESHOLD).mean()),
    }
    table = of_long_prompts(trace)
    is_sink = share_of_sinks(table, ["prompt"])
    measured["sink_rate_prompts"] = len(is_sink)
    if len(is_sink):
        measured |= _mean_over_inputs("sink_rate", is_sink, trace)
    others = other_keys(trace)
    if len(others):
        most = others.groupby(["prompt", "pos"])["share_of_heads"].mean().groupby("prompt").max()
        measured |= _mean_over_inputs("sink_rate_elsewhere", most, trace)
    return measured


def _mean_over_inputs(name: str, by_prompt: pd.Series, trace: Trace) -> dict[str, Any]:
    """Average over prompts; with the interval of the means of those that share a first token, whose key 0 is one."""
    firsts = trace.prompts.set_index("prompt")["first_token_id"].loc[by_prompt.index]
    return mean_metric(name, by_prompt.groupby(firsts).mean().to_numpy()) | {name: float(by_prompt.mean())}


def of_long_prompts(trace: Trace) -> pd.DataFrame:
    """Return the rows of `importance` of the prompts that have so many tokens; the others hold NaN."""
    long = trace.prompts["prompt"][trace.prompts["n_tokens"] >= N_TOKENS]
    return trace["importance"][trace["importance"]["prompt"].isin(long)]


def share_of_sinks(importance: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """Compute the sink rate, the share of rows over the threshold, by some columns of a table of `Importance`.

    Raises:
        MelensError: an importance that is NaN.
    """
    check_finite(importance, "importance", "importance of token 0")
    return (importance["importance"] > SINK_THRESHOLD).groupby([importance[name] for name in by]).mean()


def other_keys(trace: Trace) -> pd.DataFrame:
    """Return the rows of `importance_by_key` of the keys behind token 0 that `SEEN_BY` queries see."""
    table = trace["importance_by_key"]
    seen_by = table["prompt"].map(trace.prompts.set_index("prompt")["n_tokens"]) - table["pos"]
    return table[(table["pos"] > 0) & (seen_by >= SEEN_BY)]


def sink_rate_by_block(trace: Trace) -> pd.DataFrame:
    """Compute by `layer` what `SinkRateMetrics` has of all blocks: `sink_rate`, `elsewhere`, `off_tokens_rate`.

    `elsewhere` is of the key that has most in the block, mean over prompts; NaN where no prompt is long enough.
    """
    importance, off = of_long_prompts(trace), trace["off_tokens"]
    most = other_keys(trace).groupby(["layer", "prompt"])["share_of_heads"].max()
    rates = {
        "sink_rate": share_of_sinks(importance, ["layer"]),
        "elsewhere": most.groupby("layer").mean(),
        "off_tokens_rate": (off["off_tokens"] > SINK_THRESHOLD).groupby(off["layer"]).mean(),
    }
    return pd.DataFrame(rates).rename_axis("layer").reset_index()


def sink_rate_figure(study: Study, by_block: pd.DataFrame, observed: str) -> Figure | None:
    """Draw the sink rate by block: of token 0, of the other key that has most, of what goes to no token if any does.

    None where no prompt is long enough for any.
    """
    names = {"sink_rate": ("token 0", FIRST), "elsewhere": ("the other token with most", OTHERS)}
    if by_block["off_tokens_rate"].any():
        names["off_tokens_rate"] = ("no token", SINK)
    curves = [
        Curve(name, by_block[["layer", column]].rename(columns={column: "mean"}).dropna(), color)
        for column, (name, color) in names.items()
        if by_block[column].notna().any()
    ]
    if not curves:
        return None
    panel = Panel("", "share of heads", curves, study.me.layer, y_range=(0, 1))
    note = f"Share of heads with an importance over {SINK_THRESHOLD:g} (Gu et al. 2024), mean over prompts."
    plot = curves_by_block([panel], title=study.title("Sink rate", study.me.n_prompts), note=note)
    return Figure(plot, "Gu et al. (2024)", "The sink is the first token.", observed)


def sink_rate_in_words(metrics: SinkRateMetrics) -> str:
    """Say how large it is, of token 0, of whichever other token has most, and of what goes to no token if any does."""
    words = f"Not measured on token 0: no prompt has {N_TOKENS} tokens."
    if metrics.sink_rate is not None:
        rate = with_interval(metrics.sink_rate, metrics.sink_rate_interval, ".3f")
        prompts = counted(metrics.sink_rate_prompts or 0, "prompt")
        words = f"{rate} of all heads have a sink on token 0, in the first {N_TOKENS} tokens of {prompts}."
    if metrics.sink_rate_elsewhere is not None:
        words += f" {metrics.sink_rate_elsewhere:.3f} have one on whichever other token has most."
    if metrics.off_tokens is not None and metrics.off_tokens > _ROUNDING:
        words += f" {metrics.off_tokens:.3f} of the attention goes to no token"
        words += f", and over {SINK_THRESHOLD:g} of it in {metrics.off_tokens_rate:.3f} of all heads."
    return words
