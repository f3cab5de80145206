"""Results of a comparison: means with their intervals, as a Markdown table, a CSV file and figures."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from referee_jax import console
from referee_jax.benchmarks import statistics
from referee_jax.storage import files

Rows = Mapping[str, Mapping[str, statistics.Mean]]  # row -> score -> mean
Curves = Mapping[str, Mapping[str, Sequence[tuple[float, statistics.Mean]]]]  # panel -> row -> (x, mean) of each point


def table(means: Rows, first: str, names: Sequence[str]) -> str:
    """A Markdown table: a column for each of the scores `names`, after that of the rows' names, titled `first`."""
    rows = {row: [scores.get(name, "-") for name in names] for row, scores in means.items()}
    return console.markdown([first, *names], rows)


def write(means: Rows, first: str, names: Sequence[str], drawn: Sequence[str], out: Path) -> str:
    """Writes the results and returns the table.

    Args:
        means: row -> score -> mean.
        first: title of the column of rows.
        names: scores in table.md; table.csv has all.
        drawn: scores in figure.png; none, no figure.
        out: directory to write.
    """
    text = table(means, first, names)
    files.write_atomic(out / "table.md", text.encode())
    files.write_atomic(out / "table.csv", as_csv(means, first).encode())
    if drawn:
        draw(means, drawn, out / "figure.png")
    return text


def as_csv(means: Rows, first: str) -> str:
    """A line per row and score."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([first, "score", *statistics.Mean._fields])
    lines.writerows([row, name, *mean] for row, scores in means.items() for name, mean in scores.items())
    return text.getvalue()


def _canvas(width: float, height: float) -> Any:
    """A canvas of so many inches; None, with a warning, if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logging.warning("no figure: matplotlib is not installed (pip install 'referee_jax[eval]')")
        return None
    return FigureCanvasAgg(Figure(figsize=(width, height), layout="constrained"))


def _save(canvas: Any, file: Path) -> None:
    stream = io.BytesIO()
    canvas.print_png(stream)
    files.write_atomic(file, stream.getvalue())


def _spread(points: Sequence[tuple[float, statistics.Mean]]) -> list[list[float]]:
    """How far the intervals of means reach, below and above."""
    return [[mean.mean - mean.low for _, mean in points], [mean.high - mean.mean for _, mean in points]]


def draw_curves(panels: Curves, x: str, y: str, file: Path) -> None:
    """Draws a panel for each name, a curve for each row over `x` on a logarithmic scale. Warns without matplotlib."""
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    if not (canvas := _canvas(1 + 3 * columns, 0.6 + 2.6 * lines)):
        return
    grid = canvas.figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for n, (axes, (name, curves)) in enumerate(zip(grid, panels.items(), strict=False)):
        for row, points in curves.items():
            places, means = [place for place, _ in points], [mean.mean for _, mean in points]
            axes.errorbar(
                places, means, yerr=_spread(points), fmt="o-", markersize=3, linewidth=1, capsize=2, label=row
            )
        axes.set_title(name, fontsize="medium")
        axes.set_xscale("log", base=2)
        axes.set_xlabel(x if n + columns >= len(panels) else None)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    canvas.figure.supylabel(y, fontsize="medium")
    canvas.figure.legend(
        *grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize="small"
    )
    _save(canvas, file)


def draw(means: Rows, names: Sequence[str], file: Path) -> None:
    """Draws a panel per score, a line per row, with intervals. Warns if matplotlib is not installed."""
    if not (canvas := _canvas(3 + 4 * len(names), 1 + 0.3 * len(means))):
        return
    panels = canvas.figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        points = [(place, scores[name]) for place, scores in enumerate(means.values()) if name in scores]
        axes.errorbar(
            [mean.mean for _, mean in points], [place for place, _ in points], xerr=_spread(points), fmt="o", capsize=3
        )
        axes.set_xlabel(f"{name}\nmean and 95 % interval over prompts")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(means)), labels=list(means))
    panels[0].set_ylim(len(means) - 0.5, -0.5)
    _save(canvas, file)
