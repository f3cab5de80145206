"""Items at which a device failed, restarts, and the watchdog."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import hypothesis.strategies as st
from hypothesis import given, settings

from referee_jax import items as items_lib
from referee_jax.hardware import processes
from referee_jax.runs import job, recovery
from referee_jax.storage import files, local

ROOT = pathlib.Path(__file__).parents[2]
ITEMS = items_lib.expand(list("abcdef"), 2)


class Run:
    """The log of a run."""

    def __init__(self, path):
        self.path = path
        self.storage = local.Disk(path)

    def log(self, event, **values):
        files.append(self.path / "log.jsonl", {"event": event, "time": files.now(), **values})


BATCHES = st.lists(st.tuples(st.sets(st.sampled_from(ITEMS), min_size=1), st.integers(0, 2)), max_size=20)


@given(BATCHES)
@settings(deadline=None)
def test_each_failure_is_one_step_further(failures):
    """Whatever batches fail: an item is left out after two of them, so a run ends; once reported, all are tried again."""
    with tempfile.TemporaryDirectory() as directory:
        run, failed = Run(pathlib.Path(directory)), []
        for items, images in failures:
            todo = job.select(ITEMS, (), recovery.Failures.read(run))
            items = [item for item in todo.items if item in items]
            if items:
                failed += items
                ids = [item.id for item in items]
                run.log("device failed", host=processes.HOST, items=ids, images=images, error="INTERNAL")
        todo = job.select(ITEMS, (), recovery.Failures.read(run))
        for count, group in enumerate((todo.new, todo.again, todo.failed)):
            assert group == [item for item in ITEMS if failed.count(item) == count]
        recovery.log_failed(run, ITEMS)
        assert job.select(ITEMS, (), recovery.Failures.read(run)) == job.Todo(ITEMS, [], [])


def test_failures_in_a_row(tmp_path):
    """Of this host, since an image was made, or the end of a run in which one was."""
    run = Run(tmp_path)
    assert recovery.Failures.read(run).in_a_row == 0
    expected = []
    for event, host, images in (
        ("device failed", processes.HOST, 0), ("device failed", processes.HOST, 0), ("device failed", "other", 7),
        ("failed", "other", 0), ("end", processes.HOST, 0), ("device failed", processes.HOST, 3),
        ("device failed", processes.HOST, 0), ("end", processes.HOST, 1), ("device failed", processes.HOST, 0),
        ("failed", processes.HOST, 0),
    ):  # fmt: skip
        run.log(event, host=host, images=images, items=["any"])
        expected.append(recovery.Failures.read(run).in_a_row)
    assert expected == [1, 2, 2, 2, 2, 1, 2, 0, 1, 0]


def test_a_restart_is_this_command_again(tmp_path):
    """With the same process id, other flags, and without the open files of the process before."""
    script = tmp_path / "again.py"
    script.write_text(
        "import os, sys\n"
        "from referee_jax.runs import recovery\n"
        "print(os.getpid(), sys.argv[1:], len(os.listdir('/proc/self/fd')), sep=';', flush=True)\n"
        "for fd in [os.open('/dev/null', os.O_RDONLY) for _ in range(50)]: os.set_inheritable(fd, True)\n"
        "retries = int(sys.argv[-1].removeprefix('--retries='))\n"
        "if retries: recovery.restart(retries=retries - 1)\n"
        "sys.exit(75)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), "--prompt=x y", "--retries=2"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    first, second, third = (line.split(";") for line in done.stdout.splitlines())
    assert first[0] == second[0] == third[0]
    assert [x[1] for x in (first, second, third)] == [f"['--prompt=x y', '--retries={n}']" for n in (2, 1, 0)]
    assert int(third[2]) <= int(first[2])


def test_the_watchdog():
    told, ended = [], []
    dog = recovery.Watchdog(0.2, told.append, end=ended.append)
    with dog.watching():
        for _ in range(8):
            time.sleep(0.05)
            dog.moved()
        assert not ended
        time.sleep(1)
    assert ended == [1] and told[0] > 0.2


def test_the_watchdog_bites_whatever_becomes_of_its_bark(monkeypatch):
    """A disk that is full or hangs lets nobody tell of it."""
    monkeypatch.setattr(recovery, "LAST", 0.1)
    for bark in (lambda seconds: 1 / 0, lambda seconds: time.sleep(1000)):
        ended = []
        with recovery.Watchdog(0.05, bark, end=ended.append).watching():
            time.sleep(0.6)
        assert ended == [1]


def test_how_long_it_waits():
    """An hour, or ten times as long as it ever took; and longer for what is compiled."""
    dog = recovery.Watchdog(0, print)
    assert dog.limit == 6 * recovery.HOUR
    dog._ticks += 20
    dog.moved()
    assert dog.limit == recovery.HOUR
    dog._ticks += 5000
    dog._mark = dog._ticks
    dog._ticks += 1000
    dog.moved()
    dog.moved()
    assert dog.limit == 10_000


def test_who_was_stopped_has_not_hung():
    """SIGSTOP, a laptop's night: the time does not count."""
    script = (
        "import sys, time\n"
        "from referee_jax.runs import recovery\n"
        "with recovery.Watchdog(2, lambda seconds: None).watching() as dog:\n"
        "    print('begun', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(60) == 0
