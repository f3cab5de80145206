"""The vocabulary of the shapes world, as a tokenizer of CLIP and as one of BERT.

Each word of the world is one token, all others are spelled letter by letter.
"""

import functools
import json
import pathlib
import re
import string
from collections.abc import Sequence

import numpy as np

from referee_jax.shapes import world

LENGTH = 20  # tokens of a caption with both ends
WORDS = (
    *("a", "an", "and", "on", "the", "left", "right", "of", "above", "below", "photo", "exactly", "contains", "picture"),
    *world.NUMBERS, *world.COLOURS, *world.SHAPES, *world.PLURALS.values(), *world.TEXTURES,
)  # fmt: skip


def _merges() -> list[tuple[str, str]]:
    """Byte-pair merges that join each of WORDS letter by letter from its end.

    From the end, so that every piece carries the end-of-word mark and no merge applies inside another word.
    """
    merges = {}
    for word in WORDS:
        whole = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            merges[letter, whole] = None
            whole = letter + whole
    return list(merges)


LETTERS = string.ascii_lowercase + string.digits + ".,;:!?'\"-()"
_ENDS = ("<|startoftext|>", "<|endoftext|>")
_PIECES = [*LETTERS, *(c + "</w>" for c in LETTERS), *("".join(pair) for pair in _merges())]
VOCABULARY = {piece: i for i, piece in enumerate(dict.fromkeys([*_PIECES, *_ENDS]))}
START, END = (VOCABULARY[end] for end in _ENDS)


def save(directory: pathlib.Path) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json, as `transformers.CLIPTokenizer` reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(VOCABULARY))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in _merges()))
    config = {
        "tokenizer_class": "CLIPTokenizer", "bos_token": _ENDS[0], "eos_token": _ENDS[1], "pad_token": _ENDS[1],
        "unk_token": _ENDS[1], "model_max_length": LENGTH,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@functools.cache
def _words(text: str) -> tuple[int, ...]:
    return tuple(VOCABULARY[f"{word}</w>"] for word in text.split())


def encode(texts: list[str]) -> np.ndarray:
    """Token ids of captions, int32 `[text, LENGTH]`: start, words, end, padded with end, as the saved tokenizer's."""
    return _padded([(START, *_words(text)) for text in texts], LENGTH, END)


def _padded(rows: Sequence[Sequence[int]], length: int, pad: int) -> np.ndarray:
    """Rows of token ids, int32 `[row, length]`."""
    ids = np.full((len(rows), length), pad, np.int32)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    return ids


# --- BERT --------------------------------------------------------------------------------------------------------------

BEGINNING = "a picture of"  # of every caption in BLIP's training
_PIECES_OF_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "yes", "no", *LETTERS]
_PIECES_OF_BERT += [f"##{letter}" for letter in LETTERS] + ["[DEC]", "[ENC]"]
WORDPIECES = {piece: i for i, piece in enumerate(dict.fromkeys(_PIECES_OF_BERT))}


def save_wordpieces(directory: pathlib.Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as `transformers.BertTokenizer` reads them; [DEC] begins captions."""
    import transformers  # slow to import, and only training needs it

    tokenizer = transformers.BertTokenizer(vocab=WORDPIECES, bos_token="[DEC]", model_max_length=LENGTH)
    tokenizer.save_pretrained(directory)


def wordpieces(texts: list[str], first: str = "[CLS]") -> np.ndarray:
    """Token ids of texts, int32 `[text, LENGTH]`: `first`, words, [SEP], padded, as the saved tokenizer's."""
    rows = [[WORDPIECES[piece] for piece in (first, *text.split(), "[SEP]")] for text in texts]
    return _padded(rows, LENGTH, WORDPIECES["[PAD]"])


# --- T5 ---------------------------------------------------------------------------------------------------------------

_WORDS_OF_T5 = ["<pad>", "</s>", "<unk>", *WORDS, "yes", "no", "is", "are", "there", "to", "another", "other", "?"]
T5_WORDS = {word: i for i, word in enumerate(dict.fromkeys(_WORDS_OF_T5))}
T5_LENGTH = LENGTH + 4  # a caption with its template


def save_t5(directory: pathlib.Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json: words in lower case, and </s> at the end, as T5's tokenizer."""
    import tokenizers  # as above
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(T5_WORDS, unk_token="<unk>"))
    words.normalizer = tokenizers.normalizers.Lowercase()
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", T5_WORDS["</s>"])]
    )
    ends = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=T5_LENGTH, **ends)
    tokenizer.save_pretrained(directory)


def t5_words(texts: list[str]) -> np.ndarray:
    """Token ids of texts, int32 `[text, T5_LENGTH]`: words and marks, </s>, padded, as the saved tokenizer's."""
    rows = [[T5_WORDS[word] for word in (*re.findall(r"\w+|[^\w\s]+", text.lower()), "</s>")] for text in texts]
    return _padded(rows, T5_LENGTH, T5_WORDS["<pad>"])
