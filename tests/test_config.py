"""Settings: the paper's values, error messages, and fingerprints."""

import dataclasses
import importlib.util
import json
import pathlib
import runpy

import pytest

from referee_jax import config, sweep
from referee_jax.method import augmentations, objective
from referee_jax.method.ways import optim, sds
from referee_jax.shapes import world
from referee_jax.weights import hub

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return config.from_config(module.get_config())


def test_defaults_are_the_papers():
    settings = config.from_config(config.default())
    assert (settings.steps, settings.image_size, settings.seed) == (160, 512, 0)
    assert (settings.sds.weight, settings.sds.weight_final, settings.sds.guidance) == (800.0, 400.0, 30.0)
    assert (settings.sds.t_min, settings.sds.t_max) == (50, 950)
    assert settings.sds.prompt == "A photo exactly contains {caption}"
    assert (settings.referee.weight, settings.referee.stop, settings.referee.noise) == (2.0, 150, 0.2)
    assert (settings.optim.lr, settings.optim.lr_final, settings.optim.warmup) == (1.0, 0.5, 10)
    assert (settings.optim.noise, settings.optim.tail_noise) == (0.2, 0.01)
    assert (settings.ema.decay, settings.ema.start, settings.ema.every, settings.ema.alias) == (0.95, 40, 60, False)
    assert (settings.views.count, settings.views.keep) == (10, 10)
    assert settings.views.augmentations == ("Af", "Pe", "Ji", "Er")
    assert (settings.output, settings.clamp, settings.init) == ("final", "hard", "noise")
    assert settings.referees[0].losses == {"cosine": 1.0}


@pytest.mark.parametrize(
    ("group", "hyper", "prefix"),
    [
        ("sds", sds.Hyper, ""),
        ("referee", objective.Hyper, ""),
        ("optim", optim.Hyper, ""),
        ("views", augmentations.Settings, ""),
    ]
    + [("ema", optim.Hyper, "ema_")],
)
def test_defaults_agree_with_the_modules_that_use_them(group, hyper, prefix):
    ours = dataclasses.asdict(getattr(config.Settings(), group))
    theirs = {field.name.removeprefix(prefix): field.default for field in dataclasses.fields(hyper)}
    shared = ours.keys() & theirs.keys()
    assert len(shared) >= 3
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}


def test_every_magnitude_of_a_view_is_a_setting():
    magnitudes = {field.name for field in dataclasses.fields(augmentations.Settings)}
    others = {"count", "keep", "augmentations", "shared_erase", "per_pass", "resize"}
    assert set(dataclasses.asdict(config.Settings().views)) == magnitudes | others


def test_settings_survive_json():
    changed = config.default()
    changed.views.affine_translate = (0.25, 0.125)
    changed.prompts = ("a", "b")
    changed.referees = (config.referee(checkpoint="x"), config.referee(role="held_out", losses={"cosine": 0.5}))
    settings = config.from_config(changed)
    assert settings != config.Settings()
    assert config.from_config(config.to_dict(settings)) == settings
    assert config.from_config(json.loads(config.to_json(settings))) == settings
    assert config.from_config({}) == config.Settings()


def test_whole_numbers_become_floats():
    # An integer in place of a float would be traced as an integer.
    settings = config.from_config({"sds": {"guidance": 7}, "views": {"affine_translate": [0, 1]}})
    assert isinstance(settings.sds.guidance, float)
    assert [type(x) for x in settings.views.affine_translate] == [float, float]


