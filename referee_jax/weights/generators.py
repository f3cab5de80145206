"""Loads generators: of a directory in diffusers' layout, local or on the hub, or of one file; with LoRAs merged.

families.py has the folders of each kind of generator.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from referee_jax.models.diffusion import text, tiny_vae, vae
from referee_jax.models.flan_t5 import t5
from referee_jax.weights import config_json, hub, load, tensors, tokenizers
from referee_jax.weights.convert import WeightsError
from referee_jax.weights.families import FAMILIES, Family, check_widths, without
from referee_jax.weights.formats import lora, original_layout
from referee_jax.weights.schedules import FlowSchedule, Schedule
from referee_jax.weights.tensors import Tensors

INDEX = "model_index.json"  # names the pipeline's class
DECODERS = ("vae_decoder", "tiny_vae")
SCHEDULER = Path("scheduler", "scheduler_config.json")
# Of original_layout.LAYOUTS -> a repository with its tokenizers.
TOKENIZERS = {
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "stabilityai/sd-turbo",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """The parts of a generator.

    Attributes:
        text_encoder: token ids, one array for each of `tokenizers`, to `text.Text`.
        denoiser: the network that predicts noise, or v.
        vae: the decoder of its latents.
        schedule: of noise in training, and of its published sampler.
        tokenizers: transformers'; pad to their `model_max_length`.
    """

    text_encoder: nnx.Module
    denoiser: nnx.Module
    vae: vae.AutoencoderKL | tiny_vae.AutoencoderTiny
    schedule: Schedule | FlowSchedule
    tokenizers: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """What is read of a generator before its weights.

    Attributes:
        family: its kind.
        where: the checkpoint, for messages.
        kinds: of its networks, of load.KINDS, by folder, as are `configs` and `weights`.
        schedule, tokenizers: as of `Generator`.
        index: model_index.json.
    """

    family: Family
    where: str
    kinds: dict[str, str]
    configs: dict[str, Any]
    weights: dict[str, Mapping[str, np.ndarray]]
    schedule: Schedule | FlowSchedule
    tokenizers: Sequence[Any]
    index: Mapping


def load_generator(
    path_or_id: str | Path,
    *,
    family: str = "",
    revision: str | None = None,
    unet: str | Path = "",
    unet_revision: str | None = None,
    vae: str | Path = "",
    vae_revision: str | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    prediction: str = "",
    dtype: jax.typing.DTypeLike = jnp.float32,
    put: Callable[[np.ndarray], Any] = jax.device_put,
    put_t5: Callable[[np.ndarray], Any] | None = None,
) -> Generator:
    """Returns the parts of a checkpoint, with weights cast to `dtype`.

    Raises WeightsError as `load.load` does, and if the parts do not fit together.

    Args:
        path_or_id: the directory or hub id of diffusers' layout; or a file, see `read_file`.
        family: of FAMILIES, which it must be; empty: any.
        revision: for hub ids.
        unet: of another denoiser, which is a directory or repository by itself; empty: the checkpoint's own.
        unet_revision: for its hub id.
        vae: the same of a decoder, such as a tiny one.
        vae_revision: for its hub id.
        loras: file of each LoRA, and the weight with which it is merged.
        prediction: what the U-Net of a file predicts, where the file does not say it.
        dtype: of the weights.
        put: where each weight goes as soon as it is read; by default to JAX's default device.
        put_t5: the same for a T5's; None: as `put`.
    """
    has = {"denoiser": not unet, "vae": not vae}
    if file := _whole_file(path_or_id):
        files = read_file(file, has, prediction=prediction)
    elif prediction:
        raise WeightsError(
            f"{path_or_id}: generator.prediction is of a file; a directory's scheduler_config.json says it"
        )
    else:
        files = read_directory(_fetch(path_or_id, revision, has), has)
    if family and files.family.name != family:
        raise WeightsError(f"{files.where} is of another kind of generator: {files.family.name}, not {family}")
    files = _replaced(files, {files.family.denoiser: (unet, unet_revision), "vae": (vae, vae_revision)})
    files = _with_loras(files, loras)
    networks = {
        folder: load.build(
            kind,
            files.configs[folder],
            files.weights[folder],
            dtype=dtype,
            put=put_t5 if put_t5 and folder == files.family.t5 else put,
        )
        for folder, kind in files.kinds.items()
    }
    return assemble(files.family, networks, files.schedule, files.tokenizers, files.index)


def _needed(family: Family, kinds: Mapping[str, str], has: Mapping[str, bool]) -> dict[str, str]:
    """Without the kinds of the denoiser, or the decoder, where another is in its place."""
    replaced = {family.denoiser: not has["denoiser"], "vae": not has["vae"]}
    return {folder: kind for folder, kind in kinds.items() if not replaced.get(folder)}


def _whole_file(path_or_id: str | Path) -> Path | None:
    """The file, if a checkpoint is one with all networks in the authors' layout."""
    file = hub.file_of(path_or_id)
    return file if file and original_layout.is_original(Tensors(file.parent, file.stem)) else None


