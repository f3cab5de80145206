"""Meshes and processes; what runs on them is in test_inverter.py."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from referee_jax import parallel

ROOT = pathlib.Path(__file__).parent.parent


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
    """Over the groups what is batched; within them the longest axis that can be, of what is large."""
    monkeypatch.setattr(parallel, "LARGE", 100)
    mesh = parallel.prompt_mesh(jax.devices()[:4], model=2)
    spec = lambda *shape, batched=False: parallel.place(np.zeros(shape), mesh, batched=batched).sharding.spec  # noqa: E731
    assert spec(4, 400, batched=True) == PartitionSpec("prompt")
    assert spec(3, 40, 6) == PartitionSpec(None, "model")
    assert spec(99) == spec(101, 5) == spec(2, 2) == PartitionSpec()
    shape = parallel.place([jax.ShapeDtypeStruct((3, 40, 6), np.float32), np.zeros(3)], mesh, batched=False)
    assert shape[0].sharding.spec == PartitionSpec(None, "model") and isinstance(shape[1], jax.ShapeDtypeStruct)


def test_processes_join():
    """Two of them, by jax.distributed: each is told which it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = "import sys; from referee_jax import parallel; print(parallel.join(int(sys.argv[1]), 2, timeout=100))"
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(index)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=200)[0].strip().splitlines()[-1] for process in running]
    assert said == ["(0, 2)", "(1, 2)"]
