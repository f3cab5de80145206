"""A run directory: images, their journal, the log, and what was asked for. Nothing in it is ever half written.

    config.json         settings, fingerprint, versions, device, and of checkpoints from the hub commits and licenses
    images/<id>.png     one per item, with its prompt, scores and settings in it (formats.py); or .webp
    shards/<name>.tar   instead, many images each, where `outputs.format` is webdataset (shards.py)
    metadata.jsonl      the journal: one line per finished image, with `file_name`
    log.jsonl           starts, skipped prompts, metrics of every chunk
    contact_sheet.png   all of it at a glance
    gallery.html        all of it to sort, filter and compare (gallery.py)
    trajectories/<id>.webp

It is a Hugging Face ImageFolder: `load_dataset("imagefolder", data_files=["RUN/metadata.jsonl", "RUN/images/*"])`, or with shards
`load_dataset("webdataset", data_files="RUN/shards/*.tar")`. An image, or its shard, is on disk before its line is in the
journal, so an item is done if both are there, whatever happened in between.

Several processes may write to one directory: all but number 0 have a metadata-<number>.jsonl of their own, whose lines come into
metadata.jsonl when one of them ends (`RunDirectory.merge`). In a bucket (remote.py) each has a local
directory, which it sends there.
"""

import bisect
import collections
import contextlib
import functools
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from absl import logging
from PIL import Image, ImageDraw, ImageFont

from referee_jax import config, disk, formats, place, queue, remote, shards, writers

