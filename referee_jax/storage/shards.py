"""Shards: many images in one tar in WebDataset's format, for runs with too many images for files.

    shards/<process>-<time>-<random>.tar    for each id: <id>.png or <id>.webp, and <id>.json with
                                            prompt, scores and settings

An open shard has a temporary name, and the journal lines of its images are in a file beside it.
Both are synced after every image. When the shard is full, or at the end, it is renamed, and then
its lines go to the journal. After a crash the next start commits what was on disk. Images that
another worker has since made are removed before the commit: no image is in two shards.

The journal and `read_bytes` name an image in a shard like a file: `RUN/shards/<name>.tar/<id>.png`.
"""

import datetime
import functools
import os
import secrets
import tarfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from referee_jax.storage import files

END = 2 * tarfile.BLOCKSIZE  # zero bytes at the end of a tar
TOGETHER = 100  # members per write when a shard is rewritten


class Shard:
    """An open shard: `add`, then `commit`. OSErrors name the file and spare earlier images."""

    def __init__(self, directory: Path, process: int | str):
        directory.mkdir(exist_ok=True)
        # The random part makes the name unique; the rest is for readers of the folder.
        time = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        self.path = directory / f"{process:0>3}-{time}-{secrets.token_hex(4)}.tar"
        self.lines = directory / f".{self.path.name}.lines"
        self.file, self.count = files.open_temporary(self.path), 0

    def add(self, name: str, contents: Mapping[str, bytes], record: Mapping[str, Any]) -> None:
        """Adds files `<name>.<ending>` (`contents` by ending), with `record` as journal line."""
        start = self.file.tell()
        data = b"".join(_member(f"{name}.{ending}", content) for ending, content in contents.items())
        files.write_all(self.file, data, self.path)
        try:
            files.append(self.lines, {"end": self.file.tell(), "record": record})
        except BaseException:
            self.file.seek(start)
            self.file.truncate()
            raise
        self.count += 1

    def commit(self, journal: Path) -> None:
        """Renames the shard and writes its lines to the run's `journal`."""
        # Under a lock: of two shards with the same image, the second commit sees the first.
        with self.file, files.locked(journal.with_name("config.json")):
            _commit(self.file, self.path, self.lines, journal)


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _commit(file: BinaryIO, path: Path, lines: Path, journal: Path) -> None:
    """Commits the images of the open temporary file `file` that have a whole line in `lines`."""
    added = files.read_lines(lines)
    if not added:
        Path(file.name).unlink(missing_ok=True)
        return
    file.truncate(added[-1]["end"])
    _close(file, added[-1]["end"], path)
    _journal(path, lines, journal)


def _close(file: BinaryIO, end: int, path: Path) -> None:
    """Ends the tar in an open temporary file after `end` bytes, and renames it to `path`."""
    file.truncate(end + END)  # a hole of zeros, for which a full disk has room
    os.fsync(file.fileno())
    os.replace(file.name, path)
    files.sync_directory(path.parent)


def _journal(path: Path, lines: Path, journal: Path) -> None:
    """Removes images that the run has elsewhere from a shard, and journals the others."""
    records = [x["record"] for x in files.read_lines(lines)]
    with open(path, "rb") as file:
        inside = {_id(name) for name in _members(file)}  # fewer, if this function crashed before
    elsewhere = _elsewhere(records, journal)
    if inside <= elsewhere:
        path.unlink()
    elif inside & elsewhere:
        _remove(elsewhere, path)
    files.append(journal, *(record for record in records if record["id"] in inside - elsewhere))
    lines.unlink(missing_ok=True)


def _elsewhere(records: Sequence[Mapping[str, Any]], journal: Path) -> set[str]:
    """The ids of images that the journals name not in this shard, but in another existing file."""
    run, here = journal.parent, {(record["id"], holder(record["file_name"])) for record in records}
    # metadata.jsonl last, since lines are moved into it.
    journals = [*sorted(run.glob("metadata-*.jsonl")), run / "metadata.jsonl"]
    pairs = [(x.get("id"), x.get("file_name")) for file in journals for x in files.read_lines(file)]
    journalled = {(name, holder(file)) for name, file in pairs if isinstance(name, str) and isinstance(file, str)}
    unlisted = {name for name, _ in here} - {name for name, _ in here & journalled}
    return {name for name, file in journalled if name in unlisted and (run / file).exists()}


def _remove(ids: Collection[str], path: Path) -> None:
    """Atomically rewrites a shard without the images of these ids."""
    with open(path, "rb") as old, files.open_temporary(path) as new:
        try:
            rest = [(name, span) for name, span in _members(old).items() if _id(name) not in ids]
            for n in range(0, len(rest), TOGETHER):
                members = (_member(name, _read(old, *span)) for name, span in rest[n : n + TOGETHER])
                files.write_all(new, b"".join(members), path)
            _close(new, new.tell(), path)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise


def recover(directory: Path, journal: Path, clock: float) -> None:
    """Commits the shards that crashed processes left, and writes their lines to `journal`.

    The caller holds the lock of config.json. `clock` is as in files.abandoned.
    """
    for lines in sorted(directory.glob(".*.tar.lines")):
        path = directory / lines.name.removeprefix(".").removesuffix(".lines")
        # In this order, since a shard that is being committed moves from this name to the other.
        temporary = next(directory.glob(f".{path.name}.*.tmp"), None)
        if path.exists():
            _journal(path, lines, journal)  # a temporary file beside it is an unfinished `_remove`
        elif temporary:
            with files.abandoned(temporary, clock) as file:
                if file:
                    _commit(file, path, lines, journal)
        else:
            lines.unlink(missing_ok=True)


# --- reading ----------------------------------------------------------------------------------------------------------


def holder(name: str) -> str:
    """The file that holds the image of this name: itself, or its shard."""
    return name.rpartition("/")[0] if ".tar/" in name else name


def read_bytes(file: Path) -> bytes:
    """The content of a file, or of a member `<name>.tar/<member>` of a tar. OSError if missing."""
    if file.parent.suffix != ".tar":
        return file.read_bytes()
    start, size = _cached_members(file.parent, os.stat(file.parent).st_mtime_ns).get(file.name, (0, None))
    if size is None:
        raise FileNotFoundError(2, "No such file in the shard", str(file))
    with open(file.parent, "rb") as tar:
        return _read(tar, start, size)


def _read(tar: BinaryIO, start: int, size: int) -> bytes:
    tar.seek(start)
    return tar.read(size)


def modified(file: Path) -> int:
    """When a file, or its tar, was last changed; Unix time in nanoseconds."""
    return os.stat(file.parent if file.parent.suffix == ".tar" else file).st_mtime_ns


@functools.lru_cache(maxsize=16)
def _cached_members(tar: Path, modified: int) -> dict[str, tuple[int, int]]:
    """`_members` of a tar last changed at `modified`; cached, as listing a tar is slow."""
    del modified  # part of the cache's key
    with open(tar, "rb") as file:
        return _members(file)


def _members(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Name -> (offset, size) in bytes of each member's content. OSError if it is not a tar."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            return {member.name: (member.offset_data, member.size) for member in opened if member.isfile()}
    except tarfile.TarError as error:
        raise OSError(5, f"not a shard ({error})", file.name) from error


def _id(name: str) -> str:
    """The id of the image that a member belongs to."""
    return name.rpartition(".")[0]
