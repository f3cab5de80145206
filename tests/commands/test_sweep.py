"""Variants beside each other: one program where numbers alone differ, the same pictures as separate runs, resumed."""

import csv

import numpy as np
import pytest
from PIL import Image

from referee_jax import config, sweep
from referee_jax.engine import inverter
from referee_jax.shapes import world
from referee_jax.storage import files
from referee_jax.weights import hub
from tests import toys
from tests.conftest import relative_l2

FILE = """
from referee_jax import config


def get_config():
    settings = config.default()
    settings.steps, settings.chunk, settings.image_size, settings.batch_size, settings.samples = 3, 2, 32, 1, 2
    settings.prompts = ("a red thing", "some blue thing")
    settings.sds.weight, settings.sds.weight_final, settings.sds.guidance = 1.5, 0.75, 1.5
    settings.referee.weight, settings.referee.stop, settings.optim.warmup = 1.0, 2, 1
    settings.views.count, settings.views.keep = 2, 2
    return settings


def get_variants():
    return {"as it is": {}, "guidance 4": {"sds.guidance": 4.0}, "one view": {"views.count": 1, "views.keep": 1}}
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A sweep of toy networks."""
    monkeypatch.setattr(inverter.Inverter, "from_config", toys.engine)
    monkeypatch.setattr(hub, "version", lambda name, revision: "as it was")
    path = tmp_path / "sweep.py"
    path.write_text(FILE)
    return str(path)


def test_variants_are_separate_runs(file, tmp_path, monkeypatch):
    built = []
    engine = lambda settings: built.append(settings) or toys.engine(settings)
    monkeypatch.setattr(inverter.Inverter, "from_config", engine)
    out = tmp_path / "out"
    printed = sweep.sweep(file, out)
    assert len(built) == 2  # the first two variants share a program
    records = files.read_lines(out / "scores.jsonl")
    assert len(records) == 3 * 4 and len({(r["variant"], r["prompt"], r["sample"]) for r in records}) == 12
    pictures = {(r["variant"], r["prompt"], r["sample"]): np.asarray(Image.open(out / r["file"])) for r in records}
    settings = sweep.read(file)["guidance 4"]
    result = toys.engine(settings)(settings.prompts, samples=2)
    for item, image in zip(result.items, result.images, strict=True):
        ours = pictures["guidance 4", item.prompt, item.sample] / 255
        assert np.abs(ours - image).max() <= 1 / 255  # one step of rounding
        assert relative_l2(ours, pictures["as it is", item.prompt, item.sample] / 255) > 0.01
    lines = list(csv.DictReader((out / "table.csv").open()))
    for variant in ("as it is", "guidance 4", "one view"):
        mean = np.mean([r["scores"]["referee_0/contrastive"] for r in records if r["variant"] == variant])
        said = next(x for x in lines if x["variant"] == variant and x["score"] == "referee_0/contrastive")
        assert float(said["mean"]) == pytest.approx(mean) and said["images"] == "4" and said["prompts"] == "2"
        assert f"| {variant} | {mean:.3f} (" in printed
    assert (out / "table.md").read_text() == printed
    assert Image.open(out / "figure.png").size[0] > 500


def test_an_interrupted_sweep_continues(file, tmp_path, monkeypatch):
    out, append, begun = tmp_path / "out", files.append, []
    count = iter(range(100))

    def failing(path, record):
        if next(count) == 5:
            raise KeyboardInterrupt
        append(path, record)

    monkeypatch.setattr(files, "append", failing)
    two = ["as it is", "guidance 4"]
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(file, out, names=two)
    monkeypatch.setattr(files, "append", append)
    begin = inverter.Inverter.begin
    watched = lambda self, items, *rest, **hypers: begun.extend(items) or begin(self, items, *rest, **hypers)
    monkeypatch.setattr(inverter.Inverter, "begin", watched)
    sweep.sweep(file, out, names=two, changes={"batch_size": 2})
    assert len(begun) == 8 - 5
    assert len(files.read_lines(out / "scores.jsonl")) == 8
    assert sweep.sweep(file, out, names=two[:1]) and len(begun) == 3
    with pytest.raises(config.ConfigError, match=r"other results of 'as it is'(.|\n)*steps: 3 -> 4"):
        sweep.sweep(file, out, changes={"steps": 4})
    monkeypatch.setattr(hub, "version", lambda name, revision: "as it is")
    with pytest.raises(config.ConfigError, match=r'weights.openai/clip-vit-large-patch14: "as it was" -> "as it is"'):
        sweep.sweep(file, out)


