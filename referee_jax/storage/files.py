"""Atomic files, and files of JSON lines that several processes append to.

Each writer locks its temporary file. The kernel releases the lock however the writer dies, so the
lock tells whether the file is still being written. On file systems without locks, age decides.
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

PATIENCE = 60.0  # seconds to wait for a lock, whose owner may have been stopped
STALE = 600.0  # seconds after which a temporary file counts as abandoned, where locks cannot tell


def now() -> str:
    """The time as text: UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def finite(value: Any) -> Any:
    """`value` in JSON's types: NumPy numbers and arrays as Python's, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    if isinstance(value, np.ndarray | np.generic):
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- whole files ------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file atomically, also across a loss of power. Raises OSError."""
    with open_temporary(path) as file:
        try:
            write_all(file, data, path)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    sync_directory(path.parent)


def create(path: Path, data: bytes) -> bool:
    """Writes a file atomically unless it exists; returns whether it was written."""
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
    except OSError:  # a file system without links: of two writers at the same instant, both succeed
        if path.exists():
            return False
        os.replace(temporary, path)
    return True


def open_temporary(path: Path) -> BinaryIO:
    """Opens a new, locked temporary file beside `path`; its path is the file's `name`.

    The random suffix keeps names unique across containers that share a host name.
    """
    while True:
        file = open(path.with_name(f".{path.name}.{processes.HOST}.{secrets.token_hex(6)}.tmp"), "xb", buffering=0)
        lock(file)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process removed it before it was locked


def write_all(file: BinaryIO, data: bytes, path: Path) -> None:
    """Appends `data` to an unbuffered file and syncs it. An OSError names `path` and undoes it."""
    start, rest = file.tell(), memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]  # an almost full disk accepts only a part
        os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            file.seek(start)
            file.truncate()
        error.filename = error.filename or str(path)
        raise


def sync_directory(path: Path) -> None:
    """Makes renames in a directory durable, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- locks and abandoned files ----------------------------------------------------------------------------------------


def lock(file: BinaryIO, seconds: float | None = None) -> bool | None:
    """Locks an open file until it is closed, waiting at most `seconds` (default PATIENCE).

    Returns False if its holder did not release it in time, None if the file system has no locks.
    """
    deadline = time.monotonic() + (PATIENCE if seconds is None else seconds)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        except OSError:
            return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of an existing file. Raises OSError if it cannot be written."""
    while True:
        with open(path, "rb+", buffering=0) as file:
            lock(file)
            if not os.fstat(file.fileno()).st_nlink:
                continue  # it was replaced meanwhile: lock the new one
            yield
            return


@contextlib.contextmanager
def abandoned(temporary: Path, clock: float) -> Iterator[BinaryIO | None]:
    """Opens and locks a temporary file if its writer is gone; else gives None.

    `clock` is the present by the file system's clock, such as the mtime of a file just touched.
    """
    try:
        file = open(temporary, "rb+", buffering=0)
    except FileNotFoundError:
        yield None
        return
    with file:
        is_locked = lock(file, 0)
        # Some network file systems do not show the locks of other machines.
        is_local = re.search(rf"\.{re.escape(processes.HOST)}\.\w+\.tmp$", temporary.name)
        is_old = clock - os.fstat(file.fileno()).st_mtime > STALE
        yield file if is_locked is not False and (is_old or (is_locked and is_local)) else None


def remove_abandoned(directory: Path, clock: float) -> None:
    """Removes the temporary files of dead processes from a directory; `clock` as in `abandoned`."""
    for temporary in directory.glob(".*.tmp"):
        with abandoned(temporary, clock) as file:
            if file:
                temporary.unlink(missing_ok=True)


# --- JSON lines -------------------------------------------------------------------------------------------------------


def encode_lines(*records: Mapping[str, Any]) -> bytes:
    """One line of JSON per record, in ASCII, so that no reader sees other line breaks."""
    return b"".join(json.dumps(finite(record), allow_nan=False).encode() + b"\n" for record in records)


def append(path: Path, *records: Mapping[str, Any], seconds: float | None = None) -> bool:
    """Appends a line of JSON per record and syncs the file: all of them, or on OSError none.

    Returns False if it was locked by another for so many seconds (default PATIENCE), who may have been stopped.
    """
    data, is_free = encode_lines(*records), True
    for is_last in (False, False, True):
        with open(path, "ab", buffering=0) as file:
            is_free &= lock(file, seconds) is not False
            # RunDirectory.merge may have replaced or removed it before the lock: open it again.
            if is_last or os.fstat(file.fileno()).st_nlink:
                file.seek(0, os.SEEK_END)
                write_all(file, data, path)
                break
    return is_free


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines. Skips invalid lines, such as half written ones."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return parse_lines(data.split(b"\n"))


def parse_lines(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """`read_lines` of lines in memory."""
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def mend(path: Path) -> None:
    """Ends the last line of a file of JSON lines after a crash; removes it if it was cut short."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        lock(file)  # lets a line that is being appended come to its end
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
