"""Shards: standard tars, visible only when whole, that lose nothing that was on disk."""

import concurrent.futures
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest

from referee_jax.storage import files, shards
from tests.tools import kill_fuzz


def add(shard, name, size=700):
    """Adds a sample whose content repeats its name."""
    record = {"id": name, "file_name": f"shards/{shard.path.name}/{name}.png"}
    shard.add(name, {"png": name.encode() * size, "json": json.dumps({"text": name}).encode()}, record)
    return record


def names(directory):
    return sorted(x.name for x in directory.iterdir())


@pytest.fixture
def folder(tmp_path):
    """The folder of shards, and the journal."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").touch()  # its lock is the run's
    return run / "shards", run / "metadata.jsonl"


def test_a_shard(folder):
    directory, journal = folder
    shard = shards.Shard(directory, 3)
    records = [add(shard, f"a-{n}", size=700 + n) for n in range(4)]
    assert not shard.path.exists() and not journal.exists()  # nothing is visible yet
    shard.commit(journal)
    assert names(directory) == [shard.path.name] and shard.path.name.startswith("003-")
    assert files.read_lines(journal) == records
    members = [f"a-{n}.{ending}" for n in range(4) for ending in ("png", "json")]
    with tarfile.open(shard.path) as tar:
        assert tar.getnames() == members
        assert json.loads(tar.extractfile("a-2.json").read()) == {"text": "a-2"}
    listed = subprocess.run(["tar", "tf", shard.path], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == members and not listed.stderr
    assert shard.path.read_bytes().endswith(bytes(2 * tarfile.BLOCKSIZE))  # the format's end, which readers may ask for
    for record in records:
        assert shards.read_bytes(journal.parent / record["file_name"])[:3] == b"a-" + record["id"][2:].encode()
    assert shards.read_bytes(directory / shard.path.name / "a-3.png") == b"a-3" * 703
    assert shards.modified(directory / shard.path.name / "a-3.png") == shard.path.stat().st_mtime_ns
    with pytest.raises(FileNotFoundError, match="No such file in the shard"):
        shards.read_bytes(shard.path / "b.png")


def test_webdataset_reads_it(folder):
    webdataset = pytest.importorskip("webdataset")
    shard = shards.Shard(folder[0], 0)
    for n in range(3):
        add(shard, f"a-{n}")
    shard.commit(folder[1])
    samples = list(webdataset.WebDataset(str(shard.path), shardshuffle=False))
    assert [(x["__key__"], json.loads(x["json"])) for x in samples] == [
        (f"a-{n}", {"text": f"a-{n}"}) for n in range(3)
    ]


def test_names_do_not_collide(folder):
    """Not even for two processes with the same number, started at the same time."""
    opened = [shards.Shard(folder[0], 0) for _ in range(50)]
    assert len({shard.path for shard in opened}) == 50
    for shard in opened:
        shard.file.close()


def test_what_is_no_shard(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"nothing of the kind" * 99)
    with pytest.raises(OSError, match="not a shard"):
        shards.read_bytes(tmp_path / "x.tar" / "a.png")
    with pytest.raises(FileNotFoundError):
        shards.read_bytes(tmp_path / "y.tar" / "a.png")


@pytest.mark.parametrize("left", [0, 100, 4000, 4650])
def test_a_full_disk_costs_only_what_has_no_room(folder, room, left):
    """Wherever in a sample or its line the space ends (a sample has 4608 bytes)."""
    directory, journal = folder
    shard = shards.Shard(directory, 0)
    records = [add(shard, "a")]
    room.left = left
    with pytest.raises(OSError, match=rf"No space left on device: '{directory}"):
        add(shard, "b", size=3000)
    room.left = 6000
    records.append(add(shard, "c"))
    shard.commit(journal)
    assert files.read_lines(journal) == records
    with tarfile.open(shard.path) as tar:
        assert tar.getnames() == ["a.png", "a.json", "c.png", "c.json"]


def test_a_shard_needs_no_room_to_be_closed(folder, room):
    """If the journal has no space, its lines wait for the next start."""
    directory, journal = folder
    shard = shards.Shard(directory, 0)
    record = add(shard, "a")
    room.left = 0
    with pytest.raises(OSError, match=rf"No space left on device: '{journal}'"):
        shard.commit(journal)
    assert shard.path.exists() and files.read_lines(journal) == []
    room.left = 1000
    shards.recover(directory, journal, 0)
    assert names(directory) == [shard.path.name] and files.read_lines(journal) == [record]


def crash(folder, monkeypatch, at):
    """Crashes while writing two samples; returns the records that must be recovered."""
    directory, journal = folder
    shard = shards.Shard(directory, 0)
    records = [add(shard, "a"), add(shard, "b")]
    if at == "within a sample":
        shard.file.write(b"half of one")
    elif at == "within a line":
        with open(shard.lines, "ab") as lines:
            lines.write(b'{"end": 99999, "rec')
    elif at == "before the first line":
        shard.lines.unlink()
        records = []
    elif at != "between samples":
        with monkeypatch.context() as patch:
            module, name = {"before the name": (shards.os, "replace"), "before the journal": (files, "append")}[at]
            patch.setattr(module, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                shard.commit(journal)
    shard.file.close()  # as the kernel does
    return records


MOMENTS = (
    "between samples",
    "within a sample",
    "within a line",
    "before the first line",
    "before the name",
    "before the journal",
)


@pytest.mark.parametrize("at", MOMENTS)
def test_a_crash_costs_only_what_was_not_on_disk(folder, monkeypatch, at):
    directory, journal = folder
    records = crash(folder, monkeypatch, at)
    shards.recover(directory, journal, 0)
    files.remove_abandoned(directory, 0)
    assert files.read_lines(journal) == records
    assert len(names(directory)) == bool(records)
    for record in records:
        assert shards.read_bytes(journal.parent / record["file_name"]) == record["id"].encode() * 700
    shards.recover(directory, journal, 0)
    assert files.read_lines(journal) == records


def test_a_shard_that_is_written_is_left_alone(folder):
    """On this machine while its writer lives; on another, without a visible lock, if recent."""
    directory, journal = folder
    shard = shards.Shard(directory, 1)
    add(shard, "a")
    shards.recover(directory, journal, 1e12)
    assert not journal.exists()
    add(shard, "b")
    elsewhere = directory / f".{shard.path.name}.elsewhere.1.tmp"
    shard.file.close()
    pathlib.Path(shard.file.name).rename(elsewhere)
    clock = elsewhere.stat().st_mtime
    shards.recover(directory, journal, clock + 0.9 * files.STALE)
    assert not journal.exists() and elsewhere.exists()
    shards.recover(directory, journal, clock + 1.1 * files.STALE)
    assert [x["id"] for x in files.read_lines(journal)] == ["a", "b"]


def test_a_shard_that_another_commits_this_moment(folder, monkeypatch):
    """Renamed, but not journalled: a starting process journals it too; images count once."""
    directory, journal = folder
    shard = shards.Shard(directory, 1)
    add(shard, "a")
    listed = files.read_lines(shard.lines)
    other = journal.with_name("metadata-1.jsonl")
    append = files.append

    def meanwhile(path, *records):
        if path == other:
            shards.recover(directory, journal, 0)
        append(path, *records)

    monkeypatch.setattr(files, "append", meanwhile)
    shard.commit(other)
    assert files.read_lines(journal) == files.read_lines(other) == [x["record"] for x in listed]
    assert names(directory) == [shard.path.name]


def members(directory):
    """The members of all visible shards."""
    inside = []
    for file in sorted(directory.glob("*.tar")):
        with tarfile.open(file) as tar:
            inside += tar.getnames()
    return inside


def committed(folder, *samples, process=0):
    """A committed shard."""
    shard = shards.Shard(folder[0], process)
    for name in samples:
        add(shard, name)
    shard.commit(folder[1] if not process else folder[1].with_name(f"metadata-{process}.jsonl"))
    return shard


def is_there_once(folder, ids):
    """Checks that each image is in one tar, as journalled, and that no temporary file is left."""
    directory, journal = folder
    assert sorted(members(directory)) == sorted(f"{name}.{ending}" for name in ids for ending in ("png", "json"))
    records = [x for file in journal.parent.glob("metadata*.jsonl") for x in files.read_lines(file)]
    assert {x["id"] for x in records} == set(ids)
    for record in records:
        assert shards.read_bytes(journal.parent / record["file_name"]) == record["id"].encode() * 700
    assert [name for name in names(directory) if name.startswith(".")] == []
    for file in directory.iterdir():
        subprocess.run(["tar", "tf", file], capture_output=True, check=True)


@pytest.mark.parametrize("twice", ["a", "b", "ab", "abx"])
@pytest.mark.parametrize("at", MOMENTS)
def test_what_another_made_after_a_crash_is_left_out(folder, monkeypatch, at, twice):
    """From the dead process's shard; the whole shard, if all was made again."""
    directory, journal = folder
    ids = {x["id"] for x in crash(folder, monkeypatch, at)}
    committed(folder, *twice, process=1)
    for _ in range(2):
        shards.recover(directory, journal, 0)
        files.remove_abandoned(directory, 0)
        is_there_once(folder, ids.union(twice))
    assert len(names(directory)) == 1 + bool(ids - set(twice))


