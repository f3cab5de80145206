"""Chooses the kind of device to compute on; refuses to ignore an accelerator of the machine."""

import ctypes
import importlib.util
from importlib import metadata
from pathlib import Path

import jax

KINDS = ("auto", "cpu", "gpu", "tpu")

# PCI ids of TPU v3, v4, v5p, v5e, v6e and 7x, as in JAX: since v5 they have no device file.
_TPU_VENDOR, _TPU_CHIPS = "0x1ae0", ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")

# Variables that glibc reads when a process begins -> their numbers in its malloc.h, and values.
_MALLOC = {
    "MALLOC_ARENA_MAX": (-8, 1),  # all threads use the heap, which alone can keep large blocks
    "MALLOC_MMAP_MAX_": (-4, 0),  # large blocks are not returned to the system when they are freed
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),  # nor is the end of the heap
}
# The same for a process that is started, whose threads may have heaps of their own before it calls `keep_freed_memory`.
KEEPING_FREED_MEMORY = {name: str(value) for name, (_, value) in _MALLOC.items()}

# Options of JAX that decide which numbers are drawn, and of what type: any other value gives other pictures for a seed.
NUMBERS = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
}


class DeviceError(RuntimeError):
    """The requested devices cannot be used; one sentence, with the remedy."""


def choose(kind: str = "auto", *, root: Path = Path("/")) -> str:
    """Makes JAX compute on a device of `KINDS`; returns its device kind. Call it before using JAX.

    NUMBERS are set, whatever the environment says. "auto" is JAX's own choice, which JAX_PLATFORMS may
    set. Raises DeviceError if that is the CPU only because an accelerator of the machine (with file
    system `root`) cannot be used: the work would take many times as long. Raises it also if "gpu" or
    "tpu" is not what JAX computes on.
    """
    keep_freed_memory(kind, root=root)
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


def keep_freed_memory(kind: str = "auto", *, root: Path = Path("/")) -> None:
    """Has glibc keep freed memory, whose page faults take a quarter of an iteration on a CPU.

    It must be called before JAX starts threads, which have their own heaps. Does nothing if JAX
    will use an accelerator, or without glibc. Commands call this; library users must call it
    themselves.
    """
    is_cpu = "cpu" in (kind, jax.config.jax_platforms) or not accelerators(root)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if is_cpu and mallopt is not None:
        for parameter, value in _MALLOC.values():
            mallopt(parameter, value)


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
