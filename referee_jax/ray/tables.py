"""Tables of pictures: Parquet files of rows, with their images, or beside a WebDataset's tar that has these.

    OUT/config.json             settings, versions
    OUT/images/<part>.parquet   one row an image, with the image: `bytes` and `path`
    OUT/shards/<part>.tar       instead: <id>.png and <id>.json; <part>.parquet beside it has the rows without the images

A part appears when it is whole, and a tar before its rows; so what stands in the rows is done.
"""

import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from referee_jax.ray.folder import Folder
from referee_jax.storage import parquet

FORMATS = {"parquet": "images", "webdataset": "shards"}  # -> folder
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as the Hugging Face Hub has images in Parquet
FIELDS = {
    "id": pa.string(),
    "prompt": pa.string(),
    "sample": pa.int64(),
    "seed": pa.int64(),
    "negative": pa.string(),
    "status": pa.string(),
    "error": pa.string(),
    "seconds": pa.float64(),
    "scores": pa.string(),  # JSON, as is the next
    "record": pa.string(),
    "image": IMAGE,
}


def table(rows: Sequence[Mapping[str, Any]], types: Mapping[str, pa.DataType]) -> pa.Table:
    """Rows as a table of FIELDS, of which any may be missing, and of the carried columns of these types."""
    arrays = {}
    for name, kind in (FIELDS | dict(types)).items():
        values = [row.get(name) if name in FIELDS else row["columns"].get(name) for row in rows]
        arrays[name] = parquet.column(values, kind)
    return pa.table(arrays)


def write(folder: Folder, part: str, rows: pa.Table, layout: str) -> None:
    """Writes a part, in the layout "parquet" or "webdataset"."""
    name = f"{FORMATS[layout]}/{part}"
    if layout == "webdataset":
        folder.write(f"{name}.tar", _tar(rows))
        rows = rows.drop_columns(["image"])
    buffer = io.BytesIO()
    pq.write_table(rows, buffer)
    folder.write(f"{name}.parquet", buffer.getvalue())


def _tar(rows: pa.Table) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for row in rows.select(["record", "image"]).to_pylist():
            if row["image"]:
                path = row["image"]["path"]
                for name, data in (
                    (path, row["image"]["bytes"]),
                    (f"{path.rpartition('.')[0]}.json", row["record"].encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def finished(folder: Folder) -> dict[str, str]:
    """The status of each row that is done, by id. ValueError where one is there twice, or in the other layout as well."""
    found: dict[str, str] = {}
    for name in _parts(folder):
        with folder.open(name) as file:
            ids, statuses = pq.read_table(file, columns=["id", "status"]).columns
        for key, status in zip(ids.to_pylist(), statuses.to_pylist(), strict=True):
            if key in found:
                raise ValueError(f"{folder.name}/{name} has row {key!r} again; do two programs write there at once?")
            found[key] = status
    return found


def _parts(folder: Folder) -> Iterable[str]:
    for place in FORMATS.values():
        yield from (f"{place}/{name}" for name in folder.names(place) if name.endswith(".parquet"))
