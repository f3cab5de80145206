"""Compiled programs are kept between runs, in a directory of the user's own: compiling is a third of a small job.

JAX finds a program again by what it computes and how it was compiled; whatever it finds there it runs. So the directory must
not be written by others, and each version and kind of device has one of its own within it: a program made for one processor
may not run on another that shares the home directory.
"""

import hashlib
import os
import platform
import re
import tempfile
from pathlib import Path

import jax
import jaxlib


def use(device: str) -> str | None:
    """Has JAX keep the programs of this process; `device` is the kind it computes on. Why it cannot, in a sentence, if so.

    In JAX_COMPILATION_CACHE_DIR, or else where XDG_CACHE_HOME says, usually ~/.cache/referee_jax. Whoever has set
    JAX_ENABLE_COMPILATION_CACHE=false is left alone.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    asked = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if "://" in asked:  # a bucket, whose rights are not those of files
        jax.config.update("jax_compilation_cache_dir", f"{asked.rstrip('/')}/{key(device)}")
        return None
    try:
        base = Path(asked) if asked else _user_cache() / "referee_jax"
        base.parent.mkdir(parents=True, exist_ok=True)
        problem = _problem(base) or _problem(base / key(device))
    except (OSError, RuntimeError) as error:  # the latter: there is no home directory
        problem = f"{error}; another directory can be named by JAX_COMPILATION_CACHE_DIR"
    jax.config.update("jax_compilation_cache_dir", None if problem else str(base / key(device)))
    return problem and f"compiled programs are not kept: {problem}"


def directory() -> str | None:
    """Where the programs of this process are kept; None where they are not."""
    return jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None


# Platform -> how long the programs of a run took to compile: of networks of a few MB (configs/shapes.py), and of Stable
# Diffusion's and BLIP-2's size (configs/paper.py); on a TPU by compiling ahead.
TOOK = {
    "cpu": ("20 to 40 seconds", "some 3 minutes"),
    "gpu": ("up to a minute", "1 to 2 minutes"),
    "tpu": ("some 3 minutes", "5 to 15 minutes"),
}
LARGE = 2**28  # bytes of weights


def expected(platform: str, weights: int) -> str:
    """How long compiling for a platform may take, with networks of so many bytes, and what becomes of it; a clause."""
    small, large = TOOK.get(platform, TOOK["gpu"])
    where = directory()
    kept = f"the first time, seconds where {where} holds it" if where else "each time, for it is not kept"
    return f"{large if weights > LARGE else small} {kept}"


def key(device: str) -> str:
    """The name of the directory for programs of these versions, this kind of device and this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    except OSError:
        processor = [platform.processor()]
    host = hashlib.sha256("\n".join([platform.machine(), *processor]).encode()).hexdigest()[:8]
    return re.sub(r"[^\w.-]+", "_", f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}-{device}-{host}")


def _user_cache() -> Path:
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else Path("~/.cache").expanduser()


def _problem(directory: Path) -> str | None:
    """Makes `directory` where it is missing; what is wrong with it, if something is. Raises OSError."""
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.geteuid():
        return f"{directory} belongs to another user, whose programs would be run"
    if status.st_mode & 0o022:
        return f"others can write to {directory}, and their programs would be run (chmod go-w makes it yours alone)"
    with tempfile.TemporaryFile(dir=directory):
        return None
