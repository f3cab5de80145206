"""Peak memory of a program, estimated from its jaxpr: no device, no compilation.

    peak_memory.peak(jax.make_jaxpr(fn)(*args).jaxpr)  # arrays or jax.ShapeDtypeStructs

A value lives from the equation that makes it to the last one that reads it; the estimate is the most
bytes that live at once. Three things that XLA does are followed:

- An elementwise operation or a sum of the same operands is computed once, barriers aside.
- Chains of elementwise operations are fused: a value that only one such operation or sum reads is
  never stored, and its operands live on until then.
- The result of an elementwise operation takes the place of an operand that dies with it.

What a compiler decides by itself (order, padding, copies, scratch of convolutions) is not known here;
tests compare with XLA's own figures.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

# Free: rematerialised at each use (layout changes and constants).
_FREE = frozenset(
    "broadcast_in_dim reshape squeeze expand_dims transpose convert_element_type iota copy slice reduce_precision rev "
    "bitcast_convert_type optimization_barrier".split()
)
# Elementwise: computed where the only reader reads it.
_FUSED = _FREE | frozenset(
    "add add_any sub mul neg max min select_n eq ne lt le gt ge and or not xor abs sign integer_pow square floor ceil round "
    "clamp is_finite pad concatenate shift_left shift_right_logical shift_right_arithmetic rem nextafter exp exp2 log log1p "
    "expm1 tanh logistic sin cos tan rsqrt sqrt div pow erf erf_inv cbrt atan2".split()
)
_SUMS = frozenset("reduce_sum reduce_max reduce_min reduce_and reduce_or reduce_prod argmax argmin".split())


@dataclasses.dataclass
class _Op:
    """One equation of a program without calls; `inner` are bytes besides operands and results."""

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    inner: int = 0


@dataclasses.dataclass
class _Flat:
    """A program without calls: values are numbers, `size` their bytes."""

    ops: list[_Op] = dataclasses.field(default_factory=list)
    size: list[int] = dataclasses.field(default_factory=list)
    known: dict[tuple, list[int]] = dataclasses.field(default_factory=dict)  # of constants and elementwise results

    def value(self, aval: Any) -> int:
        """The number of a new value."""
        self.size.append(size_of(aval))
        return len(self.size) - 1

    def literal(self, atom: core.Literal) -> int:
        """The number of a constant."""
        key = (str(atom.val), str(atom.aval))
        if key not in self.known:
            self.known[key] = [self.value(None)]
        return self.known[key][0]


def size_of(aval: Any) -> int:
    """Bytes of an array or of an abstract one."""
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    # A PRNG key is two words.
    return math.prod(shape) * (8 if dtype is None or not isinstance(dtype, np.dtype) else dtype.itemsize)


def peak(jaxpr: core.Jaxpr) -> int:
    """Bytes that a program needs besides its arguments; its results are included."""
    flat = _Flat()
    arguments = [flat.value(var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)]
    results = _inline(jaxpr, arguments, flat)
    return _sweep(flat, set(arguments), results)


def _inline(jaxpr: core.Jaxpr, arguments: Sequence[int], flat: _Flat) -> list[int]:
    """Adds a program's equations to `flat`, with calls inlined; the numbers of its results."""
    number = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))

    def read(atom: Any) -> int:
        return flat.literal(atom) if isinstance(atom, core.Literal) else number[atom]

    # Rematerialisation leaves calls of which nothing is used; compilers remove them.
    for eqn in (eqn for eqn in jaxpr.eqns if eqn.outvars or eqn.primitive.name != "jit"):
        reads = [read(atom) for atom in eqn.invars]
        name, called = eqn.primitive.name, _called(eqn)
        if called is not None:
            consts = [flat.value(var.aval) for var in called.constvars]
            values = _inline(called, [*consts, *reads], flat)
        elif name == "optimization_barrier":  # a copy: what is computed of it counts as new
            values = [flat.value(var.aval) for var in eqn.outvars]
            flat.ops += [_Op(name, (old,), (new,)) for old, new in zip(reads, values, strict=True)]
        else:
            values = _results(eqn, reads, flat)
        number |= dict(zip(eqn.outvars, values, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _results(eqn: core.JaxprEqn, reads: Sequence[int], flat: _Flat) -> list[int]:
    """The numbers of an equation's results; elementwise ones and sums of the same operands are reused."""
    name = eqn.primitive.name
    key = (name, tuple(reads), str(eqn.params)) if name in _FUSED | _SUMS else None
    if key in flat.known:
        return flat.known[key]
    values = [flat.value(var.aval) for var in eqn.outvars]
    flat.ops.append(_Op(name, tuple(reads), tuple(values), _within(eqn)))
    if key:
        flat.known[key] = values
    return values


def _called(eqn: core.JaxprEqn) -> core.Jaxpr | None:
    """The program of an equation that only calls one."""
    if eqn.primitive.name in ("scan", "while", "cond", "pallas_call"):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            inner = eqn.params[name]
            return inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
    return None


def _within(eqn: core.JaxprEqn) -> int:
    """Bytes that the programs within an equation need."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":  # a turn copies its slices, which have one axis less
        body = params["jaxpr"].jaxpr
        pairs = zip(eqn.invars, body.invars, strict=True)
        return peak(body) + sum(size_of(part.aval) for whole, part in pairs if whole.aval.ndim > part.aval.ndim)
    if name == "while":
        return peak(params["body_jaxpr"].jaxpr)
    if name == "cond":
        return max(peak(branch.jaxpr) for branch in params["branches"])
    return 0


def _sweep(flat: _Flat, arguments: set[int], results: Sequence[int]) -> int:
    """The most bytes at once."""
    readers: list[list[_Op]] = [[] for _ in flat.size]
    for op in flat.ops:
        for value in set(op.reads):
            readers[value].append(op)
    # The stored values that reading each value reads: itself, or the operands that are fused with it.
    behind: list[frozenset[int]] = [frozenset((n,)) for n in range(len(flat.size))]
    last = dict.fromkeys(results, len(flat.ops))
    stored = []
    for at, op in enumerate(flat.ops):
        read = frozenset().union(*(behind[value] for value in op.reads))
        if len(op.makes) == 1 and _is_fused(op, readers[op.makes[0]], op.makes[0] in last):
            behind[op.makes[0]] = read
        else:
            stored.append((at, op))
            last |= {value: max(at, last.get(value, 0)) for value in read}
    last |= {source: len(flat.ops) for value in results for source in behind[value]}
    return _walk(stored, arguments, last, flat)


def _is_fused(op: _Op, readers: Sequence[_Op], is_result: bool) -> bool:
    """Whether an operation's result is computed where it is read, and never stored."""
    if op.name in _FREE:
        return True
    return not is_result and op.name in _FUSED and len(readers) == 1 and readers[0].name in _FUSED | _SUMS


def _walk(stored: Sequence[tuple[int, _Op]], arguments: set[int], last: dict[int, int], flat: _Flat) -> int:
    """The most bytes at once, given where each value is read for the last time."""
    ends: dict[int, list[int]] = {}
    for value, at in last.items():
        if value not in arguments:
            ends.setdefault(at, []).append(value)
    alive, now, most = set(), 0, 0
    for at, op in stored:
        dying = [flat.size[value] for value in ends.get(at, ()) if value in alive]
        new = sum(flat.size[value] for value in op.makes)
        place = min(new, max(dying, default=0)) if op.name in _FUSED else 0
        most = max(most, now + new - place + op.inner)
        unread = sum(flat.size[value] for value in op.makes if value not in last)
        alive.update(op.makes)
        now += new - unread - sum(dying)
    return most
