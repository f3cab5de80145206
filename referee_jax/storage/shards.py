"""Shards: many images in one tar, as WebDataset reads them, for runs whose files would be too many.

    shards/<process>-<time>-<random>.tar    <id>.png or .webp, and <id>.json with prompt, scores and settings, id by id

A shard grows under a temporary name, its journal's lines beside it, both on disk image by image; full, or at the end, it is
renamed, and only then its lines go to the journal. What a crash left is committed by the next start as far as it was on disk.
What others have made meanwhile, as they took the writer for dead, is taken out of it before: no image is in two shards.

An image within a shard is named like a file, `RUN/shards/<name>.tar/<id>.png`: so the journal says it, and `read_bytes` reads it.
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

END = 2 * tarfile.BLOCKSIZE  # bytes of zeros that end a tar
TOGETHER = 100  # members that are copied at once


class Shard:
    """One that is being written: `add`, then `commit`. OSErrors name the file, and leave what was added before."""

    def __init__(self, directory: Path, process: int | str):
        directory.mkdir(exist_ok=True)
        # Told apart by the random part, whoever else writes; the rest is for those who look at the folder.
        time = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        self.path = directory / f"{process:0>3}-{time}-{secrets.token_hex(4)}.tar"
        self.lines = directory / f".{self.path.name}.lines"
        self.file, self.count = files.open_temporary(self.path), 0

    def add(self, name: str, contents: Mapping[str, bytes], record: Mapping[str, Any]) -> None:
        """Adds the files `<name>.<ending>` of `contents` (by ending), of which `record` is to be the line in the journal."""
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

    def commit(self, journal: Path) -> list[str]:
        """Gives the shard its name and writes its lines to the run directory's `journal`; the ids that were added."""
        # One after the other: of two that have the same image, the second sees that the first has it.
        with self.file, files.locked(journal.with_name("config.json")):
            return _commit(self.file, self.path, self.lines, journal)


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _commit(file: BinaryIO, path: Path, lines: Path, journal: Path) -> list[str]:
    """Of the open temporary file `file`, what `lines` has whole."""
    listed = files.read_lines(lines)
    if not listed:
        Path(file.name).unlink(missing_ok=True)
        return []
    file.truncate(listed[-1]["end"])
    _close(file, listed[-1]["end"], path)
    return _list(path, lines, journal)


def _close(file: BinaryIO, end: int, path: Path) -> None:
    """Ends the tar in an open temporary file of so many bytes, and gives it its name."""
    file.truncate(end + END)  # zeros that are not written take no space: a full disk has room for them
    os.fsync(file.fileno())
    os.replace(file.name, path)
    files.sync_directory(path.parent)


def _list(path: Path, lines: Path, journal: Path) -> list[str]:
    """Takes out of a shard what the run has elsewhere, and writes the rest to the journal."""
    records = [x["record"] for x in files.read_lines(lines)]
    with open(path, "rb") as file:
        inside = {_id(name) for name in _members(file)}  # not all, after a crash in the middle of this
    elsewhere = _elsewhere(records, journal)
    if inside <= elsewhere:
        path.unlink()
    elif inside & elsewhere:
        _take_out(elsewhere, path)
    files.append(journal, *(record for record in records if record["id"] in inside - elsewhere))
    lines.unlink(missing_ok=True)
    return [record["id"] for record in records]


def _elsewhere(records: Sequence[Mapping[str, Any]], journal: Path) -> set[str]:
    """The ids of those images that the journals have not here, but in another file, which is there."""
    run, here = journal.parent, {(record["id"], holder(record["file_name"])) for record in records}
    # The main one last, into which lines are moved.
    journals = [*sorted(run.glob("metadata-*.jsonl")), run / "metadata.jsonl"]
    said = [(x.get("id"), x.get("file_name")) for file in journals for x in files.read_lines(file)]
    told = {(name, holder(file)) for name, file in said if isinstance(name, str) and isinstance(file, str)}
    own = {name for name, _ in here} - {name for name, _ in here & told}
    return {name for name, file in told if name in own and (run / file).exists()}


def _take_out(ids: Collection[str], path: Path) -> None:
    """Writes a shard anew, without these; there with them or without, whatever happens meanwhile."""
    with open(path, "rb") as old, files.open_temporary(path) as new:
        try:
            kept = [(name, place) for name, place in _members(old).items() if _id(name) not in ids]
            for n in range(0, len(kept), TOGETHER):
                some = (_member(name, _read(old, *place)) for name, place in kept[n : n + TOGETHER])
                files.write_all(new, b"".join(some), path)
            _close(new, new.tell(), path)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise


def recover(directory: Path, journal: Path, clock: float) -> None:
    """Commits what crashed processes left in a directory of shards, their lines to `journal`; see disk.abandoned.

    For one process at a time: it holds the lock of config.json.
    """
    for lines in sorted(directory.glob(".*.tar.lines")):
        path = directory / lines.name.removeprefix(".").removesuffix(".lines")
        # In this order: a shard that is committed this moment is first under the one name, then under the other.
        temporary = next(directory.glob(f".{path.name}.*.tmp"), None)
        if path.exists():
            _list(path, lines, journal)  # a temporary file beside it is half of `_take_out`
        elif temporary:
            with files.abandoned(temporary, clock) as file:
                if file:
                    _commit(file, path, lines, journal)
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
        return _read(tar, start, size)


def _read(tar: BinaryIO, start: int, size: int) -> bytes:
    tar.seek(start)
    return tar.read(size)


def modified(file: Path) -> int:
    """When a file, or the tar that it is in, was last changed; nanoseconds."""
    return os.stat(file.parent if file.parent.suffix == ".tar" else file).st_mtime_ns


@functools.lru_cache(maxsize=16)
def _places(tar: Path, modified: int) -> dict[str, tuple[int, int]]:
    """`_members`, of a file as it was `modified`. Reading this is slow; images are read shard by shard."""
    del modified  # part of the cache's key
    with open(tar, "rb") as file:
        return _members(file)


def _members(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Name -> where its content starts, and its size. OSError where it is no tar."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            return {member.name: (member.offset_data, member.size) for member in opened if member.isfile()}
    except tarfile.TarError as error:
        raise OSError(5, f"not a shard ({error})", file.name) from error


def _id(name: str) -> str:
    """Of the image that a member belongs to."""
    return name.rpartition(".")[0]
