"""Whole evaluations of small run directories, by the command's own function."""

import json
import re
import types

import numpy as np
import PIL.Image
import pytest
import scipy.stats
from absl import flags

from referee_jax import evaluate
from referee_jax.benchmarks import evaluation, layouts, measures, noun_phrases
from referee_jax.cli import tell
from referee_jax.shapes import world
from referee_jax.storage import files
from tests.lazy import transformers
from tests.oracles import networks

PROMPTS = ("a red circle and a blue square", "a green star above a pink ring", "three black crosses")


def drawn(prompt: str, *, right: bool) -> PIL.Image.Image:
    """A picture of the prompt, or of one object only."""
    said = world.parse(prompt)
    things = said.things * said.count
    places = [(14, 14), (32, 50), (50, 14)][: len(things) if right else 1]
    objects = [world.Object(t.shape, t.colour, x=x, y=y, radius=9) for t, (x, y) in zip(things, places, strict=False)]
    pixels = world.draw(world.Scene(tuple(objects)))[0]
    return PIL.Image.fromarray(np.round(pixels * 255).astype(np.uint8))


@pytest.fixture
def run(tmp_path):
    """A run directory: two samples of each prompt, the second wrong but for the first prompt."""
    (tmp_path / "images").mkdir()
    (tmp_path / "config.json").write_text("{}")
    for n, prompt in enumerate(PROMPTS):
        for sample in (0, 1):
            name = f"images/{n}-{sample}.png"
            drawn(prompt, right=sample == 0 or n == 0).save(tmp_path / name)
            files.append(tmp_path / "metadata.jsonl", {"file_name": name, "text": prompt, "sample": sample})
    return tmp_path


def command(workdir, **given):
    """The command's flags with their defaults."""
    known = dict(
        benchmark=None, referee=[], lists=None, category=None, vqa=None, clip=None, noun_phrases="new",
        export=None, metadata=None, import_scores=None, out=None, per_prompt=None, truncate=None,
    )  # fmt: skip
    return evaluate.evaluate(types.SimpleNamespace(workdir=str(workdir), **(known | given)))


def test_shapes(run, monkeypatch):
    printed = command(run, benchmark="shapes")
    found = json.loads((run / "evaluation" / "scores.json").read_text())["scores"]
    shares = {part: own["right"]["mean"] for part, own in found.items()}
    assert shares == pytest.approx({
        "all": 4 / 6, "colour": 1.0, "colour, seen": 1.0, "spatial": 0.5, "spatial, seen": 0.5,
        "numeracy": 0.5, "numeracy, seen": 0.5,
    })  # fmt: skip
    assert found["all"]["right"]["prompts"] == 3 and found["all"]["right"]["images"] == 6
    assert "| all | 6 | 0.667 (0.50..1.00) |" in printed
    lines = files.read_lines(run / "evaluation" / "images.jsonl")
    assert [line["right"] for line in lines] == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    assert [(line["prompt"], line["sample"]) for line in lines] == [(p, s) for p in PROMPTS for s in (0, 1)]
    # Again: nothing is measured twice, but what has changed.
    asked = []
    score = measures.benchmark.score
    monkeypatch.setattr(
        measures.benchmark, "score", lambda images, texts: asked.append(len(texts)) or score(images, texts)
    )
    assert command(run, benchmark="shapes") == printed and asked == []
    drawn(PROMPTS[1], right=True).save(run / "images" / "1-1.png")
    assert "| all | 6 | 0.833" in command(run, benchmark="shapes") and asked == [1]


def test_any_referee_scores(run, tmp_path_factory):
    """Two of one kind are told apart by their checkpoints."""
    root = tmp_path_factory.mktemp("referees")
    checkpoints = [str(root / "a"), str(root / "b")]
    for seed, path in enumerate(checkpoints):
        networks.save_clip(root / path, seed=seed)
    for given, names in ((checkpoints[:1], ["clip_cosine"]), (checkpoints, [f"{path}_cosine" for path in checkpoints])):
        printed = command(run, referee=given)
        lines = files.read_lines(run / "evaluation" / "images.jsonl")
        means = [np.mean([line[name] for line in lines]) for name in names]
        assert np.ptp([line[names[0]] for line in lines]) > 1e-3 and len({f"{mean:.3f}" for mean in means}) == len(
            names
        )
        assert all(f"{mean:.3f} (" in printed for mean in means) and all(name in printed for name in names)
        measured = json.loads((run / "evaluation" / "scores.json").read_text())["measures"]
        assert sorted(own["checkpoint"] for own in measured.values()) == sorted(given)


