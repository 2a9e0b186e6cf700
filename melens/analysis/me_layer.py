"""Where a model's massive activation is born: the criterion, and `find_me_layer(trace) -> Emergence` (section 3).

1. `massive_activations` lists the entries of every block's output that meet the criterion (Sun et al. 2024).
2. Of each prompt the first block with such an entry counts, and how the norm of the token with the largest one rises.
3. The ME layer is the block that is the first in most prompts, of which those that share a massive first token count
   once, as they share its every state; of these prompts the numbers are averaged.
4. The massive state is formed where the climb of the largest token ends: in the ME layer itself, if that block alone
   brings it, else later. Its dims and positions are read off there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import InstanceOf

from melens.analysis.statistics import mean_interval, with_interval
from melens.errors import MelensError
from melens.printing import Summary
from melens.tracing.probes import LargestActivations
from melens.tracing.tables import Grid
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

_NONE = {name: np.empty(0, dtype=np.int32) for name in ("prompt", "layer", "pos", "dim")}
_NONE |= {name: np.empty(0, dtype=np.float32) for name in ("value", "abs_median")}
_WHOLE = ("pos", "dim", "climb_from", "climb_to", "formed", "formed_pos")
"""Columns of whole numbers, as far as every prompt has one."""


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

    Example:
        >>> melens.find_me_layer(trace, melens.Criterion(min_abs=200)).layer
        2
    """

    min_abs: Number = 100
    min_ratio: Number = 1_000
    min_prompts: Rate = 0.5
    trailing_blocks: Whole = 2
    one_block: Number = 0.8
    few_blocks: Whole = 3

    def __post_init__(self) -> None:
        check_fields(self, "The criterion's {}")


@dataclass(frozen=True, kw_only=True, repr=False)
class Emergence(Summary):
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

    Example:
        >>> me = melens.find_me_layer(trace)
        >>> me.layer, me.kind, me.positions
        (2, 'one block', (0,))
        >>> me.per_prompt[["prompt", "layer", "pos"]]
           prompt  layer  pos
        0       0      2    0
        1       1      2    0
        2       2      2    0
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

    def _heading(self) -> str:
        if self.layer is None or self.magnification is None:
            return f"no ME layer among {self.n_layers} blocks"
        lift = with_interval(self.magnification, self.magnification_interval, ",.0f")
        return f"block {self.layer} of {self.n_layers}, × {lift}, token {self.positions[0]}, dim {self.dims[0]}"

    def _details(self) -> list[tuple[str, str]]:
        rows = [("reason", self.reason), ("first tokens", f"{self.distinct_first_tokens} distinct")]
        if self.layer is None or self.share_of_peak is None:
            return rows
        return [
            *rows,
            ("kind", self.kind or ""),
            ("share of the peak norm", with_interval(self.share_of_peak, self.share_of_peak_interval, ".0%")),
            ("formed", f"block {self.formed}"),
            ("positions", ", ".join(map(str, self.positions))),
            ("dims", ", ".join(map(str, self.dims))),
        ]

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
    """List the massive entries of each block's output (Sun et al. 2024).

    Args:
        trace: with the tables of `default_probes()`.
        criterion: of what counts as massive.

    Returns:
        A row for each: `prompt`, `layer`, `pos`, `dim`, `value`, `abs_median`. A trace keeps some dims of the largest
        tokens (`LargestActivations`); of every other massive token there is one row, with its largest |h| as `value`
        and -1 as `dim`.

    Raises:
        MelensError: a trace that may not hold all massive tokens of this criterion, or holds NaN.

    Example:
        >>> massive = melens.massive_activations(trace)
        >>> int(massive["layer"].min()), massive["pos"].unique().tolist()
        (2, [0])
    """
    trace, criterion = _in_order(trace), criterion or Criterion()
    massive = _massive(trace, criterion)
    _check_all_are_kept(trace, massive, criterion)
    return pd.DataFrame(massive)


def _in_order(trace: Trace) -> Trace:
    """Return the trace with its prompts in the order of their numbers.

    Raises:
        MelensError: numbers other than 0 to n - 1, as where rows were taken out.
    """
    prompts = trace.prompts.sort_values("prompt", kind="stable")
    if prompts["prompt"].tolist() != list(range(len(prompts))):
        raise MelensError(f"The trace's {len(prompts)} prompts must be numbered from 0 on: trace again those you want.")
    return replace(trace, prompts=prompts)


