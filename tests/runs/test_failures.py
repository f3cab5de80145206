"""Devices, disks, signals and processes that fail: nothing is lost."""

import json
import signal
import subprocess
import sys
import time

import fsspec
import jax
import pytest

from referee_jax import run
from referee_jax.hardware import processes
from referee_jax.items import Item
from referee_jax.runs import worker as worker_lib
from tests.fakes import ROOT, FakeInverter, colours, command, execute, lines, pixels, shown

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
    code, engine = execute(*prompts[:2], f"--workdir={tmp_path / 'small'}", failures={1: MEMORY, 2: MEMORY})
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


class Fails(FakeInverter):
    """Fails at the end of each batch with one of the `bad` prompts."""

    bad = ("3",)

    def advance(self, batch):
        if batch.step == 20 and set(self.bad) & {item.prompt for item in batch.items}:
            raise BUG
        return super().advance(batch)


def with_restarts(*arguments, load):
    """The exit code of a command whose restarts are calls, and the commands."""
    commands = []

    def restart(**flags):
        commands.append(command("--config.steps=25", *arguments, *[f"--{name}={x}" for name, x in flags.items()]))
        return run.main(commands[-1], load=load, restart=restart)

    return restart(), commands


def failed(file):
    """The lines of a log about device failures: event and number of items."""
    return [(x["event"], len(x["items"])) for x in lines(file) if x["event"].endswith("failed")]


def test_a_device_that_fails(tmp_path, capsys):
    """A batch is made last in a new process, and left out if it fails again; the same command tries it once more."""
    engines = []

    def load(settings):
        engines.append(Fails(settings))
        return engines[-1]

    arguments = *(f"--prompt={n}" for n in range(8)), f"--workdir={tmp_path}"
    assert with_restarts(*arguments, load=load)[0] == 1
    batches = [["".join(item.prompt for item in items) for items in engine.begun] for engine in engines]
    assert batches == [["012", "345"], ["67", "345"]]
    assert sorted(line["text"] for line in lines(tmp_path / "metadata.jsonl")) == ["0", "1", "2", "6", "7"]
    assert failed(tmp_path / "log.jsonl") == [("device failed", 3), ("device failed", 3), ("failed", 3)]
    assert (tmp_path / "contact_sheet.png").is_file() and lines(tmp_path / "log.jsonl")[-2]["event"] == "end"
    err = capsys.readouterr().err
    assert err.count("the device failed (INTERNAL: bug) at 3 images; a new process goes on") == 1
    assert "error: the device failed twice at 3 images, which the same command tries again: 3-" in err
    assert execute(*arguments)[0] == 0 and len(pixels(tmp_path)) == 8


def test_a_device_that_fails_once(tmp_path):
    """Costs a restart, and nothing else."""
    failures = [{2: BUG}, {}]
    arguments = *(f"--prompt={n}" for n in range(4)), f"--workdir={tmp_path / 'cut'}"
    code, commands = with_restarts(*arguments, load=lambda settings: FakeInverter(settings, failures.pop(0)))
    assert code == 0 and [x.retries for x in commands] == [1, 0]
    execute(*arguments[:-1], f"--workdir={tmp_path / 'whole'}")
    assert colours(tmp_path / "cut") == colours(tmp_path / "whole")


def test_a_launcher_goes_on(tmp_path, capsys):
    """It starts the command again while the code is 75: what the device failed at comes last, or is left out."""
    arguments = (
        "--config.checkpoint_seconds=1e-9",
        f"--workdir={tmp_path}",
        *(f"--prompt={n}" for n in range(12)),
        "--retries=0",
    )
    load = type("Fails", (Fails,), {"bad": ("3", "9")})
    codes = [with_restarts(*arguments, load=load) for _ in range(4)]
    assert [code for code, _ in codes] == [75, 75, 75, 1] and all(len(commands) == 1 for _, commands in codes)
    made = sorted(line["text"] for line in lines(tmp_path / "metadata.jsonl"))
    assert made == ["0", "1", "2", "6", "7", "8"] and (tmp_path / "checkpoints").exists()
    err = capsys.readouterr().err
    assert err.count("error: the device failed (INTERNAL: bug) at 3 images; the finished images are in") == 3
    assert err.count("and the same command continues") == 3 and "the device failed twice at 6 images" in err
    assert execute(*arguments)[0] == 0 and len(pixels(tmp_path)) == 12


