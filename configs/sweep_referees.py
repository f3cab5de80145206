"""Does the method depend on the referee's architecture? Each in turn, and all together, in the shapes world.

    python -m referee_jax.sweep --sweep=configs/sweep_referees.py --workdir=runs/referees

96 prompts of two coloured shapes, one image each, from the best of four samples by the referee itself.
Hardware: any CPU, five to ten minutes a row on two cores; `--variant=NAME` makes single rows.
"""

import pathlib
from typing import Any

import ml_collections

from referee_jax import config
from referee_jax.shapes import benchmark


def read(name: str) -> ml_collections.ConfigDict:
    """A config beside this one."""
    return config.read(pathlib.Path(__file__).with_name(f"{name}.py"))


def get_config() -> ml_collections.ConfigDict:
    """configs/shapes_clip.py over the fixed colour prompts."""
    settings = read("shapes_clip")
    settings.prompts = (*benchmark.prompts("colour", "seen"), *benchmark.prompts("colour", "unseen"))
    settings.batch_size, settings.init_candidates = 16, 4
    return settings


def get_variants() -> dict[str, dict[str, Any]]:
    """The referees of the other configs, and some of them alone; the held-out referee is the same."""
    matching, captions, held_out = read("shapes_blip").referees
    both, _ = read("shapes_blip2").referees
    rows = {
        "CLIP": read("shapes_clip").referees,
        "BLIP, ITM": (matching, held_out),
        "BLIP, ITM + captions": (matching, captions, held_out),
        "BLIP-2, ITM": (both.to_dict() | {"losses": {"itm": 1.0}}, held_out),
        "BLIP-2, ITM + ITG": (both, held_out),
        "CLIP + BLIP + BLIP-2": read("shapes_ensemble").referees,
    }
    return {name: {"referees": referees} for name, referees in rows.items()}
