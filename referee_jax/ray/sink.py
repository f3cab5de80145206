"""Where Ray's write tasks put rows: parts of a table of pictures (referee_jax/ray/tables.py)."""

import secrets
from collections.abc import Iterable

import pyarrow as pa
from ray.data import Datasink

from referee_jax.ray import tables
from referee_jax.ray.folder import Folder


class Sink(Datasink):
    """Writes parts of at least `rows` rows to a folder. A task that Ray repeats writes the same part again."""

    def __init__(self, folder: Folder, layout: str, rows: int):
        self.folder, self.layout, self.rows = folder, layout, rows
        self.name = secrets.token_hex(6)  # of this driver's parts

    def write(self, blocks: Iterable[pa.Table], ctx) -> None:
        """Writes the blocks of a task as one part."""
        rows = pa.concat_tables([block for block in blocks if block.num_rows])
        tables.write(self.folder, f"{self.name}-{ctx.task_idx:06d}", rows, self.layout)

    def get_name(self) -> str:
        """As Ray shows it."""
        return "Tables"

    @property
    def min_rows_per_write(self) -> int:
        """Rows that Ray waits for."""
        return self.rows
