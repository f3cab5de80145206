"""Two coloured shapes by two coloured shapes, with the networks that are part of the package; nothing is downloaded.

    python -m referee_jax.run --config=configs/shapes.py

Eight 64x64 images. Hardware: any CPU, two cores and 4 GB of memory will do; about two minutes, compiling included.
"""

import ml_collections

from referee_jax import config
from referee_jax.shapes import world


def get_config() -> ml_collections.ConfigDict:
    """The paper's method, scaled to the shapes world."""
    settings = config.default()
    settings.steps, settings.image_size, settings.chunk = 120, 64, 10
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
    settings.generator.checkpoint = "shapes/stable-diffusion"
    settings.referees = (
        config.referee(
            checkpoint="shapes/clip",
            losses={"contrastive": 1.0},
            near=24,
            exchange=(tuple(world.COLOURS), world.SHAPES),
        ),
        config.referee(checkpoint="shapes/clip_held_out", role="held_out"),
    )
    settings.sds.prompt = "{}"
    settings.sds.guidance = 1.5
    settings.sds.weight_steps = 120
    settings.referee.stop = 110
    settings.referee.balance_epsilon = 1e-8
    settings.referee.noise = 0.05
    settings.views.count, settings.views.keep = 4, 4
    settings.views.augmentations = ("Af",)
    settings.views.affine_degrees, settings.views.affine_translate = 5.0, (0.05, 0.05)
    settings.views.noise = 0.05
    return settings
