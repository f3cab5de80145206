"""Prompts in files of records: JSON, JSON lines, and tables with a header (CSV, TSV).

Of a record, the field or column `prompt` is read, or else `text`, in capitals or not; of a list or of JSON lines also
plain strings. `questions`, or GenEval 2's `vqa_list` with its `skills`, are what referees are asked about the prompt.
A format is known by the ending of the file, or else by all of its content: standard input has no name.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from referee_jax import prompts
from referee_jax.referees.questions import Atom, given

FIELDS = ("prompt", "text")
QUESTIONS, SKILLS = ("questions", "vqa_list"), "skills"
JSON = (".json", ".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
# What is no list of prompts: endings, and the first bytes of files that are not of text.
OTHERS = tuple(".yaml .yml .toml .xml .html .parquet .arrow .feather .xls .xlsx .ods .npy .pkl".split())
MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip archive or a spreadsheet", b"PAR1": "Parquet", b"%PDF": "PDF"}
READABLE = (
    "a text file with one prompt per line, and JSON, JSON lines, CSV or TSV with a field or column prompt or text"
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A prompt as it was given, and where: "line 3 of prompts.txt"; None where there is none, for a `reason`.

    `questions` are the user's about it, if any (referees/questions).
    """

    text: str | None
    where: str
    reason: str = ""
    questions: tuple[Atom, ...] = ()


def read(path: Path, data: bytes) -> list[Entry] | None:
    """The prompts of a file's content; None where it is text. Raises PromptError where it is something else."""
    ending = path.suffix.lower()
    kind = next((name for start, name in MAGIC.items() if data.startswith(start)), None)
    if kind or ending in OTHERS:
        raise prompts.PromptError(f"the prompt file {path} is {kind or ending[1:]}; what can be read is {READABLE}")
    is_json, is_table = ending in JSON, ending in TABLES
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if is_json or is_table:
            raise prompts.PromptError(f"the prompt file {path} is not UTF-8 (at byte {error.start})") from error
        return None
    entries = None if is_table else _from_json(text, path, is_certain=is_json)
    if entries is None and not is_json:
        entries = _from_table(text, path, is_certain=is_table)
    return entries


def _from_json(text: str, path: Path, *, is_certain: bool) -> list[Entry] | None:
    """The prompts of a JSON list or of JSON lines; None, unless it `is_certain`, where it is neither."""
    start = text.lstrip()[:1]
    if not is_certain and start not in ("{", "["):
        return None
    try:
        values = json.loads(text)
        if isinstance(values, list):
            return [_entry(value, f"entry {n} of {path.name}") for n, value in enumerate(values, 1)]
        return [_entry(values, f"line 1 of {path.name}")]
    except (ValueError, RecursionError) as error:
        if start == "[" and is_certain:
            raise prompts.PromptError(f"the prompt file {path} is not JSON: {error}") from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    values = [_parsed(line) for _, line in lines]
    if not is_certain and not all(isinstance(value, dict) for value in values):
        return None
    return [_entry(value, f"line {n} of {path.name}") for (n, _), value in zip(lines, values, strict=True)]


def _parsed(line: str) -> Any:
    """The JSON value of a line, or the error."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return error


def _entry(value: Any, where: str) -> Entry:
    """The prompt of a record."""
    if isinstance(value, Exception):
        return Entry(None, where, f"not JSON ({value})")
    if isinstance(value, str):
        return Entry(value, where)
    if not isinstance(value, dict):
        return Entry(None, where, "neither a text nor an object with a field prompt or text")
    names = {str(name).strip().lower(): name for name in value}
    field = next((names[field] for field in FIELDS if field in names), None)
    if field is None:
        return Entry(None, where, f"no field prompt or text; there are {', '.join(map(str, value)) or 'none'}")
    text = value[field]
    if not isinstance(text, str):
        return Entry(None, where, f"{field} is not a text")
    return _asked(text, where, {name: value[own] for name, own in names.items()})


def _asked(text: str, where: str, fields: Mapping[str, Any]) -> Entry:
    """A prompt with the questions that are among its record's fields."""
    asked = next((fields[name] for name in QUESTIONS if fields.get(name)), ())
    kinds = fields.get(SKILLS) or ()
    try:
        return Entry(text, where, questions=given(asked, kinds if isinstance(kinds, list) else ()))
    except ValueError as error:
        return Entry(text, where, f"its questions: {error}")


def _from_table(text: str, path: Path, *, is_certain: bool) -> list[Entry] | None:
    """The prompts of a table; None, unless it `is_certain`, where not all lines are rows of one that has them."""
    first = text.split("\n", 1)[0].rstrip("\r")
    for delimiter in "\t,;":
        header = next(csv.reader([first], delimiter=delimiter), [])
        names = [(name.strip() if is_certain else name).lower() for name in header]
        column = next((names.index(field) for field in FIELDS if field in names), None)
        if column is None or not is_certain and len(header) < 2:
            continue
        try:
            rows = _rows(text, delimiter)
        except csv.Error as error:
            if is_certain:
                raise prompts.PromptError(f"the prompt file {path} is no table: {error}") from error
            return None
        if is_certain or rows and all(len(row) == len(header) for _, row in rows):
            return [_cell(row, column, names, f"line {n} of {path.name}") for n, row in rows]
    if is_certain:
        raise prompts.PromptError(
            f"the prompt file {path} has no column prompt or text in its first line, {first[:200]!r}"
        )
    return None


def _rows(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Each row after the header, with the number of its last line. csv.Error where quotation marks do not match."""

    def parse(quoting: int) -> list[tuple[int, list[str]]]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        return [(reader.line_num, row) for row in reader if row][1:]

    try:
        return parse(csv.QUOTE_MINIMAL)
    except csv.Error:
        if delimiter != "\t":
            raise
        return parse(csv.QUOTE_NONE)  # texts between tabs are often not quoted, and may begin with a quotation mark


def _cell(row: list[str], column: int, names: list[str], where: str) -> Entry:
    """The prompt of a row, in a table of columns of these names."""
    if len(row) != len(names):
        return Entry(None, where, f"{len(row)} cells, and the first line has {len(names)}")
    return _asked(row[column], where, dict(zip(names, row, strict=True)))
