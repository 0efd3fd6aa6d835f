"""Saved states and the run directory: whole or absent, checked file by file, locked, never overwritten unasked."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kjax import checkpoint, config, step
from kjax.errors import RunError
from kjax.identity import Identity, differences
from kjax.lora import Adapter, LoraSpec
from kjax.optimizer import optimizer
from kjax.run_directory import RunDirectory

CONFIG = config.Config(model=config.Model(directory="base"), data=config.Data(dataset="rows.jsonl"),
                       train=config.Train(run_dir="run"))
SPEC = LoraSpec((("moe_layers/self_attn/q_proj", Adapter(2, 4.0)),))
IDENTITY = Identity.of(CONFIG, "b" * 64, "d" * 64, SPEC)


def make_state(number=3, seed=0, rank=2):
    key = jax.random.key(seed)
    adapter = {"lora_A": jax.random.normal(key, (2, rank, 5)), "lora_B": jnp.ones((2, 5, rank))}
    tree = {"moe_layers": {"q_proj": adapter}}
    state = step.initial_state(tree, optimizer(CONFIG.optimizer, 10))
    return state._replace(step=jnp.int32(number))


def write_adapter(directory):
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(b"weights")


@pytest.fixture
def checkpoints(tmp_path):
    return checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2)


def save(checkpoints, number, seed=0):
    return checkpoints.save(number, make_state(number, seed), write_adapter, IDENTITY)


def test_restores_the_same_bits_and_structure(checkpoints):
    save(checkpoints, 3, seed=7)
    number, manifest = checkpoints.latest()
    like = make_state(0, seed=1)
    restored = checkpoints.restore(number, like)
    assert jax.tree.structure(restored) == jax.tree.structure(like) and number == 3
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(make_state(3, seed=7)), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert manifest["base"] == "b" * 64 and manifest["versions"]["jax"] == jax.__version__
    assert "adapter/adapter_model.safetensors" in manifest["files"]


def test_keeps_the_newest(checkpoints):
    for number in (1, 2, 10, 9 + 2):
        save(checkpoints, number)
    assert checkpoints.steps() == [10, 11]
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["10", "11"]


def files_of(checkpoints, number):
    return sorted(path for path in checkpoints.path(number).rglob("*") if path.is_file())


def test_a_flipped_bit_in_any_file_is_found_and_named(checkpoints):
    save(checkpoints, 1)
    save(checkpoints, 2)
    for path in files_of(checkpoints, 2):
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        path.write_bytes(bad)
        with pytest.raises(RunError) as caught:
            checkpoints.latest()
        assert str(path) in str(caught.value)
        assert "the state of step 1 is valid: remove" in str(caught.value)
        path.write_bytes(good)
    assert checkpoints.latest()[0] == 2


def test_missing_and_cut_files_are_named(checkpoints):
    save(checkpoints, 4)
    state = max((checkpoints.path(4) / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    good = state.read_bytes()
    state.write_bytes(good[:-1])
    with pytest.raises(RunError, match=f"{state.name}: has {len(good) - 1} bytes.*start over with --overwrite"):
        checkpoints.latest()
    state.unlink()
    with pytest.raises(RunError, match=f"{state.name}: missing"):
        checkpoints.latest()


def test_a_manifest_cannot_name_files_elsewhere(checkpoints):
    save(checkpoints, 4)
    path = checkpoints.path(4) / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["files"]["../../secret"] = {"size": 1, "sha256": ""}
    path.write_text(json.dumps({**manifest, "sha256": checkpoint.digest(manifest)}))
    with pytest.raises(RunError, match="outside"):
        checkpoints.latest()


def test_a_save_cut_short_is_not_a_state(checkpoints):
    save(checkpoints, 1)
    save(checkpoints, 2)
    (checkpoints.directory / ".3.partial" / "state").mkdir(parents=True)
    (checkpoints.path(2) / checkpoint.MANIFEST).unlink()  # a removal cut short
    assert checkpoints.steps() == [1] and checkpoints.latest()[0] == 1
    assert [path.name for path in checkpoints.unfinished()] == [".3.partial", "2"]
    save(checkpoints, 5)
    assert checkpoints.unfinished() == [] and checkpoints.steps() == [1, 5]


def test_a_state_of_another_shape_does_not_fit(checkpoints):
    save(checkpoints, 1)
    with pytest.raises(RunError, match="does not fit this run's adapter"):
        checkpoints.restore(1, make_state(rank=3))


def test_a_failing_adapter_leaves_the_state_before(checkpoints):
    save(checkpoints, 1)

    def fail(directory):
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left.*step 1 before it is intact") as caught:
        checkpoints.save(2, make_state(2), fail, IDENTITY)
    assert str(checkpoints.directory) in str(caught.value)
    assert checkpoints.latest()[0] == 1 and checkpoints.unfinished() == []


PROGRAM = """
    import os, resource, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import test_checkpoint as t
    from kjax import checkpoint, adapters
    checkpoints = checkpoint.Checkpoints(Path({directory!r}), keep=2)
    t.save(checkpoints, 1)
