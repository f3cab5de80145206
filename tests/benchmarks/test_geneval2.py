"""GenEval 2: its data, folders and result files, and Soft-TIFA by hand and by a referee that is asked."""

import json
import math

import numpy as np
import pytest

from referee_jax import config, referees
from referee_jax.benchmarks import geneval2, layouts
from tests.benchmarks.test_layouts import content, images
from tests.commands.test_evaluate import command
from tests.lazy import transformers
from tests.oracles import networks

PROMPTS = ["two red cats", "a blue dog above a cat"]
DATA = [
    {
        "prompt": PROMPTS[0], "atom_count": 3, "skills": ["count", "attribute", "object"],
        "vqa_list": [["How many cats are in the image?", "two"], ["Are the cats red?", "Yes"], ["Are there any cats?", "Yes"]],
    },
    {
        "prompt": PROMPTS[1], "atom_count": 4, "skills": ["attribute", "position"],
        "vqa_list": [["Is the dog blue?", "Yes"], ["Is the dog above the cat?", "Yes"]],
    },
]  # fmt: skip
SCORES = [[0.5, 1.0, 0.25], [0.0, 0.5]]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "geneval2_data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in DATA))
    return file


def test_soft_tifa():
    scores = geneval2.soft_tifa(SCORES[0])
    assert scores["soft_tifa_am"] == pytest.approx(1.75 / 3)
    assert scores["soft_tifa_gm"] == pytest.approx(0.125 ** (1 / 3))
    assert geneval2.soft_tifa([0.0, 1.0])["soft_tifa_gm"] == pytest.approx(1e-6)


def test_folders_for_the_evaluator(tmp_path, data):
    """An object of prompts and paths for each sample; what is written is read again."""
    rows = geneval2.read_data(data)
    entries = images(tmp_path / "made", PROMPTS[::-1], samples=2)
    out = tmp_path / "out"
    assert geneval2.export(entries, out, rows) == (4, 2) == geneval2.export(entries, out, rows)
    paths = json.loads((out / "image_paths_1.json").read_text())
    assert {prompt: content([layouts.Entry(path, prompt, 1)]) for prompt, path in paths.items()} == {
        x.prompt: content([x]) for x in entries if x.sample == 1
    }
    assert paths[PROMPTS[0]] == str(out.resolve() / "sample_1" / "00000.png")
    assert content(geneval2.read_paths(out)) == content(entries)
    one = out / "image_paths_0.json"
    assert content(geneval2.read_paths(one)) == content([x for x in entries if x.sample == 0])
    one.write_text(json.dumps({PROMPTS[0]: "sample_0/00000.png"}))  # as from another place
    assert geneval2.read_paths(one)[0].file == out / "sample_0" / "00000.png"
    with pytest.raises(ValueError, match="holds other files"):
        geneval2.export(entries[:2], out, rows)
    with pytest.raises(ValueError, match="do not have the samples"):
        geneval2.export(entries[:3], tmp_path / "other", rows)
    with pytest.raises(ValueError, match="the benchmark does not have"):
        geneval2.export(images(tmp_path / "a", ["a bird"]), tmp_path / "other", rows)
    assert not (tmp_path / "other").exists()


