"""A folder on a disk or in a bucket, of files that are written once and appear whole."""

from pathlib import Path
from typing import BinaryIO

from referee_jax.storage import files
from referee_jax.storage.objects import Objects, is_remote


class Folder:
    """A folder by its path or URL. It can be sent to other processes. All methods raise OSError where it fails.

    The constructor raises ValueError for a URL of an unknown kind, or one that needs a package that is not installed.
    """

    def __init__(self, url: str):
        self.objects = Objects(url) if is_remote(url) else None
        self.name = self.objects.name if self.objects else str(Path(url).expanduser().absolute())

    def __reduce__(self) -> tuple:
        return Folder, (self.name,)

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder of it, sorted."""
        if self.objects:
            names = self.objects.names(folder)
        else:
            directory = Path(self.name, folder)
            names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
        return [name for name in names if name and not name.startswith(".")]

    def open(self, name: str) -> BinaryIO:
        """Opens a file for reading."""
        return self.objects.open(name) if self.objects else Path(self.name, name).open("rb")

    def write(self, name: str, data: bytes) -> None:
        """Writes or replaces a file."""
        if self.objects:
            self.objects.write(name, data)
        else:
            path = Path(self.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(path, data)
