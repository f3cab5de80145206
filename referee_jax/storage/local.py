"""Where a run directory lies: on a disk (`Disk`) or in a bucket (remote.Bucket, which has the same methods)."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from referee_jax.storage import claims
from referee_jax.storage import files as files_lib


class Disk:
    """A directory of this machine, or of a network's disk. All that a bucket has to be sent or fetched is there already."""

    is_remote = False

    def __init__(self, path: Path):
        self.local, self.name = path, str(path)

    @property
    def title(self) -> str:
        """The last part of its name."""
        return self.local.resolve().name

    def names(self, folder: str = "") -> list[str]:
        """What is in a folder."""
        where = self.local / folder
        return os.listdir(where) if where.is_dir() else []

    def listing(self, folder: str) -> list[str]:
        """What is in a folder, and what will be sent there."""
        return self.names(folder)

    def free(self) -> float:
        """The bytes that there is room for."""
        return shutil.disk_usage(self.local).free

    def begin(self, name: str, data: bytes) -> bool:
        """Writes the first file of a run, unless another process was first; whether it was ours."""
        return files_lib.create(self.local / name, data)

    def fetch(self) -> None:
        """Brings settings and journals up to date."""

    def fetch_checkpoints(self) -> None:
        """Brings what any process has left in flight."""

    def bring_images(self, files: Sequence[str]) -> list[str]:
        """Those of these images and shards that can be opened now."""
        return list(files)

    def send(self) -> None:
        """Sends what is new."""

    def publish(self, *names: str) -> None:
        """Sends these files as they are, in place of what they were."""

    def merge(self, gather: Callable[[], Sequence[str]]) -> None:
        """Calls what takes all journals into one, and tells which; one process at a time."""
        with files_lib.locked(self.local / "config.json"):
            gather()

    def claims(self, expiry: float) -> claims.Claims:
        """Who makes what, in a pool of workers."""
        return claims.Claims(self.local / "claims", expiry)

    def close(self) -> None:
        """Removes what is kept on this machine for a bucket."""
