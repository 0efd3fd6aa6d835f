"""A whole run on a tiny model: what it writes, that it learns, and resumes bit for bit.

Compiling a step takes seconds even for a tiny model, so few tests train, and each of them shows several things.
"""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from variant import variant

from kjax import adapters, checkpoint, gin_config, log
from kjax.errors import DataError, RunError
from kjax.fit import Fit, saves_to_come
from kjax.progress import StepProgress
from kjax.train import train

pytestmark = pytest.mark.plain_xla

# Two epochs of five steps, with dropout, saved and evaluated on the way.
LONG = {"train__steps": 10, "train__save_steps": 5, "train__eval_steps": 4, "lora__dropout": 0.1,
        "lora__targets": ("attention", "shared")}  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def finished(workshop):
    """An uninterrupted run: (settings, Run, its output, compilations)."""
    compiled = []
    original = jax.stages.Lowered.compile

    def counted(self, *args, **kwargs):
        compiled.append(1)
        return original(self, *args, **kwargs)

    config = tiny.settings(workshop, "finished", train__tensorboard=True, train__plot=True, **LONG)
    console = tiny.quiet()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", counted)
        run = train(config, console=console)
    return config, run, console.file.getvalue(), len(compiled)


@pytest.fixture
def copied(finished, workshop, request):
    """A copy of the finished run's directory, and settings for it."""
    shutil.copytree(finished[1].directory, workshop / request.node.name)
    return workshop / request.node.name, lambda **changes: tiny.settings(
        workshop, request.node.name, **LONG | {"train__eval_steps": 4} | changes)


def test_it_learns_and_says_what_it_does(finished):
    config, run, output, compiled = finished
    assert run.status == "finished" and run.exit_code == 0 and run.step == run.total_steps == 10
    assert len(run.losses) == 10 and np.mean(run.losses[-2:]) < 0.8 * run.losses[0]
    assert run.eval_at == [0, 4, 8, 10] and run.eval_losses[-1] < 0.8 * run.eval_losses[0]
    for text in ("deepseek_v3", "1 dense + 2 MoE layers", "8 experts, 3 per token", "threads", "20 rows", "attention",
                 "shared", "4 rows of up to 64 tokens", "10 (2.", str(run.directory), "evaluation loss after 0 steps"):
        assert text in output
    assert output.index("Trainable parameters") < output.index("step 1/10  loss")
    assert "step 10/10  loss" in output and "tok/s" in output and "padding" in output and "device" in output
    assert "finished, 10 of 10" in str(run) and "data:image/png" in run._repr_html_()
    assert compiled == 2, "the step and the evaluation, each once"


def test_the_run_directory_holds_what_is_promised(finished):
    config, run, _, _ = finished
    names = {path.name for path in run.directory.iterdir()}
    assert names == {"config.gin", "operative_config.gin", "env.json", log.LOG, log.TRAIN_PLOT, log.EVAL_PLOT, "tb",
                     "checkpoints", "adapter", ".lock"}
    assert tiny.saved_steps(run.directory) == [5, 10]
    assert tiny.adapter_bytes(run) == (run.directory / "checkpoints/10/adapter" / adapters.WEIGHTS).read_bytes()
    assert run.plot.read_bytes().startswith(b"\x89PNG")
    assert gin_config.load([run.directory / "config.gin"]) == config
    assert gin_config.load([run.directory / "operative_config.gin"]) == config
    assert "versions" in json.loads((run.directory / "env.json").read_text())
    entries = log.read(run.directory / log.LOG)
    assert [entry["loss"] for entry in entries if "loss" in entry] == run.losses
    assert all(entry["throughput"] > 0 and entry["host_seconds"] > 0 for entry in entries if "loss" in entry)
    assert entries[-1]["total_tokens"] > 10 * 64


def test_the_adapter_gives_the_losses_it_was_saved_with(finished, workshop, monkeypatch):
    """A run that goes on from it starts at the evaluation loss of the run before."""
    config, whole, _, _ = finished
    monkeypatch.setattr(Fit, "_step", lambda self: setattr(self, "done", self.done + 1))
    monkeypatch.setattr(Fit, "_save", lambda self: None)
    console = tiny.quiet()
    run = train(tiny.settings(workshop, "more", train__steps=1, model__adapter=str(whole.adapter)), console=console)
    assert run.eval_losses[0] == whole.eval_losses[-1] and "goes on from" in console.file.getvalue()


