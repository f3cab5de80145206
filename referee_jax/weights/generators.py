"""Loads generators in diffusers' layout: a directory, local or on the hub, with a folder for each network.

`FAMILIES` has the folders of each kind of generator, and which text encoders read a prompt.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from referee_jax.models.diffusion import text, vae
from referee_jax.models.flan_t5 import t5
from referee_jax.weights import config_json, load, tensors, tokenizers
from referee_jax.weights.convert import WeightsError
from referee_jax.weights.schedules import FlowSchedule, Schedule
from referee_jax.weights.tensors import Tensors

INDEX = "model_index.json"  # names the pipeline's class
SCHEDULER = Path("scheduler", "scheduler_config.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of generator.

    Attributes:
        name: of the kind.
        pipelines: classes that model_index.json may name.
        folders: of its networks -> kind, of load.KINDS; `denoiser` is one of them.
        tokenizers: folder of each -> that of the text encoder that reads its tokens.
        text: `(text encoders by folder, config of the denoiser, index) -> module`, of models.diffusion.text; `index` is
            model_index.json.
        widths: of a config of the denoiser, its keys and values of what must fit the other parts: channels of latents,
            width of the text's states, and of its pooled text or 0.
        given: of the configs by folder, what the other parts give: the same three.
        optional: folders that may be missing.
        t5: folder of a T5, and its tokens.
        is_flow: whether it is a rectified flow.
        last_is_step: of schedules.FlowSchedule.
    """

    name: str
    pipelines: Sequence[str]
    folders: Mapping[str, str]
    tokenizers: Mapping[str, str]
    text: Callable[[Mapping[str, nnx.Module], Any, Mapping], nnx.Module]
    widths: Callable[[Any], dict[str, int]]
    given: Callable[[Mapping[str, Any]], tuple[int, int, int]]
    denoiser: str = "unet"
    optional: Sequence[str] = ()
    t5: str = ""
    is_flow: bool = False
    last_is_step: bool = False


def _unet_widths(config: Any) -> dict[str, int]:
    return {
        "in_channels": config.in_channels,
        "cross_attention_dim": config.cross_attention_dim,
        "the pooled text's width": config.pooled_width,
    }


def _transformer_widths(config: Any) -> dict[str, int]:
    names = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    return {name: getattr(config, name) for name in names}


def _sdxl_given(configs: Mapping[str, Any]) -> tuple[int, int, int]:
    first, second = configs["text_encoder"], configs["text_encoder_2"]
    return configs["vae"].latent_channels, first.hidden_size + second.hidden_size, second.projection_dim


def _sd3_given(configs: Mapping[str, Any]) -> tuple[int, int, int]:
    clips, width = [configs["text_encoder"], configs["text_encoder_2"]], configs["transformer"].joint_attention_dim
    width = configs["text_encoder_3"].d_model if "text_encoder_3" in configs else width
    return configs["vae"].latent_channels, width, sum(config.projection_dim for config in clips)


