"""What makes the massive activation: parts of blocks removed, restored and patched (figure 9; the review's point 1).

    result = melens.analysis.ablation(study)
    result.metrics.causal_layers   # the blocks without whose FFN at most half of it is left

1. The prompts are cut after their massive token and run once; every run that changes a block starts at that block.
2. In the ME layer the FFN is removed, the norm before it is changed in three senses, and both are crossed.
3. In every block the FFN, the norm's gain and the attention output are removed one at a time.
4. Up to the ME layer FFN outputs are patched between the intact run and one without another block's FFN.

What is left is always ‖h‖ / ‖h intact‖ of the massive token, averaged over `Study.massive_layers`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from melens.analysis.block_ablation_claims import AblationMetrics
from melens.analysis.statistics import mean_by, mean_interval, mean_metric, tidy, with_interval
from melens.analysis.study import Study
from melens.errors import MelensError
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.heatmaps import Heatmap, heatmaps
from melens.figures.style import COLORS
from melens.models.layout import listed
from melens.models.normalization import named_normalization
from melens.printing import paragraph
from melens.report.result import Figure, Result
from melens.tracing import interventions
from melens.tracing.interventions import Hook, MassiveTokenRuns, Part, can_ablate

__all__ = ["ablation"]

SENSES: dict[str, Part] = {"identity": "ln2_identity", "no_gain": "ln2_no_gain", "no_norm": "ln2_no_norm"}
"""What "without the norm before the FFN" may mean."""

TEXTS: dict[Part, str] = {
    "ffn": "FFN removed",
    "attention": "attention output removed",
    "ln2_identity": "norm → identity",
    "ln2_no_gain": "norm without its gain",
    "ln2_no_norm": "gain without the norm",
}
CAUSES: tuple[Part, ...] = ("ffn", "ln2_no_gain", "attention")
"""What is removed from every block in turn."""


def ablation(study: Study, *, max_position: int = 64) -> Result:
    """Remove, restore and patch parts of blocks, and measure what is left of the massive token's norm.

    Args:
        study: as `melens.study` makes it.
        max_position: prompts whose massive token stands there or later are left out, as they make long runs.

    Returns:
        Metrics `AblationMetrics`; the figures `removed` (figure 9), `factorial`, `causality`, `causes`, `patching`.

    Raises:
        MelensError: no massive activation, none before `max_position`, an ME layer whose FFN cannot be removed, or a
            norm that is NaN.

    Example:
        >>> result = melens.analysis.ablation(study)
        >>> round(result.metrics.left_without_ffn, 1)  # of the norm, without the ME layer's FFN
        0.0
    """
    runs = _runs(study, max_position)
    me_layer = runs.me_layer
    if not can_ablate(study.model, me_layer, "ffn"):
        raise MelensError(
            f"Block {me_layer}, the ME layer, has no FFN output to remove: there is {study.layout.ffn_in_words}."
        )
    senses = {sense: part for sense, part in SENSES.items() if can_ablate(study.model, me_layer, part)}
    removed = {part: runs.without((me_layer, part)) for part in ("ffn", *senses.values())}
    by_block, factorial = _removed_by_block(runs, removed), _factorial(runs, senses)
    evaluated_before = runs.runs.block_evaluations
    causality, causes = _causality(runs)
    by_part = {part: causes[causes["part"] == part] for part in CAUSES}
    left_by_cause = {part: dict(zip(rows["layer"], rows["mean"], strict=True)) for part, rows in by_part.items()}
    intervals = by_part["ffn"][["low", "high"]].itertuples(index=False, name=None)
    of_ffn = left_by_cause["ffn"]
    metrics = study.metrics(
        AblationMetrics,
        **study.layout.metrics(),
        ablation_prompts=runs.n_prompts,
        **_left_at_me_layer(runs, removed, senses),
        causal_layers=[layer for layer, left in of_ffn.items() if left <= 0.5],
        strongest_cause=min(of_ffn, key=of_ffn.__getitem__),
        left_by_cause=left_by_cause,
        left_by_ffn_intervals=dict(zip(by_part["ffn"]["layer"], intervals, strict=True)),
        block_evaluations=runs.runs.block_evaluations - evaluated_before,
        block_evaluations_from_the_start=causality.groupby(["part", "cause"]).ngroups * study.n_layers,
    )
    patched = _patching(runs)
    findings = _findings(runs, metrics, patched)
    of_me_layer, of_every_block, of_patching = findings[:2], findings[2:-1], findings[-1:]
    figures = {
        "removed": _removed_figure(runs, by_block, paragraph(of_me_layer)),
        "factorial": _factorial_figure(runs, factorial),
        "causality": _causality_figure(runs, causality, paragraph(of_every_block)),
        "causes": _causes_figure(runs, causes, paragraph(of_every_block)),
        "patching": _patching_figure(runs, patched, paragraph(of_patching)),
    }
    tables = {"removed_by_block": by_block, "factorial": factorial}
    tables |= {"causality": causality, "causes": causes, "patching": patched}
    return Result("ablation", study.trace.model, metrics, tables, figures, findings)


# --- Runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Runs:
    """The prompts cut after their massive token, and how to read what is left of it."""

    study: Study
    runs: MassiveTokenRuns
    me_layer: int
    others: Float[np.ndarray, " layer"]  # the mean norm of their other tokens, intact

    @property
    def n_prompts(self) -> int:
        return len(self.runs.intact)

    @property
    def layers(self) -> list[int]:
        """The blocks after which the massive activation is there in the intact run, the trailing ones apart."""
        return list(self.study.massive_layers) or [self.me_layer]

    def left(self, norms: Float[Tensor, "prompt layer"], start: int = 0) -> np.ndarray:
        """Average ‖h‖ / ‖h intact‖ of each prompt's massive token over those of `layers` from `start` on."""
        after = [layer for layer in self.layers if layer >= start]
        return (norms / self.runs.intact)[:, after].mean(dim=1).numpy()

    def over_others(self, norms: Float[Tensor, "prompt layer"], layers: Sequence[int]) -> np.ndarray:
        """Divide ‖h‖ by the mean of the other tokens' in the intact run: `[prompt, layer]`."""
        ratios: np.ndarray = norms.numpy()[:, list(layers)] / self.others[list(layers)]
        return ratios

    def without(self, *parts: tuple[int, Part]) -> Float[Tensor, "prompt layer"]:
        """Run without parts, each given as (block, part)."""
        hooks = [hook for layer, part in parts for hook in interventions.ablation(self.study.model, layer, part)]
        return self.run([hooks], min(layer for layer, _ in parts))[0]

    def run(self, changes: Sequence[Sequence[Hook]], start: int) -> list[Float[Tensor, "prompt layer"]]:
        """Run from a block on with each of some changes, and measure the massive tokens' norms; NaN before."""
        found = self.runs.run_each(changes, start)
        for norms in found:
            for prompt, after in (~norms[:, start:].isfinite()).nonzero()[:1].tolist():
                raise MelensError(
                    f"With a part of block {start} changed, the massive token's norm after block {start + after} is "
                    f"{float(norms[prompt, start + after])}: load the model in bfloat16 or float32."
                )
        return found


