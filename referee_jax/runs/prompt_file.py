"""Files of prompts: how they are read, and what can be wrong with one."""

import dataclasses
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from referee_jax import prompts
from referee_jax.items import Item, Row
from referee_jax.referees.questions import Atom
from referee_jax.runs import prompt_records
from referee_jax.runs.prompt_columns import Entry
from referee_jax.storage import objects

LONGEST = 2000  # characters; no network here reads 300 tokens
SAMPLE = re.compile(r"(.+)-s[0-9]{3,}")  # how ids of further samples end


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A prompt that was left out, and why; with its row's own columns."""

    text: str
    where: str
    reason: str
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        shown = f" ({self.text[:60]!r})" if self.text else ""
        return f"{self.where}{shown}: {self.reason}"


def read_prompts(file: str | os.PathLike) -> list[Entry]:
    """The prompts of a UTF-8 file, as they stand: its lines, or those of its records (prompt_records.py).

    `file` is a path, or a URL in a bucket. PromptError where it cannot be read.
    """
    path, name = os.fspath(file), PurePath(file).name
    try:
        data = objects.read_file(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise prompts.PromptError(f"the prompt file {path} cannot be read: {reason}") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise prompts.PromptError(f"the prompt file {path} is UTF-16; save it as UTF-8")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if (entries := prompt_records.read(path, data)) is not None:
        return entries
    # By bytes: str.splitlines would also end a line at U+2028 and the like.
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    entries = []
    for number, line in enumerate(lines, 1):
        where = f"line {number} of {name}"
        try:
            entries.append(Entry(line.decode("utf-8"), where))
        except UnicodeDecodeError:
            entries.append(Entry(None, where, "not UTF-8"))
    return entries


def clean(text: str) -> str:
    """The prompt without white space around it; all else is the user's."""
    return text.strip()


def check(text: str) -> str | None:
    """Why this text cannot be a prompt, or None."""
    if not text.strip():
        return "blank"
    if len(text) > LONGEST:
        return f"{len(text)} characters, at most {LONGEST} are allowed"
    for place, character in enumerate(text, 1):
        # Cc are control characters, Cs lone surrogates. Cf stays: emoji are joined by it.
        if unicodedata.category(character) in ("Cc", "Cs"):
            return f"U+{ord(character):04X} at character {place} is a control character or half a character"
    return None


def questions(entries: Iterable[Entry]) -> dict[str, tuple[Atom, ...]]:
    """Cleaned prompt -> its user's questions; those of its first entry with some, as of `sift`."""
    first: dict[str, tuple[Atom, ...]] = {}
    for entry in entries:
        if not entry.reason and entry.questions:
            first.setdefault(clean(entry.text or ""), entry.questions)
    return first


def sift(entries: Iterable[Entry]) -> tuple[list[Row], list[Rejected]]:
    """The usable prompts, cleaned, each once and in order; and those left out, with reasons.

    A prompt may come again with a user's id, a seed or a negative prompt of its own.
    """
    kept: dict[str, Row] = {}  # by the id of the first image
    places: dict[str, str] = {}  # of each id and stem
    asked: dict[str, Entry] = {}
    rejected = []
    for entry in entries:
        row = Row(clean(entry.text or ""), entry.id, entry.seed, entry.negative, entry.samples, entry.columns)
        item = Item.of(row, 0)
        reason = entry.reason or check(row.prompt) or _check_negative(row) or _clash(item, places)
        others = asked.setdefault(row.prompt, entry) if entry.questions and not reason else entry
        if others.questions != entry.questions:
            reason = f"other questions than those about the same prompt at {others.where}"
        if reason:
            rejected.append(Rejected(row.prompt, entry.where, reason, entry.columns))
        else:
            kept[item.id] = row
            places[item.id] = places[item.stem] = entry.where
    return list(kept.values()), rejected


def _check_negative(row: Row) -> str | None:
    """Why a row's negative prompt cannot be one, or None."""
    reason = None if row.negative is None else check(row.negative)
    return reason and f"its negative prompt: {reason}"


def _clash(item: Item, places: Mapping[str, str]) -> str | None:
    """Why the images of a row would have names that others have, or None."""
    if item.id in places:
        return f"its id {item.id!r} is that of {places[item.id]}" if item.name else f"the same as {places[item.id]}"
    sample = SAMPLE.fullmatch(item.name)
    if sample and sample[1] in places:
        return f"its id {item.id!r} is that of a further sample of {places[sample[1]]}"
    return None
