"""Does a referee know which attribute belongs to which thing? Asked of scenes of the shapes world that it has never seen.

    python -m referee_jax.benchmarks.binding --referee=shapes/clip --referee=shapes/blip_itm
    python -m referee_jax.benchmarks.binding --referee=shapes/blip2 --loss=itg --category=texture

Of each scene it is given the true caption, the same with exchanged attributes (of a relation: exchanged things), and six that are
near to the true one. Prints as Markdown how often the loss of the true caption is less than that of its swap, and less than
those of all near ones, with 95 % intervals, for attribute pairs that captions of the training name ("seen") and that they do
not. The loss is the referee's first, or --loss. Exit codes: 0 done, 2 the command cannot be carried out.
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
# Those with attributes to exchange.
CATEGORIES = tuple(name for name in world.CATEGORIES if name not in ("shape", "numeracy"))


def exchanged(prompt: world.Prompt) -> world.Prompt:
    """The prompt of two things whose shapes have changed places, or, where a relation is told, the things."""
    one, two = prompt.things
    if prompt.relation:
        return dataclasses.replace(prompt, things=(two, one))
    things = dataclasses.replace(one, shape=two.shape), dataclasses.replace(two, shape=one.shape)
    return dataclasses.replace(prompt, things=things)


def scenes(category: str, split: str, count: int, seed: int) -> list[tuple[np.ndarray, list[str]]]:
    """Images float32 `[64, 64, 3]`, and of each the true caption, its swap, and NEAR others, all of them false."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        scene = world.sample_scene(rng, category, unseen=split == "unseen")
        true = world.describe(rng, scene, category)
        near, swap = world.distractors(rng, true, NEAR), exchanged(true)
        if len(near) == NEAR and not world.matches(swap, scene):
            image = world.draw(scene)[0].astype(np.float32)
            found.append((image, [prompt.text for prompt in (true, swap, *near)]))
    return found


@functools.partial(jax.jit, static_argnames="loss")
def _ask(referee, images, tokens, loss: str):
    def one(image, tokens):
        view = referee.fit(image)[None]
        return jax.vmap(lambda own: referee.views_losses(view, referee.encode(own))[loss][0])(tokens)

    return jax.vmap(one)(images, tokens)


def losses(judge: referees.Judge, loss: str, asked: list[tuple[np.ndarray, list[str]]]) -> np.ndarray:
    """float32 `[scene, caption]`."""
    stacked = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)
    found = []
    for start in range(0, len(asked), BATCH):
        share = asked[start : start + BATCH]
        share += share[-1:] * (BATCH - len(share))
        tokens = stacked([stacked(map(judge.tokenize, texts)) for _, texts in share])
        found.append(np.asarray(_ask(judge.referee, stacked(image for image, _ in share), tokens, loss)))
    return np.concatenate(found)[: len(asked)]


def shares(found: np.ndarray) -> list[statistics.Mean]:
    """How often the first caption's loss is less than the second's, and than all others'."""
    true, swap, near = found[:, 0], found[:, 1], np.delete(found, 1, axis=1)
    return [statistics.mean(enumerate(won)) for won in (true < swap, (true[:, None] < near[:, 1:]).all(1))]


def load(checkpoint: str, loss: str | None) -> tuple[referees.Judge, str]:
    """A referee, and the name of the loss that it is asked for. ValueError for one that it does not have."""
    spec = config.RefereeSpec(name=referees.name_of(checkpoint), checkpoint=checkpoint, losses={})
    judge = referees.load_referee(spec)
    loss = loss or judge.referee.losses[0]
    if loss not in judge.referee.losses:
        raise ValueError(f"{checkpoint} has no loss {loss!r}; there are {', '.join(judge.referee.losses)}")
    return judge, loss


def table(args) -> str:
    """What the command line asks for."""
    rows = {}
    splits = benchmark.splits(args.category)
    for checkpoint in args.referee:
        judge, loss = load(checkpoint, args.loss)
        asked = [losses(judge, loss, scenes(args.category, split, args.scenes, args.seed)) for split in splits]
        rows[f"{checkpoint}, {loss}"] = [share for kind in zip(*map(shares, asked), strict=True) for share in kind]
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
