"""Work: one item is one image to be made, named by its prompt and the number of the sample, never by who makes it.

Several processes share a run in one of two ways: each has a fixed `share` of the items, or, in a pool of workers that come
and go, each takes what nobody has yet (`Claims`). `Work` hands them out batch by batch, those first that are begun already.
"""

import collections
import contextlib
import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from referee_jax import items as items_lib
from referee_jax.hardware import processes
from referee_jax.items import Item, Part

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


class Work:
    """What is left to do for this process, handed out batch by batch.

    `begun` are batches that an earlier process has left in the middle; of those only what is wanted counts. With `claims`
    every item is asked for before it is handed out, and the last ones are waited for: `done()` says which ids are.
    """

    def __init__(
        self,
        wanted: Sequence[Item],
        begun: Sequence[Part] = (),
        *,
        claims: Claims | None = None,
        done: Callable[[], Collection[str]] = frozenset,
    ):
        self.claims, self.done, self.begun = claims, done, []
        left = dict.fromkeys(wanted)
        for part in sorted(begun, key=lambda part: -part.step):
            part = part.only(left.keys())
            if part.items:
                self.begun.append(part)
            for item in part.items:
                del left[item]
        self.fresh = collections.deque(left)

    def take(
        self,
        size: int,
        *,
        stopped: Callable[[], bool] = lambda: False,
        before_waiting: Callable[[], None] = lambda: None,
    ) -> Part | None:
        """The next at most `size` items, or None where nothing is left, or `stopped()` while the last ones are waited for."""
        while (self.begun or self.fresh) and not stopped():
            is_begun = bool(self.begun)
            part = self._next(size)
            if not self.claims:
                return part
            if is_begun and not part.items:
                continue  # another has it; the next may be had
            finished = self.done()  # also what others did between our last look and the claim
            self.claims.release({item.id for item in part.items} & set(finished))
            self.fresh = collections.deque(items_lib.missing(self.fresh, finished))
            if not part.items:
                before_waiting()
                time.sleep(WAIT if self.fresh else 0)
            elif left := items_lib.missing(part.items, finished):
                return part.only(left)
        return None

    def _next(self, size: int) -> Part:
        """Begun ones first; in a pool those that can be had, perhaps none."""
        is_ours = self.claims.take if self.claims else lambda item: True
        if self.begun:
            part, *rest = self.begun.pop(0).split(size)
            self.begun[:0] = rest
            ours = [item for item in part.items if is_ours(item)]
            self.fresh.extend(item for item in part.items if item not in ours)
            return part.only(ours)
        taken, passed = [], []
        while self.fresh and len(taken) < size:
            item = self.fresh.popleft()
            (taken if is_ours(item) else passed).append(item)
        self.fresh.extendleft(reversed(passed))
        return Part(tuple(taken))

    def put_back(self, part: Part) -> None:
        """A part that was not made comes first; what was begun goes on from there."""
        if part.state:
            self.begun.insert(0, part)
        else:
            self.fresh.extendleft(reversed(part.items))
