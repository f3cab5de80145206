"""Writes gallery.html: a page to sort, filter and compare a run's images, with their trajectories.

    python -m referee_jax.gallery RUN

is for a run in progress; at its end a run writes the page itself. The page is one file that loads nothing
from a network. It contains up to `gallery_page.EMBEDDED` pictures, so that the file can be sent alone; with
more it would be too large to open and refers to the image files beside it. Images in shards cannot be
referred to, so only the first EMBEDDED are shown. Prompts are untrusted: the page holds them as data
(JSON), shows them as text, never as markup, and its policy allows no script but its own.

Exit codes: 0 done, 2 there is no such run directory, or nothing in it yet.
"""

import json
from pathlib import Path
from typing import Any

from referee_jax import cli, config
from referee_jax.storage import gallery_page, local, objects
from referee_jax.storage import run_directory as run_directory_lib


def read(path: Path) -> run_directory_lib.RunDirectory:
    """Opens a run directory for reading. Raises RunError if it is none, ConfigError if its settings do not fit."""
    try:
        settings = json.loads((path / "config.json").read_bytes())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise run_directory_lib.RunError(f"{path} is not a run directory (no config.json that can be read)") from error
    return run_directory_lib.RunDirectory(local.Disk(path), config.recorded(settings))


def main(_: Any, run_directory: str = "") -> str:
    """The command line."""
    if not run_directory:
        raise ValueError("name one run directory: python -m referee_jax.gallery RUN")
    run = read(objects.local_only(run_directory))
    file = gallery_page.write(run, run.finished())
    if file is None:
        raise ValueError(f"{run_directory} holds no finished image")
    return str(file)


if __name__ == "__main__":
    cli.start(main, arguments=1)
