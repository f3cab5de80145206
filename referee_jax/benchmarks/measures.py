"""Measures of images: a `Measure` is a name, the settings that its numbers depend on, and a function.

`collect` runs one over many images. It can be interrupted: each image's scores are one line of a file,
and images with a line are not measured again, unless they, their text, or what measures them has changed.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tqdm

from referee_jax import config, referees
from referee_jax.benchmarks import geneval2, layouts, noun_phrases, t2i_compbench
from referee_jax.benchmarks import scorer as scorer_lib
from referee_jax.benchmarks.scorer import CUT, UNREAD
from referee_jax.referees.judge import QUESTION
from referee_jax.shapes import benchmark
from referee_jax.storage import files, shards
from referee_jax.storage import images as images_lib
from referee_jax.weights import hub

Scores = dict[str, Any]

VERSION = 2  # raised with every change of what a measure gives, so that no score from before it is taken for a new one


@dataclasses.dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
        name: of its file of scores.
        settings: all that its numbers depend on besides image and text.
        build: loads networks; returns the batch size and the function of images and their prompts.
        text: what is read of a prompt, as a JSON value.
    """

    name: str
    settings: dict[str, Any]
    build: Callable[[], tuple[int, Callable[[Sequence[PIL.Image.Image], Sequence[str]], list[Scores]]]]
    text: Callable[[str], Any] = str

    @property
    def file_name(self) -> str:
        """The file of its scores, with a hash of its settings and of VERSION."""
        settings = json.dumps([VERSION, self.settings], sort_keys=True)
        return f"{self.name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.jsonl"


def ground_truth() -> Measure:
    """The shapes world's detector: `right` (0 or 1) and `quality` in dB."""

    def score(images: Sequence[PIL.Image.Image], prompts: Sequence[str]) -> list[Scores]:
        pixels = [np.asarray(image, np.float32) / 255 for image in images]
        right, quality = benchmark.score(pixels, prompts)
        return [{"right": float(r), "quality": float(q)} for r, q in zip(right, quality, strict=True)]

    return Measure("shapes", {}, lambda: (64, score))


def by_referees(checkpoints: Sequence[str], *, truncate: bool = False, batch_size: int = 16) -> list[Measure]:
    """All scores of referees for the whole prompt, named by referee, or by checkpoint if several are of a kind."""
    kinds, result = [referees.name_of(checkpoint) for checkpoint in checkpoints], []
    for kind, checkpoint in zip(kinds, checkpoints, strict=True):
        label = kind if kinds.count(kind) == 1 else checkpoint
        build = functools.partial(
            _prompted, checkpoint, kind, str, batch_size, truncate, functools.partial(_labelled, label)
        )
        result.append(Measure(kind, _of(checkpoint, label=label) | _truncated(truncate), build))
    return result


def _labelled(label: str, scores: Scores) -> Scores:
    return {f"{label}_{name}": value for name, value in scores.items()}


def clip_score(checkpoint: str, *, truncate: bool = False, batch_size: int = 16) -> Measure:
    """T2I-CompBench's CLIPScore: the cosine of the whole prompt."""
    build = functools.partial(_prompted, checkpoint, "clip", str, batch_size, truncate, lambda x: {"clip": x["cosine"]})
    return Measure("clip", _of(checkpoint, words="all") | _truncated(truncate), build)


def clip_without_adjectives(
    checkpoint: str, prompts: Iterable[str], *, truncate: bool = False, batch_size: int = 16
) -> Measure:
    """CLIPScore of complex prompts: the cosine of their words that are no adjectives.

    Raises ValueError where one of `prompts` needs spaCy and it is not installed.
    """
    name = "clip_without_adjectives"
    label, words = noun_phrases.find(prompts, noun_phrases.WORDS)
    read = lambda prompt: " ".join(words[prompt])
    build = functools.partial(_prompted, checkpoint, "clip", read, batch_size, truncate, lambda x: {name: x["cosine"]})
    return Measure(name, _of(checkpoint, words=label) | _truncated(truncate), build, read)


def blip_vqa(checkpoint: str, prompts: Iterable[str], *, rule: str = noun_phrases.NEW, batch_size: int = 4) -> Measure:
    """T2I-CompBench's BLIP-VQA of the prompts' noun phrases, by one of noun_phrases.RULES; long ones are cut, as there.

    Raises ValueError where one of `prompts` needs spaCy and it is not installed.
    """
    label, phrases = noun_phrases.find(prompts, noun_phrases.PHRASES)
    questions = {prompt: noun_phrases.RULES[rule].select(texts) for prompt, texts in phrases.items()}

    def build():
        limit = noun_phrases.RULES[rule].limit
        scorer = scorer_lib.Scorer(_judge(checkpoint, "blip_vqa"), texts=limit, batch_size=batch_size, truncate=True)

        def score(images: Sequence[PIL.Image.Image], prompts: Sequence[str]) -> list[Scores]:
            return t2i_compbench.blip_vqa(scorer, images, [questions[prompt] for prompt in prompts])

        return scorer.batch_size, score

    return Measure("blip_vqa", _of(checkpoint, noun_phrases=rule, chunker=label), build, questions.__getitem__)


