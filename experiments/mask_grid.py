"""A grid of masks as tables, what it says of the claims, and its figures: of one run, or of a sweep's jobs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.runner.jobs import Job
from melens import MelensError
from melens.analysis.statistics import bootstrap_mean, holm, paired_permutation_p, with_interval
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.heatmaps import Heatmap, loss_changes
from melens.figures.scores import loss_over_sinks
from melens.figures.style import COLORS, FIRST, OTHERS, SINK
from melens.report.result import Figure, Result
from melens.storage.cache import hash_of

__all__ = ["ARGUMENTS", "UNMASKED", "Grid", "drawn", "merge", "report"]

UNMASKED = "unmasked"
ARGUMENTS = (
    "cell", "rate", "select", "site", "start", "layers", "positions", "strength", "seed", "n_blocks", "massive_hits",
)  # fmt: skip
"""What tells a cell of the grid."""
SELECT_COLORS = {
    "weight": OTHERS,
    "random": COLORS[3],
    "magnitude": FIRST,
    "weight_low": COLORS[4],
    "massive": SINK,
    "batch_magnitude": COLORS[6],
}
PAPER_RATE = 0.1  # of table 7
DESTROYS = 1.0
"""Nats a token from which on a mask has destroyed the model: it gives its tokens less than 1/e of their probability."""


@dataclass(frozen=True)
class Grid:
    """What was measured of one model, as tidy tables: of one run, or of a sweep's jobs together.

    Attributes:
        cells: a row a mask: `cell` (its name), its arguments, and `massive_hits`: in how many of its `n_blocks`
            blocks the largest massive dim is masked (null where the dims depend on the token).
        by_text: a row a cell and text, the unmasked model among the cells: `loss`, `kl`, `agreement`, `sink_mass`.
        by_block: a row a cell and block: `sink_mass`, `share_of_heads`, `entropy`, `effective_rank`, `input_cosine`,
            `key_cosine`.
    """

    cells: pd.DataFrame
    by_text: pd.DataFrame
    by_block: pd.DataFrame


_TEXTS = ("text", "texts", "tokens_per_text")
_OF_MODEL = (
    "me_layer", "n_prompts", "distinct_first_tokens", "massive_position", "n_carriers", "last_lasting_layer",
    "text_first_tokens", "sink_layers", "next_attention",
)  # fmt: skip


def merge(jobs: Sequence[Job]) -> list[Result]:
    """Put what a sweep's jobs measured together: a `Result` for each model and text, as one job would have given.

    Jobs that differ in any other option than their masks, as in dtype or seed, are not of one grid.
    """
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        if job.result["experiment"] == "wemask" and job.is_ok:
            options = {
                name: node for name, node in job.result["config"].items() if name not in ("wemask", "masks", "given")
            }
            same = hash_of(job.result["model"], [job.result["metrics"][name] for name in _TEXTS], options)
            alike.setdefault(same, []).append(job)
    merged: list[Result] = []
    named: set[tuple[Any, ...]] = set()
    for found in alike.values():
        tables = {
            name: pd.concat([pd.read_parquet(job.folder / f"{name}.parquet") for job in found], ignore_index=True)
            for name in ("cells", "by_text", "by_block")
        }
        grid = Grid(
            tables["cells"][list(ARGUMENTS)].drop_duplicates("cell", ignore_index=True),
            tables["by_text"].drop_duplicates(["cell", "text"], ignore_index=True),
            tables["by_block"].drop_duplicates(["cell", "layer"], ignore_index=True),
        )
        result = found[0].result
        shared = {name: value for name, value in result["metrics"].items() if name in (*_TEXTS, *_OF_MODEL)}
        model = result["model"]
        if len(alike) > 1:  # as in another dtype
            model = model | {"name": found[0].named_by([key for key in found[0].swept if not is_of_mask(key)])}
        if (model["name"], *(shared[name] for name in _TEXTS)) in named:
            model = model | {"name": f"{model['name']} (job {found[0].folder.name})"}
        named.add((model["name"], *(shared[name] for name in _TEXTS)))
        merged.append(report(grid, model, shared, {}, []))
    return merged


_MASK_NODES = ("wemask", "masks", "given", "typed")


def is_of_mask(key: str) -> bool:
    """Tell whether a swept option is of the masks, which are the rows of one grid."""
    return key.split(".")[0] == "wemask"


def report(
    grid: Grid,
    model: dict[str, Any],
    metrics: dict[str, Any],
    pictures: dict[str, Figure],
    findings: list[tuple[str, str]],
) -> Result:
    """Compare every cell with the unmasked model, draw, and put what is seen into words."""
    cells = _summarise(grid, metrics["sink_layers"])
    unmasked = grid.by_text[grid.by_text["cell"] == UNMASKED]
    metrics = metrics | {
        "cells": len(cells),
        "unmasked_loss": float(unmasked["loss"].mean()),
        "unmasked_perplexity": float(np.exp(unmasked["loss"].mean())),
        "unmasked_sink_mass": float(unmasked["sink_mass"].mean()),
        **_claim_metrics(cells, metrics.get("me_layer"), metrics.get("next_attention")),
    }
    title = _Title(model["name"], metrics["texts"], metrics["tokens_per_text"])
    findings = [
        ("unmasked", f"loss {metrics['unmasked_loss']:.3f} nats a token, perplexity "
                     f"{metrics['unmasked_perplexity']:.1f}, "
                     + _unless_nan(metrics["unmasked_sink_mass"], "sink mass {:.3f}", _NO_SINKS)),
        *findings,
        *[(cell["cell"], _cell_in_words(cell)) for cell in cells.head(_TOLD).to_dict("records")],
    ]  # fmt: skip
    if len(cells) > _TOLD:
        findings.append(("", f"and {len(cells) - _TOLD} more in cells.parquet"))
    if len(cells):
        pictures = pictures | _pictures(grid, cells, metrics, title)
    tables = {"cells": cells, "by_text": grid.by_text, "by_block": grid.by_block}
    return Result("wemask", model, metrics, tables, pictures, findings)


_TOLD = 12


@dataclass(frozen=True)
class _Title:
    model: str
    n_texts: int
    n_tokens: int

    def __call__(self, text: str) -> str:
        return f"{text}: {self.model}, {self.n_texts} texts of {self.n_tokens} tokens"


def _summarise(grid: Grid, sink_layers: Sequence[int]) -> pd.DataFrame:
    """Add to each cell its means over texts, the paired difference to the unmasked model, and p-values.

    Raises:
        MelensError: a loss or a sink mass that is no number, by cell and text.
    """
    _check_texts(grid.by_text)
    unmasked = grid.by_text[grid.by_text["cell"] == UNMASKED].set_index("text")
    of_cell = dict(list(grid.by_text.groupby("cell")))
    # NaN, which these means leave out, is a block without attention or what was not asked for: `Measured` has no other
    behind = grid.by_block[grid.by_block["layer"].isin(list(sink_layers))].groupby("cell").mean(numeric_only=True)
    has_sinks = bool(unmasked["sink_mass"].notna().all())
    rows = []
    for cell in grid.cells.to_dict("records"):
        texts = of_cell[cell["cell"]].set_index("text")
        dloss = (texts["loss"] - unmasked["loss"]).to_numpy()
        ratio = (texts["sink_mass"] / unmasked["sink_mass"]).to_numpy()
        low, high = bootstrap_mean(dloss)
        kl_low, kl_high = bootstrap_mean(texts["kl"].to_numpy())
        ratio_low, ratio_high = bootstrap_mean(ratio) if has_sinks else (float("nan"), float("nan"))
        rows.append(
            cell
            | {
                "loss": float(texts["loss"].mean()),
                "perplexity": float(np.exp(texts["loss"].mean())),
                "dloss": float(dloss.mean()),
                "dloss_low": low,
                "dloss_high": high,
                "p": paired_permutation_p(dloss),
                "kl": float(texts["kl"].mean()),
                "kl_low": kl_low,
                "kl_high": kl_high,
                "agreement": float(texts["agreement"].mean()),
                "sink_mass": float(texts["sink_mass"].mean()),
                "sink_ratio": float(ratio.mean()),
                "sink_ratio_low": ratio_low,
                "sink_ratio_high": ratio_high,
                **behind.loc[cell["cell"], list(_BEHIND)].to_dict(),
            }
        )
    if not rows:
        return grid.cells
    cells = pd.DataFrame(rows)
    cells.insert(list(cells).index("p") + 1, "p_holm", holm(cells["p"].to_numpy()))
    return cells


def _check_texts(by_text: pd.DataFrame) -> None:
    has_sinks = by_text["sink_mass"].notna().any()  # else no block behind the start has attention
    names = ["loss", "kl", "agreement", *(["sink_mass"] if has_sinks else [])]
    is_finite = np.isfinite(by_text[names].to_numpy(dtype=float)).all(axis=1)
    broken = by_text[~is_finite]
    for row in broken.to_dict("records"):
        told = ", ".join(f"{name} {row[name]:g}" for name in names)
        raise MelensError(
            f"wemask, {row['cell']}, text {row['text']}: {told}; look for NaN in the model's weights, or load it in "
            "float32."
        )


_BEHIND = {
    "share_of_heads": "share of heads with a sink",
    "entropy": "entropy of attention (nats)",
    "effective_rank": "effective rank of attention",
    "input_cosine": "cosine of token 0's attention input between texts",
    "key_cosine": "cosine of token 0's key between texts",
}


def _cell_in_words(cell: dict[Any, Any]) -> str:
    loss = with_interval(cell["dloss"], (cell["dloss_low"], cell["dloss_high"]), "+.3f")
    hits = "" if pd.isna(cell["massive_hits"]) else f", massive dim masked in {cell['massive_hits']:.0f} blocks"
    p = "" if pd.isna(cell["p_holm"]) else f", p = {cell['p_holm']:.2g}"
    sinks = _unless_nan(cell["sink_ratio"], ", sink mass × {:.2f}", "")
    return f"Δloss {loss}{p}, KL {cell['kl']:.3f}{sinks}{hits}"


_NO_SINKS = "no attention behind the ME layer"


def _unless_nan(value: float, told: str, otherwise: str) -> str:
    return otherwise if np.isnan(value) else told.format(value)


# --- For the claims ---------------------------------------------------------------------------------------------------


def _claim_metrics(cells: pd.DataFrame, me_layer: int | None, next_attention: int | None) -> dict[str, Any]:
    """Pick out of the grid what the claims are about; what it does not have is left out, with the reason."""
    if not len(cells) or me_layer is None:
        return {}
    plain = cells[(cells["positions"] == "first") & (cells["strength"] == 1)]
    behind = plain[plain["start"] == me_layer + 1]
    of_paper = behind[(behind["select"] == "weight") & (behind["site"] == "attn_in") & (behind["layers"] == "all")]
    return {
        **_sink_metrics(of_paper),
        **_harm_metrics(behind),
        **_moderation_metrics(of_paper),
        **_start_metrics(plain[plain["layers"] == "first"], next_attention),
    }


def _sink_metrics(of_paper: pd.DataFrame) -> dict[str, Any]:
    if not len(of_paper):
        return {"sink_why_not": "The grid has no mask as the paper's (wemask=paper)."}
    cell = of_paper.iloc[(of_paper["rate"] - PAPER_RATE).abs().argmin()]
    if np.isnan(cell["sink_ratio"]):
        return {"sink_why_not": "No block behind the ME layer has attention."}
    return {
        "paper_rate": float(cell["rate"]),
        "sink_ratio": float(cell["sink_ratio"]),
        "sink_ratio_interval": (float(cell["sink_ratio_low"]), float(cell["sink_ratio_high"])),
        "paper_dloss": float(cell["dloss"]),
        "paper_dloss_interval": (float(cell["dloss_low"]), float(cell["dloss_high"])),
    }


def _harm_metrics(behind: pd.DataFrame) -> dict[str, Any]:
    """Find where random (mean over seeds) or magnitude masks destroy, and what weight-guided ones cost there."""
    worst = None
    places: dict[str, int] = {"random": 0, "magnitude": 0}
    compared = 0
    for _, group in behind.groupby(["site", "layers", "rate"]):
        weight = group[group["select"] == "weight"]
        costs = group.groupby("select")["dloss"].mean()
        if not len(weight) or not {"random", "magnitude"} <= set(costs.index):
            continue
        compared += 1
        destroyed = [select for select in places if costs[select] >= DESTROYS]
        for select in destroyed:
            places[select] += 1
        if destroyed and (worst is None or weight["dloss"].iloc[0] > worst["dloss"]):
            worst = weight.iloc[0]
    if not compared:
        return {"harm_why_not": "The grid does not have weight, random and magnitude side by side (wemask=grid)."}
    if worst is None:
        return {"harm_why_not": f"Neither random nor magnitude masks cost {DESTROYS:g} nat a token in this grid."}
    return {
        "weight_where_destroyed": float(worst["dloss"]),
        "weight_where_destroyed_interval": (float(worst["dloss_low"]), float(worst["dloss_high"])),
        "destroyed_by": places,
    }


def _moderation_metrics(of_paper: pd.DataFrame) -> dict[str, Any]:
    if len(of_paper) < 3:
        return {"moderation_why_not": "It takes at least three rates (wemask.rate=[0.01,0.1,0.3])."}
    best = of_paper.iloc[of_paper["dloss"].argmin()]
    return {
        "best_rate": float(best["rate"]),
        "best_rate_is_largest": bool(best["rate"] == of_paper["rate"].max()),
        "best_dloss": float(best["dloss"]),
        "best_dloss_interval": (float(best["dloss_low"]), float(best["dloss_high"])),
    }


def _start_metrics(first_only: pd.DataFrame, behind: int | None) -> dict[str, Any]:
    """Compare the mask in the next block with attention behind the ME layer alone with that in each other alone."""
    for _, group in first_only.dropna(subset=["sink_ratio"]).groupby(["select", "site", "rate", "seed"], sort=False):
        effect = (1 - group.set_index("start")["sink_ratio"]).abs()
        if behind is not None and behind in effect.index and len(effect) >= 4:
            others = effect.drop(behind).sort_values(ascending=False)
            return {
                "start_effect": float(effect[behind]),
                "start_effect_elsewhere": float(others.iloc[0]),
                "start_strongest_elsewhere": next(map(int, others.index)),
                "start_effect_ratio": float(effect[behind] / max(others.iloc[0], 1e-9)),
            }
    return {"start_why_not": "It takes other starts (wemask.start=all_blocks wemask.layers=first)."}


# --- Figures ----------------------------------------------------------------------------------------------------------


def _pictures(grid: Grid, cells: pd.DataFrame, metrics: dict[str, Any], title: _Title) -> dict[str, Figure]:
    starts = cells["start"].nunique() if "start" in cells else 0
    main = cells if starts == 1 else cells[cells["start"] == (metrics["me_layer"] or 0) + 1]
    pictures = {}
    if len(main):
        here = _harm_in_words(main)
        if len(main) > 1:
            paper = "Table 5: weight-guided masks help; random and magnitude masks at the same rate hurt."
            pictures["loss_change"] = Figure(_loss_figure(main, title), "table 5", paper, here)
            pictures["rates"] = Figure(_rate_figure(main, title), "asked for by the review", "One rate a task.", here)
        pictures["loss_and_sinks"] = Figure(
            loss_over_sinks(
                main.assign(label=main["cell"]),
                sink_mass=metrics["unmasked_sink_mass"],
                colors=SELECT_COLORS,
                title=title("Loss against the sink that is left"),
                note="Whiskers: 95% bootstrap intervals over texts.",
            ),
            "section 4",
            "Moderate attenuation of the sink helps; none and full do not.",
            _moderation_in_words(main),
        )
        pictures["by_block"] = Figure(
            _block_figure(grid, main, metrics, title), "figure 8", "The mask weakens the sink and relaxes token 0.",
            _relaxed_in_words(grid, main, metrics),
        )  # fmt: skip
    if starts > 1:
        pictures["starts"] = Figure(
            _start_figure(cells, metrics, title),
            "asked for by the review",
            "The mask is applied from the ME layer on, nowhere else.",
            f"{starts} blocks to start at.",
        )
    return pictures


def drawn(cells: pd.DataFrame) -> pd.DataFrame:
    """Choose one mask of each selection for the figures that show few: the first of those nearest the paper's rate."""
    nearest = (cells["rate"] - PAPER_RATE).abs().to_numpy().argsort(kind="stable")
    return cells.iloc[nearest].drop_duplicates("select").sort_index()


