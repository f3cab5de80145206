"""Training data of the shapes world's networks: batches of pictures with captions, drawn from a Generator.

The captions of Stable Diffusion are noisy on purpose: in 35 % of the two-object scenes two attributes are
swapped, so that the U-Net binds attributes as badly as Stable Diffusion does. The referees' captions are clean,
with hard negatives.

Every batch with captions takes `noise`, the share of two-object captions with swapped attributes, and `named`,
whether captions may name pairs of world.UNSEEN, to measure the worth of a referee's training data.
"""

import dataclasses

import numpy as np

from referee_jax.referees import questions as questions_lib
from referee_jax.shapes import sampling, tokens, world

MIX = {
    "single": 0.08,
    "colour": 0.22,
    "shape": 0.06,
    "texture": 0.18,
    "spatial": 0.2,
    "numeracy": 0.08,
    "complex": 0.18,
}
UNET_MIX = {
    "single": 0.05,
    "colour": 0.2,
    "texture": 0.18,
    "spatial": 0.1,
    "numeracy": 0.05,
    "complex": 0.14,
    "hard": 0.28,
}
# What CLIP does not know comes often.
ASKED_MIX = {
    "single": 0.05,
    "colour": 0.1,
    "shape": 0.02,
    "texture": 0.18,
    "spatial": 0.17,
    "numeracy": 0.15,
    "complex": 0.18,
    "hard": 0.15,
}
SWAPPED, EMPTY = 0.35, 0.1  # shares of Stable Diffusion's captions that are swapped, and empty
DISTRACTORS = 2
PATCH = 8  # side in pixels of the squares with labels
KINDS = (*world.SHAPES, *world.COLOURS, *world.TEXTURES, *world.RELATIONS)
Arrays = dict[str, np.ndarray]


def sample(
    rng: np.random.Generator, mix: dict[str, float], *, unseen: bool | None = False
) -> tuple[world.Scene, world.Prompt, str]:
    """A training scene, its true caption and category; `unseen` as in sampling.sample_scene."""
    category = str(rng.choice(list(mix), p=list(mix.values())))
    scene = sampling.sample_scene(rng, category, unseen=unseen)
    return scene, sampling.describe(rng, scene, category), category


def drawn(scenes: list[world.Scene], views: list[np.ndarray | None] | None = None) -> Arrays:
    """Images `[scene, 3, 64, 64]` in [0, 1] and covers `[scene, object, 64, 64]`."""
    pairs = [world.draw(scene, view=view) for scene, view in zip(scenes, views or [None] * len(scenes), strict=True)]
    most = max(cover.shape[-1] for _, cover in pairs)
    covers = [np.pad(cover, ((0, 0), (0, 0), (0, most - cover.shape[-1]))) for _, cover in pairs]
    arrays = {"image": [image for image, _ in pairs], "cover": covers}
    return {name: np.stack(x).transpose(0, 3, 1, 2) for name, x in arrays.items()}


def vae_batch(rng: np.random.Generator, size: int = 16) -> Arrays:
    """Scenes without captions."""
    return drawn([sample(rng, MIX)[0] for _ in range(size)])


def exchanged(rng: np.random.Generator, prompt: world.Prompt, share: float, *, named: bool) -> world.Prompt:
    """The prompt; for more than one thing, in a share of the cases, with their attributes swapped."""
    if share and len(prompt.things) > 1 and rng.random() < share:
        swapped = prompt.swapped()
        if named or not any(thing.is_unseen() for thing in swapped.things):
            return swapped
    return prompt