def test_a_resumed_run_equals_an_uninterrupted_one(finished, workshop, monkeypatch):
    config, whole, _, _ = finished
    again = tiny.settings(workshop, "again", **LONG)
    original = StepProgress.step

    def step_then_signal(self, step, *rest):
        original(self, step, *rest)
        if step == 6:
            os.kill(os.getpid(), 15)

    console = tiny.quiet()
    with monkeypatch.context() as patch:
        patch.setattr(StepProgress, "step", step_then_signal)
        part = train(again, console=console)
    assert part.status == "interrupted" and part.exit_code == 143 and part.step == 6
    assert part.losses == whole.losses[:6]
    assert "stopping after step 6, then saving; again to stop now" in console.file.getvalue()
    assert tiny.saved_steps(part.directory) == [5, 6]

    # As if it had been killed while it saved step 6: what the log says about step 6 is of a lost part.
    (part.directory / "checkpoints/6").rename(part.directory / "checkpoints/.6.partial")
    (part.directory / "checkpoints/.6.partial" / checkpoint.MANIFEST).unlink()
    console = tiny.quiet()
    with monkeypatch.context() as patch:  # a state beside the restored one might not fit into memory
        patch.setattr("kjax.lora.init", lambda *_: {}["an adapter"])
        run = train(again, resume=True, console=console)
    assert run.losses == whole.losses and run.eval_losses == whole.eval_losses and run.eval_at == whole.eval_at
    assert tiny.adapter_bytes(run) == tiny.adapter_bytes(whole)
    assert "a save that was cut short, not used" in console.file.getvalue()
    assert "differs" not in console.file.getvalue()
    assert tiny.saved_steps(run.directory) == [5, 10]


