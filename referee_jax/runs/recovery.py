"""Bad days of a device: what it failed at is tried once more, then left out; where nothing moves any more, the process ends.

After an error the device's runtime is often of no use to the process that met it. So the process begins anew: the same number,
the same command (exec), and `Tried` in its environment.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from referee_jax.items import Item

VARIABLE = "REFEREE_JAX_TRIED"
FAILURES = 2  # batches given up in a row, with no image made between them: then the device is given up
HOUR = 3600.0
LAST = 10.0  # seconds for last words


class DeviceFailed(Exception):
    """The device failed at a batch, after so many images were made."""

    def __init__(self, items: Sequence[Item], made: int, why: str):
        super().__init__(why)
        self.items, self.made, self.why = items, made, why


@dataclasses.dataclass(frozen=True)
class Tried:
    """At what the device failed: items, by `key`, `once` or twice (`failed`), and batches given up `in_a_row`."""

    once: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    in_a_row: int = 0

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> "Tried":
        """What an earlier process of this number has left."""
        found = json.loads(environment.get(VARIABLE, "{}"))
        failed = frozenset(found.get("failed", ()))
        return cls(failed.union(found.get("once", ())), failed, found.get("in_a_row", 0))

    def to_json(self) -> str:
        """What `read` reads."""
        left = {"once": sorted(self.once - self.failed), "failed": sorted(self.failed), "in_a_row": self.in_a_row}
        return json.dumps(left, separators=(",", ":"))

    def after(self, error: DeviceFailed) -> "Tried":
        """With one failure more."""
        keys = frozenset(map(key, error.items))
        in_a_row = (0 if error.made else self.in_a_row) + bool(keys & self.once)
        return Tried(self.once | keys, self.failed | (keys & self.once), in_a_row)

    def says(self, item: Item) -> bool:
        """Whether an item is to be left out."""
        return key(item) in self.failed


def key(item: Item) -> str:
    """An item in few letters: an environment variable holds some 100,000."""
    return f"{item.prompt_id:x}.{item.sample}"


def begin_anew(tried: Tried) -> NoReturn:
    """This command once more, in the place of this process. OSError where the system does not let it."""
    os.environ[VARIABLE] = tried.to_json()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.setitimer(signal.ITIMER_REAL, 0)  # which the new process would inherit
    for number in filter(lambda x: x > 2, map(int, os.listdir("/dev/fd"))):
        with contextlib.suppress(OSError):  # the device's files, locked perhaps, which the new process opens for itself
            os.set_inheritable(number, False)
    os.execv(sys.executable, sys.orig_argv)


class Watchdog:
    """Ends the process with code 1 when nothing has `moved` for so many seconds: what hangs raises no error.

    0 seconds: ten times as long as it ever took, an hour at least, six hours the first time (compilation). Seconds are counted
    and not read from a clock: a process that was stopped for a night and goes on has not hung.
    """

    def __init__(self, seconds: float, tell: Callable[[float], None], *, end: Callable[[int], None] = os._exit):
        self.seconds, self.tell, self.end = seconds, tell, end
        self.longest: float | None = None
        self._ticks, self._mark = 0, 0  # each is written by one thread
        self._over, self._tick = threading.Event(), 1.0 if not seconds else min(1.0, seconds / 4)

    @property
    def still(self) -> float:
        """Seconds since something moved."""
        return (self._ticks - self._mark) * self._tick

    def moved(self) -> None:
        """Something came to its end."""
        self.longest = max(self.longest or 0.0, self.still)
        self.waits()

    def waits(self) -> None:
        """It is others that are waited for."""
        self._mark = self._ticks

    @property
    def limit(self) -> float:
        """Seconds that it may take now."""
        return self.seconds or (6 * HOUR if self.longest is None else max(HOUR, 10 * self.longest))

    @contextlib.contextmanager
    def watching(self):
        """Watches meanwhile."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._tick):
            self._ticks += 1
            if self.still > self.limit:
                last = threading.Thread(target=self._tell, daemon=True)  # a disk that hangs lets nobody tell of it
                last.start()
                last.join(LAST)
                self.end(1)
                return

    def _tell(self) -> None:
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(sys.stderr)  # where each thread is; no stderr, no help
        with contextlib.suppress(Exception):
            self.tell(self.still)
