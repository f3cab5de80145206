"""Scores a run directory, or a folder of images in a benchmark's own layout.

    python -m referee_jax.evaluate --workdir=runs/mine --benchmark=shapes
    python -m referee_jax.evaluate --workdir=runs/mine --benchmark=t2i_compbench --lists=T2I-CompBench/examples/dataset
    python -m referee_jax.evaluate --workdir=runs/mine --referee=yuvalkirstain/PickScore_v1 --referee=shapes/blip_itm
    python -m referee_jax.evaluate --workdir=runs/mine --benchmark=shapes --vqa=shapes/blip_vqa --referee=shapes/clip
    python -m referee_jax.evaluate --workdir=runs/mine --export=t2i_compbench --out=exported \
        --lists=T2I-CompBench/examples/dataset
    python -m referee_jax.evaluate --workdir=exported --benchmark=t2i_compbench --import_scores=exported \
        --lists=T2I-CompBench/examples/dataset

Writes `evaluation/` in the directory, or `--out`: for each measure a file from which an interrupted evaluation continues,
`images.jsonl` with all scores of each image, and `scores.json`, the table that is printed: means with 95 % intervals
(bootstrap over prompts). In the shapes world, where it is known which pictures are right, a second table says how far the other
scores agree with that, and `fooled.png` shows the wrong pictures that each of them likes best.

What is imported is not measured here as well, and needs no weights, unless --vqa or --clip asks for it; `scores.json` says of
each measure by what it was made, or from where it is. Exit codes: 0 done, 2 the command cannot be carried out.
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from referee_jax import cli, console
from referee_jax.benchmarks import agreement, layouts, measures, noun_phrases, statistics, t2i_compbench
from referee_jax.shapes import benchmark as benchmark_lib
from referee_jax.storage import bucket, contact_sheet, files, run_directory

ALL = "all"
VQA, CLIP = "checkpoints/blip-vqa-480", "openai/clip-vit-base-patch32"
FOOLED = 8  # wrong pictures that are shown for each score


def read(directory: Path) -> list[layouts.Entry]:
    """The images of a run directory, or of a folder in T2I-CompBench's or GenEval's layout. ValueError where there are none."""
    if any(directory.glob("metadata*.jsonl")):
        entries = layouts.read_run(directory)
    elif (directory / "samples").is_dir():
        entries = layouts.read_t2i_compbench(directory)
    elif directory.is_dir() and any(directory.glob("*/metadata.jsonl")):
        entries = layouts.read_geneval(directory)
    else:
        raise ValueError(f"{directory} is neither a run directory nor a folder in T2I-CompBench's or GenEval's layout")
    if not entries:
        raise ValueError(f"{directory} holds no finished image")
    return entries


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The images, what each prompt counts in besides everything, and the scores of each file so far."""

    entries: list[layouts.Entry]
    parts: dict[str, list[str]]
    scores: dict[str, measures.Scores]

    @classmethod
    def of(cls, entries: list[layouts.Entry], parts: Mapping[str, list[str]]) -> "Evaluation":
        """Before any measure."""
        return cls(entries, dict(parts), {str(entry.file): {} for entry in entries})

    def add(self, scores: Mapping[str, measures.Scores]) -> None:
        """Scores by file; ValueError for a file that is none of the images."""
        if strange := sorted(scores.keys() - self.scores.keys()):
            raise ValueError(f"scores of {strange[0]}, which is not among the images")
        for file, own in scores.items():
            self.scores[file] |= own

    def of_name(self, name: str) -> list[tuple[str, float]]:
        """Prompt and value of each image that has a score of this name."""
        scored = ((entry.prompt, self.scores[str(entry.file)]) for entry in self.entries)
        return [(prompt, own[name]) for prompt, own in scored if name in own]

    def summary(self) -> dict[str, dict[str, statistics.Mean]]:
        """Part -> score -> mean over its images."""
        found: dict[str, dict[str, list[tuple[str, float]]]] = {}
        for entry in self.entries:
            for part in (ALL, *self.parts.get(entry.prompt, ())):
                for name, value in self.scores[str(entry.file)].items():
                    if isinstance(value, int | float):
                        found.setdefault(part, {}).setdefault(name, []).append((entry.prompt, value))
        return {part: {name: statistics.mean(values) for name, values in own.items()} for part, own in found.items()}


