"""Does the method depend on the referee? Each in turn, in the shapes world.

    python -m referee_jax.sweep --sweep=configs/sweep_referees.py --workdir=runs/referees

104 prompts of all kinds, one image each, from the best of four samples by the referee itself, moved ten times.
Hardware: any CPU, some five minutes a row on a core; `--variant=NAME` makes single rows.
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
    """configs/shapes.py over the first prompts of each list, from fewer samples."""
    settings = read("shapes")
    settings.prompts, settings.batch_size, settings.init_candidates = benchmark.every_prompt(8), 16, 4
    return settings


def get_variants() -> dict[str, dict[str, Any]]:
    """The referees of the other configs, and some of them alone; the held-out referee is the same."""
    vqascore, chooses, held_out = read("shapes").referees
    matching, captions, _ = read("shapes_blip").referees
    rows = {
        "VQAScore": (vqascore, held_out),
        "VQAScore, and the captioner to choose": (vqascore, chooses, held_out),
        "CLIP": read("shapes_clip").referees,
        "BLIP, ITM + captions": (matching, captions, held_out),
        "BLIP-2, ITM + ITG": read("shapes_blip2").referees,
    }
    return {name: {"referees": referees} for name, referees in rows.items()}
