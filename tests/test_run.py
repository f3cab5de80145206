"""The command: what it makes, what it refuses and in which words, and that an interrupted run loses nothing."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from referee_jax import command as commands
from referee_jax import config, disk, formats, generation, outputs, queue, run, trouble
from referee_jax.weights import convert

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "paper.py"


@dataclasses.dataclass(frozen=True)
class Batch:
    items: tuple
    seed: int
    step: int = 0
    begun: np.ndarray = None


@dataclasses.dataclass(frozen=True)
class Picture:
    item: queue.Item
    image: np.ndarray
    scores: dict
    latents: np.ndarray
    status: str = "done"
    losses: dict | None = None


class FakeInverter:
    """The engine's methods; an image is one colour, of the prompt, the sample and the seed. Fails as `failures` say."""

    devices = "fake x 1"

    def __init__(self, settings, failures=()):
        self.steps, self.chunk, self.batch_size, self.groups = settings.steps, settings.chunk, 3, 1
        self.settings = dataclasses.replace(settings, batch_size=settings.batch_size or 3)
        self.failures, self.compiled, self.calls, self.begun, self.resumed = dict(failures), False, 0, [], []

    def check(self, prompt):
        return "99 tokens, the prior reads 77" if "too long" in prompt else None

    def flops(self, batch):
        return 1.5e9

    def begin(self, items, seed):
        self.begun.append(tuple(items))
        return Batch(tuple(items), seed)

    def snapshot(self, batch):
        return queue.Part(batch.items, batch.step, {"prompt": np.array([item.prompt_id for item in batch.items])})

    def resume(self, part, seed):
        assert part.state["prompt"].tolist() == [item.prompt_id for item in part.items]
        self.resumed.append((part.items, part.step))
        return Batch(part.items, seed, part.step)

    def halved(self):
        return None if self.batch_size == 1 else self.at_once(self.batch_size // 2)

    def at_once(self, size):
        self.batch_size = size
        self.settings = dataclasses.replace(self.settings, batch_size=size)
        return self

    def advance(self, batch):
        self.calls += 1
        self.compiled = True
        if failure := self.failures.get(self.calls):
            if callable(failure) and not isinstance(failure, type):
                failure()
            else:
                raise failure
        count = min(self.chunk, self.steps - batch.step)
        loss = np.tile(np.arange(batch.step, batch.step + count, dtype=np.float32), (len(batch.items), 1))
        return dataclasses.replace(batch, step=batch.step + count), {"loss": loss, "norm": np.full_like(loss, np.nan)}

    def preview(self, batch):
        return np.full((len(batch.items), 8, 8, 3), batch.step, np.uint8)

    def finish(self, batch):
        pictures = []
        for item in batch.items:
            colour = hashlib.sha256(f"{item.prompt} {item.sample} {batch.seed}".encode()).digest()[:3]
            image = np.broadcast_to(np.frombuffer(colour, np.uint8) / np.float32(255), (8, 8, 3))
            score = float("nan") if "broken" in item.prompt else 0.5
            losses = {"referee": (2.0, 1.0), "held_out": (0.5, 0.75)} if "hacked" in item.prompt else None
            pictures.append(Picture(item, image, {"cosine": score}, np.zeros((1, 1, 4)), losses=losses))
        return pictures


def command(*arguments, path=CONFIG):
    argv = ["run", f"--config={path}", *map(str, arguments)]
    values = flags.FlagValues()
    return commands.read_command(values, commands.parse_flags(argv, values)[1:])


def execute(*arguments, failures=(), stop=None):
    """Exit code and engine (None where it was not loaded)."""
    engines = []

    def load(settings):
        engines.append(FakeInverter(settings, failures))
        return engines[-1]

    code = run.main(command("--config.steps=25", *arguments), load=load, stop=stop)
    return code, engines[0] if engines else None


def pixels(path):
    return {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in (path / "images").iterdir()}


def colours(path):
    return {x.name: Image.open(x).getpixel((0, 0)) for x in (path / "images").iterdir()}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_reward_hacking_is_told(tmp_path, capsys):
    execute("--prompt=one", "--prompt=hacked one", f"--workdir={tmp_path}")
    flagged = [line for line in lines(tmp_path / "metadata.jsonl") if line.get("hacked")]
    assert [line["text"] for line in flagged] == ["hacked one"]
    assert lines(tmp_path / "log.jsonl")[-1]["hacked"] == [flagged[0]["id"]]
    out = capsys.readouterr().out
    assert "pleases the referees more than its start did, and the held-out ones less (1 of 2 images" in out
    assert flagged[0]["id"] in out


def test_a_chunk_is_the_mean_of_what_there_is(tmp_path):
    """A held-out loss is there in the iterations of a look alone."""
    run_directory = outputs.RunDirectory.open(tmp_path, config.from_config({}))
    nan = float("nan")
    looked = np.array([[nan, 1.0, nan, 2.0], [nan, nan, nan, nan]], np.float32)
    generation.log_chunk(run_directory, queue.items(["one", "two"], 1), 4, {"held_out_loss": looked})
    assert lines(tmp_path / "log.jsonl")[-1]["metrics"] == {"held_out_loss": [1.5, None]}


def test_a_run(tmp_path, capsys):
    work = tmp_path / "run"
    code, engine = execute("--prompt=one", "--prompt=two", "--samples=2", "--seed=5", f"--workdir={work}")
    assert code == 0
    assert [len(batch) for batch in engine.begun] == [3, 1]
    records = lines(work / "metadata.jsonl")
    assert [(x["text"], x["sample"], x["seed"]) for x in records] == [
        ("one", 0, 5), ("one", 1, 5), ("two", 0, 5), ("two", 1, 5),
    ]  # fmt: skip
    assert all((work / x["file_name"]).is_file() for x in records)
    assert (work / "contact_sheet.png").is_file() and (work / "gallery.html").is_file()
    chunks = [x for x in lines(work / "log.jsonl") if x["event"] == "chunk"]
    assert [(len(x["items"]), x["step"]) for x in chunks] == [(3, 10), (3, 20), (3, 25), (1, 10), (1, 20), (1, 25)]
    assert chunks[2]["metrics"] == {"loss": [22.0] * 3, "norm": [None] * 3}
    assert chunks[3]["items"] == [queue.Item("two", 1).id]
    out, err = capsys.readouterr()
    told = out.splitlines()
    assert told[1] == "compiling for fake x 1, 3 images at once (this takes a while, once)"
    assert sum("compiling" in line for line in told) == 1
    assert told[2] == "0.0015 TFLOP for an iteration of an image, 0.0375 for all"
    assert told[3].startswith("3/4 images, 75/100 steps")
    assert re.match(r"4 images done, 0 prompts skipped, \d+ s; see .*contact_sheet\.png and gallery\.html$", told[-1])
    assert len(told) == 6 and not err


def test_done_is_done(tmp_path, capsys):
    arguments = "--prompt=one", "--samples=2", f"--workdir={tmp_path}"
    execute(*arguments)
    before = pixels(tmp_path)
    code, engine = execute(*arguments)
    assert (code, engine) == (0, None)  # nothing is loaded where nothing is to be made
    assert "2 of 2 images are there already" in capsys.readouterr().out
    code, engine = execute("--prompt=zero", "--prompt=one", "--samples=3", f"--workdir={tmp_path}")
    assert [item.id for item in engine.begun[0]] == [queue.Item("zero", n).id for n in range(3)]
    assert engine.begun[1] == (queue.Item("one", 2),)
    assert before.items() <= pixels(tmp_path).items() and len(pixels(tmp_path)) == 6


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("call", [1, 4, 6])
def test_interrupted_and_continued(tmp_path, capsys, failure, call):
    arguments = "--prompt=one", "--prompt=two", "--samples=2"
    execute(*arguments, f"--workdir={tmp_path / 'whole'}")
    work = tmp_path / "cut"
    code, _ = execute(*arguments, f"--workdir={work}", failures={call: failure})
    assert code == (130 if failure is KeyboardInterrupt else 1)
    err = capsys.readouterr().err
    assert err.endswith(f"the finished images are in {work}, and the same command continues\n") and err.count("\n") == 1
    assert len(pixels(work)) == len(lines(work / "metadata.jsonl") if call > 3 else []) == (3 if call > 3 else 0)
    code, engine = execute(*arguments, f"--workdir={work}")
    assert code == 0 and sum(map(len, engine.begun)) == (1 if call > 3 else 4)
    assert len(colours(work)) == 4 and colours(work) == colours(tmp_path / "whole")


def test_bad_prompts_are_skipped_with_a_reason(tmp_path, capsys):
    file = tmp_path / "list.txt"
    file.write_bytes(b"a cat\n\ncaf\xe9\na dog\na cat\ntoo long\nbroken\n")
    work = tmp_path / "run"
    code, _ = execute(f"--prompts={file}", "--prompt=a bird", f"--workdir={work}")
    assert code == 0
    assert [x["text"] for x in lines(work / "metadata.jsonl")] == ["a cat", "a dog", "broken", "a bird"]
    assert [x["status"] for x in lines(work / "metadata.jsonl")] == ["done", "done", "nonfinite", "done"]
    skipped = [x for x in lines(work / "log.jsonl") if x["event"] == "skipped"]
    assert [(x["where"], x["reason"]) for x in skipped] == [
        ("line 2 of list.txt", "blank"),
        ("line 3 of list.txt", "not UTF-8"),
        ("line 5 of list.txt", "the same as line 1 of list.txt"),
        ("prompt", "99 tokens, the prior reads 77"),
    ]
    out, err = capsys.readouterr()
    assert "4 images done (1 of them not finite), 4 prompts skipped" in out
    assert err.splitlines()[-1] == "skipped prompt ('too long'): 99 tokens, the prior reads 77"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt= "], "no prompt can be used; --prompt 1: blank"),
        (["--prompt=too long"], "no prompt can be used; prompt ('too long'): 99 tokens, the prior reads 77"),
    ],
)
def test_no_prompt_is_left(tmp_path, capsys, arguments, message):
    code, _ = execute(*arguments, f"--workdir={tmp_path}")
    assert code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


