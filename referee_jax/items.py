"""Items, one image each (a prompt and a sample number), and parts, which are batches of items."""

import collections
import dataclasses
import functools
import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
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


class Items(Sequence[Item]):
    """`samples` samples of each prompt, prompt by prompt, or every so many of them: each made when it is asked for.

    `prompts` are distinct; `places` are numbers of samples, by default all.
    """

    def __init__(self, prompts: Sequence[str], samples: int, places: range | None = None):
        self.prompts, self.samples = prompts, samples
        self.places = range(len(prompts) * samples) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int | slice) -> "Item | Items":
        if isinstance(place, slice):
            return Items(self.prompts, self.samples, self.places[place])
        number, sample = divmod(self.places[place], self.samples)
        return Item(self.prompts[number], sample)

    def __contains__(self, item: object) -> bool:
        if not isinstance(item, Item) or item.prompt not in self._numbers or not 0 <= item.sample < self.samples:
            return False
        return self._numbers[item.prompt] * self.samples + item.sample in self.places

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {prompt: number for number, prompt in enumerate(self.prompts)}

    @functools.cached_property
    def _stems(self) -> dict[str, str]:
        """Ids without the sample -> prompts."""
        return {Item(prompt, 0).id.rpartition("-s")[0]: prompt for prompt in self.prompts}

    def named(self, ids: Iterable[str]) -> list[Item]:
        """The items with these ids, as far as they are among these, in order."""
        parts = ((name, *name.rpartition("-s")[::2]) for name in ids)
        known = [(name, Item(self._stems[x], int(y))) for name, x, y in parts if x in self._stems and y.isdecimal()]
        items = [item for name, item in known if item.id == name and item in self]
        return sorted(items, key=lambda item: (self._numbers[item.prompt], item.sample))

    def of(self, prompt: str) -> int:
        """How many there are of a prompt."""
        first, places = self._numbers[prompt] * self.samples, self.places
        start = max(places.start, first + (places.start - first) % places.step)
        return len(range(start, min(first + self.samples, places.stop), places.step))


class Missing(Collection[Item]):
    """The items whose ids are not `done`, without those of some prompts; made as they are asked for."""

    def __init__(self, items: Items, done: Collection[str], without: Collection[str] = ()):
        self.items, self.done, self.excluded = items, done, set(without)
        finished = collections.Counter(item.prompt for item in items.named(done))
        counts = {
            prompt: items.of(prompt) - finished[prompt] for prompt in items.prompts if prompt not in self.excluded
        }
        self._counts = {prompt: count for prompt, count in counts.items() if count}

    def __len__(self) -> int:
        return sum(self._counts.values())

    @property
    def prompts(self) -> list[str]:
        """Those of which items are missing, in order."""
        return list(self._counts)

    def __iter__(self) -> Iterator[Item]:
        return (item for item in self.items if self._is_missing(item))

    def __contains__(self, item: object) -> bool:
        return item in self.items and self._is_missing(item)

    def _is_missing(self, item: Item) -> bool:
        return item.prompt not in self.excluded and item.id not in self.done

    def named(self, ids: Iterable[str]) -> list[Item]:
        """The items with these ids, as far as they are among these, in order."""
        return list(filter(self._is_missing, self.items.named(ids)))

    def without(self, prompts: Collection[str]) -> "Missing":
        """These without the items of some prompts."""
        return Missing(self.items, self.done, self.excluded | set(prompts))


def expand(prompts: Sequence[str], samples: int) -> list[Item]:
    """The items of `samples` samples of each prompt, prompt by prompt."""
    return [Item(prompt, sample) for prompt in prompts for sample in range(samples)]


def missing(items: Collection[Item], done: Collection[str]) -> Collection[Item]:
    """The items, in order, whose ids are not `done`."""
    if isinstance(items, Items):
        return Missing(items, done)
    if isinstance(items, Missing):
        return Missing(items.items, {*items.done, *done}, items.excluded)
    return [item for item in items if item.id not in done]


def named(items: Collection[Item], ids: Collection[str]) -> list[Item]:
    """The items, in order, with these ids."""
    return items.named(ids) if isinstance(items, Items | Missing) else [item for item in items if item.id in ids]


def share(items: Sequence[Item], index: int, count: int) -> Sequence[Item]:
    """The share of process `index` of `count`: every `count`-th item, done or not."""
    return items[index::count]


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
