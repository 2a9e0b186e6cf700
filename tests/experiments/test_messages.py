"""What all sentences have in common, read from the source."""

import ast
from pathlib import Path

import pytest

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
