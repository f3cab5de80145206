"""Speed of a config on one device: the whole iteration and each of its parts, over batch sizes.

    python -m referee_jax.bench --config=configs/shapes.py --batches=1,8 --out=bench.json

Networks have the config's sizes and random weights; nothing is downloaded. Rates count the FLOPs of
performance/cost.py without rematerialisation, and are compared with the rate of one large product of matrices on
the same device: bfloat16, or float32 on a CPU. Prints Markdown tables and, with --out, writes the same as JSON.
With --compile-for=v5e:2x4 nothing runs: it prints the report of compiling for that TPU slice
(performance/ahead_of_time.py), as doctor does.
"""

import contextlib
import dataclasses
import json
import pathlib
import statistics as stats
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags, logging
from ml_collections import config_flags

from referee_jax import cli, config, console, items
from referee_jax.engine import capacity, inverter, parallel
from referee_jax.engine.results import Batch
from referee_jax.hardware import chips, devices
from referee_jax.performance import abstract_networks, ahead_of_time, cost
from referee_jax.storage import files, run_directory

RUNS = 3  # at least, of which the median is taken


def seconds(call: Callable[[], Any], least: float) -> float:
    """The median time of a call, over at least `least` seconds and RUNS calls; the first, which may compile, is left out."""
    jax.block_until_ready(call())
    times, beginning = [], time.monotonic()
    while len(times) < RUNS or time.monotonic() - beginning < least:
        start = time.monotonic()
        jax.block_until_ready(call())
        times.append(time.monotonic() - start)
    return stats.median(times)


def matmul_rate(device: jax.Device, least: float) -> float:
    """FLOP/s of one large product of matrices: bfloat16, on a CPU float32."""
    size, dtype = (1024, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
    # Random, since with ones a chip draws less power and is faster than with real numbers.
    x = jax.device_put(jax.random.normal(jax.random.key(0), (size, size), dtype), device)
    multiply = jax.jit(lambda x: x @ x)
    return 2 * size**3 / seconds(lambda: multiply(x), least)


def part(step: capacity.Step, piece: cost.Part, batch: int, least: float) -> dict[str, float]:
    """One part of an iteration: `seconds` for the batch, and the seconds to `compile` it."""
    fn, args = capacity.batched(piece.fn, step, piece.shape, batch)
    networks, prompt, hyper, x, _ = args
    # The content of texts does not matter, but masks must not be empty, or means over them are NaN.
    prompt = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), prompt)
    keys = jax.random.split(jax.random.key(0), batch)
    inputs = networks, prompt, hyper, jax.random.normal(jax.random.key(1), x.shape), keys
    start = time.monotonic()
    compiled = jax.jit(fn, compiler_options=chips.compiler_options(jax.default_backend())).lower(*inputs).compile()
    compiling = time.monotonic() - start
    return {"seconds": seconds(lambda: compiled(*inputs), least), "compile": compiling}


def whole(
    settings: config.Settings, sized: abstract_networks.Sized, device: jax.Device, batch: int
) -> dict[str, float]:
    """An iteration as in a run, in chunks: as `part`, and `warm`, the seconds to compile it again from the cache."""
    settings = dataclasses.replace(settings, batch_size=batch, init="noise", init_candidates=1)

    def first() -> tuple[inverter.Inverter, Batch, float]:
        engine = inverter.Inverter(settings, sized.prior, sized.judges, [device])
        state = engine.begin(items.expand(["a photo"], batch), 0)
        start = time.monotonic()
        state, _ = engine.advance(state)
        return engine, state, time.monotonic() - start

    engine, state, cold = first()
    times = []
    for _ in range(RUNS):
        start = time.monotonic()
        state, _ = engine.advance(dataclasses.replace(state, step=0))
        times.append(time.monotonic() - start)
    again, chunk = stats.median(times), min(settings.chunk, settings.steps)
    jax.clear_caches()
    warm = first()[2]
    return {"seconds": again / chunk, "compile": cold - again, "warm": max(0.0, warm - again)}