def read_directory(directory: Path, has: Mapping[str, bool]) -> Files:
    """What a local directory of diffusers' layout says; `has`: of "denoiser" and "vae", whether its own is read."""
    check_layout(directory)
    family = family_of(directory)
    kinds = _needed(family, kinds_of(directory), has)
    schedule, tokenizers = read_schedule(directory), load_tokenizers(directory)
    return Files(
        family=family,
        where=str(directory),
        kinds=kinds,
        configs={folder: load.read_config(kind, directory / folder) for folder, kind in kinds.items()},
        weights={folder: Tensors(directory / folder, load.KINDS[kind].stem) for folder, kind in kinds.items()},
        schedule=schedule,
        tokenizers=tokenizers,
        index=read_index(directory),
    )


def read_file(file: Path, has: Mapping[str, bool], *, prediction: str = "", reads_words: bool = True) -> Files:
    """What a file of Stable Diffusion 1, 2 or XL in the authors' layout says, with all networks in one.

    Its tokenizers are those of the directories `tokenizer` and `tokenizer_2` beside it, or the published ones; none
    unless `reads_words`. `has` is as of `read_directory`. Raises WeightsError where parts are missing, or the file does not
    say what its U-Net predicts and `prediction` neither.
    """
    tensors = Tensors(file.parent, file.stem)
    with safetensors.safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata() or {}
    try:
        name = original_layout.family(tensors)
        prediction = prediction or original_layout.prediction_type(tensors, metadata)
        if not prediction:
            raise WeightsError(
                "it does not say what its U-Net predicts: say generator.prediction, epsilon (base, turbo) or v_prediction "
                "(768 px)"
            )
        values = original_layout.configs(tensors, prediction=prediction, metadata=metadata)
        parts = original_layout.split(tensors)
        family = FAMILIES["sdxl" if name == "sdxl" else "stable diffusion"]
        kinds = _needed(family, family.folders, has)
        if missing := [folder for folder in kinds if folder not in parts]:
            raise WeightsError(f"it has no {' and no '.join(missing)}")
    except WeightsError as error:
        raise WeightsError(f"{file}: {error}") from error
    configs = {folder: load.KINDS[kind].config(values[folder], where=str(file)) for folder, kind in kinds.items()}
    schedule = config_json.schedule(values["scheduler"], where=str(file))
    directory, words = file.parent, []
    if reads_words:
        if not all((directory / folder).is_dir() for folder in family.tokenizers):
            directory = hub.resolve(TOKENIZERS[name], None, [f"{folder}/*" for folder in family.tokenizers])
        words = [tokenizers.read(directory / name, configs[folder]) for name, folder in family.tokenizers.items()]
    return Files(
        family=family,
        where=str(file),
        kinds=kinds,
        configs=configs,
        weights={folder: parts[folder] for folder in kinds},
        schedule=schedule,
        tokenizers=words,
        index={},
    )


