"""Drivers in processes of their own, whose actors, or which themselves, are killed."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq

ROOT = pathlib.Path(__file__).parent.parent.parent
DRIVER = pathlib.Path(__file__).with_name("driver.py")


def alone() -> dict[str, str]:
    """The environment of a process with one device: the tests' own has eight."""
    own = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    return own | {
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray would kill actors again and again, without end, while other tests fill the machine's memory.
        "RAY_memory_monitor_refresh_ms": "0",
        "OMP_NUM_THREADS": "1",
    }


def reference(prompts, workdir, *flags: str) -> None:
    """What `run` makes of a table, on one device as an actor does."""
    command = [sys.executable, "-m", "referee_jax.run", f"--prompts={prompts}", f"--workdir={workdir}", *flags]
    subprocess.run(command, env=alone() | {"JAX_NUM_CPU_DEVICES": "1"}, cwd=ROOT, check=True, capture_output=True)


def start(engine: str, prompts, out, *flags: str, **environment: str) -> subprocess.Popen:
    """Starts a driver in a session of its own."""
    command = [sys.executable, str(DRIVER), engine, str(prompts), str(out), *flags]
    return subprocess.Popen(
        command, env=alone() | environment, cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run(*arguments, seconds: float = 400.0, **environment: str) -> str:
    """Runs a driver to its end; returns the line with its counts, behind which Ray may still tell of the dead."""
    driver = start(*arguments, **environment)
    try:
        out, _ = driver.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(driver.pid)
        raise AssertionError(f"no end in {seconds:.0f} s:\n{driver.communicate()[0][-3000:]}") from None
    assert driver.returncode == 0, out[-3000:]
    return next(line for line in reversed(out.splitlines()) if line.startswith("{"))


def actors(driver: int) -> list[int]:
    """The processes of the actors of a driver."""
    parents, names = {}, {}
    for directory in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            status = (directory / "stat").read_text().rpartition(")")[2].split()
            parents[int(directory.name)] = int(status[1])
            names[int(directory.name)] = (directory / "cmdline").read_bytes()
        except OSError:
            continue

    def is_ours(number: int) -> bool:
        while number > 1 and number != driver:
            number = parents.get(number, 0)
        return number == driver

    return [number for number, name in names.items() if b"MapBatches(Actor)" in name and is_ours(number)]


def an_actor(driver: subprocess.Popen) -> int:
    """The process of an actor of a driver, as soon as there is one: a process has no name while it gets another."""
    return wait_for(lambda: actors(driver.pid), driver)[0]


def wait_for(condition, driver: subprocess.Popen, seconds: float = 400.0):
    """Waits until a condition gives something; its value. The driver must not end meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        assert driver.poll() is None, driver.communicate()[0][-3000:]
        time.sleep(0.05)
    kill(driver.pid)
    raise AssertionError(f"nothing came of it in {seconds:.0f} s:\n{driver.communicate()[0][-3000:]}")


def kill(number: int) -> None:
    """As by the kernel, at once."""
    os.kill(number, signal.SIGKILL)


def rows(out) -> list[dict]:
    """All rows of an output, in order."""
    tables = [pq.read_table(file) for file in sorted(pathlib.Path(out).glob("*/*.parquet"))]
    return sorted((row for table in tables for row in table.to_pylist()), key=lambda row: row["id"])
