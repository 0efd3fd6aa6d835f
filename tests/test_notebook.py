"""The notebooks run from top to bottom in a fresh kernel."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def outputs(cell) -> str:
    """All text that a cell shows."""
    texts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        texts += [output.get("text", ""), *(data[kind] for kind in ("text/plain", "text/html") if kind in data)]
    return "".join(texts)


def executed(name: str) -> list:
    """The code cells of a notebook with what they show; raises where a cell does."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shows_picture(cells) -> bool:
    return any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_tour_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("KJAX_TOUR_STEPS", "4")
    monkeypatch.setenv("KJAX_TOUR_RUN_DIR", str(tmp_path / "run"))
    code = executed("tour")
    assert shows_picture(code), "the live curve"
    assert "adapter_model.safetensors" in outputs(code[-1])
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert "dolphin" in outputs(code[2]) and "dolphin" in outputs(code[5])


def test_anatomy_runs():
    code = executed("anatomy")
    texts = "".join(map(outputs, code))
    assert shows_picture(code) and "custom_vjp_call" in texts
    assert "same bits: True" in texts and "{'forward': 1, 'backward': 1, 'recomputed': 1}" in texts
    distances = [float(line.split()[-1]) for line in texts.splitlines() if "relative distance" in line]
    assert len(distances) > 4 and max(distances) < 0.01, "each within a few roundings of bf16, 2^-9 each"


def test_ablation_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("KJAX_ABLATION_STEPS", "1")
    monkeypatch.setenv("KJAX_ABLATION_DIR", str(tmp_path))
    code = executed("ablation")
    texts = "".join(map(outputs, code))
    assert "221,184 numbers trained" in texts and "img alt='loss curves'" in texts
    assert all(f"<td>{name}</td>" in texts for name in ("the base", "attention", "routed experts"))
    assert len(list((tmp_path / "replies").glob("*/generated_predictions.jsonl"))) == 4
