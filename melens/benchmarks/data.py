"""Local benchmark data: JSONL files in three simple forms, turned into the rows that the harness's tasks expect.

`read_rows` reads and checks a file; `harness_row` renames its fields for the harness's definition of the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from melens.benchmarks.catalog import Benchmark, Form
from melens.data.reading import Row, file_rows
from melens.errors import MelensError

__all__ = ["harness_row", "read_rows"]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_choices(value: Any) -> bool:
    return isinstance(value, list) and 2 <= len(value) <= 10 and all(isinstance(choice, str) for choice in value)


_FIELDS: dict[Form, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "choices": {
        "question": (_is_text, "a text"),
        "choices": (_are_choices, "a list of 2 to 10 texts"),
        "answer": (lambda value: isinstance(value, int) and not isinstance(value, bool), "the index of a choice"),
    },
    "answer": {"question": (_is_text, "a text"), "answer": (_is_text, "a text")},
    "prompts": {"prompt": (_is_text, "a text")},
}


def read_rows(folder: Path, benchmark: Benchmark) -> list[dict[str, Any]]:
    """Read a benchmark's file from a folder.

    Raises:
        MelensError: only the hub has this benchmark, the file does not exist, or a line has a wrong field.
    """
    if benchmark.file is None:
        raise MelensError(
            f"The data of {benchmark.name} is on the hub only. Leave {benchmark.name} or benchmark.data_dir out."
        )
    return [_checked(read, benchmark) for read in file_rows(folder / benchmark.file)]


def _checked(read: Row, benchmark: Benchmark) -> dict[str, Any]:
    row, place = read.fields, read.place
    for name, (is_right, allowed) in _FIELDS[benchmark.form].items():
        if name not in row or not is_right(row[name]):
            found = repr(row[name]) if name in row else "missing"
            raise MelensError(f"{place}: the field {name!r} is {found[:80]}; it must be {allowed}.")
    if benchmark.form == "choices" and not 0 <= row["answer"] < len(row["choices"]):
        raise MelensError(f"{place}: the answer is {row['answer']}, but there are {len(row['choices'])} choices.")
    if benchmark.name == "xstest" and row.get("label") not in ("safe", "unsafe"):
        raise MelensError(f"{place}: the field 'label' is {row.get('label', 'missing')!r}; it must be safe or unsafe.")
    return row


def harness_row(row: dict[str, Any], benchmark: Benchmark) -> dict[str, Any]:
    """Rename a row's fields as the harness's definition of the benchmark names them."""
    if benchmark.form == "prompts":
        return {"prompt": row["prompt"], "label": row.get("label", "")}
    question, answer = row["question"], row["answer"]
    if benchmark.form == "choices":
        names = {"piqa": "goal", "openbookqa": "question_stem", "mathqa": "Problem"}
        own = {names[benchmark.name]: question} if benchmark.name in names else {}
        return {"question": question, "choices": row["choices"], "answer": answer, **own}
    return {
        "gsm8k": {"question": question, "answer": f"#### {answer}"},
        "hendrycks_math500": {"problem": question, "solution": f"\\boxed{{{answer}}}", "answer": answer},
        "aime": {"Question": question, "Answer": answer},
    }[benchmark.name]
