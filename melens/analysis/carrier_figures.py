"""The figures of `carriers`, and what they show in words."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import cycle

import pandas as pd

from melens.analysis.carrier_claims import CarrierMetrics
from melens.analysis.statistics import mean_by, mean_interval, with_interval
from melens.analysis.study import Study
from melens.analysis.super_weights import SPIKE
from melens.figures.bars import difference_bars
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.heatmaps import shares
from melens.figures.style import COLORS, FIRST, OTHERS
from melens.models.layout import listed
from melens.printing import counted, paragraph
from melens.report.result import Figure, Interval

__all__ = ["RANDOM_EXPERTS", "SUPER_EXPERTS", "draw", "in_words"]

SUPER_EXPERTS, RANDOM_EXPERTS = "without the super experts", "without as many other experts"

Tables = Mapping[str, pd.DataFrame]


def draw(study: Study, metrics: CarrierMetrics, tables: Tables, findings: list[tuple[str, str]]) -> dict[str, Figure]:
    """Draw what was measured: of a dense FFN, of a mixture, or of both."""
    said = dict(findings)
    figures = {}
    if "scaling" in tables:
        figures["scan"] = _scan_figure(study, tables["scan"], said["super weight"])
        figures["scalars"] = _scalars_figure(study, metrics, tables["scalars"], said["super weight"])
        observed = paragraph([(name, said[name]) for name in ("without it", "loss")])
        figures["scaling"] = _scaling_figure(study, metrics, tables["scaling"], observed)
        figures["massive_weights"] = _rows_figure(study, metrics, tables["massive_weights"], said["massive weights"])
    if "experts" in tables:
        figures["experts"] = _experts_figure(study, metrics, tables["experts"], said["super experts"])
    return figures


def _scan_figure(study: Study, scan: pd.DataFrame, observed: str) -> Figure:
    panels = []
    for column, title, color in (("input", "Largest input", FIRST), ("output", "Largest output", OTHERS)):
        points = mean_by(scan.assign(size=scan[column].abs()), "size")
        curve = Curve(title, points, color, False)
        panels.append(Panel(title, "|value|, any token and channel", [curve], study.me.layer, log_scale=True))
    title = study.title("Input and output of the down projections", scan["prompt"].nunique())
    note = "Mean over prompts; bands: 95% intervals. Where both spike, their channels name one weight."
    plot = partial(curves_by_block, panels, title=title, note=note)
    expected = "Input and output spike in the same early block, each in one channel."
    return Figure(plot, "Yu et al. (2024), figure 3", expected, observed)


def _scalars_figure(study: Study, metrics: CarrierMetrics, products: pd.DataFrame, observed: str) -> Figure:
    table = products.pivot(index="row", columns="column", values="share")
    table = table.loc[products["row"].unique(), products["column"].unique()]
    table["others"] = 1 - table.sum(axis=1)
    names = [*(f"neuron {column}" for column in products["column"].unique()), "all others"]
    table.index = pd.Index([f"dim {row}" for row in table.index])
    title = study.title(f"What each neuron writes in block {study.me.layer}", metrics.texts)
    note = "Share of the down projection's output at the massive token, w · x / output, mean over texts. Rows: the "
    note += "dims with the largest output; columns: the neurons with the largest input."
    plot = partial(shares, table, names=names, title=title, note=note)
    expected = "One product of one weight and one input dominates the output."
    return Figure(plot, "Yu et al. (2024), section 3.1", expected, observed)


_PANELS = (
    ("largest", "Largest |h| behind the ME layer", "|h| of the massive token"),
    ("sink_mass", "Attention on the massive token", "sink mass"),
    ("dloss", "Loss", "Δloss (nats a token)"),
)


def _scaling_figure(study: Study, metrics: CarrierMetrics, scaling: pd.DataFrame, observed: str) -> Figure:
    named = scaling.assign(name=scaling["what"].where(scaling["kind"] != "random", "random entries, mean of draws"))
    panels = []
    for column, title, y_title in _PANELS:
        curves = []
        for (name, own), color in zip(named.groupby("name", sort=False), cycle(COLORS), strict=False):
            if own[column].notna().all():
                of_text = own.groupby(["factor", "text"])[column].mean().rename_axis(["layer", "prompt"])
                curves.append(Curve(str(name), mean_by(of_text.reset_index(), column), color))
        if curves:
            tops = {"largest": 1.1 * max(curve.points["mean"].max() for curve in curves), "sink_mass": 1.0}
            y_range = (0, float(tops[column])) if column in tops else None
            panels.append(Panel(title, y_title, curves, None, y_range=y_range, zero_line=y_range is None))
    title = study.title("Single weights of the down projection scaled", metrics.texts)
    note = "Mean over texts; bands: 95% intervals. 1 is the model as it is."
    axis = {"title": {"text": "factor"}, "dtick": 0.5}
    plot = partial(curves_by_block, panels, title=title, note=note, columns=3, x_axis=axis)
    expected = "At 0 the massive activation falls by three quarters and the loss explodes; other weights do nothing."
    return Figure(plot, "Yu et al. (2024), figure 4, table 1", expected, observed)


def _rows_figure(study: Study, metrics: CarrierMetrics, outcomes: pd.DataFrame, observed: str) -> Figure:
    rows = []
    for name, own in outcomes.groupby("what", sort=False):
        rises = own.groupby("text")["dloss"].mean().to_numpy()
        rows.append((name, rises.mean(), *mean_interval(rises)))
    bars = pd.DataFrame(rows, columns=["name", "mean", "low", "high"])
    title = study.title(f"Rows of gate and up of block {study.me.layer} at zero", metrics.texts)
    note = f"Top: the {metrics.top_rows} rows of the neurons with the largest |value| at the massive token. Rise of "
    note += f"the loss over the intact model's {metrics.loss:.2f}; whiskers: 95% intervals over texts."
    plot = partial(difference_bars, bars, x_title="Δloss (nats a token)", title=title, note=note)
    expected = "A few rows at zero take the model down; all the others at zero cost little."
    return Figure(plot, "Oh et al. (2024), section 3", expected, observed)


def _experts_figure(study: Study, metrics: CarrierMetrics, outputs: pd.DataFrame, observed: str) -> Figure:
    by_block = outputs.groupby("layer")["largest"]
    curves = [
        Curve(name, points.to_frame("mean").reset_index(), color)
        for name, points, color in (
            ("largest expert", by_block.max(), FIRST), ("median expert", by_block.median(), OTHERS)
        )
    ]  # fmt: skip
    panel = Panel("", "largest |output| of the down projection", curves, study.me.layer, log_scale=True)
    title = study.title("What single experts write", metrics.texts)
    note = f"Before the router's weight, over all tokens of the texts; {counted(metrics.n_experts or 0, 'expert')}."
    expected = "In one early block an expert or two write a thousand times what others do."
    return Figure(
        partial(curves_by_block, [panel], title=title, note=note), "Su et al. (2025), section 3", expected, observed
    )


# --- Words ------------------------------------------------------------------------------------------------------------


def in_words(metrics: CarrierMetrics, tables: Tables) -> list[tuple[str, str]]:
    """Say what was found, and what became of the texts."""
    rows = [] if metrics.scalar is None else [*_scalars_in_words(metrics), _rows_in_words(metrics)]
    if "texts" in tables:
        rows += _texts_in_words(tables["texts"])
    if metrics.experts is not None:
        rows.append(_experts_in_words(metrics))
    why_not = [reason for reason in (metrics.scalars_why_not,) if reason is not None]
    return [*rows, *(("not measured", reason) for reason in why_not)]


def _scalars_in_words(metrics: CarrierMetrics) -> list[tuple[str, str]]:
    m = metrics
    assert m.scalar is not None
    assert m.share is not None
    layer, row, column = m.scalar
    spikes = m.scalar in (m.found or [])
    found = f"The down projection of block {layer} writes dim {row} most, and reads neuron {column} most"
    found += ", where both spike. " if spikes else f", but not {SPIKE:g} times as much as blocks do in the median. "
    found += f"That one weight times its input is {_share(m.share, m.share_interval)} of the output there; by size it "
    found += f"ranks {m.weight_rank:,} in its matrix."
    others = [place for place in m.found or [] if place != m.scalar]
    if others:
        found += f" Both spike in {listed([place[0] for place in others])} too."
    without = f"With it at 0, {_share(m.left, m.left_interval)} of the largest |h| behind is left; with the largest "
    without += f"other weight of the matrix at 0, {_share(m.left_control, m.left_control_interval)}."
    if m.sink_mass is not None:
        without += f" The attention on the massive token goes from {m.sink_mass:.2f} to {m.sink_mass_without:.2f}, and "
        without += f"the share of heads with a sink from {m.sink_heads:.2f} to {m.sink_heads_without:.2f}."
    loss = f"The loss of {m.loss:.2f} nats a token rises by {_signed(m.dloss, m.dloss_interval)} with it at 0, by "
    loss += f"{_signed(m.dloss_control, m.dloss_control_interval)} with the largest other weight at 0"
    if m.dloss_random is not None:
        loss += f", and by {_signed(m.dloss_random, m.dloss_random_interval)} with a random one"
    loss += f". It is least at factor {m.best_factor:g}."
    return [("super weight", found), ("without it", without), ("loss", loss)]


def _rows_in_words(metrics: CarrierMetrics) -> tuple[str, str]:
    m = metrics
    words = f"With the {m.top_rows} rows of gate and up at zero that feed the largest neurons of block {m.me_layer}, "
    words += f"the loss rises by {_signed(m.dloss_top, m.dloss_top_interval)}; with all its other rows at zero by "
    words += f"{_signed(m.dloss_rest, m.dloss_rest_interval)}"
    if m.dloss_rows_random is not None:
        words += f", with as many random ones by {_signed(m.dloss_rows_random, m.dloss_rows_random_interval)}"
    return ("massive weights", f"{words}.")


def _texts_in_words(texts: pd.DataFrame) -> list[tuple[str, str]]:
    own = texts[texts["what"] == texts["what"].iloc[0]].set_index("factor")["text"]
    return [(f"text at factor {factor:g}", " ".join(str(own[factor]).split()) or "(nothing)") for factor in (1, 0)]


def _experts_in_words(metrics: CarrierMetrics) -> tuple[str, str]:
    m = metrics
    places = ", ".join(f"expert {expert} of block {layer}" for layer, expert in m.experts or [])
    words = f"Super experts among {m.n_experts:,}: {places or 'none'}."
    if m.experts_left is not None:
        words += f" Without them {_share(m.experts_left, m.experts_left_interval)} of the largest |h| behind is left, "
        words += f"without as many others {_share(m.experts_left_random, m.experts_left_random_interval)}; the loss "
        words += f"rises by {_signed(m.dloss_experts, m.dloss_experts_interval)} and "
        words += f"{_signed(m.dloss_experts_random, m.dloss_experts_random_interval)}."
    return ("super experts", words)


def _share(value: float | None, interval: Interval | None) -> str:
    assert value is not None
    return with_interval(value, interval, ".0%")


def _signed(value: float | None, interval: Interval | None) -> str:
    assert value is not None
    return with_interval(value, interval, "+.3f")
