"""Work items: an item is one image, of a prompt and the number of a sample; and parts of a run, which are batches of them."""

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from typing import Any

STEM = 60  # characters of the prompt in an item's id


@dataclasses.dataclass(frozen=True, order=True)
class Item:
    """One image to be made: sample number `sample` (0, 1, ...) of a prompt."""

    prompt: str
    sample: int

    @property
    def prompt_id(self) -> int:
        """uint32 of the prompt's text: the first four bytes of its SHA-256, the same on every machine."""
        return int(self._hash()[:8], 16)

    @property
    def id(self) -> str:
        """A file stem for any text: ASCII words of the prompt, the hash that tells texts apart, the sample."""
        plain = unicodedata.normalize("NFKD", self.prompt).encode("ascii", "ignore").decode()
        words = re.sub(r"[^A-Za-z0-9]+", "_", plain).strip("_")
        # Few texts have the same words. But thousands begin alike, or have no ASCII words at all, and of 100,000 hashes of
        # 32 bits two are the same.
        is_whole = self.prompt.isascii() and 0 < len(words) <= STEM
        return f"{words[:STEM].rstrip('_') or 'prompt'}-{self._hash()[: 8 if is_whole else 16]}-s{self.sample:03d}"

    def _hash(self) -> str:
        """SHA-256, in hex."""
        # A lone surrogate is no character, but a text may hold one.
        return hashlib.sha256(self.prompt.encode("utf-8", "surrogatepass")).hexdigest()


def expand(prompts: Sequence[str], samples: int) -> list[Item]:
    """`samples` of each prompt, prompt by prompt."""
    return [Item(prompt, sample) for prompt in prompts for sample in range(samples)]


def missing(wanted: Sequence[Item], done: Collection[str]) -> list[Item]:
    """Those of `wanted`, in their order, whose ids are not `done`."""
    return [item for item in wanted if item.id not in done]


def share(wanted: Sequence[Item], index: int, count: int) -> list[Item]:
    """What process `index` of `count` makes of all that is wanted, done or not: every `count`-th item."""
    return list(wanted[index::count])


def batches(wanted: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive batches of `size`, the last perhaps shorter."""
    for start in range(0, len(wanted), size):
        yield list(wanted[start : start + size])


@dataclasses.dataclass(frozen=True)
class Part:
    """A batch that is to be made: from the start, or from iteration `step` on with the `state` that was saved then.

    `state` has arrays `[item, ...]` by name.
    """

    items: tuple[Item, ...]
    step: int = 0
    state: dict[str, Any] | None = None

    def only(self, kept: Collection[Item]) -> "Part":
        """The part of it with these items."""
        rows = [row for row, item in enumerate(self.items) if item in kept]
        state = self.state and {name: x[rows] for name, x in self.state.items()}
        return Part(tuple(self.items[row] for row in rows), self.step, state)

    def split(self, size: int) -> list["Part"]:
        """In pieces of at most `size` items."""
        return [self.only(piece) for piece in batches(self.items, size)]
