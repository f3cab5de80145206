"""Objects in a bucket: gs://, s3://, or anything else that fsspec supports. Only this module uses fsspec."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec

from referee_jax.hardware import processes

LOCK = 600.0  # seconds after which a lock's owner counts as dead
WAIT = 1.0  # seconds between two attempts to get a lock


def is_remote(path: object) -> bool:
    """Whether a path is a URL in a bucket, such as gs://bucket/run."""
    return "://" in str(path)


def local_only(path: str) -> Path:
    """The path with ~ expanded. ValueError for a URL in a bucket, where only runs can be."""
    if is_remote(path):
        raise ValueError(
            f"{path} is in a bucket: copy it down first (gcloud storage rsync, aws s3 sync), and give its path"
        )
    return Path(path).expanduser()


def read_file(file: str | os.PathLike) -> bytes:
    """The content of a local file, or of an object by its URL. OSError as from either; ValueError for a URL of no kind."""
    if not is_remote(file):
        return Path(file).expanduser().read_bytes()
    fs, path = filesystem(str(file))
    return fs.cat_file(path)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """What reaches a URL, and its path there. ValueError for one of no kind, or that needs what is not installed."""
    kind = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be reached: {error} (gs:// and s3:// need the extra [{kind}])") from error


class Objects:
    """The objects below a URL. All methods raise OSError when the bucket fails.

    The constructor raises ValueError for a URL of an unknown kind, or one that needs a package that is not installed.
    """

    def __init__(self, url: str):
        self.name, self.process = url.rstrip("/"), processes.name_process()
        self.fs, self.root = filesystem(self.name)

    def names(self, folder: str = "") -> list[str]:
        """The names in a folder of the bucket, sorted."""
        with self._os_errors(), contextlib.suppress(FileNotFoundError):
            paths = self.fs.ls(self._at(folder), detail=False)
            return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)
        return []

    def open(self, name: str) -> BinaryIO:
        """Opens an object for reading, which fetches what is read of it. FileNotFoundError if it does not exist."""
        with self._os_errors():
            return self.fs.open(self._at(name), "rb")

    def write(self, name: str, data: bytes) -> None:
        """Writes or replaces an object."""
        with self._os_errors():
            self.fs.pipe_file(self._at(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object unless it exists; returns whether it was written."""
        try:
            with self._os_errors():
                self.fs.pipe_file(self._at(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def read(self, name: str) -> bytes | None:
        """An object's content; None if it does not exist."""
        with self._os_errors(), contextlib.suppress(FileNotFoundError):
            return self.fs.cat_file(self._at(name))
        return None

    def remove(self, *names: str) -> None:
        """Removes objects, where they exist."""
        for name in names:
            with self._os_errors(), contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._at(name))

    def modified(self, name: str) -> float | None:
        """When an object was last written, Unix seconds of the bucket's clock; None if missing."""
        with self._os_errors(), contextlib.suppress(FileNotFoundError):
            return self.fs.modified(self._at(name)).timestamp()
        return None

    def now(self) -> float:
        """The bucket's clock, Unix seconds."""
        probe = f".{self.process}.now"
        self.write(probe, b"")
        now = self.modified(probe)
        self.remove(probe)
        if now is None:
            raise OSError(f"{self.name}: an object that was just written is missing")
        return now

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[Callable[[], bool]]:
        """Holds a lock across processes: an object that only one can create. Gives a function: whether it is still ours.

        One that is older than LOCK by the bucket's clock may be taken over.
        """
        lock, owner = f"locks/{name}", self.process.encode()
        is_ours = lambda: self.read(lock) == owner
        ahead = None  # seconds by which the bucket's clock is ahead of the monotonic one: asked once, in three requests
        while not self.create(lock, owner):
            ahead = self.now() - time.monotonic() if ahead is None else ahead
            written = self.modified(lock)
            if written is not None and time.monotonic() + ahead - written > LOCK:
                self.remove(lock)
            else:
                time.sleep(WAIT)
        try:
            yield is_ours
        finally:
            if is_ours():
                self.remove(lock)

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        """Turns the errors of the bucket's library into OSErrors."""
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # every kind of bucket has its own
            if _is_conflict(error):
                raise FileExistsError(str(error)) from error
            raise OSError(f"{self.name}: {type(error).__name__}: {str(error)[:200]}") from error


def _is_conflict(error: BaseException | None) -> bool:
    """Whether an error means that the object exists, or that another process is writing it."""
    while error is not None:
        response = getattr(error, "response", None)
        code = response.get("Error", {}).get("Code") if isinstance(response, dict) else getattr(error, "code", None)
        if str(code) in ("412", "PreconditionFailed", "ConditionalRequestConflict"):
            return True
        error = error.__cause__
    return False
