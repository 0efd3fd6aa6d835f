"""Files that a stranger may have made: found only inside their directory, read whole, quoted so that nothing acts."""

import json
import os
import stat
from pathlib import Path

from kjax.errors import CheckpointError


def quote(text: object) -> str:
    """Text from a file, safe to print: control characters escaped, long text cut."""
    shown = repr(text)
    return shown if len(shown) <= 200 else f"{shown[:200]}... ({len(shown)} characters)"


def parse_json(data: bytes, where: str) -> dict:
    """A JSON object without duplicate keys; `where` names the source in errors."""

    def unique(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            seen = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise CheckpointError(f"{where}: the key {quote(twice)} appears twice; download the file again")
        return found

    def constant(text):
        raise ValueError(f"{text} is not JSON")

    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error}); download the file again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(found).__name__}")
    return found


def inside(directory: Path, name: str) -> Path:
    """The resolved path of a file of the checkpoint, which must not lead out of it.

    A link may point to another file of the directory, or, in a hub cache, where
    `models--ORG--NAME/snapshots/REVISION/FILE` links to `models--ORG--NAME/blobs/HASH`, into the blobs of the same
    model. Everything else (`..`, absolute names, links to elsewhere) is refused: the files may have been made by
    somebody who wants others of this machine read.
    """
    if not name or "\0" in name or os.path.isabs(name) or ".." in Path(name).parts:
        raise CheckpointError(
            f"{directory}: the file name {quote(name)} leads out of the directory; "
            "names must be relative and without '..' (is the checkpoint from a source you trust?)"
        )
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed.append(root.parent.parent / "blobs")
    try:
        target = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links
        raise CheckpointError(f"{directory}: {quote(name)} cannot be followed ({error})") from None
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{directory}: {quote(name)} is a link to {target}, outside the directory; "
            "put the file itself there, or give kjax the directory that holds it"
        )
    return target


def open_regular(path: Path, shown: str) -> tuple[int, int]:
    """A file descriptor for reading and the file's size; only regular files (a named pipe would block)."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{shown}: cannot be opened ({error.strerror})") from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise CheckpointError(f"{shown}: not a regular file")
    return handle, status.st_size


def fill(handle: int, view: memoryview, offset: int, shown: str):
    """Reads exactly len(view) bytes at `offset`."""
    while len(view):
        try:
            count = os.preadv(handle, [view], offset)
        except OSError as error:
            raise CheckpointError(f"{shown}: reading at byte {offset} failed ({error.strerror})") from None
        if count == 0:
            raise CheckpointError(f"{shown}: the file became shorter while it was read; is it still downloading?")
        view, offset = view[count:], offset + count
