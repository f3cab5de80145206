"""The trained networks that are part of the package: they are what their directories say, and know what they were taught."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax import config, referees
from referee_jax.shapes import sampling, world
from referee_jax.weights import hub
from tests.conftest import cosine
from tests.lazy import torch, transformers

# Directory -> the name of transformers' class, the loss by which it is asked here, and the share of attribute swaps, of pairs
# that captions name and of pairs that none names, that it must see through: what was measured, less three standard errors of
# 48 scenes.
EMBEDDED = {
    "clip": ("CLIPModel", "cosine", 0.95, 0.92),
    "blip_itm": ("BlipForImageTextRetrieval", "itm", 0.97, 0.97),
    "blip_caption": ("BlipForConditionalGeneration", "caption", 0.97, 0.97),
    "blip_vqa": ("BlipForQuestionAnswering", "vqa", 0.97, 0.97),
    "blip2": ("Blip2ForImageTextRetrieval", "itm", 0.97, 0.97),
    "vqascore": (None, "vqa", 0.97, 0.97),  # transformers has no class of CLIP-FlanT5
    "vqascore_held_out": (None, "vqa", 0.96, 0.88),
}


def judge(name: str, dtype=jnp.float32) -> referees.Judge:
    spec = config.RefereeSpec(name=referees.name_of(f"shapes/{name}"), checkpoint=f"shapes/{name}", losses={})
    return referees.load_referee(spec, dtype=dtype)


def scenes(count: int, *, unseen: bool) -> list[tuple[np.ndarray, world.Prompt]]:
    """Pictures of two coloured shapes and their captions."""
    rng, found = np.random.default_rng(1), []
    while len(found) < count:
        scene = sampling.sample_scene(rng, "colour", unseen=unseen)
        prompt = sampling.describe(rng, scene, "colour")
        if not world.matches(prompt.swapped(), scene):
            found.append((world.draw(scene)[0].astype(np.float32), prompt))
    return found


def test_their_size():
    files = [file for file in hub.ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 32e6
    assert {file.parent.name for file in files if file.name == "preprocessor_config.json"} == EMBEDDED.keys()
    assert all((hub.ASSETS / name / "README.md").is_file() for name in EMBEDDED)


@pytest.mark.parametrize("name", EMBEDDED)
def test_attribute_swaps(name):
    _, loss, *shares = EMBEDDED[name]
    who = judge(name)
    ask = jax.jit(
        jax.vmap(lambda view, tokens: who.referee.views_losses(view[None], who.referee.encode(tokens))[loss][0])
    )
    for unseen, share in zip((False, True), shares, strict=True):
        pictures, prompts = zip(*scenes(48, unseen=unseen), strict=True)
        losses = []
        for texts in (prompts, map(world.Prompt.swapped, prompts)):
            tokens = jax.tree.map(lambda *x: np.stack(x), *[who.tokenize(prompt.text) for prompt in texts])
            losses.append(np.asarray(ask(jnp.asarray(np.stack(pictures)), tokens)))
        assert (losses[0] < losses[1]).mean() >= share


@pytest.mark.parametrize("unseen", [False, True])
def test_questions_about_one_thing(unseen):
    """T2I-CompBench's: yes to each thing of a picture of two, no to the things of its swap."""
    who, asked = judge("blip_vqa"), {True: [], False: []}
    ask = jax.jit(
        jax.vmap(lambda view, tokens: who.referee.scores(view, who.referee.encode(tokens))["vqa_probability"])
    )
    for view, prompt in scenes(48, unseen=unseen):
        for is_there, things in ((True, prompt.things), (False, prompt.swapped().things)):
            asked[is_there] += [(view, world.Prompt(things=(thing,)).text) for thing in things]
    for is_there, pairs in asked.items():
        views, texts = zip(*pairs, strict=True)
        tokens = jax.tree.map(lambda *x: np.stack(x), *map(who.tokenize, texts))
        yes = np.asarray(ask(jnp.asarray(np.stack(views)), tokens)) > 0.5
        print(unseen, is_there, (yes == is_there).mean())
        assert (yes == is_there).mean() >= 0.95


@pytest.mark.slow  # tests/referees/test_contract.py asks it of each referee with random weights
@pytest.mark.parametrize("name", EMBEDDED)
def test_bfloat16_gradients(name):
    """Of caption and picture that disagree, in half the precision, they point the same way; 0.9995 was measured."""
    _, loss, *_ = EMBEDDED[name]
    pictures, prompts = zip(*scenes(8, unseen=False), strict=True)
    noisy = np.stack(pictures) + 0.1 * np.random.default_rng(3).normal(size=(8, *pictures[0].shape))
    exact, rough = (gradients(judge(name, dtype), loss, noisy, prompts) for dtype in (jnp.float32, jnp.bfloat16))
    assert all(cosine(a, b) > 0.99 for a, b in zip(exact, rough, strict=True))


def gradients(who: referees.Judge, loss: str, pictures: np.ndarray, prompts) -> np.ndarray:
    """With respect to each picture, of the loss of its prompt with shapes exchanged."""
    tokens = jax.tree.map(lambda *x: np.stack(x), *[who.tokenize(prompt.swapped().text) for prompt in prompts])
    ask = jax.grad(lambda view, tokens: who.referee.views_losses(view[None], who.referee.encode(tokens))[loss][0])
    return np.asarray(jax.jit(jax.vmap(ask))(jnp.asarray(pictures, jnp.float32), tokens))


@pytest.mark.parametrize("name", [name for name, row in EMBEDDED.items() if row[0]])
def test_the_torch_class_reads_it(name):
    """With nothing missing, in the published layout."""
    cls = getattr(transformers, EMBEDDED[name][0])
    theirs, told = cls.from_pretrained(hub.ASSETS / name, output_loading_info=True, dtype=torch.float32)
    assert not told["missing_keys"] and not told["mismatched_keys"]
    # transformers' BLIP-2 has no language head.
    assert all(key.startswith("cls.predictions.") for key in told["unexpected_keys"])
    assert theirs.config.to_dict()["architectures"] == [cls.__name__]
