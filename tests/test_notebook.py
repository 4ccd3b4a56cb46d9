"""The notebook runs from top to bottom and shows what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


@pytest.mark.program
@pytest.mark.filterwarnings("ignore")
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient")
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path))
    notebook = read()
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "protection: none (replay_coef 0)" in text
    assert "protection: kl, coefficient 1, reference copy (proven to be the base)" in text
    prevented = re.search(r"prevented .*?(\d+\.\d)%", text)
    assert prevented, text[-3000:]
    assert float(prevented[1]) > 80
    assert any("image/png" in output.get("data", {}) for output in outputs)
