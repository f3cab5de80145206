"""The method with one referee or another, judged by ground truth in the shapes world: does it depend on the architecture?

    python -m referee_jax.benchmarks.referees --config=configs/shapes.py --samples=2 --out=runs/referees

A row is a referee or a mix of them in the place of the config's own; all else, its held-out referees too, stays. The table
is that of benchmarks.methods.
"""

import dataclasses
import pathlib
from typing import Any

from absl import app, flags

from referee_jax import config
from referee_jax.benchmarks import methods
from referee_jax.shapes import world

NEAR = {"losses": {"contrastive": 1.0}, "near": 24, "exchange": (tuple(world.COLOURS), world.SHAPES)}
CLIP, ALIGN = ({"name": name, "checkpoint": f"shapes/{name}", **NEAR} for name in ("clip", "align"))
ITM, CAPTION = (
    {"name": f"blip_{task}", "checkpoint": f"shapes/blip_{task}", "losses": {task: 1.0}} for task in ("itm", "caption")
)


def _blip2(*losses: str) -> dict[str, Any]:
    return {"name": "blip2", "checkpoint": "shapes/blip2", "losses": dict.fromkeys(losses, 1.0)}


ROWS: dict[str, tuple[dict[str, Any], ...]] = {
    "CLIP": (CLIP,),
    "ALIGN": (ALIGN,),
    "BLIP, ITM": (ITM,),
    "BLIP, ITM + captions": (ITM, CAPTION),
    "BLIP-2, ITM": (_blip2("itm"),),
    "BLIP-2, ITM + ITG": (_blip2("itm", "itg"),),
    "CLIP + ALIGN + BLIP + BLIP-2": (CLIP, ALIGN, ITM, _blip2("itm")),
}


def judged_by(settings: config.Settings, specs: tuple[dict[str, Any], ...]) -> config.Settings:
    """The settings with other referees to optimise against."""
    held_out = tuple(spec for spec in settings.referees if spec.role == "held_out")
    chosen = tuple(config.from_config({"referees": (spec,)}).referees[0] for spec in specs)
    return dataclasses.replace(settings, referees=(*chosen, *held_out))


def main(argv: list[str]) -> None:
    """The command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    args = flags.FLAGS
    settings = dataclasses.replace(config.from_config(args.config), samples=args.samples)
    rows = {row: (judged_by(settings, ROWS[row]), methods.inverted) for row in args.rows or ROWS}
    methods.run(rows, pathlib.Path(args.out), limit=args.limit)


if __name__ == "__main__":
    methods.define_flags(ROWS, "runs/referees")
    app.run(main)