def _replaced(files: Files, others: Mapping[str, tuple[str | Path, str | None]]) -> Files:
    """With other networks, paths or ids and revisions by folder, in the place of some. Checks that all fit together."""
    kinds, configs, weights = dict(files.kinds), dict(files.configs), dict(files.weights)
    for folder, (other, revision) in others.items():
        if other:
            where = load.fetch(other, revision, {"": load.DIFFUSERS})
            kind, allowed = load.kind_of(where), DECODERS if folder == "vae" else (files.family.folders[folder],)
            if kind not in allowed:
                raise WeightsError(f"{where} is of another kind of network: {kind}, not {' or '.join(allowed)}")
            kinds[folder] = kind
            configs[folder] = load.read_config(kind, where)
            weights[folder] = Tensors(where, load.DIFFUSERS)
    denoiser, _ = others[files.family.denoiser]
    check_widths(files.family, configs, where=denoiser or files.where)
    return dataclasses.replace(files, kinds=kinds, configs=configs, weights=weights)


def _with_loras(files: Files, loras: Sequence[tuple[str | Path, float]]) -> Files:
    """With LoRAs merged into the weights as they are read."""
    if not loras:
        return files
    read = [(lora.File(hub.local_path(str(file))), weight) for file, weight in loras]
    parts = {}
    for folder in set(files.kinds) & set(lora.PARTS.values()):
        weights = files.weights[folder]
        is_named = not isinstance(weights, Tensors)  # those of one file have the network's names already
        parts[folder] = weights if is_named else load.Renamed(files.kinds[folder], files.configs[folder], weights)
    lora.check([tensors for tensors, _ in read], parts)
    merged = {folder: lora.merged(weights, read, folder) for folder, weights in parts.items()}
    return dataclasses.replace(files, weights=files.weights | merged)


def assemble(
    family: Family,
    networks: Mapping[str, nnx.Module],
    schedule: Schedule | FlowSchedule,
    tokenizers: Sequence[Any],
    index: Mapping,
) -> Generator:
    """The generator of a family's networks, by folder; `index` is its model_index.json."""
    encoders = {folder: networks[folder] for folder in family.tokenizers.values() if folder in networks}
    return Generator(
        text_encoder=family.text(encoders, networks[family.denoiser].config, index),
        denoiser=networks[family.denoiser],
        vae=networks["vae"],
        schedule=schedule,
        tokenizers=tuple(tokenizers),
    )


def family_of(directory: Path) -> Family:
    """The family of a local directory, by its model_index.json or, where there is none, by its folders.

    Raises WeightsError for a pipeline that is none of FAMILIES.
    """
    index = read_index(directory)
    name = index.get("_class_name")
    is_there = lambda folder: (directory / folder).is_dir()
    for family in FAMILIES.values():
        if name in family.pipelines:
            left_out = [folder for folder in family.optional if not any(index.get(folder) or ())]
            return without(family, left_out) if left_out else family
    if name is not None:
        known = ", ".join(name for family in FAMILIES.values() for name in family.pipelines)
        raise WeightsError(f"{directory / INDEX}: _class_name={name!r} is not implemented; supported: {known}")
    return max(FAMILIES.values(), key=lambda family: sum(map(is_there, family.folders)))


def read_index(directory: Path) -> dict:
    """The values of model_index.json; none where it is missing."""
    file = directory / INDEX
    return config_json.read_json(file) if file.exists() else {}


def read_configs(directory: Path, has: Mapping[str, bool]) -> dict[str, Any]:
    """The configs of a local directory's networks, by folder, replaced ones where they are there, too; see `read_directory`."""
    kinds = kinds_of(directory)
    needed = _needed(family_of(directory), kinds, has)
    there = [folder for folder in kinds if folder in needed or (directory / folder / "config.json").exists()]
    return {folder: load.read_config(kinds[folder], directory / folder) for folder in there}


def kinds_of(directory: Path) -> dict[str, str]:
    """The kinds of a local directory's networks, by folder; its decoder may be a tiny one."""
    file, kinds = directory / "vae" / "config.json", dict(family_of(directory).folders)
    is_tiny = file.exists() and config_json.read_json(file).get("_class_name") == "AutoencoderTiny"
    return kinds | ({"vae": "tiny_vae"} if is_tiny else {})


