"""Does melens give transformers' own numbers on this kind of model? Every site with its error, and generation.

    melens.analysis.verification(study).tables["verification"]

1. `melens.verify` runs two prompts in a trace and in transformers' own eager modules, and compares every site.
2. `verify_generation` compares decode steps with the whole sequence, with a cache and in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from melens.analysis.study import Study
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.style import COLORS
from melens.models.generation import Generation, verify_generation
from melens.report.result import Figure, Metrics, Result
from melens.tracing.batching import BatchRule
from melens.tracing.verification import Verification, verify

__all__ = ["VerificationMetrics", "verification"]


class VerificationMetrics(Metrics):
    """What `verification` finds.

    Attributes:
        way: how a trace runs, a key of `_WAYS`.
        largest_error, limit, site, layer: where a trace is furthest off, by how much, and how much may be.
        use_cache, cache_error: whether generation keeps keys and values, and its error; None where none is possible.
    """

    way: str = ""
    largest_error: float | None = None
    limit: float | None = None
    site: str | None = None
    layer: int | None = None
    use_cache: bool | None = None
    cache_error: float | None = None


def verification(study: Study) -> Result:
    """Check a trace and a generation of the study's model, and lay the errors out by site and block.

    Args:
        study: as `melens.study` makes it.

    Returns:
        Metrics `VerificationMetrics`; the table and the figure `verification`: errors as in `Verification.errors`.

    Raises:
        MelensError: as `melens.verify`.

    Example:
        >>> result = melens.analysis.verification(study)
        >>> result.metrics.way
        'fast'
    """
    checked = verify(study.model)
    written = verify_generation(study.model) if study.model.original_model.can_generate() else None
    worst: dict[str, Any] = dict(checked.worst or {})
    metrics = study.metrics(
        VerificationMetrics,
        way=checked.way,
        why_not=checked.why_not or None,
        largest_error=worst.get("error"),
        **{name: worst.get(name) for name in ("limit", "site", "layer")},
        use_cache=None if written is None else written.use_cache,
        cache_error=None if written is None else written.error,
    )
    furthest_off = checked.errors.loc[checked.errors.groupby("site", sort=False)["error"].idxmax()]
    by_site = [
        (row["site"], f"off by {row['error']:.1e} at most (limit {row['limit']:.1e}), {_block(row['layer'])}")
        for row in furthest_off.to_dict("records")
    ]
    findings = [
        ("largest error", _largest_in_words(worst)),
        ("a trace runs", checked.why_not or _WAYS[checked.way]),
        ("prompts of a trace", _sharing_in_words(checked.rule)),
        ("generation", _generation_in_words(written)),
        *by_site,
    ]
    figures = {"verification": _figure(checked, study)} if worst else {}
    return Result("verify", study.trace.model, metrics, {"verification": checked.errors}, figures, findings)


_WAYS = {
    "fast": "transformers' own modules, unless a hook needs TransformerLens's components",
    "bridge": "TransformerLens's components, which takes more time and memory",
}


def _largest_in_words(worst: Mapping[str, Any]) -> str:
    if not worst:
        return "nothing was compared"
    off = f"{worst['error']:.1e} off transformers' own eager modules, at {worst['site']}"
    return f"{off} (limit {worst['limit']:.1e})"


def _block(layer: int) -> str:
    return f"in block {layer}" if layer >= 0 else "outside the blocks"


def _sharing_in_words(rule: BatchRule) -> str:
    if rule.alone:
        return "run one by one: they would change each other's numbers"
    words = []
    if rule.equal_beyond is not None:
        of_length = f"of more than {rule.equal_beyond} tokens " if rule.equal_beyond else ""
        words.append(f"those {of_length}share a forward pass only if they are equally long")
    if rule.limits:
        words.append(f"those of up to {', '.join(map(str, rule.limits))} tokens share none with longer ones")
    return "; ".join(words) or "share forward passes"


def _generation_in_words(written: Generation | None) -> str:
    if written is None:
        return "this model writes no text"
    cache = "with a cache" if written.use_cache else "without a cache, which is off"
    batch = "several prompts in a batch" if written.together else "one prompt at a time"
    return f"{cache}, {batch}: off by {written.error:.1e} of the largest logit against the whole sequence"


_PARTS = {
    "residual stream": ("hook_resid",),
    "normalisations": ("ln",),
    "attention": ("attn.", "hook_attn"),
    "FFN": ("mlp.", "hook_mlp"),
}
"""What the sites' names begin with, by the part of a block that they belong to."""


def _figure(checked: Verification, study: Study) -> Figure:
    is_drawn = (checked.errors["layer"] >= 0) & (checked.errors["error"] > 0)  # a logarithmic axis has no 0
    points = checked.errors[is_drawn].rename(columns={"error": "mean"})
    panels = []
    for part, beginnings in _PARTS.items():
        by_site = points[points["site"].str.startswith(beginnings)].groupby("site", sort=False)
        colored = zip(by_site, COLORS, strict=False)
        curves = [Curve(str(site), own[["layer", "mean"]], color) for (site, own), color in colored]
        panels.append(Panel(part, "error", curves, study.me.layer, log_scale=True))
    worst: Any = checked.worst
    limit = f"{worst['limit']:.0e}"
    kinds = "Of the worst token, relative to its vector; of attention, the largest difference of a probability."
    title = f"How far a trace is from transformers' own eager modules: {study.trace.model['name']}, 2 prompts"
    observed = f"At most {worst['error']:.1e}, at {worst['site']} {_block(int(worst['layer']))}; limit {limit}."
    plot = curves_by_block(panels, title=title, note=f"{kinds} Limit {limit}.")
    return Figure(plot, "melens's self-check", "The paper does not ask this.", observed)
