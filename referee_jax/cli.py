"""The command of a run: its flags, and what they ask for. A mistake is one sentence."""

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from referee_jax import config, console, schema
from referee_jax.hardware import chips, compile_cache, devices

# config_flags reads the file and sets what is overridden while flags are parsed, and raises what comes.
FLAG_ERRORS = (flags.Error, AttributeError, LookupError, TypeError, ValueError, SyntaxError, OSError)


def define_device(values: flags.FlagValues = flags.FLAGS) -> None:
    """The flag that says what to compute on."""
    flags.DEFINE_enum(
        "device", "auto", devices.KINDS, "what to compute on; auto: an accelerator where there is one", flag_values=values
    )  # fmt: skip


def prepare(wanted: str) -> None:
    """Chooses the device that is wanted and has its compiled programs kept, or warns why not. Raises DeviceError."""
    if trouble := compile_cache.use(devices.choose(wanted)):
        logging.warning(trouble)


def tell(work: Callable[[], str]) -> int:
    """Prints what a program's work has to say; its exit code. What cannot be done is one sentence and code 2."""
    try:
        print(console.printable(work().rstrip("\n"), sys.stdout.encoding))
        return 0
    except (ValueError, OSError, devices.DeviceError) as error:
        told = str(error)
    except jax.errors.JaxRuntimeError as error:
        told = f"the device failed: {console.first_line(error)[:300]}"
        if chips.is_out_of_memory(error):
            told += "; its memory is too small for so much at once"
    print(console.printable(f"error: {told}", sys.stderr.encoding), file=sys.stderr)
    return 2


def start(main: Callable[..., str], *, arguments: int = 0, hint: str = "") -> None:
    """Runs a program whose flags are defined: `main` has their values, and so many arguments, and gives what there is to say.

    `hint` says where else something belongs that is one argument too many. A flag or an argument that cannot be is one
    sentence and code 2, as is what cannot be done.
    """

    def parse_flags(argv: list[str]) -> list[str]:
        try:
            rest = parse_argv(argv, flags.FLAGS)
            if len(rest) > 1 + arguments:
                raise flags.Error(unexpected(rest[1 + arguments], hint))
        except FLAG_ERRORS as error:
            print(console.printable(f"error: {explain(error, argv)}", sys.stderr.encoding), file=sys.stderr)
            sys.exit(2)
        return rest

    app.run(lambda argv: tell(lambda: main(flags.FLAGS, *argv[1:])), flags_parser=parse_flags)


def unexpected(argument: str, hint: str) -> str:
    return f"unexpected argument {argument!r}" + (f"; {hint}" if hint else "")


def parse_argv(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    rest = values(list(argv))
    if "config" in values and values.config is not None:
        values.config.keys()  # a file that could not be read says so when its values are asked for
    return rest


def explain(error: Exception, argv: Sequence[str]) -> str:
    """One sentence on an error of absl or ml_collections."""
    keys = [match[1] for argument in argv if (match := re.match(r"--?config\.([^=]+)", argument))]
    for key in keys:
        if unknown := _unknown(key):
            return unknown
    # A KeyError's text is quoted once, or twice.
    text = str(error.args[0] if isinstance(error, LookupError) and error.args else error).replace("\\n", "\n").strip()
    if locked := re.search(r'Key "(\w+)" does not exist', text):
        near = re.search(r'Did you mean "(\w+)"', text)
        return f"{locked[1]} is not a setting" + (f"; did you mean {near[1]}?" if near else "")
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, flags.IllegalFlagValueError) and "Traceback" in text:
        return f"the config file fails: {lines[-1].removeprefix('referee_jax.schema.ConfigError: ')}"
    if override := re.match(r"flag --config\.(\S+?)=(.*?): (.*)", lines[0]):
        return f"{override[1]} = {override[2]!r} is not possible: {override[3]}"
    if keys and isinstance(error, AttributeError | LookupError):
        return f"{' or '.join(keys)} cannot be set: {lines[0]}"
    if isinstance(error, OSError):
        return "the config file cannot be read: " + re.sub(r"^\[Errno \d+\] ", "", lines[-1])
    return f"the config file fails: {lines[0]}" if isinstance(error, SyntaxError) else lines[0]


def _unknown(path: str) -> str | None:
    """What is wrong with the key of `--config.path=`, if there is no such setting."""
    group: Any = config.Settings()
    done = ""
    for part in path.split("."):
        match = re.fullmatch(r"(\w+)(\[\d+\])?", part)
        name, index = match.groups() if match else (part, None)
        if not dataclasses.is_dataclass(group):
            return None
        known = [field.name for field in dataclasses.fields(group)]
        if name not in known:
            return schema.unknown_key(f"{done}{name}", known)
        group, done = getattr(group, name), f"{done}{part}."
        if index and isinstance(group, tuple) and group:
            group = group[0]
    return None
