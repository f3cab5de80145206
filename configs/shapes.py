"""Two coloured shapes by two coloured shapes, with the networks that are part of the package; nothing is downloaded.

    python -m referee_jax.run --config=configs/shapes.py

Eight 64x64 images. Hardware: any CPU, two cores and 4 GB of memory will do; about two minutes, compiling included.
"""

import ml_collections

from referee_jax import config
from referee_jax.shapes import world


def get_config() -> ml_collections.ConfigDict:
    """The method, scaled to the shapes world and begun from a sample of the prior.

    Numbers were chosen on seen prompts. What decides: a prior of low guidance (at 30, right for Stable Diffusion, latents
    swell here), weights for 16x16 latents that fall towards the end, little latent noise, mild views.
    """
    settings = config.default()
    settings.steps, settings.image_size, settings.chunk = 80, 64, 10
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
    settings.init, settings.init_steps, settings.init_guidance = "sample", 25, 7.5
    settings.generator.checkpoint = "shapes/stable-diffusion"
    words = (tuple(world.COLOURS), world.SHAPES)
    settings.referees = (
        config.referee(checkpoint="shapes/clip", losses={"contrastive": 1.0}, near=24, exchange=words),
    )
    settings.sds.prompt, settings.sds.guidance = "{}", 3.0
    settings.sds.weight, settings.sds.weight_final, settings.sds.weight_steps = 50.0, 12.0, 80
    settings.referee.weight, settings.referee.weight_final, settings.referee.stop = 2.0, 1.5, 76
    settings.referee.noise, settings.referee.balance_epsilon = 0.05, 1e-8
    settings.optim.noise, settings.optim.tail_noise = 0.02, 0.0
    settings.ema.start = 1000  # no restart
    settings.views.count, settings.views.keep, settings.views.shared_erase = 4, 4, False
    settings.views.augmentations = ("Af",)
    settings.views.affine_degrees, settings.views.affine_translate = 5.0, (0.05, 0.05)
    settings.views.noise = 0.05
    return settings