def test_a_slow_process_leaves_out_what_another_made(folder):
    """Another took it for dead: its shard is still committed, by itself or by the next start."""
    directory, journal = folder
    slow, dead = shards.Shard(directory, 2), shards.Shard(directory, 3)
    for name in "abcd":
        add(slow, name)
    for name in "cde":
        add(dead, name)
    committed(folder, "b", process=1)
    dead.file.close()
    shards.recover(directory, journal, 0)
    slow.commit(journal.with_name("metadata-2.jsonl"))
    is_there_once(folder, set("abcde"))
    assert len(names(directory)) == 3


def test_an_image_by_itself_is_not_put_in_a_shard_as_well(folder):
    """After a change of format; lines whose images are missing do not count."""
    directory, journal = folder
    (journal.parent / "images").mkdir()
    (journal.parent / "images" / "a.png").touch()
    files.append(journal, {"id": "a", "file_name": "images/a.png"}, {"id": "b", "file_name": "images/b.png"}, {"id": 5})
    committed(folder, "a", "b")
    assert members(directory) == ["b.png", "b.json"]


class Crash(BaseException):
    pass


def crash_after(monkeypatch, count):
    """Raises Crash before (`count` = 2n - 1) or after (2n) the n-th change of the disk."""
    remaining = count

    def step(real, *arguments, **options):
        nonlocal remaining
        remaining -= 1
        if remaining <= 0:
            raise Crash
        result = real(*arguments, **options)
        remaining -= 1
        if remaining <= 0:
            raise Crash
        return result

    for module, name in (
        (files.os, "replace"),
        (files.os, "fsync"),
        (pathlib.Path, "unlink"),
        (files, "append"),
        (files, "write_all"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **k: step(real, *a, **k))


@pytest.mark.parametrize("twice", ["b", "ab"])
@pytest.mark.parametrize("first", ["between samples", "before the journal"])
def test_a_crash_while_it_is_taken_out_loses_nothing(folder, monkeypatch, first, twice):
    """Wherever `recover` crashes, the next call finds every image, once."""
    crash(folder, monkeypatch, first)
    committed(folder, *twice, process=1)
    run, count, crashed = folder[1].parent, 0, True
    while crashed:
        count, crashed = count + 1, False
        copy = shutil.copytree(run, run.with_name(f"copy-{count}"))
        directory, journal = copy / "shards", copy / "metadata.jsonl"
        with monkeypatch.context() as patch:
            crash_after(patch, count)
            try:
                shards.recover(directory, journal, 0)
            except Crash:
                crashed = True
        shards.recover(directory, journal, 0)
        files.remove_abandoned(directory, 0)
        is_there_once((directory, journal), {"a", "b"})
    assert count > 6


def test_two_that_commit_at_once(folder):
    """Living processes with the same images: each image is in one of their shards."""
    opened = [shards.Shard(folder[0], n) for n in range(8)]
    for n, shard in enumerate(opened):
        for k in range(6):
            add(shard, f"a-{(n + k) % 8}")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: opened[n].commit(folder[1].with_name(f"metadata-{n + 1}.jsonl")), range(8)))
    is_there_once(folder, {f"a-{n}" for n in range(8)})


