"""What each primitive does to memory: matrix products, loops, branches, updates in place."""

import math
from collections.abc import Collection, Sequence

from kjax.planning.arrays import Array, Timeline
from kjax.planning.frame import NATURAL, Frame, Rule
from kjax.planning.program import Op, Program, Value

IN_PLACE = {"dynamic_update_slice", "scatter", "scatter-add", "scatter_add", "scatter_max", "scatter_min"}


def run(life: Timeline, program: Program, inputs: Sequence[Array | None], early: Collection[Value] = (),
        sliced: range = range(0)) -> Frame:
    """One pass over a program; inputs[i] is the array of program.inputs[i], None: a scalar or a constant.

    sliced: the inputs that are slices of their arrays; one is made where an operation wants it in memory.
    early: outputs that are written as soon as they are known, into memory of the reader's.
    """
    frame = Frame(life, program, inputs, sliced)
    frame.execute(RULES, _plain, early)
    return frame


def _plain(frame: Frame, op: Op):
    """Operands from memory, results new."""
    frame.operands(op.ins)
    frame.results(op)


def _product(frame: Frame, op: Op):
    """A matrix product reads [batch..., free..., summed...], its right operand [batch..., summed..., free...] or, where
    it lies so, [batch..., free, summed...]; what lies otherwise is laid out anew, once for all products that
    read it so."""
    contract, batch = op.params["dimension_numbers"]
    wanted = []
    for side, (value, summed, shared) in enumerate(zip(op.ins, contract, batch, strict=True)):
        if value is not None:
            source, order = _untransposed(frame, value)
            layout = _layout(source, [order[a] for a in summed], [order[a] for a in shared], side)
            wanted.append((source, layout))
    for _ in range(2):  # making one operand takes time in which the other lives
        for value, layout in wanted:
            frame.memory(value, layout)
    frame.results(op)


def _untransposed(frame: Frame, value: Value) -> tuple[Value, list[int]]:
    """The array behind transposes of it, and its axis for each axis of the value."""
    order = list(range(len(value.shape)))
    while value.maker is not None and value.maker.name == "transpose" and value not in frame.array:
        order = [value.maker.params["permutation"][axis] for axis in order]
        value = value.maker.ins[0]
    return value, order


def _layout(value: Value, summed: list[int], shared: list[int], side: int) -> str:
    """The order of its axes, those of one element left out, in which a product reads its operand."""
    keep = [axis for axis in range(len(value.shape)) if value.shape[axis] != 1]
    summed, shared = [a for a in summed if a in keep], [a for a in shared if a in keep]
    free = [axis for axis in keep if axis not in shared and axis not in summed]
    left, right = [*shared, *free, *summed], [*shared, *summed, *free]
    if keep == (left if side == 0 else right) or (keep == left and len(free) < 2):
        return NATURAL
    return str(left if side == 0 else right)


def _update(frame: Frame, op: Op):
    """Writes into its first operand where nobody reads that again."""
    target = frame.memory(op.ins[0]) if op.ins[0] is not None else None
    for value in op.ins[1:]:
        if value is not None:
            frame.touch(value) if op.name == "dynamic_update_slice" else frame.memory(value)
    frame.results(op)
    if target is not None:
        frame.array[op.outs[0]].heir_of = [target]


def _random(frame: Frame, op: Op):
    """Random bits count through places: the counters are constant and have the size of one key's bits. Threefry makes
    two words for each place; whoever reads the bits combines them."""
    counters = 4 * math.prod(op.params["shape"])
    frame.life.keep(counters, "counters", str(op.params["shape"]))
    frame.operands(op.ins)
    frame.array |= {out: frame.life.new(2 * out.bytes, op.name, out.text) for out in op.outs}


def _loop(frame: Frame, op: Op):
    """A scan: what it carries has one place from its start to its end, what it stacks too; operands stay."""
    consts, carried = op.params["num_consts"], op.params["num_carry"]
    used = [True] * carried + [bool(frame.readers.get(out)) or out in frame.program.outputs
                               for out in op.outs[carried:]]
    body = op.bodies[0].needed(used)
    operands = frame.operands(op.ins)
    for array in operands:
        if array is not None and frame.life.depth == 0 and array.origin == "scan":
            array.saved = True
    stacked = [frame.life.filled(out) if keep else None
               for out, keep in zip(op.outs[carried:], used[carried:], strict=True)]
    _turn(frame, body, operands, range(consts, consts + carried), op.outs[:carried],
          [v for v in body.outputs[carried:] if v is not None], op.params["length"])
    for array in (*operands[:consts], *operands[consts + carried:], *stacked):
        if array is not None:
            array.read(frame.life.step)
    frame.array |= {out: array for out, array in zip(op.outs[carried:], stacked, strict=True) if array is not None}


def _while(frame: Frame, op: Op):
    skip = op.params["cond_nconsts"]
    operands = frame.operands(op.ins)[skip:]
    _turn(frame, op.bodies[0], operands, range(op.params["body_nconsts"], len(operands)), op.outs, [])
    for array in operands:
        if array is not None:
            array.read(frame.life.step)


def _turn(frame: Frame, body: Program, operands: list, carry: range, outs: list[Value], early: list[Value],
          length: int = 1):
    """The body of a loop, once. carry: the operands that are carried; those behind them are sliced."""
    life = frame.life
    inputs: list[Array | None] = list(operands)
    places = []
    for number in carry:
        place = life.new(body.inputs[number].bytes, "carry", body.inputs[number].text)
        if operands[number] is not None:
            place.heir_of = [operands[number]]
        inputs[number] = place
        places.append(place)
    life.step += 1
    life.depth += 1
    life.turns *= length
    inner = run(life, body, inputs, early, range(carry.stop, len(operands)))
    life.depth -= 1
    life.turns //= length
    made = []
    for value, place in zip(body.outputs, places, strict=False):
        array = None if value is None else inner.memory(value)
        if array is not None and array is not place:
            made.append((array, array.outlives(place), place))
    for array, free, place in made:
        if array.owned and free and array.bytes == place.bytes and array not in places:
            array.owned = False  # written where the old value was
        array.read(life.step)
    for value in early:
        inner.touch(value)
    for place, out in zip(places, outs, strict=True):
        place.read(life.step)
        frame.array[out] = place
    life.step += 1


def _branches(frame: Frame, op: Op):
    operands = frame.operands(op.ins)
    outs = [frame.life.new(out.bytes, op.name, out.text) for out in op.outs]
    for branch in op.bodies:
        inner = run(frame.life, branch, operands[1:])
        for value, out in zip(branch.outputs, outs, strict=True):
            array = None if value is None else inner.memory(value)
            if array is not None and array.owned and array.first >= out.first and array not in operands:
                array.owned = False  # made in the place of the result
        frame.life.step += 1
    for array in (*operands, *outs):
        if array is not None:
            array.read(frame.life.step)
    frame.array |= dict(zip(op.outs, outs, strict=True))


RULES: dict[str, Rule] = {"dot_general": _product, "scan": _loop, "while": _while, "cond": _branches,
                          "random_bits": _random} | dict.fromkeys(IN_PLACE, _update)
