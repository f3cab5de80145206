"""Encodes and writes images in a few threads, while the device works on the next ones.

The number of waiting images is bounded: a slow disk slows the run down and does not fill the
memory. An error in a thread is raised by the next `write`, or at the end. An image is on disk
before its line is in the journal, and the lines are in the order of the `write` calls.
"""

import concurrent.futures
import contextlib
import json
import os
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
PENDING = 16  # images waiting to be written, at most


class Picture(Protocol):
    """An image to write: see engine.results.Picture. `image` is float32 `[H, W, 3]` in [0, 1]."""

    item: Item
    image: np.ndarray
    scores: Mapping[str, float]
    status: str
    losses: Mapping[str, Sequence[float]] | None
    questions: Mapping[str, Sequence[Mapping[str, Any]]]


class Pool:
    """Tasks of two parts: `make` in any thread, then `commit` of its result, in order."""

    def __init__(self, threads: int = THREADS, pending: int = PENDING):
        self._makers = concurrent.futures.ThreadPoolExecutor(threads, "make")
        self._committer = concurrent.futures.ThreadPoolExecutor(1, "commit")
        self._free = threading.BoundedSemaphore(pending)
        self._error: BaseException | None = None

    def submit(self, make: Callable[[], Any], commit: Callable[[Any], None]) -> None:
        """Adds a task; blocks while `pending` tasks wait. Raises the first earlier error, once."""
        self._free.acquire()
        try:
            self._raise()
            self._committer.submit(self._commit, self._makers.submit(make), commit)
        except BaseException:
            self._free.release()
            raise

    def _commit(self, result: concurrent.futures.Future, commit: Callable[[Any], None]) -> None:
        try:
            commit(result.result())
        except BaseException as error:
            self._error = self._error or error
        finally:
            self._free.release()

    def flush(self) -> None:
        """Waits for all tasks; raises as `submit`."""
        self._committer.submit(lambda: None).result()
        self._raise()

    def close(self) -> None:
        """Waits for all tasks and ends the threads; raises as `submit`."""
        self._makers.shutdown()
        self._committer.shutdown()
        self._raise()

    def _raise(self) -> None:
        if error := self._error:
            self._error = None
            raise error


class Encoder:
    """Turns pictures into what is written: records, and image files, which say how they were made."""

    def __init__(self, settings: config.Settings):
        self.settings = settings
        self.origin = {"fingerprint": config.fingerprint(settings), "settings": config.image_settings(settings)}
        self.doubt = held_out.doubt(spec.weighted for spec in settings.referees if spec.is_held_out)

    def record(self, picture: Picture) -> dict[str, Any]:
        """What is known of a picture; its `status` is the picture's, or "nonfinite" if a pixel or a score is not finite."""
        item, scores = picture.item, files.finite(dict(picture.scores))
        is_finite = np.isfinite(picture.image).all() and None not in scores.values()
        return {
            "text": item.prompt,
            "id": item.id,
            "sample": item.sample,
            "seed": self.settings.seed if item.seed is None else item.seed,
            **({} if item.negative is None else {"negative": item.negative}),
            "scores": scores,
            "status": picture.status if is_finite else "nonfinite",
            **_held_out(picture.losses, self.doubt),
            **({"questions": files.finite(dict(picture.questions))} if picture.questions else {}),
        }

    def chunk(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What an image file says of itself. No time is in it: its bytes are the same whenever it is made."""
        return {**record, **self.origin}

    def image(self, picture: Picture, chunk: Mapping[str, Any]) -> bytes:
        """The content of an image file."""
        outputs = self.settings.outputs
        return images.ENCODERS[ending(outputs)](images.to_uint8(picture.image, stretch=outputs.stretch), chunk)


class Writer:
    """Writes images and their lines to a run directory; made by `RunDirectory.writing`."""

    def __init__(self, path: Path, journal: Path, settings: config.Settings, *, process: int | str = 0):
        self.path, self.journal, self.settings, self.process = path, journal, settings, process
        self.encoder = Encoder(settings)
        self._pool, self._shard = Pool(), None

    def write(self, picture: Picture, *, seconds: float, frames: Sequence[np.ndarray] = ()) -> str:
        """Queues an image and its line; returns its status. Raises the error of an earlier image.

        The status is the picture's ("done"), or "nonfinite" if a pixel or a score is not finite.
        `seconds` is the time it took; `frames`, uint8 `[H, W, 3]`, are written as an animation.
        """
        item, record = picture.item, self.encoder.record(picture)
        chunk = self.encoder.chunk(record)
        columns = {"columns": files.finite(dict(item.columns))} if item.columns else {}
        line = record | columns | {"seconds": round(seconds, 3), "time": files.now()}
        self._pool.submit(lambda: self._make(picture, chunk, frames), lambda data: self._commit(line, chunk, data))
        return record["status"]

    def flush(self, *, commit: bool = False) -> None:
        """Waits until all images are on disk and, but for those of an open shard, in the journal; `commit` commits it."""
        self._pool.flush()
        if commit:
            self._commit_shard()

    def close(self) -> None:
        """Waits until all images are on disk and in the journal; raises as `Pool.submit`."""
        try:
            self._pool.close()
        finally:
            self._commit_shard()

    def refresh(self) -> None:
        """Keeps the open shard young, for machines that do not see its lock."""
        shard = self._shard
        if shard:
            with contextlib.suppress(OSError, ValueError):  # a thread may be committing it
                os.utime(shard.file.fileno())

    def _make(self, picture: Picture, chunk: Mapping[str, Any], frames: Sequence[np.ndarray]) -> bytes:
        """Encodes an image; writes it unless it goes into a shard."""
        outputs, name = self.settings.outputs, picture.item.id
        data = self.encoder.image(picture, chunk)
        if frames:
            (self.path / "trajectories").mkdir(exist_ok=True)
            files.write_atomic(self.path / "trajectories" / f"{name}.webp", images.encode_animation(frames))
        if outputs.format != "webdataset":
            files.write_atomic(self.path / "images" / f"{name}.{ending(outputs)}", data)
        return data

    def _commit(self, line: Mapping[str, Any], chunk: Mapping[str, Any], data: bytes) -> None:
        """Journals an image on disk, or adds it to the open shard."""
        outputs, name = self.settings.outputs, line["id"]
        if outputs.format != "webdataset":
            files.append(self.journal, {"file_name": f"images/{name}.{ending(outputs)}", **line})
            return
        self._shard = self._shard or shards.Shard(self.path / "shards", self.process)
        record = {"file_name": f"shards/{self._shard.path.name}/{name}.{ending(outputs)}", **line}
        self._shard.add(name, {ending(outputs): data, "json": json.dumps(files.finite(chunk)).encode()}, record)
        if self._shard.count >= outputs.shard_size:
            self._commit_shard()

    def _commit_shard(self) -> None:
        shard, self._shard = self._shard, None
        if shard:
            shard.commit(self.journal)


def ending(outputs: config.Outputs) -> str:
    """The suffix of an image's name: "png" or "webp"."""
    return outputs.shard_images if outputs.format == "webdataset" else outputs.format


def _held_out(losses: Mapping[str, Sequence[float]] | None, doubt: float | None) -> dict[str, Any]:
    """Journal keys of held-out referees: first and last losses, and the reward hacking flag where they answer."""
    if not losses:
        return {}
    flag = {} if doubt is None else {"hacked": held_out.is_hacked(losses, doubt)}
    return {"losses": files.finite(losses), **flag}
