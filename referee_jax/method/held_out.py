"""Held-out referees: evaluated during an inversion, but never part of its gradient.

Every so many iterations they score the image as it is. The latents with their lowest loss are kept,
and an item stops early when that loss has not improved for `patience` evaluations. At the end, an
item whose optimised loss fell below its value at the start, and which the held-out referees doubt, is
"hacked": the gradient has found a weakness of the referees, and not a better image (reward hacking).
How often that is right is measured by benchmarks/hacking.py.
"""

from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
from flax import struct
from jax import Array

ANSWERS = ("itm", "vqa")  # losses that are -log p of "yes, this is what the text says"
# Of which referees there are losses of a whole image: the optimised ones, the held-out ones, and those that choose, which
# are the optimised ones and others.
LOSSES = ("referee", "held_out", "choice")
DOUBT = 0.3  # of such a loss: p below 0.74


class HeldOutState(struct.PyTreeNode):
    """What the held-out referees have measured of one item.

    Attributes:
        first: float32 `[3]`, LOSSES at the start.
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


def doubt(weights: Iterable[Mapping[str, float]]) -> float | None:
    """The held-out loss from which a picture is doubted, by the weights of each held-out referee's losses.

    None unless all of them answer yes or no: of other losses nothing says which value is a wrong
    picture's, and whether they rise or fall says little.
    """
    pairs = [(name, weight) for losses in weights for name, weight in losses.items()]
    return DOUBT * sum(weight for _, weight in pairs) if pairs and all(name in ANSWERS for name, _ in pairs) else None


def is_hacked(losses: Mapping[str, Sequence[float]], doubt: float) -> bool:
    """Whether the optimised loss fell and the held-out loss at the end is above `doubt`.

    `losses` has "referee" and "held_out", each a pair of the loss at the start and at the end.
    """
    first, last = losses["referee"]
    return last < first and losses["held_out"][1] > doubt
