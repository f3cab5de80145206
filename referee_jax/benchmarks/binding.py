"""Does a referee know which attribute belongs to which object? Measured on new scenes of the shapes world.

    python -m referee_jax.benchmarks.binding --referee=shapes/clip --referee=shapes/blip_itm
    python -m referee_jax.benchmarks.binding --referee=shapes/blip2 --loss=itg --category=texture

Each scene comes with its true caption, the same with swapped attributes (for a relation: swapped objects), and six
hard negatives. Prints as Markdown how often the true caption has a lower loss than its swap, and than all
hard negatives, with 95 % intervals, for attribute pairs that training captions name ("seen") and for those
that they do not. The loss is the referee's first, or --loss. Exit codes: 0 done, 2 the command cannot be carried out.
"""

import dataclasses
import functools

import jax
import numpy as np
from absl import flags, logging

from referee_jax import cli, config, console, referees
from referee_jax.benchmarks import statistics
from referee_jax.shapes import benchmark, world

NEAR = 6
BATCH = 16  # scenes at once
# Those with attributes to swap.
CATEGORIES = tuple(name for name in world.CATEGORIES if name not in ("shape", "numeracy"))


def exchanged(prompt: world.Prompt) -> world.Prompt:
    """The prompt with the shapes of its two things swapped, or, if it has a relation, the things."""
    one, two = prompt.things
    if prompt.relation:
        return dataclasses.replace(prompt, things=(two, one))
    things = dataclasses.replace(one, shape=two.shape), dataclasses.replace(two, shape=one.shape)
    return dataclasses.replace(prompt, things=things)


def scenes(category: str, split: str, count: int, seed: int) -> list[tuple[np.ndarray, list[str]]]:
    """Images float32 `[64, 64, 3]`, each with its true caption, its swap and NEAR hard negatives, all false."""
    rng, examples = np.random.default_rng(seed), []
    while len(examples) < count:
        scene = world.sample_scene(rng, category, unseen=split == "unseen")
        true = world.describe(rng, scene, category)
        near, swap = world.distractors(rng, true, NEAR), exchanged(true)
        if len(near) == NEAR and not world.matches(swap, scene):
            image = world.draw(scene)[0].astype(np.float32)
            examples.append((image, [prompt.text for prompt in (true, swap, *near)]))
    return examples


@functools.partial(jax.jit, static_argnames="loss")
def _losses(referee, images, tokens, loss: str):
    def one(image, tokens):
        view = referee.fit(image)[None]
        return jax.vmap(lambda text: referee.views_losses(view, referee.encode(text))[loss][0])(tokens)

    return jax.vmap(one)(images, tokens)


def losses(judge: referees.Judge, loss: str, examples: list[tuple[np.ndarray, list[str]]]) -> np.ndarray:
    """The losses of the captions of `scenes`, float32 `[scene, caption]`."""
    stacked = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)
    rows = []
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        batch += batch[-1:] * (BATCH - len(batch))
        tokens = stacked([stacked(map(judge.tokenize, texts)) for _, texts in batch])
        rows.append(np.asarray(_losses(judge.referee, stacked(image for image, _ in batch), tokens, loss)))
    return np.concatenate(rows)[: len(examples)]


def shares(values: np.ndarray) -> list[statistics.Mean]:
    """How often, in losses `[scene, caption]`, the first is lower than the second, and than all after it."""
    true, swap, near = values[:, 0], values[:, 1], values[:, 2:]
    return [statistics.mean(enumerate(wins)) for wins in (true < swap, (true[:, None] < near).all(1))]


def load(checkpoint: str, loss: str | None) -> tuple[referees.Judge, str]:
    """A referee and the name of a loss, None for its first. Raises ValueError for a loss that it does not have."""
    spec = config.RefereeSpec(name=referees.name_of(checkpoint), checkpoint=checkpoint, losses={})
    judge = referees.load_referee(spec)
    loss = loss or judge.referee.losses[0]
    if loss not in judge.referee.losses:
        raise ValueError(f"{checkpoint} has no loss {loss!r}; there are {', '.join(judge.referee.losses)}")
    return judge, loss


def table(args) -> str:
    """The table that the command line's flags describe."""
    rows = {}
    splits = benchmark.splits(args.category)
    for checkpoint in args.referee:
        judge, loss = load(checkpoint, args.loss)
        values = [losses(judge, loss, scenes(args.category, split, args.scenes, args.seed)) for split in splits]
        rows[f"{checkpoint}, {loss}"] = [share for kind in zip(*map(shares, values), strict=True) for share in kind]
        logging.info("%s", checkpoint)
    return console.markdown(["referee", *(f"{kind}, {x}" for kind in ("swap", "near") for x in splits)], rows)


def main(args: flags.FlagValues) -> str:
    """The command line."""
    if not args.referee:
        raise ValueError("--referee=DIRECTORY_OR_ID is needed, as often as you like")
    cli.prepare(args.device)
    return table(args)


if __name__ == "__main__":
    flags.DEFINE_multi_string("referee", [], "directory or hub id of a checkpoint; may be repeated")
    flags.DEFINE_string("loss", None, "which of its losses; default: the first")
    flags.DEFINE_enum("category", "colour", CATEGORIES, "of the captions")
    flags.DEFINE_integer("scenes", 192, "of each split", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the scenes")
    cli.define_device()
    cli.start(main)
