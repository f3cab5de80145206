"""What a batch of views promises, whatever the augmentations: order, chance, independence, gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from referee_jax.method import augmentations, views
from tests.conftest import VIEW_SIZE as SIZE
from tests.conftest import picture

ALL = tuple(views.AUGMENTATIONS)
PROBABILITIES = [field for field in views.Settings.__dataclass_fields__ if field.endswith("_p")]
# Compiled as a whole: operation by operation they are hundreds of programs.
sample = jax.jit(views.sample, static_argnames=("names", "count", "size", "shared_erase"))
apply = jax.jit(views.apply, static_argnames=("names", "size"))
pool = jax.jit(views.pool, static_argnames="size")


@pytest.mark.parametrize("names", [(), ALL, ALL[::-1]])
def test_probability_zero_is_the_pooled_image(names):
    never = views.Settings(**dict.fromkeys(PROBABILITIES, 0.0), noise=0.0)
    params = sample(jax.random.key(0), never, names=names, count=3, size=SIZE)
    image = jnp.asarray(picture(height=80, width=70))
    values = apply(image, params, size=SIZE, names=names)
    np.testing.assert_array_equal(values, jnp.broadcast_to(pool(image, size=SIZE), values.shape))


def test_probabilities_are_those_of_one_view():
    params = sample(jax.random.key(0), views.Settings(), names=ALL, count=2000, size=8)
    for name, probability in {"Af": 1.0, "Pe": 0.4, "Ji": 0.5, "Er": 1.0, "Hf": 0.5, "Ro": 0.7}.items():
        assert abs(params[name]["on"].mean() - probability) < 0.04
    assert 0.45 < sample(jax.random.key(1), views.Settings(), count=2000, size=8)["Ji"]["on"].mean() < 0.55


def test_magnitude_zero_is_the_pooled_image():
    """Every default step is on, and does nothing: identity parameters, not a switched-off augmentation."""
    still = views.Settings(
        affine_degrees=0.0, affine_translate=(0.0, 0.0), perspective_distortion=0.0, jitter=(0.0,) * 4
    )
    still = still.replace(perspective_p=1.0, jitter_p=1.0, noise=0.0)
    params = sample(jax.random.key(0), still, names=("Af", "Pe", "Ji"), count=2, size=SIZE)
    image = jnp.asarray(picture(height=80, width=70))
    values = apply(image, params, size=SIZE, names=("Af", "Pe", "Ji"))
    np.testing.assert_allclose(values, jnp.broadcast_to(pool(image, size=SIZE), values.shape), atol=2e-5)


def test_order_of_names_is_the_order_of_steps():
    settings_ = views.Settings(noise=0.0, flip_p=1.0)
    image = jnp.asarray(picture())
    params = sample(jax.random.key(0), settings_, names=("Er", "Hf"), count=2, size=SIZE)
    erased, flipped = (apply(image, params, size=SIZE, names=names) for names in (("Er", "Hf"), ("Hf", "Er")))
    warp = {"warp": augmentations.gather_warp}
    erase, flip = (functools.partial(augmentations.AUGMENTATIONS[name].apply, **warp) for name in ("Er", "Hf"))
    box = {"box": params["Er"]["box"][0]}
    np.testing.assert_array_equal(erased[0], flip(erase(image, box), {}))
    np.testing.assert_array_equal(flipped[0], erase(flip(image, {}), box))
    assert abs(erased - flipped).max() > 0.1


def test_erasing_shared_or_not():
    for shared, different in ((True, 1), (False, 6)):
        params = sample(jax.random.key(0), views.Settings(), count=6, size=SIZE, shared_erase=shared)
        assert len(np.unique(params["Er"]["box"], axis=0)) == different
        assert params["Ji"]["order"].shape == (6, 4) and len(np.unique(params["Ji"]["order"], axis=0)) == 1
        assert sorted(params["Ji"]["order"][0].tolist()) == [0, 1, 2, 3]
        assert len(np.unique(params["Af"]["angle"])) == 6


def test_orders_of_the_jitter_are_all_drawn():
    keys = jax.random.split(jax.random.key(0), 600)
    draw = functools.partial(sample, names=("Ji",), count=2, size=2)
    orders = jax.vmap(lambda key: draw(key, views.Settings())["Ji"]["order"][0])(keys)
    assert len(np.unique(orders, axis=0)) == 24


def test_noise_has_its_own_amplitude_per_view():
    noise = sample(jax.random.key(0), views.Settings(noise=0.2), names=(), count=2000, size=32)["noise"]
    spread = np.asarray(noise.std((1, 2, 3)))
    assert spread.max() < 0.21 and spread.min() < 0.01 and 0.094 < spread.mean() < 0.106
    image = jnp.asarray(picture(height=32, width=32))
    values = apply(image, {"noise": noise}, size=32, names=())
    np.testing.assert_allclose(values - image, noise, atol=1e-6)  # and nothing is clamped
    assert values.max() > 1.2 and values.min() < -0.2


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), other=st.integers(0, 4))
def test_views_are_independent_of_one_another(seed, other):
    """Changing one view's parameters, or dropping it, leaves every other view as it was, bit for bit."""
    image = jnp.asarray(picture())
    params = sample(jax.random.key(seed), views.Settings(), count=5, size=SIZE)
    run = functools.partial(apply, size=SIZE)
    changed = params | {"Af": params["Af"] | {"angle": params["Af"]["angle"].at[other].add(9.0)}}
    before, after = run(image, params), run(image, changed)
    kept = np.arange(5) != other
    np.testing.assert_array_equal(before[kept], after[kept])
    assert abs(before[other] - after[other]).max() > 0.05
    np.testing.assert_allclose(run(image, views.take(params, np.flatnonzero(kept))), before[kept], atol=1e-6)


