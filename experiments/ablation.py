"""What makes the massive activation: parts of blocks removed, restored, patched (figure 9; the review's points)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from experiments.runner.legacy import AblationOptions
from experiments.runner.study import Run as Study
from melens import MassiveTokenRuns, MelensError, Probe
from melens.analysis.statistics import bootstrap_mean, mean_by, tidy, with_interval
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.heatmaps import Heatmap, heatmaps
from melens.figures.style import COLORS
from melens.models.layout import Layout
from melens.models.normalization import named_normalization
from melens.report.result import Figure, Result
from melens.tracing.interventions import Hook, Part, ablation, can_ablate

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


def probes(model: TransformerBridge, options: AblationOptions) -> list[Probe]:
    """Everything is in the default probes."""
    return []


@dataclass(frozen=True)
class _Bench:
    """The prompts cut after their massive token, and how to read what is left of it."""

    study: Study
    runs: MassiveTokenRuns
    me_layer: int
    others: np.ndarray  # [layer], mean norm of the other tokens, intact

    @property
    def lasting(self) -> list[int]:
        """The blocks where the massive token should last."""
        return list(self.study.lasting) or [self.me_layer]

    def left(self, norms: Float[Tensor, "prompt layer"], start: int = 0) -> np.ndarray:
        """Average ‖h‖ / ‖h intact‖ of each prompt's massive token over the blocks from `start` where it should last."""
        blocks = [layer for layer in self.lasting if layer >= start]
        ratio: np.ndarray = (norms / self.runs.intact)[:, blocks].mean(dim=1).numpy()
        return ratio

    def over_others(self, norms: Float[Tensor, "prompt layer"]) -> float:
        """Compare with the other tokens of the intact run over the same blocks."""
        return float((norms.numpy()[:, self.lasting] / self.others[self.lasting]).mean())

    def without(self, *parts: tuple[int, Part]) -> Float[Tensor, "prompt layer"]:
        hooks = [hook for layer, part in parts for hook in ablation(self.study.model, layer, part)]
        return self.run(hooks, min(layer for layer, _ in parts))

    def run(self, hooks: Sequence[Hook], start: int) -> Float[Tensor, "prompt layer"]:
        """Run from a block on, and measure the massive tokens' norms; NaN before."""
        norms = self.runs.run(hooks, start)
        for prompt, after in (~norms[:, start:].isfinite()).nonzero()[:1].tolist():
            raise MelensError(
                f"With a part of block {start} changed, the massive token's norm after block {start + after} is "
                f"{float(norms[prompt, start + after])}: load the model in bfloat16 or float32."
            )
        return norms


def run(study: Study, options: AblationOptions) -> Result:
    """Remove, restore and patch, always from the first block that changes."""
    bench = _prepare(study, options)
    model, me_layer = study.model, bench.me_layer
    if not can_ablate(model, me_layer, "ffn"):
        raise MelensError(
            f"Block {me_layer}, the ME layer, has no FFN output to remove: there is {Layout.of(model).ffn_in_words}."
        )
    senses = {sense: part for sense, part in SENSES.items() if can_ablate(model, me_layer, part)}
    removed = {part: bench.without((me_layer, part)) for part in ("ffn", *senses.values())}
    factorial = _factorial(bench, senses)
    n_before = bench.runs.block_evaluations
    causality, causes = _causality(bench)
    evaluations = bench.runs.block_evaluations - n_before
    patched = _patching(bench)
    metrics = study.metrics(
        **Layout.of(model).metrics(),
        ablation_prompts=len(bench.runs.intact),
        **_removed_metrics(bench, removed, senses),
        **_causal_metrics(bench, causes),
        block_evaluations=evaluations,
        block_evaluations_from_the_start=causality.drop_duplicates(["part", "cause"]).shape[0] * study.n_layers,
    )
    n_prompts = len(bench.runs.intact)
    return Result(
        experiment="ablation",
        model=study.trace.model,
        metrics=metrics,
        tables={
            "removed_by_block": _removed_table(bench, removed),
            "factorial": factorial,
            "causality": causality,
            "causes": causes,
            "patching": patched,
        },
        figures={
            "removed": Figure(
                _removed_figure(bench, removed, study.title("Massive token by block", n_prompts)),
                "figure 9",
                "Without the FFN it appears midway, then fades; without the RMSNorm it persists, but far smaller.",
                _removed_in_words(metrics),
            ),
            "factorial": Figure(
                _factorial_figure(factorial, study.title(f"Norm × FFN at block {me_layer}", n_prompts)),
                "asked for by the review",
                "The paper removes one at a time.",
                "Without the FFN the norm before it has no way to act: that column is the same by construction.",
            ),
            "causality": Figure(
                _causality_figure(bench, causality),
                "asked for by the review",
                "Only the ME layer is looked at; its causal role is inferred.",
                _causes_in_words(metrics),
            ),
            "causes": Figure(
                _causes_figure(bench, causes),
                "asked for by the review",
                "Only the ME layer is looked at; its causal role is inferred.",
                _causes_in_words(metrics),
            ),
            "patching": Figure(
                _patching_figure(bench, patched),
                "beyond the paper",
                "No activation is patched in the paper.",
                _patching_in_words(patched, metrics),
            ),
        },
        findings=[
            ("removed at the ME layer", _removed_in_words(metrics)),
            ("causes", _causes_in_words(metrics)),
            ("patching", _patching_in_words(patched, metrics)),
        ],
    )


