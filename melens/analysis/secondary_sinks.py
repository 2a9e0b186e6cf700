"""Sinks behind the first token: which tokens are massive there or turn to the first's direction, where, for how long.

    result = melens.analysis.secondary(study, provoke=True)
    result.tables["secondary_sinks"]  # a row a token: its kind, first and last block, |h|, |cos|, attention

1. A token is a secondary sink in a block's output where it meets the criterion for "massive", or where token 0 does and
   the token has its direction: |cos| > 0.9, as it is and without what the prompt's tokens share. Where token 0 is an
   ordinary token its direction says nothing, and the second cosine leaves out what all states of a block share.
2. Tokens that only repeat token 0 from the start on have its states by construction, and count apart. So do the last
   two blocks. In a causal model tokens with the same whole prefix are one state, and count once.
3. The attention on a sink is that of the blocks that read these outputs, over all queries that see it: no pattern.
4. Its kind is set against how often tokens of that kind occur (`melens.data.token_kinds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from melens.analysis.metrics import SINK_THRESHOLD
from melens.analysis.secondary_claims import SecondaryMetrics
from melens.analysis.secondary_figures import lifetimes_figure, map_figure, rates_figure
from melens.analysis.secondary_tables import (
    TOKEN,
    Texts,
    rates_of,
    sinks_of,
    states_of,
    tokens_of,
    with_attention,
)
from melens.analysis.sink_rate import other_keys
from melens.analysis.statistics import mean_metric, share_interval, with_interval
from melens.analysis.study import Study
from melens.data.prompts import Prompt, TokenizedPrompts
from melens.data.provoking import provoking_prompts
from melens.data.token_kinds import REPETITION, RUN
from melens.errors import MelensError
from melens.printing import counted
from melens.report.result import Figure, Result
from melens.tracing.attention_probes import AttentionOffTokens, ImportanceByKey
from melens.tracing.probes import AbsMedian, CosineWithFirst, LargestActivations, Probe
from melens.tracing.sites import ATTENTION_BY_KEY, Sites
from melens.tracing.trace import trace

__all__ = ["check_texts", "probes", "secondary"]

OWN, PROVOKING, LONG = "prompts", "provoking texts", "long text"

SHARE_OF_HEADS = 0.1
"""In so many heads of a block a token must have an importance over 0.3 to be a sink there: one head may by chance."""


def secondary(study: Study, *, provoke: bool = False, long_tokens: int = 0, map_tokens: int = 40) -> Result:
    """Find the tokens behind the first that are massive or turn to its direction, and what attention pays to them.

    Args:
        study: as `melens.study` makes it.
        provoke: add texts that bring such tokens: newlines, delimiters, digits, repeats, BOS inside.
        long_tokens: add one text of so many tokens, the prompts one after the other; 0 for none. Memory
            is linear in it.
        map_tokens: how many tokens of one prompt are drawn by block, its secondary sinks and their neighbours first.

    Returns:
        Metrics `SecondaryMetrics`; the tables `secondary_sinks`, `secondary_rates` (by kind of token) and
        `secondary_tokens` (by its text); the figures `secondary_map`, `secondary_lifetimes` and `secondary_rates`, the
        first two where there are secondary sinks.

    Raises:
        MelensError: `long_tokens` over the model's context, texts to provoke them without a tokenizer, or as
            `melens.massive_activations`.

    Example:
        >>> capitals = melens.study(model, ["Birds fly south. Birds Come Back."])  # which are massive in this model
        >>> table = melens.analysis.secondary(capitals).tables["secondary_sinks"]
        >>> table[["pos", "token", "kind", "first_block", "last_block"]].values.tolist()
        [[17, 'B', 'token 0 again', 2, 3], [23, 'C', 'word', 2, 3], [28, 'B', 'token 0 again', 2, 3]]
    """
    check_texts(study.model, provoke=provoke, long_tokens=long_tokens)
    texts, layout, last = _texts(study, provoke, long_tokens), study.layout, study.last_before_trailing
    tokens = tokens_of(texts, study.model.tokenizer)
    states = pd.concat([states_of(own, study.me.criterion, last) for own in texts], ignore_index=True)
    behind = tokens[tokens["pos"] > 0]
    counting = behind[behind["is_new"] & (behind["kind"] != RUN)]
    sinks, by_reader = with_attention(sinks_of(states, counting), states, texts, layout)
    rates, by_text = rates_of(counting, sinks), _by_text(counting, sinks)
    shared = states[states["is_shared"]].merge(counting[TOKEN])[TOKEN].drop_duplicates()
    metrics = study.metrics(
        SecondaryMetrics,
        **layout.metrics(),
        n_tokens=len(counting),
        n_heads=study.trace.model.get("n_heads"),
        **_of_runs(texts, behind),
        n_shared=len(shared) - len(shared.merge(sinks[TOKEN])),
        n_texts=sum(len(own.tokens) for own in texts),
        **_counts(sinks),
        **_of_first_delimiters(behind, counting, sinks),
        **_of_attention(texts[0], behind, last),
        **_of_massive(sinks),
        **_of_repetitions(counting, sinks),
    )
    findings = _in_words(study, metrics, sinks, rates, by_text)
    figures = {"secondary_rates": rates_figure(study, rates, findings[-1][1])}
    if len(sinks):
        alive = states[states["is_sink"]]
        lifetimes = lifetimes_figure(study, alive.merge(sinks[[*TOKEN, "kind"]], on=TOKEN), by_reader, findings)
        figures = {"secondary_lifetimes": lifetimes, **figures}
        figures = {"secondary_map": _map_figure(study, texts, sinks, alive, map_tokens), **figures}
    tables = {"secondary_sinks": sinks, "secondary_rates": rates, "secondary_tokens": by_text}
    return Result("secondary", study.trace.model, metrics, tables, figures, findings)


def probes(model: Any, **options: Any) -> list[Probe]:
    """Return what `secondary` reads besides the default probes, as far as the model has attention."""
    attention: list[Probe] = [ImportanceByKey(), AttentionOffTokens()]
    return [CosineWithFirst(), *(attention if Sites.of(model).find(ATTENTION_BY_KEY) else [])]


def check_texts(model: Any, *, provoke: bool, long_tokens: int) -> None:
    """Raise a `MelensError` for texts that a model cannot be given.

    Args:
        model: a bridge, or the plan of one.
        provoke, long_tokens: as for `secondary`.
    """
    n_ctx = model.cfg.n_ctx
    if provoke and model.tokenizer is None:
        raise MelensError("provoke is true, but this model has no tokenizer to write texts with. Leave it out.")
    if long_tokens == 1 or long_tokens > n_ctx:
        raise MelensError(
            f"long_tokens is {long_tokens:,}; it must be 0, for no long text, or from 2 to the model's context of "
            f"{n_ctx:,} tokens."
        )


# --- Texts ------------------------------------------------------------------------------------------------------------


def _texts(study: Study, provoke: bool, long_tokens: int) -> list[Texts]:
    """Trace what is asked for besides the study's prompts, which come first."""
    wanted = probes(study.model)
    texts = [Texts(OWN, study.tokens, study.traced(wanted))]
    more = [LargestActivations(min_abs=study.me.criterion.min_abs), AbsMedian(), *wanted]
    added: dict[str, TokenizedPrompts] = {}
    shared = _shared_beginning(study)
    if provoke:
        added[PROVOKING] = provoking_prompts(study.model.tokenizer, shared)
    if long_tokens:
        added[LONG] = TokenizedPrompts([Prompt("", id="long")], [_long_text(study.tokens, shared, long_tokens)])
    for name, prompts in added.items():
        progress = study.stage(f"tracing the {name} (tokens)")
        found = trace(study.model, prompts, more, max_batch_tokens=study.max_batch_tokens, progress=progress)
        texts.append(Texts(name, prompts.tokens, found))
    return texts


