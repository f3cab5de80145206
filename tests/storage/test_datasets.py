"""Run directories as Hugging Face and Parquet have them, and the log's numbers in TensorBoard and Weights & Biases."""

import importlib
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from referee_jax.runs import metric_writers
from referee_jax.storage import parquet
from tests.fakes import execute, lines


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, with a cache of its own."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    library = importlib.import_module("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


def test_metadata_as_a_table(tmp_path):
    table = [{"id": "x1", "prompt": "one", "seed": 7, "kind": "a", "more": [1]}, {"id": "x2", "prompt": "broken"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, table)))
    run = tmp_path / "run"
    assert execute(f"--prompts={tmp_path / 'p.jsonl'}", f"--workdir={run}")[0] == 0
    rows = pq.read_table(run / "metadata.parquet").to_pylist()
    assert [row["file_name"] for row in rows] == [x["file_name"] for x in lines(run / "metadata.jsonl")]
    assert [(row["id"], row["seed"], row["columns.kind"], row["columns.more"]) for row in rows] == [
        ("x1", 7, "a", "[1]"), ("x2", 0, None, None),
    ]  # fmt: skip
    assert [(row["scores.cosine"], row["status"]) for row in rows] == [(0.5, "done"), (None, "nonfinite")]


def test_values_of_several_kinds_are_texts():
    types = parquet.column_types([{"a": 1, "b": math.nan}, {"a": "x"}])
    assert parquet.column([1, "x", None], types["a"]).to_pylist() == ["1", "x", None]
    assert str(types["b"]) == "double"


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.parquet"])
def test_images_load_as_a_dataset(tmp_path, datasets, table):
    run = tmp_path / "run"
    execute("--prompt=one", "--prompt=two", f"--workdir={run}")
    found = datasets.load_dataset(
        "imagefolder", data_files=[str(run / table), str(run / "images" / "*")], split="train"
    )
    assert sorted(found["text"]) == ["one", "two"] and found[0]["image"].size == (8, 8)


def test_shards_load_as_a_dataset(tmp_path, datasets):
    run = tmp_path / "run"
    execute("--prompt=one", "--prompt=two", "--config.outputs.format=webdataset", f"--workdir={run}")
    found = datasets.load_dataset("webdataset", data_files=str(run / "shards" / "*.tar"), split="train")
    assert sorted(x["text"] for x in found["json"]) == ["one", "two"] and found[0]["png"].size == (8, 8)


def test_numbers_follow_the_iterations():
    written = []
    listen = metric_writers.Listener(lambda values, iteration: written.append((values, iteration)))
    for step, losses in ((10, [1.0, 3.0]), (20, [None, 4.0]), (10, [None, None])):
        listen({"event": "chunk", "step": step, "metrics": {"loss": losses, "norm": [0.5, 0.5]}})
    listen({"event": "cost"})
    listen({"event": "end", "images": 2, "skipped": 0, "nonfinite": 1, "seconds": 3.5})
    assert written == [
        ({"loss": 2.0, "norm": 0.5}, 10), ({"loss": 4.0, "norm": 0.5}, 20), ({"norm": 0.5}, 30),
        ({"end/images": 2.0, "end/skipped": 0.0, "end/nonfinite": 1.0, "end/seconds": 3.5}, 30),
    ]  # fmt: skip


def test_tensorboard_and_wandb(tmp_path, monkeypatch):
    """Without a network; both have what the log has."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    assert execute("--prompt=one", "--writers=tensorboard", "--writers=wandb", f"--workdir={run}")[0] == 0
    chunks = [x for x in lines(run / "log.jsonl") if x["event"] == "chunk"]
    (file,) = (run / "tensorboard" / "0").iterdir()
    events = importlib.import_module("tensorboardX.proto.event_pb2")
    data, found = file.read_bytes(), []
    while data:  # records: 8 bytes of length, 4 of a checksum, the event, 4 of a checksum
        size = int(np.frombuffer(data[:8], np.uint64)[0])
        event = events.Event.FromString(data[12 : 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    assert [x for x in found if x[0] == "loss"] == [("loss", x["step"], x["metrics"]["loss"][0]) for x in chunks]
    assert ("end/images", chunks[-1]["step"], 1.0) in found
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_writer_that_is_not_installed(tmp_path, monkeypatch, capsys, name, package):
    monkeypatch.setitem(importlib.import_module("sys").modules, package, None)
    assert execute("--prompt=one", f"--writers={name}", f"--workdir={tmp_path / 'run'}")[0] == 2
    assert f"--writers={name} needs the extra [logging]" in capsys.readouterr().err


def test_no_tensorboard_in_a_bucket(capsys):
    assert execute("--prompt=one", "--writers=tensorboard", "--workdir=memory://datasets/run")[0] == 2
    assert "needs a --workdir on a disk" in capsys.readouterr().err
