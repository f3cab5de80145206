"""Many rows of few steps through Ray, beside as many plain processes: how fast, and does the memory stay as it is?

    python tests/tools/ray_load.py --rows=10000 --actors=2

The pictures are those of configs/shapes_clip.py from noise, a step of one view each. Then the same command once more, which
has nothing to make. Prints a line of JSON. Exit code 1 if Ray takes more than 10 % longer, a row is missing or doubled, the
second command wrote something, or the last quarter's peak of memory, of the driver or of an actor, is more than 5 % above that
of the second.
"""

import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import pyarrow as pa
import pyarrow.parquet as pq
from absl import app, flags

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.ray import clusters  # noqa: E402

SLOWER, GROWTH = 1.1, 1.05
FEW = (
    "--config=configs/shapes_clip.py", "--config.steps=1", "--config.views.count=1", "--config.views.keep=1",
    "--config.init=noise", "--config.init_candidates=1", "--config.batch_size=16",
)  # fmt: skip
PAGE = os.sysconf("SC_PAGE_SIZE")


def table(file: pathlib.Path, rows: int) -> pathlib.Path:
    """A table of prompts with ids and seeds of their own."""
    colours, shapes = ("red", "blue", "green", "yellow"), ("circle", "square", "ring", "star")
    texts = [f"a {colours[n % 4]} {shapes[n // 4 % 4]}" for n in range(rows)]
    pq.write_table(pa.table({"id": [f"r{n:06d}" for n in range(rows)], "prompt": texts, "seed": range(rows)}), file)
    return file


def start(module: str, *arguments: str) -> subprocess.Popen:
    """Starts a program of the package."""
    command = [sys.executable, "-m", f"referee_jax.{module}", *FEW, *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=clusters.alone(), cwd=ROOT, **quiet)


def resident(process: int) -> int:
    """Bytes in memory; 0 of one that has ended."""
    try:
        return int(pathlib.Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0


def watched(driver: subprocess.Popen) -> tuple[float, dict[str, list[int]]]:
    """Waits for a driver: its seconds, and the memory of it and of each of its actors, once a second, in bytes."""
    begin, seen = time.monotonic(), collections.defaultdict(list)
    while driver.poll() is None:
        seen["driver"].append(resident(driver.pid))
        for number in clusters.actors(driver.pid):
            seen[f"actor {number}"].append(resident(number))
        time.sleep(1)
    if driver.returncode:
        raise SystemExit(f"the driver ended with {driver.returncode}")
    return time.monotonic() - begin, seen


def peaks(values: list[int]) -> list[int]:
    """The peak of each quarter, in megabytes."""
    cuts = [len(values) * n // 4 for n in range(5)]
    return [round(max(values[a:b], default=0) / 1e6) for a, b in zip(cuts, cuts[1:], strict=False)]


def plain(prompts: pathlib.Path, workdir: pathlib.Path, count: int) -> float:
    """The seconds of so many processes that share a run directory."""
    begin = time.monotonic()
    shared = f"--prompts={prompts}", f"--workdir={workdir}", f"--shard_count={count}"
    for process in [start("run", *shared, f"--shard_index={n}") for n in range(count)]:
        if process.wait():
            raise SystemExit(f"a process ended with {process.returncode}")
    return time.monotonic() - begin


def measure(rows: int, actors: int, directory: pathlib.Path) -> dict:
    """What the docstring asks."""
    prompts, out = table(directory / "prompts.parquet", rows), directory / "table"
    few = table(directory / "few.parquet", 16 * actors)
    plain(few, directory / "warm", actors)  # programs are compiled once, for all that follows
    arguments = f"--prompts={prompts}", f"--out={out}", f"--actors={actors}"
    seconds, memory = watched(start("ray", *arguments))
    files = {file: file.stat().st_mtime_ns for file in out.rglob("*.parquet")}
    ids = [name for file in files for name in pq.read_table(file, columns=["id"])["id"].to_pylist()]
    again, _ = watched(start("ray", *arguments))
    beside = plain(prompts, directory / "run", actors)
    return {
        "rows": rows, "actors": actors, "made": len(set(ids)), "doubled": len(ids) - len(set(ids)),
        "seconds": round(seconds, 1), "plain_seconds": round(beside, 1),
        "ratio": round(seconds / beside, 3), "plain_made": len(list((directory / "run" / "images").glob("*.png"))),
        "again_seconds": round(again, 1), "peak_megabytes": {name: peaks(values) for name, values in memory.items()},
        "unchanged": files == {file: file.stat().st_mtime_ns for file in out.rglob("*.parquet")},
    }  # fmt: skip


def main(_: list[str]) -> int:
    """The command line."""
    args = flags.FLAGS
    with tempfile.TemporaryDirectory(dir=args.scratch) as directory:
        found = measure(args.rows, args.actors, pathlib.Path(directory))
    print(json.dumps(found))
    is_flat = all(peak[3] <= GROWTH * peak[1] for peak in found["peak_megabytes"].values())
    is_whole = found["made"] == args.rows == found["plain_made"] and not found["doubled"] and found["unchanged"]
    return 0 if is_flat and is_whole and found["ratio"] <= SLOWER else 1


if __name__ == "__main__":
    flags.DEFINE_integer("rows", 10_000, "rows of the table", lower_bound=1)
    flags.DEFINE_integer("actors", 2, "actors of Ray's, and plain processes", lower_bound=1)
    flags.DEFINE_string(
        "scratch", None, "where the output is, until the end; default: the system's temporary directory"
    )
    app.run(main)
