"""What the loss is without some heads: the idlest, the strongest sinks, and random ones as the control.

1. The prompts are split in two, alternately by length. On one half heads are ranked: by their output norm over their
   block's mean, least first, and by their sink mass, largest first.
2. On the other half, cut short, the model runs intact, and with the first heads of each ranking set to zero.
3. Random heads are drawn several times; a larger share holds the heads of the smaller ones. Which heads are drawn moves
   the loss more than which prompts it is measured on, so their intervals are over both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from melens.analysis.head_claims import COMPARED
from melens.analysis.statistics import mean_interval, mean_metric, two_way_interval
from melens.analysis.study import Study
from melens.tracing.heads import zero_heads
from melens.tracing.text_runs import TextRuns

__all__ = [
    "IDLE", "RANDOM", "SINKS", "Heads", "count_of", "losses_by_share", "rank_heads", "rises_as_metrics",
    "sets_of_heads", "split_prompts", "without_heads",
]  # fmt: skip

IDLE, SINKS, RANDOM = "idlest", "strongest sinks", "random"

Heads = list[tuple[int, int]]
"""Pairs of a block and a head."""


def count_of(share: float, n_heads: int) -> int:
    """Return how many heads a share of all is: at least one."""
    return max(1, round(share * n_heads))


def split_prompts(study: Study, n_prompts: int) -> tuple[list[int], list[int]]:
    """Split the prompts, those with most tokens first, into those to choose heads on and those to measure losses on."""
    prompts = study.of_massive_prompts(study.trace.prompts).sort_values("n_tokens", ascending=False, kind="stable")
    chosen = prompts["prompt"].tolist()[:n_prompts]
    return chosen[::2], chosen[1::2]


def rank_heads(by_prompt: pd.DataFrame) -> dict[str, Heads]:
    """Rank heads by `output_ratio`, the idlest first, and by `sink_mass`, the strongest first, of rows a prompt."""
    mean = by_prompt.groupby(["layer", "head"])[["output_ratio", "sink_mass"]].mean().dropna()
    return {
        IDLE: mean.sort_values("output_ratio", kind="stable").index.tolist(),
        SINKS: mean.sort_values("sink_mass", ascending=False, kind="stable").index.tolist(),
    }


def without_heads(
    study: Study,
    rankings: dict[str, Heads],
    prompts: Sequence[int],
    shares: Sequence[float],
    *,
    draws: int,
    max_tokens: int,
) -> tuple[Float[np.ndarray, " prompt"], pd.DataFrame]:
    """Measure the loss of prompts, cut to `max_tokens`, intact and without heads.

    Returns:
        The intact loss of each prompt, nats a token, and how much it rises: `heads`, `share`, `n_heads`, `draw`,
        `prompt`, `dloss`.

    Raises:
        MelensError: a loss that is NaN.
    """
    tokens = [study.tokens[prompt][:max_tokens] for prompt in prompts]
    runs = TextRuns(study.model, tokens, [0] * len(tokens), max_batch_tokens=study.max_batch_tokens)
    intact = runs.intact.loss.double().numpy()
    wanted = list(sets_of_heads(rankings, shares, draws, study.seed))
    progress = study.stage("texts with heads set to zero")
    rows = []
    for done, (name, share, draw, heads) in enumerate(wanted, 1):
        loss = runs.run(zero_heads(study.model, heads)).loss.double().numpy()
        of_set = {"heads": name, "share": share, "n_heads": len(heads), "draw": draw}
        rows.append(pd.DataFrame({**of_set, "prompt": prompts, "dloss": loss - intact}))
        progress(done, len(wanted))
    return intact, pd.concat(rows, ignore_index=True)


def sets_of_heads(
    rankings: dict[str, Heads], shares: Sequence[float], draws: int, seed: int
) -> Iterator[tuple[str, float, int, Heads]]:
    """Yield what is set to zero: the ranking's name, the share of all heads, the draw, and the heads."""
    everything, generator = sorted(rankings[IDLE]), np.random.default_rng(seed)
    orders = [(name, 0, ranking) for name, ranking in rankings.items()]
    for draw in range(draws):
        orders.append((RANDOM, draw, [everything[at] for at in generator.permutation(len(everything))]))
    for name, draw, order in orders:
        for share in shares:
            yield name, share, draw, order[: count_of(share, len(everything))]


def losses_by_share(rises: pd.DataFrame) -> pd.DataFrame:
    """Average over prompts and draws: `heads`, `share`, `n_heads`, `mean`, `low` and `high`."""
    rows = []
    for of_set, own in rises.groupby(["heads", "share", "n_heads"], sort=False):
        by_draw = own.pivot(index="prompt", columns="draw", values="dloss").to_numpy()
        interval = mean_interval(by_draw[:, 0]) if of_set[0] != RANDOM else two_way_interval(by_draw)
        rows.append((*of_set, float(by_draw.mean()), *interval))
    return pd.DataFrame(rows, columns=["heads", "share", "n_heads", "mean", "low", "high"])


def rises_as_metrics(intact: Float[np.ndarray, " prompt"], rises: pd.DataFrame) -> dict[str, Any]:
    """Return the fields of `HeadsMetrics` that are about losses."""
    by_share = losses_by_share(rises)
    measured: dict[str, Any] = {"loss": float(intact.mean())}
    for field, name in (("dloss_idle", IDLE), ("dloss_sinks", SINKS), ("dloss_random", RANDOM)):
        own = by_share[by_share["heads"] == name]
        keys = [f"{share:g}" for share in own["share"]]
        measured |= {field: dict(zip(keys, own["mean"], strict=True))}
        measured |= {"zeroed_heads": dict(zip(keys, own["n_heads"], strict=True))}
    tenth = rises[rises["share"] == COMPARED].pivot(index="prompt", columns=["heads", "draw"], values="dloss")
    idle, less_random = tenth[IDLE][0].to_numpy(), (tenth[[IDLE]].to_numpy() - tenth[RANDOM]).to_numpy()
    return measured | {
        **mean_metric("dloss_idle_tenth", idle),
        "dloss_idle_less_random": float(less_random.mean()),
        "dloss_idle_less_random_interval": two_way_interval(less_random),
    }
