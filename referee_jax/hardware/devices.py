"""What kind of device there is to compute on, and what is wrong where it is not the one that the machine has."""

import ctypes
import importlib.util
from importlib import metadata
from pathlib import Path

import jax

KINDS = ("auto", "cpu", "gpu", "tpu")

# TPU v3, v4, v5p, v5e, v6e, 7x on the PCI bus, as JAX knows them: since v5 they have no device file of their own.
_TPU_VENDOR, _TPU_CHIPS = "0x1ae0", ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


class DeviceError(RuntimeError):
    """The devices that were asked for are not to be had; one sentence, with the remedy."""


def choose(wanted: str = "auto", *, root: Path = Path("/")) -> str:
    """Has JAX compute on `wanted` of `KINDS`, before anything else does; what the chosen kind of device calls itself.

    "auto" is what JAX finds by itself, or is told by JAX_PLATFORMS; but where that is the CPU only because an accelerator
    of the machine (of which `root` is the file system) cannot be used, DeviceError is raised: the work would take
    many times as long. So it is where "gpu" or "tpu" is not what JAX computes on.
    """
    keep_freed_memory(wanted, root=root)
    if wanted == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        device = jax.local_devices()[0]
    except RuntimeError as error:
        told = f" (JAX_PLATFORMS={jax.config.jax_platforms})" if jax.config.jax_platforms else ""
        raise DeviceError(f"JAX has no device to compute on{told}: {str(error).splitlines()[0]}") from error
    if wanted == device.platform or wanted == "auto" and (device.platform != "cpu" or jax.config.jax_platforms):
        return device.device_kind
    there = accelerators(root)
    kind = next(iter(there), None) if wanted == "auto" else wanted
    if kind is None:
        return device.device_kind
    raise DeviceError(_unusable(kind, there.get(kind), device.platform))


# Of glibc's malloc.h: parameter -> value.
_MALLOPT = {
    -8: 1,  # M_ARENA_MAX: threads, too, use the heap, the only place where large pieces are kept
    -4: 0,  # M_MMAP_MAX: what is large is not given back as soon as it is freed
    -1: -1,  # M_TRIM_THRESHOLD: nor is the end of the heap, however much of it is free
}


def keep_freed_memory(wanted: str = "auto", *, root: Path = Path("/")) -> None:
    """Has glibc keep what is freed for the next iteration, a quarter of which on a CPU were else the kernel's handing out pages.

    It has to come before JAX begins, whose threads have heaps of their own by then. Where JAX will compute on an accelerator, and
    where there is no glibc, nothing is done. Programs ask for this (`choose`), who only imports the package has to by himself.
    """
    is_cpu = "cpu" in (wanted, jax.config.jax_platforms) or not accelerators(root)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if is_cpu and mallopt is not None:
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)


def accelerators(root: Path = Path("/")) -> dict[str, str]:
    """The kinds of accelerators of the machine, whether JAX can use them or not: kind -> the file that shows it.

    Files alone are looked at: machines without a GPU may well have nvidia-smi.
    """
    found = {}
    gpus = sorted(root.glob("dev/nvidia[0-9]*"))
    if (root / "dev/dxg").exists():  # WSL, whatever the maker of the GPU; the driver tells
        gpus += root.glob("usr/lib/wsl/lib/nvidia-smi")
    if gpus:
        found["gpu"] = str(gpus[0])
    tpus = sorted(root.glob("dev/accel[0-9]*"))
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        number = vendor.with_name("device")
        if vendor.read_text().strip() == _TPU_VENDOR and number.read_text().strip() in _TPU_CHIPS:
            tpus.append(number.parent)
    if tpus:
        found["tpu"] = str(tpus[0])
    return found


def _unusable(kind: str, sign: str | None, used: str) -> str:
    """Why there is no `kind` to compute on, and what to do."""
    name, extra = {"gpu": ("an NVIDIA GPU", "cuda"), "tpu": ("a TPU", "tpu")}[kind]
    if sign is None:
        return f"--device={kind} asks for a device that this machine does not have; JAX computes on its {used}"
    if jax.config.jax_platforms:
        remedy = f"because of JAX_PLATFORMS={jax.config.jax_platforms}: unset it"
    elif _has_plugin(kind):
        asks = f"python -c \"import jax; jax.devices('{extra}')\""
        remedy = f"though what it needs is installed: {asks} tells why"
    else:
        remedy = f'because what it needs is not installed: pip install -e ".[{extra}]"'
    return f"this machine has {name} ({sign}), but JAX does not use it {remedy}; or go on slowly, with --device=cpu"


def _has_plugin(kind: str) -> bool:
    if kind == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    return any("cuda" in plugin.name for plugin in metadata.entry_points(group="jax_plugins"))
