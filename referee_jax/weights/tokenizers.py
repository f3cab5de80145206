"""Reads a checkpoint's tokenizer, and compares it with the network that reads its tokens.

transformers makes a tokenizer of the special tokens alone where the files of words are missing, and
one that spells every word where merges.txt is empty: all texts would be the same, or noise.
"""

import os
from pathlib import Path
from typing import Any

from referee_jax import console
from referee_jax.models import bert, blip2, clip, qwen3_vl
from referee_jax.models.flan_t5 import t5
from referee_jax.weights.convert import WeightsError

CONFIG = "tokenizer_config.json"
# The files of words of each class of tokenizers: all of a row. The first is read where it is there.
WORDS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("spiece.model",))
# How many words tokenizer and network may be apart: NAMED in either direction, since BLIP's tokenizer
# lacks [DEC] and [ENC] and BLIP-2's has <image> besides; and the network may have ROUNDED more, since
# tables of embeddings are rounded up, to a multiple of 128 at most.
NAMED, ROUNDED = 2, 127
SPARE = {qwen3_vl.TextConfig: 512}  # Qwen's tables have rows for hundreds of words to come
PATTERNS = ("*token*.json", "vocab.*", "merges.txt", "spiece.model")
# Network -> its tokenizer in transformers. Another's class is told by config.json, or CONFIG alone.
_TYPES = {clip.TextConfig: "clip", bert.Config: "bert", blip2.QFormerConfig: "bert", t5.Config: "t5"}
_REMEDY = "; copy the tokenizer's files from where the checkpoint is from"


def transformers_class(name: str) -> Any:
    """A class of transformers, which is slow to import; without its advice to install PyTorch, which is not needed."""
    variable = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        import transformers

        return getattr(transformers, name)  # imports more, and may give the advice again
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def read(directory: Path, network: Any = None) -> Any:
    """Returns transformers' tokenizer of a directory; runs no code from there.

    Its `model_max_length` is at most the network's positions, also where no file has one.

    Args:
        directory: where its files are.
        network: the config of the network that reads its tokens, which has `vocab_size` and
            `max_position_embeddings`; None: nothing is compared.

    Raises:
        WeightsError: naming the files that are missing or empty, if the tokenizer cannot be read,
            or has other words than the network.
    """
    auto = transformers_class("AutoTokenizer")
    # transformers would go by config.json: BLIP-2's names a language model, and Stable Diffusion's
    # tokenizer has none.
    kind = None if (directory / CONFIG).exists() else _type(network)
    options = dict(local_files_only=True, trust_remote_code=False, tokenizer_type=kind)
    try:
        if isinstance(network, t5.Config):  # transformers would warn that it does not know CLIP-FlanT5's config.json
            options["config"] = transformers_class("PreTrainedConfig")()
        tokenizer = auto.from_pretrained(directory, **options)
        _check_merges(directory, tokenizer)
    except WeightsError:
        raise
    except Exception as error:  # the tokenizers library raises Exception
        reason = f"{files}{_REMEDY}" if (files := absent(directory)) else console.first_line(error)
        raise WeightsError(f"{directory}: no tokenizer can be read here ({reason})") from error
    if network is None:
        return tokenizer
    reason = absent(directory)
    spare = NAMED if reason else SPARE.get(type(network), ROUNDED)
    if not -NAMED <= network.vocab_size - len(tokenizer) <= spare:
        sizes = f"the tokenizer has {len(tokenizer)} words, the network {network.vocab_size}"
        raise WeightsError(f"{directory}: {sizes}: {reason or 'it is another one'}{_REMEDY}")
    tokenizer.model_max_length = min(tokenizer.model_max_length, network.max_position_embeddings)
    return tokenizer


def _type(network: Any) -> str | None:
    return next((name for kind, name in _TYPES.items() if isinstance(network, kind)), None)


def absent(directory: Path) -> str:
    """Which of a tokenizer's files are missing or empty, as half a sentence; "" if none are."""
    for names in WORDS:
        if any((directory / name).exists() for name in names):
            return " and ".join(filter(None, (_state(directory / name) for name in names)))
    return f"there is no {', nor '.join(' with '.join(names) for names in WORDS)}"


def _state(file: Path) -> str:
    if not file.exists():
        return f"{file.name} is missing"
    return "" if file.stat().st_size else f"{file.name} is empty"


def _check_merges(directory: Path, tokenizer: Any) -> None:
    """Raises WeightsError for a merges.txt that does not make the words of vocab.json."""
    whole, _, file = (directory / name for names in WORDS[:2] for name in names)
    if whole.exists() or not file.exists():
        return
    merged = {line.replace(" ", "") for line in file.read_text(encoding="utf-8").splitlines()}
    single = tokenizer.get_added_vocab()
    words = [word for word in tokenizer.get_vocab() if word not in single and len(word.removesuffix("</w>")) > 1]
    count = sum(word in merged for word in words)
    if count < len(words) - max(NAMED, len(words) // 100):
        reason = absent(directory) or f"it makes {count} of the {len(words)} words that are made by merging"
        raise WeightsError(f"{file}: the tokenizer would spell words ({reason}){_REMEDY}")
