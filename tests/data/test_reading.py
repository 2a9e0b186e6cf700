"""One reader for prompts, texts, benchmarks and training data: each kind of file is read rightly or refused by line."""

import csv
import gzip
import json
import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
from datasets import Dataset

from experiments.options import compose_options
from experiments.options.command_line import prepare_command
from experiments.options.reading import OptionError
from melens import MelensError, load_prompts
from melens.benchmarks.catalog import BENCHMARKS
from melens.benchmarks.data import read_rows
from melens.data.reading import file_rows, file_text, names_file
from melens.data.texts import read_text
from melens.training.data import format_rows, load_training_data

MARK = "\ufeff".encode()
ODD = "a\u2028b\u0085c\fd\ve"  # str.splitlines ends a line at each
A, B = {"text": "one"}, {"text": "two"}
LINES = b'{"text": "one"}\n{"text": "two"}\n'
LIST = json.dumps([A, B]).encode()


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.txt", MARK + b"one\n\ntwo", {"line 1": "one", "line 3": "two"}),
        ("a.txt", MARK + b"one\n" + MARK + b"two\n", {"line 1": "one", "line 2": "two"}),
        ("a.jsonl", MARK + LINES + MARK + LINES, {"line 1": A, "line 2": B, "line 3": A, "line 4": B}),
        ("a.csv", MARK + b"text\none\ntwo\n", {"line 2": A, "line 3": B}),
        ("a.JSONL", LINES, {"line 1": A, "line 2": B}),
        ("a.ndjson", LINES, {"line 1": A, "line 2": B}),
        ("a.json", LIST, {"row 1": A, "row 2": B}),
        ("a.JSON", json.dumps(["one", "two"], indent=2).encode(), {"row 1": "one", "row 2": "two"}),
        ("a.json", LINES, {"line 1": A, "line 2": B}),
        ("a.json", json.dumps(A, indent=2).encode(), {"row 1": A}),
        (
            "a.csv",
            b'text, task\n"NA, ""x""\r\ny",None\n\n"",3\n',
            {"line 2": {"text": 'NA, "x"\ny', "task": "None"}, "line 5": {"text": "", "task": "3"}},
        ),
        ("a.TSV", b"text\ttask\none, two\t\n", {"line 2": {"text": "one, two", "task": ""}}),
        ("a.txt.gz", gzip.compress(b"one\ntwo", mtime=0), {"line 1": "one", "line 2": "two"}),
        ("a.JSONL.GZ", gzip.compress(LINES, mtime=0), {"line 1": A, "line 2": B}),
        ("a.csv.gz", gzip.compress(MARK + b"text\none", mtime=0), {"line 2": A}),
        ("a.jsonl", gzip.compress(LINES, mtime=0), {"line 1": A, "line 2": B}),
        ("a.txt.gz", b"one\ntwo", {"line 1": "one", "line 2": "two"}),
        ("a.txt", "one\nzwei ü".encode("utf-16"), {"line 1": "one", "line 2": "zwei ü"}),
        ("a.jsonl", b"\xfe\xff" + LINES.decode().encode("utf-16-be"), {"line 1": A, "line 2": B}),
        ("a.txt", f"{ODD}\ntwo".encode(), {"line 1": ODD, "line 2": "two"}),
        (
            "a.jsonl",
            '{"text": "a\u2028b\u0085c"}\n{"text": "two"}'.encode(),
            {"line 1": {"text": "a\u2028b\u0085c"}, "line 2": B},
        ),
        ("a.csv", f"text\n{ODD}\ntwo".encode(), {"line 2": {"text": ODD}, "line 3": B}),
        ("a.txt", b"one\r\n\r\ntwo\rthree\n", {"line 1": "one", "line 3": "two", "line 4": "three"}),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n"), {"line 1": A, "line 2": B}),
        ("a.csv", b"text\r\none\r\ntwo\r\n", {"line 2": A, "line 3": B}),
        ("a.jsonl", b'{"text": "\\ud83d\\ude00"}', {"line 1": {"text": "😀"}}),
        ("a.unknown", b"[1] a note\n{x} = {y}\n", {"line 1": "[1] a note", "line 2": "{x} = {y}"}),
    ],
)
def test_rows_are_read_with_their_lines(tmp_path, name, content, rows):
    assert {row.at: row.value for row in file_rows(written(tmp_path, name, content))} == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES + b"\n{'text': 1}", "line 4: this is not a JSON object .*column 2"),
        ("a.jsonl", LINES + b"[1]", r"line 3: this is \[1\]; it must be an object or a text"),
        ("a.jsonl", b'"\\ud800"', r"line 1: \\ud800 is half of a surrogate pair"),
        ("a.jsonl", LINES + b'{"a": [{"\\uDFFF": 1}]}', r"line 3: \\udfff is half of a surrogate pair"),
        ("a.json", b'["a",\n "\\ud800x"]', r"row 2: \\ud800 is half of a surrogate pair"),
        ("a.json", b'[\n{"text": "one"},\n{"text": two}]', "line 3: this is not a JSON object .*column 10"),
        ("a.json", b'[{"text": "one"}, 3]', "row 2: this is 3; it must be an object"),
        ("a.json", b'{"text": "one"}\n{"text": ', "line 2: this is not a JSON object"),
        ("a.json", b"[" * 100_000, "line 1: this is not a JSON object"),
        ("a.txt", b"one\ntwo\0\n", "line 2: a NUL byte"),
        ("a.txt", "one\ntwo".encode("utf-16-le"), "line 1: a NUL byte"),
        ("a.txt", b"one\ntw\xf6\n", "line 2: this is not UTF-8 text"),
        ("a.txt", b"one\n\xed\xa0\x80", "line 2: this is not UTF-8 text"),
        ("a.txt", b"\xff\xfeo\0\n\0\x00\xd8", "line 2: this is not UTF-16 text"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0", "line 1: this is not UTF-8 text"),
        ("a.txt.gz", gzip.compress(gzip.compress(b"one", mtime=0), mtime=0), "line 1: this is not UTF-8 text"),
        ("a.txt.gz", gzip.compress(b"one" * 100, mtime=0)[:-9], "damaged or incomplete"),
        ("a.txt.gz", gzip.compress(b"one", mtime=0)[:-8] + b"\0" * 8, "damaged or incomplete"),
        ("a.txt", LINES, "line 1: this is JSON, not plain text. Rename the file to .jsonl"),
        ("a", json.dumps([A, B], indent=1).encode(), "line 1: this is JSON"),
        ("a.txt.gz", gzip.compress(b'["one", "two"]', mtime=0), "line 1: this is JSON"),
        ("a.csv", b"text,task\none\n", r"line 2: this row has 1 field\(s\), but .* 2 column\(s\): text, task"),
        ("a.csv", b'text\n"a\nb"\none,two\n', r"line 4: this row has 2 field\(s\), but .* 1 column\(s\): text"),
        ("a.csv", b'text\none\n"two\nthree\n', "line 3: this is not CSV"),
        ("a.csv", b"text,text\none,two\n", "line 1: two columns have the name 'text'"),
        *((f"a.{suffix}", b"", "is empty") for suffix in ("txt", "jsonl", "json", "csv")),
        *((f"a.{suffix}", b"\n \r\n", "is empty") for suffix in ("txt", "jsonl", "json", "csv")),
        *((f"a.{suffix}", MARK, "is empty") for suffix in ("txt", "jsonl", "json", "csv")),
        ("a.json", b"[]", "is empty"),
        ("a.csv", b"text\n", "is empty"),
        ("a.txt", b"\xff\xfe", "is empty"),
    ],
)
def test_what_is_no_row_is_refused_with_its_line(tmp_path, name, content, message):
    path = written(tmp_path, name, content)
    with pytest.raises(MelensError, match=message) as error:
        file_rows(path)
    assert str(path) in str(error.value)


