"""`--help`: every option of `conf/` with its default and the comment that stands beside it there."""

from __future__ import annotations

import itertools
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from experiments.options.reading import CONF

__all__ = ["Line", "help_text", "lines_of"]

_INTRODUCTION = """\
melens measures massive activations, attention sinks and WeMask on any language model.

  python experiments/run.py model=qwen3-4b exp=sinks exp.map_tokens=60     one run
  python experiments/run.py -m exp=wemask wemask.rate=0.01,0.1             a run for each value, merged
  python experiments/run.py ... hydra.run.dir=folder                       where to write (--hydra-help: more of Hydra)
"""
_GROUPS = {
    "exp": "What is measured: exp=",
    "model": "The model: model=",
    "prompts": "The prompts: prompts=",
    "wemask": "The mask: wemask=",
    "dynamics": "The checkpoints of exp=dynamics: dynamics=",
    "scale": "How much of it, for trainings and tables: scale=",
}
_OF_MODELS = {"hub": ("name",), "random": ("model_type", "tokenizer", "attention", "seed", "config")}
_SETTLED = {"name", "defaults"}
_KEEP = "of most experiments: what takes long stays in the user's cache, for the next run; false measures anew"
_AS_ABOVE = ("likewise", "as exp.keep")
"""Comments of options that are as one before them: `--help` shows that one."""
_WIDEST = 34


@dataclass(frozen=True)
class Line:
    """An option as a file of `conf/` has it, by its dotted name there, or a node of options, which has no default."""

    key: str
    default: str | None
    comment: str


def help_text() -> str:
    """Return all config groups with their choices and options, then the options of `conf/config.yaml`."""
    parts = [_INTRODUCTION]
    for group, title in _GROUPS.items():
        parts.append(title)
        parts += [_entry("  exp.keep=true", _KEEP)] if group == "exp" else []
        for path in sorted((CONF / group).glob("*.yaml")):
            header, lines = lines_of(path)
            parts.append(_entry(f"  {path.stem}", header))
            if group in ("model", "exp"):
                own = _OF_MODELS.get(path.stem, ()) if group == "model" else _own_of_experiment(lines)
                parts += [_option(f"{group}.{line.key}", line, indent=4) for line in lines if line.key in own]
        if (shown := {"prompts": "default", "wemask": "paper", "dynamics": "own"}.get(group)) is not None:
            parts += [_option(f"{group}.{line.key}", line) for line in lines_of(CONF / group / f"{shown}.yaml")[1]]
        parts.append("")
    _, lines = lines_of(CONF / "config.yaml")
    for line in lines:
        if line.key.split(".")[0] in ("defaults", "hydra") or line.key == "model.source":
            continue
        if line.default is None and "." not in line.key:
            parts.append("")
        parts.append(_option(line.key, line))
    return "\n".join(parts)


def _own_of_experiment(lines: Sequence[Line]) -> set[str]:
    return {line.key for line in lines if line.key != "keep" and line.comment not in _AS_ABOVE} - _SETTLED


def _option(key: str, line: Line, indent: int = 2) -> str:
    given = f"{key}={line.default}" if line.default is not None else f"{key}.<name>="
    return _entry(" " * indent + given, line.comment)


def _entry(name: str, text: str) -> str:
    """Set a text in a column beside its name, or below where the name is long."""
    width = max(shutil.get_terminal_size().columns, 80) - 1
    lines = textwrap.wrap(text, width - _WIDEST) or [""]
    first = f"{name:<{_WIDEST - 1}} {lines[0]}" if len(name) < _WIDEST else f"{name}\n{'':{_WIDEST}}{lines[0]}"
    return "\n".join([first.rstrip(), *(f"{'':{_WIDEST}}{line}" for line in lines[1:])])


def lines_of(path: Path) -> tuple[str, list[Line]]:
    """Read a file of `conf/`: the comment at its head, and its options with theirs."""
    text = path.read_text("utf-8")
    rows = text.splitlines()
    head = itertools.takewhile(lambda row: row.startswith("#"), rows)
    header = " ".join(row.lstrip("# ") for row in head if not row.startswith("# @"))
    return header, list(_lines(yaml.compose(text), text, rows, ""))


def _lines(node: yaml.Node | None, text: str, rows: list[str], prefix: str) -> Iterator[Line]:
    assert isinstance(node, yaml.MappingNode)
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.CollectionNode) and not value.flow_style:
            is_node = isinstance(value, yaml.MappingNode)
            yield Line(name, None if is_node else "", _comment(rows, key.end_mark))
            yield from _lines(value, text, rows, f"{name}.") if is_node else ()
        else:
            default = text[value.start_mark.index : value.end_mark.index]
            yield Line(name, default, _comment(rows, value.end_mark))


def _comment(rows: list[str], mark: yaml.Mark) -> str:
    """Return the comment behind a mark, with the lines below it that are nothing else."""
    _, found, comment = rows[mark.line][mark.column :].partition("#")
    below = itertools.takewhile(lambda row: row.lstrip().startswith("#"), rows[mark.line + 1 :])
    return " ".join([comment.strip(), *(row.lstrip(" #") for row in below)]) if found else ""
