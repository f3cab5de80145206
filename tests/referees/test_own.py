"""A referee of a user's own, as docs/referees.md shows it, from a directory beside the repository."""

import dataclasses
import json
import re
import shlex
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from referee_jax import config, doctor, prompts, referees, run, score
from referee_jax.performance import abstract_networks
from referee_jax.weights import generators
from tests import fakes, outside, toys

NAME = "mean_colour:build"
# Few and cheap iterations from noise.
CHEAP = ("--config.steps=3", "--config.init=noise", "--config.init_candidates=1", "--config.batch_size=1",
         "--config.mesh.prompt=1")  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    with outside.directory(tmp_path, "referees.md", ["mean_colour.py", "my_config.py"]) as path:
        yield path


def spec(**changes) -> config.RefereeSpec:
    return config.RefereeSpec(**{"name": NAME, "checkpoint": "", "losses": {"distance": 1.0}} | changes)


def change(directory, old, new):
    file = directory / "mean_colour.py"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.fixture
def importable(directory, monkeypatch):
    monkeypatch.syspath_prepend(directory)
    return directory


def documented(program: str) -> list[str]:
    """The arguments of the page's command."""
    (line,) = re.findall(rf"^python -m referee_jax\.{program} (.*)$", (outside.DOCS / "referees.md").read_text(), re.M)
    return shlex.split(line)


def test_the_example_is_short(directory):
    assert len((directory / "mean_colour.py").read_text().splitlines()) < 40


def test_the_documented_run(directory, monkeypatch):
    """The config alone is enough: what lies beside it is found. The networks beside the referee are toys."""
    monkeypatch.setattr(generators, "load_generator", lambda *_, **how: toys.prior())
    name, *arguments = documented("run")
    assert name == "--config=my_config.py"
    command = fakes.command(*arguments, *CHEAP, f"--workdir={directory / 'run'}", path=directory / "my_config.py")
    assert run.main(command) == 0
    (record,) = fakes.lines(directory / "run" / "metadata.jsonl")
    assert record["status"] == "done" and "referee_0/closeness" in json.dumps(record)
    (chunk,) = [x for x in fakes.lines(directory / "run" / "log.jsonl") if x["event"] == "chunk"]
    assert 0 < chunk["metrics"]["referee_0/distance"][0] < 3 and chunk["metrics"]["referee_norm"][0] > 0


def test_another_version_of_it_is_another_run(importable, capsys):
    settings = config.load(importable / "my_config.py")
    before = config.fingerprint(settings)
    run_of = lambda: fakes.command(f"--workdir={importable / 'run'}", path=importable / "my_config.py")
    engine = lambda settings: fakes.FakeInverter(settings)
    assert run.main(run_of(), load=engine) == 0
    change(importable, "0.9, 0.1, 0.1", "0.8, 0.1, 0.1")
    assert config.fingerprint(settings) != before
    assert run.main(run_of(), load=engine) == 2
    assert "a module of one's own" in capsys.readouterr().err


def test_the_documented_scores(importable):
    assert any(argument == f"--name={NAME}" for argument in documented("score"))
    colours = {"red": (230, 26, 26), "blue": (26, 51, 230)}
    for name, colour in colours.items():
        PIL.Image.new("RGB", (40, 20), colour).save(importable / f"{name}.png")
    files = [str(importable / f"{name}.png") for name in colours]
    lines = [json.loads(line) for line in score.score("", files, ["a red circle", "blue"], name=NAME).splitlines()]
    closeness = np.array([line["closeness"] for line in lines]).reshape(2, 2)
    distance = np.square(np.subtract((0.9, 0.1, 0.1), (0.1, 0.2, 0.9))).sum()
    np.testing.assert_allclose(closeness, np.exp([[0, -distance], [-distance, 0]]), atol=0.01)


def test_it_has_a_size_without_being_known(importable):
    settings = config.from_config({"generator": {"checkpoint": "shapes/stable-diffusion"}, "referees": (spec(),)})
    (judge,) = abstract_networks.abstract(settings).judges
    assert judge.referee.image_size == 32 and judge.read("a red star")["named"].tolist() == [True, False, False]
    assert config.checkpoints(settings) == [("shapes/stable-diffusion", "")]