def _loss_figure(cells: pd.DataFrame, title: _Title) -> Any:
    maps = []
    for (site, layers), group in cells.groupby(["site", "layers"], sort=False):
        wide = group.pivot_table(index="select", columns="rate", values="dloss", aggfunc="mean", sort=False)
        wide = wide[sorted(wide.columns)]
        rates = [f"{rate:g}" for rate in wide.columns]
        maps.append(Heatmap(f"{site}, layers {layers}", wide.to_numpy(), rates, list(wide.index), "rate", ""))
    n_seeds = cells.loc[cells["select"] == "random", "seed"].nunique()
    note = "Nats a token over the unmasked model on the same tokens." + (
        f" Random: mean over {n_seeds} seeds." if n_seeds > 1 else ""
    )
    return loss_changes(maps, title=title("Change of the loss"), note=note)


def _rate_figure(cells: pd.DataFrame, title: _Title) -> Any:
    panels = []
    for (site, layers), group in cells.groupby(["site", "layers"], sort=False):
        curves = []
        for select, color in SELECT_COLORS.items():
            of_select = group[group["select"] == select].groupby("rate")[["dloss", "dloss_low", "dloss_high"]].mean()
            points = of_select.reset_index().set_axis(["layer", "mean", "low", "high"], axis=1)
            if len(points):
                curves.append(Curve(select, points, color))
        panels.append(Panel(f"{site}, layers {layers}", "Δloss (nats a token)", curves, None, zero_line=True))
    note = "Bands: 95% bootstrap intervals over texts; for random masks the mean of each seed's."
    figure = curves_by_block(panels, title=title("Loss by mask rate"), note=note, columns=3)
    figure.update_xaxes(type="log", title_text="mask rate", dtick="D2")
    return figure


