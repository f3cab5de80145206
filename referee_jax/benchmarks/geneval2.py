"""GenEval 2 (Kamath et al. 2025, arXiv 2512.16853): its data, folders and result files, and Soft-TIFA.

    data         JSON lines: prompt, atom_count, vqa_list [[question, answer], ...], skills [...]; a user's own copy
    pictures     one JSON object {prompt: path}, one picture of each prompt
    results      one JSON list, of a list of probabilities for each line of the data

Soft-TIFA asks a model each question about the picture and takes the probability of the right answer.
AM, their arithmetic mean, is of single facts; GM, the geometric mean, of whole prompts. Formats as in
https://github.com/facebookresearch/GenEval2.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from referee_jax.benchmarks import layouts, statistics
from referee_jax.referees import questions

AM, GM, ATOMS = "soft_tifa_am", "soft_tifa_gm", "probabilities"
LEAST = 1e-12  # a probability in the geometric mean, where it is 0
PATHS, RESULTS = "image_paths_{}.json", "score_lists_{}.json"  # of an exported folder, by sample


class Row(NamedTuple):
    """One prompt: its questions, whose kinds are the skills, and how many facts it says."""

    atoms: tuple[questions.Atom, ...]
    count: int


def read_data(file: str | Path) -> dict[str, Row]:
    """The rows of geneval2_data.jsonl by prompt, in their order. Raises ValueError for a damaged file."""
    rows, path = {}, Path(file)
    for number, line in enumerate(layouts.read_lines(path), 1):
        where = f"line {number} of {path}"
        match layouts.parsed(line, where):
            case {"prompt": str(prompt), "vqa_list": list(asked), "atom_count": int(count), "skills": list(skills)}:
                if len(asked) != len(skills) or not asked:
                    raise ValueError(f"{where} has {len(asked)} questions and {len(skills)} skills")
                try:
                    atoms = questions.given(asked, skills)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from error
                if prompt in rows:
                    raise ValueError(f"{where} has a prompt of a line before, {prompt[:60]!r}")
                rows[prompt] = Row(atoms, count)
            case _:
                raise ValueError(f"{where} has no prompt, atom_count, vqa_list and skills, as GenEval 2's data have")
    if not rows:
        raise ValueError(f"{path} has no prompts")
    return rows


def export(entries: Sequence[layouts.Entry], out: str | Path, rows: Mapping[str, Row]) -> tuple[int, int]:
    """Copies images to `out`, with {prompt: path} of each sample; returns the numbers of images and of samples.

    A folder for each sample, since the evaluator takes one picture of each prompt: `sample_0/00000.png` by the
    line of the data, and PATHS. Existing files stay. Raises ValueError and writes nothing for a prompt that the
    data lack, for another number of samples of some, and if `out` holds other images.
    """
    places, out = {prompt: n for n, prompt in enumerate(rows)}, Path(out)
    samples = sorted({entry.sample for entry in entries})
    groups = layouts.by_prompt(entries, list(rows), None)
    groups = {prompt: group for prompt, group in groups.items() if group}
    if uneven := [prompt for prompt, group in groups.items() if [entry.sample for entry in group] != samples]:
        raise ValueError(f"{len(uneven)} prompts do not have the samples {samples}: {uneven[0][:60]!r} for one")
    plan: dict[str, Path | bytes] = {}
    for n, sample in enumerate(samples):
        paths = {}
        for prompt, group in groups.items():
            name = f"sample_{sample}/{places[prompt]:05d}.png"
            plan[name], paths[prompt] = group[n].file, str((out / name).resolve())
        plan[PATHS.format(sample)] = json.dumps(paths, indent=1, ensure_ascii=False).encode() + b"\n"
    present = [file.relative_to(out).as_posix() for file in (*out.glob("sample_*/*"), *out.glob(PATHS.format("*")))]
    layouts.write(out, plan, present)
    return len(groups) * len(samples), len(samples)


def read_paths(file: str | Path) -> list[layouts.Entry]:
    """The images of a {prompt: path} file, or of all those in an exported folder. Raises ValueError for anything else."""
    path, entries = Path(file), []
    for n, one in _numbered(path, PATHS):
        paths = layouts.parsed(one.read_bytes(), str(one))
        if not isinstance(paths, dict) or not all(isinstance(x, str) for x in paths.values()):
            raise ValueError(f"{one} is no object of prompts and paths")
        # Relative to where the evaluator is started, or else to the file.
        at = lambda name, folder=one.parent: Path(name) if Path(name).exists() else folder / name
        entries += [layouts.Entry(at(name), prompt, n) for prompt, name in paths.items()]
    if not entries:
        raise ValueError(f"{path} names no images")
    return entries


def _numbered(path: Path, name: str) -> list[tuple[int, Path]]:
    """(Sample, file) of a folder's files called `name`, or of one file: the number in its name, 0 where there is none."""
    pattern = re.compile(re.escape(name).replace(r"\{\}", "([0-9]+)"))
    numbers = [(pattern.fullmatch(file.name), file) for file in (path.iterdir() if path.is_dir() else [path])]
    return sorted((int(number[1]) if number else 0, file) for number, file in numbers if number or not path.is_dir())


