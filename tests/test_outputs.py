"""The run directory: nothing half written, nothing lost, nothing mixed."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from referee_jax import config, outputs, queue

SETTINGS = config.from_config({"seed": 7, "image_size": 16})


@dataclasses.dataclass(frozen=True)
class Picture:
    item: queue.Item
    image: np.ndarray
    scores: dict
    status: str = "done"
    losses: dict | None = None


def picture(prompt="a red circle", sample=0, value=0.5, **changes):
    image = np.full((16, 16, 3), value, np.float32)
    image[:8, :, 0] = 0.25
    return Picture(queue.Item(prompt, sample), image, {"cosine": 0.125, "held_out": 0.5}, **changes)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_image_and_its_line(tmp_path):
    run = outputs.RunDirectory.open(tmp_path / "a" / "b", SETTINGS, device="cpu x 1")
    prompt = 'the "café" / 🙂'
    assert run.write(picture(prompt, 3), seconds=1.5) == "done"
    (record,) = lines(run.journal)
    name = queue.Item(prompt, 3).id
    assert record.pop("time").endswith("Z")
    assert record == {
        "file_name": f"images/{name}.png", "text": prompt, "id": name, "sample": 3, "seed": 7,
        "scores": {"cosine": 0.125, "held_out": 0.5}, "status": "done", "seconds": 1.5,
    }  # fmt: skip
    # ImageFolder reads file_name from where metadata.jsonl lies.
    with Image.open(run.journal.parent / record["file_name"]) as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")
        assert (image.getpixel((0, 0)), image.getpixel((0, 15))) == ((64, 128, 128), (128, 128, 128))
    assert run.done() == {name}
    assert sorted(x.name for x in run.path.rglob("*") if x.is_file()) == sorted(
        ["config.json", "metadata.jsonl", "log.jsonl", f"{name}.png"]
    )


def test_a_watched_image_and_its_line(tmp_path):
    """First and last losses, and whether the two kinds of referees part."""
    run = outputs.RunDirectory.open(tmp_path, SETTINGS)
    parting, agreeing = ({"referee": (2.0, 1.0), "held_out": (0.5, last)} for last in (0.75, 0.25))
    run.write(picture("parting", losses=parting), seconds=1)
    run.write(picture("agreeing", losses=agreeing), seconds=1)
    first, second = lines(run.journal)
    assert (first["hacked"], second["hacked"]) == (True, False)
    assert first["losses"] == {"referee": [2.0, 1.0], "held_out": [0.5, 0.75]}
    assert outputs.read_settings(run.image_file(first["id"]))["hacked"] is True


def test_settings_in_the_image(tmp_path):
    run = outputs.RunDirectory.open(tmp_path / "run", SETTINGS)
    run.write(picture("ü 🙂"), seconds=1)
    file = run.image_file(queue.Item("ü 🙂", 0).id)
    read = outputs.read_settings(file)
    assert (read["text"], read["seed"], read["scores"]["held_out"]) == ("ü 🙂", 7, 0.5)
    assert read["fingerprint"] == config.fingerprint(SETTINGS)
    assert config.fingerprint(config.from_config(read["settings"])) == read["fingerprint"]
    Image.open(file).save(tmp_path / "bare.png")
    with pytest.raises(ValueError, match="bare.png was not written by referee_jax"):
        outputs.read_settings(tmp_path / "bare.png")


def test_config_is_recorded(tmp_path):
    run = outputs.RunDirectory.open(tmp_path, SETTINGS, device="cpu x 1")
    record = json.loads((run.path / "config.json").read_text())
    assert config.from_config(record["settings"]) == SETTINGS
    assert (record["fingerprint"], record["device"]) == (config.fingerprint(SETTINGS), "cpu x 1")
    assert {"python", "jax", "numpy"} <= record["versions"].keys()
    assert lines(run.log_file)[0]["event"] == "start"


def test_what_is_not_finite_is_flagged(tmp_path):
    run = outputs.RunDirectory.open(tmp_path, SETTINGS)
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
    assert Image.open(run.image_file(bad.item.id)).getpixel((0, 15)) == (0, 0, 0)


def test_other_settings_are_refused(tmp_path):
    outputs.RunDirectory.open(tmp_path, SETTINGS)
    same = config.from_config({"seed": 7, "image_size": 16, "prompts": ["a"], "samples": 4, "batch_size": 1})
    outputs.RunDirectory.open(tmp_path, same)
    other = config.from_config({"seed": 8, "image_size": 16, "sds": {"guidance": 5}, "prompts": ["b"]})
    with pytest.raises(outputs.RunError) as caught:
        outputs.RunDirectory.open(tmp_path, other)
    assert str(caught.value).startswith(f"{tmp_path} was begun with other settings; choose another --workdir")
    assert str(caught.value).splitlines()[1:] == ["sds.guidance: 30.0 -> 5.0", "seed: 7 -> 8"]


def test_what_is_no_run_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(outputs.RunError, match="is not empty and not a run directory"):
        outputs.RunDirectory.open(tmp_path, SETTINGS)
    assert [x.name for x in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(outputs.RunError, match=r"thesis.tex cannot be written: "):
        outputs.RunDirectory.open(tmp_path / "thesis.tex", SETTINGS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(outputs.RunError, match="cannot be written: Permission denied"):
        outputs.RunDirectory.open(tmp_path / "run", SETTINGS)


def test_damaged_config(tmp_path):
    run = outputs.RunDirectory.open(tmp_path, SETTINGS)
    (run.path / "config.json").write_text('{"fingerprint": "a')
    with pytest.raises(outputs.RunError, match="config.json is damaged"):
        outputs.RunDirectory.open(tmp_path, SETTINGS)


def test_an_item_needs_its_line_and_its_image(tmp_path):
    run = outputs.RunDirectory.open(tmp_path, SETTINGS)
    for sample in range(3):
        run.write(picture(sample=sample), seconds=1)
    names = [queue.Item("a red circle", sample).id for sample in range(3)]
    run.image_file(names[0]).unlink()
    kept = [line for line in run.journal.read_text().splitlines() if names[1] not in line]
    run.journal.write_text("\n".join(kept) + "\n")
    assert run.done() == {names[2]}
    # Opened again, and the lost ones made again: one line each.
    run = outputs.RunDirectory.open(tmp_path, SETTINGS)
    for sample in range(2):
        run.write(picture(sample=sample), seconds=1)
    assert sorted(x["id"] for x in lines(run.journal)) == names
    assert run.done() == set(names)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = outputs.RunDirectory.open(tmp_path_factory.mktemp("run"), SETTINGS)
    for sample in range(3):
        run.write(picture("é 🙂", sample), seconds=1)
    return run


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    run = outputs.RunDirectory.open(copy, SETTINGS)
    assert run.done() == complete
    run.write(picture("new"), seconds=1)
    assert {x["id"] for x in lines(run.journal)} == complete | {queue.Item("new", 0).id}


@given(st.lists(st.one_of(st.binary(max_size=30), st.just(b'{"id": "a"}'), st.just(b"[1]"), st.just(b"3")), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_reading_lines_of_anything(tmp_path, rows):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\n".join(rows))
    assert outputs.read_lines(file).count({"id": "a"}) == rows.count(b'{"id": "a"}')
    outputs.mend(file)
    outputs.append(file, {"id": "b"})
    records = outputs.read_lines(file)
    assert records[-1] == {"id": "b"} and records.count({"id": "a"}) == rows.count(b'{"id": "a"}')


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    file = tmp_path / "x.png"
    file.write_bytes(b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        outputs.write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_left_over_temporaries_go(tmp_path):
    run = outputs.RunDirectory.open(tmp_path, SETTINGS)
    (run.images / ".x.png.123.tmp").write_bytes(b"half")
    outputs.RunDirectory.open(tmp_path, SETTINGS)
    assert list(run.images.iterdir()) == []


def test_stretch():
    image = np.array([[[0.25, 0.5, 0.75]]], np.float32)
    assert outputs.to_uint8(image).tolist() == [[[64, 128, 191]]]
    assert outputs.to_uint8(image, stretch=True).tolist() == [[[0, 128, 255]]]
    assert outputs.to_uint8(np.full((1, 1, 3), 0.5), stretch=True).tolist() == [[[0, 0, 0]]]
    assert outputs.to_uint8(np.array([[[-3, 2, np.inf]]])).tolist() == [[[0, 255, 0]]]


def test_trajectory(tmp_path):
    run = outputs.RunDirectory.open(tmp_path, SETTINGS)
    frames = [np.full((16, 16, 3), value, np.uint8) for value in (0, 100, 200)]
    with Image.open(run.trajectory("x", frames)) as image:
        assert (image.format, image.n_frames, image.size) == ("WEBP", 3, (16, 16))
        for n, value in enumerate((0, 100, 200)):
            image.seek(n)
            assert abs(np.asarray(image.convert("RGB"), int) - value).max() <= 3
    with Image.open(run.trajectory("y", frames[:1])) as image:
        assert image.size == (16, 16)


def test_contact_sheet(tmp_path):
    run = outputs.RunDirectory.open(tmp_path, SETTINGS)
    assert run.contact_sheet() is None
    for prompt in ("first", "second, with many more words than one line of a picture has place for", "x" * 300):
        for sample in range(2):
            run.write(picture(prompt, sample), seconds=1)
    with Image.open(run.contact_sheet()) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    # Six cells in rows of four, 192 pixels of picture and text below; the pictures stand where they should.
    assert pixels.shape[1] == 12 + 4 * 204
    assert 2 * 204 < pixels.shape[0] < 2 * 350
    cell = pixels.shape[0] // 2
    np.testing.assert_array_equal(pixels[12 + 191, 12 + 204 * 3], (128, 128, 128))
    np.testing.assert_array_equal(pixels[12, 12], (64, 128, 128))
    below = pixels[12 + 194 : cell, 12 : 12 + 192]
    assert (below < 128).any() and (below == 255).all(-1).mean() > 0.5  # dark letters on white


def test_contact_sheet_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "SHEET_PICTURES", 3)
    run = outputs.RunDirectory.open(tmp_path, SETTINGS)
    for sample in range(5):
        run.write(picture(sample=sample), seconds=1)
    drawn = []
    monkeypatch.setattr(
        outputs, "draw_sheet", lambda shown, title: drawn.append((shown, title)) or Image.new("L", (1, 1))
    )
    run.contact_sheet()
    assert len(drawn[0][0]) == 3
    assert drawn[0][1].endswith(": 3 of 5 images")


@given(st.text(max_size=200), st.integers(1, 5))
@settings(deadline=None, max_examples=50)
def test_wrapped_text_fits(text, count):
    font = ImageFont.load_default(15)
    wrapped = outputs.wrap(text, font, 100, lines=count)
    assert len(wrapped) <= count
    assert all(font.getlength(line) <= 100 for line in wrapped)
    if not (wrapped and wrapped[-1].endswith("...")):
        assert "".join(wrapped).replace(" ", "") == "".join(text.split())
