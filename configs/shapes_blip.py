"""The shapes world with BLIP as its referee: matching (ITM), and the likelihood of the prompt as a caption.

    python -m referee_jax.run --config=configs/shapes_blip.py

Eight 64x64 images on any CPU, as configs/shapes.py.
"""

import pathlib

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """configs/shapes_clip.py with another referee."""
    settings = config.read(pathlib.Path(__file__).with_name("shapes_clip.py"))
    settings.referees = (
        config.referee(name="blip_itm", checkpoint="shapes/blip_itm", losses={"itm": 1.0}),
        config.referee(name="blip_caption", checkpoint="shapes/blip_caption", losses={"caption": 1.0}),
        settings.referees[-1],
    )
    return settings
