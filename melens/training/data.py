"""Training data: a preset of `conf/training/dataset/`, any dataset of the hub, or a file, in the form that TRL takes.

1. `load_training_data` finds which column has which role (prompt, completion, chosen, ...), checks every value, leaves
   out rows that teach nothing, and draws a sample.
2. `format_rows` turns the roles into TRL's forms: conversations for a chat template, or plain text.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from datasets import Dataset

from melens.data.reading import Row, file_rows
from melens.data.texts import hub_dataset
from melens.errors import MelensError
from melens.training.datasets import OWN_FILE, file_of
from melens.training.recipe import known_datasets

__all__ = ["TrainingData", "format_rows", "hash_rows", "load_training_data"]

_NEEDED: dict[str, tuple[set[str], ...]] = {  # the first set whose columns all exist is used
    "sft": ({"prompt", "completion"}, {"messages"}, {"text"}, {"prompt", "chosen"}, {"chosen"}),
    "dpo": ({"prompt", "chosen", "rejected"}, {"chosen", "rejected"}),
    "grpo": ({"prompt", "answer"},),
}
_ROLES = ("system", "prompt", "completion", "answer", "chosen", "rejected", "messages", "text")
_log = logging.getLogger(__name__)
_TURN = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True, eq=False)  # so that a cache can go by its identity
class TrainingData:
    """The rows of a training, under the names of their roles.

    Attributes:
        name: of the dataset.
        rows: with columns among `system`, `prompt`, `completion`, `answer`, `chosen`, `rejected`, `messages`, `text`.
        are_dialogues: whether `chosen` and `rejected` are whole dialogues, as in HH-RLHF: "\\n\\nHuman: …
            \\n\\nAssistant: …".
    """

    name: str
    rows: Dataset
    are_dialogues: bool = False


def load_training_data(
    name: str,
    method: str,
    *,
    data_dir: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
) -> TrainingData:
    """Load the rows that a method needs.

    Args:
        name: of `conf/training/dataset/`, a file with columns (`melens.data.reading`), a hub id, `org/name` or
            `org/name:subset`, or `sums`, which are made here.
        method: `sft`, `dpo` or `grpo`.
        data_dir: the folder of a preset's file; None fetches it from the hub.
        columns: which column has which role, over those of a preset.
        split: of a hub dataset.
        limit: number of rows, drawn at random by `seed`; None for all.

    Raises:
        MelensError: the name is unknown, the file, the dataset or a column does not exist, or a row is malformed or has
            values of another type than the rows before.
    """
    if name == "sums":
        return TrainingData(name, _sums(limit or 10_000, seed, method))
    preset = known_datasets().get(name, {})
    source = _source(name, method, data_dir, split)
    if isinstance(source, Dataset):
        names, of_preset = source.column_names, preset.get("columns", {})
    else:
        names = list(dict.fromkeys(column for row in source for column in row.fields))
        of_preset = preset.get("file_columns") or preset.get("columns", {})
    named = {**{role: role for role in _ROLES if role in names}, **of_preset, **(columns or {})}
    if preset and not columns:
        named = of_preset
    there = _columns_of_roles(names, named, columns or {}, method, name)
    rows = _checked(source, there, name) if isinstance(source, Dataset) else _dataset(source, there)
    chosen = rows[0].get(there.get("chosen", ""))
    are_dialogues = "prompt" not in there and isinstance(chosen, str) and _TURN.search(chosen) is not None
    if are_dialogues:
        compared = [there[role] for role in (("chosen", "rejected") if method == "dpo" else ("chosen",))]
        rows = _kept(rows, lambda row: _is_pair([row[column] for column in compared]), name, "no last turn to learn")
    if limit is not None and limit < len(rows):
        rows = rows.shuffle(seed=seed).select(range(limit))

    def in_roles(row: Mapping[str, Any]) -> dict[str, Any]:
        return {role: _answer(row[column]) if role == "answer" else row[column] for role, column in there.items()}

    return TrainingData(name, rows.map(in_roles, remove_columns=rows.column_names), are_dialogues)


def _sums(n_rows: int, seed: int, method: str) -> Dataset:
    """Make sums that a model of any size can learn, each with a right and a wrong answer."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n_rows):
        left, right = draw.randrange(100), draw.randrange(100)
        answer, wrong = str(left + right), str(left + right + draw.randrange(1, 10))
        row = {"prompt": f"{left} + {right} =", "completion": answer, "answer": answer}
        rows.append(row | {"chosen": answer, "rejected": wrong})
    return Dataset.from_list(rows).select_columns([role for role in _ROLES if role in _NEEDED[method][0]])


