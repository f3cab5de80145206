"""Items, one image each (a prompt and a sample number), and parts, which are batches of items."""

import dataclasses
import functools
import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from typing import Any

STEM = 60  # characters of the prompt in an item's id, at most


@dataclasses.dataclass(frozen=True, order=True)
class Item:
    """One image to make: sample number `sample` (0, 1, ...) of a prompt."""

    prompt: str
    sample: int

    @functools.cached_property
    def prompt_id(self) -> int:
        """A uint32 of the prompt's text: the first four bytes of its SHA-256."""
        return int(self._hash[:8], 16)

    @functools.cached_property
    def id(self) -> str:
        """A file stem for any text: ASCII words of the prompt, part of its hash, the sample."""
        plain = unicodedata.normalize("NFKD", self.prompt).encode("ascii", "ignore").decode()
        words = re.sub(r"[^A-Za-z0-9]+", "_", plain).strip("_")
        # 8 hex digits tell apart the few texts with the same words. Thousands may begin alike, or
        # have no ASCII words, and of 100,000 hashes of 32 bits two are equal: these take 16 digits.
        is_whole = self.prompt.isascii() and 0 < len(words) <= STEM
        digits = f"{self.prompt_id:08x}" + ("" if is_whole else self._hash[8:16])
        return f"{words[:STEM].rstrip('_') or 'prompt'}-{digits}-s{self.sample:03d}"

    @functools.cached_property
    def _hash(self) -> str:
        """SHA-256 of the prompt, in hex."""
        # A text may hold a lone surrogate, which plain UTF-8 refuses.
        return hashlib.sha256(self.prompt.encode("utf-8", "surrogatepass")).hexdigest()

    def __reduce__(self) -> tuple:
        return Item, (self.prompt, self.sample)  # pickled and copied without the cached values


def expand(prompts: Sequence[str], samples: int) -> list[Item]:
    """The items of `samples` samples of each prompt, prompt by prompt."""
    return [Item(prompt, sample) for prompt in prompts for sample in range(samples)]


def missing(items: Sequence[Item], done: Collection[str]) -> list[Item]:
    """The items, in order, whose ids are not `done`."""
    return [item for item in items if item.id not in done]


def share(items: Sequence[Item], index: int, count: int) -> list[Item]:
    """The share of process `index` of `count`: every `count`-th item, done or not."""
    return list(items[index::count])


def batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive batches of `size` items; the last may be shorter."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


@dataclasses.dataclass(frozen=True)
class Part:
    """A batch to make from iteration `step` on, where saved from `state`: arrays `[item, ...]`."""

    items: tuple[Item, ...]
    step: int = 0
    state: dict[str, Any] | None = None

    def only(self, items: Collection[Item]) -> "Part":
        """The rows of these items."""
        rows = [row for row, item in enumerate(self.items) if item in items]
        state = self.state and {name: x[rows] for name, x in self.state.items()}
        return Part(tuple(self.items[row] for row in rows), self.step, state)

    def split(self, size: int) -> list["Part"]:
        """Parts of at most `size` items."""
        return [self.only(piece) for piece in batches(self.items, size)]
