"""Ablation in the shapes world: what each part of the method is worth, and how much each number matters.

    python -m referee_jax.sweep --sweep=configs/ablation.py --workdir=runs/ablation

104 prompts, of all kinds. Each image begins from one sample of the prior, so the referee cannot help by choosing among
several. The base is configs/shapes.py, which has no restarts of the average and leaves views as they are. Without SDS
there is no length to balance the referee's gradient by, so its balance is off as well. Hardware: an accelerator
(--batch_size=96), or any CPU: some two minutes a row on a core. --variant=NAME makes single rows.
"""

import pathlib
from typing import Any

import ml_collections

from referee_jax import config
from referee_jax.shapes import benchmark


def get_config() -> ml_collections.ConfigDict:
    """configs/shapes.py without the choice of a start, over the first prompts of each list."""
    settings = config.read(pathlib.Path(__file__).with_name("shapes.py"))
    settings.prompts, settings.batch_size, settings.init_candidates = benchmark.every_prompt(8), 16, 1
    return settings


PARTS = {
    "as it is": {},
    "without SDS": {"sds.weight": 0.0, "sds.weight_final": 0.0, "referee.balance": False},
    "without referee": {"referee.weight": 0.0, "referee.weight_final": 0.0},
    "without balance": {"referee.balance": False},
    "balanced as published": {"referee.balance_epsilon": 0.0},
    "one view": {"views.count": 1, "views.keep": 1},
    "twice as many steps": {"steps": 20, "sds.weight_steps": 20, "referee.stop": 18},
    "from noise, 40 steps": {"init": "noise", "steps": 40, "sds.weight_steps": 40, "referee.stop": 38},
}
# Setting -> other values than the config's.
NUMBERS = {"sds.guidance": (7.5, 15.0), "optim.lr": (2.0,), "sds.t_max_final": (500,)}


def get_variants() -> dict[str, dict[str, Any]]:
    """Parts out or otherwise; then one number at a time."""
    return PARTS | {f"{key} = {value:g}": {key: value} for key, values in NUMBERS.items() for value in values}
