"""Several referees at once, and those that only watch: gradients that add up, shares, looks, stopping, reward hacking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax import config, items
from referee_jax.engine import inverter
from referee_jax.method import held_out, inversion, objective
from tests import tiny, toys
from tests.conftest import relative_l2

PROMPTS = ("a red circle and a blue square", "a green square", "a photo")


# Two referees of different sizes: the one in CLIP's place reads 32 pixels, the other 24.
SPECS = {
    "clip": {"name": "clip", "losses": {"cosine": 0.5}, "weight": 2.0, "views": 4, "keep": 1},
    "blip2": {"name": "blip2", "losses": {"itm": 1.0, "itg": 0.25}, "weight": 0.5, "views": 2},
}


def build(specs, **changes) -> inverter.Inverter:
    values = {
        "steps": 8, "chunk": 3, "batch_size": 3, "referees": tuple(specs), "sds": {"weight_steps": 8},
        "referee": {"stop": 8, "balance_epsilon": 0.0}, "look_every": 2, "views": {"keep": 3},
        "ema": {"start": 40, "every": 60},
    }  # fmt: skip
    return toys.engine(tiny.settings(**values | changes), jax.devices()[:1])


@pytest.fixture(scope="module")
def mixed():
    """An engine of two referees, and the arguments of their gradient for the first prompt."""
    engine = build(SPECS.values())
    latents = jax.random.normal(jax.random.key(0), engine.plan.latent)
    noise = inversion.draw(jax.random.key(1), engine.networks, engine.plan, engine.hyper, 0)
    prompt = jax.tree.map(lambda x: x[0], engine.begin(items.expand(PROMPTS[:1], 1), 0).prompt)
    return engine, (engine.networks, prompt, engine.hyper), (latents, noise)


@pytest.fixture(scope="module")
def parts(mixed):
    """Of each referee alone: d(loss)/d(image), the same pulled back to the latents, and its losses."""
    engine, (networks_, prompt, hyper), (latents, noise) = mixed

    @jax.jit
    def each(networks_, prompt, hyper, latents, noise):
        image, pullback = jax.vjp(lambda z: inversion.decode(networks_, z, engine.plan), latents)
        found = []
        for n, looks in enumerate(engine.plan.views):
            gradient, losses = objective.image_gradient(
                networks_.referees[n], image, prompt.texts[n], looks, hyper.weights[n],
                params=noise.views[n], noise=hyper.referee.noise * noise.referee[n],
            )  # fmt: skip
            found.append((gradient, pullback(gradient)[0], losses))
        return found

    return each(networks_, prompt, hyper, latents, noise)


def test_each_referee_looks_in_its_own_way(mixed):
    engine, _, (_, noise) = mixed
    assert [(looks.count, looks.keep) for looks in engine.plan.views] == [(4, 1), (2, 2)]
    assert [x.shape for x in noise.referee] == [(1, 32, 32, 3), (2, 24, 24, 3)]
    assert [looks.losses for looks in engine.plan.views] == [("cosine",), ("itg", "itm")]
    assert [list(map(float, one.losses)) for one in engine.hyper.weights] == [[1.0], [0.125, 0.5]]


@pytest.mark.parametrize("normalise", [False, True])
def test_gradients_add_up(mixed, parts, normalise):
    """One decode for all sizes of views: the gradient of the mix is the sum of those of its parts, so are the losses.

    Normalised, each with respect to the image has first taken the referee's weight as its length.
    """
    engine, arguments, (latents, noise) = mixed
    plan = engine.plan.replace(normalise=normalise)
    together, metrics = jax.jit(inversion.referees_gradient, static_argnums=3)(*arguments, plan, latents, noise)
    scales = [
        share / jnp.linalg.norm(raw) if normalise else 1.0 for share, (raw, *_) in zip((2.0, 0.5), parts, strict=True)
    ]
    wanted = sum(scale * gradient for scale, (_, gradient, _) in zip(scales, parts, strict=True))
    assert relative_l2(together, wanted) < 1e-4
    assert {"referee_0/cosine", "referee_1/itm", "referee_1/itg", "loss"} == set(metrics)
    np.testing.assert_allclose(metrics["loss"], sum(losses["loss"] for *_, losses in parts), rtol=1e-5)
    np.testing.assert_allclose(metrics["referee_1/itm"], parts[1][2]["itm"], rtol=1e-5)


def test_shares_fade_with_the_gradient():
    raw = jnp.asarray([3.0, 4.0])
    for epsilon, length in ((0.0, 3.0), (5.0, 1.5)):
        np.testing.assert_allclose(objective.normalised(raw, 3.0, epsilon), raw * length / 5, rtol=1e-6)
    assert not objective.normalised(jnp.zeros(2), 3.0, 0.0).any()


HELD_OUT = {"name": "blip2", "losses": {"itm": 1.0}, "role": "held_out"}
STEPS = 24


@pytest.fixture(scope="module")
def watched():
    return build([SPECS["clip"], HELD_OUT], steps=STEPS, output="best_held_out")


@pytest.fixture(scope="module")
def history(watched):
    """Held-out losses of all looks, `[prompt, look]`, the one before the first iteration first, and the pictures."""
    batch, losses = watched.begin(items.expand(PROMPTS, 1), 5), []
    losses.append(np.asarray(batch.state.held_out.first)[:, 1:2])
    while batch.step < watched.steps:
        batch, metrics = watched.advance(batch)
        losses.append(metrics["held_out/loss"])
    return np.concatenate(losses, axis=1), watched.finish(batch), np.asarray(batch.state.latents)


def test_a_watcher_changes_nothing(history):
    """The latents are those of a run without a held-out referee."""
    blind = build([SPECS["clip"]], steps=STEPS)
    batch = blind.begin(items.expand(PROMPTS, 1), 5)
    assert batch.state.held_out is None
    while batch.step < blind.steps:
        batch, _ = blind.advance(batch)
    assert relative_l2(batch.state.latents, history[2]) < 1e-6
    assert [picture.losses for picture in blind.finish(batch)] == [None] * 3


CHOOSES = SPECS["blip2"] | {"role": "choose", "weight": 2.0}
FROM_SAMPLES = {"init": "sample", "init_steps": 2, "init_candidates": 4, "particles": 4}


def test_one_that_chooses_is_in_no_gradient():
    """Where there is nothing to choose, the pictures are those without it; it scores them."""
    alone, two = (build(specs, steps=4)(PROMPTS, seed=5) for specs in ([SPECS["clip"]], [SPECS["clip"], CHOOSES]))
    assert relative_l2(two.latents, alone.latents) < 1e-6
    assert two.history.keys() == alone.history.keys()
    np.testing.assert_allclose(two.history["loss"], alone.history["loss"], rtol=1e-5)
    assert {"referee_0/cosine", "referee_1/itm", "referee_1/itg"} <= two.scores[0].keys()


def test_one_that_chooses_has_its_say():
    """Starts are ranked by the sum of its losses and those of the optimised one, which would rank them otherwise."""
    together, clip = build([SPECS["clip"], CHOOSES, HELD_OUT], **FROM_SAMPLES), build([SPECS["clip"]])
    # By itself its losses are those of the optimised referee of an engine; it has the second one's weights here, too.
    other = build([SPECS["clip"] | {"weight": 1e-9}, CHOOSES | {"role": "optimise"}])
    batch = together.begin(items.expand(PROMPTS, 1), 5)
    own = lambda engine: engine.begin(items.expand(PROMPTS, 1), 5)
    losses = {}
    for name, engine, column in (("choice", together, 2), ("clip", clip, 0), ("other", other, 0)):
        begun = batch if engine is together else own(engine)
        rows = [engine._judge(begun.prompt, begun.hyper, x.state.latents)[:, column] for x in batch.particles]
        losses[name] = np.stack(rows)
    np.testing.assert_allclose(losses["choice"], losses["clip"] + losses["other"], rtol=1e-4, atol=1e-6)
    assert (np.diff(losses["choice"], axis=0) >= 0).all()
    assert (np.diff(losses["clip"], axis=0) < 0).any()
    # At the end, too, among the particles; and the pictures say it.
    for picture, best in zip(together.finish(batch), losses["choice"].min(0), strict=True):
        assert picture.losses.keys() == {"referee", "held_out", "choice"}
        np.testing.assert_allclose(picture.losses["choice"], (best, best), rtol=1e-4)


def test_looks(history):
    """Every second iteration the loss of the picture as it is; what is kept at the end is the best of all looks."""
    losses, pictures, latents = history
    assert losses.shape == (3, 1 + STEPS)
    assert np.isnan(losses[:, 1::2]).all() and np.isfinite(losses[:, 0::2]).all()
    kept = []
    for n, picture in enumerate(pictures):
        np.testing.assert_allclose(picture.losses["held_out"], (losses[n, 0], np.nanmin(losses[n])), rtol=1e-4)
        np.testing.assert_allclose(-np.log(picture.scores["held_out_0/itm"]), np.nanmin(losses[n]), rtol=1e-4)
        kept.append(relative_l2(picture.latents, latents[n]) > 1e-3)
    assert any(kept)  # somebody's best was not the last


def test_patience(history):
    """An item stops when so many looks found nothing better, and its neighbours go on; a batch ends with its last item."""
    losses = history[0][:, 0::2]
    patience = 3
    patient = build([SPECS["clip"], HELD_OUT], steps=STEPS, chunk=5, patience=patience)
    batch, looked = patient.begin(items.expand(PROMPTS, 1), 5), []
    while batch.step < patient.steps:
        batch, metrics = patient.advance(batch)
        looked.append(metrics["held_out/loss"])
    looked = np.concatenate(looked, axis=1)
    stops = []
    for n in range(3):
        best, since, stop = losses[n, 0], 0, STEPS // 2
        for look, loss in enumerate(losses[n, 1:], 1):
            best, since = (loss, 0) if loss < best else (best, since + 1)
            if since == patience:
                stop = look
                break
        stops.append(stop)
        np.testing.assert_allclose(looked[n, 1 : 2 * stop : 2], losses[n, 1 : stop + 1], rtol=1e-5)
        assert np.isnan(looked[n, 2 * stop :]).all()
    assert min(stops) < max(stops)  # neighbours do differ
    assert looked.shape[1] == min(STEPS, -(-2 * max(stops) // 5) * 5)
    whole = patient(PROMPTS, seed=5).history["loss"]
    assert whole.shape == (3, STEPS) and np.isnan(whole[np.argmin(stops), 2 * min(stops) :]).all()


def test_reward_hacking():
    doubt = held_out.doubt([{"itm": 2.0}, {"vqa": 0.5}])
    assert doubt == pytest.approx(0.3 * 2.5)
    assert held_out.is_hacked({"referee": (0.5, 0.4), "held_out": (0.9, 0.8)}, doubt)
    assert not held_out.is_hacked({"referee": (0.5, 0.4), "held_out": (0.1, 0.7)}, doubt)
    assert not held_out.is_hacked({"referee": (0.5, 0.5), "held_out": (0.5, 0.8)}, doubt)
    assert not held_out.is_hacked({"referee": (0.5, float("nan")), "held_out": (0.5, 0.8)}, doubt)
    # Of a cosine nothing says from which value on a picture is wrong.
    assert (
        held_out.doubt([]) is held_out.doubt([{"cosine": 1.0}]) is held_out.doubt([{"itm": 1.0, "cosine": 1.0}]) is None
    )


UNMOVED = {"referee": {"weight": 0.0, "weight_final": 0.0}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"output": "best_held_out"}, "output = 'best_held_out' is not possible"),
        ({"patience": 2}, "patience = 2 is not possible"),
        ({"referees": ({"views": 2, "keep": 3},)}, r"referees\[0\].keep = 3 is not possible: it must be at most .*, 2"),
        ({"referees": ({"weight": 0.0},)}, r"referees\[0\].weight = 0.0 is not possible"),
        (
            {"referees": ({"role": "choose"},)},
            'one with role="optimise" at least, unless referee.weight and weight_final are 0',
        ),
        (
            UNMOVED | {"init": "sample", "init_candidates": 2, "referees": ({"role": "held_out"},)},
            'one with role="optimise" or "choose", unless init_candidates is 1',
        ),
    ],
)
def test_impossible(change, message):
    with pytest.raises(config.ConfigError, match=message):
        config.from_config(change)


def test_choosing_needs_no_optimised_referee():
    """Best of N, and nothing moved; of one start nobody need choose."""
    chosen = UNMOVED | {"init": "sample", "init_candidates": 2, "referees": ({"role": "choose"},)}
    assert config.from_config(chosen).referees[0].role == "choose"
    assert config.from_config(UNMOVED | {"referees": ()}).init_candidates == 1


def test_state_is_the_same_everywhere(watched):
    """The watch has a batch axis, as all of the state has."""
    batch = watched.begin(items.expand(PROMPTS, 1), 0)
    assert {x.shape[0] for x in jax.tree.leaves(batch.state)} == {3}
    assert batch.state.held_out.since.tolist() == [0, 0, 0]