def _runs(study: Study, max_position: int) -> _Runs:
    if study.me.layer is None:
        raise MelensError(f"There is no massive activation whose causes could be removed: {study.me.reason}")
    born = study.me.per_prompt
    massive = born[born["prompt"].isin(study.massive_states) & (born["formed_pos"] < max_position)]
    if massive.empty:
        raise MelensError(f"Every massive token is at position {max_position} or later: raise exp.max_position.")
    prompts, positions = massive["prompt"].tolist(), massive["formed_pos"].astype(int).tolist()
    norms = study.trace["norm"].query("site == 'hook_resid_post'")
    norms = norms.merge(massive[["prompt", "formed_pos"]].rename(columns={"formed_pos": "massive"}), on="prompt")
    is_massive = norms["pos"] == norms["massive"]
    traced = norms[is_massive].pivot(index="prompt", columns="layer", values="norm").loc[prompts]
    tokens = [study.tokens[prompt] for prompt in prompts]
    runs = MassiveTokenRuns(study.model, tokens, positions, torch.tensor(traced.to_numpy()))
    others = norms[~is_massive].groupby("layer")["norm"].mean().reindex(range(study.n_layers))
    return _Runs(study, runs, study.me.layer, others.to_numpy(dtype=float))


# --- In the ME layer --------------------------------------------------------------------------------------------------


def _removed_by_block(runs: _Runs, removed: dict[Part, Float[Tensor, "prompt layer"]]) -> pd.DataFrame:
    """Average the massive token's norm after each block, intact and without each part: columns of `mean_by`."""
    intact = runs.runs.intact
    norms = {"intact": intact}  # before the ME layer, where a run has NaN, nothing changed
    norms |= {TEXTS[part]: torch.where(without.isnan(), intact, without) for part, without in removed.items()}
    tables = [mean_by(tidy(each.numpy(), "norm"), "norm").assign(removed=name) for name, each in norms.items()]
    return pd.concat(tables, ignore_index=True)


