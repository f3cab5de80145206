"""Makes images for prompts.

    python -m referee_jax.run --config=configs/shapes.py
    python -m referee_jax.run --config=configs/clip.py --prompts=prompts.txt --samples=4 --workdir=runs/mine

Any setting can be changed: --config.sds.guidance=20. The same command on the same run directory continues it, in the middle of
its images. Several processes may share one: --shard_index and --shard_count, or --claim for workers that come and go.
Exit codes: 0 done, 1 disk, memory or device failed, or nothing moved any more, 2 the command cannot be carried out, 130 or 143
interrupted.
"""

import dataclasses
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from referee_jax import config, console, prompts
from referee_jax.console import say
from referee_jax.hardware import chips, compile_cache, devices, processes
from referee_jax.performance import cost
from referee_jax.runs import job, recovery, worker
from referee_jax.runs.command import Command, CommandError, parse_flags, read_command
from referee_jax.storage import bucket, run_directory
from referee_jax.weights import convert

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 8.0  # seconds that a run has to finish its chunk and save when it is asked to end


def estimate(command: Command, **_: Any) -> int:
    """Says what a command's config costs; loads and writes nothing."""

    say(cost.table(cost.estimate(command.settings), precision=command.settings.precision))
    return 0


# --- the program ------------------------------------------------------------------------------------------------------


def main(
    command: Command,
    *,
    load: Callable[[config.Settings], Any] = job.load_inverter,
    stop: worker.Stop | None = None,
    work: Callable[..., int] = job.execute,
    begin_anew: Callable[[recovery.Tried], int] | None = recovery.begin_anew,
) -> int:
    """Carries out a command by `work`; the exit code. What goes wrong is told in a sentence.

    Where the device fails, the command begins anew in a fresh process (`begin_anew`), unless it cannot (None).
    """
    keeps = f"the finished images are in {command.workdir}, and the same command continues"
    tried = recovery.Tried.read()
    try:
        return work(command, load=load, stop=stop, tried=tried)
    except recovery.DeviceFailed as error:
        if stop and stop.number:
            say(f"interrupted; {keeps}", file=sys.stderr)
            return 128 + stop.number
        tried = tried.after(error)
        if begin_anew is None:
            return console.fail(1, f"the device failed ({error.why}); {keeps}")
        if tried.in_a_row >= recovery.FAILURES:
            return console.fail(1, f"the device fails at whatever it is given ({error.why}); {keeps}")
        say(f"the device failed ({error.why}) at {len(error.items)} images; a fresh process goes on", file=sys.stderr)
        try:
            return begin_anew(tried)
        except OSError as why:
            return console.fail(1, f"no fresh process can be begun ({why}); {keeps}")
    except (
        CommandError,
        config.ConfigError,
        prompts.PromptError,
        run_directory.RunError,
        convert.WeightsError,
    ) as error:
        return console.fail(2, str(error))
    except KeyboardInterrupt:
        say(f"interrupted; {keeps}", file=sys.stderr)
        return 130
    except worker.Stopped as stopped:
        say(f"interrupted; {keeps}", file=sys.stderr)
        return 128 + stopped.number
    except OSError as error:
        return console.fail(1, f"{error}; {keeps}")
    except jax.errors.JaxRuntimeError as error:
        if chips.is_out_of_memory(error):
            return console.fail(
                1,
                f"the device's memory is too small even for --config.batch_size=1 (--config.remat=full needs least); {keeps}",
            )
        return console.fail(1, f"the device failed: {console.first_line(error)[:300]}; {keeps}")


def catch_signals(stop: worker.Stop) -> None:
    """SIGINT and SIGTERM ask the run to end; when GRACE is over, or a second one comes, it ends at once.

    Python runs its handlers between two lines of the main thread, and a compilation is one line: what must happen in time
    happens in a thread, which the wake-up descriptor tells at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_end, args=(reader, stop), daemon=True).start()


def _end(reader: int, stop: worker.Stop) -> None:
    number = 0
    while number not in SIGNALS:
        number = os.read(reader, 1)[0]
    stop.number = signal.Signals(number)
    # The kernel's, for when Python itself is ending and some thread does not let it.
    signal.setitimer(signal.ITIMER_REAL, GRACE + 1)
    say(f"{stop.number.name}: ending after this chunk, or in {GRACE:.0f} s", file=sys.stderr)
    select.select([reader], [], [], GRACE)
    os._exit(128 + number)  # nothing is ever half written, and what is in flight goes on from its last checkpoint


def _absl_flags(argv: list[str]) -> list[str]:
    try:
        return parse_flags(argv, flags.FLAGS)
    except CommandError as error:
        sys.exit(console.fail(2, str(error)))


def _absl_main(argv: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # JAX tells of every kind of device that is not there
    stop = worker.Stop()
    catch_signals(stop)
    try:
        command = read_command(flags.FLAGS, argv[1:])
        devices.keep_freed_memory(command.device)
        if command.distributed:  # which must come before any device is looked at
            place = None if bucket.is_remote(command.workdir) else Path(command.workdir).expanduser()
            index, count = processes.join(command.shard_index, command.shard_count, place)
            command = dataclasses.replace(command, shard_index=index, shard_count=count)
        device = devices.choose(command.device)
    except (CommandError, config.ConfigError, prompts.PromptError, devices.DeviceError) as error:
        return console.fail(2, str(error))
    if problem := compile_cache.use(device):
        say(f"warning: {problem}", file=sys.stderr)
    work = estimate if flags.FLAGS.estimate else job.warm_up if flags.FLAGS.warmup else job.execute
    # JAX lets nobody join a job again, and what came through a pipe does not come twice.
    once = command.distributed or (flags.FLAGS.prompts and not Path(flags.FLAGS.prompts).is_file())
    return main(command, stop=stop, work=work, begin_anew=None if once else recovery.begin_anew)


if __name__ == "__main__":
    app.run(_absl_main, flags_parser=_absl_flags)
