"""A new checkpoint out of another one, shard by shard: resumable, and never beside anything that it is not.

    TARGET.partial/                 while it is made
        .lock                       held by the process that makes it
        model-00001-of-000163.safetensors ...
        kjax_manifest.json          what it is made from, and the digest of each finished shard
    TARGET/                         the same directory, renamed when all of it is on the disk
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import progress as bars

from kjax.errors import CheckpointError
from kjax.weights.files import inside, parse_json, quote
from kjax.weights.safetensors import CONFIG, INDEX, SINGLE, Checkpoint
from kjax.weights.writer import Part, digest_file, sync, write_error, write_file

MANIFEST, LOCK = "kjax_manifest.json", ".lock"
FORMAT = 1  # of the manifest and of the arithmetic: shards of different formats are not mixed
MAX_SMALL = 1 << 26  # bytes; tokenizers have up to 20 MB, and what is larger is no file that belongs to a model
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
RESERVE = 64 << 20  # bytes to leave free


def identify(checkpoint: Checkpoint) -> dict:
    """What tells a source from another one without reading its weights: its files' sizes and times, and its config."""
    def status(path):
        found = path.stat()
        return [found.st_size, found.st_mtime_ns]

    config = checkpoint.config_path.read_bytes()
    return {"directory": str(checkpoint.directory.resolve()), "config": hashlib.sha256(config).hexdigest(),
            "shards": {name: status(path) for name, path in checkpoint.shards.items()}}


def rewrite(source: Checkpoint, target: Path, shards: Mapping[str, Sequence[Part]], *, config: bytes, made_from: dict,
            progress: bool = True) -> Path:
    """Writes the checkpoint `target`: the parts of each shard, an index, config.json, and source's small files.

    made_from: everything that the bytes follow from. A partial directory of the same origin is gone on with: its
    finished shards are read and compared with their digests first, and damaged ones are made again.
    Raises CheckpointError where the target exists, the partial directory is another's, or the disk is too small.
    """
    target = Path(target).absolute()
    partial = target.with_name(f"{target.name}.partial")
    check_target(source, target)
    made_from = json.loads(json.dumps(made_from | {"kjax_format": FORMAT}))  # as it is read back
    small = _small_files(source)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _Lock(partial):
            done = _finished(partial, shards, made_from)
            total = sum(part.nbytes for parts in shards.values() for part in parts)
            with _Progress(progress) as shown:
                done = _verify(partial, done, shown)
                left = {name: parts for name, parts in shards.items() if name not in done}
                _check_space(partial, sum(part.nbytes for parts in left.values() for part in parts)
                             + sum(path.stat().st_size for path in small.values()))
                for number, (name, parts) in enumerate(left.items(), len(done) + 1):
                    shown.begin(f"Shard {number} of {len(shards)}", sum(part.nbytes for part in parts))
                    done[name] = write_file(partial / name, parts, shown.advance)
                    _write(partial / MANIFEST, _json({"made_from": made_from, "shards": dict(sorted(done.items()))}))
            for name, path in small.items():
                _write(partial / name, path.read_bytes())
            if set(shards) != {SINGLE}:
                weight_map = {tensor.name: name for name, parts in shards.items() for part in parts
                              for tensor in part.tensors}
                _write(partial / INDEX, _json({"metadata": {"total_size": total},
                                               "weight_map": dict(sorted(weight_map.items()))}))
            _write(partial / CONFIG, config)
            sync(partial)
            os.rename(partial, target)
            (target / LOCK).unlink()
            sync(target.parent)
    except OSError as error:
        raise write_error(partial, error) from error
    return target


def check_target(source: Checkpoint, target: Path):
    """Refuses a target that exists or lies in the source."""
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: already exists; give a new directory")
    if target.resolve().is_relative_to(source.directory.resolve()):
        raise CheckpointError(f"{target}: lies in the source {source.directory}, which is never changed; give another "
                              "directory")


