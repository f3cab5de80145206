"""What a comparison ends in: rows of means with their intervals, as a Markdown table, a CSV file and a figure."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging

from referee_jax import console
from referee_jax.benchmarks import statistics
from referee_jax.storage import files

Rows = Mapping[str, Mapping[str, statistics.Mean]]  # row -> score -> mean


def table(found: Rows, first: str, names: Sequence[str]) -> str:
    """A row for each, a column for each of the scores `names`, as Markdown; the column of the rows' names is called `first`."""
    return console.markdown(
        [first, *names], {row: [own.get(name, "-") for name in names] for row, own in found.items()}
    )


def write(found: Rows, first: str, names: Sequence[str], shown: Sequence[str], out: Path) -> str:
    """Writes table.md, table.csv and, of the scores `shown`, figure.png; returns the table."""
    told = table(found, first, names)
    files.write_atomic(out / "table.md", told.encode())
    files.write_atomic(out / "table.csv", as_csv(found, first).encode())
    if shown:
        draw(found, shown, out / "figure.png")
    return told


def as_csv(found: Rows, first: str) -> str:
    """A line per row and score."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([first, "score", *statistics.Mean._fields])
    lines.writerows([row, name, *mean] for row, own in found.items() for name, mean in own.items())
    return text.getvalue()


def draw(found: Rows, names: Sequence[str], file: Path) -> None:
    """Draws scores beside each other, each with its intervals, a line per row; warns where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logging.warning("no figure: matplotlib is not installed (pip install 'referee_jax[eval]')")
        return
    canvas = FigureCanvasAgg(Figure(figsize=(3 + 4 * len(names), 1 + 0.3 * len(found)), layout="constrained"))
    panels = canvas.figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        shown = [(place, own[name]) for place, own in enumerate(found.values()) if name in own]
        spread = [[mean.mean - mean.low for _, mean in shown], [mean.high - mean.mean for _, mean in shown]]
        axes.errorbar([mean.mean for _, mean in shown], [place for place, _ in shown], xerr=spread, fmt="o", capsize=3)
        axes.set_xlabel(f"{name}\nmean and 95 % interval over prompts")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(found)), labels=list(found))
    panels[0].set_ylim(len(found) - 0.5, -0.5)
    stream = io.BytesIO()
    canvas.print_png(stream)
    files.write_atomic(file, stream.getvalue())
