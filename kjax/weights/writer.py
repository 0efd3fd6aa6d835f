"""Safetensors files written band by band: little memory whatever their size, each file there whole or not at all."""

import concurrent.futures
import hashlib
import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kjax.errors import CheckpointError
from kjax.weights.safetensors import DTYPES, ITEMSIZE, Checkpoint, TensorEntry, read_header

WORKERS = min(4, os.cpu_count() or 1)  # parts in hand at a time: more of them need more memory and rarely help
COPIED = 16 << 20  # bytes copied at a time
METADATA = {"format": "pt"}  # without it transformers refuses a file


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to be written; dtype is the safetensors code."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of one file that are made together.

    bands() yields tuples with the next bytes of each tensor, as arrays of any type and shape; an array may be empty.
    """

    tensors: tuple[Tensor, ...]
    bands: Callable[[], Iterator[Sequence[np.ndarray]]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def copied(checkpoint: Checkpoint, entry: TensorEntry) -> Part:
    """A tensor as it is, bit for bit."""
    def bands():
        size = entry.end - entry.begin
        for start in range(0, size, COPIED):
            out = np.empty(min(COPIED, size - start), np.uint8)
            checkpoint.read_bytes(entry, out, start)
            yield (out,)
    return Part((Tensor(entry.name, entry.dtype, entry.shape),), bands)


def in_memory(name: str, array, index: tuple[int, ...] = ()) -> Part:
    """`array[index]`, of a numpy or JAX array on the host; it is copied only if it is not contiguous."""
    dtype = next(code for code, known in DTYPES.items() if known == array.dtype)
    return Part((Tensor(name, dtype, array.shape[len(index):]),), lambda: iter([(np.asarray(array)[index],)]))


def layout(tensors: Iterable[Tensor]) -> tuple[bytes, dict[str, int]]:
    """A file's beginning, up to the first tensor, and where each tensor begins.

    Wide types come first, as in the files of the safetensors library, so that every number lies at a multiple of its
    size.
    """
    header, offsets, cursor = {"__metadata__": METADATA}, {}, 0
    for tensor in sorted(tensors, key=lambda tensor: (-ITEMSIZE[tensor.dtype], tensor.name)):
        end = cursor + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [cursor, end]}
        offsets[tensor.name], cursor = cursor, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + at for name, at in offsets.items()}


def write_file(path: Path, parts: Sequence[Part], advance: Callable[[int], object] = lambda count: None) -> str:
    """Writes a safetensors file and returns its digest. It appears under its name when all of it is on the disk.

    advance(n) is told of every n bytes written, from several threads. OSError and the errors of the parts pass through;
    the partial file is removed then.
    """
    beginning, offsets = layout(tensor for part in parts for tensor in part.tensors)
    partial = path.with_name(f"{path.name}.partial")
    stop = threading.Event()
    handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def work(part: Part) -> dict[str, bytes]:
        cursors = [offsets[tensor.name] for tensor in part.tensors]
        digests = [hashlib.sha256() for _ in part.tensors]
        for band in part.bands():
            if stop.is_set():
                return {}
            for i, array in enumerate(band):
                view = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
                digests[i].update(view)
                advance(len(view))
                cursors[i] = _put(handle, view, cursors[i])
        for tensor, cursor in zip(part.tensors, cursors, strict=True):
            if cursor != offsets[tensor.name] + tensor.nbytes:
                raise ValueError(f"{tensor.name}: {cursor - offsets[tensor.name]} bytes made of {tensor.nbytes}")
        return {tensor.name: digest.digest() for tensor, digest in zip(part.tensors, digests, strict=True)}

    try:
        try:
            _put(handle, memoryview(beginning), 0)
            digests: dict[str, bytes] = {}
            for made in _on_threads(work, parts, stop):
                digests |= made
            os.fsync(handle)
            # What was written will not be read soon: the page cache is for the experts of others.
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return _digest(beginning, (digests[name] for name in offsets))


def digest_file(path: Path, advance: Callable[[int], object] = lambda count: None) -> str:
    """The digest of a file's contents, as write_file gave it: the SHA-256 of the header and each tensor's SHA-256."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        entries = read_header(handle, os.fstat(handle).st_size, path, str(path))
        (length,) = struct.unpack("<Q", os.pread(handle, 8, 0))
        beginning = os.pread(handle, 8 + length, 0)

        def work(entry: TensorEntry) -> bytes:
            digest = hashlib.sha256()
            for start in range(entry.begin, entry.end, COPIED):
                data = os.pread(handle, min(COPIED, entry.end - start), start)
                digest.update(data)
                advance(len(data))
            return digest.digest()

        return _digest(beginning, _on_threads(work, entries, threading.Event()))
    finally:
        os.close(handle)


def sync(directory: Path):
    """Makes renames in a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(beginning: bytes, tensors: Iterable[bytes]) -> str:
    whole = hashlib.sha256(hashlib.sha256(beginning).digest())
    for tensor in tensors:
        whole.update(tensor)
    return whole.hexdigest()


def _put(handle: int, view: memoryview, offset: int) -> int:
    while len(view):
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
    return offset


def _on_threads(work: Callable, items: Sequence, stop: threading.Event) -> Iterator:
    """work(item) of each, in order, on WORKERS threads; after an error or an interrupt the others end soon."""
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        try:
            yield from pool.map(work, items)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def write_error(directory: Path, error: OSError) -> CheckpointError:
    """What a failed write means to the user."""
    return CheckpointError(f"{directory}: cannot be written ({error.strerror or error}); free some space or give "
                           "another place")