def test_imported_scores(tmp_path, data):
    """Means by hand, over prompts, by facts and by skill."""
    entries = images(tmp_path / "made", PROMPTS, samples=1)
    paths, results = tmp_path / "paths.json", tmp_path / "score_lists.json"
    paths.write_text(json.dumps({x.prompt: str(x.file) for x in entries}))
    results.write_text(json.dumps(SCORES))
    out = tmp_path / "out"
    asked = dict(benchmark="geneval2", metadata=str(data), out=str(out), vqa="")
    printed = command(paths, import_scores=str(results), **asked)
    record = json.loads((out / "scores.json").read_text())
    means = {part: {name: x["mean"] for name, x in scores.items()} for part, scores in record["scores"].items()}
    gm = 0.125 ** (1 / 3), math.sqrt(1e-12 * 0.5)
    assert means["all"] == pytest.approx({"soft_tifa_am": (1.75 / 3 + 0.25) / 2, "soft_tifa_gm": sum(gm) / 2})
    assert means["3 atoms"]["soft_tifa_gm"] == pytest.approx(gm[0])
    skills = {name: (x["mean"], x["images"]) for name, x in record["skills"].items()}
    assert skills == {"attribute": (0.5, 2), "count": (0.5, 1), "object": (0.25, 1), "position": (0.5, 1)}
    assert "| attribute | 2 | 0.500 (0.00..1.00) |" in printed and "| 4 atoms | 1 |" in printed
    with pytest.raises(ValueError, match="nothing to measure"):
        command(paths, **asked)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([[0.5]], "has 1 lists of scores, the data 2 prompts"),
        ([[0.5, 1.0], [0, 1]], "are no probabilities of the 3 of 'two red cats'"),
        ([[0.5, 1.0, 2.0], [0, 1]], "are no probabilities"),
        ({}, "has no lists"),
    ],
)
def test_results_of_other_data(tmp_path, data, results, message):
    (tmp_path / "scores.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=message):
        geneval2.import_scores(tmp_path / "scores.json", geneval2.read_data(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skills": ["count"]}, "line 1 of .* has 3 questions and 1 skills"),
        ({"vqa_list": [["a"], ["b"], ["c"]]}, "neither a question nor a pair"),
        ({"atom_count": None}, "has no prompt, atom_count, vqa_list and skills"),
        ({"prompt": PROMPTS[1]}, "line 2 of .* has a prompt of a line before"),
    ],
)
def test_damaged_data(data, change, message):
    data.write_text("".join(json.dumps(x) + "\n" for x in (DATA[0] | change, DATA[1])))
    with pytest.raises(ValueError, match=message):
        geneval2.read_data(data)


def test_by_a_referee(tmp_path, data):
    """Each question's probability is that of the referee alone, and a second evaluation measures nothing again."""
    checkpoint = networks.save_blip(networks.blip(transformers.BlipForQuestionAnswering), tmp_path / "blip")
    entries = images(tmp_path / "made", PROMPTS, samples=1)
    paths = tmp_path / "paths.json"
    paths.write_text(json.dumps({x.prompt: str(x.file) for x in entries}))
    asked = dict(benchmark="geneval2", metadata=str(data), out=str(tmp_path / "out"), vqa=str(checkpoint))
    printed = command(paths, **asked)
    lines = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    alone = referees.load_referee(config.RefereeSpec(name="blip_vqa", checkpoint=str(checkpoint), losses={}))
    texts = [
        ["are there exactly two cats", "are the cats red", "are there any cats"],
        ["is the dog blue", "is the dog above the cat"],
    ]
    for line, entry, own in zip(lines, entries, texts, strict=True):
        wanted = [row["vqa_probability"] for row in alone.score([entry.file], own)[0]]
        np.testing.assert_allclose(line["probabilities"], wanted, rtol=1e-4)
        assert line["soft_tifa_am"] == pytest.approx(np.mean(wanted), rel=1e-4)
    assert command(paths, **asked) == printed
    networks.save_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="which answers no questions; blip_vqa, qwen3_vl, vqascore do"):
        command(paths, **asked | {"vqa": str(tmp_path / "clip")})


def test_what_is_missing(tmp_path, data):
    images(tmp_path / "made", PROMPTS, samples=1)
    paths = tmp_path / "paths.json"
    paths.write_text(json.dumps({"a bird": "x.png"}))
    with pytest.raises(ValueError, match="--metadata is missing: GenEval 2's geneval2_data.jsonl"):
        command(paths, benchmark="geneval2")
    with pytest.raises(ValueError, match="1 prompts are not in GenEval 2's data, 'a bird' for one"):
        command(paths, benchmark="geneval2", metadata=str(data))


def test_a_sample_is_the_number_in_the_name(tmp_path, data):
    """Also of one file alone, where some are missing, and beyond nine."""
    rows = geneval2.read_data(data)
    for number in (2, 10):
        (tmp_path / f"score_lists_{number}.json").write_text(json.dumps(SCORES))
        (tmp_path / f"image_paths_{number}.json").write_text(json.dumps({"a bird": f"{number}.png"}))
    assert {sample for _, sample in geneval2.import_scores(tmp_path, rows)} == {2, 10}
    assert {sample for _, sample in geneval2.import_scores(tmp_path / "score_lists_2.json", rows)} == {2}
    assert [(x.file.name, x.sample) for x in geneval2.read_paths(tmp_path)] == [("2.png", 2), ("10.png", 10)]
    other = tmp_path / "scores.json"
    other.write_text(json.dumps(SCORES))
    assert {sample for _, sample in geneval2.import_scores(other, rows)} == {0}
