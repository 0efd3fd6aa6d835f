"""The tour runs from top to bottom in a fresh kernel."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "tour.ipynb"


def outputs(cell) -> str:
    """All text that a cell shows."""
    texts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        texts += [output.get("text", ""), *(data[kind] for kind in ("text/plain", "text/html") if kind in data)]
    return "".join(texts)


def test_tour_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_tour_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("KJAX_TOUR_STEPS", "4")
    monkeypatch.setenv("KJAX_TOUR_RUN_DIR", str(tmp_path / "run"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3",
                                     resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()  # raises where a cell does
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs), "the live curve"
    assert "adapter_model.safetensors" in outputs(code[-1])
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert "dolphin" in outputs(code[2]) and "dolphin" in outputs(code[5])
