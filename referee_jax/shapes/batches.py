"""What the networks of the shapes world are trained on: batches of pictures with their captions, drawn from a Generator.

The captions of Stable Diffusion are noisy on purpose: in 35 % of the two-object scenes two attributes are exchanged, so that the
U-Net binds attributes as badly as Stable Diffusion does. The referees' captions are clean, with hard negatives.

Every batch with captions takes `noise`, the share of two-object captions that are exchanged, and `named`, whether captions may
name the attribute pairs of world.UNSEEN: what the training data of a referee is worth can be measured.
"""

import dataclasses

import numpy as np

from referee_jax.shapes import tokens, world

MIX = {
    "single": 0.08,
    "colour": 0.22,
    "shape": 0.06,
    "texture": 0.18,
    "spatial": 0.2,
    "numeracy": 0.08,
    "complex": 0.18,
}
UNET_MIX = {"single": 0.15, "colour": 0.5, "texture": 0.07, "spatial": 0.14, "numeracy": 0.07, "complex": 0.07}
SWAPPED, EMPTY = 0.35, 0.1  # shares of Stable Diffusion's captions that are exchanged and left out
DISTRACTORS = 2
PATCH = 8  # side in pixels of the squares that say what they show
KINDS = (*world.SHAPES, *world.COLOURS, *world.TEXTURES, *world.RELATIONS)
Arrays = dict[str, np.ndarray]


def sample(
    rng: np.random.Generator, mix: dict[str, float], *, unseen: bool | None = False
) -> tuple[world.Scene, world.Prompt, str]:
    """A training scene (`unseen` as of world.sample_scene) with a true caption, and its category."""
    category = str(rng.choice(list(mix), p=list(mix.values())))
    scene = world.sample_scene(rng, category, unseen=unseen)
    return scene, world.describe(rng, scene, category), category


def drawn(scenes: list[world.Scene], views: list[np.ndarray | None] | None = None) -> Arrays:
    """Images `[scene, 3, 64, 64]` in [0, 1] and covers `[scene, object, 64, 64]`."""
    pairs = [world.draw(scene, view=view) for scene, view in zip(scenes, views or [None] * len(scenes), strict=True)]
    return {
        name: np.stack([pair[i] for pair in pairs]).transpose(0, 3, 1, 2) for i, name in enumerate(("image", "cover"))
    }


def vae_batch(rng: np.random.Generator, size: int = 16) -> Arrays:
    """Scenes alone."""
    return drawn([sample(rng, MIX)[0] for _ in range(size)])


def exchanged(rng: np.random.Generator, prompt: world.Prompt, share: float, *, named: bool) -> world.Prompt:
    """In `share` of the cases the caption of two things with their attributes exchanged."""
    if share and len(prompt.things) == 2 and rng.random() < share:
        swapped = prompt.swapped()
        if named or not any(thing.is_unseen() for thing in swapped.things):
            return swapped
    return prompt


def unet_batch(rng: np.random.Generator, size: int = 32, *, noise: float = SWAPPED, named: bool = False) -> Arrays:
    """Scenes with noisy captions: of two-object captions SWAPPED have two attributes exchanged, of all EMPTY are empty.

    Scenes show attribute pairs of world.UNSEEN as often as others; captions leave out the attribute.
    """
    scenes, texts = [], []
    for _ in range(size):
        scene, prompt, _ = sample(rng, UNET_MIX, unseen=None)
        if not named:
            prompt = dataclasses.replace(prompt, things=tuple(thing.unsaid() for thing in prompt.things))
        prompt = exchanged(rng, prompt, noise, named=named)
        scenes.append(scene)
        texts.append("" if rng.random() < EMPTY else prompt.text)
    return {"image": drawn(scenes)["image"], "input_ids": tokens.encode(texts)}


