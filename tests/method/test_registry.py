"""An augmentation, an optimiser and a loss of latents of a user's own, as docs/plugins.md shows them."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax import config, gallery
from referee_jax.engine import builders
from referee_jax.method import augmentations, inversion, views
from referee_jax.method import state as state_lib
from referee_jax.method.registry import Registry
from referee_jax.method.ways import optim
from tests import outside

SIZE, COUNT = 12, 8


@pytest.fixture
def directory(tmp_path):
    with outside.directory(tmp_path, "plugins.md", ["my_parts.py", "my_config.py"]) as path:
        yield path


@pytest.fixture
def settings(directory):
    """Of the config alone: what lies beside it is found."""
    return config.load(directory / "my_config.py")


def test_the_documented_augmentation(settings):
    """A view is blended with its mean or left alone; the numbers of other augmentations are what they were."""
    key, how, image = (
        jax.random.key(3),
        views.Settings(noise=0.0),
        jax.random.uniform(jax.random.key(0), (SIZE, SIZE, 3)),
    )
    names = settings.views.augmentations
    params = views.sample(key, how, names=names, count=COUNT, size=SIZE)
    alone = views.sample(key, how, names=("Af",), count=COUNT, size=SIZE)
    jax.tree.map(np.testing.assert_array_equal, params["Af"], alone["Af"])
    np.testing.assert_array_equal(params["noise"], alone["noise"])
    shown = views.apply(image, {"Bl": params["Bl"], "noise": params["noise"]}, size=SIZE, names=("Bl",))
    on, u = params["Bl"]["on"], params["Bl"]["u"][:, 0]
    share = jnp.where(on, 0.5 * u, 0)[:, None, None, None]
    np.testing.assert_allclose(shown, image + share * (image.mean((0, 1)) - image), atol=1e-6)
    assert 0 < on.sum() < COUNT and len(set(u.tolist())) == COUNT


def test_the_documented_optimizer(settings):
    """Two equal gradients: the second step is longer by the momentum of the first."""
    optimizer = optim.build(optim.Hyper(lr=1.0, ema_start=100), stop=0, name=settings.optim.name)
    z, zero = jnp.float32(0.0), jnp.float32(0.0)
    state, moves = optimizer.init(z), []
    for i in range(2):
        move, state = optimizer.update(jnp.float32(1.0), state, z, step=jnp.int32(i), moved=zero, noise=zero)
        moves.append(float(move))
    assert moves == pytest.approx([-1.0, -1.9])


def test_the_documented_loss_of_latents(settings):
    """Its gradient times the weight is a term of its own, whoever else acts; its value is in the metrics."""
    hyper = builders.make_hyper(settings)
    assert hyper.latent_losses[0] == np.float32(0.01)
    shape = (2, 2, 1)
    plan = state_lib.Plan(latent=shape, views=(), use_sds=False, latent_losses=tuple(settings.latent_losses))
    latents = jnp.array([[0.0, 1.0], [0.0, 3.0]])[..., None]
    state = inversion.init(None, latents, plan, hyper)
    slopes = inversion.gradients(None, None, hyper, plan, state, 0, None, referees_active=False)
    assert float(slopes.losses["latents/rough"]) == (0 + 4) + (1 + 9)
    # d/dz of the squares of the differences, by hand.
    np.testing.assert_allclose(slopes.latents[..., 0], 0.01 * np.array([[-2.0, -2.0], [-6.0, 10.0]]), rtol=1e-6)
    still = state_lib.Noise(jnp.int32(0), *[jnp.zeros(shape)] * 3, (), ())
    new, metrics = inversion.update(hyper, plan, state, jnp.int32(0), still, slopes, referees_active=False)
    np.testing.assert_allclose(new.latents, latents - slopes.latents, rtol=1e-6)
    assert "latents/rough" in metrics


def test_its_weight_is_no_part_of_the_program(settings):
    other = config.override(settings, {"latent_losses": {"rough": 0.5}})
    assert builders.structure(other) == builders.structure(settings) != builders.structure(config.load("shapes_clip"))


def test_a_run_knows_its_plugins(settings, directory):
    """By name and by source: settings that survive JSON, fingerprints that differ."""
    assert config.from_config(config.to_dict(settings)) == settings
    before = config.fingerprint(settings)
    assert config.fingerprint(config.override(settings, {"plugins": ()})) != before
    with (directory / "my_parts.py").open("a") as file:
        file.write("\n# another version\n")
    assert config.fingerprint(settings) != before


def test_a_run_of_others_is_shown_without_running_their_code(directory, monkeypatch):
    monkeypatch.syspath_prepend(directory)
    values = {"plugins": ["my_parts"], "optim": {"name": "momentum"}, "referees": [{"name": "my_parts:build"}]}
    (directory / "config.json").write_text(json.dumps({"settings": values}))
    assert gallery.read(directory).settings.plugins == ("my_parts",)
    assert "my_parts" not in sys.modules


ADD = 'or your own: @{}("name") in a module of config.plugins, see docs/plugins.md'


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"name": "sdg"}}, "it must be one of 'sgd', 'adam', " + ADD.format("optim.register")),
        ({"views": {"augmentations": ("Xy",)}}, ADD.format("augmentations.register")),
        ({"latent_losses": {"x": 1.0}}, "a dictionary of weights of " + ADD.format("latent_losses.register")),
        ({"plugins": ("no_such_module",)}, "plugins[0] = 'no_such_module' is not possible: it must be a module that"),
        ({"plugins": "my_parts"}, "plugins = 'my_parts' is not possible: it must be a tuple"),
        ({"plugins": ("broken",)}, "plugins[0] = 'broken' cannot be imported: ZeroDivisionError: division by zero ("),
        ({"plugins": ("taken",)}, "ValueError: the name 'Af' is taken by another; give f one of its own ("),
        (
            {"plugins": ("needs",)},
            "plugins[0] = 'needs' cannot be imported: ModuleNotFoundError: No module named 'absent'",
        ),
    ],
)
def test_mistakes_are_explained(directory, monkeypatch, values, message):
    (directory / "broken.py").write_text("1 / 0\n")
    (directory / "needs.py").write_text("import absent\n")
    taken = 'from referee_jax.method import augmentations\n@augmentations.register("Af")\ndef f(view, u, warp): ...\n'
    (directory / "taken.py").write_text(taken)
    monkeypatch.syspath_prepend(directory)
    with pytest.raises(config.ConfigError) as caught:
        config.from_config(values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_function_may_come_again_but_not_another():
    table = Registry("x.register", {"old": 1})

    def new(): ...

    assert table.register("new")(new) is new and table.register("new", row=lambda value: (value,))(new) is new
    assert table == {"old": 1, "new": (new,)}
    for name in ("old", "new"):
        with pytest.raises(ValueError, match=f"'{name}' is taken"):
            table.register(name)(lambda: None)


def test_rows_of_the_package_have_the_numbers_they_had():
    assert list(views.COLUMNS) == list(augmentations.AUGMENTATIONS)
