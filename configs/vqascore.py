"""Stable Diffusion 1.5 with VQAScore as its referee: CLIP-FlanT5-XL is asked whether the picture shows the prompt.

    python -m referee_jax.weights.lavis clip-flant5-xl checkpoints/clip-flant5-xl
    python -m referee_jax.run --config=configs/vqascore.py --prompts=prompts.txt

The first line is needed once (extra [train]): clip-flant5-xl is a copy of https://huggingface.co/zhiqiulin/clip-flant5-xl,
whose weights are pickles. It knows relations, of which CLIP knows nothing, and so may see no picture turned or cut: it has
one view of the whole, its colours jittered. `versus` asks the same of the prompt with its relation exchanged ("a left of b":
"b left of a"), and costs as much again.

Hardware: a GPU or TPU core with 16 GB, in bfloat16; a float32 run needs 32 GB. CLIP-FlanT5-XXL has 22 GB of weights: cores with
16 GB share them with --config.mesh.model=4.
"""

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """As configs/clip.py, but for the referee and its views."""
    settings = config.default()
    settings.referees = (
        config.referee(
            name="vqascore",
            checkpoint="checkpoints/clip-flant5-xl",
            losses={"vqa": 1.0, "versus": 1.0},
            near=1,
            views=1,
            augmentations=("Ji",),
        ),
    )
    settings.precision = "bfloat16"
    settings.batch_size = 0
    settings.output = "best"
    settings.clamp = "straight_through"
    settings.sds.prompt = "{}"
    settings.referee.balance_epsilon = 1e-8
    return settings
