"""Programs as tracing leaves them, kept for the next process: tracing is Python's, one core's, and seconds for each.

JAX finds a compiled program by what tracing gives (hardware/compile_cache.py). Here that is found by what decides it: the
package's sources, its static arguments, and the structure, shapes and types of the others. What that cannot tell, as of a
function of a user's, is traced each time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import export

from referee_jax.hardware import chips, kept
from referee_jax.method import augmentations, latent_losses
from referee_jax.method.state import Plan
from referee_jax.method.ways import noise, optim

# What is found here was made by these very versions, which its calls suit.
CHECKS = [export.DisabledSafetyCheck.custom_call(name) for name in chips.CUSTOM_CALLS]


def keeping(program: Callable, plan: Plan, static: Any) -> Callable | None:
    """A function to jit that computes what `program`, of a plan and other static values, does; None if nothing is kept."""
    if not kept.directory():
        return None

    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        try:
            name = described(plan, static, structure, leaves)
            data, outputs = kept.once(name, functools.partial(_exported, program, structure, leaves))
        except (kept.Unknown, ValueError, NotImplementedError):  # of jax.export: what it cannot keep
            return program(*args)
        return jax.tree.unflatten(jax.tree.structure(outputs), export.deserialize(bytearray(data)).call(*leaves))

    call.__name__ = program.__name__  # in what JAX tells about it
    return call


def count(plan: Plan, static: Any, args: Any, counted: Callable[[], float]) -> float:
    """What is `counted` in programs of a plan, other static values and arguments; kept as they are."""
    leaves, structure = jax.tree.flatten(args)
    try:
        name = described(plan, static, structure, leaves)
    except kept.Unknown:
        return counted()
    return kept.once(name, counted)


def _exported(program: Callable, structure: Any, leaves: list) -> tuple[bytes, Any]:
    """A program for arguments of this structure, which takes and returns leaves, and its outputs' structure."""
    # With the sharding, they are those of performance/cost.py, and traced once.
    abstract = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type, sharding=x.sharding)
        for x in map(jax.typeof, leaves)
    ]
    exported = export.export(jax.jit(program), disabled_checks=CHECKS)(*jax.tree.unflatten(structure, abstract))
    outputs = jax.tree.unflatten(exported.out_tree, range(exported.out_tree.num_leaves))
    flat = {"in_tree": ((0,) * len(leaves), {}), "out_tree": [0] * len(exported.out_avals)}
    exported = dataclasses.replace(exported, **{name: jax.tree.structure(x) for name, x in flat.items()})
    return bytes(exported.serialize()), outputs


def described(plan: Plan, static: Any, structure: Any, leaves: list) -> str:
    """All that decides what tracing gives, but for sources and versions. Raises kept.Unknown."""
    for registry, names in (
        (augmentations.AUGMENTATIONS, [name for view in (*plan.views, *plan.held_out) for name in view.augmentations]),
        (latent_losses.LATENT_LOSSES, plan.latent_losses),
        (noise.RULES, [plan.rule]),
        (optim.OPTIMIZERS, [plan.optimizer]),
    ):
        if added := registry.added(names):
            raise kept.Unknown(added)
    arrays = [(x.shape, str(x.dtype), x.weak_type) for x in map(jax.typeof, leaves)]
    return f"{kept.text((plan, static))}\n{_structure(structure)}\n{arrays}"


@functools.lru_cache(maxsize=32)  # each program of an engine has the networks
def _structure(tree: Any) -> str:
    if (data := tree.node_data()) is None:
        return "*"
    kind, static = data
    return f"{kept.text(kind)}[{kept.text(static)}]({', '.join(map(_structure, tree.children()))})"
