"""Claims: who makes which item, in a pool of workers that come and go."""

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

from referee_jax.hardware import processes
from referee_jax.items import Item

WAIT = 1.0  # seconds between two looks at what others have claimed


class Claims:
    """Who makes what, in a pool of workers that come and go: a file for each item, made by who takes it first.

    A claim that its owner has not refreshed for `expiry` seconds may be taken over. Ages are told by the clock of the file
    system, which is one for all. Where an owner that was taken for dead comes back, both may make the item: the images are the
    same, and the journal counts it once.
    """

    def __init__(self, directory: Path, expiry: float):
        self.directory, self.expiry, self.owner = directory, expiry, processes.name_process()
        self.held: dict[str, Path] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def take(self, item: Item) -> bool:
        """Whether the item is ours now: it was already, nobody had it, or who had it is gone."""
        if item.id in self.held:
            return True
        path = self.directory / f"{item.id}.claim"
        for _ in range(3):
            try:
                self.directory.mkdir(exist_ok=True)  # who leaves last removes it
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
        """Says that we are still at work on what we hold."""
        for path in self.held.values():
            try:
                os.utime(path)
            except FileNotFoundError:
                pass  # we were so slow that it was taken over

    def release(self, ids: Collection[str]) -> None:
        """Gives items back, done or not."""
        for name in ids:
            path = self.held.pop(name, None)
            if path and _read(path) == self.owner:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Gives everything back, and removes the directory if nobody has anything."""
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
        """Takes away a claim that has expired; whether there is none now.

        Of those who see it expired at once, one makes the mark of this very claim, and may.
        """
        try:
            seen = path.stat()
            if self._now() - seen.st_mtime <= self.expiry:
                return False
            mark = path.with_name(f".{path.name}.{seen.st_ino}.{seen.st_mtime_ns}")
            mark.touch(exist_ok=False)
        except FileNotFoundError:
            return True
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if self._now() - mark.stat().st_mtime > self.expiry:
                    mark.unlink()  # whoever made it died at it
            return False
        try:
            now = path.stat()
            if (now.st_ino, now.st_mtime_ns) == (seen.st_ino, seen.st_mtime_ns):
                path.unlink()
        except FileNotFoundError:
            pass
        finally:
            mark.unlink(missing_ok=True)
        return True


def forget_claims(directory: Path, done: Collection[str]) -> None:
    """Removes the claims of items that are `done`, which who died left, and the directory if there are no others."""
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
