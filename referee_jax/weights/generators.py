"""Loads generators in diffusers' layout: a directory, local or on the hub, with a folder for each network.

`FAMILIES` has the folders of each kind of generator, and which text encoders read a prompt.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from referee_jax.models.diffusion import text, vae
from referee_jax.weights import config_json, load, tensors, tokenizers
from referee_jax.weights.convert import WeightsError
from referee_jax.weights.tensors import Tensors

INDEX = "model_index.json"  # names the pipeline's class
SCHEDULER = Path("scheduler", "scheduler_config.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of generator.

    Attributes:
        pipelines: classes that model_index.json may name.
        folders: of its networks -> kind, of load.KINDS; `denoiser` is one of them.
        tokenizers: folder of each -> that of the text encoder that reads its tokens.
        text: `(text encoders by folder, index) -> module`, of models.diffusion.text; `index` is model_index.json.
        widths: of a config of the denoiser, what it takes: the text's states, and its pooled text or 0.
        text_widths: of the configs of the text encoders, by folder, what they give: the same two.
    """

    pipelines: Sequence[str]
    folders: Mapping[str, str]
    tokenizers: Mapping[str, str]
    text: Callable[[Mapping[str, nnx.Module], Mapping], nnx.Module]
    text_widths: Callable[[Mapping[str, Any]], tuple[int, int]]
    denoiser: str = "unet"


def _stable_diffusion_text(encoders: Mapping[str, nnx.Module], index: Mapping) -> nnx.Module:
    return text.StableDiffusionText(encoders["text_encoder"])


def _sdxl_text(encoders: Mapping[str, nnx.Module], index: Mapping) -> nnx.Module:
    return text.SDXLText(**encoders, zeros_for_empty=bool(index.get("force_zeros_for_empty_prompt", True)))


