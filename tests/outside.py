"""A directory beside the repository, with the modules that a page of the docs shows, as a user has it."""

import contextlib
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

from referee_jax.method import augmentations, latent_losses
from referee_jax.method.ways import optim

DOCS = pathlib.Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"<!-- needs: a directory beside the repository[^\n]*-->\n```python\n(.*?)^```$", re.M | re.S)
TABLES = (augmentations.AUGMENTATIONS, latent_losses.LATENT_LOSSES, optim.OPTIMIZERS)


@contextlib.contextmanager
def directory(path: pathlib.Path, page: str, names: Sequence[str]) -> Iterator[pathlib.Path]:
    """Writes the page's modules as files of these names to `path`; afterwards nothing knows of them."""
    for name, text in zip(names, BLOCK.findall((DOCS / page).read_text()), strict=True):
        (path / name).write_text(text)
    modules, places, rows = set(sys.modules), list(sys.path), [dict(table) for table in TABLES]
    try:
        yield path
    finally:
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(path)):
                del sys.modules[name]
        sys.path[:] = places
        for table, before in zip(TABLES, rows, strict=True):
            table.clear()
            table.update(before)
