"""Whether a quantity of token 0 stands out in one block: its lead over the next block, and in how many states.

    table = table[table["prompt"].isin(compared_prompts(study))]     # one prompt a distinct first token
    place = place_among(by_state(table, "delta_frac", up_to=27), 11)
    place.lead, place.next_layer                                     # ΔFrac in block 11 minus that in the next block

1. The next block is the one with the largest mean among the others, before or behind the asked one.
2. The lead is paired: the difference is taken in each state and then averaged, so that what lifts a state in all
   blocks does not widen its interval.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from melens.analysis.statistics import mean_interval
from melens.analysis.study import Study
from melens.report.result import Interval

__all__ = ["Place", "by_state", "compared_prompts", "geometric_mean", "place_among"]


@dataclass(frozen=True)
class Place:
    """Where a block stands among the others by a quantity.

    Attributes:
        next_layer: of the other blocks the one with the largest mean over states, 0-based.
        lead, lead_interval: the block's value minus that of `next_layer`, mean over states: negative where it is not
            the largest.
        share_larger: of the other blocks those with a larger mean.
        is_largest: by prompt, whether the block's value is the largest of all.
    """

    next_layer: int
    lead: float
    lead_interval: Interval
    share_larger: float
    is_largest: pd.Series[bool]


def compared_prompts(study: Study) -> list[int]:
    """List the prompts in which token 0 is compared with others: one for each first token, of two tokens or more.

    They are prompts whose massive activation is born in the ME layer; without one, all. Where all are of one token,
    these are listed: token 0 has its own numbers in them.
    """
    prompts = study.of_massive_prompts(study.trace.prompts)
    with_others = prompts[prompts["n_tokens"] > 1]
    return (prompts if with_others.empty else with_others).drop_duplicates("first_token_id")["prompt"].tolist()


def by_state(table: pd.DataFrame, value: str, *, up_to: int) -> pd.DataFrame:
    """Lay a column of a table out as a row a state and a column a block.

    Args:
        table: `prompt`, `layer` and the column `value`, one row each; a prompt of NaN alone is left out.
        value: the quantity.
        up_to: the last block, 0-based; those behind it count apart.
    """
    wide = table[table["layer"] <= up_to].pivot(index="prompt", columns="layer", values=value)
    return wide.dropna(how="all")


def place_among(values: pd.DataFrame, layer: int | None) -> Place | None:
    """Find a block's place among the others; None where it was not measured, or no other was.

    Args:
        values: a row a state, a column a block, as `by_state` returns it.
        layer: 0-based block.
    """
    if layer not in values or len(values.columns) < 2 or values.empty:
        return None
    here, others = values[layer].to_numpy(dtype=float), values.drop(columns=layer)
    means = others.mean()
    next_layer = int(others.columns.to_numpy()[means.to_numpy().argmax()])
    lead = here - others[next_layer].to_numpy(dtype=float)
    return Place(
        next_layer=next_layer,
        lead=float(lead.mean()),
        lead_interval=mean_interval(lead),
        share_larger=float((means > here.mean()).mean()),
        is_largest=values[layer] > others.max(axis=1),
    )


def geometric_mean(values: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Average ratios `[state]` by their logarithms, so that × 2 and × 1/2 give × 1; with the 95% interval."""
    logarithms = np.log(np.asarray(values, dtype=float))
    low, high = mean_interval(logarithms)
    return float(np.exp(logarithms.mean())), (float(np.exp(low)), float(np.exp(high)))
