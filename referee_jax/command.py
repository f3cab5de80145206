"""The command of a run: its flags, and what they ask for. A mistake is one sentence."""

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from referee_jax import compile_cache, config, devices, parsing, progress, prompts, remote

# config_flags reads the file and sets what is overridden while flags are parsed, and raises what comes.
FLAG_ERRORS = (flags.Error, AttributeError, LookupError, TypeError, ValueError, SyntaxError, OSError)


class CommandError(ValueError):
    """A command that cannot be carried out; one sentence."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What was asked for: settings, the prompts as they were given, the run directory, and who shares the work.

    One in a bucket is text, "gs://bucket/run" say. Process `shard_index` of `shard_count` makes its fixed share, unless
    each takes what nobody has (`claim`); a claim that is not refreshed for `claim_expiry` seconds may be taken over. With
    `distributed`, JAX says who this process is. `device` is one of devices.KINDS.
    """

    settings: config.Settings
    entries: tuple[prompts.Entry, ...]
    workdir: Path | str
    shard_index: int = 0
    shard_count: int = 1
    claim: bool = False
    claim_expiry: float = 900.0
    distributed: bool = False
    resume: str = "auto"
    device: str = "auto"


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The flags; overrides of the config are looked for in `argv`."""
    config_flags.DEFINE_config_file(
        "config", None, "file of settings, as configs/shapes.py", flag_values=values, sys_argv=list(argv)
    )
    flags.DEFINE_string("prompts", None, "text file of prompts, one per line", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "a prompt; may be repeated", flag_values=values)
    flags.DEFINE_integer("samples", None, "images per prompt; default: config.samples", flag_values=values)
    flags.DEFINE_integer("seed", None, "default: config.seed", flag_values=values)
    flags.DEFINE_string("workdir", None, "run directory; default: runs/<config>-<fingerprint>", flag_values=values)
    flags.DEFINE_enum(
        "resume", "auto", ("auto", "force", "never"), "a run directory is continued if it was begun for the same images; by "
        "force also with other settings; or never", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool("estimate", False, "say what the config costs, without any weights, and end", flag_values=values)
    flags.DEFINE_bool("warmup", False, "compile what a run needs, fill the compile cache, and end", flag_values=values)
    flags.DEFINE_integer("shard_index", 0, "which of the processes that share the run this is", flag_values=values)
    flags.DEFINE_integer("shard_count", 1, "how many processes share the run", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("claim", False, "take what no other worker has, instead of a fixed share", flag_values=values)
    flags.DEFINE_float(
        "claim_expiry", 900.0, "seconds after which a silent worker's images are taken over; more than a chunk or a "
        "compilation lasts", lower_bound=1.0, flag_values=values,
    )  # fmt: skip
    define_device(values)
    flags.DEFINE_bool(
        "distributed", False, "join the other processes of a TPU slice, Slurm or GKE job by jax.distributed, which says who "
        "this one is", flag_values=values,
    )  # fmt: skip


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
        print(prompts.printable(work().rstrip("\n"), sys.stdout.encoding))
        return 0
    except (ValueError, OSError, devices.DeviceError) as error:
        told = str(error)
    except jax.errors.JaxRuntimeError as error:
        told = f"the device failed: {progress.first_line(error)[:300]}"
        if devices.is_memory(error):
            told += "; its memory is too small for so much at once"
    print(prompts.printable(f"error: {told}", sys.stderr.encoding), file=sys.stderr)
    return 2


def start(main: Callable[..., str], *, arguments: int = 0, hint: str = "") -> None:
    """Runs a program whose flags are defined: `main` has their values, and so many arguments, and gives what there is to say.

    `hint` says where else something belongs that is one argument too many. A flag or an argument that cannot be is one
    sentence and code 2, as is what cannot be done.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = _parsed(argv, flags.FLAGS)
            if len(rest) > 1 + arguments:
                raise flags.Error(_unexpected(rest[1 + arguments], hint))
        except FLAG_ERRORS as error:
            print(prompts.printable(f"error: {_why(error, argv)}", sys.stderr.encoding), file=sys.stderr)
            sys.exit(2)
        return rest

    app.run(lambda argv: tell(lambda: main(flags.FLAGS, *argv[1:])), flags_parser=parse)


def _unexpected(argument: str, hint: str) -> str:
    return f"unexpected argument {argument!r}" + (f"; {hint}" if hint else "")


def _parsed(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    rest = values(list(argv))
    if "config" in values and values.config is not None:
        values.config.keys()  # a file that could not be read says so when its values are asked for
    return rest


def parse_flags(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Parses `argv` into `values`; what is left of it. Raises CommandError."""
    define_flags(values, argv)
    try:
        rest = _parsed(argv, values)
    except config.ConfigError as error:
        raise CommandError(str(error)) from error
    except FLAG_ERRORS as error:
        raise CommandError(_why(error, argv)) from error
    if values.config is None:
        raise CommandError("--config is missing, for example --config=configs/shapes.py")
    return rest


def _why(error: Exception, argv: Sequence[str]) -> str:
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
        return f"the config file fails: {lines[-1].removeprefix('referee_jax.parsing.ConfigError: ')}"
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
            return parsing.unknown_key(f"{done}{name}", known)
        group, done = getattr(group, name), f"{done}{part}."
        if index and isinstance(group, tuple) and group:
            group = group[0]
    return None


def read_command(values: flags.FlagValues, rest: Sequence[str]) -> Command:
    """The command of parsed flags. Raises CommandError, ConfigError or PromptError."""
    if rest:
        raise CommandError(_unexpected(rest[0], "prompts are given with --prompt or --prompts"))
    wanted = dict(values.config.items())
    wanted |= {key: values[key].value for key in ("samples", "seed", "workdir") if values[key].value is not None}
    settings = config.from_config(wanted)
    entries = [prompts.Entry(text, f"--prompt {n}") for n, text in enumerate(values.prompt, 1)]
    if values.prompts is not None:
        entries = prompts.read_prompts(values.prompts) + entries
    elif not entries:
        entries = [prompts.Entry(text, f"prompt {n} of the config") for n, text in enumerate(settings.prompts, 1)]
    file = Path(config_flags.get_config_filename(values["config"]).partition(":")[0])
    workdir = settings.workdir or Path("runs", f"{file.stem}-{config.fingerprint(settings)[:8]}")
    names = ("shard_index", "shard_count", "claim", "claim_expiry", "distributed", "resume", "device")
    shared = {name: values[name].value for name in names}
    if not 0 <= values.shard_index < values.shard_count:
        raise CommandError(f"--shard_index={values.shard_index} is not one of 0 to {values.shard_count - 1}")
    if values.claim and values.shard_count > 1:
        raise CommandError("--claim and --shard_count are two ways to share a run; give one of them")
    workdir = workdir if remote.is_remote(workdir) else Path(workdir)
    return Command(settings, tuple(entries), workdir, **shared)
