"""What is kept is what would be made, or is made again."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax.hardware import chips, kept
from tests import toys

DIRECTORY = kept.directory.__wrapped__  # without what tests/conftest.py puts in its place


@pytest.fixture
def place(monkeypatch, tmp_path):
    """The directory where things are kept, empty."""
    monkeypatch.setattr(kept, "directory", lambda: tmp_path / "traced")
    return tmp_path / "traced"


@pytest.mark.parametrize("change", [lambda data: b"", lambda data: b"garbage" * 9, lambda data: data[:-20]])
def test_what_is_damaged_is_made_again(change, place):
    kept.once("x", lambda: b"made" * 9)
    (file,) = place.iterdir()
    whole = file.read_bytes()
    file.write_bytes(change(whole))
    assert kept.once("x", lambda: b"again") == kept.once("x", pytest.fail) == b"again"
    assert list(place.iterdir()) == [file]


def test_without_a_place_it_is_made_again(place):
    place.write_text("no directory")
    assert kept.once("x", lambda: b"made") == b"made"


def test_what_cannot_be_written_is_made_again(place):
    assert kept.once("x", lambda: test_texts_tell_values_apart) is test_texts_tell_values_apart  # by its name
    here = lambda: None
    assert kept.once("y", lambda: here) is here
    assert len(list(place.iterdir())) == 1


def test_other_sources_or_options_have_another(place, monkeypatch):
    kept.once("x", lambda: 1)
    with jax.numpy_dtype_promotion("strict"):
        assert kept.once("x", lambda: 2) == 2
    monkeypatch.setattr(kept, "_sources", lambda: "edited")
    assert kept.once("x", lambda: 3) == 3


@pytest.mark.parametrize(
    ("is_enabled", "place", "expected"),
    [
        (True, "gs://bucket/programs", None),
        (True, "/home/programs", pathlib.Path("/home/programs/traced")),
        (True, None, None),
        (False, "/home/programs", None),
    ],
)
def test_it_lies_beside_what_jax_compiles(is_enabled, place, expected):
    """But not in a bucket, of which JAX alone has a way to read."""
    options = {"jax_enable_compilation_cache": is_enabled, "jax_compilation_cache_dir": place}
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        assert DIRECTORY() == expected
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def outside(x):
    return x


@pytest.mark.parametrize(
    "value",
    [
        outside,
        lambda x: x,
        functools.partial(outside, 1),
        object(),
        np.zeros(2),
        {"a": (1, outside)},
        {1, 2},
        toys.engine,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_text_tells_is_unknown(value):
    with pytest.raises(kept.Unknown):
        kept.text(value)


def test_texts_tell_values_apart():
    gelu = [functools.partial(jax.nn.gelu, approximate=is_rough) for is_rough in (True, False)]
    values = [1, 1.0, True, "1", b"1", (1,), [1], {"a": 1}, None, np.float32(1), jnp.float32, jax.nn.gelu, *gelu]
    values += [chips.Hardware(), chips.Hardware(group=2), chips.Chip, np.dtype("int8"), -0.0, 0.0]
    assert len(set(map(kept.text, values))) == len(values)
