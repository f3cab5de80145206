"""Writing in the background: bounded, in order, and with errors raised."""

import functools
import os
import tarfile
import threading
import time

import numpy as np
import pytest

from referee_jax import config
from referee_jax.items import Item
from referee_jax.storage import files, images, run_directory
from referee_jax.storage import writer as writer_lib
from tests.storage.test_run_directory import Picture

FORMATS = "png", "webp", "webdataset"


def picture(sample=0, prompt="a red circle"):
    return Picture(Item(prompt, sample), np.full((16, 16, 3), sample % 256 / 255, np.float32), {"cosine": 0.125})


def ids(samples):
    return [Item("a red circle", n).id for n in samples]


def directory(path, kind="png", **changes):
    values = {"image_size": 16, "outputs": {"format": kind, **changes}}
    return run_directory.RunDirectory.open(path, config.from_config(values))


@pytest.fixture
def gate():
    """An event that is set at the end, so that no thread waits for ever."""
    event = threading.Event()
    yield event
    event.set()


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_results_come_in_order():
    pool, committed = writer_lib.Pool(threads=4, pending=100), []
    for n in range(100):
        pool.submit(functools.partial(lambda n: time.sleep(n % 5 / 1000) or n, n), committed.append)
    pool.close()
    assert committed == [*range(100)]


def test_tasks_are_made_at_once(gate):
    """The second task runs while the first is not finished."""
    pool, second = writer_lib.Pool(threads=2, pending=3), threading.Event()
    pool.submit(lambda: gate.wait(60), lambda _: None)
    pool.submit(second.set, lambda _: None)
    assert second.wait(60)
    gate.set()
    pool.close()


def test_who_gives_too_much_waits(gate):
    pool, submitted = writer_lib.Pool(threads=2, pending=3), []

    def give():
        for n in range(5):
            pool.submit(lambda: gate.wait(60), lambda _: None)
            submitted.append(n)

    thread = threading.Thread(target=give)
    thread.start()
    wait_until(lambda: len(submitted) == 3)
    time.sleep(0.05)
    assert submitted == [0, 1, 2]  # the fourth waits
    gate.set()
    thread.join(60)
    assert submitted == [0, 1, 2, 3, 4]
    pool.close()


@pytest.mark.parametrize("half", ["make", "commit"])
def test_an_error_is_raised_once_and_the_others_are_done(half):
    pool, committed = writer_lib.Pool(threads=2, pending=2), []

    def fail(*_):
        raise OSError(28, "No space left on device")

    pool.submit(lambda: 0, committed.append)
    pool.submit(*((fail, committed.append) if half == "make" else (lambda: 1, fail)))
    pool.submit(lambda: 2, committed.append)
    with pytest.raises(OSError, match="No space left"):
        wait_until(lambda: pool.submit(lambda: 3, lambda _: None))  # submits until one raises
    pool.submit(lambda: 4, committed.append)
    pool.close()
    assert committed == [0, 2, 4]
    for end in "flush", "close":
        pool = writer_lib.Pool()
        pool.submit(fail, committed.append)
        with pytest.raises(OSError, match="No space left"):
            getattr(pool, end)()
        pool.close()


