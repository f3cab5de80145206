"""What the text of a compiled program says: the cycles its compiler expects, and whether devices talk to each other.

XLA for TPUs writes `estimated_cycles` beside most instructions (fusions, convolutions, reductions). `cycles` adds them, a loop's
body as often as it is run, of a branch the dearest side. It is the compiler's estimate, not a measurement: transfers that overlap
with work count nothing, nor does what has no estimate (custom calls).
"""

import dataclasses
import re
from collections.abc import Sequence

_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_LOOP = re.compile(r"\bwhile\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bconditional\(.*branch_computations=\{([^}]*)\}")
_SIDES = re.compile(r"\bconditional\(.*true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")
_CALL = re.compile(r"\b(?:call|async-start)\(.*(?:to_apply|calls)=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COMPARED = re.compile(r"\bcompare\(([^)]*)\), direction=(LT|GT)")
_CONSTANT = re.compile(r"\bs32\[\]\S* constant\((\d+)\)")


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
