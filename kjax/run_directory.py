"""The directory of a run, locked while it is in use and never overwritten unasked."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from kjax import adapters, log, lora
from kjax.checkpoint import ADAPTER, MANIFEST, STATE, Checkpoints
from kjax.errors import RunError

LOCK = ".lock"
CONFIG, OPERATIVE, ENV = "config.gin", "operative_config.gin", "env.json"
FILES = (CONFIG, OPERATIVE, ENV, log.LOG, log.TRAIN_PLOT, log.EVAL_PLOT)
BOARD, SAVED = "tb", "checkpoints"
ADAPTER_FILES = {adapters.CONFIG, adapters.WEIGHTS, adapters.RECORD, adapters.TEMPLATE}
LEFTOVERS = f".{ADAPTER}.partial"  # of an adapter whose writing was cut short


class RunDirectory:
    """A run directory held by this process; a context manager that takes and releases its lock.

    A run that ends before it wrote anything leaves nothing that was not there before it.

    Attributes: path; checkpoints; adapter: the directory of the newest adapter.
    """

    def __init__(self, path: str | Path, *, keep: int, resume: bool, overwrite: bool):
        """Check that the directory may be used so, before anything long starts; nothing is written or removed yet."""
        if resume and overwrite:
            raise RunError("--resume and --overwrite exclude each other")
        self.path = Path(path).absolute()
        self.checkpoints = Checkpoints(self.path / SAVED, keep)
        self.adapter = self.path / ADAPTER
        self._resume, self._overwrite, self._lock = resume, overwrite, None
        self._made_lock, self._made = False, []  # the lock file; directories, innermost first: new with this run

    def __enter__(self) -> "RunDirectory":
        self._require_own()
        try:
            self._take_lock()
            self._require_allowed()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            if self._made_lock and not self._present():
                with contextlib.suppress(OSError):
                    (self.path / LOCK).unlink()
            os.close(self._lock)
            self._lock = None
        with contextlib.suppress(OSError):  # up to the first that is not empty
            for directory in self._made:
                directory.rmdir()

    def _present(self) -> list[str]:
        return [name for name in (*FILES, BOARD, SAVED, ADAPTER) if os.path.lexists(self.path / name)]

    def _require_own(self) -> None:
        """Refuses a directory whose files carry the names of a run's but are none."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"Train.run_dir = {str(self.path)!r}: is a file; choose another directory")
        present = self._present()
        if present and not (self.path / LOCK).is_file():
            raise RunError(f"{self.path}: holds {', '.join(present)}, which no run of kjax wrote (it has no {LOCK}): "
                           "choose another run_dir")

    def _take_lock(self) -> None:
        lock = self.path / LOCK
        try:
            self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._made_lock = not lock.exists()
            held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise RunError(f"{self.path}: the run directory is not writable ({error.strerror}); choose another run_dir "
                           "or change its permissions") from error
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(held), os.stat(lock)):
                raise FileNotFoundError  # its holder removed it since it was opened: it locks nothing
        except (BlockingIOError, FileNotFoundError) as error:
            holder = _holder(lock)
            os.close(held)
            raise RunError(f"{self.path}: in use by {holder}; wait for it, stop it, or choose another run_dir"
                           ) from error
        except OSError as error:
            os.close(held)
            if self._made_lock:
                lock.unlink(missing_ok=True)
            raise RunError(f"{lock}: cannot be locked ({error.strerror}), as on a file system that has no locks; "
                           "choose a run_dir on another one") from error
        self._lock = held
        try:
            os.ftruncate(held, 0)
            os.write(held, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except OSError as error:
            raise RunError(f"{self.path}: the run directory is not writable ({error.strerror})") from error

    def _require_allowed(self) -> None:
        present = self._present()
        if self._resume:
            if not self.checkpoints.steps():
                way = "start over with --overwrite" if present else "start without --resume"
                raise RunError(f"{self.path}: no saved state to resume from; {way}")
        elif self._overwrite:
            self._require_only_own()
        elif present:
            steps = self.checkpoints.steps()
            state = (f"saved up to step {steps[-1]}): go on with --resume, replace" if steps else
                     "without a saved state): replace")
            raise RunError(f"{self.path}: already holds a run ({state} it with --overwrite, or choose another run_dir")

    def _require_only_own(self) -> None:
        """Refuses to remove a directory of the run into which something else was put."""
        foreign = sorted(str(path.relative_to(self.path)) for path in self._foreign())
        if foreign:
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise RunError(f"{self.path}: --overwrite removes only what a run wrote, and this is not: "
                           f"{', '.join(foreign[:5])}{more}; move it away")

    def _foreign(self) -> Iterator[Path]:
        for name in (BOARD, SAVED, ADAPTER):
            if (self.path / name).is_symlink():
                yield self.path / name
                return
        unfinished = set(self.checkpoints.unfinished())
        for child in _children(self.path / SAVED):
            if child not in unfinished:
                own = _listed(child)
                yield from (path for path in (child, *child.rglob("*")) if not own or path.is_symlink()
                            or path.is_file() and str(path.relative_to(child)) not in own)
        yield from (path for path in _children(self.path / ADAPTER) if path.name not in ADAPTER_FILES)
        yield from (path for path in _children(self.path / BOARD) if not path.name.startswith("events.out.tfevents."))

    def require_space(self, state_bytes: int, saves: int) -> None:
        """Refuses to begin where the states that will be kept, and the one being written, do not fit on the disk.

        state_bytes: of a state and its adapter, which is a quarter.  saves: how many are still to come.
        """
        keep, quarter = self.checkpoints.keep, state_bytes // 4
        states, adapters_there = (0, 0) if self._overwrite else (len(self.checkpoints.steps()), self.adapter.is_dir())
        taken = states * state_bytes + adapters_there * quarter
        most = taken
        for _ in range(min(saves, keep + 1)):  # a state is written, the oldest goes, the run's adapter is replaced
            most = max(most, (states + 1) * state_bytes + adapters_there * quarter)
            states = min(states + 1, keep)
            most = max(most, states * state_bytes + (adapters_there + 1) * quarter)
            adapters_there = 1
        needed = most - taken
        free = shutil.disk_usage(self.path).free + (self._replaced_bytes() if self._overwrite else 0)
        if needed > free:
            fewer = "lower Train.keep, " if keep > 1 and saves > 1 else ""
            raise RunError(f"{self.path}: the saved states need {lora.size(needed)}, {lora.size(free)} are free: "
                           f"{fewer}free some space, or choose another run_dir")

    def _replaced_bytes(self) -> int:
        """What `clear` will free, by far most of it."""
        return sum(path.lstat().st_size for name in (SAVED, ADAPTER) for path in (self.path / name).rglob("*")
                   if path.is_file())

    def require_outside(self, setting: str, path: str | Path) -> None:
        """Refuses to replace a run by one that goes on from its files."""
        if Path(path).resolve().is_relative_to(self.path.resolve()):
            raise RunError(f"{setting} = {str(path)!r} lies in Train.run_dir, which --overwrite replaces: choose "
                           "another run_dir, or copy it away first")

    def clear(self) -> None:
        """Remove the earlier run that is to be overwritten: its own files only."""
        if self._overwrite:
            self._require_only_own()
            for name in (BOARD, SAVED, ADAPTER, LEFTOVERS):
                if (self.path / name).exists():
                    shutil.rmtree(self.path / name)
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Write a small file of the run, replacing it as a whole."""
        log.write_whole(self.path / name, text.encode())


def _children(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _listed(saved: Path) -> set[str]:
    """The files that the manifest of a saved state lists, itself included; none where there is no manifest."""
    try:
        return {MANIFEST, *json.loads((saved / MANIFEST).read_bytes())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        names = {child.name for child in _children(saved)}
        own = names <= {MANIFEST, STATE, ADAPTER} and re.fullmatch(r"\d+", saved.name)
        return {str(path.relative_to(saved)) for path in saved.rglob("*")} if own else set()


def _holder(lock: Path) -> str:
    try:
        found = json.loads(lock.read_text())
        return f"process {int(found['pid'])} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
