"""Scores of a directory of images by measures, referees and external scorers: the body of referee_jax.evaluate."""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from referee_jax import console
from referee_jax.benchmarks import geneval2, layouts, measures, noun_phrases, statistics, t2i_compbench
from referee_jax.shapes import benchmark as shapes_benchmark
from referee_jax.storage import contact_sheet, files, run_directory

ALL = "all"  # the part that every image counts in
VQA, CLIP = "checkpoints/blip-vqa-480", "openai/clip-vit-base-patch32"
QUESTIONED = "Qwen/Qwen3-VL-8B-Instruct"  # GenEval 2's
FOOLED = 8  # wrong pictures in fooled.png for each score

Means = dict[str, dict[str, statistics.Mean]]  # part -> score -> mean


def is_run(directory: Path) -> bool:
    """Whether it is a run directory, and not a folder in a benchmark's layout."""
    return any(directory.glob("metadata*.jsonl"))


def read(directory: Path) -> list[layouts.Entry]:
    """The images of a run directory, of a folder in T2I-CompBench's or GenEval's layout, or of GenEval 2's {prompt: path}.

    Raises ValueError where there are none.
    """
    if is_run(directory):
        entries = layouts.read_run(directory)
    elif (directory / "samples").is_dir():
        entries = layouts.read_t2i_compbench(directory)
    elif directory.is_dir() and any(directory.glob("*/metadata.jsonl")):
        entries = layouts.read_geneval(directory)
    elif directory.suffix == ".json" and directory.is_file() or any(directory.glob(geneval2.PATHS.format("*"))):
        entries = geneval2.read_paths(directory)
    else:
        raise ValueError(f"{directory} is neither a run directory nor a folder in a benchmark's layout")
    if not entries:
        raise ValueError(f"{directory} holds no finished image")
    return entries


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Images, the parts that each prompt counts in besides ALL, and the scores of each file so far."""

    entries: list[layouts.Entry]
    parts: dict[str, list[str]]
    scores: dict[str, measures.Scores]

    @classmethod
    def of(cls, entries: list[layouts.Entry], parts: Mapping[str, list[str]]) -> "Evaluation":
        """Before any measure."""
        return cls(entries, dict(parts), {str(entry.file): {} for entry in entries})

    def add(self, scores: Mapping[str, measures.Scores]) -> None:
        """Adds scores by file. Raises ValueError for a file that is none of the images."""
        if unknown := sorted(scores.keys() - self.scores.keys()):
            raise ValueError(f"scores of {unknown[0]}, which is not among the images")
        for file, values in scores.items():
            self.scores[file] |= values

    def add_three_in_one(self) -> None:
        """Adds the 3-in-1 of each complex prompt whose parts have scores, unless it has one."""
        for entry in self.entries:
            scores = self.scores[str(entry.file)]
            value = t2i_compbench.three_in_one(self.parts[entry.prompt], scores)
            if value is not None:
                scores.setdefault("3_in_1", value)

    def of_name(self, name: str) -> list[tuple[str, float]]:
        """Prompt and value of each image that has a score of this name."""
        scored = ((entry.prompt, self.scores[str(entry.file)]) for entry in self.entries)
        return [(prompt, scores[name]) for prompt, scores in scored if name in scores]

    def lines(self) -> list[dict[str, Any]]:
        """A record per image: `file`, `prompt`, `sample` and its scores."""
        return [
            {"file": str(entry.file), "prompt": entry.prompt, "sample": entry.sample, **self.scores[str(entry.file)]}
            for entry in self.entries
        ]

    def summary(self) -> Means:
        """Part -> score -> mean over its images."""
        values: dict[str, dict[str, list[tuple[str, float]]]] = {}
        for entry in self.entries:
            for part in (ALL, *self.parts.get(entry.prompt, ())):
                for name, value in self.scores[str(entry.file)].items():
                    if isinstance(value, int | float):
                        values.setdefault(part, {}).setdefault(name, []).append((entry.prompt, value))
        return {part: {name: statistics.mean(x) for name, x in scores.items()} for part, scores in values.items()}


def evaluate(
    directory: Path,
    out: Path,
    *,
    benchmark: str | None,
    referees: Sequence[str],
    lists: str | None,
    category: str | None,
    vqa: str | None,
    clip: str | None,
    rule: str,
    import_scores: str | None,
    truncate: bool | None = None,
    data: str | None = None,
) -> str:
    """Measures the images of a directory and writes images.jsonl, scores.json and fooled.png.

    Args:
        directory: a run directory, or a folder in a benchmark's layout.
        out: the directory to write; it also holds a file of scores for each measure.
        benchmark: "shapes", "t2i_compbench", "geneval", "geneval2" or None.
        referees: checkpoints of referees that score each image.
        lists: directory of T2I-CompBench's lists.
        category: T2I-CompBench's category of all prompts.
        vqa: checkpoint for BLIP-VQA, or that answers GenEval 2's questions; None is the benchmark's default, "" none.
        clip: checkpoint for CLIPScore, as `vqa`.
        rule: one of noun_phrases.RULES.
        import_scores: where external scorers left their results.
        truncate: whether prompts that are too long for a measure are cut, as its authors do; None: not in run directories.
        data: GenEval 2's geneval2_data.jsonl.

    Returns:
        The tables, as Markdown, and what was cut or could not be measured.

    Raises:
        ValueError: if something is missing or does not fit.
    """
    entries = read(directory)
    rows = read_rows(benchmark, data)
    evaluation = Evaluation.of(entries, parts(benchmark, entries, lists, category, rows))
    out.mkdir(parents=True, exist_ok=True)
    imported = []
    if import_scores:
        checkpoints = {"blip_vqa": vqa, "clip": clip}
        imported = add_imported(evaluation, directory, import_scores, benchmark, checkpoints, rows)
    if category == "complex" and not lists and "3_in_1" not in imported:
        logging.warning("there is no 3_in_1 by --category=complex alone: --lists says of what kind a complex prompt is")
    truncate = not is_run(directory) if truncate is None else truncate
    work = plan(benchmark, evaluation, vqa=vqa, clip=clip, rule=rule, referees=referees, truncate=truncate, rows=rows)
    remarks = {}
    for measure, unscored in work:
        scores = measures.collect(measure, unscored, out)
        remarks[name_of(measure)] = Remarks.of(unscored, scores)
        evaluation.add(scores)
    if benchmark == "t2i_compbench":
        evaluation.add_three_in_one()
    means = evaluation.summary()
    if not means:
        for name, own in remarks.items():
            for about, reason in own.unread.items():
                raise ValueError(f"{name} can measure none of the images: {about}: {reason}")
        raise ValueError("there is nothing to measure by: give --benchmark, --referee or --import_scores")
    if benchmark == "geneval" and imported:
        tags = [tag for tag in imported if tag != "geneval"]
        means[ALL]["geneval"] = statistics.mean_of_means([evaluation.of_name(tag) for tag in tags])
    lines = evaluation.lines()
    files.write_atomic(out / "images.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    record = {
        "measures": dict.fromkeys(imported, {"imported": import_scores})
        | {name_of(measure): measure.settings for measure, _ in work},
        "versions": run_directory.versions(),
        "scores": {part: {name: x._asdict() for name, x in scores.items()} for part, scores in means.items()},
    }
    record["remarks"] = {name: dataclasses.asdict(own) for name, own in remarks.items() if own.cut or own.unread}
    if benchmark == "geneval2":
        skills = geneval2.by_skill(rows, [(x["prompt"], x[geneval2.ATOMS]) for x in lines if geneval2.ATOMS in x])
        record["skills"] = {skill: mean._asdict() for skill, mean in skills.items()}
    agreements = agree(lines, out)
    if agreements:
        record["agreement"] = {name: x._asdict() for name, x in agreements.items()}
    files.write_atomic(out / "scores.json", json.dumps(files.finite(record), indent=2).encode() + b"\n")
    titles = {name: f"{name} (imported)" for name in imported if benchmark == "t2i_compbench"}
    if any("noun_phrases" in measure.settings for measure, _ in work):
        titles["blip_vqa"] = f"blip_vqa ({rule} noun phrases)"
    tables = table(means, titles) + ("\n" + statistics.agreement_table(agreements) if agreements else "")
    if benchmark == "geneval2":
        tables += "\n" + console.markdown(
            ["skill", "questions", geneval2.AM], {k: [x.images, x] for k, x in skills.items()}
        )
    return tables + "".join(f"\n{line}\n" for name, own in remarks.items() for line in own.lines(name, truncate))


def name_of(measure: measures.Measure) -> str:
    """What tells a measure from all others: a referee may be of the kind by which the benchmark measures."""
    return f"referee {measure.settings['label']}" if "label" in measure.settings else measure.name


@dataclasses.dataclass(frozen=True)
class Remarks:
    """On the scores of a measure.

    Attributes:
        prompts: how many there are.
        cut: those that were cut.
        unread: prompt, or file of an image, -> why it could not be measured.
    """

    prompts: int
    cut: list[str]
    unread: dict[str, str]

    @classmethod
    def of(cls, entries: Sequence[layouts.Entry], scores: Mapping[str, measures.Scores]) -> "Remarks":
        """Takes them out of a measure's scores by file."""
        cut, unread = {}, {}
        for entry in entries:
            own = scores[str(entry.file)]
            if own.pop(measures.CUT, False):
                cut[entry.prompt] = None
            if reason := own.pop(measures.UNREAD, ""):
                about = str(entry.file) if str(entry.file) in reason else entry.prompt
                unread[about] = reason.removeprefix(f"{about} ")
        return cls(len({entry.prompt for entry in entries}), list(cut), unread)

    def lines(self, name: str, truncate: bool) -> list[str]:
        """A sentence for each."""
        lines = []
        if self.cut:
            lines.append(
                f"{name}: {len(self.cut)} of {self.prompts} prompts are too long and were cut as by its authors, "
                f"{self.cut[0][:60]!r} for one"
            )
        if self.unread:
            how = "" if truncate else "; --truncate cuts what is too long, as its authors do"
            each = "; ".join(f"{about[:60]!r} ({reason})" for about, reason in self.unread.items())
            lines.append(f"{name} could not measure {len(self.unread)}: {each}{how}")
        return lines


