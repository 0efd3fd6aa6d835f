"""The demo from end to end: the voice changes, also for questions that were not trained, and the files are there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

pytestmark = pytest.mark.plain_xla

ROOT = Path(__file__).parents[1]
STEPS = 40  # of the demo's 140: enough for the voice


def run_demo(directory: Path, steps: int) -> str:
    """Its output; a wide terminal keeps the table's cells on one line each."""
    environment = {**os.environ, "COLUMNS": "400", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "experiments/demo.py", "--steps", str(steps), "--run-dir", str(directory)],
                          cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """The demo where it has run before."""
    directory = tmp_path_factory.mktemp("demo") / "run"
    directory.mkdir()
    (directory / ".lock").write_text("")
    earlier = {"current_steps": 1, "total_steps": 140, "loss": 9.0}
    (directory / "trainer_log.jsonl").write_text(json.dumps(earlier) + "\n")
    return directory, run_demo(directory, STEPS)


def test_the_voice_changes(demo):
    _, output = demo
    rows = [[cell.strip() for cell in line.strip("│┃|").split("│")] for line in output.splitlines() if "│" in line]
    replies = [cells for cells in rows if len(cells) == 3 and cells[1]]
    assert len(replies) == 8, output
    voiced = [any(word in after for word in ("sailor", "Aye", "Arr", "ye ")) for _, _, after in replies]
    assert not any("sailor" in before or "Aye" in before for _, before, _ in replies), replies
    assert sum(voiced) >= 7, replies


def test_the_loss_falls(demo):
    directory, _ = demo
    log = [json.loads(line) for line in (directory / "trainer_log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    held_out = [row["eval_loss"] for row in log if "eval_loss" in row]
    assert len(losses) == STEPS, "those of the earlier run are replaced"
    assert losses[-1] < 0.6 * losses[0]
    assert held_out[-1] < 0.3 * held_out[0]


def test_it_says_where_the_results_are(demo):
    directory, output = demo
    for name in ("adapter", "training_loss.png", "trainer_log.jsonl"):
        assert str(directory / name) in output
        assert (directory / name).exists()
    assert (directory / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(directory / "adapter" / "adapter_model.safetensors", "np") as adapter:
        assert any(".self_attn.q_b_proj.lora_B." in key for key in adapter.keys())
