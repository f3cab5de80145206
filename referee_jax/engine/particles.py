"""Pictures of an item that are made beside each other, "particles", and which of them go on (method/selection.py).

A batch holds each particle of all its items by itself: memory is that of one, programs are the same for any number,
and item by item another one may be the best.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from referee_jax import config
from referee_jax.method import selection
from referee_jax.method import state as state_lib

# Of several trees of arrays `[item, ...]`, for each item the one whose number stands in an array `[item]`.
Take = Callable[[Sequence[Any], np.ndarray], Any]


class Particle(NamedTuple):
    """One particle of each item; `value` is what it was worth at the last selection, `log_w` its weight in "smc".

    The latter two are float32 `[item]`, zeros at first.
    """

    state: state_lib.InversionState
    keys: Array
    value: Array
    log_w: Array

    @property
    def saved(self) -> tuple:
        """What a checkpoint holds of it."""
        return self.state, self.value, self.log_w


def survivors(settings: config.Settings, step: int) -> int:
    """How many particles there are before iteration `step`."""
    return selection.survivors(settings.select, settings.particles, step // settings.select_every)


def until_selection(settings: config.Settings, step: int) -> int:
    """Iterations to the next selection."""
    return settings.select_every - step % settings.select_every if settings.particles > 1 else settings.steps


def is_selected(settings: config.Settings, step: int) -> bool:
    """Whether some are chosen after iteration `step - 1`."""
    is_due = step % settings.select_every == 0 and step < settings.steps
    return is_due and settings.select != "none" and survivors(settings, step - 1) > 1


def ranked(take: Take, trees: Sequence[Any], values: Sequence[Array], keep: int) -> list[Any]:
    """Of several trees each item's `keep` with the highest values `[item]`, best first."""
    if len(trees) == 1:
        return list(trees)
    return [take(trees, row) for row in selection.ranked([np.asarray(x) for x in values], keep)]


def select(
    settings: config.Settings,
    particles: Sequence[Particle],
    values: Sequence[Array],
    step: int,
    take: Take,
    resampled: Callable[..., tuple[Array, Array]],
) -> tuple[Particle, ...]:
    """Those that go on after iteration `step - 1`, by `values [particle][item]`, the higher the better.

    `resampled` is the program of selection.resampled.
    """
    if settings.select == "halve":
        states = ranked(take, [particle.state for particle in particles], values, survivors(settings, step))
        return tuple(particle._replace(state=state) for particle, state in zip(particles, states, strict=False))
    rows = lambda arrays: jnp.stack(list(arrays), axis=1)
    numbers = jnp.float32(settings.select_scale), jnp.int32(step)
    before, weights = (rows(getattr(particle, name) for particle in particles) for name in ("value", "log_w"))
    parents, log_w = resampled(rows(values), before, weights, particles[0].keys, *numbers)
    pairs = [(particle.state, value) for particle, value in zip(particles, values, strict=True)]
    chosen = []
    for n, (particle, row) in enumerate(zip(particles, np.asarray(parents).T, strict=True)):
        state, value = take(pairs, row)
        chosen.append(Particle(state, particle.keys, value, log_w[:, n]))
    return tuple(chosen)


def abstract(state: Any, count: int, size: int) -> list[tuple]:
    """The shapes of what a checkpoint holds of `count` particles of `size` items."""
    number = jax.ShapeDtypeStruct((size,), jnp.float32)
    return [(state, number, number)] * count
