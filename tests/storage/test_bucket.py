"""Run directories in buckets: their content, and that nothing is lost, doubled or out of order."""

import concurrent.futures
import datetime
import io
import json
import secrets
import threading
import time

import fsspec
import pytest
from PIL import Image

from referee_jax import items as items_lib
from referee_jax import run
from referee_jax.storage import bucket as bucket_lib
from referee_jax.storage import objects, run_directory
from tests.fakes import FakeInverter, colours, command, execute
from tests.s3 import s3  # noqa: F401
from tests.tools import kill_fuzz

PROMPTS = ["--prompt=one", "--prompt=two", "--prompt=three", "--prompt=four"]


@pytest.fixture
def url():
    """A URL in an in-memory bucket."""
    where = f"memory://{secrets.token_hex(8)}/run"
    yield where
    place = where.removeprefix("memory:/").rpartition("/")[0]
    if fsspec.filesystem("memory").exists(place):
        fsspec.filesystem("memory").rm(place, recursive=True)


def contents(url):
    """Name -> content of each object of a run."""
    fs, root = fsspec.core.url_to_fs(url)
    return {name[len(root) + 1 :]: fs.cat_file(name) for name in fs.find(root)}


def journal(url):
    return [json.loads(line) for line in contents(url)["metadata.jsonl"].splitlines()]


def finished(url, count):
    """The images' colours in a finished run, which must hold no other objects."""
    objects, lines = contents(url), journal(url)
    images = {name for name in objects if name.startswith("images/")}
    assert sorted(x["file_name"] for x in lines) == sorted(images) and len(images) == count
    others = {name for name in objects if not name.startswith(("images/", "log-", "trajectories/"))}
    assert others == {"config.json", "metadata.jsonl", "metadata.parquet", "contact_sheet.png", "gallery.html"}
    return {name.removeprefix("images/"): Image.open(io.BytesIO(objects[name])).getpixel((0, 0)) for name in images}


def test_a_run_in_a_bucket(tmp_path, url, capsys):
    """It equals a run on a disk; finished images are not made again; other settings are refused."""
    assert execute(*PROMPTS, "--samples=2", f"--workdir={tmp_path}")[0] == 0
    assert execute(*PROMPTS, "--samples=2", f"--workdir={url}")[0] == 0
    assert finished(url, 8) == colours(tmp_path)
    assert f"see {url}/contact_sheet.png and gallery.html" in capsys.readouterr().out
    assert b"data:image/webp" in contents(url)["gallery.html"]
    assert {"start", "chunk", "end"} <= {
        json.loads(line)["event"]
        for name, data in contents(url).items()
        if name.startswith("log-")
        for line in data.splitlines()
    }
    code, engine = execute(*PROMPTS, "--samples=2", f"--workdir={url}")
    assert (code, engine) == (0, None) and "8 of 8 images are there already" in capsys.readouterr().out
    assert execute(*PROMPTS, "--config.sds.guidance=1", f"--workdir={url}")[0] == 2
    assert f"{url} was begun with other settings" in capsys.readouterr().err
    assert execute(*PROMPTS, "--samples=2", f"--workdir={url}", "--resume=never")[0] == 2
    fsspec.filesystem("memory").rm_file(url.removeprefix("memory:/") + "/images/" + min(finished(url, 8)))
    assert execute(*PROMPTS, "--samples=2", f"--workdir={url}")[0] == 0
    assert finished(url, 8) == colours(tmp_path)


@pytest.mark.parametrize("call", [1, 2, 4, 6])
def test_a_run_that_was_cut_short_goes_on(tmp_path, url, call):
    """From its checkpoint, on another machine: only the bucket is left."""
    execute(*PROMPTS, f"--workdir={tmp_path}")
    saving = "--config.checkpoint_seconds=1e-9", "--config.chunk=10"
    assert execute(*PROMPTS, f"--workdir={url}", *saving, failures={call: KeyboardInterrupt()})[0] == 130
    assert any(name.startswith("checkpoints/") for name in contents(url)) == (call in (2, 6))
    code, engine = execute(*PROMPTS, f"--workdir={url}", *saving)
    assert code == 0 and [step for _, step in engine.resumed] == {2: [10], 6: [20]}.get(call, [])
    assert finished(url, 4) == colours(tmp_path)