def _massive(trace: Trace, criterion: Criterion) -> dict[str, np.ndarray]:
    """List the massive entries of each block's output as columns, by batch, block, prompt and rank."""
    medians = _medians(trace)
    found: list[dict[str, np.ndarray]] = [_NONE]
    for grid in trace.grids("largest", index="rank"):
        (layers, value), (_, pos), (_, dim) = (grid.at(name, "hook_resid_post") for name in ("value", "pos", "dim"))
        if np.count_nonzero(np.isfinite(value)) != np.count_nonzero(pos >= 0):  # -1 where there is no token to keep
            _check_finite(
                trace, {layer: (pos[at] >= 0) & ~np.isfinite(value[at]) for at, layer in enumerate(layers)}, grid
            )
        at = np.unravel_index(np.flatnonzero((value > criterion.min_abs) | (value < -criterion.min_abs)), value.shape)
        layer, prompt = np.asarray(layers, dtype=np.int32)[at[0]], grid.prompts.astype(np.int32)[at[1]]
        median = medians[prompt, layer]
        is_massive = np.abs(value[at]) > criterion.min_ratio * median
        columns = {"prompt": prompt, "layer": layer, "pos": pos[at], "dim": dim[at], "value": value[at]}
        found.append(_only(columns | {"abs_median": median}, is_massive))
    return {name: np.concatenate([of_grid[name] for of_grid in found]) for name in found[0]}


def _medians(trace: Trace) -> np.ndarray:
    """Lay the medians of the blocks' outputs out as `[prompt, layer]`."""
    medians = np.full((len(trace.prompts), trace.model["n_layers"]), np.nan, dtype=np.float32)
    for grid in trace.grids("abs_median"):
        layers, values = grid.at("abs_median", "hook_resid_post")
        _check_finite(trace, {layer: ~np.isfinite(values[at])[:, None] for at, layer in enumerate(layers)}, grid)
        medians[grid.prompts[:, None], layers] = values.T
    return medians


def _check_all_are_kept(trace: Trace, massive: Mapping[str, np.ndarray], criterion: Criterion) -> None:
    """Raise a `MelensError` where all tokens that were kept are massive, and others, smaller, may be as well."""
    if criterion.min_abs >= LargestActivations().min_abs:
        return
    state = ["prompt", "layer"]
    kept = trace["largest"].query("site == 'hook_resid_post' and pos >= 0").groupby(state)["pos"].nunique()
    n_massive = pd.DataFrame(massive).groupby(state)["pos"].nunique().reindex(kept.index, fill_value=0)
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

    Example:
        >>> melens.find_me_layer(melens.trace(model, prompts)).layer
        2
    """
    trace, criterion = _in_order(trace), criterion or Criterion()
    for name in ("norm", "largest", "abs_median"):
        if name not in trace.tables:
            trace[name]  # says what it has
    norms = _norms(trace)
    massive = _massive(trace, criterion)
    _check_all_are_kept(trace, massive, criterion)
    of_prompt = _per_prompt(len(trace.prompts), norms, massive, criterion)
    n_prompts, n_born = len(of_prompt["layer"]), int((of_prompt["layer"] >= 0).sum())
    first_tokens = trace.prompts["first_token_id"].to_numpy()
    layer, reason = _settle(trace, of_prompt, first_tokens, criterion)
    shared: dict[str, Any] = {
        "reason": reason, "prompts_with": n_born / n_prompts, "n_layers": trace.model["n_layers"],
        "n_prompts": n_prompts, "distinct_first_tokens": len(np.unique(first_tokens)), "criterion": criterion,
    }  # fmt: skip
    if layer is None:
        return Emergence(**shared, per_prompt=pd.DataFrame(of_prompt))
    agrees = of_prompt["layer"] == layer
    agreeing = {name: values[agrees] for name, values in of_prompt.items()}
    formed = int(np.median(agreeing["formed"]))
    is_of_agreeing = agrees[massive["prompt"]]
    # `formed` is a median over prompts: an entry that is massive in no prompt there is looked for in the ME layer
    read_at = formed if formed in massive["layer"][is_of_agreeing] else layer
    is_there = massive["layer"] == read_at
    in_formed, there = _only(massive, is_there), _only(massive, is_there & is_of_agreeing)
    climb = int(np.median(agreeing["climb_from"])), int(np.median(agreeing["climb_to"]))
    apart = _only(agreeing, _is_one_a_state(first_tokens[agrees], agreeing["layer"], agreeing["pos"]))
    share = float(apart["share_of_peak"].mean())
    kind: Kind = "a few blocks" if climb[1] - climb[0] < criterion.few_blocks else "slow climb"
    if share >= criterion.one_block:
        kind = "one block"
    relative = agreeing["relative_magnification"]
    return Emergence(
        layer=layer,
        kind=kind,
        magnification=float(apart["magnification"].mean()),
        magnification_interval=mean_interval(apart["magnification"]),
        relative_magnification=float(np.nanmean(relative)) if np.isfinite(relative).any() else np.nan,
        share_of_peak=share,
        share_of_peak_interval=mean_interval(apart["share_of_peak"]),
        climb=climb,
        formed=formed,
        agreement=float(agrees.mean()),
        positions=_most_frequent(there, "pos"),
        dims=_most_frequent(_only(there, there["dim"] >= 0), "dim"),
        per_prompt=pd.DataFrame(of_prompt | _massive_tokens(n_prompts, in_formed)),
        **shared,
    )


def one_a_state(prompts: pd.DataFrame) -> pd.DataFrame:
    """Keep one of the prompts that share a massive token 0: in a causal model they share its every state.

    Args:
        prompts: rows of `Emergence.per_prompt` with `first_token_id`.
    """
    first_tokens, layers, positions = (prompts[name].to_numpy() for name in ("first_token_id", "layer", "pos"))
    return prompts[_is_one_a_state(first_tokens, layers, positions)]


def _is_one_a_state(first_tokens: np.ndarray, layers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Mark the first of the prompts that share a massive token 0, and all others whose massive token is another."""
    is_one = positions != 0
    at_first = np.nonzero(~is_one)[0]
    is_one[at_first[_distinct(first_tokens[at_first], layers[at_first] + 1)]] = True  # -1 for none
    return is_one


