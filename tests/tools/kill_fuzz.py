"""Kills a run again and again, at random moments, and looks whether anything is lost, doubled or changed.

    python -m tests.tools.kill_fuzz --kills=50 --seed=0
    python -m tests.tools.kill_fuzz --kills=50 --format=webdataset
    python -m tests.tools.kill_fuzz --kills=500 --engine=fake

Runs of the shapes world, by one to three processes (another number after each kill), end by SIGTERM or SIGKILL; the last one may
finish. Asked then: is every image there, once, to the byte what an uninterrupted run makes, and is nothing else left behind?

The fake engine has no networks. All the rest of the program is real, and a process takes one second instead of forty.
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence

from referee_jax.storage import run_directory, shards
from tests import fake_run, programs

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "star", "ring")]
SETTINGS = {
    "init": "noise", "init_candidates": 1, "steps": 12, "chunk": 2, "checkpoint_seconds": 0.3,
    "batch_size": 3,  # of which an image has the same bytes at every place, on every CPU (docs/scale.md)
    "views.count": 2, "views.keep": 2,
}  # fmt: skip
# By the run itself; killed; before Python had begun to catch signals; by the kernel, when its time was over.
TERMINATED = (128 + signal.SIGTERM, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGALRM)
LONGEST = 300  # seconds that a process may take
SHARDS = ("--config.outputs.format=webdataset", "--config.outputs.shard_size=3")


def start(
    workdir: pathlib.Path,
    cache: pathlib.Path,
    index: int = 0,
    count: int = 1,
    *,
    devices: int = 1,
    url: str = "",
    flags: Sequence[str] = (),
    engine: str = "real",
    config: str | os.PathLike = "configs/shapes_clip.py",
) -> "subprocess.Popen | Forked":
    """One process of a run, with so many simulated devices; in a bucket if there is a `url`. Its log is beside `workdir`."""
    arguments = [f"--config={config}", f"--workdir={url or workdir}"]
    arguments += [f"--config.{key}={value}" for key, value in SETTINGS.items()] + [f"--prompt={x}" for x in PROMPTS]
    arguments += [*flags, f"--shard_index={index}", f"--shard_count={count}"]
    if engine == "fake":
        return Forked(arguments, workdir.with_suffix(".log"))
    # Many processes on few cores: one thread each, and what is compiled once is not compiled again.
    threads = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {threads}",
        "JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONFAULTHANDLER": "1", "JAX_NUM_CPU_DEVICES": str(devices),
    }  # fmt: skip
    with open(workdir.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "referee_jax.run", *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log
        )


class Forked:
    """A process with the fake engine, forked from one that has imported all; with the methods of a subprocess.Popen."""

    def __init__(self, arguments: Sequence[str], log: pathlib.Path):
        self.args, self.process = arguments, programs.begin(fake_run.forked, arguments, log)

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may end between the two; its server reaps it at once
            if self.poll() is None:
                os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def ended(*processes: subprocess.Popen) -> list[int]:
    """Their exit codes. RuntimeError where one takes more than LONGEST seconds, with what it was at."""
    try:
        return [process.wait(LONGEST) for process in processes]
    except subprocess.TimeoutExpired as error:
        for process in processes:
            process.send_signal(signal.SIGABRT)  # upon which Python's fault handler tells of all threads
            process.wait()
        log = pathlib.Path(next(x for x in error.cmd if x.startswith("--workdir="))[len("--workdir=") :] + ".log")
        raise RuntimeError(f"a process does not end: {log.read_text()[-4000:]}") from error


def images(workdir: pathlib.Path) -> dict[str, bytes]:
    """File name -> its bytes; of images by themselves, and of those in shards that are in the journal."""
    found = {file.name: file.read_bytes() for file in (workdir / "images").glob("*")}
    sharded = [x["file_name"] for x in run_directory.read_journal(workdir) if x["file_name"].startswith("shards/")]
    return found | {pathlib.Path(name).name: shards.read_bytes(workdir / name) for name in sharded}


def doubles(workdir: pathlib.Path) -> list[str]:
    """Which images are there more than once: by themselves and in all shards, whatever the journal says."""
    names = [file.name for file in (workdir / "images").glob("*")]
    for file in (workdir / "shards").glob("*.tar"):
        with tarfile.open(file) as tar:
            names += [name for name in tar.getnames() if not name.endswith(".json")]
    return [f"{name} is there {count} times" for name, count in collections.Counter(names).items() if count > 1]


def problems(workdir: pathlib.Path, reference: pathlib.Path) -> list[str]:
    """What is wrong with a finished run, compared with an uninterrupted one."""
    found, wanted = images(workdir), images(reference)
    wrong = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    wrong += [f"{name} should not be there" for name in found.keys() - wanted.keys()]
    wrong += [f"{name} is another image" for name in found.keys() & wanted.keys() if found[name] != wanted[name]]
    wrong += doubles(workdir)
    journal = [json.loads(line) for file in workdir.glob("metadata*.jsonl") for line in file.read_text().splitlines()]
    names = [pathlib.Path(record["file_name"]).name for record in journal]
    wrong += [f"{name} is {names.count(name)} times in the journal" for name in wanted if names.count(name) != 1]
    expected = {file.name for file in reference.iterdir()} | {"shards"}
    hidden = [file for folder in ("images", "shards") for file in (workdir / folder).glob(".*")]
    wrong += [f"{file.name} was left behind" for file in hidden]
    wrong += [f"{file.name} was left behind" for file in workdir.iterdir() if file.name not in expected]
    return wrong


def uninterrupted(workdir: pathlib.Path, engine: str = "real") -> float:
    """Makes `workdir / "whole"`, and `workdir / "cache"` of compiled programs; how many seconds it took with those."""
    whole, cache = workdir / "whole", workdir / "cache"
    for _ in range(2):
        shutil.rmtree(whole, ignore_errors=True)
        began = time.monotonic()
        if any(ended(start(whole, cache, engine=engine))):
            raise RuntimeError(f"the uninterrupted run fails: {whole.with_suffix('.log').read_text()[-2000:]}")
    return time.monotonic() - began


def chunks(workdir: pathlib.Path) -> int:
    """How often a process of the run has logged that images came further."""
    log = workdir / "log.jsonl"
    return log.read_bytes().count(b'"event": "chunk"') if log.exists() else 0


def wait_for_chunks(workdir: pathlib.Path, count: int, running: Sequence[subprocess.Popen]) -> None:
    """Until there are so many, or all processes have ended."""
    end = time.monotonic() + LONGEST
    while chunks(workdir) < count and any(x.poll() is None for x in running) and time.monotonic() < end:
        time.sleep(0.02)


def fuzz(
    kills: int, seed: int, workdir: pathlib.Path, lasted: float, flags: Sequence[str] = (), engine: str = "real"
) -> list[str]:
    """Kills a run in `workdir / "cut"`, which alone would last `lasted` seconds; what is wrong in the end."""
    rng, cut, whole, cache = random.Random(seed), workdir / "cut", workdir / "whole", workdir / "cache"
    begin = functools.partial(start, cut, cache, flags=flags, engine=engine)
    shutil.rmtree(cut, ignore_errors=True)
    wrong, codes, killed = [], [], 0
    while killed < kills:
        count, before = rng.randint(1, 3), chunks(cut)
        running = [begin(index, count) for index in range(count)]
        # Together they need no more than one alone, and start several times as slowly: kills fall on all they do.
        for process in rng.sample(running, rng.randint(1, count)):
            if rng.random() < 0.5:  # most of the time goes into the start: half of them when images are made
                wait_for_chunks(cut, before + rng.randint(1, 10), running)
            else:
                time.sleep(rng.uniform(0, lasted * (1 + count) / 2 / count))
            if process.poll() is None and killed < kills:
                process.send_signal(rng.choice([signal.SIGTERM, signal.SIGKILL]))
                killed += 1
        if rng.random() < 0.5:
            for process in running:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            codes += ended(*running)
            wrong += [f"it took {took:.0f} s to end"] if (took := time.monotonic() - begun) > 10 else []
        else:
            codes += ended(*running)
        print(f"{killed} kills, {len(images(cut))} images", flush=True)
        wrong += doubles(cut)
        if len(images(cut)) == len(PROMPTS):
            for file in sorted(x for folder in ("images", "shards") for x in (cut / folder).glob("[!.]*")):
                if rng.random() < 0.5:  # all is done before the last kill: half of it is to be made again
                    file.unlink()
    last = [begin(index, 2) for index in range(2)]
    codes_of_last = ended(*last)
    wrong += [f"a process ended with {code}" for code in codes if code not in (0, *TERMINATED)]
    wrong += [f"the last run ended with {code}" for code in codes_of_last if code]
    ended(begin())  # alone: it finds all done, and joins the journals
    return wrong + problems(cut, whole)


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=pathlib.Path, help="a new directory; default: a temporary one")
    parser.add_argument("--engine", choices=("real", "fake"), default="real")
    parser.add_argument("--format", choices=("png", "webdataset"), default="png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workdir = args.workdir or pathlib.Path(temporary)
        workdir.mkdir(parents=True, exist_ok=True)
        flags = SHARDS if args.format == "webdataset" else ()
        wrong = fuzz(args.kills, args.seed, workdir, uninterrupted(workdir, args.engine), flags, args.engine)
    print("\n".join(wrong) or f"nothing lost, doubled or changed by {args.kills} kills")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