def table(found: Mapping[str, Mapping[str, statistics.Mean]], titles: Mapping[str, str] | None = None) -> str:
    """A row per part, a column per score, titled by its name or as `titles` has it."""
    names = list(dict.fromkeys(name for own in found.values() for name in own))
    rows = {
        part: [max(mean.images for mean in own.values()), *(own.get(name, "-") for name in names)]
        for part, own in found.items()
    }
    return console.markdown(["", "images", *((titles or {}).get(name, name) for name in names)], rows)


def plan(
    benchmark: str | None,
    evaluation: Evaluation,
    *,
    vqa: str | None,
    clip: str | None,
    rule: str,
    judges: Sequence[str],
) -> list[tuple[measures.Measure, list[layouts.Entry]]]:
    """The measures that are wanted, each with the images it is for and that have no score of its name; a referee is for all.

    `vqa` and `clip` None are the benchmark's own, "" none.
    """
    entries = evaluation.entries
    wanted = []
    if benchmark == "shapes":
        wanted.append((measures.ground_truth(), entries))
        if vqa:
            wanted.append((measures.blip_vqa(vqa, [entry.prompt for entry in entries], rule=rule), entries))
    elif benchmark == "t2i_compbench":
        vqa, clip = VQA if vqa is None else vqa, CLIP if clip is None else clip
        builders = {}
        if vqa:
            builders["blip_vqa"] = lambda prompts: measures.blip_vqa(vqa, prompts, rule=rule)
        if clip:
            builders["clip"] = lambda prompts: measures.clip_score(clip)
            builders["clip_without_adjectives"] = lambda prompts: measures.clip_without_adjectives(clip, prompts)
        for name, build in builders.items():
            unscored = [
                entry
                for entry in entries
                if t2i_compbench.is_measured(evaluation.parts[entry.prompt], name)
                and name not in evaluation.scores[str(entry.file)]
            ]
            if unscored:
                wanted.append((build([entry.prompt for entry in unscored]), unscored))
    return wanted + [(measure, entries) for measure in measures.by_referees(judges)]


def evaluate(args) -> str:
    """What the command line says; returns what is to be printed. Raises ValueError for what cannot be done."""
    directory = bucket.local_only(args.workdir)
    entries = read(directory)
    if args.export:
        return export(args.export, entries, Path(args.out or directory / args.export), args)
    out = Path(args.out or directory / "evaluation")
    out.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation.of(entries, parts(args.benchmark, entries, args.lists, args.category))
    brought = imported(evaluation, directory, args) if args.import_scores else []
    if args.category == "complex" and not args.lists and "3_in_1" not in brought:
        logging.warning("there is no 3_in_1 by --category=complex alone: --lists says of what kind a complex prompt is")
    wanted = plan(args.benchmark, evaluation, vqa=args.vqa, clip=args.clip, rule=args.noun_phrases, judges=args.referee)
    for measure, own in wanted:
        evaluation.add(measures.collect(measure, own, out))
    if args.benchmark == "t2i_compbench":
        for entry in entries:
            own = evaluation.scores[str(entry.file)]
            score = t2i_compbench.three_in_one(evaluation.parts[entry.prompt], own)
            if score is not None and "3_in_1" not in own:
                own["3_in_1"] = score
    found = evaluation.summary()
    if not found:
        raise ValueError("there is nothing to measure by: give --benchmark, --referee or --import_scores")
    if args.benchmark == "geneval" and brought:
        found[ALL]["geneval"] = statistics.mean_of_means(
            [evaluation.of_name(tag) for tag in brought if tag != "geneval"]
        )
    lines = [
        {"file": str(entry.file), "prompt": entry.prompt, "sample": entry.sample, **evaluation.scores[str(entry.file)]}
        for entry in entries
    ]
    files.write_atomic(out / "images.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    record = {
        "measures": dict.fromkeys(brought, {"imported": args.import_scores})
        | {measure.settings.get("label", measure.name): measure.settings for measure, _ in wanted},
        "versions": run_directory.versions(),
        "scores": {part: {name: mean._asdict() for name, mean in own.items()} for part, own in found.items()},
    }
    agreed = agreements(lines, out)
    if agreed:
        record["agreement"] = {name: own._asdict() for name, own in agreed.items()}
    files.write_atomic(out / "scores.json", json.dumps(files.finite(record), indent=2).encode() + b"\n")
    titles = {name: f"{name} (imported)" for name in brought if args.benchmark == "t2i_compbench"}
    if any(measure.name == "blip_vqa" for measure, _ in wanted):
        titles["blip_vqa"] = f"blip_vqa ({args.noun_phrases} noun phrases)"
    return table(found, titles) + ("\n" + agreement.table(agreed) if agreed else "")


