"""Keeps compiled programs between runs in a private directory; compiling is a third of a small job.

JAX looks a program up by its computation and compiler options, and runs whatever it finds. So
nobody else may write to the directory. Each version and kind of device has a subdirectory, as a
program made for one processor may not run on another that shares the home directory.
"""

import hashlib
import os
import platform
import re
import tempfile
from pathlib import Path

import jax
import jaxlib

_LEAST = "jax_persistent_cache_min_compile_time_secs"  # of a program that is kept


def use(device: str) -> str | None:
    """Has JAX keep this process's programs for this kind of device; a sentence if it cannot.

    The directory is JAX_COMPILATION_CACHE_DIR, or referee_jax in XDG_CACHE_HOME (~/.cache). Does
    nothing if JAX_ENABLE_COMPILATION_CACHE=false.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if _LEAST.upper() not in os.environ:  # JAX's own second leaves out what a run's first pictures wait for
        jax.config.update(_LEAST, 0.1)
    path = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if "://" in path:  # a bucket, which has no file permissions
        jax.config.update("jax_compilation_cache_dir", f"{path.rstrip('/')}/{key(device)}")
        return None
    try:
        base = Path(path) if path else _user_cache() / "referee_jax"
        base.parent.mkdir(parents=True, exist_ok=True)
        problem = _problem(base) or _problem(base / key(device))
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        problem = f"{error}; another directory can be named by JAX_COMPILATION_CACHE_DIR"
    jax.config.update("jax_compilation_cache_dir", None if problem else str(base / key(device)))
    return problem and f"compiled programs are not kept: {problem}"


def directory() -> str | None:
    """The directory of this process's programs; None if they are not kept."""
    return jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None


def key(device: str) -> str:
    """Name of the subdirectory for these versions, this kind of device and this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    except OSError:
        processor = [platform.processor()]
    host = hashlib.sha256("\n".join([platform.machine(), *processor]).encode()).hexdigest()[:8]
    return re.sub(r"[^\w.-]+", "_", f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}-{device}-{host}")


def _user_cache() -> Path:
    path = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return path if path.is_absolute() else Path("~/.cache").expanduser()


def _problem(directory: Path) -> str | None:
    """Makes `directory` if it is missing, and returns what is wrong with it. Raises OSError."""
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.geteuid():
        return f"{directory} belongs to another user, whose programs would be run"
    if status.st_mode & 0o022:
        return f"others can write to {directory}, and their programs would be run (chmod go-w makes it yours alone)"
    with tempfile.TemporaryFile(dir=directory):
        return None