def test_draws_depend_neither_on_count_nor_on_the_other_names():
    few = sample(jax.random.key(5), views.Settings(), count=3, size=SIZE)
    many = sample(jax.random.key(5), views.Settings(), names=ALL, count=7, size=SIZE)
    for name in views.DEFAULT:
        for leaf, value in few[name].items():
            np.testing.assert_array_equal(value, many[name][leaf][:3])
    np.testing.assert_array_equal(few["noise"], many["noise"][:3])


def test_vmap_over_prompts_is_one_prompt_at_a_time():
    """Prompts have their own orders of the jitter, so nothing may leak through the shared leaf."""
    keys = jax.random.split(jax.random.key(2), 4)
    images = jnp.stack([jnp.asarray(picture(seed)) for seed in range(4)])

    def one(key, image):
        params = sample(key, views.Settings(jitter_p=1.0), count=3, size=SIZE)
        return apply(image, params, size=SIZE), params["Ji"]["order"]

    together, orders = jax.jit(jax.vmap(one))(keys, images)
    assert len(np.unique(orders, axis=0)) > 1
    for i in range(4):
        np.testing.assert_allclose(together[i], jax.jit(one)(keys[i], images[i])[0], atol=1e-6)


def test_traced_magnitudes_do_not_recompile():
    traces = []

    @functools.partial(jax.jit, static_argnames=("names", "count"))
    def run(key, image, settings, *, names, count):
        traces.append(names)
        params = sample(key, settings, names=names, count=count, size=SIZE)
        return apply(image, params, size=SIZE, names=names)

    image, key = jnp.asarray(picture()), jax.random.key(0)
    changes = [{}, {"affine_degrees": 5.0}, {"erase_area": (0.2, 0.3), "jitter": (0.3, 0.3, 0.3, 0.2)}, {"noise": 0.4}]
    outputs = [run(key, image, views.Settings(**change), names=views.DEFAULT, count=2) for change in changes]
    assert run._cache_size() == len(traces) == 1
    assert all(abs(outputs[0] - other).max() > 0.05 for other in outputs[1:])
    run(key, image, views.Settings(), names=("Af",), count=2)
    assert run._cache_size() == len(traces) == 2


def test_work_of_an_unnamed_augmentation_is_not_done():
    def gathers(names):
        params = sample(jax.random.key(0), views.Settings(), names=names, count=2, size=SIZE)
        run = jax.jit(functools.partial(apply, size=SIZE, names=names))
        text = run.lower(jnp.zeros((SIZE, SIZE, 3)), params).as_text()
        return len(re.findall(r"slice_sizes = array<i64: (?:1, )*12>", text))

    assert [gathers(names) for names in ((), ("Ji", "Er"), ("Af",), ("Af", "Pe"))] == [0, 0, 1, 2]


def test_gradient_is_finite_through_everything():
    """Also at a black, a white and a grey image, where hue and clamps have their corners."""
    params = sample(
        jax.random.key(1), views.Settings(**dict.fromkeys(PROBABILITIES, 1.0)), names=ALL, count=4, size=SIZE
    )
    weights = jax.random.normal(jax.random.key(2), params["noise"].shape)
    gradient = jax.jit(jax.grad(lambda x: (weights * apply(x, params, size=SIZE, names=ALL)).sum()))
    for image in (picture(), np.zeros((SIZE, SIZE, 3)), np.ones((SIZE, SIZE, 3)), np.full((SIZE, SIZE, 3), 0.5)):
        value = gradient(jnp.asarray(image, jnp.float32))
        assert bool(jnp.isfinite(value).all())
        assert abs(value).max() > 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12), st.data())
def test_hardest(losses, data):
    keep = data.draw(st.integers(1, len(losses)))
    index = np.asarray(views.hardest(jnp.asarray(losses, jnp.float32), keep))
    assert len(set(index.tolist())) == keep
    np.testing.assert_array_equal(
        np.asarray(losses, np.float32)[index], np.sort(np.asarray(losses, np.float32))[::-1][:keep]
    )


@pytest.mark.parametrize(("names", "message"), [(("Af", "Zz"), "Zz"), (("Af", "Af"), "twice")])
def test_impossible_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        sample(jax.random.key(0), views.Settings(), names=names, count=1, size=SIZE)


def test_parameters_of_other_names_are_refused():
    params = sample(jax.random.key(0), views.Settings(), names=("Af",), count=1, size=SIZE)
    with pytest.raises(ValueError, match="Er"):
        apply(jnp.zeros((SIZE, SIZE, 3)), params, size=SIZE, names=("Af", "Er"))