def table(means: Means, titles: Mapping[str, str]) -> str:
    """A row per part, a column per score, titled by its name or by `titles`, as Markdown."""
    names = list(dict.fromkeys(name for scores in means.values() for name in scores))
    rows = {
        part: [max(mean.images for mean in scores.values()), *(scores.get(name, "-") for name in names)]
        for part, scores in means.items()
    }
    return console.markdown(["", "images", *(titles.get(name, name) for name in names)], rows)


def plan(
    benchmark: str | None,
    evaluation: Evaluation,
    *,
    referees: Sequence[str] = (),
    vqa: str | None = None,
    clip: str | None = None,
    rule: str = noun_phrases.NEW,
    truncate: bool = False,
    rows: Mapping[str, geneval2.Row] | None = None,
) -> list[tuple[measures.Measure, list[layouts.Entry]]]:
    """The measures, each with the images to measure: all, or for T2I-CompBench those without its score.

    Arguments are those of `evaluate`.
    """
    entries = evaluation.entries
    work = []
    if benchmark == "shapes":
        work.append((measures.ground_truth(), entries))
        if vqa:
            work.append((measures.blip_vqa(vqa, [entry.prompt for entry in entries], rule=rule), entries))
    elif benchmark == "geneval2":
        unscored = [entry for entry in entries if geneval2.AM not in evaluation.scores[str(entry.file)]]
        if unscored and vqa != "":
            work.append((measures.soft_tifa(vqa or QUESTIONED, rows), unscored))
    elif benchmark == "t2i_compbench":
        vqa, clip = VQA if vqa is None else vqa, CLIP if clip is None else clip
        builders = {}
        if vqa:
            builders["blip_vqa"] = lambda prompts: measures.blip_vqa(vqa, prompts, rule=rule)
        if clip:
            builders["clip"] = lambda prompts: measures.clip_score(clip, truncate=truncate)
            builders["clip_without_adjectives"] = lambda prompts: measures.clip_without_adjectives(
                clip, prompts, truncate=truncate
            )
        for name, build in builders.items():
            unscored = [
                entry
                for entry in entries
                if t2i_compbench.is_measured(evaluation.parts[entry.prompt], name)
                and name not in evaluation.scores[str(entry.file)]
            ]
            if unscored:
                work.append((build([entry.prompt for entry in unscored]), unscored))
    return work + [(measure, entries) for measure in measures.by_referees(referees, truncate=truncate)]


