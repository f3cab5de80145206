"""Parquet of records: columns with one type each, whatever the records hold."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from referee_jax.storage import files


def column_types(rows: Sequence[Mapping[str, Any]]) -> dict[str, pa.DataType]:
    """The type of each column; a text, in JSON, where values are nested or of several kinds."""
    types = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            kind = pa.array([row.get(name) for row in rows]).type
        except pa.ArrowException:
            kind = pa.string()
        types[name] = pa.string() if pa.types.is_nested(kind) or pa.types.is_null(kind) else kind
    return types


def column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """A column of this type."""
    is_text = pa.types.is_string(kind)
    text = lambda x: json.dumps(files.finite(x)) if is_text and x is not None and not isinstance(x, str) else x
    return pa.array([text(value) for value in values], kind)


def encode_metadata(records: Sequence[Mapping[str, Any]]) -> bytes:
    """The lines of a journal as Parquet: of `scores` and `columns` each entry is a column ("scores.referee_0/cosine")."""
    rows = []
    for record in records:
        inner = {name: record.get(name) or {} for name in ("scores", "columns")}
        flat = {f"{name}.{key}": value for name, values in inner.items() for key, value in values.items()}
        rows.append({name: value for name, value in record.items() if name not in inner} | flat)
    sink = pa.BufferOutputStream()
    types = column_types(rows)
    pq.write_table(
        pa.table({name: column([row.get(name) for row in rows], kind) for name, kind in types.items()}), sink
    )
    return sink.getvalue().to_pybytes()
