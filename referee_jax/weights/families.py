"""The kinds of generators: which networks each has, in which folders, and which text encoders read a prompt."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from referee_jax.models.diffusion import text
from referee_jax.weights.convert import WeightsError


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


def without(family: Family, folders: Sequence[str]) -> Family:
    """A family without some of its text encoders."""
    return dataclasses.replace(
        family,
        folders={folder: kind for folder, kind in family.folders.items() if folder not in folders},
        tokenizers={name: folder for name, folder in family.tokenizers.items() if folder not in folders},
        t5="" if family.t5 in folders else family.t5,
    )


def check_widths(family: Family, configs: Mapping[str, Any], *, where: str | Path) -> None:
    """Raises WeightsError, naming the config's key, if networks of these configs, by folder, do not fit together.

    `where` is the checkpoint, or the network in the place of its denoiser.
    """
    taken = family.widths(configs[family.denoiser])
    for (name, width), expected in zip(taken.items(), family.given(configs), strict=True):
        if width != expected:
            raise WeightsError(
                f"{where}: {family.denoiser}: {name}={width} does not fit the other parts, which have {expected}"
            )