def test_config_dict_is_locked_and_typed():
    settings = config.default()
    with pytest.raises(AttributeError, match="stepz"):
        settings.stepz = 3
    with pytest.raises(TypeError):
        settings.steps = "many"
    with pytest.raises(AttributeError, match="rolle"):
        settings.referees[0].rolle = "held_out"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "stepz is not a setting; did you mean steps?"),
        (
            {"outputs": {"format": "gif"}},
            "outputs.format = 'gif' is not possible: it must be one of 'png', 'webp', 'webdataset'",
        ),
        ({"outputs": {"shard_size": 0}}, "outputs.shard_size = 0 is not possible: it must be at least 1"),
        (
            {"outputs": {"format": "webp"}, "image_size": 16384},
            "image_size = 16384 is not possible: it must be at most 16383, as WebP files are asked for",
        ),
        ({"sds": {"guidanse": 3}}, "sds.guidanse is not a setting; did you mean sds.guidance?"),
        (
            {"outputs": {"zzz": 3}},
            "outputs.zzz is not a setting; there are format, shard_images, shard_size, stretch, trajectory",
        ),
        ({"steps": 0}, "steps = 0 is not possible: it must be at least 1"),
        ({"steps": 2.5}, "steps = 2.5 is not possible: it must be a whole number"),
        ({"steps": True}, "steps = True is not possible: it must be a whole number"),
        ({"sds": 3}, "sds = 3 is not possible: it must be a group of settings (a ConfigDict or a dictionary)"),
        ({"sds": {"weight": "much"}}, "sds.weight = 'much' is not possible: it must be a finite number"),
        ({"sds": {"weight": float("nan")}}, "sds.weight = nan is not possible: it must be a finite number"),
        ({"sds": {"prompt": "{} {}"}}, "sds.prompt = '{} {}' is not possible: it must be a text with one {} or"),
        (
            {"sds": {"prompt": "{} {caption}"}},
            "sds.prompt = '{} {caption}' is not possible: it must be a text with one {}",
        ),
        ({"sds": {"t_max": 51}}, "sds.t_max = 51 is not possible: it must be at least sds.t_min + 2 = 52"),
        ({"sds": {"t_max_final": 51}}, "sds.t_max_final = 51 is not possible: it must be at least sds.t_min + 2 = 52"),
        ({"init_candidates": 2}, 'init_candidates = 2 is not possible: it must be one, unless init = "sample"'),
        ({"precision": "float16"}, "precision = 'float16' is not possible: it must be one of 'float32', 'bfloat16'"),
        ({"seed": 2**32}, f"seed = {2**32} is not possible: it must be at most {2**32 - 1}"),
        ({"image_size": 500}, "image_size = 500 is not possible: it must be a multiple of 8"),
        ({"optim": {"lr": 0}}, "optim.lr = 0.0 is not possible: it must be more than 0"),
        ({"optim": {"name": "sdg"}}, "optim.name = 'sdg' is not possible: it must be one of 'sgd', 'adam'"),
        ({"ema": {"alias": 1}}, "ema.alias = 1 is not possible: it must be True or False"),
        ({"prompts": "a"}, "prompts = 'a' is not possible: it must be a tuple"),
        ({"prompts": ["a", 3]}, "prompts[1] = 3 is not possible: it must be a text"),
        ({"views": {"keep": 11}}, "views.keep = 11 is not possible: it must be at most views.count = 10"),
        (
            {"views": {"augmentations": ("Af", "Xy")}},
            "views.augmentations = ('Af', 'Xy') is not possible: augmentations",
        ),
        (
            {"views": {"affine_translate": (0.1,)}},
            "views.affine_translate = (0.1,) is not possible: it must be a tuple of 2",
        ),
        ({"views": {"affine_p": 1.5}}, "views.affine_p = 1.5 is not possible: it must be a probability, 0 to 1"),
        ({"views": {"noise": -0.1}}, "views.noise = -0.1 is not possible: it must be at least 0"),
        (
            {"views": {"erase_area": (0.4, 0.1)}},
            "views.erase_area = (0.4, 0.1) is not possible: it must be (low, high)",
        ),
        ({"views": {"erase_area": (0.4, 1.1)}}, "views.erase_area = (0.4, 1.1) is not possible: it must be shares"),
        ({"referees": [{"name": "bert"}]}, "referees[0].name = 'bert' is not possible: it must be one of "),
        (
            {"referees": [{"losses": {"l2": 1.0}}]},
            "referees[0].losses = {'l2': 1.0} is not possible: it must be a dict",
        ),
        (
            {"referees": [{}, {"name": "blip2", "losses": {"cosine": 1.0}}]},
            "referees[1].losses = {'cosine': 1.0} is not possible: it must be a dictionary of weights of blip2's losses: "
            "itm, itc, itg",
        ),
        (
            {"referees": [{"losses": {"cosine": 0.0}}]},
            "referees[0].losses = {'cosine': 0.0} is not possible: it must be w",
        ),
        (
            {"referees": [{"losses": {"contrastive": 1.0}}]},
            "referees[0].negatives = () is not possible: it must be some texts, or referees[0].near",
        ),
        (
            {"referees": [{}, {"role": "judge"}]},
            "referees[1].role = 'judge' is not possible: it must be one of 'optimise'",
        ),
        (
            {"referees": [{"checkpoint": ""}]},
            "referees[0].checkpoint = '' is not possible: it must be a directory, a hub",
        ),
        ({"referees": []}, 'referees = () is not possible: it must be one with role="optimise" at least'),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(config.ConfigError) as caught:
        config.from_config(values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_long_values_are_shortened():
    with pytest.raises(config.ConfigError) as caught:
        config.from_config({"prompts": "word " * 1000})
    assert len(str(caught.value)) < 400


def test_no_referee_is_needed_where_none_acts():
    assert config.from_config({"referees": [], "referee": {"weight": 0, "weight_final": 0}}).referees == ()


def test_fingerprint_is_of_what_changes_the_images():
    base = config.from_config({})
    same = {
        "prompts": ["a"],
        "samples": 3,
        "workdir": "x",
        "batch_size": 1,
        "chunk": 7,
        "outputs": {"trajectory": True, "format": "webp", "shard_size": 9, "shard_images": "webp"},
    }
    for key, value in same.items():
        assert config.from_config({key: value}) != base
        assert config.fingerprint(config.from_config({key: value})) == config.fingerprint(base), key
    others = [
        {"seed": 1}, {"steps": 159}, {"sds": {"guidance": 29.5}}, {"views": {"noise": 0.0}}, {"precision": "bfloat16"},
        {"referees": [{"revision": "abc"}]}, {"outputs": {"stretch": True}}, {"output": "best"},
    ]  # fmt: skip
    prints = {config.fingerprint(config.from_config(values)) for values in [{}, *others]}
    assert len(prints) == 1 + len(others)
    assert all(len(x) == 64 for x in prints)


def test_diff_names_what_changed():
    old = config.from_config({})
    new = config.from_config({"steps": 3, "sds": {"guidance": 7.5}, "referees": [{"checkpoint": "mine"}, {}]})
    lines = config.diff(old, new).splitlines()
    assert lines[-2:] == ["sds.guidance: 30.0 -> 7.5", "steps: 160 -> 3"]
    assert 'referees[0].checkpoint: "openai/clip-vit-large-patch14" -> "mine"' in lines
    assert 'referees[1].name: (absent) -> "clip"' in lines
    assert config.diff(old, old) == ""
    # Records of other versions may have other keys.
    assert config.diff({"a": {"gone": 1}}, {"a": {}}) == "a.gone: 1 -> (absent)"


def test_checkpoints_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "ASSETS", tmp_path / "assets")
    (tmp_path / "assets" / "clip").mkdir(parents=True)
    (tmp_path / "assets" / "clip" / "lora.safetensors").touch()
    (tmp_path / "outside").mkdir()
    assert hub.local_path("shapes/clip") == tmp_path / "assets" / "clip"
    assert hub.file_of("shapes/clip/lora.safetensors") == tmp_path / "assets" / "clip" / "lora.safetensors"
    assert hub.file_of("shapes/clip") is None
    assert hub.local_path("openai/clip-vit-large-patch14") == pathlib.Path("openai/clip-vit-large-patch14")
    for name in ("shapes/clop", "shapes/../outside", "shapes/clip/other.safetensors"):
        with pytest.raises(hub.WeightsError, match="not in the package; it holds shapes/clip$"):
            hub.local_path(name)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
