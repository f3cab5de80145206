"""The gallery: an HTML page of a run's images."""

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

EMBEDDED = 300  # thumbnails in the page, at most: about 5 MB for images of 512 px
THUMBNAIL = 256  # pixels, the longest side of a thumbnail
SMALL = 128  # pixels; images up to this side are embedded losslessly and shown pixelated


def write(run: run_directory.RunDirectory, records: list[dict[str, Any]]) -> Path | None:
    """Writes gallery.html of these lines of the journal (`run.finished()`); None without images."""
    if not records:
        return None
    path = run.path / "gallery.html"
    # A prompt may hold a lone surrogate, which UTF-8 cannot encode.
    files.write_atomic(path, page(run, records).encode("utf-8", "replace"))
    run.storage.publish(path.name)
    return path


def page(run: run_directory.RunDirectory, records: list[dict[str, Any]]) -> str:
    """The HTML page of these lines of the journal."""
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
        nonce=secrets.token_urlsafe(16),  # newer than all prompts, so that none can contain it
        records=[_entry(x, run.path, x["id"] in trajectories, is_embedded) for x in records],
        left_out=count - len(records),
        scores=list(dict.fromkeys(name for x in records for name in x["scores"])),
        statuses=list(dict.fromkeys(x["status"] for x in records)),
        prompts=len({x["text"] for x in records}),
        hacked=sum(bool(x.get("hacked")) for x in records),
        is_small=run.settings.image_size <= SMALL,
        about={key: begun.get(key) for key in ("created", "device", "fingerprint", "versions", "licenses")},
        settings=json.dumps(config.image_settings(run.settings), indent=2, ensure_ascii=False),
    )


def _entry(record: Mapping[str, Any], path: Path, has_trajectory: bool, is_embedded: bool) -> dict[str, Any]:
    """The page's data of one line of the journal."""
    keys = ("text", "sample", "seed", "scores", "status", "losses", "hacked", "seconds", "questions")
    entry = {key: files.finite(record[key]) for key in keys if key in record}
    name = record["file_name"]
    entry["image"] = _link(shards.holder(name))  # browsers cannot open a file in a shard
    entry["thumbnail"] = entry["image"]
    if is_embedded:
        with contextlib.suppress(ValueError):  # a damaged image is linked, for the browser to show
            entry["thumbnail"] = thumbnail(path / name)
    if has_trajectory:
        entry["trajectory"] = _link(f"trajectories/{record['id']}.webp")
    return entry


def _link(name: str) -> str:
    # The dot makes any name a path below the page, such as "javascript:" or "//elsewhere".
    return "./" + quote(name, errors="replace")


def thumbnail(file: Path) -> str:
    """A data URI of an image with sides of at most THUMBNAIL. ValueError if it cannot be read."""
    image = images.read_image(file)
    is_small = max(image.size) <= SMALL
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=is_small, quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
