"""Console output: lines, progress, tables, and text made safe for a terminal."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

import numpy as np
import tqdm

SECONDS_BETWEEN_LINES = 30  # of progress, if stderr is not a terminal
SECONDS_BETWEEN_WORDS = 15  # before the first chunk
SHOWN_METRICS = 4


def say(text: str, *, file: TextIO | None = None) -> None:
    """Prints a `printable` line. If the reader has gone (`| head`), later output is discarded."""
    file = file or sys.stdout
    try:
        tqdm.tqdm.write(printable(text, file.encoding), file=file)
        file.flush()
    except BrokenPipeError:
        # Flushing the buffer at exit would raise again.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, file.fileno())
            os.close(null)


class Progress:
    """Progress in iterations of all images: a bar on a terminal, elsewhere lines now and then."""

    def __init__(self, images: int, steps: int):
        self.images, self.total, self.steps = images, images * steps, 0
        self.done, self.bar = 0, None
        self.is_terminal = sys.stderr.isatty()
        self.counted_from = self.printed = time.monotonic()  # when counting began; of the last line
        self.uncounted, self.is_printed = 0, True
        self.is_over = threading.Event()

    def advance(self, steps: int, metrics: dict[str, np.ndarray]) -> None:
        """Counts a chunk of `steps` iterations, summed over images; shows the metrics' means."""
        self.steps += steps
        # Metrics that are not measured in every iteration are NaN in the others.
        means = {name: mean(np.ravel(x)) for name, x in metrics.items()}
        texts = [f"{name} {value:.3g}" for name, value in means.items() if not np.isnan(value)]
        losses = " ".join(texts[:SHOWN_METRICS])
        if not self.uncounted:
            # The first chunk includes compilation, so the rate does not count it.
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
        """Leaves out iterations that were done before this run."""
        self.total -= steps

    def finished(self, images: int) -> None:
        """Counts the images of a finished batch."""
        self.done, self.is_printed = self.done + images, False
        if self.is_terminal:
            self._describe()
        else:
            self._line("")

    def wait(self) -> None:
        """Says now and then that the first chunk, with its compilation, is still to come; in a thread of its own."""
        begun = time.monotonic()
        while not self.is_over.wait(SECONDS_BETWEEN_WORDS) and not self.steps:
            say(f"still compiling or in the first iterations, for {time.monotonic() - begun:.0f} s")

    def close(self) -> None:
        """Ends the bar; without one, prints the last state."""
        self.is_over.set()
        if self.bar is not None:
            self.bar.close()
        if not self.is_terminal and not self.is_printed:
            self._line("", is_last=True)

    def _describe(self) -> None:
        if self.bar is not None:
            self.bar.set_description_str(f"{self.done}/{self.images} images")

    def _line(self, losses: str, *, is_last: bool = False) -> None:
        now = time.monotonic()
        if not is_last and now - self.printed <= SECONDS_BETWEEN_LINES:
            return
        self.printed, self.is_printed = now, True
        rate = (self.steps - self.uncounted) / max(now - self.counted_from, 1e-9)
        parts = [f"{self.done}/{self.images} images", f"{self.steps}/{self.total} steps"]
        if rate > 0:
            parts += [f"{rate:.2f} steps/s", f"{(self.total - self.steps) / rate:.0f} s left"]
        say(", ".join([*parts, losses] if losses else parts))


@contextlib.contextmanager
def shown(images: int, steps: int) -> Iterator[Progress]:
    """A Progress that is closed at the end, also after an exception."""
    bar = Progress(images, steps)
    threading.Thread(target=bar.wait, daemon=True).start()
    try:
        yield bar
    finally:
        bar.close()


def mean(metric: np.ndarray) -> np.ndarray:
    """The mean over the last axis without NaNs; NaN if all are."""
    valid = ~np.isnan(metric)
    with np.errstate(all="ignore"):
        return np.where(valid, metric, 0).sum(-1, dtype=np.float64) / valid.sum(-1)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def markdown(columns: Sequence[str], rows: Mapping[str, Sequence[object]]) -> str:
    """A Markdown table; a row is its name and a cell for each other column."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join([name, *map(str, cells)])} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def printable(text: str, encoding: str | None = None) -> str:
    """`text` with control and unencodable characters escaped; newlines stay."""
    encoding = encoding or "utf-8"
    plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return plain.encode(encoding, "backslashreplace").decode(encoding)


def fail(code: int, text: str) -> int:
    """Prints an error and returns the exit code."""
    say(f"error: {text}", file=sys.stderr)
    return code
