"""The command of a run: its flags, parsed and checked together."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from referee_jax import cli, config
from referee_jax.runs import prompt_file
from referee_jax.runs.prompt_columns import Entry
from referee_jax.storage import objects
from referee_jax.weights import hub

DEFAULT = "shapes"  # the config without --config: its networks are part of the package


class CommandError(ValueError):
    """A command that cannot be executed; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Command:
    """Settings, prompts, the run directory, and how processes share the work.

    `workdir` is a str for a bucket ("gs://bucket/run"). Process `shard_index` of `shard_count` makes a
    fixed share; with `distributed`, JAX tells a process its index. After a device failure the command
    starts again, up to `retries` times. `device` is one of devices.KINDS. `writers` are names in
    metric_writers.WRITERS. `split` is how many devices of a CPU share a batch of `settings.batch_size`.
    """

    settings: config.Settings
    entries: tuple[Entry, ...]
    workdir: Path | str
    shard_index: int = 0
    shard_count: int = 1
    distributed: bool = False
    resume: str = "auto"
    retries: int = 1
    device: str = "auto"
    writers: tuple[str, ...] = ()
    split: int = 1

    @property
    def images(self) -> int:
        """How many this process makes, at most: rows may have samples of their own, or be left out."""
        return -(-len(self.entries) * self.settings.samples // self.shard_count)

    @property
    def at_once(self) -> int:
        """Images of a batch of this process, on one device."""
        return min(self.settings.batch_size or 1, self.images)

    @property
    def fits_a_core(self) -> bool:
        """Whether each core of a CPU may hold the networks, as all are part of the package, and no other devices are asked for.

        A process that has joined others by JAX's runtime has its devices already.
        """
        is_free = self.settings.mesh == config.Mesh() and not self.distributed
        return is_free and hub.are_embedded(config.checkpoints(self.settings))


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Defines the flags; `argv` has the overrides of the config."""
    define_prompts(values, argv)
    flags.DEFINE_string("workdir", None, "run directory; default: runs/<config>-<fingerprint>", flag_values=values)
    flags.DEFINE_enum(
        "resume", "auto", ("auto", "force", "never"), "auto: continue a run directory that was begun with settings for "
        "the same images; force: with any; never: only begin a new one", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "retries", 1, "how often the command starts itself again when the device fails, before it ends with code 75",
        lower_bound=0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "estimate", False, "print what the config costs, without any weights, and exit", flag_values=values
    )
    flags.DEFINE_bool("warmup", False, "compile what a run needs, fill the compile cache, and exit", flag_values=values)
    flags.DEFINE_integer("shard_index", 0, "index of this process among those that share the run", flag_values=values)
    flags.DEFINE_integer("shard_count", 1, "how many processes share the run", lower_bound=1, flag_values=values)
    flags.DEFINE_multi_enum(
        "writers", [], ("tensorboard", "wandb"), "write the log's numbers there as well (extra [logging]); may be repeated",
        flag_values=values,
    )  # fmt: skip
    cli.define_device(values)
    flags.DEFINE_bool(
        "distributed", False, "join the other processes of a TPU slice, Slurm or GKE job by jax.distributed, which "
        "gives each its index", flag_values=values,
    )  # fmt: skip


def define_prompts(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Defines the flags that say what is to be made."""
    config_flags.DEFINE_config_file(
        "config", config.find(DEFAULT), f"config file, or the name of one of the package's; default: {DEFAULT}",
        flag_values=values, sys_argv=list(argv),
    )  # fmt: skip
    flags.DEFINE_string(
        "prompts",
        None,
        "prompts: one per line, or the field or column prompt (or text) of JSON, JSON lines, CSV, TSV or Parquet, local "
        "or in a bucket; of those also id, seed, negative, samples, questions",
        flag_values=values,
    )
    flags.DEFINE_multi_string("prompt", [], "a prompt; may be repeated", flag_values=values)
    flags.DEFINE_integer("samples", None, "images per prompt; default: config.samples", flag_values=values)
    flags.DEFINE_integer("seed", None, "default: config.seed", flag_values=values)


def parse_flags(
    argv: Sequence[str],
    values: flags.FlagValues,
    define: Callable[[flags.FlagValues, Sequence[str]], None] = define_flags,
) -> list[str]:
    """Defines the flags, parses `argv` into `values` and returns the arguments that are no flags. Raises CommandError."""
    define(values, argv)
    try:
        return cli.parse_argv(argv, values)
    except config.ConfigError as error:
        raise CommandError(str(error)) from error
    except cli.FLAG_ERRORS as error:
        raise CommandError(cli.explain(error, argv)) from error


def read_command(values: flags.FlagValues, arguments: Sequence[str]) -> Command:
    """Returns the command of parsed flags. Raises CommandError, ConfigError or PromptError."""
    if arguments:
        raise CommandError(cli.unexpected(arguments[0], "prompts are given with --prompt or --prompts"))
    if not 0 <= values.shard_index < values.shard_count:
        raise CommandError(f"--shard_index={values.shard_index} is not one of 0 to {values.shard_count - 1}")
    settings, entries = read_prompts(values, "samples", "seed", "workdir")
    file = Path(config_flags.get_config_filename(values["config"]).partition(":")[0])
    workdir = settings.workdir or Path("runs", f"{file.stem}-{config.fingerprint(settings)[:8]}")
    workdir = workdir if objects.is_remote(workdir) else Path(workdir)
    names = ("shard_index", "shard_count", "distributed", "resume", "retries", "device")
    writers = tuple(dict.fromkeys(values.writers))
    return Command(settings, entries, workdir, writers=writers, **{name: values[name].value for name in names})


def read_prompts(values: flags.FlagValues, *names: str) -> tuple[config.Settings, tuple[Entry, ...]]:
    """The settings, some by flags of these names, and the prompts. Raises ConfigError or PromptError."""
    changes = {key: values[key].value for key in names if values[key].value is not None}
    settings = config.from_config(dict(values.config.items()) | changes)
    entries = [Entry(text, f"--prompt {n}") for n, text in enumerate(values.prompt, 1)]
    if values.prompts is not None:
        entries = prompt_file.read_prompts(values.prompts) + entries
    elif not entries:
        entries = [Entry(text, f"prompt {n} of the config") for n, text in enumerate(settings.prompts, 1)]
    return settings, tuple(entries)
