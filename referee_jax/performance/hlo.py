"""What the text of a compiled program says: its compiler's cycles, whether devices talk, and what a fast program has not.

XLA for TPUs writes `estimated_cycles` beside most instructions (fusions, convolutions, reductions). `cycles` adds them, a loop's
body as often as it is run, of a branch the dearest side. It is the compiler's estimate, not a measurement: transfers that overlap
with work count nothing, nor does what has no estimate (custom calls). There, products of matrices are written as convolutions.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Sequence

_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_LOOP = re.compile(r"\bwhile\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bconditional\(.*branch_computations=\{([^}]*)\}")
_SIDES = re.compile(r"\bconditional\(.*true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")
_CALL = re.compile(r"\b(?:call|async-start)\(.*(?:to_apply|calls)=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COMPARED = re.compile(r"\bcompare\(([^)]*)\), direction=(LT|GT)")
_CONSTANT = re.compile(r"\bs32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*))?")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_PERMUTATION = re.compile(r"dimensions=\{([\d,]*)\}")
LARGE = 10_000  # elements: an image of 64 x 64 pixels has 12,288
FLOAT32 = "product in float32"
_HANDED_ON = ("bitcast", "reshape", "convert", "copy-done")  # what is neither work nor a new order of the bytes


@dataclasses.dataclass(frozen=True)
class Cycles:
    """An estimate, and the names of the loops whose number of trips the program does not say: they were counted once."""

    total: int
    uncounted: tuple[str, ...]


def collectives(text: str) -> list[str]:
    """The instructions by which devices exchange data, in order."""
    return _COLLECTIVE.findall(text)


def cycles(text: str) -> Cycles:
    """The estimated cycles of a program, from `compiled.as_text()`. ValueError for what is not the text of one."""
    bodies, entry = _computations(text)
    found: dict[str, int] = {}
    uncounted: list[str] = []

    def of(name: str) -> int:
        if name not in found:
            found[name] = sum(instruction(line) for line in bodies[name])
        return found[name]

    def instruction(line: str) -> int:
        own = sum(map(int, _CYCLES.findall(line)))
        if loop := _LOOP.search(line):
            trips = _trips(line, bodies[loop[1]])
            if trips is None:
                uncounted.append(loop[2])
            return own + (1 if trips is None else trips) * (of(loop[1]) + of(loop[2]))
        if branches := _BRANCHES.search(line):
            return own + max(of(name.strip().lstrip("%")) for name in branches[1].split(","))
        if sides := _SIDES.search(line):
            return own + max(of(sides[1]), of(sides[2]))
        # A fusion's estimate, which stands at its call, is of all that it contains.
        called = _CALL.search(line)
        return own + (of(called[1]) if called and not own else 0)

    return Cycles(of(entry), tuple(uncounted))


@dataclasses.dataclass(frozen=True)
class Surprise:
    """Instructions of one kind that should not be there.

    `count` and `amount` are of all of them, loops as often as they are run; the amount is floating-point operations of products,
    else elements. `most` is the shape with the largest part of it. `share`, of products, is that of all products' operations.
    """

    kind: str
    count: int
    amount: float
    most: str
    share: float | None = None

    def line(self) -> str:
        """For reading."""
        much = f"{self.amount:.3g} elements" if self.share is None else f"{self.share:.2%} of all products' work"
        return f"{self.count} x {self.kind}, {much}, most of it {self.most}"


def surprises(text: str) -> list[Surprise]:
    """What a fast program in bfloat16 does not have, from `compiled.as_text()` or `lowered.as_text("hlo")`.

    That is products of float32, gathers and scatters of LARGE arrays, and large arrays that are put into another order for a
    convolution or product alone. ValueError for what is not the text of a program.
    """
    bodies, entry = _computations(text)
    parsed = {name: {x.name: x for x in map(_parse, lines)} for name, lines in bodies.items()}
    times, callers = _runs(bodies, parsed, entry)
    found: dict[str, list[tuple[str, int, float]]] = {}  # kind -> shape, how often, how much in all
    work, moved = 0.0, set()

    def note(kind: str, x: _Instruction, often: int, amount: float) -> None:
        found.setdefault(kind, []).append((x.plain, often, often * amount))

    for name, body in parsed.items():
        often = times[name]
        for x in body.values() if often else ():
            if x.op in ("dot", "convolution"):
                flops = _flops(x, body)
                work += often * flops
                kinds = [body[operand].array[0] for operand in x.operands[:2] if operand in body]
                if kinds == ["f32", "f32"]:
                    note(FLOAT32, x, often, flops)
                for operand in x.operands[:2]:
                    where, source = _source(name, operand, parsed, callers)
                    if source and _is_reordered(source, parsed[where]) and (where, source.name) not in moved:
                        moved.add((where, source.name))
                        note(f"{source.op} for a product", source, times[where], source.size)
            elif x.op in ("gather", "scatter") and x.size >= LARGE:
                note(x.op, x, often, x.size)
    return [_surprise(kind, found[kind], work) for kind in sorted(found)]


def _surprise(kind: str, rows: Sequence[tuple[str, int, float]], work: float) -> Surprise:
    shapes = collections.Counter()
    for shape, _, amount in rows:
        shapes[shape] += amount
    ((most, _),) = shapes.most_common(1)
    amount = sum(shapes.values())
    return Surprise(kind, sum(often for _, often, _ in rows), amount, most, amount / work if kind == FLOAT32 else None)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One line: `array` is the kind, lengths and order of axes of its (first) result."""

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
    name, rest = _INSTRUCTION.match(line).group(2, 3)
    start = _closed(rest) if rest.startswith("(") else rest.index(" ")  # a type, or several in brackets
    kind, shape, order = found.groups() if (found := _ARRAY.search(rest[:start])) else ("", "", "")
    op, _, tail = rest[start:].strip().partition("(")
    inside = tail[: _closed("(" + tail) - 2]
    operands = re.findall(r"%([\w.\-]+)", inside) or [part.split()[-1] for part in inside.split(",") if part.split()]
    return _Instruction(name, op, tuple(operands), (kind, _numbers(shape), order or ""), line)