def _shared_beginning(study: Study) -> list[int]:
    """Return BOS, where all the study's prompts begin with it, as the texts that are added then do."""
    tokenizer = study.model.tokenizer
    bos = None if tokenizer is None else tokenizer.bos_token_id
    return [bos] if bos is not None and {int(ids[0]) for ids in study.tokens} == {bos} else []


def _long_text(tokens: Sequence[Int[Tensor, " _"]], prefix: list[int], length: int) -> Int[Tensor, " _"]:
    """Put prompts one after the other, again and again, up to a length; what they all begin with comes once."""
    whole = torch.cat([ids[len(prefix) :] for ids in tokens])
    return torch.cat([torch.tensor(prefix, dtype=whole.dtype), whole.repeat(-(-length // len(whole)))])[:length]


# --- Metrics ----------------------------------------------------------------------------------------------------------


def _counts(sinks: pd.DataFrame) -> dict[str, Any]:
    births = sinks["first_block"].value_counts().sort_index()
    measured: dict[str, Any] = {
        "n_sinks": len(sinks),
        "n_massive": int(sinks["massive_from"].notna().sum()),
        "sink_texts": len(sinks[["texts", "prompt"]].drop_duplicates()),
        "by_kind": {str(kind): int(n) for kind, n in sinks["kind"].value_counts().items()},
        "by_birth": {str(layer): int(n) for layer, n in births.items()},
    }
    return measured | ({"median_blocks": float(sinks["blocks"].median())} if len(sinks) else {})


def _of_runs(texts: Sequence[Texts], behind: pd.DataFrame) -> dict[str, Any]:
    """Tell how near the states of tokens that only repeat token 0 come to its own, which is why they do not count."""
    runs = behind.loc[behind["kind"] == RUN, TOKEN]
    of_runs = [own.trace["cosine_with_first"].assign(texts=own.name).merge(runs)["cosine"] for own in texts]
    least = {"least_run_cosine": float(pd.concat(of_runs).min())} if len(runs) else {}
    return {"n_in_run": len(runs), **least}


def _of_first_delimiters(behind: pd.DataFrame, counting: pd.DataFrame, sinks: pd.DataFrame) -> dict[str, Any]:
    """Tell of how many of the study's prompts the first period or newline is massive."""
    own = behind[(behind["texts"] == OWN) & ((behind["token"].str.strip() == ".") | behind["token"].str.contains("\n"))]
    firsts = own.drop_duplicates("prompt")[TOKEN].merge(counting[TOKEN])
    massive = pd.MultiIndex.from_frame(sinks.loc[sinks["massive_from"].notna(), TOKEN])
    return _share("first_delimiter", pd.MultiIndex.from_frame(firsts).isin(massive))


def _of_attention(own: Texts, behind: pd.DataFrame, last: int) -> dict[str, Any]:
    """Tell in how many of the study's prompts a token behind the first is a sink, massive or not."""
    if "importance_by_key" not in own.trace.tables:
        return {}
    in_run = behind.loc[(behind["texts"] == OWN) & (behind["kind"] == RUN), ["prompt", "pos"]]
    keys = other_keys(own.trace).query("layer <= @last")
    keys = keys[~pd.MultiIndex.from_frame(keys[["prompt", "pos"]]).isin(pd.MultiIndex.from_frame(in_run))]
    has = (keys["share_of_heads"] >= SHARE_OF_HEADS).groupby(keys["prompt"]).any().to_numpy()
    return _share("elsewhere", has) | {"off_tokens": float(own.trace["off_tokens"]["off_tokens"].mean())}


def _of_massive(sinks: pd.DataFrame) -> dict[str, Any]:
    """Compare the massive tokens with their token 0, and the attention on secondary sinks with that on it."""
    measured: dict[str, Any] = {}
    both = sinks[sinks["massive_cosine"].notna()]
    if len(both):
        both = both.assign(later=both["massive_from"] > both["first_from"], fades=both["massive_to"] < both["first_to"])
        names = {"aligned": "massive_cosine", "later": "later", "fades": "fades"}
        for name, column in names.items():
            measured |= _mean_over_texts(name, both, both[column].astype(float))
        measured["aligned_texts"] = len(both[["texts", "prompt"]].drop_duplicates())
    seen = sinks[sinks["importance"].notna() & sinks["first_from"].notna()]
    if len(seen):
        measured |= _mean_over_texts("of_first", seen, seen["importance"] / seen["importance_of_first"])
        measured |= _mean_over_texts("over_even", seen, seen["importance"] / seen["even_attention"])
    return measured


def _of_repetitions(counting: pd.DataFrame, sinks: pd.DataFrame) -> dict[str, Any]:
    repeating = counting[counting["kind"] == REPETITION]
    is_sink = pd.MultiIndex.from_frame(repeating[TOKEN]).isin(pd.MultiIndex.from_frame(sinks[TOKEN]))
    has = repeating.assign(is_sink=is_sink).groupby(["texts", "prompt"])["is_sink"].any().to_numpy()
    return _share("repeated", has)


def _share(name: str, has: np.ndarray) -> dict[str, Any]:
    """Return a share of texts, with its exact interval and of how many it is; only how many, if none."""
    measured: dict[str, Any] = {f"{name}_texts": len(has)}
    return measured | ({name: float(has.mean()), f"{name}_interval": share_interval(has)} if len(has) else {})


def _mean_over_texts(name: str, sinks: pd.DataFrame, values: pd.Series) -> dict[str, Any]:
    return mean_metric(name, values.groupby([sinks["texts"], sinks["prompt"]]).mean().to_numpy())


# --- Words and figures ------------------------------------------------------------------------------------------------


def _in_words(
    study: Study, metrics: SecondaryMetrics, sinks: pd.DataFrame, rates: pd.DataFrame, by_text: pd.DataFrame
) -> list[tuple[str, str]]:
    """Say what was found; the last row says which kinds of tokens they are."""
    n_sinks, n_massive = metrics.n_sinks or 0, metrics.n_massive or 0
    among = f"{metrics.n_tokens or 0:,} tokens behind the first"
    words = f"None among {among} of {counted(metrics.n_texts or 0, 'text')}."
    if n_sinks:
        of_texts = f"in {metrics.sink_texts} of {counted(metrics.n_texts or 0, 'text')}"
        turned = f", {n_sinks - n_massive} only turn to token 0's direction" if n_sinks > n_massive else ""
        words = f"{n_sinks} of {among} ({of_texts}): {n_massive} massive{turned}."
    elif study.me.layer is None:
        words += f" {study.me.reason}"
    if metrics.n_shared:
        words += f" {metrics.n_shared} more have |cos| > 0.9 only through what all tokens of their prompt share."
    if metrics.n_in_run:
        words += f" {metrics.n_in_run} that repeat token 0 from the start on do not count: their cosine with it is at"
        words += f" least {metrics.least_run_cosine:.3f} in every block."
    rows = [("secondary sinks", words)]
    if n_sinks:
        births = ", ".join(f"block {layer} ({n})" for layer, n in (metrics.by_birth or {}).items())
        reach = f"{sinks['blocks'].min()} to {sinks['blocks'].max()}"
        lives = f"They live {metrics.median_blocks:g} blocks (median; {reach}) of those up to block"
        rows.append(("birth and lifetime", f"Born in {births}. {lives} {study.last_before_trailing}."))
    rows += _attention_in_words(study, metrics)
    return [*rows, ("which tokens", f"{_kinds_in_words(rates)}{_tokens_in_words(by_text)}")]


def _attention_in_words(study: Study, metrics: SecondaryMetrics) -> list[tuple[str, str]]:
    if not study.layout.attention:
        return [("attention on them", f"Not measured: there is {study.layout.attention_in_words}.")]
    said = []
    if metrics.of_first is not None and metrics.over_even is not None:
        of_first = with_interval(metrics.of_first, metrics.of_first_interval)
        said.append(f"{of_first} of what token 0 gets, {metrics.over_even:.3g} × what even attention pays.")
    if metrics.elsewhere is not None:
        share = with_interval(metrics.elsewhere, metrics.elsewhere_interval)
        heads = f"an importance over {SINK_THRESHOLD:g} in a tenth of the heads of a block"
        said.append(f"{share} of prompts have a token behind the first with {heads}, massive or not.")
    if (metrics.off_tokens or 0) > 0.001:
        said.append(f"{metrics.off_tokens:.3f} of all attention goes to no token.")
    return [("attention on them", " ".join(said))] if said else []


def _kinds_in_words(rates: pd.DataFrame) -> str:
    """Say of which kinds they are, of those with sinks the most frequent first: "prompts: word 12 of 3,000 (0.4%)"."""
    said = []
    for texts, own in rates.groupby("texts", sort=False):
        has = own[own["n_sinks"] > 0].sort_values("n_sinks", ascending=False, kind="stable")
        kinds = [f"{row.kind} {row.n_sinks} of {row.n_tokens:,}" for row in has.itertuples()]
        said.append(f"{texts}: {', '.join(kinds) or 'none'}")
    return f"{'; '.join(said)}.".capitalize() if said else "There is no token behind the first."


def _by_text(counting: pd.DataFrame, sinks: pd.DataFrame) -> pd.DataFrame:
    """Count by the text of a token how many are secondary sinks, `n_sinks`, and how many there are, `n_tokens`."""
    counts = {"n_sinks": sinks["token"].value_counts(), "n_tokens": counting["token"].value_counts()}
    by_text = pd.DataFrame(counts).dropna().astype(int).rename_axis("token").reset_index()
    return by_text.sort_values("n_sinks", ascending=False, kind="stable", ignore_index=True)


def _tokens_in_words(by_text: pd.DataFrame) -> str:
    """List the tokens with most secondary sinks: " By text: ' fly' 2 of 2."."""
    listed = [f"{row.token!r} {row.n_sinks} of {row.n_tokens:,}" for row in by_text.head(5).itertuples()]
    return f" By text: {', '.join(listed)}{' …' if len(by_text) > 5 else ''}." if listed else ""


def _map_figure(
    study: Study, texts: Sequence[Texts], sinks: pd.DataFrame, alive: pd.DataFrame, map_tokens: int
) -> Figure:
    """Draw the text whose secondary sinks live in most blocks together, with those that an earlier text has as well."""
    lived = sinks.groupby(["texts", "prompt"], sort=False, as_index=False)["blocks"].sum()
    most = lived.iloc[int(lived["blocks"].argmax())]
    of_text = alive[(alive["texts"] == most["texts"]) & (alive["prompt"] == most["prompt"])]
    own = next(each for each in texts if each.name == most["texts"])
    return map_figure(study, own, int(most["prompt"]), sorted(set(of_text["pos"])), map_tokens)