def _prepare(study: Study, options: AblationOptions) -> _Bench:
    if study.me.layer is None:
        raise MelensError(f"There is no massive activation whose causes could be removed: {study.me.reason}")
    born = study.me.per_prompt
    usable = born[born["prompt"].isin(study.distinct_carriers if study.position == 0 else study.carriers)]
    usable = usable[usable["pos"] < options.max_position]
    if usable.empty:
        raise MelensError(
            f"All massive tokens stand at position {options.max_position} or later; raise exp.max_position."
        )
    prompts, positions = usable["prompt"].tolist(), usable["pos"].astype(int).tolist()
    norms = (
        study.trace["norm"]
        .query("site == 'hook_resid_post'")
        .merge(usable[["prompt", "pos"]].rename(columns={"pos": "massive"}), on="prompt")
    )
    traced = norms[norms["pos"] == norms["massive"]].pivot(index="prompt", columns="layer", values="norm").loc[prompts]
    tokens = [study.tokens[prompt] for prompt in prompts]
    runs = MassiveTokenRuns(study.model, tokens, positions, torch.tensor(traced.to_numpy()))
    others = norms[norms["pos"] != norms["massive"]].groupby("layer")["norm"].mean()
    return _Bench(study, runs, study.me.layer, others.reindex(range(study.n_layers)).to_numpy(dtype=float))


# --- At the ME layer --------------------------------------------------------------------------------------------------


def _factorial(bench: _Bench, senses: dict[str, Part]) -> pd.DataFrame:
    """Cross every form of the norm with the FFN there and removed: what is left, with its interval."""
    rows = []
    for has_ffn in (True, False):
        for sense in (None, *senses):
            parts: list[tuple[int, Part]] = [] if sense is None else [(bench.me_layer, senses[sense])]
            if not has_ffn:
                parts.append((bench.me_layer, "ffn"))
            norms = bench.without(*parts) if parts else bench.runs.intact
            left = bench.left(norms)
            low, high = bootstrap_mean(left)
            norm = "intact" if sense is None else TEXTS[senses[sense]]
            at_me_layer = float(norms[:, bench.me_layer].mean())
            rows.append((norm, "intact" if has_ffn else "removed", at_me_layer, float(left.mean()), low, high))
    return pd.DataFrame(rows, columns=["norm", "ffn", "norm_at_me_layer", "mean", "low", "high"])


def _removed_table(bench: _Bench, removed: dict[Part, Float[Tensor, "prompt layer"]]) -> pd.DataFrame:
    """Summarise the massive token's norm after each block, intact and without each part."""
    lines = {"intact": bench.runs.intact, **{TEXTS[part]: norms for part, norms in removed.items()}}
    tables = []
    for name, norms in lines.items():
        from_start = bench.runs.intact.clone()  # before the ME layer nothing changed
        from_start[:, bench.me_layer :] = norms[:, bench.me_layer :]
        tables.append(mean_by(tidy(from_start.numpy(), "norm"), "norm").assign(removed=name))
    return pd.concat(tables, ignore_index=True)


def _removed_metrics(
    bench: _Bench, removed: dict[Part, Float[Tensor, "prompt layer"]], senses: dict[str, Part]
) -> dict[str, Any]:
    without_ffn = bench.left(removed["ffn"])
    metrics: dict[str, Any] = {
        "left_without_ffn": float(without_ffn.mean()),
        "left_without_ffn_interval": bootstrap_mean(without_ffn),
        "left_without_norm": {sense: float(bench.left(removed[part]).mean()) for sense, part in senses.items()},
        "over_others_without_norm": {sense: bench.over_others(removed[part]) for sense, part in senses.items()},
    }
    if "identity" in senses:
        metrics["left_identity_interval"] = bootstrap_mean(bench.left(removed[senses["identity"]]))
    return metrics


