"""The directory of a run: held by one process, never overwritten unasked, nothing of others removed."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys

import pytest
from test_checkpoint import IDENTITY, make_state, write_adapter

from kjax.errors import RunError
from kjax.run_directory import RunDirectory


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
    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
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