def agreements(lines: Sequence[Mapping[str, Any]], out: Path) -> dict[str, agreement.Agreement]:
    """How far each score of all images agrees with `right`, where that is known; draws fooled.png."""
    numbers = [
        name for name, value in lines[0].items() if isinstance(value, float) and name not in ("right", "quality")
    ]
    if "right" not in lines[0] or not numbers:
        return {}
    right, prompted = [line["right"] == 1 for line in lines], [line["prompt"] for line in lines]
    found, shown = {}, []
    for name in numbers:
        scores = [line[name] for line in lines]
        found[name] = agreement.measure(prompted, scores, right)
        for row in agreement.fooled(scores, right, FOOLED):
            shown.append((Path(lines[row]["file"]), lines[row]["prompt"], {name: scores[row]}))
    if shown:
        buffer = io.BytesIO()
        contact_sheet.draw_sheet(shown, title="wrong pictures with the highest scores").save(buffer, "PNG")
        files.write_atomic(out / "fooled.png", buffer.getvalue())
    return found


def parts(
    benchmark: str | None, entries: Sequence[layouts.Entry], lists: str | None, category: str | None
) -> dict[str, list[str]]:
    """What each prompt counts in besides everything. ValueError where that cannot be said."""
    texts = dict.fromkeys(entry.prompt for entry in entries)
    if benchmark == "shapes":
        return {text: benchmark_lib.parts(text) for text in texts}
    if benchmark != "t2i_compbench":
        return {text: [] for text in texts}
    if not lists:
        if category:
            return {text: [category] for text in texts}
        raise ValueError(
            "--lists is missing: the directory of T2I-CompBench's *_val.txt files (examples/dataset of "
            "https://github.com/Karine-Huang/T2I-CompBench), or --category, if all prompts are of one"
        )
    known = t2i_compbench.read_lists(Path(lists))
    found = {
        text: [part for part in known.get(text, ()) if not category or part.partition(",")[0] == category]
        for text in texts
    }
    if strange := [text for text, own in found.items() if not own]:
        where = f"not in the list of {category}" if category else "in none of the lists"
        raise ValueError(f"{len(strange)} prompts are {where} of {lists}, {strange[0]!r} for one")
    return found


def imported(evaluation: Evaluation, directory: Path, args) -> list[str]:
    """Adds what external scorers found of the images in an exported folder, but for what is to be measured; its names."""
    if args.benchmark == "geneval":
        found = layouts.import_geneval(args.import_scores)
        evaluation.add({str(directory / file): {"geneval": x} for own in found.values() for file, x in own.items()})
        for tag, own in found.items():
            evaluation.add({str(directory / file): {tag: x} for file, x in own.items()})
        return ["geneval", *found]
    if args.benchmark != "t2i_compbench":
        raise ValueError("--import_scores is of --benchmark=t2i_compbench or geneval")
    prompts = {str(entry.file): entry.prompt for entry in evaluation.entries}
    asked = {"blip_vqa": args.vqa, "clip": args.clip}
    brought: dict[str, None] = {}
    for measure, own in layouts.import_t2i_compbench(args.import_scores).items():
        if asked.get(measure):
            logging.warning("%s is measured by %s, what was imported is left out", measure, asked[measure])
            continue
        for name, score in own.items():
            file = str(directory / "samples" / name)
            said = t2i_compbench.name_of_result(measure, evaluation.parts.get(prompts.get(file), ()))
            evaluation.add({file: {said: score}})
            brought[said] = None
    return list(brought)