def test_every_config_is_possible(file):
    """Its settings, or its variants' if it is a sweep; the package's checkpoints in it exist."""
    variants_of = runpy.run_path(str(file)).get("get_variants")
    variants = sweep.read(str(file)) if variants_of else {"": config.load(str(file))}
    for settings in variants.values():
        for name, _ in config.checkpoints(settings):
            assert not name.startswith("shapes/") or hub.local_path(name).exists()


def test_configs():
    base = config.Settings()
    paper = load("paper")
    assert dataclasses.replace(paper, referees=base.referees, outputs=base.outputs, ema=base.ema) == base
    assert paper.ema == dataclasses.replace(base.ema, alias=True)
    assert paper.outputs == dataclasses.replace(base.outputs, stretch=True)
    assert [(spec.name, spec.losses) for spec in paper.referees] == [("blip2", {"itg": 1.0, "itm": 1.0})]
    changed = {line.split(":")[0] for line in config.diff(base, load("clip")).splitlines()}
    assert changed == {
        "init", "init_candidates", "init_steps", "output", "clamp", "sds.prompt", "referee.balance_epsilon",
        "views.affine_translate", "views.shared_erase",
    }  # fmt: skip
    shapes = load("shapes")
    assert len(shapes.prompts) == 8
    assert all(world.parse(text).things for text in shapes.prompts)
    assert [spec.role for spec in shapes.referees] == ["optimise", "choose", "held_out"]


LATE = {"referees": ({}, {"role": "held_out"}), "steps": 20, "look_every": 21}
GUIDED = {"method": "guided", "steps": 12}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"particles": 2, "select": "smc"}, "particles = 2 is not possible: it must be more for select"),
        (
            GUIDED | {"guided": {"low": 500, "high": 540}},
            "guided.low = 500 is not possible: it must be a window (to guided.high) with one of the timesteps, of which 544",
        ),
        (LATE | {"output": "best_held_out"}, "look_every = 21 is not possible: it must be at most steps = 20"),
        (LATE | {"patience": 1}, "look_every = 21 is not possible: it must be at most steps = 20"),
        (
            {"referees": ({"name": "json:loads", "checkpoint": "", "questions": 2},)},
            "referees[0].questions = 2 is not possible: it must be 0: a referee of your own is asked none",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(values, message):
    with pytest.raises(config.ConfigError) as caught:
        config.from_config(values)
    assert str(caught.value).startswith(message)


def test_a_window_matters_where_the_referees_act():
    """Sampling has none that do."""
    config.from_config(GUIDED | {"guided": {"low": 500, "high": 540}, "referee": {"stop": 0}})
    config.from_config({"particles": 3, "select": "smc"})
    config.from_config(LATE)


def test_the_weights_of_losses_are_the_referees_too():
    spec = config.RefereeSpec(losses={"itm": 1.0, "itc": 0.5}, weight=2.0)
    assert spec.weighted == {"itc": 1.0, "itm": 2.0}
