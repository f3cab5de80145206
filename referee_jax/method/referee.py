"""What the method asks of a referee."""

from typing import Any, Protocol

from jax import Array

Losses = dict[str, Array]


class Referee(Protocol):
    """A frozen judge.

    Attributes:
        image_size: side of the square views it reads, in pixels.
        losses: names of the losses it knows.
    """

    image_size: int
    losses: tuple[str, ...]

    def encode(self, tokens: Any) -> Any:
        """All that depends on the text alone, of what `Judge.tokenize` gave for one prompt; computed once per prompt."""

    def views_losses(self, views: Array, text: Any) -> Losses:
        """Views `[V, S, S, 3]` in [0, 1] (noise may leave it) and `encode`'s result to each loss, float32 `[V]`."""

    def fit(self, image: Array) -> Array:
        """An image `[H, W, 3]` in [0, 1] of any size to the view that its authors would score it by.

        `[S, S, 3]`, unless they keep its ratio of sides.
        """

    def scores(self, view: Array, text: Any) -> dict[str, Array]:
        """One clean view of `fit` in [0, 1] to scalars, the higher the better."""