def test_resuming_a_finished_run_changes_nothing(finished):
    config, whole, _, _ = finished
    saved = whole.directory / "checkpoints"
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    run = train(config, resume=True, console=tiny.quiet())
    assert run.status == "finished" and run.losses == whole.losses and run.eval_losses == whole.eval_losses
    assert before == {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lost", ["missing", "older"])
def test_a_resumed_run_brings_its_adapter_up_to_the_state(copied, lost):
    """As after a kill between the saved state and the adapter beside it."""
    directory, settings = copied
    newest, saved = directory / "adapter", directory / "checkpoints"
    shutil.rmtree(newest)
    if lost == "older":
        shutil.copytree(saved / "5/adapter", newest)
    console = tiny.quiet()
    run = train(settings(), resume=True, console=console)
    assert tiny.adapter_bytes(run) == (saved / "10/adapter" / adapters.WEIGHTS).read_bytes()
    assert {path.name for path in newest.iterdir()} == {path.name for path in (saved / "10/adapter").iterdir()}
    assert f"{newest}: written again from the state of step 10" in console.file.getvalue()


@pytest.mark.parametrize("every, done, total, saves",
                         [(None, 0, 9, 1), (None, 9, 9, 0), (5, 0, 10, 2), (5, 0, 11, 3), (5, 6, 10, 1), (5, 5, 10, 1),
                          (5, 10, 10, 0), (20, 0, 10, 1), (1, 3, 10, 7)])
def test_saves_to_come(every, done, total, saves):
    assert saves_to_come(every, done, total) == saves


def test_resume_lists_what_differs(copied):
    _, settings = copied
    console = tiny.quiet()
    run = train(settings(optimizer__learning_rate=1e-3, train__eval_steps=None), resume=True, console=console)
    assert run.status == "finished"
    assert "optimizer.learning_rate: 0.03 -> 0.001" in console.file.getvalue()
    assert "train.eval_steps: 4 -> None" in console.file.getvalue()


def test_resume_refuses_another_meaning_unless_told(copied, workshop):
    _, settings = copied
    tiny.model(workshop / "other", seed=1)
    for change, message in (({"lora__alpha": 8.0}, "lora.alpha: 4.0 -> 8.0"),
                            ({"train__seed": 3}, "train.seed: 0 -> 3"),
                            ({"data__limit": 12}, "the dataset's tokens"),
                            ({"model__directory": str(workshop / "other")}, "the base model")):
        with pytest.raises(RunError, match="is not the one that was saved") as caught:
            train(settings(**change), resume=True, console=tiny.quiet())
        assert message in str(caught.value)
    assert train(settings(data__limit=12), resume="changed", console=tiny.quiet()).status == "finished"
    with pytest.raises(RunError, match="does not fit this run's adapter"):
        train(settings(lora__rank=3), resume="changed", console=tiny.quiet())


def test_a_damaged_state_is_named_and_an_older_one_offered(copied):
    directory, settings = copied
    victim = max((directory / "checkpoints/10/state/d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 8
    victim.write_bytes(content)
    with pytest.raises(RunError, match="the state of step 5 is valid: remove") as caught:
        train(settings(), resume=True, console=tiny.quiet())
    assert str(victim) in str(caught.value)


def test_overwrite_starts_over_once_everything_is_checked(copied, workshop, monkeypatch):
    directory, settings = copied
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="already holds a run"):
        train(settings(), console=tiny.quiet())
    with pytest.raises(DataError):
        train(settings(data__dataset=str(workshop / "none.jsonl")), overwrite=True, console=tiny.quiet())
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["kjax.train"], "load_params", lambda *_: {}["a weight"])
        with pytest.raises(KeyError, match="a weight"):
            train(settings(), overwrite=True, console=tiny.quiet())
    with pytest.raises(RunError, match="Model.adapter = .* lies in Train.run_dir, which --overwrite replaces"):
        train(settings(model__adapter=str(directory / "adapter")), overwrite=True, console=tiny.quiet())
    assert tiny.saved_steps(directory) == [5, 10]
    monkeypatch.setattr(Fit, "_steps", lambda self: None)
    run = train(settings(train__plot=False), overwrite=True, console=tiny.quiet())
    assert run.losses == [] and tiny.saved_steps(directory) == []
    assert sorted(path.name for path in directory.iterdir()) == [".lock", "config.gin", "env.json", "notes.txt",
                                                                 "operative_config.gin", log.LOG]


# One step holds every example, whatever the layout of the rows, so that each run sees the same batches; the second
# loss shows that the gradients are the same.
WHOLE = {"train__steps": 2, "train__rows_per_step": 20, "data__val_size": 4.0}


def two_losses(workshop, name, **changes):
    run = train(tiny.settings(workshop, name, **WHOLE | changes), console=tiny.quiet())
    return [*run.losses, run.eval_losses[-1]]


@pytest.fixture(scope="module")
def reference(workshop):
    return two_losses(workshop, "reference")


@pytest.mark.parametrize("changes", [
    {"model__transport": "pure_callback"}, variant({"model__experts": "device"}),
    {"data__rows": "plain", "train__micro_rows": 5, "train__loss_chunk": 50},
    variant({"data__rows": "grouped"}),
], ids=lambda changes: "_".join(map(str, changes.values())))  # fmt: skip
def test_other_ways_give_the_same_losses(workshop, reference, changes, request):
    np.testing.assert_allclose(two_losses(workshop, request.node.name, **changes), reference, rtol=1e-5)


def test_the_bits_do_not_depend_on_the_number_of_cores(workshop):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core only")
    tiny.settings(workshop)
    program = """
import os, sys
os.sched_setaffinity(0, {cores})
sys.path.insert(0, {tests!r})
from pathlib import Path
import tiny
from kjax.offload.resident import Resident
from kjax.train import train
changes = dict(train__steps=3, model__dtype="bfloat16", data__val_size=0.0)
train(tiny.settings(Path({workshop!r}), {name!r}, **changes))
print("pool of", os.environ["NPROC"])
"""
    environment = {key: value for key, value in os.environ.items() if key not in ("NPROC", "KJAX_THREADS")}
    results = {}
    for name, used in (("one_core", cores[:1]), ("two_cores", cores[:2])):
        text = program.format(cores=set(used), tests=os.path.dirname(__file__), workshop=str(workshop), name=name)
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300,
                              env=environment)
        assert done.returncode == 0, done.stderr
        # Other threads for the experts, the same pool for the rest: XLA splits some sums by the size of its pool.
        assert f"{len(used)} thread" in done.stdout and "pool of 16" in done.stdout
        results[name] = (workshop / name / "adapter" / adapters.WEIGHTS).read_bytes()
    assert results["one_core"] == results["two_cores"]
