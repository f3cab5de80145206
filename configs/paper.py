"""The paper's setting as its authors' code has it: Stable Diffusion 1.5, and BLIP-2's first stage asked twice, ITM and ITG.

    python -m referee_jax.weights.lavis blip2_pretrained.pth eva_vit_g.pth checkpoints/blip2-stage1
    python -m referee_jax.run --config=configs/paper.py --prompts=prompts.txt

The first line is needed once (extra [train]): transformers' checkpoint of BLIP-2 has no captions (ITG). The two files are
LAVIS', in https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/.

Hardware: a GPU or TPU core with 40 GB; --config.batch_size=1 --config.precision=bfloat16 for 16 GB. 160 iterations of a
512x512 image, seconds to a minute each image on a current accelerator.
"""

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """Numbers are the defaults: they are the paper's.

    Its images were stretched to the whole range as they were written, and a restart made latents
    and average one tensor, which is not recommended elsewhere: the referees then move both.
    """
    settings = config.default()
    settings.referees = (
        config.referee(name="blip2", checkpoint="checkpoints/blip2-stage1", losses={"itm": 1.0, "itg": 1.0}),
    )
    settings.ema.alias = True
    settings.outputs.stretch = True
    return settings
