"""Variants of a config beside each other: the same prompts and seeds, one table and one figure.

    python -m referee_jax.sweep --sweep=configs/ablation.py --samples=4 --workdir=runs/ablation
    python -m referee_jax.sweep --sweep=configs/shapes.py --vary=sds.guidance=1.5,3,7.5 --workdir=runs/guidance

A sweep file is a config file, and may have `get_variants()` besides: name -> {setting: value}, settings named as on the command
line ("sds.guidance"). `--vary` adds variants with other values of one setting. Variants that differ in numbers alone are rows
of the same batches of one compiled program, each row with numbers of its own; others (another referee, other augmentations)
have engines of their own, one after the other.

Every picture's scores are a line of scores.jsonl, from which an interrupted sweep continues: what the referees say of it and, in
the shapes world, whether it is right. Writes table.md, table.csv, figure.png (with the extra `[eval]`) and the images. Exit
codes: 0 done, 2 the command cannot be carried out.
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
from referee_jax.benchmarks import report, statistics
from referee_jax.engine import builders, inverter
from referee_jax.items import Item
from referee_jax.shapes import benchmark
from referee_jax.storage import bucket, files, images

Row = tuple[str, Item]  # name of the variant, what is made
GAINS = {
    "right": "right, gain",
    "quality": "quality, gain",
}  # score -> what it is called as a gain on the first variant


def read(file: str, vary: Sequence[str] = ()) -> dict[str, config.Settings]:
    """The settings of each variant of a sweep file, and of `vary`: "setting=value,value". Raises ConfigError."""
    base = config.load(file)
    made = runpy.run_path(file).get("get_variants", lambda: {"as it is": {}})()
    for said in vary:
        key, _, values = said.partition("=")
        try:
            made |= {f"{key} = {value}": {key: ast.literal_eval(value)} for value in values.split(",")}
        except (ValueError, SyntaxError) as error:
            raise config.ConfigError(f"--vary={said}: it should be setting=number,number") from error
    variants = {}
    for name, changes in made.items():
        try:
            variants[name] = config.override(base, changes)
        except config.ConfigError as error:
            raise config.ConfigError(f"variant {name!r}: {error}") from error
    if len(variants) < 2:
        raise config.ConfigError(f"{file} has no get_variants(), and there is no --vary: there is nothing to compare")
    return variants


def programs(variants: Mapping[str, config.Settings]) -> list[list[str]]:
    """The names of the variants, those together that one compiled program serves."""
    groups: dict[str, list[str]] = {}
    for name, settings in variants.items():
        groups.setdefault(config.to_json(builders.structure(settings)), []).append(name)
    return list(groups.values())


def run(variants: Mapping[str, config.Settings], out: Path) -> list[dict[str, Any]]:
    """The records of all variants; what `out` has already is not made again.

    A record has `variant`, `prompt`, `sample`, `file` and `scores`. Raises ConfigError where variants have other prompts or
    another number of samples than the first, and where `out` is of other variants.
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
            engine = None  # its networks make room for the next one's
            own = [row for row in todo if row[0] in names]
            engine = inverter.Inverter.from_config(variants[names[0]]) if own else None
            for share in items_lib.batches(own, engine.batch_size) if engine else ():
                bar.set_description(share[0][0])
                for record in _made(engine, share, variants, out):
                    files.append(journal, record)
                    records.append(record)
                bar.update(len(share))
    return records


def _keep(variants: Mapping[str, config.Settings], out: Path) -> None:
    """Writes what is swept, or compares it with what is there."""
    file, said = out / "variants.json", {name: config.image_settings(s) for name, s in variants.items()}
    if file.exists():
        before = json.loads(file.read_text())
        for name in filter(before.__contains__, said):
            if difference := config.diff(before[name], said[name]):
                raise config.ConfigError(f"{out} has other results of {name!r}; choose another --workdir\n{difference}")
        said = before | said
    (out / "images").mkdir(parents=True, exist_ok=True)
    files.write_atomic(file, json.dumps(said, indent=2).encode() + b"\n")


