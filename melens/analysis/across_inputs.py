"""Whether the ME layer is the same for every kind of input, and what moves the massive token (figure 10, appendix D).

    result = melens.analysis.stability(study)
    result.metrics.least_agreement   # of the task type or length in which fewest prompts have the ME layer

1. The study's own trace gives the block of each prompt's massive token: grouped by task type and by length.
2. The shortest prompts are then run with other beginnings: other first tokens, prefixes, delimiters, BOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
import pandas as pd
import torch

from melens.analysis.me_layer import find_me_layer
from melens.analysis.statistics import share_interval
from melens.analysis.study import Study
from melens.claims.engine import Claim, Judgement, at_least, unless_trivial
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.scores import shares
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
        positions_by_beginning: by other beginning, the share of prompts whose massive token is at position 0.
    """

    experiment = "stability"
    least_agreement: float | None = None
    least_agreement_interval: Interval | None = None
    n_tasks: int = 0
    n_length_bins: int = 0
    agreement_by_group: dict[str, float] | None = None
    positions_by_beginning: dict[str, float] | None = None


def stability(
    study: Study,
    *,
    length_bins: Sequence[int] = (30, 100, 300),
    n_prompts: int = 8,
    max_tokens: int = 32,
    n_first_tokens: int = 8,
) -> Result:
    """Group the prompts by task type and length, then change how the shortest of them begin.

    Args:
        study: as `melens.study` makes it.
        length_bins: rising numbers of tokens at which one group of prompts ends and the next begins.
        n_prompts: how many of the shortest get other beginnings.
        max_tokens: of each of them.
        n_first_tokens: how many random tokens are put in place of, and before, the first.

    Returns:
        Metrics `StabilityMetrics`; the figures `norms_by_task` and `agreement` (figure 10), and `beginnings`.

    Raises:
        MelensError: as `melens.trace`.
    """
    prompts, names = study.trace.prompts.merge(study.me.per_prompt, on="prompt"), _bin_names(length_bins)
    length = pd.cut(prompts["n_tokens"], [0, *length_bins, np.inf], labels=names).astype(str)
    bins = [name for name in names if name in set(length)]
    prompts = prompts.assign(length=length, task=prompts["task"].fillna("not given"))
    groups = _agreement(study, prompts, bins)
    beginnings = _beginnings(study, n_prompts, max_tokens, n_first_tokens)
    least, least_agreement = groups.iloc[groups["agreement"].argmin()], dict[str, Any]()
    if study.me.layer is not None:
        interval = (float(least["low"]), float(least["high"]))
        least_agreement = {"least_agreement": float(least["agreement"]), "least_agreement_interval": interval}
    metrics = study.metrics(
        StabilityMetrics,
        **least_agreement,
        n_tasks=prompts["task"].nunique(),
        n_length_bins=prompts["length"].nunique(),
        agreement_by_group=dict(zip(groups["group"], groups["agreement"], strict=True)),
        positions_by_beginning=dict(zip(beginnings["beginning"], beginnings["at_first"], strict=True)),
    )
    agreement = _agreement_in_words(study, groups, least)
    figures = {
        "norms_by_task": _norms_figure(study, prompts, bins, agreement),
        "agreement": _agreement_figure(study, groups, agreement),
        "beginnings": _beginnings_figure(study, beginnings, min(n_prompts, len(study.tokens))),
    }
    findings = [("task types and lengths", agreement), ("other beginnings", figures["beginnings"].observed)]
    tables = {"agreement_by_group": groups, "beginnings": beginnings}
    return Result("stability", study.trace.model, metrics, tables, figures, findings)


# --- By task type and length ------------------------------------------------------------------------------------------


def _bin_names(edges: Sequence[int]) -> list[str]:
    lows = [1, *(edge + 1 for edge in edges)]
    return [f"{low}-{high} tokens" for low, high in zip(lows, edges, strict=False)] + [f"over {lows[-1] - 1} tokens"]


def _agreement(study: Study, prompts: pd.DataFrame, bins: Sequence[str]) -> pd.DataFrame:
    """List by task type and by length how many prompts have the ME layer of all: `agreement` with its interval.

    `me_layer` is the group's own: the block where most of its massive tokens are born, NA if most have none.
    """
    rows = []
    groups = (*(("task", task) for task in sorted(set(prompts["task"]))), *(("length", name) for name in bins))
    for kind, group in groups:
        layers = prompts.loc[prompts[kind] == group, "layer"]
        agrees = (layers == study.me.layer).to_numpy(dtype=float)
        most_frequent = int(layers.mode().iloc[0])  # -1 stands for prompts without a massive token
        own = most_frequent if most_frequent >= 0 else None
        rows.append((kind, group, len(layers), own, float(agrees.mean()), *share_interval(agrees)))
    columns = ["kind", "group", "n_prompts", "me_layer", "agreement", "low", "high"]
    return pd.DataFrame(rows, columns=columns).astype({"me_layer": "Int64"})


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
                curves.append(Curve(group, points[["layer", "mean"]], color, in_legend=number == 0))
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
        return f"Block {study.me.layer} in every prompt of every task type and length."
    elsewhere = groups[(groups["me_layer"] != study.me.layer).fillna(True)]["group"].tolist()
    where = f"in every group but {', '.join(elsewhere)}" if elsewhere else "in every group"
    lowest = f"{least['group']}, {least['agreement']:.0%} of {least['n_prompts']} prompts"
    return f"Block {study.me.layer} is the most frequent {where}; agreement is lowest for {lowest}."