def unet_batch(rng: np.random.Generator, size: int = 32, *, noise: float = SWAPPED, named: bool = False) -> Arrays:
    """Scenes with noisy captions: SWAPPED of the two-object captions have two attributes swapped, EMPTY of all are empty.

    Scenes show attribute pairs of world.UNSEEN as often as others; captions leave out the attribute.
    """
    scenes, texts = [], []
    for _ in range(size):
        scene, prompt, _ = sample(rng, UNET_MIX, unseen=None)
        if not named:
            prompt = prompt.unsaid()
        prompt = exchanged(rng, prompt, noise, named=named)
        scenes.append(scene)
        texts.append("" if rng.random() < EMPTY else prompt.text)
    return {"image": drawn(scenes)["image"], "input_ids": tokens.encode(texts)}


def prompt_batch(rng: np.random.Generator, size: int = 32) -> Arrays:
    """Captions of all kinds, also of what no other training says: pairs of world.UNSEEN, three things."""
    return {"input_ids": tokens.encode([sample(rng, ASKED_MIX, unseen=None)[1].text for _ in range(size)])}


def random_view(rng: np.random.Generator) -> np.ndarray | None:
    """A small rotation, shift and zoom for `world.draw`; None in a quarter of the cases."""
    if rng.random() < 0.25:
        return None
    angle, zoom = rng.uniform(-0.35, 0.35), rng.uniform(0.9, 1.15)
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    return np.array([[cos, -sin, rng.uniform(-5, 5)], [sin, cos, rng.uniform(-5, 5)]])


def facts(prompt: world.Prompt, scene: world.Scene) -> np.ndarray:
    """Whether each token of a caption is true of the scene, int8 `[LENGTH]`: 1 true, 0 false, -1 says nothing.

    A shape is true if there is an object with its attributes; a number, if the count is right; the last
    word of a relation, if it holds, where all objects exist.
    """
    words, truth = prompt.text.split(), np.full(tokens.LENGTH, -1, np.int8)
    nouns = [i for i, word in enumerate(words) if word in world.SHAPES or word in world.PLURALS.values()]
    fitting = [[item for item in scene.objects if thing.fits(item)] for thing in prompt.things]
    truth[[1 + noun for noun in nouns]] = [bool(items) for items in fitting]  # after the start token
    if prompt.count > 1:
        truth[1] = len(fitting[0]) == prompt.count
    if prompt.relations and all(fitting):
        first, *others = fitting
        for relation, second, noun in zip(prompt.relations, others, nouns[1:], strict=True):
            # The relation's last word stands before the article and the attributes of its thing.
            last = max(i for i in range(noun) if words[i] == relation.split()[-1])
            truth[1 + last] = any(world.holds(relation, a, b) for a in first for b in second if a is not b)
    return truth


@dataclasses.dataclass(frozen=True)
class Captioned:
    """Scenes, each followed by its twin, with a caption true of it alone and DISTRACTORS hard negatives."""

    scenes: list[world.Scene]
    prompts: list[world.Prompt]
    near: list[list[world.Prompt]]

    @property
    def texts(self) -> list[str]:
        """The true captions in the scenes' order, then the hard negatives of each scene."""
        return [prompt.text for prompt in (*self.prompts, *(prompt for group in self.near for prompt in group))]


def caption(
    rng: np.random.Generator,
    size: int,
    *,
    noise: float,
    named: bool,
    swaps: float = 0.0,
    mix: dict[str, float] = MIX,
    shown: bool = False,
) -> Captioned:
    """`size` scenes and their twins; in a share `swaps` the first hard negative has swapped attributes.

    With `shown` scenes have pairs of world.UNSEEN as others, and captions leave out the attribute that makes one.
    """
    scenes, prompts = [], []
    while len(scenes) < 2 * size:
        scene, prompt, category = sample(rng, mix, unseen=None if named or shown else False)
        twin = sampling.edit(rng, scene, unseen=named or shown)
        other = sampling.describe(rng, twin, "single" if len(twin.objects) == 1 else category)
        if not named:
            prompt, other = prompt.unsaid(), other.unsaid()
        if not world.matches(prompt, twin) and not world.matches(other, scene):
            scenes += [scene, twin]
            prompts += [exchanged(rng, text, noise, named=named) for text in (prompt, other)]
    near = []
    for scene, prompt in zip(scenes, prompts, strict=True):
        others = sampling.distractors(rng, prompt, DISTRACTORS, seen=not named) * DISTRACTORS
        swapped = exchanged(rng, prompt, swaps, named=named)
        first = [] if swapped == prompt or world.matches(swapped, scene) else [swapped]
        near.append([*first, *others][:DISTRACTORS])
    return Captioned(scenes, prompts, near)


