"""Steps of token rows: packed, grouped by length or plain, each found from its number alone."""

import bisect
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from kjax.data.dataset import Dataset, Example

IGNORE = -100  # a target that is none


def lengths_ladder(longest: int) -> int:
    """The next of 32, 48, 64, 96, 128, ...: few distinct row lengths to compile for, at most a third of it padding."""
    step = 32
    while True:
        for length in (step, step + step // 2):
            if length >= longest:
                return length
        step *= 2


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit, decreasing: each example goes to the fullest row that still has room for it."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for example in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(room, (lengths[example], -1))
        if at < len(room):
            free, row = room.pop(at)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(example)
        bisect.insort(room, (free - lengths[example], row))
    return rows


class Batches:
    """Batch of every step: `batch(step)` -> tokens, targets, positions, segments, all int32 [rows_per_step, T].

    Segments count from 1 in each row, 0 is padding; positions restart in each segment; a target is the next token of
    the same segment if that one is trained, else -100. An epoch holds every example once; its last batch is filled
    up with empty rows. With shuffle the order of each epoch comes from seed and epoch alone; without, it is the same
    for every epoch (evaluation).
    """

    def __init__(self, dataset: Dataset, rows_per_step: int, max_length: int,
                 mode: Literal["packed", "grouped", "plain"] = "packed", seed: int = 0, shuffle: bool = True):
        self._examples = dataset.examples
        self._rows_per_step = rows_per_step
        self._mode, self._seed, self._shuffle = mode, seed, shuffle
        lengths = [len(e.ids) for e in self._examples]
        if longest := max((n for n in lengths if n > max_length), default=0):
            raise ValueError(f"an example of {longest} tokens does not fit rows of {max_length}")
        self._ladder = [min(lengths_ladder(n), max_length) for n in lengths]
        if mode == "packed":
            self._rows = pack(lengths, max_length)
            self._length = min(lengths_ladder(max(sum(lengths[i] for i in row) for row in self._rows)), max_length)
        else:
            self._rows = [[i] for i in range(len(lengths))]
            self._length = max(self._ladder)
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Steps per epoch."""
        return -(-len(self._rows) // self._rows_per_step)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """The batches of the first epoch."""
        return (self.batch(step) for step in range(len(self)))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Row numbers in the order of an epoch. Grouped: rows of like length are neighbours, their steps shuffled."""
        if not self._shuffle:
            epoch = 0
        if self._order is None or self._order[0] != epoch:
            # Philox's raw stream is specified; Generator.permutation may change between NumPy versions (NEP 19),
            # and a resumed run must see the same order.
            draw = np.random.Philox(key=[self._seed, epoch]).random_raw(len(self._rows) + len(self))
            keys = draw[: len(self._rows)] if self._shuffle else np.arange(len(self._rows))
            if self._mode == "grouped":
                lengths = [self._ladder[row[0]] for row in self._rows]
                order = np.lexsort((keys, lengths))
                steps = np.argsort(draw[len(self._rows):], kind="stable") if self._shuffle else np.arange(len(self))
                pieces = np.split(order, range(self._rows_per_step, len(order), self._rows_per_step))
                padded = [np.pad(p, (0, self._rows_per_step - len(p)), constant_values=-1) for p in pieces]
                order = np.concatenate([padded[step] for step in steps])
            else:
                order = np.argsort(keys, kind="stable")
            self._order = (epoch, order)
        return self._order[1]

    def rows(self, step: int) -> list[list[Example]]:
        """The examples of each row of a step, empty rows left out."""
        epoch, within = divmod(step, len(self))
        chosen = self._epoch_order(epoch)[within * self._rows_per_step:(within + 1) * self._rows_per_step]
        return [[self._examples[i] for i in self._rows[row]] for row in chosen if row >= 0]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """tokens, targets, positions, segments [rows_per_step, T] of a step, counted from 0 over all epochs."""
        rows = self.rows(step)
        length = self._length
        if self._mode == "grouped":
            length = min(lengths_ladder(max(len(row[0].ids) for row in rows)), max(self._ladder))
        shape = (self._rows_per_step, length)
        batch = {"tokens": np.zeros(shape, np.int32), "targets": np.full(shape, IGNORE, np.int32),
                 "positions": np.zeros(shape, np.int32), "segments": np.zeros(shape, np.int32)}
        for number, row in enumerate(rows):
            begin = 0
            for segment, example in enumerate(row, 1):
                end = begin + len(example.ids)
                batch["tokens"][number, begin:end] = example.ids
                batch["targets"][number, begin:end - 1] = np.where(example.trained[1:], example.ids[1:], IGNORE)
                batch["positions"][number, begin:end] = np.arange(end - begin)
                batch["segments"][number, begin:end] = segment
                begin = end
        return batch

    def padded_share(self) -> float:
        """Share of positions that hold no token, over the first epoch."""
        batches = [self.batch(step)["segments"] for step in range(len(self))]
        return 1 - sum(int((b > 0).sum()) for b in batches) / sum(b.size for b in batches)
