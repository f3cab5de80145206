"""Progress of a run whose output is no terminal."""

import time

import numpy as np
import pytest

from referee_jax import console


@pytest.fixture
def clock(monkeypatch):
    """The current second, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def printed(capsys):
    return [line.partition(" steps")[0] for line in capsys.readouterr().out.splitlines()]


def test_a_line_now_and_then(clock, capsys):
    """However many batches there are; and the last state at the end."""
    with console.shown(10_000, 4) as bar:
        for _ in range(1250):
            for _ in range(2):
                clock[0] += 1.0
                bar.advance(8 * 2, {"loss": np.ones(8)})
            bar.finished(8)
    lines = printed(capsys)
    assert 2500 / console.SECONDS_BETWEEN_LINES - 5 < len(lines) < 2500 / console.SECONDS_BETWEEN_LINES + 5
    assert lines[0] == "120/10000 images, 496/40000" and lines[-1] == "10000/10000 images, 40000/40000"


def test_the_wait_for_the_first_chunk_is_filled(capsys, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_WORDS", 0.01)
    with console.shown(2, 2) as bar:
        time.sleep(0.1)
        said = capsys.readouterr().out.splitlines()
        assert len(said) > 1 and set(said) == {"still compiling or in the first iterations, for 0 s"}
        bar.advance(2, {})
        time.sleep(0.05)
        capsys.readouterr()
        time.sleep(0.05)
        assert not capsys.readouterr().out


def test_the_last_line_is_told_once(clock, capsys):
    """Also if the run ends early by an exception; not again if the last batch was printed."""
    with pytest.raises(KeyboardInterrupt), console.shown(9, 2) as bar:
        bar.advance(3 * 2, {})
        bar.finished(3)
        assert printed(capsys) == []
        raise KeyboardInterrupt
    assert printed(capsys) == ["3/9 images, 6/18"]
    with console.shown(3, 2) as bar:
        bar.advance(3 * 2, {})
        clock[0] += 1.0 + console.SECONDS_BETWEEN_LINES
        bar.finished(3)
    assert printed(capsys) == ["3/3 images, 6/6"]
    with console.shown(3, 2):
        pass
    assert printed(capsys) == []
