"""ReNO's published objective: the starting noise of SD-Turbo, moved by four referees of what people prefer.

    python -m referee_jax.weights.lavis HPS_v2.1_compressed.pt checkpoints/hps-v2.1
    python -m referee_jax.weights.lavis ImageReward.pt checkpoints/image-reward
    python -m referee_jax.run --config=configs/reno.py --prompts=prompts.txt

Eyring et al. 2024, arXiv 2406.04312: 512 px, one step, 50 iterations, one view of each referee as its authors make it. The
first two lines are needed once (extra [train]), of the authors' files.

Hardware: a GPU or TPU core with 24 GB, in bfloat16.
"""

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The published numbers; the weights are of the referees' raw outputs."""
    settings = config.default()
    settings.method, settings.output, settings.steps, settings.chunk = "noise", "best", 50, 25
    settings.precision, settings.generator.checkpoint = "bfloat16", "stabilityai/sd-turbo"
    settings.sds.prompt = "{}"
    settings.noise.rule, settings.noise.steps, settings.noise.lr = "reno", 1, 5.0
    settings.noise.momentum, settings.noise.clip, settings.noise.norm_weight = 0.9, 0.1, 0.01
    settings.referees = (
        config.referee(name="hps", checkpoint="checkpoints/hps-v2.1", losses={"cosine": 5.0}),
        config.referee(name="image_reward", checkpoint="checkpoints/image-reward", losses={"reward": 1.0}),
        config.referee(name="clip", checkpoint="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", losses={"cosine": 1.0}),
        config.referee(name="pickscore", checkpoint="yuvalkirstain/PickScore_v1", losses={"cosine": 5.0}),
    )
    settings.referee.weight, settings.referee.weight_final = 1.0, 1.0
    settings.referee.balance, settings.referee.noise, settings.referee.stop = False, 0.0, 50
    settings.views.count, settings.views.keep, settings.views.augmentations = 1, 1, ()
    settings.views.noise, settings.views.resize = 0.0, "fit"
    return settings
