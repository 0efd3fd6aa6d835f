"""How much memory a traced function needs beside its arguments, and how many operations it does."""

from collections.abc import Sequence
from dataclasses import dataclass

from jax.extend import core

from kjax.planning import program, rules
from kjax.planning.arrays import Array, Span, Timeline


@dataclass(frozen=True)
class Usage:
    """Bytes of a function.

    temporaries: the most that exists at once beside the arguments and what is written over them.
    saved: the part of it that one loop stacks for another to read: under reverse differentiation what the layers keep
    from the forward to the backward pass.
    largest: what exists at the fullest moment, as (operation, shape, bytes), the largest first.
    traffic: bytes of arrays written and read in the whole run.
    """

    arguments: int
    temporaries: int
    saved: int
    largest: tuple[tuple[str, str, int], ...]
    traffic: float

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries


def usage(closed: core.ClosedJaxpr, donated: Sequence[bool] = (), merge: bool = True) -> Usage:
    """Memory of a traced function; donated marks the flat arguments whose memory its results may take.

    merge: see kjax.planning.program.flatten.
    """
    flat = program.flatten(closed.jaxpr, merge)
    flat = flat.needed([True] * len(flat.outputs))
    donated = [False] * len(closed.jaxpr.constvars) + list(donated)
    life = Timeline()
    inputs = [Array(v.bytes, 0, "argument", v.text, owned=False) for v in flat.inputs]
    frame = rules.run(life, flat, inputs)
    results = [frame.memory(v) for v in flat.outputs if v is not None]
    free = [array for array, gives in zip(inputs, donated, strict=False) if gives]
    for array in results:
        place = next((a for a in free if array is not None and a.text == array.text), None)
        if place is not None:
            free.remove(place)
            if array.owned and array.outlives(place):
                array.owned = False  # written where the donated argument was
    for array in results:
        if array is not None:
            array.read(life.step)
    at, rows = _fullest(life.spans())
    # Constants of the trace are part of the program, not arguments.
    arguments = sum(v.bytes for v in flat.inputs[len(closed.jaxpr.constvars):])
    return Usage(arguments, sum(row[2] for row in rows), sum(a.bytes for a in life.arrays if a.saved), rows,
                 life.traffic())


def _fullest(spans: list[tuple[Array, Span]]) -> tuple[int, tuple[tuple[str, str, int], ...]]:
    """The step at which most bytes live, and what they are. XLA's heap packs them without gaps, or nearly so."""
    changes: dict[int, int] = {}
    for array, span in spans:
        changes[span.first] = changes.get(span.first, 0) + array.bytes
        changes[span.last + 1] = changes.get(span.last + 1, 0) - array.bytes
    at = most = now = 0
    for step in sorted(changes):
        now += changes[step]
        if now > most:
            at, most = step, now
    rows = [(array.origin, array.text, array.bytes) for array, span in spans if span.first <= at <= span.last]
    return at, tuple(sorted((row for row in rows if row[2]), key=lambda row: -row[2]))


def operations(closed: core.ClosedJaxpr) -> float:
    """Multiplications and additions in matrix products: 2 m n k each, loops times their length."""
    return program.operations(closed.jaxpr)
