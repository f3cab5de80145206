"""What the engine gives and carries: a picture, all of a call, how it begins, and a batch between two chunks."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from referee_jax.engine.particles import Particle
from referee_jax.items import Item
from referee_jax.method import state as state_lib


@dataclasses.dataclass(frozen=True)
class Picture:
    """One result.

    Attributes:
        item: what was asked for.
        image: float32 `[H, W, 3]` in [0, 1].
        scores: of all referees on the clean image, as "referee_0/cosine".
        latents: float32 `[h, w, C]`, scaled, from which the image was decoded.
        status: "done" or "nonfinite".
        losses: where there are held-out referees, the losses of "referee" and "held_out", and of "choice" where others
            help to choose, each a pair of the first and the last (held_out.is_hacked).
        questions: "referee_0" -> what it was asked about the prompt, see Judge.answered.
    """

    item: Item
    image: np.ndarray
    scores: dict[str, float]
    latents: np.ndarray
    status: str = "done"
    losses: dict[str, tuple[float, float]] | None = None
    questions: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """All results of a call, in the order prompts x samples; `history` has `[item, iteration]` per metric."""

    items: list[Item]
    images: np.ndarray
    scores: list[dict[str, float]]
    latents: np.ndarray
    history: dict[str, np.ndarray]

    @classmethod
    def of(cls, pictures: Sequence[Picture], history: dict[str, np.ndarray]) -> "Result":
        """The result of so many pictures."""
        return cls(
            items=[picture.item for picture in pictures],
            images=np.stack([picture.image for picture in pictures]),
            scores=[picture.scores for picture in pictures],
            latents=np.stack([picture.latents for picture in pictures]),
            history=history,
        )


class Start(NamedTuple):
    """The first latents: "noise" or a "sample" of the prior, the one of `candidates` with the lowest loss."""

    init: str
    steps: int
    guidance: float
    candidates: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch between two chunks: its items, and what the programs carry, padded to the batch size."""

    items: tuple[Item, ...]
    step: int
    prompt: state_lib.Prompt
    hyper: state_lib.Hyperparameters
    particles: tuple[Particle, ...]

    @property
    def state(self) -> state_lib.InversionState:
        """Of the first particle."""
        return self.particles[0].state

    @property
    def keys(self) -> Array:
        """Of the first particle."""
        return self.particles[0].keys