def test_the_doctor_knows_nothing_of_its_checkpoint(importable):
    """And looks at those of the others."""
    name = f"--config={importable / 'my_config.py'}"
    command, findings = doctor.read_command(["doctor", name, "--config.referees[0].checkpoint=its/own"])
    assert not [x for x in findings if x.remedy]
    (found,) = doctor.checkpoints(command)
    assert "shapes/stable-diffusion" in found.text and not found.remedy


def test_an_entry_point_is_a_name(importable, monkeypatch):
    points = metadata.EntryPoints([metadata.EntryPoint("mean_colour", NAME, config.ENTRY_POINTS)])
    monkeypatch.setattr(metadata, "entry_points", lambda group: points.select(group=group))
    assert config.referee(name="mean_colour", losses={"distance": 1.0}).checkpoint == ""
    assert referees.load_referee(spec(name="mean_colour")).referee.losses == ("distance",)
    assert score.listing().splitlines()[-1] == f"mean_colour (a package's own: {NAME})"
    assert config.own_referee("clip") == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "referees[0].name = 'bert' is not possible: it must be one of 'clip', "),
        (
            "nowhere:build",
            "referees[0].name = 'nowhere' is not possible: it must be a module that Python finds: in the",
        ),
        (
            "mean_colour:make",
            "referees[0].name = 'mean_colour:make' is not possible: it must be \"mean_colour:function\"",
        ),
        ("mean_colour:", "referees[0].name = 'mean_colour:' is not possible: it must be \"mean_colour:function\", and"),
    ],
)
def test_a_wrong_name_is_explained(importable, name, message):
    with pytest.raises(config.ConfigError) as caught:
        config.from_config({"referees": ({"name": name, "losses": {"distance": 1.0}},)})
    assert str(caught.value).startswith(message)
    assert "docs/referees.md" in str(caught.value) or name != "bert"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def fit", "def fits", "lacks fit, it must be an object with image_size, losses, encode"),
        ("MeanColour(struct.PyTreeNode)", "MeanColour", "is a MeanColour, it must be a pytree"),
        ("return MeanColour(), read", "return MeanColour()", "returns MeanColour, it must be a pair"),
        ("return MeanColour(), read", "return MeanCollor()", "cannot be built: NameError: name 'MeanCollor' is not defined ("),
        ("default=32", "default=32.5", "has an image_size of 32.5, it must be the side"),
        (".sum(-1)}", ".sum()}", "has views_losses of {'distance': ShapeDtypeStruct(shape=(), dtype=float32)}, it must be"),
        ('"distance"]', '"distant"]', "scores fails: KeyError: 'distant' (/"),
        ('["distance"][0]', '["distance"]', "has scores of {'closeness': ShapeDtypeStruct(shape=(1,), dtype=float32)}"),
        ("(self.image_size, self.image_size, 3)", "(8, 8, 3)", "has fit of ShapeDtypeStruct(shape=(8, 8, 3)"),
        ("text.split()", "text.words()", "cannot read 'a': AttributeError: 'str' object has no attribute 'words' ("),
    ],
)  # fmt: skip
def test_a_wrong_member_is_explained(importable, old, new, message):
    change(importable, old, new)
    with pytest.raises(config.ConfigError) as caught:
        referees.load_referee(spec())
    assert str(caught.value).startswith(f"referee {NAME}") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_fit_are_explained(importable):
    with pytest.raises(config.ConfigError, match="no loss cosine; there are distance"):
        referees.load_referee(spec(losses={"cosine": 1.0}))
    with pytest.raises(config.ConfigError, match="image_size = 64, but it reads 32"):
        referees.load_referee(spec(image_size=64))


def test_one_text_that_it_cannot_read_ends_nothing(importable):
    judge = referees.load_referee(spec())
    jax.tree.map(np.testing.assert_array_equal, judge.read("red"), judge.reader("red"))

    def reader(text):
        if text == "b":
            raise prompts.Unreadable(text, "no colour in it")
        return {"x": jnp.zeros({"a": 1, "c": 2}[text])}

    judge = dataclasses.replace(judge, reader=reader)
    for text, reason in (("b", "^no colour in it$"), ("c", "other shapes of it than of 'a'"), ("d", "KeyError: 'd' ")):
        with pytest.raises(prompts.Unreadable) as caught:
            judge.read(text)
        assert re.search(reason, caught.value.reason)
