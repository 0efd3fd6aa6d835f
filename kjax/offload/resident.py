"""Copies the routed experts into memory of their own, each on the memory node of the threads that will read it."""

import concurrent.futures
import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np

from kjax import _ext, progress
from kjax.errors import CheckpointError, ConfigError
from kjax.offload.formats import Entry

CHUNK = 16 << 20  # bytes read at a time: long reads for the disk, and little to repeat when interrupted
WORKERS = 4  # readers per node: a disk array wants several requests at a time, memory more than one writer
ALIGNMENT = 64  # bytes at which a tensor begins, a cache line


class Resident:
    """The copy.

    Attributes:
      buffers: uint8 memory of each node that holds experts.
      nodes: which one holds each expert.
      refused: why a buffer may not lie on its node, "" where nothing speaks against it.
    """

    def __init__(self, tensors: Sequence[Sequence[Entry]], *, show: bool = True):
        """Copy tensors[expert], the tensors of each expert of all layers, reading every file in order.

        The files leave the page cache as they are read. Raises ConfigError where the system refuses the memory and
        CheckpointError where a file cannot be read.
        """
        self.nodes = _ext.spread(len(tensors))
        order = sorted(((entry, node) for entries, node in zip(tensors, self.nodes, strict=True) for entry in entries),
                       key=lambda item: (str(item[0].path), item[0].begin))
        sizes = [0] * (max(self.nodes) + 1)
        self._places: dict[tuple[str, int], tuple[int, int]] = {}
        for entry, node in order:
            self._places[str(entry.path), entry.begin] = node, sizes[node]
            sizes[node] += -(-(entry.end - entry.begin) // ALIGNMENT) * ALIGNMENT
        self.buffers, reasons = zip(*(_memory(size, node) for node, size in enumerate(sizes)), strict=True)
        self.refused = "; ".join(sorted({reason for reason in reasons if reason}))
        self._copy(order, show)

    def place(self, entry: Entry) -> tuple[int, int]:
        """The index of the buffer that holds a tensor, and where in it the tensor begins."""
        return self._places[str(entry.path), entry.begin]

    def _copy(self, order, show: bool):
        total = sum(entry.end - entry.begin for entry, _ in order)
        with contextlib.ExitStack() as stack:
            handles = {}
            for path in dict.fromkeys(entry.path for entry, _ in order):
                handles[path] = stack.enter_context(_opened(path))
            bar = stack.enter_context(progress.bytes_bar("Copying routed experts", total, show))
            cpus = [cpus for _, cpus in _ext.nodes()]
            pools = [concurrent.futures.ThreadPoolExecutor(WORKERS, "kjax-copy", _pin, (cpus[node],))
                     for node in range(len(self.buffers))]
            for pool in pools:
                stack.callback(pool.shutdown, cancel_futures=True)

            def work(entry, node, begin, size):
                _, at = self.place(entry)
                _read(handles[entry.path], self.buffers[node][at + begin:at + begin + size], entry, begin)
                bar(size)

            futures = [pools[node].submit(work, entry, node, begin, size) for entry, node in order
                       for begin, size in _chunks(entry)]
            for future in concurrent.futures.as_completed(futures):
                future.result()
            for handle in handles.values():
                _drop(handle, 0, 0)  # pages that two tensors share


def as_float32(scales: Sequence[Entry]) -> tuple[np.ndarray, dict[tuple[str, int], int]]:
    """(fp32 numbers, the byte at which those of each tensor begin, by path and begin) of bf16 tensors.

    For scales of rows that a file has in bf16: 4 bytes for a row of thousands of weights.
    """
    entries = sorted(scales, key=lambda entry: (str(entry.path), entry.begin))
    numbers, offsets, at = np.empty(sum(math.prod(entry.shape) for entry in entries), np.float32), {}, 0
    for path, of_file in itertools.groupby(entries, key=lambda entry: entry.path):
        with _opened(path) as handle:
            for entry in of_file:
                raw = np.empty(entry.end - entry.begin, np.uint8)
                _read(handle, raw, entry, 0)
                offsets[str(path), entry.begin] = at * numbers.itemsize
                stop = at + math.prod(entry.shape)
                numbers[at:stop] = raw.view(ml_dtypes.bfloat16)
                at = stop
    return numbers, offsets


@contextlib.contextmanager
def _opened(path) -> Iterator[int]:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from None
    try:
        yield handle
    finally:
        os.close(handle)


def _memory(size: int, node: int) -> tuple[np.ndarray, str]:
    try:
        return _ext.host_memory(max(size, 1), node)
    except MemoryError:
        raise ConfigError(f"Model.storage = 'resident': the system refuses {size / 1e9:.1f} GB of memory (a limit of "
                          "the process or of overcommitment, see ulimit -v and vm.overcommit_memory): set 'mapped'"
                          ) from None


def _pin(cpus: list[int]):
    """First touch places a page on the toucher's node, also where the system refuses to be told the node."""
    if len(_ext.nodes()) > 1 and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cpus)  # of this thread alone


def _chunks(entry: Entry) -> Iterator[tuple[int, int]]:
    size = entry.end - entry.begin
    for begin in range(0, size, CHUNK):
        yield begin, min(CHUNK, size - begin)


def _read(handle: int, out: np.ndarray, entry: Entry, begin: int):
    view, offset = memoryview(out), entry.begin + begin
    while len(view):
        try:
            count = os.preadv(handle, [view], offset)
        except OSError as error:
            raise CheckpointError(f"{entry.path}: tensor {entry.name!r}: reading at byte {offset} failed "
                                  f"({error.strerror})") from None
        if not count:
            raise CheckpointError(f"{entry.path}: tensor {entry.name!r}: the file ends at byte {offset}; it became "
                                  "shorter since it was opened, put it back as it was")
        view, offset = view[count:], offset + count
    _drop(handle, entry.begin + begin, len(out))


def _drop(handle: int, begin: int, size: int):
    """Let the page cache go: the bytes are held twice otherwise."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(handle, begin, size, os.POSIX_FADV_DONTNEED)
