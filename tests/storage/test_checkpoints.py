"""Checkpoints: they come back bit by bit, damage is detected, and only whole ones count."""

import logging
import os
import socket

import numpy as np
import pytest

from referee_jax import items
from referee_jax.hardware import processes
from referee_jax.items import Part
from referee_jax.storage import checkpoints

ITEMS = (*items.expand(["a cat", "\udcff <b>"], 1), items.Item("ünï", 0, "x1", 7, "grey", {"kind": ["a"]}))


def part(step, rng=None):
    rng = np.random.default_rng(step)
    state = {".latents": rng.normal(size=(3, 4, 4, 2)).astype(np.float32), ".optimizer[0].count": np.arange(3)}
    return Part(ITEMS, step, state | {".frozen": np.array([True, False, True])})


def assert_same(a, b):
    assert (a.items, a.step) == (b.items, b.step) and a.state.keys() == b.state.keys()
    for name in a.state:
        np.testing.assert_array_equal(a.state[name], b.state[name])
        assert a.state[name].dtype == b.state[name].dtype


def test_the_newest_comes_back(tmp_path):
    one = checkpoints.Checkpoints(tmp_path / "checkpoints")
    assert one.begun("print") == []
    for step in (10, 20, 30):
        one.save(part(step), "print")
    (newest,) = checkpoints.Checkpoints(tmp_path / "checkpoints").begun("print")
    assert_same(newest, part(30))
    assert sorted(x.name for x in one.folder.iterdir() if x.name.isdigit()) == ["2", "3"]
    assert checkpoints.Checkpoints(tmp_path / "checkpoints").begun("other settings") == []
    one.clear()
    assert one.begun("print") == []


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
@pytest.mark.parametrize("where", [0.02, 0.1, 0.5, 0.9, 0.999])
def test_a_damaged_one_is_passed_over(tmp_path, damage, where, caplog):
    """Damages each file of the newest in turn: it comes back whole, or else the one before does."""
    one = checkpoints.Checkpoints(tmp_path / "checkpoints")
    for step in (10, 20):
        one.save(part(step), "print")
    fallen = 0
    for file in [x for x in (one.folder / "2").rglob("*") if x.is_file() and x.stat().st_size]:
        data = file.read_bytes()
        at = int(where * len(data))
        broken = {"flip": data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :], "cut": data[:at]}
        if damage == "lose":
            file.unlink()
        else:
            file.write_bytes(broken[damage])
        with caplog.at_level(logging.WARNING, logger="absl"):
            caplog.clear()
            (newest,) = one.begun("print")
        assert_same(newest, part(newest.step))
        assert newest.step == 20 or "cannot be read, the one before is taken" in caplog.text
        fallen += newest.step == 10
        file.write_bytes(data)
    assert fallen
    assert_same(one.begun("print")[0], part(20))


def test_one_that_its_owner_removes_meanwhile(tmp_path, monkeypatch):
    """Between listing the folders and reading one: it does not count."""
    one = checkpoints.Checkpoints(tmp_path / "checkpoints")
    one.save(part(10), "print")
    folders = checkpoints._folders(one.directory)
    one.clear()
    monkeypatch.setattr(checkpoints, "_folders", lambda directory: folders)
    other = checkpoints.Checkpoints(one.directory)
    assert other.begun("print") == []
    other.forget(set())


def test_one_that_is_being_written_is_left_to_its_process(tmp_path):
    """It cannot be read yet, so it is not known to be done. Abandoned folders are removed."""
    names = (
        processes.name_process(),
        f"{socket.gethostname()}-99999999-aa",
        "other-host-1-aa",
        "@other",
        "old-host-1-aa",
    )
    places = [tmp_path / "checkpoints" / name for name in names]
    for place in places:
        (place / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    os.utime(places[-1], (0, 0))
    checkpoints.Checkpoints(tmp_path / "checkpoints").forget(set())
    assert [place.exists() for place in places] == [True, False, True, True, False]


def test_forgotten_when_all_is_done(tmp_path):
    one, two = (checkpoints.Checkpoints(tmp_path / "checkpoints") for _ in range(2))
    one.save(part(10), "print")
    two.save(Part(ITEMS[:1], 5, {"x": np.zeros(1)}), "print")
    assert len(one.begun("print")) == 2
    one.forget({ITEMS[0].id})
    assert [newest.step for newest in one.begun("print")] == [10]
    one.forget({item.id for item in ITEMS})
    assert not (tmp_path / "checkpoints").exists()
