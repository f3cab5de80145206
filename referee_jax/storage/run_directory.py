"""A run directory: images, their journal, the log and the settings. No file is ever half written.

    config.json             settings, versions, variables, device; commits, licenses and digests of checkpoints
    images/<id>.png         one per item, with its prompt, scores and settings (images.py); or .webp
    shards/<name>.tar       instead, if `outputs.format` is webdataset: many images each (shards.py)
    metadata.jsonl          the journal: one line per finished image, with `file_name`
    metadata.parquet        the same as a table, when a run ends (parquet.py)
    log.jsonl               starts, skipped prompts, metrics of every chunk
    contact_sheet.png       the first images (contact_sheet.py)
    preview.png             until the first images are finished: what they look like so far
    gallery.html            all images, to sort, filter and compare (gallery_page.py)
    trajectories/<id>.webp  an animation of each item, if `outputs.trajectory` is set
    checkpoints/            batches in flight (checkpoints.py)

It is a Hugging Face dataset: `load_dataset("imagefolder", data_files=["RUN/metadata.jsonl",
"RUN/images/*"])`, or with shards `load_dataset("webdataset", data_files="RUN/shards/*.tar")`.

Several processes may write to one directory. Each but number 0 has a journal of its own,
metadata-<number>.jsonl, which `merge` moves into metadata.jsonl when a process ends. In a bucket
(bucket.py) each process has a local directory, which it uploads.

The life of an image:

    made        the worker iterates; it saves the batch as a checkpoint now and then
    encoded     `Writer.write` hands the picture to a thread, which makes a PNG or WebP
    on disk     as a file, or added to the open shard, which `Writer.refresh` keeps young
    journalled  its line is appended: only now it is done. The lines of a shard are appended when
                the shard is full or committed
    settled     `Writer.flush` has waited for all of the batch; `Saver.settle` then removes the
                checkpoint. With `commit` it first commits the open shard

An image is on disk before its line is in the journal, so an item is done if both are there. After a
crash, the next start (`RunDirectory.open`) repairs what it finds: `files.mend` ends or removes a
half line, `shards.recover` commits open shards of dead processes, temporary files are removed, and
lines without an image are dropped. What is not done then is made again, from its checkpoint if any.
"""

import contextlib
import functools
import importlib.metadata
import io
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from referee_jax import config
from referee_jax.hardware import processes
from referee_jax.storage import bucket as bucket_lib
from referee_jax.storage import contact_sheet, local, objects, parquet, shards
from referee_jax.storage import files as files_lib
from referee_jax.storage import writer as writer_lib

