"""Tables of the tokens behind the first: which are massive or have turned to token 0's direction, and what they get.

1. `tokens_of` lists every token of some texts with its kind, and whether its whole prefix came before.
2. `states_of` lists the tokens behind the first that are secondary sinks in the output of a block, block by block.
3. `sinks_of` gathers these by token, `with_attention` adds what the blocks that read them pay, `rates_of` counts kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from melens.analysis.me_layer import Criterion, massive_activations
from melens.analysis.sink_rate import SEEN_BY
from melens.analysis.statistics import share_interval
from melens.data.token_kinds import KINDS, token_kinds, token_texts
from melens.models.layout import Layout
from melens.printing import Brief
from melens.tracing.trace import Trace

__all__ = ["SAME_DIRECTION", "TOKEN", "Texts", "rates_of", "sinks_of", "states_of", "tokens_of", "with_attention"]

SAME_DIRECTION = 0.9
"""|cos| with token 0's state over which a token has its direction: 26 degrees."""

TOKEN = ["texts", "prompt", "pos"]
"""The columns that name a token."""

_STATE = ["prompt", "layer", "pos"]


@dataclass(frozen=True, repr=False)
class Texts(Brief):
    """Some texts with their trace.

    Attributes:
        name: what they are, in the column `texts`.
        tokens: of each, `[pos]`.
        trace: with the tables `largest`, `abs_median` and `cosine_with_first`.
    """

    name: str
    tokens: Sequence[Int[Tensor, " _"]]
    trace: Trace


def tokens_of(texts: Sequence[Texts], tokenizer: object) -> pd.DataFrame:
    """List every token: `texts`, `prompt`, `id` (of its text), `pos`, `token`, `kind`, `n_tokens`, `is_new`.

    `is_new` is False where an earlier text has the same tokens up to this one: in a causal model that is one state.
    """
    known: dict[tuple[int, int], int] = {}
    found = []
    for own in texts:
        for prompt, (name, ids) in enumerate(zip(own.trace.prompts["id"], map(list, own.tokens), strict=True)):
            numbers, prefix, is_new = [int(token) for token in ids], -1, []
            for token in numbers:
                n_known = len(known)
                prefix = known.setdefault((prefix, token), n_known)
                is_new.append(prefix == n_known)
            columns = {"texts": own.name, "prompt": prompt, "id": name, "pos": range(len(numbers))}
            columns |= {"token": token_texts(numbers, tokenizer), "kind": token_kinds(numbers, tokenizer)}
            found.append(pd.DataFrame(columns | {"n_tokens": len(numbers), "is_new": is_new}))
    return pd.concat(found, ignore_index=True)


def states_of(texts: Texts, criterion: Criterion, last: int) -> pd.DataFrame:
    """List the tokens behind the first that are massive, or have token 0's direction while that is massive.

    Args:
        texts: with their trace.
        criterion: of what counts as massive.
        last: the last block that counts.

    Returns:
        A row for each token and block: `texts`, `prompt`, `layer`, `pos`, `is_massive`, `is_turned`, `is_shared`
        (|cos| alone is over the threshold, and no longer once what the prompt's tokens share is removed), `is_sink`,
        `first_is_massive`, `abs_max` (the largest |h|; NaN where the trace does not keep it), |cosine| and
        |centred_cosine|; of its prompt `first_from` and `first_to`, the blocks between which token 0 is massive.
    """
    massive = massive_activations(texts.trace, criterion)[_STATE].drop_duplicates()
    massive = massive[massive["layer"] <= last]
    of_first = massive[massive["pos"] == 0].groupby("prompt")["layer"].agg(first_from="min", first_to="max")
    states = texts.trace["cosine_with_first"].drop(columns="site").query("pos > 0 and layer <= @last")
    states = states.merge(massive.assign(is_massive=True), on=_STATE, how="left")
    first = massive.loc[massive["pos"] == 0, ["prompt", "layer"]].assign(first_is_massive=True)
    states = states.merge(first, on=["prompt", "layer"], how="left")
    for name in ("is_massive", "first_is_massive"):
        states[name] = states[name].eq(True)
    for name in ("cosine", "centred_cosine"):
        states[name] = states[name].abs()
    has_direction = states["first_is_massive"] & (states["cosine"] > SAME_DIRECTION)
    keeps_it = states["centred_cosine"] > SAME_DIRECTION
    states["is_turned"], states["is_shared"] = has_direction & keeps_it, has_direction & ~keeps_it
    states["is_sink"] = states["is_massive"] | states["is_turned"]
    states = states[states["is_massive"] | has_direction]
    largest = texts.trace["largest"].query("site == 'hook_resid_post' and pos > 0")
    sizes = largest.assign(abs_max=largest["value"].abs()).groupby(_STATE)["abs_max"].max().reset_index()
    states = states.merge(sizes, on=_STATE, how="left").merge(of_first, on="prompt", how="left")
    return states.assign(texts=texts.name)


