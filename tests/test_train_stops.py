"""What stops a run, or keeps it from beginning: told in words, and nothing is lost that was saved."""

import os
import re
import shutil
import subprocess
import sys

import jax
import pytest
import tiny
from variant import variant

from kjax import checkpoint, log
from kjax.errors import KjaxError, RunError
from kjax.fit import Fit
from kjax.offload.resident import Resident
from kjax.train import train


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


def test_a_loss_that_is_no_number_stops_the_run(workshop):
    config = tiny.settings(workshop, "nan", train__steps=6, train__save_steps=1, data__val_size=0.0,
                           optimizer__learning_rate=1e38, optimizer__warmup_steps=2, optimizer__schedule="constant")
    with pytest.raises(RunError, match=r"step 3 made a loss of .*The state of step 2 is in .*checkpoints/2"):
        train(config, console=tiny.quiet())
    directory = workshop / "nan"
    assert checkpoint.Checkpoints(directory / "checkpoints", 2).latest()[0] == 2
    assert tiny.saved_steps(directory) == [1, 2]
    assert len(log.read(directory / log.LOG)) == 2


def evaluation(failing, at: int):
    """Fit._define_steps with an evaluation that does something else after `at` steps."""
    original = Fit._define_steps

    def define(self, *args):
        original(self, *args)
        works, self.eval_step = self.eval_step, lambda *args: failing() if self.done == at else works(*args)
        self.eval_step.prepare = works.prepare
    return define


@pytest.mark.parametrize("at, said", [(0, "It is the base, or Model.adapter"), (1, "A lower Optimizer.learning_rate")])
def test_what_gives_no_number_is_not_saved(workshop, monkeypatch, at, said):
    monkeypatch.setattr(Fit, "_define_steps", evaluation(lambda: (float("nan"), 1.0, 0.0), at))
    with pytest.raises(RunError, match=f"after step {at} made a loss of nan.*Nothing has been saved yet. {said}"):
        train(tiny.settings(workshop, f"no number {at}", train__eval_steps=1), console=tiny.quiet())
    assert tiny.saved_steps(workshop / f"no number {at}") == []


def test_a_run_is_saved_before_its_last_evaluation(workshop, monkeypatch):
    """Evaluations fail, give no number, are stopped, then work; the run is the same as one without trouble."""
    changes = {"train__steps": 2}
    whole = train(tiny.settings(workshop, "untroubled", **changes), console=tiny.quiet())
    config = tiny.settings(workshop, "troubled", **changes)

    def out_of_memory():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "_define_steps", evaluation(out_of_memory, 2))
        with pytest.raises(RunError, match="evaluating 1/.* failed.*The state of step 2 is in .*checkpoints/2"):
            train(config, console=tiny.quiet())
    with monkeypatch.context() as patch:
        patch.setattr(Fit, "_define_steps", evaluation(lambda: (float("nan"), 1.0, 0.0), 2))
        with pytest.raises(RunError, match="evaluation after step 2 made a loss of nan.*The state of step 2 is in"):
            train(config, resume=True, console=tiny.quiet())
    with monkeypatch.context() as patch:
        original = Fit._begin
        patch.setattr(Fit, "_begin", lambda self, what: (original(self, what), os.kill(os.getpid(), 15)))
        console = tiny.quiet()
        run = train(config, resume=True, console=console)
    assert run.status == "interrupted" and run.exit_code == 143 and run.eval_at == [0]
    assert re.search("giving up evaluating 1/[0-9]+; again to stop now", console.file.getvalue())
    run = train(config, resume=True, console=tiny.quiet())
    assert (run.losses, run.eval_losses, run.eval_at) == (whole.losses, whole.eval_losses, whole.eval_at)
    assert run.status == "finished" and tiny.adapter_bytes(run) == tiny.adapter_bytes(whole)


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_what_fails_is_told_with_the_step(workshop, monkeypatch, kind):
    def fail(self, *args):
        raise kind("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr("kjax.fit._Compiled.prepare", lambda self, *args: None)
    monkeypatch.setattr("kjax.fit._Compiled.__call__", fail)
    with pytest.raises(RunError, match="step 1/4 failed: RESOURCE_EXHAUSTED.*Train.micro_rows.*Nothing"):
        train(tiny.settings(workshop, kind.__name__, data__val_size=0.0), console=tiny.quiet())


LOST = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import tiny
from kjax.errors import RunError
from kjax.fit import Fit
from kjax.offload.resident import Resident
from kjax.train import train

save = Fit._save

def save_and_lose(self):
    save(self)
    for shard in Path({workshop!r}, "model").glob("*.safetensors"):
        os.truncate(shard, 4096)

Fit._save = save_and_lose
try:
    train(tiny.settings(Path({workshop!r}), "lost", data__val_size=0.0, train__save_steps=2, model__storage="mapped"))
except RunError as error:
    print("RunError", error)
"""


@pytest.mark.parametrize("transport", ["ffi", variant("pure_callback")])
def test_a_lost_file_ends_a_run_by_name_with_its_state_saved(tmp_path, transport):
    done = subprocess.run(
        [sys.executable, "-c", LOST.format(tests=os.path.dirname(__file__), workshop=str(tmp_path))],
        capture_output=True, text=True, timeout=300, env={**os.environ, "KJAX_TRANSPORT": transport},
    )  # fmt: skip
    said = next((line for line in done.stdout.splitlines() if line.startswith("RunError")), done.stdout + done.stderr)
    assert re.search(r"RunError step 3/4 failed: .*\.safetensors: cannot be read at byte .*put the file back.*"
                     r"The state of step 2 is in .*checkpoints/2", said), said


def test_a_disk_too_small_is_found_before_loading(workshop, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(RunError, match="full: the saved states need .* kB, 1.0 kB are free: lower Train.keep"):
        train(tiny.settings(workshop, "full", train__save_steps=1), console=tiny.quiet())
    assert not (workshop / "full").exists()


@pytest.mark.parametrize("wrong", [{"lora__targets": ("nosuch_proj",)}, {"data__max_length": 4},
                                   {"model__directory": "nowhere"}])
def test_a_refused_run_leaves_nothing(workshop, wrong):
    with pytest.raises(KjaxError):
        train(tiny.settings(workshop, "runs/refused", **wrong), console=tiny.quiet())
    assert not (workshop / "runs").exists()


def test_memory_on_another_node_is_told_before_the_steps(workshop, monkeypatch):
    class Misplaced(Resident):
        refused = property(lambda self: "mbind (Operation not permitted)", lambda self, reason: None)

    class Begun(Exception):
        pass

    def run(self, at):
        raise Begun

    monkeypatch.setattr("kjax.offload.store.Resident", Misplaced)
    monkeypatch.setattr(Fit, "run", run)
    console = tiny.quiet()
    with pytest.raises(Begun):
        train(tiny.settings(workshop, "misplaced", model__storage="resident"), console=console)
    assert ("experts may lie on another memory node than the threads that read them: mbind (Operation not permitted)"
            in console.file.getvalue())  # fmt: skip
