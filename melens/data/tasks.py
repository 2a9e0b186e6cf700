"""The task types that prompts have, from a file of them alone: told before a library is imported that reads tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from melens.data.reading import file_rows
from melens.errors import MelensError

__all__ = ["OWN_PROMPTS", "check_tasks", "tasks_in"]

OWN_PROMPTS = Path(__file__).with_name("prompts.jsonl")
"""The project's prompts."""


def tasks_in(file: Path) -> set[str | None]:
    """Return the task types of a file's prompts; None is that of prompts without one."""
    return {row.word("task") for row in file_rows(file)}


def check_tasks(wanted: Sequence[str], tasks: Iterable[str | None]) -> None:
    """Raise a `MelensError` for a task type that no prompt has, or where none is wanted."""
    known = sorted({task for task in tasks if task is not None})
    unknown = [task for task in wanted if task not in known]
    if unknown or not wanted:
        problem = f"No prompt has the task {unknown[0]!r}" if unknown else "prompts.tasks is empty"
        raise MelensError(f"{problem}; the tasks are {', '.join(known) or 'not given'}.")
