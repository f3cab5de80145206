"""Devices: a mesh, and a function of a batch run on all of them without a word between them.

`jax.shard_map` over the mesh axis `prompt` is the successor that `jax.pmap` names. Prompts are independent, so the compiled
program contains no collective; a test reads it.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "prompt"


def prompt_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of this process's devices along the axis `prompt`."""
    return Mesh(np.array(devices or jax.local_devices()), (AXIS,))


def across_devices(fn: Callable, mesh: Mesh, batched: Sequence[bool], *, joined: int | tuple[int, ...] = 0) -> Callable:
    """`fn` with each batched argument split along its first axis over the mesh, the others whole on every device.

    The result, or each part of a tuple, is joined along the axis `joined`. Batches must be a multiple of the number of
    devices.
    """
    specs = tuple(PartitionSpec(AXIS) if is_batched else PartitionSpec() for is_batched in batched)
    out = jax.tree.map(lambda axis: PartitionSpec(*[None] * axis, AXIS), joined)
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)


def place(tree: Any, mesh: Mesh, *, batched: bool) -> Any:
    """Puts a pytree on the mesh: split along its leaves' first axis, or whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(AXIS) if batched else PartitionSpec()))


def join(index: int, count: int, *, timeout: int = 300) -> tuple[int, int]:
    """Joins the other processes of a job by jax.distributed; which one of how many this is. They share nothing afterwards.

    On a TPU slice and under Slurm, GKE or Open MPI JAX finds them itself; elsewhere `index` and `count` say who this is, and
    JAX_COORDINATOR_ADDRESS where process 0 listens. Raises RuntimeError after `timeout` seconds, which names who is missing.
    """
    given = {"process_id": index, "num_processes": count} if "JAX_COORDINATOR_ADDRESS" in os.environ else {}
    jax.distributed.initialize(**given, initialization_timeout=timeout)
    ocp.multihost.sync_global_processes("start", timeout=timeout)
    return jax.process_index(), jax.process_count()
