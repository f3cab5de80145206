"""Settings of small, gentle runs: 32 pixels, 8 x 8 latents, a few iterations."""

from collections.abc import Sequence
from typing import Any

from referee_jax import config

PROMPTS = (
    "a red circle and a blue square",
    "a green square",
    "a blue circle",
    "red",
    "a photo",
    "blue and red",
    "b",
    "c",
)


def settings(checkpoints: Sequence[Any] = ("sd", "clip"), **changes: Any) -> config.Settings:
    """Six iterations of one referee, which acts in the first five; a group of `changes` is merged into its defaults.

    `checkpoints` are the directories of Stable Diffusion and of the referee.
    """
    prior, referee = map(str, checkpoints)
    values = {
        "steps": 6, "chunk": 4, "image_size": 32, "batch_size": 8, "output": "final", "generator": {"checkpoint": prior},
        "referees": (
            {
                "checkpoint": referee, "losses": {"cosine": 0.5, "contrastive": 1.0}, "near": 3,
                "exchange": (("red", "blue", "green"),),
            },
        ),
        "sds": {"weight": 1.5, "weight_final": 0.75, "weight_steps": 6, "guidance": 1.5},
        "referee": {"weight": 1.0, "weight_final": 1.0, "stop": 5, "noise": 0.1, "balance_epsilon": 1e-8},
        "optim": {"warmup": 2, "noise": 0.05}, "ema": {"start": 2, "every": 2}, "views": {"count": 3, "keep": 2},
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return config.from_config(values)
