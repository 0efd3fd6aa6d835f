"""How much memory a traced function needs at its peak, and how many operations it does: read off the jaxpr.

The model of the compiler is simple: calls are inlined; cheap operations (element by element, slices, broadcasts) that
feed only operations which can absorb them are fused and take no memory; everything else takes its outputs' bytes from
where it runs to where it is last read; a cheap operation writes over an operand that dies there; a loop holds its
carry, its stacked outputs and the peak of its body. Values that nobody reads are never computed.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jax.extend import core

# Views of the same bytes, or layouts that a matrix product reads as they are.
VIEWS = {"reshape", "squeeze", "expand_dims", "bitcast_convert_type", "stop_gradient", "name", "copy",
         "optimization_barrier", "reduce_precision", "sharding_constraint", "copy_p", "pvary"}
# Cheap, but too dear to compute once per reader: with several readers the result is kept.
COSTLY = {"exp", "exp2", "log", "log1p", "expm1", "logistic", "tanh", "erf", "erf_inv", "sin", "cos", "pow", "rsqrt",
          "sqrt", "cbrt", "rem", "threefry2x32", "random_bits", "random_unwrap"}
CHEAP = COSTLY | {
    "add", "sub", "mul", "div", "neg", "max", "min", "abs", "sign", "floor", "ceil", "round", "square", "integer_pow",
    "is_finite", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "select_n", "clamp", "add_any",
    "convert_element_type", "broadcast_in_dim", "transpose", "iota", "slice", "dynamic_slice", "pad", "rev",
    "shift_left", "shift_right_logical", "shift_right_arithmetic", "nextafter", "empty", "empty2", "full", "split"}
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin"}
IN_PLACE = {"dynamic_update_slice", "scatter", "scatter-add", "scatter_add", "scatter_max", "scatter_min"}


@dataclass(frozen=True)
class Usage:
    """Bytes of a function: its arguments, and the most that exists beside those that stay.

    saved: bytes that one loop stacks for another to read: under reverse differentiation what the layers keep from the
    forward to the backward pass.  saved_at_peak: those of them that exist then.
    largest: what exists at the peak, as (operation, shape, bytes), the largest first.
    """

    arguments: int
    peak: int  # with the arguments
    saved: int
    saved_at_peak: int
    largest: tuple[tuple[str, str, int], ...]

    @property
    def temporaries(self) -> int:
        return self.peak - self.arguments


def usage(closed: core.ClosedJaxpr, donated: Sequence[bool] = ()) -> Usage:
    """Memory of a traced function; donated marks the flat arguments whose buffers it may take over."""
    program = _flatten(closed.jaxpr)
    donated = list(donated) + [False] * (len(program.inputs) - len(donated))
    own = [var for var, gives in zip(program.inputs, donated, strict=True) if gives]
    arguments = sum(var.bytes for var in program.inputs)
    constants = sum(_bytes(constant) for constant in closed.consts)
    saved = 0
    readers = _readers(program.ops)
    for op in program.ops:
        for out in op.outs[op.params["num_carry"]:] if op.name == "scan" else ():
            if any(reader.name == "scan" for reader in _through_views(out, readers)):
                out.origin = "saved"
                saved += out.bytes
    peak, at = _peak(program, held=own, used=[True] * len(program.outputs))
    rows = sorted(((op, shape, size) for op, shape, size in at if size), key=lambda row: -row[2])
    stay = arguments - sum(var.bytes for var in own)
    return Usage(arguments + constants, stay + constants + peak, saved,
                 sum(size for op, _, size in rows if op == "saved"), tuple(rows))


def operations(closed: core.ClosedJaxpr) -> float:
    """Multiplications and additions in matrix products: 2 m n k each, loops times their length."""
    return _operations(closed.jaxpr)


class _Var:
    """A value of a flattened program."""

    __slots__ = ("bytes", "ndim", "shape", "origin")

    def __init__(self, aval, origin: str):
        self.bytes, self.origin, self.ndim = _bytes(aval), origin, len(getattr(aval, "shape", ()))
        self.shape = aval.str_short() if hasattr(aval, "str_short") else str(aval)


@dataclass
class _Op:
    name: str
    ins: list[_Var]
    outs: list[_Var]
    params: dict


@dataclass
class _Program:
    inputs: list[_Var]
    outputs: list[_Var | None]  # None: a literal
    ops: list[_Op] = field(default_factory=list)


def _bytes(aval) -> int:
    dtype, shape = getattr(aval, "dtype", None), getattr(aval, "shape", ())
    if dtype is None:
        return 0
    # A typed random key holds two 32-bit words; its dtype's itemsize says so.
    return math.prod(shape) * dtype.itemsize


def _inner(eqn) -> core.Jaxpr | None:
    """The body of an operation that merely calls it."""
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = eqn.params.get(key)
        if body is not None:
            return body.jaxpr if hasattr(body, "jaxpr") else body
    return None


def _flatten(jaxpr: core.Jaxpr) -> _Program:
    """The program with all calls inlined."""
    inputs = [_Var(var.aval, "argument") for var in jaxpr.invars]
    program = _Program(inputs, [])

    def run(jaxpr, values):
        env = dict(zip(jaxpr.invars, values, strict=True))
        env |= {var: _Var(var.aval, "constant") for var in jaxpr.constvars}

        def read(var):
            return None if isinstance(var, core.Literal) else env[var]

        for eqn in jaxpr.eqns:
            body = _inner(eqn)
            ins = [read(var) for var in eqn.invars]
            if body is not None and len(body.invars) == len(ins):
                # A literal argument of a call becomes a value of its own, of a few bytes.
                ins = [v if v is not None else _Var(var.aval, "constant")
                       for v, var in zip(ins, body.invars, strict=True)]
                outs = run(body, ins)
                for var, value in zip(eqn.outvars, outs, strict=True):
                    env[var] = value if value is not None else _Var(var.aval, "constant")
                continue
            outs = [_Var(var.aval, eqn.primitive.name) for var in eqn.outvars]
            env |= zip(eqn.outvars, outs, strict=True)
            program.ops.append(_Op(eqn.primitive.name, [v for v in ins if v is not None], outs,
                                   {**eqn.params, **_scan_counts(eqn), "_ins": ins}))
        return [read(var) for var in jaxpr.outvars]

    program.outputs = run(jaxpr, inputs)
    return program


def _scan_counts(eqn) -> dict[str, int]:
    """How many operands of a scan are constants and how many values it carries, told by shape alone.

    What it slices or stacks has one more axis outside than inside; how its parameters say so differs between versions
    of JAX.
    """
    if eqn.primitive.name != "scan":
        return {}
    body = eqn.params["jaxpr"].jaxpr
    whole, carried = (sum(len(outer.aval.shape) == len(inner.aval.shape) for outer, inner in zip(*pair, strict=True))
                      for pair in ((eqn.invars, body.invars), (eqn.outvars, body.outvars)))
    return {"num_consts": whole - carried, "num_carry": carried}


def _peak(program: _Program, held: Iterable[_Var], used: Sequence[bool], lazy: Iterable[_Var] = ()
          ) -> tuple[int, list[tuple[str, str, int]]]:
    """The most bytes that exist at once, and what they are.

    held: inputs that count, and whose memory is free after their last use.  lazy: inputs that are slices of something
    larger, taken where they are first read.  Other inputs belong to the caller.  used: outputs that are wanted.
    """
    wanted = {v for v, keep in zip(program.outputs, used, strict=True) if keep and v is not None}
    ops = _live_ops(program, wanted)
    slices = [_Op("dynamic_slice", [], [var], {"_ins": []}) for var in lazy]
    ops = slices + ops
    absorbed = _absorbed(ops, wanted)

    # Memory that a value stands on: itself, or, for a view or a fused operation, that of its operands.
    roots: dict[_Var, frozenset[_Var]] = {}
    steps = []
    for op in ops:
        below = frozenset().union(*(roots.get(v, frozenset([v])) for v in op.ins)) if op.ins else frozenset()
        if op.name in VIEWS or all(out in absorbed for out in op.outs):
            roots |= dict.fromkeys(op.outs, below)
        else:
            steps.append((op, below))
    last: dict[_Var, int] = {}
    for number, (_, below) in enumerate(steps):
        last |= dict.fromkeys(below, number)
    for var in wanted:
        last |= dict.fromkeys(roots.get(var, frozenset([var])), len(steps))

    live = {var: var.bytes for var in held}
    total = sum(live.values())
    best, at = total, [(var.origin, var.shape, var.bytes) for var in live]
    for number, (op, below) in enumerate(steps):
        dying = [var for var in below if var in live and last[var] == number]
        inside, rows, takes_over = _inside(op, last)
        outs = {var: var.bytes for var in op.outs if var in last}
        size = sum(outs.values())
        # What dies here may be written over by the outputs.
        reuse = min(size, sum(live[var] for var in dying)) if op.name in CHEAP | IN_PLACE else 0
        reuse += sum(live[var] for var in dying if var in takes_over)
        now = total + max(inside, size - reuse) if rows else total + size - reuse
        if now > best:
            best = now
            at = [(var.origin, var.shape, size) for var, size in live.items()]
            at += rows if inside >= size else [(op.name, var.shape, n) for var, n in outs.items()]
        live |= outs
        total += size
        for var in {*dying, *(v for v in outs if last[v] <= number)}:
            total -= live.pop(var)
    return best, at


def _live_ops(program: _Program, wanted: set[_Var]) -> list[_Op]:
    needed, ops = set(wanted), []
    for op in reversed(program.ops):
        if any(out in needed for out in op.outs):
            needed.update(op.ins)
            ops.append(op)
    return ops[::-1]


def _absorbed(ops: list[_Op], wanted: set[_Var]) -> set[_Var]:
    """The results that never exist: cheap ones that only absorbing operations read."""
    readers = _readers(ops)
    absorbed: set[_Var] = set()
    # Backwards, so that a view is known to be absorbed before what it views is judged.
    for op in reversed(ops):
        for out in op.outs:
            behind = list(_through_views(out, readers))
            if op.name in CHEAP and not _reaches(out, readers, wanted) and behind \
                    and all(reader.name in CHEAP | REDUCTIONS | IN_PLACE for reader in behind) \
                    and (op.name not in COSTLY or len(behind) == 1):
                absorbed.add(out)
    return absorbed


def _readers(ops: list[_Op]) -> dict[_Var, list[_Op]]:
    readers: dict[_Var, list[_Op]] = {}
    for op in ops:
        for var in set(op.ins):
            readers.setdefault(var, []).append(op)
    return readers


def _through_views(var: _Var, readers: dict) -> Iterable[_Op]:
    for op in readers.get(var, ()):
        if op.name in VIEWS:
            yield from itertools.chain.from_iterable(_through_views(out, readers) for out in op.outs)
        else:
            yield op


def _reaches(var: _Var, readers: dict, wanted: set[_Var]) -> bool:
    return var in wanted or any(_reaches(out, readers, wanted) for op in readers.get(var, ())
                                if op.name in VIEWS for out in op.outs)


def _inside(op: _Op, last: dict[_Var, int]) -> tuple[int, list, set[_Var]]:
    """The peak while an operation with a body runs, its outputs included; what exists; operands it works in."""
    if op.name == "scan":
        body = _flatten(op.params["jaxpr"].jaxpr)
        consts, carried = op.params["num_consts"], op.params["num_carry"]
        carry = body.inputs[consts:consts + carried]
        stacked = [out for out in op.outs[carried:] if out in last]
        used = [True] * carried + [out in last for out in op.outs[carried:]]
        peak, at = _peak(body, carry, used, body.inputs[consts + carried:])
        rows = [(out.origin, out.shape, out.bytes) for out in stacked] + at
        start = {v for v in op.params["_ins"][consts:consts + carried] if v is not None}
        return peak + sum(out.bytes for out in stacked), rows, start
    if op.name == "while":
        body = _flatten(op.params["body_jaxpr"].jaxpr)
        skip = op.params["body_nconsts"]
        peak, at = _peak(body, body.inputs[skip:], [True] * len(body.outputs))
        return peak, at or [("while", "", 0)], set(op.params["_ins"][op.params["cond_nconsts"] + skip:]) - {None}
    if op.name == "cond":
        runs = [_peak(_flatten(branch.jaxpr), (), [out in last for out in op.outs])
                for branch in op.params["branches"]]
        peak, at = max(runs, key=lambda run: run[0])
        return peak, at or [("cond", "", 0)], set()
    if op.name == "dot_general":
        copies = _copied_operands(op)
        return sum(out.bytes for out in op.outs) + copies, [("dot_general", "operand copies", copies)], set()
    return 0, [], set()


def _copied_operands(op: _Op) -> int:
    """Bytes of the operands that a matrix product must lay out anew: [batch..., free..., contracted...] is read as is,
    so is its transpose."""
    contract, batch = op.params["dimension_numbers"]
    total = 0
    for var, summed, shared in zip(op.params["_ins"], contract, batch, strict=True):
        if var is None:
            continue
        rest = [axis for axis in range(var.ndim) if axis not in shared]
        inner = sorted(summed)
        ends = rest[-len(inner):] == inner or rest[:len(inner)] == inner if inner else True
        if tuple(shared) != tuple(range(len(shared))) or not ends or list(summed) != inner:
            total += var.bytes
    return total


def _operations(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contract)
        elif name == "scan":
            total += params["length"] * _operations(params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(_operations(branch.jaxpr) for branch in params["branches"])
        elif name == "while":
            total += _operations(params["body_jaxpr"].jaxpr)
        elif (body := _inner(eqn)) is not None:
            total += _operations(body)
    return total
