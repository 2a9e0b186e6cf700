"""Read a user's files: one reader for prompts, texts, benchmarks and training data.

1. Bytes: a gzip file is recognised by its first bytes, whatever its name, and decompressed.
2. Text: UTF-8, or UTF-16 with a byte order mark. Marks are removed. `\\n`, `\\r\\n` and `\\r` end a line; a form feed,
   U+0085 or U+2028 does not.
3. Rows, by the name's suffix: `.jsonl` and `.ndjson` have a row in each line, `.json` a list of rows, `.csv` and `.tsv`
   a line of column names and a row in each record. Any other file is plain text with a row in each line, and is
   refused if it holds JSON.

A file that cannot be read raises a `MelensError` that names the file and the line.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melens.errors import MelensError

__all__ = ["Row", "check_source", "file_rows", "file_text", "has_columns", "lone_surrogate", "names_file"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_WITH_COLUMNS = (".jsonl", ".ndjson", ".json", *_DELIMITERS)
_MARKS = re.compile("^\ufeff+", re.MULTILINE)  # files joined by `cat` have marks inside


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file.

    Attributes:
        value: a text, or fields by column.
        file: that it is from.
        at: its place in the file: `line 3`, or `row 3` of a JSON list, counted from 1.
    """

    value: str | dict[str, Any]
    file: Path
    at: str

    @property
    def place(self) -> str:
        """The row's file and line, for messages."""
        return f"{self.file}, {self.at}"

    @property
    def fields(self) -> dict[str, Any]:
        """The row's fields by column; a `MelensError` if it is a text without columns."""
        if isinstance(self.value, str):
            raise MelensError(f"{self.place}: this is a text; it must be an object with fields.")
        return self.value

    def text(self, column: str = "text") -> str:
        """Return the row itself if it is a text, else the text in a column; a `MelensError` if there is none."""
        if isinstance(self.value, str):
            return self.value
        if column not in self.value:
            raise MelensError(f"{self.place}: there is no column {column!r}, only {', '.join(self.value) or 'none'}.")
        found = self.value[column]
        if not isinstance(found, str):
            raise MelensError(f"{self.place}: {column!r} is {json.dumps(found)[:80]}; it must be a text.")
        return found

    def word(self, column: str) -> str | None:
        """Return the word or number in a column as text; None if it is missing, null, NaN or empty."""
        found = None if isinstance(self.value, str) else self.value.get(column)
        if not isinstance(found, str | int | float | None):
            raise MelensError(f"{self.place}: {column!r} is {json.dumps(found)[:80]}; it must be a word or a number.")
        return None if found in (None, "") or found != found else str(found)


def names_file(name: str) -> bool:
    """Return whether a name is a file's, existing or not, rather than a hub dataset's (`org/name`)."""
    path = Path(os.path.expanduser(name))
    is_known = _suffix(path) in (*_WITH_COLUMNS, ".txt", ".md") or path.suffix.lower() == ".gz"
    return name.startswith((".", "/", "~")) or path.is_absolute() or is_known or os.path.isfile(path)


def check_source(option: str, source: str) -> bool:
    """Return whether a source of texts is a file rather than a dataset of the hub, `org/name`.

    Raises:
        MelensError: it is neither; `option` names it in the sentence.
    """
    if not (is_file := names_file(source)) and source.count("/") != 1:
        raise MelensError(f"{option} is {source!r}; it must be an existing file or a dataset of the hub (org/name).")
    return is_file


def has_columns(path: Path) -> bool:
    """Return whether a file's rows have columns, by its suffix."""
    return _suffix(path) in _WITH_COLUMNS


def file_rows(path: Path) -> list[Row]:
    """Read a file's rows; the rows of plain text are its lines that are not blank.

    Raises:
        MelensError: the file is missing, unreadable, binary or empty, has JSON under another suffix, or has a malformed
            line.
    """
    suffix = _suffix(path)
    if suffix not in _WITH_COLUMNS:
        lines = enumerate(_plain_text(path).split("\n"), 1)
        return [Row(line, path, f"line {number}") for number, line in lines if line.strip()]
    content = _decoded(path)
    if suffix in _DELIMITERS:
        rows = _csv_rows(content, path, _DELIMITERS[suffix])
    elif suffix == ".json" and not _is_object(content.lstrip().partition("\n")[0]):  # or it has JSON lines
        whole = _parsed(content, path, 1) if content.strip() else []
        values = whole if isinstance(whole, list) else [whole]
        rows = [_json_row(value, path, f"row {number}") for number, value in enumerate(values, 1)]
    else:
        lines = enumerate(content.split("\n"), 1)
        rows = [_json_row(_parsed(line, path, n), path, f"line {n}") for n, line in lines if line.strip()]
    if not rows:
        raise MelensError(f"The file {path} is empty.")
    return rows


