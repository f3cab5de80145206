"""The gradient of one referee in several passes over its views, and its loss of a picture as it is."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax import config
from referee_jax.engine import builders, peak_memory
from referee_jax.method import inversion, objective, views
from referee_jax.method import state as state_lib
from referee_jax.storage import images
from tests.tools import hlo_surprises

SIZE, NAMES = 16, ("Ji", "Er")


class Referee:
    """Two losses of a view that is compared with a text."""

    image_size = SIZE

    def views_losses(self, views, text):
        far = jnp.square(views - text).mean((1, 2, 3))
        return {"far": far, "curved": jnp.sin(3 * views.mean((1, 2, 3)) + far)}


def looks(count, keep, passes=1):
    return objective.ViewPlan(losses=("curved", "far"), count=count, keep=keep, augmentations=NAMES, passes=passes)


def given_views(count, keep):
    """An image, a text, parameters and noise."""
    image, text, noise = np.random.default_rng(0).uniform(size=(3, 24, 24, 3)).astype(np.float32)
    sample = functools.partial(views.sample, names=NAMES, count=count, size=SIZE)
    params = jax.jit(sample)(jax.random.key(3), views.Settings())
    return image, text[:SIZE, :SIZE], params, np.stack([n * noise[:SIZE, :SIZE] for n in range(keep)])


def gradient(looks, image, text, params, noise):
    weights = objective.Weights((0.5, 2.0))
    return objective.image_gradient(Referee(), image, text, looks, weights, params=params, noise=noise)


@pytest.mark.parametrize(("count", "keep", "passes"), [(4, 4, 2), (5, 5, 3), (4, 3, 2)])
def test_passes_change_nothing(count, keep, passes):
    """Nor do views that fill up the last pass, if there are such; the losses are those of views one by one."""
    args = given_views(count, keep)
    one, told = jax.jit(gradient, static_argnums=0)(looks(count, keep), *args)
    several, losses = jax.jit(gradient, static_argnums=0)(looks(count, keep, passes), *args)
    np.testing.assert_allclose(several, one, atol=1e-5 * float(abs(one).max()))
    assert losses.keys() == told.keys() == {"curved", "far", "loss"}
    for name, value in told.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=1e-4)
    assert float(told["loss"]) == pytest.approx(0.5 * float(told["curved"]) + 2 * float(told["far"]), rel=1e-6)
    image, text, params, noise = args
    losses_of = jax.jit(
        lambda params, noise: Referee().views_losses(views.apply(image, params, size=SIZE, names=NAMES) + noise, text)
    )
    each = losses_of(params, 0.0)
    hardest = np.argsort(-(0.5 * each["curved"] + 2 * each["far"]))[:keep] if keep < count else slice(None)
    kept = jax.tree.map(lambda x: np.asarray(x)[hardest], params)
    assert float(losses["far"]) == pytest.approx(float(losses_of(kept, noise)["far"].mean()), rel=1e-4)


def test_views_as_the_authors_make_them():
    """Their loss and gradient are those of the clean view, and its corner is all that has one."""
    image, text, _, noise = given_views(1, 1)
    referee, weights = Referee(), objective.Weights((0.5, 2.0))
    referee.fit = lambda image: image[:SIZE, :SIZE]
    plan = objective.ViewPlan(losses=("curved", "far"), count=1, keep=1, augmentations=(), is_fitted=True)
    params = {"noise": jnp.zeros((1, SIZE, SIZE, 3))}
    told = lambda image: objective.image_gradient(
        referee, image, text, plan, weights, params=params, noise=jnp.zeros_like(noise)
    )
    gradient, losses = jax.jit(told)(image)
    clean, expected = jax.jit(
        jax.value_and_grad(lambda image: objective.clean_loss(referee, image, text, plan, weights))
    )(image)
    assert float(losses["loss"]) == pytest.approx(float(clean), rel=1e-6)
    np.testing.assert_allclose(gradient, expected, atol=1e-8)
    assert not gradient[SIZE:].any() and gradient[:SIZE, :SIZE].any()


def test_memory_is_that_of_one_pass():
    needed = {}
    for passes in (1, 8):
        fn = lambda *args: gradient(looks(16, 16, passes), *args)  # noqa: B023, E731
        needed[passes] = peak_memory.peak(jax.make_jaxpr(fn)(*given_views(16, 16)).jaxpr)
    assert needed[8] < 0.4 * needed[1]


@pytest.mark.parametrize("is_dense", [False, True])
def test_where_products_are_quicker_nothing_is_gathered(is_dense):
    """Views of the paper's sizes, and their gradient."""

    def pulled(image, key):
        params = views.sample(key, views.Settings(), count=2, size=224)
        shown, pullback = jax.vjp(lambda image: views.apply(image, params, size=224, dense=is_dense), image)
        return pullback(shown)[0]

    lowered = jax.jit(pulled).lower(jax.ShapeDtypeStruct((512, 512, 3), "float32"), jax.random.key(0))
    found = {x.kind for x in hlo_surprises.surprises(lowered.as_text("hlo"))}
    assert ({"gather", "scatter"} & found == set()) == is_dense


def test_passes():
    """As few as the memory allows; a few more where none is then filled up."""
    assert [builders.make_passes(10, most) for most in (0, 10, 9, 5, 4, 3, 1)] == [1, 1, 2, 2, 5, 5, 10]
    assert builders.make_passes(11, 7) == 2 and builders.make_passes(7, 9) == 1
    settings = config.override(config.Settings(), {"views.per_pass": 4})
    assert builders.make_view_plan(settings, config.RefereeSpec(views=8)).passes == 2


def test_passes_are_not_of_the_image():
    settings = config.Settings()
    other = config.override(settings, {"views.per_pass": 2})
    assert other.views.per_pass == 2 and config.fingerprint(other) == config.fingerprint(settings)


def test_what_is_judged_is_what_is_saved():
    """Steps of 1/255, for the referees and for the held-out ones; and as the referee fits an image, not as views are made."""
    referee = types.SimpleNamespace(
        fit=lambda image: image[:2, :2], views_losses=lambda views, text: {"red": text * views[..., 0].sum((1, 2))}
    )
    view_plan = objective.ViewPlan(losses=("red",), count=1, keep=1, augmentations=())
    plan = state_lib.Plan(latent=(1, 1, 4), views=(view_plan,), held_out=(view_plan,))
    networks = state_lib.Networks(prior=None, vae=None, referees=(referee,), held_out=(referee,))
    prompt = state_lib.Prompt(cond=None, uncond=None, texts=(1.0,), held_out=(2.0,))
    weights = (objective.Weights((0.5,)),)
    hyper = state_lib.Hyperparameters(weights=weights, held_out=weights)
    image = np.random.default_rng(0).uniform(size=(3, 3, 3)).astype(np.float32)
    saved = (images.to_uint8(image) / np.float32(255))[:2, :2, 0].sum()
    made = inversion.clean_losses(networks, prompt, hyper, plan, jnp.asarray(image))
    np.testing.assert_allclose(made, [0.5 * saved, saved, 0.5 * saved], rtol=1e-6)
    two = view_plan.replace(has_gradient=False)
    plan = plan.replace(views=(view_plan, two))
    networks, prompt = networks.replace(referees=(referee,) * 2), prompt.replace(texts=(1.0, 3.0))
    made = inversion.clean_losses(networks, prompt, hyper.replace(weights=weights * 2), plan, jnp.asarray(image))
    np.testing.assert_allclose(made, [0.5 * saved, saved, 2 * saved], rtol=1e-6)  # the second one chooses alone
    assert abs(saved - image[:2, :2, 0].sum()) > 1e-4
