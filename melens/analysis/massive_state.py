"""What follows from the massive activation: it is taken away, brought earlier, and fixed to zero or to its mean.

    result = melens.analysis.consequence(study)
    result.metrics.sinks_left  # of the attention on the massive token without its massive activation

1. The prompts, cut short, run intact: who attends to the massive token in each block, and the loss.
2. The FFN write that makes the token massive is taken from it, and as a control from all other tokens: do sinks stay?
3. What the ME layer adds to the token is added at an earlier block already: do sinks come earlier?
4. The massive entries are fixed where they are formed, to zero and to their mean over the other prompts, as in Sun et
   al. (2024, section 4, table 3), who change the hidden state in which they first appear: how much loss does that cost?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from melens.analysis.massive_state_claims import ConsequenceMetrics
from melens.analysis.massive_texts import massive_texts
from melens.analysis.metrics import SINK_THRESHOLD
from melens.analysis.statistics import mean_by, mean_interval, mean_metric, tidy, with_interval
from melens.analysis.study import Study
from melens.errors import MelensError
from melens.figures.bars import difference_bars
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.style import COLORS
from melens.models.layout import listed
from melens.printing import paragraph
from melens.report.result import Figure, Interval, Result
from melens.tracing.interventions import Hook, can_ablate
from melens.tracing.text_runs import TextEffects, TextRuns

__all__ = ["consequence"]

INTACT, REMOVED, CONTROL, EARLIER, ZERO, MEAN = (
    "intact",
    "FFN write removed from the massive token",
    "FFN write removed from all other tokens",
    "written earlier",
    "massive entries set to zero",
    "massive entries set to their mean",
)


def consequence(study: Study, *, n_prompts: int = 24, max_tokens: int = 64) -> Result:
    """Take the massive activation away, bring it earlier and fix its entries: what becomes of sinks and loss.

    Args:
        study: as `melens.study` makes it.
        n_prompts: how many prompts are run, those with most tokens first, one for each first token.
        max_tokens: of each of them.

    Returns:
        Metrics `ConsequenceMetrics`; the figures `sinks_by_run` (section 6) and `loss_by_run` (Sun et al. 2024).

    Raises:
        MelensError: no massive activation, none with eight tokens behind it, an FFN that cannot be removed, or a
            loss that is NaN.

    Example:
        >>> result = melens.analysis.consequence(study)
        >>> sorted(result.figures)
        ['loss_by_run', 'sinks_by_run']
    """
    texts = _texts(study, n_prompts, max_tokens)
    ran = _run_all(texts)
    metrics = study.metrics(
        ConsequenceMetrics,
        **study.layout.metrics(),
        texts=len(texts.prompts),
        tokens_per_text=max(map(len, texts.tokens)),
        removed_layers=texts.removed_layers,
        **_without_the_write(texts, ran),
        **_written_earlier(texts, ran),
        **_losses(ran),
    )
    by_block = [mean_by(tidy(run.sink_mass.numpy(), "sink_mass"), "sink_mass") for run in ran.values()]
    sinks = pd.concat([table.assign(run=name) for name, table in zip(ran, by_block, strict=True)], ignore_index=True)
    of_texts = {"prompt": texts.prompts, "id": study.trace.prompts["id"][texts.prompts].tolist()}
    of_runs = [pd.DataFrame({"run": name, **of_texts, "loss": run.loss.numpy()}) for name, run in ran.items()]
    losses = pd.concat(of_runs, ignore_index=True)
    of_sinks, of_loss = _sinks_in_words(metrics), _losses_in_words(metrics, texts.formed)
    figures = {
        "sinks_by_run": _sinks_figure(texts, sinks, paragraph(of_sinks)),
        "loss_by_run": _loss_figure(texts, ran, metrics.loss, paragraph(of_loss)),
    }
    tables = {"sinks_by_run": sinks, "loss_by_run": losses}
    return Result("consequence", study.trace.model, metrics, tables, figures, [*of_sinks, *of_loss])


# --- Texts and runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Texts:
    """The prompts that are run, cut short, and what is massive in them where the massive state is formed."""

    study: Study
    me_layer: int
    formed: int
    prompts: list[int]
    tokens: list[Tensor]
    positions: list[int]  # of each one's largest massive entry
    entries: pd.DataFrame  # `text`, `pos`, `dim` of all massive entries

    @cached_property
    def runs(self) -> TextRuns:
        starts = {self.me_layer, self.formed, *([] if self.written_at is None else [self.written_at])}
        most = self.study.max_batch_tokens
        return TextRuns(self.study.model, self.tokens, self.positions, max_batch_tokens=most, starts=starts)

    @property
    def removed_layers(self) -> list[int]:
        layers = range(self.me_layer, self.formed + 1)
        return [layer for layer in layers if can_ablate(self.study.model, layer, "ffn")]

    @property
    def written_at(self) -> int | None:
        """Half way to the ME layer, so that blocks before it and behind read the state."""
        return (self.me_layer - 1) // 2 if self.me_layer > 0 else None

    @cached_property
    def is_massive(self) -> Bool[Tensor, "text pos d"]:
        marks = torch.zeros(*self.runs.is_token.shape[:2], self.study.model.cfg.d_model, dtype=torch.bool)
        marks[tuple(torch.tensor(self.entries[column].to_numpy()) for column in ("text", "pos", "dim"))] = True
        return marks

    @cached_property
    def equal_attention(self) -> Float[np.ndarray, " text"]:
        """The attention on each massive token if every later query attends to all that it sees alike."""
        of_queries = [1 / np.arange(at + 2, len(ids) + 1) for at, ids in zip(self.positions, self.tokens, strict=True)]
        return np.array([shares.mean() for shares in of_queries])


def _texts(study: Study, n_prompts: int, max_tokens: int) -> _Texts:
    me_layer, formed = study.me.layer, study.me.formed
    if me_layer is None or formed is None:
        raise MelensError(f"There is no massive activation from which anything could follow: {study.me.reason}")
    if not can_ablate(study.model, me_layer, "ffn"):
        raise MelensError(
            f"Block {me_layer}, the ME layer, has no FFN output to remove: there is {study.layout.ffn_in_words}."
        )
    chosen = massive_texts(study, n_prompts, max_tokens)
    return _Texts(study, me_layer, formed, chosen.prompts, chosen.tokens, chosen.positions, chosen.entries)


def _run_all(texts: _Texts) -> dict[str, TextEffects]:
    """Run the texts intact and with every intervention, by name."""
    runs, progress = texts.runs, texts.study.stage("texts with the massive activation changed")
    intact, formed, written_at = runs.intact, texts.formed, texts.written_at
    massive_tokens = texts.is_massive.any(dim=-1, keepdim=True)
    at_formed = f"blocks.{formed}.hook_resid_post"
    writes = [f"blocks.{layer}.hook_mlp_out" for layer in texts.removed_layers]
    changes: dict[str, tuple[list[Hook], int]] = {  # and the first block that they change
        REMOVED: ([runs.put(write, massive_tokens, 0) for write in writes], texts.me_layer),
        CONTROL: ([runs.put(write, runs.is_token & ~massive_tokens, 0) for write in writes], texts.me_layer),
    }
    if written_at is not None:
        added = intact.states[:, formed] - intact.states[:, texts.me_layer - 1]
        changes[EARLIER] = [runs.add(f"blocks.{written_at}.hook_resid_post", runs.massive, added)], written_at
    changes[ZERO] = [runs.put(at_formed, texts.is_massive, 0)], formed
    if len(texts.prompts) > 1:
        means = _means_of_others(intact.states[:, formed])
        changes[MEAN] = [runs.put(at_formed, texts.is_massive, means)], formed
    ran = {INTACT: intact}
    for done, (name, (hooks, start)) in enumerate(changes.items(), 1):
        ran[name] = runs.run(hooks, start)
        progress(done, len(changes))
    return ran


def _means_of_others(states: Float[Tensor, "text d"]) -> Float[Tensor, "text d"]:
    """Average over the other texts: a mean in which a text's own state counts would say of it what it is."""
    return (states.sum(dim=0) - states) / (len(states) - 1)


