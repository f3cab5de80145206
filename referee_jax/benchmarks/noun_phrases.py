"""The noun phrases of prompts, about each of which BLIP-VQA asks, and their words without the adjectives.

    python -m referee_jax.benchmarks.noun_phrases T2I-CompBench/examples/dataset

BLIP-VQA (Huang et al., T2I-CompBench, 2023, arXiv 2307.06350) takes the noun chunks of spaCy's
en_core_web_sm; CLIPScore leaves out what it tags as an adjective in a complex prompt.
noun_phrases.json holds both for the benchmark's own prompts, so that scores depend neither on an
installation of spaCy nor on its version. Captions of the shapes world are split by their grammar.
All other prompts need spaCy and its model. The command writes noun_phrases.json from the official
`*_val.txt` lists.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from referee_jax import cli
from referee_jax.benchmarks import t2i_compbench
from referee_jax.shapes import world
from referee_jax.storage import files

FILE = Path(__file__).with_name("noun_phrases.json")
# What can be found in a prompt: its noun phrases, or its words and marks that are no adjectives.
PHRASES, WORDS = "phrases", "words"
MODEL = "en_core_web_sm"
SHAPES = "shapes world"  # instead of a model's name


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which of a prompt's noun phrases are asked about: the first `limit` that are not `excluded`."""

    limit: int
    excluded: frozenset[str]

    def select(self, phrases: Iterable[str]) -> list[str]:
        """These phrases, in their order."""
        return [phrase for phrase in phrases if phrase not in self.excluded][: self.limit]


# The official scorer's rule since it excludes places, and its first one. Papers of early 2024 quote
# scores by the old rule; scores by different rules cannot be compared.
NEW, OLD = "new", "old"
RULES = {NEW: Rule(8, frozenset({"top", "the side", "the left", "the right"})), OLD: Rule(2, frozenset())}


def find(prompts: Iterable[str], kind: str) -> tuple[str, dict[str, list[str]]]:
    """The PHRASES or WORDS of each prompt, in order, and the name of what found them, for a report.

    Raises ValueError where a prompt needs spaCy and it, or its model, is not installed.
    """
    known, texts, names, others = official(), {}, set(), []
    for prompt in dict.fromkeys(prompts):
        spans = known["prompts"].get(key(prompt), {}).get(kind)
        if spans is not None:
            texts[prompt] = [prompt[start:end] for start, end in spans]
            names.add(known["model"])
        elif (parts := _of_caption(prompt, kind)) is not None:
            texts[prompt] = parts
            names.add(SHAPES)
        else:
            others.append(prompt)
    if others:
        model = load_spacy()
        if model is None:
            raise ValueError(
                f"the noun phrases of {len(others)} prompts, {others[0]!r} for one, are neither known from T2I-CompBench nor "
                f"of the shapes world: pip install 'referee_jax[eval]' && python -m spacy download {MODEL}"
            )
        texts |= {prompt: [prompt[start:end] for start, end in _spans(model(prompt), kind)] for prompt in others}
        names.add(_name())
    return ", ".join(sorted(names)), texts


@functools.cache
def official() -> dict[str, Any]:
    """noun_phrases.json: `model`, the name of what found them, and `prompts`, key -> kind -> [[start, end], ...]."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def key(prompt: str) -> str:
    """Stands for a prompt in noun_phrases.json, which holds no text of the benchmark."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


def _of_caption(prompt: str, kind: str) -> list[str] | None:
    """As `find`, of a caption of the shapes world; None for another prompt."""
    try:
        world.parse(prompt)
    except ValueError:
        return None
    caption = " ".join(prompt.replace(".", " ").split())
    if kind == PHRASES:  # "the left" in "on the left of" is one
        return re.split(r" (?:and )?(?:above|below|on|of) | and ", caption, flags=re.IGNORECASE)
    return [word for word in caption.split() if word.lower() not in {*world.COLOURS, *world.TEXTURES}]


def load_spacy() -> Any:
    """spaCy's en_core_web_sm; None where either is not installed."""
    try:
        import spacy

        return spacy.load(MODEL)
    except (ImportError, OSError):
        return None


def _name() -> str:
    return f"spacy {MODEL} {metadata.version(MODEL)}"


def _spans(document: Any, kind: str) -> list[tuple[int, int]]:
    """Start and end of each of the PHRASES or WORDS of a document of spaCy's, in characters."""
    if kind == PHRASES:
        return [(chunk.start_char, chunk.end_char) for chunk in document.noun_chunks]
    return [(token.idx, token.idx + len(token)) for token in document if token.pos_ != "ADJ"]


def make(directory: Path, out: Path = FILE) -> str:
    """Writes noun_phrases.json of a directory's lists; words are those of prompts whose score needs them.

    Raises ValueError where there are no lists, or no spaCy.
    """
    model = load_spacy()
    if model is None:
        raise ValueError(f"spaCy's {MODEL} is not installed: pip install spacy && python -m spacy download {MODEL}")
    entries = {}
    for prompt, parts in t2i_compbench.read_lists(directory).items():
        kinds = [PHRASES, WORDS] if t2i_compbench.is_measured(parts, "clip_without_adjectives") else [PHRASES]
        document = model(prompt)
        entries[key(prompt)] = {kind: _spans(document, kind) for kind in kinds}
    lines = [f'"{name}":{json.dumps(entries[name], separators=(",", ":"))}' for name in sorted(entries)]
    head, body = json.dumps({"model": _name()}).rstrip("}"), ",\n".join(lines)
    files.write_atomic(out, f'{head}, "prompts": {{\n{body}\n}}}}\n'.encode())
    return f"{len(entries)} prompts in {out}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of T2I-CompBench's *_val.txt files")
    parser.add_argument("--out", type=Path, default=FILE, help="the file to write; by default that of the package")
    arguments = parser.parse_args()
    sys.exit(cli.tell(lambda: make(arguments.directory, arguments.out)))
