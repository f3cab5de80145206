"""Variants of a config beside each other: the same prompts and seeds, one table and one figure.

    python -m referee_jax.sweep --sweep=configs/ablation.py --samples=4 --workdir=runs/ablation
    python -m referee_jax.sweep --sweep=configs/shapes.py --vary=sds.guidance=1.5,3,7.5 --workdir=runs/guidance

A sweep file is a config file that may also have `get_variants()`: name -> {setting: value}, with settings named
as on the command line ("sds.guidance"). `--vary` adds variants with other values of one setting. Variants that
differ in numbers alone share one compiled program and its batches, each row with its own numbers; the others
(another referee, other augmentations) have their own engines, one after the other.

Each picture's scores are a line of scores.jsonl, with which an interrupted sweep continues: those of the
referees and, in the shapes world, whether it is right. Writes table.md, table.csv, figure.png (with the
extra `[eval]`) and the images. Exit codes: 0 done, 2 the command cannot be carried out.
"""

import ast
import json
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tqdm
from absl import flags

from referee_jax import cli, config
from referee_jax import items as items_lib
from referee_jax.benchmarks import methods, report, statistics
from referee_jax.engine import builders, inverter
from referee_jax.items import Item
from referee_jax.shapes import benchmark, world
from referee_jax.storage import files, images, objects
from referee_jax.weights import hub

Row = tuple[str, Item]  # name of the variant, item
GAINS = {"right": "right, gain", "quality": "quality, gain"}  # score -> name of its gain on the first variant


def read(file: str, vary: Sequence[str] = ()) -> dict[str, config.Settings]:
    """The settings of each variant of a sweep file, and of `vary`: "setting=value,value". Raises ConfigError."""
    base = config.load(file)
    changes_of = runpy.run_path(config.find(file)).get("get_variants", lambda: {"as it is": {}})()
    for argument in vary:
        key, _, values = argument.partition("=")
        try:
            changes_of |= {f"{key} = {value}": {key: ast.literal_eval(value)} for value in values.split(",")}
        except (ValueError, SyntaxError) as error:
            raise config.ConfigError(f"--vary={argument}: it should be setting=number,number") from error
    variants = {}
    for name, changes in changes_of.items():
        try:
            variants[name] = config.override(base, changes)
        except config.ConfigError as error:
            raise config.ConfigError(f"variant {name!r}: {error}") from error
    if len(variants) < 2:
        raise config.ConfigError(f"{file} has no get_variants(), and there is no --vary: there is nothing to compare")
    return variants


def programs(variants: Mapping[str, config.Settings]) -> list[list[str]]:
    """The names of the variants, grouped by compiled program."""
    groups: dict[str, list[str]] = {}
    for name, settings in variants.items():
        groups.setdefault(config.to_json(builders.structure(settings)), []).append(name)
    return list(groups.values())


def run(variants: Mapping[str, config.Settings], out: Path) -> list[dict[str, Any]]:
    """The records of all variants: `variant`, `prompt`, `sample`, `file`, `scores`. Those in `out` are not made again.

    Raises ConfigError if variants differ in prompts, samples or seed, or if `out` has results of other settings.
    """
    first = next(iter(variants.values()))
    if any((s.prompts, s.samples, s.seed) != (first.prompts, first.samples, first.seed) for s in variants.values()):
        raise config.ConfigError("variants have prompts, samples and seed in common")
    _keep(variants, out)
    journal = out / "scores.jsonl"
    files.mend(journal)
    records = files.read_lines(journal)
    done = {(record["variant"], record["prompt"], record["sample"]) for record in records}
    items = items_lib.expand(first.prompts, first.samples)
    todo = [(name, item) for name in variants for item in items if (name, item.prompt, item.sample) not in done]
    with tqdm.tqdm(total=len(todo), unit="image", dynamic_ncols=True) as bar:
        for names in programs(variants):
            engine = None  # frees its networks before the next ones are loaded
            rows = [row for row in todo if row[0] in names]
            engine = inverter.Inverter.from_config(variants[names[0]]) if rows else None
            for batch in items_lib.batches(rows, engine.batch_size) if engine else ():
                bar.set_description(batch[0][0])
                for record in _make(engine, batch, variants, out):
                    files.append(journal, record)
                    records.append(record)
                bar.update(len(batch))
    return records


def _keep(variants: Mapping[str, config.Settings], out: Path) -> None:
    """Writes settings and versions of weights, or compares them with those in `out`. ConfigError for other ones."""
    file, values = out / "variants.json", {name: config.image_settings(s) for name, s in variants.items()}
    weights = hub.versions(dict.fromkeys(pair for s in variants.values() for pair in config.checkpoints(s)))
    for name, settings in variants.items():
        values[name]["weights"] = {checkpoint: weights[checkpoint] for checkpoint, _ in config.checkpoints(settings)}
    if file.exists():
        before = json.loads(file.read_text())
        for name in filter(before.__contains__, values):
            if difference := config.diff(before[name], values[name]):
                raise config.ConfigError(f"{out} has other results of {name!r}; choose another --workdir\n{difference}")
        values = before | values
    (out / "images").mkdir(parents=True, exist_ok=True)
    files.write_atomic(file, json.dumps(values, indent=2).encode() + b"\n")


