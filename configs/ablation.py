"""Ablation in the shapes world: what each part of the method is worth, and how much each number matters.

    python -m referee_jax.sweep --sweep=configs/ablation.py --samples=4 --workdir=runs/ablation

96 prompts of two coloured shapes. Each image begins from one sample of the prior, so the referee cannot
help by choosing among several. The base is configs/shapes_clip.py, which has no restarts of the average:
they are a part that is added. Without SDS there is no length to balance the referee's gradient by, so
its balance is off as well. Hardware: an accelerator (--batch_size=96), or many cores
(JAX_NUM_CPU_DEVICES as many as cores; on two, about two and a half minutes a row for each sample).
--variant=NAME makes single rows.
"""

import pathlib
from typing import Any

import ml_collections

from referee_jax import config
from referee_jax.shapes import benchmark


def get_config() -> ml_collections.ConfigDict:
    """configs/shapes_clip.py without the choice of a start."""
    settings = config.read(pathlib.Path(__file__).with_name("shapes_clip.py"))
    settings.prompts = (*benchmark.prompts("colour", "seen"), *benchmark.prompts("colour", "unseen"))
    settings.samples, settings.batch_size, settings.init_candidates = 4, 16, 1
    return settings


PARTS = {
    "as it is": {},
    "without augmentation": {"views.augmentations": (), "views.noise": 0.0, "referee.noise": 0.0},
    "with restarts of the average": {"ema.start": 10, "ema.every": 10},
    "with one restart, late": {"ema.start": 30, "ema.every": 100},
    "without balance": {"referee.balance": False},
    "balanced as published": {"referee.balance_epsilon": 0.0},
    "without SDS": {"sds.weight": 0.0, "sds.weight_final": 0.0, "referee.balance": False},
    "without referee": {"referee.weight": 0.0, "referee.weight_final": 0.0},
    "without latent noise": {"optim.noise": 0.0},
    "referee late": {"referee.start": 20},
    "referee early": {"referee.stop": 20},
    "the hardest 4 of 8 views": {"views.count": 8},
    "from noise": {"init": "noise"},
    "half as many steps": {"steps": 20, "sds.weight_steps": 20, "referee.stop": 18},
    "twice as many steps": {"steps": 80, "sds.weight_steps": 80, "referee.stop": 78},
}
# Setting -> other values than the config's.
NUMBERS = {
    "sds.guidance": (1.5, 7.5, 15.0, 30.0),
    "sds.weight": (5.0, 80.0),
    "referee.weight": (1.0, 9.0),
    "referee.noise": (0.0, 0.2),
    "optim.noise": (0.05, 0.2),
    "optim.lr": (0.5, 2.0),
    "referee.balance_epsilon": (0.1, 2.0),
    "sds.t_max_final": (500,),
    "views.noise": (0.0, 0.2),
    "views.affine_degrees": (0.0, 20.0),
}
VIEWS = (1, 10, 20)


def get_variants() -> dict[str, dict[str, Any]]:
    """Parts out or otherwise; then one number at a time."""
    views = {f"{count} views": {"views.count": count, "views.keep": count} for count in VIEWS}
    numbers = {f"{key} = {value:g}": {key: value} for key, values in NUMBERS.items() for value in values}
    return PARTS | views | numbers