def test_the_fuzz_sees_doubles(folder):
    """tests/tools/kill_fuzz.py finds them also in a shard without lines in the journal."""
    directory, journal = folder
    shard = committed(folder, "a", "b")
    whole = shutil.copytree(journal.parent, journal.parent.with_name("whole"))
    assert kill_fuzz.problems(journal.parent, whole) == []
    shutil.copy(shard.path, directory / "other.tar")
    assert kill_fuzz.problems(journal.parent, whole) == ["a.png is there 2 times", "b.png is there 2 times"]


def test_killed(tmp_path):
    """A process is killed while it adds samples: those that it reported come back whole."""
    script = (
        "import pathlib, sys, time\n"
        "from referee_jax.storage import shards\n"
        f"shard = shards.Shard(pathlib.Path({str(tmp_path / 'shards')!r}), 0)\n"
        "for n in range(10**6):\n"
        "    name = f'a-{n}'\n"
        "    record = {'id': name, 'file_name': f'shards/{shard.path.name}/{name}.png'}\n"
        "    shard.add(name, {'png': name.encode() * 9999}, record)\n"
        "    print(n, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    output = [process.stdout.readline() for _ in range(20)]
    process.kill()
    output += process.stdout.readlines()
    process.wait()
    shards.recover(tmp_path / "shards", tmp_path / "metadata.jsonl", 0)
    records = files.read_lines(tmp_path / "metadata.jsonl")
    assert len(records) - len(output) in (0, 1) and len(output) >= 20
    for record in records:
        assert shards.read_bytes(tmp_path / record["file_name"]) == record["id"].encode() * 9999