def test_other_settings_are_refused_before_weights_are_loaded(tmp_path, capsys):
    execute("--prompt=one", f"--workdir={tmp_path}")
    code, engine = execute("--prompt=two", "--config.sds.guidance=5", f"--workdir={tmp_path}")
    assert (code, engine) == (2, None)
    assert capsys.readouterr().err == (
        f"error: {tmp_path} was begun with other settings; choose another --workdir, go on with these by --resume=force, or "
        "take back:\nsds.guidance: 30.0 -> 5.0\n"
    )


def test_what_else_may_become_of_a_run_directory(tmp_path, capsys):
    """By force it goes on with other settings, which are then its own, and what is there stays; or it is left alone."""
    execute("--prompt=one", f"--workdir={tmp_path}")
    before = pixels(tmp_path)
    changed = "--prompt=one", "--prompt=two", "--config.sds.guidance=5", f"--workdir={tmp_path}"
    assert execute(*changed, "--resume=never")[0] == 2
    assert "is a run already, and --resume=never" in capsys.readouterr().err
    code, engine = execute(*changed, "--resume=force")
    assert code == 0 and engine.begun == [(queue.Item("two", 0),)]
    assert before.items() <= pixels(tmp_path).items() and len(pixels(tmp_path)) == 2
    events = [x for x in lines(tmp_path / "log.jsonl") if x["event"] == "settings"]
    assert [x["changes"] for x in events] == [["sds.guidance: 30.0 -> 5.0"]]
    assert execute(*changed)[0] == 0 and execute("--prompt=one", f"--workdir={tmp_path}")[0] == 2


