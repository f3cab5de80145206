"""The engine with real networks, tiny ones; what does not depend on networks is in test_inverter.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax import config, prompts, referees
from referee_jax import items as items_lib
from referee_jax.engine import inverter as inverter_lib
from referee_jax.engine import parallel
from referee_jax.engine import texts as texts_lib
from referee_jax.performance import ahead_of_time, cost, flops, hlo
from tests import tiny
from tests.conftest import relative_l2
from tests.engine import transformations
from tests.oracles import networks

# XLA tiles a batch of 8 otherwise than one of 1, and sums of floats depend on their order; the steps below are gentle
# enough that such differences (1e-7 at first) do not grow past this in 6 iterations.
TOLERANCE = 2e-5


def settings(checkpoints, **changes) -> config.Settings:
    """Of one augmentation, for a third less to compile: toys have all."""
    return tiny.settings(checkpoints, views={"count": 3, "keep": 2, "augmentations": ("Af",)}, **changes)


def build(checkpoints, devices: int = 1, **changes) -> inverter_lib.Inverter:
    return inverter_lib.Inverter.from_config(settings(checkpoints, **changes), jax.devices()[:devices])


@pytest.fixture(scope="module")
def inverter(checkpoints):
    return build(checkpoints)


@pytest.fixture(scope="module")
def straight(inverter):
    """All eight prompts in one batch on one device."""
    return inverter(tiny.PROMPTS, seed=3)


def test_result(inverter, straight):
    assert straight.images.shape == (8, 32, 32, 3) and straight.latents.shape == (8, 8, 8, 4)
    assert 0 <= straight.images.min() and straight.images.max() <= 1
    assert straight.history["loss"].shape == (8, 6)
    # The referees act in iterations 0 to 4.
    assert np.isfinite(straight.history["loss"][:, :5]).all() and np.isnan(straight.history["loss"][:, 5]).all()
    assert set(straight.scores[0]) == {"referee_0/cosine", "referee_0/probability"}
    # Different prompts and different samples make different pictures.
    flat = straight.latents.reshape(8, -1)
    assert min(relative_l2(flat[i], flat[j]) for i in range(8) for j in range(i)) > 0.5


def test_flops_are_those_of_the_estimate(inverter):
    """Which knows the networks' sizes alone."""
    each = cost.step_flops(inverter, inverter.begin(items_lib.expand(tiny.PROMPTS, 1), 0))
    assert each > 1e6
    assert cost.estimate(inverter.settings).step == pytest.approx(each, rel=1e-6)


def test_shapes_alone_make_the_same_program(checkpoints, inverter):
    """What is traced without weights is, to the letter, what is traced of real ones."""
    unloaded = ahead_of_time.unloaded(settings(checkpoints), jax.devices()[:1])
    batch = unloaded.shapes()
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((unloaded.networks, batch.state)))
    real = inverter.trace(inverter.begin(items_lib.expand(tiny.PROMPTS, 1), 0))
    assert str(unloaded.trace(batch).jaxpr) == str(real.jaxpr)
    assert cost.step_flops(unloaded, batch) > 1e6


def chunk_text(engine) -> str:
    batch = engine.begin(items_lib.expand(tiny.PROMPTS, 1), 0)
    args = engine.networks, batch.prompt, batch.hyper, batch.state, batch.keys, jnp.int32(0)
    return engine._programs("step", referees_active=True).lower(*args).compile().as_text()


@pytest.fixture(scope="module")
def spread(checkpoints):
    """One item on each of eight devices."""
    return build(checkpoints, devices=8, batch_size=1)


def test_devices(spread, straight):
    """Eight devices with one prompt each, by shard_map: without a word between them."""
    assert spread.batch_size == 8
    result = spread(tiny.PROMPTS, seed=3)
    assert relative_l2(result.latents, straight.latents) < TOLERANCE
    text = chunk_text(spread)
    assert "fusion" in text  # it is the program
    assert hlo.collectives(text) == []


def test_weights_split_within_groups(checkpoints, straight, monkeypatch):
    """Four groups of two devices: each holds half of the large weights, and speaks to its neighbour alone."""
    monkeypatch.setattr(parallel, "LARGE", 256)
    split = build(checkpoints, devices=8, batch_size=2, mesh={"model": 2})
    assert split.batch_size == 8
    weights = jax.tree.leaves(split.networks)
    held, whole = sum(x.addressable_shards[0].data.size for x in weights), sum(x.size for x in weights)
    assert 0.5 <= held / whole < 0.6
    assert relative_l2(split(tiny.PROMPTS, seed=3).latents, straight.latents) < TOLERANCE
    found = hlo.exchanging(chunk_text(split))
    assert found and all(a // 2 == b // 2 for a, b in found)


def test_transformations(inverter):
    transformations.check(inverter, tiny.PROMPTS, TOLERANCE)


def test_rows_with_numbers_of_their_own_share_the_weights(inverter):
    """What differs from row to row must not give each a copy of the networks: no convolution or product has groups for it."""
    items = items_lib.expand(tiny.PROMPTS[:1], 1) * 3
    shapes = []
    for hypers in (None, [inverter.hyper] * 3):
        batch = inverter.begin(items, 0, hypers=hypers)
        step = inverter._programs("step", hypers is not None, referees_active=True)
        traced = step.trace(inverter.networks, batch.prompt, batch.hyper, batch.state, batch.keys, np.int32(0))
        shapes.append(sorted(weights(traced.jaxpr.jaxpr)))
    assert shapes[0] == shapes[1] and len(shapes[0]) > 20


def weights(jaxpr):
    """The shapes of all that images are convolved with, and groups."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn.invars[1].aval.shape, eqn.params["feature_group_count"], eqn.params["batch_group_count"]
        for inner in flops._inner(eqn.params):
            yield from weights(inner)


def test_a_prompt_is_counted_as_each_referee_reads_it(inverter, tmp_path, monkeypatch):
    networks.save_blip2(tmp_path, lm_head=False)
    judge = referees.load_referee(config.RefereeSpec(name="blip2", checkpoint=str(tmp_path), losses={"itm": 1.0}))
    texts = inverter.texts
    monkeypatch.setattr(
        inverter, "texts", texts_lib.Texts(texts.settings, texts.tokenizers, texts.judges, held_out=[judge])
    )
    quoted = '"red" ' * 11
    assert prompts.token_count(judge.tokenizer, quoted) == 35  # but marks are not read
    assert judge.read(quoted)["attention_mask"].sum() == 13 and inverter.check(quoted) is None
    assert inverter.check("red " * 30) is None
    assert inverter.check("red " * 31) == "33 tokens, blip2 reads 32"
    assert inverter.check("(...)") == "nothing in it that blip2 reads"
