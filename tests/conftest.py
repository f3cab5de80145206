"""Set-up of every test, and the measures they share."""

import errno
import functools
import gc
import io
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import threading

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test waits for a network
# Tiny networks are compiled for longer than they run. Without the fusion emitters it takes a third of the time, and a fifth less
# where the code is not split among threads.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)

os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # most take less than a tenth, and are thousands

import jax
import numpy as np
import pytest

from referee_jax.engine import capacity
from referee_jax.hardware import compile_cache, kept
from referee_jax.performance import abstract_networks
from referee_jax.storage import files

# A test that replaces part of a program would be given what another has traced.
kept.directory = functools.wraps(kept.directory)(lambda: None)

# What is ignored here, as in a job that a shell put into the background, is ignored by all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_num_cpu_devices", 8)
# Tracing makes millions of small objects, few of them garbage: looking for it as often as by default is a fifth of the time.
gc.freeze()
gc.set_threshold(100_000, 10, 10)


def pytest_addoption(parser):
    parser.addoption("--compile-cache", help="where compiled programs are kept for the next run; default: nowhere")


def pytest_configure(config):
    """Equal programs of several tests, files, workers and the processes they start are compiled once."""
    if not hasattr(config, "workerinput"):  # a worker of xdist has its parent's environment
        directory = config.getoption("--compile-cache")
        if not directory:
            temporary = tempfile.TemporaryDirectory(prefix="programs-")
            config.add_cleanup(temporary.cleanup)
            directory = temporary.name
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.abspath(directory)
    if problem := compile_cache.use("cpu"):
        raise pytest.UsageError(problem)


# Folder or file of tests -> their kind, the longest match; see docs/testing.md. What is not named is a unit test.
KINDS = {
    "benchmarks/test_binding.py": "compiled",
    "benchmarks/test_scorer.py": "compiled",
    "benchmarks/test_t2i_compbench.py": "compiled",
    "commands": "process",
    "engine": "compiled",
    "engine/test_peak_memory.py": "unit",
    "hardware/test_devices.py": "process",
    "hardware/test_processes.py": "process",
    "method": "compiled",
    "method/test_ddim.py": "unit",
    "method/test_optim.py": "unit",
    "method/test_sds.py": "unit",
    "models": "compiled",
    "performance": "compiled",
    "performance/test_flops.py": "unit",
    "performance/test_hlo.py": "unit",
    "ray/test_pipeline.py": "process",
    "referees": "compiled",
    "referees/test_questions.py": "unit",
    "runs/test_failures.py": "process",
    "runs/test_recovery.py": "process",
    "runs/test_reliability.py": "process",
    "shapes/test_assets.py": "compiled",
    "shapes/test_train.py": "compiled",
    "shapes/test_vqascore.py": "compiled",
    "test_docs.py": "process",
    "test_launch.py": "process",
    "tools": "compiled",
    "weights": "compiled",
}
# A minute each: begun last, they would run while the other workers have nothing to do.
LONG = (
    "test_reliability.py",
    "test_pipeline.py",
    "test_contract.py",
    "test_cost.py",
    "test_inversion.py",
    "test_train.py",
    "test_sweep.py",
)


def kind(path: pathlib.PurePath) -> str:
    """The kind of the tests in a file, whose path is relative to tests/."""
    places = [str(path), *map(str, path.parents)]
    return next((KINDS[place] for place in places if place in KINDS), "unit")


def pytest_collection_modifyitems(items):
    """Marks kinds; long files first; slow tests may take as long as they want."""
    root = pathlib.Path(__file__).parent
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    for item in items:
        is_slow = item.get_closest_marker("slow")
        item.add_marker(pytest.mark.timeout(0) if is_slow else kind(item.path.relative_to(root)))


@pytest.fixture(autouse=True, scope="module")
def _free_programs():
    """Drops what a module has compiled: XLA maps memory for each program, and a process may have only so many maps."""
    yield
    jax.clear_caches()
    gc.collect()  # which holds networks and programs in circles


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Tiny random Stable Diffusion (32 px images, 8x8 latents) and CLIP directories: `(sd, clip)`."""
    from tests.oracles import networks

    return networks.save(tmp_path_factory.mktemp("checkpoints"))


def relative_l2(ours, theirs) -> float:
    """`|ours - theirs| / |theirs|` in float64; shapes must be equal, not just broadcast."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def cosine(a, b) -> float:
    """Cosine of the angle between two arrays of equal shape, as vectors."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def gradient_memory(fn, x) -> int:
    """Bytes that the compiled gradient of `fn(x).sum()` needs besides its inputs and outputs."""
    program = jax.jit(jax.grad(lambda x: fn(x).sum())).lower(x).compile()
    return program.memory_analysis().temp_size_in_bytes


def abstract_step(settings):
    """An iteration of a config without weights."""
    sized = abstract_networks.abstract(settings)
    return capacity.make_step(settings, sized.prior, sized.judges)


VIEW_SIZE = 40


def picture(seed=0, height=VIEW_SIZE, width=VIEW_SIZE):
    """Noise with a few saturated and grey patches: ties, clamps and hues without a chroma all occur."""
    image = np.random.default_rng(seed).uniform(size=(height, width, 3)).astype(np.float32)
    image[2:9, 3:12] = (1.0, 0.0, 0.0)
    image[12:20, 20:30] = 0.5
    image[22:30, 5:14] = 0.0
    image[22:30, 20:33] = 1.0
    return image


class Room:
    """Of a disk: so many bytes can still be written."""

    left = float("inf")

    def __init__(self):
        self.lock = threading.Lock()


@pytest.fixture
def room(monkeypatch):
    """A disk that is full after `room.left` bytes, for what is written through disk.py."""
    room = Room()

    class File(io.FileIO):
        def write(self, data):
            with room.lock:  # files are written by several threads
                if not room.left:
                    raise OSError(errno.ENOSPC, "No space left on device")
                taken = super().write(data[: min(len(data), room.left)])
                room.left -= taken
                return taken

    def opened(path, mode, buffering=-1):
        return File(path, mode) if buffering == 0 else open(path, mode, buffering)

    monkeypatch.setattr(files, "open", opened, raising=False)
    return room


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many kB in memory, and gives its directory."""
    mounted = []

    def make(size):
        path = tmp_path / "disk"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", path]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    yield make
    for path in mounted:
        subprocess.run(["umount", path], check=True)
