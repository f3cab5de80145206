"""Makes images for prompts.

    python -m referee_jax.run --prompt="a red circle and a blue square"
    python -m referee_jax.run --config=configs/clip.py --prompts=prompts.txt --samples=4 --workdir=runs/mine

`--config` is a file, or the name of a config of the package (default: shapes). Any setting can be
changed: --config.sds.guidance=20. The same command with the same run directory continues the run, in
the middle of its images. Several processes may share a run: --shard_index and --shard_count. For
workers that come and go: python -m referee_jax.ray.

Exit codes: 0 done; 1 the disk failed, the device's memory is too small, nothing moved any more, or
images are left out because the device failed at them twice; 2 the command cannot be executed;
75 the device failed, and the same command goes on (--retries=N: it starts itself again, N times at
most); 130 or 143 interrupted.
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
from referee_jax.storage import objects, run_directory
from referee_jax.weights import convert

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 8.0  # seconds between a stop request and the end: time to finish the chunk and save


def estimate(command: Command, **_: Any) -> int:
    """Prints what a command's config costs; loads and writes nothing."""
    say(cost.table(cost.estimate(command.settings), precision=command.settings.precision))
    return 0


def main(
    command: Command,
    *,
    load: job.Load = job.load_inverter,
    stop: worker.Stop | None = None,
    work: Callable[..., int] = job.execute,
    restart: Callable[..., int] = recovery.restart,
) -> int:
    """Runs the command and returns an exit code. Errors are printed as one sentence.

    Args:
        command: what to do.
        load: returns the engine of a config.
        stop: the stop request, which a signal sets.
        work: executes the command: job.execute, job.warm_up or `estimate`.
        restart: starts the command again after a device failure, with the flags it is given.
    """
    keeps = f"the finished images are in {command.workdir}, and the same command continues"
    try:
        return work(command, load=load, stop=stop)
    except recovery.DeviceFailed as error:
        if stop and stop.number:
            say(f"interrupted; {keeps}", file=sys.stderr)
            return 128 + stop.number
        if error.is_given_up:
            return console.fail(1, f"the device fails at whatever it is given ({error.reason}); {keeps}")
        failure = f"the device failed ({error.reason}) at {len(error.items)} images"
        if not command.retries:
            return console.fail(os.EX_TEMPFAIL, f"{failure}; {keeps}")
        say(f"{failure}; a new process goes on", file=sys.stderr)
        # The run that --resume=never refuses is now our own.
        flags_of_next = {"retries": command.retries - 1} | ({"resume": "auto"} if command.resume == "never" else {})
        try:
            return restart(**flags_of_next)
        except OSError as reason:
            return console.fail(os.EX_TEMPFAIL, f"no new process can be started ({reason}); {keeps}")
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
            advice = "even for --config.batch_size=1 (--config.remat=full needs least)"
            return console.fail(1, f"the device's memory is too small {advice}; {keeps}")
        return console.fail(1, f"the device failed: {console.first_line(error)[:300]}; {keeps}")


def catch_signals(stop: worker.Stop) -> None:
    """SIGINT and SIGTERM request a stop; after GRACE seconds, or a second signal, the process exits.

    Python runs signal handlers between two bytecodes of the main thread, and a compilation is one. So
    a thread waits for the wake-up descriptor, which gets each signal's number at once.
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
    # By the kernel: Python itself may be shutting down, with a thread that never ends.
    signal.setitimer(signal.ITIMER_REAL, GRACE + 1)
    say(f"{stop.number.name}: ending after this chunk, or in {GRACE:.0f} s", file=sys.stderr)
    select.select([reader], [], [], GRACE)
    os._exit(128 + number)  # no file is ever half written, and a batch goes on from its last checkpoint


def _absl_flags(argv: list[str]) -> list[str]:
    try:
        return parse_flags(argv, flags.FLAGS)
    except CommandError as error:
        sys.exit(console.fail(2, str(error)))


def _absl_main(argv: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # JAX logs every kind of device that is missing
    stop = worker.Stop()
    catch_signals(stop)
    try:
        command = read_command(flags.FLAGS, argv[1:])
        is_small = command.fits_a_core
        # Of a single batch, compiling is most of the time.
        heaps = devices.HEAPS if is_small and command.images == command.at_once else 1
        devices.keep_freed_memory(command.device, heaps=heaps)
        if command.distributed:  # before JAX looks for devices
            directory = None if objects.is_remote(command.workdir) else Path(command.workdir).expanduser()
            index, count = processes.join(command.shard_index, command.shard_count, directory)
            command = dataclasses.replace(command, shard_index=index, shard_count=count)
        command = dataclasses.replace(
            command, split=devices.split_cpu(command.device, command.at_once if is_small else 1)
        )
        device = devices.choose(command.device, heaps=heaps)
    except (CommandError, config.ConfigError, prompts.PromptError, devices.DeviceError) as error:
        return console.fail(2, str(error))
    if problem := compile_cache.use(device):
        say(f"warning: {problem}", file=sys.stderr)
    file = flags.FLAGS.prompts
    if command.distributed or (file and not objects.is_remote(file) and not Path(file).is_file()):
        # JAX lets no process join a job again, and a pipe of prompts cannot be read again.
        command = dataclasses.replace(command, retries=0)
    work = estimate if flags.FLAGS.estimate else job.warm_up if flags.FLAGS.warmup else job.execute
    return main(command, stop=stop, work=work)


if __name__ == "__main__":
    app.run(_absl_main, flags_parser=_absl_flags)