def file_text(path: Path, column: str = "text") -> str:
    """Read a file as one text, with `\\n` at the end of each line.

    Args:
        path: plain text, or a file with rows, which are joined by blank lines.
        column: of the rows, if they have columns.

    Raises:
        MelensError: as `file_rows`, or a row has no text in the column.
    """
    if _suffix(path) not in _WITH_COLUMNS:
        return _plain_text(path)
    return "\n\n".join(row.text(column) for row in file_rows(path))


def _plain_text(path: Path) -> str:
    content = _decoded(path)
    if not content.strip():
        raise MelensError(f"The file {path} is empty.")
    if _is_json(content):
        raise MelensError(
            f"{path}, line 1: this is JSON, not plain text. Rename the file to .jsonl, or to .json if it holds a list."
        )
    return content


def lone_surrogate(value: Any) -> str | None:
    """Return the first lone half of a surrogate pair in a text or a JSON value; None if there is none.

    Python's strings and JSON can hold one, but tokenizers and tables cannot.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        return ascii(error.object[error.start]).strip("'")
    return None


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


# --- From bytes to text -----------------------------------------------------------------------------------------------


def _decoded(path: Path) -> str:
    data = _bytes(path)
    is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "UTF-16" if is_utf_16 else "UTF-8"
    try:
        text = _with_plain_line_ends(data.decode(encoding))
    except UnicodeDecodeError as error:
        line = _last_line(data[: error.start].decode(encoding, "ignore"))
        raise MelensError(f"{path}, line {line}: this is not {encoding} text. Save the file as UTF-8 text.") from None
    if "\0" in text:
        line = _last_line(text[: text.index("\0")])
        raise MelensError(f"{path}, line {line}: a NUL byte is not text. Save the file as UTF-8 text.")
    return _MARKS.sub("", text)


def _bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise MelensError(f"{path} is a folder. Give a file in it.")
        data = path.read_bytes()
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except FileNotFoundError:
        raise MelensError(f"There is no file {path}.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise MelensError(f"The gzip file {path} is damaged or incomplete ({error}). Copy it again.") from None
    except OSError as error:
        raise MelensError(f"The file {path} cannot be read: {error.strerror}.") from error


def _with_plain_line_ends(text: str) -> str:
    return io.StringIO(text, newline=None).read()  # str.splitlines splits at eight more characters


def _last_line(text: str) -> int:
    return _with_plain_line_ends(text).count("\n") + 1


# --- JSON -------------------------------------------------------------------------------------------------------------


def _parsed(text: str, path: Path, line: int) -> Any:
    """Parse JSON that begins at a line of a file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = str(error)
        if isinstance(error, json.JSONDecodeError):
            line, why = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
        raise MelensError(f"{path}, line {line}: this is not a JSON object ({why}).") from None


def _json_row(value: Any, path: Path, at: str) -> Row:
    if not isinstance(value, str | dict):
        raise MelensError(f"{path}, {at}: this is {json.dumps(value)[:80]}; it must be an object or a text.")
    if (half := lone_surrogate(value)) is not None:
        raise MelensError(f"{path}, {at}: {half} is half of a surrogate pair, which is not a character. Remove it.")
    return Row(value, path, at)


def _is_json(content: str) -> bool:
    """Return whether plain text is JSON: an object in every line, one object, or a list of objects or texts."""
    if not content.lstrip().startswith(("{", "[")):
        return False
    if all(_is_object(line) for line in content.split("\n") if line.strip()):
        return True
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(whole, dict) or (bool(whole) and all(isinstance(value, dict | str) for value in whole))


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


# --- CSV --------------------------------------------------------------------------------------------------------------


def _csv_rows(content: str, path: Path, delimiter: str) -> list[Row]:
    """Read records, with the column names in the first line. (pandas would turn the texts `NA` and `None` into NaN.)"""
    header: list[str] = []
    rows = []
    begin = 1
    reader = csv.reader(io.StringIO(content), delimiter=delimiter, strict=True)
    with _fields_of_any_length(len(content)):
        try:
            for cells in reader:
                if not header:
                    header = _named_once(cells, f"{path}, line {begin}")
                elif len(cells) not in (0, len(header)):
                    expected = f"but the header has {len(header)} column(s): {', '.join(header)}"
                    raise MelensError(f"{path}, line {begin}: this row has {len(cells)} field(s), {expected}.")
                elif cells:
                    rows.append(Row(dict(zip(header, cells, strict=True)), path, f"line {begin}"))
                begin = reader.line_num + 1
        except csv.Error as error:
            raise MelensError(f"{path}, line {begin}: this is not CSV ({error}).") from None
    return rows


def _named_once(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise MelensError(f"{place}: two columns have the name {twice[0]!r}. Rename one of them.")
    return names


@contextmanager
def _fields_of_any_length(longest: int) -> Iterator[None]:
    """Raise the csv module's limit of 131,072 characters in a field, which holds for the whole process, for a while."""
    before = csv.field_size_limit(longest)
    try:
        yield
    finally:
        csv.field_size_limit(before)