# --- Metrics ----------------------------------------------------------------------------------------------------------


def _mass(run: TextEffects, layers: Sequence[int]) -> Float[np.ndarray, " text"]:
    return run.sink_mass[:, list(layers)].mean(dim=1).double().numpy()


def _with_sink(run: TextEffects, layers: Sequence[int]) -> list[int]:
    """List the blocks with a mean sink mass over Gu et al.'s threshold; a block without attention has NaN."""
    means = run.sink_mass.mean(dim=0)
    return [layer for layer in layers if float(means[layer]) > SINK_THRESHOLD]


def _without_the_write(texts: _Texts, ran: dict[str, TextEffects]) -> dict[str, Any]:
    intact, removed = ran[INTACT], ran[REMOVED]
    from_formed = list(texts.study.massive_layers) or [texts.formed]
    left = (removed.norms / intact.norms)[:, from_formed].mean(dim=1).double().numpy()
    measured = mean_metric("norm_left", left)
    layers = _with_sink(intact, range(texts.formed + 1, texts.study.last_before_trailing + 1))
    if not layers:
        why_not = f"No block behind has a sink (over {SINK_THRESHOLD:g}) that could follow from it."
        return measured | {"sinks_why_not": why_not}
    excess = _mass(intact, layers).mean() - texts.equal_attention.mean()
    for end, name in (("", REMOVED), ("_control", CONTROL), ("_zero", ZERO)):
        mass = _mass(ran[name], layers)
        measured |= mean_metric(f"sinks_left{end}", (mass - texts.equal_attention) / excess)
        measured[f"sink_mass{end or '_without'}"] = float(mass.mean())
    return measured | {
        "sink_layers": layers,
        "sink_layers_before": _with_sink(intact, range(texts.me_layer + 1)),
        "sink_mass_intact": float(_mass(intact, layers).mean()),
        "sink_layers_left": _with_sink(removed, layers),
    }


