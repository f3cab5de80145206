"""Ctrl-C while a command starts: one line and exit code 130, instead of the traceback of an import.

It imports nothing that takes time: `referee_jax/__init__.py` calls `guard` before all else.
"""

import os
import signal
import sys
from typing import Any

CODE = 128 + signal.SIGINT


def guard() -> None:
    """Has SIGINT end this process at once, if it is a command of the package and has no handler of its own."""
    # While Python looks for the module of `python -m`, this is the name of the program.
    is_starting = sys.argv[:1] == ["-m"]
    is_ours = any(argument.removeprefix("-m").startswith("referee_jax.") for argument in sys.orig_argv)
    if is_starting and is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def leave(*_: Any) -> None:
    """Ends the process; an exception could be lost in the import of a library."""
    os.write(2, b"interrupted\n")
    os._exit(CODE)


def release() -> None:
    """Has SIGINT raise KeyboardInterrupt again, now that there may be something to put in order."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
