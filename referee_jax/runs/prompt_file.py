"""Files of prompts: how they are read, and what can be wrong with one."""

import dataclasses
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from referee_jax import prompts
from referee_jax.referees.questions import Atom
from referee_jax.runs import prompt_records
from referee_jax.runs.prompt_records import Entry

LONGEST = 2000  # characters; no network here reads 300 tokens


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A prompt that was left out, and why."""

    text: str
    where: str
    reason: str

    def __str__(self) -> str:
        shown = f" ({self.text[:60]!r})" if self.text else ""
        return f"{self.where}{shown}: {self.reason}"


def read_prompts(file: str | os.PathLike) -> list[Entry]:
    """The prompts of a UTF-8 file, as they stand: its lines, or those of its records (prompt_records.py).

    PromptError where the file cannot be read.
    """
    path = Path(file)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise prompts.PromptError(f"the prompt file {path} cannot be read: {error.strerror or error}") from error
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
        where = f"line {number} of {path.name}"
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
    """Cleaned prompt -> its user's questions; those of its first entry, as of `sift`."""
    first = {}
    for entry in entries:
        if not entry.reason:
            first.setdefault(clean(entry.text or ""), entry.questions)
    return {text: atoms for text, atoms in first.items() if atoms}


def sift(entries: Iterable[Entry]) -> tuple[list[str], list[Rejected]]:
    """The usable prompts, cleaned, each once and in order; and those left out, with reasons."""
    kept: dict[str, str] = {}
    rejected = []
    for entry in entries:
        text = clean(entry.text or "")
        reason = entry.reason or check(text)
        if not reason and text in kept:
            reason = f"the same as {kept[text]}"
        if reason:
            rejected.append(Rejected(text, entry.where, reason))
        else:
            kept[text] = entry.where
    return list(kept), rejected
