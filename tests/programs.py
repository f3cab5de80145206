"""The package's commands in processes of their own, forked from one that has imported what they import.

So a start takes a tenth of a second instead of three; all else is as by `python -m`.
"""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from referee_jax import bench, doctor, evaluate, gallery, run, score, sweep  # noqa: F401  for all processes

ROOT = pathlib.Path(__file__).parent.parent
LONGEST = 300  # seconds that a command may take


def begin(target: Callable, *arguments: Any) -> multiprocessing.Process:
    """A process that calls `target`, a function of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def redirect(out: pathlib.Path, error: pathlib.Path) -> None:
    """Appends what this process prints to files."""
    for number, path in ((1, out), (2, error)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)


def command(module: str, *arguments: Any) -> subprocess.CompletedProcess:
    """`python -m MODULE ARGUMENTS` in the root of the repository."""
    line = [module, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as directory:
        out, error = pathlib.Path(directory, "out"), pathlib.Path(directory, "error")
        process = begin(_command, line, out, error)
        process.join(LONGEST)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(line, LONGEST)
        return subprocess.CompletedProcess(line, process.exitcode, out.read_text(), error.read_text())


def _command(line: list[str], out: pathlib.Path, error: pathlib.Path) -> None:
    os.chdir(ROOT)
    redirect(out, error)
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")  # the variable was read when JAX was imported
    sys.modules.pop(line[0], None)  # it is to run anew, as the main module
    sys.argv = line
    runpy.run_module(line[0], run_name="__main__", alter_sys=True)