def _removed_figure(bench: _Bench, removed: dict[Part, Float[Tensor, "prompt layer"]], title: str) -> Any:
    table = _removed_table(bench, removed)
    curves = [
        Curve(str(name), table[table["removed"] == name], color)
        for name, color in zip(table["removed"].unique(), COLORS, strict=False)
    ]
    others = pd.DataFrame({"layer": range(len(bench.others)), "mean": bench.others})
    panel = Panel(
        "",
        "L2 norm of the block output",
        [*curves, Curve("other tokens, intact", others, "#999999")],
        bench.me_layer,
        log_scale=True,
    )
    named = named_normalization(bench.study.model, "ln2") or "none"
    note = f"One part of block {bench.me_layer} changed at a time; the norm is {named}. Bands: 95% bootstrap intervals."
    return curves_by_block([panel], title=title, note=note, scale_buttons=True)


def _factorial_figure(factorial: pd.DataFrame, title: str) -> Any:
    wide = factorial.pivot(index="norm", columns="ffn", values="mean").loc[factorial["norm"].unique().tolist()]
    cells = Heatmap("", wide.to_numpy(), list(wide.columns), list(wide.index), "FFN", "norm before it")
    note = "What is left of the massive token's norm afterwards, relative to intact (1); colours are logarithmic."
    return heatmaps([cells], title=title, note=note, z_title="left", text=True)


# --- Every block ------------------------------------------------------------------------------------------------------