PACKAGES = ("referee_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "pillow")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "NVIDIA_TF32_OVERRIDE")
FOLDERS = ("images", "shards")
NOTED = ("commits", "licenses", "weights")
PATIENCE = 10.0  # seconds to wait for the log's lock, which is held for a line
# To estimate the space on disk: compressed bytes per raw byte, at most; and bytes of metadata.
SHARE = {"png": 0.9, "webp": 0.75, "frame": 0.25}
OVERHEAD = 16384


class RunError(ValueError):
    """A run directory that cannot be used; one sentence, perhaps with a list."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect the images."""
    numbers = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            numbers[name] = importlib.metadata.version(name)
    return numbers


def environment() -> dict[str, str]:
    """The variables that are set of those that affect the images' rounding."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def read_journal(path: Path, *, where: local.Disk | bucket_lib.Bucket | None = None) -> list[dict[str, Any]]:
    """The lines of all processes' journals whose images exist, each image once."""
    # These first: `merge` moves their lines to metadata.jsonl, and so each is seen at least once.
    others = [line for file in sorted(path.glob("metadata-*.jsonl")) for line in files_lib.read_lines(file)]
    return _existing(where or local.Disk(path), files_lib.read_lines(path / "metadata.jsonl") + others)


def _existing(storage: local.Disk | bucket_lib.Bucket, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records whose images exist, one per id. Lists folders: asking file by file is slow."""
    names = {f"{folder}/{name}" for folder in FOLDERS for name in storage.listing(folder)}
    by_id = {}
    for record in records:
        name = record.get("file_name")
        if isinstance(name, str) and (name in names or name.rpartition("/")[0] in names):  # a file, or in a shard
            by_id[str(record.get("id", name))] = record
    return list(by_id.values())


class RunDirectory:
    """A run directory open for writing by this process, and perhaps by others at the same time."""

    def __init__(self, storage: local.Disk | bucket_lib.Bucket, settings: config.Settings, *, process: int | str = 0):
        self.storage, self.path, self.name = storage, storage.local, storage.name
        self.settings, self.process, self.patience = settings, process, PATIENCE
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []  # get each line of the log
        journal = f"metadata-{process}.jsonl" if process else "metadata.jsonl"
        self.images, self.journal, self.log_file = (self.path / x for x in ("images", journal, "log.jsonl"))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the settings."""
        return config.fingerprint(self.settings)

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
        """Begins or continues a run directory, and repairs what a crash left in it.

        Args:
            path: a directory, or a URL in a bucket ("gs://bucket/run").
            settings: what the run makes.
            device: noted in config.json and in the log.
            process: number of this process among those that write at the same time; 0 if alone.
            resume: "auto" continues a run with the same image settings; "force" also one with
                others, for the missing images; "never" continues none. A run of which there is neither
                an image nor a checkpoint is begun anew.

        Raises:
            RunError: it cannot be written, holds something else, or may not be continued.
        """
        if objects.is_remote(path):
            try:
                bucket = bucket_lib.Bucket(str(path))
            except ValueError as error:
                raise RunError(str(error)) from error
            run = cls(bucket, settings, process=bucket.process)
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
        # Listed before the check for config.json, which another process may be about to write.
        is_empty = all(name.startswith(".") for name in self.storage.names())
        self.storage.fetch()
        if file.exists():
            changes = self._compare(file)
            is_bound = (changes or resume == "never") and self.is_bound()
            if is_bound and resume == "never":
                raise RunError(f"{self.name} is a run already, and --resume=never; choose another --workdir")
            if is_bound and resume != "force":
                raise RunError(
                    f"{self.name} was begun with other settings; choose another --workdir, go on with these by --resume=force, "
                    f"or take back:\n{changes}"
                )
            if changes:
                noted = {kind: self.noted(kind) for kind in NOTED} if is_bound else {}
                files_lib.write_atomic(file, self._record(device, noted))
                self.storage.publish(file.name)
                self.log("settings", changes=changes.splitlines())
        elif not is_empty:
            raise RunError(
                f"{self.name} is not empty and not a run directory (no config.json); choose another --workdir"
            )
        elif not self.storage.begin(file.name, self._record(device, {})):
            return self._begin(device, resume)  # another process was first, perhaps with other settings
        with files_lib.locked(file):  # one process at a time
            self._repair(device)

    def _record(self, device: str, noted: Mapping[str, Any]) -> bytes:
        """The content of config.json."""
        record = {
            "fingerprint": self.fingerprint,
            "settings": config.to_dict(self.settings),
            "versions": versions(),
            "environment": environment(),
            "device": device,
            "created": files_lib.now(),
            "process": processes.name_process(),
            **noted,
        }
        return json.dumps(record, indent=2).encode() + b"\n"

    def is_bound(self) -> bool:
        """Whether something was made with the settings in config.json, or the process that wrote them may yet do it."""
        if any(self.storage.listing(folder) for folder in (*FOLDERS, "checkpoints")):
            return True
        return processes.is_at_work(json.loads((self.path / "config.json").read_bytes()).get("process", ""))

    def check_settings(self) -> None:
        """RunError where another command has given the run other settings meanwhile."""
        self.storage.fetch_settings()
        if changes := self._compare(self.path / "config.json"):
            raise RunError(
                f"{self.name} was given other settings by another command; choose another --workdir, or take back:\n{changes}"
            )

    def _repair(self, device: str) -> None:
        """Repairs what crashed processes left, while others may be at work."""
        self.images.mkdir(exist_ok=True)
        for lines in (self.journal, self.log_file):
            files_lib.mend(lines)
        # This also proves that the directory is writable, and gives the file system's time.
        self.log("start", device=device, versions=versions(), environment=environment())
        clock = self.log_file.stat().st_mtime
        shards.recover(self.path / "shards", self.journal, clock)
        for folder in ("", *FOLDERS, "trajectories"):
            files_lib.remove_abandoned(self.path / folder, clock)
        self._gather(self.journal, [] if self.process else self._others())

    def _compare(self, file: Path) -> str:
        """The differences from the image settings in a config.json, by line. Raises RunError."""
        try:
            old = json.loads(file.read_bytes())
            fingerprint, settings = old["fingerprint"], old["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.name}/{file.name} is damaged ({error!r}); choose another --workdir") from error
        if fingerprint == self.fingerprint:
            return ""
        changes = config.diff(config.image_part(settings), config.image_settings(self.settings))
        return changes or "(of another version of the program, or of a module of one's own)"

    def noted(self, kind: str) -> dict[str, str]:
        """One of NOTED of the checkpoints, by name, as noted in config.json."""
        return json.loads((self.path / "config.json").read_bytes()).get(kind, {})

    def note(self, kind: str, values: Mapping[str, str], *, anew: bool = False) -> None:
        """Notes one of NOTED of checkpoints; earlier notes stay, unless `anew`."""
        file = self.path / "config.json"
        self.storage.fetch()
        with files_lib.locked(file):
            record = json.loads(file.read_bytes())
            earlier = record.get(kind, {})
            noted = {**earlier, **values} if anew else {**values, **earlier}
            if noted != earlier:
                record[kind] = noted
                files_lib.write_atomic(file, json.dumps(record, indent=2).encode() + b"\n")
                self.storage.publish(file.name)

    def merge(self) -> None:
        """Moves all journals into metadata.jsonl.

        Any process may call this at any time: lines that others append meanwhile stay in their own
        journals.
        """
        self.storage.merge(self._merge)

    def _merge(self) -> list[str]:
        others = self._others()
        self._gather(self.path / "metadata.jsonl", others)
        return [file.name for file in others]

    def _others(self) -> list[Path]:
        return sorted(self.path.glob("metadata-*.jsonl"))

    def _gather(self, into: Path, others: Sequence[Path]) -> None:
        """Moves the lines of other journals into one, and drops lines whose images are missing."""
        into.touch()
        with contextlib.ExitStack() as stack:
            for file in (into, *others):
                stack.enter_context(files_lib.locked(file))
            records = [line for file in (into, *others) for line in files_lib.read_lines(file)]
            existing = _existing(self.storage, records)
            if others or len(existing) < len(records):
                files_lib.write_atomic(into, files_lib.encode_lines(*existing))
            for file in others:
                file.unlink()

    def finished(self) -> list[dict[str, Any]]:
        """The lines of all journals whose images exist, each image once."""
        self.storage.fetch()
        return read_journal(self.path, where=self.storage)

    def done(self) -> set[str]:
        """The ids of all items that any process has journalled and whose images exist."""
        return {record["id"] for record in self.finished() if isinstance(record.get("id"), str)}

    def check_space(self, items: int) -> None:
        """Raises RunError if the free space is too small for this many more images."""
        needed, free = items * bytes_per_item(self.settings), self.storage.free()
        if needed > free:
            size = functools.partial(tqdm.tqdm.format_sizeof, suffix="B")
            raise RunError(
                f"{self.path} has {size(free)} free ({free:,} bytes), and {items} images need about {size(needed)} "
                f"({needed:,} bytes); make room, or choose another --workdir"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[writer_lib.Writer]:
        """Gives a writer. At the end, also after an exception, all its images are on disk."""
        writer = writer_lib.Writer(self.path, self.journal, self.settings, process=self.process)
        try:
            yield writer
        finally:
            try:
                writer.close()
            finally:
                self.storage.send()  # also if one image failed

    def bring(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Fetches the images of these lines from a bucket; returns the lines that have one."""
        files = [shards.holder(x["file_name"]) for x in records]
        available = set(self.storage.bring_images(list(dict.fromkeys(files))))
        return [record for record, file in zip(records, files, strict=True) if file in available]

    def write(self, picture: writer_lib.Picture, *, seconds: float, frames: Sequence[np.ndarray] = ()) -> str:
        """Writes one image, in a shard of its own if the format is webdataset; see Writer.write."""
        with self.writing() as writer:
            return writer.write(picture, seconds=seconds, frames=frames)

    def log(self, event: str, **values: Any) -> None:
        """Appends a line to log.jsonl."""
        line = {"event": event, "time": files_lib.now(), **values}
        if not files_lib.append(self.log_file, line, seconds=self.patience):
            self.patience = 0.0  # who holds it was stopped: to wait again would delay each chunk
        for listen in self.listeners:
            listen(files_lib.finite(line))

    def write_table(self, records: Sequence[dict[str, Any]]) -> None:
        """Writes metadata.parquet of these lines (`finished()`), where there are some."""
        if records:
            files_lib.write_atomic(self.path / "metadata.parquet", parquet.encode_metadata(records))
            self.storage.publish("metadata.parquet")

    @property
    def preview(self) -> Path | None:
        """The file of `show_preview`; None in a bucket, and for all processes but number 0."""
        return None if self.process or self.storage.is_remote else self.path / "preview.png"

    def remove_preview(self) -> None:
        """Removes the file of `show_preview`, also one that a killed process left."""
        if self.preview:
            self.preview.unlink(missing_ok=True)

    def show_preview(self, prompts: Sequence[str], images: np.ndarray, title: str) -> None:
        """Draws unfinished images, uint8 `[image, H, W, 3]`, each with its prompt."""
        pictures = [
            (Image.fromarray(image), prompt, {})
            for prompt, image in zip(prompts[: contact_sheet.SHEET_PICTURES], images, strict=False)
        ]
        buffer = io.BytesIO()
        contact_sheet.draw_sheet(pictures, title=title).save(buffer, "PNG")
        files_lib.write_atomic(self.preview, buffer.getvalue())

    def contact_sheet(self, records: Sequence[dict[str, Any]]) -> Path | None:
        """Writes contact_sheet.png of the first SHEET_PICTURES of these lines (`finished()`); None without images."""
        order: dict[str, int] = {}
        for record in records:
            order.setdefault(record["text"], len(order))
        records = sorted(records, key=lambda x: (order[x["text"]], x["sample"]))
        if not records:
            return None
        available = self.bring(records[: contact_sheet.SHEET_PICTURES])
        pictures = [(self.path / x["file_name"], x["text"], x["scores"]) for x in available]
        is_partial = len(pictures) < len(records)
        title = f"{self.storage.title}: {len(pictures)} of {len(records)} images" if is_partial else ""
        buffer = io.BytesIO()
        contact_sheet.draw_sheet(pictures, title=title).save(buffer, "PNG")
        path = self.path / "contact_sheet.png"
        files_lib.write_atomic(path, buffer.getvalue())
        self.storage.publish(path.name)
        return path


def bytes_per_item(settings: config.Settings) -> int:
    """An upper estimate of the bytes of an image on disk, with its metadata and animation."""
    outputs, raw = settings.outputs, 3 * settings.image_size**2
    metadata = 2 * len(config.to_json(settings)) + OVERHEAD  # in the image, and in a shard again
    frames = math.ceil(settings.steps / settings.chunk) if outputs.trajectory else 0
    return math.ceil(SHARE[writer_lib.ending(outputs)] * raw + metadata + frames * SHARE["frame"] * raw)
