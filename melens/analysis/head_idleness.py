"""Which heads are idle, and whether those with a sink are: values, output norms, entropy, and the loss without heads.

    result = melens.analysis.heads(study)
    result.figures["head_map"]
    result.metrics.rank_correlation  # of sink mass and output norm

1. Three quantities of every head come with the study's trace: its sink mass (`SinkMass`), how long the values of token
   0 are against the others' (`ValueNorms`), and the norm of what it writes (`HeadOutputs`) over its block's mean.
2. Entropy takes one further pass over prompts cut to one length: a pattern is quadratic in it.
3. `melens.analysis.head_zeroing` sets idle, sink and random heads to zero, and measures the loss on other prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.head_benchmarks import HeadTask, scores_as_metrics, scores_in_words, scores_without_heads
from melens.analysis.head_claims import CLAIMS, COMPARED, DRAINED, HeadsMetrics
from melens.analysis.head_zeroing import (
    IDLE,
    RANDOM,
    SINKS,
    Heads,
    count_of,
    losses_by_share,
    rank_heads,
    rises_as_metrics,
    split_prompts,
    without_heads,
)
from melens.analysis.low_rank import prompts_of_length
from melens.analysis.sink_mass import SINK_THRESHOLD, even_attention, measured_layers
from melens.analysis.statistics import mean_metric, with_interval
from melens.analysis.study import Study
from melens.errors import MelensError
from melens.figures.heads import head_points, loss_without_heads
from melens.figures.heatmaps import Heatmap, head_maps
from melens.figures.style import BLOCK, COLORS, FIRST, OTHERS, SINK
from melens.printing import counted
from melens.report.result import Figure, Result
from melens.tracing.attention_probes import AttentionEntropy
from melens.tracing.heads import HeadOutputs, ValueNorms
from melens.tracing.probes import Probe
from melens.tracing.sites import Sites
from melens.tracing.trace import trace

__all__ = ["CLAIMS", "HeadsMetrics", "heads", "probes"]

_OF_HEAD = ["layer", "head"]
_OUTPUT = "output norm over the block's mean"


def heads(
    study: Study,
    *,
    shares: Sequence[float] = (0.05, 0.1, 0.2, 0.3),
    draws: int = 5,
    n_prompts: int = 36,
    max_tokens: int = 64,
    entropy_tokens: int = 64,
    entropy_prompts: int = 8,
    tasks: Sequence[HeadTask] = ("induction", "copy"),
    items: int = 16,
) -> Result:
    """Map sinks, entropy, values and outputs by head, and measure the loss without idle, sink and random heads.

    Args:
        study: as `melens.study` makes it.
        shares: of all heads that are set to zero; a tenth, which the claims are about, is always among them.
        draws: of random heads.
        n_prompts: at most so many, those with most tokens; heads are chosen on a half of them, losses measured on the
            other.
        max_tokens: of a prompt whose loss is measured.
        entropy_tokens: entropy is measured on prompts cut to this length; shorter ones stay out.
        entropy_prompts: on at most so many.
        tasks: benchmarks that are scored without a tenth of the heads; none for no scores.
        items: of each.

    Returns:
        Metrics `HeadsMetrics`; the tables `heads`, `loss_without_heads` and `scores_without_heads`; the figures
        `head_map`, `output_over_sinks` and `loss_without_heads`.

    Raises:
        MelensError: a model without attention that can be measured, or a number that is NaN.

    Example:
        >>> result = melens.analysis.heads(study)
        >>> sorted(result.figures)
        ['head_map', 'loss_without_heads', 'output_over_sinks']
        >>> result.tables["heads"].columns[:4].tolist()
        ['layer', 'head', 'sink_mass', 'output_norm']
    """
    layout = study.layout.as_measured(measured_layers(study.trace))
    if "sink_mass" not in study.trace.tables:
        raise MelensError(f"Heads cannot be measured: there is {layout.attention_in_words}.")
    by_prompt, why_not = _by_prompt(study)
    entropy, why_no_entropy = _entropy(study, entropy_tokens, entropy_prompts)
    by_input = _by_input(study, by_prompt)
    table = by_input.groupby(_OF_HEAD).mean().join(entropy).reset_index().sort_values(_OF_HEAD)
    table["is_sink"] = table["sink_mass"] > _threshold(study)
    if "value_head" in table:
        table["value_head"] = table["value_head"].astype("Int64")  # none in a block without values of its own
        table["heads_per_value"] = table.groupby(["layer", "value_head"])["head"].transform("nunique").astype("Int64")
    measured: dict[str, Any] = {**why_not, **({"entropy_why_not": why_no_entropy} if why_no_entropy else {})}
    measured |= _values(by_input, table) if "value_ratio" in table else {}
    measured |= _sinks_and_outputs(by_input, table) if "output_ratio" in table else {}
    rises = scores = None
    if "output_ratio" in table:
        zeroed, rises, table = _without_heads(study, by_prompt, table, shares, draws, n_prompts, max_tokens)
        measured |= zeroed
        if rises is not None and tasks:
            chosen, _ = split_prompts(study, n_prompts)
            rankings = rank_heads(by_prompt[by_prompt["prompt"].isin(chosen)])
            try:
                scores = scores_without_heads(study, rankings, tasks, draws=draws, items=items)
                measured |= scores_as_metrics(scores)
            except MelensError as error:  # of a short context, say
                measured["scores_why_not"] = str(error)
    metrics = study.metrics(
        HeadsMetrics,
        **layout.metrics(),
        n_heads=len(table),
        inputs=by_input.index.get_level_values("first_token_id").nunique(),
        sink_heads=int(table["is_sink"].sum()),
        **measured,
    )
    figures, findings = _figures(study, table, rises, metrics), _findings(metrics)
    found = {"loss_without_heads": rises, "scores_without_heads": scores}
    tables = {"heads": table} | {name: own for name, own in found.items() if own is not None}
    return Result("heads", study.trace.model, metrics, tables, figures, findings)


def probes(model: TransformerBridge, **options: Any) -> list[Probe]:
    """Return what `heads` needs besides the default probes, as far as the model has it."""
    found: list[Probe] = [ValueNorms()] if Sites.of(model).find(ValueNorms.sites[0]) else []
    with suppress(MelensError):  # `_why_no_outputs` says it
        found.append(HeadOutputs(model))
    for probe in found:
        probe.may_miss = True
    return found


# --- What is measured of every head -----------------------------------------------------------------------------------


def _by_prompt(study: Study) -> tuple[pd.DataFrame, dict[str, str]]:
    """Lay out what the trace has of every head: `prompt`, `layer`, `head`, `sink_mass`, and if they can be had
    `output_norm`, `output_ratio`, `value_head`, `value_ratio`; and say why what is missing is missing."""
    found, why_not = study.traced(probes(study.model)), {}
    table = _checked(study.of_massive_prompts(found["sink_mass"]), "sink_mass")[["prompt", *_OF_HEAD, "sink_mass"]]
    if "head_outputs" in found.tables:
        outputs = _checked(found["head_outputs"], "output_norm_others").drop(columns=["site", "output_norm"])
        outputs = outputs.rename(columns={"output_norm_others": "output_norm"})
        table = table.merge(outputs, "left", ["prompt", *_OF_HEAD])
        mean = table.groupby(["prompt", "layer"])["output_norm"].transform("mean")
        table["output_ratio"] = table["output_norm"] / mean.where(mean > 0)
    else:
        why_not["outputs_why_not"] = why_not["zeroing_why_not"] = _why_no_outputs(study.model)
    if "value_norms" in found.tables:
        values = _checked(found["value_norms"], "value_norm", "value_norm_others").drop(columns="site")
        others = values["value_norm_others"]
        values["value_ratio"] = values["value_norm"] / others.where(others > 0)
        per_block = [each.groupby("layer")[name].nunique() for each, name in ((table, "head"), (values, "value_head"))]
        table["value_head"] = table["head"] // table["layer"].map(per_block[0] / per_block[1])
        wanted = ["prompt", "layer", "value_head", "value_ratio"]
        table = table.merge(values[wanted], "left", wanted[:3])
    else:
        why_not["values_why_not"] = "TransformerLens names no value vectors by head in this model's attention."
    return table, why_not


def _why_no_outputs(model: TransformerBridge) -> str:
    try:
        HeadOutputs(model)
    except MelensError as error:
        return str(error)
    return "No output of a head passed in the trace."


def _checked(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    for column in columns:  # before a mean leaves NaN out
        for row in table[~np.isfinite(table[column])].head(1).to_dict("records"):
            raise MelensError(
                f"The {column} of block {row['layer']} is {row[column]} in prompt {row['prompt']}: look for NaN in the "
                "model's weights, or load it in float32."
            )
    return table


def _by_input(study: Study, by_prompt: pd.DataFrame) -> pd.DataFrame:
    """Average over the prompts that share a first token, by `first_token_id`, `layer` and `head`."""
    first_tokens = study.trace.prompts.set_index("prompt")["first_token_id"]
    inputs = by_prompt.assign(first_token_id=by_prompt["prompt"].map(first_tokens)).drop(columns="prompt")
    return inputs.groupby(["first_token_id", *_OF_HEAD]).mean()


def _threshold(study: Study) -> float:
    """Return from which mean sink mass on a head has a sink: in short prompts even attention pays token 0 much."""
    lengths = study.of_massive_prompts(study.trace.prompts)["n_tokens"]
    return max(SINK_THRESHOLD, 2 * float(lengths.map(even_attention).mean()))


def _entropy(study: Study, n_tokens: int, n_prompts: int) -> tuple[pd.DataFrame, str | None]:
    """Measure the entropy of attention over its largest, log n on average over queries: `entropy`, `entropy_share`."""
    nothing = pd.DataFrame(index=pd.MultiIndex.from_tuples([], names=_OF_HEAD))
    if not Sites.of(study.model).find(AttentionEntropy.sites[0]):
        return nothing, "TransformerLens names no attention pattern in this model."
    chosen = prompts_of_length(study, n_tokens)[:n_prompts]
    if not chosen:
        return nothing, f"No prompt has {n_tokens} tokens (exp.entropy_tokens)."
    probe, progress = AttentionEntropy(), study.stage("entropy of attention (tokens)")
    probe.may_miss = True
    cut = [study.tokens[prompt][:n_tokens] for prompt in chosen]
    found = trace(study.model, cut, [probe], progress=progress, max_batch_tokens=n_tokens)[probe.name]
    entropy = _checked(found, "entropy").groupby(_OF_HEAD)["entropy"].mean()
    largest = float(np.log(np.arange(2, n_tokens + 1)).mean())
    return pd.DataFrame({"entropy": entropy, "entropy_share": entropy / largest}), None


# --- What it comes to -------------------------------------------------------------------------------------------------


def _values(by_input: pd.DataFrame, table: pd.DataFrame) -> dict[str, Any]:
    """Compare the values of token 0 with the others', in value heads that serve a sink head and in all others."""
    measured: dict[str, Any] = {"heads_per_value": sorted(set(table["heads_per_value"].dropna().tolist()))}
    by_value = by_input.join(table.set_index(_OF_HEAD)["is_sink"]).dropna(subset="value_ratio")
    by_value = by_value.groupby(["first_token_id", "layer", "value_head"]).agg(
        value_ratio=("value_ratio", "first"), serves_sink=("is_sink", "any")
    )
    of_sinks, others = (by_value[by_value["serves_sink"] == serves]["value_ratio"] for serves in (True, False))
    if len(others):
        measured["value_ratio_elsewhere"] = float(others.mean())
    if not len(of_sinks):
        return measured | {"values_why_not": f"No head has a mean sink mass over {SINK_THRESHOLD:g}."}
    share = float((of_sinks.groupby(["layer", "value_head"]).mean() <= DRAINED).mean())
    by_first_token = of_sinks.groupby("first_token_id").mean().to_numpy()
    return measured | mean_metric("value_drain", by_first_token) | {"value_drain_share": share}


