"""Saved states of a run: adapter, optimiser and position, in a directory that appears whole or not at all.

    checkpoints/<step>/state/         Orbax: the lora tree, the optimiser's state, the step
    checkpoints/<step>/adapter/       the same adapter as a PEFT directory
    checkpoints/<step>/manifest.json  written last: size and SHA-256 of every file, what it was trained from
    checkpoints/.<step>.partial/      a save that was cut short; never read

Orbax restores a flipped bit without a word, hence the manifest: nothing is restored before every file is checked.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jax

from kjax.errors import RunError
from kjax.identity import Identity, versions

MANIFEST = "manifest.json"
STATE, ADAPTER = "state", "adapter"
FORMAT = 1
MAX_MANIFEST = 1 << 26  # bytes; a manifest has some hundred bytes per file


def digest(value) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Checkpoints:
    """The saved states under one directory; keeps the newest `keep`."""

    def __init__(self, directory: Path, keep: int):
        self.directory, self.keep = directory, keep

    def steps(self) -> list[int]:
        """The steps of which a complete state exists, oldest first; nothing in it is checked yet."""
        return sorted(int(path.name) for path in _children(self.directory)
                      if re.fullmatch(r"\d+", path.name) and (path / MANIFEST).is_file())

    def unfinished(self) -> list[Path]:
        """What saves and removals that were cut short have left behind."""
        return [path for path in _children(self.directory)
                if re.fullmatch(r"\.\d+\.partial", path.name) or re.fullmatch(r"\d+", path.name)
                and not path.is_symlink() and {child.name for child in _children(path)} <= {STATE, ADAPTER}]

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def save(self, step: int, state, write_adapter: Callable[[Path], object], identity: Identity) -> Path:
        """Write state and adapter, check them into a manifest, then give the directory its name; prune old ones.

        Raises RunError where anything fails; what was saved before stays as it is.
        """
        target, partial = self.path(step), self.directory / f".{step}.partial"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.unfinished():
                shutil.rmtree(leftover)
            partial.mkdir()
            _save_state(partial / STATE, state)
            write_adapter(partial / ADAPTER)
            _write_manifest(partial, step, identity)
            _sync(partial)
            os.rename(partial, target)
            _fsync(self.directory)
        except Exception as error:  # Orbax and TensorStore raise many kinds; all mean that this state is not saved
            _clear(partial)
            saved = self.steps()
            kept = f"the state of step {saved[-1]} before it is intact" if saved else "nothing was saved before it"
            raise RunError(f"{self.directory}: saving step {step} failed ({_brief(error)}); {kept}. Free some space or "
                           f"make the directory writable, then resume.") from error
        for old in self.steps()[:-self.keep]:
            self.remove(old)
        return target

    def remove(self, step: int) -> None:
        """Remove a state: its manifest first, so that a removal cut short leaves no state that looks complete."""
        (self.path(step) / MANIFEST).unlink()
        shutil.rmtree(self.path(step))

    def latest(self) -> tuple[int, dict]:
        """The newest saved step and its manifest, every file of it checked.

        Raises RunError where there is none, or where it is damaged: the message names the file, and an older state
        that is valid. Nothing older is taken without being asked for.
        """
        steps = self.steps()
        if not steps:
            raise RunError(f"{self.directory}: no saved state to resume from; start without --resume")
        try:
            return steps[-1], self.verify(steps[-1])
        except RunError as error:
            older = next((step for step in reversed(steps[:-1]) if self._valid(step)), None)
            way = (f"the state of step {older} is valid: remove {self.path(steps[-1])} to resume from that one"
                   if older is not None else "no older state is valid: start over with --overwrite")
            raise RunError(f"{error}; {way}") from error

    def verify(self, step: int) -> dict:
        """The manifest of a state, after checking it and every file it lists; RunError names the one at fault."""
        directory = self.path(step)
        manifest = _read_manifest(directory)
        if manifest["step"] != step:
            raise RunError(f"{directory / MANIFEST}: is of step {manifest['step']}, not {step}")
        for name, expected in manifest["files"].items():
            path = directory / name
            if path.is_symlink() or not path.is_file():
                raise RunError(f"{path}: missing")
            if path.stat().st_size != expected["size"]:
                raise RunError(f"{path}: has {path.stat().st_size} bytes, its manifest says {expected['size']}")
            if _sha256(path) != expected["sha256"]:
                raise RunError(f"{path}: damaged, its SHA-256 is not the one in its manifest")
        return manifest

    def _valid(self, step: int) -> bool:
        try:
            return bool(self.verify(step))
        except RunError:
            return False

    def restore(self, step: int, like):
        """The state of a verified step; like: a state's structure as jax.ShapeDtypeStructs with shardings."""
        import orbax.checkpoint as ocp  # here: only a run that saves or resumes needs it

        directory = self.path(step) / STATE
        wanted = {jax.tree_util.keystr(path, simple=True, separator="."): (leaf.shape, leaf.dtype)
                  for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                leaves = jax.tree.leaves(checkpointer.metadata(directory).item_metadata.tree)
                found = {leaf.name: (leaf.shape, leaf.dtype) for leaf in leaves}
                if wrong := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
                    raise RunError(f"{directory}: does not fit this run's adapter and optimiser: "
                                   f"{_shape(found, wrong)} saved, {_shape(wanted, wrong)} wanted")
                state = checkpointer.restore(directory, args=ocp.args.StandardRestore(like))
        except RunError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise RunError(f"{directory}: cannot be restored ({_brief(error)})") from error
        if int(state.step) != step:
            raise RunError(f"{directory}: holds step {int(state.step)}, not {step}")
        return state


def _save_state(directory: Path, state) -> None:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.StandardSave(state))


def _write_manifest(directory: Path, step: int, identity: Identity) -> None:
    files = {str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": _sha256(path)}
             for path in sorted(directory.rglob("*")) if path.is_file()}
    manifest = {"format": FORMAT, "step": step, **dataclasses.asdict(identity), "versions": versions(), "files": files}
    manifest["config_sha256"] = digest(identity.config)
    manifest["sha256"] = digest(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _read_manifest(directory: Path) -> dict:
    path = directory / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST:
            raise ValueError("too large")
        manifest = json.loads(path.read_bytes())
        claimed = manifest.pop("sha256")
        intact = claimed == digest(manifest)
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise RunError(f"{path}: not a readable manifest ({_brief(error)})") from error
    if not intact:
        raise RunError(f"{path}: damaged, its own SHA-256 does not fit")
    if manifest["format"] != FORMAT:
        raise RunError(f"{path}: format {manifest['format']}, this kjax reads format {FORMAT}")
    if any(".." in Path(name).parts or Path(name).is_absolute() for name in manifest["files"]):
        raise RunError(f"{path}: names a file outside of its directory")
    return manifest


def _shape(leaves: dict, names: list[str]) -> str:
    """The first leaf that is at fault, as one of two sides has it."""
    shape, dtype = leaves.get(names[0], (None, None))
    return f"no {names[0]}" if shape is None else f"{names[0]} {list(shape)} {dtype}"


def _clear(directory: Path, seconds: float = 5) -> None:
    """Remove what a failed save wrote. TensorStore's writers end some time after the error and until then make their
    files, and the directories of these, anew; what outlasts the wait is removed before the next save."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.3)
        if not directory.exists():
            return


def _children(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    """Everything under a directory to the disk, so that the rename after it never names files that are not there."""
    for path in (*directory.rglob("*"), directory):
        _fsync(path)


def _brief(error: BaseException) -> str:
    """What the system said, without the stack that TensorStore puts into its messages."""
    text = str(error)
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    lines = text.strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