def random_view(rng: np.random.Generator) -> np.ndarray | None:
    """A small rotation, shift and zoom for `world.draw`; one in four is none."""
    if rng.random() < 0.25:
        return None
    angle, zoom = rng.uniform(-0.35, 0.35), rng.uniform(0.9, 1.15)
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    return np.array([[cos, -sin, rng.uniform(-5, 5)], [sin, cos, rng.uniform(-5, 5)]])


def facts(prompt: world.Prompt, scene: world.Scene) -> np.ndarray:
    """What each token of a caption says of the scene, int8 `[LENGTH]`: 1 what is so, 0 what is not, -1 nothing.

    A shape says whether a thing with its attributes is there; a number, whether there are so many; the last word of a
    relation, whether the things stand so, if they are there.
    """
    words, said = prompt.text.split(), np.full(tokens.LENGTH, -1, np.int8)
    nouns = [i for i, word in enumerate(words) if word in world.SHAPES or word in world.PLURALS.values()]
    there = [[item for item in scene.objects if thing.fits(item)] for thing in prompt.things]
    said[[1 + noun for noun in nouns]] = [bool(items) for items in there]  # after the token that begins all texts
    if prompt.count > 1:
        said[1] = len(there[0]) == prompt.count
    if prompt.relation and all(there):
        first, second = there
        end = 1 + nouns[0] + len(prompt.relation.split())
        said[end] = any(world.holds(prompt.relation, a, b) for a in first for b in second if a is not b)
    return said


@dataclasses.dataclass(frozen=True)
class Told:
    """Scenes, twin beside twin, each with a caption true of it alone and DISTRACTORS captions near to it."""

    scenes: list[world.Scene]
    prompts: list[world.Prompt]
    near: list[list[world.Prompt]]

    @property
    def texts(self) -> list[str]:
        """The true captions in the scenes' order, after those each scene's distractors."""
        return [prompt.text for prompt in (*self.prompts, *(prompt for own in self.near for prompt in own))]


def tell(rng: np.random.Generator, size: int, *, noise: float, named: bool, swaps: float = 0.0) -> Told:
    """`size` scenes and their twins; the first distractor exchanges the attributes in a share `swaps` of the cases."""
    scenes, prompts = [], []
    while len(scenes) < 2 * size:
        scene, prompt, category = sample(rng, MIX, unseen=None if named else False)
        twin = world.edit(rng, scene, unseen=named)
        told = world.describe(rng, twin, "single" if len(twin.objects) == 1 else category)
        if not world.matches(prompt, twin) and not world.matches(told, scene):
            scenes += [scene, twin]
            prompts += [exchanged(rng, text, noise, named=named) for text in (prompt, told)]
    near = []
    for scene, prompt in zip(scenes, prompts, strict=True):
        others = world.distractors(rng, prompt, DISTRACTORS, seen=not named) * DISTRACTORS
        swapped = exchanged(rng, prompt, swaps, named=named)
        first = [] if swapped == prompt or world.matches(swapped, scene) else [swapped]
        near.append([*first, *others][:DISTRACTORS])
    return Told(scenes, prompts, near)


