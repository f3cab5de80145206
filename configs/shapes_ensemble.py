"""The shapes world with three referees at once: CLIP, BLIP and BLIP-2.

    python -m referee_jax.run --config=configs/shapes_ensemble.py

Eight 64x64 images on any CPU, as configs/shapes.py.
"""

import pathlib

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """configs/shapes_clip.py with two more referees."""
    settings = config.read(pathlib.Path(__file__).with_name("shapes_clip.py"))
    clip, held_out = settings.referees
    settings.referees = (
        clip,
        config.referee(name="blip_itm", checkpoint="shapes/blip_itm", losses={"itm": 1.0}),
        config.referee(name="blip2", checkpoint="shapes/blip2", losses={"itm": 1.0}),
        held_out,
    )
    return settings