def test_an_open_shard_is_soon_sent(tmp_path, url, monkeypatch):
    """Otherwise a lost machine would lose all of it. Here uploads fail from the third batch on."""
    execute(*PROMPTS, "--samples=2", f"--workdir={tmp_path}")
    arguments = [*PROMPTS, "--samples=2", f"--workdir={url}", "--config.outputs.format=webdataset"]
    arguments += ["--config.outputs.shard_size=100", "--config.checkpoint_seconds=1e-9"]
    lost = lambda: monkeypatch.setattr(bucket_lib.Bucket, "_put", fail)

    def fail(*_):
        raise OSError("the machine is lost")

    code, _ = execute(*arguments, failures={7: lost})  # in the third batch, three chunks each
    assert code == 1 and len([x for x in contents(url) if x.startswith("shards/")]) == 2
    monkeypatch.undo()
    code, engine = execute(*arguments)
    assert code == 0 and len(journal(url)) == 8 and [len(items) for items in engine.begun] == [2]


@pytest.mark.parametrize(
    "arguments", [(), ("--config.outputs.trajectory=True",), ("--config.outputs.format=webdataset",)]
)
def test_no_line_comes_before_its_image(url, monkeypatch, arguments):
    """The bucket is consistent at every moment, and the local files are deleted."""
    put, wrong, locals_ = bucket_lib.Bucket.write, [], []

    def write(self, name, data):
        put(self, name, data)
        if name.startswith("metadata"):
            objects = contents(url).keys()
            for line in data.splitlines():
                name = json.loads(line)["file_name"]
                wrong.extend({name.rpartition("/")[0] if ".tar/" in name else name} - objects)
            locals_.append(self.local)

    monkeypatch.setattr(bucket_lib.Bucket, "write", write)
    assert execute(*PROMPTS, "--samples=2", f"--workdir={url}", *arguments, failures={7: KeyboardInterrupt()})[0] == 130
    assert locals_ and not wrong
    assert not any(list((local / folder).glob("*")) for local in locals_ for folder in bucket_lib.CONTENT)
    assert execute(*PROMPTS, "--samples=2", f"--workdir={url}", *arguments)[0] == 0
    assert not wrong and len(journal(url)) == 8
    assert ("trajectories/" in str(contents(url).keys())) == ("trajectory" in str(arguments))


def test_processes_share_a_bucket(tmp_path, url, monkeypatch):
    """At the same time; each item is made once, and the last process merges the journals."""
    monkeypatch.setattr(objects, "WAIT", 0.01)
    prompts = [f"--prompt=number {n}" for n in range(12)]
    execute(*prompts, f"--workdir={tmp_path}")
    begun, lock = [], threading.Lock()

    class Engine(FakeInverter):
        def begin(self, items, seed, *, look=None):
            with lock:
                begun.extend(items)
            time.sleep(0.01)
            return super().begin(items, seed)

    def work(index):
        parsed = command("--config.steps=25", *prompts, f"--workdir={url}", "--shard_count=3", f"--shard_index={index}")
        return run.main(parsed, load=Engine)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [0, 0, 0]
    assert sorted(begun) == sorted(items_lib.expand([f"number {n}" for n in range(12)], 1))
    assert finished(url, 12) == colours(tmp_path)


def test_what_a_dead_worker_left_in_flight_goes_with_the_last(url):
    """Also if it was uploaded after all others had begun, and if there is nothing left to do."""
    dead = ["--config.checkpoint_seconds=1e-9", "--config.chunk=10"]
    execute(*PROMPTS, f"--workdir={url}", *dead, failures={2: KeyboardInterrupt()})
    objects = {name: data for name, data in contents(url).items() if name.startswith("checkpoints/")}
    assert execute(*PROMPTS, f"--workdir={url}")[0] == 0
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe({f"{root}/{name}": data for name, data in objects.items()})
    assert execute(*PROMPTS, f"--workdir={url}")[0] == 0
    assert finished(url, 4)


