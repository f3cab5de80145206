"""Scores images with a referee, behind the checkpoint's own preprocessing: one JSON object a line for each image and text.

    python -m referee_jax.score --referee=Salesforce/blip-itm-base-coco --image=a.png --image=b.png --text="a red book"
    python -m referee_jax.score --list

Which referee a checkpoint is, is seen from it, or said with --name. Exit codes: 0 done, 2 the command cannot be carried out.
"""

import json
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from referee_jax import config, formats, prompts, referees
from referee_jax.weights import convert


def listing() -> str:
    """The referees: names, losses, published checkpoints."""
    lines = []
    for name, family in referees.REFEREES.items():
        lines.append(f"{name} (losses: {', '.join(config.LOSSES[name])})")
        note = "  (a pickle: convert it first with python -m referee_jax.weights.lavis)" if family.is_converted else ""
        lines += [f"    {published}{note}" for published in family.published]
    return "\n".join(lines)


def score(referee: str, images: Sequence[str], texts: Sequence[str], *, name: str = "", revision: str = "") -> None:
    """Prints the scores. Raises ValueError, PromptError or WeightsError for what cannot be done."""
    if not images or not texts:
        raise ValueError("there is nothing to score; give --image=FILE and --text=TEXT, each as often as you like")
    opened = [formats.read_image(file) for file in images]
    spec = config.RefereeSpec(
        name=name or referees.name_of(referee, revision or None), checkpoint=referee, revision=revision, losses={}
    )
    judge = referees.load_referee(spec)
    for file, row in zip(images, judge.score(opened, texts), strict=True):
        for text, scores in zip(texts, row, strict=True):
            print(json.dumps({"image": file, "text": text, **scores}))


def main(argv: list[str]) -> int:
    """The command line."""
    args = flags.FLAGS
    if not args["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; texts are given with --text")
        if args.list:
            print(listing())
        elif not args.referee:
            raise ValueError("--referee is missing: a directory or a hub id, see --list")
        else:
            score(args.referee, args.image, args.text, name=args.name or "", revision=args.revision)
    except (ValueError, prompts.PromptError, convert.WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("referee", None, "directory or hub id of a checkpoint")
    flags.DEFINE_enum("name", None, list(referees.REFEREES), "which referee it is; default: seen from the checkpoint")
    flags.DEFINE_string("revision", "", "commit of a hub id; default: the newest")
    flags.DEFINE_multi_string("image", [], "image file; may be repeated")
    flags.DEFINE_multi_string("text", [], "text; may be repeated")
    flags.DEFINE_bool("list", False, "name the referees and their published checkpoints")
    app.run(main)
