"""Steps of token rows: packed, grouped by length or plain, each found from its number alone."""

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from kjax import config
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


def pack(lengths: Sequence[int], capacity: int, draw: Sequence[int]) -> list[list[int]]:
    """Best fit: each example goes to the fullest row that still has room for it.

    Long examples go first, by decreasing length, as they are hard to place. Those below an eighth of a row fill the
    gaps in the order of the random numbers `draw`, so that rows mix examples of all lengths.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for example in sorted(range(len(lengths)), key=lambda i: (-max(lengths[i], capacity // 8), draw[i])):
        at = bisect.bisect_left(room, (lengths[example], -1))
        if at < len(room):
            free, row = room.pop(at)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(example)
        bisect.insort(room, (free - lengths[example], row))
    return rows


def _draw(seed: int, stream: int, count: int) -> np.ndarray:
    """Random uint64s. Philox's raw stream is specified; the methods of Generator may change between NumPy versions
    (NEP 19), and a resumed run must see the same rows in the same order."""
    return np.random.Philox(key=[seed, stream]).random_raw(count)


class Batches:
    """Batch of every step: `batch(step)` -> tokens, targets, positions, segments, all int32 [rows_per_step, T].

    Segments count from 1 in each row, 0 is padding; positions restart in each segment; a target is the next token of
    the same segment if that one is trained, else -100. An epoch holds every example once; its last batch is filled
    up with empty rows, and where the data do not fill even one, batches have only as many rows as they need, to a
    multiple of `multiple`. With shuffle the order of each epoch comes from seed and epoch alone; without, it is the
    same for every epoch (evaluation).
    """

    def __init__(self, dataset: Dataset, rows_per_step: int, max_length: int,
                 mode: Literal["packed", "grouped", "plain"] = "packed", seed: int = 0, shuffle: bool = True,
                 multiple: int = 1):
        self._examples = dataset.examples
        self._mode, self._seed, self._shuffle = mode, seed, shuffle
        lengths = [len(e.ids) for e in self._examples]
        if longest := max((n for n in lengths if n > max_length), default=0):
            raise ValueError(f"an example of {longest} tokens does not fit rows of {max_length}")
        self._ladder = [min(lengths_ladder(n), max_length) for n in lengths]
        if mode == "packed":
            self._rows = pack(lengths, max_length, _draw(seed, 0, len(lengths)).tolist())
            self._length = min(lengths_ladder(max(sum(lengths[i] for i in row) for row in self._rows)), max_length)
        else:
            self._rows = [[i] for i in range(len(lengths))]
            self._length = max(self._ladder)
        self.rows_per_step = min(rows_per_step, math.ceil(len(self._rows) / multiple) * multiple)
        self._order: tuple[int, np.ndarray] | None = None

    @classmethod
    def of_run(cls, settings: config.Config, dataset: Dataset, *, evaluation: bool = False) -> "Batches":
        """The batches in which a run of these settings trains on a dataset, or evaluates it: then in one order and
        packed alike for every seed, so that losses of several seeds compare."""
        train = settings.train
        return cls(dataset, train.rows_per_step, settings.data.max_length, settings.data.rows,
                   seed=0 if evaluation else train.seed, shuffle=not evaluation, multiple=train.micro_rows or 1)

    def __len__(self) -> int:
        """Steps per epoch."""
        return -(-len(self._rows) // self.rows_per_step)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """The batches of the first epoch."""
        return (self.batch(step) for step in range(len(self)))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Row numbers in the order of an epoch, -1 for an empty row."""
        if not self._shuffle:
            epoch = 0
        if self._order is None or self._order[0] != epoch:
            count = len(self._rows)
            draw = _draw(self._seed, 1 + epoch, count + len(self))
            if not self._shuffle:
                draw = np.arange(len(draw))
            order = np.argsort(draw[:count], kind="stable")
            if self._mode == "grouped":  # rows of like length become neighbours, then the steps are shuffled
                lengths = np.array([self._ladder[row[0]] for row in self._rows])
                order = order[np.argsort(lengths[order], kind="stable")]
            order = np.pad(order, (0, len(self) * self.rows_per_step - count), constant_values=-1)
            if self._mode == "grouped":
                order = order.reshape(len(self), -1)[np.argsort(draw[count:], kind="stable")].reshape(-1)
            self._order = (epoch, order)
        return self._order[1]

    def rows(self, step: int) -> list[list[Example]]:
        """The examples of each row of a step, empty rows left out."""
        epoch, within = divmod(step, len(self))
        chosen = self._epoch_order(epoch)[within * self.rows_per_step:(within + 1) * self.rows_per_step]
        return [[self._examples[i] for i in self._rows[row]] for row in chosen if row >= 0]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """tokens, targets, positions, segments [rows_per_step, T] of a step, counted from 0 over all epochs."""
        rows = self.rows(step)
        length = self._length_of(rows)
        shape = (self.rows_per_step, length)
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

    def _length_of(self, rows: list[list[Example]]) -> int:
        if self._mode != "grouped":
            return self._length
        return min(lengths_ladder(max(len(row[0].ids) for row in rows)), self._length)

    def padded_share(self) -> float:
        """Share of positions that hold no token, over the first epoch."""
        steps = [self.rows(step) for step in range(len(self))]
        positions = sum(self.rows_per_step * self._length_of(rows) for rows in steps)
        return 1 - sum(len(example.ids) for rows in steps for row in rows for example in row) / positions