LONG = "a red circle" + " !" * 90


@pytest.mark.parametrize("is_run", [True, False])
@pytest.mark.parametrize("truncate", [None, True, False])
def test_one_prompt_or_picture_spoils_no_other(run, tmp_path_factory, is_run, truncate):
    """What is too long is cut in folders of others, or on demand; what cannot be measured is named, and the rest is there."""
    networks.save_clip(checkpoint := tmp_path_factory.mktemp("clip"))
    drawn(PROMPTS[0], right=True).save(run / "images" / "3-0.png")
    files.append(run / "metadata.jsonl", {"file_name": "images/3-0.png", "text": LONG, "sample": 0})
    (run / "images" / "1-1.png").write_bytes(b"no picture")
    if not is_run:
        (run / "samples").mkdir()
        for n, line in enumerate(files.read_lines(run / "metadata.jsonl")):
            (run / line["file_name"]).rename(run / "samples" / f"{line['text']}_{n:06}.png")
        (run / "metadata.jsonl").unlink()
    given = {"referee": [str(checkpoint)], "truncate": truncate}
    printed = command(run, **given)
    lines = files.read_lines(run / "evaluation" / "images.jsonl")
    is_cut = truncate or (truncate is None and not is_run)
    missing = [line for line in lines if "clip_cosine" not in line]
    assert len(lines) == 7 and len(missing) == (1 if is_cut else 2) and f"| all | {7 - len(missing)} |" in printed
    assert all(line.keys() == {"file", "prompt", "sample"} for line in missing)
    assert ("clip: 1 of 4 prompts are too long and were cut as by its authors, 'a red circle" in printed) == is_cut
    assert (
        f"clip could not measure {len(missing)}: " in printed
        and "cannot be read as an image: cannot identify" in printed
    )
    assert ("95 tokens, clip reads 77" in printed) == ("--truncate cuts what is too long" in printed) == (not is_cut)
    assert command(run, **given) == printed  # from what it has kept


def test_nothing_that_can_be_measured(run, tmp_path_factory):
    networks.save_clip(checkpoint := tmp_path_factory.mktemp("clip"))
    lines = files.read_lines(run / "metadata.jsonl")
    (run / "metadata.jsonl").write_text("".join(json.dumps(line | {"text": LONG}) + "\n" for line in lines))
    with pytest.raises(ValueError, match="clip can measure none of the images: a red .*: 95 tokens, clip reads 77"):
        command(run, referee=[str(checkpoint)])


def test_scores_are_compared_with_the_truth(run, tmp_path_factory):
    """BLIP-VQA and a referee of the same pictures: how far they agree with the detector, and what they like in vain."""
    root = tmp_path_factory.mktemp("referees")
    networks.save_clip(root / "clip")
    networks.save_blip(networks.blip(transformers.BlipForQuestionAnswering), root / "vqa")
    printed = command(run, benchmark="shapes", vqa=str(root / "vqa"), referee=[str(root / "clip")])
    # A referee is told from a measure of the benchmark's of the same name.
    measured = json.loads((run / "evaluation" / "scores.json").read_text())["measures"]
    assert list(measured) == ["shapes", "blip_vqa", "referee clip"]
    lines = files.read_lines(run / "evaluation" / "images.jsonl")
    found = json.loads((run / "evaluation" / "scores.json").read_text())["agreement"]
    assert list(found) == ["blip_vqa", "clip_cosine"]
    for name, own in found.items():
        scores = [line[name] for line in lines]
        expected = scipy.stats.spearmanr(scores, [line["right"] for line in lines])[0]
        assert own["rank_correlation"] == pytest.approx(expected) and f"| {name} | {expected:.3f} (" in printed
    with PIL.Image.open(run / "evaluation" / "fooled.png") as sheet:
        assert sheet.width > 400
    assert "rank correlation" not in command(run, benchmark="shapes")


