"""Folders of images as external benchmarks want them, and the result files that their official scorers leave: both ways.

    T2I-CompBench   samples/<prompt>_<6-digit running number>.png; several scorers, each with its vqa_result.json
    GenEval         <5-digit place of the prompt>/metadata.jsonl and .../samples/<5-digit sample>.png; one results.jsonl

A scorer has nothing but these names to know prompts and order from, so a name that it would misread is refused. Layouts and
results as in Karine-Huang/T2I-CompBench (GORS_finetune/inference_eval.py and the *_eval folders) and djghosh13/geneval
(generation/diffusers_generate.py, evaluation/evaluate_images.py).
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

# Measure, where its vqa_result.json lies, and what a question_id is: the number in the file name, or the place among all
# images in the order of these numbers. They differ where numbers are left out.
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
    """One image: sample number `sample` (0, 1, ...) of a prompt. The file may be in a shard (shards.py)."""

    file: Path
    prompt: str
    sample: int


def read_run(directory: str | os.PathLike) -> list[Entry]:
    """The images of a run directory (outputs.py) that are there, in the journal's order and whatever their status.

    RunError, a ValueError, if it is no run directory.
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
    """The file name of an image; ValueError for a prompt that its scorers, or a file system, could not get back from it."""
    name = f"{prompt}_{number:06d}.png"
    reason = None
    # The numeracy scorer looks for the number before the first ".png", the others anywhere after the first "_".
    if held := [x for x in ("_", "/", "\0", ".png") if x in prompt]:
        reason = f"it holds {held[0]!r}"
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
    """Prompt and running number of a file name, split as the scorers split it; ValueError where they would stumble.

    Of a name with several "_", the prompt is what is before the first one, the number what is after the last.
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
    """Copies images to `out`/samples under names for the scorers; returns how many there are. What is there stays.

    Numbers run through prompt by prompt, sample by sample, so number = prompt's place * per_prompt + sample. Prompts are in
    the order of `prompts`, or of their first image. The 3-in-1 scorer has no other sign of the prompt than the number: give
    it the lines of complex_val.txt as `prompts`, since runs of several processes have images in any order.

    Raises ValueError, and nothing is written, where a prompt has not just the samples 0 to `per_prompt` - 1 (None: any), is
    none of `prompts` or cannot be in a name, or where `out` holds other images; OSError as from the system.
    """
    groups = _by_prompt(entries, prompts, per_prompt)
    ordered = [entry for own in groups.values() for entry in own]
    plan = {f"samples/{t2i_compbench_name(entry.prompt, n)}": entry.file for n, entry in enumerate(ordered)}
    samples = Path(out) / "samples"
    _write(Path(out), plan, [f"samples/{name}" for name in os.listdir(samples)] if samples.exists() else [])
    return len(ordered)


def read_t2i_compbench(directory: str | os.PathLike) -> list[Entry]:
    """The images below `directory`/samples in the order of their numbers; a prompt's samples are counted in this order.

    ValueError if there is no such folder, or something in it that the scorers would not get over.
    """
    entries, seen = [], Counter()
    for _, prompt, file in _numbered(Path(directory)):
        entries.append(Entry(file, prompt, seen[prompt]))
        seen[prompt] += 1
    return entries


def import_t2i_compbench(directory: str | os.PathLike) -> dict[str, dict[str, float]]:
    """The scores that the official scorers left in an exported folder: measure (of `RESULTS`) -> file name -> score.

    BLIP-VQA and the UniDet measures are in [0, 1], clip is a cosine, for the complex set of the words without adjectives.
    Measures without a result file are left out.
    Raises ValueError for a file that is damaged, or is not about just the images that are there.
    """
    path, found = Path(directory), {}
    images = [(number, file.name) for number, _, file in _numbered(path)]
    for measure, folder, said in RESULTS:
        file = path / folder / "vqa_result.json"
        if not file.exists():
            continue
        if measure in found:
            raise ValueError(f"{file} is a second result of {measure}; remove the older one")
        names = {number if said == "number" else place: name for place, (number, name) in enumerate(images)}
        scores = _read_answers(file)
        if scores.keys() != names.keys():
            differing = sorted(scores.keys() ^ names.keys())
            raise ValueError(
                f"{file} does not belong to these images: {len(scores)} scores for {len(names)} images;"
                f" on one side only: {said} {_list(differing)}"
            )
        found[measure] = {name: scores[question] for question, name in names.items()}
    return found


def _numbered(directory: Path) -> list[tuple[int, str, Path]]:
    """Number, prompt and file of all that is in samples/, by number."""
    samples = directory / "samples"
    if not samples.is_dir():
        raise ValueError(f"{directory} is no folder of T2I-CompBench: it has no folder samples")
    images = []
    for name in os.listdir(samples):
        prompt, number = parse_t2i_compbench_name(name)
        images.append((number, prompt, samples / name))
    # Which of two would come first is for the file system to say, so nobody knows whose score is whose.
    if twice := [number for number, times in Counter(number for number, _, _ in images).items() if times > 1]:
        raise ValueError(f"{samples}: several images have the same number: {_list(sorted(twice))}")
    return sorted(images)


def _read_answers(file: Path) -> dict[int, float]:
    """question_id -> score, of a vqa_result.json: a list of {"question_id": 0, "answer": 0.25 or "0.2500"}."""
    answers = _json(file.read_bytes(), str(file))
    if not isinstance(answers, list):
        raise ValueError(f"{file} is damaged: no list of answers")
    scores: dict[int, float] = {}
    for answer in answers:
        match answer:
            case {"question_id": int(question), "answer": int() | float() | str() as said} if _is_number(said):
                score = float(said)
            case _:
                raise ValueError(f"{file} is damaged: {str(answer)[:80]} is no answer")
        if question in scores:
            raise ValueError(f"{file} is damaged: question_id {question} is answered twice")
        scores[question] = score
    return scores


def _is_number(said: int | float | str) -> bool:
    try:
        return not isinstance(said, bool) and math.isfinite(float(said))
    except (ValueError, OverflowError):
        return False


# --- GenEval ----------------------------------------------------------------------------------------------------------


def export_geneval(
    entries: Sequence[Entry], out: str | os.PathLike, metadata_file: str | os.PathLike, *, per_prompt: int | None = 4
) -> int:
    """Copies images to `out`, a folder for each line of GenEval's evaluation_metadata.jsonl; returns how many there are.

    What is there stays. A prompt that several lines name goes to each of their folders. Lines without images are left out
    if `per_prompt` is None.

    Raises ValueError, and nothing is written, where the file is damaged or does not name a prompt, where a prompt of it has
    not just the samples 0 to `per_prompt` - 1 (None: any), or where `out` holds other images; OSError as from the system.
    """
    lines = _read_metadata(Path(metadata_file))
    groups = _by_prompt(entries, [prompt for prompt, _ in lines], per_prompt)
    plan: dict[str, Path | bytes] = {}
    for place, (prompt, line) in enumerate(lines):
        if own := groups[prompt]:
            plan[f"{place:05d}/metadata.jsonl"] = line + b"\n"
            plan |= {f"{place:05d}/samples/{entry.sample:05d}.png": entry.file for entry in own}
    there = [file for folder in _places(Path(out)) for file in (folder / "metadata.jsonl", *folder.glob("samples/*"))]
    _write(Path(out), plan, [file.relative_to(out).as_posix() for file in there if file.exists()])
    return sum(not isinstance(source, bytes) for source in plan.values())


def read_geneval(directory: str | os.PathLike) -> list[Entry]:
    """The images of a folder of GenEval, by prompt's place and sample; ValueError if it is none, or damaged."""
    entries = []
    for folder in _places(Path(directory)):
        file = folder / "metadata.jsonl"
        match _json(file.read_bytes(), str(file)) if file.is_file() else None:
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

    Files are named from the exported folder on, as in 00000/samples/00000.png. GenEval's overall score is the mean of the
    tags' means. ValueError where the file is damaged.
    """
    path, found, seen = Path(results), {}, set()
    for number, line in enumerate(_lines(path), 1):
        match _json(line, f"line {number} of {path}"):
            case {"filename": str(said), "tag": str(tag), "correct": bool(correct)}:
                # The path is of the machine where the scorer ran; this class takes either kind of slash.
                name = "/".join(PureWindowsPath(said).parts[-3:])
            case _:
                name = ""
        if not re.fullmatch(r"[0-9]+/samples/[0-9]+\.png", name):
            raise ValueError(f"line {number} of {path} is no result of GenEval: {line[:80].decode(errors='replace')}")
        if name in seen:
            raise ValueError(f"line {number} of {path}: {name} has a result already")
        seen.add(name)
        found.setdefault(tag, {})[name] = float(correct)
    if not found:
        raise ValueError(f"{path} has no results")
    return found


def _places(directory: Path) -> list[Path]:
    """The folders of prompts, in their order."""
    folders = directory.iterdir() if directory.is_dir() else ()
    return sorted((x for x in folders if re.fullmatch("[0-9]+", x.name) and x.is_dir()), key=lambda x: int(x.name))


def _read_metadata(file: Path) -> list[tuple[str, bytes]]:
    """Prompt and whole line of each line of evaluation_metadata.jsonl."""
    lines = []
    for number, line in enumerate(_lines(file), 1):
        match _json(line, f"line {number} of {file}"):
            case {"prompt": str(prompt), "tag": str()}:
                lines.append((prompt, line))
            case _:
                raise ValueError(f"line {number} of {file} has no prompt and tag, as GenEval's metadata have")
    return lines


# --- both -------------------------------------------------------------------------------------------------------------


def _by_prompt(
    entries: Iterable[Entry], prompts: Sequence[str] | None, per_prompt: int | None
) -> dict[str, list[Entry]]:
    """The entries of each of `prompts`, by sample."""
    groups: dict[str, list[Entry]] = {prompt: [] for prompt in prompts or ()}
    for entry in entries:
        groups.setdefault(entry.prompt, []).append(entry)
    if prompts is not None and (unknown := list(groups)[len(set(prompts)) :]):
        raise ValueError(f"there are images of prompts that the benchmark does not have: {_list(unknown)}")
    wrong = []
    for prompt, own in groups.items():
        own.sort(key=lambda entry: entry.sample)
        samples = [entry.sample for entry in own]
        if samples != (sorted(set(samples)) if per_prompt is None else list(range(per_prompt))):
            wrong.append(prompt)
    if wrong:
        wanted = "each sample once" if per_prompt is None else f"samples 0 to {per_prompt - 1}, each once"
        raise ValueError(f"{len(wrong)} of {len(groups)} prompts do not have {wanted}: {_list(wrong)}")
    return groups


def _write(out: Path, plan: Mapping[str, Path | bytes], there: Sequence[str]) -> None:
    """Makes the files of `plan` (name -> the file to copy, or its content); `there` are those that a scorer sees now."""
    if other := [name for name in there if name not in plan or (out / name).read_bytes() != _content(plan[name])]:
        raise ValueError(f"{out} holds other files already, choose another folder: {_list(other)}")
    out.mkdir(parents=True, exist_ok=True)
    staged = out / ".copy"
    for name in sorted(plan.keys() - set(there)):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        # Not beside its end: there a scorer takes all files for images, and a long name leaves no room for a longer one.
        files.write_atomic(staged, _content(plan[name]))
        os.replace(staged, out / name)


def _content(source: Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else images_lib.read_png(source)


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: {error}") from error


def _lines(file: Path) -> list[bytes]:
    """Without the empty one after the last line end."""
    lines = [line.removesuffix(b"\r") for line in file.read_bytes().split(b"\n")]
    return lines if lines[-1] else lines[:-1]


def _list(names: Sequence[object]) -> str:
    shown = ", ".join(map(repr, names[:SHOWN]))
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown
