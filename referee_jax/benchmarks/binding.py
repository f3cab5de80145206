"""Does a referee know which attribute belongs to which object, where things are and how many? On new scenes of the shapes world.

    python -m referee_jax.benchmarks.binding --referee=shapes/clip --referee=shapes/blip_itm
    python -m referee_jax.benchmarks.binding --referee=shapes/blip2 --loss=itg --category=texture --category=spatial

Each scene comes with its true caption, the same with swapped attributes (for a relation: swapped objects, for a number:
another), and six hard negatives, and as a second scene with an object too many. Prints as Markdown how often the true
caption has a lower loss than its swap, than all hard negatives, and than of the second scene, with 95 % intervals, for
attribute pairs that training captions name ("seen") and for those that they do not. The loss is the referee's first, or
--loss. Exit codes: 0 done, 2 the command cannot be carried out.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from referee_jax import cli, config, console, referees
from referee_jax.benchmarks import statistics
from referee_jax.shapes import batches, benchmark, sampling, world

NEAR = 6
BATCH = 16  # scenes at once
CATEGORIES = tuple(name for name in world.CATEGORIES if name != "shape")  # those with something to swap
KINDS = ("swap", "near", "crowd")  # what the true caption has to be told from


class Example(NamedTuple):
    """A picture and one with an object too many, float32 `[64, 64, 3]`; the true caption, its swap and NEAR hard negatives."""

    image: np.ndarray
    crowded: np.ndarray
    texts: list[str]


def exchanged(prompt: world.Prompt) -> world.Prompt:
    """The prompt with the shapes of two things swapped, or, if it has one relation, the things; or with another number."""
    if prompt.count > 1:
        return prompt.miscounted()
    return batches.turned(prompt) if len(prompt.relations) == 1 else prompt.swapped()


def scenes(category: str, split: str, count: int, seed: int) -> list[Example]:
    """New scenes of a category; all but the first caption are false, and of the second scene the first too."""
    rng, examples = np.random.default_rng(seed), []
    while len(examples) < count:
        scene = sampling.sample_scene(rng, category, unseen=split == "unseen")
        true = sampling.describe(rng, scene, category)
        near, swap = sampling.distractors(rng, true, NEAR), exchanged(true)
        if len(near) == NEAR and not world.matches(swap, scene):
            crowded = sampling.crowd(np.random.default_rng((seed, len(examples))), scene)
            image, other = (world.draw(x)[0].astype(np.float32) for x in (scene, crowded))
            examples.append(Example(image, other, [prompt.text for prompt in (true, swap, *near)]))
    return examples


@functools.partial(jax.jit, static_argnames="loss")
def _losses(referee, images, crowded, tokens, loss: str):
    def one(image, crowded, tokens):
        ask = lambda view, text: referee.views_losses(view[None], referee.encode(text))[loss][0]
        view, other = referee.fit(image), referee.fit(crowded)
        first = jax.tree.map(lambda x: x[0], tokens)
        return jnp.append(jax.vmap(lambda text: ask(view, text))(tokens), ask(other, first))

    return jax.vmap(one)(images, crowded, tokens)


def losses(judge: referees.Judge, loss: str, examples: list[Example]) -> np.ndarray:
    """The losses of the captions of `scenes`, then of the first with the crowded scene, float32 `[scene, caption + 1]`."""
    stacked = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)
    rows = []
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        batch += batch[-1:] * (BATCH - len(batch))
        images, crowded, texts = zip(*batch, strict=True)
        tokens = stacked([stacked(map(judge.tokenize, group)) for group in texts])
        rows.append(np.asarray(_losses(judge.referee, np.stack(images), np.stack(crowded), tokens, loss)))
    return np.concatenate(rows)[: len(examples)]


def shares(values: np.ndarray) -> list[statistics.Mean]:
    """How often, in losses as of `losses`, the true caption's is lower than those of each of KINDS."""
    true, swap, near, crowd = values[:, 0], values[:, 1], values[:, 2:-1], values[:, -1]
    return [statistics.mean(enumerate(wins)) for wins in (true < swap, (true[:, None] < near).all(1), true < crowd)]


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
    for checkpoint in args.referee:
        judge, loss = load(checkpoint, args.loss)
        for category in args.category:
            values = {
                x: losses(judge, loss, scenes(category, x, args.scenes, args.seed)) for x in benchmark.splits(category)
            }
            found = {split: shares(x) for split, x in values.items()}
            cells = [
                found[split][n] if split in found else "-" for n in range(len(KINDS)) for split in benchmark.SPLITS
            ]
            rows[f"{checkpoint}, {loss}: {category}"] = cells
            logging.info("%s: %s", checkpoint, category)
    return console.markdown(["referee", *(f"{kind}, {split}" for kind in KINDS for split in benchmark.SPLITS)], rows)


def main(args: flags.FlagValues) -> str:
    """The command line."""
    if not args.referee:
        raise ValueError("--referee=DIRECTORY_OR_ID is needed, as often as you like")
    cli.prepare(args.device)
    return table(args)


if __name__ == "__main__":
    flags.DEFINE_multi_string("referee", [], "directory or hub id of a checkpoint; may be repeated")
    flags.DEFINE_string("loss", None, "which of its losses; default: the first")
    flags.DEFINE_multi_enum("category", list(CATEGORIES), CATEGORIES, "of the captions; may be repeated; default: all")
    flags.DEFINE_integer("scenes", 192, "of each split", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the scenes")
    cli.define_device()
    cli.start(main)
