"""gallery.html: a run's images on a page to sort, filter and compare them, with their trajectories.

    python -m referee_jax.gallery RUN

writes it for a run in progress; at the end of a run it is written anyway. The page is one file that asks no network for
anything. Up to EMBEDDED pictures are part of it, so that it can be sent to somebody by itself; of more than these a page
would grow too large to open, and it shows the files beside it; of images in shards, which no page can show, the first EMBEDDED.
Prompts are other people's words: they are in the page as data (JSON), become text there and never markup, and the page's
policy runs no script but its own.

Exit codes: 0 done, 2 there is no such run directory, or nothing in it yet.
"""

import json
from pathlib import Path
from typing import Any

from referee_jax import cli, config
from referee_jax.storage import bucket, gallery_page, local
from referee_jax.storage import run_directory as run_directory_lib


def read(path: Path) -> run_directory_lib.RunDirectory:
    """A run directory as it is, in which nothing is begun. RunError or ConfigError where it is none, or not of this version."""
    try:
        settings = json.loads((path / "config.json").read_bytes())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise run_directory_lib.RunError(f"{path} is not a run directory (no config.json that can be read)") from error
    return run_directory_lib.RunDirectory(local.Disk(path), config.from_config(settings))


def main(_: Any, run_directory: str = "") -> str:
    """The command line."""
    if not run_directory:
        raise ValueError("name one run directory: python -m referee_jax.gallery RUN")
    file = gallery_page.write(read(bucket.local_only(run_directory)))
    if file is None:
        raise ValueError(f"{run_directory} holds no finished image")
    return str(file)


if __name__ == "__main__":
    cli.start(main, arguments=1)