def _left_at_me_layer(
    runs: _Runs, removed: dict[Part, Float[Tensor, "prompt layer"]], senses: dict[str, Part]
) -> dict[str, Any]:
    without_norm = {sense: runs.left(removed[part]) for sense, part in senses.items()}
    over_others = {sense: runs.over_others(removed[part], runs.layers).mean(axis=1) for sense, part in senses.items()}
    return {
        **mean_metric("left_without_ffn", runs.left(removed["ffn"])),
        **_course_without_ffn(runs, removed["ffn"]),
        "left_without_norm": {sense: float(left.mean()) for sense, left in without_norm.items()},
        "left_without_norm_intervals": {sense: mean_interval(left) for sense, left in without_norm.items()},
        "over_others_without_norm": {sense: float(over.mean()) for sense, over in over_others.items()},
        "over_others_without_norm_intervals": {sense: mean_interval(over) for sense, over in over_others.items()},
    }


def _course_without_ffn(runs: _Runs, norms: Float[Tensor, "prompt layer"]) -> dict[str, Any]:
    """Measure how far the token still rises from the ME layer on, and what is left of that at the end."""
    layers = range(runs.me_layer, runs.study.last_before_trailing + 1)
    if len(layers) < 2:
        return {}
    over_others, course = runs.over_others(norms, layers), norms[:, layers.start : layers.stop]
    highest = course.max(dim=1)
    before = runs.me_layer - 1
    risen = (highest.values / runs.runs.intact[:, before]).numpy()
    return ({} if before < 0 else mean_metric("risen_without_ffn", risen)) | {
        **mean_metric("highest_without_ffn", over_others.max(axis=1)),
        **mean_metric("end_without_ffn", (course[:, -1] / highest.values).numpy()),
        "highest_without_ffn_layer": int(highest.indices.median()) + runs.me_layer,
    }


def _removed_figure(runs: _Runs, by_block: pd.DataFrame, observed: str) -> Figure:
    names = by_block["removed"].unique().tolist()
    curves = [Curve(name, by_block[by_block["removed"] == name], COLORS[i]) for i, name in enumerate(names)]
    others = pd.DataFrame({"layer": range(len(runs.others)), "mean": runs.others})
    curves.append(Curve("others", others, "#999999"))
    panel = Panel("", "L2 norm of the block output", curves, runs.me_layer, log_scale=True)
    norm = named_normalization(runs.study.model, "ln2") or "none"
    note = f"One part of block {runs.me_layer} changed at a time; the norm is {norm}. Bands: 95% intervals."
    title = runs.study.title("Massive token by block", runs.n_prompts)
    plot = curves_by_block([panel], title=title, note=note, scale_buttons=True)
    expected = "Without the FFN it appears midway, then fades; without the RMSNorm it persists, but far smaller."
    return Figure(plot, "figure 9", expected, observed)


def _factorial(runs: _Runs, senses: dict[str, Part]) -> pd.DataFrame:
    """Cross every form of the norm with the FFN intact and removed: what is left, with its interval."""
    rows = []
    ffns: dict[str, list[Part]] = {"intact": [], "removed": ["ffn"]}
    norms: dict[str, list[Part]] = {"intact": [], **{TEXTS[part]: [part] for part in senses.values()}}
    for (ffn, of_ffn), (norm, of_norm) in itertools.product(ffns.items(), norms.items()):
        parts = [(runs.me_layer, part) for part in (*of_norm, *of_ffn)]
        after = runs.without(*parts) if parts else runs.runs.intact
        left, at_me_layer = runs.left(after), float(after[:, runs.me_layer].mean())
        rows.append((norm, ffn, at_me_layer, float(left.mean()), *mean_interval(left)))
    return pd.DataFrame(rows, columns=["norm", "ffn", "norm_at_me_layer", "mean", "low", "high"])


def _factorial_figure(runs: _Runs, factorial: pd.DataFrame) -> Figure:
    wide = factorial.pivot(index="norm", columns="ffn", values="mean").loc[factorial["norm"].unique().tolist()]
    heatmap = Heatmap("", wide.to_numpy(), list(wide.columns), list(wide.index), "FFN", "norm before it")
    note = "What is left of the massive token's norm afterwards, relative to intact (1); colours are logarithmic."
    title = runs.study.title(f"Norm × FFN at block {runs.me_layer}", runs.n_prompts)
    plot = heatmaps([heatmap], title=title, note=note, z_title="left", text=True)
    observed = "Without the FFN the norm before it has no way to act: that column is the same by construction."
    return Figure(plot, "follow-up question", "The paper removes one at a time.", observed)


# --- In every block ---------------------------------------------------------------------------------------------------


