"""Stable Diffusion 1.5 with Qwen3-VL 2B as its referee, which is asked whether the image shows the prompt.

    python -m referee_jax.run --config=configs/qwen3_vl.py --prompts=prompts.txt
    python -m referee_jax.run --config=configs/qwen3_vl.py --estimate

The 4B and the 8B checkpoint by --config.referees[0].checkpoint=Qwen/Qwen3-VL-4B-Instruct.
"""

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The numbers of configs/clip.py; views are the whole image, which differ by their noise alone."""
    settings = config.default()
    settings.output = "best"
    settings.clamp = "straight_through"
    settings.precision = "bfloat16"
    settings.sds.prompt = "{}"
    settings.referee.balance_epsilon = 1e-8
    settings.referees = (
        config.referee(
            name="qwen3_vl", checkpoint="Qwen/Qwen3-VL-2B-Instruct", losses={"vqa": 1.0}, views=2, image_size=512
        ),
    )
    return settings