def _causality(bench: _Bench) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Remove a part of every block in turn, and measure ‖h‖ / ‖h intact‖ of the massive token.

    Returns:
        `part`, `cause`, `effect` (blocks) with `mean`, `low` and `high` over prompts; and `part`, `layer` (the cause)
        with the same of what is left on average over the blocks where it should last.
    """
    model, n_layers = bench.study.model, bench.study.n_layers
    jobs = [(part, cause) for part in CAUSES for cause in range(n_layers) if can_ablate(model, cause, part)]
    progress = bench.study.stage("ablations")
    tables, causes = [], []
    for done, (part, cause) in enumerate(jobs, 1):
        norms = bench.without((cause, part))
        ratio = norms / bench.runs.intact
        by_effect = mean_by(tidy(ratio.numpy(), "ratio", "effect"), "ratio", ("effect",))
        tables.append(by_effect.assign(part=part, cause=cause))
        if cause <= bench.lasting[-1]:  # a later block leaves nothing to measure
            left = bench.left(norms, cause)
            causes.append((part, cause, float(left.mean()), *bootstrap_mean(left)))
        progress(done, len(jobs))
    columns = ["part", "layer", "mean", "low", "high"]
    return pd.concat(tables, ignore_index=True), pd.DataFrame(causes, columns=columns)


def _causal_metrics(bench: _Bench, left: pd.DataFrame) -> dict[str, Any]:
    of_ffn = left[left["part"] == "ffn"].set_index("layer")["mean"]
    up_to_end = of_ffn[of_ffn.index <= max(bench.study.last_lasting, bench.me_layer)]
    return {
        "causal_layers": [int(layer) for layer in up_to_end.index[up_to_end <= 0.5]],
        "strongest_cause": int(up_to_end.index.to_numpy()[up_to_end.to_numpy().argmin()]),
        "left_by_cause": {
            part: {int(row["layer"]): float(row["mean"]) for _, row in left[left["part"] == part].iterrows()}
            for part in CAUSES
        },
    }


def _causality_figure(bench: _Bench, causality: pd.DataFrame) -> Any:
    layers = list(range(bench.study.n_layers))
    maps = []
    for part in CAUSES:
        of_part = causality[causality["part"] == part]
        if len(of_part):
            wide = of_part.pivot(index="cause", columns="effect", values="mean").reindex(index=layers, columns=layers)
            maps.append(
                Heatmap(
                    TEXTS[part], wide.to_numpy(dtype=float), layers, layers, "effect: after block", "cause: in block"
                )
            )
    return heatmaps(
        maps,
        title=bench.study.title("What is left of the massive token's norm", len(bench.runs.intact)),
        note="One part of one block removed at a time. 1: as intact; colours are logarithmic. Blocks are 0-based.",
        z_title="left",
        me_layer=bench.me_layer,
    )


def _causes_figure(bench: _Bench, left: pd.DataFrame) -> Any:
    curves = [
        Curve(TEXTS[part], left[left["part"] == part], color) for part, color in zip(CAUSES, COLORS, strict=False)
    ]
    panel = Panel("", "left from the ME layer on, relative to intact", curves, bench.me_layer, log_scale=True)
    title = bench.study.title("Massive activation by removed block", len(bench.runs.intact))
    note = "Mean over the blocks from the ME layer to the last two. Bands: 95% bootstrap intervals."
    return curves_by_block([panel], title=title, note=note)


# --- Patching ---------------------------------------------------------------------------------------------------------


def _patching(bench: _Bench) -> pd.DataFrame:
    """Patch the massive token's FFN output of one block between the intact run and one without another block's FFN.

    Returns:
        `removed` and `patched` (blocks up to the ME layer), `direction`: `"restored"`, the intact output patched into
        the ablated run (sufficient if 1), or `"carried"`, the ablated run's output patched into the intact one (how
        much of the damage goes through that block: necessary if as low as the ablation itself); `mean`, `low`, `high`
        of what is left.
    """
    model, runs = bench.study.model, bench.runs
    blocks = [layer for layer in range(bench.me_layer + 1) if can_ablate(model, layer, "ffn")]
    progress = bench.study.stage("patches")
    rows = []
    for done, removed in enumerate(blocks, 1):
        without: Sequence[Hook] = ablation(model, removed, "ffn")
        _, ablated_ffn = runs.run_with_ffn(without, start=removed)
        for patched in (layer for layer in blocks if layer >= removed):
            restored = bench.run([*without, runs.patch_ffn(patched, runs.ffn[patched])], removed)
            written = torch.zeros_like(ablated_ffn[patched]) if patched == removed else ablated_ffn[patched]
            carried = bench.run([runs.patch_ffn(patched, written)], patched)
            for direction, norms in (("restored", restored), ("carried", carried)):
                left = bench.left(norms)
                rows.append((direction, removed, patched, float(left.mean()), *bootstrap_mean(left)))
        progress(done, len(blocks))
    return pd.DataFrame(rows, columns=["direction", "removed", "patched", "mean", "low", "high"])


def _patching_figure(bench: _Bench, patched: pd.DataFrame) -> Any:
    titles = {
        "restored": "Restored: intact output into the ablated run",
        "carried": "Carried: ablated output into the intact run",
    }
    maps = []
    for direction, title in titles.items():
        wide = patched[patched["direction"] == direction].pivot(index="removed", columns="patched", values="mean")
        maps.append(
            Heatmap(
                title,
                wide.to_numpy(dtype=float),
                list(wide.columns),
                list(wide.index),
                "FFN output patched in block",
                "FFN removed in block",
            )
        )
    return heatmaps(
        maps,
        title=bench.study.title("Patching the massive token's FFN output", len(bench.runs.intact)),
        note=f"What is left of its norm from the ME layer ({bench.me_layer}) on; 1: as intact. Blocks are 0-based.",
        z_title="left",
        columns=2,
    )


# --- In words ---------------------------------------------------------------------------------------------------------


def _removed_in_words(metrics: dict[str, Any]) -> str:
    left_of_it = with_interval(metrics["left_without_ffn"], metrics["left_without_ffn_interval"], ".1%")
    words = f"Without the FFN {left_of_it} of the norm is left"
    left = [f"{TEXTS[SENSES[sense]]}: ×{share:,.3g}" for sense, share in metrics["left_without_norm"].items()]
    return f"{words}; {', '.join(left)}." if left else f"{words}; there is no norm of its own before it."


def _causes_in_words(metrics: dict[str, Any]) -> str:
    left = metrics["left_by_cause"]["ffn"]
    causal = [f"{layer} (leaves {left[layer]:.0%})" for layer in metrics["causal_layers"]]
    if not causal:
        return "No single block's FFN halves it when removed."
    return (
        f"Removing the FFN of block {', '.join(causal)} leaves at most half; the strongest cause is block "
        f"{metrics['strongest_cause']}. {metrics['block_evaluations']:,} block evaluations in place of "
        f"{metrics['block_evaluations_from_the_start']:,}."
    )


def _patching_in_words(patched: pd.DataFrame, metrics: dict[str, Any]) -> str:
    me_layer = metrics["me_layer"]
    at_me_layer = patched[(patched["direction"] == "restored") & (patched["patched"] == me_layer)]
    least = at_me_layer.sort_values("mean").iloc[0]
    return (
        f"The intact FFN output of block {me_layer} alone restores at least {least['mean']:.0%}, whichever block's FFN "
        f"is removed (least for block {int(least['removed'])})."
    )