def _distinct(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return where each pair of whole numbers, none below 0, stands first."""
    pairs = first.astype(np.int64) * (int(second.max(initial=0)) + 1) + second
    return np.unique(pairs, return_index=True)[1]


def _only(columns: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[rows] for name, values in columns.items()}


def _most_frequent(entries: Mapping[str, np.ndarray], column: str) -> tuple[int, ...]:
    """List the positions or dims, those of most prompts first; of equally many the one with the largest |h|, mean."""
    # not the number of entries: twenty small massive tokens of a prompt would outvote the dim of its large one
    found, which = np.unique(entries[column], return_inverse=True)
    n_prompts = np.bincount(which[_distinct(which, entries["prompt"])], minlength=len(found))
    sizes = np.bincount(which, np.abs(entries["value"]), len(found)) / np.bincount(which, minlength=len(found))
    return tuple(found[np.lexsort((-sizes, -n_prompts))].tolist())


def _massive_tokens(n_prompts: int, massive: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Count the massive tokens of each prompt among these entries of one block, and tell whether token 0 is one."""
    tokens = _only(massive, _distinct(massive["prompt"], massive["pos"]))
    n_massive, at_first = (
        np.bincount(tokens["prompt"][among], minlength=n_prompts) for among in (slice(None), tokens["pos"] == 0)
    )
    return {"n_massive": n_massive, "first_is_massive": at_first > 0}


def _check_finite(trace: Trace, broken: Mapping[int, np.ndarray], grid: Grid) -> None:
    """Raise a `MelensError` for the first block with NaN, which `max` and `>` would pass by.

    Args:
        broken: by block (-1 for the embeddings), in which prompts and where what was measured is not finite.
        grid: of these prompts.
    """
    for layer, where in sorted(broken.items()):
        if where.any():
            prompts = grid.prompts[where.any(1)]
            what = "the embeddings" if layer < 0 else f"block {layer}"
            raise MelensError(
                f"The output of {what} is not finite in {len(prompts)} of {len(trace.prompts)} prompts, first in "
                f"prompt {prompts.min()} ({trace.model.get('dtype')}): load the model in bfloat16 or float32."
            )


def _settle(
    trace: Trace, of_prompt: Mapping[str, np.ndarray], first_tokens: np.ndarray, criterion: Criterion
) -> tuple[int | None, str]:
    """Choose the ME layer, and say why."""
    is_born, n_prompts = of_prompt["layer"] >= 0, len(first_tokens)
    born = _only(of_prompt, is_born)
    n_born = len(born["layer"])
    if not n_born:
        values = [grid.at("value", "hook_resid_post")[1] for grid in trace.grids("largest", index="rank")]
        largest = max((float(np.nanmax(np.abs(of_grid))) for of_grid in values), default=0.0)
        return None, (
            f"No block's output holds an entry with |h| > {criterion.min_abs:g} and > {criterion.min_ratio:,g} × the "
            f"median |h| (the largest |h| is {largest:.4g})."
        )
    if n_born < criterion.min_prompts * n_prompts:
        return None, f"Only {n_born} of {n_prompts} prompts hold a massive activation at any block."
    layers, counts = np.unique(born["layer"], return_counts=True)
    apart = born["layer"][_is_one_a_state(first_tokens[is_born], born["layer"], born["pos"])]
    order = np.argsort(-(apart == layers[:, None]).sum(1), kind="stable")  # of equally many the earliest first
    layers, counts = layers[order].tolist(), counts[order].tolist()
    others = ", ".join(f"block {layer} in {count}" for layer, count in zip(layers[1:], counts[1:], strict=True))
    end = f" ({others})." if others else "."
    if counts[0] < max(counts):
        end += " Prompts that share a massive first token share its every state, and count once."
    return layers[0], f"First massive at block {layers[0]} in {counts[0]} of {n_prompts} prompts{end}"


def _norms(trace: Trace) -> list[tuple[Grid, np.ndarray]]:
    """Lay ‖h‖ out as `[embeddings and blocks, prompt, pos]`, by batch; 0 behind the end of a prompt."""
    found = []
    for grid in trace.grids("norm", index="pos"):
        sites = [grid.at("norm", site) for site in _SITES]
        if [layers for layers, _ in sites] != [[0], list(range(trace.model["n_layers"]))]:
            raise MelensError(
                "find_me_layer needs the norms of the embeddings and of every block's output: trace with "
                "melens.default_probes(model)."
            )
        is_token = np.arange(sites[0][1].shape[-1]) < grid.lengths[:, None]
        norms = np.concatenate([np.where(is_token, values, 0) for _, values in sites])
        _check_finite(trace, {at - 1: ~np.isfinite(of_state) for at, of_state in enumerate(norms)}, grid)
        found.append((grid, norms))
    if not found:
        raise MelensError("The trace's table 'norm' is empty.")
    return found


def _per_prompt(
    n_prompts: int, norms: Sequence[tuple[Grid, np.ndarray]], massive: Mapping[str, np.ndarray], criterion: Criterion
) -> dict[str, np.ndarray]:
    """Describe how the massive token of each prompt rises, as columns; `layer` is -1, and all else NaN, without one."""
    prompts, layers = massive["prompt"], massive["layer"]
    n_blocks = len(norms[0][1]) - 1
    birth = np.full(n_prompts, n_blocks)
    birth[prompts[::-1]] = layers[::-1]  # the earliest, which is written last
    columns = {name: np.full(n_prompts, np.nan) for name in _PER_PROMPT}
    columns |= {"prompt": np.arange(n_prompts), "layer": np.where(birth < n_blocks, birth, -1)}
    is_birth = layers == birth[prompts]
    first = _largest_of_each_prompt(massive, is_birth)
    for name in ("pos", "dim", "value"):
        columns[name][prompts[first]] = massive[name][first]
    largest = _largest_of_each_prompt(massive, layers < _lasting(birth, n_blocks, criterion)[prompts])
    columns["formed_pos"][prompts[largest]] = massive["pos"][largest]
    for grid, of_grid in norms:
        within = columns["layer"][grid.prompts] >= 0
        own, states = grid.prompts[within], of_grid[:, within].astype(float)
        row_of = np.full(n_prompts, -1)
        row_of[own] = np.arange(len(own))
        here = is_birth & (row_of[prompts] >= 0)
        is_massive = np.zeros(states.shape[1:], dtype=bool)
        is_massive[row_of[prompts[here]], massive["pos"][here]] = True
        layer, position, formed_pos = (columns[name][own].astype(int) for name in ("layer", "pos", "formed_pos"))
        found = _rise(states, layer, position, is_massive, criterion)
        found["formed"] = _formed(states, layer, formed_pos, criterion)
        for name, values in found.items():
            columns[name][own] = values
    whole = {name: columns[name].astype(int) for name in _WHOLE if np.isfinite(columns[name]).all()}
    return columns | whole


def _largest_of_each_prompt(massive: Mapping[str, np.ndarray], among: np.ndarray) -> np.ndarray:
    """Return where each prompt's entry with the largest |h| is among some entries; of equals the first."""
    at = np.nonzero(among)[0]
    at = at[np.lexsort((-np.abs(massive["value"][at]), massive["prompt"][at]))]
    return at[np.unique(massive["prompt"][at], return_index=True)[1]]


def _rise(
    states: np.ndarray, layer: np.ndarray, position: np.ndarray, is_massive: np.ndarray, criterion: Criterion
) -> dict[str, np.ndarray]:
    """Describe how massive tokens rise.

    Args:
        states: ‖h‖ `[embeddings and blocks, prompt, pos]`, 0 behind the end of a prompt.
        layer, position: of each prompt's massive token, where it is first massive.
        is_massive: `[prompt, pos]`, the massive tokens in that block's output.
    """
    rows = np.arange(len(layer))
    before, after, token = states[layer, rows], states[layer + 1, rows], states[1:, rows, position]
    norm_in, norm_out = before[rows, position], after[rows, position]
    is_other = ~is_massive & (before > 0)  # a padding token's embedding may be 0
    lifts = np.divide(after, before, out=np.zeros_like(before), where=is_other)
    with np.errstate(divide="ignore", invalid="ignore"):
        magnification = norm_out / norm_in
        relative = magnification / (lifts.sum(1) / is_other.sum(1))
    peak = _peak(token, layer, criterion)
    return {
        "norm_in": norm_in, "norm_out": norm_out,
        "magnification": magnification, "relative_magnification": relative,
        "peak": peak, "share_of_peak": (norm_out - norm_in) / peak,
        "climb_from": _first_reaching(0.1 * peak, token), "climb_to": _first_reaching(0.9 * peak, token),
    }  # fmt: skip


def _formed(states: np.ndarray, layer: np.ndarray, position: np.ndarray, criterion: Criterion) -> np.ndarray:
    """Find the block that completes each prompt's largest massive token, `position`; other arguments as for `_rise`.

    That is the ME layer where it alone brings the token's peak norm, else the first that reaches 90% of it.
    """
    rows = np.arange(len(layer))
    token = states[1:, rows, position]
    peak = _peak(token, layer, criterion)
    brings_it = token[layer, rows] - states[layer, rows, position] >= criterion.one_block * peak
    return np.where(brings_it, layer, np.maximum(layer, _first_reaching(0.9 * peak, token)))


def _peak(token: np.ndarray, layer: np.ndarray, criterion: Criterion) -> np.ndarray:
    """Return the peak of norms `[block, prompt]`, the trailing blocks apart."""
    is_lasting = np.arange(len(token))[:, None] < _lasting(layer, len(token), criterion)
    return np.where(is_lasting, token, 0).max(0)


def _lasting(layer: np.ndarray, n_blocks: int, criterion: Criterion) -> np.ndarray:
    """Return how many blocks there are without the trailing ones, but at least up to the one given."""
    return np.maximum(layer + 1, n_blocks - criterion.trailing_blocks)


def _first_reaching(norm: np.ndarray, token: np.ndarray) -> np.ndarray:
    return np.argmax(token >= norm, axis=0)
