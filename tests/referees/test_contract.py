"""One bench that every referee walks over: each row of REFEREES, from a tiny directory, under every transformation.

A new referee is one line in DIRECTORIES; all that is compared here is ours with ours, so its own tests still compare it with
its oracle.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from referee_jax import config, prompts, referees
from referee_jax.engine import parallel
from referee_jax.performance import flops
from tests.conftest import cosine, picture, relative_l2
from tests.lazy import t5_oracles, transformers
from tests.oracles import networks
from tests.referees import compiled


def _blip(name):
    return lambda path: networks.save_blip(networks.blip(getattr(transformers, name)), path)


# Name in the config -> writes a tiny checkpoint directory, of weights that hear image and text.
DIRECTORIES = {
    "clip": networks.save_clip,
    "siglip": lambda path: networks.save_siglip(networks.siglip(), path),
    "pickscore": networks.save_clip,
    "hps": networks.save_clip,
    "blip_itm": _blip("BlipForImageTextRetrieval"),
    "blip_caption": _blip("BlipForConditionalGeneration"),
    "blip_vqa": _blip("BlipForQuestionAnswering"),
    "blip2": functools.partial(networks.save_blip2, lm_head=True, older=False),
    "image_reward": networks.save_image_reward,
    "align": lambda path: networks.save_align(networks.align(), path),
    "qwen3_vl": networks.save_qwen3_vl,
    "vqascore": lambda path: t5_oracles.save_clip_t5(t5_oracles.clip_t5(), path),
}
PROMPTS = ("a red circle and a blue square", "a green square", "a blue circle and a photo", "red and green")
STEPS, VIEWS = 2, 2


def test_every_referee_is_on_the_bench():
    assert referees.REFEREES.keys() == config.LOSSES.keys()
    assert referees.REFEREES.keys() == DIRECTORIES.keys()


@pytest.fixture(scope="module", params=referees.REFEREES)
def judge(request, tmp_path_factory):
    name, path = request.param, tmp_path_factory.mktemp("bench")
    if name not in DIRECTORIES:
        pytest.fail(f"the referee {name} is not in DIRECTORIES: add what writes a tiny checkpoint of it")
    DIRECTORIES[name](path)
    negatives = {"near": 2, "exchange": (("red", "blue", "green"),)}
    negatives = negatives if config.CONTRASTS & set(config.LOSSES[name]) else {}
    losses = dict.fromkeys(config.LOSSES[name], 1.0)
    return referees.load_referee(config.RefereeSpec(name=name, checkpoint=str(path), losses=losses, **negatives))


@pytest.fixture(scope="module")
def texts(judge):
    """All that depends on the prompts alone, computed once, for all of them together."""
    tokens = jax.tree.map(lambda *x: np.stack(x), *[judge.tokenize(prompt) for prompt in PROMPTS])
    return jax.jit(jax.vmap(lambda r, t: r.encode(t), in_axes=(None, 0)))(judge.referee, tokens)


@pytest.fixture(scope="module")
def views(judge):
    size = judge.referee.image_size
    return np.random.default_rng(0).uniform(size=(len(PROMPTS), VIEWS, size, size, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def images(views):
    """The views of all prompts as those of one."""
    return views.reshape(-1, *views.shape[2:])


def of(tree, n):
    return jax.tree.map(lambda x: x[n], tree)


def losses_and_gradients(referee, text, views):
    """Losses `[V]`, and d(mean)/d(views) of each."""
    losses, pullback = jax.vjp(lambda v: referee.views_losses(v, text), views)
    share = {a: jnp.stack([jnp.full_like(x, (a == b) / len(x)) for b in losses]) for a, x in losses.items()}
    return losses, dict(zip(losses, jax.vmap(pullback)(share)[0], strict=True))


def moved(views, gradients):
    """Some way down the gradient of all losses."""
    total = sum(gradients.values())
    return views - 0.1 * total / jnp.linalg.norm(total)


def descend(referee, text, views):
    def step(x, _):
        losses, gradients = losses_and_gradients(referee, text, x)
        return moved(x, gradients), losses

    return jax.lax.scan(step, views, length=STEPS)


alone = jax.jit(losses_and_gradients)


@pytest.fixture(scope="module")
def exact(judge, texts, views):
    """Losses and gradients of all views, two at a time, with the first prompt."""
    return joined([alone(judge.referee, of(texts, 0), pair) for pair in views])


def joined(rows):
    return jax.tree.map(lambda *x: np.concatenate(x), *rows)


def test_losses(judge, texts, views, exact):
    """The losses that the config promises, in float32, of image and text."""
    assert judge.referee.losses == config.LOSSES[judge.spec.name]
    first, _ = exact
    other, _ = joined([alone(judge.referee, of(texts, 1), pair) for pair in views])
    assert set(first) == set(judge.referee.losses)
    for name, loss in first.items():
        assert loss.shape == (VIEWS * len(PROMPTS),) and loss.dtype == jnp.float32 and np.isfinite(loss).all()
        assert np.ptp(loss) > 1e-3
        assert np.abs(other[name] - loss).max() > 1e-3


def test_a_text_is_encoded_once(judge, texts, images):
    """No product of the losses depends on the text alone; the same count finds all of an encoding that is put into them.

    Under vmap over images, a product that sees none of them keeps one copy, however many they are. Of these, those that see
    a text are copied once texts are mapped too; what is left is of weights alone. A loop over layers sees what its last does.
    """
    tokens = jax.tree.map(lambda *x: np.stack(x), *map(judge.tokenize, PROMPTS))

    def kept(loss, read, over):
        """Operations of which two images need no more than one, by vmap `over` them and, or not, their texts."""
        one, two = (
            flops.flops(
                jax.vmap(loss, over), judge.referee, images[:n, None], of(read, 0 if over[2] is None else np.s_[:n])
            )
            for n in (1, 2)
        )
        assert two > one > 0
        return 2 * one - two

    def of_text_alone(loss, read):
        return kept(loss, read, (None, 0, None)) - kept(loss, read, (None, 0, 0))

    encoding = flops.flops(lambda r, t: r.encode(t), judge.referee, of(tokens, 0))
    assert of_text_alone(lambda r, x, text: r.views_losses(x, text), texts) == 0
    assert of_text_alone(lambda r, x, read: r.views_losses(x, r.encode(read)), tokens) == encoding
    # What reads its image from the first layer on has nothing to encode.
    at_once = ("blip_caption", "blip_vqa", "image_reward", "qwen3_vl", "vqascore")
    assert (encoding == 0) == (judge.spec.name in at_once)


def test_scores(judge, texts, views):
    """Scalars of an image of any size."""
    image = jnp.asarray(views[0, 0])
    large = jnp.repeat(jnp.repeat(image, 2, 0), 2, 1)
    shapes = jax.eval_shape(lambda r, i, t: r.scores(r.fit(i), t), judge.referee, large, of(texts, 0))
    assert shapes and all(x.shape == () and x.dtype == jnp.float32 for x in shapes.values())
    score = jax.jit(lambda r, i, t: r.scores(r.fit(i), t))
    scores = score(judge.referee, image, of(texts, 0))
    assert scores.keys() == shapes.keys() and all(np.isfinite(x) for x in scores.values())
    # In a run and of its file, by the rules of `Judge.score`: one number for one picture.
    pixels = np.round(255 * picture(height=3 * len(image), width=3 * len(image))).astype(np.uint8)
    by_run = score(judge.referee, compiled.fit(judge.referee, jnp.asarray(pixels / np.float32(255))), of(texts, 0))
    of_file = score(judge.referee, jnp.asarray(judge.preprocess(PIL.Image.fromarray(pixels))), of(texts, 0))
    # PickScore's score is a cosine times as much, and so is what the last bit of a pixel makes of it.
    most = float(judge.referee.network.logits(jnp.ones(1))[0]) if judge.spec.name == "pickscore" else 1
    for name, value in of_file.items():
        assert abs(float(by_run[name]) - float(value)) < 2e-6 * max(most, abs(float(value)))


def test_transformations(judge, texts, views):
    """grad in scan in vmap in shard_map in jit are what each prompt alone gives, step by step; so is pmap, which is
    the same for all of JAX's functions."""
    wanted, wanted_losses = views.copy(), []
    for n in range(len(PROMPTS)):
        losses = []
        for _ in range(STEPS):
            loss, gradients = alone(judge.referee, of(texts, n), wanted[n])
            wanted[n] = moved(wanted[n], gradients)
            losses.append(loss)
        wanted_losses.append(losses)
    over = (None, 0, 0)
    devices = jax.devices()
    spread = parallel.across_devices(
        jax.vmap(descend, in_axes=over), parallel.prompt_mesh(devices[:2]), (False, True, True)
    )
    made = {
        "shard_map": jax.jit(spread)(judge.referee, texts, views),
    }
    if judge.spec.name == "clip":
        devices = devices[: len(PROMPTS)]
        made["pmap"] = jax.pmap(descend, in_axes=over, devices=devices)(judge.referee, texts, views)
    for how, (x, losses) in made.items():
        for n in range(len(PROMPTS)):
            assert relative_l2(x[n] - views[n], wanted[n] - views[n]) < 1e-3, how
            for s in range(STEPS):
                for name, loss in wanted_losses[n][s].items():
                    np.testing.assert_allclose(losses[name][n, s], loss, rtol=1e-4, atol=1e-5, err_msg=how)
    assert relative_l2(wanted[0] - views[0], wanted[1] - views[1]) > 0.1


