"""The authors' directories of CLIP-FlanT5, of pickled shards, to one that weights.load reads.

A part of weights.lavis. The vision tower, which the authors' config.json names by its hub id, its
sizes and its preprocessing become parts of the directory. Tensors keep their names; one shard is in
memory at a time.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from referee_jax.weights import config_json, hub, load, tensors, tokenizers
from referee_jax.weights.convert import WeightsError

TOKENIZER = "google/flan-t5-xl"  # that of all sizes
_TOWER = "vision_tower.vision_tower."
_STEMS = ("pytorch_model", load.TRANSFORMERS)  # of pickled files and of safetensors


def convert(
    directory: Path,
    out: Path,
    read: Callable[[Path], Mapping[str, np.ndarray]],
    *,
    vision: str | None = None,
    tokenizer: str | None = None,
) -> int:
    """Writes the directory `out`, and returns how many tensors it has.

    Args:
        directory: the authors', on this machine.
        out: is new.
        read: reads a file of torch.save.
        vision: directory or hub id of the vision tower; None: the one that config.json names.
        tokenizer: directory or hub id; None: that of `directory`, or TOKENIZER.

    Raises WeightsError for files that are missing or damaged, and for tensors that are not those of
    the network: `out` is not there then.
    """
    values = config_json.read_json(directory / "config.json")
    tower = hub.resolve(vision or str(values.get("mm_vision_tower", "")), None, _patterns())
    source = directory if not tokenizer and not tokenizers.absent(directory) else tokenizer or TOKENIZER
    words = load.load_tokenizer(source)
    preprocessing = load.read_preprocessing(tower)
    sizes = config_json.read_json(tower / "config.json")
    values |= {"architectures": [load.KINDS["clip_t5"].architecture], "model_type": "t5"}
    values["vision_config"] = sizes.get("vision_config", sizes)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        count = _write_shards(_shards(directory, tower, read), unfinished)
        (unfinished / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (unfinished / "preprocessor_config.json").write_text(
            json.dumps(preprocessing, indent=2) + "\n", encoding="utf-8"
        )
        words.save_pretrained(unfinished)
        load.check_names("clip_t5", unfinished)
    except WeightsError as error:
        raise WeightsError(f"{directory}: {str(error).replace(str(unfinished), str(out))}") from error
    else:
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return count


def _patterns() -> list[str]:
    names = [f"{_STEMS[0]}{x}.bin" for x in ("", "-*-of-*")]
    return ["config.json", "preprocessor_config.json", "processor_config.json", *names, *tensors.patterns(_STEMS[1])]


def _files(directory: Path) -> list[Path]:
    """The files of weights in a directory: safetensors, or else pickled ones."""
    for stem, suffix in zip(reversed(_STEMS), ("safetensors", "bin"), strict=True):
        if files := sorted(directory.glob(f"{stem}*.{suffix}")):
            return files
    raise WeightsError(f"{directory} has no weights: neither {_STEMS[0]}*.bin nor {_STEMS[1]}*.safetensors")


def _shards(directory: Path, tower: Path, read: Callable) -> Iterator[dict[str, np.ndarray]]:
    """The tensors of each file, and those of the tower where the files have none."""
    load_file = lambda file: safetensors.numpy.load_file(file) if file.suffix == ".safetensors" else read(file)
    has_tower = False
    for file in _files(directory):
        shard = load_file(file)
        has_tower |= any(name.startswith("vision_tower.") for name in shard)
        yield dict(shard)
    if has_tower:
        return
    parts = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
    for file in _files(tower):
        # A CLIP's has the other tower, too; that of the tower alone may have no prefix.
        shard = {name.removeprefix("vision_model."): x for name, x in load_file(file).items()}
        yield {f"{_TOWER}vision_model.{name}": x for name, x in shard.items() if name.startswith(parts)}


def _write_shards(shards: Iterator[Mapping[str, np.ndarray]], out: Path) -> int:
    """Writes safetensors and their index."""
    weight_map = {}
    for n, shard in enumerate(shards, 1):
        if twice := sorted(weight_map.keys() & shard.keys()):
            raise WeightsError(f"{twice[0]} is in two files")
        file = f"{load.TRANSFORMERS}-{n:05d}.safetensors"
        kept = {name: np.asarray(x, order="C") for name, x in shard.items() if not name.endswith("position_ids")}
        safetensors.numpy.save_file(kept, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(kept, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
    (out / f"{load.TRANSFORMERS}.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
    return len(weight_map)
