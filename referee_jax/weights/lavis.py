"""Converts authors' files to directories that weights.load reads:

    python -m referee_jax.weights.lavis IN [VISION] OUT_DIR [--kind=KIND] [--tokenizer=DIR]

    blip2         LAVIS' stage 1: blip2_pretrained.pth with eva_vit_g.pth, or
                  blip2_pretrained_vitL.pth with clip_vit_L.pth; fine-tuned files need no second one
    blip_itm      BLIP: model_base_retrieval_coco.pth and the like
    blip_caption  BLIP: model_base_caption_capfilt_large.pth and the like
    blip_vqa      BLIP: model_base_vqa_capfilt_large.pth and the like, at 480 pixels
    image_reward  ImageReward.pt
    clip          HPS_v2_compressed.pt, HPS_v2.1_compressed.pt: CLIP H/14 by the names of open_clip
    openai_clip   OpenAI's own archives of its vision transformers: ViT-B-32.pt, ViT-L-14.pt and the like
    clip_t5       directories of CLIP-FlanT5, clip-flant5-xl and the like; VISION is a directory or hub id
                  of its vision tower, by default the one that its config.json names (clip_flant5.py)

The names of the tensors tell the kind. A pickled file can run code: torch (the extra `train`) reads
only tensors and plain values, and refuses the rest. Every tensor is renamed by a row of
`lavis_tables.KINDS`, or ignored by name; one that is unknown, missing or of a wrong shape is an
error that names it. Sizes come from the shapes; head widths, epsilons and activations from the
authors' code. The files have no tokenizer: it is read from `--tokenizer`, a directory or hub id.
"""

import argparse
import dataclasses
import hashlib
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from referee_jax.weights import clip_flant5, convert, load
from referee_jax.weights.convert import WeightsError
from referee_jax.weights.lavis_tables import BERT, CLIP_H, CLIP_MEAN, CLIP_STD, KINDS, OPENAI, Row, ShapesByName

# --- names ---


def _bind(pattern: str, name: str) -> tuple[str, ...] | None:
    """The parts of a name that match the stars of a pattern; None if it does not match."""
    parts = re.split(r"(\*\*|\*)", pattern)
    regex = "".join({"*": r"([^.]+)", "**": "(.+)"}.get(part, re.escape(part)) for part in parts)
    match = re.fullmatch(regex, name)
    return match and match.groups()


def _fill(patterns: str, stars: Iterable[str]) -> list[str]:
    """Replaces the stars of each pattern by the same values."""
    names = []
    for pattern in patterns.split():
        values = iter(stars)
        names.append(re.sub(r"\*\*|\*", lambda _, values=values: next(values), pattern))
    return names


def _fits(patterns: Iterable[str], name: str) -> bool:
    return any(_bind(pattern, name) is not None for pattern in patterns)


def _network(kind: str) -> load.Kind:
    return load.KINDS[KINDS[kind].network or kind]


def _kind(names: Iterable[str]) -> str:
    """The first kind of file that may have tensors of these names."""
    some = lambda pattern: any(_bind(pattern, name) is not None for name in names)
    for kind, row in KINDS.items():
        if all(map(some, row.has)) and not any(map(some, row.lacks)):
            return kind
    raise WeightsError(f"the names of the tensors do not say which kind this is; say --kind={'|'.join(KINDS)}")


# --- the conversion ---


