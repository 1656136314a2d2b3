"""The notebooks: each runs, offline and with small numbers, and is committed with its outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALL = {
    "quickstart": {"OFFLINE": True, "STEPS": 2, "PROBLEMS": 4},
    "what_an_update_does": {"OFFLINE": True, "PROMPTS": 4},
    "choose_a_method": {"LEARNING_RATES": (1e-3,), "STEPS": 4, "SEEDS": (1,), "TUNING_SEEDS": (101,), "PROBLEMS": 4},
}


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


LONG = [NOTEBOOKS[0].with_name("choose_a_method.ipynb")]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path in LONG else path for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_runs_offline(path, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    notebook = read(path)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for name, value in SMALL[path.stem].items():
        parameters.source, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", parameters.source)
        assert count == 1, f"{path.name} has no parameter {name}"
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()  # raises what a cell raises
    assert shown(notebook) >= shown(read(path)) - {"application/vnd.jupyter.widget-view+json"}


def shown(notebook):
    """Kinds of output: pictures, tables, text."""
    return {
        kind
        for cell in code_cells(notebook)
        for output in cell.outputs
        for kind in output.get("data", {"text/plain": ""})
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_as_it_ran(path):
    notebook = read(path)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    assert "image/png" in shown(notebook)
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not re.search(r"/(work|tmp|home|root|Users|content)/", path.read_text()), "a path of the machine it ran on"


def test_there_are_three():
    assert {path.stem for path in NOTEBOOKS} == set(SMALL)
