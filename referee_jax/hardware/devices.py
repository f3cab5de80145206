"""Chooses the kind of device to compute on; refuses to ignore an accelerator of the machine."""

import ctypes
import importlib.util
import os
from importlib import metadata
from pathlib import Path

import jax

KINDS = ("auto", "cpu", "gpu", "tpu")

# PCI ids of TPU v3, v4, v5p, v5e, v6e and 7x, as in JAX: since v5 they have no device file.
_TPU_VENDOR, _TPU_CHIPS = "0x1ae0", ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")

# Variables that glibc reads when a process begins -> their numbers in its malloc.h, and values.
_MALLOC = {
    "MALLOC_ARENA_MAX": (-8, 1),  # all threads use the heap, which alone can keep blocks of 2**26 bytes
    "MALLOC_MMAP_MAX_": (-4, 0),  # large blocks are not returned to the system when they are freed
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),  # nor is the end of the heap
    "MALLOC_TOP_PAD_": (-2, 2**27),  # nor are the heaps of threads, of 2**26 bytes, where they have some
}
# The same for a process that is started, whose threads may have heaps of their own before it calls `keep_freed_memory`.
KEEPING_FREED_MEMORY = {name: str(value) for name, (_, value) in _MALLOC.items()}
HEAPS = 8  # for jobs that mostly compile: the compiler's threads wait for each other where they share one heap

# Options of JAX that decide which numbers are drawn, and of what type: any other value gives other pictures for a seed.
NUMBERS = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
}


class DeviceError(RuntimeError):
    """The requested devices cannot be used; one sentence, with the remedy."""


def choose(kind: str = "auto", *, heaps: int = 1, root: Path = Path("/")) -> str:
    """Makes JAX compute on a device of `KINDS`; returns its device kind. Call it before using JAX.

    NUMBERS are set, whatever the environment says; `heaps` is as of `keep_freed_memory`. "auto" is
    JAX's own choice, which JAX_PLATFORMS may set. Raises DeviceError if that is the CPU only because
    an accelerator of the machine (with file system `root`) cannot be used: the work would take many
    times as long. Raises it also if "gpu" or "tpu" is not what JAX computes on.
    """
    keep_freed_memory(kind, heaps=heaps, root=root)
    for name, value in NUMBERS.items():
        jax.config.update(name, value)
    if kind == "cpu":
        jax.config.update("jax_platforms", "cpu")
    device = local()[0]
    if kind == device.platform or kind == "auto" and (device.platform != "cpu" or jax.config.jax_platforms):
        return device.device_kind
    files = accelerators(root)
    unused = next(iter(files), None) if kind == "auto" else kind
    if unused is None:
        return device.device_kind
    raise DeviceError(_unusable(unused, files.get(unused), device.platform))


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_cpu(kind: str, images: int, *, root: Path = Path("/")) -> int:
    """Makes a device of each core, for up to `images` devices; returns their number. Call it before using JAX.

    A program of small networks that uses all cores is hardly faster than on one; on devices of their own, all are busy.
    Each holds the networks. JAX_NUM_CPU_DEVICES decides where it is set; 1 also where JAX will use an accelerator.
    """
    count = 1 if "JAX_NUM_CPU_DEVICES" in os.environ or not _is_cpu(kind, root) else max(1, min(images, cores()))
    if count > 1:
        jax.config.update("jax_num_cpu_devices", count)
    return count


def local() -> list[jax.Device]:
    """The devices of this process. Raises DeviceError where JAX has none."""
    try:
        return jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.jax_platforms
        variable = f" (JAX_PLATFORMS={platforms})" if platforms else ""
        # JAX asserts, without a word, that there is some backend where JAX_PLATFORMS has only one
        # that it knows of and that is not installed.
        reason = str(error).partition("\n")[0] or (
            f"what it needs is not installed; unset JAX_PLATFORMS, or pip install -e '.[{platforms}]'"
        )
        raise DeviceError(f"JAX has no device to compute on{variable}: {reason}") from error


def check_numbers() -> None:
    """Raises DeviceError where JAX has another of NUMBERS: a library must not change them for its user."""
    for name, value in NUMBERS.items():
        if (current := getattr(jax.config, name)) != value:
            raise DeviceError(
                f"JAX is set to {name}={current!r}, by which the same seed gives other pictures; "
                f"set it to {value!r}: jax.config.update({name!r}, {value!r})"
            )


def keep_freed_memory(kind: str = "auto", *, heaps: int = 1, root: Path = Path("/")) -> None:
    """Has glibc keep freed memory, whose page faults take a quarter of an iteration on a CPU, in up to so many heaps.

    It must be called before JAX starts threads, which have their own heaps. Does nothing if JAX
    will use an accelerator, or without glibc. Commands call this; library users must call it
    themselves.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if _is_cpu(kind, root) and mallopt is not None:
        for parameter, value in (_MALLOC | {"MALLOC_ARENA_MAX": (-8, heaps)}).values():
            mallopt(parameter, value)


def _is_cpu(kind: str, root: Path) -> bool:
    return "cpu" in (kind, jax.config.jax_platforms) or not accelerators(root)


def accelerators(root: Path = Path("/")) -> dict[str, str]:
    """The machine's accelerators, usable by JAX or not: kind -> the device file that proves it.

    Device files decide: machines without a GPU may have nvidia-smi.
    """
    files = {}
    gpus = sorted(root.glob("dev/nvidia[0-9]*"))
    if (root / "dev/dxg").exists():  # WSL, with a GPU of any maker: check NVIDIA's driver
        gpus += root.glob("usr/lib/wsl/lib/nvidia-smi")
    if gpus:
        files["gpu"] = str(gpus[0])
    tpus = sorted(root.glob("dev/accel[0-9]*"))
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        number = vendor.with_name("device")
        if vendor.read_text().strip() == _TPU_VENDOR and number.read_text().strip() in _TPU_CHIPS:
            tpus.append(number.parent)
    if tpus:
        files["tpu"] = str(tpus[0])
    return files


def _unusable(kind: str, file: str | None, platform: str) -> str:
    """Why JAX computes on `platform` and not on `kind`, whose device file is `file`; the remedy."""
    name, extra = {"gpu": ("an NVIDIA GPU", "cuda"), "tpu": ("a TPU", "tpu")}[kind]
    if file is None:
        return f"--device={kind} asks for a device that this machine does not have; JAX computes on its {platform}"
    if jax.config.jax_platforms:
        remedy = f"because of JAX_PLATFORMS={jax.config.jax_platforms}: unset it"
    elif _has_plugin(kind):
        check = f"python -c \"import jax; jax.devices('{extra}')\""
        remedy = f"though what it needs is installed: {check} tells why"
    else:
        remedy = f'because what it needs is not installed: pip install -e ".[{extra}]"'
    return f"this machine has {name} ({file}), but JAX does not use it {remedy}; or go on slowly, with --device=cpu"


def _has_plugin(kind: str) -> bool:
    if kind == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    return any("cuda" in plugin.name for plugin in metadata.entry_points(group="jax_plugins"))
