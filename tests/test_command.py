"""What all programs have in common: a mistake in a command is one sentence and code 2, never a traceback."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("program", "arguments", "said"),
    [
        ("evaluate", ["--benchmark=nothing"], "flag --benchmark=nothing: value should be one of"),
        ("sweep", ["--samples=0"], "flag --samples=0"),
        ("score", ["--nothing=1"], "Unknown command line flag 'nothing'"),
        ("bench", ["--config=configs/shapes.py", "--config.sds.guidanse=3"], "sds.guidanse is not a setting; did you mean"),
        ("bench", ["--batches=0"], "--batches=0: numbers of images are needed"),
        ("benchmarks.methods", ["--config=nothing.py"], "the config file cannot be read: No such file"),
        ("shapes.train", [], "Flag --network must have a value other than None"),
        ("shapes.train", ["--network=clip", "more"], "unexpected argument 'more'"),
    ],
)  # fmt: skip
def test_a_mistake_is_a_sentence(program, arguments, said):
    command = [sys.executable, "-m", f"referee_jax.{program}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") <= 3, done.stderr


def test_help_is_no_mistake():
    done = subprocess.run(
        [sys.executable, "-m", "referee_jax.sweep", "--helpshort"], cwd=ROOT, capture_output=True, text=True
    )
    assert "--vary" in done.stdout and "Traceback" not in done.stderr
