"""The referees' half of the gradient, and its balance with the prior's (arXiv 2402.16305).

The image is decoded once, with its pullback held. Each referee looks at its own views of it, all at once or in several passes,
and adds its gradient with respect to the image; one pullback through the decoder turns the sum into a gradient of the latents.
Nothing here knows which referees there are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from referee_jax.method import schedules, views
from referee_jax.method.referee import Referee


class Hyper(struct.PyTreeNode):
    """Numbers of the term, all traced.

    The referees act in iterations `start` to `stop - 1`; their step is `weight` times the length of the prior's, moving
    along a cosine to `weight_final` meanwhile. `balance_epsilon` is the length below which
    the referees' gradient is not brought to the prior's: at 0 (the authors') a referee that is content pulls as hard as one
    that objects; `normalise_epsilon` is the same for each referee's gradient with respect to the image, where they are
    normalised. `noise` is the standard deviation added to the views, in [0, 1] units.
    """

    weight: Array | float = 2.0
    weight_final: Array | float = 2.0
    start: Array | int = 0
    stop: Array | int = 150
    balance_epsilon: Array | float = 0.0
    normalise_epsilon: Array | float = 0.0
    noise: Array | float = 0.2

    def is_on(self, i: Array) -> Array:
        """Whether the referees act at iteration `i`."""
        return (i >= self.start) & (i < self.stop)

    def weight_at(self, i: Array) -> Array:
        """Length of the referees' step in prior steps at iteration `i`."""
        return schedules.cosine(
            self.weight, self.weight_final, (i - self.start) / jnp.maximum(self.stop - self.start, 1)
        )


class ViewPlan(struct.PyTreeNode):
    """How one referee looks at the image: static facts.

    `losses` are their names; `keep` <= `count` views count, and have their gradient in as many `passes` one after the other.
    """

    losses: tuple[str, ...] = struct.field(pytree_node=False)
    count: int = struct.field(pytree_node=False)
    keep: int = struct.field(pytree_node=False)
    augmentations: tuple[str, ...] = struct.field(pytree_node=False)
    passes: int = struct.field(pytree_node=False, default=1)


class Weights(struct.PyTreeNode):
    """What one referee's word counts, traced: the weight of each of Looks.losses.

    `share` is the length of its gradient in a mix where those are normalised.
    """

    losses: tuple[Array | float, ...]
    share: Array | float = 1.0

    def total(self, looks: ViewPlan, losses: dict[str, Array]) -> Array:
        """The weighted sum of the referee's losses."""
        return sum(weight * losses[name] for name, weight in zip(looks.losses, self.losses, strict=True))


def clamp(x: Array, how: str) -> Array:
    """`x` clamped to [0, 1]. `hard`: no gradient outside. `straight_through`: the gradient that leads back inside passes."""
    if how == "hard":
        return jnp.where((x >= 0) & (x <= 1), x, jax.lax.stop_gradient(jnp.clip(x, 0, 1)))
    return _straight_through(x)


@jax.custom_vjp
def _straight_through(x: Array) -> Array:
    return jnp.clip(x, 0, 1)


def _straight_through_backward(x: Array, g: Array) -> tuple[Array]:
    return (jnp.where(((x > 1) & (g < 0)) | ((x < 0) & (g > 0)), 0, g),)


_straight_through.defvjp(lambda x: (jnp.clip(x, 0, 1), x), _straight_through_backward)


def image_gradient(
    referee: Referee,
    image: Array,
    text: Any,
    looks: ViewPlan,
    weights: Weights,
    *,
    params: views.Params,
    noise: Array,
) -> tuple[Array, dict[str, Array]]:
    """d(loss)/d(image) of one referee, and its losses, means over the kept views.

    Of `count` views the `keep` with the largest loss are kept (all, unscored, where keep = count); `noise [keep, S, S, 3]`,
    in pixel units, is added to those. In several passes memory is that of one; views that fill up the last of them count nothing.
    """
    size, names = referee.image_size, looks.augmentations
    if looks.keep < looks.count:
        scored = weights.total(looks, referee.views_losses(views.apply(image, params, size=size, names=names), text))
        params = views.take(params, views.hardest(scored, looks.keep))

    def gradient(params: views.Params, noise: Array, counts: Array) -> tuple[Array, dict[str, Array]]:
        def loss(image: Array) -> tuple[Array, dict[str, Array]]:
            shown = views.apply(image, params, size=size, names=names) + noise
            each = referee.views_losses(shown, text)
            losses = {name: (counts * value).sum() / looks.keep for name, value in each.items()}
            return weights.total(looks, losses), losses

        (total, losses), gradient = jax.value_and_grad(loss, has_aux=True)(image)
        return gradient, {name: losses[name] for name in looks.losses} | {"loss": total}

    counts = jnp.ones(looks.keep)
    if looks.passes == 1:
        return gradient(params, noise, counts)
    params, noise = views.in_passes(params, looks.passes), views.split(noise, looks.passes, mode="edge")
    given = params, noise, views.split(counts, looks.passes, mode="constant")
    return jax.tree.map(lambda x: x.sum(0), jax.lax.map(lambda one: gradient(*one), given))


def clean_loss(referee: Referee, image: Array, text: Any, looks: ViewPlan, weights: Weights) -> Array:
    """The referee's loss on the image as it is: one view, fitted and not augmented."""
    losses = referee.views_losses(referee.fit(image)[None], text)
    return weights.total(looks, losses)[0]


def normalised(gradient: Array, share: Array | float, epsilon: Array) -> Array:
    """A gradient brought to the length `share`, less where it is not much longer than `epsilon`."""
    length = jnp.linalg.norm(gradient)
    return jnp.where(length > 0, share / jnp.where(length > 0, length + epsilon, 1), 0) * gradient


def balance(prior: Array, referee: Array, epsilon: Array) -> Array:
    """|prior| / (|referee| + epsilon), by which the referees' gradient is scaled to the prior's length; 1 without one of them."""
    length, pull = jnp.linalg.norm(prior), jnp.linalg.norm(referee) + epsilon
    return jnp.where((length > 0) & (pull > 0), length / jnp.where(pull > 0, pull, 1), 1.0)
