"""Chips: rate and memory of each, and what compiling for them depends on."""

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax

from referee_jax.hardware import devices


class Chip(NamedTuple):
    """One kind of chip.

    Attributes:
        rate: TFLOP/s of bfloat16 matrix products.
        memory: GB, for TPUs GiB, as their makers count.
        clock: GHz implied by the rate, for TPUs that programs can be compiled for.
        layout: libtpu's name for "a chip is one device", where that is not its default.
        scores: MiB of attention logits per block, so that they stay out of the chip's main memory.
        logits: cycles of JAX's kernel of attention for a thousand logits, and going back: its instructions, counted.
        dense: whether matrix products with many zeros are faster than gathers.

    `scores` and `dense` are set where they lower the compiler's estimate (docs/notes/performance_log.md).
    """

    name: str
    rate: float
    memory: float
    clock: float | None = None
    layout: str | None = None
    scores: float | None = None
    logits: tuple[float, float] = (0.0, 0.0)
    dense: bool = False

    @property
    def bytes(self) -> float:
        """Its memory in bytes."""
        return self.memory * (2**30 if self.name.startswith("TPU") else 1e9)


# Rates are the makers' (Google's Cloud TPU pages); the first was measured. A TPU's rate is matrix
# units x 128 x 128 (v6e: 256 x 256) x 2 x clock, with 8 units for v4 and v5p, 4 for v5e and v6e.
CHIPS = (
    Chip("H200", 790, 141),
    Chip("H100 SXM", 989, 80),
    Chip("A100", 312, 80),
    Chip("RTX 4090", 165, 24),
    Chip("TPU v4", 275, 32, clock=1.05, layout="megacore", scores=32, logits=(3.4, 5.7), dense=True),
    Chip("TPU v5e", 197, 16, clock=1.5, scores=32, logits=(4.8, 9.9), dense=True),
    Chip("TPU v5p", 459, 95, clock=1.75, logits=(2.4, 5.2), dense=True),
    Chip("TPU v6e", 918, 32, clock=1.75, scores=32, logits=(3.0, 6.0), dense=True),
    Chip("TPU7x", 2307, 192, dense=True),
)
# By the chip's name in slices such as "v5e:2x4".
TPUS = {chip.name.removeprefix("TPU "): chip for chip in CHIPS if chip.clock}
# Chip -> pattern of JAX's device kinds with its rate, without slower variants and partial chips.
_KINDS = {
    "H200": "NVIDIA H200",
    "H100 SXM": r"NVIDIA H100 \d+GB HBM3",
    "A100": r"NVIDIA A100(-\S+| \d+GB PCIe)",
    "RTX 4090": "NVIDIA GeForce RTX 4090",
    "TPU v5e": "TPU v5 lite|TPU v5e",
    "TPU v5p": "TPU v5p?",
    "TPU v6e": "TPU v6 lite|TPU v6e",
}

# Platform -> XLA options for the engine's programs. On a CPU, more optimisation compiles half as
# long again for programs no faster. On a TPU, a prefetched weight would take the fast memory that
# attention's logits need.
OPTIONS = {"cpu": {"xla_backend_optimization_level": "1"}, "tpu": {"xla_max_cross_program_prefetches": "0"}}
# Of a program that runs rarely: it compiles in a third of the time.
QUICKLY = {"cpu": {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False}}

MODEL = "model"  # the axis of a mesh over which weights are split

# Primitives of cuDNN's attention, whose programs do not show their FLOPs (performance/flops.py).
CUDNN_FORWARD, CUDNN_BACKWARD = "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"
CUSTOM_CALLS = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")  # what they are in a program
# What is named for rematerialisation: results of layers, and of JAX's kernel for TPUs.
KEPT, SPLASH = "kept", "splash_attention"


def of(kind: str) -> Chip | None:
    """The chip with this device kind; None if the table lacks it."""
    return next((chip for chip in CHIPS if re.fullmatch(_KINDS.get(chip.name, chip.name), kind)), None)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What decides how a network computes on a device; a static field of the modules that depend on it.

    Attributes:
        dense: whether matrix products, mostly of zeros, are faster than gathering or interleaving pixels.
        attention_block: MiB of attention logits to compute at once; None: all.
        cudnn: whether long attention in half precision is cuDNN's.
        splash: whether it is the kernel of JAX for TPUs where its logits do not fit on the chip.
        rows: of a tile, in which tokens lie; another number of tokens than a multiple takes longer.
        group: devices over which weights are split, along the mesh's axis MODEL; the kernel splits heads.
    """

    dense: bool = False
    attention_block: float | None = None
    cudnn: bool = False
    splash: bool = False
    rows: int = 1
    group: int = 1


def traits(device: jax.Device | None = None, *, group: int = 1) -> Hardware:
    """The traits of a device, which need not be there (performance/ahead_of_time.py); by default, of the one JAX uses.

    `group` is as in Hardware. XLA would have to split cuDNN's attention, which it cannot, so a group does not use it.
    """
    device = device or devices.local()[0]
    chip = of(device.device_kind)
    return Hardware(
        dense=chip is not None and chip.dense,
        attention_block=chip and chip.scores,
        cudnn=group == 1 and _has_cudnn(device),
        splash=device.platform == "tpu",
        rows=8 if device.platform == "tpu" else 1,
        group=group,
    )


def _has_cudnn(device: jax.Device) -> bool:
    """Whether it is an NVIDIA GPU for which cuDNN has attention in half precision: from Ampere on."""
    if device.platform != "gpu":
        return False
    return "cuda" in device.client.platform_version and float(device.compute_capability) >= 8


def compiler_options(platform: str, count: int = 1, *, is_rare: bool = False) -> dict[str, str | bool]:
    """OPTIONS of a platform, and those of a program on `count` of its devices, without those that XLA_FLAGS sets."""
    options, flags = OPTIONS.get(platform, {}), os.environ.get("XLA_FLAGS", "")
    options = options | QUICKLY.get(platform, {}) if is_rare else options
    if platform == "cpu" and count > max(1, devices.cores() // 2):  # a core each: threads of theirs would wait
        options = options | {"xla_cpu_multi_thread_eigen": False}
    return {name: value for name, value in options.items() if f"--{name}=" not in flags}


def memory_limit(device: jax.Device) -> int | None:
    """Bytes of an accelerator's memory that JAX may use; None for CPUs and absent devices."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:
        return None


def machine_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this machine, with file system `root`, has for a CPU; None where JAX does not compute on it.

    A larger program does not fail: the system ends the process, or swaps for hours.
    """
    if jax.local_devices()[0].platform != "cpu":
        return None
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    # Of a container: cgroup v2, and v1, which has a number beyond all memory where there is no limit.
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            limits.append(int((root / "sys/fs/cgroup" / name).read_text()))
    return min(limits)


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether the device ran out of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)
