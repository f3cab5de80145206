"""The tensors of safetensors files, one file or shards, read one at a time."""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from referee_jax.weights import config_json
from referee_jax.weights.convert import WeightsError

_PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".msgpack", ".h5")
VARIANTS = ("fp16", "bf16")  # of files: the same weights in fewer bits
_SHOWN = 5  # files, in a message
_MERGE = (
    "one of a generator is named in generator.loras, beside its checkpoint; merge another into its checkpoint once "
    "(merge_and_unload of peft), and save that with save_pretrained"
)
_CONVERT = (
    "a checkpoint is a directory as save_pretrained of transformers or diffusers writes it, or, of Stable Diffusion 1, 2 or XL, "
    "the path of the authors' file with all networks"
)
_TORCH = (".bin", ".pth", ".pt", ".ckpt")  # of the pickled files, those that torch writes
_REWRITE = (
    "import sys, torch; from safetensors.torch import save_file; "
    "x = torch.load(sys.argv[1], map_location='cpu', weights_only=True); x = x.get('state_dict', x); "
    "save_file({k: v.contiguous().clone() for k, v in x.items() if torch.is_tensor(v)}, sys.argv[2])"
)
_SAVED_AGAIN = "save the checkpoint in float32, float16 or bfloat16"
# Floats of a byte, which safetensors' reader for numpy does not have.
NARROW = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
# Scales, and floats of which several are in a byte: weights only together with others.
UNREAD = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a directory's safetensors file or shards, read on access.

    The file is opened again for each tensor: as long as it is open, all pages that were read stay
    in memory. `source` is the file, or the index of the shards; where there are no others, of a
    variant. Raises WeightsError naming a file that is missing, damaged or does not agree with the
    index.
    """

    def __init__(self, directory: Path, stem: str):
        self._files: dict[str, Path] = {}
        self.source = source(directory, stem)
        if self.source is None:
            raise WeightsError(missing(directory, stem))
        shards = _shards(self.source) if self.source.suffix == ".json" else {self.source: None}
        for file, indexed in shards.items():
            names = set(_names(file))
            if indexed is not None and names != indexed:
                raise WeightsError(f"{file} does not hold what the index says: {', '.join(sorted(names ^ indexed))}")
            self._files |= dict.fromkeys(sorted(names), file)

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._files[name]
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                kind = opened.get_slice(name).get_dtype()
                if kind in UNREAD:
                    raise WeightsError(f"{file}: {name} is of the type {kind}, which is not read; {_SAVED_AGAIN}")
                return _narrow(file, name) if kind in NARROW else opened.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise WeightsError(f"{file}: {name} cannot be read ({error})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _shards(index: Path) -> dict[Path, set[str]]:
    """The files of weights that an index names -> names of their tensors in it."""
    shards: dict[Path, set[str]] = {}
    weight_map = config_json.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        # An index is untrusted: it may only name files beside it.
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise WeightsError(f"{index} puts {name} into {file!r}, which is not the name of a file beside it")
        shards.setdefault(index.parent / file, set()).add(name)
    return shards


def source(directory: Path, stem: str) -> Path | None:
    """The file of weights in `directory`, or the index of its shards; None if there are none.

    Those of a variant count where there are no others.
    """
    infixes = ("", *(f".{variant}" for variant in VARIANTS))
    names = [name for x in infixes for name in (f"{stem}{x}.safetensors", f"{stem}.safetensors.index{x}.json")]
    return next((directory / name for name in names if (directory / name).exists()), None)


def patterns(stem: str, variant: str = "") -> list[str]:
    """Glob patterns of the files that `source` and its shards may be."""
    x = variant and f".{variant}"
    shard = "-?????-of-?????"  # and no more, which a variant's shards have
    names = [f"{stem}{x}.safetensors", f"{stem}.safetensors.index{x}.json", f"{stem}{x}{shard}.safetensors"]
    return [*names, f"{stem}{shard}{x}.safetensors"] if x else names


def missing(directory: Path, stem: str, names: Iterable[str] | None = None) -> str:
    """Says that there are no weights in `directory`, and what there is instead.

    `names` are those of its files, by default those on this machine.
    """
    names = [file.name for file in directory.glob("*")] if names is None else names
    return f"{directory / stem}.safetensors is missing{instead(directory, names, stem)}"


def instead(directory: Path, names: Iterable[str], stem: str = "") -> str:
    """The rest of a sentence that says that weights are missing: what there is, and the way on."""
    names = sorted(name for name in names if Path(name).suffix in (".safetensors", *_PICKLED))
    whole = [name for name in names if name.endswith(".safetensors")]
    loras = [name for name in whole if is_lora(directory / name)]
    if loras:
        remedy = f"{loras[0]} is a LoRA: {_MERGE}"
    elif variants := [name for name in whole if stem and name.startswith(f"{stem}.")]:
        remedy = f"if {variants[0]} has the weights that are meant, rename it to {stem}.safetensors"
    elif whole:
        remedy = _CONVERT
    elif checkpoints := [name for name in names if name.endswith(".ckpt")]:
        remedy = rewritten(directory / checkpoints[0])
    elif names:
        remedy = (
            "only safetensors are read, as pickled files can run code: convert a checkpoint that has no others once, with "
            "from_pretrained and save_pretrained of transformers or diffusers, or the authors' own file with "
            "referee_jax.weights.lavis"
        )
    else:
        return "; only safetensors are read, and there are none"
    return f" (there is {', '.join(names[:_SHOWN])}{' and more' if len(names) > _SHOWN else ''}); {remedy}"


def of_one_file(file: Path) -> str:
    """The way on for the path of a file where a directory is needed."""
    if (file.parent / "config.json").exists():
        return f"say {file.parent}"
    if file.suffix in _TORCH:
        return rewritten(file)
    return _MERGE if is_lora(file) else _CONVERT


def rewritten(file: Path) -> str:
    """The way on for a file that torch pickled: the command that writes its tensors to one of safetensors."""
    command = shlex.join(["python", "-c", _REWRITE, str(file), str(file.with_suffix(".safetensors"))])
    return f"only safetensors are read, as pickled files can run code: where torch is, run: {command}"


def is_lora(file: Path) -> bool:
    """Whether a file has the weights of a LoRA; by its name, where it is not on this machine."""
    try:
        return any("lora_" in name for name in _names(file))
    except WeightsError:
        return "lora" in file.name.lower() or file.name == "adapter_model.safetensors"


def _names(file: Path) -> list[str]:
    """The names of a file's tensors."""
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            return list(opened.keys())
    except FileNotFoundError as error:
        raise WeightsError(f"{file} is missing") from error
    except (OSError, safetensors.SafetensorError) as error:
        if unknown := re.search(r"unknown variant `(\w+)`", str(error)):
            reason = f"{_first_of(file, unknown[1])} is of the type {unknown[1]}, which the library safetensors does not know"
            raise WeightsError(f"{file}: {reason}: update it, or {_SAVED_AGAIN}") from error
        raise WeightsError(f"{file} is damaged or not a safetensors file ({error})") from error


def _first_of(file: Path, kind: str) -> str:
    """The name of the first tensor of a type, as far as the header can be read."""
    try:
        return next(name for name, entry in _header(file)[0].items() if entry.get("dtype") == kind)
    except (ValueError, AttributeError, StopIteration):
        return "a tensor"


def _header(file: Path) -> tuple[dict, int]:
    """The header of a file, and the offset of the tensors behind it, in bytes."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(length)), 8 + length


def _narrow(file: Path, name: str) -> np.ndarray:
    """A tensor of a type of `NARROW`, as float32, which has all their values and is read further."""
    header, start = _header(file)
    entry = header[name]
    begin, end = entry["data_offsets"]
    values = np.fromfile(file, NARROW[entry["dtype"]], end - begin, offset=start + begin)
    return values.astype(np.float32).reshape(entry["shape"])
