"""Whether the ME layer is the same for every kind of input, and what moves the massive token: figure 10."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

import melens
from experiments.runner.legacy import StabilityOptions
from experiments.runner.study import Run as Study
from melens import Probe
from melens.analysis.statistics import bootstrap_mean
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.scores import shares
from melens.figures.style import COLORS
from melens.report.result import Figure, Result

PREFIXES = ("In other words, ", "Please read this carefully. ", "\n\n")
DELIMITERS = (".", ",", "\n", ":")


def probes(model: TransformerBridge, options: StabilityOptions) -> list[Probe]:
    """Everything is in the default probes."""
    return []


def run(study: Study, options: StabilityOptions) -> Result:
    """Group the prompts by task and length, then change how some of them begin."""
    edges = list(options.length_bins)
    prompts = study.trace.prompts.merge(study.me.per_prompt, on="prompt")
    prompts = prompts.assign(length=_length_names(prompts["n_tokens"], edges), task=prompts["task"].fillna("not given"))
    groups = _agreement(study, prompts, edges)
    beginnings = _beginnings(study, options)
    norms = (
        study.trace["norm"]
        .query("site == 'hook_resid_post' and pos == 0")
        .merge(prompts[["prompt", "task", "length"]], on="prompt")
    )
    metrics = study.metrics(
        **_least_agreement(study, groups),
        n_tasks=int(prompts["task"].nunique()),
        n_length_bins=int(prompts["length"].nunique()),
        agreement_by_group={row["group"]: row["agreement"] for row in groups.to_dict("records")},
        positions_by_beginning={row["beginning"]: row["at_first"] for row in beginnings.to_dict("records")},
    )
    return Result(
        experiment="stability",
        model=study.trace.model,
        metrics=metrics,
        tables={"agreement_by_group": groups, "beginnings": beginnings},
        figures={
            "norms_by_task": Figure(
                _norms_figure(study, norms, edges),
                "figure 10",
                "The same ME layer for four task types and lengths from about 10 to over 1,000 tokens.",
                _agreement_in_words(study, groups),
            ),
            "agreement": Figure(
                _agreement_figure(study, groups),
                "figure 10, table",
                "The ME layer is the same for every type and length.",
                _agreement_in_words(study, groups),
            ),
            "beginnings": Figure(
                shares(
                    beginnings.set_index("beginning")[["at_first", "elsewhere", "none"]],
                    names=("position 0", "another position", "no massive token"),
                    title=study.title(
                        "Where the massive token is when a prompt begins otherwise",
                        min(options.n_prompts, len(study.tokens)),
                    ),
                    note="Share of prompts; n: how many were run.",
                ),
                "beyond the paper",
                "Inputs begin as they come: what the first token is, is not varied.",
                _beginnings_in_words(study, beginnings),
            ),
        },
        findings=[
            ("task types and lengths", _agreement_in_words(study, groups)),
            ("other beginnings", _beginnings_in_words(study, beginnings)),
        ],
    )


def _length_names(n_tokens: pd.Series, edges: Sequence[int]) -> pd.Series:
    names = _bin_names(edges)
    return pd.Series([names[int(np.searchsorted(edges, length))] for length in n_tokens], index=n_tokens.index)


def _bin_names(edges: Sequence[int]) -> list[str]:
    lows = [1, *(edge + 1 for edge in edges)]
    return [f"{low}-{high} tokens" for low, high in zip(lows, edges, strict=False)] + [f"over {lows[-1] - 1} tokens"]


def _agreement(study: Study, prompts: pd.DataFrame, edges: Sequence[int]) -> pd.DataFrame:
    """List by task type and by length how many prompts have the ME layer of all: `agreement` with its interval."""
    rows = []
    by_kind = {"task": sorted(set(prompts["task"])), "length": _bin_names(edges)}
    for kind, group in ((kind, group) for kind, groups in by_kind.items() for group in groups):
        of_group = prompts[prompts[kind] == group]
        if not of_group.empty:
            agrees = (of_group["layer"] == study.me.layer).to_numpy(dtype=float)
            low, high = bootstrap_mean(agrees)
            layers = of_group["layer"].mode()
            most = int(layers.iloc[0]) if layers.iloc[0] >= 0 else None
            rows.append((kind, group, len(of_group), most, float(agrees.mean()), low, high))
    columns = ["kind", "group", "n_prompts", "me_layer", "agreement", "low", "high"]
    return pd.DataFrame(rows, columns=columns).astype({"me_layer": "Int64"})


def _least_agreement(study: Study, groups: pd.DataFrame) -> dict[str, Any]:
    if study.me.layer is None:
        return {}
    least = groups.sort_values("agreement", kind="stable").iloc[0]
    interval = (float(least["low"]), float(least["high"]))
    return {"least_agreement": float(least["agreement"]), "least_agreement_interval": interval}


# --- Other beginnings -------------------------------------------------------------------------------------------------


def _beginnings(study: Study, options: StabilityOptions) -> pd.DataFrame:
    """Change how the shortest prompts begin, and see where their massive token is then.

    Returns:
        `beginning`, `n` (sequences run), the shares `at_first`, `elsewhere` and `none`, and `same_layer`: of those with
        a massive token, the share in which it is born in the ME layer.
    """
    shortest = sorted((ids.tolist() for ids in study.tokens), key=len)[: options.n_prompts]
    bodies = [ids[: options.max_tokens] for ids in shortest]
    variants = _variants(study, bodies, options)
    flat = [torch.tensor(ids[: study.model.cfg.n_ctx]) for sequences in variants.values() for ids in sequences]
    probes = melens.default_probes(study.model, min_abs=study.me.criterion.min_abs)
    progress = study.stage("other beginnings: tokens")
    trace = melens.trace(study.model, flat, probes, max_batch_tokens=study.cfg.max_batch_tokens, progress=progress)
    found = melens.find_me_layer(trace, study.me.criterion).per_prompt
    found["beginning"] = [name for name, sequences in variants.items() for _ in sequences]
    rows = []
    for name, of_beginning in found.groupby("beginning", sort=False):
        born = of_beginning[of_beginning["layer"] >= 0]
        at_first = float((born["pos"] == 0).sum() / len(of_beginning)) if len(born) else 0.0
        rows.append(
            {
                "beginning": f"{name} (n = {len(of_beginning)})",
                "n": len(of_beginning),
                "at_first": at_first,
                "elsewhere": len(born) / len(of_beginning) - at_first,
                "none": 1 - len(born) / len(of_beginning),
                "same_layer": float((born["layer"] == study.me.layer).mean()) if len(born) else float("nan"),
            }
        )
    return pd.DataFrame(rows)


def _variants(study: Study, bodies: list[list[int]], options: StabilityOptions) -> dict[str, list[list[int]]]:
    tokenizer, vocabulary = study.model.tokenizer, study.model.cfg.d_vocab
    generator = torch.Generator().manual_seed(study.cfg.seed)
    firsts = torch.randint(vocabulary, (options.n_first_tokens,), generator=generator).tolist()
    variants = {
        "as it is": bodies,
        "another first token": [[first, *ids[1:]] for ids in bodies for first in firsts],
        "random token prepended": [[first, *ids] for ids in bodies for first in firsts],
    }
    if tokenizer is None:
        return variants
    prefixes = [tokenizer(prefix, add_special_tokens=False)["input_ids"] for prefix in PREFIXES]
    delimiters = [tokenizer(mark, add_special_tokens=False)["input_ids"][-1:] for mark in DELIMITERS]
    variants["prefix prepended"] = [[*prefix, *ids] for ids in bodies for prefix in prefixes]
    variants["delimiter prepended"] = [[*mark, *ids] for ids in bodies for mark in delimiters]
    if tokenizer.bos_token_id is not None:
        with_bos = [[tokenizer.bos_token_id, *ids] for ids in bodies if ids[0] != tokenizer.bos_token_id]
        without = [ids[1:] for ids in bodies if ids[0] == tokenizer.bos_token_id and len(ids) > 2]
        if with_bos:
            variants["BOS prepended"] = with_bos
        if without:
            variants["without BOS"] = without
    return variants


# --- Figures and words ------------------------------------------------------------------------------------------------


def _norms_figure(study: Study, norms: pd.DataFrame, edges: Sequence[int]) -> Any:
    panels = []
    orders = {
        "task": sorted(norms["task"].unique()),
        "length": [n for n in _bin_names(edges) if n in set(norms["length"])],
    }
    for kind, title in (("task", "By task type"), ("length", "By length")):
        colors = dict(zip(orders[kind], COLORS if kind == "task" else COLORS[4:], strict=False))
        curves = []
        for group in orders[kind]:
            for number, (_, of_prompt) in enumerate(norms[norms[kind] == group].groupby("prompt")):
                points = of_prompt.rename(columns={"norm": "mean"})[["layer", "mean"]]
                curves.append(Curve(group, points, colors.get(group, COLORS[-1]), in_legend=number == 0))
        panels.append(Panel(title, "L2 norm of token 0", curves, study.me.layer, log_scale=True))
    distinct = study.me.distinct_first_tokens
    trivial = ", so the curves are the same by construction" if distinct == 1 else ""
    note = f"One line a prompt; {distinct} distinct first token{'s' if distinct > 1 else ''}{trivial}."
    title = study.title("Norm of token 0 after each block", study.me.n_prompts)
    return curves_by_block(panels, title=title, note=note)


def _agreement_figure(study: Study, groups: pd.DataFrame) -> Any:
    names = [f"{row['group']} (n = {row['n_prompts']})" for row in groups.to_dict("records")]
    agrees = groups["agreement"].to_numpy()
    me_layer = "no ME layer" if study.me.layer is None else f"ME layer {study.me.layer}"
    return shares(
        pd.DataFrame({"agrees": agrees, "other": 1 - agrees}, index=names),
        names=(me_layer, "another layer, or none"),
        title=study.title("Share of prompts with the ME layer of all", study.me.n_prompts),
        note="By task type and by length; blocks are 0-based.",
    )


def _agreement_in_words(study: Study, groups: pd.DataFrame) -> str:
    if study.me.layer is None:
        return "No prompt type has an ME layer."
    least = groups.sort_values("agreement", kind="stable").iloc[0]
    if least["agreement"] == 1:
        return f"Block {study.me.layer} in every prompt of every task type and length."
    elsewhere = groups[(groups["me_layer"] != study.me.layer).fillna(True)]["group"].tolist()
    where = f"in every group but {', '.join(elsewhere)}" if elsewhere else "in every group"
    return (
        f"Block {study.me.layer} is the most frequent {where}; agreement is lowest for {least['group']}, "
        f"{least['agreement']:.0%} of {least['n_prompts']} prompts."
    )


def _beginnings_in_words(study: Study, beginnings: pd.DataFrame) -> str:
    if study.me.layer is None:
        return "Without massive activations no beginning makes a difference."
    least = beginnings.sort_values("at_first", kind="stable").iloc[0]
    if least["at_first"] == 1:
        return "Whatever the prompts begin with, the massive token is at position 0."
    return (
        f"The massive token is at position 0 least often with '{least['beginning']}': {least['at_first']:.0%}; "
        f"elsewhere in {least['elsewhere']:.0%}, nowhere in {least['none']:.0%}."
    )