def _sinks_and_outputs(by_input: pd.DataFrame, table: pd.DataFrame) -> dict[str, Any]:
    """Compare the strongest sink heads with the idlest ones, and sink mass with output norm over all heads."""
    from scipy.stats import hypergeom  # a third of a second, which few runs need

    ranked = table.dropna(subset="output_ratio")
    n, k = len(ranked), count_of(COMPARED, len(ranked))
    strongest, idlest = ranked.nlargest(k, "sink_mass"), ranked.nsmallest(k, "output_ratio")
    overlap = len(strongest.index.intersection(idlest.index))
    places = pd.MultiIndex.from_frame(strongest[_OF_HEAD])
    of_strongest = by_input[by_input.reset_index(0).index.isin(places)]["output_ratio"]
    measured = {
        "compared_heads": k,
        "overlap": overlap,
        "overlap_by_chance": k * k / n,
        "overlap_p": float(hypergeom.sf(overlap - 1, n, k, k)),
        **mean_metric("sink_output", of_strongest.groupby("first_token_id").mean().to_numpy()),
    }
    both = by_input[["sink_mass", "output_ratio"]].dropna()
    over_all = both.groupby("first_token_id").apply(_spearman)
    within = both.groupby(["first_token_id", "layer"]).apply(_spearman).dropna()
    if over_all.isna().any() or not len(within):
        return measured | {"correlation_why_not": "All heads of a block are alike: a rank correlation takes two."}
    measured |= mean_metric("rank_correlation", over_all.to_numpy())
    return measured | mean_metric("rank_correlation_within", within.groupby("first_token_id").mean().to_numpy())