def read_schedule(directory: Path) -> Schedule | FlowSchedule:
    """Returns the noise schedule of a local directory. Raises WeightsError for one that its family does not have."""
    file = directory / SCHEDULER
    schedule, family = config_json.schedule(config_json.read_json(file), where=str(file)), family_of(directory)
    if (schedule.prediction_type == "flow") != family.is_flow:
        what = "of diffusion" if family.is_flow else "of a rectified flow"
        raise WeightsError(
            f"{file}: a schedule {what} is not implemented for {family.name}, which is of the other kind"
        )
    return dataclasses.replace(schedule, last_is_step=family.last_is_step) if family.is_flow else schedule


def load_tokenizers(directory: Path) -> list[Any]:
    """Returns the tokenizers of a local directory, each compared with the text encoder that reads its tokens."""
    family = family_of(directory)
    config = lambda folder: load.read_config(family.folders[folder], directory / folder)
    read = {name: tokenizers.read(directory / name, config(folder)) for name, folder in family.tokenizers.items()}
    for name, folder in family.tokenizers.items():
        if folder == family.t5:
            read[name].model_max_length = text.T5_TOKENS
    return list(read.values())


def check(directory: Path, prediction: str = "", has: Mapping[str, bool] | None = None) -> None:
    """Raises WeightsError for a part of a local directory, or file, that is missing or damaged; reads no weights.

    `prediction` is as of `load_generator`, `has` as of `read_directory`. Of a file, tokenizers are not looked for.
    """
    has = has or {"denoiser": True, "vae": True}
    if file := _whole_file(directory):
        read_file(file, has, prediction=prediction, reads_words=False)
        return
    check_layout(directory)
    for folder, kind in _needed(family_of(directory), kinds_of(directory), has).items():
        load.read_config(kind, directory / folder)
        Tensors(directory / folder, load.KINDS[kind].stem)
    read_schedule(directory)
    load_tokenizers(directory)


def check_layout(directory: Path) -> None:
    """Raises WeightsError for a directory without any part of a generator."""
    if not any((directory / folder).is_dir() for family in FAMILIES.values() for folder in family.folders):
        names = [file.name for file in directory.glob("*")]
        parts = ", ".join(FAMILIES["stable diffusion"].folders)
        raise WeightsError(f"{directory} has none of the directories {parts}{tensors.instead(directory, names)}")


def on_host(text_encoder: nnx.Module) -> nnx.Module:
    """The text encoders with the weights of a T5 in the host's memory."""
    to_host = lambda x: jax.tree.map(np.asarray, x) if _is_t5(x) else x
    return jax.tree.map(to_host, text_encoder, is_leaf=_is_t5)


def resident(text_encoder: nnx.Module) -> list[Any]:
    """The weights of a generator's text encoders that stay in a device's memory: all but those of a T5."""
    return [x for x in jax.tree.leaves(text_encoder, is_leaf=_is_t5) if not _is_t5(x)]


def _is_t5(x: Any) -> bool:
    return isinstance(x, t5.T5Encoder)


def _fetch(path_or_id: str | Path, revision: str | None, has: Mapping[str, bool]) -> Path:
    """The directory of a checkpoint with the files of its family.

    Configs come first, so that what is not implemented is refused before gigabytes of weights are downloaded.
    """
    parts = lambda kinds: {folder: load.KINDS[kind].stem for folder, kind in kinds.items()}
    words = lambda family: [f"{name}/*" for name in family.tokenizers]
    configs = [INDEX, str(SCHEDULER), *sorted({f"{x}/config.json" for row in FAMILIES.values() for x in row.folders})]
    if hub.is_local(str(path_or_id)):
        return hub.resolve(path_or_id, revision, configs)
    possible = [load.patterns(parts(row.folders)) + words(row) for row in FAMILIES.values()]
    directory = hub.resolve(path_or_id, revision, configs, sorted({name for row in possible for name in row}))
    family, kinds = family_of(directory), kinds_of(directory)
    if (directory / SCHEDULER).exists():
        read_schedule(directory)
    needed = _needed(family, kinds, has)
    for folder in needed:
        if (directory / folder).is_dir():
            load.read_config(kinds[folder], directory / folder)
    return load.fetch(path_or_id, revision, parts(needed), [*configs, *words(family)])
