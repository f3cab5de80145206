"""Batches in flight on disk (Orbax), so that whoever continues a run goes on in the middle of an image.

    RUN/checkpoints/<who>/<number>/default/state.safetensors   arrays `[item, ...]` by name; items, step, and a hash of it all

Each process writes its own, the last two are kept, and a checkpoint is visible only when it is complete. Rows of one may go on in
different processes: the state of an item knows nothing of its batch. Key data is not saved; it follows from seed and item.
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
    """A part as one file: Orbax's own handlers have NumPy arrays written by process 0 of a job alone."""

    def save(self, directory: Path, args: "_Save") -> None:
        """Into the directory of a checkpoint that is not visible yet."""
        about = json.dumps(
            {
                "items": [[item.prompt, item.sample] for item in args.part.items],
                "step": args.part.step,
                "fingerprint": args.fingerprint,
            }
        )
        metadata = {"about": about, "hash": _hash(args.part.state, about)}
        state = {name: np.ascontiguousarray(x) for name, x in args.part.state.items()}
        files.write_atomic(Path(directory) / FILE, safetensors.numpy.save(state, metadata))

    def restore(self, directory: Path, args: Any = None) -> tuple[Part, str]:
        """The part and the fingerprint of its settings. ValueError where they are not those that were saved."""
        with safetensors.safe_open(Path(directory) / FILE, "np") as file:
            metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        if _hash(state, metadata["about"]) != metadata["hash"]:
            raise ValueError("this is not what was saved")
        about = json.loads(metadata["about"])
        items = tuple(Item(prompt, sample) for prompt, sample in about["items"])
        return Part(items, about["step"], state), about["fingerprint"]


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Save(ocp.args.CheckpointArgs):
    part: Part
    fingerprint: str


class Checkpoints:
    """Those of this process, and of others before it, in the run directory's folder `directory`."""

    def __init__(self, directory: Path):
        # A name of its own: rows of an older checkpoint may be what another process goes on with.
        self.directory, self.own = directory, directory / processes.name_process()
        self._manager: ocp.CheckpointManager | None = None

    def save(self, part: Part, fingerprint: str) -> None:
        """Saves a part in flight; on disk when this returns. OSError where it cannot be written."""
        manager = self._manager = self._manager or _manager(self.own)
        number = 1 + max(manager.all_steps(), default=0)
        manager.save(number, args=_Save(part, fingerprint), force=True)

    def clear(self) -> None:
        """Forgets our own: their batch is done."""
        if self._manager:
            self._manager.close()
            self._manager = None
        shutil.rmtree(self.own, ignore_errors=True)

    def forget(self, done: Collection[str]) -> None:
        """Removes those of any process of which all items are `done`, and the folder when it is empty.

        One that is begun and not yet visible is left to its process, if that is at work.
        """
        for place in _places(self.directory):
            parts = list(self._of(place, None))
            is_done = all(item.id in done for part in parts for item in part.items) if parts else self._is_left(place)
            if is_done:
                shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def _is_left(self, place: Path) -> bool:
        """Whether nobody is at work on a folder, by its process or by the clock of its file system."""
        if not processes.is_alive(place.name):
            return True
        with contextlib.suppress(OSError):
            os.utime(self.directory)
            return self.directory.stat().st_mtime - place.stat().st_mtime > files.STALE
        return False

    def begun(self, fingerprint: str) -> list[Part]:
        """What any process has left in the middle under these settings: the newest whole checkpoint of each."""
        found = (next(self._of(place, fingerprint), None) for place in _places(self.directory))
        return [part for part in found if part]

    def _of(self, place: Path, fingerprint: str | None) -> Iterator[Part]:
        """The parts in a process's folder, the newest first; damaged ones are told of and passed over."""
        numbers = [int(x.name) for x in _listed(place) if x.name.isdigit()]
        for number in sorted(numbers, reverse=True):
            try:
                part, settings = _Handler().restore(place / str(number) / "default")
            except Exception as error:  # safetensors raises what it likes for damaged files
                logging.warning("%s cannot be read, the one before is taken: %s", place / str(number), str(error)[:200])
                continue
            if fingerprint is None or settings == fingerprint:
                yield part


def _places(directory: Path) -> list[Path]:
    return sorted(x for x in _listed(directory) if x.is_dir())


def _listed(directory: Path) -> list[Path]:
    """What is in a directory, which its owner may remove at any moment."""
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


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
    return ocp.CheckpointManager(path, options=options, item_handlers=_Handler())


def _hash(state: dict[str, Any], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(state):
        x = np.ascontiguousarray(state[name])
        digest.update(f"{name} {x.dtype} {x.shape} ".encode())
        digest.update(x)
    return digest.hexdigest()