def _source(name: str, method: str, data_dir: str | None, split: str) -> Dataset | list[Row]:
    """Read a dataset from its file or the hub."""
    if (path := file_of(name, method, data_dir)) is not None:
        return file_rows(path)
    if (preset := known_datasets().get(name)) is None:
        return hub_dataset(name, split, f"give {OWN_FILE}")
    folder = f"set training.data_dir to a folder with {preset['file']}"
    return hub_dataset(f"{preset['hub']}:{preset.get('subset', '')}", split, f"give {OWN_FILE}, or {folder}")


def _dataset(rows: Sequence[Row], roles: Mapping[str, str]) -> Dataset:
    """Make a dataset of the columns that have a role; `Dataset.from_list` drops those that the first row lacks."""
    table = {column: [row.fields.get(column) for row in rows] for column in roles.values()}
    for role, column in roles.items():
        for row, value in zip(rows, table[column], strict=True):
            _check_value(value, role, row.place)
    if "answer" in roles:  # numbers and words alike are compared as text
        table[roles["answer"]] = [str(answer) for answer in table[roles["answer"]]]
    try:
        return Dataset.from_dict(table)
    except Exception:  # pyarrow's, where a column has values of several types
        column, values = next(of for of in table.items() if not _are_of_one_kind(of[1]))
        odd = bisect.bisect(range(len(values)), False, key=lambda row: not _are_of_one_kind(values[: row + 1]))
        place, found = rows[odd].place, json.dumps(values[odd])[:80]
        raise MelensError(f"{place}: {column!r} is {found}; its type must be that of the rows before.") from None


def _are_of_one_kind(values: list[Any]) -> bool:
    try:
        Dataset.from_dict({"column": values})
    except Exception:  # as above
        return False
    return True


def _checked(rows: Dataset, roles: Mapping[str, str], name: str) -> Dataset:
    """Return the rows of a hub dataset; its columns have types, so without gaps the first value stands for all."""
    if not len(rows):
        raise MelensError(f"The dataset {name} is empty.")
    for role, column in roles.items():
        for number, value in enumerate(rows[column] if rows.data.column(column).null_count else rows[column][:1], 1):
            _check_value(value, role, f"{name}, row {number}")
    return rows


def _check_value(value: Any, role: str, place: str) -> None:
    """Raise a `MelensError` for a value that its role cannot have."""
    if role == "answer":
        is_right = isinstance(value, str | int | float) and not isinstance(value, bool)
        allowed = "a text or a number"
    elif role in ("text", "system"):
        is_right, allowed = isinstance(value, str) or (role == "system" and value is None), "a text"
    else:
        is_right = (isinstance(value, str) and role != "messages") or (bool(value) and _is_conversation(value))
        allowed = "a list of messages" if role == "messages" else "a text or a list of messages"
    if not is_right:
        raise MelensError(f"{place}: {role!r} is {value!r:.80}; it must be {allowed}.")


def _columns_of_roles(
    names: Sequence[str], named: Mapping[str, str], given: Mapping[str, str], method: str, name: str
) -> dict[str, str]:
    unknown = [role for role in named if role not in _ROLES]
    if unknown:
        raise MelensError(f"training.columns names the role {unknown[0]!r}; allowed are {', '.join(_ROLES)}.")
    missing = [column for column in given.values() if column not in names]
    there = {role: column for role, column in named.items() if column in names}
    needed = next((roles for roles in _NEEDED[method] if roles <= set(there)), None)
    if missing or needed is None:
        ways = " or ".join(" and ".join(sorted(roles)) for roles in _NEEDED[method])
        without = f", but not {missing[0]}" if missing else ""
        raise MelensError(
            f"{name} has the columns {', '.join(names)}{without}; {method} needs {ways}. Name them with "
            "training.columns={prompt: question, ...}."
        )
    return {role: column for role, column in there.items() if role in needed or role == "system"}


_NUMBER = re.compile(r"[-+$]*\d{1,3}(,\d{3})+(\.\d+)?%?")


def _answer(value: Any) -> str:
    """Return the answer alone, without the worked solution that may stand before it; a number without its commas."""
    answer = str(value).rpartition("####")[2].strip()
    return answer.replace(",", "") if _NUMBER.fullmatch(answer) else answer


def _kept(rows: Dataset, is_wanted: Callable[[Any], bool], name: str, why_not: str) -> Dataset:
    """Leave out rows that nothing can be learnt from, and log how many."""
    kept = rows.filter(is_wanted)
    if len(kept) < len(rows):
        _log.warning("%s: %d of %d rows have %s and are left out.", name, len(rows) - len(kept), len(rows), why_not)
    return kept


