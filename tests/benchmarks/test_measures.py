"""Scores are kept as long as everything that they are made of is what it was."""

import json

import numpy as np
import PIL.Image
import pytest

from referee_jax.benchmarks import evaluation, layouts, measures

PROMPTS = ["a red circle and a blue square", "a green star above a pink ring", "three black crosses"]
CORRECTED = "a red ring and a blue star"
FILES = ("model.safetensors", "preprocessor_config.json", "vocab.json", "merges.txt")

# Measures of the prompts, by a checkpoint where they have one.
MEASURES = {
    "shapes": lambda checkpoint, prompts: measures.ground_truth(),
    "referee": lambda checkpoint, prompts: measures.by_referees([checkpoint])[0],
    "clip": lambda checkpoint, prompts: measures.clip_score(checkpoint),
    "clip_without_adjectives": measures.clip_without_adjectives,
    "blip_vqa": measures.blip_vqa,
}


class Scorer:
    """Stands for benchmarks.scorer.Scorer, without a network; `asked` are the texts of all images so far."""

    batch_size, asked = 2, []

    def __init__(self, judge, **settings):
        pass

    def __call__(self, images, texts):
        self.asked.extend(texts)
        return [[{"cosine": 0.5, "vqa_probability": 0.5} for _ in group] for group in texts]


@pytest.fixture
def asked(monkeypatch):
    """What has been measured: texts of images."""
    monkeypatch.setattr(Scorer, "asked", [])
    monkeypatch.setattr(measures.scorer_lib, "Scorer", Scorer)
    monkeypatch.setattr(measures, "_judge", lambda checkpoint, name: None)
    score = measures.benchmark.score
    monkeypatch.setattr(
        measures.benchmark, "score", lambda images, texts: Scorer.asked.extend(texts) or score(images, texts)
    )
    return Scorer.asked


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "clip"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["CLIPModel"]}))
    for name in FILES:
        (path / name).write_bytes(b"as it was")
    return path


@pytest.fixture
def picture(tmp_path):
    """Draws a picture number."""

    def draw(number, shade=0):
        PIL.Image.fromarray(np.full((64, 64, 3), shade, np.uint8)).save(tmp_path / f"{number}.png")
        return tmp_path / f"{number}.png"

    return draw


@pytest.mark.parametrize("changed", ["nothing", "a prompt", "a picture", *FILES, "a file beside", "the measure"])
@pytest.mark.parametrize("kind", MEASURES)
def test_what_has_changed_is_measured_again(tmp_path, monkeypatch, asked, checkpoint, picture, kind, changed):
    def collect(prompts):
        entries = [layouts.Entry(tmp_path / f"{n}.png", prompt, 0) for n, prompt in enumerate(prompts)]
        return measures.collect(MEASURES[kind](str(checkpoint), prompts), entries, tmp_path)

    for n in range(3):
        picture(n)
    before = collect(PROMPTS)
    assert len(asked) == 3
    asked.clear()
    prompts, expected = list(PROMPTS), 0
    if changed == "a prompt":
        prompts[1], expected = CORRECTED, 1
    elif changed == "a picture":
        picture(1, shade=9)
        expected = 1
    elif changed == "the measure":
        monkeypatch.setattr(measures, "VERSION", measures.VERSION + 1)
        expected = 3
    elif changed in FILES:
        (checkpoint / changed).write_bytes(b"as it is.")
        expected = 0 if kind == "shapes" else 3
    elif changed == "a file beside":
        (checkpoint / "README.md").write_text("# A model")
    after = collect(prompts)
    assert len(asked) == expected and after.keys() == before.keys()
    asked.clear()
    assert collect(prompts) == after and not asked


def test_scores_are_those_of_the_text_that_is_read(tmp_path, asked, checkpoint, picture):
    """A prompt that is corrected where a measure does not look need not be measured again, and one that was not need."""
    picture(0)
    words = lambda prompt: measures.collect(
        measures.clip_without_adjectives(str(checkpoint), [prompt]),
        [layouts.Entry(tmp_path / "0.png", prompt, 0)],
        tmp_path,
    )
    assert words("a red circle and a blue square") == words("a pink circle and a blue square")
    words("a red circle and a blue star")
    assert asked == [("a circle and a square",), ("a circle and a star",)]


def test_a_sheet_of_an_earlier_evaluation_does_not_stay(tmp_path, picture):
    line = {"file": str(picture(0)), "prompt": PROMPTS[0], "right": 0.0, "clip": 0.5}
    evaluation.agree([line], tmp_path)
    assert (tmp_path / "fooled.png").exists()
    evaluation.agree([line | {"right": 1.0}], tmp_path)
    assert not (tmp_path / "fooled.png").exists()
