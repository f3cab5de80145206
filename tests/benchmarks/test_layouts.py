"""Folders for external benchmarks, and their result files: nothing misnamed, nothing mixed, nothing half written."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from referee_jax import config, items
from referee_jax.benchmarks import layouts
from referee_jax.items import Item
from referee_jax.storage import files as files_lib
from referee_jax.storage import run_directory

PROMPTS = ["a red star and a blue circle", "a blue star. And a café", "3 stars"]
METADATA = [{"tag": tag, "include": [], "prompt": text} for tag, text in zip("abb", reversed(PROMPTS), strict=True)]


def images(directory, prompts=PROMPTS, samples=2):
    """One-colour PNGs, all different, with the entries that name them."""
    directory.mkdir(exist_ok=True)
    entries = []
    for n, item in enumerate(items.expand(prompts, samples)):
        file = directory / f"{item.id}.png"
        Image.fromarray(np.full((2, 2, 3), n, np.uint8)).save(file)
        entries.append(layouts.Entry(file, item.prompt, item.sample))
    return entries


def content(entries):
    """Prompt and sample -> what the image shows."""
    return {(x.prompt, x.sample): int(np.asarray(Image.open(x.file))[0, 0, 0]) for x in entries}


def files(directory):
    return sorted(x.relative_to(directory).as_posix() for x in directory.rglob("*") if x.is_file())


def metadata(directory, records=METADATA):
    file = directory / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def answer(directory, folder, answers):
    """A result file of T2I-CompBench: question_id -> answer."""
    file = directory / folder / "vqa_result.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([{"question_id": n, "answer": x} for n, x in answers.items()]))
    return file


# --- run directories --------------------------------------------------------------------------------------------------


def test_a_run_directory_is_read_in_the_journals_order(tmp_path):
    run = run_directory.RunDirectory.open(tmp_path / "run", config.from_config({"image_size": 16}))
    assert layouts.read_run(run.path) == []
    lines = [Item("b", 1), Item("a", 0), Item("b", 0), Item("lost", 0), Item("b", 1)]
    for n, item in enumerate(lines):
        status = "nonfinite" if n == 1 else "done"
        record = {"file_name": f"images/{item.id}.png", "text": item.prompt, "sample": item.sample, "status": status}
        files_lib.append(run.journal, record)
        if item.prompt != "lost":
            Image.new("RGB", (1, 1)).save(run.images / f"{item.id}.png")
    with open(run.journal, "a") as file:
        file.write('{"file_name": "images/other.png"}\n{"half')
    found = layouts.read_run(run.path)
    assert [(x.prompt, x.sample) for x in found] == [("b", 1), ("a", 0), ("b", 0)]
    assert all(x.file == run.images / f"{Item(x.prompt, x.sample).id}.png" for x in found)


def test_another_directory_is_no_run(tmp_path):
    with pytest.raises(run_directory.RunError, match="is not a run directory"):
        layouts.read_run(tmp_path)
    with pytest.raises(ValueError, match="is not a run directory"):
        layouts.read_run(tmp_path / "nowhere")


# --- T2I-CompBench: names ---------------------------------------------------------------------------------------------


def test_a_name():
    name = layouts.t2i_compbench_name("a green bench", 42)
    assert name == "a green bench_000042.png"
    assert layouts.parse_t2i_compbench_name(name) == ("a green bench", 42)
    # What other programs call their images is read as the scorers read it.
    assert layouts.parse_t2i_compbench_name("a dog_sits_7.png") == ("a dog", 7)
    assert layouts.parse_t2i_compbench_name("a dog._0.5.jpg") == ("a dog.", 0)


@given(st.text(st.characters() | st.sampled_from("_/.\0png")), st.integers(0, 10**7))
@example("a" * 245, 0)
@example("a" * 244 + "é", 0)
@example("a.png", 0)
@example("\udc80", 0)
def test_a_name_gives_prompt_and_number_back_or_is_refused(prompt, number):
    try:
        name = layouts.t2i_compbench_name(prompt, number)
    except ValueError as error:
        assert "cannot be part of a file name" in str(error)
        size = len(f"{prompt}_{number:06d}.png".encode("utf-8", "surrogatepass"))
        half = any(0xD800 <= ord(x) < 0xE000 for x in prompt)
        assert size > 255 or half or any(x in prompt for x in ("_", "/", "\0", ".png"))
        return
    assert layouts.parse_t2i_compbench_name(name) == (prompt, number)
    # The scorers' several ways to the number: after the last "_", after the first one, before the first ".png".
    parts = name.split("_")
    assert len(parts) == 2 and name.index(".png") == len(name) - len(".png")
    assert len(os.fsencode(name)) <= 255 and not set(name) & set("/\0")


@pytest.mark.parametrize("name", ["a dog.png", "000001.png", "a dog_.png", "a dog_x1.png", "a dog_-1.png", ".DS_Store"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="is no image of T2I-CompBench"):
        layouts.parse_t2i_compbench_name(name)


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="-1 is negative"):
        layouts.t2i_compbench_name("a dog", -1)


# The benchmark's own lists, which are no part of the project.
LISTS = pathlib.Path(os.environ.get("T2I_COMPBENCH") or pathlib.Path(__file__).parents[3] / "shared" / "t2i-compbench")


@pytest.mark.skipif(not LISTS.is_dir(), reason="T2I_COMPBENCH is not the directory of the benchmark's prompt lists")
def test_every_prompt_of_the_benchmark_has_a_name():
    lists = sorted(LISTS.glob("*_val.txt"))
    assert lists
    for file in lists:
        prompts = file.read_text(encoding="utf-8").splitlines()
        names = [layouts.t2i_compbench_name(prompt, n) for n, prompt in enumerate(prompts)]
        assert [layouts.parse_t2i_compbench_name(name) for name in names] == list(zip(prompts, range(300), strict=True))


# --- T2I-CompBench: folders -------------------------------------------------------------------------------------------


def test_t2i_compbench_there_and_back(tmp_path):
    entries = images(tmp_path / "in")
    out = tmp_path / "deep" / "out"
    assert layouts.export_t2i_compbench(entries[::-1], out, prompts=PROMPTS, per_prompt=2) == 6
    assert files(out) == sorted(f"samples/{PROMPTS[n // 2]}_{n:06d}.png" for n in range(6))
    found = layouts.read_t2i_compbench(out)
    assert [(x.prompt, x.sample) for x in found] == [(x.prompt, x.sample) for x in entries]
    assert content(found) == content(entries)


def test_prompts_come_in_the_order_of_their_first_image(tmp_path):
    entries = images(tmp_path / "in")
    layouts.export_t2i_compbench([entries[3], *entries[:3], *entries[4:]], tmp_path / "out", per_prompt=2)
    found = layouts.read_t2i_compbench(tmp_path / "out")
    assert [x.prompt for x in found[::2]] == [PROMPTS[1], PROMPTS[0], PROMPTS[2]]
    assert content(found) == content(entries)


def test_any_number_of_samples_if_so_wanted(tmp_path):
    entries = images(tmp_path / "in")
    assert layouts.export_t2i_compbench(entries[1:], tmp_path / "out", prompts=PROMPTS, per_prompt=None) == 5
    names = [x.file.name for x in layouts.read_t2i_compbench(tmp_path / "out")]
    assert names[:2] == [f"{PROMPTS[0]}_000000.png", f"{PROMPTS[1]}_000001.png"]


EXPORTS = {
    "t2i_compbench": lambda entries, out, **kwargs: layouts.export_t2i_compbench(entries, out, **kwargs),
    "geneval": lambda entries, out, **kwargs: layouts.export_geneval(entries, out, metadata(out.parent), **kwargs),
}


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
def test_wrong_counts_are_refused_and_nothing_is_written(tmp_path, export):
    entries = images(tmp_path / "in")
    out = tmp_path / "out"
    for given_entries, per_prompt, wrong in (
        (entries, 3, "3 of 3 prompts do not have samples 0 to 2"),
        (entries[:-1], 2, f"1 of 3 .*: '{PROMPTS[2]}'"),
        ([*entries[:5], layouts.Entry(entries[5].file, PROMPTS[2], 2)], 2, "1 of 3"),
        ([*entries, entries[0]], None, f"each sample once: '{PROMPTS[0]}'"),
    ):
        with pytest.raises(ValueError, match=wrong):
            export(given_entries, out, per_prompt=per_prompt)
    assert not out.exists()
    with pytest.raises(ValueError, match="and 4 more"):
        layouts.export_t2i_compbench([layouts.Entry(entries[0].file, str(n), 0) for n in range(9)], out)


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
def test_an_export_goes_on_where_it_was_cut_off(tmp_path, export, monkeypatch):
    entries = images(tmp_path / "in")
    out, replace, calls = tmp_path / "out", os.replace, []

    def fails(source, target):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", fails)
        export(entries, out, per_prompt=2)
    early = {x: (out / x).stat().st_mtime_ns for x in files(out) if not x.startswith(".")}
    assert 0 < len(early) < 6 and all(pathlib.Path(x).suffix in (".png", ".jsonl") for x in early)
    assert export(entries, out, per_prompt=2) == 6
    assert early == {x: (out / x).stat().st_mtime_ns for x in early}
    assert content(layouts.read_t2i_compbench(out) if "samples" in os.listdir(out) else layouts.read_geneval(out)) == (
        content(entries)
    )
    # Once more, and there is nothing to do.
    monkeypatch.setattr(files_lib, "write_atomic", None)
    assert export(entries, out, per_prompt=2) == 6


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
def test_other_images_are_not_mixed_in(tmp_path, export):
    entries = images(tmp_path / "in")
    out = tmp_path / "out"
    export(entries, out, per_prompt=2)
    before = files(out)
    changed = [layouts.Entry(entries[0].file, x.prompt, x.sample) for x in entries]
    fewer = [x for x in entries if x.sample == 0]
    for other in changed, fewer:
        with pytest.raises(ValueError, match="holds other files already"):
            export(other, out, per_prompt=None)
    assert files(out) == before


def test_prompts_that_cannot_be_named_or_are_not_asked_for(tmp_path):
    entries = images(tmp_path / "in", ["snake_case"])
    with pytest.raises(ValueError, match="'snake_case' cannot be part of a file name of T2I-CompBench: it holds '_'"):
        layouts.export_t2i_compbench(entries, tmp_path / "out", per_prompt=2)
    with pytest.raises(ValueError, match="does not have: 'snake_case'"):
        layouts.export_t2i_compbench(entries, tmp_path / "out", prompts=PROMPTS, per_prompt=2)
    with pytest.raises(ValueError, match="does not have: 'snake_case'"):
        layouts.export_geneval(entries, tmp_path / "out", metadata(tmp_path))
    assert not (tmp_path / "out").exists()


def test_the_longest_name_can_be_written(tmp_path):
    prompt = "é" * 122
    entries = [layouts.Entry(images(tmp_path / "in", ["x"], 1)[0].file, prompt, 0)]
    layouts.export_t2i_compbench(entries, tmp_path / "out", per_prompt=1)
    assert layouts.read_t2i_compbench(tmp_path / "out")[0].prompt == prompt


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no folder samples"):
        layouts.read_t2i_compbench(tmp_path)
    for names, wrong in ((["a_1.png", "b_01.png"], "the same number: 1"), (["a_1.png", "Thumbs.db"], "'Thumbs.db'")):
        folder = tmp_path / wrong[:4] / "samples"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).touch()
        with pytest.raises(ValueError, match=wrong):
            layouts.read_t2i_compbench(folder.parent)


# --- T2I-CompBench: results -------------------------------------------------------------------------------------------


def folder_with_gaps(tmp_path):
    """Numbers that stand in another order as text, and with one left out: 2, 9, 10."""
    names = ["z_10.png", "b_9.png", "a_000002.png"]
    for name in names:
        (tmp_path / "samples").mkdir(exist_ok=True)
        (tmp_path / "samples" / name).touch()
    return names[::-1]


def test_official_results_go_to_their_images(tmp_path):
    names = folder_with_gaps(tmp_path)
    assert layouts.import_t2i_compbench(tmp_path) == {}
    # Some scorers count images, in the order of their numbers; others give the number itself. BLIP-VQA writes text.
    answer(tmp_path, "annotation_blip", {0: "0.7110", 1: "0.0000", 2: "1.0000"})
    answer(tmp_path, "annotation_clip", {0: 0.358642578125, 1: 0.25, 2: 0.3251953125})
    answer(tmp_path, "annotation_3_in_1", {0: 0.1, 1: 0.2, 2: 0.3})
    answer(tmp_path, "labels/annotation_obj_detection_2d", {2: 0, 9: 0.75, 10: 1.0})
    answer(tmp_path, "labels/annotation_obj_detection_3d", {10: 0.5, 2: 0.25, 9: 0})
    answer(tmp_path, "annotation_num", {2: 0.5, 9: 1, 10: 0.25})
    assert layouts.import_t2i_compbench(tmp_path) == {
        "blip_vqa": dict(zip(names, [0.711, 0.0, 1.0], strict=True)),
        "clip": dict(zip(names, [0.358642578125, 0.25, 0.3251953125], strict=True)),
        "3_in_1": dict(zip(names, [0.1, 0.2, 0.3], strict=True)),
        "unidet_2d": dict(zip(names, [0.0, 0.75, 1.0], strict=True)),
        "unidet_3d": dict(zip(names, [0.25, 0.0, 0.5], strict=True)),
        "unidet_numeracy": dict(zip(names, [0.5, 1.0, 0.25], strict=True)),
    }


def test_an_older_scorers_folder(tmp_path):
    names = folder_with_gaps(tmp_path)
    old = answer(tmp_path, "labels/annotation_obj_detection", {2: 0, 9: 0.75, 10: 1.0})
    assert layouts.import_t2i_compbench(tmp_path) == {"unidet_2d": dict(zip(names, [0.0, 0.75, 1.0], strict=True))}
    shutil.copytree(old.parent, tmp_path / "labels" / "annotation_obj_detection_2d")
    with pytest.raises(ValueError, match="is a second result of unidet_2d"):
        layouts.import_t2i_compbench(tmp_path)


GOOD = '{"question_id": 0, "answer": 0.5}, {"question_id": 1, "answer": 0.5}'


@pytest.mark.parametrize(
    "text, wrong",
    [
        (f"[{GOOD}", "is damaged: Expecting"),
        (f'{{"a": [{GOOD}]}}', "no list"),
        (f"[{GOOD}, 3]", "3 is no answer"),
        (f'[{GOOD}, {{"question_id": 2}}]', "is no answer"),
        (f'[{GOOD}, {{"question_id": "2", "answer": 1}}]', "is no answer"),
        (f'[{GOOD}, {{"question_id": 2, "answer": null}}]', "is no answer"),
        (f'[{GOOD}, {{"question_id": 2, "answer": true}}]', "is no answer"),
        (f'[{GOOD}, {{"question_id": 2, "answer": "nan"}}]', "is no answer"),
        (f'[{GOOD}, {{"question_id": 2, "answer": NaN}}]', "is no answer"),
        (f'[{GOOD}, {{"question_id": 2, "answer": 1{"0" * 400}}}]', "is no answer"),
        (f'[{GOOD}, {{"question_id": 1, "answer": 0.5}}]', "question_id 1 is answered twice"),
        (f"[{GOOD}]", "2 scores for 3 images; on one side only: place 2"),
        (f'[{GOOD}, {{"question_id": 3, "answer": 0.5}}]', "3 scores for 3 images; on one side only: place 2, 3"),
    ],
)
def test_damaged_or_foreign_results_are_refused(tmp_path, text, wrong):
    folder_with_gaps(tmp_path)
    answer(tmp_path, "annotation_clip", {}).write_text(text)
    with pytest.raises(ValueError, match=f"annotation_clip/vqa_result.json.*{wrong}"):
        layouts.import_t2i_compbench(tmp_path)


# --- GenEval ----------------------------------------------------------------------------------------------------------


def test_geneval_there_and_back(tmp_path):
    entries, out = images(tmp_path / "in"), tmp_path / "out"
    file = metadata(tmp_path)
    assert layouts.export_geneval(entries, out, file, per_prompt=2) == 6
    places = [f"{n:05d}" for n in range(3)]
    assert files(out) == sorted(f"{x}/{y}" for x in places for y in ("metadata.jsonl", *NAMES))
    assert [(out / x / "metadata.jsonl").read_text() for x in places] == file.read_text().splitlines(keepends=True)
    (out / "00001" / "grid.png").touch()
    (out / "00001" / "samples" / "notes.txt").touch()
    (out / "results.jsonl").touch()
    found = layouts.read_geneval(out)
    assert [x.prompt for x in found[::2]] == PROMPTS[::-1] and content(found) == content(entries)


NAMES = ("samples/00000.png", "samples/00001.png")


def test_geneval_with_some_prompts_only_and_one_named_twice(tmp_path):
    entries, out = images(tmp_path / "in"), tmp_path / "out"
    file = metadata(tmp_path, [*METADATA, METADATA[0]])
    assert layouts.export_geneval(entries[3:], out, file, per_prompt=None) == 5
    wanted = {"00000": NAMES, "00001": NAMES[1:], "00003": NAMES}
    assert files(out) == sorted(f"{x}/{y}" for x, own in wanted.items() for y in ("metadata.jsonl", *own))


@pytest.mark.parametrize("line", ["", "{", '"a"', '{"prompt": "a"}', '{"prompt": 1, "tag": "a"}', "[]"])
def test_other_metadata_are_refused(tmp_path, line):
    file = metadata(tmp_path)
    file.write_text(f"{file.read_text()}{line}\n{json.dumps(METADATA[0])}\n")
    with pytest.raises(ValueError, match="line 4 of .*evaluation_metadata.jsonl"):
        layouts.export_geneval(images(tmp_path / "in"), tmp_path / "out", file, per_prompt=2)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_of_geneval_are_refused(tmp_path):
    for folder in tmp_path, tmp_path / "nowhere":
        with pytest.raises(ValueError, match="is no folder of GenEval"):
            layouts.read_geneval(folder)
    (tmp_path / "00000").mkdir()
    with pytest.raises(ValueError, match="metadata.jsonl does not name a prompt"):
        layouts.read_geneval(tmp_path)


def result(place, sample, tag, correct, folder="/far/away"):
    name = f"{folder}/{place:05d}/samples/{sample:05d}.png"
    return {"filename": name, "tag": tag, "prompt": "a", "correct": correct, "reason": "", "metadata": "{}"}


def test_geneval_results_go_to_their_images(tmp_path):
    file = tmp_path / "results.jsonl"
    records = [result(1, 0, "colors", True), result(0, 1, "counting", False), result(0, 0, "counting", True, "C:\\out")]
    # As pandas writes it: "/" escaped.
    file.write_text("\n".join(json.dumps(record).replace("/", "\\/") for record in records))
    found = layouts.import_geneval(file)
    assert found == {
        "colors": {"00001/samples/00000.png": 1.0},
        "counting": {"00000/samples/00001.png": 0.0, "00000/samples/00000.png": 1.0},
    }
    out = tmp_path / "out"
    layouts.export_geneval(images(tmp_path / "in"), out, metadata(tmp_path), per_prompt=2)
    assert all((out / name).is_file() for own in found.values() for name in own)


FIRST = result(0, 0, "counting", True)


@pytest.mark.parametrize(
    "line, wrong",
    [
        ("", "line 2 of .* is damaged"),
        ("{", "line 2 of .* is damaged"),
        ("1", "is no result of GenEval: 1"),
        (json.dumps(FIRST | {"correct": None}), "is no result"),
        (json.dumps(FIRST | {"filename": "a.png"}), "is no result"),
        (json.dumps(FIRST | {"correct": False}), "line 2 of .*: 00000/samples/00000.png has a result already"),
    ],
)
def test_damaged_results_of_geneval_are_refused(tmp_path, line, wrong):
    file = tmp_path / "results.jsonl"
    file.write_text("")
    with pytest.raises(ValueError, match="has no results"):
        layouts.import_geneval(file)
    file.write_text(f"{json.dumps(FIRST)}\n{line}\n")
    with pytest.raises(ValueError, match=wrong):
        layouts.import_geneval(file)
