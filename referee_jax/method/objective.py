"""The referees' half of the gradient, and its balance with the prior's (arXiv 2402.16305).

With x the decoded image, T_v the views, r_k the referees and L_k the weighted sum of their losses:

    g_k  = d/dx mean_v L_k(r_k(T_v(x)))                       (1)
    g_k <- weight_k g_k / (|g_k| + normalise_epsilon)         (2), if referees are normalised
    gv   = (dx/dz)^T sum_k g_k                                (3)
    r    = |gs| / (|gv| + balance_epsilon)                    (4), gs being the prior's gradient

The image is decoded once, with its pullback held: each referee adds its gradient with respect to
the image, from all views at once or in several microbatches, and one pullback (3) turns the sum
into a gradient of the latents. The step of the referees is weight(i) r gv (optim.py). Nothing here
knows which referees there are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from referee_jax.method import augmentations, schedules, views
from referee_jax.method.referee import Referee


class Hyper(struct.PyTreeNode):
    """Numbers of the term, all traced.

    Attributes:
        weight: length of the referees' step in steps of the prior; goes along a cosine to
            `weight_final` while the referees are active.
        start: the first iteration in which they are active.
        stop: the first in which they are not any more.
        balance_epsilon: of (4); a gradient much shorter than this is not brought to the prior's
            length. At 0 (the authors') a content referee pulls as hard as one that objects.
        normalise_epsilon: of (2).
        noise: standard deviation of the noise on the views, in [0, 1] units of pixels.
    """

    weight: Array | float = 2.0
    weight_final: Array | float = 2.0
    start: Array | int = 0
    stop: Array | int = 150
    balance_epsilon: Array | float = 0.0
    normalise_epsilon: Array | float = 0.0
    noise: Array | float = 0.2

    def is_active(self, i: Array) -> Array:
        """Whether the referees are active at iteration `i`."""
        return (i >= self.start) & (i < self.stop)

    def weight_at(self, i: Array) -> Array:
        """Length of the referees' step in prior steps at iteration `i`."""
        return schedules.cosine(
            self.weight, self.weight_final, (i - self.start) / jnp.maximum(self.stop - self.start, 1)
        )


class ViewPlan(struct.PyTreeNode):
    """How the views of one referee are made; static.

    Attributes:
        losses: names of the referee's losses.
        count: views that are drawn.
        keep: the hardest of them, which have a gradient (hard-view mining); all if equal to `count`.
        augmentations: names, in their order; see augmentations.AUGMENTATIONS.
        passes: microbatches into which the kept views are split.
        is_fitted: whether the image is resized as the referee's authors do, and not pooled (views.pool).
        dense: whether pixels are resampled by products of matrices, which suits TPUs.
        has_gradient: whether the referee is optimised, or has part in the choice among pictures alone.
    """

    losses: tuple[str, ...] = struct.field(pytree_node=False)
    count: int = struct.field(pytree_node=False)
    keep: int = struct.field(pytree_node=False)
    augmentations: tuple[str, ...] = struct.field(pytree_node=False)
    passes: int = struct.field(pytree_node=False, default=1)
    is_fitted: bool = struct.field(pytree_node=False, default=False)
    dense: bool = struct.field(pytree_node=False, default=False)
    has_gradient: bool = struct.field(pytree_node=False, default=True)


class Weights(struct.PyTreeNode):
    """Loss weights of one referee (traced).

    Attributes:
        losses: the weight of each of ViewPlan.losses.
        referee: weight_k of (2).
    """

    losses: tuple[Array | float, ...]
    referee: Array | float = 1.0

    def total(self, names: tuple[str, ...], losses: dict[str, Array]) -> Array:
        """L_k: the weighted sum of the losses of these names."""
        return sum(weight * losses[name] for name, weight in zip(names, self.losses, strict=True))


def clamp(x: Array, how: str) -> Array:
    """`x` clamped to [0, 1].

    `how` is "hard", without a gradient outside, or "straight_through": outside, a gradient whose
    descent leads back inside passes.
    """
    if how == "hard":
        return augmentations.clamp(x)
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
    plan: ViewPlan,
    weights: Weights,
    *,
    params: views.Params,
    noise: Array,
) -> tuple[Array, dict[str, Array]]:
    """(1) of one referee, and its losses, means over the kept views.

    Args:
        referee: the referee.
        image: `[H, W, 3]` in [0, 1].
        text: of `referee.encode`.
        plan: how its views are made.
        weights: of its losses.
        params: of `views.sample`, for `plan.count` views.
        noise: `[keep, S, S, 3]` in units of pixels, added to the kept views.

    Returns:
        The gradient, as `image`, and the losses by name with their weighted sum "loss".
    """
    size = referee.image_size

    def view_losses(image: Array, params: views.Params, noise: Array | float) -> dict[str, Array]:
        with jax.named_scope("views"):
            image = referee.fit(image) if plan.is_fitted else image
            shown = views.apply(image, params, size=size, names=plan.augmentations, dense=plan.dense) + noise
        return referee.views_losses(shown, text)

    if plan.keep < plan.count:
        scores = weights.total(plan.losses, view_losses(image, params, 0.0))
        params = views.take(params, views.hardest(scores, plan.keep))

    def gradient(params: views.Params, noise: Array, counts: Array) -> tuple[Array, dict[str, Array]]:
        def loss(image: Array) -> tuple[Array, dict[str, Array]]:
            each = view_losses(image, params, noise)
            means = {name: (counts * each[name]).sum() / plan.keep for name in plan.losses}
            return weights.total(plan.losses, means), means

        (total, means), gradient = jax.value_and_grad(loss, has_aux=True)(image)
        return gradient, means | {"loss": total}

    counts = jnp.ones(plan.keep)
    if plan.passes == 1:
        return gradient(params, noise, counts)
    # The last microbatch is filled up with views that count nothing.
    params, noise = jax.tree.map(lambda x: views.split(x, plan.passes, mode="edge"), (params, noise))
    batches = params, noise, views.split(counts, plan.passes, mode="constant")
    return jax.tree.map(lambda x: x.sum(0), jax.lax.map(lambda batch: gradient(*batch), batches))


def clean_loss(referee: Referee, image: Array, text: Any, plan: ViewPlan, weights: Weights) -> Array:
    """The weighted sum of the losses on the image as it is: one view, not augmented."""
    losses = referee.views_losses(referee.fit(image)[None], text)
    return weights.total(plan.losses, losses)[0]


def normalised(gradient: Array, weight: Array | float, epsilon: Array) -> Array:
    """(2) for one gradient; 0 where it is 0."""
    length = jnp.linalg.norm(gradient)
    return jnp.where(length > 0, weight / jnp.where(length > 0, length + epsilon, 1), 0) * gradient


def balance(prior: Array, referee: Array, epsilon: Array) -> Array:
    """r of (4); 1 where one of the gradients is 0."""
    length, pull = jnp.linalg.norm(prior), jnp.linalg.norm(referee) + epsilon
    return jnp.where((length > 0) & (pull > 0), length / jnp.where(pull > 0, pull, 1), 1.0)
