"""Where a model's massive activation is born: the criterion, and `find_me_layer(trace) -> Emergence` (section 3).

1. `massive_activations` lists the entries of every block's output that meet the criterion (Sun et al. 2024).
2. Of each prompt the first block with such an entry counts, and how the norm of the token with the largest one rises.
3. The ME layer is the block that is the first in most prompts, of which those that share a massive first token count
   once, as they share its every state; of these prompts the numbers are averaged.
4. The massive state is formed where the climb of the largest token ends: in the ME layer itself, if that block alone
   brings it, else later. Its dims and positions are read off there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import InstanceOf

from melens.analysis.statistics import mean_interval, with_interval
from melens.errors import MelensError
from melens.tracing.probes import LargestActivations
from melens.tracing.trace import Trace, TraceGiven
from melens.validation.signatures import checked
from melens.validation.types import Number, Rate, Said, Whole, check_fields

__all__ = ["Criterion", "Emergence", "find_me_layer", "massive_activations", "one_a_state"]

Kind = Literal["one block", "a few blocks", "slow climb"]

_SITES = ("hook_resid_pre", "hook_resid_post")
"""Of the embeddings, and of every block's output."""
_PER_PROMPT = [
    "prompt", "layer", "pos", "dim", "value", "norm_in", "norm_out", "magnification", "relative_magnification", "peak",
    "share_of_peak", "climb_from", "climb_to", "formed", "formed_pos",
]  # fmt: skip


@dataclass(frozen=True)
class Criterion:
    """What counts as massive, and how an emergence is described: the same numbers for every model.

    Attributes:
        min_abs, min_ratio: an entry of a hidden state is massive if |h| > `min_abs` and |h| > `min_ratio` × the median
            |h| of that hidden state (Sun et al. 2024).
        min_prompts: the share of prompts that must hold a massive activation for the model to have an ME layer.
        trailing_blocks: the last blocks, left out of the peak norm since they erase the massive activation or make a
            second one (appendix A).
        one_block: the ME layer alone brings at least this share of the peak norm.
        few_blocks: the norm climbs from 10% to 90% of its peak within at most this many blocks.
    """

    min_abs: Number = 100
    min_ratio: Number = 1_000
    min_prompts: Rate = 0.5
    trailing_blocks: Whole = 2
    one_block: Number = 0.8
    few_blocks: Whole = 3

    def __post_init__(self) -> None:
        check_fields(self, "The criterion's {}")


@dataclass(frozen=True, kw_only=True)
class Emergence:
    """Where and how the massive activation emerges. Layers are 0-based blocks.

    Attributes:
        layer: the first block whose output holds a massive activation, in more prompts than any other block (of equally
            many the earliest), those that share a massive first token counted once; None without one.
        reason: why `layer` is None, or how it was settled.
        kind: whether one block brings the massive activation, a few do, or the norm climbs slowly; None without one.
        magnification: ‖h_out‖ / ‖h_in‖ of the massive token at that block, mean over prompts (table 8); those that
            share a massive first token share its every state and count once. `share_of_peak` in the same way.
        magnification_interval, share_of_peak_interval: 95% intervals of these; (NaN, NaN) of fewer than three.
        relative_magnification: the same divided by the mean magnification of the prompt's other tokens in that block
            (block 0 lifts every token), mean over the prompts that have some; NaN where none has.
        share_of_peak: how much of the token's peak norm that one block brings, (‖h_out‖ - ‖h_in‖) / peak.
        climb: first and last block of the climb from 10% to 90% of the peak norm (median over prompts).
        formed: the block in whose output the massive state is formed: `layer` where that alone brings the peak norm of
            a prompt's largest massive token, else the first that reaches 90% of it (median over prompts).
        agreement, prompts_with: share of prompts whose first massive block is `layer`, and of those that have any.
        positions, dims: where in the output of `formed` they are, those of most prompts first, then the largest.
        n_layers: how many blocks the model has.
        n_prompts, distinct_first_tokens, criterion: what all this rests on.
        per_prompt: a row a prompt: `layer` (-1 for none), `pos`, `dim`, `value`, `norm_in`, `norm_out`,
            `magnification`, `relative_magnification`, `peak`, `share_of_peak`, `climb_from`, `climb_to`, all of the
            token that is the largest in the block `layer`; `formed` and `formed_pos`, of the largest in any block;
            `n_massive` and `first_is_massive`: how many massive tokens there are in the output of the emergence's
            block `formed`, and whether token 0 is one; only with an ME layer.
    """

    layer: int | None = None
    reason: str
    kind: Kind | None = None
    magnification: float | None = None
    magnification_interval: tuple[float, float] | None = None
    relative_magnification: float | None = None
    share_of_peak: float | None = None
    share_of_peak_interval: tuple[float, float] | None = None
    climb: tuple[int, int] | None = None
    formed: int | None = None
    agreement: float = 0.0
    prompts_with: float
    positions: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    n_layers: int
    n_prompts: int
    distinct_first_tokens: int
    criterion: Criterion
    per_prompt: pd.DataFrame

    def __repr__(self) -> str:
        if self.layer is None or self.magnification is None:
            return f"no ME layer among {self.n_layers} blocks"
        lift = with_interval(self.magnification, self.magnification_interval, ",.0f")
        return f"block {self.layer} of {self.n_layers}, × {lift}, token {self.positions[0]}, dim {self.dims[0]}"

    @property
    def lifted_position(self) -> int:
        """Where the token that `layer` lifts, of which `magnification` tells, most often is; 0 without a layer."""
        lifted = self.per_prompt[self.per_prompt["layer"] == self.layer]
        return int(lifted["pos"].mode().iloc[0]) if len(lifted) else 0

    def metrics(self) -> dict[str, Any]:
        """Everything but the table, ready for JSON; the layer under the name `me_layer`."""
        values = {name: value for name, value in asdict(self).items() if name != "per_prompt"}
        return {"me_layer": values.pop("layer"), **values}


