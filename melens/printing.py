"""Print an object in the lines that a researcher reads, where a dataclass writes out every tensor, table and module.

    study.trace     # Trace of 36 prompts (10 to 1,206 tokens) through smollm2-135m, 30 blocks, and its tables by name
    result          # what was found; in a notebook a table, with the verdicts on the paper's claims

`Brief` is for what is passed on: the fields that are not as by default, each in a few words. `Summary` is for what one
looks at: a heading and rows, as plain text and as a table in a notebook.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import Field, fields
from html import escape
from typing import Any

__all__ = ["Brief", "Summary", "brief", "counted", "html_table", "paragraph"]


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 4
        self.maxlevel = 3

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, Brief | Summary):
            return repr(x)
        if hasattr(x, "shape"):  # an array, a tensor or a table
            return f"{type(x).__name__} of {' × '.join(f'{size:,}' for size in x.shape) or 'one number'}"
        if callable(x):  # a module, whose own repr is a page, a function, whose own is an address, a class
            return getattr(x, "__name__", type(x).__name__)
        return super().repr_instance(x, level)


_SHORT = _Short()


def brief(value: Any) -> str:
    """Write a value in a few words: of an array or table the shape, of a module the class, of a long list its start."""
    return _SHORT.repr(value)


class Brief:
    """A dataclass (`repr=False`) that prints the fields that are not as by default, each in a few words."""

    def __repr__(self) -> str:
        of_class: Any = self  # a mixin of dataclasses, which is none itself
        given = [
            (each.name, getattr(self, each.name))
            for each in fields(of_class)
            if each.repr and not _is_default(self, each)
        ]
        return f"{type(self).__name__}({', '.join(f'{name}={brief(value)}' for name, value in given)})"


def _is_default(whole: Any, field: Field[Any]) -> bool:
    value = getattr(whole, field.name)
    return value is field.default or (isinstance(value, str | int | float | tuple) and value == field.default)


class Summary:
    """An object that prints a heading and rows (what, value); a notebook shows them in a table, and further details."""

    def _heading(self) -> str:
        raise NotImplementedError

    def _rows(self) -> Iterable[Sequence[str]]:
        """Return what is printed below the heading."""
        return ()

    def _details(self) -> Iterable[Sequence[str]]:
        """Return what a notebook shows below that."""
        return ()

    def __repr__(self) -> str:
        rows = [": ".join(filter(None, [row[0], " | ".join(filter(None, row[1:]))])) for row in self._rows()]
        return "\n".join([self._heading(), *rows])

    def _repr_html_(self) -> str:
        return f"<p><b>{escape(self._heading())}</b></p>{html_table([*self._rows(), *self._details()])}"


def html_table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Lay rows of text out as an HTML table; empty where there are none."""
    lines = [_html_row(row, "td") for row in rows]
    first = _html_row(head, "th") if head else ""
    return f"<table>{first}{''.join(lines)}</table>" if lines else ""


def _html_row(cells: Sequence[str], tag: str) -> str:
    written = [f'<{tag} style="text-align:left">{escape(cell)}</{tag}>' for cell in cells]
    return f"<tr>{''.join(written)}</tr>"


def paragraph(rows: Iterable[Sequence[str]]) -> str:
    """Join what rows (what, sentences) say, for the figure that shows it all."""
    return " ".join(said for _, said in rows)


def counted(number: int, what: str) -> str:
    """Write a number of things: "1 prompt", "4,320 rows"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
