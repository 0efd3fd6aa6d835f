"""Runs side by side: the figures of the table, what is left out, the files; and the script that makes the runs."""

import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny
from matplotlib.figure import Figure
from rich.console import Console

import kjax
from kjax import gin_config, log
from kjax.errors import ConfigError, RunError
from kjax.run import Run

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def made(directory: Path, losses, evaluations=(), speed: float = 100.0, total: int | None = None) -> Path:
    """A run directory as training leaves it; evaluations: (step, loss) pairs."""
    directory.mkdir()
    written = log.RunLog(directory, total or len(losses), tensorboard=False, plots=False)
    evaluations = dict(evaluations)
    for step in range(len(losses) + 1):
        if step:
            # Of the median speed; the first step, which a run compiles for, and the others by far slower and faster.
            seconds = 50 / speed * (1 if step % 2 else (3 if step % 4 else 0.2))
            written.step(step, loss=losses[step - 1], rate=1e-3, grad_norm=1.0, epoch=0.5, elapsed=2.0 * step,
                         times=log.StepTimes(seconds, seconds / 2, 50, 64))
        if step in evaluations:
            written.evaluation(step, loss=evaluations[step], accuracy=0.25, epoch=0.5, elapsed=2.0 * step)
    written.close()
    (directory / "adapter").mkdir()
    safetensors.numpy.save_file({"a": np.zeros((2, 8), np.float32), "b": np.zeros((5, 2), np.float32)},
                                directory / "adapter" / "adapter_model.safetensors")
    return directory


def test_the_figures_of_one_run(tmp_path):
    losses = [4.0 - 0.1 * i for i in range(21)]
    path = made(tmp_path / "one", losses, [(0, 5.0), (10, 1.5), (21, 1.75)])
    (row,) = kjax.compare({"one": path}).rows
    figures = row.figures()
    assert figures.pop("tokens_per_second") == [pytest.approx(100)]
    assert figures.pop("loss") == [pytest.approx(statistics.fmean(losses[-3:]))]  # a tenth of 21, at least
    assert figures == {"trained": [26], "steps": [21], "eval_before": [5.0], "eval_lowest": [1.5], "eval_loss": [1.75]}


def test_repeats_are_a_mean_and_a_deviation(tmp_path):
    paths = [made(tmp_path / str(i), [3.0, loss]) for i, loss in enumerate((1.0, 2.0, 4.5))]
    head, row = kjax.compare({"seeds": paths}).cells()
    assert head == ["", "runs", "trained", "steps", "loss", "tok/s"]
    assert row == ["seeds", "3", "26", "2", f"2.500 ± {statistics.stdev((1, 2, 4.5)):.3f}", row[5]]
    # Of a run whose steps were never evaluated before the first one, that cell alone is empty.
    late = made(tmp_path / "late", [3.0, 2.0], [(2, 1.0)])
    early = made(tmp_path / "early", [3.0, 2.0], [(0, 9.0), (2, 1.0)])
    head, first, second = kjax.compare({"late": late, "early": early}).cells()
    column = head.index("eval before")
    assert "runs" not in head and "lowest" not in head and (first[column], second[column]) == ("", "9.000")


def test_an_evaluation_before_the_first_step_is_no_result(tmp_path):
    path = made(tmp_path / "begun", [3.0, 2.0], [(0, 9.0)], total=8)
    figures = kjax.compare({"begun": path}).rows[0].figures()
    assert (figures["eval_before"], figures["eval_loss"]) == ([9.0], [])
    assert Run.read(path).status == "interrupted" and Run.read(path).total_steps == 8


def test_no_run_to_compare(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        kjax.compare({"nothing": tmp_path})
    for empty in ({}, {"none": []}):
        with pytest.raises(RunError, match="no run to compare"):
            kjax.compare(empty)


def test_names_are_shown_as_they_are(tmp_path):
    name = "a|b [red] <i>"
    shown = kjax.compare({name: made(tmp_path / "x", [2.0, 1.0])})
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(shown)
    assert name in console.export_text()
    assert "a|b [red] &lt;i&gt;</td>" in shown._repr_html_() and "<i>" not in shown._repr_html_()
    assert r"| a\|b [red] <i> |" in shown.markdown() and str(shown) == shown.markdown()


def test_files(tmp_path):
    runs = {"one": made(tmp_path / "one", [2.0, 1.0], [(0, 3.0), (2, 2.0)]),
            "two": [made(tmp_path / name, [2.0, 1.5], [(0, 3.0), (2, 2.5)]) for name in "ab"]}
    shown = kjax.compare(runs)
    paths = shown.write(tmp_path)
    assert [path.name for path in paths] == ["comparison.md", "comparison.json", "comparison.png"]
    assert paths[0].read_text() == shown.markdown() and paths[2].read_bytes().startswith(b"\x89PNG")
    first, second = json.loads(paths[1].read_text())
    assert first["name"] == "one" and first["eval_loss"] == [2.0] and first["runs"] == [str(tmp_path / "one")]
    assert second["loss"] == [1.5, 1.5]
    assert not list(tmp_path.glob(".*partial")), "each file is replaced as a whole"


def test_the_curves_of_the_picture(tmp_path, monkeypatch):
    runs = {"one": made(tmp_path / "one", [2.0, 1.0], [(0, 3.0), (2, 2.0)]),
            "two": [made(tmp_path / f"two {last}", [2.0, 1.5], [(0, 3.0), (2, last)]) for last in (2.5, 3.5)]}
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *to, **how: drawn.append(figure) or save(figure, *to, **how))
    kjax.compare(runs).picture()
    smoothed, evaluation = drawn[0].axes
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["loss, smoothed", "evaluation loss"]
    for axes in drawn[0].axes:
        assert [line.get_label() for line in axes.lines] == ["one", "two"] and len(axes.collections) == 1, "one range"
    np.testing.assert_array_equal(smoothed.lines[0].get_xydata(), [*enumerate(log.smoothed([2.0, 1.0]), start=1)])
    np.testing.assert_array_equal(evaluation.lines[1].get_xydata(), [(0, 3.0), (2, 3.0)])  # the mean of both