CriterionGiven = Annotated[Criterion, InstanceOf(), Said("a Criterion, such as melens.Criterion(min_abs=100)")]


@checked
def massive_activations(trace: TraceGiven, criterion: CriterionGiven | None = None) -> pd.DataFrame:
    """List the massive entries of each block's output: `prompt`, `layer`, `pos`, `dim`, `value`, `abs_median`.

    A trace keeps some dims of the largest tokens (`LargestActivations`); of every other massive token there is one row,
    with its largest |h| as `value` and -1 as `dim`.

    Raises:
        MelensError: a trace that may not hold all massive tokens of this criterion, or holds NaN.
    """
    criterion = criterion or Criterion()
    largest = trace["largest"]
    kept = largest[largest["pos"] >= 0]  # elsewhere rows are empty: prompts have fewer tokens, or fewer massive ones
    _check_finite(trace, value=kept, abs_median=trace["abs_median"])
    entries = kept[(kept["site"] == "hook_resid_post") & (kept["value"].abs() > criterion.min_abs)]
    medians = trace["abs_median"].query("site == 'hook_resid_post'")[["prompt", "layer", "abs_median"]]
    entries = entries.merge(medians, on=["prompt", "layer"])
    massive = entries[entries["value"].abs() > criterion.min_ratio * entries["abs_median"]]
    _check_all_are_kept(trace, massive, criterion)
    return massive[["prompt", "layer", "pos", "dim", "value", "abs_median"]].reset_index(drop=True)


def _check_all_are_kept(trace: Trace, massive: pd.DataFrame, criterion: Criterion) -> None:
    """Raise a `MelensError` where all tokens that were kept are massive, and others, smaller, may be as well."""
    if criterion.min_abs >= LargestActivations().min_abs:
        return
    state = ["prompt", "layer"]
    kept = trace["largest"].query("site == 'hook_resid_post' and pos >= 0").groupby(state)["pos"].nunique()
    n_massive = massive.groupby(state)["pos"].nunique().reindex(kept.index, fill_value=0)
    lengths = trace.prompts.set_index("prompt")["n_tokens"].reindex(kept.index.get_level_values("prompt")).to_numpy()
    if ((n_massive == kept) & (kept < lengths)).any():
        raise MelensError(
            f"With a criterion of min_abs {criterion.min_abs:g} more tokens are massive than the trace keeps: trace "
            f"with melens.default_probes(model, min_abs={criterion.min_abs:g})."
        )


