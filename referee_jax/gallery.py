"""gallery.html: a run's images on a page to sort, filter and compare them, with their trajectories.

    python -m referee_jax.gallery RUN

writes it for a run in progress; at the end of a run it is written anyway. The page is one file that asks no network for
anything. Up to EMBEDDED pictures are part of it, so that it can be sent to somebody by itself; of more than these a page
would grow too large to open, and it shows the files beside it; of images in shards, which no page can show, the first EMBEDDED.
Prompts are other people's words: they are in the page as data (JSON), become text there and never markup, and the page's
policy runs no script but its own.

Exit codes: 0 done, 2 there is no such run directory, or nothing in it yet.
"""

import base64
import contextlib
import io
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from referee_jax import cli, config, disk, formats, outputs, place, remote, shards

EMBEDDED = 300  # pictures; of 512 px they make a page of about 5 MB
THUMBNAIL = 256  # pixels at most, of a picture in the page
SMALL = 128  # pixels; pictures up to this are kept without loss and shown with their pixels


def write(run: outputs.RunDirectory) -> Path | None:
    """Writes gallery.html of the images that are finished; None where there are none."""
    records = run.finished()
    if not records:
        return None
    path = run.path / "gallery.html"
    # A text may hold half a character (a lone surrogate), which no file can.
    disk.write_atomic(path, page(run, records).encode("utf-8", "replace"))
    run.place.publish(path.name)
    return path


def page(run: outputs.RunDirectory, records: list[dict[str, Any]]) -> str:
    """The page of these lines of the journal."""
    trajectories = {name.removesuffix(".webp") for name in run.place.listing("trajectories")}
    count, is_sharded = len(records), any(x["file_name"].startswith("shards/") for x in records)
    records = records[:EMBEDDED] if is_sharded else records
    is_embedded = len(records) <= EMBEDDED
    records = run.bring(records) if is_embedded else records
    begun = json.loads((run.path / "config.json").read_bytes())
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("gallery.html").render(
        title=run.place.title,
        nonce=secrets.token_urlsafe(16),  # drawn after the prompts were written: none of them can know it
        records=[_shown(x, run.path, x["id"] in trajectories, is_embedded) for x in records],
        left_out=count - len(records),
        scores=list(dict.fromkeys(name for x in records for name in x["scores"])),
        statuses=list(dict.fromkeys(x["status"] for x in records)),
        prompts=len({x["text"] for x in records}),
        hacked=sum(bool(x.get("hacked")) for x in records),
        is_small=run.settings.image_size <= SMALL,
        about={key: begun.get(key) for key in ("created", "device", "fingerprint", "versions", "licenses")},
        settings=json.dumps(config.image_settings(run.settings), indent=2, ensure_ascii=False),
    )


def _shown(record: Mapping[str, Any], path: Path, has_trajectory: bool, is_embedded: bool) -> dict[str, Any]:
    """What the page has of a line of the journal."""
    kept = ("text", "sample", "seed", "scores", "status", "losses", "hacked", "seconds")
    shown = {key: disk.finite(record[key]) for key in kept if key in record}
    name = record["file_name"]
    shown["image"] = _link(shards.holder(name))  # a browser opens no file in a shard
    shown["thumbnail"] = shown["image"]
    if is_embedded:
        with contextlib.suppress(ValueError):  # of a damaged file the browser shows that it is
            shown["thumbnail"] = thumbnail(path / name)
    if has_trajectory:
        shown["trajectory"] = _link(f"trajectories/{record['id']}.webp")
    return shown


def _link(name: str) -> str:
    # With the dot it is a path below the page, whatever the name: not "javascript:", not "//elsewhere".
    return "./" + quote(name, errors="replace")


def thumbnail(file: Path) -> str:
    """A data URI of an image, no wider or higher than THUMBNAIL; ValueError where it cannot be read."""
    image = formats.read_image(file)
    is_small = max(image.size) <= SMALL
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=is_small, quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def read(path: Path) -> outputs.RunDirectory:
    """A run directory as it is, in which nothing is begun. RunError or ConfigError where it is none, or not of this version."""
    try:
        settings = json.loads((path / "config.json").read_bytes())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise outputs.RunError(f"{path} is not a run directory (no config.json that can be read)") from error
    return outputs.RunDirectory(place.Disk(path), config.from_config(settings))


def main(_: Any, run_directory: str = "") -> str:
    """The command line."""
    if not run_directory:
        raise ValueError("name one run directory: python -m referee_jax.gallery RUN")
    file = write(read(remote.local_only(run_directory)))
    if file is None:
        raise ValueError(f"{run_directory} holds no finished image")
    return str(file)


if __name__ == "__main__":
    cli.start(main, arguments=1)