@pytest.mark.parametrize("runs", [{"one": [3.0]}, {"no curve": [3.0], "a curve": [3.0, 2.0, 1.0]}])
def test_a_picture_of_whatever_there_is(tmp_path, runs):
    shown = kjax.compare({name: made(tmp_path / name, losses) for name, losses in runs.items()})
    assert shown.picture().startswith(b"\x89PNG")


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import ablation

    return ablation


def test_what_is_varied(ablation, tmp_path):
    gin = tmp_path / "base.gin"
    gin.write_text("SEED = 7\nModel.directory = 'm'\nData.dataset = 'd.json'\nTrain.run_dir = 'runs/x'\n"
                   "Train.seed = %SEED\n")
    axes = [ablation.axis("Lora.rank,Lora.alpha=[(4, 8.0), (16, 4.0)]"),
            ablation.axis("Lora.targets=[('attention',), ('experts', 'q_b_proj')]"), ablation.axis("SEED=[0, 1]")]
    planned = ablation.variants([str(gin)], ["Train.steps=3"], axes)
    found = [(v.config.lora.rank, v.config.lora.alpha, v.config.lora.targets, v.config.train.seed) for v in planned]
    assert found == [(rank, alpha, targets, seed) for rank, alpha in ((4, 8.0), (16, 4.0))
                     for targets in (("attention",), ("experts", "q_b_proj")) for seed in (0, 1)]
    assert all(v.config.train.steps == 3 for v in planned)
    assert planned[3].row == planned[2].row == "rank 4, alpha 8.0, targets experts+q_b_proj"
    assert planned[3].config.train.run_dir == "runs/x/rank_4_alpha_8.0_targets_experts+q_b_proj_SEED_1"
    assert len({v.config.train.run_dir for v in planned}) == 8
    assert {v.row for v in ablation.variants([str(gin)], [], axes[2:])} == {"all"}


@pytest.mark.parametrize("text, said", [
    ("Lora.rank", "no list of values"), ("Lora.rank=8", "no list of values"), ("Lora.rank=[]", "no list of values"),
    ("Lora.rank=[%RANK]", "no list of values"), ("Lora.rank=[1", "no list of values"),
    ("Lora.rank,Lora.alpha=[(1, 2.0), 3]", "3 is not 2 values"), ("Lora.rank=[1, 'two']", "Lora.rank = 'two'"),
    ("Lora.rnak=[1]", "rank"), ("Lora.rank=[1, 1]", "is one given twice"),
])  # fmt: skip
def test_what_cannot_be_varied_is_said_first(ablation, tmp_path, text, said):
    gin = tmp_path / "base.gin"
    gin.write_text("Model.directory = 'm'\nData.dataset = 'd.json'\nTrain.run_dir = 'runs/x'\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        ablation.variants([str(gin)], [], [ablation.axis(text)])


def test_an_ablation_from_end_to_end(ablation, tmp_path, monkeypatch, capsys):
    """Two runs, one that is refused, and all of it again: what is finished is not trained twice."""
    gin = tmp_path / "base.gin"
    gin.write_text(gin_config.text(tiny.settings(tmp_path, "runs", train__steps=2)))
    command = ["ablation.py", "--gin_file", str(gin), "--over", "Lora.rank=[1, 3]", "--over",
               "Lora.targets=[('q_b_proj',), ('no_such_module',)]"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("COLUMNS", "250")
    trained, train = [], kjax.train
    monkeypatch.setattr(kjax, "train", lambda config, **how: trained.append(how) or train(config, **how))
    assert ablation.main() == 1
    output = capsys.readouterr().out
    assert "rank_1_targets_no_such_module failed" in output and len(trained) == 4
    figures = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert [entry["name"] for entry in figures] == ["rank 1, targets q_b_proj", "rank 3, targets q_b_proj"]
    one, three = (entry["trained"][0] for entry in figures)
    assert three == 3 * one
    for entry in figures:
        assert Run.read(entry["runs"][0]).eval_losses[-1:] == entry["eval_loss"] and entry["steps"] == [2]
        assert f"{entry['eval_loss'][0]:.3f}" in output
    trained.clear()
    assert ablation.main() == 1
    assert len(trained) == 2, "those that were refused, and no other"

    # A directory that is a run itself is no home for runs.
    monkeypatch.setattr(sys, "argv", [*command, f"--gin.Train.run_dir={figures[0]['runs'][0]}"])
    with pytest.raises(SystemExit, match="holds a run itself"):
        ablation.main()
