"""Right pictures over cost: sampling, and choosing among N samples, beside each way to move, in the shapes world.

    python -m referee_jax.benchmarks.methods --config=configs/shapes.py --category=spatial --out=runs/methods

A row of ROWS is a change of the config. Each makes `--samples` pictures of each of the benchmark's fixed prompts, which
ground truth judges; "best of N" takes of each N of them the one that the referees choose, and costs N times as much. So
each row is a curve, and each point of it has an opponent: the best of as many samples as its cost pays for. Costs are FLOPs
of a picture with all networks in passes of the U-Net (two, where it is guided), and seconds. Speed and quality in one number
are the right pictures a second.

Prints a Markdown table with 95 % intervals (bootstrap over prompts), and writes table.md, table.csv, figure.png (with the
extra `[eval]`), the pictures, and one JSON line for each, with which an interrupted run continues.
"""

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags, logging
from ml_collections import config_flags

from referee_jax import cli, config, console, items
from referee_jax.benchmarks import report, statistics
from referee_jax.engine import inverter, results
from referee_jax.performance import cost
from referee_jax.shapes import benchmark, world
from referee_jax.storage import files, images
from referee_jax.weights import hub

SAMPLING = "sampling"  # the row whose best of N is everyone's opponent
ONE_STEP = "one step"  # this one is drawn as often
_FROM_NOISE = {"init": "noise", "init_candidates": 1, "particles": 1, "look_every": 1000}
_SAMPLED = _FROM_NOISE | {
    "method": "guided", "steps": 12, "guided.guidance": 7.5, "referee.stop": 0, "output": "final",
}  # fmt: skip
_HALVED = {"select": "halve", "select_every": 2}
_ONE_VIEW = {"views.count": 1, "views.keep": 1, "views.augmentations": (), "referee.noise": 0.0}
_ACTIVE = {"referee.start": 0, "referee.stop": 1000}
_PULLED = _SAMPLED | _ONE_VIEW | _ACTIVE | {
    "referee.balance": True, "referee.weight": 0.2, "referee.weight_final": 0.2,
}  # fmt: skip
_MOVED = _FROM_NOISE | _ONE_VIEW | _ACTIVE | {
    "method": "noise", "output": "best", "noise.rule": "sphere", "noise.steps": 8, "noise.first": 900,
    "noise.guidance": 7.5, "noise.lr": 1.5, "noise.momentum": 0.5, "referee.balance": False, "referee.weight": 1.0,
    "referee.weight_final": 1.0,
}  # fmt: skip

# The generator of one step, whose starting noise the referees choose, and move.
_ONE_STEP = _MOVED | {
    "generator.loras": [{"file": "shapes/one_step/pytorch_lora_weights.safetensors", "weight": 1.0}],
    "noise.steps": 1, "noise.first": 999, "noise.guidance": 1.0,
}  # fmt: skip


def _chosen_and_moved(count: int, steps: int) -> dict[str, Any]:
    """The config's own way for so many iterations, from the best of `count` samples."""
    return {"init_candidates": count, "steps": steps, "sds.weight_steps": steps, "referee.stop": steps - 2}


# Row -> the change of the config.
ROWS: dict[str, dict[str, Any]] = {
    SAMPLING: _SAMPLED,
    "sampling, 50 steps": _SAMPLED | {"steps": 50},
    "sampling, guidance 12": _SAMPLED | {"guided.guidance": 12.0},
    **{f"halving of {count}": _SAMPLED | _HALVED | {"particles": count} for count in (4, 8, 16, 32)},
    "pulled": _PULLED,
    "pulled, halving of 8": _PULLED | _HALVED | {"particles": 8},
    "noise, 5 iterations": _MOVED | {"steps": 5},
    "noise, 15 iterations": _MOVED | {"steps": 15},
    "noise: best of 8, moved 5 times": _MOVED | {"init_candidates": 8, "steps": 5},
    ONE_STEP: _ONE_STEP | {"steps": 1, "referee.stop": 0, "output": "final"},
    **{f"one step, moved {steps} times": _ONE_STEP | {"steps": steps} for steps in (5, 20)},
    **{
        f"one step: best of {count}, moved {steps} times": _ONE_STEP | {"init_candidates": count, "steps": steps}
        for count, steps in ((8, 5), (32, 20))
    },
    **{
        f"best of {count}, moved {steps} times": _chosen_and_moved(count, steps)
        for count, steps in ((4, 10), (8, 10), (8, 20), (16, 10), (28, 10), (24, 40))
    },
    "as it is, from one sample": {"init_candidates": 1},
    "as it is": {},
}


