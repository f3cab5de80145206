"""The method beside its parts, scored by ground truth in the shapes world.

    python -m referee_jax.benchmarks.methods --config=configs/shapes.py --samples=2 --out=runs/methods
    python -m referee_jax.benchmarks.methods --config=configs/shapes.py --samples=2 --out=runs/categories --category=all \
        --rows="DDIM sampling" --rows="referee + SDS"

Rows: score distillation alone (from noise, guidance 7.5); DDIM sampling of the prior (guidance 7.5, 50 steps); the
samples that the config begins with (the referees' choice, if it has several candidates); the config from
one sample without a choice; the config itself. Prompts are the fixed ones of a category (by default
two-object colour prompts), seen and unseen. Prints a Markdown table with 95 % intervals (bootstrap over
prompts) and writes table.md, table.csv, figure.png (with the extra `[eval]`), the images, and one JSON
line per image, with which an interrupted run continues.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

from absl import flags, logging
from ml_collections import config_flags

from referee_jax import cli, config, items
from referee_jax.benchmarks import report, statistics
from referee_jax.engine import inverter
from referee_jax.shapes import benchmark, world
from referee_jax.storage import files, images
from referee_jax.weights import hub

GUIDANCE = 7.5

# Makes pictures of prompts: engine, prompts, samples per prompt, seed.
Make = Callable[[inverter.Inverter, Sequence[str], int, int], inverter.Result]


def _alone(settings: config.Settings) -> config.Settings:
    """Score distillation from noise: guidance of the sampler, twice the steps, and a weight large enough alone."""
    steps = 2 * settings.steps
    prior = dataclasses.replace(
        settings.sds,
        prompt="{}",
        guidance=GUIDANCE,
        weight=50.0,
        weight_final=12.0,
        weight_steps=steps,
        t_max_final=950,
    )
    return dataclasses.replace(
        settings, steps=steps, sds=prior, referee=dataclasses.replace(settings.referee, stop=0), output="final",
        init="noise", init_candidates=1,
    )  # fmt: skip


def _sampled(engine: inverter.Inverter, prompts: Sequence[str], samples: int, seed: int) -> inverter.Result:
    return engine.sample(prompts, samples=samples, seed=seed, steps=50, guidance=GUIDANCE)


def _begun(engine: inverter.Inverter, prompts: Sequence[str], samples: int, seed: int) -> inverter.Result:
    start = {name: getattr(engine.settings, f"init_{name}") for name in ("steps", "guidance", "candidates")}
    return engine.sample(prompts, samples=samples, seed=seed, **start)


def _inverted(engine: inverter.Inverter, prompts: Sequence[str], samples: int, seed: int) -> inverter.Result:
    return engine(prompts, samples=samples, seed=seed)


def _as_it_is(settings: config.Settings) -> config.Settings:
    return settings


def _unchosen(settings: config.Settings) -> config.Settings:
    return dataclasses.replace(settings, init_candidates=1)


# Row -> the change of the settings, and how pictures are made.
ROWS: dict[str, tuple[Callable[[config.Settings], config.Settings], Make]] = {
    "SDS alone": (_alone, _inverted),
    "DDIM sampling": (_as_it_is, _sampled),
    "its start": (_as_it_is, _begun),
    "one sample, referee + SDS": (_unchosen, _inverted),
    "referee + SDS": (_as_it_is, _inverted),
}
OF_SAMPLES = ("its start", "one sample, referee + SDS")  # rows of a config that begins with samples


class Engines:
    """Builds inverters and keeps the last one, so that rows with equal settings share compiled programs."""

    def __init__(self):
        self.last: tuple[config.Settings, inverter.Inverter] | None = None

    def __call__(self, settings: config.Settings) -> inverter.Inverter:
        """The engine of these settings."""
        if self.last is None or self.last[0] != settings:
            self.last = None  # frees its networks
            self.last = settings, inverter.Inverter.from_config(settings)
        return self.last[1]


def measure(
    row: str,
    category: str,
    split: str,
    settings: config.Settings,
    make: Make,
    out: pathlib.Path,
    engines: Engines,
    *,
    limit: int | None = None,
) -> list[dict]:
    """The records of one row, category and split; those that are in `out` are not made again.

    Args:
        row: its name, of the files in `out`.
        category: of world.CATEGORIES.
        split: "seen" or "unseen".
        settings: of the row.
        make: makes the pictures.
        out: directory of records and pictures.
        engines: builds the engine of the settings.
        limit: only so many prompts, the first ones.

    Returns:
        A record per image: `prompt`, `sample`, `right`, `quality` (dB), `scores` and `file`.
    """
    expected = items.expand(benchmark.prompts(category, split)[:limit], settings.samples)
    name = f"{row.replace(' ', '_')}-{category}-{split}"
    file = out / f"{name}.jsonl"
    files.mend(file)
    done = {(record["prompt"], record["sample"]): record for record in files.read_lines(file)}
    todo = [item for item in expected if (item.prompt, item.sample) not in done]
    engine = engines(settings) if todo else None
    # Whole prompts at a time, so many that their samples fill a batch.
    texts = list(dict.fromkeys(item.prompt for item in todo))
    count = max(1, engine.batch_size // settings.samples) if engine else 1
    for start in range(0, len(texts), count):
        result = make(engine, texts[start : start + count], settings.samples, settings.seed)
        right, quality = benchmark.score(result.images, [item.prompt for item in result.items])
        for n, item in enumerate(result.items):
            record = {
                "prompt": item.prompt,
                "sample": item.sample,
                "right": bool(right[n]),
                "quality": float(quality[n]),
            }
            record["scores"] = result.scores[n]
            path = out / "images" / name / f"{item.id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(path, images.encode_png(images.to_uint8(result.images[n]), record))
            if (item.prompt, item.sample) not in done:
                record["file"] = str(path.relative_to(out))
                files.append(file, record)
                done[item.prompt, item.sample] = record
        logging.info("%s, %s %s: %d of %d prompts", row, category, split, min(start + count, len(texts)), len(texts))
    return [done[item.prompt, item.sample] for item in expected]


def keep(settings: config.Settings, out: pathlib.Path) -> None:
    """Writes settings and versions of weights, or compares them with those in `out`. ConfigError for other ones."""
    file, values = out / "settings.json", config.image_settings(settings)
    values["weights"] = hub.versions(config.checkpoints(settings))
    if not file.exists() and any(out.glob("*.jsonl")):
        raise config.ConfigError(f"{out} has results of unknown settings; choose another --out")
    if file.exists() and (difference := config.diff(json.loads(file.read_text()), values)):
        raise config.ConfigError(f"{out} has results of other settings; choose another --out\n{difference}")
    files.write_atomic(file, json.dumps(values, indent=2).encode() + b"\n")


def summary(measured: dict[tuple[str, str, str], list[dict]]) -> dict[str, dict[str, statistics.Mean]]:
    """Row -> score -> mean, of records by row, category and split; rows are by category if there are several.

    Scores are the share of right pictures of seen prompts, of unseen ones (if the category has any) and
    of both, the quality in dB, and the probability that the first held-out referee gives the prompt.
    """
    means, categories = {}, {category for _, category, _ in measured}
    for category, row in sorted(
        dict.fromkeys((c, r) for r, c, _ in measured), key=lambda x: world.CATEGORIES.index(x[0])
    ):
        parts = {
            split: measured[row, category, split] for split in benchmark.SPLITS if (row, category, split) in measured
        }
        both = [record for records in parts.values() for record in records]
        scores = {x: statistics.mean((r["prompt"], r["right"]) for r in records) for x, records in parts.items()}
        scores["both"] = statistics.mean((r["prompt"], r["right"]) for r in both)
        scores["quality, dB"] = statistics.mean((r["prompt"], r["quality"]) for r in both)
        name = "held_out_0/probability"
        if values := [(r["prompt"], r["scores"][name]) for r in both if r["scores"].get(name) is not None]:
            scores["held-out referee"] = statistics.mean(values)
        means[row if len(categories) == 1 else f"{category}: {row}"] = scores
    return means


def compare(args: flags.FlagValues) -> str:
    """Measures what the flags select; writes and returns the table."""
    settings = dataclasses.replace(config.from_config(args.config), samples=args.samples)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    keep(settings, out)
    rows = args.rows or [row for row in ROWS if settings.init == "sample" or row not in OF_SAMPLES]
    engines, measured = Engines(), {}
    categories = world.CATEGORIES if "all" in args.category else args.category
    for row in rows:
        change, make = ROWS[row]
        for category, split in ((c, s) for c in categories for s in benchmark.splits(c)):
            records = measure(row, category, split, change(settings), make, out, engines, limit=args.limit)
            measured[row, category, split] = records
    means = summary(measured)
    names = list(dict.fromkeys([*benchmark.SPLITS, *(name for scores in means.values() for name in scores)]))
    return report.write(means, "method", names, [*benchmark.SPLITS, "quality, dB"], out)


def main(args: flags.FlagValues) -> str:
    """The command line."""
    cli.prepare(args.device)
    return compare(args)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", config.find("shapes"), "config file, or the name of one")
    cli.define_device()
    flags.DEFINE_integer("samples", 2, "pictures per prompt", lower_bound=1)
    flags.DEFINE_integer("limit", None, "only the first so many prompts of each list", lower_bound=1)
    flags.DEFINE_multi_enum("category", ["colour"], ["all", *world.CATEGORIES], "of the prompts; may be repeated")
    flags.DEFINE_multi_enum("rows", None, list(ROWS), "only these rows")
    flags.DEFINE_string("out", "runs/methods", "directory of records and pictures")
    cli.start(main)
