"""Processes of a run in the shapes world that are killed, stopped and replaced: tests/tools/kill_fuzz.py, in short.

Most with the fake engine, whose images depend on every iteration; files, journals, shards and signals are real.
"""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.conftest import relative_l2
from tests.tools import kill_fuzz

pytestmark = pytest.mark.timeout(1800)  # kill_fuzz.LONGEST for each of several rounds
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with an uninterrupted run of the fake engine, and the seconds that it took."""
    workdir = tmp_path_factory.mktemp("fake")
    return workdir, kill_fuzz.uninterrupted(workdir, "fake")


@pytest.fixture(scope="module")
def real_place(tmp_path_factory):
    """The same with the real engine."""
    workdir = tmp_path_factory.mktemp("real")
    return workdir, kill_fuzz.uninterrupted(workdir)


def test_kills(place):
    assert kill_fuzz.fuzz(50, 209, *place, engine="fake") == []


def test_kills_of_processes_that_write_shards(place):
    assert kill_fuzz.fuzz(20, 84, *place, kill_fuzz.SHARDS, engine="fake") == []


# Most of the time goes into tracing: without a held-out referee.
CONFIG = """
from referee_jax import config


def get_config():
    settings = config.read("shapes_clip")
    settings.referees = settings.referees[:1]
    return settings
"""


def test_the_real_engine_goes_on_where_it_was_killed(tmp_path, checkpoints):
    """From the checkpoint of a batch that it was at, with images to the byte those of an uninterrupted run."""
    whole, cut, cache = tmp_path / "whole", tmp_path / "cut", pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    sd, judge = checkpoints
    (tmp_path / "shapes.py").write_text(CONFIG)
    flags = [f"--config.generator.checkpoint={sd}", "--config.image_size=32", "--config.steps=60"]
    flags += [f"--config.referees[0].checkpoint={judge}"]
    begin = functools.partial(kill_fuzz.start, cache=cache, flags=flags, config=tmp_path / "shapes.py")
    assert kill_fuzz.ended(begin(whole)) == [0]
    process, end = begin(cut), time.monotonic() + kill_fuzz.LONGEST
    # Others are being written.
    saved = lambda: any(x.parts[-3].isdigit() for x in cut.glob("checkpoints/*/*/default/*"))
    while not saved() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    assert kill_fuzz.ended(process) == [-signal.SIGKILL]
    assert len(kill_fuzz.images(cut)) < len(kill_fuzz.PROMPTS)
    before = len(read_log(cut))
    assert kill_fuzz.ended(begin(cut)) == [0]
    steps = [record["step"] for record in read_log(cut)[before:] if record["event"] == "chunk"]
    assert steps[0] > kill_fuzz.SETTINGS["chunk"]
    assert kill_fuzz.problems(cut, whole) == []


@pytest.mark.slow
@pytest.mark.parametrize("kills, seed, flags", [(5, 209, ()), (2, 84, kill_fuzz.SHARDS)], ids=["files", "shards"])
def test_kills_of_the_real_engine(real_place, kills, seed, flags):
    assert kill_fuzz.fuzz(kills, seed, *real_place, flags) == []


def read_log(workdir):
    """The records of all processes of a run."""
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


def test_the_dead_and_the_stopped_delay_nobody(place):
    """Four processes, one killed and one stopped (SIGSTOP): the others make their share; a restart makes the rest."""
    workdir, _ = place
    cut, cache = workdir / "four", workdir / "cache"
    begin = functools.partial(kill_fuzz.start, cut, cache, engine="fake")
    running = [begin(index, 4) for index in range(4)]
    try:
        log, end = cut / "log.jsonl", time.monotonic() + kill_fuzz.LONGEST
        while not (log.exists() and log.read_bytes().count(b"start") >= 4) and time.monotonic() < end:
            time.sleep(0.05)
        assert time.monotonic() < end
        running[0].kill()
        running[1].send_signal(signal.SIGSTOP)
        assert kill_fuzz.ended(*running[2:]) == [0, 0]
        assert len(kill_fuzz.images(cut)) >= len(kill_fuzz.PROMPTS) // 4 * 2
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert kill_fuzz.ended(*[begin(index, 2) for index in range(2)]) == [0, 0]
    assert kill_fuzz.ended(begin()) == [0]
    assert kill_fuzz.problems(cut, workdir / "whole") == []
    journal = [json.loads(line) for line in (cut / "metadata.jsonl").read_text().splitlines()]
    assert {record["status"] for record in journal} == {"done"}


def test_a_stop_is_obeyed_while_compiling(tmp_path):
    """Which is one line of Python, and half a minute: SIGTERM ends the process within its ten seconds."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "referee_jax.run",
        "--config=configs/shapes_clip.py",
        f"--workdir={tmp_path / 'run'}",
    ]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    with process:
        assert any("compiling for" in line for line in process.stdout)
        time.sleep(3)  # the start is sampled first, by small programs
        assert process.poll() is None and not list((tmp_path / "run" / "images").iterdir())
        process.terminate()
        begun = time.monotonic()
        process.stdout.read()
        assert process.wait(kill_fuzz.LONGEST) == 143
    assert time.monotonic() - begun < 12  # two for a machine that has more to do


@pytest.mark.slow
def test_two_processes_of_eight_devices(real_place):
    """Each makes its share on all its devices; the images are those of one process with one device, but for rounding.

    After four iterations, when what was rounded otherwise (another batch does so too) is 1e-6 of the latents; it grows up to a
    thousandfold in the next eight.
    """
    workdir, _ = real_place
    one, many, flags = workdir / "one", workdir / "many", ["--config.steps=4"]
    running = [kill_fuzz.start(many, workdir / "cache", index, 2, devices=8, flags=flags) for index in range(2)]
    assert kill_fuzz.ended(*running, kill_fuzz.start(one, workdir / "cache", flags=flags)) == [0, 0, 0]
    assert kill_fuzz.ended(kill_fuzz.start(many, workdir / "cache", flags=flags)) == [0]  # joins the journals
    devices = [record["device"] for record in read_log(many) if record["event"] == "start"]
    assert devices == ["cpu x 8", "cpu x 8", "cpu x 1"]
    assert kill_fuzz.images(many).keys() == kill_fuzz.images(one).keys()
    for file in (one / "images").glob("*"):
        shown, other = (np.asarray(Image.open(x)).astype(np.float32) for x in (file, many / "images" / file.name))
        assert relative_l2(shown, other) < 1e-4  # a step in each of ten of the 12288 numbers