class Engines:
    """Builds inverters and keeps the last one, for all categories and splits of a row."""

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
        out: directory of records and pictures.
        engines: builds the engine of the settings.
        limit: only so many prompts, the first ones.

    Returns:
        A record per image: `prompt`, `sample`, `right`, `quality` (dB), `loss`, `held_out` and `choice` (the losses of the
        optimised referees, of the held-out ones and of those that choose; None where no referee is held out, or they are
        not finite), `seconds` and `file`.
    """
    expected = items.expand(benchmark.prompts(category, split)[:limit], settings.samples)
    name = f"{slug(row)}-{category}-{split}"
    file = out / f"{name}.jsonl"
    files.mend(file)
    done = {(record["prompt"], record["sample"]): record for record in files.read_lines(file)}
    todo = [item for item in expected if (item.prompt, item.sample) not in done]
    engine = engines(settings) if todo else None
    with tqdm.tqdm(total=len(todo), desc=name, unit="image", dynamic_ncols=True) as bar:
        for part in items.batches(todo, engine.batch_size) if engine else ():
            begin = time.monotonic()
            pictures = completed(engine, engine.begin(part, settings.seed))
            seconds = (time.monotonic() - begin) / len(part)
            right, quality = benchmark.score([x.image for x in pictures], [item.prompt for item in part])
            for n, (item, picture) in enumerate(zip(part, pictures, strict=True)):
                last = {key: pair[1] for key, pair in (picture.losses or {}).items()}
                losses = {"loss": last.get("referee"), "held_out": last.get("held_out")}
                record = {
                    "prompt": item.prompt, "sample": item.sample, "right": bool(right[n]), "quality": float(quality[n]),
                    **losses, "choice": last.get("choice", losses["loss"]), "seconds": seconds,
                }  # fmt: skip
                path = out / "images" / name / f"{item.id}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                files.write_atomic(path, images.encode_png(images.to_uint8(picture.image), record))
                record = files.finite(record | {"file": str(path.relative_to(out))})
                files.append(file, record)
                done[item.prompt, item.sample] = record
            bar.update(len(part))
    return [done[item.prompt, item.sample] for item in expected]


def slug(name: str) -> str:
    """The name of a row as part of a file's."""
    return name.replace(" ", "_").replace(",", "")


def completed(engine: inverter.Inverter, batch: results.Batch) -> list[results.Picture]:
    """The pictures of a batch that has begun."""
    while batch.step < engine.steps:
        batch, _ = engine.advance(batch)
    return engine.finish(batch)


def keep(settings: config.Settings, out: pathlib.Path) -> None:
    """Writes settings and versions of weights, or compares them with those in `out`. ConfigError for other ones."""
    file, values = out / "settings.json", config.image_settings(settings)
    values["weights"] = hub.versions(config.checkpoints(settings))
    if not file.exists() and any(out.glob("*.jsonl")):
        raise config.ConfigError(f"{out} has results of unknown settings; choose another --out")
    if file.exists() and (difference := config.diff(json.loads(file.read_text()), values)):
        raise config.ConfigError(f"{out} has results of other settings; choose another --out\n{difference}")
    files.write_atomic(file, json.dumps(values, indent=2).encode() + b"\n")