def _block_figure(grid: Grid, cells: pd.DataFrame, metrics: dict[str, Any], title: _Title) -> Any:
    """Draw what attention looks like block by block, for one mask of each selection, next to none."""
    chosen = drawn(cells)
    lines = [(UNMASKED, "#444444"), *zip(chosen["cell"], chosen["select"].map(SELECT_COLORS), strict=True)]
    panels = []
    for quantity, text in {"sink_mass": "sink mass", **_BEHIND}.items():
        points = grid.by_block.rename(columns={quantity: "mean"})[["cell", "layer", "mean"]].dropna()
        if not len(points):
            continue
        curves = [Curve(name, points[points["cell"] == name], color) for name, color in lines]
        panels.append(Panel(text.capitalize(), text.split(" between")[0], curves, metrics.get("me_layer")))
    note = "Cosines: mean over pairs of texts."
    if grid.by_block["entropy"].notna().any():
        note = f"Entropy and rank: the first two texts, 96 tokens. {note}"
    return curves_by_block(panels, title=title("Attention by block"), note=note)


def _start_figure(cells: pd.DataFrame, metrics: dict[str, Any], title: _Title) -> Any:
    panels = []
    for quantity, text in (("dloss", "Δloss (nats a token)"), ("sink_ratio", "sink mass, relative to unmasked")):
        curves: list[Curve] = []
        for (select, site, layers, rate), group in cells.groupby(["select", "site", "layers", "rate"], sort=False):
            points = group.groupby("start")[[quantity, f"{quantity}_low", f"{quantity}_high"]].mean().reset_index()
            points = points.set_axis(["layer", "mean", "low", "high"], axis=1)
            color = COLORS[len(curves) % len(COLORS)]
            curves.append(Curve(f"{select}, {site}, layers {layers}, rate {rate:g}", points, color))
        panels.append(Panel("", text, curves, metrics.get("me_layer"), zero_line=quantity == "dloss"))
    note = "Bands: 95% bootstrap intervals over texts. Sink mass: mean over the blocks behind the ME layer."
    figure = curves_by_block(panels, title=title("The same mask from each block in turn"), note=note)
    figure.update_xaxes(title_text="first masked block (0-based)")
    return figure