def test_a_merge_of_another_hides_no_line(url, monkeypatch):
    """It moves lines from parts to metadata.jsonl while both are fetched."""
    execute("--prompt=a", f"--workdir={url}")
    bucket, other, bring = bucket_lib.Bucket(url), bucket_lib.Bucket(url), bucket_lib.Bucket.bring
    bucket.fetch()
    line = contents(url)["metadata.jsonl"].replace(b'"text": "a"', b'"text": "b"').replace(b'"id": "a-', b'"id": "b-')
    other.write("metadata-x-000001.jsonl", line)

    def late(self, names):
        if "metadata-x-000001.jsonl" in names:
            monkeypatch.setattr(bucket_lib.Bucket, "bring", bring)
            other.write("metadata.jsonl", contents(url)["metadata.jsonl"] + line)
            other.remove("metadata-x-000001.jsonl")
        bring(self, names)

    monkeypatch.setattr(bucket_lib.Bucket, "bring", late)
    bucket.fetch()
    ids = [json.loads(x)["id"][0] for file in bucket.local.glob("metadata*") for x in file.read_text().splitlines()]
    assert sorted(ids) == ["a", "b"]


@pytest.mark.parametrize("form", ["png", "webdataset"])
def test_nothing_is_left_on_the_machine(url, monkeypatch, form):
    """After a run has ended or was interrupted. The pictures show only the first shards."""
    places, init = [], bucket_lib.Bucket.__init__
    monkeypatch.setattr(bucket_lib.Bucket, "__init__", lambda self, url: init(self, url) or places.append(self.local))
    monkeypatch.setattr(bucket_lib, "SHOWN_BYTES", 1)
    arguments = [*PROMPTS, f"--workdir={url}", f"--config.outputs.format={form}", "--config.outputs.shard_size=1"]
    assert execute(*arguments, failures={5: KeyboardInterrupt()})[0] == 130
    assert execute(*arguments)[0] == 0
    assert len(places) == 2 and not any(place.exists() for place in places)
    assert contents(url)["gallery.html"].count(b"data:image/webp") == (4 if form == "png" else 1)


def test_who_merges_too_slowly_does_it_again(url, monkeypatch):
    """Its lock was taken over meanwhile, so what it has gathered may be old."""
    monkeypatch.setattr(objects, "WAIT", 0.001)
    monkeypatch.setattr(objects, "LOCK", 0.2)
    gather, slow = run_directory.RunDirectory._gather, [True]

    def late(self, into, others):
        gather(self, into, others)
        if into.name == "metadata.jsonl" and slow:
            slow.clear()
            time.sleep(0.3)
            assert execute("--prompt=b", f"--workdir={url}", "--config.samples=1")[0] == 0

    monkeypatch.setattr(run_directory.RunDirectory, "_gather", late)
    assert execute("--prompt=a", f"--workdir={url}")[0] == 0
    assert finished(url, 2)


def test_one_lock_at_a_time(url, monkeypatch):
    monkeypatch.setattr(objects, "WAIT", 0.001)
    inside, most = [], []

    def work(number):
        with bucket_lib.Bucket(url).locked("merge"):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.005)
            inside.remove(number)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert most == [1] * 8 and not contents(url)


def test_the_lock_of_the_dead_is_taken_over(url, monkeypatch):
    """When it is older than LOCK by the bucket's clock, whatever this machine's says; then it is no longer theirs."""
    monkeypatch.setattr(objects, "WAIT", 0.001)
    dead, waits = bucket_lib.Bucket(url), []
    fs, path = fsspec.filesystem("memory"), f"{url.removeprefix('memory:/')}/locks/merge"

    def age(seconds):
        waits.append(seconds)
        fs.store[path].modified -= datetime.timedelta(seconds=objects.LOCK - 1)

    monkeypatch.setattr(objects.time, "sleep", age)
    monkeypatch.setattr(objects.time, "time", lambda: 0.0)
    with dead.locked("merge") as is_ours:
        assert is_ours()
        with bucket_lib.Bucket(url).locked("merge") as is_others:
            assert len(waits) == 2 and is_others() and not is_ours()
    assert not contents(url)