def test_bfloat16_gradient_points_the_same_way(judge, views, exact):
    """Of image and text in half the precision."""
    half, (_, exact) = referees.load_referee(judge.spec, dtype=jnp.bfloat16), exact
    text = compiled.encode(half.referee, half.tokenize(PROMPTS[0]))
    made = [alone(half.referee, text, pair) for pair in views]
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    losses, rough = joined(made)
    for name in losses:
        # Of each image, then the mean: in the cosine of all together one image would count for all the others, as a tiny
        # random network has images at which it is many times as sensitive.
        each = [cosine(a, b) for a, b in zip(exact[name], rough[name], strict=True)]
        assert np.mean(each) >= 0.99 and min(each) > 0.95, (name, each)
        assert relative_l2(rough[name], exact[name]) > 1e-4  # bfloat16 was really used


def test_what_is_too_long_is_counted_and_refused(judge):
    def count(prompt):
        return max(prompts.token_count(judge.tokenizer, text) for text in judge.family.texts(judge, prompt))

    for prompt in PROMPTS:
        assert 2 < count(prompt) <= judge.length
    longest = "red" + " red" * (judge.length - count("red"))
    assert count(longest) == judge.length
    assert jax.tree.map(np.shape, judge.tokenize(longest)) == jax.tree.map(np.shape, judge.tokenize("red"))
    with pytest.raises(
        prompts.PromptError, match=f"red .*': {judge.length + 1} tokens, {judge.spec.name} reads {judge.length}"
    ):
        judge.tokenize(longest + " red")
    # Or cut to what the authors read, both ends kept.
    cutting = judge.cutting()
    lengths = {"blip_itm": 35, "blip_caption": 40, "blip_vqa": 35}
    assert cutting.length == lengths.get(judge.spec.name, judge.length) <= judge.length
    long = "red " * judge.length + "blue circle"
    options = {"truncation": True, "padding": "max_length", "max_length": cutting.length}
    wanted = judge.tokenizer(judge.family.texts(judge, long)[0], **options)["input_ids"]
    assert np.atleast_2d(cutting.tokenize(long)["input_ids"])[0].tolist() == wanted
    assert cutting.is_cut(long) and not cutting.is_cut("red") and not judge.is_cut(long)
