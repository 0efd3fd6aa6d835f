"""Arrays on a time line: what exists, from which step to which, and what takes whose place."""

from dataclasses import dataclass, field
from typing import NamedTuple

from kjax.planning.program import Value


class Span(NamedTuple):
    """The steps at whose ends something exists, both included."""

    first: int
    last: int


@dataclass(eq=False)
class Array:
    """Something in memory from step `first` to step `last`.

    owned: part of the program's temporaries, not an argument of the caller.  saved: stacked by one loop for another.
    fused: written while its operands are read, element by element.
    heir_of: arrays whose place it takes if they are not read any more when it is made.
    times: how often it is made, by loops.
    """

    bytes: int
    first: int
    origin: str
    text: str = ""
    last: int = 0
    owned: bool = True
    saved: bool = False
    fused: bool = False
    heir_of: list["Array"] = field(default_factory=list)
    times: int = 1

    def read(self, step: int):
        self.last = max(self.last, step)

    def outlives(self, old: "Array") -> bool:
        """Whether it can be written where `old` was: nobody reads that any more."""
        return old.last < self.first or (self.fused and old.last == self.first)


class Timeline:
    """The arrays of a program that runs step by step; kjax.planning.rules fills it."""

    def __init__(self):
        self.step = 0
        self.depth = 0  # of loops
        self.turns = 1  # of all loops around
        self.arrays: list[Array] = []
        self.kept: dict[str, Array] = {}

    def new(self, bytes_: int, origin: str, text: str = "") -> Array:
        array = Array(bytes_, self.step, origin, text, last=self.step, times=self.turns)
        self.arrays.append(array)
        return array

    def keep(self, bytes_: int, origin: str, text: str) -> Array:
        """A constant array, made once, that stays for its last reader; loops take what does not change out of them."""
        key = f"{origin} {text}"
        if key not in self.kept:
            self.kept[key] = self.new(bytes_, origin, text)
        self.kept[key].read(self.step)
        return self.kept[key]

    def filled(self, value: Value) -> Array:
        """What a loop fills: a copy of zeros, or the zeros themselves where only one loop outside of others wants
        them."""
        again = f"zeros {value.text}" in self.kept
        self.keep(value.bytes, "zeros", value.text).owned = again or self.depth > 0
        return self.new(value.bytes, "scan", value.text)

    def traffic(self) -> float:
        """Bytes written and read where each array is written once and read once; what is no operation's own, such as
        what a loop carries, stacks or keeps, is counted with the operation that makes it."""
        return sum(2.0 * a.bytes * a.times for a in self.arrays if a.origin not in ("carry", "scan", "zeros"))

    def spans(self) -> list[tuple[Array, Span]]:
        """Each array that has a place of its own, and how long it or those that take its place live."""
        spans: dict[Array, Span] = {}
        place: dict[Array, Array] = {}
        for array in self.arrays:
            if not array.owned:
                continue
            for old in (place.get(old, old) for old in array.heir_of):
                if old in spans and old.bytes == array.bytes and spans[old].last <= array.first:
                    spans[old] = Span(spans[old].first, max(spans[old].last, array.last))
                    place[array] = old
                    break
            else:
                spans[array] = Span(array.first, array.last)
        return list(spans.items())