def _make(
    engine: inverter.Inverter, rows: Sequence[Row], variants: Mapping[str, config.Settings], out: Path
) -> list[dict[str, Any]]:
    """Makes one batch and writes its images; returns their records."""
    hypers = [builders.make_hyper(variants[name]) for name, _ in rows]
    batch = engine.begin([item for _, item in rows], engine.settings.seed, hypers=hypers)
    records = []
    for (name, item), picture in zip(rows, methods.completed(engine, batch), strict=True):
        file = out / "images" / slug(name) / f"{item.id}.png"
        record = {"variant": name, "prompt": item.prompt, "sample": item.sample, "file": str(file.relative_to(out))}
        record["scores"] = files.finite(picture.scores | truth(picture.image, item.prompt))
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(file, images.encode_png(images.to_uint8(picture.image), record))
        records.append(record)
    return records


def truth(image, prompt: str) -> dict[str, float]:
    """`right` and `quality` of a picture of the shapes world; empty for other prompts."""
    try:
        right, quality = benchmark.score([image], [prompt])
    except ValueError:
        return {}
    return {"right": float(right[0]), "quality": float(quality[0])}


def slug(name: str) -> str:
    """The name of a variant's directory."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", name).strip("._") or "variant"


def means(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, statistics.Mean]]:
    """Variant -> score -> mean.

    Besides the records' scores there are `right` of each category of the shapes world's prompts, of the seen and of the
    unseen ones, and GAINS on the first variant. These are paired by prompt and sample, so that differences among prompts
    do not widen their intervals.
    """
    values: dict[str, dict[str, list[tuple[str, float]]]] = {}
    first: dict[tuple[str, int], Mapping[str, float]] = {}
    for record in records:
        prompt, sample = record["prompt"], record["sample"]
        lists = values.setdefault(record["variant"], {})
        scores = {name: value for name, value in record["scores"].items() if value is not None}
        if "right" in scores:
            category, split = benchmark.parts(prompt)[-1].split(", ")
            scores |= {f"right, {part}": scores["right"] for part in (category, split)}
        if len(values) == 1:
            first[prompt, sample] = scores
        else:
            before = first.get((prompt, sample), {})
            scores |= {gain: scores[x] - before[x] for x, gain in GAINS.items() if x in scores and x in before}
        for name, value in scores.items():
            lists.setdefault(name, []).append((prompt, value))
    return {variant: {name: statistics.mean(x) for name, x in lists.items()} for variant, lists in values.items()}


def columns(rows: report.Rows) -> list[str]:
    """The scores in the table's order: ground truth, by category where there are several, then those of referees."""
    names = {name for scores in rows.values() for name in scores}
    categories = [name for category in world.CATEGORIES if (name := f"right, {category}") in names]
    if len(categories) == 1:
        names.remove(categories.pop())
    truth = ["right", "right, seen", "right, unseen", GAINS["right"], "quality", GAINS["quality"], *categories]
    return [name for name in truth if name in names] + sorted(names - set(truth))


def sweep(
    file: str,
    workdir: Path,
    *,
    vary: Sequence[str] = (),
    names: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
) -> str:
    """Runs a sweep and returns its table.

    Args:
        file: the sweep file.
        workdir: directory of scores, table, figure and images.
        vary: further variants, "setting=value,value" each.
        names: only these variants.
        changes: settings of all variants.
    """
    variants = {name: config.override(settings, changes or {}) for name, settings in read(file, vary).items()}
    if unknown := [name for name in names if name not in variants]:
        raise config.ConfigError(f"there is no variant {unknown[0]!r}; there are {', '.join(variants)}")
    workdir.mkdir(parents=True, exist_ok=True)
    records = run({name: variants[name] for name in names or variants}, workdir)
    order = {name: place for place, name in enumerate(variants)}  # also those of an earlier command
    rows = means(sorted((x for x in records if x["variant"] in order), key=lambda x: order[x["variant"]]))
    scores = columns(rows)
    drawn = [name for name in ("right", *GAINS.values()) if name in scores]
    return report.write(rows, "variant", scores, drawn or scores[:1], workdir)


def main(args: flags.FlagValues) -> str:
    """The command line."""
    if not args.sweep or not args.workdir:
        raise ValueError("--sweep=FILE and --workdir=DIRECTORY are needed")
    cli.prepare(args.device)
    changes = {name: args[name].value for name in ("samples", "batch_size") if args[name].value is not None}
    return sweep(args.sweep, objects.local_only(args.workdir), vary=args.vary, names=args.variant, changes=changes)


if __name__ == "__main__":
    flags.DEFINE_string("sweep", None, "config file, with get_variants() or not")
    flags.DEFINE_string("workdir", None, "directory of scores, table, figure and images")
    cli.define_device()
    flags.DEFINE_integer("samples", None, "images per prompt; default: the config's", lower_bound=1)
    flags.DEFINE_integer("batch_size", None, "images at once on each device; default: the config's", lower_bound=1)
    flags.DEFINE_multi_string("vary", [], "setting=value,value,...: variants with these; may be repeated")
    flags.DEFINE_multi_string("variant", [], "only this variant; may be repeated")
    cli.start(main)