def test_a_device_that_fails_at_a_run_in_a_bucket(capsys):
    """What one process has sent of its log, the next one reads; each has a directory of its own."""
    url = "memory://failing/run"
    arguments = *(f"--prompt={n}" for n in range(8)), f"--workdir={url}"
    assert with_restarts(*arguments, load=Fails)[0] == 1
    fs = fsspec.filesystem("memory")
    journal = fs.cat_file("/failing/run/metadata.jsonl").splitlines()
    assert sorted(json.loads(line)["text"] for line in journal) == ["0", "1", "2", "6", "7"]
    assert "the device failed twice at 3 images" in capsys.readouterr().err
    assert execute(*arguments)[0] == 0 and len(fs.ls("/failing/run/images")) == 8
    fs.rm("/failing", recursive=True)


def test_a_device_that_always_fails_ends_the_run(tmp_path, capsys):
    """After four batches without an image in between, in one command or in as many as a launcher starts."""
    arguments = [f"--prompt={n}" for n in range(50)]
    load = lambda settings: FakeInverter(settings, {1: BUG})
    code, commands = with_restarts(*arguments, "--retries=9", f"--workdir={tmp_path / 'one'}", load=load)
    assert code == 1 and [x.retries for x in commands] == [9, 8, 7, 6]
    assert "the device fails at whatever it is given (INTERNAL: bug); the finished images" in capsys.readouterr().err
    many = *arguments, "--retries=0", f"--workdir={tmp_path / 'many'}"
    assert [with_restarts(*many, load=load)[0] for _ in range(8)] == [75, 75, 75, 1] * 2
    assert execute(*many)[0] == 0 and len(pixels(tmp_path / "many")) == 50


def test_no_new_process_can_be_started(tmp_path, capsys):
    def refused(**flags):
        raise OSError(7, "Argument list too long")

    asked = command("--prompt=one", f"--workdir={tmp_path}")
    assert run.main(asked, load=lambda s: FakeInverter(s, {1: BUG}), restart=refused) == 75
    assert "no new process can be started ([Errno 7] Argument list too long)" in capsys.readouterr().err


def test_a_stop_that_came_before_the_device_failed_is_obeyed(tmp_path, capsys):
    stop = worker_lib.Stop()

    def fail():
        stop.number = signal.SIGTERM
        raise BUG

    asked = command("--prompt=one", f"--workdir={tmp_path}")
    for _ in range(2):  # when it is tried again, and when nothing else is left
        assert run.main(asked, load=lambda s: FakeInverter(s, {1: fail}), stop=stop, restart=None) == 143
        assert "interrupted" in capsys.readouterr().err


def test_a_new_run_is_restarted(tmp_path):
    """With --resume=never, too: the run that is there is its own."""
    failures = [{1: BUG}, {}]
    arguments = "--prompt=one", f"--workdir={tmp_path}", "--resume=never"
    code, commands = with_restarts(*arguments, load=lambda settings: FakeInverter(settings, failures.pop(0)))
    assert code == 0 and [x.resume for x in commands] == ["never", "auto"]
    assert len(pixels(tmp_path)) == 1
    assert run.main(command(*arguments), load=FakeInverter) == 2


