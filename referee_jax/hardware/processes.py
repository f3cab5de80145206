"""Processes: their names, whether they live, and those of one job that find each other."""

import contextlib
import os
import platform
import re
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from referee_jax import console
from referee_jax.hardware import devices

HOST = re.sub(r"[^A-Za-z0-9-]+", "-", platform.node())[:63]


OTHERS = 30 * 24 * 3600  # seconds for which one that is done waits for the others, who may have more to do


# Where launchers say which process of a job this is, and of how many: Slurm, Open MPI, TPU slices, Kubernetes.
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "JOB_COMPLETION_INDEX")


COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


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
        waiting = _presence(place / ".joining", f"process {number} on {HOST}", timeout, wanted)
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
    is_left = lambda file: file.stat().st_mtime < own.stat().st_mtime - timeout

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


def name_process() -> str:
    """A name that no other process has or will have."""
    return f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"


def is_alive(name: str) -> bool:
    """Whether a process of this name may be at work: one of another machine may always."""
    host, _, rest = name.rpartition("-")[0].rpartition("-")
    if host != socket.gethostname() or not rest.isdigit():
        return True
    try:
        os.kill(int(rest), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