def read(file: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a file that torch.save wrote, memory-mapped, without running code of it.

    Prints the file's SHA-256. Raises WeightsError for a file that is missing, damaged, or holds
    more than tensors and plain values.
    """
    try:
        import torch  # needed by this conversion and training only
    except ImportError as error:
        raise WeightsError("torch is needed to read the authors' files: pip install 'referee_jax[train]'") from error

    if not Path(file).is_file():
        raise WeightsError(f"{file} is missing")
    with open(file, "rb") as opened:
        print(f"SHA-256 {hashlib.file_digest(opened, 'sha256').hexdigest()}  {file}")
    if zipfile.is_zipfile(file) and (values := _scripted(file)):
        return values
    try:
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except Exception as error:  # torch and pickle raise errors of any type
        raise WeightsError(
            f"{file} is damaged, or holds more than tensors; nothing in it was run ({_reason(error)})"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(values, Mapping) and isinstance(values.get(key), Mapping):
            values = values[key]
            break
    if not isinstance(values, Mapping) or not values:
        raise WeightsError(f"{file} does not hold tensors by their names")
    if strange := [
        str(name) for name, x in values.items() if not isinstance(x, torch.Tensor) or not isinstance(name, str)
    ]:
        raise WeightsError(f"{file} should hold tensors by their names, but these are none: {_listed(strange)}")
    arrays, exact = {}, (torch.float16, torch.float32, torch.float64)
    for name, x in _unwrapped(values).items():
        try:  # numpy has neither bfloat16 nor floats of a byte
            x = x.float() if x.is_floating_point() and x.dtype not in exact else x
            arrays[name] = x.detach().contiguous().numpy()
        except (TypeError, RuntimeError) as error:
            raise WeightsError(f"{file}: {name} is of the type {x.dtype}, {x.layout}, which is not read") from error
    return arrays


def _reason(error: Exception) -> str:
    """Why torch does not read a file, without its advice to read it in spite of that."""
    if match := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it asks for {match[1]}: get its tensors alone, a state_dict, from the authors"
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return re.split(r"\.\s|\n", text)[0] if text and "weights_only" not in text else "it is not what torch.save writes"


def _unwrapped(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors by their names in the network that torch's DataParallel or compile wrapped."""
    for prefix in ("module.", "_orig_mod.") * 2:  # in either order
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return tensors


class _Part:
    """A module of a TorchScript archive, by its attributes: those of a class whose code is not looked at."""


class _Scripted(pickle.Unpickler):
    """Reads the tensors of a TorchScript archive, and makes nothing else than modules without code."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        """The few names that such an archive needs. Raises UnpicklingError for another."""
        if module.partition(".")[0] == "__torch__":
            return _Part
        if module in ("torch", "torch.cuda") and name in STORAGES:
            return STORAGES[name]
        makers = {
            ("collections", "OrderedDict"): dict,
            ("torch._utils", "_rebuild_tensor_v2"): _strided,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
        }
        if (module, name) not in makers:
            raise pickle.UnpicklingError(f"{module}.{name} is not read")
        return makers[module, name]

    def persistent_load(self, pid: tuple) -> np.ndarray:
        """The numbers of a tensor."""
        _, dtype, key, *_ = pid
        return np.frombuffer(self.archive.read(f"{self.root}data/{key}"), dtype)


STORAGES = {
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "DoubleStorage": "<f8",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
}


def _strided(numbers: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or last >= max(len(numbers), 1):
        raise pickle.UnpicklingError("a tensor is larger than its numbers")
    steps = [step * numbers.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(numbers[offset:], size, steps, writeable=False)


def _scripted(file: str | Path) -> dict[str, np.ndarray] | None:
    """The tensors of a TorchScript archive by their names; None where it is none.

    Torch would run code of it. Raises WeightsError for what holds anything else than modules of tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            root = names[0].partition("/")[0] + "/" if names else ""
            if f"{root}constants.pkl" not in names:
                return None
            top = _Scripted(archive, root).load()
    except Exception as error:  # a damaged pickle raises errors of any type
        raise WeightsError(f"{file} is damaged, or no TorchScript archive of tensors ({error})") from error
    tensors: dict[str, np.ndarray] = {}

    def walk(part: _Part, prefix: str) -> None:
        for name, value in vars(part).items():
            if isinstance(value, _Part):
                walk(value, f"{prefix}{name}.")
            elif isinstance(value, np.ndarray):
                tensors[prefix + name] = value

    walk(top, "")
    return tensors


def rename(kind: str, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors of a file by our names, and a map of our names to the authors'.

    Raises WeightsError naming tensors that match no row, or lack others of their row.
    """
    renamed: dict[str, np.ndarray] = {}
    origins: dict[str, str] = {}
    used, unknown = set(), []
    for name in tensors:
        if name in used or _fits(KINDS[kind].ignore, name):
            continue
        match = next(_matches(kind, name, 0), None)
        if match is None:
            unknown.append(name)
            continue
        (old_patterns, new_patterns, *transform), stars = match
        old, new = _fill(old_patterns, stars), _fill(new_patterns, stars)
        used |= set(old)
        if missing := [source for source in old if source not in tensors]:
            raise WeightsError(f"{name} is there, but {', '.join(missing)} is missing")
        if twice := [target for target in new if target in renamed]:
            raise WeightsError(f"{origins[twice[0]]} and {name} are the same part of the network")
        parts, names = [tensors[source] for source in old], " and ".join(old)
        try:
            renamed |= zip(new, transform[0](*parts) if transform else parts, strict=True)
        except ValueError as error:
            raise WeightsError(f"{names}: unexpected shape {' and '.join(str(x.shape) for x in parts)}") from error
        origins |= dict.fromkeys(new, names)
    if unknown:
        raise WeightsError(f"tensors that a {kind} does not have: {_listed(unknown)}")
    return renamed, origins


def _matches(kind: str, name: str, side: int) -> Iterator[tuple[Row, tuple[str, ...]]]:
    """Rows whose authors' names (`side` 0) or ours (1) match `name`, and their stars' parts."""
    for row in KINDS[kind].rows:
        for pattern in row[side].split():
            if (stars := _bind(pattern, name)) is not None:
                yield row, stars


def _listed(names: Iterable[str], limit: int = 20) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check(kind: str, tensors: Mapping[str, np.ndarray], origins: Mapping[str, str], config: Mapping) -> None:
    """Raises WeightsError unless the tensors are exactly those of the network of `config`.

    Args:
        kind: of `KINDS`.
        tensors: by our names.
        origins: our names -> the authors', for messages.
        config: the contents of config.json.
    """
    could_be = lambda name: " or ".join(" and ".join(_fill(row[0], stars)) for row, stars in _matches(kind, name, 1))
    row = _network(kind)
    parsed = row.config(config, where="config.json")
    parsed = dataclasses.replace(parsed, **load.optional_parts(row, tensors))
    module = load.unfilled(row, parsed)
    shapes = {name: target.source_shape for target in convert.targets(module) for name in target.names}
    sources = {}
    for name, x in tensors.items():
        final = name
        for old, new in row.renames:
            final = re.sub(old, new, final)
        if name not in row.ties:
            sources[final] = name, x.shape
    problems = []
    if missing := [could_be(name) for name in shapes if name not in sources]:
        problems.append(f"missing: {_listed(missing)}")
    if unknown := [origins[sources[name][0]] for name in sources if name not in shapes]:
        problems.append(f"no part of the network: {_listed(unknown)}")
    wrong = [
        f"{origins[name]}, as {name} {shape} instead of {shapes[final]}"
        for final, (name, shape) in sources.items()
        if shape != shapes.get(final, shape)
    ]
    if wrong:
        problems.append(f"of another shape: {_listed(wrong)}")
    if problems:
        raise WeightsError(f"the tensors are not those of a {kind}: {'; '.join(problems)}")
    load.check_ties(row, tensors)


def _tokenizer(kind: str, path_or_id: str):
    """The tokenizer with the tokens that the authors add."""
    try:
        tokenizer = load.load_tokenizer(path_or_id)
    except WeightsError as error:
        raise WeightsError(
            f"the authors' files hold no tokenizer, and that of {path_or_id} cannot be had ({error}). Copy the files of "
            f"{KINDS[kind].tokenizer} (tokenizer.json, or vocab.txt; tokenizer_config.json) into a directory, and say "
            "--tokenizer=DIRECTORY"
        ) from error
    for tokens in KINDS[kind].special:
        tokenizer.add_special_tokens(dict(tokens))
    return tokenizer


def _preprocessing(kind: str, size: int) -> dict:
    """The contents of preprocessor_config.json."""
    square = {"height": size, "width": size}
    if KINDS[kind].crop:
        values = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}, "crop_size": square}
    else:
        values = {"image_processor_type": "BlipImageProcessor", "size": square}
    return values | {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3, "do_convert_rgb": True}


def main(files: list[str], out: str | Path, *, kind: str | None = None, tokenizer: str | None = None) -> str:
    """Writes the directory `out` from one or two files (see the module's docstring).

    Returns the kind. Raises WeightsError before anything is written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(f"{out} is there already")
    if Path(files[0]).is_dir():
        count = clip_flant5.convert(Path(files[0]), out, read, vision=(*files, None)[1], tokenizer=tokenizer)
        print(f"{out}: a clip_t5 of {count} tensors")
        return "clip_t5"
    tensors: dict[str, np.ndarray] = {}
    for file, prefix in zip(files, ("", "visual_encoder."), strict=False):
        new = {prefix + name: x for name, x in read(file).items()}
        if twice := sorted(new.keys() & tensors.keys()):
            raise WeightsError(
                f"{files[0]} holds its vision transformer already: {_listed(twice, 3)}; leave out {file}"
            )
        tensors |= new
    try:
        kind = kind or _kind(tensors)
        if kind == "blip2" and not any(name.startswith("visual_encoder.") for name in tensors):
            raise WeightsError(
                "its vision transformer is another file: eva_vit_g.pth, or clip_vit_L.pth of a ..._vitL.pth"
            )
        renamed, origins = rename(kind, tensors)
        values = KINDS[kind].config(ShapesByName({name: x.shape for name, x in renamed.items()}))
        check(kind, renamed, origins, values)
    except WeightsError as error:
        raise WeightsError(f"{' and '.join(files)}: {error}") from error
    weights = {name: x for name, x in renamed.items() if name not in _network(kind).ties}
    source = tokenizer or KINDS[kind].tokenizer
    words, vocabulary = _tokenizer(kind, source), values.get("text_config", values.get("qformer_config"))
    if len(words) != vocabulary["vocab_size"]:
        raise WeightsError(
            f"the tokenizer of {source} has {len(words)} words, the network {vocabulary['vocab_size']}: it is another one"
        )
    if kind.startswith("blip_") or kind == "image_reward":
        vocabulary["bos_token_id"] = words.bos_token_id
    # Not ascontiguousarray, which turns a scalar into a vector.
    load.save_directory(out, {name: np.asarray(x, order="C") for name, x in weights.items()}, values)
    preprocessing = json.dumps(_preprocessing(kind, values["vision_config"]["image_size"]), indent=2)
    (out / "preprocessor_config.json").write_text(preprocessing + "\n", encoding="utf-8")
    words.save_pretrained(out)
    print(f"{out}: a {kind} of {len(weights)} tensors")
    return kind


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m referee_jax.weights.lavis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="IN", help="the authors' file, or directory")
    parser.add_argument("vision", metavar="VISION", nargs="?", help="the file of BLIP-2's vision transformer")
    parser.add_argument("out", metavar="OUT_DIR", help="the directory to write; it must be new, or empty")
    parser.add_argument("--kind", choices=KINDS, help="what the file is; by default, what its names say")
    parser.add_argument(
        "--tokenizer", help=f"directory or hub id; by default {BERT}, that of a clip from {CLIP_H}, {OPENAI}"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse(sys.argv[1:])
    inputs = [file for file in (args.input, args.vision) if file]
    try:
        main(inputs, args.out, kind=args.kind, tokenizer=args.tokenizer)
    except WeightsError as problem:
        sys.exit(f"error: {problem}")