def bench(settings: config.Settings, batches: Sequence[int], *, least: float) -> dict[str, Any]:
    """All measurements, for JSON; None for what this device does not report."""
    device = parallel.prompt_mesh().devices.flat[0]
    sized = abstract_networks.at_random(abstract_networks.abstract(settings))
    rows, unsized = [], settings
    lean = cost.estimate(dataclasses.replace(settings, remat="none"))
    for batch in sorted(batches):  # the peak of memory includes all earlier ones
        unsized, limit = dataclasses.replace(unsized, batch_size=batch), chips.memory_limit(device)
        settings = capacity.fitting(unsized, sized.prior, sized.judges, limit)
        step = capacity.make_step(settings, sized.prior, sized.judges)
        for piece in cost.parts(step):
            logging.info("%s, %d at once", piece.name, batch)
            flops = batch * lean.parts[piece.name]
            rows.append({"part": piece.name, "batch": batch, "flops": flops} | part(step, piece, batch, least))
        logging.info("iteration, %d at once", batch)
        row = {"part": "iteration", "batch": batch, "flops": batch * lean.step, "remat": settings.remat}
        rows.append(row | whole(settings, sized, device, batch))
        rows[-1]["peak"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
        rows[-1]["images_per_hour"] = 3600 * batch / (settings.steps * rows[-1]["seconds"])
    return {
        "device": device.device_kind,
        "precision": settings.precision,
        "versions": run_directory.versions(),
        "matmul": matmul_rate(device, least),
        "assumed": sized.assumed,
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    columns = ["part, images at once", "ms", "GFLOP", "GFLOP/s", "share of matmul rate", "compile, s"]
    rows = {}
    for row in results["rows"]:
        rate = row["flops"] / row["seconds"]
        rows[f"{row['part']}, {row['batch']}"] = [
            f"{1e3 * row['seconds']:.3g}", f"{row['flops'] / 1e9:.4g}", f"{rate / 1e9:.4g}", f"{rate / results['matmul']:.0%}",
            f"{row['compile']:.1f}",
        ]  # fmt: skip
    runs = {}
    for row in (row for row in results["rows"] if row["part"] == "iteration"):
        peak = "-" if row["peak"] is None else f"{row['peak'] / 1e9:.2f}"
        runs[str(row["batch"])] = [
            f"{row['batch'] / row['seconds']:.3g}", f"{row['images_per_hour']:.4g}", peak, f"{row['compile']:.1f}",
            f"{row['warm']:.1f}", row["remat"],
        ]  # fmt: skip
    heads = [
        "images at once",
        "steps/s of an image",
        "images/hour",
        "peak memory, GB",
        "compile, s",
        "again, s",
        "remat",
    ]
    title = f"{results['device']}, {results['precision']}; product of matrices {results['matmul'] / 1e9:.4g} GFLOP/s\n"
    return "\n".join([title, console.markdown(columns, rows), console.markdown(heads, runs)])


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """A new cache of compiled programs, so that the first compilation is cold and the second warm."""
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        yield


def main(args: flags.FlagValues) -> str:
    """The command line."""
    if not args.batches or not all(x.isdigit() and int(x) for x in args.batches):
        raise ValueError(f"--batches={','.join(args.batches)}: numbers of images are needed, at least 1")
    settings, name = config.from_config(args.config), getattr(args, "compile-for")
    if name:
        report = ahead_of_time.compile_for(settings, name)
        results, text = report.to_dict(), "\n".join(report.lines())
    else:
        devices.choose()
        with empty_cache():
            results = bench(settings, list(map(int, args.batches)), least=args.seconds)
        text = table(results)
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(files.finite(results), indent=2) + "\n")
    return text


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", config.find("shapes"), "config file, or the name of one")
    flags.DEFINE_list("batches", ["1", "8"], "numbers of images at once")
    flags.DEFINE_float("seconds", 1.0, "least time of measuring each part", lower_bound=0)
    flags.DEFINE_string("compile-for", None, "compile for this TPU slice instead, such as v5e:2x4")
    flags.DEFINE_string("out", None, "JSON file to write")
    cli.start(main)
