"""A traced function as a flat list of operations: calls inlined, loops of one turn unrolled, equal ones merged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from jax.extend import core

VIEWS = {"reshape", "squeeze", "expand_dims", "bitcast_convert_type", "stop_gradient", "name", "copy", "copy_p",
         "optimization_barrier", "reduce_precision", "sharding_constraint", "pvary", "pcast"}
LOOPS = {"scan", "while", "cond"}


class Value:
    """An array of a program: its bytes, its shape, and the operation that makes it (None: an input or a constant)."""

    __slots__ = ("bytes", "shape", "text", "maker")

    def __init__(self, aval, maker: "Op | None" = None):
        self.shape, self.maker = tuple(getattr(aval, "shape", ())), maker
        self.bytes = nbytes(aval)
        self.text = aval.str_short() if hasattr(aval, "str_short") else str(aval)


@dataclass(eq=False)
class Op:
    """One operation; ins may hold None for a literal. bodies: the programs of a loop or of a cond's branches."""

    name: str
    ins: list[Value | None]
    params: dict
    outs: list[Value] = field(default_factory=list)
    bodies: list["Program"] = field(default_factory=list)


@dataclass(eq=False)
class Program:
    """inputs include the constants; outputs may hold None for a literal."""

    inputs: list[Value]
    outputs: list[Value | None]
    ops: list[Op]

    def needed(self, used: Sequence[bool]) -> "Program":
        """Without what only unused outputs need; those become None."""
        outputs = [v if keep else None for v, keep in zip(self.outputs, used, strict=True)]
        alive, ops = {v for v in outputs if v is not None}, []
        for op in reversed(self.ops):
            if any(out in alive for out in op.outs):
                alive.update(v for v in op.ins if v is not None)
                ops.append(op)
        return Program(self.inputs, outputs, ops[::-1])


def nbytes(aval) -> int:
    """A typed random key holds two 32-bit words; its dtype's itemsize says so."""
    dtype, shape = getattr(aval, "dtype", None), getattr(aval, "shape", ())
    return 0 if dtype is None else math.prod(shape) * dtype.itemsize


def flatten(jaxpr: core.Jaxpr, merge: bool = True) -> Program:
    """merge: a loop of one turn is unrolled and what a checkpoint recomputes in it is found equal to what was computed
    before, as by a compiler that drops optimisation barriers."""
    return _Flattener(merge).program(jaxpr)


class _Flattener:
    def __init__(self, merge: bool):
        self.merge = merge

    def program(self, jaxpr) -> Program:
        inputs = [Value(var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)]
        program = Program(inputs, [], [])
        seen: dict = {}
        n = len(jaxpr.constvars)
        program.outputs = self._run(jaxpr, inputs[:n], inputs[n:], program.ops, seen)
        return program

    def _run(self, jaxpr, constants, arguments, ops: list[Op], seen: dict) -> list[Value | None]:
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))

        def read(var):
            return None if isinstance(var, core.Literal) else env[var]

        for eqn in jaxpr.eqns:
            ins = [read(var) for var in eqn.invars]
            body, constants = called(eqn)
            if body is not None and len(body.invars) == len(ins):
                filled = [v if v is not None else
                          seen.setdefault(("literal", str(var), str(inner.aval)), Value(inner.aval))
                          for v, var, inner in zip(ins, eqn.invars, body.invars, strict=True)]
                outs = self._run(body, [Value(var.aval) for var in body.constvars], filled, ops, seen)
            elif eqn.primitive.name == "scan" and eqn.params["length"] == 1 and self.merge:
                outs = self._unroll(eqn, ins, ops, seen)
            else:
                outs = self._append(eqn, ins, ops, seen)
            for var, value in zip(eqn.outvars, outs, strict=True):
                env[var] = value if value is not None else Value(var.aval)
        return [read(var) for var in jaxpr.outvars]

    def _append(self, eqn, ins, ops, seen) -> list[Value]:
        name = eqn.primitive.name
        key = None
        if name not in LOOPS and "call" not in name:
            literals = tuple(str(var) for var in eqn.invars if isinstance(var, core.Literal))
            key = (name, tuple(map(id, ins)), literals, str(sorted(eqn.params.items(), key=lambda item: item[0])))
            if key in seen:
                return seen[key]
        op = Op(name, ins, dict(eqn.params))
        op.outs = [Value(var.aval, op) for var in eqn.outvars]
        if name == "scan":
            op.bodies = [self.program(eqn.params["jaxpr"].jaxpr)]
            op.params |= counts(eqn)
        elif name == "while":
            op.bodies = [self.program(eqn.params["body_jaxpr"].jaxpr)]
        elif name == "cond":
            op.bodies = [self.program(branch.jaxpr) for branch in eqn.params["branches"]]
        ops.append(op)
        if key is not None:
            seen[key] = op.outs
        return op.outs

    def _unroll(self, eqn, ins, ops, seen) -> list[Value | None]:
        """The single turn of a loop: slices and stacked results are views."""
        body, many = eqn.params["jaxpr"].jaxpr, counts(eqn)
        whole = many["num_consts"] + many["num_carry"]

        def view(value, var):
            below = value.maker.ins[0] if value.maker is not None and value.maker.name == "reshape" else None
            if below is not None and below.text == var.aval.str_short():
                return below  # what the loop before stacked, taken from the stack
            op = Op("reshape", [value], {})
            op.outs = [Value(var.aval, op)]
            ops.append(op)
            key = ("unrolled", id(value), str(var.aval))
            return seen.setdefault(key, op.outs)[0]

        filled = [v if v is not None else Value(var.aval) for v, var in zip(ins, eqn.invars, strict=True)]
        filled = filled[:whole] + [view(v, var) for v, var in
                                   zip(filled[whole:], body.invars[whole:], strict=True)]
        outs = self._run(body, [Value(var.aval) for var in body.constvars], filled, ops, seen)
        carried = many["num_carry"]
        return outs[:carried] + [view(v if v is not None else Value(var.aval), var) for v, var in
                                 zip(outs[carried:], eqn.outvars[carried:], strict=True)]


def called(eqn) -> tuple[core.Jaxpr | None, tuple]:
    """The body of an operation that merely calls it."""
    if eqn.primitive.name in LOOPS:
        return None, ()
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = eqn.params.get(key)
        if body is not None:
            return (body.jaxpr, tuple(body.consts)) if hasattr(body, "jaxpr") else (body, ())
    return None, ()


def counts(eqn) -> dict[str, int]:
    """How many operands of a scan are constants and how many values it carries, told by shape alone.

    What it slices or stacks has one more axis outside than inside; how its parameters say so differs between versions
    of JAX.
    """
    body = eqn.params["jaxpr"].jaxpr
    whole, carried = (sum(len(outer.aval.shape) == len(inner.aval.shape) for outer, inner in zip(*pair, strict=True))
                      for pair in ((eqn.invars, body.invars), (eqn.outvars, body.outvars)))
    return {"num_consts": whole - carried, "num_carry": carried}


def operations(jaxpr: core.Jaxpr) -> float:
    """Multiplications and additions in matrix products: 2 m n k each, loops times their length."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contract)
        elif name == "scan":
            total += params["length"] * operations(params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(operations(branch.jaxpr) for branch in params["branches"])
        elif name == "while":
            total += operations(params["body_jaxpr"].jaxpr)
        elif (body := called(eqn)[0]) is not None:
            total += operations(body)
    return total
