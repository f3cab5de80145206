"""Shards: tars that others read, of which nothing is seen before it is whole, and nothing lost that was on disk."""

import json
import pathlib
import subprocess
import sys
import tarfile

import pytest

from referee_jax import disk, shards
from tests import conftest


def add(shard, name, size=700):
    """A sample; its content tells of its name."""
    record = {"id": name, "file_name": f"shards/{shard.path.name}/{name}.png"}
    shard.add(name, {"png": name.encode() * size, "json": json.dumps({"text": name}).encode()}, record)
    return record


def names(directory):
    return sorted(x.name for x in directory.iterdir())


@pytest.fixture
def folder(tmp_path):
    """The folder of shards and the journal."""
    return tmp_path / "shards", tmp_path / "metadata.jsonl"


def test_a_shard(folder):
    directory, journal = folder
    shard = shards.Shard(directory, 3)
    records = [add(shard, f"a-{n}", size=700 + n) for n in range(4)]
    assert not shard.path.exists() and not journal.exists()  # nothing is seen yet
    assert shard.commit(journal) == [x["id"] for x in records]
    assert names(directory) == [shard.path.name] and shard.path.name.startswith("003-")
    assert disk.read_lines(journal) == records
    members = [f"a-{n}.{ending}" for n in range(4) for ending in ("png", "json")]
    with tarfile.open(shard.path) as tar:
        assert tar.getnames() == members
        assert json.loads(tar.extractfile("a-2.json").read()) == {"text": "a-2"}
    listed = subprocess.run(["tar", "tf", shard.path], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == members and not listed.stderr
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
    """Not even of two processes that were started with the same number, at the same time."""
    made = [shards.Shard(folder[0], 0) for _ in range(50)]
    assert len({shard.path for shard in made}) == 50
    for shard in made:
        shard.file.close()


def test_what_is_no_shard(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"nothing of the kind" * 99)
    with pytest.raises(OSError, match="not a shard"):
        shards.read_bytes(tmp_path / "x.tar" / "a.png")
    with pytest.raises(FileNotFoundError):
        shards.read_bytes(tmp_path / "y.tar" / "a.png")


@pytest.mark.parametrize("left", [0, 100, 4000, 4650])
def test_a_full_disk_costs_only_what_has_no_room(folder, room, left):
    """Wherever in a sample or in its line the room ends (4608 bytes are the sample's)."""
    directory, journal = folder
    shard = shards.Shard(directory, 0)
    records = [add(shard, "a")]
    room.left = left
    with pytest.raises(OSError, match=rf"No space left on device: '{directory}"):
        add(shard, "b", size=3000)
    room.left = 6000
    records.append(add(shard, "c"))
    shard.commit(journal)
    assert disk.read_lines(journal) == records
    with tarfile.open(shard.path) as tar:
        assert tar.getnames() == ["a.png", "a.json", "c.png", "c.json"]


def test_a_shard_needs_no_room_to_be_closed(folder, room):
    """Its lines wait where they are for the next start, if the journal has none."""
    directory, journal = folder
    shard = shards.Shard(directory, 0)
    record = add(shard, "a")
    room.left = 0
    with pytest.raises(OSError, match=rf"No space left on device: '{journal}'"):
        shard.commit(journal)
    assert shard.path.exists() and disk.read_lines(journal) == []
    room.left = 1000
    shards.recover(directory, journal, 0)
    assert names(directory) == [shard.path.name] and disk.read_lines(journal) == [record]


def crash(folder, monkeypatch, at):
    """Two samples, and what is there after a crash at a moment of their writing; the records that are to come back."""
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
            module, name = {"before the name": (shards.os, "replace"), "before the journal": (disk, "append")}[at]
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
    disk.remove_abandoned(directory, 0)
    assert disk.read_lines(journal) == records
    assert len(names(directory)) == bool(records)
    for record in records:
        assert shards.read_bytes(journal.parent / record["file_name"]) == record["id"].encode() * 700
    shards.recover(directory, journal, 0)
    assert disk.read_lines(journal) == records


def test_a_shard_that_is_written_is_left_alone(folder):
    """Of this machine as long as its writer lives; of another, whose lock may not be seen, if it was written lately."""
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
    shards.recover(directory, journal, clock + 0.9 * disk.STALE)
    assert not journal.exists() and elsewhere.exists()
    shards.recover(directory, journal, clock + 1.1 * disk.STALE)
    assert [x["id"] for x in disk.read_lines(journal)] == ["a", "b"]


def test_a_shard_that_another_commits_this_moment(folder, monkeypatch):
    """Renamed, its lines not yet in a journal: whoever starts lists it too, and the journal counts an image once."""
    directory, journal = folder
    shard = shards.Shard(directory, 1)
    add(shard, "a")
    listed = disk.read_lines(shard.lines)
    other = journal.with_name("metadata-1.jsonl")
    append = disk.append

    def meanwhile(path, *records):
        if path == other:
            shards.recover(directory, journal, 0)
        append(path, *records)

    monkeypatch.setattr(disk, "append", meanwhile)
    assert shard.commit(other) == ["a"]
    assert disk.read_lines(journal) == disk.read_lines(other) == [x["record"] for x in listed]
    assert names(directory) == [shard.path.name]


def test_killed(tmp_path):
    """A process that is killed while it adds: what it said was added comes back, whole."""
    script = conftest.BARE + (
        "from referee_jax import shards\n"
        f"shard = shards.Shard(pathlib.Path({str(tmp_path / 'shards')!r}), 0)\n"
        "for n in range(10**6):\n"
        "    name = f'a-{n}'\n"
        "    record = {'id': name, 'file_name': f'shards/{shard.path.name}/{name}.png'}\n"
        "    shard.add(name, {'png': name.encode() * 9999}, record)\n"
        "    print(n, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    said = [process.stdout.readline() for _ in range(20)]
    process.kill()
    said += process.stdout.readlines()
    process.wait()
    shards.recover(tmp_path / "shards", tmp_path / "metadata.jsonl", 0)
    records = disk.read_lines(tmp_path / "metadata.jsonl")
    assert len(records) - len(said) in (0, 1) and len(said) >= 20
    for record in records:
        assert shards.read_bytes(tmp_path / record["file_name"]) == record["id"].encode() * 9999