def test_programs_are_shared_where_numbers_alone_differ():
    base = config.load("configs/shapes_clip.py")
    changes = {
        "base": {}, "numbers": {"sds.guidance": 9.0, "ema.start": 3, "referee.stop": 7, "views.noise": 0.0, "optim.lr": 0.1},
        "no prior": {"sds.weight": 0.0, "sds.weight_final": 0.0}, "views": {"views.count": 9}, "steps": {"steps": 9},
        "no balance": {"referee.balance": False}, "alias": {"ema.alias": True},
    }  # fmt: skip
    variants = {name: config.override(base, own) for name, own in changes.items()}
    alone = [[name] for name in list(changes)[2:]]
    assert sweep.programs(variants) == [["base", "numbers"], *alone]


def test_vary(file):
    variants = sweep.read(file, ["sds.guidance=2,3.5", "ema.every=7"])
    assert variants["sds.guidance = 3.5"].sds.guidance == 3.5 and variants["ema.every = 7"].ema.every == 7
    assert list(sweep.read("configs/shapes_clip.py", ["seed=1,2"])) == ["as it is", "seed = 1", "seed = 2"]


def test_truth_and_splits():
    scene = world.Scene((world.Object("star", "red", x=18, radius=10), world.Object("circle", "blue", x=46, radius=10)))
    image = world.draw(scene)[0].astype(np.float32)
    assert sweep.truth(image, "a red star and a blue circle")["right"] == 1.0
    assert sweep.truth(image, "a blue star and a red circle")["right"] == 0.0
    assert sweep.truth(image, "a dog") == {}
    prompts = {"a red star and a blue circle": 1.0, "a blue star and a red circle": 0.0}
    records = [
        {"variant": "a", "prompt": p, "sample": 0, "scores": {"right": x, "gone": None}} for p, x in prompts.items()
    ]
    found = sweep.means(records)["a"]
    assert found["right"].mean == found["right, colour"].mean == 0.5 and "gone" not in found
    assert "right, colour" not in sweep.columns({"a": found})  # the only category says nothing new
    both = sweep.means([*records, records[0] | {"prompt": "a star and a circle"}])
    assert {"right, colour", "right, shape"} < set(sweep.columns(both)) and both["a"]["right, shape"].mean == 1.0
    assert found["right, seen"].images + found.get("right, unseen", (0,) * 5)[4] == 2


def test_gains_are_of_the_same_pictures():
    """Both prompts gain the same, however far apart they are; what the first variant has not is left out."""
    prompts, made = ("a red star and a blue circle", "a blue star and a red circle"), []
    for variant, gain in (("first", 0.0), ("second", 0.25)):
        for n, prompt in enumerate(prompts):
            scores = {"right": n / 2 + gain, "quality": None if n else 20 + gain}
            made.append({"variant": variant, "prompt": prompt, "sample": 0, "scores": scores})
    made.append({"variant": "second", "prompt": prompts[0], "sample": 1, "scores": {"right": 0.0, "quality": 1.0}})
    found = sweep.means(made)
    assert "right, gain" not in found["first"]
    assert found["second"]["right, gain"] == (0.25, 0.25, 0.25, 2, 2)
    assert found["second"]["quality, gain"] == (0.25, 0.25, 0.25, 1, 1)
    assert found["second"]["right"].images == 3
    assert sweep.columns(found)[0] == "right" and sweep.columns(found)[-3:] == [
        "right, gain",
        "quality",
        "quality, gain",
    ]


def test_bad_input(file, tmp_path):
    for how, message in (
        ({"file": "configs/shapes_clip.py"}, "there is nothing to compare"),
        ({"file": str(tmp_path / "none.py")}, "there is no config file"),
        ({"file": file, "vary": ["sds.guidanse=1"]}, "variant 'sds.guidanse = 1': sds.guidanse is not a setting"),
        ({"file": file, "vary": ["sds.guidance=a"]}, "it should be setting=number"),
        ({"file": file, "vary": ["seed=1,2"]}, "prompts, samples and seed in common"),
        ({"file": file, "names": ["none"]}, "there is no variant 'none'; there are as it is, guidance 4, one view"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            sweep.sweep(**how, workdir=tmp_path / "out")


def test_directories_of_variants_are_safe():
    names = {
        "CLIP + ALIGN/..": "CLIP_ALIGN",
        "../..": "variant",
        "**": "variant",
        "sds.guidance = 7.5": "sds.guidance_=_7.5",
    }
    assert {name: sweep.slug(name) for name in names} == names
