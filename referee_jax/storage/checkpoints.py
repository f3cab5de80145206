"""Checkpoints of batches in flight (Orbax), from which a run continues in the middle of an image.

    RUN/checkpoints/<process>/<number>/default/state.safetensors
        arrays `[item, ...]` by name; metadata: items, step, fingerprint, and a hash of it all

Each process writes its own and keeps the last two. A checkpoint is visible only when it is
complete. Its rows may continue in different processes, since an item's state does not depend on its
batch. Random keys are not saved: they follow from the seed and the item.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from absl import logging

from referee_jax.hardware import processes
from referee_jax.items import Item, Part
from referee_jax.storage import files

KEPT = 2
FILE = "state.safetensors"


class _Handler(ocp.CheckpointHandler):
    """Saves a part as one file. With Orbax's own handlers only process 0 writes NumPy arrays."""

    def save(self, directory: Path, args: "_Save") -> None:
        """Writes the part into the directory of a checkpoint that is not visible yet."""
        about = json.dumps(
            {
                "items": [_fields(item) for item in args.part.items],
                "step": args.part.step,
                "fingerprint": args.fingerprint,
            }
        )
        metadata = {"about": about, "hash": _hash(args.part.state, about)}
        state = {name: np.ascontiguousarray(x) for name, x in args.part.state.items()}
        files.write_atomic(Path(directory) / FILE, safetensors.numpy.save(state, metadata))

    def restore(self, directory: Path, args: Any = None) -> tuple[Part, str]:
        """Reads the part and the fingerprint of its settings. ValueError if they are damaged."""
        with safetensors.safe_open(Path(directory) / FILE, "np") as file:
            metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        if _hash(state, metadata["about"]) != metadata["hash"]:
            raise ValueError("its content does not match its hash")
        about = json.loads(metadata["about"])
        items = tuple(Item(*fields) for fields in about["items"])
        return Part(items, about["step"], state), about["fingerprint"]


def _fields(item: Item) -> list[Any]:
    """The fields of an item, the last ones as far as they are not the defaults."""
    fields = [item.prompt, item.sample, item.name, item.seed, item.negative, dict(item.columns)]
    return fields[:2] if Item(*fields[:2]) == item and not item.columns else fields


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Save(ocp.args.CheckpointArgs):
    part: Part
    fingerprint: str


class Checkpoints:
    """The checkpoints in a run's folder `directory`: this process's own, and those of others."""

    def __init__(self, directory: Path):
        # A new name for each process: another one may be continuing older checkpoints.
        self.directory, self.folder = directory, directory / processes.name_process()
        self._manager: ocp.CheckpointManager | None = None

    def save(self, part: Part, fingerprint: str) -> None:
        """Saves a part; it is on disk when this returns. OSError if it cannot be written."""
        manager = self._manager = self._manager or _manager(self.folder)
        number = 1 + max(manager.all_steps(), default=0)
        manager.save(number, args=_Save(part, fingerprint), force=True)

    def clear(self) -> None:
        """Removes this process's checkpoints, when their batch is done."""
        if self._manager:
            self._manager.close()
            self._manager = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def forget(self, done: Collection[str]) -> None:
        """Removes the checkpoints of any process whose items are all `done`, and the empty folder.

        A folder without a visible checkpoint is removed only if its process is not at work.
        """
        for folder in _folders(self.directory):
            items = [item for part in self._parts(folder, None) for item in part.items]
            is_done = all(item.id in done for item in items) if items else self._is_abandoned(folder)
            if is_done:
                shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def _is_abandoned(self, folder: Path) -> bool:
        """Whether a folder's process is dead, or has not changed it for STALE seconds."""
        if not processes.is_alive(folder.name):
            return True
        with contextlib.suppress(OSError):
            os.utime(self.directory)  # the present by the file system's clock
            return self.directory.stat().st_mtime - folder.stat().st_mtime > files.STALE
        return False

    def begun(self, fingerprint: str) -> list[Part]:
        """The newest valid part of each process with these settings."""
        newest = (next(self._parts(folder, fingerprint), None) for folder in _folders(self.directory))
        return [part for part in newest if part]

    def _parts(self, folder: Path, fingerprint: str | None) -> Iterator[Part]:
        """The parts in a process's folder, newest first. Warns of damaged ones and skips them."""
        numbers = [int(x.name) for x in _list(folder) if x.name.isdigit()]
        for number in sorted(numbers, reverse=True):
            path = folder / str(number)
            try:
                part, part_fingerprint = _Handler().restore(path / "default")
            except Exception as error:  # safetensors raises errors of any kind for damaged files
                logging.warning("%s cannot be read, the one before is taken: %s", path, str(error)[:200])
                continue
            if fingerprint is None or part_fingerprint == fingerprint:
                yield part


def _folders(directory: Path) -> list[Path]:
    return sorted(x for x in _list(directory) if x.is_dir())


def _list(directory: Path) -> list[Path]:
    """The content of a directory; empty if its owner has removed it."""
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def _manager(path: Path) -> ocp.CheckpointManager:
    """A manager of this process alone, also in a job of several processes."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix=path.name
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT,
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
        create=False,
        multiprocessing_options=alone,
    )
    path.mkdir(parents=True, exist_ok=True)
    return ocp.CheckpointManager(path, options=options, item_handlers=_Handler())


def _hash(state: dict[str, Any], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(state):
        x = np.ascontiguousarray(state[name])
        digest.update(f"{name} {x.dtype} {x.shape} ".encode())
        digest.update(x)
    return digest.hexdigest()