def sinks_of(states: pd.DataFrame, tokens: pd.DataFrame) -> pd.DataFrame:
    """Gather by token where it is a secondary sink.

    Args:
        states: of `states_of`.
        tokens: those that count, rows of `tokens_of`.

    Returns:
        A row for each secondary sink: what `tokens` has of it; `first_block`, `last_block` and in how many `blocks`;
        `massive_from` and `massive_to`, missing where it only turns; `first_from` and `first_to`, of its token 0; the
        largest `abs_max`; `cosine` and `centred_cosine`, means of |cos| over its blocks with a massive token 0, and
        `massive_cosine`, over those of them in which it is massive itself.
    """
    alive = states[states["is_sink"]]
    by_token = alive.groupby(TOKEN)
    found = by_token.agg(
        first_block=("layer", "min"), last_block=("layer", "max"), blocks=("layer", "size"),
        first_from=("first_from", "first"), first_to=("first_to", "first"), abs_max=("abs_max", "max"),
    )  # fmt: skip
    own = alive[alive["is_massive"]].groupby(TOKEN)["layer"].agg(massive_from="min", massive_to="max")
    behind = alive[alive["first_is_massive"]]
    cosines = behind.groupby(TOKEN)[["cosine", "centred_cosine"]].mean()
    both = behind[behind["is_massive"]].groupby(TOKEN)["cosine"].mean().rename("massive_cosine")
    found = found.join([own, cosines, both])
    whole = ["massive_from", "massive_to", "first_from", "first_to"]
    found = tokens.drop(columns="is_new").merge(found.reset_index(), on=TOKEN)
    return found.astype(dict.fromkeys(whole, "Int64"))


def with_attention(
    sinks: pd.DataFrame, states: pd.DataFrame, texts: Sequence[Texts], layout: Layout
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Add what is paid to each secondary sink by the blocks with attention that read the outputs in which it is one.

    Returns:
        The sinks with `importance` and `share_of_heads` (as of `ImportanceByKey`), `importance_of_first`, that of token
        0 in the same blocks, all means over these blocks, and `even_attention`, what the key had if every query paid
        all keys alike; NaN where fewer than `SEEN_BY` queries see the token, or no block reads it. Behind that
        the same by reading block: a row for each sink and `layer`.
    """
    alive = states[states["is_sink"]].merge(sinks[[*TOKEN, "n_tokens"]], on=TOKEN)
    readers = {layer: layout.next_attention(layer) for layer in set(alive["layer"])}
    reading = alive[[*TOKEN, "n_tokens"]].assign(layer=alive["layer"].map(readers).astype(float)).dropna()
    reading = reading[reading["n_tokens"] - reading["pos"] >= SEEN_BY].drop_duplicates().astype({"layer": int})
    of_keys = [
        own.trace["importance_by_key"].drop(columns="site").assign(texts=own.name)
        for own in texts
        if "importance_by_key" in own.trace.tables
    ]
    columns = ["importance", "share_of_heads", "importance_of_first", "even_attention"]
    if not of_keys:
        return sinks.assign(**dict.fromkeys(columns, np.nan)), reading.assign(**dict.fromkeys(columns, np.nan))
    paid = pd.concat(of_keys, ignore_index=True)
    first = paid[paid["pos"] == 0].rename(columns={"importance": "importance_of_first"})
    first = first[["texts", "prompt", "layer", "importance_of_first"]]
    reading = reading.merge(paid, on=[*TOKEN, "layer"]).merge(first, on=["texts", "prompt", "layer"])
    even = [
        float(np.mean(1 / np.arange(at + 1, n + 1))) for at, n in zip(reading["pos"], reading["n_tokens"], strict=True)
    ]
    reading = reading.assign(even_attention=np.array(even, dtype=float))
    means = reading.groupby(TOKEN, as_index=False)[columns].mean()
    return sinks.merge(means, on=TOKEN, how="left"), reading


def rates_of(tokens: pd.DataFrame, sinks: pd.DataFrame) -> pd.DataFrame:
    """Set secondary sinks of each kind against the tokens of that kind: how often one is a secondary sink.

    Returns:
        A row for `texts` and `kind`: `n_tokens`, `n_texts` (that have the kind), `n_sinks`; `rate`, the share of the
        kind's tokens that are secondary sinks, mean over these texts, with its exact interval `low` to `high`.
    """
    is_sink = pd.MultiIndex.from_frame(tokens[TOKEN]).isin(pd.MultiIndex.from_frame(sinks[TOKEN]))
    rows = []
    for (texts, kind), own in tokens.assign(is_sink=is_sink).groupby(["texts", "kind"], sort=False):
        by_text = own.groupby("prompt")["is_sink"].mean().to_numpy()
        counts = len(own), len(by_text), int(own["is_sink"].sum())
        rows.append((texts, kind, *counts, float(by_text.mean()), *share_interval(by_text)))
    rates = pd.DataFrame(rows, columns=["texts", "kind", "n_tokens", "n_texts", "n_sinks", "rate", "low", "high"])
    order = {name: at for at, name in enumerate([*dict.fromkeys(tokens["texts"]), *KINDS])}
    return rates.sort_values(["texts", "kind"], key=lambda names: names.map(order), ignore_index=True)