def _written_earlier(texts: _Texts, ran: dict[str, TextEffects]) -> dict[str, Any]:
    if EARLIER not in ran or texts.written_at is None:
        return {"earlier_why_not": "No block lies before the ME layer."}
    attending = [layer for layer in texts.study.layout.attention if texts.written_at < layer <= texts.me_layer]
    have_sinks = _with_sink(ran[INTACT], attending)
    layers = [layer for layer in attending if layer not in have_sinks]
    if not layers:
        why_not = f"have a sink intact: {listed(have_sinks)}" if have_sinks else "have attention: none"
        return {"earlier_why_not": f"Of the blocks from {texts.written_at + 1} to the ME layer all {why_not}."}
    return {
        "written_at": texts.written_at,
        "earlier_layers": layers,
        "sink_mass_before": float(_mass(ran[INTACT], layers).mean()),
        **mean_metric("sink_mass_earlier", _mass(ran[EARLIER], layers)),
        "earlier_sink_layers": _with_sink(ran[EARLIER], layers),
    }


def _rise(ran: dict[str, TextEffects], name: str) -> Float[np.ndarray, " text"]:
    return (ran[name].loss.double() - ran[INTACT].loss.double()).numpy()


def _losses(ran: dict[str, TextEffects]) -> dict[str, Any]:
    measured: dict[str, Any] = {"loss": float(ran[INTACT].loss.mean())}
    for field, name in (("dloss_removed", REMOVED), ("dloss_zero", ZERO), ("dloss_mean", MEAN)):
        if name in ran:
            measured |= mean_metric(field, _rise(ran, name))
    return measured if MEAN in ran else measured | {"mean_why_not": "A mean over other prompts takes two prompts."}


# --- Figures ----------------------------------------------------------------------------------------------------------


