"""Devices: a mesh, and a function of a batch run on all of them without a word between them.

`jax.shard_map` over the mesh axis `prompt` is the successor that `jax.pmap` names. Prompts are independent, so the compiled
program contains no collective; a test reads it. Where weights are too large for one device, a second axis, `model`, spreads them
over the devices of a group, which then work on the same prompts: there the compiler divides the work, and the only collectives
are within a group.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from referee_jax import console, devices, disk

AXIS, MODEL = "prompt", "model"
LARGE = 2**16  # elements; smaller weights are whole on every device
OTHERS = 30 * 24 * 3600  # seconds for which one that is done waits for the others, who may have more to do
# Where launchers say which process of a job this is, and of how many: Slurm, Open MPI, TPU slices, Kubernetes.
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "JOB_COMPLETION_INDEX")
COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def prompt_mesh(devices: Sequence[jax.Device] | None = None, *, prompt: int = 0, model: int = 1) -> Mesh:
    """A mesh of this process's devices: `prompt` groups (0: as many as there are) of `model` devices each.

    Raises ValueError where there are too few devices, or, without `prompt`, some would be left over.
    """
    devices = list(devices or jax.local_devices())
    groups = prompt or len(devices) // model
    if not 0 < groups * model <= len(devices) or (not prompt and groups * model < len(devices)):
        raise ValueError(f"{len(devices)} devices do not make {prompt or 'whole'} groups of {model}")
    return Mesh(np.array(devices[: groups * model]).reshape(groups, model), (AXIS, MODEL))


def across_devices(fn: Callable, mesh: Mesh, batched: Sequence[bool]) -> Callable:
    """`fn` with each batched argument split along its first axis over the mesh, the others whole on every device.

    The result is joined along its first axis. Batches must be a multiple of the number of groups.
    """
    # Where no weight is split all axes are ours: cuDNN's attention is only then the whole of what a device does.
    own = {AXIS} if mesh.shape[MODEL] > 1 else {AXIS, MODEL}
    specs = tuple(PartitionSpec(AXIS) if is_batched else PartitionSpec() for is_batched in batched)
    out = PartitionSpec(AXIS)
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out, axis_names=own, check_vma=False)


def place(tree: Any, mesh: Mesh, *, batched: bool) -> Any:
    """Puts a pytree on the mesh: split along its leaves' first axis over the groups, or the same in every group.

    Within a group, what is the same in all and LARGE is split along the longest axis that can be. Where there are shapes in it
    (jax.ShapeDtypeStructs) nothing is put anywhere: each leaf becomes one, and is told where it would be.
    """
    is_abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))
    told = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    put = told if is_abstract else jax.device_put
    return jax.tree.map(lambda x: put(x, NamedSharding(mesh, _spec(x, mesh, batched))), tree)


def _spec(x: Any, mesh: Mesh, batched: bool) -> PartitionSpec:
    count = mesh.shape[MODEL]
    if batched:
        return PartitionSpec(AXIS)
    axes = [axis for axis, length in enumerate(x.shape) if length % count == 0]
    if count == 1 or x.size < LARGE or not axes:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: x.shape[axis])
    return PartitionSpec(*[None] * longest, MODEL)


def join(index: int, count: int, place: Path | None, *, timeout: int = 300) -> tuple[int, int]:
    """Joins the other processes of a job by jax.distributed; which one of how many this is. They exchange nothing afterwards.

    On a TPU slice and under Slurm, GKE or Open MPI JAX finds them itself; elsewhere `index` and `count` say who this is, and
    JAX_COORDINATOR_ADDRESS where process 0 listens. Where some are missing after `timeout` seconds JAX ends the process; before
    that it is told who has come to the directory `place`, which all share, if there is one, and who has not. So JAX does
    later, within two minutes, when one of them dies. Who is done ends when all are.
    """
    given = {"process_id": index, "num_processes": count} if "JAX_COORDINATOR_ADDRESS" in os.environ else {}
    # JAX would take SIGTERM for itself, and tell nobody.
    jax.config.update("jax_enable_preemption_service", False)
    number = str(index) if given else next((os.environ[name] for name in RANKS if name in os.environ), "?")
    wanted = range(count) if given else range(next((int(os.environ[x]) for x in COUNTS if x in os.environ), 0))
    waiting = contextlib.nullcontext()
    if place:
        waiting = _presence(place / ".joining", f"process {number} on {disk.HOST}", timeout, wanted)
    with waiting:
        try:
            jax.distributed.initialize(**given, initialization_timeout=timeout, shutdown_timeout_seconds=OTHERS)
        except ValueError as error:
            raise devices.DeviceError(
                f"--distributed: JAX finds no job that this process belongs to ({error}); it is for TPU slices, Slurm, GKE "
                "and Open MPI, or set JAX_COORDINATOR_ADDRESS"
            ) from error
        # Of these processes, and not of their devices: so it ends in time.
        ocp.multihost.sync_global_processes("start", timeout=timeout, processes=set(range(jax.process_count())))
    return jax.process_index(), jax.process_count()


@contextlib.contextmanager
def _presence(place: Path, name: str, timeout: float, wanted: Iterable[int]) -> Iterator[None]:
    """Leaves a file of that name while others are waited for.

    Before the `timeout` is over it tells who has left one, and which of the processes that are `wanted` has not.
    """
    own = place / name
    try:
        place.mkdir(parents=True, exist_ok=True)
        own.touch()
    except OSError as error:
        raise devices.DeviceError(
            f"--distributed: {place.parent} cannot be written: {error.strerror or error}"
        ) from error
    # Those that an earlier job's end left are older than any of this one.
    is_left = lambda file: file.stat().st_mtime < own.stat().st_mtime - timeout  # noqa: E731

    def tell() -> None:
        come = sorted(file.name for file in place.iterdir() if not is_left(file))
        there = {file.split()[1] for file in come}
        missing = ", ".join(str(x) for x in wanted if str(x) not in there)
        console.say(
            f"others of this job are waited for, {timeout:.0f} s at most; here are: {', '.join(come)}"
            + (f"; missing: {missing}" if missing else ""),
            file=sys.stderr,
        )

    timer = threading.Timer(0.6 * timeout, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with contextlib.suppress(OSError):  # others do the same
            for file in filter(is_left, list(place.iterdir())):
                file.unlink(missing_ok=True)
        own.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            place.rmdir()
