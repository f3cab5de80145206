"""What a run tells while it works: lines, and a bar where it is a terminal that reads them."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

import numpy as np
import tqdm

SECONDS_BETWEEN_LINES = 30  # of progress, where it is not a terminal that reads it
SHOWN_METRICS = 4


def say(text: str, *, file: TextIO | None = None) -> None:
    """Prints a line, without what would steer a terminal; where nobody reads any more (`| head`), the work goes on silently."""
    file = file or sys.stdout
    try:
        tqdm.tqdm.write(printable(text, file.encoding), file=file)
        file.flush()
    except BrokenPipeError:
        # What is still in the buffer would raise again at exit.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, file.fileno())
            os.close(null)


class Progress:
    """Iterations of all images: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, images: int, steps: int):
        self.images, self.total, self.steps = images, images * steps, 0
        self.done, self.bar = 0, None
        self.is_terminal = sys.stderr.isatty()
        self.counted_from = self.said = time.monotonic()
        self.uncounted, self.is_told = 0, True

    def advance(self, steps: int, metrics: dict[str, np.ndarray]) -> None:
        """After a chunk of so many iterations, each image's counted, with its metrics."""
        self.steps += steps
        # What is not measured in every iteration is shown where it was.
        means = {name: mean(np.ravel(x)) for name, x in metrics.items()}
        there = [f"{name} {value:.3g}" for name, value in means.items() if not np.isnan(value)]
        losses = " ".join(there[:SHOWN_METRICS])
        if not self.uncounted:
            # The first chunk is compiled: its time says nothing about the others.
            self.counted_from, self.uncounted = time.monotonic(), self.steps
        if self.is_terminal:
            if self.bar is None:
                self.bar = tqdm.tqdm(total=self.total, initial=self.steps, unit="step", dynamic_ncols=True)
            self.bar.update(self.steps - self.bar.n)
            self.bar.set_postfix_str(losses, refresh=False)
            self._describe()
        else:
            self._line(losses)

    def skip(self, steps: int) -> None:
        """So many iterations have been done before."""
        self.total -= steps

    def finished(self, images: int) -> None:
        """After a batch: so many images more."""
        self.done, self.is_told = self.done + images, False
        if self.is_terminal:
            self._describe()
        else:
            self._line("")

    def close(self) -> None:
        """Leaves the bar as it is and the cursor below it; elsewhere, how far it came."""
        if self.bar is not None:
            self.bar.close()
        if not self.is_terminal and not self.is_told:
            self._line("", is_last=True)

    def _describe(self) -> None:
        if self.bar is not None:
            self.bar.set_description_str(f"{self.done}/{self.images} images")

    def _line(self, losses: str, *, is_last: bool = False) -> None:
        now = time.monotonic()
        if not is_last and now - self.said <= SECONDS_BETWEEN_LINES:
            return
        self.said, self.is_told = now, True
        rate = (self.steps - self.uncounted) / max(self.said - self.counted_from, 1e-9)
        parts = [f"{self.done}/{self.images} images", f"{self.steps}/{self.total} steps"]
        if rate > 0:
            parts += [f"{rate:.2f} steps/s", f"{(self.total - self.steps) / rate:.0f} s left"]
        say(", ".join([*parts, losses] if losses else parts))


@contextlib.contextmanager
def shown(images: int, steps: int) -> Iterator[Progress]:
    """A Progress that is closed at the end, whatever happens."""
    bar = Progress(images, steps)
    try:
        yield bar
    finally:
        bar.close()


def mean(metric: np.ndarray) -> np.ndarray:
    """Over the last axis, of what is not NaN; NaN where that is nothing."""
    there = ~np.isnan(metric)
    with np.errstate(all="ignore"):
        return np.where(there, metric, 0).sum(-1, dtype=np.float64) / there.sum(-1)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def markdown(columns: Sequence[str], rows: Mapping[str, Sequence[object]]) -> str:
    """A table, one line per row: its name, then a cell for each of the other columns."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join([name, *map(str, cells)])} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def printable(text: str, encoding: str | None = None) -> str:
    """`text` for a terminal: what would steer it, or has no place in its encoding, as an escape; lines stay lines."""
    encoding = encoding or "utf-8"
    plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return plain.encode(encoding, "backslashreplace").decode(encoding)


def fail(code: int, text: str) -> int:
    say(f"error: {text}", file=sys.stderr)
    return code