def test_weights_that_cannot_be_loaded(tmp_path, capsys):
    def load(settings):
        raise convert.WeightsError("x/config.json is missing")

    assert run.main(command("--prompt=one", f"--workdir={tmp_path}"), load=load) == 2
    assert capsys.readouterr().err == "error: x/config.json is missing\n"


def test_a_run_goes_on_with_the_commits_that_it_began_with(tmp_path, monkeypatch):
    """Whatever has become of the checkpoints on the hub meanwhile; a revision in the config stays what it is."""
    loaded, newest = [], "a" * 40

    def load(settings):
        loaded.append((settings.generator.revision, settings.referees[0].revision))
        return FakeInverter(settings)

    monkeypatch.setattr(run.hub, "commit", lambda name, revision: revision or newest)
    asked = [f"--workdir={tmp_path}", "--config.referees[0].revision=v1"]
    assert run.main(command("--prompt=one", *asked), load=load) == 0
    newest = "b" * 40
    assert run.main(command("--prompt=two", *asked), load=load) == 0
    assert run.main(command("--prompt=3", "--config.sds.guidance=1", "--resume=force", *asked), load=load) == 0
    assert loaded == [("", "v1"), ("a" * 40, "v1"), ("a" * 40, "v1")]
    commits = json.loads((tmp_path / "config.json").read_text())["commits"]
    assert commits == {config.Settings().generator.checkpoint: "a" * 40, "checkpoints/blip2-stage1": "v1"}


MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")
BUG = jax.errors.JaxRuntimeError("INTERNAL: bug")


def test_too_little_memory(tmp_path, capsys):
    """Halved once for each size, and told; nothing is lost. With one image at once it is the end."""
    prompts = [f"--prompt={n}" for n in range(4)]
    code, engine = execute(*prompts, f"--workdir={tmp_path / 'cut'}", failures={2: MEMORY})
    assert code == 0 and [len(items) for items in engine.begun] == [3, 1, 1, 1, 1]
    assert capsys.readouterr().out.count("memory is too small, going on with --config.batch_size=1") == 1
    execute(*prompts, f"--workdir={tmp_path / 'whole'}")
    assert colours(tmp_path / "cut") == colours(tmp_path / "whole")
    code, engine = execute("--prompt=one", f"--workdir={tmp_path / 'small'}", failures={1: MEMORY, 2: MEMORY})
    assert code == 1 and len(engine.begun) == 2
    assert (
        "memory is too small even for --config.batch_size=1 (--config.remat=full needs least); the finished images"
        in capsys.readouterr().err
    )


def test_a_batch_that_is_chosen_is_no_larger_than_what_there_is_to_do(tmp_path):
    for count, begun in ((2, [2]), (5, [3, 2])):
        asked = [f"--prompt={n}" for n in range(count)]
        code, engine = execute(*asked, "--config.batch_size=0", f"--workdir={tmp_path / str(count)}")
        assert code == 0 and [len(items) for items in engine.begun] == begun
        assert engine.batch_size == min(3, count)


def test_a_device_that_fails(tmp_path, monkeypatch, capsys):
    """A batch is tried once more in a fresh process, then left out, and the others are made; the same command tries it again."""
    bad, engines = ["3"], []

    class Engine(FakeInverter):
        def advance(self, batch):
            if set(bad) & {item.prompt for item in batch.items}:
                raise BUG
            return super().advance(batch)

    def load(settings):
        engines.append(Engine(settings))
        return engines[-1]

    def begin_anew(tried):
        left = {"once": sorted(tried.once), "failed": sorted(tried.failed), "in_a_row": tried.in_a_row}
        monkeypatch.setenv(trouble.VARIABLE, json.dumps(left))
        return run.main(asked, load=load, begin_anew=begin_anew)

    asked = command("--config.steps=25", *[f"--prompt={n}" for n in range(8)], f"--workdir={tmp_path}")
    assert run.main(asked, load=load, begin_anew=begin_anew) == 1
    made = [[item.prompt for items in engine.begun for item in items] for engine in engines]
    assert made == [["0", "1", "2", "3", "4", "5"], ["3", "4", "5"], ["6", "7"]]
    assert sorted(json.loads(line)["text"] for line in open(tmp_path / "metadata.jsonl")) == ["0", "1", "2", "6", "7"]
    told = [(x["event"], len(x["items"])) for x in lines(tmp_path / "log.jsonl") if x["event"].endswith("failed")]
    assert told == [("device failed", 3), ("device failed", 3), ("failed", 3)]
    err = capsys.readouterr().err
    assert err.count("the device failed (INTERNAL: bug) at 3 images; a fresh process goes on") == 2
    assert "error: the device failed twice at 3 images, which the same command tries again: 3-" in err
    monkeypatch.delenv(trouble.VARIABLE)
    bad.clear()
    assert run.main(asked, load=load) == 0 and len(pixels(tmp_path)) == 8


def test_a_device_that_always_fails_ends_the_run(tmp_path, monkeypatch, capsys):
    """After two batches that failed twice, without an image between them."""
    count = []

    def begin_anew(tried):
        count.append(tried)
        left = {"once": sorted(tried.once), "failed": sorted(tried.failed), "in_a_row": tried.in_a_row}
        monkeypatch.setenv(trouble.VARIABLE, json.dumps(left))
        return again()

    prompts = [f"--prompt={n}" for n in range(50)]
    asked = command("--config.steps=25", *prompts, f"--workdir={tmp_path}")
    again = lambda: run.main(asked, load=lambda s: FakeInverter(s, {1: BUG}), begin_anew=begin_anew)  # noqa: E731
    assert again() == 1 and len(count) == 3
    assert "the device fails at whatever it is given (INTERNAL: bug); the finished images" in capsys.readouterr().err
    monkeypatch.delenv(trouble.VARIABLE)
    distributed = dataclasses.replace(asked, distributed=True)
    assert run.main(distributed, load=lambda s: FakeInverter(s, {1: BUG}), begin_anew=None) == 1


