"""ALIGN as a referee against transformers' AlignModel and its processor: losses, image gradients, scores, settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from referee_jax import config, prompts, referees
from referee_jax.referees import align
from tests.conftest import picture, relative_l2
from tests.lazy import torch, transformers
from tests.oracles import networks
from tests.referees import compiled

GROUPS = (("red", "blue", "green"), ("circle", "square"))
PROMPT = "a red circle and a blue square"
SIDE = 33


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return networks.save_align(networks.align(), tmp_path_factory.mktemp("align"))


def load(directory, **changes):
    spec = dict(losses={"cosine": 1.0, "contrastive": 1.0}, negatives=("a photo",), near=4, exchange=GROUPS)
    return referees.load_referee(config.RefereeSpec(name="align", checkpoint=str(directory), **spec | changes))


def texts(judge, prompt):
    return [prompt, *(n for n in judge.spec.negatives if n != prompt), *prompts.hard_negatives(prompt, GROUPS)[:4]]


def views(size=SIDE, count=3):
    """Noise of different colours: grey noise is all the same after the tower's mean over the image."""
    rng = np.random.default_rng(0)
    return (rng.uniform(size=(count, 1, 1, 3)) * rng.uniform(size=(count, size, size, 3))).astype(np.float32)


def oracle(judge, shown: np.ndarray, prompt: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Losses `[V]` and d(their mean)/d(views) by torch; each text is read alone, without padding."""
    network = transformers.AlignModel.from_pretrained(judge.spec.checkpoint).eval()
    x = torch.from_numpy(shown).requires_grad_()
    pixels = (x * 255 / 127.5 - 1).permute(0, 3, 1, 2)
    rows = [torch.tensor(judge.tokenizer(text)["input_ids"])[None] for text in texts(judge, prompt)]
    logits = torch.cat([network(input_ids=ids, pixel_values=pixels).logits_per_image for ids in rows], dim=1)
    losses = {"cosine": 1 - logits[:, 0] * network.temperature, "contrastive": -logits.log_softmax(1)[:, 0]}
    gradients = {k: torch.autograd.grad(v.mean(), x, retain_graph=True)[0].numpy() for k, v in losses.items()}
    return {name: value.detach().numpy() for name, value in losses.items()}, gradients


# One program for all texts and views of one shape.
encode = jax.jit(lambda referee, tokens: referee.encode(tokens))


@jax.jit
def losses_and_gradients(referee, text, shown):
    losses, pullback = jax.vjp(lambda v: referee.views_losses(v, text), shown)
    share = jnp.full(len(shown), 1 / len(shown))
    return losses, {k: pullback({n: (n == k) * share for n in losses})[0] for k in losses}


@pytest.mark.parametrize(("prompt", "size"), [(PROMPT, 0), ("a photo", 0), (PROMPT, 46)])
def test_losses(directory, prompt, size):
    judge = load(directory, image_size=size)
    assert judge.referee.image_size == (size or SIDE)
    shown = views(judge.referee.image_size)
    tokens = judge.tokenize(prompt)
    # "a photo" is its own only negative, and has no words to exchange: nothing is left to tell it from.
    assert tokens["real"].sum() == len(texts(judge, prompt)) == (6 if "red" in prompt else 1)
    wanted, gradients = oracle(judge, shown, prompt)
    made, ours = losses_and_gradients(judge.referee, encode(judge.referee, tokens), jnp.asarray(shown))
    assert set(made) == set(judge.referee.losses) == set(wanted)
    for name in wanted:
        np.testing.assert_allclose(made[name], wanted[name], atol=2e-5)
        if len(texts(judge, prompt)) > 1 or name == "cosine":
            print(name, relative_l2(ours[name], gradients[name]))
            assert relative_l2(ours[name], gradients[name]) < 1e-4
            assert np.ptp(wanted[name]) > 0.01
    # The text is seen.
    other = losses_and_gradients(judge.referee, encode(judge.referee, judge.tokenize("a green square")), shown)[0]
    assert np.abs(other["cosine"] - made["cosine"]).max() > 0.01


def test_tokens(directory):
    judge = load(directory)
    tokens = judge.tokenize(PROMPT)
    assert tokens["input_ids"].shape == tokens["mask"].shape == (6, align.TOKENS)
    rows = judge.tokenizer(texts(judge, PROMPT), padding="max_length", max_length=64)
    np.testing.assert_array_equal(tokens["input_ids"], rows["input_ids"])
    np.testing.assert_array_equal(tokens["mask"], np.array(rows["attention_mask"], bool))
    assert tokens["mask"].sum(-1).tolist() == [9, 4, 9, 9, 5, 5]
    with pytest.raises(prompts.PromptError, match="red .*': 66 tokens, align reads 64"):
        judge.tokenize("red " * 64)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """The same network with the published sizes: what the processor rounds is lost in the mean over so many pixels."""
    return networks.save_align(networks.align(), tmp_path_factory.mktemp("larger"), side=289, resized=346)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 407), (346, 346)])
def test_scores(larger, height, width):
    """The same as of torch's class behind the published kind of processor, which resizes with PIL, in 8 bits."""
    judge = load(larger)
    pixels = np.round(255 * picture(1, height, width)).astype(np.uint8)
    image, text = jnp.asarray(pixels / np.float32(255)), encode(judge.referee, judge.tokenize(PROMPT))
    score = jax.jit(lambda r, i, t: r.scores(r.fit(i), t))
    scores = score(judge.referee, image, text)

    processor = transformers.AlignProcessor(networks.align_processor(289, 346), judge.tokenizer)
    read = processor(images=PIL.Image.fromarray(pixels), text=texts(judge, PROMPT), return_tensors="pt")
    assert read["pixel_values"].shape == (1, 3, 289, 289) and read["input_ids"].shape == (6, 64)
    theirs = transformers.AlignModel.from_pretrained(larger).eval()(**read)
    wanted = {
        "cosine": (theirs.image_embeds @ theirs.text_embeds.T)[0, 0].item(),
        "probability": theirs.logits_per_image.softmax(1)[0, 0].item(),
    }
    assert scores.keys() == wanted.keys()
    print({name: float(scores[name]) - wanted[name] for name in wanted}, wanted)
    for name, value in wanted.items():
        assert float(scores[name]) == pytest.approx(value, abs=1e-3)
    assert 0.01 < wanted["probability"] < 0.99
    # Looking at the whole image would not do.
    whole = judge.referee.replace(fitting=dataclasses.replace(judge.referee.fitting, resized=289))
    assert abs(float(score(whole, image, text)["cosine"]) - wanted["cosine"]) > 2e-3

    # What is looked at is what the processor gives, but for pixels that lie between two of its 255 steps.
    seen = np.asarray(compiled.fit(judge.referee, image))
    steps = np.abs(255 * seen - 127.5 * (read["pixel_values"][0].permute(1, 2, 0).numpy() + 1))
    assert steps.max() < (0.01 if (height, width) == (346, 346) else 1.01)
    assert steps.mean() < 0.02


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rescale_factor": 1 / 255, "rescale_offset": False, "do_normalize": True, "include_top": True},
        {"rescale_offset": True, "do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
    ],
    ids=["published", "EfficientNet", "other"],
)
def test_mean_and_std_are_the_processors(directory, changes):
    processor = networks.align_processor(do_resize=False, **changes)
    pixels = np.round(255 * picture(2, SIDE, SIDE)).astype(np.uint8)
    wanted = processor(PIL.Image.fromarray(pixels), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    settings = networks.align_processor(**changes).to_dict()
    referee = align.from_checkpoint(load(directory).referee.network, settings)
    np.testing.assert_allclose((pixels / 255 - referee.mean) / referee.std, wanted, atol=1e-5)
    if not changes:
        np.testing.assert_allclose((*referee.mean, *referee.std), 0.5, rtol=1e-12)


def test_sizes(directory):
    network = load(directory).referee.network
    settings = networks.align_processor(289, 346).to_dict()
    sizes = lambda **how: (lambda r: (r.image_size, r.fitting.at(r.image_size).resized))(
        align.from_checkpoint(network, **how)
    )
    assert sizes(preprocessing=settings) == (289, 346)
    assert sizes(preprocessing=settings, image_size=578) == (578, 692)
    assert sizes(preprocessing=settings | {"do_center_crop": False}) == (346, 346)
    for name, size, message in (
        ("crop_size", {"height": 350, "width": 350}, "crop_size=350 is more than size=346"),
        ("size", {"shortest_edge": 346}, "size={'shortest_edge': 346} is not implemented; supported: height = width"),
        ("size", {"height": 300, "width": 346}, "is not implemented; supported: height = width"),
    ):
        with pytest.raises(ValueError, match=message):
            sizes(preprocessing=settings | {name: size})


def test_under_jit_vmap_grad_and_scan(directory):
    """Two prompts by vmap, two steps down the gradient by scan, the text encoded once: the same as one by one."""
    judge = load(directory)
    tokens = [judge.tokenize(p) for p in (PROMPT, "a green square")]
    images = jnp.asarray(views(count=4).reshape(2, 2, SIDE, SIDE, 3))

    def descend(referee, tokens, images):
        text = referee.encode(tokens)
        total = lambda x: sum(v.mean() for v in referee.views_losses(x, text).values())

        def step(x, _):
            loss, gradient = jax.value_and_grad(total)(x)
            return x - 0.05 * gradient / jnp.linalg.norm(gradient), loss

        return jax.lax.scan(step, images, length=2)

    together = jax.tree.map(lambda *x: jnp.stack(x), *tokens)
    x, losses = jax.jit(jax.vmap(descend, in_axes=(None, 0, 0)))(judge.referee, together, images)
    assert losses.shape == (2, 2) and np.isfinite(losses).all()
    alone = jax.jit(descend)
    for n in range(2):
        x_n, losses_n = alone(judge.referee, jax.tree.map(jnp.asarray, tokens[n]), images[n])
        np.testing.assert_allclose(losses[n], losses_n, rtol=1e-4)
        assert relative_l2(x[n] - images[n], x_n - images[n]) < 1e-3
    assert (losses[:, 1] < losses[:, 0]).all()


def test_what_encode_gives_is_all_that_is_read_of_the_text(directory):
    """Losses take unit features: nothing of the text tower is left in the program of a step."""
    judge = load(directory)
    text = jax.eval_shape(lambda r, t: r.encode(t), judge.referee, judge.tokenize(PROMPT))
    assert {name: (x.shape, x.dtype) for name, x in text.items()} == {
        "features": ((6, 24), jnp.float32),
        "real": ((6,), bool),
    }
    step = jax.make_jaxpr(lambda r, t, v: r.views_losses(v, t))
    program = step(judge.referee, text, jnp.zeros((1, SIDE, SIDE, 3)))
    read = {x for equation in program.eqns for x in equation.invars if not hasattr(x, "val")}
    leaves = jax.tree_util.tree_flatten_with_path(judge.referee)[0]
    for (path, _), argument in zip(leaves, program.jaxpr.invars, strict=False):
        assert ("text" in jax.tree_util.keystr(path)) == (argument not in read)


def test_settings(directory):
    with pytest.raises(ValueError, match="referee align: no loss itm; there are cosine, contrastive"):
        load(directory, losses={"itm": 1.0})
    spec = {"name": "align", "checkpoint": "kakaobrain/align-base", "losses": {"contrastive": 1.0}, "near": 2}
    assert config.from_config({"referees": (spec,)}).referees[0].near == 2
