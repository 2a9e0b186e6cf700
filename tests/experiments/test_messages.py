"""What all sentences have in common, read from the source, and that none is printed twice."""

import ast
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.options import compose_options
from experiments.runner import command
from experiments.runner.job import _chosen_prompts
from melens.data.prompts import byte_tokenizer

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("melens", "experiments") for path in (ROOT / package).rglob("*.py"))


def functions_in_texts(source):
    """Names of functions, classes and modules that an f-string of the source would print as `<function ...>`."""
    tree = ast.parse(source)
    defined = (ast.FunctionDef, ast.ClassDef)
    names = {node.name for node in tree.body if isinstance(node, defined)}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name) for alias in node.names if not alias.name.isupper()}
    found = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        own = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        own |= {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        for part in ast.walk(function):
            if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
                found += [part.value.id] if part.value.id in names - own else []
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_sentence_prints_a_function_in_place_of_what_it_returns(path):
    assert functions_in_texts(path.read_text("utf-8")) == []


def test_such_a_sentence_would_be_found():
    source = "from a import folder\ndef tell(path):\n    raise ValueError(f'{folder} or {path}, {folder()}')\n"
    assert functions_in_texts(source) == ["folder"]


def test_a_warning_is_printed_once_in_a_job_whatever_libraries_do_to_filters(monkeypatch, capsys):
    def job():
        for text in ("The gains are alike.", "The gains are alike.", "Another."):
            warnings.simplefilter("default")
            warnings.warn(text, stacklevel=1)

    with warnings.catch_warnings():
        monkeypatch.setattr(command, "main", job)
        for name, value in {"_printed_warnings": set(), "_failures": [], "failed_jobs": []}.items():
            monkeypatch.setattr(command, name, value)
        monkeypatch.setattr(sys, "argv", ["run.py"])
        assert command.run_command() == 0
    assert capsys.readouterr().err == "Warning: The gains are alike.\nWarning: Another.\n"


@pytest.mark.parametrize(
    ("texts", "bos", "said"),
    [
        (["Hi"], "auto", "The prompts have a single first token."),
        (["Hi there", "His house", "Another one"], "auto", "The prompts have 2 different first tokens."),
        (["Hi there", "Another", "One more"], "auto", ""),
        (["Hi there", "His house"], "true", ""),  # every prompt begins with BOS, and no other prompts would not
    ],
)
def test_prompts_with_too_few_first_tokens_for_a_verdict_get_a_warning(tmp_path, caplog, texts, bos, said):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
    planned = SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=64, d_vocab=300))
    (file := tmp_path / "mine.txt").write_text("\n".join(texts))
    chosen = _chosen_prompts(planned, compose_options(f"prompts.file={file}", f"prompts.bos={bos}"))
    assert len(chosen.tokens) == len(texts)
    assert [record.message.startswith(said) for record in caplog.records] == [True] * bool(said)
