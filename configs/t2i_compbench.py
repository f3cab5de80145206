"""T2I-CompBench: one category's 300 prompts by ten images each, as one job, with Stable Diffusion 1.5 and CLIP L/14.

    python -m referee_jax.run --config=configs/t2i_compbench.py --prompts=T2I-CompBench/examples/dataset/color_val.txt \
        --workdir=runs/color
    python -m referee_jax.weights.lavis model_base_vqa_capfilt_large.pth checkpoints/blip-vqa-480
    python -m referee_jax.evaluate --workdir=runs/color --benchmark=t2i_compbench --lists=T2I-CompBench/examples/dataset

The lists are those of https://github.com/Karine-Huang/T2I-CompBench; its protocol asks for the `_val` ones. By `--lists` seen and
unseen prompts have a row each, and complex ones their 3-in-1; `--category=color` instead gives the whole only. The second line
is needed once (extra [train]): BLIP's VQA weights, from https://github.com/salesforce/BLIP. Categories that UniDet judges are
exported for it, in the order of the lists (`--export=t2i_compbench --lists=..`).

Hardware: accelerators with 40 GB each. 3000 images of 160 iterations.
"""

import pathlib

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """configs/clip.py, ten images of each prompt."""
    settings = config.read(pathlib.Path(__file__).with_name("clip.py"))
    settings.samples = 10
    return settings
