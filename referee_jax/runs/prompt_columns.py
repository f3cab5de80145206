"""What a record says beside its prompt: the columns id, seed, negative, samples and questions. Others are carried."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from referee_jax.referees.questions import Atom, given

FIELDS = ("prompt", "text", "prompts")  # of which the first that is there holds the prompt
QUESTIONS, SKILLS = ("questions", "vqa_list"), "skills"
NEGATIVES = ("negative", "negative_prompt")
HIGHEST_SEED = 2**32 - 1
MOST_SAMPLES = 100_000
# A file's name and a key of WebDataset, whose keys end at the first dot.
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_=+@-]{0,199}")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A prompt as it was given, and where: "line 3 of prompts.txt"; None where there is none, for a `reason`.

    The rest is that of items.Row, and `questions` are the user's about it, if any (referees/questions).
    """

    text: str | None
    where: str
    reason: str = ""
    questions: tuple[Atom, ...] = ()
    id: str = ""
    seed: int | None = None
    negative: str | None = None
    samples: int | None = None
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def prompt_field(names: Mapping[str, str]) -> str | None:
    """Of the names in a record, by their lower case, the one that holds the prompt."""
    return next((names[field] for field in FIELDS if field in names), None)


def lower(names: Any) -> dict[str, str]:
    """Names in lower case -> names; of two that differ in case alone the first."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(str(name).strip().lower(), name)
    return found


def entry(record: Mapping[str, Any], where: str) -> Entry:
    """The prompt of a record, with what else it says; with a reason where it cannot be read."""
    names = lower(record)
    field = prompt_field(names)
    if field is None:
        return Entry(None, where, f"no field prompt or text; there are {', '.join(map(str, record)) or 'none'}")
    if not isinstance(record[field], str):
        return Entry(None, where, f"{field} is not a text")
    own = {
        name: record[names[name]] for name in ("id", "seed", "samples", *NEGATIVES, *QUESTIONS, SKILLS) if name in names
    }
    used = {field, *(names[name] for name in own)}
    columns = {str(name): value for name, value in record.items() if name not in used}
    found = Entry(record[field], where, columns=columns)
    try:
        found = dataclasses.replace(found, id=_id(own.get("id")))
        return dataclasses.replace(
            found,
            seed=_number(own, "seed", 0, HIGHEST_SEED),
            samples=_number(own, "samples", 1, MOST_SAMPLES),
            negative=_negative(own),
            questions=_questions(own),
        )
    except ValueError as error:
        return dataclasses.replace(found, reason=str(error))


def _id(value: Any) -> str:
    """The user's id, empty where there is none. ValueError for one that cannot name a file."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as tables have numbers of which some are missing
    text = "" if _is_missing(value) else str(value).strip()
    if text and not ID.fullmatch(text):
        raise ValueError(
            f"its id {text[:60]!r} cannot name an image: letters, digits and _ - = + @ can, at most 200, the first a "
            "letter or a digit"
        )
    return text


def _number(own: Mapping[str, Any], name: str, lowest: int, highest: int) -> int | None:
    """A whole number, None where there is none. ValueError for what is none."""
    value = own.get(name)
    if _is_missing(value):
        return None
    try:
        number = int(value) if isinstance(value, str) else value
        if isinstance(number, bool) or number != int(number) or not lowest <= number <= highest:
            raise ValueError
        return int(number)
    except (ValueError, TypeError, OverflowError):
        text = f"its {name} is {str(value)[:40]!r}, and not a whole number from {lowest} to {highest}"
        raise ValueError(text) from None


def _negative(own: Mapping[str, Any]) -> str | None:
    """The text of a negative prompt, None where it is blank. ValueError for what is no text."""
    value = next((own[name] for name in NEGATIVES if not _is_missing(own.get(name))), None)
    if value is not None and not isinstance(value, str):
        raise ValueError("its negative prompt is not a text")
    return value and value.strip()


def _questions(own: Mapping[str, Any]) -> tuple[Atom, ...]:
    """The user's questions. ValueError for what is none."""
    asked = next((own[name] for name in QUESTIONS if own.get(name)), ())
    kinds = own.get(SKILLS) or ()
    try:
        return given(asked, kinds if isinstance(kinds, list) else ())
    except ValueError as error:
        raise ValueError(f"its questions: {error}") from error


def _is_missing(value: Any) -> bool:
    """Whether a cell is empty."""
    return value is None or value != value or isinstance(value, str) and not value.strip()