def agree(lines: Sequence[Mapping[str, Any]], out: Path) -> dict[str, statistics.Agreement]:
    """How far each score agrees with `right`, where that is known; draws fooled.png."""
    (out / "fooled.png").unlink(missing_ok=True)  # of an evaluation before
    judged = [line for line in lines if "right" in line]
    names = {name: None for line in judged for name, x in line.items() if isinstance(x, float)}
    agreements, pictures = {}, []
    for name in (name for name in names if name not in ("right", "quality")):
        scored = [line for line in judged if name in line]
        scores, right = [line[name] for line in scored], [line["right"] == 1 for line in scored]
        agreements[name] = statistics.agreement([line["prompt"] for line in scored], scores, right)
        for row in statistics.fooled(scores, right, FOOLED):
            pictures.append((Path(scored[row]["file"]), scored[row]["prompt"], {name: scores[row]}))
    if pictures:
        buffer = io.BytesIO()
        contact_sheet.draw_sheet(pictures, title="wrong pictures with the highest scores").save(buffer, "PNG")
        files.write_atomic(out / "fooled.png", buffer.getvalue())
    return agreements


def read_rows(benchmark: str | None, data: str | None) -> dict[str, geneval2.Row]:
    """GenEval 2's rows; none for another benchmark. ValueError where they are missing or damaged."""
    if benchmark != "geneval2":
        return {}
    if not data:
        raise ValueError("--metadata is missing: GenEval 2's geneval2_data.jsonl")
    return geneval2.read_data(data)


