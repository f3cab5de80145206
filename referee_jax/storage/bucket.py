"""A run directory in a bucket: gs://, s3://, or anything else that fsspec supports.

A bucket has no locks and no appends, and objects appear whole. So each process works in a local
directory of its own (`Bucket.local`) and uploads new files. Objects are written once:

    images/, shards/, trajectories/      as in any run directory; deleted locally after the upload
    metadata-<process>-<n>.jsonl, log-*  lines of the journal and log since the previous upload;
                                         log-failed-* those of device failures
    metadata.jsonl                       all lines, merged when a process ends (`Bucket.merge`)
    checkpoints/                         deleted in the bucket when they are deleted locally

An image is uploaded before its line.
"""

import collections
import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from referee_jax import items
from referee_jax.storage import files as files_lib
from referee_jax.storage.objects import Objects

CONTENT = ("images", "shards", "trajectories")
LINES = ("metadata", "log")
FAILED = "log-failed"  # parts of the log with device failures
CHECKPOINTS = "checkpoints"
SHOWN_BYTES = 1e9  # of shards to fetch for a contact sheet or gallery; each is fetched whole
TOGETHER = 32  # objects per fetch request


class Bucket(Objects):
    """A run directory at `url` in a bucket, and this process's local copy."""

    is_remote = True

    def __init__(self, url: str):
        super().__init__(url)
        self._directory = tempfile.TemporaryDirectory(prefix="referee_jax-")
        self.local = Path(self._directory.name)
        self._ends = dict.fromkeys(LINES, 0)  # bytes of each file of lines that were uploaded
        self._parts: collections.Counter[str] = collections.Counter()  # uploads of each
        self._checkpoints: set[str] = set()  # known to be in the bucket
        self._keys: dict[str, str] = {}  # versions of the fetched files that may change
        self._fetched: set[str] = set()

    @property
    def title(self) -> str:
        """The last part of the URL."""
        return self.name.rpartition("/")[2]

    def free(self) -> float:
        """Free bytes: a bucket has no limit."""
        return math.inf

    def listing(self, folder: str) -> list[str]:
        """The names in a folder of the bucket and of the local directory."""
        directory = self.local / folder
        return (os.listdir(directory) if directory.is_dir() else []) + self.names(folder)

    def close(self) -> None:
        """Removes the local directory."""
        self._directory.cleanup()

    # --- downloads and uploads ----------------------------------------------------------------------------------------

    def begin(self, name: str, data: bytes) -> bool:
        """Writes a run's first file, here and in the bucket; False if another process was first."""
        is_ours = self.create(name, data)
        if is_ours:
            files_lib.write_atomic(self.local / name, data)
        return is_ours

    def fetch(self) -> None:
        """Fetches the current settings, journals and device failures."""
        names = [name for name in self.names() if name.startswith(("metadata", FAILED)) and name.endswith(".jsonl")]
        names = [name for name in names if not name.startswith(f"{FAILED}-{self.process}")]
        fixed = [name for name in names if name != "metadata.jsonl" and not (self.local / name).exists()]
        # Parts first: RunDirectory.merge moves their lines to metadata.jsonl, and so each line is
        # seen at least once.
        self.bring(fixed)
        self.fetch_settings()
        self.bring([name for name in ("metadata.jsonl",) if self._is_new(name)])

    def fetch_settings(self) -> None:
        """Fetches the current settings."""
        self.bring([name for name in ("config.json",) if self._is_new(name)])

    def fetch_checkpoints(self) -> None:
        """Fetches the checkpoints of all processes."""
        with self._os_errors():
            paths = self.fs.find(self._at(CHECKPOINTS))
        names = [path[len(self.root) + 1 :] for path in paths]
        self.bring([name for name in names if not (self.local / name).exists()])
        self._checkpoints.update(names)

    def bring(self, names: Sequence[str]) -> None:
        """Fetches objects into the local directory, where they exist; several per request."""
        for name in names:
            (self.local / name).parent.mkdir(parents=True, exist_ok=True)
        large = [name for name in names if name.startswith("shards/")]
        for name in large:
            with self._os_errors(), contextlib.suppress(FileNotFoundError):
                self.fs.get_file(self._at(name), str(self.local / name))
        small = [name for name in names if name not in large]
        for share in items.batches(small, TOGETHER):
            with self._os_errors():
                contents = self.fs.cat([self._at(name) for name in share], on_error="return")
                for name in share:
                    data = contents[self._at(name)]
                    if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                        raise data
                    if isinstance(data, bytes):
                        (self.local / name).write_bytes(data)
        self._fetched.update(names)

    def bring_images(self, files: Sequence[str]) -> list[str]:
        """Fetches images, and shards up to SHOWN_BYTES; returns the names that were fetched."""
        names, total = [x for x in files if not x.endswith(".tar")], 0
        for shard in (x for x in files if x.endswith(".tar")):
            if total < SHOWN_BYTES:
                names.append(shard)
                total += self._size(shard)
        self.bring([name for name in names if not (self.local / name).exists()])
        return names

    def _size(self, name: str) -> int:
        with self._os_errors(), contextlib.suppress(FileNotFoundError):
            return self.fs.size(self._at(name)) or 0
        return 0

    def send(self) -> None:
        """Uploads what is new. Lines are read before their images are sent, so none comes first."""
        lines = {kind: self._new_lines(kind) for kind in LINES}
        content = [file for folder in CONTENT for file in _files(self.local / folder)]
        content = [file for file in content if self._name(file) not in self._fetched]
        states = {self._name(file): file for file in _files(self.local / CHECKPOINTS, "*/[0-9]*/default/*")}
        self._put(content + [file for name, file in states.items() if name not in self._checkpoints])
        for kind, data in lines.items():
            if data:
                self._parts[kind] += 1
                # Other processes read device failures, and not all the rest of the log.
                stem = FAILED if kind == "log" and b'failed", ' in data else kind
                self.write(f"{stem}-{self.process}-{self._parts[kind]:06d}.jsonl", data)
                self._ends[kind] += len(data)
        for file in content:
            file.unlink(missing_ok=True)
        self.remove(*(self._checkpoints - states.keys()))
        self._checkpoints = set(states)

    def publish(self, *names: str) -> None:
        """Uploads these files, replacing what the bucket has."""
        self._put([self.local / name for name in names if (self.local / name).exists()])

    def merge(self, gather: Callable[[], Sequence[str]]) -> None:
        """Under a lock, merges the journals by `gather`, which returns the names of the merged."""
        self.send()
        is_merged = False
        while not is_merged:
            with self.locked("merge") as is_ours:
                self.fetch()
                merged = gather()
                self._ends["metadata"] = 0  # this process's journal was uploaded, and is now empty
                if is_merged := is_ours():  # else the lock expired, and another process merges
                    self.publish("metadata.jsonl")
                    self.remove(*merged)

    def _is_new(self, name: str) -> bool:
        with self._os_errors(), contextlib.suppress(FileNotFoundError):
            key = self.fs.ukey(self._at(name))
            previous, self._keys[name] = self._keys.get(name), key
            return key != previous
        return False

    def _new_lines(self, kind: str) -> bytes:
        """The whole lines of a local file that were not uploaded yet."""
        file = self.local / (f"{kind}-{self.process}.jsonl" if kind == "metadata" else f"{kind}.jsonl")
        if not file.exists():
            return b""
        with open(file, "rb") as lines:
            lines.seek(self._ends[kind])
            data = lines.read()
        return data[: data.rfind(b"\n") + 1]

    def _put(self, files: Sequence[Path]) -> None:
        if files:
            with self._os_errors():
                self.fs.put([str(file) for file in files], [self._at(self._name(file)) for file in files])

    def _name(self, file: Path) -> str:
        return file.relative_to(self.local).as_posix()


def _files(folder: Path, pattern: str = "*") -> list[Path]:
    """The finished files in a folder; temporary ones begin with a dot."""
    return [file for file in sorted(folder.glob(pattern)) if file.is_file() and not file.name.startswith(".")]
