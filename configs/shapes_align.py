"""The shapes world with ALIGN as its referee, whose vision tower is convolutional.

    python -m referee_jax.run --config=configs/shapes_align.py

Eight 64x64 images on any CPU, as configs/shapes.py.
"""

import pathlib

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """configs/shapes.py with another referee and the same loss."""
    settings = config.read(pathlib.Path(__file__).with_name("shapes.py"))
    settings.referees[0].name, settings.referees[0].checkpoint = "align", "shapes/align"
    return settings
