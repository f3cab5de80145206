"""Merges LoRAs (Hu et al. 2021, arXiv 2106.09685) into the weights of a generator while they are read.

    W + weight * alpha / rank * B A                                                              (1)

with A `[rank, in]` ("down") and B `[out, rank]` ("up"); of a convolution, A is a convolution, too,
and B one of one pixel (LoCon). Without an alpha it is the rank. Names are those of kohya's scripts
(`lora_unet_…_to_q.lora_down.weight`), by diffusers' blocks or by the original ones; of older
diffusers (`unet.….attn1.processor.to_q_lora.down.weight`, `….to_q.lora.down.weight`,
`….q_proj.lora_linear_layer.down.weight`); and of PEFT (`unet.….to_q.lora_A.weight`). Names without
a part are of the U-Net. They are compared with dots as underscores, as kohya's leave no other way.
"""

import dataclasses
import fnmatch
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors

from referee_jax.weights import config_json, tensors
from referee_jax.weights.convert import WeightsError
from referee_jax.weights.formats import original_names

PARTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "diffusion_model.": "unet",
    "transformer.": "transformer",
}
# The ends of names -> which of a pair they are; the first that fits.
ENDS = {
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    **{f".{x}.down.weight": "down" for x in ("lora", "lora_linear_layer")},
    **{f".{x}.up.weight": "up" for x in ("lora", "lora_linear_layer")},
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".alpha": "alpha",
}
# Names of other ways to change weights -> what they are.
REFUSED = {
    "*.dora_scale": "DoRA, which also scales the weights",
    "*.lora_magnitude_vector*": "DoRA, which also scales the weights",
    "*.hada_*": "LoHa, a product of two low-rank matrices",
    "*.lokr_*": "LoKr, a Kronecker product",
    "*.lora_mid.*": "a LoRA with a Tucker decomposition",
    "*.oft_*": "OFT, which turns the weights",
    "*.lora_B*.bias": "a LoRA with biases",
    "*.diff": "a difference of whole weights",
    "*.diff_b": "a difference of whole biases",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """The tensors of a LoRA for one weight, by their names; `alpha` may be ""."""

    down: str
    up: str
    alpha: str = ""


Change = tuple[Mapping[str, np.ndarray], float, Pair, str]


class File(Mapping[str, np.ndarray]):
    """The tensors of a file with a LoRA, read on access, and alphas of its metadata as tensors `….alpha`.

    Raises WeightsError for a file that is missing, damaged or pickled, and for settings that are
    not implemented.
    """

    def __init__(self, file: str | Path):
        file = Path(file)
        if file.suffix == ".safetensors" and not file.is_file():
            raise WeightsError(f"the LoRA {file} is not here; it is the path of a file, from the working directory")
        if file.suffix != ".safetensors":
            raise WeightsError(f"{file}: {tensors.rewritten(file)}")
        self.source = file
        self._tensors = tensors.Tensors(file.parent, file.stem)
        try:
            self._alphas = _alphas(self._tensors, _settings(file))
        except WeightsError as error:
            raise WeightsError(f"{file}: {error}") from error

    def __getitem__(self, name: str) -> np.ndarray:
        return np.float32(self._alphas[name]) if name in self._alphas else self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._tensors
        yield from self._alphas

    def __len__(self) -> int:
        return len(self._tensors) + len(self._alphas)


def _settings(file: Path) -> Mapping:
    """PEFT's settings: diffusers keeps them in the header, PEFT itself in a file beside."""
    beside = file.parent / "adapter_config.json"
    if file.name == "adapter_model.safetensors" and beside.exists():
        return config_json.read_json(beside)
    with safetensors.safe_open(file, framework="numpy") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata")
    try:
        values = json.loads(text or "{}")
    except ValueError as error:
        raise WeightsError(f"lora_adapter_metadata in its header is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise WeightsError("lora_adapter_metadata in its header does not hold a JSON object")
    return values


def _alphas(names: Iterable[str], settings: Mapping) -> dict[str, float]:
    """The alphas of PEFT's settings, by the names that they would have as tensors."""
    alphas, names = {}, dict.fromkeys(names)
    for name in names:
        module, end, _ = name.partition(".lora_A.")
        prefixes = (x for x in PARTS if x.endswith(".") and name.startswith(x) and f"{x}lora_alpha" in settings)
        part = next(prefixes, "")
        if not end or f"{part}lora_alpha" not in settings or f"{module}.alpha" in names:
            continue
        if settings.get(f"{part}use_dora"):
            raise WeightsError(f"{name} is of {REFUSED['*.dora_scale']}: it is not read")
        alpha = _setting(settings, part, module, "lora_alpha", "alpha_pattern")
        if settings.get(f"{part}use_rslora"):  # alpha / sqrt(rank) in (1): Kalajdzievski 2023, arXiv 2312.03732
            alpha *= math.sqrt(_setting(settings, part, module, "r", "rank_pattern"))
        alphas[f"{module}.alpha"] = alpha
    return alphas


def _setting(settings: Mapping, part: str, module: str, key: str, pattern: str) -> float:
    """A number for one layer: of the first pattern that its name ends with, or that for all layers."""
    value, several = settings.get(part + key), settings.get(part + pattern) or {}
    try:
        fitting = (x for k, x in several.items() if re.match(rf"(.*\.)?({k})$", module.removeprefix(part)))
        return float(next(fitting, value))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise WeightsError(f"{part}{key}={value!r} and {part}{pattern}={several!r} give {module} no number") from error


# --- names ---


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _module(part: str, name: str) -> str:
    """The name of a module, however it is written: underscores for dots, diffusers' older names as the newer."""
    name = re.sub("_processor(?=_)", "", _flat(name))
    if part == "unet":
        return re.sub("(attn[12]_to_out)$", r"\1_0", name)
    return re.sub("self_attn_to_(q|k|v|out)$", r"self_attn_\1_proj", name.removeprefix("text_model_"))


def _parse(name: str) -> tuple[str, str, str] | None:
    """Part, module and role of a tensor of a LoRA; None for another."""
    rest = name.removeprefix("base_model.model.")
    prefix = next((x for x in PARTS if rest.startswith(x)), "")
    end = next((x for x in ENDS if rest.endswith(x)), None)
    if end is None:
        return None
    part = PARTS.get(prefix, "unet")
    return part, _module(part, rest[len(prefix) : -len(end)]), ENDS[end]


def _weights(part: str, names: Iterable[str]) -> dict[str, str]:
    """Modules of a network, as `_module` writes them -> the names of their weights."""
    weights = {name.removesuffix(".weight"): name for name in names if name.endswith(".weight")}
    found = {_module(part, module): name for module, name in weights.items()}
    if part == "unet":
        levels = original_names.count(weights, "down_blocks.")
        layers = original_names.count(weights, "down_blocks.0.resnets.")
        modules = original_names.unet_modules(levels, layers, original_names.unet_depth(weights))
        found |= {_flat(old): weights[new] for old, new in modules.items() if new in weights}
    return found


def _called(lora: Mapping, number: int) -> str:
    return str(getattr(lora, "source", f"LoRA {number}"))


def _pairs(lora: Mapping, where: str) -> dict[tuple[str, str], Pair]:
    """Part and module -> tensors. Raises WeightsError for a tensor that is of no pair, or not of a LoRA."""
    roles: dict[tuple[str, str], dict[str, str]] = {}
    for name in lora:
        if what := next((what for pattern, what in REFUSED.items() if fnmatch.fnmatchcase(name, pattern)), None):
            raise WeightsError(f"{where}: {name} is of {what}: it is not read")
        parsed = _parse(name)
        if parsed is None:
            raise WeightsError(f"{where}: {name} is not known to be of a LoRA")
        *module, role = parsed
        others = roles.setdefault(tuple(module), {})
        if role in others:
            raise WeightsError(f"{where}: {others[role]} and {name} are the same part of the LoRA")
        others[role] = name
    for found in roles.values():
        if lacking := [role for role in ("down", "up") if role not in found]:
            raise WeightsError(f"{where}: {next(iter(found.values()))} is there, but not what goes {lacking[0]}")
    return {module: Pair(**found) for module, found in roles.items()}


def _targets(
    pairs: Mapping[tuple[str, str], Pair], where: str, parts: Mapping[str, Iterable[str]]
) -> dict[tuple[str, str], Pair]:
    """Part and name of each weight -> the tensors for it, of those parts that are given."""
    weights = {part: _weights(part, names) for part, names in parts.items()}
    targets: dict[tuple[str, str], Pair] = {}
    for (part, module), pair in pairs.items():
        if part not in weights:
            continue
        if module not in weights[part]:
            raise WeightsError(f"{where}: {pair.down} is for no weight of the {part}")
        target = part, weights[part][module]
        if target in targets:
            raise WeightsError(f"{where}: {targets[target].down} and {pair.down} are for the same weight of the {part}")
        targets[target] = pair
    return targets


def check(loras: Sequence[Mapping[str, np.ndarray]], parts: Mapping[str, Iterable[str]]) -> None:
    """Raises WeightsError, with file and tensor, unless every tensor of every LoRA is for a weight of `parts`.

    Reads no tensors; `merged` compares the shapes.

    Args:
        loras: by their own names, as `File` has them.
        parts: "unet", "text_encoder", "text_encoder_2" -> names of the network's tensors.
    """
    for number, lora in enumerate(loras):
        where = _called(lora, number)
        pairs = _pairs(lora, where)
        for (part, _), pair in pairs.items():
            if part not in parts:
                raise WeightsError(f"{where}: {pair.down} is for a {part}, which this checkpoint does not have")
        _targets(pairs, where, parts)


# --- weights ---


class Merged(Mapping[str, np.ndarray]):
    """The tensors of a network, those that LoRAs change by equation (1), in float32.

    `changes` has, for each of these, the LoRAs with their weights, tensors and files.
    """

    def __init__(self, network: Mapping[str, np.ndarray], changes: Mapping[str, Sequence[Change]]):
        self._network, self.changes, self.source = network, changes, getattr(network, "source", "")

    def __getitem__(self, name: str) -> np.ndarray:
        x = self._network[name]
        for lora, weight, pair, where in self.changes.get(name, ()):
            x = x.astype(np.float32) + np.float32(weight) * _change(lora, pair, x.shape, f"{where}: {pair.down}")
        return x

    def __iter__(self) -> Iterator[str]:
        return iter(self._network)

    def __len__(self) -> int:
        return len(self._network)


def _change(lora: Mapping, pair: Pair, shape: tuple[int, ...], where: str) -> np.ndarray:
    """alpha / rank * B A of (1), float32 of the weight's shape `[out, in, ...]`."""
    down, up = (np.asarray(lora[name]) for name in (pair.down, pair.up))
    outputs, rank = up.shape[:2] if up.ndim > 1 else (0, 0)
    fits = rank > 0 and len(shape) > 1 and down.shape[:2] == (rank, shape[1]) and outputs == shape[0]
    if not fits or up.size != outputs * rank or down.size != rank * math.prod(shape[1:]):
        raise WeightsError(f"{where} {down.shape} and the other of its pair {up.shape} do not fit the weight {shape}")
    alpha = np.asarray(lora[pair.alpha]).astype(np.float32) if pair.alpha else np.float32(rank)
    if alpha.size != 1:
        raise WeightsError(f"{where}: its alpha has shape {alpha.shape} instead of a number")
    up, down = up.astype(np.float32).reshape(outputs, rank), down.astype(np.float32).reshape(rank, -1)
    return (alpha.reshape(()) / rank * (up @ down)).reshape(shape)


def merged(
    network: Mapping[str, np.ndarray], loras: Sequence[tuple[Mapping[str, np.ndarray], float]], part: str
) -> Merged:
    """A network's tensors with LoRAs merged into them, by equation (1), each when it is read.

    Tensors that no LoRA changes are as they were; `convert.fill` casts them all. Raises
    WeightsError, with file and tensor, for what is not a LoRA, or not of this network; tensors of
    other parts are left to those, or to `check`.

    Args:
        network: by the names of diffusers or transformers.
        loras: of a file, as `File` has them, and with which weight.
        part: "unet", "text_encoder" or "text_encoder_2".
    """
    changes: dict[str, list[Change]] = {}
    for number, (lora, weight) in enumerate(loras):
        where = _called(lora, number)
        for (_, name), pair in _targets(_pairs(lora, where), where, {part: network}).items():
            changes.setdefault(name, []).append((lora, weight, pair, where))
    return Merged(network, changes)
