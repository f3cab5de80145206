"""Work: one item is one image to be made, named by its prompt and the number of the sample, never by who makes it."""

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence

STEM = 60  # characters of the prompt in an item's id


@dataclasses.dataclass(frozen=True, order=True)
class Item:
    """One image to be made: sample number `sample` (0, 1, ...) of a prompt."""

    prompt: str
    sample: int

    @property
    def prompt_id(self) -> int:
        """uint32 of the prompt's text: the first four bytes of its SHA-256, the same on every machine."""
        # A lone surrogate is no character, but a text may hold one.
        return int.from_bytes(hashlib.sha256(self.prompt.encode("utf-8", "surrogatepass")).digest()[:4], "big")

    @property
    def id(self) -> str:
        """A file stem for any text: ASCII words of the prompt, the hash that tells texts apart, the sample."""
        plain = unicodedata.normalize("NFKD", self.prompt).encode("ascii", "ignore").decode()
        words = re.sub(r"[^A-Za-z0-9]+", "_", plain).strip("_")[:STEM].rstrip("_")
        return f"{words or 'prompt'}-{self.prompt_id:08x}-s{self.sample:03d}"


def items(prompts: Sequence[str], samples: int) -> list[Item]:
    """`samples` of each prompt, prompt by prompt."""
    return [Item(prompt, sample) for prompt in prompts for sample in range(samples)]


def missing(wanted: Sequence[Item], done: Collection[str]) -> list[Item]:
    """Those of `wanted`, in their order, whose ids are not `done`."""
    return [item for item in wanted if item.id not in done]


def batches(wanted: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive batches of `size`, the last perhaps shorter."""
    for start in range(0, len(wanted), size):
        yield list(wanted[start : start + size])