def test_what_hangs_ends(tmp_path):
    """And says who and at what; a second process makes its share as ever, a restart the rest."""
    arguments = [f"--prompt={n}" for n in range(6)] + [f"--workdir={tmp_path}", "--shard_count=2"]
    script = (
        "import sys, time\n"
        "from tests import fakes\n"
        "advance = fakes.FakeInverter.advance\n"
        "fakes.FakeInverter.advance = lambda *x: x[0].calls and time.sleep(1000) or advance(*x)\n"
        f"sys.exit(fakes.execute('--config.stall_seconds=2', *{arguments}, '--shard_index=0')[0])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert execute(*arguments, "--shard_index=1")[0] == 0 and len(pixels(tmp_path)) == 3
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 1
    assert (
        f"error: {processes.HOST}: nothing has moved for 2 s, at 0-" in err
        and "in advance" not in err.partition("Thread")[0]
    )
    (stalled,) = [x for x in lines(tmp_path / "log.jsonl") if x["event"] == "stalled"]
    assert stalled["host"] == processes.HOST and "and 2 others" in stalled["at"]
    assert execute(*arguments, "--shard_index=0")[0] == 0 and len(pixels(tmp_path)) == 6


def test_checkpoints_of_another_number_of_processes_go_on(tmp_path):
    """Each process takes the rows that are its own; what all have done is forgotten."""
    arguments = [f"--prompt={n}" for n in range(3)]
    stop = worker_lib.Stop()
    end = lambda: setattr(stop, "number", signal.SIGTERM)
    execute(*arguments, f"--workdir={tmp_path}", failures={1: end}, stop=stop)
    items = [Item(str(n), 0) for n in range(3)]
    for index, own in enumerate([(items[0], items[2]), (items[1],)]):
        code, engine = execute(*arguments, f"--workdir={tmp_path}", f"--shard_index={index}", "--shard_count=2")
        assert code == 0 and engine.resumed == [(own, 10)] and not engine.begun
        assert (tmp_path / "checkpoints").exists() == (index == 0)
    assert len(pixels(tmp_path)) == 3


@pytest.mark.parametrize("form", ["png", "webdataset"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_processes_share_a_directory(tmp_path, form, order):
    """Each makes its share; the journals are joined by whoever ends last."""
    arguments = *(f"--prompt={n}" for n in range(5)), f"--config.outputs.format={form}", f"--workdir={tmp_path}"
    for index in order:
        assert execute(*arguments, f"--shard_index={index}", "--shard_count=2")[0] == 0
    assert len(shown(tmp_path)) == len(lines(tmp_path / "metadata.jsonl")) == 5
    assert [x.name for x in tmp_path.glob("metadata*.jsonl")] == ["metadata.jsonl"]
    assert execute(*arguments) == (0, None)


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


def test_a_python_that_cannot_end_is_ended_by_the_kernel(tmp_path):
    """While its objects are taken away no thread of it runs any more, and one of them may never come to an end."""
    script = (
        "import os, signal, time\n"
        "from referee_jax import run\n"
        "from referee_jax.runs import worker\n"
        "class Stuck:\n"
        "    def __del__(self, sleep=time.sleep): sleep(1000)\n"
        "stuck, stop, run.GRACE = Stuck(), worker.Stop(), 1.0\n"
        "run.catch_signals(stop)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "while not stop(): time.sleep(0.01)\n"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGALRM  # which a shell calls 142
    assert b"SIGTERM: ending" in done.stderr and time.monotonic() - begun < 60


def test_nobody_reads(tmp_path):
    # `... | head -0`: the pipe is closed before the first word.
    script = (
        "import pathlib, sys, time\n"
        "from tests import fakes\n"
        "sys.stdin.read()\n"
        f"sys.exit(fakes.execute('--prompt=one', '--prompt=two', '--prompt= ', '--workdir={tmp_path}')[0])\n"
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
        "from tests import fakes\n"
        "from referee_jax import run\n"
        "from referee_jax.runs import worker\n"
        "advance = fakes.FakeInverter.advance\n"
        "fakes.FakeInverter.advance = lambda *x: time.sleep(0.1) or advance(*x)\n"
        "stop = worker.Stop()\n"
        "run.catch_signals(stop)\n"
        f"sys.exit(fakes.execute('--workdir={tmp_path / 'cut'}', *{arguments}, stop=stop)[0])\n"
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
