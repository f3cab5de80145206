"""What is known of chips: rates, memory, and of TPUs what is needed to compile for them and what suits them."""

import re
from typing import NamedTuple


class Chip(NamedTuple):
    """`rate` of products of bfloat16 matrices in TFLOP/s, `memory` in GB (of TPUs, as their makers count, GiB).

    Of TPUs that can be compiled for: the `clock` in GHz that the rate implies, and `layout`, libtpu's name of the way in which a
    chip is one device, where it is not the first that it knows.

    Where its compiler's estimate is lower for it (docs/speed.md): `scores`, the MiB of attention's logits that it works on at
    once, without a way through its memory; and whether it is `dense`, quicker with products of many zeros than with pixels one
    by one.
    """

    name: str
    rate: float
    memory: float
    clock: float | None = None
    layout: str | None = None
    scores: float | None = None
    dense: bool = False

    @property
    def bytes(self) -> float:
        """Of its memory."""
        return self.memory * (2**30 if self.name.startswith("TPU") else 1e9)


# Rates are the makers' (of TPUs Google's Cloud TPU pages), but for the first, which was measured. A TPU's is matrix units x 128 x
# 128 (v6e: 256 x 256) x 2 x clock: 8 units for v4 and v5p, 4 for v5e and v6e.
CHIPS = (
    Chip("H200", 790, 141),
    Chip("H100 SXM", 989, 80),
    Chip("A100", 312, 80),
    Chip("RTX 4090", 165, 24),
    Chip("TPU v4", 275, 32, clock=1.05, layout="megacore", scores=32, dense=True),
    Chip("TPU v5e", 197, 16, clock=1.5, scores=32, dense=True),
    Chip("TPU v5p", 459, 95, clock=1.75, dense=True),
    Chip("TPU v6e", 918, 32, clock=1.75, scores=32, dense=True),
    Chip("TPU7x", 2307, 192, dense=True),
)
# As the names of slices have them, "v5e:2x4" say.
TPUS = {chip.name.removeprefix("TPU "): chip for chip in CHIPS if chip.clock}
# Chip -> what JAX calls the kinds of devices that have its rate: not its slower forms, nor a share of one.
_KINDS = {
    "H200": "NVIDIA H200",
    "H100 SXM": r"NVIDIA H100 \d+GB HBM3",
    "A100": r"NVIDIA A100(-\S+| \d+GB PCIe)",
    "RTX 4090": "NVIDIA GeForce RTX 4090",
    "TPU v5e": "TPU v5 lite|TPU v5e",
    "TPU v5p": "TPU v5p?",
    "TPU v6e": "TPU v6 lite|TPU v6e",
}


def of(kind: str) -> Chip | None:
    """The chip of the table that a device's kind names, None where there is none."""
    return next((chip for chip in CHIPS if re.fullmatch(_KINDS.get(chip.name, chip.name), kind)), None)