@pytest.mark.parametrize("kind", FORMATS)
def test_images_and_lines(tmp_path, kind):
    run = directory(tmp_path, kind, shard_size=4, shard_images="webp")
    with run.writing() as writer:
        for n in range(10):
            assert writer.write(picture(n), seconds=1) == "done"
    records = files.read_lines(run.journal)
    assert [x["id"] for x in records] == ids(range(10)) and run.done() == set(ids(range(10)))
    for n, record in enumerate(records):
        file = tmp_path / record["file_name"]
        assert np.asarray(images.read_image(file)).tolist() == [[[n] * 3] * 16] * 16
        settings = images.read_settings(file)
        assert (settings["text"], settings["sample"], settings["scores"]) == ("a red circle", n, {"cosine": 0.125})
        assert settings["settings"]["image_size"] == 16 and "time" not in settings
    endings = {"png": {".png"}, "webp": {".webp"}, "webdataset": {".tar"}}[kind]
    folder = tmp_path / ("shards" if kind == "webdataset" else "images")
    assert {x.suffix for x in folder.iterdir()} == endings
    if kind == "webdataset":
        sizes = []
        for file in sorted(folder.iterdir(), key=lambda x: x.stat().st_mtime_ns):
            with tarfile.open(file) as tar:
                assert [x.rpartition(".")[2] for x in tar.getnames()[:2]] == ["webp", "json"]
                sizes.append(len(tar.getnames()) // 2)
        assert sizes == [4, 4, 2]


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_is_there_before_its_line(tmp_path, monkeypatch, kind):
    """Whenever lines are appended to the journal, their images exist."""
    run, append, samples = directory(tmp_path, kind, shard_size=3), files.append, []

    def append_checked(path, *records):
        if path == run.journal:
            samples.extend(images.read_settings(tmp_path / x["file_name"])["sample"] for x in records)
        append(path, *records)

    monkeypatch.setattr(files, "append", append_checked)
    with run.writing() as writer:
        for n in range(8):
            writer.write(picture(n), seconds=1)
    assert samples == [*range(8)]


def test_flush(tmp_path):
    """What was written is in the journal then, but for images of an open shard."""
    run = directory(tmp_path / "png")
    with run.writing() as writer:
        for n in range(3):
            writer.write(picture(n), seconds=1)
        writer.flush()
        assert run.done() == set(ids(range(3)))
    run = directory(tmp_path / "webdataset", "webdataset", shard_size=2)
    with run.writing() as writer:
        for n in range(3):
            writer.write(picture(n), seconds=1)
        writer.flush()
        assert run.done() == set(ids(range(2)))
        writer.flush(commit=True)
        assert run.done() == set(ids(range(3)))
        writer.write(picture(3), seconds=1)
    assert run.done() == set(ids(range(4)))


def test_interrupted(tmp_path):
    """Images and open shards are written whatever ends the work."""
    for kind in FORMATS:
        run = directory(tmp_path / kind, kind)
        with pytest.raises(KeyboardInterrupt), run.writing() as writer:
            for n in range(3):
                writer.write(picture(n), seconds=1)
            raise KeyboardInterrupt
        assert run.done() == set(ids(range(3)))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk(tmp_path, room, kind):
    """The journal is right, no file is half written, and the run continues when there is space."""
    run = directory(tmp_path, kind, shard_size=3)
    room.left, sample = 50_000, 0
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}"), run.writing() as writer:
        for sample in range(100):  # noqa: B007
            writer.write(picture(sample), seconds=1)
    assert sample < 99
    room.left = float("inf")
    run = directory(tmp_path, kind, shard_size=3)
    assert [x for x in tmp_path.rglob("*") if x.name.startswith(".")] == []
    done = [x["id"] for x in run.finished()]
    assert 0 < len(done) < 100 and done == ids(range(len(done)))
    for record in run.finished():
        assert images.read_settings(tmp_path / record["file_name"])["id"] == record["id"]
    with run.writing() as writer:
        for n in range(len(done), 100):
            writer.write(picture(n), seconds=1)
    assert [x["id"] for x in run.finished()] == ids(range(100))
    assert len(files.read_lines(run.journal)) == 100


@pytest.mark.parametrize("kind", FORMATS)
def test_a_disk_that_is_really_full(small_disk, kind):
    path = small_disk(256)
    run = directory(path / "run", kind, shard_size=8)
    with pytest.raises(OSError, match="No space left on device: "), run.writing() as writer:
        for n in range(1000):
            writer.write(picture(n), seconds=1)
    done = {x["id"]: x for x in run.finished()}
    assert os.statvfs(path).f_bavail < 16 and len(done) > 8
    for name, record in done.items():
        assert images.read_settings(path / "run" / record["file_name"])["id"] == name


def test_making(tmp_path):
    """The animation is written too, under the image's id."""
    run = directory(tmp_path)
    frames = [np.full((16, 16, 3), value, np.uint8) for value in (0, 100)]
    run.write(picture(1), seconds=1, frames=frames)
    run.write(picture(2), seconds=1)
    (file,) = (tmp_path / "trajectories").iterdir()
    assert file.name == f"{ids([1])[0]}.webp" and file.read_bytes() == images.encode_animation(frames)


def test_the_same_image_has_the_same_bytes(tmp_path, monkeypatch):
    """Regardless of the time and of the seconds it took."""
    first, second = directory(tmp_path / "a"), directory(tmp_path / "b")
    first.write(picture(), seconds=1)
    monkeypatch.setattr(files, "now", lambda: "another day")
    second.write(picture(), seconds=2)
    assert [x["time"] for x in second.finished()] == ["another day"]
    name = f"{ids([0])[0]}.png"
    assert (first.images / name).read_bytes() == (second.images / name).read_bytes()
