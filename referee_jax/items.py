"""Items, one image each (a prompt and a sample number), and parts, which are batches of items."""

import bisect
import collections
import copy
import dataclasses
import functools
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

Texts = tuple[str, str | None]  # what networks read: a prompt, and a negative prompt of its own

STEM = 60  # characters of the prompt in an item's id, at most


@dataclasses.dataclass(frozen=True)
class Row:
    """What a user asks for: a prompt, and what a table may say about it.

    Attributes:
        prompt: the text.
        name: the user's own id, which names the images; empty: they are named after the prompt.
        seed: of this row; None: that of the settings.
        negative: what guidance leads away from; None: the text of the settings.
        samples: images of this row; None: as many as the settings say.
        columns: what else the table has, as JSON values: carried to the output, of no effect on an image.
    """

    prompt: str
    name: str = ""
    seed: int | None = None
    negative: str | None = None
    samples: int | None = None
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Item:
    """One image to make: sample number `sample` (0, 1, ...) of a prompt; the rest is of its row."""

    prompt: str
    sample: int
    name: str = ""
    seed: int | None = None
    negative: str | None = None
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, row: Row, sample: int) -> "Item":
        """A sample of a row."""
        return cls(row.prompt, sample, row.name, row.seed, row.negative, row.columns)

    def __lt__(self, other: "Item") -> bool:
        return (self.prompt, self.sample, self.id) < (other.prompt, other.sample, other.id)

    @property
    def texts(self) -> Texts:
        """What networks read: the prompt, and a negative prompt of its own."""
        return self.prompt, self.negative

    @functools.cached_property
    def prompt_id(self) -> int:
        """A uint32 of the prompt's text: the first four bytes of its SHA-256."""
        return int(self._hash[:8], 16)

    @functools.cached_property
    def stem(self) -> str:
        """The id without the sample: the user's, or for any text ASCII words and part of its hash."""
        if self.name:
            return self.name
        plain = unicodedata.normalize("NFKD", self.prompt).encode("ascii", "ignore").decode()
        words = re.sub(r"[^A-Za-z0-9]+", "_", plain).strip("_")
        # 8 hex digits tell apart the few texts with the same words. Thousands may begin alike, or
        # have no ASCII words, and of 100,000 hashes of 32 bits two are equal: these take 16 digits.
        is_whole = self.prompt.isascii() and 0 < len(words) <= STEM
        digits = f"{self.prompt_id:08x}" + ("" if is_whole else self._hash[8:16])
        seed = "" if self.seed is None else f"-seed{self.seed}"
        negative = "" if self.negative is None else f"-negative{_sha256(self.negative)[:8]}"
        return f"{words[:STEM].rstrip('_') or 'prompt'}-{digits}{seed}{negative}"

    @functools.cached_property
    def id(self) -> str:
        """A file stem. A user's own id is that of sample 0; all others end in the sample."""
        return self.name if self.name and not self.sample else f"{self.stem}-s{self.sample:03d}"

    @functools.cached_property
    def _hash(self) -> str:
        """SHA-256 of the prompt, in hex."""
        return _sha256(self.prompt)

    def __reduce__(self) -> tuple:
        # Pickled and copied without the cached values.
        return Item, (self.prompt, self.sample, self.name, self.seed, self.negative, self.columns)


def _sha256(text: str) -> str:
    """In hex."""
    # A text may hold a lone surrogate, which plain UTF-8 refuses.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Items(Sequence[Item]):
    """`samples` samples of each row, row by row, or every so many of them: each made when it is asked for.

    `rows`, or plain prompts, are distinct, and may have numbers of samples of their own.
    """

    def __init__(self, rows: Sequence[Row | str], samples: int):
        self.rows = [Row(row) if isinstance(row, str) else row for row in rows]
        self.samples = samples
        self._ends = list(itertools.accumulate(self._samples(row) for row in self.rows))
        self.places = range(self._ends[-1] if self._ends else 0)

    def _samples(self, row: Row) -> int:
        return self.samples if row.samples is None else row.samples

    def _start(self, number: int) -> int:
        """The place of the first item of a row."""
        return self._ends[number] - self._samples(self.rows[number])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int | slice) -> "Item | Items":
        if isinstance(place, slice):
            others = copy.copy(self)  # which shares the rows: a million are not counted again for each batch
            others.places = self.places[place]
            return others
        place = self.places[place]
        number = bisect.bisect_right(self._ends, place)
        return Item.of(self.rows[number], place - self._start(number))

    def __contains__(self, item: object) -> bool:
        return isinstance(item, Item) and self._place(item) in self.places

    def _place(self, item: Item) -> int:
        """Where an item stands among all of these rows; -1 where it is none of them."""
        number = self.numbers.get(item.stem)
        if number is None or not 0 <= item.sample < self._samples(self.rows[number]):
            return -1
        return self._start(number) + item.sample if item == Item.of(self.rows[number], item.sample) else -1

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """Ids without the sample -> numbers of rows."""
        return {Item.of(row, 0).stem: number for number, row in enumerate(self.rows)}

    def named(self, ids: Iterable[str]) -> list[Item]:
        """The items with these ids, as far as they are among these, in order."""
        items = []
        for name in ids:
            stem, _, sample = name.rpartition("-s")
            tried = [(name, 0), (stem, int(sample))] if sample.isdecimal() else [(name, 0)]
            known = [Item.of(self.rows[self.numbers[x]], n) for x, n in tried if x in self.numbers]
            items += [item for item in known if item.id == name and item in self]
        return sorted(items, key=self._place)

    def of(self, number: int) -> int:
        """How many there are of a row."""
        first, places = self._start(number), self.places
        start = max(places.start, first + (places.start - first) % places.step)
        return len(range(start, min(self._ends[number], places.stop), places.step))


class Missing(Collection[Item]):
    """The items whose ids are not `done`, without those of some texts; made as they are asked for."""

    def __init__(self, items: Items, done: Collection[str], without: Collection[Texts] = ()):
        self.items, self.done, self.excluded = items, done, set(without)
        finished = collections.Counter(items.numbers[item.stem] for item in items.named(done))
        counts = {
            number: items.of(number) - finished[number]
            for number, row in enumerate(items.rows)
            if (row.prompt, row.negative) not in self.excluded
        }
        self._counts = {number: count for number, count in counts.items() if count}

    def __len__(self) -> int:
        return sum(self._counts.values())

    @property
    def texts(self) -> list[Texts]:
        """Prompts and negative prompts (`Item.texts`) of which items are missing, in order."""
        rows = (self.items.rows[number] for number in self._counts)
        return list(dict.fromkeys((row.prompt, row.negative) for row in rows))

    def __iter__(self) -> Iterator[Item]:
        return (item for item in self.items if self._is_missing(item))

    def __contains__(self, item: object) -> bool:
        return item in self.items and self._is_missing(item)

    def _is_missing(self, item: Item) -> bool:
        return item.texts not in self.excluded and item.id not in self.done

    def named(self, ids: Iterable[str]) -> list[Item]:
        """The items with these ids, as far as they are among these, in order."""
        return list(filter(self._is_missing, self.items.named(ids)))

    def without(self, texts: Collection[Texts]) -> "Missing":
        """These without the items of some texts."""
        return Missing(self.items, self.done, self.excluded | set(texts))


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


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive batches of `size` items, or of anything; the last may be shorter."""
    rest = iter(items)
    while part := list(itertools.islice(rest, size)):
        yield part


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
