"""What the program of a fast network should not contain, by its text.

    python -m tests.tools.hlo_surprises FILE

The file is the text of a compiled program, as XLA_FLAGS=--xla_dump_to=DIR leaves it.
"""

import collections
import dataclasses
import functools
import math
import pathlib
import re
import sys
from collections.abc import Sequence

from referee_jax.performance import hlo

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*))?")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_PERMUTATION = re.compile(r"dimensions=\{([\d,]*)\}")
LARGE = 10_000  # elements: an image of 64 x 64 pixels has 12,288
FLOAT32 = "product in float32"
_FORWARDED = ("bitcast", "reshape", "convert", "copy-done")  # neither work nor a new order of the bytes


@dataclasses.dataclass(frozen=True)
class Surprise:
    """Instructions of one kind that should not be there.

    Attributes:
        count: how many, those of a loop times its trips.
        amount: FLOPs of products, else elements, of all of them.
        most: the shape that has the largest part of the amount.
        share: of products in float32, their part of all products' FLOPs.
    """

    kind: str
    count: int
    amount: float
    most: str
    share: float | None = None

    def line(self) -> str:
        """One line for people."""
        much = f"{self.amount:.3g} elements" if self.share is None else f"{self.share:.2%} of all products' work"
        return f"{self.count} x {self.kind}, {much}, most of it {self.most}"


def surprises(text: str) -> list[Surprise]:
    """Instructions that a fast program in bfloat16 should not contain.

    These are products of float32, gathers and scatters of LARGE arrays, and large arrays that are
    reordered for a convolution or product alone. `text` is `compiled.as_text()` or
    `lowered.as_text("hlo")`; raises ValueError for anything else.
    """
    bodies, entry = hlo.computations(text)
    parsed = {name: {x.name: x for x in map(_parse, lines)} for name, lines in bodies.items()}
    times, callers = _runs(bodies, parsed, entry)
    rows: dict[str, list[tuple[str, int, float]]] = {}  # kind -> shape, count, amount
    work, counted = 0.0, set()

    def note(kind: str, x: _Instruction, count: int, amount: float) -> None:
        rows.setdefault(kind, []).append((x.plain, count, count * amount))

    for name, body in parsed.items():
        count = times[name]
        for x in body.values() if count else ():
            if x.op in ("dot", "convolution"):
                flops = _flops(x, body)
                work += count * flops
                kinds = [body[operand].array[0] for operand in x.operands[:2] if operand in body]
                if kinds == ["f32", "f32"]:
                    note(FLOAT32, x, count, flops)
                for operand in x.operands[:2]:
                    caller, source = _source(name, operand, parsed, callers)
                    if source and _is_reordered(source, parsed[caller]) and (caller, source.name) not in counted:
                        counted.add((caller, source.name))
                        note(f"{source.op} for a product", source, times[caller], source.size)
            elif x.op in ("gather", "scatter") and x.size >= LARGE:
                note(x.op, x, count, x.size)
    return [_surprise(kind, rows[kind], work) for kind in sorted(rows)]


def _surprise(kind: str, rows: Sequence[tuple[str, int, float]], work: float) -> Surprise:
    shapes = collections.Counter()
    for shape, _, amount in rows:
        shapes[shape] += amount
    ((most, _),) = shapes.most_common(1)
    amount = sum(shapes.values())
    return Surprise(kind, sum(count for _, count, _ in rows), amount, most, amount / work if kind == FLOAT32 else None)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One line of a program; `array` is dtype, shape and order of the axes of its (first) result."""

    name: str
    op: str
    operands: tuple[str, ...]
    array: tuple[str, tuple[int, ...], str]
    line: str

    @property
    def size(self) -> int:
        return math.prod(self.array[1])

    @property
    def plain(self) -> str:
        return f"{self.array[0]}[{','.join(map(str, self.array[1]))}]"


def _parse(line: str) -> _Instruction:
    name, rest = hlo.INSTRUCTION.match(line).group(2, 3)
    start = _closed(rest) if rest.startswith("(") else rest.index(" ")  # behind one type, or several in brackets
    dtype, shape, order = match.groups() if (match := _ARRAY.search(rest[:start])) else ("", "", "")
    op, _, tail = rest[start:].strip().partition("(")
    inside = tail[: _closed("(" + tail) - 2]
    operands = re.findall(r"%([\w.\-]+)", inside) or [part.split()[-1] for part in inside.split(",") if part.split()]
    return _Instruction(name, op, tuple(operands), (dtype, _numbers(shape), order or ""), line)


def _closed(text: str) -> int:
    """Index behind the bracket that closes the one at the beginning."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(",") if x)


