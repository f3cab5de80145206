"""The shapes world with BLIP-2 as its referee, as in the paper: matching (ITM) and captioning (ITG).

    python -m referee_jax.run --config=configs/shapes_blip2.py

Eight 64x64 images on any CPU, as configs/shapes.py.
"""

import pathlib

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """configs/shapes_clip.py with another referee."""
    settings = config.read(pathlib.Path(__file__).with_name("shapes_clip.py"))
    judge = config.referee(name="blip2", checkpoint="shapes/blip2", losses={"itm": 1.0, "itg": 1.0})
    settings.referees = (judge, settings.referees[-1])
    return settings