def _made(
    engine: inverter.Inverter, share: Sequence[Row], variants: Mapping[str, config.Settings], out: Path
) -> list[dict[str, Any]]:
    """One batch, its images written."""
    hypers = [builders.make_hyper(variants[name]) for name, _ in share]
    batch = engine.begin([item for _, item in share], engine.settings.seed, hypers)
    while batch.step < engine.steps:
        batch, _ = engine.advance(batch)
    records = []
    for (name, item), picture in zip(share, engine.finish(batch), strict=True):
        file = out / "images" / slug(name) / f"{item.id}.png"
        record = {"variant": name, "prompt": item.prompt, "sample": item.sample, "file": str(file.relative_to(out))}
        record["scores"] = files.finite(picture.scores | truth(picture.image, item.prompt))
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(file, images.encode_png(images.to_uint8(picture.image), record))
        records.append(record)
    return records


def truth(image, prompt: str) -> dict[str, float]:
    """`right` and `quality` of a picture of the shapes world; nothing of another."""
    try:
        right, quality = benchmark.score([image], [prompt])
    except ValueError:
        return {}
    return {"right": float(right[0]), "quality": float(quality[0])}


def slug(name: str) -> str:
    """A name of a directory."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", name).strip("._") or "variant"


def means(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, statistics.Mean]]:
    """Variant -> score -> mean.

    `right` is also told of seen and of unseen prompts, and `right` and `quality` as the `GAINS` on the first variant, picture by
    picture of the same prompts and samples: what prompts have in common does not widen their intervals.
    """
    found: dict[str, dict[str, list[tuple[str, float]]]] = {}
    first: dict[tuple[str, int], Mapping[str, float]] = {}
    for record in records:
        prompt, scores, place = record["prompt"], record["scores"], (record["prompt"], record["sample"])
        own = found.setdefault(record["variant"], {})
        if len(found) == 1:
            first[place] = scores
        told = {name: value for name, value in scores.items() if value is not None}
        if "right" in told:
            split = benchmark.parts(prompt)[-1].rpartition(", ")[2]
            told[f"right, {split}"] = told["right"]
        if len(found) > 1:
            before = first.get(place, {})
            told |= {gain: told[x] - before[x] for x, gain in GAINS.items() if None not in (told.get(x), before.get(x))}
        for name, value in told.items():
            own.setdefault(name, []).append((prompt, value))
    return {variant: {name: statistics.mean(x) for name, x in own.items()} for variant, own in found.items()}


def columns(found: report.Rows) -> list[str]:
    """The scores in the table's order: what is known, then what referees say."""
    names = {name for own in found.values() for name in own}
    known = ["right", "right, seen", "right, unseen", GAINS["right"], "quality", GAINS["quality"]]
    return [name for name in known if name in names] + sorted(names - set(known))


def sweep(
    file: str,
    workdir: Path,
    *,
    vary: Sequence[str] = (),
    names: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
) -> str:
    """Runs the variants of a sweep file, or those of `names`, all with `changes`; returns the table."""
    variants = {name: config.override(settings, changes or {}) for name, settings in read(file, vary).items()}
    if unknown := [name for name in names if name not in variants]:
        raise config.ConfigError(f"there is no variant {unknown[0]!r}; there are {', '.join(variants)}")
    workdir.mkdir(parents=True, exist_ok=True)
    asked = {name: variants[name] for name in names or variants}
    records = run(asked, workdir)
    order = {name: place for place, name in enumerate(variants)}  # also those of an earlier command
    found = means(sorted((x for x in records if x["variant"] in order), key=lambda x: order[x["variant"]]))
    shown = columns(found)
    drawn = [name for name in ("right", *GAINS.values()) if name in shown]
    return report.write(found, "variant", shown, drawn or shown[:1], workdir)


def main(args: flags.FlagValues) -> str:
    """The command line."""
    if not args.sweep or not args.workdir:
        raise ValueError("--sweep=FILE and --workdir=DIRECTORY are needed")
    cli.prepare(args.device)
    changes = {name: args[name].value for name in ("samples", "batch_size") if args[name].value is not None}
    return sweep(args.sweep, bucket.local_only(args.workdir), vary=args.vary, names=args.variant, changes=changes)


if __name__ == "__main__":
    flags.DEFINE_string("sweep", None, "config file, with get_variants() or not")
    flags.DEFINE_string("workdir", None, "directory of scores, table, figure and images")
    cli.define_device()
    flags.DEFINE_integer("samples", None, "images per prompt; default: the config's", lower_bound=1)
    flags.DEFINE_integer("batch_size", None, "images at once on each device; default: the config's", lower_bound=1)
    flags.DEFINE_multi_string("vary", [], "setting=value,value,...: variants with these; may be repeated")
    flags.DEFINE_multi_string("variant", [], "only this variant; may be repeated")
    cli.start(main)
