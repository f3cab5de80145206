"""Does the method depend on the referee's architecture? Each in turn, and all together, in the shapes world.

    python -m referee_jax.sweep --sweep=configs/sweep_referees.py --workdir=runs/referees

ALIGN, BLIP and BLIP-2 are not part of the package yet, see configs/shapes_ensemble.py; `--variant=CLIP` runs without them.
96 prompts of two coloured shapes by two samples for each row. Hardware: any CPU, about a quarter of an hour a row on two cores.
"""

import pathlib
from typing import Any

import ml_collections

from referee_jax import config
from referee_jax.benchmarks import shapes
from referee_jax.shapes import world

NEAR = {"losses": {"contrastive": 1.0}, "near": 24, "exchange": (tuple(world.COLOURS), world.SHAPES)}
CLIP, ALIGN = ({"name": name, "checkpoint": f"shapes/{name}", **NEAR} for name in ("clip", "align"))
ITM, CAPTION = (
    {"name": f"blip_{task}", "checkpoint": f"shapes/blip_{task}", "losses": {task: 1.0}} for task in ("itm", "caption")
)
BLIP2_ITM, BLIP2 = (
    {"name": "blip2", "checkpoint": "shapes/blip2", "losses": dict.fromkeys(losses, 1.0)}
    for losses in (("itm",), ("itm", "itg"))
)
HELD_OUT = {"checkpoint": "shapes/clip_held_out", "role": "held_out", **NEAR}
ROWS = {
    "CLIP": (CLIP,),
    "ALIGN": (ALIGN,),
    "BLIP, ITM": (ITM,),
    "BLIP, ITM + captions": (ITM, CAPTION),
    "BLIP-2, ITM": (BLIP2_ITM,),
    "BLIP-2, ITM + ITG": (BLIP2,),
    "CLIP + ALIGN + BLIP + BLIP-2": (CLIP, ALIGN, ITM, BLIP2_ITM),
}


def get_config() -> ml_collections.ConfigDict:
    """configs/shapes.py over the fixed colour prompts."""
    settings = config.read(pathlib.Path(__file__).with_name("shapes.py"))
    settings.prompts = (*shapes.prompts("colour", "seen"), *shapes.prompts("colour", "unseen"))
    settings.samples, settings.batch_size = 2, 16
    return settings


def get_variants() -> dict[str, dict[str, Any]]:
    """Other referees to optimise against; who watches is the same."""
    return {name: {"referees": (*specs, HELD_OUT)} for name, specs in ROWS.items()}
