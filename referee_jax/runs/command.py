"""A run's command: its flags, and what they say together."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from referee_jax import cli, config
from referee_jax.runs import prompt_file
from referee_jax.runs.prompt_file import Entry
from referee_jax.storage import bucket


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
    entries: tuple[Entry, ...]
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
    cli.define_device(values)
    flags.DEFINE_bool(
        "distributed", False, "join the other processes of a TPU slice, Slurm or GKE job by jax.distributed, which says who "
        "this one is", flag_values=values,
    )  # fmt: skip


def parse_flags(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Parses `argv` into `values`; what is left of it. Raises CommandError."""
    define_flags(values, argv)
    try:
        rest = cli.parse_argv(argv, values)
    except config.ConfigError as error:
        raise CommandError(str(error)) from error
    except cli.FLAG_ERRORS as error:
        raise CommandError(cli.explain(error, argv)) from error
    if values.config is None:
        raise CommandError("--config is missing, for example --config=configs/shapes.py")
    return rest


def read_command(values: flags.FlagValues, rest: Sequence[str]) -> Command:
    """The command of parsed flags. Raises CommandError, ConfigError or PromptError."""
    if rest:
        raise CommandError(cli.unexpected(rest[0], "prompts are given with --prompt or --prompts"))
    wanted = dict(values.config.items())
    wanted |= {key: values[key].value for key in ("samples", "seed", "workdir") if values[key].value is not None}
    settings = config.from_config(wanted)
    entries = [Entry(text, f"--prompt {n}") for n, text in enumerate(values.prompt, 1)]
    if values.prompts is not None:
        entries = prompt_file.read_prompts(values.prompts) + entries
    elif not entries:
        entries = [Entry(text, f"prompt {n} of the config") for n, text in enumerate(settings.prompts, 1)]
    file = Path(config_flags.get_config_filename(values["config"]).partition(":")[0])
    workdir = settings.workdir or Path("runs", f"{file.stem}-{config.fingerprint(settings)[:8]}")
    names = ("shard_index", "shard_count", "claim", "claim_expiry", "distributed", "resume", "device")
    shared = {name: values[name].value for name in names}
    if not 0 <= values.shard_index < values.shard_count:
        raise CommandError(f"--shard_index={values.shard_index} is not one of 0 to {values.shard_count - 1}")
    if values.claim and values.shard_count > 1:
        raise CommandError("--claim and --shard_count are two ways to share a run; give one of them")
    workdir = workdir if bucket.is_remote(workdir) else Path(workdir)
    return Command(settings, tuple(entries), workdir, **shared)
