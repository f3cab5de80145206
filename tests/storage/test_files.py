"""Files are whole or absent, whichever process dies and whichever others write."""

import concurrent.futures
import errno
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from referee_jax.hardware import processes as processes_lib
from referee_jax.storage import files


@given(st.lists(st.one_of(st.binary(max_size=30), st.just(b'{"id": "a"}'), st.just(b"[1]"), st.just(b"3")), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_reading_lines_of_anything(tmp_path, rows):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\n".join(rows))
    assert files.read_lines(file).count({"id": "a"}) == rows.count(b'{"id": "a"}')
    files.mend(file)
    files.append(file, {"id": "b"})
    records = files.read_lines(file)
    assert records[-1] == {"id": "b"} and records.count({"id": "a"}) == rows.count(b'{"id": "a"}')


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    file = tmp_path / "x.png"
    file.write_bytes(b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("has_links", [True, False])
def test_one_creates_a_file(tmp_path, monkeypatch, has_links):
    """Of several that try, and the others leave nothing, nor does one whose disk is full."""
    file = tmp_path / "x.json"
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *_: os.rename("/nowhere", "/else"))  # OSError
    assert [files.create(file, data) for data in (b"one", b"two")] == [True, False]
    assert file.read_bytes() == b"one" and list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(os, "fsync", lambda handle: os.rename("/nowhere", "/else"))
    with pytest.raises(OSError):
        files.create(tmp_path / "y.json", b"three")
    assert list(tmp_path.iterdir()) == [file]


def test_a_lock_is_of_the_file_that_has_the_name(tmp_path):
    """Also if the file was replaced while another waited for the lock."""
    file = tmp_path / "x.json"
    files.write_atomic(file, b"old")
    with open(file, "rb+") as old, concurrent.futures.ThreadPoolExecutor(1) as pool:
        files.lock(old)

        def wait():
            with files.locked(file), open(file, "rb+") as new:
                return files.lock(new, 0)

        waiting = pool.submit(wait)
        time.sleep(0.05)
        files.write_atomic(file, b"new")
        old.close()
        assert waiting.result(10) is False  # it holds the new one


@pytest.mark.parametrize("left", [0, 1, 9])
def test_lines_are_added_whole_or_not_at_all(tmp_path, room, left):
    """A full disk accepts a part; later lines are not corrupted by it."""
    file = tmp_path / "x.jsonl"
    files.append(file, {"n": 0})
    before, room.left = file.read_bytes(), left
    with pytest.raises(OSError, match=rf"No space left on device: '{file}'"):
        files.append(file, {"n": 1}, {"n": 2})
    assert file.read_bytes() == before
    room.left = 100
    files.append(file, {"n": 3})
    assert files.read_lines(file) == [{"n": 0}, {"n": 3}]


def test_a_full_disk_is_named(tmp_path, room):
    room.left = 3
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'x.png'}'"):
        files.write_atomic(tmp_path / "x.png", b"more than three")
    assert list(tmp_path.iterdir()) == []


def test_lines_go_to_the_file_that_has_the_name(tmp_path, monkeypatch):
    """Another process replaces a journal just before a line is appended."""
    file, lock = tmp_path / "x.jsonl", files.lock
    files.append(file, {"n": 0})

    def late(handle, seconds):
        monkeypatch.setattr(files, "lock", lock)
        files.write_atomic(file, files.encode_lines({"n": 1}))
        return lock(handle, seconds)

    monkeypatch.setattr(files, "lock", late)
    assert files.append(file, {"n": 2})
    assert files.read_lines(file) == [{"n": 1}, {"n": 2}]


def holder(file):
    """A process that holds a temporary file of `file` open; it prints the name first."""
    script = (
        "import pathlib, sys, time\n"
        "from referee_jax.storage import files\n"
        f"file = files.open_temporary(pathlib.Path({str(file)!r}))\n"
        "file.write(b'half')\n"
        "print(file.name, flush=True)\n"
        "time.sleep(100)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    return process, pathlib.Path(process.stdout.readline().strip())


def test_what_another_process_writes_is_left_alone_until_it_dies(tmp_path):
    process, temporary = holder(tmp_path / "x.png")
    try:
        assert temporary.parent == tmp_path and temporary.name.startswith(".x.png.")
        process.send_signal(signal.SIGSTOP)  # not even one that stands still for long loses its file
        files.remove_abandoned(tmp_path, time.time() + 10 * files.STALE)
        assert temporary.exists()
        process.kill()
        process.wait()
        files.remove_abandoned(tmp_path, time.time())
        assert not temporary.exists()
    finally:
        process.kill()
        process.wait()


def test_what_another_machine_writes_is_left_alone_for_a_while(tmp_path):
    """Its lock may be invisible here."""
    temporary = tmp_path / ".x.png.elsewhere.123.tmp"
    temporary.write_bytes(b"half")
    written = temporary.stat().st_mtime
    files.remove_abandoned(tmp_path, written + 0.9 * files.STALE)
    assert temporary.exists()
    files.remove_abandoned(tmp_path, written + 1.1 * files.STALE)
    assert not temporary.exists()


def test_a_disk_without_locks(tmp_path, monkeypatch):
    """Age alone decides there; writing works as usual."""

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    files.write_atomic(tmp_path / "x", b"whole")
    files.append(tmp_path / "y", {"n": 1})
    assert (tmp_path / "x").read_bytes() == b"whole" and files.read_lines(tmp_path / "y") == [{"n": 1}]
    temporary = tmp_path / f".x.{processes_lib.HOST}.123.tmp"
    temporary.write_bytes(b"half")
    files.remove_abandoned(tmp_path, time.time())
    assert temporary.exists()
    files.remove_abandoned(tmp_path, time.time() + 1.1 * files.STALE)
    assert not temporary.exists()


def test_nobody_waits_for_ever(tmp_path, monkeypatch):
    """For the lock of a process that was stopped."""
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    files.append(tmp_path / "x.jsonl", {"n": 0})
    with files.locked(tmp_path / "x.jsonl"):
        with open(tmp_path / "x.jsonl") as file:
            assert files.lock(file, 0) is False
        files.append(tmp_path / "x.jsonl", {"n": 1})
    assert len(files.read_lines(tmp_path / "x.jsonl")) == 2


def test_lines_of_several_processes_do_not_mix(tmp_path):
    script = (
        "import pathlib, sys, time\n"
        "from referee_jax.storage import files\n"
        "for n in range(50):\n"
        f"    files.append(pathlib.Path({str(tmp_path / 'x.jsonl')!r}), {{'who': sys.argv[1], 'n': n, 'text': 'x' * 9000}})\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, who]) for who in "abc"]
    assert [process.wait() for process in processes] == [0, 0, 0]
    lines = (tmp_path / "x.jsonl").read_bytes().splitlines()
    records = [json.loads(line) for line in lines]
    assert {who: [x["n"] for x in records if x["who"] == who] for who in "abc"} == dict.fromkeys("abc", [*range(50)])