"""


def run_program(tmp_path, body):
    program = textwrap.dedent(PROGRAM).format(tests=os.path.dirname(__file__), directory=str(tmp_path / "checkpoints"))
    return subprocess.run([sys.executable, "-c", program + textwrap.dedent(body)], capture_output=True, text=True,
                          timeout=120)


def test_a_full_disk_is_an_error_that_names_the_directory(tmp_path, checkpoints):
    done = run_program(tmp_path, """
        state = t.make_state(2, rank=5000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            checkpoints.save(2, state, t.write_adapter, t.IDENTITY)
        except t.RunError as error:
            print("RunError:", error)
    """)
    assert "RunError:" in done.stdout, done.stderr
    assert str(checkpoints.directory) in done.stdout and "File too large" in done.stdout
    assert checkpoints.latest()[0] == 1 and checkpoints.unfinished() == []


@pytest.mark.parametrize("moment", ["_write_manifest", "_sync", "write_adapter"])
def test_a_kill_during_a_save_leaves_the_state_before(tmp_path, checkpoints, moment):
    done = run_program(tmp_path, f"""
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(t if {moment!r} == "write_adapter" else checkpoint, {moment!r}, die)
        t.save(checkpoints, 2)
    """)
    assert done.returncode == -9, done.stderr
    assert checkpoints.latest()[0] == 1
    assert [path.name for path in checkpoints.unfinished()] == [".2.partial"]
    save(checkpoints, 2)
    assert checkpoints.latest()[0] == 2 and checkpoints.unfinished() == []


def test_differences_are_listed_and_weighed(checkpoints):
    save(checkpoints, 1)
    manifest = checkpoints.latest()[1]
    assert differences(manifest, IDENTITY) == ([], [])
    changed = dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, run_dir="elsewhere", save_steps=5, seed=1),
        lora=dataclasses.replace(CONFIG.lora, targets=("shared",)))
    said, binding = differences(manifest, Identity.of(changed, "b" * 64, "e" * 64, SPEC))
    assert said == ["lora.targets: ['attention'] -> ['shared']", "train.save_steps: None -> 5", "train.seed: 0 -> 1",
                    "the dataset's tokens: dddddddddddd -> eeeeeeeeeeee (SHA-256)"]
    assert binding == [said[0], said[2], said[3]]


def test_a_scale_that_the_settings_do_not_tell_is_binding(checkpoints):
    """Of an adapter that a run goes on from, which may be replaced meanwhile."""
    save(checkpoints, 1)
    manifest = checkpoints.latest()[1]
    other = LoraSpec(((SPEC.paths[0], Adapter(2, 8.0)),))
    said, binding = differences(manifest, Identity.of(CONFIG, "b" * 64, "d" * 64, other))
    assert said == binding == ["the scale of the adapter of moe_layers/self_attn/q_proj: 2.0 -> 4.0"]
    del manifest["adapter"]  # of a state that was saved before they were recorded
    assert differences(manifest, Identity.of(CONFIG, "b" * 64, "d" * 64, other)) == ([], [])


def open_directory(path, resume=False, overwrite=False):
    return RunDirectory(path, keep=2, resume=resume, overwrite=overwrite)


def finished_run(path):
    with open_directory(path) as directory:
        directory.write("config.gin", "")
        directory.checkpoints.save(1, make_state(1), write_adapter, IDENTITY)
        write_adapter(directory.adapter)
        (path / "tb").mkdir()
        (path / "tb" / "events.out.tfevents.1.host").write_text("")
        (path / ".adapter.partial").mkdir()
    return path


def test_a_run_directory_is_not_taken_twice(tmp_path):
    with open_directory(tmp_path / "run"):
        with pytest.raises(RunError, match=f"in use by process {os.getpid()} on"):
            open_directory(tmp_path / "run").__enter__()
    with open_directory(tmp_path / "run"):
        pass


def test_a_lock_held_by_another_process(tmp_path):
    program = (f"from kjax.run_directory import RunDirectory; import sys\n"
               f"with RunDirectory({str(tmp_path / 'run')!r}, keep=1, resume=False, overwrite=False):\n"
               f"    print('held', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=f"in use by process {holder.pid} on"):
            open_directory(tmp_path / "run").__enter__()
        holder.kill()
    with open_directory(tmp_path / "run"):
        pass  # a lock dies with its process


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "runs" / "first", tmp_path / "empty"):
        with pytest.raises(KeyError):
            with open_directory(path):
                assert (path / ".lock").exists()
                raise KeyError
    assert [child.name for child in tmp_path.rglob("*")] == ["empty"]


def test_what_was_there_before_a_refused_run_stays(tmp_path):
    """Another run's lock, a file of the user, the lock of an earlier run."""
    with open_directory(tmp_path / "runs" / "first"):
        with pytest.raises(RunError, match="in use"):
            open_directory(tmp_path / "runs" / "first").__enter__()
        assert (tmp_path / "runs" / "first" / ".lock").exists()
        with open_directory(tmp_path / "runs" / "second"):
            pass
        assert sorted(child.name for child in (tmp_path / "runs").iterdir()) == ["first"]
    (tmp_path / "mine").mkdir()
    for name in ("notes.txt", ".lock"):
        (tmp_path / "mine" / name).write_text("")
        with open_directory(tmp_path / "mine"):
            pass
        assert name in os.listdir(tmp_path / "mine")
    assert sorted(os.listdir(tmp_path)) == ["mine"]


def test_a_file_that_cannot_be_written_leaves_no_part(tmp_path, monkeypatch):
    def full(path, text, encoding):
        path.write_bytes(text[:2].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(OSError), open_directory(tmp_path / "full") as directory:
        directory.write("config.gin", "text")
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunError, match="cannot be locked .No locks available.*has no locks; choose a run_dir on"):
        open_directory(tmp_path / "run").__enter__()
    assert not list(tmp_path.iterdir())


def test_a_lock_removed_while_it_is_opened_locks_nothing(tmp_path, monkeypatch):
    """The holder of a lock gives it up, and removes it, between another's opening and locking it."""
    holder = open_directory(tmp_path / "run").__enter__()
    flock = fcntl.flock

    def give_up_first(*args):
        holder.__exit__()
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", give_up_first)
    with pytest.raises(RunError, match="in use by another process"):
        open_directory(tmp_path / "run").__enter__()


def test_a_run_is_never_overwritten_unasked(tmp_path):
    path = finished_run(tmp_path / "run")
    with pytest.raises(RunError, match="already holds a run .saved up to step 1.*--resume.*--overwrite"):
        open_directory(path).__enter__()
    with open_directory(path, resume=True) as directory:
        directory.clear()
        assert directory.checkpoints.latest()[0] == 1
    with pytest.raises(RunError, match="exclude each other"):
        open_directory(path, resume=True, overwrite=True)


def test_a_run_without_a_saved_state_can_only_be_replaced(tmp_path):
    with open_directory(tmp_path) as directory:
        directory.write("config.gin", "")
    with pytest.raises(RunError, match="without a saved state.: replace it with --overwrite") as caught:
        open_directory(tmp_path).__enter__()
    assert "--resume" not in str(caught.value)
    with pytest.raises(RunError, match="no saved state to resume from; start over with --overwrite"):
        open_directory(tmp_path, resume=True).__enter__()
    with open_directory(tmp_path, overwrite=True):
        pass


def test_the_space_needed_is_that_of_the_saves_to_come(tmp_path, monkeypatch):
    def allowed(directory, free, saves):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
        try:
            directory.require_space(1000, saves)
        except RunError as error:
            assert ("Train.keep" in str(error)) == (saves > 1)
            return False
        return True

    with open_directory(tmp_path / "new") as directory:
        for saves, needed in ((1, 1250), (2, 2500), (3, 3250), (9, 3250)):  # keep is 2
            assert allowed(directory, needed, saves) and not allowed(directory, needed - 1, saves)
    path = finished_run(tmp_path / "run")
    with open_directory(path, resume=True) as directory:
        # One state and the adapter are there: a second and a third state, before the first goes.
        assert allowed(directory, 0, 0) and allowed(directory, 2000, 9) and not allowed(directory, 1999, 9)
        assert allowed(directory, 1250, 1) and not allowed(directory, 1249, 1)
    (path / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 1250)
    with open_directory(path, overwrite=True) as directory:
        assert allowed(directory, 0, 1), "what is replaced makes room"


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    path = finished_run(tmp_path / "run")
    (path / "notes.txt").write_text("mine")
    with open_directory(path, overwrite=True) as directory:
        assert directory.checkpoints.steps() == [1], "nothing goes before the run is ready to start"
        directory.clear()
    assert sorted(child.name for child in path.iterdir()) == [".lock", "notes.txt"]


@pytest.mark.parametrize("foreign", ["checkpoints/notes.txt", "checkpoints/1/notes.txt", "checkpoints/best/x",
                                     "adapter/mine.bin", "tb/notes", "checkpoints/1/state/d/x"])
def test_overwrite_refuses_what_a_run_did_not_write(tmp_path, foreign):
    path = finished_run(tmp_path / "run")
    (path / foreign).parent.mkdir(exist_ok=True)
    (path / foreign).write_text("mine")
    with pytest.raises(RunError, match="removes only what a run wrote") as caught:
        open_directory(path, overwrite=True).__enter__()
    assert foreign in str(caught.value)
    assert (path / foreign).read_text() == "mine" and (path / "checkpoints/1/manifest.json").exists()


def test_overwrite_follows_no_link(tmp_path):
    path = finished_run(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    (path / "checkpoints").rename(elsewhere)
    (path / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(RunError, match="checkpoints"):
        open_directory(path, overwrite=True).__enter__()
    assert (elsewhere / "1" / "manifest.json").exists()


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_files_of_another_program_are_no_run(tmp_path, flags):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("mine")
    with pytest.raises(RunError, match="holds adapter, which no run of kjax wrote"):
        open_directory(tmp_path, **flags).__enter__()
    assert sorted(child.name for child in tmp_path.iterdir()) == ["adapter"]


def test_a_directory_that_cannot_be_written_or_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        open_directory(tmp_path / "file").__enter__()
    with pytest.raises(RunError, match="not writable"):
        open_directory("/proc/kjax-run").__enter__()  # refused to every user
    with pytest.raises(RunError, match="not writable"):
        open_directory(tmp_path / "file" / "run").__enter__()


def test_resume_needs_a_state(tmp_path):
    with pytest.raises(RunError, match="no saved state"):
        open_directory(tmp_path / "run", resume=True).__enter__()
