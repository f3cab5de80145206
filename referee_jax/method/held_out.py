"""Held-out referees: evaluated during an inversion, but never part of its gradient.

Every so many iterations they score the image as it is. The latents with their lowest loss are kept,
and an item stops early when that loss has not improved for `patience` evaluations. At the end, an
item whose optimised loss fell below its value at the start while its held-out loss rose is "hacked":
the gradient has found a weakness of the referees, and not a better image (reward hacking).
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import struct
from jax import Array


class HeldOutState(struct.PyTreeNode):
    """What the held-out referees have measured of one item.

    Attributes:
        first: float32 `[2]`, the losses of the optimised and of the held-out referees at the start.
        best: the latents with the lowest held-out loss.
        loss: that loss.
        since: evaluations since then, int32.
    """

    first: Array
    best: Array
    loss: Array
    since: Array

    def evaluated(self, latents: Array, loss: Array) -> "HeldOutState":
        """After another evaluation, of `latents` with this held-out loss."""
        better = loss < self.loss
        return self.replace(
            best=jnp.where(better, latents, self.best),
            loss=jnp.where(better, loss, self.loss),
            since=jnp.where(better, 0, self.since + 1),
        )


def begin(latents: Array, losses: Array) -> HeldOutState:
    """Before the first iteration; `losses` as `HeldOutState.first`."""
    return HeldOutState(first=losses, best=latents, loss=losses[1], since=jnp.zeros((), jnp.int32))


def is_hacked(losses: Mapping[str, Sequence[float]]) -> bool:
    """Whether the optimised loss fell and the held-out loss rose.

    `losses` has "referee" and "held_out", each a pair of the loss at the start and at the end.
    """
    (first, last), (held_first, held_last) = losses["referee"], losses["held_out"]
    return last < first and held_last > held_first
