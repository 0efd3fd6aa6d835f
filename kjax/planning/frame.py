"""What a value of a running program stands on: fusion, by kinds of primitive.

Operations fall into three kinds. *Views* are the same bytes. *Fusible* ones never run by themselves: whoever reads
their result computes it on the way, from the arrays below; only a reader that needs it in memory (a matrix product, a
reduction, a loop, a call, an output) makes it exist, each product in the layout it asks for. Everything else takes its
operands from memory and makes new arrays. Arrays live from the step that makes them to the last that reads them.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from kjax.planning.arrays import Array, Timeline
from kjax.planning.program import VIEWS, Op, Program, Value

# Too dear to compute once per reader (XLA's IsExpensive): with several readers the result is kept.
COSTLY = {"exp", "exp2", "log", "log1p", "expm1", "logistic", "tanh", "erf", "erf_inv", "sin", "cos", "pow", "rsqrt",
          "sqrt", "cbrt", "rem", "div"}
FUSIBLE = COSTLY | {
    "add", "sub", "mul", "neg", "max", "min", "abs", "sign", "floor", "ceil", "round", "square", "integer_pow",
    "is_finite", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "select_n", "clamp", "add_any",
    "convert_element_type", "broadcast_in_dim", "transpose", "iota", "slice", "dynamic_slice", "pad", "rev",
    "concatenate", "shift_left", "shift_right_logical", "shift_right_arithmetic", "nextafter", "empty", "empty2",
    "full", "split", "stack", "unstack"}
NATURAL = ""  # the layout of an array whose last axis is the fastest

Rule = Callable[["Frame", Op], None]  # what an operation does to the arrays


class Frame:
    """A program being executed: what each of its values stands on."""

    def __init__(self, life: Timeline, program: Program, inputs: Sequence[Array | None], sliced: range):
        self.life, self.program = life, program
        self.array: dict[Value, Array | None] = dict(zip(program.inputs, inputs, strict=True))
        self.stack = {program.inputs[i]: self.array.pop(program.inputs[i]) for i in sliced}
        self.made: dict[tuple[Value, str], Array] = {}
        self.readers: dict[Value, set[int]] = {}
        for number, op in enumerate(program.ops):
            for value in op.ins:
                if value is not None:
                    self.readers.setdefault(value, set()).add(number)
        self.views: dict[Value, Value] = {op.outs[0]: op.ins[0] for op in program.ops
                                          if op.name in VIEWS and op.outs and op.ins}

    # What a value is.

    def base(self, value: Value) -> Value:
        while value in self.views and self.views[value] is not None:
            value = self.views[value]
        return value

    def fusible(self, value: Value) -> bool:
        return value not in self.array and value.maker is not None and value.maker.name in FUSIBLE

    def _number_of_readers(self, value: Value) -> int:
        """Through views; the program's outputs are not readers."""
        total = 0
        for number in self.readers.get(value, ()):
            op = self.program.ops[number]
            total += sum(map(self._number_of_readers, op.outs)) if op.name in VIEWS else 1
        return total

    def _constant(self, value: Value) -> bool:
        """Whether it follows from no array: loops take such comparisons out of them."""
        value = self.base(value)
        return self.fusible(value) and all(v is None or self._constant(v) for v in value.maker.ins)

    # Reading.

    def touch(self, value: Value | None) -> set[Array]:
        """The arrays that a fused reader of the value reads now."""
        found: set[Array] = set()
        seen: set[Value] = set()

        def visit(value):
            value = self.base(value)
            if value in seen:
                return
            seen.add(value)
            if value in self.array:
                if self.array[value] is not None:
                    found.add(self.array[value])
            elif value in self.stack:
                found.update({self.stack[value]} - {None})
            elif self.fusible(value):
                if costly(value.maker) and self._number_of_readers(value) > 1:
                    found.add(self.memory(value))
                elif self.life.depth and value.text.startswith("bool") and self._constant(value):
                    self.life.keep(value.bytes, "mask", value.text)
                else:
                    for operand in value.maker.ins:
                        if operand is not None:
                            visit(operand)

        if value is not None:
            visit(value)
        for array in found:
            array.read(self.life.step)
        return found

    def memory(self, value: Value, layout: str = NATURAL) -> Array | None:
        """The array that holds the value in a layout, made now if there is none."""
        value = self.base(value)
        if value in self.array and layout == NATURAL:
            if (array := self.array[value]) is not None:
                array.read(self.life.step)
            return array
        if (value, layout) not in self.made:
            if value in self.array:
                below = {self.array[value]} - {None}
            elif value in self.stack:
                below = {self.stack[value]} - {None}
            elif self.fusible(value):
                # Computed one step before its reader, whose result may not lie on it.
                below = set().union(*(self.touch(v) for v in value.maker.ins if v is not None))
            else:
                return None
            for array in below:
                array.read(self.life.step)
            origin = value.maker.name if value.maker is not None else "slice" if value in self.stack else "copy"
            made = self.life.new(value.bytes, origin, value.text)
            made.fused = layout == NATURAL
            if layout == NATURAL and value.maker is not None:
                # A product's result is a matrix, seen through a view, and cannot be written over.
                made.heir_of = [v for v in below if v.text == value.text and v.origin != "dot_general"]
            self.made[value, layout] = made
            self.life.step += 1
        array = self.made[value, layout]
        array.read(self.life.step)
        return array

    def operands(self, values: Iterable[Value | None]) -> list[Array | None]:
        """All of them in memory at once: the first still lives when the last is made."""
        for value in (values := list(values)):
            if value is not None:
                self.memory(value)
        return [None if value is None else self.memory(value) for value in values]

    # Running.

    def execute(self, rules: Mapping[str, Rule], otherwise: Rule, early: Collection[Value]):
        """One pass over the operations. early: outputs that are written, to memory of the reader's, once known."""
        for op in self.program.ops:
            if op.name in VIEWS:
                pass
            elif op.name in FUSIBLE:
                if any(out in early for out in op.outs):
                    for out in op.outs:
                        self.touch(out)
                    self.life.step += 1
            else:
                rules.get(op.name, otherwise)(self, op)
                self.life.step += 1

    def results(self, op: Op):
        for out in op.outs:
            self.array[out] = self.life.new(out.bytes, op.name, out.text)


def costly(op: Op) -> bool:
    """Division by a number or by a broadcast array is a product with its inverse."""
    if op.name != "div":
        return op.name in COSTLY
    divisor = op.ins[1]
    while divisor is not None and divisor.maker is not None and divisor.maker.name in VIEWS:
        divisor = divisor.maker.ins[0]
    if divisor is None or divisor.shape == ():
        return False
    return divisor.maker is None or divisor.maker.name != "broadcast_in_dim"
