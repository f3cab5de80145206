"""Processes: their names, whether they are alive, and joining those of one job."""

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
OTHERS = 30 * 24 * 3600  # seconds that a finished process waits for the others of its job
# Variables with the number of a process, and of all: Slurm, Open MPI, TPU slices, Kubernetes.
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "JOB_COMPLETION_INDEX")
COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def join(index: int, count: int, directory: Path | None, *, timeout: int = 300) -> tuple[int, int]:
    """Joins the processes of a job by jax.distributed. They exchange no data afterwards.

    They join directly, whatever proxies the environment names. JAX ends all processes if some are
    missing after `timeout` seconds, and within two minutes when one dies. A finished process waits for
    the others.

    Args:
        index: the number of this process, used if JAX_COORDINATOR_ADDRESS names where process 0
            listens. Else JAX asks the launcher: a TPU slice, Slurm, GKE or Open MPI.
        count: the number of processes, used likewise.
        directory: shared by all processes, if any; by files in it this names the missing ones
            before the timeout, which JAX does not.
        timeout: seconds.

    Returns:
        The number of this process and the number of all.

    Raises:
        DeviceError: JAX finds no job, or the directory cannot be written.
    """
    address = {"process_id": index, "num_processes": count} if "JAX_COORDINATOR_ADDRESS" in os.environ else {}
    # JAX's preemption service would intercept SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    number = str(index) if address else next((os.environ[name] for name in RANKS if name in os.environ), "?")
    total = count if address else next((int(os.environ[name]) for name in COUNTS if name in os.environ), 0)
    waiting = contextlib.nullcontext()
    if directory:
        waiting = _presence(directory / ".joining", f"process {number} on {HOST}", timeout, range(total))
    with waiting:
        try:
            with _without_proxies():
                jax.distributed.initialize(**address, initialization_timeout=timeout, shutdown_timeout_seconds=OTHERS)
        except ValueError as error:
            raise devices.DeviceError(
                f"--distributed: JAX finds no job that this process belongs to ({error}); it is for TPU slices, Slurm, GKE "
                "and Open MPI, or set JAX_COORDINATOR_ADDRESS"
            ) from error
        # `processes` makes this a barrier of processes; that of their devices has no timeout.
        ocp.multihost.sync_global_processes("start", timeout=timeout, processes=set(range(jax.process_count())))
    return jax.process_index(), jax.process_count()


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Takes proxies out of the environment: JAX's connections follow http_proxy and wait there for each other."""
    proxies = {name: os.environ.pop(name) for name in list(os.environ) if name.lower().endswith("_proxy")}
    try:
        yield
    finally:
        os.environ.update(proxies)


@contextlib.contextmanager
def _presence(directory: Path, name: str, timeout: float, indices: Iterable[int]) -> Iterator[None]:
    """Keeps a file `name` in a shared directory while this process waits for the others of its job.

    After 60 % of `timeout` seconds it prints which processes have one, and which of `indices` have
    none. JAX (0.10) does not: it aborts all with "DEADLINE_EXCEEDED ... RegisterTask".
    """
    file = directory / name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise devices.DeviceError(
            f"--distributed: {directory.parent} cannot be written: {error.strerror or error}"
        ) from error
    # Files of an earlier job are older than any of this one.
    is_stale = lambda other: other.stat().st_mtime < file.stat().st_mtime - timeout

    def report() -> None:
        present = sorted(other.name for other in directory.iterdir() if not is_stale(other))
        numbers = {other.split()[1] for other in present}
        missing = ", ".join(str(index) for index in indices if str(index) not in numbers)
        console.say(
            f"waiting for other processes of this job, {timeout:.0f} s at most; present: {', '.join(present)}"
            + (f"; missing: {missing}" if missing else ""),
            file=sys.stderr,
        )

    timer = threading.Timer(0.6 * timeout, report)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with contextlib.suppress(OSError):  # other processes may remove the same files
            for other in filter(is_stale, list(directory.iterdir())):
                other.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            directory.rmdir()


def name_process() -> str:
    """A name for this process that no other ever has."""
    return f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"


def is_alive(name: str) -> bool:
    """Whether the process of this name may be alive; always true for other machines."""
    number = _number_here(name)
    return number is None or _exists(number)


def is_at_work(name: str) -> bool:
    """Whether the process of this name is another one of this machine, and alive."""
    number = _number_here(name)
    return number not in (None, os.getpid()) and _exists(number)


def _number_here(name: str) -> int | None:
    """The process id of a name of this machine; None for another's."""
    host, _, number = name.rpartition("-")[0].rpartition("-")
    return int(number) if host == socket.gethostname() and number.isdigit() else None


def _exists(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
