"""The quickstart notebook runs from top to bottom, and what is stored with it is what it shows."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from melens.models.loading import embedded_model_folder

PATH = Path(__file__).parent.parent / "experiments" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(PATH, 4)


@pytest.fixture(scope="module")
def executed():
    embedded_model_folder()  # fetched and unpacked here, where other tests wait for it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLOTLY_RENDERER", "plotly_mimetype")  # images would need a browser
        patch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it
        resources = {"metadata": {"path": str(PATH.parent)}}
        return NotebookClient(nbformat.read(PATH, 4), timeout=None, resources=resources).execute()  # raises at an error


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _words(notebook):
    """What every cell prints or ends with, as text; numbers may differ in their digits from machine to machine."""
    outputs = [output for cell in _code(notebook) for output in cell.outputs if output.get("name") != "stderr"]
    texts = [output.get("text") or output.data["text/plain"] for output in outputs]
    return [re.sub(r"\d+(\.\d+)?", "#", text).split() for text in texts]


def _printed(notebook):
    outputs = [output for cell in _code(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def test_the_stored_notebook_was_run_from_top_to_bottom_and_is_small(stored):
    cells = _code(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"] == []
    assert PATH.stat().st_size < 1e6


def test_the_notebook_shows_what_is_stored_with_it(stored, executed):
    assert [cell.source for cell in executed.cells] == [cell.source for cell in stored.cells]
    assert _words(executed) == _words(stored)


def test_the_notebook_finds_the_me_layer_and_a_mask_changes_what_is_written(executed):
    printed = _printed(executed)
    assert re.search(r"^block 11 of 30, × 1[45]\d ", printed, re.M)
    assert "no ME layer among 30 blocks" in printed
    without, masked = re.findall(r"^with(?:out)? the mask: +(Once upon a time.+)$", printed, re.M)
    assert without != masked


def test_the_notebook_shows_three_figures_and_the_claims(executed):
    data = [output.data for cell in _code(executed) for output in cell.outputs if "data" in output]
    assert sum("application/vnd.plotly.v1+json" in each for each in data) == 3
    assert "<td>holds</td>" in data[-1]["text/html"]
