"""What all commands share: flags, starting, and error messages of one sentence."""

import ast
import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections.config_flags import config_flags, tuple_parser

from referee_jax import config, console, schema
from referee_jax.hardware import chips, compile_cache, devices, interrupts

# config_flags reads the config file while flags are parsed, and passes on any error in it.
FLAG_ERRORS = (flags.Error, AttributeError, LookupError, TypeError, ValueError, SyntaxError, OSError)


class Tuple(tuple_parser.TupleParser):
    """Tuples of a config on the command line: a literal, words between commas, or nothing (None).

    ml_collections takes `a,b` for one text, and None for an element.
    """

    def parse(self, argument: Any) -> tuple:
        """The tuple. Raises ValueError for what is none."""
        if not isinstance(argument, str):
            return super().parse(argument)
        if argument.strip() in ("", "None"):
            return ()
        with contextlib.suppress(SyntaxError):  # which the parent explains
            try:
                ast.literal_eval(argument)
            except ValueError as error:
                if re.search(r"""[][(){}'"]""", argument):
                    raise ValueError("a tuple of texts is written as ('first', 'second')") from error
                return tuple(word.strip() for word in argument.split(","))
        return super().parse(argument)


config_flags.register_flag_parser_for_type(tuple, Tuple())


def define_device(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines --device."""
    text = "what to compute on; auto: an accelerator where there is one"
    flags.DEFINE_enum("device", "auto", devices.KINDS, text, flag_values=values)


def prepare(kind: str) -> None:
    """Chooses the device and turns on the compile cache, or warns why not. Raises DeviceError."""
    if problem := compile_cache.use(devices.choose(kind)):
        logging.warning(problem)


def tell(work: Callable[[], str]) -> int:
    """Prints the result of `work` and returns 0; after an error, prints one sentence, returns 2; interrupted, 130."""
    interrupts.release()
    try:
        print(console.printable(work().rstrip("\n"), sys.stdout.encoding))
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return interrupts.CODE
    except (ValueError, OSError, devices.DeviceError) as error:
        message = str(error)
    except jax.errors.JaxRuntimeError as error:
        message = f"the device failed: {console.first_line(error)[:300]}"
        if chips.is_out_of_memory(error):
            message += "; its memory is too small for so much at once"
    print(console.printable(f"error: {message}", sys.stderr.encoding), file=sys.stderr)
    return 2


def start(main: Callable[..., str], *, arguments: int = 0, hint: str = "") -> None:
    """Parses flags, calls `main(flags, *args)` with up to `arguments` args, and prints its result.

    `hint` is shown if there is an unexpected argument. Mistakes and errors are one sentence and
    exit code 2.
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
    """The message for an unexpected argument."""
    return f"unexpected argument {argument!r}" + (f"; {hint}" if hint else "")


def parse_argv(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Parses flags into `values`; returns the other arguments. Raises FLAG_ERRORS."""
    rest = values([_with_path(argument, before) for before, argument in zip(["", *argv], argv, strict=False)])
    if "config" in values and values.config is not None:
        values.config.keys()  # raises now if the config file could not be read
    return rest


def _with_path(argument: str, before: str) -> str:
    """The argument, or its path instead of the name of a config: --config=shapes, or shapes after --config."""
    if before in ("--config", "-config"):
        return config.find(argument)
    match = re.fullmatch(r"(--?config=)(.*)", argument)
    return match[1] + config.find(match[2]) if match else argument


def explain(error: Exception, argv: Sequence[str]) -> str:
    """An error of absl or ml_collections in one sentence."""
    keys = [match[1] for argument in argv if (match := re.match(r"--?config\.([^=]+)", argument))]
    for key in keys:
        if unknown := _unknown(key):
            return unknown
    # str() of a KeyError quotes its text.
    text = str(error.args[0] if isinstance(error, LookupError) and error.args else error).replace("\\n", "\n").strip()
    if locked := re.search(r'Key "(\w+)" does not exist', text):
        match = re.search(r'Did you mean "(\w+)"', text)
        return f"{locked[1]} is not a setting" + (f"; did you mean {match[1]}?" if match else "")
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
    """The message for `--config.path=` if there is no such setting."""
    group: Any = config.Settings()
    prefix = ""
    for part in path.split("."):
        match = re.fullmatch(r"(\w+)(\[\d+\])?", part)
        name, index = match.groups() if match else (part, None)
        if not dataclasses.is_dataclass(group):
            return None
        known = [field.name for field in dataclasses.fields(group)]
        if name not in known:
            return schema.unknown_key(f"{prefix}{name}", known)
        group, prefix = getattr(group, name), f"{prefix}{part}."
        if index and isinstance(group, tuple) and group:
            group = group[0]
    return None
