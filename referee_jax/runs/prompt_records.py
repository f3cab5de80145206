"""Prompts in files of records: JSON, JSON lines, Parquet, and tables with a header (CSV, TSV).

Of a record, the field or column `prompt` is read, or else `text`, or `prompts`, in capitals or not; of a list or of
JSON lines also plain strings. What else is read of it is in prompt_columns.py. A format is known by the ending of the
file, or else by all of its content: standard input has no name.
"""

import csv
import io
import json
from pathlib import PurePath
from typing import Any

from referee_jax import console, prompts
from referee_jax.runs import prompt_columns
from referee_jax.runs.prompt_columns import Entry

JSON = (".json", ".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
PARQUET = b"PAR1"  # its first bytes
# What is no list of prompts: endings, and the first bytes of files that are not of text.
OTHERS = tuple(".yaml .yml .toml .xml .html .arrow .feather .xls .xlsx .ods .npy .pkl".split())
MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip archive or a spreadsheet", b"%PDF": "PDF"}
READABLE = (
    "a text file with one prompt per line, and JSON, JSON lines, CSV, TSV or Parquet with a field or column prompt or "
    "text"
)


def read(path: str, data: bytes) -> list[Entry] | None:
    """The prompts of a file's content; None where it is text. Raises PromptError where it is something else."""
    ending = PurePath(path).suffix.lower()
    kind = next((name for start, name in MAGIC.items() if data.startswith(start)), None)
    if kind or ending in OTHERS:
        raise prompts.PromptError(f"the prompt file {path} is {kind or ending[1:]}; what can be read is {READABLE}")
    if data.startswith(PARQUET) or ending == ".parquet":
        return _from_parquet(data, path)
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


def _from_json(text: str, path: str, *, is_certain: bool) -> list[Entry] | None:
    """The prompts of a JSON list or of JSON lines; None, unless it `is_certain`, where it is neither."""
    start = text.lstrip()[:1]
    if not is_certain and start not in ("{", "["):
        return None
    try:
        values = json.loads(text)
        if isinstance(values, list):
            return [_entry(value, f"entry {n} of {PurePath(path).name}") for n, value in enumerate(values, 1)]
        return [_entry(values, f"line 1 of {PurePath(path).name}")]
    except (ValueError, RecursionError) as error:
        if start == "[" and is_certain:
            raise prompts.PromptError(f"the prompt file {path} is not JSON: {error}") from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    values = [_parsed(line) for _, line in lines]
    if not is_certain and not all(isinstance(value, dict) for value in values):
        return None
    return [_entry(value, f"line {n} of {PurePath(path).name}") for (n, _), value in zip(lines, values, strict=True)]


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
    return prompt_columns.entry(value, where)


def _from_parquet(data: bytes, path: str) -> list[Entry]:
    """The prompts of a Parquet file. What JSON has no word for, such as a date, is carried as text; bytes are not."""
    import pyarrow  # of the programs that read prompts few read Parquet
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
    except pyarrow.ArrowException as error:
        raise prompts.PromptError(f"the prompt file {path} is not Parquet: {console.first_line(error)}") from error
    if prompt_columns.prompt_field(prompt_columns.lower(table.column_names)) is None:
        raise prompts.PromptError(
            f"the prompt file {path} has no column prompt or text; there are {', '.join(table.column_names) or 'none'}"
        )
    table = table.select([field.name for field in table.schema if "binary" not in str(field.type)])
    entries, row = [], 0
    for batch in table.to_batches():
        for record in batch.to_pylist():
            row += 1
            plain = json.loads(json.dumps(record, default=str))
            entries.append(prompt_columns.entry(plain, f"row {row} of {PurePath(path).name}"))
    return entries


def _from_table(text: str, path: str, *, is_certain: bool) -> list[Entry] | None:
    """The prompts of a table; None, unless it `is_certain`, where not all lines are rows of one that has them."""
    first = text.split("\n", 1)[0].rstrip("\r")
    for delimiter in "\t,;":
        header = next(csv.reader([first], delimiter=delimiter), [])
        names = prompt_columns.lower(header) if is_certain else {name.lower(): name for name in header}
        if prompt_columns.prompt_field(names) is None or not is_certain and len(header) < 2:
            continue
        try:
            rows = _rows(text, delimiter)
        except csv.Error as error:
            if is_certain:
                raise prompts.PromptError(f"the prompt file {path} is no table: {error}") from error
            return None
        if is_certain or rows and all(len(row) == len(header) for _, row in rows):
            return [_cells(row, header, f"line {n} of {PurePath(path).name}") for n, row in rows]
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


def _cells(row: list[str], header: list[str], where: str) -> Entry:
    """The prompt of a row, in a table with this header."""
    if len(row) != len(header):
        return Entry(None, where, f"{len(row)} cells, and the first line has {len(header)}")
    return prompt_columns.entry(dict(zip(header, row, strict=True)), where)