# --- the curve --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """The best of `count` pictures of a row, of records by category; `passes` and `seconds` are what one costs."""

    row: str
    count: int
    passes: float
    seconds: float
    records: Mapping[str, Sequence[dict]]

    @functools.cached_property
    def scores(self) -> dict[str, statistics.Mean]:
        """Score -> mean: right pictures by category and in all, quality, the losses of optimised and held-out referees.

        "all" is the mean over categories.
        """
        pairs = lambda key: [
            [(r["prompt"], r[key]) for r in part if r[key] is not None] for part in self.records.values()
        ]
        scores = {name: statistics.mean((r["prompt"], r["right"]) for r in part) for name, part in self.records.items()}
        scores["all"] = statistics.mean_of_means(pairs("right"))
        scores["quality, dB"] = statistics.mean_of_means(pairs("quality"))
        for name, key in (("loss", "loss"), ("held-out loss", "held_out")):
            if all(pairs(key)):
                scores[name] = statistics.mean_of_means(pairs(key))
        return scores


def favourites(records: Sequence[dict], count: int) -> list[dict]:
    """Of each `count` pictures of a prompt, in the order of their samples, the one that the referees choose."""
    by_prompt: dict[str, list[dict]] = {}
    for record in records:
        by_prompt.setdefault(record["prompt"], []).append(record)
    return [
        min(group[start : start + count], key=lambda record: math.inf if record["choice"] is None else record["choice"])
        for group in by_prompt.values()
        for start in range(0, len(group) - count + 1, count)
    ]


def points(row: str, passes: float, records: Mapping[str, Sequence[dict]]) -> list[Point]:
    """The curve of a row, of its records by category: the best of 1, 2, 4, ... of the samples that there are."""
    every = [record for part in records.values() for record in part]
    samples = 1 + max(record["sample"] for record in every)
    seconds = float(np.median([record["seconds"] for record in every]))
    counts = [2**n for n in range(samples.bit_length())]
    if all(record["choice"] is None for record in every):
        counts = [1]
    best = {count: {name: favourites(part, count) for name, part in records.items()} for count in counts}
    return [Point(row, count, count * passes, count * seconds, best[count]) for count in counts]


def gains(
    point: Point, opponents: Sequence[Point], records: Mapping[str, Sequence[dict]]
) -> dict[str, statistics.Mean]:
    """How many more are right than of the best of as many samples as the point's cost pays for, by prompt.

    Args:
        point: of any row.
        opponents: the curve of SAMPLING.
        records: all of SAMPLING, by category.

    Returns:
        The mean difference of each category, as "gain, colour", and over them, "gain"; nothing where the cost is less than
        that of a sample, or more than that of all samples that there are.
    """
    count = int(point.passes / opponents[0].passes + 1e-6)
    if not 1 <= count <= opponents[-1].count:
        return {}
    groups = {}
    for category, own in point.records.items():
        theirs = _shares(favourites(records[category], count))
        groups[category] = [(prompt, share - theirs[prompt]) for prompt, share in _shares(own).items()]
    whole = {"gain": statistics.mean_of_means(list(groups.values()))}
    return whole | {f"gain, {category}": statistics.mean(group) for category, group in groups.items()}


def _shares(records: Sequence[dict]) -> dict[str, float]:
    """Prompt -> the share of its pictures that are right."""
    right: dict[str, list[bool]] = {}
    for record in records:
        right.setdefault(record["prompt"], []).append(record["right"])
    return {prompt: float(np.mean(values)) for prompt, values in right.items()}


def is_fooled(point: Point, opponents: Sequence[Point]) -> bool:
    """Whether the optimised referees like a point's pictures better than any sample's of its cost, and no more are right."""
    cheaper = [other for other in opponents if other.passes <= point.passes + 1e-6]
    if not cheaper or point.row == SAMPLING:
        return False
    mine, theirs = point.scores, cheaper[-1].scores
    return "loss" in mine and mine["loss"].mean < theirs["loss"].mean and mine["all"].mean <= theirs["all"].mean


