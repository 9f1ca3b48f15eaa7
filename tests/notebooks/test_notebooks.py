"""The notebooks run from top to bottom, and are committed with outputs small enough to be shown on the web."""

import re
from pathlib import Path

import nbformat
import pytest

from tests.few_steps import few_steps
from tests.processes import Popen

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_seven():
    assert [p.name[:2] for p in NOTEBOOKS] == [f"{k}_" for k in range(1, 8)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_stored_and_small(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any("image/png" in o.get("data", {}) for o in outputs) or path.stem.startswith("5")
    assert path.stat().st_size < 900_000
    text = path.read_text()
    assert not re.findall(r'"/(?:work|home|tmp)/[^"]*"', text)
    assert "find_spec" in code[0].source  # the first cell installs the package on Colab and Kaggle


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # matrices are small: more threads are slower on shared cores
    monkeypatch.setattr("jupyter_client.launcher.Popen", Popen)
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        cell.source = few_steps(cell.source)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
