"""How far all actors are: counted in an actor of its own, printed by the driver."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from referee_jax import console

SECONDS = 10.0  # between two lines
OWN = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}  # it counts, and takes no CPU from those that compute


class Counts:
    """Rows by status. A table whose actor died is made again, and counts once."""

    def __init__(self):
        self.tables: dict[str, Mapping[str, int]] = {}
        self.begun: Counter[str] = Counter()

    def begin(self, name: str) -> int:
        """Notes that a table or row is begun; returns how often it was before."""
        self.begun[name] += 1
        return self.begun[name] - 1

    def add(self, name: str, counts: Mapping[str, int]) -> None:
        """Notes how many rows of a table, which is done, came to which status; none of a row alone."""
        self.begun.pop(name, None)
        if counts:
            self.tables[name] = counts

    def read(self) -> dict[str, int]:
        """Status -> rows."""
        total: Counter[str] = Counter()
        for counts in self.tables.values():
            total.update(counts)
        return dict(total)


class Tally:
    """Counts in a process of their own, as actors reach them. Where it died they begin anew: progress is no reason to end."""

    def __init__(self, counts: Any):
        self.counts = counts

    def begin(self, name: str) -> int:
        """See Counts."""
        try:
            return ray.get(self.counts.begin.remote(name))
        except ray.exceptions.RayError:
            return 0

    def add(self, name: str, counts: Mapping[str, int]) -> None:
        """See Counts."""
        self.counts.add.remote(name, counts)


def line(counts: Mapping[str, int], total: int, rate: float) -> str:
    """Progress, at so many images a second."""
    done = sum(counts.values())
    others = [f"{count} {status}" for status, count in sorted(counts.items()) if status != "ok"]
    times = [f"{rate:.2f} images/s", f"{(total - done) / rate:.0f} s left"] if rate > 0 else []
    return ", ".join([f"{done}/{total} images", *others, *times])


@contextlib.contextmanager
def shown(total: int) -> Iterator[Tally]:
    """Prints progress now and then; gives what is to be told of all that is made."""
    counts = ray.remote(**OWN)(Counts).remote()
    over = threading.Event()
    thread = threading.Thread(target=_print, args=(counts, total, over), daemon=True)
    thread.start()
    try:
        yield Tally(counts)
    finally:
        over.set()
        thread.join()


def _print(counter: Any, total: int, over: threading.Event) -> None:
    first = None  # when rows were done for the first time, and how many: before that programs were compiled
    while not over.wait(SECONDS):
        with contextlib.suppress(ray.exceptions.RayError):  # a line less
            counts = ray.get(counter.read.remote(), timeout=SECONDS)
            done, now = sum(counts.values()), time.monotonic()
            if done:
                first = first or (now, done)
                rate = (done - first[1]) / (now - first[0]) if now > first[0] else 0.0
                console.say(line(counts, total, rate))
