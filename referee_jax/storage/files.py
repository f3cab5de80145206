"""Bytes on disk: files that are there whole or not at all, and files of JSON lines that several processes may work on.

A temporary file is locked by who writes it, and the kernel lets go of the lock however the writer dies; so what a crash left
behind is told from what another process is writing this moment. Where a file system has no locks, age decides.
"""

import contextlib
import datetime
import fcntl
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from referee_jax.hardware import processes

PATIENCE = 60.0  # seconds; a process that was stopped while it held a lock holds up nobody longer
STALE = 600.0  # seconds after which a temporary file is nobody's, where no lock can tell


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def finite(value: Any) -> Any:
    """`value` as JSON has it: NumPy numbers and arrays as Python's, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    if isinstance(value, np.ndarray | np.generic):
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- whole files ------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all, also after a loss of power. OSError as from the system."""
    with open_temporary(path) as file:
        try:
            write_all(file, data, path)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    sync_directory(path.parent)


def create(path: Path, data: bytes) -> bool:
    """Writes a file whole, unless there is one; whether there was none."""
    with open_temporary(path) as file:
        try:
            write_all(file, data, path)
            is_new = _link(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)
    sync_directory(path.parent)
    return is_new


def _link(temporary: str, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: two at the same instant are not told apart
        if path.exists():
            return False
        os.replace(temporary, path)
    return True


def open_temporary(path: Path) -> BinaryIO:
    """Opens, empty and locked, a temporary file of what is to be `path`; its name is the file's `name`.

    By chance it is nobody else's, also where containers with the same host name count processes each for themselves.
    """
    while True:
        file = open(path.with_name(f".{path.name}.{processes.HOST}.{secrets.token_hex(6)}.tmp"), "xb", buffering=0)
        lock(file)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # removed by another before it was locked


def write_all(file: BinaryIO, data: bytes, path: Path) -> None:
    """Adds `data` to an unbuffered file, on disk when this returns. An OSError names `path`, and the file is as before."""
    start, rest = file.tell(), memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]  # a full disk takes a part first
        os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            file.seek(start)
            file.truncate()
        error.filename = error.filename or str(path)
        raise


def sync_directory(path: Path) -> None:
    """Puts on disk what was renamed in a directory. Some file systems cannot: only the promise is lost there."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- locks and what is left behind ------------------------------------------------------------------------------------


def lock(file: BinaryIO, seconds: float | None = None) -> bool | None:
    """Locks an open file until it is closed; False if another holds it all the time, None where there are no locks."""
    end = time.monotonic() + (PATIENCE if seconds is None else seconds)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.01)
        except OSError:
            return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file that is there. OSError if it cannot be written."""
    while True:
        with open(path, "rb+", buffering=0) as file:
            lock(file)
            if not os.fstat(file.fileno()).st_nlink:
                continue  # another was put in its place meanwhile
            yield
            return


@contextlib.contextmanager
def abandoned(temporary: Path, clock: float) -> Iterator[BinaryIO | None]:
    """A temporary file, opened and locked, if nobody is at work on it any more; else None.

    `clock` is the time by the file system's own clock, as of a file that was touched this moment.
    """
    try:
        file = open(temporary, "rb+", buffering=0)
    except FileNotFoundError:
        yield None
        return
    with file:
        is_locked = lock(file, 0)
        # The lock of another machine's process is not seen on every network file system.
        is_of_here = re.search(rf"\.{re.escape(processes.HOST)}\.\w+\.tmp$", temporary.name)
        is_old = clock - os.fstat(file.fileno()).st_mtime > STALE
        yield file if is_locked is not False and (is_old or (is_locked and is_of_here)) else None


def remove_abandoned(directory: Path, clock: float) -> None:
    """Removes the temporary files that crashed processes left in a directory, if there is one."""
    for temporary in directory.glob(".*.tmp"):
        with abandoned(temporary, clock) as file:
            if file:
                temporary.unlink(missing_ok=True)


# --- JSON lines -------------------------------------------------------------------------------------------------------


def encode_lines(*records: Mapping[str, Any]) -> bytes:
    """A line of JSON for each record; in ASCII, so that no reader splits it elsewhere."""
    return b"".join(json.dumps(finite(record), allow_nan=False).encode() + b"\n" for record in records)


def append(path: Path, *records: Mapping[str, Any]) -> None:
    """Adds a line of JSON for each record to a file, on disk when this returns; all of them, or with OSError none."""
    data = encode_lines(*records)
    for is_last in (False, False, True):
        with open(path, "ab", buffering=0) as file:
            lock(file)
            # Another may have replaced or removed the file (RunDirectory.merge) before it was locked: then it is opened anew.
            if is_last or os.fstat(file.fileno()).st_nlink:
                file.seek(0, os.SEEK_END)
                write_all(file, data, path)
                return


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; lines that are not one (half written, say) are left out."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return parse_lines(data.split(b"\n"))


def parse_lines(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """As `read_lines`."""
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def mend(path: Path) -> None:
    """Ends a file of JSON lines that a crash cut short: a whole last line gets its end, half a one is taken away."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        lock(file)  # who adds a line this moment comes to its end
        data = file.read()
        start = data.rfind(b"\n") + 1
        if start == len(data):
            return
        try:
            json.loads(data[start:])
            file.write(b"\n")
        except ValueError:
            file.truncate(start)
        file.flush()
        os.fsync(file.fileno())
