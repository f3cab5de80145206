"""The shapes world with VQAScore as its referee, which knows relations, numbers and textures too.

    python -m referee_jax.run --config=configs/shapes_vqascore.py

Eight 64x64 images on any CPU, as configs/shapes.py.
"""

import pathlib

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """configs/shapes.py with another referee, which sees the whole picture the right way round."""
    settings = config.read(pathlib.Path(__file__).with_name("shapes.py"))
    settings.referees = (
        config.referee(name="vqascore", checkpoint="shapes/vqascore", losses={"vqa": 1.0}),
        settings.referees[-1],
    )
    settings.views.count, settings.views.keep, settings.views.augmentations = 2, 2, ()
    return settings
