"""Images of coloured shapes, with the networks that are part of the package; nothing is downloaded.

    python -m referee_jax.run --config=configs/shapes.py

Eight 64x64 images. Hardware: any CPU, two cores and 4 GB of memory will do; about a minute, compiling included.
"""

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The method scaled to the shapes world: the best of eight samples of the prior, moved ten times.

    The referee, a VQAScore, sees the whole picture the right way round, and knows relations and numbers. BLIP's captioner
    helps to choose: the VQAScore takes two shapes that have grown together for two, the captioner more rarely does. Most
    numbers were chosen on seen prompts of two colours, with an earlier U-Net and CLIP:

    - the choice makes pictures right, and ten iterations, which cost as much as one sample, make them cleaner; more do
      little (docs/shapes_world.md). `init_candidates=28` is for prompts of which few samples are right.
    - `balance_epsilon`: as published, the referee's gradient always gets the prior's length, so a
      content referee, whose gradient is noise, pulls as hard as one that objects, and good starts
      fall to pieces. With 0.5 (the gradient of a referee that objects has a length of 1 to 2) it
      fades as the referee agrees.
    - guidance: at 30, right for Stable Diffusion, latents swell at this size.
    """
    settings = config.default()
    settings.steps, settings.image_size, settings.chunk = 10, 64, 5
    settings.prompts = (
        "a red circle and a blue square",
        "a purple star and an orange cross",
        "a green triangle above a yellow ring",
        "a black square on the left of a pink circle",
        "three blue rings",
        "two green stars",
        "a striped circle and a dotted cross",
        "a dotted red circle above a striped purple star",
    )
    settings.init, settings.init_steps, settings.init_guidance, settings.init_candidates = "sample", 12, 7.5, 8
    settings.generator.checkpoint = "shapes/stable-diffusion"
    settings.referees = (
        config.referee(name="vqascore", checkpoint="shapes/vqascore", losses={"vqa": 1.0}),
        config.referee(name="blip_caption", checkpoint="shapes/blip_caption", role="choose", losses={"caption": 1.0}),
        config.referee(name="vqascore", checkpoint="shapes/vqascore_held_out", role="held_out", losses={"vqa": 1.0}),
    )
    settings.sds.prompt, settings.sds.guidance = "{}", 3.0
    settings.sds.weight, settings.sds.weight_final, settings.sds.weight_steps = 20.0, 12.0, 10
    settings.referee.weight, settings.referee.weight_final, settings.referee.stop = 3.0, 3.0, 8
    settings.referee.noise, settings.referee.balance_epsilon = 0.05, 0.5
    settings.optim.noise, settings.optim.tail_noise = 0.02, 0.0
    settings.ema.start = 1000  # no restart
    settings.views.count, settings.views.keep, settings.views.shared_erase = 2, 2, False
    settings.views.augmentations, settings.views.noise = (), 0.05
    return settings