def _sinks_figure(texts: _Texts, sinks: pd.DataFrame, observed: str) -> Figure:
    by_run, named = dict(iter(sinks.groupby("run"))), {EARLIER: f"{EARLIER}, at block {texts.written_at}"}
    shown = [name for name in (INTACT, REMOVED, CONTROL, EARLIER, ZERO) if name in by_run]
    curves = [Curve(named.get(each, each), by_run[each], color) for each, color in zip(shown, COLORS, strict=False)]
    panel = Panel("", "attention on the massive token", curves, texts.me_layer, y_range=(0, 1))
    note = "Mean over heads and texts; bands: 95% intervals over texts. "
    note += f"Equal attention to all tokens: {texts.equal_attention.mean():.2f}."
    title = texts.study.title("Sinks with and without the massive activation", len(texts.prompts))
    expected = "Sinks are a downstream consequence of the massive activation."
    return Figure(curves_by_block([panel], title=title, note=note), "section 6", expected, observed)


def _sinks_in_words(metrics: ConsequenceMetrics) -> list[tuple[str, str]]:
    m = metrics
    if m.sinks_left is None:
        rows = [("sinks without it", m.sinks_why_not or "")]
    else:
        left = with_interval(m.sinks_left, m.sinks_left_interval, ".0%")
        without = (
            f"Without what the FFN of {listed(m.removed_layers or ())} writes to the massive token, the attention "
        )
        without += f"on that token in later blocks (sink mass) falls from {m.sink_mass_intact:.2f} to "
        without += f"{m.sink_mass_without:.2f}: {left} of what goes beyond equal attention is left."
        if m.sink_layers_left:
            without += f" A sink stays in {listed(m.sink_layers_left)}."
        control = f"Without what that FFN writes to all other tokens it is {m.sink_mass_control:.2f}; with the massive "
        control += f"activations alone set to zero, {m.sink_mass_zero:.2f}."
        rows = [("sinks without it", without), ("for comparison", control)]
    if m.sink_mass_earlier is None:
        return [*rows, ("written earlier", m.earlier_why_not or "")]
    where = f"in {listed(m.earlier_sink_layers)}" if m.earlier_sink_layers else "in none of them"
    earlier = f"With the massive state written already at block {m.written_at}, the sink mass in "
    earlier += (
        f"{listed(m.earlier_layers)} goes from {m.sink_mass_before:.2f} to {m.sink_mass_earlier:.2f}, and is over "
    )
    return [*rows, ("written earlier", f"{earlier}{SINK_THRESHOLD:g}, a sink, {where}.")]


def _losses_in_words(metrics: ConsequenceMetrics, formed: int) -> list[tuple[str, str]]:
    m = metrics
    words = f"The loss of {m.loss:.2f} nats a token rises by {_signed(m.dloss_zero, m.dloss_zero_interval)} with the "
    words += f"massive activations after block {formed} set to zero"
    if m.dloss_mean is not None:
        words += f", by {_signed(m.dloss_mean, m.dloss_mean_interval)} with them set to their mean over other inputs"
    without = _signed(m.dloss_removed, m.dloss_removed_interval)
    return [("loss", f"{words}, and by {without} without what the FFN writes to the token.")]


def _loss_figure(texts: _Texts, ran: dict[str, TextEffects], loss: float | None, observed: str) -> Figure:
    rises = {name: _rise(ran, name) for name in ran if name != INTACT}
    rows = [(name, rise.mean(), *mean_interval(rise)) for name, rise in rises.items()]
    bars = pd.DataFrame(rows, columns=["name", "mean", "low", "high"])
    title = texts.study.title("What each change costs in loss", len(texts.prompts))
    note = f"Rise of the loss over the intact model's {loss:.2f}; whiskers: 95% intervals over texts."
    plot = difference_bars(bars, x_title="Δloss (nats a token)", title=title, note=note)
    expected = "Set to zero, the massive activations take the model down; set to their mean, nothing changes."
    return Figure(plot, "Sun et al. (2024), table 3", expected, observed)


def _signed(rise: float | None, interval: Interval | None) -> str:
    assert rise is not None
    return with_interval(rise, interval, "+.3f")