def test_t2i_compbench_there_and_back(run, tmp_path_factory):
    """Exported, read again, measured by BLIP-VQA and CLIP, merged with what official scorers would have left."""
    root = tmp_path_factory.mktemp("t2i")
    networks.save_clip(root / "clip")
    networks.save_blip(networks.blip(transformers.BlipForQuestionAnswering), root / "vqa")
    assert command(run, export="t2i_compbench", out=str(root / "out"), per_prompt=2) == f"6 images in {root / 'out'}\n"
    for name, texts in {
        "complex_val": PROMPTS,
        "complex_val_action": PROMPTS[:1],
        "complex_val_spatial": PROMPTS[1:],
    }.items():
        (root / f"{name}.txt").write_text("\n".join(texts))
    folder = root / "out" / "labels" / "annotation_obj_detection_2d"
    folder.mkdir(parents=True)
    answers = [{"question_id": n, "answer": n / 10} for n in range(6)]
    (folder / "vqa_result.json").write_text(json.dumps(answers))
    given = {"vqa": str(root / "vqa"), "clip": str(root / "clip"), "lists": str(root)}
    command(root / "out", benchmark="t2i_compbench", import_scores=str(root / "out"), **given)
    lines = files.read_lines(root / "out" / "evaluation" / "images.jsonl")
    assert [line["unidet_2d"] for line in lines] == [n / 10 for n in range(6)]
    for n, line in enumerate(lines):
        parts = ["blip_vqa", "clip_without_adjectives" if n < 2 else "unidet_2d"]
        assert line["3_in_1"] == pytest.approx(np.mean([line[name] for name in parts]))
    found = json.loads((root / "out" / "evaluation" / "scores.json").read_text())
    assert found["scores"]["complex, spatial"]["3_in_1"]["images"] == 4
    assert found["measures"]["blip_vqa"]["noun_phrases"] == "new"
    assert found["measures"]["blip_vqa"]["chunker"] == noun_phrases.SHAPES


def written(root, **lists):
    """A directory of prompt lists."""
    root.mkdir(exist_ok=True)
    for name, texts in lists.items():
        (root / f"{name}.txt").write_text("\n".join(texts) + "\n")
    return str(root)


def test_an_export_is_in_the_order_of_its_list(run):
    """Which the 3-in-1 scorer needs, and a run of several processes does not have."""
    lines = files.read_lines(run / "metadata.jsonl")
    (run / "metadata.jsonl").unlink()
    for n in (5, 0, 3, 4, 1, 2):
        files.append(run / "metadata.jsonl", lines[n])
    listed = [PROMPTS[1], "a dog", *PROMPTS[:1], PROMPTS[2]]
    lists = written(run / "lists", color_val=["a cat", PROMPTS[0]], complex_val=listed, complex_val_spatial=PROMPTS[:1])
    out, given = run / "out", {"export": "t2i_compbench", "per_prompt": 2}
    said = command(run, lists=lists, out=str(out), **given)
    assert said == f"6 images in {out}, of 3 of the 4 prompts of complex, in their order\n"
    names = [f"{listed[n]}_{number:06d}.png" for number, n in enumerate((0, 0, 2, 2, 3, 3))]
    assert [entry.file.name for entry in layouts.read_t2i_compbench(out)] == names
    for n, entry in enumerate(layouts.read_t2i_compbench(out)):
        original = run / f"images/{PROMPTS.index(entry.prompt)}-{n % 2}.png"
        assert entry.file.read_bytes() == original.read_bytes()
    command(run, out=str(run / "unordered"), **given)
    assert [entry.prompt for entry in layouts.read_t2i_compbench(run / "unordered")[::2]] == [
        PROMPTS[n] for n in (2, 0, 1)
    ]
    for other, message in (
        ({"category": "color"}, "no color_val.txt of"),
        ({}, r"no \*_val.txt of .* has all 3 prompts"),
    ):
        (run / "lists" / "complex_val.txt").write_text("a dog" if not other else "\n".join(listed))
        with pytest.raises(ValueError, match=message):
            command(run, lists=lists, out=str(run / "other"), **given, **other)