def table(curves: Mapping[str, Sequence[Point]], records: Mapping[str, Sequence[dict]]) -> tuple[str, report.Rows]:
    """The Markdown tables of all points, cheapest first, and of their gains by category, and their scores.

    `records` are those of SAMPLING by category.
    """
    rows, means, opponents = {}, {}, curves.get(SAMPLING, ())
    for point in sorted((point for curve in curves.values() for point in curve), key=lambda point: point.passes):
        name = point.row if point.count == 1 else f"{point.row}: best of {point.count}"
        is_compared = opponents and point.row != SAMPLING
        scores = point.scores | (gains(point, opponents, records) if is_compared else {})
        short = [f"{mean.mean:.2f}" for key, mean in scores.items() if key in world.CATEGORIES]
        others = [str(scores["all"]), str(scores.get("gain", "-"))]
        rest = [f"{scores[key].mean:.2f}" if key in scores else "-" for key in ("held-out loss", "quality, dB")]
        mark, means[name] = ["fooled" if is_fooled(point, opponents) else ""], scores
        pace = f"{scores['all'].mean / point.seconds:.3g}"
        rows[name] = [f"{point.passes:.0f}", f"{point.seconds:.2f}", pace, *short, *others, *rest, *mark]
    columns = ["method", "passes", "s", "right a second", *records, "all", "at equal cost", "held-out loss"]
    columns += ["quality, dB", ""]
    text = console.markdown(columns, rows)
    if compared := {name: scores for name, scores in means.items() if "gain" in scores}:
        names = [*(f"gain, {category}" for category in records), "gain"]
        text += "\n\nMore right than of the best of as many samples as the same cost pays for:\n\n"
        text += report.table(compared, "method", names)
    return text, means


def draw(curves: Mapping[str, Sequence[Point]], file: pathlib.Path) -> None:
    """A panel for each category and for all: right pictures over passes of the U-Net."""
    some = next(iter(curves.values()))[0]
    panels = {
        name: {row: [(point.passes, point.scores[name]) for point in curve] for row, curve in curves.items()}
        for name in [*some.records, *(["all"] if len(some.records) > 1 else [])]
    }
    report.draw_curves(panels, "passes of the U-Net", "right", file)


def one_pass(settings: config.Settings) -> float:
    """FLOPs of a pass of the U-Net."""
    is_guided = settings.sds.prompt != settings.sds.negative_prompt
    return cost.estimate(settings).parts["denoiser"] / (2 if is_guided else 1)


def compare(args: flags.FlagValues) -> str:
    """Measures what the flags select; writes and returns the table."""
    base = config.from_config(args.config)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    keep(base, out)
    categories = world.CATEGORIES if "all" in args.category else args.category
    engines, curves, sampled, unit = Engines(), {}, {}, one_pass(base)
    for row in args.rows or ROWS:
        count = args.candidates if row in (SAMPLING, ONE_STEP) else args.samples
        settings = dataclasses.replace(config.override(base, ROWS[row]), samples=count)
        records = {
            category: [
                record
                for split in benchmark.splits(category)
                for record in measure(row, category, split, settings, out, engines, limit=args.limit)
            ]
            for category in categories
        }
        sampled = records if row == SAMPLING else sampled
        curves[row] = points(row, cost.estimate(settings).image / unit, records)
        logging.info("%s: %s right", row, curves[row][0].scores["all"])
    text, means = table(curves, sampled or dict.fromkeys(categories, ()))
    files.write_atomic(out / "table.md", text.encode())
    files.write_atomic(out / "table.csv", report.as_csv(means, "method").encode())
    draw(curves, out / "figure.png")
    return text


def main(args: flags.FlagValues) -> str:
    """The command line."""
    cli.prepare(args.device)
    return compare(args)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", config.find("shapes"), "config file, or the name of one")
    cli.define_device()
    flags.DEFINE_integer("samples", 2, "pictures per prompt", lower_bound=1)
    flags.DEFINE_integer(
        "candidates", 64, "pictures per prompt of the row 'sampling', of which the best of N are taken", lower_bound=1
    )
    flags.DEFINE_integer("limit", None, "only the first so many prompts of each list", lower_bound=1)
    flags.DEFINE_multi_enum("category", ["all"], ["all", *world.CATEGORIES], "of the prompts; may be repeated")
    flags.DEFINE_multi_enum("rows", None, list(ROWS), "only these rows")
    flags.DEFINE_string("out", "runs/methods", "directory of records and pictures")
    cli.start(main)