def _causality(runs: _Runs) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Remove a part of every block in turn, and measure ‖h‖ / ‖h intact‖ of the massive token.

    Returns:
        `part`, `cause`, `effect` (blocks) with `mean`, `low` and `high` over prompts; and `part`, `layer` (the cause)
        with the same of what is left on average from that block on.
    """
    model, n_layers = runs.study.model, runs.study.n_layers
    progress = runs.study.stage("blocks with a part removed")
    without: dict[tuple[Part, int], Float[Tensor, "prompt layer"]] = {}
    for cause in range(n_layers):
        parts = [part for part in CAUSES if can_ablate(model, cause, part)]
        found = runs.run([interventions.ablation(model, cause, part) for part in parts], cause)
        without |= {(part, cause): norms for part, norms in zip(parts, found, strict=True)}
        progress(cause + 1, n_layers)
    tables, causes = [], []
    for part, cause in sorted(without, key=lambda removed: CAUSES.index(removed[0])):
        norms = without[part, cause]
        by_effect = mean_by(tidy((norms / runs.runs.intact).numpy(), "ratio", "effect"), "ratio", ("effect",))
        tables.append(by_effect.assign(part=part, cause=cause))
        if cause <= runs.layers[-1]:  # a later block acts on the trailing ones alone, which count apart
            left = runs.left(norms, cause)
            causes.append((part, cause, float(left.mean()), *mean_interval(left)))
    columns = ["part", "layer", "mean", "low", "high"]
    return pd.concat(tables, ignore_index=True), pd.DataFrame(causes, columns=columns)


def _causality_figure(runs: _Runs, causality: pd.DataFrame, observed: str) -> Figure:
    layers = list(range(runs.study.n_layers))
    axes, maps = ("effect: after block", "cause: in block"), []
    for part in [part for part in CAUSES if (causality["part"] == part).any()]:
        of_part = causality[causality["part"] == part]
        wide = of_part.pivot(index="cause", columns="effect", values="mean").reindex(index=layers, columns=layers)
        maps.append(Heatmap(TEXTS[part], wide.to_numpy(dtype=float), layers, layers, *axes))
    title = runs.study.title("What is left of the massive token's norm", runs.n_prompts)
    note = "One part of one block removed at a time. 1: as intact; colours are logarithmic. Blocks are 0-based."
    plot = heatmaps(maps, title=title, note=note, z_title="left", me_layer=runs.me_layer)
    return Figure(plot, "follow-up question", _INFERRED, observed)


def _causes_figure(runs: _Runs, causes: pd.DataFrame, observed: str) -> Figure:
    curves = [Curve(TEXTS[part], causes[causes["part"] == part], COLORS[i]) for i, part in enumerate(CAUSES)]
    panel = Panel("", "norm left, relative to intact", curves, runs.me_layer, log_scale=True)
    title = runs.study.title("Massive activation by removed block", runs.n_prompts)
    note = "Mean over the blocks from the ME layer to the last two. Bands: 95% intervals."
    return Figure(curves_by_block([panel], title=title, note=note), "follow-up question", _INFERRED, observed)


_INFERRED = "Only the ME layer is looked at; its causal role is inferred."


# --- Patching ---------------------------------------------------------------------------------------------------------


def _patching(runs: _Runs) -> pd.DataFrame:
    """Patch the massive token's FFN output of one block between the intact run and one without another block's FFN.

    Returns:
        `removed` and `patched` (blocks up to the ME layer), `direction`: `"restored"`, the intact output patched into
        the ablated run (sufficient if 1), or `"carried"`, the ablated run's output patched into the intact one (how
        much of the damage goes through that block: necessary if as low as the ablation itself); `mean`, `low`, `high`
        of what is left.
    """
    model, intact = runs.study.model, runs.runs
    blocks = [layer for layer in range(runs.me_layer + 1) if can_ablate(model, layer, "ffn")]
    pairs = [(removed, patched) for removed in blocks for patched in blocks if patched >= removed]
    progress = runs.study.stage("FFN outputs patched")
    left: dict[tuple[str, int, int], np.ndarray] = {}
    written: dict[tuple[int, int], Float[Tensor, "prompt d"]] = {}

    def patch(direction: str, start: int, changes: dict[tuple[int, int], list[Hook]]) -> None:
        found = runs.run(list(changes.values()), start)
        left.update({(direction, *pair): runs.left(norms) for pair, norms in zip(changes, found, strict=True)})
        progress(len(left), 2 * len(pairs))

    for removed in blocks:
        without = interventions.ablation(model, removed, "ffn")
        _, ablated_ffn = intact.run_with_ffn(without, start=removed)
        of_removed = [pair for pair in pairs if pair[0] == removed]
        ablated_ffn[removed] = 0  # whether it was recorded before it was removed or after
        written |= {pair: ablated_ffn[pair[1]].clone() for pair in of_removed}
        restoring = {pair: [*without, intact.patch_ffn(pair[1], intact.ffn[pair[1]])] for pair in of_removed}
        patch("restored", removed, restoring)
    for patched in blocks:
        of_patched = [pair for pair in pairs if pair[1] == patched]
        patch("carried", patched, {pair: [intact.patch_ffn(patched, written[pair])] for pair in of_patched})
    rows = [
        (direction, *pair, float(left[direction, *pair].mean()), *mean_interval(left[direction, *pair]))
        for pair in pairs
        for direction in ("restored", "carried")
    ]
    return pd.DataFrame(rows, columns=["direction", "removed", "patched", "mean", "low", "high"])


def _patching_figure(runs: _Runs, patching: pd.DataFrame, observed: str) -> Figure:
    titles = ("Restored: intact output into the ablated run", "Carried: ablated output into the intact run")
    axes, maps = ("FFN output patched in block", "FFN removed in block"), []
    for direction, title in zip(("restored", "carried"), titles, strict=True):
        wide = patching[patching["direction"] == direction].pivot(index="removed", columns="patched", values="mean")
        maps.append(Heatmap(title, wide.to_numpy(dtype=float), list(wide.columns), list(wide.index), *axes))
    title = runs.study.title("Patching the massive token's FFN output", runs.n_prompts)
    note = f"What is left of its norm from the ME layer ({runs.me_layer}) on; 1: as intact. Blocks are 0-based."
    plot = heatmaps(maps, title=title, note=note, z_title="left", columns=2)
    return Figure(plot, "beyond the paper", "No activation is patched in the paper.", observed)


# --- Words ------------------------------------------------------------------------------------------------------------


def _findings(runs: _Runs, metrics: AblationMetrics, patched: pd.DataFrame) -> list[tuple[str, str]]:
    """Say what the massive token's norm rests on: at the ME layer (two rows), in every block, and by patching (one)."""
    assert metrics.left_without_ffn is not None
    of_ffn = with_interval(metrics.left_without_ffn, metrics.left_without_ffn_interval, ".1%")
    without_ffn = (
        f"Without the FFN of block {runs.me_layer}, the ME layer, {of_ffn} of the massive token's norm is left."
    )
    if metrics.highest_without_ffn is not None:
        without_ffn += f" The token is then at most × {metrics.highest_without_ffn:,.3g} the others from there "
        without_ffn += f"on, and ends at {metrics.end_without_ffn:.0%} of its highest norm."
    of_norm = [f"× {share:,.3g} ({TEXTS[SENSES[sense]]})" for sense, share in metrics.left_without_norm.items()]
    without_norm = f"The massive token's norm becomes {', '.join(of_norm)}, relative to the intact model."
    left = metrics.left_by_cause["ffn"]
    causal = ", ".join(f"{layer} ({left[layer]:.0%} left)" for layer in metrics.causal_layers or ())
    in_blocks = "No single block's FFN halves the massive token's norm when it is removed."
    if causal:
        in_blocks = f"At most half of the norm is left without the FFN of one block: {causal}; least without that of "
        in_blocks += f"block {metrics.strongest_cause}."
    return [
        ("without the FFN", without_ffn),
        ("without the norm", without_norm if of_norm else "The FFN has no norm of its own before it."),
        ("other blocks", in_blocks),
        ("patching", _restored_in_words(patched, runs.me_layer)),
    ]


def _restored_in_words(patching: pd.DataFrame, me_layer: int) -> str:
    """Say what the ME layer's intact output restores; of its own removal that is all, by construction."""
    into_me_layer = patching[(patching["direction"] == "restored") & (patching["patched"] == me_layer)]
    before = into_me_layer[into_me_layer["removed"] < me_layer]
    if before.empty:
        return f"No FFN lies before block {me_layer}, so that its intact output has nothing to restore but itself."
    least, tried = before.iloc[before["mean"].argmin()], listed(before["removed"].tolist())
    observed = f"The intact FFN output of block {me_layer} alone restores "
    if len(before) == 1:
        interval = with_interval(least["mean"], (least["low"], least["high"]), ".0%")
        return f"{observed}{interval} of the norm where the FFN of {tried} is removed, the only one before it."
    return (
        f"{observed}at least {least['mean']:.0%} of the norm, whichever earlier block's FFN is removed ({tried}; least "
        f"for block {int(least['removed'])})."
    )