# --- Other beginnings -------------------------------------------------------------------------------------------------


def _beginnings(study: Study, n_prompts: int, max_tokens: int, n_first_tokens: int) -> pd.DataFrame:
    """Change how the shortest prompts begin, and see where their massive token is then.

    Returns:
        `beginning`, `n` (sequences run), the shares `at_first`, `elsewhere` and `none`, and `same_layer`: of those with
        a massive token, the share in which it is born in the ME layer.
    """
    shortest = sorted((ids.tolist() for ids in study.tokens), key=len)[:n_prompts]
    variants = _variants(study, [ids[:max_tokens] for ids in shortest], n_first_tokens)
    tokens = [torch.tensor(ids[: study.model.cfg.n_ctx]) for sequences in variants.values() for ids in sequences]
    probes = default_probes(study.model, min_abs=study.me.criterion.min_abs)
    progress = study.stage("other beginnings: tokens")
    found = trace(study.model, tokens, probes, max_batch_tokens=study.max_batch_tokens, progress=progress)
    per_prompt = find_me_layer(found, study.me.criterion).per_prompt
    beginnings = [name for name, sequences in variants.items() for _ in sequences]
    rows = []
    for name, of_beginning in per_prompt.assign(beginning=beginnings).groupby("beginning", sort=False):
        n, born = len(of_beginning), of_beginning[of_beginning["layer"] >= 0]
        at_first = float((born["pos"] == 0).sum() / n) if len(born) else 0.0
        same_layer = float((born["layer"] == study.me.layer).mean())  # NaN where none is born
        rows.append((f"{name} (n = {n})", n, at_first, len(born) / n - at_first, 1 - len(born) / n, same_layer))
    return pd.DataFrame(rows, columns=["beginning", "n", "at_first", "elsewhere", "none", "same_layer"])


def _variants(study: Study, bodies: list[list[int]], n_first_tokens: int) -> dict[str, list[list[int]]]:
    tokenizer, vocabulary = study.model.tokenizer, study.model.cfg.d_vocab
    generator = torch.Generator().manual_seed(study.seed)
    firsts = torch.randint(vocabulary, (n_first_tokens,), generator=generator).tolist()
    variants = {
        "as it is": bodies,
        "another first token": [[first, *ids[1:]] for ids in bodies for first in firsts],
        "random token prepended": [[first, *ids] for ids in bodies for first in firsts],
    }
    if tokenizer is None:
        return variants
    prefixes = [tokenizer(prefix, add_special_tokens=False)["input_ids"] for prefix in PREFIXES]
    # some tokenizers put a token of their own before a lone mark: the last one is the mark
    delimiters = [tokenizer(mark, add_special_tokens=False)["input_ids"][-1:] for mark in DELIMITERS]
    variants["prefix prepended"] = [[*prefix, *ids] for ids in bodies for prefix in prefixes]
    variants["delimiter prepended"] = [[*mark, *ids] for ids in bodies for mark in delimiters]
    bos = tokenizer.bos_token_id
    if bos is not None:
        variants["BOS prepended"] = [[bos, *ids] for ids in bodies if ids[0] != bos]
        variants["without BOS"] = [ids[1:] for ids in bodies if ids[0] == bos and len(ids) > 2]
    return {name: sequences for name, sequences in variants.items() if sequences}


def _beginnings_figure(study: Study, beginnings: pd.DataFrame, n_prompts: int) -> Figure:
    table = beginnings.set_index("beginning")[["at_first", "elsewhere", "none"]]
    names = ("position 0", "another position", "no massive token")
    title = study.title("Where the massive token is when a prompt begins otherwise", n_prompts)
    plot = shares(table, names=names, title=title, note="Share of prompts; n: how many were run.")
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
    if metrics.n_tasks < 2 or metrics.n_length_bins < 2:
        return Judgement("not measured", note="It takes prompts of at least two task types and two lengths.")
    judged = at_least(metrics.least_agreement, metrics.least_agreement_interval, 0.95, partly=0.5)
    return judged if metrics.massive_position != 0 else unless_trivial(metrics, judged)


CLAIMS = (
    Claim(
        id="same-layer", fixed="2026-11-22 a1bbeb3",
        source="appendix D, figure 10", figure="norms_by_task", metrics=StabilityMetrics,
        claim="The ME layer is the same for all task types and lengths",
        statistic="smallest share of prompts with that ME layer in any task type or length",
        criterion=">= 0.95; in part >= 0.5", why="1 in 20 may differ",
        judge=_same_everywhere,
    ),
)  # fmt: skip