def test_what_cannot_be_reached_is_a_sentence(url, monkeypatch, capsys):
    code, _ = execute(*PROMPTS, "--workdir=nothing://bucket/run")
    assert code == 2 and "nothing://bucket/run cannot be reached" in capsys.readouterr().err

    def fail(*args, **kwargs):
        raise RuntimeError("403 Forbidden")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", fail)
    code, _ = execute(*PROMPTS, f"--workdir={url}")
    assert code == 2 and f"the run directory {url} cannot be written" in capsys.readouterr().err


def test_a_bucket_that_fails_meanwhile_ends_the_run_and_loses_nothing(tmp_path, url, monkeypatch, capsys):
    execute(*PROMPTS, f"--workdir={tmp_path}")
    put = bucket_lib.Bucket._put

    def fail(self, files):
        if any(file.parent.name == "images" for file in files):
            raise OSError(f"{self.name}: 503 Service Unavailable")
        put(self, files)

    monkeypatch.setattr(bucket_lib.Bucket, "_put", fail)
    assert execute(*PROMPTS, f"--workdir={url}")[0] == 1
    assert "503 Service Unavailable; the finished images are in memory://" in capsys.readouterr().err
    monkeypatch.undo()
    assert execute(*PROMPTS, f"--workdir={url}")[0] == 0
    assert finished(url, 4) == colours(tmp_path)


def test_another_place_is_refused(url, capsys):
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/photo.png", b"x")
    assert execute(*PROMPTS, f"--workdir={url}")[0] == 2
    assert f"{url} is not empty and not a run directory" in capsys.readouterr().err


def test_two_begin_at_once_with_other_settings(url, monkeypatch):
    """The later one is refused."""
    create = bucket_lib.Bucket.create

    def late(self, name, data):
        if name == "config.json":
            monkeypatch.setattr(bucket_lib.Bucket, "create", create)
            assert execute("--prompt=a", f"--workdir={url}")[0] == 0
        return create(self, name, data)

    monkeypatch.setattr(bucket_lib.Bucket, "create", late)
    assert execute("--prompt=a", "--config.sds.guidance=1", f"--workdir={url}")[0] == 2
    assert finished(url, 1)


def test_settings_that_are_forced_are_kept(url):
    execute("--prompt=a", f"--workdir={url}")
    assert execute("--prompt=a", "--prompt=b", "--config.sds.guidance=1", f"--workdir={url}", "--resume=force")[0] == 0
    assert json.loads(contents(url)["config.json"])["settings"]["sds"]["guidance"] == 1
    assert finished(url, 2)


def test_a_journal_in_a_bucket_is_that_of_a_directory(tmp_path, url):
    """Downloaded, it is an ordinary run directory."""
    execute(*PROMPTS, f"--workdir={url}")
    for name, data in contents(url).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert len(run_directory.read_journal(tmp_path)) == 4


# --- a real protocol ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_processes_that_are_killed_lose_nothing_in_s3(tmp_path, s3):  # noqa: F811
    """Three real processes over S3's protocol, one killed, one asked to stop; others finish."""
    kill_fuzz.uninterrupted(tmp_path)
    fs, cache = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True), tmp_path / "cache"
    running = [kill_fuzz.start(tmp_path / "cut", cache, n, 3, url=s3) for n in range(3)]
    while not fs.glob(f"{s3}/checkpoints/*/*/default/*"):
        time.sleep(0.1)
    running[0].kill()
    running[1].terminate()
    assert set(kill_fuzz.ended(*running)) <= {0, *kill_fuzz.TERMINATED}
    last = [kill_fuzz.start(tmp_path / "cut", cache, n, 2, url=s3) for n in range(2)]
    assert kill_fuzz.ended(*last) == [0, 0]
    fs.get(s3, str(tmp_path / "down"), recursive=True)
    for file in (tmp_path / "down").glob("log-*.jsonl"):
        file.rename(tmp_path / "down" / "log.jsonl")
    assert kill_fuzz.problems(tmp_path / "down", tmp_path / "whole") == []
