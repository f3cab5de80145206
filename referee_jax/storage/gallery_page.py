"""The gallery: one page that shows the images of a run."""

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

from referee_jax import config
from referee_jax.storage import files, images, run_directory, shards

EMBEDDED = 300  # pictures; of 512 px they make a page of about 5 MB


THUMBNAIL = 256  # pixels at most, of a picture in the page


SMALL = 128  # pixels; pictures up to this are kept without loss and shown with their pixels


def write(run: run_directory.RunDirectory) -> Path | None:
    """Writes gallery.html of the images that are finished; None where there are none."""
    records = run.finished()
    if not records:
        return None
    path = run.path / "gallery.html"
    # A text may hold half a character (a lone surrogate), which no file can.
    files.write_atomic(path, page(run, records).encode("utf-8", "replace"))
    run.storage.publish(path.name)
    return path


def page(run: run_directory.RunDirectory, records: list[dict[str, Any]]) -> str:
    """The page of these lines of the journal."""
    trajectories = {name.removesuffix(".webp") for name in run.storage.listing("trajectories")}
    count, is_sharded = len(records), any(x["file_name"].startswith("shards/") for x in records)
    records = records[:EMBEDDED] if is_sharded else records
    is_embedded = len(records) <= EMBEDDED
    records = run.bring(records) if is_embedded else records
    begun = json.loads((run.path / "config.json").read_bytes())
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("gallery.html").render(
        title=run.storage.title,
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
    shown = {key: files.finite(record[key]) for key in kept if key in record}
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
    image = images.read_image(file)
    is_small = max(image.size) <= SMALL
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=is_small, quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
