"""Programs are kept in a private directory; without one the run continues."""

import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from referee_jax.engine import inverter
from referee_jax.hardware import compile_cache


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """An empty cache directory of the user, and JAX set to keep every program."""
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield tmp_path / "referee_jax"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def compiled():
    """Computes as a new process would; returns the result and whether a kept program gave it."""
    hits = []
    listen = lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
    jax.monitoring.register_event_listener(listen)

    def run():
        hits.clear()
        jax.clear_caches()
        x = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
        return np.asarray(jax.jit(lambda x: jnp.linalg.inv(x @ x.T + jnp.eye(20)))(x)).tobytes(), bool(hits)

    yield run
    jax.monitoring.unregister_event_listener(listen)


def test_a_kept_program_gives_the_same(home, compiled):
    assert compile_cache.use("cpu") is None
    first, was_kept = compiled()
    assert not was_kept
    assert compiled() == (first, True)
    (directory,) = home.iterdir()
    assert directory.name == compile_cache.key("cpu") and list(directory.glob("*-cache"))
    assert [path.stat().st_mode & 0o777 for path in (home, directory)] == [0o700, 0o700]


@pytest.mark.parametrize("asked", [None, "2.5"])
def test_programs_of_a_tenth_of_a_second_are_kept(asked, monkeypatch):
    """Unless the user wants it otherwise."""
    name = "jax_persistent_cache_min_compile_time_secs"
    monkeypatch.delenv(name.upper(), raising=False)
    if asked:
        monkeypatch.setenv(name.upper(), asked)
    jax.config.update(name, float(asked or 1))
    compile_cache.use("cpu")
    assert getattr(jax.config, name) == float(asked or 0.1)


@pytest.mark.parametrize(
    "change", [lambda data: b"garbage", lambda data: data[:-20], lambda data: data[:-9] + b"x" + data[-8:]]
)
def test_a_damaged_program_is_compiled_again(change, home, compiled):
    compile_cache.use("cpu")
    first, _ = compiled()
    for file in home.rglob("*-cache"):
        file.write_bytes(change(file.read_bytes()))
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert compiled() == (first, False)


def test_the_directory_is_of_the_versions_and_the_device():
    assert compile_cache.key("cpu").startswith(f"jax-{jax.__version__}-jaxlib-")
    assert compile_cache.key("cpu") == compile_cache.key("cpu") != compile_cache.key("NVIDIA H100/80GB")
    assert not set(compile_cache.key("../NVIDIA H100")) & set("/ ")


def test_the_variable_that_users_know(tmp_path, monkeypatch, home):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    assert compile_cache.use("cpu") is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine" / compile_cache.key("cpu"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/programs/")
    assert compile_cache.use("cpu") is None
    assert jax.config.jax_compilation_cache_dir == f"gs://bucket/programs/{compile_cache.key('cpu')}"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert compile_cache.use("cpu") is None and jax.config.jax_compilation_cache_dir is None
    assert not home.exists()


def refused(compiled):
    """The sentence of a refusal, after which programs are not kept."""
    jax.config.update("jax_compilation_cache_dir", "left from before")
    sentence = compile_cache.use("cpu")
    assert jax.config.jax_compilation_cache_dir is None and "\n" not in sentence
    assert [compiled()[1], compiled()[1]] == [False, False]
    return sentence


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_others_could_write(mode, inner, home, compiled):
    place = home / compile_cache.key("cpu") if inner else home
    place.mkdir(parents=True)
    place.chmod(mode)
    sentence = refused(compiled)
    assert sentence.startswith(f"compiled programs are not kept: others can write to {place}, and")
    assert "chmod go-w" in sentence


def test_others_can_read(home):
    home.mkdir(mode=0o755)
    assert compile_cache.use("cpu") is None


def test_another_user(home, compiled, monkeypatch):
    home.mkdir()
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert refused(compiled) == (
        f"compiled programs are not kept: {home} belongs to another user, whose programs would be run"
    )


@pytest.mark.parametrize("place", ["/proc/nobody/programs", "/dev/null/programs", "/dev/null"])
def test_no_place(place, compiled, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", place)
    assert "JAX_COMPILATION_CACHE_DIR" in refused(compiled)


def test_no_home(compiled, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", lambda: None)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert "home directory" in refused(compiled)


def test_the_directory_is_told(home):
    engine = types.SimpleNamespace(devices="cpu x 1", batch_size=3)
    assert compile_cache.use("cpu") is None
    assert compile_cache.directory() == str(home / compile_cache.key("cpu"))
    assert inverter.Inverter.compiling.fget(engine) == (
        f"compiling for cpu x 1, 3 images at once; programs are kept in {compile_cache.directory()}"
    )
    jax.config.update("jax_compilation_cache_dir", None)
    assert compile_cache.directory() is None
    assert inverter.Inverter.compiling.fget(engine) == "compiling for cpu x 1, 3 images at once"
