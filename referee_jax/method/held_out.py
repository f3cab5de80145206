"""The held-out referees' watch over one inversion: they are never in the gradient, but see where it leads.

Every so many iterations they judge the picture as it is. The latents that they liked best are kept; an item that has not
come nearer to their liking for some looks may stop. And the end is compared with the start: where the referees that were
optimised against like the picture better and those that were not like it less, the gradient has found a weakness of the
first ("reward hacking") and not a better picture.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import struct
from jax import Array


class HeldOutState(struct.PyTreeNode):
    """What is remembered.

    Attributes:
        first: float32 `[2]`, the losses of the optimised and of the held-out referees at the start.
        best: the latents with the lowest held-out loss, and `loss`, that loss.
        since: int32, looks since they were seen.
    """

    first: Array
    best: Array
    loss: Array
    since: Array

    def looked(self, latents: Array, loss: Array) -> "HeldOutState":
        """After another look, at `latents` with this held-out loss."""
        better = loss < self.loss
        return self.replace(
            best=jnp.where(better, latents, self.best),
            loss=jnp.where(better, loss, self.loss),
            since=jnp.where(better, 0, self.since + 1),
        )


def begin(latents: Array, losses: Array) -> HeldOutState:
    """Before the first iteration; `losses` as `Watch.first`."""
    return HeldOutState(first=losses, best=latents, loss=losses[1], since=jnp.zeros((), jnp.int32))


def is_hacked(losses: Mapping[str, Sequence[float]]) -> bool:
    """Whether the optimised referees are surer than at the start and the held-out ones less sure.

    `losses` has `referee` and `held_out`, each a pair of first and last.
    """
    (first, last), (held_first, held_last) = losses["referee"], losses["held_out"]
    return last < first and held_last > held_first