FAMILIES: dict[str, Family] = {
    "stable diffusion": Family(
        pipelines=("StableDiffusionPipeline",),
        folders={"text_encoder": "clip_text", "unet": "unet", "vae": "vae_decoder"},
        tokenizers={"tokenizer": "text_encoder"},
        text=_stable_diffusion_text,
        text_widths=lambda configs: (configs["text_encoder"].hidden_size, 0),
    ),
    "sdxl": Family(
        pipelines=("StableDiffusionXLPipeline",),
        folders={
            "text_encoder": "clip_text",
            "text_encoder_2": "clip_text_projected",
            "unet": "unet",
            "vae": "vae_decoder",
        },
        tokenizers={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
        text=_sdxl_text,
        text_widths=lambda configs: (
            configs["text_encoder"].hidden_size + configs["text_encoder_2"].hidden_size,
            configs["text_encoder_2"].projection_dim,
        ),
    ),
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
    vae: vae.AutoencoderKL
    schedule: config_json.Schedule
    tokenizers: tuple[Any, ...]


def load_generator(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    unet: str | Path = "",
    unet_revision: str | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Generator:
    """Returns the parts of a checkpoint in diffusers' layout, with weights cast to `dtype`.

    Raises WeightsError as `load.load` does, and if the parts do not fit together.

    Args:
        path_or_id: the directory or hub id.
        revision: for hub ids.
        unet: of another denoiser, which is a directory or repository by itself; empty: the checkpoint's own.
        unet_revision: for its hub id.
        dtype: of the weights.
    """
    directory = _fetch(path_or_id, revision, has_denoiser=not unet)
    check_layout(directory)
    family = family_of(directory)
    schedule, tokenizer = read_schedule(directory), load_tokenizers(directory)
    networks = {
        folder: load.load(kind, directory, subfolder=folder, dtype=dtype)
        for folder, kind in family.folders.items()
        if not (unet and folder == family.denoiser)
    }
    if unet:
        kind = family.folders[family.denoiser]
        networks[family.denoiser] = load.load(kind, unet, revision=unet_revision, dtype=dtype)
    configs = {folder: _config(networks[folder]) for folder in family.folders}
    check_widths(family, configs, where=directory, unet=unet)
    return assemble(family, networks, schedule, tokenizer, read_index(directory))


def assemble(
    family: Family,
    networks: Mapping[str, nnx.Module],
    schedule: config_json.Schedule,
    tokenizers: Sequence[Any],
    index: Mapping,
) -> Generator:
    """The generator of a family's networks, by folder; `index` is its model_index.json."""
    encoders = {folder: networks[folder] for folder in family.tokenizers.values()}
    return Generator(
        text_encoder=family.text(encoders, index),
        denoiser=networks[family.denoiser],
        vae=networks["vae"],
        schedule=schedule,
        tokenizers=tuple(tokenizers),
    )


def check_widths(family: Family, configs: Mapping[str, Any], *, where: str | Path, unet: str | Path = "") -> None:
    """Raises WeightsError, naming the config's key, if networks of these configs, by folder, do not fit together."""
    config, (states, pooled) = configs[family.denoiser], family.text_widths(configs)
    for name, width, expected in (
        ("in_channels", config.in_channels, configs["vae"].latent_channels),
        ("cross_attention_dim", config.cross_attention_dim, states),
        ("the pooled text's width", config.pooled_width, pooled),
    ):
        if width != expected:
            raise WeightsError(
                f"{unet or where}: {family.denoiser}: {name}={width} does not fit the other parts, which have {expected}"
            )


def _config(network: nnx.Module) -> Any:
    return network.text_model.config if hasattr(network, "text_model") else network.config


def family_of(directory: Path) -> Family:
    """The family of a local directory, by its model_index.json or, where there is none, by its folders.

    Raises WeightsError for a pipeline that is none of FAMILIES.
    """
    name = read_index(directory).get("_class_name")
    for family in FAMILIES.values():
        if name in family.pipelines:
            return family
    if name is not None:
        known = ", ".join(name for family in FAMILIES.values() for name in family.pipelines)
        raise WeightsError(f"{directory / INDEX}: _class_name={name!r} is not implemented; supported: {known}")
    is_there = lambda family: sum((directory / folder).is_dir() for folder in family.folders)
    return max(FAMILIES.values(), key=is_there)


def read_index(directory: Path) -> dict:
    """The values of model_index.json; none where it is missing."""
    file = directory / INDEX
    return config_json.read_json(file) if file.exists() else {}


def read_configs(directory: Path) -> dict[str, Any]:
    """The configs of a local directory's networks, by folder."""
    return {folder: load.read_config(kind, directory / folder) for folder, kind in family_of(directory).folders.items()}


def read_schedule(directory: Path) -> config_json.Schedule:
    """Returns the noise schedule of a local directory."""
    return config_json.schedule(config_json.read_json(directory / SCHEDULER), where=str(directory / SCHEDULER))


def load_tokenizers(directory: Path) -> list[Any]:
    """Returns the tokenizers of a local directory, each compared with the text encoder that reads its tokens."""
    family = family_of(directory)
    config = lambda folder: load.read_config(family.folders[folder], directory / folder)
    return [tokenizers.read(directory / name, config(folder)) for name, folder in family.tokenizers.items()]


def check(directory: Path) -> None:
    """Raises WeightsError for a part of a local directory that is missing or damaged; reads no weights."""
    check_layout(directory)
    for folder, kind in family_of(directory).folders.items():
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


def _fetch(path_or_id: str | Path, revision: str | None, *, has_denoiser: bool) -> Path:
    """The directory of a checkpoint with the files of its family, which its model_index.json tells."""
    all_folders = {folder: kind for family in FAMILIES.values() for folder, kind in family.folders.items()}
    left_out = () if has_denoiser else {family.denoiser for family in FAMILIES.values()}
    parts = {folder: load.KINDS[kind].stem for folder, kind in all_folders.items() if folder not in left_out}
    names = sorted({name for family in FAMILIES.values() for name in family.tokenizers})
    others = [INDEX, str(SCHEDULER), *(f"{name}/*" for name in names)]
    needed = lambda directory: [folder for folder in family_of(directory).folders if folder in parts]
    return load.fetch(path_or_id, revision, parts, others, needed)
