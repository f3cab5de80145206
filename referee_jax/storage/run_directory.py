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

import collections
import contextlib
import functools
import importlib.metadata
import io
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from referee_jax import config
from referee_jax.storage import bucket as bucket_lib
from referee_jax.storage import claims as claims_lib
from referee_jax.storage import contact_sheet, local, shards
from referee_jax.storage import files as files_lib
from referee_jax.storage import writer as writer_lib

PACKAGES = ("referee_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "pillow")
FOLDERS = ("images", "shards")
NOTED = ("commits", "licenses")
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


def read_journal(path: Path, *, where: local.Disk | bucket_lib.Bucket | None = None) -> list[dict[str, Any]]:
    """The lines of a run directory's journals, of all processes, whose images are there; each image once."""
    # These first: `merge` moves lines to the main one, where they may be seen again but must not be missed.
    others = [line for file in sorted(path.glob("metadata-*.jsonl")) for line in files_lib.read_lines(file)]
    return _there(where or local.Disk(path), files_lib.read_lines(path / "metadata.jsonl") + others)


def _there(where: local.Disk | bucket_lib.Bucket, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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

    def __init__(self, where: local.Disk | bucket_lib.Bucket, settings: config.Settings, *, process: int | str = 0):
        self.storage, self.path, self.name = where, where.local, where.name
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
        if bucket_lib.is_remote(path):
            try:
                bucket = bucket_lib.Bucket(str(path))
            except ValueError as error:
                raise RunError(str(error)) from error
            run = cls(bucket, settings, process=bucket.who)
        else:
            run = cls(local.Disk(Path(path).expanduser()), settings, process=process)
        try:
            run._begin(device, resume)
        except OSError as error:
            raise RunError(f"the run directory {run.name} cannot be written: {error.strerror or error}") from error
        return run

    def _begin(self, device: str, resume: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "config.json"
        # Listed before config.json is looked for, which another process that begins the run writes first.
        is_empty = all(name.startswith(".") for name in self.storage.names())
        self.storage.fetch()
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
                files_lib.write_atomic(file, self._record(device, {kind: self.noted(kind) for kind in NOTED}))
                self.storage.publish(file.name)
                self.log("settings", changes=changes.splitlines())
        elif not is_empty:
            raise RunError(
                f"{self.name} is not empty and not a run directory (no config.json); choose another --workdir"
            )
        elif not self.storage.begin(file.name, self._record(device, {})):
            return self._begin(device, resume)  # another began it this moment, perhaps with other settings
        # One process after the other, so that what a crash left is taken up by one, and the next sees it done.
        with files_lib.locked(file):
            self._take_up(device)

    def _record(self, device: str, noted: Mapping[str, Any]) -> bytes:
        """What config.json says."""
        record = {
            "fingerprint": self.fingerprint,
            "settings": config.to_dict(self.settings),
            "versions": versions(),
            "device": device,
            "created": files_lib.now(),
            **noted,
        }
        return json.dumps(record, indent=2).encode() + b"\n"

    def _take_up(self, device: str) -> None:
        """Brings a directory that was left at any moment into order, whoever else is at work in it."""
        self.images.mkdir(exist_ok=True)
        for lines in (self.journal, self.log_file):
            files_lib.mend(lines)
        # Also the proof that the directory can be written to, and the time by the clock of its file system.
        self.log("start", device=device, versions=versions())
        clock = self.log_file.stat().st_mtime
        shards.recover(self.path / "shards", self.journal, clock)
        for folder in ("", *FOLDERS, "trajectories"):
            files_lib.remove_abandoned(self.path / folder, clock)
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
        self.storage.fetch()
        with files_lib.locked(file):
            record = json.loads(file.read_bytes())
            if found.keys() - record.get(kind, {}).keys():
                record[kind] = {**found, **record.get(kind, {})}
                files_lib.write_atomic(file, json.dumps(record, indent=2).encode() + b"\n")
                self.storage.publish(file.name)

    def merge(self) -> None:
        """Takes the lines of all processes' journals into metadata.jsonl; for any of them, at any time.

        A line that another process adds meanwhile stays in, or comes into, a journal of its own. Claims of what is done go.
        """
        self.storage.merge(self._merge)
        claims = self.path / "claims"
        if claims.exists():
            claims_lib.forget_claims(claims, self.done())

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
                stack.enter_context(files_lib.locked(file))
            records = [line for file in (into, *others) for line in files_lib.read_lines(file)]
            kept = _there(self.storage, records)
            if others or len(kept) < len(records):
                files_lib.write_atomic(into, files_lib.encode_lines(*kept))
            for file in others:
                file.unlink()

    def finished(self) -> list[dict[str, Any]]:
        """The lines of all journals whose images are there, each image once."""
        self.storage.fetch()
        return read_journal(self.path, where=self.storage)

    def done(self) -> set[str]:
        """The ids of all items that are journalled, by any process, and whose images are there."""
        return {record["id"] for record in self.finished() if isinstance(record.get("id"), str)}

    def check_space(self, items: int) -> None:
        """RunError if there is no room for so many more images."""
        needed, free = items * bytes_per_item(self.settings), self.storage.free()
        if needed > free:
            size = functools.partial(tqdm.tqdm.format_sizeof, suffix="B")
            raise RunError(
                f"{self.path} has {size(free)} free ({free:,} bytes), and {items} images need about {size(needed)} "
                f"({needed:,} bytes); make room, or choose another --workdir"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[writer_lib.Writer]:
        """What images are written with. At the end, also that by an exception, all that it was given is on disk."""
        writer = writer_lib.Writer(self.path, self.journal, self.settings, process=self.process)
        try:
            yield writer
        finally:
            try:
                writer.close()
            finally:
                self.storage.send()  # what is whole, also if something was not

    def bring(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of these lines whose images can be opened; where the run is in a bucket they are fetched."""
        files = [shards.holder(x["file_name"]) for x in records]
        there = set(self.storage.bring_images(list(dict.fromkeys(files))))
        return [record for record, file in zip(records, files, strict=True) if file in there]

    def write(self, picture: writer_lib.Picture, *, seconds: float, frames: Sequence[np.ndarray] = ()) -> str:
        """Writes one image by itself, in a shard of its own if shards are asked for; see writers.Writer.write."""
        with self.writing() as writer:
            return writer.write(picture, seconds=seconds, frames=frames)

    def log(self, event: str, **values: Any) -> None:
        """Adds a line to log.jsonl."""
        files_lib.append(self.log_file, {"event": event, "time": files_lib.now(), **values})

    def failures(self) -> collections.Counter[str]:
        """How often a device failed at each id, by log.jsonl."""
        if not self.log_file.exists():
            return collections.Counter()
        with self.log_file.open("rb") as file:  # long, and few lines are asked for
            told = [line for line in file if b'"device failed"' in line]
        found = filter(lambda x: x.get("event") == "device failed", files_lib.parse_lines(told))
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
        brought = self.bring(records[: contact_sheet.SHEET_PICTURES])
        shown = [(self.path / x["file_name"], x["text"], x["scores"]) for x in brought]
        title = f"{self.storage.title}: {len(shown)} of {len(records)} images" if len(records) > len(shown) else ""
        buffer = io.BytesIO()
        contact_sheet.draw_sheet(shown, title=title).save(buffer, "PNG")
        path = self.path / "contact_sheet.png"
        files_lib.write_atomic(path, buffer.getvalue())
        self.storage.publish(path.name)
        return path


def bytes_per_item(settings: config.Settings) -> int:
    """What an image takes on the disk, with all that is written beside it; rather more than less."""
    asked, raw = settings.outputs, 3 * settings.image_size**2
    said = 2 * len(config.to_json(settings)) + OVERHEAD  # in the image, in a shard again
    frames = math.ceil(settings.steps / settings.chunk) if asked.trajectory else 0
    return math.ceil(SHARE[writer_lib.ending(asked)] * raw + said + frames * SHARE["frame"] * raw)


# --- contact sheet ----------------------------------------------------------------------------------------------------
