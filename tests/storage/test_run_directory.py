"""Run directories: nothing is half written, lost or mixed up."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from referee_jax import config
from referee_jax.benchmarks import layouts, measures
from referee_jax.hardware import processes
from referee_jax.items import Item
from referee_jax.storage import contact_sheet, files, gallery_page, images, run_directory

SETTINGS = config.from_config({"seed": 7, "image_size": 16})
HELD_OUT = {"name": "blip_itm", "checkpoint": "any", "role": "held_out", "losses": {"itm": 1.0}}
WITH_HELD_OUT = config.from_config({"seed": 7, "image_size": 16, "referees": ({}, HELD_OUT)})


@dataclasses.dataclass(frozen=True)
class Picture:
    item: Item
    image: np.ndarray
    scores: dict
    status: str = "done"
    losses: dict | None = None
    questions: dict = dataclasses.field(default_factory=dict)


def picture(prompt="a red circle", sample=0, value=0.5, **changes):
    image = np.full((16, 16, 3), value, np.float32)
    image[:8, :, 0] = 0.25
    return Picture(Item(prompt, sample), image, {"cosine": 0.125, "held_out": 0.5}, **changes)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_image_and_its_line(tmp_path):
    run = run_directory.RunDirectory.open(tmp_path / "a" / "b", SETTINGS, device="cpu x 1")
    prompt = 'the "café" / 🙂'
    assert run.write(picture(prompt, 3), seconds=1.5) == "done"
    (record,) = lines(run.journal)
    name = Item(prompt, 3).id
    assert record.pop("time").endswith("Z")
    assert record == {
        "file_name": f"images/{name}.png",
        "text": prompt,
        "id": name,
        "sample": 3,
        "seed": 7,
        "scores": {"cosine": 0.125, "held_out": 0.5},
        "status": "done",
        "seconds": 1.5,
    }
    # ImageFolder resolves file_name relative to metadata.jsonl.
    with Image.open(run.journal.parent / record["file_name"]) as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")
        assert (image.getpixel((0, 0)), image.getpixel((0, 15))) == ((64, 128, 128), (128, 128, 128))
    assert run.done() == {name}
    assert sorted(x.name for x in run.path.rglob("*") if x.is_file()) == sorted(
        ["config.json", "metadata.jsonl", "log.jsonl", f"{name}.png"]
    )


def test_a_watched_image_and_its_line(tmp_path):
    """First and last losses, and the reward hacking flag where the held-out referee answers yes or no."""
    run = run_directory.RunDirectory.open(tmp_path, WITH_HELD_OUT)
    parting, agreeing = ({"referee": (2.0, 1.0), "held_out": (0.5, last)} for last in (0.75, 0.25))
    run.write(picture("parting", losses=parting), seconds=1)
    run.write(picture("agreeing", losses=agreeing), seconds=1)
    first, second = lines(run.journal)
    assert (first["hacked"], second["hacked"]) == (True, False)
    assert first["losses"] == {"referee": [2.0, 1.0], "held_out": [0.5, 0.75]}
    assert images.read_settings(run.images / f"{first['id']}.png")["hacked"] is True
    cosine = dataclasses.replace(WITH_HELD_OUT.referees[1], losses={"cosine": 1.0}, name="clip")
    unmarked = dataclasses.replace(SETTINGS, referees=(*SETTINGS.referees, cosine))
    run = run_directory.RunDirectory.open(tmp_path / "unmarked", unmarked)
    run.write(picture("parting", losses=parting), seconds=1)
    (line,) = lines(run.journal)
    assert "hacked" not in line and line["losses"] == first["losses"]


def test_settings_in_the_image(tmp_path):
    run = run_directory.RunDirectory.open(tmp_path / "run", SETTINGS)
    run.write(picture("ü 🙂"), seconds=1)
    file = run.images / f"{Item('ü 🙂', 0).id}.png"
    read = images.read_settings(file)
    assert (read["text"], read["seed"], read["scores"]["held_out"]) == ("ü 🙂", 7, 0.5)
    assert read["fingerprint"] == config.fingerprint(SETTINGS)
    assert config.fingerprint(config.from_config(read["settings"])) == read["fingerprint"]
    Image.open(file).save(tmp_path / "bare.png")
    with pytest.raises(ValueError, match="bare.png was not written by referee_jax"):
        images.read_settings(tmp_path / "bare.png")


def test_config_is_recorded(tmp_path):
    run = run_directory.RunDirectory.open(tmp_path, SETTINGS, device="cpu x 1")
    record = json.loads((run.path / "config.json").read_text())
    assert config.from_config(record["settings"]) == SETTINGS
    assert (record["fingerprint"], record["device"]) == (config.fingerprint(SETTINGS), "cpu x 1")
    assert {"python", "jax", "numpy"} <= record["versions"].keys()
    assert record["environment"]["XLA_FLAGS"] == os.environ["XLA_FLAGS"]
    assert lines(run.log_file)[0]["event"] == "start"


def test_what_is_not_finite_is_flagged(tmp_path):
    run = run_directory.RunDirectory.open(tmp_path, SETTINGS)
    bad = picture("a", value=np.nan)
    assert run.write(bad, seconds=1) == "nonfinite"
    assert (
        run.write(dataclasses.replace(picture("b"), scores={"x": float("inf"), "y": np.float32(0.5)}), seconds=1)
        == "nonfinite"
    )
    assert run.write(picture("c", status="nonfinite"), seconds=1) == "nonfinite"
    assert run.write(picture("d"), seconds=1) == "done"
    records = lines(run.journal)
    assert [x["status"] for x in records] == ["nonfinite"] * 3 + ["done"]
    assert records[1]["scores"] == {"x": None, "y": 0.5}
    assert "NaN" not in run.journal.read_text() and "Infinity" not in run.journal.read_text()
    assert Image.open(run.images / f"{bad.item.id}.png").getpixel((0, 15)) == (0, 0, 0)


def test_other_settings_are_refused(tmp_path):
    run_directory.RunDirectory.open(tmp_path, SETTINGS).write(picture("a"), seconds=1)
    same = config.from_config({"seed": 7, "image_size": 16, "prompts": ["a"], "samples": 4, "batch_size": 1})
    run_directory.RunDirectory.open(tmp_path, same)
    other = config.from_config({"seed": 8, "image_size": 16, "sds": {"guidance": 5}, "prompts": ["b"]})
    with pytest.raises(run_directory.RunError) as caught:
        run_directory.RunDirectory.open(tmp_path, other)
    assert str(caught.value).startswith(f"{tmp_path} was begun with other settings; choose another --workdir")
    assert str(caught.value).splitlines()[1:] == ["sds.guidance: 30.0 -> 5.0", "seed: 7 -> 8"]


@pytest.mark.parametrize("resume", ["auto", "force", "never"])
@pytest.mark.parametrize(
    "made", [None, "images/a.png", "shards/a.tar", "checkpoints/host-1-a/1/default/state.safetensors"]
)
def test_a_start_that_made_nothing_binds_nothing(tmp_path, made, resume):
    """Other settings take the place of its own, and of what it noted; but not of those of an image or a checkpoint."""
    run = run_directory.RunDirectory.open(tmp_path, SETTINGS)
    run.note("commits", {"some/model": "a" * 40})
    if made:
        (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / made).write_bytes(b"")
    other = dataclasses.replace(SETTINGS, seed=8)
    if made and resume != "force":
        with pytest.raises(run_directory.RunError, match="other settings|a run already"):
            run_directory.RunDirectory.open(tmp_path, other, resume=resume)
        return
    new = run_directory.RunDirectory.open(tmp_path, other, resume=resume)
    assert config.from_config(json.loads((tmp_path / "config.json").read_text())["settings"]) == other
    assert bool(new.noted("commits")) == bool(made)
    assert [x["changes"] for x in lines(new.log_file) if x["event"] == "settings"] == [["seed: 7 -> 8"]]
    # Whoever goes on with the old ones learns of it before anything is written.
    with pytest.raises(run_directory.RunError, match="was given other settings by another command(.|\n)*seed: 8 -> 7"):
        run.check_settings()
    new.check_settings()


def test_settings_of_another_process_at_work_stay(tmp_path, monkeypatch):
    """It may be compiling, and has nothing yet; of one that has ended, or of another machine, nothing is known to come."""
    for name, is_refused in ((f"{socket.gethostname()}-{os.getppid()}-a", True), ("elsewhere-1-a", False)):
        with monkeypatch.context() as patch:
            patch.setattr(processes, "name_process", lambda name=name: name)
            run_directory.RunDirectory.open(tmp_path / name, SETTINGS)
        other = dataclasses.replace(SETTINGS, seed=8)
        with pytest.raises(run_directory.RunError, match="other settings") if is_refused else contextlib.nullcontext():
            run_directory.RunDirectory.open(tmp_path / name, other)


def test_what_is_no_run_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(run_directory.RunError, match="is not empty and not a run directory"):
        run_directory.RunDirectory.open(tmp_path, SETTINGS)
    assert [x.name for x in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(run_directory.RunError, match=r"thesis.tex cannot be written: "):
        run_directory.RunDirectory.open(tmp_path / "thesis.tex", SETTINGS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(run_directory.RunError, match="cannot be written: Permission denied"):
        run_directory.RunDirectory.open(tmp_path / "run", SETTINGS)


def test_damaged_config(tmp_path):
    run = run_directory.RunDirectory.open(tmp_path, SETTINGS)
    (run.path / "config.json").write_text('{"fingerprint": "a')
    with pytest.raises(run_directory.RunError, match="config.json is damaged"):
        run_directory.RunDirectory.open(tmp_path, SETTINGS)


def test_an_item_needs_its_line_and_its_image(tmp_path):
    run = run_directory.RunDirectory.open(tmp_path, SETTINGS)
    for sample in range(3):
        run.write(picture(sample=sample), seconds=1)
    names = [Item("a red circle", sample).id for sample in range(3)]
    (run.images / f"{names[0]}.png").unlink()
    rest = [line for line in run.journal.read_text().splitlines() if names[1] not in line]
    run.journal.write_text("\n".join(rest) + "\n")
    assert run.done() == {names[2]}
    # The missing ones are made again: one line each.
    run = run_directory.RunDirectory.open(tmp_path, SETTINGS)
    for sample in range(2):
        run.write(picture(sample=sample), seconds=1)
    assert sorted(x["id"] for x in lines(run.journal)) == names
    assert run.done() == set(names)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = run_directory.RunDirectory.open(tmp_path_factory.mktemp("run"), SETTINGS)
    for sample in range(3):
        run.write(picture("é 🙂", sample), seconds=1)
    return run


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_journal_cut_at_any_byte(finished, data):
    whole = finished.journal.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    copy = finished.path.with_name(f"{finished.path.name}-cut")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(finished.path, copy)
    (copy / "metadata.jsonl").write_bytes(whole[:cut])
    # A line is complete with its last brace; its end may be missing.
    rows = whole.splitlines()
    ends = np.cumsum([len(row) + 1 for row in rows]) - 1
    complete = {json.loads(row)["id"] for row, end in zip(rows, ends, strict=True) if cut >= end}
    run = run_directory.RunDirectory.open(copy, SETTINGS)
    assert run.done() == complete
    run.write(picture("new"), seconds=1)
    assert {x["id"] for x in lines(run.journal)} == complete | {Item("new", 0).id}


# --- several processes ------------------------------------------------------------------------------------------------


def test_each_process_has_a_journal_and_all_read_all(tmp_path):
    runs = [run_directory.RunDirectory.open(tmp_path, SETTINGS, process=n) for n in range(3)]
    for n, run in enumerate(runs):
        run.write(picture(sample=n), seconds=1)
    assert [[x["sample"] for x in lines(tmp_path / f"metadata{own}.jsonl")] for own in ("", "-1", "-2")] == [
        [0],
        [1],
        [2],
    ]
    assert [x["event"] for x in lines(tmp_path / "log.jsonl")] == ["start"] * 3
    for run in runs:
        assert run.done() == {Item("a red circle", n).id for n in range(3)}
        assert [x["sample"] for x in run.finished()] == [0, 1, 2]
    assert [entry.sample for entry in layouts.read_run(tmp_path)] == [0, 1, 2]
    runs[0].merge()
    assert [x["sample"] for x in lines(tmp_path / "metadata.jsonl")] == [0, 1, 2]
    assert [x.name for x in tmp_path.glob("metadata*")] == ["metadata.jsonl"]
    runs[2].write(picture(sample=3), seconds=1)  # a process still at work begins a new journal
    assert [x["sample"] for x in lines(tmp_path / "metadata-2.jsonl")] == [3]
    alone = run_directory.RunDirectory.open(tmp_path, SETTINGS)
    assert [x["sample"] for x in lines(alone.journal)] == [0, 1, 2, 3] and len(alone.done()) == 4


def test_an_image_that_two_made_counts_once(tmp_path):
    first, second = (run_directory.RunDirectory.open(tmp_path, SETTINGS, process=n) for n in range(2))
    for run in (first, second):
        run.write(picture(), seconds=1)
    assert len(first.finished()) == 1
    first.merge()
    assert len(lines(first.journal)) == 1


def test_no_line_is_lost_while_journals_are_merged(tmp_path):
    """Two processes append lines as fast as they can, while two others merge."""
    main, other = (run_directory.RunDirectory.open(tmp_path, SETTINGS, process=n) for n in (0, 3))
    for n in range(100):
        (main.images / f"{n}.png").touch()
    script = (
        "import pathlib, sys, time\n"
        "from referee_jax.storage import files\n"
        "for n in range(int(sys.argv[1]), 100, 2):\n"
        f"    file = pathlib.Path({str(tmp_path)!r}, f'metadata-{{1 + n % 2}}.jsonl')\n"
        "    files.append(file, {'id': str(n), 'file_name': f'images/{n}.png'})\n"
    )
    adding = [subprocess.Popen([sys.executable, "-c", script, str(n)]) for n in range(2)]
    merges = []

    def merge(run):
        while any(process.poll() is None for process in adding):
            run.merge()
            merges.append(run)
            time.sleep(0.015)  # a waiting process polls the lock every 10 ms: let it have a turn

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(merge, (main, other)))
    assert [process.returncode for process in adding] == [0, 0]
    assert merges.count(main) > 3 and merges.count(other) > 3
    other.merge()
    assert sorted(int(x["id"]) for x in lines(main.journal)) == [*range(100)]


def test_a_start_leaves_alone_what_others_write(tmp_path):
    """It leaves open files and shards of a living process, and repairs those of a dead one."""
    sharded = config.override(SETTINGS, {"outputs.format": "webdataset"})
    other = run_directory.RunDirectory.open(tmp_path, sharded, process=1)
    with other.writing() as writer:
        writer.write(picture(), seconds=1)
        writer.flush()
        with files.open_temporary(other.images / "x.png") as image:
            assert run_directory.RunDirectory.open(tmp_path, SETTINGS).done() == set()
            assert os.path.exists(image.name)
        crashed = writer._shard  # closing it releases its lock
        crashed.file.close()
        writer._shard = None
    run = run_directory.RunDirectory.open(tmp_path, SETTINGS)
    assert run.done() == {Item("a red circle", 0).id} == {x["id"] for x in lines(run.journal)}
    assert [x for x in tmp_path.rglob("*") if x.name.startswith(".")] == []


def test_several_begin_at_once(tmp_path):
    """In a directory that does not exist yet."""
    threads = [
        threading.Thread(
            target=lambda n: run_directory.RunDirectory.open(tmp_path / "run", SETTINGS, process=n), args=(n,)
        )
        for n in range(4)
    ]
    failures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", failures.append)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert len(lines(tmp_path / "run" / "log.jsonl")) == 4


# --- large outputs ----------------------------------------------------------------------------------------------------


def test_the_scan_lists_folders_and_asks_for_no_file(tmp_path, monkeypatch):
    """However many images there are: each request takes a millisecond on a network disk."""
    run = run_directory.RunDirectory.open(tmp_path, SETTINGS)
    for n in range(500):
        (run.images / f"{n}.png").touch()
    files.append(run.journal, *({"id": f"{n}", "file_name": f"images/{n}.png"} for n in range(1000)))
    calls = []
    for name in ("stat", "scandir", "listdir", "open"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, **k: calls.append(a) or real(*a, **k))
    assert run.done() == {f"{n}" for n in range(500)}
    assert 0 < len(calls) < 20


def test_another_format_goes_on(tmp_path):
    """Finished images count in any format, and all readers of run directories read all formats."""
    for n, kind in enumerate(("png", "webp", "webdataset", "webdataset")):
        run = run_directory.RunDirectory.open(tmp_path, config.override(SETTINGS, {"outputs.format": kind}))
        assert len(run.done()) == n
        run.write(dataclasses.replace(picture(sample=n), image=np.ones((64, 64, 3), np.float32)), seconds=1)
    run = run_directory.RunDirectory.open(tmp_path, SETTINGS)
    assert [x["sample"] for x in run.finished()] == [0, 1, 2, 3]
    assert [Path(x["file_name"]).suffix for x in run.finished()] == [".png", ".webp", ".png", ".png"]
    assert run.contact_sheet(run.finished()).is_file()
    entries = layouts.read_run(tmp_path)
    found = measures.collect(measures.ground_truth(), entries, tmp_path)
    assert [x["right"] for x in found.values()] == [0.0] * 4  # white, and no red circle
    assert measures.collect(dataclasses.replace(measures.ground_truth(), build=None), entries, tmp_path) == found
    assert layouts.export_t2i_compbench(entries, tmp_path / "out", per_prompt=4) == 4
    exported = sorted((tmp_path / "out" / "samples").iterdir())
    assert [images.read_settings(x)["sample"] for x in exported] == [0, 1, 2, 3]
    assert {Image.open(x).format for x in exported} == {"PNG"}
    # Images of a missing shard are made again.
    next((tmp_path / "shards").iterdir()).unlink()
    assert len(run.done()) == 3


def test_a_disk_that_is_too_small(small_disk):
    """Refused in one sentence with the directory, the needed and the free space."""
    run = run_directory.RunDirectory.open(small_disk(300) / "run", SETTINGS)
    run.check_space(2)
    with pytest.raises(run_directory.RunError) as caught:
        run.check_space(100_000)
    needed = 100_000 * run_directory.bytes_per_item(SETTINGS)
    free = shutil.disk_usage(run.path).free
    assert str(caught.value).startswith(f"{run.path} has ") and "\n" not in str(caught.value)
    assert f"({free:,} bytes)" in str(caught.value) and f"({needed:,} bytes)" in str(caught.value)
    with pytest.raises(run_directory.RunError):
        run.check_space(free // run_directory.bytes_per_item(SETTINGS) + 1)
    run.check_space(free // run_directory.bytes_per_item(SETTINGS))


@pytest.mark.parametrize(
    "changes", [{}, {"outputs.format": "webp"}, {"outputs.format": "webdataset"}, {"outputs.trajectory": True}]
)
@pytest.mark.parametrize("size", [64, 256])
def test_the_estimate_is_generous_and_not_absurd(tmp_path, changes, size):
    """Compared with the disk usage of noisy pictures."""
    options = config.override(
        SETTINGS, {"image_size": size, "steps": 20, "chunk": 10, "outputs.shard_size": 4, **changes}
    )
    run = run_directory.RunDirectory.open(tmp_path, options)
    noisy = np.random.default_rng(0).normal(0.5, 0.03, (size, size, 3)).astype(np.float32)
    frames = [images.to_uint8(noisy[:, ::step]) for step in (1, -1)] if options.outputs.trajectory else []
    taken = lambda: sum(x.stat().st_blocks * 512 for x in tmp_path.rglob("*") if x.is_file())
    before = taken()
    with run.writing() as writer:
        for n in range(4):
            writer.write(dataclasses.replace(picture(sample=n), image=noisy), seconds=1, frames=frames)
    assert (taken() - before) / 4 < run_directory.bytes_per_item(options) < 4 * (taken() - before) / 4


def test_a_disk_that_is_read_only(small_disk):
    path = small_disk(300)
    run = run_directory.RunDirectory.open(path / "run", SETTINGS)
    run.write(picture(), seconds=1)
    subprocess.run(["mount", "-o", "remount,ro", path], check=True)
    for name in "run", "new":
        with pytest.raises(
            run_directory.RunError, match=f"the run directory {path / name} cannot be written: Read-only file"
        ):
            run_directory.RunDirectory.open(path / name, SETTINGS)
    assert len(run.done()) == 1  # and can be read


def test_contact_sheet(tmp_path):
    run = run_directory.RunDirectory.open(tmp_path, SETTINGS)
    assert run.contact_sheet(run.finished()) is None
    for prompt in ("first", "second, with many more words than one line of a picture has place for", "x" * 300):
        for sample in range(2):
            run.write(picture(prompt, sample), seconds=1)
    with Image.open(run.contact_sheet(run.finished())) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    # Six cells in rows of four, each a picture of 192 pixels with text below.
    assert pixels.shape[1] == 12 + 4 * 204
    assert 2 * 204 < pixels.shape[0] < 2 * 350
    cell = pixels.shape[0] // 2
    np.testing.assert_array_equal(pixels[12 + 191, 12 + 204 * 3], (128, 128, 128))
    np.testing.assert_array_equal(pixels[12, 12], (64, 128, 128))
    below = pixels[12 + 194 : cell, 12 : 12 + 192]
    assert (below < 128).any() and (below == 255).all(-1).mean() > 0.5  # dark letters on white


def test_an_open_shard_stays_young(tmp_path):
    """While its process is at work: another machine may not see its lock."""
    settings = dataclasses.replace(SETTINGS, outputs=dataclasses.replace(SETTINGS.outputs, format="webdataset"))
    run = run_directory.RunDirectory.open(tmp_path, settings)
    with run.writing() as writer:
        writer.refresh()
        writer.write(picture(sample=0), seconds=1)
        writer.flush()
        (shard,) = (tmp_path / "shards").glob(".*.tmp")
        os.utime(shard, (0, 0))
        writer.refresh()
        assert time.time() - shard.stat().st_mtime < 60
    assert len(run.done()) == 1


def test_a_damaged_picture_spoils_no_sheet(tmp_path):
    """It is grey in the sheet, and a link in the page."""
    run = run_directory.RunDirectory.open(tmp_path, SETTINGS)
    for sample in (0, 1):
        run.write(picture(sample=sample), seconds=1)
    (run.images / f"{Item('a red circle', 1).id}.png").write_bytes(b"no picture")
    with Image.open(run.contact_sheet(run.finished())) as sheet:
        assert (0xBB, 0xBB, 0xBB) in {colour for _, colour in sheet.convert("RGB").getcolors(1 << 24)}
    assert gallery_page.write(run, run.finished()).read_text().count("data:image/webp") == 1


def test_contact_sheet_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "SHEET_PICTURES", 3)
    run = run_directory.RunDirectory.open(tmp_path, SETTINGS)
    for sample in range(5):
        run.write(picture(sample=sample), seconds=1)
    drawn = []
    monkeypatch.setattr(
        contact_sheet, "draw_sheet", lambda shown, title: drawn.append((shown, title)) or Image.new("L", (1, 1))
    )
    run.contact_sheet(run.finished())
    assert len(drawn[0][0]) == 3
    assert drawn[0][1].endswith(": 3 of 5 images")


@given(st.text(max_size=200), st.integers(1, 5))
@settings(deadline=None, max_examples=50)
def test_wrapped_text_fits(text, count):
    font = ImageFont.load_default(15)
    wrapped = contact_sheet.wrap(text, font, 100, lines=count)
    assert len(wrapped) <= count
    assert all(font.getlength(line) <= 100 for line in wrapped)
    if not (wrapped and wrapped[-1].endswith("...")):
        assert "".join(wrapped).replace(" ", "") == "".join(text.split())


def test_a_process_that_was_stopped_delays_a_log_once(tmp_path, monkeypatch):
    """It may have been stopped with the lock, and chunks end every few seconds; when it goes on, lines are locked again."""
    run, waited, lock = run_directory.RunDirectory.open(tmp_path, SETTINGS), [], files.lock

    def noted(file, seconds=None):
        is_locked = lock(file, min(seconds, 0.1))
        waited.append((seconds, is_locked))
        return is_locked

    monkeypatch.setattr(files, "lock", noted)
    with open(run.log_file, "rb+", buffering=0) as stopped:
        assert lock(stopped, 0)
        for number in range(3):
            run.log("chunk", number=number)
    run.log("chunk", number=3)
    assert waited == [(run_directory.PATIENCE, False), (0.0, False), (0.0, False), (0.0, True)]
    assert [line["number"] for line in files.read_lines(run.log_file) if line["event"] == "chunk"] == [0, 1, 2, 3]
