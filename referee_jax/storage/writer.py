"""Images are encoded and written beside the device's work, by a few threads.

A bounded number of images waits: a slow disk slows the run down rather than filling the memory. What goes wrong in a thread is
raised where the next image is given, or at the end. An image is on disk before its line is in the journal, and the lines
are in the order in which images were given.
"""

import concurrent.futures
import contextlib
import json
import os
import queue as queues
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from referee_jax import config
from referee_jax.items import Item
from referee_jax.method import held_out
from referee_jax.storage import files, images, shards

THREADS = 4
PENDING = 16  # images that are given and not written


class Picture(Protocol):
    """What is written: see inverter.Picture. `image` is float32 `[H, W, 3]` in [0, 1]."""

    item: Item
    image: np.ndarray
    scores: Mapping[str, float]
    status: str
    losses: Mapping[str, Sequence[float]] | None


class Pool:
    """Tasks of two halves: `make` in any of the threads, then `commit` of what it gave, one after the other in order."""

    def __init__(self, threads: int = THREADS, pending: int = PENDING):
        self._makers = concurrent.futures.ThreadPoolExecutor(threads, "make")
        self._committer = concurrent.futures.ThreadPoolExecutor(1, "commit")
        self._free = threading.BoundedSemaphore(pending)
        self._error: BaseException | None = None

    def submit(self, make: Callable[[], Any], commit: Callable[[Any], None]) -> None:
        """Gives a task, once less than `pending` are waiting; raises the first error of an earlier one, once."""
        self._free.acquire()
        try:
            self._raise()
            self._committer.submit(self._commit, self._makers.submit(make), commit)
        except BaseException:
            self._free.release()
            raise

    def _commit(self, made: concurrent.futures.Future, commit: Callable[[Any], None]) -> None:
        try:
            commit(made.result())
        except BaseException as error:
            self._error = self._error or error
        finally:
            self._free.release()

    def flush(self) -> None:
        """Waits for all that was given; raises as `submit`."""
        self._committer.submit(lambda: None).result()
        self._raise()

    def close(self) -> None:
        """As `flush`, and ends the threads."""
        self._makers.shutdown()
        self._committer.shutdown()
        self._raise()

    def _raise(self) -> None:
        if error := self._error:
            self._error = None
            raise error


class Writer:
    """Writes the images of a run directory and their lines; from `RunDirectory.writing`."""

    def __init__(self, path: Path, journal: Path, settings: config.Settings, *, process: int | str = 0):
        self.path, self.journal, self.settings, self.process = path, journal, settings, process
        self.made_from = {"fingerprint": config.fingerprint(settings), "settings": config.image_settings(settings)}
        self._pool, self._shard, self._listed = Pool(), None, queues.SimpleQueue()

    def write(self, picture: Picture, *, seconds: float, frames: Sequence[np.ndarray] = ()) -> str:
        """Writes an image and then its line; `seconds` is what it took. Returns the status in the journal.

        It is the picture's ("done"), or "nonfinite" if a pixel or a score is not a finite number. `frames`, uint8
        `[H, W, 3]`, are its making, written as an animation. Raises what went wrong with an earlier image.
        """
        item, scores = picture.item, files.finite(dict(picture.scores))
        is_finite = np.isfinite(picture.image).all() and None not in scores.values()
        record = {
            "text": item.prompt,
            "id": item.id,
            "sample": item.sample,
            "seed": self.settings.seed,
            "scores": scores,
            "status": picture.status if is_finite else "nonfinite",
            **_watched(picture.losses),
        }
        # No time in the image: its bytes say what it was made from, and are the same whenever it is made.
        chunk = record | self.made_from
        line = record | {"seconds": round(seconds, 3), "time": files.now()}
        self._pool.submit(lambda: self._make(picture, chunk, frames), lambda data: self._commit(line, chunk, data))
        return record["status"]

    def flush(self, *, commit: bool = False) -> list[str]:
        """Waits until all that was given is on disk; the ids that came into the journal since this was last asked.

        Those in a shard that is not full come later, unless it is to be committed now.
        """
        self._pool.flush()
        if commit:
            self._commit_shard()
        return [self._listed.get() for _ in range(self._listed.qsize())]

    def close(self) -> None:
        """Waits until all is on disk and in the journal; raises what went wrong and was not raised yet."""
        try:
            self._pool.close()
        finally:
            self._commit_shard()

    def refresh(self) -> None:
        """Says that we are at work on the open shard, where others do not see its lock."""
        shard = self._shard
        if shard:
            with contextlib.suppress(OSError, ValueError):  # it may be committed this moment
                os.utime(shard.file.fileno())

    def _make(self, picture: Picture, chunk: Mapping[str, Any], frames: Sequence[np.ndarray]) -> bytes:
        """The image's file, written if it is one by itself."""
        asked, name = self.settings.outputs, picture.item.id
        data = images.ENCODERS[ending(asked)](images.to_uint8(picture.image, stretch=asked.stretch), chunk)
        if frames:
            (self.path / "trajectories").mkdir(exist_ok=True)
            files.write_atomic(self.path / "trajectories" / f"{name}.webp", images.encode_animation(frames))
        if asked.format != "webdataset":
            files.write_atomic(self.path / "images" / f"{name}.{ending(asked)}", data)
        return data

    def _commit(self, line: Mapping[str, Any], chunk: Mapping[str, Any], data: bytes) -> None:
        asked, name = self.settings.outputs, line["id"]
        if asked.format != "webdataset":
            files.append(self.journal, {"file_name": f"images/{name}.{ending(asked)}", **line})
            self._listed.put(name)
            return
        self._shard = self._shard or shards.Shard(self.path / "shards", self.process)
        record = {"file_name": f"shards/{self._shard.path.name}/{name}.{ending(asked)}", **line}
        self._shard.add(name, {ending(asked): data, "json": json.dumps(files.finite(chunk)).encode()}, record)
        if self._shard.count >= asked.shard_size:
            self._commit_shard()

    def _commit_shard(self) -> None:
        shard, self._shard = self._shard, None
        if shard:
            for name in shard.commit(self.journal):
                self._listed.put(name)


def ending(asked: config.Outputs) -> str:
    """Of an image's file."""
    return asked.shard_images if asked.format == "webdataset" else asked.format


def _watched(losses: Mapping[str, Sequence[float]] | None) -> dict[str, Any]:
    """What the journal says of the watch (watch.py): first and last losses, and whether they look like reward hacking."""
    return {"losses": files.finite(losses), "hacked": held_out.is_hacked(losses)} if losses else {}
