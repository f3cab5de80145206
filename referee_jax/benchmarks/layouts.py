"""Reads and writes folders of images as external benchmarks want them, and reads their scorers' result files.

    T2I-CompBench   samples/<prompt>_<6-digit running number>.png; several scorers, each with its vqa_result.json
    GenEval         <5-digit place of the prompt>/metadata.jsonl and .../samples/<5-digit sample>.png; one results.jsonl

Scorers know prompts and order from these names alone, so names that they would misread are refused. Layouts and
results as in Karine-Huang/T2I-CompBench (GORS_finetune/inference_eval.py and the *_eval folders) and
djghosh13/geneval (generation/diffusers_generate.py, evaluation/evaluate_images.py).
"""

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from referee_jax.storage import files, run_directory
from referee_jax.storage import images as images_lib

LONGEST_NAME = 255  # bytes, of the usual file systems
SHOWN = 5  # names in an error

# Measure, the folder of its vqa_result.json, and what a question_id is: the number in the file name,
# or the place among all images in the order of these numbers. They differ if numbers are missing.
RESULTS = (
    ("blip_vqa", "annotation_blip", "place"),
    ("clip", "annotation_clip", "place"),
    ("3_in_1", "annotation_3_in_1", "place"),
    ("unidet_2d", "labels/annotation_obj_detection_2d", "number"),
    ("unidet_2d", "labels/annotation_obj_detection", "number"),  # its name before there was a 3D scorer
    ("unidet_3d", "labels/annotation_obj_detection_3d", "number"),
    ("unidet_numeracy", "annotation_num", "number"),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image: sample number `sample` (0, 1, ...) of a prompt. The file may be in a shard (storage/shards.py)."""

    file: Path
    prompt: str
    sample: int


def read_run(directory: str | os.PathLike) -> list[Entry]:
    """The images of a run directory (storage/run_directory.py) in the journal's order, whatever their status.

    Raises RunError, a ValueError, if it is no run directory.
    """
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise run_directory.RunError(f"{path} is not a run directory (no config.json)")
    entries = []
    for line in run_directory.read_journal(path):
        match line:
            case {"file_name": str(name), "text": str(prompt), "sample": int(sample)}:
                entries.append(Entry(path / name, prompt, sample))
    return entries


# --- T2I-CompBench ----------------------------------------------------------------------------------------------------


def t2i_compbench_name(prompt: str, number: int) -> str:
    """The file name of an image. Raises ValueError for a prompt that cannot be read back from it."""
    name = f"{prompt}_{number:06d}.png"
    reason = None
    # The numeracy scorer looks for the number before the first ".png", the others anywhere after the first "_".
    if forbidden := [x for x in ("_", "/", "\0", ".png") if x in prompt]:
        reason = f"it holds {forbidden[0]!r}"
    elif any("\ud800" <= x <= "\udfff" for x in prompt):
        reason = "it holds half a character"
    elif (size := len(name.encode())) > LONGEST_NAME:
        reason = f"the file name would have {size} bytes, at most {LONGEST_NAME} are possible"
    elif number < 0:
        reason = f"the number {number} is negative"
    if reason:
        raise ValueError(f"the prompt {prompt[:60]!r} cannot be part of a file name of T2I-CompBench: {reason}")
    return name


def parse_t2i_compbench_name(name: str) -> tuple[str, int]:
    """Prompt and running number of a file name, split as the scorers do. Raises ValueError for other names.

    The prompt ends at the first "_", the number begins after the last.
    """
    prompt, _, rest = name.partition("_")
    number = rest.rpartition("_")[2].partition(".")[0]
    if not re.fullmatch("[0-9]+", number):
        raise ValueError(f"{name!r} is no image of T2I-CompBench: it should be named <prompt>_<running number>.png")
    return prompt, int(number)


def export_t2i_compbench(
    entries: Sequence[Entry],
    out: str | os.PathLike,
    *,
    prompts: Sequence[str] | None = None,
    per_prompt: int | None = 10,
) -> int:
    """Copies images to `out`/samples under names for the scorers; returns their number. Existing files stay.

    The number of an image is its prompt's place * per_prompt + sample. Prompts are in the order of
    `prompts`, or of their first image. The 3-in-1 scorer knows a prompt by this number alone, and runs
    of several processes have images in any order: give it the lines of complex_val.txt as `prompts`.

    Raises ValueError and writes nothing if a prompt does not have exactly the samples 0 to
    `per_prompt` - 1 (None: any), is none of `prompts` or cannot be in a name, or if `out` holds other
    images; OSError as from the system.
    """
    groups = by_prompt(entries, prompts, per_prompt)
    ordered = [entry for group in groups.values() for entry in group]
    plan = {f"samples/{t2i_compbench_name(entry.prompt, n)}": entry.file for n, entry in enumerate(ordered)}
    samples = Path(out) / "samples"
    write(Path(out), plan, [f"samples/{name}" for name in os.listdir(samples)] if samples.exists() else [])
    return len(ordered)


def read_t2i_compbench(directory: str | os.PathLike) -> list[Entry]:
    """The images below `directory`/samples in the order of their numbers, in which samples are counted.

    Raises ValueError if there is no such folder, or a file in it on which the scorers would fail.
    """
    entries, counts = [], Counter()
    for _, prompt, file in _numbered(Path(directory)):
        entries.append(Entry(file, prompt, counts[prompt]))
        counts[prompt] += 1
    return entries


def import_t2i_compbench(directory: str | os.PathLike) -> dict[str, dict[str, float]]:
    """The scores that the official scorers left in an exported folder: measure (of `RESULTS`) -> file name -> score.

    BLIP-VQA and the UniDet measures are in [0, 1]; clip is a cosine, in the complex set of the words without
    adjectives. Measures without a result file are left out. Raises ValueError for a damaged file, or one
    that is not about exactly these images.
    """
    path, results = Path(directory), {}
    images = [(number, file.name) for number, _, file in _numbered(path)]
    for measure, folder, kind in RESULTS:
        file = path / folder / "vqa_result.json"
        if not file.exists():
            continue
        if measure in results:
            raise ValueError(f"{file} is a second result of {measure}; remove the older one")
        names = {number if kind == "number" else place: name for place, (number, name) in enumerate(images)}
        scores = _read_answers(file)
        if scores.keys() != names.keys():
            differing = sorted(scores.keys() ^ names.keys())
            raise ValueError(
                f"{file} does not belong to these images: {len(scores)} scores for {len(names)} images;"
                f" on one side only: {kind} {_list(differing)}"
            )
        results[measure] = {name: scores[question] for question, name in names.items()}
    return results


def _numbered(directory: Path) -> list[tuple[int, str, Path]]:
    """Number, prompt and file of everything in samples/, by number."""
    samples = directory / "samples"
    if not samples.is_dir():
        raise ValueError(f"{directory} is no folder of T2I-CompBench: it has no folder samples")
    images = []
    for name in os.listdir(samples):
        prompt, number = parse_t2i_compbench_name(name)
        images.append((number, prompt, samples / name))
    # The file system decides which of two comes first, so their scores could not be told apart.
    if twice := [number for number, times in Counter(number for number, _, _ in images).items() if times > 1]:
        raise ValueError(f"{samples}: several images have the same number: {_list(sorted(twice))}")
    return sorted(images)


def _read_answers(file: Path) -> dict[int, float]:
    """question_id -> score, of a vqa_result.json: a list of {"question_id": 0, "answer": 0.25 or "0.2500"}."""
    answers = parsed(file.read_bytes(), str(file))
    if not isinstance(answers, list):
        raise ValueError(f"{file} is damaged: no list of answers")
    scores: dict[int, float] = {}
    for answer in answers:
        match answer:
            case {"question_id": int(question), "answer": int() | float() | str() as value} if _is_number(value):
                score = float(value)
            case _:
                raise ValueError(f"{file} is damaged: {str(answer)[:80]} is no answer")
        if question in scores:
            raise ValueError(f"{file} is damaged: question_id {question} is answered twice")
        scores[question] = score
    return scores


def _is_number(value: int | float | str) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


# --- GenEval ----------------------------------------------------------------------------------------------------------


def export_geneval(
    entries: Sequence[Entry], out: str | os.PathLike, metadata_file: str | os.PathLike, *, per_prompt: int | None = 4
) -> int:
    """Copies images to `out`, a folder for each line of evaluation_metadata.jsonl; returns their number.

    Existing files stay. A prompt of several lines goes to each of their folders. Lines without images
    are left out if `per_prompt` is None.

    Raises ValueError and writes nothing if the file is damaged or lacks a prompt, if one of its prompts does
    not have exactly the samples 0 to `per_prompt` - 1 (None: any), or if `out` holds other images; OSError
    as from the system.
    """
    lines = _read_metadata(Path(metadata_file))
    groups = by_prompt(entries, [prompt for prompt, _ in lines], per_prompt)
    plan: dict[str, Path | bytes] = {}
    for place, (prompt, line) in enumerate(lines):
        if group := groups[prompt]:
            plan[f"{place:05d}/metadata.jsonl"] = line + b"\n"
            plan |= {f"{place:05d}/samples/{entry.sample:05d}.png": entry.file for entry in group}
    present = [file for folder in _places(Path(out)) for file in (folder / "metadata.jsonl", *folder.glob("samples/*"))]
    write(Path(out), plan, [file.relative_to(out).as_posix() for file in present if file.exists()])
    return sum(not isinstance(source, bytes) for source in plan.values())


def read_geneval(directory: str | os.PathLike) -> list[Entry]:
    """The images of a folder of GenEval, by place of the prompt and sample. Raises ValueError for any other folder."""
    entries = []
    for folder in _places(Path(directory)):
        file = folder / "metadata.jsonl"
        match parsed(file.read_bytes(), str(file)) if file.is_file() else None:
            case {"prompt": str(prompt)}:
                images = [x for x in folder.glob("samples/*.png") if re.fullmatch("[0-9]+", x.stem)]
                entries += [Entry(x, prompt, int(x.stem)) for x in sorted(images, key=lambda x: int(x.stem))]
            case _:
                raise ValueError(f"{file} does not name a prompt")
    if not entries:
        raise ValueError(f"{directory} is no folder of GenEval: it has no <number>/samples/<number>.png")
    return entries


def import_geneval(results: str | os.PathLike) -> dict[str, dict[str, float]]:
    """GenEval's results.jsonl: tag (the category) -> file -> 1 where it is correct, else 0.

    Files are relative to the exported folder, as in 00000/samples/00000.png. GenEval's overall score is
    the mean of the tags' means. Raises ValueError for a damaged file.
    """
    path, by_tag, names = Path(results), {}, set()
    for number, line in enumerate(read_lines(path), 1):
        match parsed(line, f"line {number} of {path}"):
            case {"filename": str(file_name), "tag": str(tag), "correct": bool(correct)}:
                # The path is of the machine where the scorer ran; this class splits at either kind of slash.
                name = "/".join(PureWindowsPath(file_name).parts[-3:])
            case _:
                name = ""
        if not re.fullmatch(r"[0-9]+/samples/[0-9]+\.png", name):
            raise ValueError(f"line {number} of {path} is no result of GenEval: {line[:80].decode(errors='replace')}")
        if name in names:
            raise ValueError(f"line {number} of {path}: {name} has a result already")
        names.add(name)
        by_tag.setdefault(tag, {})[name] = float(correct)
    if not by_tag:
        raise ValueError(f"{path} has no results")
    return by_tag


def _places(directory: Path) -> list[Path]:
    """The folders of prompts, in their order."""
    folders = directory.iterdir() if directory.is_dir() else ()
    return sorted((x for x in folders if re.fullmatch("[0-9]+", x.name) and x.is_dir()), key=lambda x: int(x.name))


def _read_metadata(file: Path) -> list[tuple[str, bytes]]:
    """Prompt and whole line of each line of evaluation_metadata.jsonl."""
    lines = []
    for number, line in enumerate(read_lines(file), 1):
        match parsed(line, f"line {number} of {file}"):
            case {"prompt": str(prompt), "tag": str()}:
                lines.append((prompt, line))
            case _:
                raise ValueError(f"line {number} of {file} has no prompt and tag, as GenEval's metadata have")
    return lines


# --- all --------------------------------------------------------------------------------------------------------------


def by_prompt(
    entries: Iterable[Entry], prompts: Sequence[str] | None, per_prompt: int | None
) -> dict[str, list[Entry]]:
    """The entries of each of `prompts`, by sample."""
    groups: dict[str, list[Entry]] = {prompt: [] for prompt in prompts or ()}
    for entry in entries:
        groups.setdefault(entry.prompt, []).append(entry)
    if prompts is not None and (unknown := list(groups)[len(set(prompts)) :]):
        raise ValueError(f"there are images of prompts that the benchmark does not have: {_list(unknown)}")
    wrong = []
    for prompt, group in groups.items():
        group.sort(key=lambda entry: entry.sample)
        samples = [entry.sample for entry in group]
        if samples != (sorted(set(samples)) if per_prompt is None else list(range(per_prompt))):
            wrong.append(prompt)
    if wrong:
        rule = "each sample once" if per_prompt is None else f"samples 0 to {per_prompt - 1}, each once"
        raise ValueError(f"{len(wrong)} of {len(groups)} prompts do not have {rule}: {_list(wrong)}")
    return groups


def write(out: Path, plan: Mapping[str, Path | bytes], present: Sequence[str]) -> None:
    """Writes the files of `plan` (name -> file to copy, or content); `present` are those that a scorer sees now."""
    if other := [name for name in present if name not in plan or (out / name).read_bytes() != _content(plan[name])]:
        raise ValueError(f"{out} holds other files already, choose another folder: {_list(other)}")
    out.mkdir(parents=True, exist_ok=True)
    staged = out / ".copy"
    for name in sorted(plan.keys() - set(present)):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        # Not in the same folder: a scorer takes all its files for images, and long names cannot get longer.
        files.write_atomic(staged, _content(plan[name]))
        os.replace(staged, out / name)


def _content(source: Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else images_lib.read_png(source)


def parsed(data: bytes, where: str) -> Any:
    """The JSON value. Raises ValueError, with `where` it is from."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: {error}") from error


def read_lines(file: Path) -> list[bytes]:
    """The lines of a file, without an empty last one."""
    lines = [line.removesuffix(b"\r") for line in file.read_bytes().split(b"\n")]
    return lines if lines[-1] else lines[:-1]


def _list(names: Sequence[object]) -> str:
    text = ", ".join(map(repr, names[:SHOWN]))
    return f"{text} and {len(names) - SHOWN} more" if len(names) > SHOWN else text