def _spearman(of_heads: pd.DataFrame) -> float:
    ranks = of_heads.rank()
    is_alike = (ranks.nunique() < 2).any()
    return float("nan") if is_alike else float(np.corrcoef(ranks["sink_mass"], ranks["output_ratio"])[0, 1])


def _without_heads(
    study: Study,
    by_prompt: pd.DataFrame,
    table: pd.DataFrame,
    shares: Sequence[float],
    draws: int,
    n_prompts: int,
    max_tokens: int,
) -> tuple[dict[str, Any], pd.DataFrame | None, pd.DataFrame]:
    """Set heads to zero; return metrics, the rises of the loss, and the table with the ranks that chose the heads."""
    chosen, held_out = split_prompts(study, n_prompts)
    if not held_out:
        why_not = "It takes two prompts: one to choose heads on, another to measure the loss on."
        return {"zeroing_why_not": why_not}, None, table
    rankings = rank_heads(by_prompt[by_prompt["prompt"].isin(chosen)])
    every = sorted({*shares, COMPARED})
    intact, rises = without_heads(study, rankings, held_out, every, draws=draws, max_tokens=max_tokens)
    ranks = {f"{name}_rank": _ranks(rankings[of]) for name, of in (("idle", IDLE), ("sink", SINKS))}
    longest = max(min(len(study.tokens[prompt]), max_tokens) for prompt in held_out)
    measured = {"chosen_on": len(chosen), "texts": len(held_out), "tokens_per_text": longest}
    table = table.join(pd.DataFrame(ranks), on=_OF_HEAD)
    return measured | rises_as_metrics(intact, rises), rises, table


