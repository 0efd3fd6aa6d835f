"""The record of a run: the keys of trainer_log.jsonl, going on after a resume, TensorBoard, plots, the screen."""

import io
import json

import pytest
from rich.console import Console

from kjax import log, progress

KEYS = {"current_steps", "total_steps", "loss", "lr", "epoch", "percentage", "elapsed_time", "remaining_time",
        "throughput", "total_tokens"}  # fmt: skip
TIMES = log.StepTimes(seconds=2.0, host_seconds=0.5, tokens=300, slots=400)


def record(run_log, steps, start=1):
    for number in range(start, start + steps):
        run_log.step(number, loss=3.0 / number, rate=1e-4, grad_norm=1.0, epoch=number / 4,
                     elapsed=2.0 * (number - start + 1), times=TIMES)


def test_entries_have_the_keys_and_figures(tmp_path):
    run_log = log.RunLog(tmp_path, 8, tensorboard=False, plots=False)
    record(run_log, 2)
    run_log.evaluation(2, loss=1.25, accuracy=0.25, epoch=0.5, elapsed=5.0)
    first, second, evaluation = map(json.loads, (tmp_path / log.LOG).read_text().splitlines())
    assert first.keys() >= KEYS
    assert evaluation["eval_loss"] == 1.25 and evaluation["eval_accuracy"] == 0.25
    assert "loss" not in evaluation and evaluation.keys() >= KEYS - {"loss", "lr"}
    assert second["total_tokens"] == 600 and second["percentage"] == 25.0
    # 4 s for 2 steps: 6 steps take 12 s more; 600 tokens in 4 s.
    assert second["elapsed_time"] == "0:00:04" and second["remaining_time"] == "0:00:12"
    assert second["throughput"] == 150.0
    run_log.close()


def test_a_resumed_log_goes_on_from_the_saved_step(tmp_path):
    first = log.RunLog(tmp_path, 8, tensorboard=False, plots=False)
    record(first, 5)
    first.close()
    with open(tmp_path / log.LOG, "a") as file:
        file.write('{"current_steps": 6, "lo')  # what a crash leaves
    second = log.RunLog(tmp_path, 8, start_step=3, tensorboard=False, plots=False)
    assert [at for at, _ in second.losses] == [1, 2, 3]
    record(second, 2, start=4)
    second.close()
    entries = log.read(tmp_path / log.LOG)
    assert [entry["current_steps"] for entry in entries] == [1, 2, 3, 4, 5]
    assert entries[-1]["total_tokens"] == 1500 and entries[-1]["elapsed_time"] == "0:00:10"


def test_a_loss_that_is_no_number_is_never_written(tmp_path):
    run_log = log.RunLog(tmp_path, 2, tensorboard=False, plots=False)
    with pytest.raises(ValueError):
        run_log.step(1, loss=float("nan"), rate=0.0, grad_norm=0.0, epoch=0.0, elapsed=1.0, times=TIMES)
    run_log.close()
    assert (tmp_path / log.LOG).read_text() == ""


def test_tensorboard_holds_the_scalars(tmp_path):
    run_log = log.RunLog(tmp_path, 4, plots=False)
    run_log.text("config", "Lora.rank = 8")
    record(run_log, 3)
    run_log.evaluation(3, loss=0.5, accuracy=0.25, epoch=1.0, elapsed=1.0)
    run_log.close()
    (events,) = (tmp_path / "tb").iterdir()
    content = events.read_bytes()
    for tag in (b"train/loss", b"eval/loss", b"train/learning_rate", b"speed/tokens_per_second", b"config/text_summ"):
        assert tag in content
    assert content.count(b"train/loss") == 3


def test_plots_are_png_files_and_hold_both_curves(tmp_path):
    run_log = log.RunLog(tmp_path, 4, tensorboard=False)
    record(run_log, 4)
    run_log.refresh_plots()
    assert (tmp_path / log.TRAIN_PLOT).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / log.EVAL_PLOT).exists()
    before = (tmp_path / log.TRAIN_PLOT).read_bytes()
    run_log.evaluation(4, loss=0.5, accuracy=0.25, epoch=1.0, elapsed=1.0)
    record(run_log, 3, start=5)
    run_log.refresh_plots()
    run_log.close()
    assert (tmp_path / log.EVAL_PLOT).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / log.TRAIN_PLOT).read_bytes() != before
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*.partial"))


def test_the_smoothed_curve_follows_the_raw_one():
    assert log.smoothed([]) == [] and log.smoothed([2.0]) == [2.0]
    assert log.smoothed([1.0] * 5) == [1.0] * 5
    noisy = [5.0 - 0.01 * i + (-1) ** i for i in range(200)]
    smooth = log.smoothed(noisy)
    assert max(abs(b - a) for a, b in zip(smooth, smooth[1:], strict=False)) < 0.5
    assert abs(smooth[-1] - 3.0) < 0.5


def test_step_times():
    assert TIMES.tokens_per_second == 150.0 and TIMES.padded == 0.25 and TIMES.host_share == 0.25


def test_without_a_terminal_there_is_one_line_a_step():
    out = io.StringIO()
    with progress.StepProgress(Console(file=out, width=80), 3, 0) as bar:
        for number in (1, 2, 3):
            bar.begin(f"step {number}/3")
            bar.step(number, 2.0, 1e-4, TIMES)
        assert bar.expected() is not None
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and "\x1b" not in out.getvalue()
    assert "step 2/3" in lines[1] and "remaining 0:00:02" in lines[1] and "150 tok/s" in lines[1]
    assert "padding 25%" in lines[1] and "host 25% / device 75%" in lines[1]


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # whatever the tests themselves run in
    out = io.StringIO()
    with progress.StepProgress(Console(file=out, width=120, force_terminal=True), 3, 1) as bar:
        bar.begin("step 2/3")
        bar.step(2, 2.0, 1e-4, TIMES)
        bar.say("a [message] with brackets")
    assert "150 tok/s" in out.getvalue() and "a [message] with brackets" in out.getvalue()
    assert "\x1b" in out.getvalue()


def test_before_the_first_step_no_time_is_promised():
    bar = progress.StepProgress(Console(file=io.StringIO()), 3, 0)
    bar.begin("step 1/3")
    assert bar.expected() is None


def test_in_a_notebook_one_line_is_updated_in_place(capsys):
    pytest.importorskip("IPython")
    shown = []
    with progress.StepProgress(Console(force_jupyter=True, width=80), 3, 0) as bar:
        bar._handle.update = lambda line: shown.append(line.data)
        bar.step(1, 2.0, 1e-4, TIMES)
        bar.step(2, 1.5, 1e-4, TIMES)
    assert len(shown) == 2 and "step 2/3" in shown[1] and shown[1].startswith("<pre>")
