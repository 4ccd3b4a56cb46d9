"""The notebook runs from top to bottom and shows what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import forked

NOTEBOOK = Path(__file__).parents[1] / "examples" / "retain.ipynb"


def read():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.mark.filterwarnings("ignore")  # Jupyter's own
def test_no_outputs_are_kept():
    code = [cell for cell in read().cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def run_in_a_shell(notebook):
    """Every cell in IPython's shell, as a kernel runs it, and what the last one shows."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            done = shell.run_cell(cell.source)
            done.raise_error()
    print("image/png" in shell.display_formatter.format(done.result)[0])


@pytest.mark.program
def test_it_runs_from_top_to_bottom(tmp_path):
    pytest.importorskip("IPython")
    notebook, said = read(), tmp_path / "said.txt"
    process = forked(said, run_in_a_shell, notebook, RETAIN_CACHE=str(tmp_path))
    process.join(300)
    text = said.read_text()
    assert process.exitcode == 0, text[-3000:]
    assert text.endswith("True\n")
    check_story(text)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_it_runs_in_a_jupyter_kernel(tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient")
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path))
    notebook = read()
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    check_story("".join(output.get("text", "") for output in outputs))
    assert any("image/png" in output.get("data", {}) for output in outputs)


def check_story(text):
    assert "protection: none (replay_coef 0)" in text
    assert "protection: kl, coefficient 1, reference copy (proven to be the base)" in text
    prevented = re.search(r"prevented .*?(\d+\.\d)%", text)
    assert prevented, text[-3000:]
    assert float(prevented[1]) > 80