def soft_tifa(checkpoint: str, rows: Mapping[str, geneval2.Row], *, batch_size: int = 4) -> Measure:
    """GenEval 2's Soft-TIFA of the rows' questions, by any referee of config.ASKED."""
    kind, most = referees.name_of(checkpoint), max(len(row.atoms) for row in rows.values())
    if kind not in config.ASKED:
        raise ValueError(f"{checkpoint} is a {kind}, which answers no questions; {', '.join(config.ASKED)} do")

    def build():
        spec = config.RefereeSpec(name=kind, checkpoint=checkpoint, losses={}, questions=most)
        asked = {prompt: row.atoms for prompt, row in rows.items()}
        scorer = scorer_lib.Scorer(referees.load_referee(spec), batch_size=batch_size, questions=asked)

        def result(own: list[Scores] | str, prompt: str) -> Scores:
            if isinstance(own, str):
                return {UNREAD: own}
            return geneval2.soft_tifa([own[0][f"{QUESTION}{n}"] for n in range(len(asked[prompt]))])

        def score(images: Sequence[PIL.Image.Image], prompts: Sequence[str]) -> list[Scores]:
            return list(map(result, scorer(images, [(prompt,) for prompt in prompts]), prompts))

        return scorer.batch_size, score

    text = lambda prompt: [list(atom[2:]) for atom in rows[prompt].atoms]
    return Measure("soft_tifa", _of(checkpoint, most=str(most)), build, text)


def _of(checkpoint: str, **settings: str) -> dict[str, Any]:
    """The settings of a measure by a checkpoint, with the version of its files: a directory's may change."""
    return {"checkpoint": checkpoint, "weights": hub.version(checkpoint), **settings}


def _judge(checkpoint: str, name: str) -> referees.Judge:
    return referees.load_referee(config.RefereeSpec(name=name, checkpoint=checkpoint, losses={}))


def _truncated(truncate: bool) -> dict[str, bool]:
    """Of a measure's settings."""
    return {"truncate": True} if truncate else {}


def _prompted(
    checkpoint: str,
    name: str,
    read: Callable[[str], str],
    batch_size: int,
    truncate: bool,
    select: Callable[[Scores], Scores],
):
    """What `Measure.build` returns, for a referee that scores one text made of the prompt by `read`."""
    scorer = scorer_lib.Scorer(_judge(checkpoint, name), batch_size=batch_size, truncate=truncate)

    def result(own: list[Scores] | str) -> Scores:
        if isinstance(own, str):
            return {UNREAD: own}
        (scores,) = own
        cut = {CUT: True} if scores.pop(CUT, False) else {}
        return select(scores) | cut

    def score(images: Sequence[PIL.Image.Image], prompts: Sequence[str]) -> list[Scores]:
        return list(map(result, scorer(images, [(read(prompt),) for prompt in prompts])))

    return scorer.batch_size, score


def collect(measure: Measure, entries: Sequence[layouts.Entry], out: Path) -> dict[str, Scores]:
    """The scores of each entry, by the path of its file; `out` is the directory of the files of scores.

    Of an image that cannot be measured, UNREAD says why; CUT is beside the scores of a prompt that was cut.

    An image that has changed since is measured again, and so is one whose text has.
    """
    file = out / measure.file_name
    files.mend(file)
    key = lambda line: (line.get("file"), line.get("modified"), json.dumps(line.get("text")))
    known = {key(line): line.get("scores") for line in files.read_lines(file)}
    stamps = {
        entry: {"file": str(entry.file), "modified": shards.modified(entry.file), "text": measure.text(entry.prompt)}
        for entry in entries
    }
    todo = [entry for entry in entries if key(stamps[entry]) not in known]
    if todo:
        size, score = measure.build()
        with tqdm.tqdm(total=len(todo), desc=measure.name, unit="image", dynamic_ncols=True) as bar:
            for start in range(0, len(todo), size):
                batch = todo[start : start + size]
                for entry, scores in zip(batch, _scores(score, batch), strict=True):
                    scores = known[key(stamps[entry])] = files.finite(scores)
                    files.append(file, {**stamps[entry], "prompt": entry.prompt, "scores": scores})
                bar.update(len(batch))
    return {str(entry.file): known[key(stamps[entry])] for entry in entries}


def _scores(score: Callable[..., list[Scores]], entries: Sequence[layouts.Entry]) -> list[Scores]:
    """The scores of some entries, or in their place why a file cannot be read."""
    images, results = {}, {}
    for n, entry in enumerate(entries):
        try:
            images[n] = images_lib.read_image(entry.file)
        except ValueError as error:
            results[n] = {UNREAD: str(error)}
    if images:
        measured = score(list(images.values()), [entries[n].prompt for n in images])
        results |= zip(images, measured, strict=True)
    return [results[n] for n in range(len(entries))]
