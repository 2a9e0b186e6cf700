"""What an analysis found: numbers under their names (`Metrics`), tidy tables, figures, and sentences.

    result = melens.analysis.sinks(study)
    result.figures["sink_mass"]      # shows itself in a notebook
    result.metrics.sink_onset_layer  # an attribute, so that a typo is an error
    result.claims                    # what the paper's claims about it come to

Each analysis has metrics of its own, as `melens.analysis.attention_sinks.SinksMetrics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import plotly.graph_objects as go
from pydantic import BaseModel, ConfigDict, model_validator

from melens.figures import saving
from melens.printing import Brief, Summary, brief, html_table

__all__ = ["COMPLETE", "PARTIAL", "Figure", "Interval", "Metrics", "Result", "plain"]

COMPLETE, PARTIAL = "result.json", "result.partial.json"
"""What a run's folder holds once everything is there, and before."""
Interval = tuple[float | None, float | None]
"""A 95% interval; of a single prompt there is none: (NaN, NaN), which JSON holds as (null, null)."""


class Metrics(BaseModel):
    """The numbers of one experiment by name: what its claims, its report and `result.json` read.

    A field without a value was not measured, and is not in `result.json`. Each experiment adds its own fields.

    Attributes:
        experiment: which one measures them; of the class.
        rests_on_states: whether its means are over states of the massive token, of which prompts that share it have
            one, and not over texts, items or weights; of the class.
        me_layer: the ME layer, 0-based; None without one.
        formed: the block in which the massive state is formed: the ME layer, or a later one at the end of a climb.
        n_prompts, distinct_first_tokens: what the trace rests on.
        massive_position: where the massive token most often is once it is formed.
        n_carriers: prompts whose massive activation is born in the ME layer, which the numbers are about.
        last_lasting_layer: the last block before the trailing ones, which count apart (appendix A).
        n_layers: how many blocks there are.
        attention_layers, ffn_layers: the blocks whose attention, and whose FFN, can be measured (`Layout`).
        not_applicable, failed: why the experiment says nothing of this model, and whether that is a mistake of melens.
        measured_before: whether the result was kept by an earlier run.
        why_not: why nothing of it was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    experiment: ClassVar[str] = ""
    rests_on_states: ClassVar[bool] = True
    me_layer: int | None = None
    formed: int | None = None
    n_prompts: int | None = None
    distinct_first_tokens: int | None = None
    massive_position: int = 0
    n_carriers: int | None = None
    last_lasting_layer: int | None = None
    n_layers: int | None = None
    attention_layers: list[int] | None = None
    ffn_layers: list[int] | None = None
    not_applicable: str | None = None
    failed: bool = False
    measured_before: bool = False
    why_not: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_python(cls, values: Any) -> Any:
        """Take numpy's numbers for Python's."""
        return {name: _python(value) for name, value in values.items()} if isinstance(values, Mapping) else values

    def __repr__(self) -> str:
        measured = [
            f"{name}={brief(getattr(self, name))}" for name in type(self).model_fields if name in self.model_fields_set
        ]
        return f"{type(self).__name__}({', '.join(measured)})"

    __str__ = __repr__  # pydantic's writes out every list

    def plain(self) -> dict[str, Any]:
        """Return the fields that were measured, ready for JSON but for NaN."""
        return self.model_dump(exclude_unset=True)


@dataclass(frozen=True, repr=False)
class Figure(Brief):
    """A figure and what to see in it; as the last line of a notebook's cell it shows itself.

    Attributes:
        drawing: the interactive figure, or what draws it when `plot` is first asked for: who wants the metrics alone
            need not wait for it.
        source: which of the paper's figures it reproduces, or who asked for it.
        expected: what the paper shows there, in a sentence; empty where it shows none.
        observed: what is seen on this model, in a sentence.

    Example:
        >>> figure = melens.analysis.ffn(study).figures["ffn"]
        >>> figure.source
        'figure 4'
        >>> figure.save("ffn.html").name
        'ffn.html'
    """

    drawing: go.Figure | Callable[[], go.Figure] = field(repr=False)
    source: str
    expected: str
    observed: str

    @cached_property
    def plot(self) -> go.Figure:
        """The interactive figure."""
        return self.drawing if isinstance(self.drawing, go.Figure) else self.drawing()

    def show(self) -> None:
        """Open the figure, as plotly does."""
        self.plot.show()

    def save(self, path: str | Path, *, columns: int = 1) -> Path:
        """Write the figure for a paper (.pdf, .svg, .png) or as a page (.html), as `melens.figures.save` does."""
        return saving.save(self.plot, path, columns=columns)

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> Any:
        return saving.in_notebook(self.plot)._repr_mimebundle_(*args, **kwargs)


@dataclass(frozen=True, repr=False)
class Result(Summary):
    """What an experiment found.

    Attributes:
        experiment: its name.
        model: as in `Trace.model`.
        metrics: its numbers, for `result.json` and `melens.judge`.
        tables: tidy data by name, each what a figure shows.
        figures: by name.
        findings: what to show the user, as (what, value) rows of plain text, or (what, left, right) to lay two texts
            side by side.
        documents: whole files by name, for what is no figure: HTML pages, tables in Markdown.

    Example:
        >>> result = melens.analysis.direction(study)
        >>> result.experiment, result.metrics.me_layer, sorted(result.tables)
        ('direction', 2, ['direction_by_block'])
        >>> result.claims.columns[:3].tolist()
        ['model', 'id', 'claim']
    """

    experiment: str
    model: dict[str, Any]
    metrics: Metrics
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    findings: Sequence[tuple[str, ...]] = ()
    documents: dict[str, str] = field(default_factory=dict)

    @property
    def claims(self) -> pd.DataFrame:
        """The claims that this result measures, with their verdicts, as `melens.judge` returns them."""
        from melens.claims.engine import judge_parts  # whose claims are declared beside the analyses

        return judge_parts([self])

    def draw(self) -> Result:
        """Draw every figure now, which else is done when it is first shown or written; return the result."""
        assert all(figure.plot is not None for figure in self.figures.values())
        return self

    def _heading(self) -> str:
        return f"{self.experiment} of {self.model['name']}" if "name" in self.model else self.experiment

    def _rows(self) -> list[tuple[str, ...]]:
        named = {kind: ", ".join(getattr(self, kind)) for kind in ("tables", "figures", "documents")}
        return [*self.findings, *((kind, names) for kind, names in named.items() if names)]

    def _repr_html_(self) -> str:
        shown = ["claim", "verdict", "note"]
        return super()._repr_html_() + html_table(self.claims[shown].fillna("").astype(str).values.tolist(), head=shown)


def plain(value: Any) -> Any:
    """Turn numpy scalars into Python's and what JSON lacks (NaN, infinity) into null."""
    value = _python(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _python(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