@checked
def find_me_layer(trace: TraceGiven, criterion: CriterionGiven | None = None) -> Emergence:
    """Find the massive emergence layer: the first block whose output holds a massive activation (section 3, table 8).

    Args:
        trace: with the tables of `default_probes()`: `norm`, `largest` and `abs_median`.
        criterion: see `Criterion`; held constant over models by default.

    Returns:
        An `Emergence`; without massive activations its `layer` is None and its `reason` says so.

    Raises:
        MelensError: a trace without those tables, or with NaN or infinite values in them.
    """
    criterion = criterion or Criterion()
    _check_finite(trace, norm=trace["norm"])
    massive = massive_activations(trace, criterion)
    per_prompt = _per_prompt(trace, massive, criterion)
    n_prompts = len(per_prompt)
    born = per_prompt[per_prompt["layer"] >= 0].merge(trace.prompts[["prompt", "first_token_id"]], on="prompt")
    layer, reason = _settle(trace, born, n_prompts, criterion)
    shared: dict[str, Any] = {
        "reason": reason, "prompts_with": len(born) / n_prompts, "n_layers": trace.model["n_layers"],
        "n_prompts": n_prompts, "distinct_first_tokens": int(trace.prompts["first_token_id"].nunique()),
        "criterion": criterion, "per_prompt": per_prompt,
    }  # fmt: skip
    if layer is None:
        return Emergence(**shared)
    agreeing = born[born["layer"] == layer]
    formed = int(agreeing["formed"].median())
    of_agreeing = massive[massive["prompt"].isin(agreeing["prompt"])]
    # `formed` is a median over prompts: an entry that is massive in no prompt there is looked for in the ME layer
    read_at = formed if formed in set(of_agreeing["layer"]) else layer
    in_formed, entries = (table[table["layer"] == read_at] for table in (massive, of_agreeing))
    shared["per_prompt"] = _with_massive_tokens(per_prompt, in_formed)
    climb = int(agreeing["climb_from"].median()), int(agreeing["climb_to"].median())
    apart = one_a_state(agreeing)
    share = float(apart["share_of_peak"].mean())
    kind: Kind = "a few blocks" if climb[1] - climb[0] < criterion.few_blocks else "slow climb"
    if share >= criterion.one_block:
        kind = "one block"
    return Emergence(
        layer=layer,
        kind=kind,
        magnification=float(apart["magnification"].mean()),
        magnification_interval=mean_interval(apart["magnification"].to_numpy()),
        relative_magnification=float(agreeing["relative_magnification"].mean()),
        share_of_peak=share,
        share_of_peak_interval=mean_interval(apart["share_of_peak"].to_numpy()),
        climb=climb,
        formed=formed,
        agreement=len(agreeing) / n_prompts,
        positions=_most_frequent(entries, "pos"),
        dims=_most_frequent(entries[entries["dim"] >= 0], "dim"),
        **shared,
    )


def one_a_state(prompts: pd.DataFrame) -> pd.DataFrame:
    """Keep one of the prompts that share a massive token 0: in a causal model they share its every state.

    Args:
        prompts: rows of `Emergence.per_prompt` with `first_token_id`.
    """
    at_first = prompts["pos"] == 0
    return prompts[~at_first | ~prompts[["first_token_id", "layer"]].where(at_first).duplicated()]


def _most_frequent(entries: pd.DataFrame, column: str) -> tuple[int, ...]:
    """List the positions or dims, those of most prompts first; of equally many the one with the largest |h|, mean."""
    # not the number of entries: twenty small massive tokens of a prompt would outvote the dim of its large one
    sizes = entries.assign(size=entries["value"].abs()).groupby(column)
    order = sizes.agg(n=("prompt", "nunique"), size=("size", "mean")).sort_values(["n", "size"], ascending=False)
    return tuple(int(at) for at in order.index)


def _with_massive_tokens(per_prompt: pd.DataFrame, massive: pd.DataFrame) -> pd.DataFrame:
    """Add how many massive tokens each prompt holds among these entries of one block, and whether token 0 is one."""
    of_prompt = massive.groupby("prompt")["pos"]
    n_massive = of_prompt.nunique().reindex(per_prompt["prompt"], fill_value=0).to_numpy()
    at_first = of_prompt.min().reindex(per_prompt["prompt"]).to_numpy() == 0
    return per_prompt.assign(n_massive=n_massive, first_is_massive=at_first)


def _check_finite(trace: Trace, **tables: pd.DataFrame) -> None:
    """Raise a `MelensError` for the first block with NaN in a table's column, which `max` and `>` would pass by."""
    read = [table[table["site"].isin(_SITES) & ~np.isfinite(table[column])] for column, table in tables.items()]
    broken = pd.concat(read)
    if not broken.empty:
        after = broken["layer"].where(broken["site"] == "hook_resid_post", -1)
        first = broken.loc[(after == after.min()).to_numpy(), "prompt"].unique()
        what = "the embeddings" if after.min() < 0 else f"block {after.min()}"
        raise MelensError(
            f"The output of {what} is not finite in {len(first)} of {len(trace.prompts)} prompts, first in prompt "
            f"{min(first)} ({trace.model.get('dtype')}): load the model in bfloat16 or float32."
        )