def _ranks(ranking: Heads) -> pd.Series:
    return pd.Series(range(1, len(ranking) + 1), pd.MultiIndex.from_tuples(ranking, names=_OF_HEAD))


# --- Figures and words ------------------------------------------------------------------------------------------------


def _figures(study: Study, table: pd.DataFrame, rises: pd.DataFrame | None, metrics: HeadsMetrics) -> dict[str, Figure]:
    figures = {"head_map": _head_map(study, table, metrics)}
    if "output_ratio" in table:
        figures["output_over_sinks"] = _output_over_sinks(study, table, metrics)
    if rises is not None:
        colors = {IDLE: OTHERS, SINKS: SINK, RANDOM: COLORS[6]}
        note = f"Rise over the intact model's {metrics.loss:.2f}; heads chosen on {metrics.chosen_on} other prompts. "
        note += "Whiskers: 95% intervals over prompts, of random heads over draws as well."
        title = study.title("Loss without some heads", metrics.texts)
        plot = loss_without_heads(losses_by_share(rises), colors, title=title, note=note)
        expected = "More than a tenth of the heads can be set to zero with little loss: those that write least."
        source = "Sandoval-Segura et al. (2025)"
        figures["loss_without_heads"] = Figure(plot, source, expected, _losses_in_words(metrics))
    return figures


def _head_map(study: Study, table: pd.DataFrame, metrics: HeadsMetrics) -> Figure:
    titles = {
        "sink_mass": "Sink mass",
        "entropy_share": "Entropy of attention over its largest",
        "output_ratio": "Output norm over its block's mean",
        "value_ratio": "‖v‖ of token 0 over the others'",
    }
    maps = {}
    for column in (name for name in titles if name in table):
        wide = table.pivot(index="head", columns="layer", values=column)
        wide = wide.reindex(columns=range(study.n_layers))
        maps[column] = Heatmap(titles[column], wide.to_numpy(), list(wide.columns), list(wide.index), BLOCK, "head")
    shares, ratios = ([maps[name] for name in names if name in maps] for names in (list(titles)[:2], list(titles)[2:]))
    note = "Framed: the ME layer. " * (study.me.layer is not None) + _missing_in_words(metrics)
    if metrics.heads_per_value not in ([], [1]):
        served = " or ".join(map(str, metrics.heads_per_value))
        note += f"A value head serves {served} heads, which have its colour."
    plot = head_maps(
        shares,
        ratios,
        me_layer=study.me.layer,
        title=study.title("Sinks, entropy, outputs and values by head"),
        note=note,
    )
    expected = "At sinks values drain, and sink heads write little."
    observed = f"{metrics.sink_heads} of {metrics.n_heads} heads have a mean sink mass over {_threshold(study):.2g}. "
    return Figure(plot, "Guo et al. (2024)", expected, observed + _values_in_words(metrics))


