"""Devices: a mesh, and a function of a batch run on all of them without a word between them.

`jax.shard_map` over the mesh axis `prompt` is the successor that `jax.pmap` names. Prompts are independent, so the compiled
program contains no collective; a test reads it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
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
    """Puts a pytree on the mesh: split along its leaves' first axis, or whole on every device.

    Of shapes (jax.ShapeDtypeStructs) nothing is put anywhere: each is told where it would be.
    """
    sharding = NamedSharding(mesh, PartitionSpec(AXIS) if batched else PartitionSpec())
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
    return jax.device_put(tree, sharding)