def _runs(
    bodies: dict[str, list[str]], parsed: dict[str, dict[str, _Instruction]], entry: str
) -> tuple[dict[str, int], dict[str, tuple[str, _Instruction]]]:
    """How often each computation runs, all branches included; of a fused one, its computation and fusion."""
    times, callers = dict.fromkeys(bodies, 0), {}

    def run(name: str, count: int) -> None:
        times[name] += count
        for x in parsed[name].values():
            trips = 1
            if loop := hlo.LOOP.search(x.line):
                trips = hlo.trips_of(x.line, bodies[loop[1]]) or 1
            callees = _CALLED.findall(x.line)
            if branches := hlo.BRANCHES.search(x.line):
                callees += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
            for callee in callees:
                if x.op == "fusion":
                    callers[callee] = name, x
                run(callee, count * trips)

    run(entry, 1)
    return times, callers


def _flops(x: _Instruction, body: dict[str, _Instruction]) -> float:
    """FLOPs of a product or convolution, without those on zeros that pad or dilate an input."""
    left, right = (body[operand].array[1] for operand in x.operands[:2])
    if x.op == "dot":
        return 2.0 * x.size * math.prod(left[axis] for axis in _numbers(_CONTRACTED.search(x.line)[1]))
    lefts, rights, outs = _LABELS.search(x.line).groups()
    window = dict(field.split("=") for field in match[1].split()) if (match := _WINDOW.search(x.line)) else {}
    defaults = {"pad": "0_0", "stride": "1", "lhs_dilate": "1", "rhs_dilate": "1"}
    fields = [window[name].split("x") if name in window else [x] * (len(rights) - 2) for name, x in defaults.items()]
    pairs = 1
    for axis, (pad, *steps) in enumerate(zip(*fields, strict=True)):
        lengths = [
            shape[labels.index(str(axis))] for shape, labels in ((left, lefts), (right, rights), (x.array[1], outs))
        ]
        pairs *= _pairs(*lengths, int(pad.split("_")[0]), *map(int, steps))
    free = math.prod(x.array[1][outs.index(label)] for label in "bf")
    return 2.0 * free * right[rights.index("i")] * pairs


@functools.cache
def _pairs(length: int, taps: int, out: int, pad: int, stride: int, lhs_dilation: int, rhs_dilation: int) -> int:
    """Pairs of an output and a tap, along one axis of a convolution, that meet an element of the input."""
    positions = (o * stride + tap * rhs_dilation - pad for o in range(out) for tap in range(taps))
    return sum(0 <= x <= (length - 1) * lhs_dilation and x % lhs_dilation == 0 for x in positions)


def _source(
    computation: str,
    name: str,
    parsed: dict[str, dict[str, _Instruction]],
    callers: dict[str, tuple[str, _Instruction]],
) -> tuple[str, _Instruction | None]:
    """The computation and instruction that an operand comes from, looking through fusions and _FORWARDED ones."""
    while True:
        x = parsed[computation].get(name)
        if x is None:
            return computation, None
        if x.op == "parameter" and computation in callers:
            computation, call = callers[computation]
            name = call.operands[int(re.search(r"parameter\((\d+)\)", x.line)[1])]
        elif x.op == "fusion":
            computation = _CALLED.search(x.line)[1]
            name = next(y.name for y in parsed[computation].values() if y.line.lstrip().startswith("ROOT "))
        elif x.op in _FORWARDED:
            name = x.operands[0]
        else:
            return computation, x


def _is_reordered(x: _Instruction, body: dict[str, _Instruction]) -> bool:
    """Whether the instruction only changes the order in memory of a large array."""
    if x.size < LARGE:
        return False
    if x.op == "transpose":
        axes = _numbers(_PERMUTATION.search(x.line)[1])
        return axes != tuple(range(len(axes)))
    return x.op == "copy" and x.operands[0] in body and x.array[2] != body[x.operands[0]].array[2]


if __name__ == "__main__":
    print("\n".join(surprise.line() for surprise in surprises(pathlib.Path(sys.argv[1]).read_text())))
