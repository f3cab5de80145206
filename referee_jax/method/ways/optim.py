"""The update of the latents, as Optax transformations.

One iteration of "Referee Can Play" (arXiv 2402.16305) is

    z <- z - lr_i (weight r gv + noise n1) - lr gs + noise n2        (referees active)
    z <- z - lr gs + tail_noise n2                                   (else)

where gv and gs are the referees' and the prior's gradients, r their balance (objective.py) and lr_i a
schedule; then the result is folded into an average, to which the latents are set back at restarts.
As one chain: the caller's gradient is gs + (lr_i / lr) weight r gv, then a base optimiser, the
noise, and the restart.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from referee_jax.method import schedules
from referee_jax.method.registry import Registry

# Functions without arguments, to transformations of the gradient. The authors' choice is plain gradient descent.
OPTIMIZERS = Registry("optim.register", {"sgd": optax.identity, "adam": optax.scale_by_adam})
register = OPTIMIZERS.register


class Hyper(struct.PyTreeNode):
    """Numbers of the update, all traced; `noise` and `tail_noise` are standard deviations in latent units."""

    lr: Array | float = 1.0
    lr_final: Array | float = 0.5
    warmup: Array | int = 10
    noise: Array | float = 0.2
    tail_noise: Array | float = 0.01
    ema_decay: Array | float = 0.95
    ema_start: Array | int = 40
    ema_every: Array | int = 60


def referee_rate(hyper: Hyper, i: Array, steps: int) -> Array:
    """lr_i: linear over `warmup` iterations, then a cosine from `lr` to `lr_final` at iteration `steps`."""
    rising = hyper.lr * (i + 1) / jnp.maximum(hyper.warmup, 1)
    falling = schedules.cosine(hyper.lr, hyper.lr_final, (i - hyper.warmup) / jnp.maximum(steps - hyper.warmup, 1))
    return jnp.where(i < hyper.warmup, rising, falling)


class EmaRestartState(NamedTuple):
    """The inner state, the running average of the parameters, and whether parameters and average share storage."""

    inner: optax.OptState
    average: optax.Params
    aliased: Array


def ema_restart(
    inner: optax.GradientTransformation, *, decay: Array, start: Array, every: Array, stop: Array, alias: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Averages the parameters, and restarts from the average at iterations `start`, `start + every`, ... `<= stop`.

    The k-th update (k = `step` + 1) is folded into the average:
    average <- decay average + (1 - decay) updated; the first one is copied. At a restart the update
    returned is average - params. Read the average with `optax.tree.get(state, "average")`.

    Args:
        inner: the transformation whose updates are averaged.
        decay: of the average, in [0, 1].
        start: the iteration of the first restart, counted from 1.
        every: iterations between restarts.
        stop: the last iteration that may restart.
        alias: whether parameters and average share storage after a restart, as in the authors'
            code: the referees' next step then moves both.

    Returns:
        A transformation whose `update` takes `step` (int32) and, for `alias`, the referees' step
        as `moved`.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> EmaRestartState:
        return EmaRestartState(inner.init(params), params, jnp.zeros((), bool))

    def update(updates, state, params, *, step: Array, moved: optax.Updates = None, **extra):
        updates, inner_state = inner.update(updates, state.inner, params, step=step, **extra)
        updated, average = optax.apply_updates(params, updates), state.average
        if alias:
            shared = optax.apply_updates(average, moved)
            average = optax.tree.where(state.aliased, shared, average)
        folded = optax.incremental_update(updated, average, 1 - decay)
        average = optax.tree.where(step == 0, updated, folded)
        count = step + 1
        restart = (count >= start) & ((count - start) % every == 0) & (count <= stop)
        updates = optax.tree.where(restart, optax.tree.sub(average, params), updates)
        return updates, EmaRestartState(inner_state, average, restart)

    return optax.GradientTransformationExtraArgs(init, update)


def add_noise() -> optax.GradientTransformationExtraArgs:
    """Adds `noise`, an argument of `update`: already drawn and scaled, so that a test can give its own."""

    def update(updates, state, params=None, *, noise: optax.Updates, **extra):
        return optax.tree.add(updates, noise), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def build(
    hyper: Hyper, *, stop: Array, name: str = "sgd", alias: bool = False
) -> optax.GradientTransformationExtraArgs:
    """The chain of the module's docstring; `stop` is the last iteration that may restart (that of the referees)."""
    inner = optax.chain(OPTIMIZERS[name](), optax.scale(-hyper.lr), add_noise())
    return ema_restart(
        inner, decay=hyper.ema_decay, start=hyper.ema_start, every=hyper.ema_every, stop=stop, alias=alias
    )