def import_scores(results: str | Path, rows: Mapping[str, Row]) -> dict[tuple[str, int], dict[str, Any]]:
    """(Prompt, sample) -> scores, of the evaluator's result file, or of each RESULTS in a folder.

    Raises ValueError for a damaged file, and for one that does not belong to the data.
    """
    path, scores = Path(results), {}
    for sample, file in _numbered(path, RESULTS):
        lists = layouts.parsed(file.read_bytes(), str(file))
        if not isinstance(lists, list) or len(lists) != len(rows):
            count = len(lists) if isinstance(lists, list) else "no"
            raise ValueError(f"{file} has {count} lists of scores, the data {len(rows)} prompts")
        for (prompt, row), values in zip(rows.items(), lists, strict=True):
            is_fitting = isinstance(values, list) and len(values) == len(row.atoms)
            if not is_fitting or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in values):
                raise ValueError(
                    f"{file}: {str(values)[:60]} are no probabilities of the {len(row.atoms)} of {prompt[:60]!r}"
                )
            scores[prompt, sample] = soft_tifa(values)
    if not scores:
        raise ValueError(f"{path} has no {RESULTS.format(0)}")
    return scores


def soft_tifa(probabilities: Sequence[float]) -> dict[str, Any]:
    """AM and GM of the probabilities of a picture's right answers, and these."""
    logs = [math.log(max(p, LEAST)) for p in probabilities]
    count = len(probabilities)
    return {AM: sum(probabilities) / count, GM: math.exp(sum(logs) / count), ATOMS: list(map(float, probabilities))}


def parts(rows: Mapping[str, Row], prompts: Sequence[str]) -> dict[str, list[str]]:
    """The part that each prompt counts in: by how many facts it says. ValueError for one that the data lack."""
    if unknown := [prompt for prompt in prompts if prompt not in rows]:
        raise ValueError(f"{len(unknown)} prompts are not in GenEval 2's data, {unknown[0]!r} for one")
    return {prompt: [f"{rows[prompt].count} atoms"] for prompt in prompts}


def by_skill(rows: Mapping[str, Row], scored: Sequence[tuple[str, Sequence[float]]]) -> dict[str, statistics.Mean]:
    """The mean probability of the right answer by skill, over all questions, of prompts with their probabilities."""
    values: dict[str, list[tuple[str, float]]] = {}
    for prompt, probabilities in scored:
        for atom, p in zip(rows[prompt].atoms, probabilities, strict=True):
            values.setdefault(atom.kind, []).append((prompt, p))
    return {skill: statistics.mean(values[skill]) for skill in sorted(values)}
