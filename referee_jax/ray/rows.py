"""Rows of a table of prompts, one for each image, and the tables in which Ray hands them to the actors."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from referee_jax import items as items_lib
from referee_jax.items import Item, Row
from referee_jax.referees.questions import Atom
from referee_jax.runs.prompt_file import Rejected

# `refused` says why a row cannot be made; the fields of an item, its columns and questions as JSON.
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("id", "prompt", "name", "negative", "columns", "questions", "refused")]
    + [("sample", pa.int64()), ("seed", pa.int64())]
)


def of_items(items: items_lib.Items, questions: Mapping[str, Sequence[Atom]]) -> Iterator[dict[str, Any]]:
    """The rows of the items, with the user's questions by prompt."""
    asked = {prompt: json.dumps(list(map(list, atoms))) for prompt, atoms in questions.items()}
    for item in items:
        yield {
            "id": item.id, "prompt": item.prompt, "sample": item.sample, "name": item.name, "seed": item.seed,
            "negative": item.negative, "columns": json.dumps(item.columns), "questions": asked.get(item.prompt, "[]"),
        }  # fmt: skip


def of_rejected(rejected: Sequence[Rejected]) -> Iterator[dict[str, Any]]:
    """The rows of prompts that cannot be used, named after their place: their own id may be another's."""
    for one in rejected:
        name = re.sub(r"[^A-Za-z0-9]+", "_", one.where)
        # Half a character may be why it is refused, and Parquet has UTF-8 alone.
        text = one.text.encode("utf-8", "backslashreplace").decode()
        yield {
            "id": f"refused-{name}", "prompt": text, "columns": json.dumps(one.columns), "questions": "[]",
            "refused": one.reason,
        }  # fmt: skip


def tables(rows: Iterator[Mapping[str, Any]], size: int) -> Iterator[pa.Table]:
    """The rows in tables of `size`, the last one shorter."""
    return (pa.Table.from_pylist(part, SCHEMA) for part in items_lib.batches(rows, size))


def item_of(row: Mapping[str, Any]) -> Item:
    """The item of a row."""
    return Item.of(Row(row["prompt"], row["name"], row["seed"], row["negative"]), row["sample"])


def questions_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Atom, ...]]:
    """Prompt -> the user's questions about it."""
    found = {row["prompt"]: tuple(Atom(*x) for x in json.loads(row["questions"])) for row in rows}
    return {prompt: atoms for prompt, atoms in found.items() if atoms}
