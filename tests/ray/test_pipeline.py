"""Tables of prompts on a Ray cluster: nothing lost, doubled or changed, whoever is killed."""

import json
import pathlib
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from referee_jax import run
from referee_jax.hardware import devices
from referee_jax.shapes import benchmark
from tests import fakes
from tests.ray import clusters
from tests.s3 import s3  # noqa: F401

FEW = ("--config.steps=2", "--config.init=noise", "--config.init_candidates=1", "--config.batch_size=8")
STEPS = "--config.steps=25"
LONG = 600.0  # seconds that a slow test waits for a step; three times that for a whole job


def table(file: pathlib.Path, count: int, texts: list[str], **changes: str) -> pathlib.Path:
    """A table of so many rows, each with an id, a seed and a column to carry; `changes` are other prompts, by id."""
    rows = [
        {"id": f"r{n:05d}", "prompt": changes.get(f"r{n:05d}", texts[n % len(texts)]), "seed": n, "kind": n % 3}
        for n in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def check(rows: list[dict], reference: pathlib.Path, ids: set[str]) -> None:
    """Every row is there once, and each image is the file that `run` made."""
    assert [row["id"] for row in rows] == sorted(ids)
    images = {row["image"]["path"]: row["image"]["bytes"] for row in rows if row["status"] == "ok"}
    assert images == {file.name: file.read_bytes() for file in (reference / "images").iterdir()}


def test_killed_and_continued(tmp_path):
    """An actor's process, then the driver; a row that fails, one that is refused, one that kills whoever makes it.

    The first driver's actors have all CPUs; what they make is written all the same. They keep the memory that they free.
    """
    bad = {"r00003": "failing", "r00010": "far too long", "r00055": "deadly"}
    prompts = table(tmp_path / "p.parquet", 60, list("abcdefghijk"), **bad)
    out, ids = tmp_path / "out", {f"r{n:05d}" for n in range(60)}
    driver = clusters.start("fake", prompts, out, STEPS, CPUS="2")
    numbers = clusters.wait_for(lambda: len(found := clusters.actors(driver.pid)) == 2 and found, driver)
    for number in numbers:
        environment = pathlib.Path(f"/proc/{number}/environ").read_text().split("\0")
        assert {f"{name}={value}" for name, value in devices.KEEPING_FREED_MEMORY.items()} <= set(environment)
    clusters.wait_for(lambda: list(out.glob("images/*")), driver)
    clusters.kill(clusters.an_actor(driver))
    clusters.wait_for(lambda: set(clusters.actors(driver.pid)) - set(numbers), driver)
    clusters.kill(driver.pid)
    driver.communicate()
    before = {row["id"] for row in clusters.rows(out)}
    assert 0 < len(before) < 60
    assert clusters.run("fake", prompts, out, STEPS) == "{'failed': 2, 'ok': 57, 'refused': 1}"
    rows = clusters.rows(out)
    good = table(tmp_path / "good.parquet", 60, list("abcdefghijk"), **dict.fromkeys(bad, "far too long"))
    arguments = f"--prompts={good}", STEPS, f"--workdir={tmp_path / 'run'}"
    assert (
        run.main(fakes.command(*arguments, path=fakes.ROOT / "configs" / "shapes_clip.py"), load=fakes.FakeInverter)
        == 0
    )
    check(rows, tmp_path / "run", ids)
    assert {row["id"]: row["error"] for row in rows if row["status"] != "ok"} == {
        "r00003": "ArithmeticError: no such picture",
        "r00010": "99 tokens, the prior reads 77",
        "r00055": "2 processes died of it",
    }
    assert [row["kind"] for row in rows] == [n % 3 for n in range(60)] and [row["seed"] for row in rows] == list(
        range(60)
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", ["parquet"])
def test_the_shapes_world(tmp_path, layout):
    """200 rows through two actors; two processes of actors and the driver killed; every byte as `run` makes it.

    The row that is refused is the last, so that each image has the place in a batch that it has in the run: at another
    one XLA may round its last bit otherwise.
    """
    texts = benchmark.prompts("colour", "seen") + benchmark.prompts("colour", "unseen")
    prompts = table(tmp_path / "p.parquet", 200, texts, r00199="red circle " * 60)
    out, ids = tmp_path / "out", {f"r{n:05d}" for n in range(200)}
    clusters.reference(prompts, tmp_path / "run", "--config=shapes_clip", *FEW)
    driver = clusters.start("shapes", prompts, out, *FEW, LAYOUT=layout)
    parts = lambda: len(list(out.glob("*/*.parquet")))
    for wanted in (1, 3):
        clusters.wait_for(lambda n=wanted: parts() >= n, driver, LONG)
        clusters.kill(clusters.an_actor(driver))
    clusters.wait_for(lambda: parts() >= 5, driver, LONG)
    clusters.kill(driver.pid)
    driver.communicate()
    assert clusters.run("shapes", prompts, out, *FEW, seconds=3 * LONG, LAYOUT=layout) == "{'ok': 199, 'refused': 1}"
    rows = clusters.rows(out)
    check(rows, tmp_path / "run", ids)
    assert [row["error"] for row in rows if row["error"]] == ["122 tokens, the prior reads 20"]
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert clusters.run("shapes", prompts, out, *FEW, seconds=3 * LONG, LAYOUT=layout) == "{'ok': 199, 'refused': 1}"
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert {x["text"] for x in fakes.lines(tmp_path / "run" / "metadata.jsonl")} == {
        x["prompt"] for x in rows if not x["error"]
    }
    assert json.loads((out / "config.json").read_text())["fingerprint"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_killed_and_continued_in_s3(tmp_path, s3, layout):  # noqa: F811
    """From a table in a bucket to one in a bucket; an actor's process and the driver killed."""
    prompts, fs = (
        table(tmp_path / "p.parquet", 60, list("abcdefghijk")),
        fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True),
    )
    fs.put(str(prompts), f"{s3}/p.parquet")
    arguments, parts = ("fake", f"{s3}/p.parquet", f"{s3}/out", STEPS), lambda: fs.glob(f"{s3}/out/*/*.parquet")
    driver = clusters.start(*arguments, LAYOUT=layout, PAUSE="1")  # the first part comes before the last row
    clusters.wait_for(parts, driver, LONG)
    clusters.kill(clusters.an_actor(driver))
    before = len(parts())
    clusters.wait_for(lambda: len(parts()) > before, driver, LONG)
    clusters.kill(driver.pid)
    driver.communicate()
    assert clusters.run(*arguments, seconds=3 * LONG, LAYOUT=layout) == "{'ok': 60}"
    fs.get(f"{s3}/out", str(tmp_path / "out"), recursive=True)
    rows = clusters.rows(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"r{n:05d}" for n in range(60)]
    flags = f"--prompts={prompts}", STEPS, f"--workdir={tmp_path / 'run'}"
    assert run.main(fakes.command(*flags, path=fakes.ROOT / "configs" / "shapes_clip.py"), load=fakes.FakeInverter) == 0
    images = {row["image"]["path"]: row["image"]["bytes"] for row in rows} if layout == "parquet" else {}
    for file in (tmp_path / "out").glob("shards/*.tar"):
        with tarfile.open(file) as tar:
            images |= {x.name: tar.extractfile(x).read() for x in tar if x.name.endswith(".png")}
    assert images == {file.name: file.read_bytes() for file in (tmp_path / "run" / "images").iterdir()}
