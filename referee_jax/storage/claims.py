"""Claims: which worker of a pool makes which item."""

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

from referee_jax.hardware import processes
from referee_jax.items import Item

WAIT = 1.0  # seconds between two attempts to claim something


class Claims:
    """The owners of items in a pool of workers: one file per item, created by its owner.

    Another worker may take over a claim that its owner has not refreshed for `expiry` seconds of
    the file system's clock, which all share. If the owner is alive after all, both may make the
    item: the images are equal, and the journal counts it once.
    """

    def __init__(self, directory: Path, expiry: float):
        self.directory, self.expiry, self.owner = directory, expiry, processes.name_process()
        self.held: dict[str, Path] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def take(self, item: Item) -> bool:
        """Claims an item; False if another worker holds it."""
        if item.id in self.held:
            return True
        path = self.directory / f"{item.id}.claim"
        for _ in range(3):
            try:
                self.directory.mkdir(exist_ok=True)  # the last worker to leave removes it
                with open(path, "x") as file:
                    file.write(self.owner)
            except FileNotFoundError:
                continue
            except FileExistsError:
                if not self._expired(path):
                    return False
            else:
                self.held[item.id] = path
                return True
        return False

    def refresh(self) -> None:
        """Keeps the held claims from expiring."""
        for path in self.held.values():
            try:
                os.utime(path)
            except FileNotFoundError:
                pass  # it expired, and was taken over

    def release(self, ids: Collection[str]) -> None:
        """Releases items, done or not."""
        for name in ids:
            path = self.held.pop(name, None)
            if path and _read(path) == self.owner:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Releases everything, and removes the directory if no claims are left."""
        self.release(list(self.held))
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def _now(self) -> float:
        probe = self.directory / f".{self.owner}.now"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now

    def _expired(self, path: Path) -> bool:
        """Removes a claim if it has expired; returns whether there is none now.

        Of several workers that do so at once, only the one that creates the mark, a file named
        after this very claim, removes it.
        """
        try:
            claim = path.stat()
            if self._now() - claim.st_mtime <= self.expiry:
                return False
            mark = path.with_name(f".{path.name}.{claim.st_ino}.{claim.st_mtime_ns}")
            mark.touch(exist_ok=False)
        except FileNotFoundError:
            return True
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if self._now() - mark.stat().st_mtime > self.expiry:
                    mark.unlink()  # the worker that made it died
            return False
        try:
            current = path.stat()
            if (current.st_ino, current.st_mtime_ns) == (claim.st_ino, claim.st_mtime_ns):
                path.unlink()
        except FileNotFoundError:
            pass
        finally:
            mark.unlink(missing_ok=True)
        return True


def forget_claims(directory: Path, done: Collection[str]) -> None:
    """Removes dead workers' claims of `done` items, and the directory if it is then empty."""
    for path in directory.glob("*.claim"):
        if path.stem in done:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