@contextmanager
def without_rights():
    """Run as a user who may do nothing, where the tests run as one who may do all."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_files_that_are_none_or_cannot_be_read_are_told(tmp_path):
    path = written(tmp_path, "a.txt", b"one")
    path.chmod(0)
    with pytest.raises(MelensError, match=r"a\.txt cannot be read: Permission denied\."), without_rights():
        file_rows(path)
    with pytest.raises(MelensError, match=r"is a folder\. Give a file in it"):
        file_rows(tmp_path)
    with pytest.raises(MelensError, match=r"There is no file .*nowhere/a\.txt\."):
        file_rows(tmp_path / "nowhere" / "a.txt")
    with pytest.raises(MelensError, match="cannot be read: File name too long"):
        file_rows(tmp_path / ("x" * 300))


def test_plain_text_keeps_its_blank_lines_and_gets_one_kind_of_line_end(tmp_path):
    assert file_text(written(tmp_path, "a.md", MARK + b"one\r\n\r\ntwo\rthree\x0c\n")) == "one\n\ntwo\nthree\f\n"


def test_a_field_may_be_of_any_length_and_the_csv_module_stays_as_it_was(tmp_path):
    before = csv.field_size_limit()
    (row,) = file_rows(written(tmp_path, "a.csv", b"text\n" + b"x" * 200_000))
    assert len(row.text()) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("mine.jsonl", True),
        ("org/mine.JSON", True),
        ("org/mine.csv", True),
        ("org/mine.txt.gz", True),
        ("org/mine.gz", True),
        ("./mine", True),
        ("/data/mine", True),
        ("~/mine", True),
        ("org/there", True),
        ("org/folder", False),
        ("org/name", False),
        ("org/name:config", False),
        ("org/name.v2", False),
        ("gsm8k", False),
        ("x" * 5_000, False),
        ("a\0b", False),
    ],
)
def test_a_files_name_is_told_from_a_datasets(tmp_path, monkeypatch, name, is_one):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "folder").mkdir(parents=True)
    (tmp_path / "org" / "there").touch()
    assert names_file(name) is is_one


# --- The four that read -----------------------------------------------------------------------------------------------


def read_prompts(path):
    return [prompt.text for prompt in load_prompts(path)]


def read_texts(path):
    return read_text(str(path)).split("\n\n")


def read_benchmark(path):
    benchmark = replace(BENCHMARKS["advbench"], file=path.name)
    return [row["prompt"] for row in read_rows(path.parent, benchmark)]


def read_training(path):
    return [row["text"] for row in load_training_data(str(path), "sft").rows]


READERS = {read_prompts: "text", read_texts: "text", read_benchmark: "prompt", read_training: "text"}
KINDS = {
    ".jsonl": lambda texts, column: "\n".join(json.dumps({column: text}) for text in texts),
    ".JSON": lambda texts, column: json.dumps([{column: text} for text in texts], ensure_ascii=False),
    ".csv": lambda texts, column: "\r\n".join([column, *texts]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("read", "column"), READERS.items())
def test_all_read_the_same_whatever_the_files_name(tmp_path, read, column, kind):
    folder = tmp_path / "my data [a=b] {c}, (d) 'e' %s ü 数据"
    folder.mkdir()
    texts = ["one \u2028 1", "zwei ü"]
    path = folder / f"x = [1] é #1{kind}"
    path.write_bytes(MARK + KINDS[kind](texts, column).encode())
    assert read(path) == texts
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_text("utf-8").encode("utf-16")))
    assert read(path.with_name(path.name + ".gz")) == texts


@pytest.mark.parametrize(("read", "column"), READERS.items())
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"COLUMN": "\\ud800"}', r"line 2: \\ud800 is half"),
        ("one", "line 2: this is not a JSON"),
        ("[]", r"line 2: this is \[\]; it must be an object"),
        ("\0", "line 2: a NUL byte"),
    ],
)
def test_all_refuse_alike(tmp_path, read, column, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"COLUMN": "one"}\nLINE\n'.replace("LINE", line).replace("COLUMN", column))
    with pytest.raises(MelensError, match=message):
        read(path)
    with pytest.raises(MelensError, match="is a folder"):
        read(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(MelensError, match="is empty"):
        read(path)


@pytest.mark.parametrize("option", ["prompts.file", "data.text"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a [b=c].jsonl", b'{"text": "one"}\n{"text": 2}', "line 2: 'text' is 2"),
        ("a.csv", b"prompt\none\n", "line 2: there is no column 'text', only prompt"),
        ("a.txt", b"one\0", "line 1: a NUL byte"),
    ],
)
def test_what_a_file_lacks_is_told_with_the_options(tmp_path, option, name, content, message):
    (command,) = prepare_command([f"{option}={written(tmp_path, name, content)}"])
    with pytest.raises(OptionError, match=message):
        compose_options(command)


# --- Training data ----------------------------------------------------------------------------------------------------


def training_rows(folder, method, *rows, **options):
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_training_data(str(folder / "own.jsonl"), method, **options)


def test_a_column_that_the_first_row_lacks_is_kept(tmp_path):
    data = training_rows(
        tmp_path, "sft", {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d", "system": "e"}
    )
    first, second = format_rows(data, "sft", chat=True)
    assert [turn["role"] for turn in first["prompt"]] == ["user"]
    assert second["prompt"][0] == {"role": "system", "content": "e"}


def test_columns_without_a_role_may_hold_anything_and_answers_become_words(tmp_path):
    rows = [{"id": 1, "answer": 3}, {"id": "two", "answer": "#### 4"}, {"id": None, "answer": 2.5}]
    data = training_rows(tmp_path, "grpo", *({"prompt": "a"} | row for row in rows))
    assert list(data.rows) == [{"prompt": "a", "answer": answer} for answer in ("3", "4", "2.5")]


@pytest.mark.parametrize(
    ("method", "row", "message"),
    [
        ("sft", {"prompt": 3, "completion": "b"}, r"own\.jsonl, line 3: 'prompt' is 3; it must be a text or a list"),
        (
            "sft",
            {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
            r"line 3: 'prompt' is \[\{\"role\": .*; its type must be that of the rows before",
        ),
        ("sft", {"prompt": "a"}, "line 3: 'completion' is None; it must be a text"),
        ("sft", {"prompt": "a", "completion": []}, r"line 3: 'completion' is \[\]; it must be a text"),
        ("sft", {"prompt": "a", "completion": "b", "system": 3}, r"line 3: 'system' is 3; it must be a text\."),
        (
            "grpo",
            {"prompt": "a", "answer": None},
            r"own\.jsonl, line 3: 'answer' is None; it must be a text or a number\.",
        ),
    ],
)
def test_a_row_of_another_kind_is_named(tmp_path, method, row, message):
    good = {"prompt": "a", "completion": "b"} if method == "sft" else {"prompt": "a", "answer": "b"}
    with pytest.raises(MelensError, match=message):
        training_rows(tmp_path, method, good, good, row, good)


def test_the_roles_that_a_method_reads_are_looked_at_alone(tmp_path):
    asked, replied = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    data = training_rows(tmp_path, "sft", {"prompt": "a", "messages": [asked, replied], "text": None, "answer": None})
    expected = [{"prompt": [asked], "completion": [replied]}]
    assert list(format_rows(data, "sft", chat=True)) == expected
    data = training_rows(tmp_path, "sft", {"prompt": "a", "chosen": "b", "rejected": None})
    assert list(format_rows(data, "sft", chat=True)) == expected
    for row, message in (
        ({"messages": []}, r"'messages' is \[\]"),
        ({"messages": [{"from": "a"}]}, r"'messages' is \[{'from': 'a'}\]"),
        ({"text": 3}, "'text' is 3"),
    ):
        with pytest.raises(MelensError, match=f"line 1: {message}"):
            training_rows(tmp_path, "sft", row)


def test_a_gap_in_a_dataset_of_the_hub_is_told(monkeypatch):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "answer": ["c", None], "note": [None, None]})
    monkeypatch.setattr("datasets.load_dataset", lambda name, config, split: rows)
    with pytest.raises(MelensError, match="org/name, row 2: 'answer' is None; it must be a text or a number"):
        load_training_data("org/name", "grpo")
    rows = rows.select([0])
    assert list(load_training_data("org/name", "grpo").rows) == [{"prompt": "a", "answer": "c"}]


def test_what_is_given_for_a_file_is_not_left_unused(tmp_path):
    row = {"question": "a", "completion": "b", "prompt": "c"}
    with pytest.raises(MelensError, match="has the columns question, completion, prompt, but not sytsem; sft needs"):
        training_rows(tmp_path, "sft", row, columns={"system": "sytsem"})
    with pytest.raises(MelensError, match=r"training\.data_dir is for the datasets flan, .* Leave it out"):
        training_rows(tmp_path, "sft", row, data_dir=str(tmp_path))
    with pytest.raises(MelensError, match="line 1: this is a text; it must be an object with fields"):
        load_training_data(str(written(tmp_path, "own.txt", b"a line")), "sft")