_FAMILIES = (
    Family(
        name="stable diffusion",
        pipelines=("StableDiffusionPipeline",),
        folders={"text_encoder": "clip_text", "unet": "unet", "vae": "vae_decoder"},
        tokenizers={"tokenizer": "text_encoder"},
        text=lambda encoders, config, index: text.StableDiffusionText(**encoders),
        widths=_unet_widths,
        given=lambda configs: (configs["vae"].latent_channels, configs["text_encoder"].hidden_size, 0),
    ),
    Family(
        name="sdxl",
        pipelines=("StableDiffusionXLPipeline",),
        folders={
            "text_encoder": "clip_text",
            "text_encoder_2": "clip_text_projected",
            "unet": "unet",
            "vae": "vae_decoder",
        },
        tokenizers={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
        text=lambda encoders, config, index: text.SDXLText(
            **encoders, zeros_for_empty=bool(index.get("force_zeros_for_empty_prompt", True))
        ),
        widths=_unet_widths,
        given=_sdxl_given,
    ),
    Family(
        name="sd3",
        pipelines=("StableDiffusion3Pipeline",),
        folders={
            "text_encoder": "clip_text_projected",
            "text_encoder_2": "clip_text_projected",
            "text_encoder_3": "t5_encoder",
            "transformer": "sd3",
            "vae": "vae_decoder",
        },
        tokenizers={f"tokenizer{end}": f"text_encoder{end}" for end in ("", "_2", "_3")},
        text=lambda encoders, config, index: text.SD3Text(**encoders, width=config.joint_attention_dim),
        widths=_transformer_widths,
        given=_sd3_given,
        denoiser="transformer",
        optional=("text_encoder_3",),
        t5="text_encoder_3",
        is_flow=True,
    ),
    Family(
        name="flux",
        pipelines=("FluxPipeline",),
        folders={
            "text_encoder": "clip_text",
            "text_encoder_2": "t5_encoder",
            "transformer": "flux",
            "vae": "vae_decoder",
        },
        tokenizers={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
        text=lambda encoders, config, index: text.FluxText(**encoders),
        widths=_transformer_widths,
        given=lambda configs: (
            4 * configs["vae"].latent_channels,  # of two by two latents
            configs["text_encoder_2"].d_model,
            configs["text_encoder"].hidden_size,
        ),
        denoiser="transformer",
        t5="text_encoder_2",
        is_flow=True,
        last_is_step=True,
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}


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
    schedule: Schedule | FlowSchedule
    tokenizers: tuple[Any, ...]


def load_generator(
    path_or_id: str | Path,
    *,
    family: str = "",
    revision: str | None = None,
    unet: str | Path = "",
    unet_revision: str | None = None,
    vae: str | Path = "",
    vae_revision: str | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    put: Callable[[np.ndarray], Any] = jax.device_put,
    put_t5: Callable[[np.ndarray], Any] | None = None,
) -> Generator:
    """Returns the parts of a checkpoint in diffusers' layout, with weights cast to `dtype`.

    Raises WeightsError as `load.load` does, and if the parts do not fit together.

    Args:
        path_or_id: the directory or hub id.
        family: of FAMILIES, which it must be; empty: any.
        revision: for hub ids.
        unet: of another denoiser, which is a directory or repository by itself; empty: the checkpoint's own.
        unet_revision: for its hub id.
        vae: the same of a decoder, such as a tiny one.
        vae_revision: for its hub id.
        dtype: of the weights.
        put: where each weight goes as soon as it is read; by default to JAX's default device.
        put_t5: the same for a T5's; None: as `put`.
    """
    directory = _fetch(path_or_id, revision, has_denoiser=not unet, has_vae=not vae)
    check_layout(directory)
    kinds = family_of(directory)
    if family and kinds.name != family:
        raise WeightsError(f"{directory} is of another kind of generator: {kinds.name}, not {family}")
    schedule, tokenizer = read_schedule(directory), load_tokenizers(directory)
    others = {kinds.denoiser: (unet, unet_revision), "vae": (vae, vae_revision)}
    networks = {}
    for folder, kind in kinds.folders.items():
        other, other_revision = others.get(folder, ("", None))
        where = load.fetch(other, other_revision, {"": load.DIFFUSERS}) if other else directory / folder
        kind = load.kind_of(where) if other or folder == "vae" else kind
        networks[folder] = load.load(kind, where, dtype=dtype, put=put_t5 if put_t5 and folder == kinds.t5 else put)
    configs = {folder: _config(network) for folder, network in networks.items()}
    check_widths(kinds, configs, where=directory, unet=unet)
    return assemble(kinds, networks, schedule, tokenizer, read_index(directory))


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


def resident(text_encoder: nnx.Module) -> list[Any]:
    """The weights of a generator's text encoders that stay in a device's memory: all but those of a T5."""
    is_t5 = lambda x: isinstance(x, t5.T5Encoder)
    return [x for x in jax.tree.leaves(text_encoder, is_leaf=is_t5) if not is_t5(x)]


def check_widths(family: Family, configs: Mapping[str, Any], *, where: str | Path, unet: str | Path = "") -> None:
    """Raises WeightsError, naming the config's key, if networks of these configs, by folder, do not fit together."""
    taken = family.widths(configs[family.denoiser])
    for (name, width), expected in zip(taken.items(), family.given(configs), strict=True):
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
    is_there = lambda folder: (directory / folder).is_dir()
    for family in FAMILIES.values():
        if name in family.pipelines:
            left_out = [folder for folder in family.optional if not is_there(folder)]
            return _without(family, left_out) if left_out else family
    if name is not None:
        known = ", ".join(name for family in FAMILIES.values() for name in family.pipelines)
        raise WeightsError(f"{directory / INDEX}: _class_name={name!r} is not implemented; supported: {known}")
    return max(FAMILIES.values(), key=lambda family: sum(map(is_there, family.folders)))


def _without(family: Family, folders: Sequence[str]) -> Family:
    """A family without some of its text encoders."""
    return dataclasses.replace(
        family,
        folders={folder: kind for folder, kind in family.folders.items() if folder not in folders},
        tokenizers={name: folder for name, folder in family.tokenizers.items() if folder not in folders},
        t5="" if family.t5 in folders else family.t5,
    )


def read_index(directory: Path) -> dict:
    """The values of model_index.json; none where it is missing."""
    file = directory / INDEX
    return config_json.read_json(file) if file.exists() else {}


def read_configs(directory: Path) -> dict[str, Any]:
    """The configs of a local directory's networks, by folder."""
    return {folder: load.read_config(kind, directory / folder) for folder, kind in kinds_of(directory).items()}


def kinds_of(directory: Path) -> dict[str, str]:
    """The kinds of a local directory's networks, by folder; its decoder may be a tiny one."""
    vae = directory / "vae"
    return {**family_of(directory).folders, **({"vae": load.kind_of(vae)} if vae.is_dir() else {})}


def read_schedule(directory: Path) -> Schedule | FlowSchedule:
    """Returns the noise schedule of a local directory. Raises WeightsError for one that its family does not have."""
    file = directory / SCHEDULER
    schedule, family = config_json.schedule(config_json.read_json(file), where=str(file)), family_of(directory)
    if (schedule.prediction_type == "flow") != family.is_flow:
        kinds = ("of diffusion", "of a rectified flow")
        raise WeightsError(
            f"{file}: a schedule {kinds[not family.is_flow]} is not implemented for {family.name}, which is {kinds[family.is_flow]}"
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


def check(directory: Path) -> None:
    """Raises WeightsError for a part of a local directory that is missing or damaged; reads no weights."""
    check_layout(directory)
    for folder, kind in kinds_of(directory).items():
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


def _fetch(path_or_id: str | Path, revision: str | None, *, has_denoiser: bool, has_vae: bool) -> Path:
    """The directory of a checkpoint with the files of its family, which its model_index.json tells."""
    all_folders = {folder: kind for family in FAMILIES.values() for folder, kind in family.folders.items()}
    left_out = set() if has_denoiser else {family.denoiser for family in FAMILIES.values()}
    left_out |= set() if has_vae else {"vae"}
    parts = {folder: load.KINDS[kind].stem for folder, kind in all_folders.items() if folder not in left_out}
    names = sorted({name for family in FAMILIES.values() for name in family.tokenizers})
    others = [INDEX, str(SCHEDULER), *(f"{name}/*" for name in names)]
    needed = lambda directory: [folder for folder in family_of(directory).folders if folder in parts]
    return load.fetch(path_or_id, revision, parts, others, needed)
