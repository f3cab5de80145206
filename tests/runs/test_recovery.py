"""What becomes of what a device fails at, and the watch over what hangs."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import hypothesis.strategies as st
from hypothesis import given

from referee_jax import items as items_lib
from referee_jax.runs import recovery

ROOT = pathlib.Path(__file__).parents[2]
ITEMS = items_lib.expand(list("abcdef"), 2)


@given(st.lists(st.tuples(st.sets(st.sampled_from(ITEMS), min_size=1), st.integers(0, 2)), max_size=20))
def test_each_failure_is_one_step_further(failures):
    """Whatever batches there are: an item is failed when it was in two of them; so a run comes to its end."""
    tried, seen = recovery.Tried(), []
    for items, made in failures:
        before = len(tried.once) + len(tried.failed)
        items = [item for item in items if not tried.says(item)]
        if not items:
            continue
        seen += items
        tried = tried.after(recovery.DeviceFailed(items, made, "INTERNAL"))
        assert len(tried.once) + len(tried.failed) > before
    assert [tried.says(item) for item in ITEMS] == [seen.count(item) == 2 for item in ITEMS]


def test_a_fresh_process_is_this_command_once_more(tmp_path):
    """With the same number, knowing what was tried, and without the open files of the one before."""
    script = tmp_path / "again.py"
    script.write_text(
        "import os, sys\n"
        "from referee_jax import items\n"
        "from referee_jax.runs import recovery\n"
        "tried = recovery.Tried.read()\n"
        "print(os.getpid(), sys.argv[1:], len(tried.once), len(tried.failed), len(os.listdir('/proc/self/fd')), flush=True)\n"
        "keep = [os.open('/dev/null', os.O_RDONLY) for _ in range(50)]\n"
        "for fd in keep: os.set_inheritable(fd, True)\n"
        "if len(tried.failed) < 2:\n"
        "    recovery.begin_anew(tried.after(recovery.DeviceFailed(items.expand(['a', 'b'], 1), 0, '')))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), "--prompt=x y"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, second, third = done.stdout.splitlines()
    assert first.split()[0] == second.split()[0] == third.split()[0] and "['--prompt=x y']" in third
    assert [line.split()[-3:-1] for line in (first, second, third)] == [["0", "0"], ["2", "0"], ["2", "2"]]
    assert int(third.split()[-1]) <= int(first.split()[-1])


def test_an_environment_holds_a_large_batch():
    tried = recovery.Tried().after(recovery.DeviceFailed(items_lib.expand(list(map(str, range(4000))), 2), 0, ""))
    tried = tried.after(recovery.DeviceFailed(items_lib.expand(list(map(str, range(4000))), 2), 0, ""))
    assert len(tried.failed) == 8000 and len(tried.to_json()) < 128 * 1024
    assert recovery.Tried.read({recovery.VARIABLE: tried.to_json()}) == tried


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
    dog.waits()
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