def _small_files(source: Checkpoint) -> dict[str, Path]:
    """Tokenizer, chat template, licence, remote code and the like: name -> file, links resolved."""
    small = {}
    for item in sorted(source.directory.iterdir()):
        if item.name in (INDEX, CONFIG, MANIFEST) or item.name.startswith(".") or item.suffix in WEIGHTS:
            continue
        if (path := inside(source.directory, item.name)).is_file() and path.stat().st_size <= MAX_SMALL:
            small[item.name] = path
    return small


def _finished(partial: Path, shards: Mapping, made_from: dict) -> dict[str, str]:
    """The digests of the shards that are finished; refuses what is not of this origin."""
    way = f"remove {partial} to start over, or give another target"
    if not (partial / MANIFEST).is_file():
        if foreign := sorted(item.name for item in partial.iterdir()
                             if item.name != LOCK and not item.name.endswith(".partial")):
            raise CheckpointError(f"{partial}: holds {quote(foreign[0])} but no {MANIFEST}; {way}")
        _write(partial / MANIFEST, _json({"made_from": made_from, "shards": {}}))
        return {}
    manifest = parse_json((partial / MANIFEST).read_bytes(), str(partial / MANIFEST))
    if manifest.get("made_from") != made_from:
        before = manifest.get("made_from")
        before = before if isinstance(before, dict) else {}
        differing = sorted(key for key in made_from.keys() | before.keys() if made_from.get(key) != before.get(key))
        raise CheckpointError(f"{partial}: was begun with another {', '.join(map(quote, differing))}; {way}")
    done = manifest.get("shards")
    if not isinstance(done, dict) or not done.keys() <= shards.keys():
        raise CheckpointError(f"{partial / MANIFEST}: damaged; {way}")
    return done


def _verify(partial: Path, done: dict[str, str], shown: "_Progress") -> dict[str, str]:
    """The shards of which every byte is as it was written; says which are not."""
    whole = {}
    for number, (name, digest) in enumerate(done.items(), 1):
        try:
            shown.begin(f"Checking shard {number} of {len(done)}", (partial / name).stat().st_size)
            if digest_file(partial / name, shown.advance) == digest:
                whole[name] = digest
                continue
        except (OSError, CheckpointError):
            pass
        shown.say(f"{partial / name}: missing or damaged, made again")
    return whole


def _check_space(directory: Path, needed: int):
    free = shutil.disk_usage(directory).free
    if free < needed + RESERVE:
        raise CheckpointError(f"{directory}: {needed / 1e9:.2f} GB are to be written and {free / 1e9:.2f} GB are free; "
                              "free some space or give a target on another disk")


def _json(content: dict) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"


def _write(path: Path, data: bytes):
    """A small file, whole or not at all."""
    staging = path.with_name(f"{path.name}.partial")
    with open(staging, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)


class _Lock:
    """Keeps a second process out of a partial directory."""

    def __init__(self, directory: Path):
        self.path = directory / LOCK

    def __enter__(self):
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise CheckpointError(f"{self.path.parent}: another process is making it; wait for it, or give another "
                                  "target") from None
        except OSError as error:
            os.close(self._handle)
            raise CheckpointError(f"{self.path}: cannot be locked ({error.strerror}), as on a file system that has no "
                                  "locks; give a target on another one") from error

    def __exit__(self, *_):
        os.close(self._handle)


class _Progress:
    """GB, GB/s and the time left: a bar on a terminal, one line a shard elsewhere."""

    def __init__(self, wanted: bool):
        self.console, self.wanted = bars.get_console(), wanted
        self.bar = bars.Progress(
            bars.TextColumn("{task.description}"), bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(), console=self.console, transient=True,
            disable=not (wanted and self.console.is_terminal))
        self._line = self._task = None

    def begin(self, what: str, size: int):
        self._end()
        self._line = what, size, time.monotonic()
        self._task = self.bar.add_task(what, total=size)

    def advance(self, count: int):
        self.bar.update(self._task, advance=count)

    def say(self, text: str):
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _end(self):
        if self._line and self.wanted and not self.console.is_terminal:
            what, size, began = self._line
            seconds = max(time.monotonic() - began, 1e-3)
            self.say(f"{what}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s")
        if self._task is not None:
            self.bar.remove_task(self._task)
        self._line = self._task = None

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self._end()
        self.bar.stop()