def pictures(rng: np.random.Generator, told: Told) -> Arrays:
    """The scenes' pictures, and after them scenes with an object too many, that no caption is true of.

    `parents` are the scenes that got the objects too many; `shown [scene, patch, KINDS]` says of what each patch shows a
    part: shape, colour, texture, and where it stands to the other object, if there are two.
    """
    pairs = [
        i for i, scene in enumerate(told.scenes) if len({(item.shape, item.colour) for item in scene.objects}) == 2
    ]
    parents = np.array(pairs[: len(told.scenes) // 4])
    scenes = [*told.scenes, *(world.crowd(rng, told.scenes[i]) for i in parents)]
    batch = drawn(scenes, [random_view(rng) for _ in scenes])
    side = world.SIZE // PATCH
    covered = batch.pop("cover").reshape(len(scenes), -1, side, PATCH, side, PATCH).mean((3, 5)) > 0.08
    labels = np.zeros((len(scenes), world.MAX_OBJECTS, len(KINDS)), bool)
    for i, scene in enumerate(scenes):
        for j, item in enumerate(scene.objects):
            kinds = [item.shape, item.colour, item.texture]
            if len(scene.objects) == 2:
                kinds += [relation for relation in world.RELATIONS if world.holds(relation, item, scene.objects[1 - j])]
            labels[i, j, [KINDS.index(kind) for kind in kinds]] = True
    shown = np.einsum("bjp,bjk->bpk", covered.reshape(len(scenes), world.MAX_OBJECTS, -1), labels)
    return batch | {"shown": shown, "parents": parents}


def true_words(told: Told) -> np.ndarray:
    """`[scene, text, LENGTH]`: what the tokens of its own text, its twin's and its distractors' say of the scene."""
    prompts = told.prompts
    own = [(prompts[i], prompts[i ^ 1], *near) for i, near in enumerate(told.near)]
    return np.stack([[facts(text, scene) for text in texts] for texts, scene in zip(own, told.scenes, strict=True)])


def pair_batch(rng: np.random.Generator, size: int = 48, *, noise: float = 0.0, named: bool = False) -> Arrays:
    """Scenes, their near twins, each with a caption true of it alone, and scenes with an object too many that none is true of."""
    told = tell(rng, size, noise=noise, named=named)
    return pictures(rng, told) | {"input_ids": tokens.encode(told.texts)}


def wordpiece_batch(rng: np.random.Generator, size: int = 48, *, noise: float = 0.0, named: bool = False) -> Arrays:
    """The same, read by BERT's tokenizer, with captions whose attributes are exchanged among the false ones."""
    told = tell(rng, size, noise=noise, named=named, swaps=0.5)
    return pictures(rng, told) | {"input_ids": tokens.wordpieces(told.texts), "facts": true_words(told)}


def read_captions(texts: list[str]) -> np.ndarray:
    """Token ids of captions that begin as all of BLIP's do."""
    return tokens.wordpieces([f"{tokens.BEGINNING} {text}" for text in texts], first="[DEC]")


def read_questions(texts: list[str]) -> np.ndarray:
    """Token ids of texts as questions."""
    return tokens.wordpieces([f"{text} ?" for text in texts])


def questions(rng: np.random.Generator, told: Told) -> Arrays:
    """Two questions for each scene, the second ones after all the first: is there what its caption says, or a false one?

    Half of those about two things ask for one of them, as T2I-CompBench's questions do: for one that is not there, if the
    caption is false. `answers [question]` is whether all that is asked for is there, `asked [question, LENGTH]` is facts'.
    """
    false = [told.prompts[i ^ 1] if i % 4 < 2 else near[1] for i, near in enumerate(told.near)]
    texts, asked = [], []
    for prompts in (told.prompts, false):
        for scene, prompt in zip(told.scenes, prompts, strict=True):
            if len(prompt.things) == 2 and rng.random() < 0.5:
                missing = [thing for thing in prompt.things if not any(map(thing.fits, scene.objects))]
                prompt = world.Prompt(things=(world.pick(rng, missing or prompt.things),))
            texts.append(prompt.text)
            asked.append(facts(prompt, scene))
    asked = np.stack(asked)
    return {"question_ids": read_questions(texts), "asked": asked, "answers": (asked != 0).all(1)}


def blip_batch(rng: np.random.Generator, size: int = 48, *, noise: float = 0.0, named: bool = False) -> Arrays:
    """The same, and as BLIP reads them, captions that begin as all do, and questions whether things are there."""
    told = tell(rng, size, noise=noise, named=named, swaps=0.5)
    texts = {"input_ids": tokens.wordpieces(told.texts), "caption_ids": read_captions(told.texts)}
    return pictures(rng, told) | texts | {"facts": true_words(told)} | questions(rng, told)
