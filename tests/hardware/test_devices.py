"""The choice of devices: an unusable accelerator is an error, never ignored."""

import importlib
import os
import pathlib
import platform
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from referee_jax.engine import programs
from referee_jax.hardware import chips, devices

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def platforms():
    """Sets JAX_PLATFORMS as JAX has read it."""
    before = jax.config.jax_platforms
    yield lambda value: jax.config.update("jax_platforms", value)
    jax.config.update("jax_platforms", before)


def machine(root, *files, **texts):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name, (vendor, device) in texts.items():
        place = root / "sys/bus/pci/devices" / name
        place.mkdir(parents=True)
        (place / "vendor").write_text(vendor + "\n")
        (place / "device").write_text(device + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "buses", "found"),
    [
        ((), {}, {}),
        (("dev/null", "dev/nvidiactl", "usr/bin/nvidia-smi", "dev/accel/accel0", "dev/vfio/vfio"), {}, {}),
        (("dev/nvidia1", "dev/nvidia0", "dev/nvidiactl"), {}, {"gpu": "dev/nvidia0"}),
        (("dev/dxg",), {}, {}),
        (("dev/dxg", "usr/lib/wsl/lib/nvidia-smi"), {}, {"gpu": "usr/lib/wsl/lib/nvidia-smi"}),
        (("dev/accel0", "dev/accel1"), {}, {"tpu": "dev/accel0"}),
        (("dev/vfio/0",), {"a": ("0x1ae0", "0x0063")}, {"tpu": "sys/bus/pci/devices/a"}),
        ((), {"a": ("0x1ae0", "0x0042"), "b": ("0x8086", "0x0063")}, {}),  # Google's network card, and another maker's
    ],
)
def test_accelerators_of_a_machine(files, buses, found, tmp_path):
    root = machine(tmp_path, *files, **buses)
    assert devices.accelerators(root) == {kind: str(root / sign) for kind, sign in found.items()}


@pytest.mark.parametrize("wanted", ["auto", "cpu"])
def test_a_bare_machine_computes_on_its_cpu(wanted, tmp_path, platforms):
    platforms(None)
    assert devices.choose(wanted, root=tmp_path) == "cpu"


OTHER = {
    "jax_enable_x64": True,
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 3,
}


@pytest.mark.parametrize("name", devices.NUMBERS)
def test_the_environment_does_not_change_what_is_drawn(name, tmp_path, platforms):
    """A command draws the same numbers, whatever JAX's variables ask for; a library that cannot says so."""
    draw = lambda: np.asarray(jax.random.normal(programs.item_key(7, 2**31, 1), (3,)))
    platforms(None)
    expected, before = draw(), {name: getattr(jax.config, name) for name in devices.NUMBERS}
    try:
        jax.config.update(name, OTHER[name])
        with pytest.raises(devices.DeviceError, match=f"JAX is set to {name}={OTHER[name]!r}, .*update"):
            devices.check_numbers()
        devices.choose(root=tmp_path)
        devices.check_numbers()
        drawn = draw()
        assert drawn.dtype == expected.dtype and (drawn == expected).all()
    finally:
        for option, value in before.items():
            jax.config.update(option, value)


FAULTS = """
import resource, statistics, sys
import jax, jax.numpy as jnp
from referee_jax.hardware import devices
if sys.argv[1] == "choose":
    devices.choose("cpu", heaps=int(sys.argv[2]))
step = jax.jit(lambda x: jnp.cumsum(jnp.exp(x), 1).max())  # a block of two intermediate arrays
x = jnp.zeros((int(sys.argv[3]) * 600, 5))
faults = lambda: (step(x).block_until_ready(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt)[1]
found = [faults() for _ in range(60)]  # until each heap has had its first block, and beyond
print(int(statistics.median(b - a for a, b in zip(found[30:], found[31:]))))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told to keep what is freed")
def test_a_cpu_keeps_its_memory_between_iterations():
    """By the call, and by the environment for a process whose threads begin earlier; smaller blocks in several heaps, too."""

    def faults(how, heaps=1, rows=3000, variables=None):
        command = [sys.executable, "-c", FAULTS, how, str(heaps), str(rows)]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "", "XLA_FLAGS": "", **(variables or {})}
        return int(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)

    kept = faults("choose"), faults("variables", variables=devices.KEEPING_FREED_MEMORY)
    assert max(kept) < faults("not") / 10  # 72 MB
    assert faults("choose", devices.HEAPS, 2000) < faults("not", rows=2000) / 10  # 48 MB


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("nvidia0", r'has an NVIDIA GPU \(.*/dev/nvidia0\), but .* pip install -e "\.\[cuda\]"; or .* --device=cpu$'),
        (
            "accel0",
            r'has a TPU \(.*/dev/accel0\), but JAX does not use it .* pip install -e "\.\[tpu\]"; or .* --device=cpu$',
        ),
    ],
)
def test_an_accelerator_that_jax_does_not_use(file, message, tmp_path, platforms, monkeypatch):
    monkeypatch.setattr(devices, "_has_plugin", lambda kind: False)
    root = machine(tmp_path, f"dev/{file}")
    platforms(None)
    with pytest.raises(devices.DeviceError, match=message):
        devices.choose("auto", root=root)
    assert devices.choose("cpu", root=root) == "cpu"
    assert jax.config.jax_platforms == "cpu"  # also for an accelerator that could be used
    monkeypatch.setattr(devices, "_has_plugin", lambda kind: True)
    platforms(None)
    with pytest.raises(
        devices.DeviceError, match=r"""is installed: python -c "import jax; jax\.devices\('(cuda|tpu)'\)" tells"""
    ):
        devices.choose("auto", root=root)


def test_jax_platforms_is_a_wish_too(tmp_path, platforms):
    root = machine(tmp_path, "dev/nvidia0")
    platforms("cpu")
    assert devices.choose("auto", root=root) == "cpu"
    with pytest.raises(devices.DeviceError, match="because of JAX_PLATFORMS=cpu: unset it"):
        devices.choose("gpu", root=root)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), r"what it needs is not installed; unset JAX_PLATFORMS, or pip install -e '\.\[cuda\]'"),
        (RuntimeError("Unable to initialize backend 'cuda'\nand more"), "Unable to initialize backend 'cuda'"),
    ],
)
def test_jax_platforms_that_is_not_there(error, reason, tmp_path, platforms, monkeypatch):
    """JAX asserts where it has left out the one platform that it was to use."""

    def broken():
        raise error

    monkeypatch.setattr(jax, "local_devices", broken)
    platforms("cuda")
    for look in (lambda: devices.choose("auto", root=tmp_path), devices.local, chips.traits):
        with pytest.raises(devices.DeviceError, match=rf"to compute on \(JAX_PLATFORMS=cuda\): {reason}$"):
            look()


@pytest.mark.parametrize("wanted", ["gpu", "tpu"])
def test_asked_for_what_is_not_there(wanted, tmp_path, platforms):
    platforms(None)
    with pytest.raises(
        devices.DeviceError, match=f"--device={wanted} asks for a device that this machine does not have"
    ):
        devices.choose(wanted, root=tmp_path)


def test_the_plugins_that_are_installed(tmp_path, monkeypatch):
    """On any machine: without plugins, then with what the wheels install."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not devices._has_plugin("gpu") and not devices._has_plugin("tpu")
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "__init__.py").touch()
    (tmp_path / "jax_cuda13_plugin-0.1.dist-info").mkdir()
    entries = "[jax_plugins]\nxla_cuda13 = jax_plugins.xla_cuda13\n"
    (tmp_path / "jax_cuda13_plugin-0.1.dist-info" / "entry_points.txt").write_text(entries)
    importlib.invalidate_caches()
    assert devices._has_plugin("gpu") and devices._has_plugin("tpu")