def _settle(trace: Trace, born: pd.DataFrame, n_prompts: int, criterion: Criterion) -> tuple[int | None, str]:
    if born.empty:
        largest = trace["largest"].query("site == 'hook_resid_post'")["value"].abs().max()
        return None, (
            f"No block's output holds an entry with |h| > {criterion.min_abs:g} and > {criterion.min_ratio:,g} × the "
            f"median |h| (the largest |h| is {largest:.4g})."
        )
    if len(born) < criterion.min_prompts * n_prompts:
        return None, f"Only {len(born)} of {n_prompts} prompts hold a massive activation at any block."
    by_state = one_a_state(born)["layer"].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    counts = born["layer"].value_counts().loc[by_state.index]
    others = ", ".join(f"block {layer} in {count}" for layer, count in counts.iloc[1:].items())
    layer, end = int(counts.index[0]), f" ({others})." if others else "."
    if counts.iloc[0] < counts.max():
        end += " Prompts that share a massive first token share its every state, and count once."
    return layer, f"First massive at block {layer} in {counts.iloc[0]} of {n_prompts} prompts{end}"


def _per_prompt(trace: Trace, massive: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    norms = _norms_by_layer(trace)
    rows = []
    for prompt in range(len(trace.prompts)):
        row: dict[str, Any] = {"prompt": prompt, "layer": -1}
        of_prompt = massive[massive["prompt"] == prompt]
        if not of_prompt.empty:
            at_birth = of_prompt[of_prompt["layer"] == of_prompt["layer"].min()]
            largest = at_birth.loc[at_birth["value"].abs().idxmax()]
            row |= {"layer": int(largest["layer"]), "pos": int(largest["pos"]), "dim": int(largest["dim"])}
            row["value"] = float(largest["value"])
            of_norms = norms[prompt].to_numpy(dtype=float)
            row |= _rise(of_norms, row["layer"], row["pos"], set(at_birth["pos"]), criterion)
            row |= _formed(of_norms, of_prompt, row["layer"], criterion)
        rows.append(row)
    return pd.DataFrame(rows).reindex(columns=_PER_PROMPT)  # all of them, also where no prompt has a massive token


def _rise(
    norms: np.ndarray, layer: int, position: int, massive_positions: set[int], criterion: Criterion
) -> dict[str, float | int]:
    """Describe how a prompt's massive token rises; `norms` is `[embeddings and blocks, pos]`."""
    before, after = norms[layer], norms[layer + 1]
    ordinary = [at for at in range(norms.shape[1]) if at not in massive_positions]
    others = [at for at in ordinary if before[at] > 0]  # a padding token's embedding may be 0
    token, norm_in, norm_out = norms[1:, position], float(before[position]), float(after[position])
    peak = _peak(token, layer, criterion)
    magnification = float(after[position] / before[position])
    relative = magnification / float((after[others] / before[others]).mean()) if others else np.nan
    return {
        "norm_in": norm_in, "norm_out": norm_out,
        "magnification": magnification, "relative_magnification": relative,
        "peak": peak, "share_of_peak": (norm_out - norm_in) / peak,
        "climb_from": _first_reaching(0.1 * peak, token), "climb_to": _first_reaching(0.9 * peak, token),
    }  # fmt: skip


def _formed(norms: np.ndarray, massive: pd.DataFrame, layer: int, criterion: Criterion) -> dict[str, int]:
    """Find a prompt's largest massive token, the trailing blocks apart, and the block that completes it.

    That is the ME layer where it alone brings the token's peak norm, else the first that reaches 90% of it.
    """
    lasting = massive[massive["layer"] < max(layer + 1, len(norms) - 1 - criterion.trailing_blocks)]
    position = int(lasting["pos"].to_numpy()[lasting["value"].abs().to_numpy().argmax()])
    token = norms[1:, position]
    peak = _peak(token, layer, criterion)
    brings_it = token[layer] - norms[layer, position] >= criterion.one_block * peak
    formed = layer if brings_it else max(layer, _first_reaching(0.9 * peak, token))
    return {"formed": formed, "formed_pos": position}


def _peak(token: np.ndarray, layer: int, criterion: Criterion) -> float:
    return float(token[: max(layer + 1, len(token) - criterion.trailing_blocks)].max())


def _first_reaching(norm: float, token: np.ndarray) -> int:
    return int(np.argmax(token >= norm))


def _norms_by_layer(trace: Trace) -> pd.DataFrame:
    """Lay ‖h‖ out with a row for the embeddings (-1) and each block, a column for each prompt and position."""
    table = trace["norm"]
    table = table[table["site"].isin(_SITES)]
    layers = table["layer"].where(table["site"] == "hook_resid_post", -1)
    wide = table.assign(layer=layers).pivot(index="layer", columns=["prompt", "pos"], values="norm").sort_index(axis=1)
    if list(wide.index) != list(range(-1, trace.model["n_layers"])) or wide.isna().any(axis=None):
        raise MelensError(
            "find_me_layer needs the norms of the embeddings and of every block's output: trace with "
            "melens.default_probes(model)."
        )
    return wide
