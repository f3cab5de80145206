"""What is a referee's training data worth? CLIPs trained on noisy captions, on less data, and with the unseen pairs named.

    python configs/training_data.py | sh      # trains them, half an hour to an hour each on one CPU core; resumable
    python -m referee_jax.sweep --sweep=configs/training_data.py --workdir=runs/training_data

Each referee judges the same 96 prompts of two coloured shapes, one picture each, begun from its favourite of four samples.
"""

import pathlib
from typing import Any

import ml_collections

from referee_jax import config

PLACE = "runs/training_data/networks"
# Name -> what the training is told. A batch is 96 scenes and their captions, so an epoch of 100 is some 10,000 pictures.
DATA = {
    "clean": "",
    "10 % noise": "--noise=0.1",
    "30 % noise": "--noise=0.3",
    "all pairs named": "--named",
    "100 batches": "--epoch=100",
    "20 batches": "--epoch=20",
}
STEPS = 2000


def directory(name: str) -> str:
    """Where the networks of that training are."""
    return f"{PLACE}/{name.replace(' %', '').replace(' ', '-')}"


def get_config() -> ml_collections.ConfigDict:
    """That of the sweep over referees: the same prompts, begun in the same way."""
    return config.read(pathlib.Path(__file__).with_name("sweep_referees.py"))


def get_variants() -> dict[str, dict[str, Any]]:
    """The same method, asked of each of those CLIPs."""
    clip, held_out = get_config().referees
    return {name: {"referees": (clip.to_dict() | {"checkpoint": f"{directory(name)}/clip"}, held_out)} for name in DATA}


if __name__ == "__main__":
    for name, said in DATA.items():
        place = directory(name)
        print(
            f"python -m referee_jax.shapes.train --network=clip --steps={STEPS} {said} --out={place} --workdir={place}/work"
        )
