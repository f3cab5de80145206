"""Runs a batched function on all devices by shard_map; no communication.

Prompts are independent, so the compiled program contains no collective; a test reads it. Where
weights are too large for one device, a second mesh axis, `model`, splits them over a group of devices
that work on the same prompts: there the compiler divides the work, and collectives stay within a group.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from referee_jax.hardware.chips import MODEL

AXIS = "prompt"
BATCHED = PartitionSpec(AXIS)  # of what has a leading axis of items
LARGE = 2**16  # elements; smaller weights are whole on every device


def prompt_mesh(devices: Sequence[jax.Device] | None = None, *, prompt: int = 0, model: int = 1) -> Mesh:
    """A mesh of this process's devices: `prompt` groups (0: as many as fit) of `model` devices each.

    Raises ValueError where there are too few devices, or, without `prompt`, some would be left over.
    """
    devices = list(devices or jax.local_devices())
    groups = prompt or len(devices) // model
    if not 0 < groups * model <= len(devices) or (not prompt and groups * model < len(devices)):
        raise ValueError(f"{len(devices)} devices do not make {prompt or 'whole'} groups of {model}")
    return Mesh(np.array(devices[: groups * model]).reshape(groups, model), (AXIS, MODEL))


def across_devices(fn: Callable, mesh: Mesh, batched: Sequence[bool]) -> Callable:
    """`fn` with each batched argument split along its first axis over the mesh, the others whole on every device.

    The result is joined along its first axis. Batches must be a multiple of the number of groups.
    """
    # Where no weight is split, all axes are manual: cuDNN's attention cannot be partitioned by the compiler.
    manual = {AXIS} if mesh.shape[MODEL] > 1 else {AXIS, MODEL}
    specs = tuple(BATCHED if is_batched else PartitionSpec() for is_batched in batched)
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=BATCHED, axis_names=manual, check_vma=False)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of what has an axis of prompts: split along it over the groups, whole on each device of one."""
    return NamedSharding(mesh, BATCHED)


def place(tree: Any, mesh: Mesh, *, batched: bool) -> Any:
    """Puts a pytree on the mesh: batched leaves split along their first axis over the groups, others in every group.

    Within a group, a leaf of LARGE elements or more that is not batched is split along its longest
    divisible axis. If any leaf is a jax.ShapeDtypeStruct, all become abstract, with their sharding.
    """
    is_abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))
    abstract = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    put = abstract if is_abstract else jax.device_put
    return jax.tree.map(lambda x: put(x, NamedSharding(mesh, _spec(x, mesh, batched))), tree)


def _spec(x: Any, mesh: Mesh, batched: bool) -> PartitionSpec:
    count = mesh.shape[MODEL]
    if batched:
        return BATCHED
    axes = [axis for axis, length in enumerate(x.shape) if length % count == 0]
    if count == 1 or x.size < LARGE or not axes:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: x.shape[axis])
    return PartitionSpec(*[None] * longest, MODEL)