def _is_pair(dialogues: list[Any]) -> bool:
    """Return whether dialogues end with a reply to the same turns."""
    if not all(isinstance(dialogue, str) and _last_turn(dialogue)[1].strip() for dialogue in dialogues):
        return False
    return len({_before_last_turn(dialogue) for dialogue in dialogues}) == 1


def format_rows(data: TrainingData, method: str, *, chat: bool) -> Dataset:
    """Put rows into TRL's forms: a prompt and what follows it, as conversations or as plain text.

    Args:
        data: as `load_training_data` returns it.
        method: `sft`, `dpo` or `grpo`.
        chat: messages for the tokenizer's chat template, else text.
    """

    def formatted(row: Mapping[str, Any]) -> dict[str, Any]:
        if data.are_dialogues:
            prompt: Any = _conversation(_last_turn(row["chosen"])[0]) if chat else _before_last_turn(row["chosen"])
            replies: dict[str, Any] = {role: _last_turn(row[role])[1] for role in ("chosen", "rejected") if role in row}
        else:
            prompt, replies = _prompt_and_replies(row, data.name)
            if not _is_conversation(prompt):
                messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
                messages.append({"role": "user", "content": prompt})
                prompt = messages if chat else "\n".join(message["content"] for message in messages) + "\n"
        if _is_conversation(prompt) and not chat:
            raise MelensError(f"{data.name} holds conversations, but training.chat is false. Set training.chat=true.")
        if method == "grpo":
            return {"prompt": prompt, "answer": row["answer"]}
        if method == "sft":  # a preferred reply is learnt as any other
            replies = {"completion": replies.get("completion", replies.get("chosen"))}
        for role, reply in replies.items():
            if isinstance(reply, str):
                text = f" {reply}" if data.are_dialogues and not chat else reply
                replies[role] = [{"role": "assistant", "content": text}] if chat else text
        return {"prompt": prompt, **replies}

    rows = data.rows
    if method == "sft" and "text" in rows.column_names and not {"completion", "messages"} & set(rows.column_names):
        return rows.select_columns(["text"])
    return _kept(rows.map(formatted, remove_columns=rows.column_names), _is_answered, data.name, "an empty reply")


def _is_conversation(value: Any) -> bool:
    """Return whether a value has TRL's conversational form, a list of messages."""
    is_list = isinstance(value, list)
    return is_list and all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in value)


def _prompt_and_replies(row: Mapping[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """Return the prompt and the replies of a row; without a prompt, from its conversations."""
    replies = {role: row[role] for role in ("completion", "chosen", "rejected") if role in row}
    if "prompt" in row:
        return row["prompt"], replies
    whole = row.get("messages") if "messages" in row else row.get("chosen")
    if not (_is_conversation(whole) and whole):
        raise MelensError(
            f"{name}: rows without a prompt need messages, or chosen (and rejected) as whole conversations."
        )
    if "messages" in row:
        replies["completion"] = whole
    return whole[:-1], {role: turns[-1:] if _is_conversation(turns) else turns for role, turns in replies.items()}


def hash_rows(rows: Dataset) -> str:
    """Hash the content of rows, in their order."""
    digest = hashlib.sha256()
    if rows.column_names == ["input_ids"]:  # token ids: hundreds of millions
        for batch in rows.with_format("numpy").iter(10_000):
            digest.update(np.ascontiguousarray(batch["input_ids"], dtype=np.int32).tobytes())
        return digest.hexdigest()[:16]
    for batch in rows.iter(1_000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _is_answered(row: Mapping[str, Any]) -> bool:
    """Return whether a row has a reply to learn: some dialogues end with the human's turn."""
    texts = [row[key] for key in ("completion", "chosen", "rejected") if key in row]
    return all((text if isinstance(text, str) else (text[-1]["content"] or "")).strip() for text in texts)


def _last_turn(dialogue: str) -> tuple[list[tuple[str, str]], str]:
    """Split a dialogue into the assistant's last turn and the turns before it."""
    parts = _TURN.split(dialogue)[1:]
    turns = list(zip(parts[::2], parts[1::2], strict=True))
    if not turns or turns[-1][0] != "Assistant":
        return turns, ""
    return turns[:-1], turns[-1][1]


def _before_last_turn(dialogue: str) -> str:
    turns, _ = _last_turn(dialogue)
    return "".join(f"\n\n{who}: {text}" for who, text in turns) + "\n\nAssistant:"


def _conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Return messages; consecutive turns of one speaker become one, because chat templates alternate the roles."""
    role = {"Human": "user", "Assistant": "assistant"}
    by_speaker = groupby(turns, key=lambda turn: turn[0])
    return [{"role": role[who], "content": "\n\n".join(text for _, text in said)} for who, said in by_speaker]