def _harm_in_words(cells: pd.DataFrame) -> str:
    means = cells.groupby("select", sort=False)["dloss"].agg(["min", "max"])
    parts = [f"{select} {row['min']:+.3f} to {row['max']:+.3f}" for select, row in means.iterrows()]
    return f"Δloss over the grid: {', '.join(parts)} nats a token."


def _moderation_in_words(cells: pd.DataFrame) -> str:
    best = cells.iloc[cells["dloss"].argmin()]
    told = f"The lowest loss is with {best['cell']}: {_cell_in_words(best.to_dict())}."
    return told if best["dloss"] < 0 else f"No mask lowers the loss. {told}"


def _relaxed_in_words(grid: Grid, cells: pd.DataFrame, metrics: dict[str, Any]) -> str:
    cell = drawn(cells).iloc[0]
    behind = grid.by_block[grid.by_block["layer"].isin(metrics["sink_layers"])].groupby("cell").mean(numeric_only=True)
    before, after = behind.loc[UNMASKED], behind.loc[cell["cell"]]
    if np.isnan(before["sink_mass"]):
        return "No block behind the ME layer has attention."
    return (
        f"{cell['cell']}: sink mass {before['sink_mass']:.3f} to {after['sink_mass']:.3f}; cosine of token 0's "
        f"attention input between texts {before['input_cosine']:.4f} to {after['input_cosine']:.4f}, of its key "
        f"{before['key_cosine']:.4f} to {after['key_cosine']:.4f}."
    )
