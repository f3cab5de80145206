"""Makes the images of a table of prompts on a Ray cluster, or on all of one machine (extra [ray]).

    python -m referee_jax.ray --config=configs/clip.py --prompts=prompts.parquet --out=runs/million
    python -m referee_jax.ray --config=configs/clip.py --prompts=gs://bucket/prompts.parquet --out=gs://bucket/run --actors=64

One actor a GPU, or a TPU host with all its chips. The output is a table with a row for each image: referee_jax/ray/tables.py.
The same command makes what is not there yet, whatever ended the one before.

Exit codes: 0 done; 1 rows failed, each with its reason in the output, or Ray gave up; 2 the command cannot be executed.
"""

import os
import sys

import ray
from absl import app, flags, logging

from referee_jax import cli, config, console, prompts
from referee_jax.ray import pipeline, tables
from referee_jax.ray.folder import Folder
from referee_jax.runs import command as command_lib
from referee_jax.runs.command import CommandError

# What a Ray that is started here reads. Its own niceness, 15, leaves CPUs idle between processes; and writers that end
# after a second would import all anew at each file.
LOCAL = {"RAY_worker_niceness": "0", "RAY_idle_worker_killing_time_threshold_ms": "3600000"}


def define_flags(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags; `argv` has the overrides of the config."""
    command_lib.define_prompts(values, argv)
    define = {"flag_values": values}
    flags.DEFINE_string("out", None, "the output: a path that all machines see, or a URL", **define)
    flags.DEFINE_enum("format", "parquet", tuple(tables.FORMATS), "of the output", **define)
    flags.DEFINE_integer("rows_per_file", 100, "of the output, at least", lower_bound=1, **define)
    flags.DEFINE_string("address", None, "of the Ray cluster; default: RAY_ADDRESS, or this machine alone", **define)
    flags.DEFINE_integer(
        "actors", None, "at most; default: one for each GPU or TPU host, or CPU but one", lower_bound=1, **define
    )
    flags.DEFINE_integer("least_actors", 1, "at least; below --actors Ray follows the work", lower_bound=1, **define)
    flags.DEFINE_enum("device", "auto", ("auto", "cpu", "gpu", "tpu"), "auto: what the cluster has", **define)
    flags.DEFINE_integer(
        "chips", None, "of an actor; default: a GPU, or the chips of a TPU host", lower_bound=1, **define
    )
    flags.DEFINE_float("cpus", 1.0, "of an actor", lower_bound=0.0, **define)
    flags.DEFINE_integer("rows_per_task", 32, "rows that an actor gets at once: a few batches", lower_bound=1, **define)


def pool_of(values: flags.FlagValues) -> pipeline.Pool:
    """The actors, as the flags say, or as the cluster that is joined has room for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    device = values.device
    if device == "auto":
        device = next((kind for kind in ("tpu", "gpu") if any(node.get(kind.upper()) for node in nodes)), "cpu")
    name = device.upper()
    of_host = int(max((node.get(name, 0) for node in nodes), default=1))
    chips = values.chips or (max(of_host, 1) if device == "tpu" else 1)
    places = sum(node.get(name, 0) for node in nodes) / (values.cpus or 1 if device == "cpu" else chips)
    most = values.actors or max(1, int(places) - (device == "cpu"))
    return pipeline.Pool(min(values.least_actors, most), most, device, chips, values.cpus, values.rows_per_task)


def main(values: flags.FlagValues) -> int:
    """Executes the command and returns an exit code. Errors are printed as one sentence."""
    try:
        if values.out is None:
            raise CommandError("--out=PATH_OR_URL is missing")
        settings, entries = command_lib.read_prompts(values, "samples", "seed")
        if not entries:
            raise CommandError("there are no prompts; give --prompts=FILE, --prompt=TEXT or config.prompts")
        out = Folder(values.out)
        if not ray.is_initialized():
            os.environ.update(LOCAL | os.environ)
            cache = {name: os.environ[name] for name in ("JAX_COMPILATION_CACHE_DIR",) if name in os.environ}
            ray.init(values.address, runtime_env={"env_vars": cache}, include_dashboard=None, logging_level="WARNING")
        pool = pool_of(values)
        size = f"{pool.least} to {pool.most} actors" if pool.least < pool.most else f"{pool.most} actors"
        console.say(f"{len(entries)} prompts, {size} on {pool.device}; into {out.name}")
        counts = pipeline.generate(settings, entries, out, pool=pool, layout=values.format, part=values.rows_per_file)
    except (CommandError, config.ConfigError, prompts.PromptError, ValueError, ConnectionError) as error:
        return console.fail(2, str(error))
    except (ray.exceptions.RayError, OSError) as error:
        return console.fail(1, f"{console.first_line(error)}; the same command makes what is not there yet")
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    console.say(f"{sum(counts.values())} images in {out.name}: {told}")
    return 1 if counts.get("failed") else 0


def _absl_flags(argv: list[str]) -> list[str]:
    try:
        return command_lib.parse_flags(argv, flags.FLAGS, define_flags)
    except CommandError as error:
        sys.exit(console.fail(2, str(error)))


def _absl_main(argv: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    if argv[1:]:
        return console.fail(2, cli.unexpected(argv[1], "prompts are given with --prompt or --prompts"))
    return main(flags.FLAGS)


if __name__ == "__main__":
    app.run(_absl_main, flags_parser=_absl_flags)
