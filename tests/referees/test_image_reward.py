"""ImageReward as a referee: its loss and gradient against torch, its tokens, and how it cuts images."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from referee_jax import config, referees
from referee_jax.referees import resizing
from tests.conftest import picture, relative_l2
from tests.lazy import torch
from tests.models import test_image_reward
from tests.oracles import networks
from tests.referees import compiled

PROMPT = "a red circle and a blue square"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """The directory, the trunk and the linear layers."""
    path = tmp_path_factory.mktemp("image_reward")
    return path, *networks.save_image_reward(path)


def load(path, dtype=jnp.float32, **changes):
    spec = config.RefereeSpec(name="image_reward", checkpoint=str(path), losses={"reward": 1.0}, **changes)
    return referees.load_referee(spec, dtype=dtype)


def views(count=3, size=32):
    return jnp.asarray(np.random.default_rng(0).uniform(size=(count, size, size, 3)).astype(np.float32))


@jax.jit
def losses_and_gradient(referee, views, text):
    def total(views):
        losses = referee.views_losses(views, text)["reward"]
        return losses.mean(), losses

    (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(views)
    return losses, gradient


def test_loss(oracle):
    path, trunk, mlp = oracle
    judge = load(path)
    assert judge.referee.losses == ("reward",) and judge.referee.image_size == 32
    tokens, shown = judge.tokenize(PROMPT), views()
    made, gradient = losses_and_gradient(judge.referee, shown, compiled.encode(judge.referee, tokens))
    x = torch.from_numpy(np.array(shown)).requires_grad_()
    pixels = ((x - torch.tensor(networks.CLIP_MEAN)) / torch.tensor(networks.CLIP_STD)).permute(0, 3, 1, 2)
    ids = np.array(judge.tokenizer(PROMPT)["input_ids"], np.int32)[None].repeat(3, 0)  # not padded, [CLS] first
    assert ids[0, 0] == networks.BLIP_WORDS.index("[CLS]")
    wanted = -test_image_reward.theirs(trunk, mlp, pixels, ids, ids > 0)
    np.testing.assert_allclose(made, wanted.detach(), rtol=1e-4, atol=2e-5)
    theirs = torch.autograd.grad(wanted.mean(), x)[0]
    print(relative_l2(made, wanted.detach()), relative_l2(gradient, theirs))
    assert relative_l2(gradient, theirs) < 1e-4
    assert np.ptp(wanted.detach()) > 0.1
    other = losses_and_gradient(judge.referee, shown, judge.tokenize("a green photo"))[0]
    assert np.abs(other - made).min() > 0.1


def test_tokens(oracle):
    judge = load(oracle[0])
    tokens = judge.tokenize(PROMPT)
    assert tokens["input_ids"].shape == (35,) and tokens["input_ids"].dtype == np.int32
    assert tokens["mask"].tolist() == [True] * 9 + [False] * 26


def test_score(oracle):
    """Of the middle of a wide image, made smaller as PIL makes it."""
    judge = load(oracle[0])
    text = compiled.encode(judge.referee, judge.tokenize(PROMPT))
    score = jax.jit(lambda referee, image: referee.scores(referee.fit(image), text))
    image = views(1)[0]
    scores = score(judge.referee, image)
    assert scores.keys() == {"reward"}
    loss = losses_and_gradient(judge.referee, image[None], text)[0][0]
    assert float(scores["reward"]) == pytest.approx(-float(loss), abs=1e-5)
    wide = jnp.asarray(picture(height=48, width=80))
    middle = score(judge.referee, compiled.fit(judge.referee, wide))
    assert float(score(judge.referee, wide)["reward"]) == pytest.approx(float(middle["reward"]), abs=1e-5)
    assert abs(float(score(judge.referee, wide[:, :48])["reward"]) - float(middle["reward"])) > 1e-3


@pytest.mark.parametrize(
    ("size", "contrast"),
    [((48, 80), 1), ((32, 45), 1), ((32, 32), 1), ((81, 33), 0.5), ((20, 16), 0.5)],
)
def test_crop_is_that_of_pil(size, contrast):
    """Resize(32, bicubic) and CenterCrop(32) of torchvision, in steps of 1/255 on PIL's side.

    In tall images some versions of PIL take columns before rows, which is seen where a pixel is clamped between the two:
    here these have too little contrast for that.
    """
    height, width = size
    pixels = ((0.5 + contrast * (picture(height=height, width=width) - 0.5)) * 255).round().astype(np.uint8)
    short = min(size)
    wanted = PIL.Image.fromarray(pixels).resize((32 * width // short, 32 * height // short), PIL.Image.BICUBIC)
    top, left = (int(round((x - 32) / 2.0)) for x in (wanted.height, wanted.width))
    wanted = np.asarray(wanted)[top : top + 32, left : left + 32] / 255
    crop = resizing.Fitting(side=32, resized=32, shape="rounded")
    made = jax.jit(crop)(jnp.asarray(pixels / 255, jnp.float32))
    assert made.shape == (32, 32, 3)
    np.testing.assert_allclose(made, wanted, atol=1.5 / 255)
    assert 0 <= float(made.min()) and float(made.max()) <= 1


def test_other_image_size(oracle):
    judge = load(oracle[0], image_size=48)
    assert judge.referee.image_size == 48
    text = judge.tokenize(PROMPT)
    large, small = (losses_and_gradient(judge.referee, views(2, size), text)[0] for size in (48, 32))
    assert np.isfinite(large).all() and np.abs(large - small).min() > 1e-3


def test_under_jit_vmap_grad_and_scan(oracle):
    """Two prompts by vmap, two steps down the gradient by scan, as one program: the same as one by one."""
    judge = load(oracle[0])
    tokens = [judge.tokenize(prompt) for prompt in (PROMPT, "a green square")]
    start = views(4).reshape(2, 2, 32, 32, 3)

    def descend(referee, tokens, x):
        text = referee.encode(tokens)

        def step(x, _):
            loss, gradient = jax.value_and_grad(lambda x: referee.views_losses(x, text)["reward"].mean())(x)
            return x - 0.05 * gradient / jnp.linalg.norm(gradient), loss

        return jax.lax.scan(step, x, length=2)

    together = jax.tree.map(lambda *x: jnp.stack(x), *tokens)
    x, losses = jax.jit(jax.vmap(descend, in_axes=(None, 0, 0)))(judge.referee, together, start)
    alone = jax.jit(descend)
    for n in range(2):
        x_n, losses_n = alone(judge.referee, jax.tree.map(jnp.asarray, tokens[n]), start[n])
        np.testing.assert_allclose(losses[n], losses_n, rtol=1e-4, atol=1e-5)
        assert relative_l2(x[n] - start[n], x_n - start[n]) < 1e-3
    assert (losses[:, 1] < losses[:, 0]).all()


def test_losses_that_it_does_not_know(oracle):
    spec = config.RefereeSpec(name="image_reward", checkpoint=str(oracle[0]), losses={"itm": 1.0})
    with pytest.raises(ValueError, match="referee image_reward: no loss itm; there are reward"):
        referees.load_referee(spec)