def parts(
    benchmark: str | None,
    entries: Sequence[layouts.Entry],
    lists: str | None,
    category: str | None,
    rows: Mapping[str, geneval2.Row] | None = None,
) -> dict[str, list[str]]:
    """The parts that each prompt counts in besides ALL. Raises ValueError where they are unknown."""
    prompts = dict.fromkeys(entry.prompt for entry in entries)
    if benchmark == "shapes":
        return {prompt: shapes_benchmark.parts(prompt) for prompt in prompts}
    if benchmark == "geneval2":
        return geneval2.parts(rows, list(prompts))
    if benchmark != "t2i_compbench":
        return {prompt: [] for prompt in prompts}
    if not lists:
        if category:
            return {prompt: [category] for prompt in prompts}
        raise ValueError(
            "--lists is missing: the directory of T2I-CompBench's *_val.txt files (examples/dataset of "
            "https://github.com/Karine-Huang/T2I-CompBench), or --category, if all prompts are of one"
        )
    listed = t2i_compbench.read_lists(Path(lists))
    selected = {
        prompt: [part for part in listed.get(prompt, ()) if not category or part.partition(",")[0] == category]
        for prompt in prompts
    }
    if unlisted := [prompt for prompt, names in selected.items() if not names]:
        where = f"not in the list of {category}" if category else "in none of the lists"
        raise ValueError(f"{len(unlisted)} prompts are {where} of {lists}, {unlisted[0]!r} for one")
    return selected


def add_imported(
    evaluation: Evaluation,
    directory: Path,
    results: str,
    benchmark: str | None,
    checkpoints: Mapping[str, str | None],
    rows: Mapping[str, geneval2.Row],
) -> list[str]:
    """Adds the scores that external scorers gave the images of an exported folder.

    Args:
        evaluation: takes the scores.
        directory: of the images.
        results: the folder or file that the scorers left.
        benchmark: "t2i_compbench", "geneval" or "geneval2".
        checkpoints: measure -> checkpoint that measures it here; its imported scores are left out.
        rows: GenEval 2's.

    Returns:
        The names of the scores.

    Raises:
        ValueError: for another benchmark, or results that do not fit.
    """
    if benchmark == "geneval":
        by_tag = layouts.import_geneval(results)
        for tag, scores in by_tag.items():
            evaluation.add({str(directory / file): {"geneval": x, tag: x} for file, x in scores.items()})
        return ["geneval", *by_tag]
    if benchmark == "geneval2":
        scores = geneval2.import_scores(results, rows)
        files = {(entry.prompt, entry.sample): str(entry.file) for entry in evaluation.entries}
        evaluation.add({files[key]: x for key, x in scores.items() if key in files})
        return [geneval2.AM, geneval2.GM]
    if benchmark != "t2i_compbench":
        raise ValueError("--import_scores is of --benchmark=t2i_compbench, geneval or geneval2")
    prompts = {str(entry.file): entry.prompt for entry in evaluation.entries}
    names: dict[str, None] = {}
    for measure, scores in layouts.import_t2i_compbench(results).items():
        if checkpoints.get(measure):
            logging.warning("%s is measured by %s, what was imported is left out", measure, checkpoints[measure])
            continue
        for file_name, score in scores.items():
            file = str(directory / "samples" / file_name)
            name = t2i_compbench.name_of_result(measure, evaluation.parts.get(prompts.get(file), ()))
            evaluation.add({file: {name: score}})
            names[name] = None
    return list(names)
