"""The shapes world judged by CLIP, which knows colours, shapes and numbers, and moved forty times.

    python -m referee_jax.run --config=configs/shapes_clip.py

Eight 64x64 images on any CPU, as configs/shapes.py; the base of the other referees' configs.
"""

import pathlib

import ml_collections

from referee_jax import config
from referee_jax.shapes import world


def get_config() -> ml_collections.ConfigDict:
    """configs/shapes.py with another referee, which sees turned and shifted views, and prompts that are nearly the same."""
    settings = config.read(pathlib.Path(__file__).with_name("shapes.py"))
    words = (tuple(world.COLOURS), world.SHAPES)
    settings.referees = (
        config.referee(checkpoint="shapes/clip", losses={"contrastive": 1.0}, near=24, exchange=words),
        settings.referees[-1],
    )
    settings.prompts = (
        "a red circle and a blue square",
        "a green triangle and a yellow ring",
        "a purple star and an orange cross",
        "a black square and a pink circle",
        "a blue ring and a red cross",
        "a yellow star and a green square",
        "an orange triangle and a purple circle",
        "a pink cross and a black ring",
    )
    settings.steps, settings.chunk, settings.sds.weight_steps, settings.referee.stop = 40, 10, 40, 38
    settings.views.count, settings.views.keep, settings.views.augmentations = 4, 4, ("Af",)
    settings.views.affine_degrees, settings.views.affine_translate = 5.0, (0.05, 0.05)
    return settings
