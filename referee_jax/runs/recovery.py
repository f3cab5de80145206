"""Device failures and hangs.

After an error the device's runtime is often of no use to the process. So the process logs a "device
failed" line with the items of the batch and ends with code 75, and a new one goes on: the same
command, started by `restart` or by a launcher. Items with one such line are made last, items with
two are left out.
"""

import collections
import contextlib
import dataclasses
import faulthandler
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from referee_jax.hardware import processes
from referee_jax.items import Item
from referee_jax.storage import files, run_directory

TRIES = 2  # failures of an item after which it is left out
IN_A_ROW = 4  # failures on a host, with no image made in between, after which its device is given up
HOUR = 3600.0
LAST = 10.0  # seconds for the last message of a process that hangs

_EVENT = re.compile(rb'"event": "(device failed|failed|end)"')


class DeviceFailed(Exception):
    """The device failed at the batch of `items`. `made` counts the images of this process.

    A new process may go on, unless the device `is_given_up`.
    """

    def __init__(self, items: Sequence[Item], made: Any, reason: str, *, is_given_up: bool = False):
        super().__init__(reason)
        self.items, self.made, self.reason, self.is_given_up = items, made, reason, is_given_up


@dataclasses.dataclass
class Failures:
    """Device failures of a run: of each item's id, and in a row on this host without an image.

    A "failed" line, which reports the items that are given up, sets both to 0: the next process
    tries these items again.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    in_a_row: int = 0

    @classmethod
    def read(cls, run: run_directory.RunDirectory) -> "Failures":
        """Reads log.jsonl; of a run in a bucket, also what other processes have sent of theirs."""
        logs, failures = sorted(run.path.glob("log*.jsonl")), cls()
        records = []
        for log in logs:
            with log.open("rb") as lines:  # the log is long: parse only what may be such a line
                records += files.parse_lines(filter(_EVENT.search, lines))
        for record in sorted(records, key=lambda x: x["time"]) if len(logs) > 1 else records:
            failures._add(record)
        return failures

    def _add(self, record: dict) -> None:
        event, is_here = record.get("event"), record.get("host") == processes.HOST
        if event == "device failed":
            self.counts.update(record["items"])
            if is_here:
                self.in_a_row = 1 if record["images"] else self.in_a_row + 1
        elif event == "failed":
            for name in record["items"]:
                self.counts.pop(name, None)
            if is_here:
                self.in_a_row = 0
        elif event == "end" and is_here and record["images"]:
            self.in_a_row = 0


def log_failed(run: run_directory.RunDirectory, items: Sequence[Item]) -> None:
    """Logs that these items are given up; see Failures."""
    run.log("failed", host=processes.HOST, items=[item.id for item in items])
    run.storage.send()


def restart(**changes: object) -> NoReturn:
    """Starts this command again, with some flags changed, in the place of this process.

    The process id stays, so signals and the exit code still reach whoever started the command.
    Raises OSError where the system refuses.
    """
    is_changed = tuple(f"--{name}=" for name in changes)
    arguments = [argument for argument in sys.orig_argv if not argument.startswith(is_changed)]
    sys.stdout.flush()
    sys.stderr.flush()
    signal.setitimer(signal.ITIMER_REAL, 0)  # the new process would inherit it
    # Drivers lock the files of their devices: the new process has to open them itself.
    for number in filter(lambda x: x > 2, map(int, os.listdir("/dev/fd"))):
        with contextlib.suppress(OSError):
            os.set_inheritable(number, False)
    os.execv(sys.executable, arguments + [f"--{name}={value}" for name, value in changes.items()])


class Watchdog:
    """Ends the process with code 1 when nothing has `moved` for `seconds`: a hang raises no error.

    0 seconds: ten times as long as it ever took, but at least an hour, and six hours the first time
    (compilation). Seconds are counted, not read from a clock: a process that was stopped (SIGSTOP)
    and goes on has not hung. `report` gets the seconds without a move.
    """

    def __init__(self, seconds: float, report: Callable[[float], None], *, end: Callable[[int], None] = os._exit):
        self.seconds, self.report, self.end = seconds, report, end
        self.longest: float | None = None
        self._ticks, self._mark = 0, 0  # each is written by one thread
        self._tick = 1.0 if not seconds else min(1.0, seconds / 4)

    @property
    def still(self) -> float:
        """Seconds since the last move."""
        return (self._ticks - self._mark) * self._tick

    def moved(self) -> None:
        """Notes that some work was completed."""
        self.longest = max(self.longest or 0.0, self.still)
        self._mark = self._ticks

    @property
    def limit(self) -> float:
        """Seconds that are allowed without a move."""
        return self.seconds or (6 * HOUR if self.longest is None else max(HOUR, 10 * self.longest))

    @contextlib.contextmanager
    def watching(self):
        """Watches inside the `with` block."""
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(self._tick):
            self._ticks += 1
            if self.still > self.limit:
                # In a thread: if the disk hangs, the report does so too.
                last = threading.Thread(target=self._report, daemon=True)
                last.start()
                last.join(LAST)
                self.end(1)
                return

    def _report(self) -> None:
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(sys.stderr)  # where each thread is
        with contextlib.suppress(Exception):
            self.report(self.still)
