"""A folder on a disk or in a bucket, of files that are written once and appear whole."""

import functools
from pathlib import Path
from typing import Any, BinaryIO

from referee_jax.storage import bucket, files


class Folder:
    """A folder by its path or URL. It can be sent to other processes. All methods raise OSError where it fails.

    The constructor raises ValueError for a URL of an unknown kind, or one that needs a package that is not installed.
    """

    def __init__(self, url: str):
        self.name = url.rstrip("/") if bucket.is_remote(url) else str(Path(url).expanduser().absolute())
        self._reached  # noqa: B018 - tells now whether it can be

    def __reduce__(self) -> tuple:
        return Folder, (self.name,)

    @functools.cached_property
    def _reached(self) -> tuple[Any, str] | None:
        """What reaches a bucket, and the folder's path there; None on a disk."""
        return bucket.filesystem(self.name) if bucket.is_remote(self.name) else None

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder of it, sorted."""
        try:
            if self._reached:
                fs, root = self._reached
                names = [path.rstrip("/").rpartition("/")[2] for path in fs.ls(f"{root}/{folder}", detail=False)]
            else:
                names = [path.name for path in Path(self.name, folder).iterdir()]
        except FileNotFoundError:
            return []
        return sorted(name for name in names if name and not name.startswith("."))

    def open(self, name: str) -> BinaryIO:
        """Opens a file for reading."""
        if self._reached:
            fs, root = self._reached
            return fs.open(f"{root}/{name}", "rb")
        return Path(self.name, name).open("rb")

    def write(self, name: str, data: bytes) -> None:
        """Writes or replaces a file."""
        if self._reached:
            fs, root = self._reached
            fs.pipe_file(f"{root}/{name}", data)
        else:
            path = Path(self.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(path, data)