def test_what_hangs_ends(tmp_path):
    """And says who and at what; a second process makes its share as ever, a restart the rest."""
    arguments = [f"--prompt={n}" for n in range(6)] + [f"--workdir={tmp_path}", "--shard_count=2"]
    script = (
        "import sys, time\n"
        "from tests import test_run\n"
        "advance = test_run.FakeInverter.advance\n"
        "test_run.FakeInverter.advance = lambda *x: x[0].calls and time.sleep(1000) or advance(*x)\n"
        f"sys.exit(test_run.execute('--config.stall_seconds=2', *{arguments}, '--shard_index=0')[0])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert execute(*arguments, "--shard_index=1")[0] == 0 and len(pixels(tmp_path)) == 3
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 1
    assert (
        f"error: {disk.HOST}: nothing has moved for 2 s, at 0-" in err
        and "in advance" not in err.partition("Thread")[0]
    )
    (stalled,) = [x for x in lines(tmp_path / "log.jsonl") if x["event"] == "stalled"]
    assert stalled["host"] == disk.HOST and "and 2 others" in stalled["at"]
    assert execute(*arguments, "--shard_index=0")[0] == 0 and len(pixels(tmp_path)) == 6


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_stop_is_obeyed_after_the_chunk(tmp_path, capsys, call):
    """What is in flight is saved, and goes on in the middle; only a batch that is at its end is finished first."""
    arguments = [f"--prompt={n}" for n in range(4)]
    stop = generation.Stop()
    end = lambda: setattr(stop, "number", signal.SIGTERM)  # noqa: E731
    code, engine = execute(*arguments, f"--workdir={tmp_path / 'cut'}", failures={call: end}, stop=stop)
    assert code == 143 and engine.calls == call
    assert capsys.readouterr().err.endswith("and the same command continues\n")
    assert len(pixels(tmp_path / "cut")) == (3 if call > 2 else 0)
    code, engine = execute(*arguments, f"--workdir={tmp_path / 'cut'}")
    names = [queue.Item(str(n), 0) for n in range(4)]
    resumed = {1: [(tuple(names[:3]), 10)], 2: [(tuple(names[:3]), 20)], 3: [], 4: [(tuple(names[3:]), 10)]}[call]
    assert code == 0 and engine.resumed == resumed
    assert sum(map(len, engine.begun)) == 4 - (3 if call > 2 else 0) - sum(len(items) for items, _ in resumed)
    execute(*arguments, f"--workdir={tmp_path / 'whole'}")
    assert colours(tmp_path / "cut") == colours(tmp_path / "whole")
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_checkpoints_of_another_number_of_processes_go_on(tmp_path):
    """Each process takes the rows that are its own; what all have done is forgotten."""
    arguments = [f"--prompt={n}" for n in range(3)]
    stop = generation.Stop()
    end = lambda: setattr(stop, "number", signal.SIGTERM)  # noqa: E731
    execute(*arguments, f"--workdir={tmp_path}", failures={1: end}, stop=stop)
    items = [queue.Item(str(n), 0) for n in range(3)]
    for index, own in enumerate([(items[0], items[2]), (items[1],)]):
        code, engine = execute(*arguments, f"--workdir={tmp_path}", f"--shard_index={index}", "--shard_count=2")
        assert code == 0 and engine.resumed == [(own, 10)] and not engine.begun
        assert (tmp_path / "checkpoints").exists() == (index == 0)
    assert len(pixels(tmp_path)) == 3


def test_workers_that_come_and_go(tmp_path, monkeypatch):
    """What another worker holds is waited for; what its silence gives up is taken over."""
    monkeypatch.setattr(queue, "WAIT", 0.05)
    execute("--prompt=3", f"--workdir={tmp_path}")
    other = queue.Claims(tmp_path / "claims", 900)
    item = queue.Item("1", 0)
    assert other.take(item)
    begun = time.time()
    os.utime(tmp_path / "claims" / f"{item.id}.claim", (begun - 2, begun - 2))
    arguments = [f"--prompt={n}" for n in range(3)]
    code, engine = execute(*arguments, f"--workdir={tmp_path}", "--claim", "--claim_expiry=3")
    assert code == 0 and engine.begun == [(queue.Item("0", 0), queue.Item("2", 0)), (item,)]
    assert time.time() - begun > 0.9
    assert not (tmp_path / "claims").exists()
    other.close()


@pytest.mark.parametrize("arguments", [["--shard_index=2", "--shard_count=2"], ["--claim", "--shard_count=2"]])
def test_impossible_shares(arguments):
    with pytest.raises(commands.CommandError, match="shard_(index|count)"):
        command("--prompt=one", *arguments)


def shown(path):
    """Id -> colour of all finished images, wherever they are."""
    records = outputs.read_journal(path)
    return {x["id"]: formats.read_image(path / x["file_name"]).getpixel((0, 0)) for x in records}


@pytest.mark.parametrize("form", ["webp", "webdataset"])
@pytest.mark.parametrize("call", [1, 4, 6])
def test_other_formats_lose_nothing_either(tmp_path, form, call):
    arguments = *(f"--prompt={n}" for n in range(5)), f"--config.outputs.format={form}", "--config.outputs.shard_size=2"
    execute(*arguments, f"--workdir={tmp_path / 'whole'}")
    work = tmp_path / "cut"
    code, _ = execute(*arguments, f"--workdir={work}", failures={call: OSError(5, "Input/output error")})
    assert code == 1 and len(shown(work)) == (3 if call > 3 else 0)
    code, engine = execute(*arguments, f"--workdir={work}")
    assert code == 0 and sum(map(len, engine.begun)) == (2 if call > 3 else 5)
    assert len(shown(work)) == 5 and shown(work) == shown(tmp_path / "whole")
    assert (work / "contact_sheet.png").is_file()
    assert [x.name for x in (work / ("images" if form == "webdataset" else "shards")).glob("*")] == []


@pytest.mark.parametrize("form", ["png", "webdataset"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_processes_share_a_directory(tmp_path, form, order):
    """Each makes its share; the journals are joined by whoever ends last."""
    arguments = *(f"--prompt={n}" for n in range(5)), f"--config.outputs.format={form}", f"--workdir={tmp_path}"
    for index in order:
        assert execute(*arguments, f"--shard_index={index}", "--shard_count=2")[0] == 0
    assert len(shown(tmp_path)) == len(lines(tmp_path / "metadata.jsonl")) == 5
    assert [x.name for x in tmp_path.glob("metadata*")] == ["metadata.jsonl"]
    assert execute(*arguments) == (0, None)


def test_workers_do_not_wait_for_what_is_in_each_others_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "WAIT", 0.05)
    arguments = *(f"--prompt={n}" for n in range(9)), f"--workdir={tmp_path}", "--config.outputs.format=webdataset"
    codes = []
    workers = [threading.Thread(target=lambda: codes.append(execute(*arguments, "--claim")[0])) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert codes == [0, 0] and len(shown(tmp_path)) == 9
    assert not (tmp_path / "claims").exists()


def test_a_disk_without_room_is_refused_before_weights_are_loaded(small_disk, capsys):
    work = small_disk(500) / "run"
    code, engine = execute("--prompt=one", "--samples=500", f"--workdir={work}")
    assert (code, engine) == (2, None)
    err = capsys.readouterr().err
    assert err.startswith(f"error: {work} has ") and "and 500 images need about" in err and err.count("\n") == 1


@pytest.mark.parametrize("form", ["png", "webdataset"])
def test_a_disk_that_fills_while_images_are_made(small_disk, capsys, form):
    """It ends cleanly, tells the path, and goes on when there is room."""
    path = small_disk(4000)
    arguments = *(f"--prompt={n}" for n in range(5)), f"--workdir={path / 'run'}", f"--config.outputs.format={form}"
    arguments += "--config.image_size=64", "--config.outputs.shard_size=2"

    def fill():
        with open(path / "other", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def filled():
        with pytest.raises(OSError):
            fill()

    code, _ = execute(*arguments, failures={4: filled})
    err = capsys.readouterr().err
    assert code == 1 and f"No space left on device: '{path / 'run'}" in err and err.count("\n") == 1
    assert err.endswith("the same command continues\n")
    assert all(json.loads(line) for line in (path / "run" / "metadata.jsonl").read_text().splitlines())
    (path / "other").unlink()
    code, engine = execute(*arguments)
    assert code == 0 and len(shown(path / "run")) == 5 == len(lines(path / "run" / "metadata.jsonl"))
    assert [x for x in (path / "run").rglob("*") if x.name.startswith(".")] == []


def test_trajectories(tmp_path):
    execute("--prompt=one", "--config.outputs.trajectory=True", f"--workdir={tmp_path}")
    with Image.open(tmp_path / "trajectories" / f"{queue.Item('one', 0).id}.webp") as image:
        assert (image.n_frames, image.size) == (3, (8, 8))


def test_a_progress_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    execute("--prompt=one", f"--workdir={tmp_path}")
    err = capsys.readouterr().err
    assert "1/1 images" in err and "25/25" in err and "loss 22" in err
    assert "nan" not in err  # of what was not measured nothing is shown


def test_flags_change_the_config(tmp_path):
    asked = command(
        "--prompt=a", "--samples=3", "--seed=9", "--config.sds.guidance=7", "--config.views.affine_translate=0.1,0.2"
    )
    assert (asked.settings.samples, asked.settings.seed, asked.settings.sds.guidance) == (3, 9, 7.0)
    assert asked.settings.views.affine_translate == (0.1, 0.2)
    assert asked.workdir == pathlib.Path("runs", f"paper-{config.fingerprint(asked.settings)[:8]}")
    assert command("--prompt=a", "--workdir=x").workdir == pathlib.Path("x")
    asked = command(path=ROOT / "configs" / "shapes.py")
    assert (asked.entries[0].text, asked.entries[0].where) == (asked.settings.prompts[0], "prompt 1 of the config")
    assert command("--prompt=b", path=ROOT / "configs" / "shapes.py").entries[0].text == "b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.stepz=3"], "stepz is not a setting; did you mean steps?"),
        (["--config.sds.guidanse=3"], "sds.guidanse is not a setting; did you mean sds.guidance?"),
        (["--config.referees[0].rolle=held_out"], "referees[0].rolle is not a setting; did you mean referees[0].role?"),
        (["--config.steps=many"], "steps = 'many' is not possible: invalid literal for int()"),
        (["--config.steps=0"], "steps = 0 is not possible: it must be at least 1"),
        (["--seed=-1"], "seed = -1 is not possible: it must be at least 0"),
        (["--samples=two"], "flag --samples=two: invalid literal for int()"),
        (["--promt=a"], "Unknown command line flag 'promt'. Did you mean: prompt"),
        (["a", "cat"], "unexpected argument 'a'; prompts are given with --prompt or --prompts"),
        (["--config.referees[3].name=clip"], "referees[3].name cannot be set: tuple index out of range"),
        (["--config.referees[0].losses.l2=1"], "referees[0].losses.l2 cannot be set: "),
        (["--config.ema=3"], "ema = '3' is not possible: "),
        (["--prompts=none.txt"], "the prompt file none.txt cannot be read: No such file or directory"),
    ],
)
def test_mistakes_in_the_command(arguments, message):
    with pytest.raises(ValueError) as caught:
        command(*arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_prompts_are_needed(capsys, tmp_path):
    """Of who wants images; what a config costs, and whether a machine is fit for it, can be asked without."""
    asked = command(f"--workdir={tmp_path / 'none'}")
    assert run.main(asked) == 2 and not asked.workdir.exists()
    assert "there are no prompts; give --prompts=FILE, --prompt=TEXT or config.prompts" in capsys.readouterr().err


def test_a_config_is_needed():
    values = flags.FlagValues()
    with pytest.raises(commands.CommandError, match="--config is missing, for example --config=configs/shapes.py"):
        commands.parse_flags(["run", "--prompt=a"], values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the config file cannot be read: No such file or directory: "),
        ("x = (", "the config file fails: '(' was never closed (mine.py, line 5)"),
        ("settings.stepz = 3", "stepz is not a setting; did you mean steps?"),
        ("settings.steps = 'a'", "the config file fails: TypeError: "),
        (
            "config.referee(rolle='a')",
            "the config file fails: referee.rolle is not a setting; did you mean referee.role?",
        ),
    ],
)
def test_mistakes_in_the_config_file(tmp_path, text, message):
    file = tmp_path / "mine.py"
    if text is not None:
        body = f"    settings = config.default()\n    {text}\n    return settings\n"
        file.write_text(f"from referee_jax import config\n\ndef get_config():\n{body}")
    with pytest.raises(commands.CommandError) as caught:
        command("--prompt=a", path=file)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def program(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "referee_jax.run", *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        timeout=300,
        **options,
    )