OFFICIAL = {
    "annotation_blip": [0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
    "annotation_clip": [0.3, 0.31, 0.32, 0.33, 0.34, 0.35],
    "labels/annotation_obj_detection_2d": [0.0, 0.5, 1.0, 0.5, 0.25, 0.75],
}


def answered(out, folder, scores):
    """What an official scorer leaves."""
    (out / folder).mkdir(parents=True)
    answers = [{"question_id": n, "answer": score} for n, score in enumerate(scores)]
    (out / folder / "vqa_result.json").write_text(json.dumps(answers))


@pytest.fixture
def warned(monkeypatch):
    """The warnings of the command."""
    said = []
    monkeypatch.setattr(evaluate.logging, "warning", lambda text, *given: said.append(text % given))
    return said


def merged(out, **given):
    """The table, scores.json and images.jsonl of an evaluation with what was imported."""
    printed = command(out, benchmark="t2i_compbench", import_scores=str(out), **given)
    lines = files.read_lines(out / "evaluation" / "images.jsonl")
    return printed, json.loads((out / "evaluation" / "scores.json").read_text()), lines


def test_what_is_imported_is_not_measured(run, tmp_path_factory, warned, monkeypatch):
    """Nor are weights asked for: those that are the default are not there."""
    monkeypatch.setattr(measures, "_judge", lambda *of: pytest.fail(f"weights are asked for: {of}"))
    root = tmp_path_factory.mktemp("merge")
    kinds = {
        "complex_val_action": PROMPTS[:1],
        "complex_val_spatial": PROMPTS[1:2],
        "complex_val_spatialaction": PROMPTS[2:],
    }
    lists = written(root / "lists", complex_val=PROMPTS, **kinds)
    out = root / "out"
    command(run, export="t2i_compbench", lists=lists, out=str(out), per_prompt=2)
    for folder, scores in OFFICIAL.items():
        answered(out, folder, scores)
    printed, found, lines = merged(out, lists=lists)
    blip, clip, unidet = OFFICIAL.values()
    assert [line["blip_vqa"] for line in lines] == blip and [line["unidet_2d"] for line in lines] == unidet
    # The official CLIP result of complex prompts is of their words without adjectives.
    assert [line["clip_without_adjectives"] for line in lines] == clip and not any("clip" in line for line in lines)
    three = [(blip[n] + clip[n]) / 2 for n in (0, 1)] + [(blip[n] + unidet[n]) / 2 for n in (2, 3)]
    three += [(blip[n] + clip[n] + unidet[n]) / 3 for n in (4, 5)]
    assert [line["3_in_1"] for line in lines] == pytest.approx(three)
    names = ("blip_vqa", "clip_without_adjectives", "unidet_2d")
    assert found["measures"] == {name: {"imported": str(out)} for name in names}
    assert printed.startswith(f"|  | images | {' | '.join(f'{name} (imported)' for name in names)} | 3_in_1 |\n")
    assert found["scores"]["complex, action"]["3_in_1"]["images"] == 2 and warned == []
    # Theirs is kept.
    answered(out, "annotation_3_in_1", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    printed, found, lines = merged(out, lists=lists)
    assert [line["3_in_1"] for line in lines] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert found["measures"]["3_in_1"] == {"imported": str(out)} and "| 3_in_1 (imported) |" in printed
    # Also where only the category is said; and what is not imported can be left out.
    assert [line["3_in_1"] for line in merged(out, category="complex")[2]] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert warned == []
    for folder in ("annotation_blip", "annotation_clip", "annotation_3_in_1"):
        (out / folder / "vqa_result.json").unlink()
    _, found, lines = merged(out, lists=lists, vqa="", clip="")
    assert list(found["measures"]) == ["unidet_2d"] and "blip_vqa" not in lines[0] and "3_in_1" not in lines[0]


def test_what_is_imported_is_measured_if_asked_for(run, tmp_path_factory, warned):
    root = tmp_path_factory.mktemp("merge")
    networks.save_blip(networks.blip(transformers.BlipForQuestionAnswering), root / "vqa")
    lists = written(root / "lists", complex_val=PROMPTS, complex_val_action=PROMPTS)
    out = root / "out"
    command(run, export="t2i_compbench", lists=lists, out=str(out), per_prompt=2)
    for folder, scores in OFFICIAL.items():
        answered(out, folder, scores)
    printed, found, lines = merged(out, lists=lists, vqa=str(root / "vqa"))
    assert found["measures"]["blip_vqa"]["checkpoint"] == str(root / "vqa")
    assert "blip_vqa (new noun phrases)" in printed and "clip_without_adjectives (imported)" in printed
    own = [line["blip_vqa"] for line in lines]
    assert own != OFFICIAL["annotation_blip"] and all("questions" in line for line in lines)
    clip = OFFICIAL["annotation_clip"]
    assert [line["3_in_1"] for line in lines] == pytest.approx([(a + b) / 2 for a, b in zip(own, clip, strict=True)])
    assert warned == [f"blip_vqa is measured by {root / 'vqa'}, what was imported is left out"]


def test_the_number_of_noun_phrases_is_said(tmp_path, monkeypatch):
    """The old one asks about two, places among them, and is kept apart from the new one."""
    networks.save_blip(networks.blip(transformers.BlipForQuestionAnswering), tmp_path / "vqa")
    (tmp_path / "samples").mkdir()
    prompt = "a red circle on the left of a blue square and a photo"
    spans = [
        [match.start(), match.end()] for match in re.finditer("a red circle|the left|a blue square|a photo", prompt)
    ]
    known = {"model": "by hand", "prompts": {noun_phrases.key(prompt): {"phrases": spans}}}
    monkeypatch.setattr(noun_phrases, "official", lambda: known)
    drawn(PROMPTS[0], right=True).save(tmp_path / "samples" / f"{prompt}_000000.png")
    asked = {"new": ["a red circle", "a blue square", "a photo"], "old": ["a red circle", "the left"]}
    for rule, phrases in asked.items():
        given = {"category": "color", "vqa": str(tmp_path / "vqa"), "noun_phrases": rule}
        printed = command(tmp_path, benchmark="t2i_compbench", **given)
        assert printed.startswith(f"|  | images | blip_vqa ({rule} noun phrases) |\n")
        found = json.loads((tmp_path / "evaluation" / "scores.json").read_text())
        measured = found["measures"]["blip_vqa"]
        assert (measured["noun_phrases"], measured["chunker"]) == (rule, "by hand")
        (line,) = files.read_lines(tmp_path / "evaluation" / "images.jsonl")
        assert list(line["questions"]) == phrases
        assert line["blip_vqa"] == pytest.approx(np.prod(list(line["questions"].values())))
    assert len(list((tmp_path / "evaluation").glob("blip_vqa-*.jsonl"))) == 2


def test_a_prompt_that_needs_spacy_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(noun_phrases, "load_spacy", lambda: None)
    monkeypatch.setattr(measures, "collect", lambda *of: pytest.fail("measured"))
    files.append(run / "metadata.jsonl", {"file_name": "images/0-0.png", "text": "a dog on a mat", "sample": 0})
    with pytest.raises(ValueError, match=r"1 prompts, 'a dog on a mat' for one.*referee_jax\[eval\]"):
        command(run, benchmark="t2i_compbench", category="color")


def test_lists_and_category(run, warned):
    entries = evaluation.read(run)
    lists = written(
        run / "lists",
        color_val=PROMPTS[:2],
        color_val_seen=PROMPTS[:1],
        shape_val=PROMPTS[1:],
        shape_val_unseen=PROMPTS[1:],
    )
    parts = lambda category: evaluation.parts("t2i_compbench", entries, lists, category)
    seen, unseen = ["color", "color, seen"], ["shape", "shape, unseen"]
    assert parts(None) == {PROMPTS[0]: seen, PROMPTS[1]: ["color", *unseen], PROMPTS[2]: unseen}
    with pytest.raises(ValueError, match=f"1 prompts are not in the list of shape of .*, '{PROMPTS[0]}' for one"):
        parts("shape")
    entries = entries[2:]
    assert parts("shape") == {PROMPTS[1]: unseen, PROMPTS[2]: unseen}
    assert evaluation.parts("t2i_compbench", entries, None, "shape") == {text: ["shape"] for text in PROMPTS[1:]}
    with pytest.raises(ValueError, match="nothing to measure by"):
        command(run, benchmark="t2i_compbench", category="complex", vqa="", clip="")
    assert warned == ["there is no 3_in_1 by --category=complex alone: --lists says of what kind a complex prompt is"]


def test_an_evaluation_goes_on_in_the_middle_of_a_measure(run, tmp_path_factory, monkeypatch):
    """Cut off while a batch is measured, and while a line is written: what has a line is not measured again."""
    asked, stops = [], [True]

    def measure():
        def score(images, prompts):
            asked.append(len(images))
            if len(asked) == 3 and stops.pop():
                raise KeyboardInterrupt
            right, quality = measures.benchmark.score([np.asarray(x, np.float32) / 255 for x in images], prompts)
            return [{"right": float(r), "quality": float(q)} for r, q in zip(right, quality, strict=True)]

        return measures.Measure("shapes", {}, lambda: (2, score))

    wanted = command(run, benchmark="shapes", out=str(tmp_path_factory.mktemp("straight")))
    monkeypatch.setattr(measures, "ground_truth", measure)
    with pytest.raises(KeyboardInterrupt):
        command(run, benchmark="shapes")
    (file,) = (run / "evaluation").glob("shapes-*.jsonl")
    assert len(files.read_lines(file)) == 4 and not (run / "evaluation" / "scores.json").exists()
    file.write_bytes(file.read_bytes()[:-20])
    asked.clear()
    stops.append(False)
    assert command(run, benchmark="shapes") == wanted and asked == [2, 1]
    assert len(files.read_lines(file)) == 6


@pytest.mark.parametrize(
    "given, code, said",
    [
        (["--benchmark=shapes"], 0, "| all | 6 | 0.667 (0.50..1.00) |"),
        (["--benchmark=t2i_compbench"], 2, "error: --lists is missing"),
        (["--export=t2i_compbench", "--per_prompt=2"], 0, "6 images in "),
    ],
)
def test_the_command_line(run, capsys, given, code, said):
    values = flags.FlagValues()
    evaluate.define_flags(values)
    values(["evaluate", f"--workdir={run}", "--device=cpu", *given])
    assert tell(lambda: evaluate.main(values)) == code
    printed = capsys.readouterr()
    assert said in (printed.err if code else printed.out)


def test_the_flags():
    values = flags.FlagValues()
    evaluate.define_flags(values)
    values(["evaluate"])
    assert (values.noun_phrases, values.vqa, values.clip, values.lists) == ("new", None, None, None)
    with pytest.raises(flags.IllegalFlagValueError, match="noun_phrases"):
        values(["evaluate", "--noun_phrases=8"])


def test_geneval_there_and_back(run, tmp_path_factory):
    root = tmp_path_factory.mktemp("geneval")
    metadata = root / "metadata.jsonl"
    metadata.write_text("".join(json.dumps({"tag": "colors", "prompt": prompt}) + "\n" for prompt in PROMPTS))
    with pytest.raises(ValueError, match="--metadata is missing"):
        command(run, export="geneval")
    command(run, export="geneval", out=str(root / "out"), metadata=str(metadata), per_prompt=2)
    results = [
        {"filename": str(entry.file), "tag": "colors", "prompt": entry.prompt, "correct": n > 0}
        for n, entry in enumerate(layouts.read_geneval(root / "out"))
    ]
    (root / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results))
    printed = command(root / "out", benchmark="geneval", import_scores=str(root / "results.jsonl"))
    assert "| all | 6 | 0.833 (0.50..1.00) | 0.833" in printed
    # Of two tags the total is the mean of 3/4 and 0, not of 3 right pictures of 6.
    for n, line in enumerate(results):
        line |= {"tag": "colors" if n < 4 else "counting", "correct": 0 < n < 4}
    (root / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results))
    printed = command(root / "out", benchmark="geneval", import_scores=str(root / "results.jsonl"))
    assert "|  | images | geneval | colors | counting |" in printed
    assert "| all | 6 | 0.375 (0.25..0.50) | 0.750 (0.50..1.00) | 0.000 (0.00..0.00) |" in printed
    found = json.loads((root / "out" / "evaluation" / "scores.json").read_text())
    assert found["scores"]["all"]["geneval"]["mean"] == 0.375 and found["scores"]["all"]["geneval"]["images"] == 6
    assert found["measures"]["geneval"] == {"imported": str(root / "results.jsonl")}


def test_bad_input(run, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for workdir, given, message in (
        (empty, {}, "is neither a run directory nor a folder"),
        (run, {}, "there is nothing to measure by"),
        (run, {"benchmark": "t2i_compbench"}, "--lists is missing"),
        (run, {"benchmark": "t2i_compbench", "lists": str(empty)}, "holds none of T2I-CompBench"),
        (run, {"referee": [str(empty / "none")]}, "is not a directory"),
        (run, {"import_scores": str(empty), "referee": []}, "--import_scores is of"),
        (run, {"export": "t2i_compbench", "per_prompt": 10}, "3 of 3 prompts do not have samples 0 to 9"),
    ):
        with pytest.raises(ValueError, match=message):
            command(workdir, **given)
    (empty / "t").mkdir()
    (empty / "color_val.txt").write_text("another prompt")
    with pytest.raises(ValueError, match="3 prompts are in none of the lists"):
        command(run, benchmark="t2i_compbench", lists=str(empty))
    files.append(run / "metadata.jsonl", {"file_name": "images/0-0.png", "text": "a dog", "sample": 0})
    with pytest.raises(ValueError, match="not a caption of the shapes world: 'a dog'|not a thing"):
        command(run, benchmark="shapes")