def _closed(text: str) -> int:
    """Where the bracket that a text begins with is closed; behind it."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    return len(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(",") if x)


def _runs(
    bodies: dict[str, list[str]], parsed: dict[str, dict[str, _Instruction]], entry: str
) -> tuple[dict[str, int], dict[str, tuple[str, _Instruction]]]:
    """How often each computation is run, of branches all; and of a fused one, who fuses it."""
    times, callers = dict.fromkeys(bodies, 0), {}

    def run(name: str, often: int) -> None:
        times[name] += often
        for x in parsed[name].values():
            trips = 1
            if loop := _LOOP.search(x.line):
                trips = _trips(x.line, bodies[loop[1]]) or 1
            called = _CALLED.findall(x.line)
            if branches := _BRANCHES.search(x.line):
                called += [one.strip().lstrip("%") for one in branches[1].split(",")]
            for one in called:
                if x.op == "fusion":
                    callers[one] = name, x
                run(one, often * trips)

    run(entry, 1)
    return times, callers


def _flops(x: _Instruction, body: dict[str, _Instruction]) -> float:
    """Floating-point operations; neither those with what pads an input nor those with what dilates it."""
    left, right = (body[operand].array[1] for operand in x.operands[:2])
    if x.op == "dot":
        return 2.0 * x.size * math.prod(left[axis] for axis in _numbers(_CONTRACTED.search(x.line)[1]))
    lefts, rights, outs = _LABELS.search(x.line).groups()
    window = dict(field.split("=") for field in found[1].split()) if (found := _WINDOW.search(x.line)) else {}
    axes = len(rights) - 2
    given = lambda name, default: window[name].split("x") if name in window else [default] * axes
    each = zip(
        given("pad", "0_0"), given("stride", "1"), given("lhs_dilate", "1"), given("rhs_dilate", "1"), strict=True
    )
    pairs = 1
    for axis, (pad, *steps) in enumerate(each):
        lengths = [
            shape[labels.index(str(axis))] for shape, labels in ((left, lefts), (right, rights), (x.array[1], outs))
        ]
        pairs *= _pairs(*lengths, int(pad.split("_")[0]), *map(int, steps))
    free = math.prod(x.array[1][outs.index(label)] for label in "bf")
    return 2.0 * free * right[rights.index("i")] * pairs


@functools.cache
def _pairs(length: int, taps: int, out: int, pad: int, stride: int, dilated: int, apart: int) -> int:
    """Along one axis of a convolution, the pairs of a place of the result and a tap that meet a number of the input."""
    places = (o * stride + tap * apart - pad for o in range(out) for tap in range(taps))
    return sum(0 <= place <= (length - 1) * dilated and place % dilated == 0 for place in places)


def _source(
    where: str, name: str, parsed: dict[str, dict[str, _Instruction]], callers: dict[str, tuple[str, _Instruction]]
) -> tuple[str, _Instruction | None]:
    """What makes an operand, and in which computation: through fusions, and what only hands it on."""
    while True:
        x = parsed[where].get(name)
        if x is None:
            return where, None
        if x.op == "parameter" and where in callers:
            where, call = callers[where]
            name = call.operands[int(re.search(r"parameter\((\d+)\)", x.line)[1])]
        elif x.op == "fusion":
            where = _CALLED.search(x.line)[1]
            name = next(y.name for y in parsed[where].values() if y.line.lstrip().startswith("ROOT "))
        elif x.op in _HANDED_ON:
            name = x.operands[0]
        else:
            return where, x


def _is_reordered(x: _Instruction, body: dict[str, _Instruction]) -> bool:
    """Whether a large array only has its bytes put into another order."""
    if x.size < LARGE:
        return False
    if x.op == "transpose":
        axes = _numbers(_PERMUTATION.search(x.line)[1])
        return axes != tuple(range(len(axes)))
    return x.op == "copy" and x.operands[0] in body and x.array[2] != body[x.operands[0]].array[2]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Name -> lines of instructions, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif _INSTRUCTION.match(line):
            lines.append(line)
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no entry")
    return bodies, entry


def _trips(loop: str, condition: Sequence[str]) -> int | None:
    """How often a loop is run: as XLA says, or, of a count from zero by one (as all of lax.scan), where it ends."""
    if known := _KNOWN_TRIPS.search(loop):
        return int(known[1])
    constants = {found[2]: int(limit[1]) for line in condition
                 if (found := _INSTRUCTION.match(line)) and (limit := _CONSTANT.search(line))}  # fmt: skip
    for line in condition:
        if compared := _COMPARED.search(line):
            limits = [constants[name] for name in re.findall(r"%?([\w.\-]+)", compared[1]) if name in constants]
            return limits[0] if len(limits) == 1 else None
    return None
