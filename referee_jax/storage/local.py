"""Storage of a run directory on a disk: `Disk`, with the same methods as bucket.Bucket."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from referee_jax.storage import files as files_lib


class Disk:
    """A directory on a local or network disk. Nothing has to be uploaded or fetched."""

    is_remote = False

    def __init__(self, path: Path):
        self.local, self.name = path, str(path)

    @property
    def title(self) -> str:
        """The last part of the path."""
        return self.local.resolve().name

    def names(self, folder: str = "") -> list[str]:
        """The names in a folder."""
        directory = self.local / folder
        return os.listdir(directory) if directory.is_dir() else []

    def listing(self, folder: str) -> list[str]:
        """The names in a folder, those that are not uploaded yet included."""
        return self.names(folder)

    def free(self) -> float:
        """Free bytes."""
        return shutil.disk_usage(self.local).free

    def begin(self, name: str, data: bytes) -> bool:
        """Writes the first file of a run; False if another process was first."""
        return files_lib.create(self.local / name, data)

    def fetch(self) -> None:
        """Fetches the current settings and journals."""

    def fetch_settings(self) -> None:
        """Fetches the current settings."""

    def fetch_checkpoints(self) -> None:
        """Fetches the checkpoints of all processes."""

    def bring_images(self, files: Sequence[str]) -> list[str]:
        """Fetches images and shards; returns the names of those that are here."""
        return list(files)

    def send(self) -> None:
        """Uploads what is new."""

    def publish(self, *names: str) -> None:
        """Uploads these files, replacing what a bucket has."""

    def merge(self, gather: Callable[[], Sequence[str]]) -> None:
        """Under a lock, merges the journals by `gather`, which returns the names of the merged."""
        with files_lib.locked(self.local / "config.json"):
            gather()

    def close(self) -> None:
        """Removes the local copy of a bucket."""