def _missing_in_words(metrics: HeadsMetrics) -> str:
    reasons = (metrics.values_why_not, metrics.outputs_why_not, metrics.entropy_why_not)
    return "".join(f"{reason} " for reason in reasons if reason)


def _output_over_sinks(study: Study, table: pd.DataFrame, metrics: HeadsMetrics) -> Figure:
    points = table.dropna(subset="output_ratio").rename(columns={"sink_mass": "x", "output_ratio": "y"})
    assert metrics.compared_heads is not None
    is_sink = points["x"].rank(ascending=False, method="first") <= metrics.compared_heads
    is_idle = points["y"].rank(method="first") <= metrics.compared_heads
    groups = {
        "other heads": points[~is_sink & ~is_idle],
        f"among the {metrics.compared_heads} strongest sinks": points[is_sink & ~is_idle],
        f"among the {metrics.compared_heads} idlest": points[is_idle & ~is_sink],
        "both": points[is_sink & is_idle],
    }
    shown = {name: own for name, own in groups.items() if len(own)}
    colors = dict(zip(groups, (COLORS[6], SINK, OTHERS, FIRST), strict=True))
    plot = head_points(
        shown, [colors[name] for name in shown], x_title="sink mass", y_title=_OUTPUT,
        title=study.title("Sink heads and idle heads"), note="A point a head: means over prompts.",
    )  # fmt: skip
    expected = "Heads with a strong sink are dormant: they write little."
    return Figure(plot, "Guo et al. (2024)", expected, _sinks_in_words(metrics))


def _findings(metrics: HeadsMetrics) -> list[tuple[str, str]]:
    findings = [
        ("values of token 0", _values_in_words(metrics)),
        ("sink heads", _sinks_in_words(metrics)),
        ("heads set to zero", _losses_in_words(metrics)),
        ("benchmarks then", scores_in_words(metrics)),
    ]
    return [*findings, ("entropy", metrics.entropy_why_not)] if metrics.entropy_why_not else findings


def _values_in_words(metrics: HeadsMetrics) -> str:
    if metrics.value_drain is None:
        return metrics.values_why_not or ""
    drain = with_interval(metrics.value_drain, metrics.value_drain_interval, ".2f")
    words = f"Where a head has a sink, token 0's value vector is {drain} times as long as other tokens'"
    if metrics.value_ratio_elsewhere is not None:
        words += f", in all other value heads {metrics.value_ratio_elsewhere:.2f} times"
    return f"{words}."


def _sinks_in_words(metrics: HeadsMetrics) -> str:
    m = metrics
    if m.sink_output is None:
        return m.outputs_why_not or ""
    words = f"The tenth of heads with the strongest sinks ({counted(m.compared_heads or 0, 'head')}) writes "
    words += f"{with_interval(m.sink_output, m.sink_output_interval, '.2f')} times as much as a head of its block on "
    words += f"average; {m.overlap} of them are in the tenth that writes least (by chance {m.overlap_by_chance:.1f}, "
    words += f"p = {m.overlap_p:.2g})."
    if m.rank_correlation is None or m.rank_correlation_within is None:
        return f"{words} {m.correlation_why_not}"
    correlation = with_interval(m.rank_correlation, m.rank_correlation_interval, ".2f")
    within = with_interval(m.rank_correlation_within, m.rank_correlation_within_interval, ".2f")
    return f"{words} Rank correlation of sink mass and output norm: {correlation}, within blocks {within}."


def _losses_in_words(metrics: HeadsMetrics) -> str:
    m, tenth = metrics, f"{COMPARED:g}"
    if m.dloss_idle_tenth is None or not (m.zeroed_heads and m.dloss_sinks and m.dloss_random):
        return m.zeroing_why_not or ""
    rise = with_interval(m.dloss_idle_tenth, m.dloss_idle_tenth_interval, "+.3f")
    words = f"Without the tenth that writes least ({counted(m.zeroed_heads[tenth], 'head')}) the loss of {m.loss:.2f} "
    words += f"changes by {rise} nats a token, without as many random heads by {m.dloss_random[tenth]:+.3f}, "
    return f"{words}without the strongest sinks by {m.dloss_sinks[tenth]:+.3f}."
