"""Processes of a real run in the shapes world that are killed, stopped and replaced: tests/tools/kill_fuzz.py, in short."""

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
    """A directory with an uninterrupted run, and the seconds that it took."""
    workdir = tmp_path_factory.mktemp("fuzz")
    return workdir, kill_fuzz.uninterrupted(workdir)


def test_kills(place):
    assert kill_fuzz.fuzz(5, 209, *place) == []


def test_kills_in_a_pool_that_writes_shards(place):
    """Of three workers one is stopped and one killed (so says the seed) while images are made; the third makes the rest."""
    assert kill_fuzz.fuzz(2, 84, *place, [*kill_fuzz.POOL, *kill_fuzz.SHARDS]) == []


def test_the_dead_and_the_stopped_delay_nobody(place):
    """Four processes, one killed and one stopped (SIGSTOP): the others make their share; a restart makes the rest."""
    workdir, _ = place
    cut, cache = workdir / "four", workdir / "cache"
    running = [kill_fuzz.start(cut, cache, index, 4) for index in range(4)]
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
    last = [kill_fuzz.start(cut, cache, index, 2) for index in range(2)]
    assert kill_fuzz.ended(*last) == [0, 0]
    assert kill_fuzz.ended(kill_fuzz.start(cut, cache)) == [0]
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
        "--config=configs/shapes.py",
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
def test_two_processes_of_eight_devices(place):
    """Each makes its share on all its devices; the images are those of one process with one device, but for rounding.

    After four iterations, when what was rounded otherwise (another batch does so too) is 1e-6 of the latents; it grows up to a
    thousandfold in the next eight.
    """
    workdir, _ = place
    one, many, flags = workdir / "one", workdir / "many", ["--config.steps=4"]
    running = [kill_fuzz.start(many, workdir / "cache", index, 2, devices=8, flags=flags) for index in range(2)]
    assert kill_fuzz.ended(*running, kill_fuzz.start(one, workdir / "cache", flags=flags)) == [0, 0, 0]
    assert kill_fuzz.ended(kill_fuzz.start(many, workdir / "cache", flags=flags)) == [0]  # joins the journals
    log = [json.loads(line) for line in (many / "log.jsonl").read_text().splitlines()]
    devices = [record["device"] for record in log if record["event"] == "start"]
    assert devices == ["cpu x 8", "cpu x 8", "cpu x 1"]
    assert kill_fuzz.images(many).keys() == kill_fuzz.images(one).keys()
    for file in (one / "images").glob("*"):
        shown, other = (np.asarray(Image.open(x)).astype(np.float32) for x in (file, many / "images" / file.name))
        assert relative_l2(shown, other) < 1e-4  # a step in each of ten of the 12288 numbers