def labelled(scenes: list[world.Scene], views: list[np.ndarray | None]) -> Arrays:
    """Images as of `drawn`, and `shown [scene, patch, KINDS]`, which labels each patch.

    Labels are the shape, colour and texture of the objects in it, and their relation to the other of two.
    """
    batch = drawn(scenes, views)
    side = world.SIZE // PATCH
    cover = batch.pop("cover")
    covered = cover.reshape(*cover.shape[:2], side, PATCH, side, PATCH).mean((3, 5)) > 0.08
    labels = np.zeros((*covered.shape[:2], len(KINDS)), bool)
    for i, scene in enumerate(scenes):
        for j, item in enumerate(scene.objects):
            kinds = [item.shape, item.colour, item.texture]
            if len(scene.objects) == 2:
                kinds += [relation for relation in world.RELATIONS if world.holds(relation, item, scene.objects[1 - j])]
            labels[i, j, [KINDS.index(kind) for kind in kinds]] = True
    shown = np.einsum("bjp,bjk->bpk", covered.reshape(*covered.shape[:2], -1), labels)
    return batch | {"shown": shown}


def pictures(rng: np.random.Generator, captioned: Captioned) -> Arrays:
    """The scenes' pictures, then those of scenes with an extra object, of which no caption is true.

    `parents` are the indices of the scenes that got an extra object.
    """
    pairs = [
        i for i, scene in enumerate(captioned.scenes) if len({(item.shape, item.colour) for item in scene.objects}) == 2
    ]
    parents = np.array(pairs[: len(captioned.scenes) // 4])
    scenes = [*captioned.scenes, *(sampling.crowd(rng, captioned.scenes[i]) for i in parents)]
    return labelled(scenes, [random_view(rng) for _ in scenes]) | {"parents": parents}


def true_words(captioned: Captioned) -> np.ndarray:
    """`facts` of each scene's caption, its twin's and its hard negatives, `[scene, text, LENGTH]`."""
    prompts = captioned.prompts
    texts = [(prompts[i], prompts[i ^ 1], *near) for i, near in enumerate(captioned.near)]
    return np.stack([[facts(x, scene) for x in group] for group, scene in zip(texts, captioned.scenes, strict=True)])


def pair_batch(rng: np.random.Generator, size: int = 48, *, noise: float = 0.0, named: bool = False) -> Arrays:
    """Scenes and their near twins with captions, and scenes with an extra object, read by CLIP's tokenizer."""
    captioned = caption(rng, size, noise=noise, named=named)
    return pictures(rng, captioned) | {"input_ids": tokens.encode(captioned.texts)}


def wordpiece_batch(rng: np.random.Generator, size: int = 48, *, noise: float = 0.0, named: bool = False) -> Arrays:
    """The same, read by BERT's tokenizer, with swapped attributes among the false captions."""
    captioned = caption(rng, size, noise=noise, named=named, swaps=0.5)
    return pictures(rng, captioned) | {"input_ids": tokens.wordpieces(captioned.texts), "facts": true_words(captioned)}


def read_captions(texts: list[str]) -> np.ndarray:
    """Token ids of captions that begin with BEGINNING, as all of BLIP's."""
    return tokens.wordpieces([f"{tokens.BEGINNING} {text}" for text in texts], first="[DEC]")


def read_questions(texts: list[str]) -> np.ndarray:
    """Token ids of texts as questions."""
    return tokens.wordpieces([f"{text} ?" for text in texts])


def questions(rng: np.random.Generator, captioned: Captioned) -> Arrays:
    """Two questions for each scene, first all about true captions, then all about false ones.

    Half of those with two things ask for one of them, as T2I-CompBench's questions do; of a false caption for one
    that is missing. `answers [question]` is whether everything is there, `asked [question, LENGTH]` its `facts`.
    """
    false = [captioned.prompts[i ^ 1] if i % 4 < 2 else near[1] for i, near in enumerate(captioned.near)]
    texts, truth = [], []
    for prompts in (captioned.prompts, false):
        for scene, prompt in zip(captioned.scenes, prompts, strict=True):
            if len(prompt.things) == 2 and rng.random() < 0.5:
                missing = [thing for thing in prompt.things if not any(map(thing.fits, scene.objects))]
                prompt = world.Prompt(things=(sampling.pick(rng, missing or prompt.things),))
            texts.append(prompt.text)
            truth.append(facts(prompt, scene))
    truth = np.stack(truth)
    return {"question_ids": read_questions(texts), "asked": truth, "answers": (truth != 0).all(1)}


def blip_batch(rng: np.random.Generator, size: int = 48, *, noise: float = 0.0, named: bool = False) -> Arrays:
    """The same, with captions that begin with BEGINNING, and with questions."""
    captioned = caption(rng, size, noise=noise, named=named, swaps=0.5)
    texts = {"input_ids": tokens.wordpieces(captioned.texts), "caption_ids": read_captions(captioned.texts)}
    return pictures(rng, captioned) | texts | {"facts": true_words(captioned)} | questions(rng, captioned)


def mirrored(scene: world.Scene, axis: str) -> world.Scene:
    """The scene with its left and right (`axis` "x") or its top and bottom ("y") exchanged; shapes stay upright."""
    moved = (dataclasses.replace(x, **{axis: world.SIZE - getattr(x, axis)}) for x in scene.objects)
    return dataclasses.replace(scene, objects=tuple(moved))


def turned(prompt: world.Prompt) -> world.Prompt:
    """The prompt with the two arguments of its relation exchanged, which makes it false."""
    return dataclasses.replace(prompt, things=prompt.things[::-1])


FORMS = ("exactly", "contains")  # nothing else is there; other objects may be


def answer(form: str, prompt: world.Prompt, scene: world.Scene) -> bool:
    """Whether a scene shows exactly what a caption says, or contains it."""
    return world.matches(prompt, scene) if form == "exactly" else not (facts(prompt, scene) == 0).any()


def centres(prompt: world.Prompt, scene: world.Scene, view: np.ndarray | None) -> np.ndarray:
    """Where a view shows the objects that a caption names, float32 `[T5_LENGTH, 2]` at their nouns.

    -1..1 is from side to side; NaN where not exactly one object fits.
    """
    where, words = np.full((tokens.T5_LENGTH, 2), np.nan, np.float32), prompt.text.split()
    nouns = [i for i, word in enumerate(words) if word in world.SHAPES or word in world.PLURALS.values()]
    for noun, thing in zip(nouns, prompt.things, strict=True):
        fitting = [item for item in scene.objects if thing.fits(item)]
        if len(fitting) == 1:
            offset = np.array([fitting[0].x, fitting[0].y]) - world.SIZE / 2
            if view is not None:  # which maps canvas to world
                offset = np.linalg.solve(view[:, :2], offset - view[:, 2])
            where[1 + noun] = offset / (world.SIZE / 2)
    return where


_IN_QUESTIONS = {
    "to the left of": "on the left of",
    "to the right of": "on the right of",
    "above": "above",
    "below": "below",
}


def is_true(atom: questions_lib.Atom, scene: world.Scene) -> bool:
    """Whether the answer to an atom's question, of a caption of the world, is yes; no where what it is about is missing."""
    fitting = lambda words: [item for item in scene.objects if world.thing(words).fits(item)]
    if atom.kind == questions_lib.NUMBER:
        number, _, words = atom.text.partition(" ")
        return len(fitting(words)) == world.NUMBERS[number]
    if atom.kind != questions_lib.RELATION:
        return bool(fitting(atom.text))
    relation = next(text for text in _IN_QUESTIONS if f" {text} " in atom.text)
    first, second = map(fitting, atom.text.split(f" {relation} "))
    return any(world.holds(_IN_QUESTIONS[relation], a, b) for a in first for b in second if a is not b)


def vqascore_batch(rng: np.random.Generator, size: int = 16, *, mirror: bool = True, crowd: bool = True) -> Arrays:
    """Scenes, their twins and mirrored ones, with true captions, hard negatives and their atoms as questions of yes and no.

    `mirror` and `crowd`: whether there are mirrored scenes, and such with an extra object.
    `pictures [question]` is the picture that is asked about, `answers` the truth, `facts [question, T5_LENGTH]` that of
    each word, `centres [question, T5_LENGTH, 2]` of `centres`, in the view's coordinates.
    """
    captioned = caption(rng, size, noise=0.0, named=False, swaps=0.5, mix=ASKED_MIX, shown=True)
    scenes, asked, atoms = list(captioned.scenes), [], []
    for i, (prompt, near) in enumerate(zip(captioned.prompts, captioned.near, strict=True)):
        asked += [(i, prompt), (i, captioned.prompts[i ^ 1]), *((i, other) for other in near)]
        if prompt.count > 1:
            asked.append((i, prompt.miscounted()))
        if prompt.relation and mirror:
            asked += [(i, turned(prompt)), (len(scenes), prompt), (len(scenes), turned(prompt))]
            scenes.append(mirrored(scenes[i], "x" if "the" in prompt.relation else "y"))
        others = [atom for text in near for atom in questions_lib.atoms(text.text)]
        false = [atom for atom in others if not is_true(atom, scenes[i])]
        atoms += [(i, sampling.pick(rng, questions_lib.atoms(prompt.text))), (i, sampling.pick(rng, false or others))]
    if crowd:
        counted = [i for i in range(2 * size) if captioned.prompts[i].count > 1]
        pairs = [i for i in range(2 * size) if len({(item.shape, item.colour) for item in scenes[i].objects}) == 2]
        for i in counted + pairs[: size // 2]:
            asked.append((len(scenes), captioned.prompts[i]))
            if i in counted:  # what is one too many for "two" may be right for "three"
                asked.append((len(scenes), captioned.prompts[i].miscounted()))
            scenes.append(sampling.crowd(rng, scenes[i]))
    forms = [FORMS[int(rng.random() < 0.25)] for _ in asked]
    views = [random_view(rng) for _ in scenes]
    count = len(asked) + len(atoms)
    words = np.full((count, tokens.T5_LENGTH), -1, np.int8)
    where = np.full((count, tokens.T5_LENGTH, 2), np.nan, np.float32)
    for n, (i, prompt) in enumerate(asked):
        words[n, : tokens.LENGTH] = facts(prompt, scenes[i])  # one word of the template, one start token
        where[n] = centres(prompt, scenes[i], views[i])
    texts = [f"{form} {prompt.text}" for form, (_, prompt) in zip(forms, asked, strict=True)]
    answers = [answer(form, prompt, scenes[i]) for form, (i, prompt) in zip(forms, asked, strict=True)]
    return labelled(scenes, views) | {
        "pictures": np.array([i for i, _ in asked + atoms]),
        "question_ids": tokens.t5_words(texts + [atom.question for _, atom in atoms]),
        "answers": np.array(answers + [is_true(atom, scenes[i]) for i, atom in atoms]),
        "facts": words,
        "centres": where,
    }
