"""Meshes and processes; programs on them are tested in engine/test_inverter.py."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from referee_jax.engine import parallel
from referee_jax.hardware import processes
from referee_jax.storage import checkpoints, files

ROOT = pathlib.Path(__file__).parents[2]


def test_meshes():
    devices = jax.devices()[:6]
    assert dict(parallel.prompt_mesh(devices).shape) == {"prompt": 6, "model": 1}
    assert dict(parallel.prompt_mesh(devices, model=3).shape) == {"prompt": 2, "model": 3}
    mesh = parallel.prompt_mesh(devices, prompt=2, model=2)
    assert [[device.id for device in group] for group in mesh.devices] == [[0, 1], [2, 3]]
    for prompt, model in ((0, 4), (4, 2), (0, 7)):
        with pytest.raises(ValueError, match="6 devices do not make"):
            parallel.prompt_mesh(devices, prompt=prompt, model=model)


def test_what_is_split(monkeypatch):
    """Batches are split over groups, large arrays within them along the longest divisible axis."""
    monkeypatch.setattr(parallel, "LARGE", 100)
    mesh = parallel.prompt_mesh(jax.devices()[:4], model=2)
    spec = lambda *shape, batched=False: parallel.place(np.zeros(shape), mesh, batched=batched).sharding.spec
    assert spec(4, 400, batched=True) == PartitionSpec("prompt")
    assert spec(3, 40, 6) == PartitionSpec(None, "model")
    assert spec(99) == spec(101, 5) == spec(2, 2) == PartitionSpec()
    shape = parallel.place([jax.ShapeDtypeStruct((3, 40, 6), np.float32), np.zeros(3)], mesh, batched=False)
    assert shape[0].sharding.spec == PartitionSpec(None, "model") and isinstance(shape[1], jax.ShapeDtypeStruct)


JOINED = """
import signal, sys, time
from pathlib import Path
import numpy as np
from referee_jax import items, run
from referee_jax.hardware import processes
from referee_jax.runs import worker
from referee_jax.storage import checkpoints
stop, place = worker.Stop(), Path(sys.argv[2])
run.catch_signals(stop)
index, count = processes.join(int(sys.argv[1]), 2, place, timeout=100)
part = items.Part((items.Item("a", index),), 5, {"x": np.full((1, 3), index, np.float32)})
checkpoints.Checkpoints(place / "checkpoints").save(part, "print")
print((index, count), flush=True)
if index:
    signal.raise_signal(signal.SIGTERM)
    deadline = time.monotonic() + 5
    while not stop() and time.monotonic() < deadline:
        time.sleep(0.1)
    print("asked to stop:", stop(), flush=True)
    time.sleep(2)  # while the other process, which is done, waits
signal.setitimer(signal.ITIMER_REAL, 0)
"""


def environment():
    """Environment of a job's processes, with a free port for process 0, and a proxy that leads nowhere."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    proxy = dict.fromkeys(("http_proxy", "HTTPS_PROXY", "grpc_proxy"), "http://192.0.2.1:9")
    return os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PLATFORMS": "cpu"} | proxy


def test_processes_join(tmp_path):
    """Each of two gets its index, hears SIGTERM and has checkpoints; a finished one waits."""
    variables = environment()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED, str(index), tmp_path],
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0].strip().splitlines() for process in running]
    assert outputs[0][-1] == "(0, 2)" and outputs[1][-2:] == ["(1, 2)", "asked to stop: True"]
    assert running[0].returncode == 0
    parts = checkpoints.Checkpoints(tmp_path / "checkpoints").begun("print")
    assert sorted((part.items[0].sample, part.state["x"].tolist()) for part in parts) == [
        (0, [[0.0] * 3]),
        (1, [[1.0] * 3]),
    ]


def test_a_distributed_run(tmp_path):
    """Two processes of a job make a run: each its share, and the last merges the journals."""
    variables, work = environment(), tmp_path / "run"
    arguments = [
        "--config=configs/shapes_clip.py",
        "--config.steps=4",
        "--samples=5",
        "--prompt=a star",
        f"--workdir={work}",
    ]
    line = [sys.executable, "-m", "tests.fake_run", "--distributed", *arguments, "--shard_count=2"]
    running = [
        subprocess.Popen([*line, f"--shard_index={index}"], cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert "3 images done" in outputs[0] and "2 images done" in outputs[1]
    journals = [file.name for file in work.glob("metadata*.jsonl")]
    assert journals == ["metadata.jsonl"] and not (work / ".joining").exists()
    records = files.read_lines(work / "metadata.jsonl")
    assert sorted(x["sample"] for x in records) == [*range(5)]
    assert {x["file_name"] for x in records} == {f"images/{file.name}" for file in (work / "images").iterdir()}
    assert len(list((work / "images").iterdir())) == 5


def test_missing_processes_are_named(tmp_path):
    """One of three starts; before JAX ends it, it prints which are present and missing."""
    script = (
        "import pathlib, sys; from referee_jax.hardware import processes;"
        "processes.join(0, 3, pathlib.Path(sys.argv[1]), timeout=5)"
    )
    (tmp_path / ".joining").mkdir()
    (tmp_path / ".joining" / "process 1 on a host of yesterday").touch()
    os.utime(tmp_path / ".joining" / "process 1 on a host of yesterday", (0, 0))
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode
    assert (
        f"waiting for other processes of this job, 5 s at most; present: process 0 on {processes.HOST}; missing: 1, 2\n"
        in done.stderr
    )
