"""What is known of chips: rates, memory, and of TPUs what is needed to compile for them and what suits them."""

import os
import re
from typing import NamedTuple

import jax


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


# Platform -> XLA's options for an engine's programs. On a CPU more optimisation takes half as long again, for programs that are
# no quicker. A TPU's own memory is for what is worked on: else one large weight lies there from a program's beginning until it
# is needed, and attention's logits do not.
OPTIONS = {"cpu": {"xla_backend_optimization_level": "1"}, "tpu": {"xla_max_cross_program_prefetches": "0"}}


def has_cudnn() -> bool:
    """Whether JAX computes on an NVIDIA GPU for which cuDNN has attention in half precision: from Ampere on."""
    if jax.default_backend() != "gpu":
        return False
    device = jax.local_devices()[0]
    return "cuda" in device.client.platform_version and float(device.compute_capability) >= 8


def compiler_options(platform: str) -> dict[str, str]:
    """OPTIONS of a platform, but for what XLA_FLAGS decides."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in OPTIONS.get(platform, {}).items() if f"--{name}=" not in flags}


def chip() -> Chip | None:
    """The chip for which a program is being traced, where the table has it: of the mesh it is for, else what JAX computes on.

    A mesh's devices need not be there (topology.py).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.local_devices()[0]
    return of(device.device_kind)


def is_dense() -> bool:
    """Whether that chip takes products of matrices for what others gather or interleave."""
    found = chip()
    return found is not None and found.dense


def memory_limit(device: jax.Device) -> int | None:
    """Bytes that JAX may use of an accelerator's own memory; None where it has none, or is not there (topology.py)."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:
        return None


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether it says that memory was too small."""
    return "RESOURCE_EXHAUSTED" in str(error)


# cuDNN's attention, whose programs say nothing of their work -> products of the size of queries x keys. Going back, the
# probabilities are made again.
CUDNN_FORWARD, CUDNN_BACKWARD = "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"
