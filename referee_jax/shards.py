"""Shards: many images in one tar, as WebDataset reads them, for runs whose files would be too many.

    shards/<process>-<time>-<random>.tar    <id>.png or .webp, and <id>.json with prompt, scores and settings, id by id

A shard grows under a temporary name, its journal's lines beside it, both on disk image by image; full, or at the end, it is
renamed, and only then its lines go to the journal. What a crash left is committed by the next start as far as it was on disk.

An image within a shard is named like a file, `RUN/shards/<name>.tar/<id>.png`: so the journal says it, and `read_bytes` reads it.
"""

import datetime
import functools
import os
import secrets
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from referee_jax import disk

END = 2 * tarfile.BLOCKSIZE  # bytes of zeros that end a tar


class Shard:
    """One that is being written: `add`, then `commit`. OSErrors name the file, and leave what was added before."""

    def __init__(self, directory: Path, process: int | str):
        directory.mkdir(exist_ok=True)
        # Told apart by the random part, whoever else writes; the rest is for those who look at the folder.
        time = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        self.path = directory / f"{process:0>3}-{time}-{secrets.token_hex(4)}.tar"
        self.lines = directory / f".{self.path.name}.lines"
        self.file, self.count = disk.open_temporary(self.path), 0

    def add(self, name: str, contents: Mapping[str, bytes], record: Mapping[str, Any]) -> None:
        """Adds the files `<name>.<ending>` of `contents` (by ending), of which `record` is to be the line in the journal."""
        start = self.file.tell()
        data = b"".join(_member(f"{name}.{ending}", content) for ending, content in contents.items())
        disk.write_all(self.file, data, self.path)
        try:
            disk.append(self.lines, {"end": self.file.tell(), "record": record})
        except BaseException:
            self.file.seek(start)
            self.file.truncate()
            raise
        self.count += 1

    def commit(self, journal: Path) -> list[str]:
        """Gives the shard its name and writes its lines to the journal; the ids in it."""
        with self.file:
            return _commit(self.file, self.path, self.lines, journal)


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _commit(file: BinaryIO, path: Path, lines: Path, journal: Path) -> list[str]:
    """Of the open temporary file `file`, what `lines` has whole."""
    listed = disk.read_lines(lines)
    if not listed:
        Path(file.name).unlink(missing_ok=True)
        return []
    # Zeros that are not written take no space: a full disk has room for them.
    file.truncate(listed[-1]["end"])
    file.truncate(listed[-1]["end"] + END)
    os.fsync(file.fileno())
    os.replace(file.name, path)
    disk.sync_directory(path.parent)
    return _list(listed, lines, journal)


def _list(listed: list[dict[str, Any]], lines: Path, journal: Path) -> list[str]:
    records = [x["record"] for x in listed]
    disk.append(journal, *records)
    lines.unlink(missing_ok=True)
    return [record["id"] for record in records]


def recover(directory: Path, journal: Path, clock: float) -> None:
    """Commits what crashed processes left in a directory of shards, their lines to `journal`; see disk.abandoned."""
    for lines in sorted(directory.glob(".*.tar.lines")):
        path = directory / lines.name.removeprefix(".").removesuffix(".lines")
        # In this order: a shard that is committed this moment is first under the one name, then under the other.
        temporary = next(directory.glob(f".{path.name}.*.tmp"), None)
        if temporary:
            with disk.abandoned(temporary, clock) as file:
                if file:
                    _commit(file, path, lines, journal)
        elif path.exists():
            _list(disk.read_lines(lines), lines, journal)
        else:
            lines.unlink(missing_ok=True)


# --- reading ----------------------------------------------------------------------------------------------------------


def holder(name: str) -> str:
    """The file that holds an image of this name: itself, or the shard that it is in."""
    return name.rpartition("/")[0] if ".tar/" in name else name


def read_bytes(file: Path) -> bytes:
    """The content of a file, or of a member of a tar that is named like a file in it. OSError where there is none."""
    if file.parent.suffix != ".tar":
        return file.read_bytes()
    start, size = _places(file.parent, os.stat(file.parent).st_mtime_ns).get(file.name, (0, None))
    if size is None:
        raise FileNotFoundError(2, "No such file in the shard", str(file))
    with open(file.parent, "rb") as tar:
        tar.seek(start)
        return tar.read(size)


def modified(file: Path) -> int:
    """When a file, or the tar that it is in, was last changed; nanoseconds."""
    return os.stat(file.parent if file.parent.suffix == ".tar" else file).st_mtime_ns


@functools.lru_cache(maxsize=16)
def _places(tar: Path, modified: int) -> dict[str, tuple[int, int]]:
    """Name -> where its content starts, and its size. Reading this is slow; images are read shard by shard."""
    del modified  # part of the cache's key
    try:
        with tarfile.open(tar, "r:") as opened:
            return {member.name: (member.offset_data, member.size) for member in opened if member.isfile()}
    except tarfile.TarError as error:
        raise OSError(5, f"not a shard ({error})", str(tar)) from error
