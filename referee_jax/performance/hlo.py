"""Reads the text of a compiled program: the compiler's cycles, and collectives.

XLA for TPUs writes `estimated_cycles` beside most instructions (fusions, convolutions, reductions).
`cycles` adds them: a loop's body times its trips, of a branch the costliest side. It is the
compiler's estimate, not a measurement: transfers that overlap with work count nothing, nor do instructions
without an estimate. Of custom calls only JAX's kernel of attention has one, by its logits.
Products of matrices are written as convolutions there.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)
_EXCHANGE = re.compile(r"(?:replica_groups|source_target_pairs)=(\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_DEVICES = re.compile(r"num_partitions=(\d+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
LOOP = re.compile(r"\bwhile\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
BRANCHES = re.compile(r"\bconditional\(.*branch_computations=\{([^}]*)\}")
_SIDES = re.compile(r"\bconditional\(.*true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")
_CALL = re.compile(r"\b(?:call|async-start)\(.*(?:to_apply|calls)=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL = re.compile(
    r"%?splash_mha_(\w+)\S* = .*custom_call_target=\"tpu_custom_call\", operand_layout_constraints=\{(.*?)\}, frontend"
)
_BFLOAT16 = re.compile(r"bf16\[([\d,]+)\]")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COMPARED = re.compile(r"\bcompare\(([^)]*)\), direction=(LT|GT)")
_CONSTANT = re.compile(r"\bs32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Cycles:
    """`total` cycles; `uncounted` names the loops without a known number of trips, which count once."""

    total: int
    uncounted: tuple[str, ...]


def collectives(text: str) -> list[str]:
    """Instructions by which devices exchange data, in order."""
    return _COLLECTIVE.findall(text)


def exchanging(text: str) -> set[tuple[int, ...]]:
    """The groups of devices that exchange data, by their numbers in the program; of a permutation its pairs."""
    found: set[tuple[int, ...]] = set()
    for line in filter(_COLLECTIVE.search, text.splitlines()):
        match = _EXCHANGE.search(line)
        said = match[1] if match else ""
        if not said:  # all of the program's devices
            found.add(tuple(range(int(_DEVICES.search(text)[1]))))
        elif said.startswith("{"):
            found |= {_numbers(group) for group in re.findall(r"\{([\d,]+)\}", said)}
        else:  # groups of devices counted through an array whose axes are in another order
            shape, axes, *order = (_numbers(part) for part in re.findall(r"[\[(]([\d,]+)[\])]", said))
            devices = np.arange(math.prod(axes)).reshape(axes).transpose(*order or range(len(axes)))
            found |= set(map(tuple, devices.reshape(shape).tolist()))
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def cycles(text: str, logits: tuple[float, float] = (0.0, 0.0)) -> Cycles:
    """The estimated cycles of a program, from `compiled.as_text()`. Raises ValueError for any other text.

    `logits` are those of the chip (hardware/chips.py), for its kernel of attention.
    """
    bodies, entry = computations(text)
    totals: dict[str, int] = {}
    uncounted: list[str] = []

    def of(name: str) -> int:
        if name not in totals:
            totals[name] = sum(instruction(line) for line in bodies[name])
        return totals[name]

    def instruction(line: str) -> int:
        estimate = sum(map(int, _CYCLES.findall(line)))
        if loop := LOOP.search(line):
            trips = trips_of(line, bodies[loop[1]])
            if trips is None:
                uncounted.append(loop[2])
            return estimate + (1 if trips is None else trips) * (of(loop[1]) + of(loop[2]))
        if branches := BRANCHES.search(line):
            return estimate + max(of(name.strip().lstrip("%")) for name in branches[1].split(","))
        if sides := _SIDES.search(line):
            return estimate + max(of(sides[1]), of(sides[2]))
        if kernel := _KERNEL.search(line):  # whose first arrays of bfloat16 are queries and keys, [..., tokens, width]
            queries, keys = map(_numbers, _BFLOAT16.findall(kernel[2])[:2])
            return round(math.prod(queries[:-1]) * keys[-2] * logits["fwd" not in kernel[1]] / 1000)
        # The estimate at the call of a fusion covers all that it contains.
        call = _CALL.search(line)
        return estimate + (of(call[1]) if call and not estimate else 0)

    return Cycles(of(entry), tuple(uncounted))


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Name -> lines of instructions, and the entry's name. Raises ValueError for a text without an entry."""
    bodies: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif INSTRUCTION.match(line):
            lines.append(line)
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no entry")
    return bodies, entry


def trips_of(loop: str, condition: Sequence[str]) -> int | None:
    """The trips of a loop, None if unknown: XLA's own number, or the limit of a count from 0 (lax.scan)."""
    if known := _KNOWN_TRIPS.search(loop):
        return int(known[1])
    constants = {match[2]: int(limit[1]) for line in condition
                 if (match := INSTRUCTION.match(line)) and (limit := _CONSTANT.search(line))}  # fmt: skip
    for line in condition:
        if compared := _COMPARED.search(line):
            limits = [constants[name] for name in re.findall(r"%?([\w.\-]+)", compared[1]) if name in constants]
            return limits[0] if len(limits) == 1 else None
    return None
