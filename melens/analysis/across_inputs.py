"""Whether the ME layer is the same for every kind of input, and what moves the massive token (figure 10, appendix D).

    result = melens.analysis.stability(study)
    result.metrics.least_agreement   # of the task type or length in which fewest prompts have the ME layer

1. The study's own trace gives the block of each prompt's massive token: grouped by task type and by length.
2. The same trace is read by other criteria: with other ratios to the median (`criterion_ratios`).
3. The shortest prompts are then run with other beginnings: other first tokens, prefixes, delimiters, BOS.

A massive token 0 depends on itself alone, so that prompts which share it count as one state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise, repeat
from typing import Any

import numpy as np
import pandas as pd
import torch

from melens.analysis.criterion_ratios import verdicts_by_ratio
from melens.analysis.me_layer import find_me_layer, one_a_state
from melens.analysis.statistics import share_interval
from melens.analysis.study import Study
from melens.claims.engine import Claim, Former, Judgement, NotMeasuredError, Verdict, at_least, unless_trivial
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.heatmaps import shares
from melens.figures.style import COLORS
from melens.report.result import Figure, Interval, Metrics, Result
from melens.tracing.trace import default_probes, trace

__all__ = ["CLAIMS", "StabilityMetrics", "stability"]

PREFIXES = ("In other words, ", "Please read this carefully. ", "\n\n")
DELIMITERS = (".", ",", "\n", ":")


class StabilityMetrics(Metrics):
    """What `stability` measures.

    Attributes:
        least_agreement: the smallest share of prompts with the ME layer of all, over task types and lengths.
        n_tasks, n_length_bins: how many of them have prompts.
        agreement_by_group: that share by task type and by length.
        weakest_group, weakest_share, weakest_share_interval, weakest_states: the task type or length whose share of
            states with the ME layer of all has the interval that begins lowest; that share; and of how many states.
        groups_with_another_layer: the groups in which another block, or none, is the most frequent.
        positions_by_beginning: by other beginning, the share of first tokens with which the massive token is at
            position 0.
        me_layer_by_ratio: the ME layer by the criterion's ratio to the median.
        changed_by_ratio: the claims, of those that need the study's trace alone, whose verdict is then another.
    """

    experiment = "stability"
    least_agreement: float | None = None
    least_agreement_interval: Interval | None = None
    n_tasks: int = 0
    n_length_bins: int = 0
    agreement_by_group: dict[str, float] | None = None
    weakest_group: str | None = None
    weakest_share: float | None = None
    weakest_share_interval: Interval | None = None
    weakest_states: int | None = None
    groups_with_another_layer: list[str] | None = None
    positions_by_beginning: dict[str, float] | None = None
    me_layer_by_ratio: dict[str, int | None] | None = None
    changed_by_ratio: dict[str, list[str]] | None = None


def stability(
    study: Study,
    *,
    length_bins: Sequence[int] = (30, 100, 300),
    n_prompts: int = 8,
    max_tokens: int = 32,
    n_first_tokens: int = 8,
    min_ratios: Sequence[float | int] = (500, 750, 1_000, 2_000),
    judge_all: bool = False,
) -> Result:
    """Group the prompts by task type and length, read them by other criteria, change how the shortest of them begin.

    Args:
        study: as `melens.study` makes it.
        length_bins: rising numbers of tokens at which one group of prompts ends and the next begins.
        n_prompts: how many of the shortest get other beginnings.
        max_tokens: of each of them.
        n_first_tokens: how many random tokens are put in place of, and before, the first.
        min_ratios: in place of the criterion's, which is 1,000 by default.
        judge_all: whether, where another ratio finds another ME layer, sinks, ablation, consequence and predict are
            judged again too, which takes their passes anew.

    Returns:
        Metrics `StabilityMetrics`; the figures `norms_by_task` and `agreement` (figure 10), and `beginnings`; the
        tables `me_layer_by_criterion` and, where some prompt differs, `verdicts_by_criterion`.

    Raises:
        MelensError: as `melens.trace`.

    Example:
        >>> result = melens.analysis.stability(study, n_prompts=1, n_first_tokens=2, min_ratios=[1000])
        >>> result.metrics.least_agreement  # of the task types and lengths: the share of prompts with this ME layer
        1.0
    """
    prompts = study.trace.prompts.merge(study.me.per_prompt, on="prompt")
    names = [f"{low + 1}-{high} tokens" for low, high in pairwise((0, *length_bins))]
    names.append(f"over {(0, *length_bins)[-1]} tokens")
    length = pd.cut(prompts["n_tokens"], [0, *length_bins, np.inf], labels=names).astype(str)
    bins = [name for name in names if name in set(length)]
    prompts = prompts.assign(length=length, task=prompts["task"].fillna("not given"))
    groups = _agreement(study, prompts, bins)
    beginnings = _beginnings(study, n_prompts, max_tokens, n_first_tokens)
    by_ratio = verdicts_by_ratio(study, min_ratios, judge_all=judge_all)
    least = groups.iloc[groups["agreement"].argmin()]
    metrics = study.metrics(
        StabilityMetrics,
        **_weakest(study, groups, least),
        n_tasks=prompts["task"].nunique(),
        n_length_bins=prompts["length"].nunique(),
        agreement_by_group=dict(zip(groups["group"], groups["agreement"], strict=True)),
        positions_by_beginning=dict(zip(beginnings["beginning"], beginnings["at_first"], strict=True)),
        me_layer_by_ratio=by_ratio.me_layers,
        changed_by_ratio=by_ratio.changed,
    )
    agreement = _agreement_in_words(study, groups, least)
    figures = {
        "norms_by_task": _norms_figure(study, prompts, bins, agreement),
        "agreement": _agreement_figure(study, groups, agreement),
        "beginnings": _beginnings_figure(study, beginnings, min(n_prompts, len(study.tokens))),
    }
    findings = [("task types and lengths", agreement), ("other beginnings", figures["beginnings"].observed)]
    tables = {"agreement_by_group": groups, "beginnings": beginnings}
    if min_ratios:
        findings.append(("other thresholds", by_ratio.in_words()))
        tables["me_layer_by_criterion"] = by_ratio.layers
    if len(by_ratio.verdicts):
        tables["verdicts_by_criterion"] = by_ratio.verdicts
    return Result("stability", study.trace.model, metrics, tables, figures, findings)


# --- By task type and length ------------------------------------------------------------------------------------------


def _agreement(study: Study, prompts: pd.DataFrame, bins: Sequence[str]) -> pd.DataFrame:
    """List by task type and by length how many prompts have the ME layer of all.

    Returns:
        `kind`, `group`, `n_prompts`; `n_agreeing`, how many have the ME layer of all, and `agreement`, their share;
        `me_layer`, the group's own: the block where most of its massive tokens are born, NA if most have none;
        `states`, and their `share` with the ME layer of all, with its exact interval `low` to `high`.
    """
    rows = []
    groups = (*(("task", task) for task in sorted(set(prompts["task"]))), *(("length", name) for name in bins))
    for kind, group in groups:
        of_group = prompts[prompts[kind] == group]
        states = one_a_state(of_group)
        agrees = (states["layer"] == study.me.layer).to_numpy()
        most_frequent = int(states["layer"].mode().iloc[0])  # -1 stands for prompts without a massive token
        own = most_frequent if most_frequent >= 0 else None
        n_agreeing = int((of_group["layer"] == study.me.layer).sum())
        share = (float(agrees.mean()), *share_interval(agrees))
        rows.append((kind, group, len(of_group), n_agreeing, own, n_agreeing / len(of_group), len(states), *share))
    columns = [
        "kind", "group", "n_prompts", "n_agreeing", "me_layer", "agreement", "states", "share", "low", "high",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns).astype({"me_layer": "Int64"})


def _weakest(study: Study, groups: pd.DataFrame, least: pd.Series) -> dict[str, Any]:
    """Pick the group that agrees least, and the one whose interval begins lowest: of equal shares that of fewest."""
    if study.me.layer is None:
        return {}
    weakest = groups.iloc[groups["low"].argmin()]
    return {
        "least_agreement": float(least["agreement"]),
        "least_agreement_interval": share_interval(np.arange(least["n_prompts"]) < least["n_agreeing"]),
        "weakest_group": str(weakest["group"]),
        "weakest_share": float(weakest["share"]),
        "weakest_share_interval": (float(weakest["low"]), float(weakest["high"])),
        "weakest_states": int(weakest["states"]),
        "groups_with_another_layer": groups[(groups["me_layer"] != study.me.layer).fillna(True)]["group"].tolist(),
    }


def _norms_figure(study: Study, prompts: pd.DataFrame, bins: Sequence[str], observed: str) -> Figure:
    norms = study.trace["norm"].query("site == 'hook_resid_post' and pos == 0")
    norms = norms.rename(columns={"norm": "mean"}).merge(prompts[["prompt", "task", "length"]], on="prompt")
    panels = []
    for kind, title, groups, colors in (
        ("task", "By task type", sorted(norms["task"].unique()), COLORS),
        ("length", "By length", bins, COLORS[4:]),
    ):
        curves = []
        for group, color in zip(groups, chain(colors, repeat(COLORS[-1])), strict=False):
            for number, (_, points) in enumerate(norms[norms[kind] == group].groupby("prompt")):
                curves.append(Curve(group, points[["layer", "mean"]], color, in_legend=number == 0, thin=True))
        panels.append(Panel(title, "L2 norm of token 0", curves, study.me.layer, log_scale=True))
    distinct = study.me.distinct_first_tokens
    trivial = ", so the curves are the same by construction" if distinct == 1 else ""
    note = f"One line a prompt; {distinct} distinct first token{'s' if distinct > 1 else ''}{trivial}."
    title = study.title("Norm of token 0 after each block", study.me.n_prompts)
    expected = "The same ME layer for four task types and lengths from about 10 to over 1,000 tokens."
    return Figure(curves_by_block(panels, title=title, note=note), "figure 10", expected, observed)


def _agreement_figure(study: Study, groups: pd.DataFrame, observed: str) -> Figure:
    rows = [f"{row['group']} (n = {row['n_prompts']})" for row in groups.to_dict("records")]
    agrees = groups["agreement"].to_numpy()
    table = pd.DataFrame({"agrees": agrees, "other": 1 - agrees}, index=rows)
    names = ("no ME layer" if study.me.layer is None else f"ME layer {study.me.layer}", "another layer, or none")
    title = study.title("Share of prompts with the ME layer of all", study.me.n_prompts)
    plot = shares(table, names=names, title=title, note="By task type and by length; blocks are 0-based.")
    return Figure(plot, "figure 10, table", "The ME layer is the same for every type and length.", observed)


def _agreement_in_words(study: Study, groups: pd.DataFrame, least: pd.Series) -> str:
    if study.me.layer is None:
        return "No prompt type has an ME layer."
    if least["agreement"] == 1:
        words = f"Block {study.me.layer} in every prompt of every task type and length"
        if study.me.distinct_first_tokens == 1 and study.position == 0:
            return f"{words}, which is trivial: all share their first token, whose states are the same by construction."
        return f"{words}."
    elsewhere = groups[(groups["me_layer"] != study.me.layer).fillna(True)]["group"].tolist()
    where = f"of every group but {', '.join(elsewhere)}" if elsewhere else "of every group of prompts"
    lowest = f"{least['group']}, {least['agreement']:.0%} of {least['n_prompts']} prompts"
    return f"Block {study.me.layer} is the most frequent ME layer {where}; fewest prompts agree for {lowest}."


# --- Other beginnings -------------------------------------------------------------------------------------------------


def _beginnings(study: Study, n_prompts: int, max_tokens: int, n_first_tokens: int) -> pd.DataFrame:
    """Change how the shortest prompts begin, and see where their massive token is then.

    Returns:
        `beginning`; `n`, how many first tokens were tried, each in `sequences` / `n` of them; the shares of first
        tokens with which it is most often `at_first` (with the exact interval `low` to `high`), `elsewhere` and nowhere
        (`none`); and `same_layer`: of those with a massive token, the share in which it is born in the ME layer.
    """
    shortest = sorted((ids.tolist() for ids in study.tokens), key=len)[:n_prompts]
    variants = _variants(study, [ids[:max_tokens] for ids in shortest], n_first_tokens)
    tokens = [torch.tensor(ids[: study.model.cfg.n_ctx]) for sequences in variants.values() for ids in sequences]
    probes = default_probes(study.model, min_abs=study.me.criterion.min_abs)
    progress = study.stage("prompts that begin otherwise (tokens)")
    found = trace(study.model, tokens, probes, max_batch_tokens=study.max_batch_tokens, progress=progress)
    per_prompt = find_me_layer(found, study.me.criterion).per_prompt
    beginnings = [name for name, sequences in variants.items() for _ in sequences]
    is_born = per_prompt["layer"] >= 0
    at_first = is_born & (per_prompt["pos"] == 0)
    where = np.select([at_first, is_born], ["at_first", "elsewhere"], "none")
    table = per_prompt.assign(beginning=beginnings, where=where, first=[int(ids[0]) for ids in tokens])
    rows = []
    for name, of_beginning in table.groupby("beginning", sort=False):
        # a massive token 0 depends on itself alone: sequences that share it are one state
        by_first = of_beginning.groupby("first")["where"].agg(lambda each: each.mode().iloc[0]).to_numpy()
        shares = [float((by_first == place).mean()) for place in ("at_first", "elsewhere", "none")]
        born = of_beginning[of_beginning["layer"] >= 0]
        same_layer = float((born["layer"] == study.me.layer).mean())  # NaN where none is born
        n, interval = len(by_first), share_interval(by_first == "at_first")
        rows.append((f"{name} (n = {n})", n, len(of_beginning), *shares, *interval, same_layer))
    columns = ["beginning", "n", "sequences", "at_first", "elsewhere", "none", "low", "high", "same_layer"]
    return pd.DataFrame(rows, columns=columns)


def _variants(study: Study, bodies: list[list[int]], n_first_tokens: int) -> dict[str, list[list[int]]]:
    tokenizer, vocabulary = study.model.tokenizer, study.model.cfg.d_vocab
    generator = torch.Generator().manual_seed(study.seed)
    bos = None if tokenizer is None else tokenizer.bos_token_id

    def begin(ids: list[int], tokens: list[int]) -> list[int]:
        """Put tokens before a prompt, behind the BOS that it begins with."""
        return [bos, *tokens, *ids[1:]] if bos is not None and ids[0] == bos else [*tokens, *ids]

    firsts = torch.randint(vocabulary, (n_first_tokens,), generator=generator).tolist()
    variants = {
        "as it is": bodies,
        "another first token": [[first, *ids[1:]] for ids in bodies for first in firsts],
        "random token prepended": [begin(ids, [first]) for ids in bodies for first in firsts],
    }
    if tokenizer is None:
        return variants
    prefixes = [tokenizer(prefix, add_special_tokens=False)["input_ids"] for prefix in PREFIXES]
    # some tokenizers put a token of their own before a lone mark: the last one is the mark
    delimiters = [tokenizer(mark, add_special_tokens=False)["input_ids"][-1:] for mark in DELIMITERS]
    variants["prefix prepended"] = [begin(ids, prefix) for ids in bodies for prefix in prefixes]
    variants["delimiter prepended"] = [begin(ids, mark) for ids in bodies for mark in delimiters]
    if bos is not None:
        variants["BOS prepended"] = [[bos, *ids] for ids in bodies if ids[0] != bos]
        variants["without BOS"] = [ids[1:] for ids in bodies if ids[0] == bos and len(ids) > 2]
    return {name: sequences for name, sequences in variants.items() if sequences}


def _beginnings_figure(study: Study, beginnings: pd.DataFrame, n_prompts: int) -> Figure:
    table = beginnings.set_index("beginning")[["at_first", "elsewhere", "none"]]
    names = ("position 0", "another position", "no massive token")
    title = study.title("Where the massive token is when a prompt begins otherwise", n_prompts)
    note = "Share of first tokens, n of them. What is prepended goes behind BOS, where prompts begin with it."
    plot = shares(table, names=names, title=title, note=note)
    expected = "Inputs begin as they come: what the first token is, is not varied."
    least = beginnings.iloc[beginnings["at_first"].argmin()]
    observed = f"The massive token is at position 0 least often with '{least['beginning']}': {least['at_first']:.0%}; "
    observed += f"elsewhere in {least['elsewhere']:.0%}, nowhere in {least['none']:.0%}."
    if least["at_first"] == 1:
        observed = "Whatever the prompts begin with, the massive token is at position 0."
    if study.me.layer is None:
        observed = "Without massive activations no beginning makes a difference."
    return Figure(plot, "beyond the paper", expected, observed)


# --- Claims -----------------------------------------------------------------------------------------------------------


def _same_everywhere(metrics: StabilityMetrics) -> Judgement:
    _check_kinds(metrics)
    judged = at_least(metrics.weakest_share, metrics.weakest_share_interval, 0.5)
    note = f"Least clear for {metrics.weakest_group}, of {metrics.weakest_states} first tokens."
    if elsewhere := metrics.groups_with_another_layer:
        note = f"Another block, or none, is the most frequent for {', '.join(elsewhere)}."
    verdict: Verdict = "holds" if judged.verdict == "holds" else "does not hold" if elsewhere else "holds in part"
    judged = replace(judged, verdict=verdict, note=note)
    return judged if metrics.massive_position != 0 else unless_trivial(metrics, judged)


def _check_kinds(metrics: StabilityMetrics) -> None:
    if metrics.n_tasks < 2 or metrics.n_length_bins < 2:
        raise NotMeasuredError("It takes prompts of at least two task types and two lengths.")


def _same_in_95_percent(metrics: StabilityMetrics) -> Judgement:
    _check_kinds(metrics)
    judged = at_least(metrics.least_agreement, metrics.least_agreement_interval, 0.95, partly=0.5)
    return judged if metrics.massive_position != 0 else unless_trivial(metrics, judged)


CLAIMS = (
    Claim(
        id="same-layer", fixed="2026-11-26 25a77c7",
        source="appendix D, figure 10", figure="norms_by_task", metrics=StabilityMetrics,
        claim="The ME layer is the same for all task types and lengths",
        statistic="share of first tokens with that ME layer, in the task type or length whose exact interval begins "
        "lowest",
        criterion="> 0.5, the whole interval; in part: it is the most frequent in every task type and length",
        why="a group's ME layer is the block in which most of its prompts are first massive: over half are enough; 9 "
        "of 9 show that (0.66 to 1), 5 of 5 do not (0.48)",
        judge=_same_everywhere,
        former=Former("≥ 0.95; in part ≥ 0.5", "2026-11-22 a1bbeb3", _same_in_95_percent),
    ),
)  # fmt: skip
