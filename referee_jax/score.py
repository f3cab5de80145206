"""Scores images with a referee, behind the checkpoint's own preprocessing; prints JSON lines.

    python -m referee_jax.score --referee=Salesforce/blip-itm-base-coco --image=a.png --image=b.png --text="a red book"
    python -m referee_jax.score --list

There is one line for each image and text; an image that cannot be read, and a text that is too long,
are named at the end, and the rest is there (--truncate cuts it, as the referee's authors do). Which
referee a checkpoint is, is read from its config.json, unless --name is given; --name=module:function
is one of your own, perhaps without a checkpoint. Exit codes: 0 done, 2 the command cannot be carried
out.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags, logging

from referee_jax import cli, config, referees
from referee_jax.storage import images as images_lib


def listing() -> str:
    """The referees: names, losses, published checkpoints, and commands for the authors' files."""
    lines = []
    for name, family in referees.REFEREES.items():
        lines.append(f"{name} (losses: {', '.join(config.LOSSES[name])})")
        note = "  (its files, by the line below)" if family.is_converted else ""
        lines += [f"    {published}{note}" for published in family.published]
        lines += [f"    python -m referee_jax.weights.lavis {file} OUT_DIR" for file in family.files]
    lines += [f"{point.name} (a package's own: {point.value})" for point in config.own_referees()]
    return "\n".join(lines)


def score(
    referee: str, images: Sequence[str], texts: Sequence[str], *, name: str = "", revision: str = "", **reading: Any
) -> str:
    """Scores of each image with each text, as lines of JSON. Warns of what could not be read, and of what was cut.

    Args:
        referee: directory or hub id of a checkpoint; empty for one of the user's own that has none.
        images: files.
        texts: any number, one at least.
        name: of the referee; empty: read from the checkpoint.
        revision: commit of a hub id; empty: the newest.
        **reading: `template`, `first_token`, `truncate` and `questions` of config.RefereeSpec.

    Raises ValueError, PromptError or WeightsError for what cannot be done, or if no image or no text can be read.
    """
    if not images or not texts:
        raise ValueError("there is nothing to score; give --image=FILE and --text=TEXT, each as often as you like")
    if reading.get("template") and reading["template"].count("{}") != 1:
        raise ValueError(f"--template={reading['template']!r} is not a text with one {{}} where the prompt is put")
    if name:
        config.own_referee(name, "--name")  # an unknown name is an error
    kind = name or referees.name_of(referee, revision or None)
    if reading.get("questions") and kind not in config.ASKED:
        raise ValueError(f"--questions: {kind} answers none; {', '.join(config.ASKED)} do")
    pixels, unread = _readable(images, images_lib.read_image)
    spec = config.RefereeSpec(name=kind, checkpoint=referee, revision=revision, losses={}, **reading)
    judge = referees.load_referee(spec)
    tokens, long = _readable(texts, judge.tokenize)
    lines = []
    for file, row in zip(pixels, judge.score(list(pixels.values()), list(tokens)), strict=True):
        for text, scores in zip(tokens, row, strict=True):
            asked = {x["question"]: x["probability"] for x in judge.answered(scores, text)} if spec.questions else {}
            lines.append(json.dumps({"image": file, "text": text, **scores, **({"questions": asked} if asked else {})}))
    for text in filter(judge.is_cut, tokens):
        logging.warning(
            "the prompt %r is cut to %d tokens, as by the authors of %s", text[:60], judge.length, spec.name
        )
    for error in unread + long:
        logging.warning("not scored: %s", error)
    return "\n".join(lines)


def _readable(values: Sequence[str], read: Callable[[str], Any]) -> tuple[dict[str, Any], list[ValueError]]:
    """What can be read, with what it is, and the errors of the rest. Raises the first where that is all."""
    results, errors = {}, []
    for value in values:
        try:
            results[value] = read(value)
        except ValueError as error:
            errors.append(error)
    if not results:
        raise errors[0]
    return results, errors


def main(args: flags.FlagValues) -> str:
    """The command line."""
    if not args["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    if args.list:
        return listing()
    if not args.referee and not (args.name and config.own_referee(args.name, "--name")):
        raise ValueError("--referee is missing: a directory or a hub id, see --list")
    cli.prepare(args.device)
    names = ("template", "first_token", "truncate", "questions")
    reading = {name: args[name].value for name in names if args[name].present}
    return score(args.referee or "", args.image, args.text, name=args.name or "", revision=args.revision, **reading)


if __name__ == "__main__":
    flags.DEFINE_string("referee", None, "directory or hub id of a checkpoint")
    flags.DEFINE_string(
        "name", None, "which referee it is, see --list, or module:function; default: read from the checkpoint"
    )
    flags.DEFINE_string("template", "", "text with {} in the prompt's place; default: the referee's own")
    flags.DEFINE_enum(
        "first_token", "[ENC]", ["[ENC]", "[CLS]"], "of texts that read the image in blip_itm and blip_vqa: the authors' "
        "[ENC], or [CLS], as transformers has it",
    )  # fmt: skip
    flags.DEFINE_integer(
        "questions", 0, "take each text apart into at most so many questions of one fact, and print their probabilities",
        lower_bound=0,
    )  # fmt: skip
    flags.DEFINE_bool("truncate", False, "cut texts that are too long, as the referee's authors do")
    flags.DEFINE_string("revision", "", "commit of a hub id; default: the newest")
    cli.define_device()
    flags.DEFINE_multi_string("image", [], "image file; may be repeated")
    flags.DEFINE_multi_string("text", [], "text; may be repeated")
    flags.DEFINE_bool("list", False, "name the referees and their published checkpoints")
    cli.start(main, hint="texts are given with --text")