PACKAGES = ("referee_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "pillow")
FOLDERS = ("images", "shards")
NOTED = ("commits", "licenses")
SHEET_PICTURES = 200
# For the space on disk: a compressed image by what it is raw, at most; and what is written besides, in bytes.
SHARE = {"png": 0.9, "webp": 0.75, "frame": 0.25}
OVERHEAD = 16384


class RunError(ValueError):
    """A run directory that cannot be used; one sentence, perhaps with a list."""


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what is computed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def read_journal(path: Path, *, where: place.Disk | remote.Bucket | None = None) -> list[dict[str, Any]]:
    """The lines of a run directory's journals, of all processes, whose images are there; each image once."""
    # These first: `merge` moves lines to the main one, where they may be seen again but must not be missed.
    others = [line for file in sorted(path.glob("metadata-*.jsonl")) for line in disk.read_lines(file)]
    return _there(where or place.Disk(path), disk.read_lines(path / "metadata.jsonl") + others)


def _there(where: place.Disk | remote.Bucket, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those of images that are there. The folders are listed: to ask for each file is slow on a network's disk."""
    names = {f"{folder}/{name}" for folder in FOLDERS for name in where.listing(folder)}
    kept = {}
    for record in records:
        name = record.get("file_name")
        if isinstance(name, str) and (name in names or name.rpartition("/")[0] in names):  # a file, or in a shard
            kept[str(record.get("id", name))] = record
    return list(kept.values())


class RunDirectory:
    """A run directory that is written to, by this process and perhaps others; each has a journal of its own."""

    def __init__(self, where: place.Disk | remote.Bucket, settings: config.Settings, *, process: int | str = 0):
        self.place, self.path, self.name = where, where.local, where.name
        self.settings, self.process = settings, process
        journal = f"metadata-{process}.jsonl" if process else "metadata.jsonl"
        self.images, self.journal, self.log_file = (self.path / x for x in ("images", journal, "log.jsonl"))
        self.fingerprint = config.fingerprint(settings)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        settings: config.Settings,
        *,
        device: str = "",
        process: int = 0,
        resume: str = "auto",
    ) -> "RunDirectory":
        """Begins a run directory or continues one, here or in a bucket ("gs://bucket/run"); `device` is noted in it.

        One that was begun for other images is refused, but with `resume` "force": then what is missing is made with these
        settings, and what is there stays. With "never", none is continued.

        `process` is this process's number among those that write to the directory at the same time; 0 if it is the only one.
        Raises RunError where it cannot be written, holds something else, or was begun for other images.
        """
        if remote.is_remote(path):
            try:
                bucket = remote.Bucket(str(path))
            except ValueError as error:
                raise RunError(str(error)) from error
            run = cls(bucket, settings, process=bucket.who)
        else:
            run = cls(place.Disk(Path(path).expanduser()), settings, process=process)
        try:
            run._begin(device, resume)
        except OSError as error:
            raise RunError(f"the run directory {run.name} cannot be written: {error.strerror or error}") from error
        return run

    def _begin(self, device: str, resume: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "config.json"
        # Listed before config.json is looked for, which another process that begins the run writes first.
        is_empty = all(name.startswith(".") for name in self.place.names())
        self.place.fetch()
        if file.exists() and resume == "never":
            raise RunError(f"{self.name} is a run already, and --resume=never; choose another --workdir")
        if file.exists():
            changes = self._compare(file)
            if changes and resume != "force":
                raise RunError(
                    f"{self.name} was begun with other settings; choose another --workdir, go on with these by --resume=force, "
                    f"or take back:\n{changes}"
                )
            if changes:
                disk.write_atomic(file, self._record(device, {kind: self.noted(kind) for kind in NOTED}))
                self.place.publish(file.name)
                self.log("settings", changes=changes.splitlines())
        elif not is_empty:
            raise RunError(
                f"{self.name} is not empty and not a run directory (no config.json); choose another --workdir"
            )
        elif not self.place.begin(file.name, self._record(device, {})):
            return self._begin(device, resume)  # another began it this moment, perhaps with other settings
        # One process after the other, so that what a crash left is taken up by one, and the next sees it done.
        with disk.locked(file):
            self._take_up(device)

    def _record(self, device: str, noted: Mapping[str, Any]) -> bytes:
        """What config.json says."""
        record = {
            "fingerprint": self.fingerprint,
            "settings": config.to_dict(self.settings),
            "versions": versions(),
            "device": device,
            "created": disk.now(),
            **noted,
        }
        return json.dumps(record, indent=2).encode() + b"\n"

    def _take_up(self, device: str) -> None:
        """Brings a directory that was left at any moment into order, whoever else is at work in it."""
        self.images.mkdir(exist_ok=True)
        for lines in (self.journal, self.log_file):
            disk.mend(lines)
        # Also the proof that the directory can be written to, and the time by the clock of its file system.
        self.log("start", device=device, versions=versions())
        clock = self.log_file.stat().st_mtime
        shards.recover(self.path / "shards", self.journal, clock)
        for folder in ("", *FOLDERS, "trajectories"):
            disk.remove_abandoned(self.path / folder, clock)
        self._gather(self.journal, [] if self.process else self._others())

    def _compare(self, file: Path) -> str:
        """How the settings of a run differ from ours as far as images go, a line each. Raises RunError."""
        try:
            old = json.loads(file.read_bytes())
            fingerprint, settings = old["fingerprint"], old["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.name}/{file.name} is damaged ({error!r}); choose another --workdir") from error
        if fingerprint == self.fingerprint:
            return ""
        return config.diff(config.image_part(settings), config.image_settings(self.settings)) or "(of another version)"

    def noted(self, kind: str) -> dict[str, str]:
        """What is noted of checkpoints: of each, the "commits" that the run began with or the "licenses"."""
        return json.loads((self.path / "config.json").read_bytes()).get(kind, {})

    def note(self, kind: str, found: Mapping[str, str]) -> None:
        """Notes the commits or licenses of checkpoints; of those that are noted already nothing changes."""
        file = self.path / "config.json"
        self.place.fetch()
        with disk.locked(file):
            record = json.loads(file.read_bytes())
            if found.keys() - record.get(kind, {}).keys():
                record[kind] = {**found, **record.get(kind, {})}
                disk.write_atomic(file, json.dumps(record, indent=2).encode() + b"\n")
                self.place.publish(file.name)

    def merge(self) -> None:
        """Takes the lines of all processes' journals into metadata.jsonl; for any of them, at any time.

        A line that another process adds meanwhile stays in, or comes into, a journal of its own. Claims of what is done go.
        """
        self.place.merge(self._merge)
        claims = self.path / "claims"
        if claims.exists():
            queue.forget_claims(claims, self.done())

    def _merge(self) -> list[str]:
        others = self._others()
        self._gather(self.path / "metadata.jsonl", others)
        return [file.name for file in others]

    def _others(self) -> list[Path]:
        return sorted(self.path.glob("metadata-*.jsonl"))

    def _gather(self, into: Path, others: Sequence[Path]) -> None:
        """The lines of other journals into one; images that are no longer there lose theirs: they will be made again."""
        into.touch()
        with contextlib.ExitStack() as stack:
            for file in (into, *others):
                stack.enter_context(disk.locked(file))
            records = [line for file in (into, *others) for line in disk.read_lines(file)]
            kept = _there(self.place, records)
            if others or len(kept) < len(records):
                disk.write_atomic(into, disk.encode_lines(*kept))
            for file in others:
                file.unlink()

    def finished(self) -> list[dict[str, Any]]:
        """The lines of all journals whose images are there, each image once."""
        self.place.fetch()
        return read_journal(self.path, where=self.place)

    def done(self) -> set[str]:
        """The ids of all items that are journalled, by any process, and whose images are there."""
        return {record["id"] for record in self.finished() if isinstance(record.get("id"), str)}

    def image_file(self, name: str) -> Path:
        """Where the image of an item's id is written, if it is a file by itself."""
        return self.images / f"{name}.{writers.ending(self.settings.outputs)}"

    def check_space(self, items: int) -> None:
        """RunError if there is no room for so many more images."""
        needed, free = items * bytes_per_item(self.settings), self.place.free()
        if needed > free:
            size = functools.partial(tqdm.tqdm.format_sizeof, suffix="B")
            raise RunError(
                f"{self.path} has {size(free)} free ({free:,} bytes), and {items} images need about {size(needed)} "
                f"({needed:,} bytes); make room, or choose another --workdir"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[writers.Writer]:
        """What images are written with. At the end, also that by an exception, all that it was given is on disk."""
        writer = writers.Writer(self.path, self.journal, self.settings, process=self.process)
        try:
            yield writer
        finally:
            try:
                writer.close()
            finally:
                self.place.send()  # what is whole, also if something was not

    def bring(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of these lines whose images can be opened; where the run is in a bucket they are fetched."""
        files = [shards.holder(x["file_name"]) for x in records]
        there = set(self.place.bring_images(list(dict.fromkeys(files))))
        return [record for record, file in zip(records, files, strict=True) if file in there]

    def write(self, picture: writers.Picture, *, seconds: float, frames: Sequence[np.ndarray] = ()) -> str:
        """Writes one image by itself, in a shard of its own if shards are asked for; see writers.Writer.write."""
        with self.writing() as writer:
            return writer.write(picture, seconds=seconds, frames=frames)

    def log(self, event: str, **values: Any) -> None:
        """Adds a line to log.jsonl."""
        disk.append(self.log_file, {"event": event, "time": disk.now(), **values})

    def failures(self) -> collections.Counter[str]:
        """How often a device failed at each id, by log.jsonl."""
        if not self.log_file.exists():
            return collections.Counter()
        with self.log_file.open("rb") as file:  # long, and few lines are asked for
            told = [line for line in file if b'"device failed"' in line]
        found = filter(lambda x: x.get("event") == "device failed", disk.parse_lines(told))
        return collections.Counter(name for line in found for name in line["items"])

    def contact_sheet(self) -> Path | None:
        """Writes contact_sheet.png of the first SHEET_PICTURES images, prompt by prompt; None without images."""
        order: dict[str, int] = {}
        records = self.finished()
        for record in records:
            order.setdefault(record["text"], len(order))
        records.sort(key=lambda x: (order[x["text"]], x["sample"]))
        if not records:
            return None
        brought = self.bring(records[:SHEET_PICTURES])
        shown = [(self.path / x["file_name"], x["text"], x["scores"]) for x in brought]
        title = f"{self.place.title}: {len(shown)} of {len(records)} images" if len(records) > len(shown) else ""
        buffer = io.BytesIO()
        draw_sheet(shown, title=title).save(buffer, "PNG")
        path = self.path / "contact_sheet.png"
        disk.write_atomic(path, buffer.getvalue())
        self.place.publish(path.name)
        return path


def bytes_per_item(settings: config.Settings) -> int:
    """What an image takes on the disk, with all that is written beside it; rather more than less."""
    asked, raw = settings.outputs, 3 * settings.image_size**2
    said = 2 * len(config.to_json(settings)) + OVERHEAD  # in the image, in a shard again
    frames = math.ceil(settings.steps / settings.chunk) if asked.trajectory else 0
    return math.ceil(SHARE[writers.ending(asked)] * raw + said + frames * SHARE["frame"] * raw)


# --- contact sheet ----------------------------------------------------------------------------------------------------


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float, *, lines: int) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels; a word that is too long is broken, a text cut with "..."."""
    wrapped = list(itertools.islice(_wrapped(text, font, width), lines + 1))
    if len(wrapped) > lines:
        last = wrapped[lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        wrapped = [*wrapped[: lines - 1], last + "..."]
    return wrapped


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") <= width:
            line = f"{line} {word}"
            continue
        if line:
            yield line
        line = word
        while font.getlength(line) > width and len(line) > 1:
            # By halves: a word of 2000 letters would take minutes to measure at every length.
            fits = bisect.bisect_right(range(1, len(line)), width, key=lambda n: font.getlength(line[:n])) or 1
            yield line[:fits]
            line = line[fits:]
    if line:
        yield line


def _thumbnail(file: Path, width: int) -> Image.Image:
    """At least `width` wide by whole pixels, or shrunk to it; of a damaged file, grey."""
    try:
        image = formats.read_image(file)
    except ValueError as error:
        logging.warning("%s", error)
        image = Image.new("RGB", (width, width), "#bbbbbb")
    if image.width < width:
        factor = -(-width // image.width)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)


def draw_sheet(
    pictures: Sequence[tuple[Path, str, Mapping[str, float | None]]], *, title: str = "", width: int = 192
) -> Image.Image:
    """A grid of images (files, or in shards) with their texts and scores below."""
    margin, size, lines = 12, 15, 4
    font, small = ImageFont.load_default(size), ImageFont.load_default(size - 2)
    images = [_thumbnail(file, width) for file, _, _ in pictures]
    wide, high = max(x.width for x in images), max(x.height for x in images)
    texts = [wrap(text, font, wide, lines=lines) for _, text, _ in pictures]
    said = [[wrap(_score(*x), small, wide, lines=1)[0] for x in scores.items()] for _, _, scores in pictures]
    leading = size + 4
    below = leading * max(len(a) + len(b) for a, b in zip(texts, said, strict=True))
    columns = min(len(pictures), max(4, math.ceil(math.sqrt(len(pictures)))))
    rows, top = -(-len(pictures) // columns), leading + margin if title else 0
    cell = wide + margin, high + below + margin
    sheet = Image.new("RGB", (margin + columns * cell[0], top + margin + rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((margin, margin), title, font=font, fill="black")
    for n, image in enumerate(images):
        x, y = margin + n % columns * cell[0], top + margin + n // columns * cell[1]
        sheet.paste(image, (x, y))
        y += high + 2
        for text, kind, colour in [(t, font, "black") for t in texts[n]] + [(t, small, "#666666") for t in said[n]]:
            draw.text((x, y), text, font=kind, fill=colour)
            y += leading
    return sheet


def _score(name: str, value: float | None) -> str:
    return f"{name} {'not finite' if value is None else format(value, '.3f')}"