def test_the_program_fails_without_a_traceback(tmp_path):
    done = program("--config=configs/paper.py", "--config.sds.guidanse=3", capture_output=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: sds.guidanse is not a setting; did you mean sds.guidance?\n"


def test_nobody_reads(tmp_path):
    # `... | head -0`: the pipe is closed before the first word.
    script = (
        "import pathlib, sys, time\n"
        "from tests import test_run\n"
        "sys.stdin.read()\n"
        f"sys.exit(test_run.execute('--prompt=one', '--prompt=two', '--prompt= ', '--workdir={tmp_path}')[0])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    process.stdin.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=300) == 0, err
    assert "Traceback" not in err and "BrokenPipe" not in err
    assert len(pixels(tmp_path)) == 2


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_signals(tmp_path, sent, code):
    arguments = [f"--prompt={n}" for n in range(9)]
    script = (
        "import signal, sys, time\n"
        # A shell's background job starts with Ctrl-C ignored, and so would its children.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tests import test_run\n"
        "from referee_jax import generation, run\n"
        "advance = test_run.FakeInverter.advance\n"
        "test_run.FakeInverter.advance = lambda *x: time.sleep(0.1) or advance(*x)\n"
        "stop = generation.Stop()\n"
        "run.catch_signals(stop)\n"
        f"sys.exit(test_run.execute('--workdir={tmp_path / 'cut'}', *{arguments}, stop=stop)[0])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    journal, end = tmp_path / "cut" / "metadata.jsonl", time.monotonic() + 200
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 3) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(sent)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == code, err
    assert "Traceback" not in err
    execute(*arguments, f"--workdir={tmp_path / 'cut'}")
    execute(*arguments, f"--workdir={tmp_path / 'whole'}")
    assert len(colours(tmp_path / "cut")) == 9 and colours(tmp_path / "cut") == colours(tmp_path / "whole")
    assert len(lines(journal)) == 9
    starts = [x["event"] for x in lines(tmp_path / "cut" / "log.jsonl")].count("start")
    assert starts == 2


def test_outputs_are_what_the_engine_gave(tmp_path):
    execute("--prompt=one", "--seed=5", "--config.outputs.stretch=False", f"--workdir={tmp_path}")
    name = queue.Item("one", 0).id
    assert colours(tmp_path)[f"{name}.png"] == tuple(hashlib.sha256(b"one 0 5").digest()[:3])
    assert formats.read_settings(tmp_path / "images" / f"{name}.png")["settings"]["steps"] == 25


def test_estimate_needs_no_prompts_weights_or_directory(tmp_path):
    """The whole command in a process of its own, where there is neither a checkpoint nor a network."""
    arguments = [
        "-m",
        "referee_jax.run",
        f"--config={ROOT / 'configs' / 'shapes.py'}",
        "--estimate",
        "--config.prompts=()",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("U-Net", "clip: forward + backward", "each image at once", "TPU v5e"):
        assert word in done.stdout
    assert not any(tmp_path.iterdir())


def test_an_estimate_that_cannot_be_made_is_a_sentence(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    asked = command("--estimate", f"--config.referees[0].checkpoint={tmp_path}", f"--workdir={tmp_path / 'run'}")
    assert run.main(asked, work=run.estimate) == 2
    assert "preprocessor_config.json is missing" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_warmup_compiles_and_writes_nothing(tmp_path, capsys):
    engines = []
    load = lambda settings: engines.append(FakeInverter(settings)) or engines[-1]  # noqa: E731
    asked = command("--warmup", "--seed=3", f"--workdir={tmp_path / 'run'}")
    before = jax.config.jax_compilation_cache_dir  # whoever runs the tests may have one
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert run.main(asked, load=load, work=run.warm_up) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    (engine,) = engines
    assert engine.calls == 1 and len(engine.begun) == 1 and not (tmp_path / "run").exists()
    out = capsys.readouterr().out
    assert "compiled in 0 s" in out and "JAX_COMPILATION_CACHE_DIR names no directory" in out
