"""Batches in flight on disk (Orbax), so that whoever continues a run goes on in the middle of an image.

    RUN/checkpoints/<who>/<number>/   `state`: arrays `[item, ...]` by name; `about`: items, step, a hash of the arrays

Each process writes its own, the last two are kept, and a checkpoint is visible only when it is complete. Rows of one may go on in
different processes: the state of an item knows nothing of its batch. Key data is not saved; it follows from seed and item.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from referee_jax import queue

KEPT = 2


class Checkpoints:
    """Those of this process, and of others before it, in the run directory's folder `directory`."""

    def __init__(self, directory: Path):
        # A name of its own: rows of an older checkpoint may be what another process goes on with.
        self.directory, self.own = directory, directory / queue.name_process()
        self._manager: ocp.CheckpointManager | None = None

    def save(self, part: queue.Part, fingerprint: str) -> None:
        """Saves a part in flight; on disk when this returns. OSError where it cannot be written."""
        about = {
            "items": [[item.prompt, item.sample] for item in part.items],
            "step": part.step,
            "fingerprint": fingerprint,
            "hash": _hash(part.state),
        }
        manager = self._manager = self._manager or _manager(self.own)
        number = 1 + max(manager.all_steps(), default=0)
        content = ocp.args.Composite(state=ocp.args.StandardSave(part.state), about=ocp.args.JsonSave(about))
        manager.save(number, args=content, force=True)

    def clear(self) -> None:
        """Forgets our own: their batch is done."""
        if self._manager:
            self._manager.close()
            self._manager = None
        shutil.rmtree(self.own, ignore_errors=True)

    def forget(self, done: Collection[str]) -> None:
        """Removes those of any process of which all items are `done`, and the folder when it is empty."""
        for place in _places(self.directory):
            if all(item.id in done for part in self._of(place, None) for item in part.items):
                shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def begun(self, fingerprint: str) -> list[queue.Part]:
        """What any process has left in the middle under these settings: the newest whole checkpoint of each."""
        found = (next(self._of(place, fingerprint), None) for place in _places(self.directory))
        return [part for part in found if part]

    def _of(self, place: Path, fingerprint: str | None) -> Iterator[queue.Part]:
        """The parts in a process's folder, the newest first; damaged ones are told of and passed over."""
        for number in sorted((int(x.name) for x in place.iterdir() if x.name.isdigit()), reverse=True):
            try:
                part, settings = _read(place / str(number))
            except Exception as error:  # Orbax and TensorStore raise what they like for damaged files
                logging.warning("%s cannot be read, the one before is taken: %s", place / str(number), str(error)[:200])
                continue
            if fingerprint is None or settings == fingerprint:
                yield part


def _places(directory: Path) -> list[Path]:
    return sorted(x for x in directory.iterdir() if x.is_dir()) if directory.is_dir() else []


def _manager(path: Path) -> ocp.CheckpointManager:
    """One that is of this process alone, also where jax.distributed knows of others."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix=path.name
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True, create=False,
        multiprocessing_options=alone,
    )  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    return ocp.CheckpointManager(path, options=options)


def _read(path: Path) -> tuple[queue.Part, str]:
    """The part in a checkpoint and the fingerprint of its settings. ValueError where the arrays are not those saved."""
    about = ocp.JsonCheckpointHandler().restore(path / "about")
    state = ocp.StandardCheckpointHandler().restore(path / "state")
    if _hash(state) != about["hash"]:
        raise ValueError("the arrays are not those that were saved")
    items = tuple(queue.Item(prompt, sample) for prompt, sample in about["items"])
    return queue.Part(items, about["step"], state), about["fingerprint"]


def _hash(state: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        x = np.ascontiguousarray(state[name])
        digest.update(f"{name} {x.dtype} {x.shape} ".encode())
        digest.update(x)
    return digest.hexdigest()