RUN = [sys.executable, "-m", "referee_jax.run", "--config=configs/shapes_clip.py"]


@pytest.mark.parametrize(
    ("arguments", "platforms", "message"),
    [
        (["--device=gpu"], "cpu", "error: --device=gpu asks for a device|error: this machine has a"),
        ([], "nonsense", "error: JAX has no device to compute on \\(JAX_PLATFORMS=nonsense\\): Unable to initialize"),
    ],
)
def test_the_command_says_so_at_once(arguments, platforms, message, tmp_path):
    env = os.environ | {"JAX_PLATFORMS": platforms}
    done = subprocess.run(
        [*RUN, *arguments, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert re.search(message, done.stderr) and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("backend", "version", "capability", "found"),
    [
        ("gpu", "PJRT C API\ncuda 13000", "9.0", True),
        ("gpu", "PJRT C API\ncuda 12080", "8.0", True),
        ("gpu", "PJRT C API\ncuda 12080", "7.5", False),
        ("gpu", "rocm 60300", "9.4", False),
        ("cpu", "cpu", None, False),
    ],
)
def test_cudnn(monkeypatch, backend, version, capability, found):
    """Attention in half precision is there from Ampere on, and used where no weights are split."""
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(
        client=client, compute_capability=capability, platform=backend, device_kind="a device of no table"
    )
    assert chips.traits(device) == chips.Hardware(cudnn=found)
    assert chips.traits(device, group=2) == chips.Hardware(group=2)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert chips.traits() == chips.Hardware(cudnn=found)


def test_traits_of_a_chip_that_is_not_there():
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    assert chips.traits(tpu) == chips.Hardware(dense=True, attention_block=32, splash=True, rows=8)


@pytest.mark.parametrize(
    ("files", "kind", "images", "variable", "count"),
    [
        ((), "auto", 8, None, 3),  # a core each
        ((), "auto", 2, None, 2),  # no more than there are images
        ((), "cpu", 1, None, 1),
        ((), "auto", 8, "1", 1),  # it was asked otherwise
        (("dev/nvidia0",), "auto", 8, None, 1),
        (("dev/nvidia0",), "cpu", 8, None, 3),
    ],
)
def test_a_cpu_is_made_into_devices(files, kind, images, variable, count, tmp_path, platforms, monkeypatch):
    platforms(None)
    updates = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: updates.update({name: value}))
    monkeypatch.setattr(devices, "cores", lambda: 3)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    if variable:
        monkeypatch.setenv("JAX_NUM_CPU_DEVICES", variable)
    assert devices.split_cpu(kind, images, root=machine(tmp_path, *files)) == count
    assert updates == ({"jax_num_cpu_devices": count} if count > 1 else {})


def test_options_of_xla(monkeypatch):
    """XLA knows them, or would refuse them; XLA_FLAGS takes precedence."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert chips.compiler_options("gpu") == {}
    options = chips.compiler_options("cpu")
    assert options == chips.OPTIONS["cpu"] != {}
    jax.jit(lambda x: x + 1, compiler_options=options)(1.0)
    monkeypatch.setattr(devices, "cores", lambda: 4)
    few, many = (chips.compiler_options("cpu", count) for count in (2, 3))
    rare = chips.compiler_options("cpu", is_rare=True)
    assert few == options and many == options | {"xla_cpu_multi_thread_eigen": False}
    assert rare == options | chips.QUICKLY["cpu"]
    for other in (many, rare):
        jax.jit(lambda x: x + 1, compiler_options=other)(1.0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_no_such": "1"})(1.0)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    assert chips.compiler_options("cpu") == {}
    assert set(chips.compiler_options("cpu", is_rare=True)) == {"xla_cpu_use_fusion_emitters"}
