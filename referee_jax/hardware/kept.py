"""Keeps what a process works out from the package's sources alone for the next one, beside compiled programs.

Other sources, versions or options of JAX have other files. Whoever could write to the directory could have code run, as with
the programs themselves (compile_cache.py).
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pickle
import tempfile
import types
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from referee_jax.hardware import compile_cache

PACKAGES = {"referee_jax", "flax", "jax", "jaxlib", "optax", "numpy", "builtins"}  # whose sources or versions are known
# Options of JAX that name a place or devices: the directory has one kind of these, and what depends on their number says so.
_ELSEWHERE = {"jax_compilation_cache_dir", "jax_platforms", "jax_num_cpu_devices"}
_DIGEST = hashlib.sha256().digest_size


class Unknown(Exception):
    """A value that its text does not tell apart from others."""


def directory() -> Path | None:
    """Where things are kept; None if they are not: JAX may keep its programs in a bucket, too."""
    place = compile_cache.directory()
    return None if place is None or "://" in place else Path(place) / "traced"


def once(made_of: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, or returned in another process for the same `made_of`, sources, versions and device."""
    if not (place := directory()):
        return make()
    options = {name: x for name, x in jax.config.values.items() if name not in _ELSEWHERE}
    file = place / hashlib.sha256(f"{_sources()}\n{options}\n{made_of}".encode()).hexdigest()
    with contextlib.suppress(OSError):
        data = file.read_bytes()
        if hashlib.sha256(data[_DIGEST:]).digest() == data[:_DIGEST]:
            return pickle.loads(data[_DIGEST:])
    made = make()
    # Of a full disk, or of what has a function of a function's: the next process makes it again.
    with contextlib.suppress(OSError, pickle.PicklingError, AttributeError):
        data = pickle.dumps(made)
        place.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place, delete=False) as temporary:
            temporary.write(hashlib.sha256(data).digest() + data)
        os.replace(temporary.name, file)
    return made


@functools.cache
def _sources() -> str:
    """A hash of the package's sources, and the versions of what it traces with."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    versions = [metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")]
    return f"{digest.hexdigest()} {versions}"


def text(value: Any) -> str:
    """The text of a static value, which no other has. Raises Unknown."""
    match value:
        case None | bool() | int() | float() | str() | bytes() | np.dtype() | np.generic():
            return repr(value)
        case tuple() | list():
            return f"{text(type(value))}({', '.join(map(text, value))})"
        case Mapping():
            return f"{{{', '.join(f'{text(key)}: {text(x)}' for key, x in value.items())}}}"
        case functools.partial():
            return f"partial{text((value.func, value.args, value.keywords))}"
        case type() | types.FunctionType() | jax.stages.Wrapped():
            if value.__module__.partition(".")[0] in PACKAGES and "<" not in value.__qualname__:
                return f"{value.__module__}.{value.__qualname__}"
        case _ if dataclasses.is_dataclass(value):
            return text(type(value)) + text({x.name: getattr(value, x.name) for x in dataclasses.fields(value)})
    raise Unknown(value)