def export(benchmark: str, entries: Sequence[layouts.Entry], out: Path, args) -> str:
    """Writes the folder that the official scorers of a benchmark read."""
    if benchmark == "geneval":
        if not args.metadata:
            raise ValueError("--metadata is missing: GenEval's evaluation_metadata.jsonl")
        count = layouts.export_geneval(entries, out, args.metadata, per_prompt=args.per_prompt or 4)
        return f"{count} images in {out}\n"
    order, said = None, ""
    if args.lists:
        there = {entry.prompt for entry in entries}
        category, listed = t2i_compbench.read_list_of(Path(args.lists), there, category=args.category)
        order = [prompt for prompt in listed if prompt in there]
        said = f", of {len(order)} of the {len(listed)} prompts of {category}, in their order"
    count = layouts.export_t2i_compbench(entries, out, prompts=order, per_prompt=args.per_prompt or 10)
    return f"{count} images in {out}{said}\n"


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The command's flags."""
    own = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "run directory, or a folder of images in a benchmark's layout", **own)
    flags.DEFINE_enum("benchmark", None, ["shapes", "t2i_compbench", "geneval"], "what is measured", **own)
    cli.define_device(values)
    flags.DEFINE_multi_string("referee", [], "checkpoint of a referee that scores each image; may be repeated", **own)
    flags.DEFINE_string(
        "lists", None, "directory of T2I-CompBench's *_val.txt files: what is seen and unseen, and of what kind complex prompts "
        "are. --export takes their order, or else that of the first images; the official 3-in-1 needs theirs", **own,
    )  # fmt: skip
    flags.DEFINE_enum(
        "category", None, list(t2i_compbench.CATEGORIES), "of all prompts; without --lists there are no parts of it", **own,
    )  # fmt: skip
    flags.DEFINE_string(
        "vqa", None, f"BLIP for BLIP-VQA, as weights.lavis converts it, also where that is imported; default: {VQA}, for shapes "
        "none; empty: none", **own,
    )  # fmt: skip
    flags.DEFINE_string(
        "clip", None, f"CLIP for CLIPScore, also where that is imported; default: {CLIP}; empty: none", **own
    )
    flags.DEFINE_enum(
        "noun_phrases", noun_phrases.NEW, list(noun_phrases.RULES), "which ones BLIP-VQA asks about: new, the first 8 but for "
        "places, as the official scorer does now; old, the first 2 of all, as it did at first", **own,
    )  # fmt: skip
    flags.DEFINE_enum(
        "export", None, ["t2i_compbench", "geneval"], "write the folder that its official scorers read", **own
    )
    flags.DEFINE_string("metadata", None, "GenEval's evaluation_metadata.jsonl, for --export=geneval", **own)
    flags.DEFINE_integer(
        "per_prompt", None, "images of each prompt, for --export; default: the benchmark's", lower_bound=1, **own
    )
    flags.DEFINE_string("import_scores", None, "exported folder with results, or GenEval's results.jsonl", **own)
    flags.DEFINE_string("out", None, "directory to write; default: within --workdir", **own)


def main(args: flags.FlagValues) -> str:
    """The command line."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    if not args.workdir:
        raise ValueError("--workdir is missing: a run directory, or a folder of images in a benchmark's layout")
    if args.referee or args.vqa or args.benchmark == "t2i_compbench":  # who scores needs a device
        cli.prepare(args.device)
    return evaluate(args)


if __name__ == "__main__":
    define_flags()
    cli.start(main)
