"""Tables of pictures: columns, parts, what is done."""

import io
import tarfile

import pyarrow as pa
import pytest

from referee_jax import config
from referee_jax.ray import pipeline, tables
from referee_jax.ray.folder import Folder
from referee_jax.runs.command import CommandError
from referee_jax.storage import parquet
from tests import tiny


def row(name: str, **changes):
    image = {"bytes": b"png of " + name.encode(), "path": f"{name}.png"}
    return {"id": name, "prompt": "a", "status": "ok", "columns": {}, "record": {"id": name}, "image": image} | changes


def test_carried_columns_keep_their_type():
    columns = [{"n": 1, "x": 0.5, "t": "a", "l": [1], "m": 1, "e": None}, {"n": None, "m": "b", "e": None}, {}]
    types = parquet.column_types(columns)
    assert types == {
        "n": pa.int64(), "x": pa.float64(), "t": pa.string(), "l": pa.string(), "m": pa.string(), "e": pa.string()
    }  # fmt: skip
    found = tables.table([row(str(n), columns=x) for n, x in enumerate(columns)], types).select(list(types))
    assert found.to_pylist() == [
        {"n": 1, "x": 0.5, "t": "a", "l": "[1]", "m": "1", "e": None},
        {"n": None, "x": None, "t": None, "l": None, "m": "b", "e": None},
        dict.fromkeys(types),
    ]


@pytest.mark.parametrize("layout", tables.FORMATS)
def test_what_is_done_stands_in_the_rows(tmp_path, layout):
    folder = Folder(str(tmp_path / "out"))
    assert tables.finished(folder) == {}
    rows = [row("a"), row("b", image=None, status="refused", record=None)]
    tables.write(folder, "one", tables.table(rows, {}), layout)
    tables.write(folder, "one", tables.table(rows, {}), layout)  # a task that is repeated
    assert tables.finished(folder) == {"a": "ok", "b": "refused"}
    if layout == "webdataset":
        with tarfile.open(fileobj=io.BytesIO((tmp_path / "out" / "shards" / "one.tar").read_bytes())) as tar:
            assert {x.name: tar.extractfile(x).read() for x in tar} == {"a.png": b"png of a", "a.json": b'{"id": "a"}'}
    tables.write(folder, "two", tables.table([row("a")], {}), "parquet")
    with pytest.raises(ValueError, match="has row 'a' again"):
        tables.finished(folder)


def test_an_output_has_one_config(tmp_path):
    folder = Folder(str(tmp_path))
    pipeline.begin(folder, tiny.settings())
    pipeline.begin(folder, tiny.settings(batch_size=5))  # which no picture depends on
    with pytest.raises(CommandError, match="begun with other settings; choose another --out, or take back:\nsteps: "):
        pipeline.begin(folder, tiny.settings(steps=99))
    assert config.fingerprint(tiny.settings()) in (tmp_path / "config.json").read_text()


def test_a_column_that_the_output_has(tmp_path):
    with pytest.raises(CommandError, match="the table has a column status, which the output has, too; rename it"):
        pipeline.carried([{"kind": 1}, {"status": 2}])
