"""What `quantization` found, in figures and in words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pandas as pd

from melens.analysis.quantization_claims import QuantizationMetrics
from melens.analysis.statistics import mean_by, with_interval
from melens.analysis.study import Study
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.points import grouped_points
from melens.figures.style import COLORS, FIRST, OTHERS
from melens.report.result import Figure, Interval

__all__ = ["NO_MASK", "PREFIX", "by_bits_figure", "by_mask_figure", "findings_of", "inputs_figure"]

NO_MASK, PREFIX = "no mask", "behind a prefix"
"""Conditions; the others are masks by name."""

_SCALES = {
    "static": "one fixed scale a layer",
    "tensor": "one scale a layer and text",
    "token": "one scale a token",
    "channel": "one scale an output",
}
_PANELS = {
    "static": "activations, fixed scales",
    "tensor": "activations, a scale a text",
    "token": "activations, a scale a token",
}
_OF_WEIGHTS = {"channel": "weights, a scale an output", "tensor": "weights, a scale a layer"}
_ALL, _EXEMPT, _BOTH = "every token", "without massive tokens", "weights too, a scale an output"
_Y_TITLE = "Δloss (nats a token)"


# --- Figures ----------------------------------------------------------------------------------------------------------


def by_bits_figure(study: Study, metrics: QuantizationMetrics, table: pd.DataFrame) -> Figure:
    """Draw Δloss by bits and by what shares a scale, with and without the massive tokens."""
    points = _points(table[table["condition"] == NO_MASK])
    points["name"] = points["exempt"].map({False: _ALL, True: _EXEMPT})
    points.loc[(points["activations"] != "full") & (points["weights"] != "full"), "name"] = _BOTH
    note = (
        f"Whiskers: 95% intervals over {metrics.texts} texts. Without: their rows in full precision, out of the scales."
    )
    title = _title(study, metrics, "What rounding linear layers costs")
    colors = {_ALL: FIRST, _EXEMPT: OTHERS, _BOTH: COLORS[6]}
    plot = partial(grouped_points, points, colors, x_title="bits", y_title=_Y_TITLE, title=title, note=note)
    expected = "Outliers of the massive token make one scale for a tensor too coarse; a scale for each token is enough."
    said = " ".join(words for what, words in findings_of(metrics, table) if what.startswith("8 bits"))
    return Figure(plot, "Son et al. (2024), Chen et al. (2024)", expected, said or metrics.bits_why_not or "")


def by_mask_figure(study: Study, metrics: QuantizationMetrics, table: pd.DataFrame) -> Figure:
    """Draw Δloss by bits under each mask and behind a prefix, over the same model in full precision."""
    points = _points(table[(table["weights"] == "full") & (table["activations"] != "full")])
    masks = [name for name in points["condition"].unique() if name not in (NO_MASK, PREFIX)]
    shared = [word for word in masks[0].split() if all(word in name.split() for name in masks)] if masks[1:] else []
    points["name"] = [_without_words(name, shared) for name in points["condition"]]
    points.loc[(points["condition"] == NO_MASK) & points["exempt"], "name"] = f"{NO_MASK}, {_EXEMPT}"
    note = "Over the same model in full precision: masked, or behind the prefix. Whiskers: 95% intervals over texts."
    note += f" All masks: {' '.join(shared)}." if shared else ""
    title = _title(study, metrics, "What rounding costs under masks and behind a prefix")
    colors = dict(zip(points["name"].unique(), COLORS * len(points), strict=False))
    plot = partial(grouped_points, points, colors, x_title="bits", y_title=_Y_TITLE, title=title, note=note)
    said = " ".join(words for what, words in findings_of(metrics, table) if what in ("under masks", "prefix"))
    return Figure(plot, "a follow-up question", "The paper says nothing of quantisation.", said)


def _points(table: pd.DataFrame) -> pd.DataFrame:
    """Lay Δloss out for `grouped_points`, panels and bits in their order."""
    of_weights = table["activations"] == "full"
    panel = table["activations"].map(_PANELS).where(~of_weights, table["weights"].map(_OF_WEIGHTS))
    points = table.assign(panel=panel, x=table["bits"].astype(str), mean=table["dloss"])
    order = {panel: at for at, panel in enumerate((*_PANELS.values(), *_OF_WEIGHTS.values()))}
    points = points.sort_values("bits", ascending=False, kind="stable")
    return points.sort_values("panel", key=lambda panels: panels.map(order), kind="stable")


def _without_words(name: str, words: Sequence[str]) -> str:
    return " ".join(word for word in name.split() if word not in words) or name


def inputs_figure(study: Study, metrics: QuantizationMetrics, inputs: pd.DataFrame) -> Figure:
    """Draw the outliers of what enters the linear layers by block, with and without the massive tokens."""
    own = inputs[inputs["condition"] == NO_MASK].rename(columns={"text": "prompt"}).dropna()
    panels = []
    for quantity, y_title in (("kurtosis", "excess kurtosis"), ("largest", "largest |value|")):
        for end, of in (("", "all tokens"), ("_others", "without the massive tokens")):
            means = mean_by(own, f"{quantity}{end}", ("input", "layer"))
            groups = means.groupby("input", sort=False)
            curves = [Curve(str(name), rows, color) for (name, rows), color in zip(groups, COLORS, strict=False)]
            panels.append(Panel(f"{y_title}, {of}", y_title, curves, study.me.layer, log_scale=True))
    title = _title(study, metrics, "Outliers of what enters linear layers")
    plot = partial(curves_by_block, panels, title=title, note="Mean over texts; bands: 95% intervals over texts.")
    return Figure(
        plot,
        "Bondarenko et al. (2023)",
        "Outliers, seen as kurtosis, make activations hard to quantise.",
        _outliers(own),
    )


def _title(study: Study, metrics: QuantizationMetrics, text: str) -> str:
    return f"{text}: {study.trace.model['name']}, {metrics.texts} texts of {metrics.tokens_per_text} tokens"


# --- Words ------------------------------------------------------------------------------------------------------------


def findings_of(metrics: QuantizationMetrics, table: pd.DataFrame) -> list[tuple[str, str]]:
    """Say what was found, for the terminal and below the figures."""
    m = metrics
    before = (
        f"In full precision the loss is {m.loss:.3f} nats a token, over {m.predictions_per_text:.0f} predictions of "
    )
    before += f"each of {m.texts} texts: those from token 0 and from massive tokens ({m.massive_per_text:.1f} a text) "
    before += "do not count."
    if m.has_gates:
        before += " Attention is gated; the gates read activations before they are rounded."
    rows = [("loss", before), *_at_8_bits(m), ("all bits", _by_bits(table)), ("weights", _weights(m, table))]
    return [*rows, ("under masks", _masks(m, table)), ("prefix", _prefix(m, table))]


def _at_8_bits(m: QuantizationMetrics) -> list[tuple[str, str]]:
    if m.bits_why_not is not None:
        return []
    static = (
        f"With one fixed scale a layer, activations at 8 bits cost {_signed(m.dloss_static, m.dloss_static_interval)}"
    )
    static += _gone(m.exempt_share_static, m.exempt_share_static_interval, m.exempt_why_not)
    tensor = f"With one scale a layer and text they cost {_signed(m.dloss_tensor, m.dloss_tensor_interval)}"
    tensor += _gone(m.exempt_share_tensor, m.exempt_share_tensor_interval, m.exempt_why_not)
    token = f"With one scale a token they cost {_signed(m.dloss_token, m.dloss_token_interval)}."
    return [("8 bits, fixed scales", static), ("8 bits, a scale a text", tensor), ("8 bits, a scale a token", token)]


def _gone(share: float | None, interval: Interval | None, why_not: str | None) -> str:
    if share is None:
        return f". {why_not}"
    gone = with_interval(share, interval, ".0%")
    return f"; {gone} of that is gone with the massive tokens alone in full precision and out of the scale."


def _by_bits(table: pd.DataFrame) -> str:
    own = table[(table["condition"] == NO_MASK) & (table["weights"] == "full") & ~table["exempt"]]
    return f"Activations cost {_listed(own, 'activations')}."


def _weights(m: QuantizationMetrics, table: pd.DataFrame) -> str:
    own = table[(table["condition"] == NO_MASK) & (table["activations"] == "full")]
    words = f"Weights cost {_listed(own, 'weights')}."
    if m.are_of_4_bits:
        words += " They were rounded to 4 bits in groups of 32 before (a GGUF's): here they are rounded again."
    both = table[(table["condition"] == NO_MASK) & (table["activations"] != "full") & (table["weights"] != "full")]
    return f"{words} With activations as well, they cost {_listed(both, 'activations')}."


def _masks(m: QuantizationMetrics, table: pd.DataFrame) -> str:
    rows = table[(table["activations"] == "tensor") & (table["weights"] == "full") & ~table["exempt"]]
    most = rows["bits"].max()
    masked = rows[(rows["bits"] == most) & ~rows["condition"].isin([NO_MASK, PREFIX])].to_dict("records")
    if not masked:
        return m.mask_why_not or "No mask was asked for."
    costs = [f"{_signed(row['dloss'], (row['low'], row['high']))} under {row['condition']}" for row in masked]
    words = f"At {most} bits and one scale a layer and text activations cost {', '.join(costs)}."
    if m.mask_share is None:
        return f"{words} {m.mask_why_not or m.bits_why_not}"
    share = with_interval(m.mask_share, m.mask_share_interval, ".0%")
    return f"{words} Under WeMask at the attention input {share} of what it costs without a mask is gone."


def _prefix(m: QuantizationMetrics, table: pd.DataFrame) -> str:
    own = table[table["condition"] == PREFIX]
    if own.empty:
        return m.prefix_why_not or m.bits_why_not or ""
    words = (
        f"Behind {m.prefix or 'it'} in full precision, as in a cache, activations cost {_listed(own, 'activations')}."
    )
    if m.prefix is not None:
        words += (
            f" It is {'' if m.prefix_is_massive else 'not '}massive there; {m.massive_behind_prefix:.1f} others of "
        )
        words += (
            f"a text are, and one in {m.prompts_massive_behind_prefix} of {m.calibration_prompts} prompts, to which "
        )
        words += "scales are fixed."
    return words


def _listed(rows: pd.DataFrame, column: str) -> str:
    """List Δloss by scale and bits: "+0.01 / +0.2 (8 / 6 bits) with one scale a token, ..."."""
    listed = []
    for kind, own in rows.groupby(column, sort=False):
        by_bits = own.sort_values("bits", ascending=False)
        costs = " / ".join(f"{value:+.3f}" for value in by_bits["dloss"])
        scale = "one scale a layer" if (column, kind) == ("weights", "tensor") else _SCALES[str(kind)]
        listed.append(f"{costs} at {' / '.join(map(str, by_bits['bits']))} bits with {scale}")
    return "; ".join(listed)


def _outliers(inputs: pd.DataFrame) -> str:
    """Say where the outliers are, and whether they are the massive tokens'."""
    means = inputs.groupby(["input", "layer"], as_index=False).mean(numeric_only=True)
    at = max(means.to_dict("records"), key=lambda row: row["kurtosis"])
    return (
        f"The largest excess kurtosis is that of what {at['input']} of block {at['layer']} reads: "
        f"{at['kurtosis']:,.0f}, and {at['kurtosis_others']:,.0f} without the massive tokens; its largest |value| is "
        f"{at['largest']:,.4g}, and {at['largest_others']:,.4g} without them."
    )


def _signed(rise: float | None, interval: Interval | None) -> str:
    assert rise is not None
    return with_interval(rise, interval, "+.3f")
