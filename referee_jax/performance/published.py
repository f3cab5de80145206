"""Sizes of published checkpoints, of their config.json or their papers, for estimates where the files are not here."""

import dataclasses
import functools
from typing import Any

from referee_jax import config
from referee_jax.models import align, blip, blip2, clip, image_reward, qwen3_vl, siglip
from referee_jax.models.diffusion import flux, sd3, unet, vae
from referee_jax.models.flan_t5 import clip_t5, t5
from referee_jax.weights import families, schedules


def _tower(cls: type, width: int, layers: int, heads: int, hidden: int | None = None, **other: Any) -> Any:
    return cls(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=hidden or 4 * width, **other
    )  # fmt: skip


def _clip(text: clip.TextConfig, image_size: int, width: int) -> clip.Config:
    vision = _tower(clip.VisionConfig, 1024, 24, 16, image_size=image_size, patch_size=14)
    return clip.Config(text_config=text, vision_config=vision, projection_dim=width)


_CLIP_L = functools.partial(_clip, _tower(clip.TextConfig, 768, 12, 12), width=768)
_CLIP_H = clip.Config(
    text_config=_tower(clip.TextConfig, 1024, 24, 16, hidden_act="gelu"),
    vision_config=_tower(clip.VisionConfig, 1280, 32, 16, patch_size=14, hidden_act="gelu"),
    projection_dim=1024,
)


def _blip(width: int = 768, layers: int = 12, heads: int = 12) -> blip.Config:
    vision = _tower(blip.VisionConfig, width, layers, heads, image_size=384)
    return blip.Config(text_config=blip.TextConfig(num_attention_heads=12), vision_config=vision)


def _qwen3_vl(width: int, hidden: int, layers: int, heads: int, *, is_large: bool = False) -> qwen3_vl.Config:
    text = _tower(
        qwen3_vl.TextConfig, width, layers, heads, hidden, num_key_value_heads=8, max_position_embeddings=262144,
        rope_theta=5e6,
    )  # fmt: skip
    tower = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": (5, 11, 17)}
    vision = qwen3_vl.VisionConfig(out_hidden_size=width, **({} if is_large else tower))
    return qwen3_vl.Config(text_config=text, vision_config=vision, tie_word_embeddings=not is_large)


def _clip_t5(width: int, heads: int, hidden: int) -> clip_t5.Config:
    vision = _CLIP_L(336).vision_config
    sizes = dict(num_layers=24, d_model=width, num_heads=heads, d_ff=hidden, vision_config=vision)
    return clip_t5.Config(**sizes, tie_word_embeddings=False, lm_head=True)


_BLIP_L = _blip(1024, 24, 16)
_SIGLIP_2 = siglip.TextConfig(vocab_size=256000)
# Published checkpoint -> its sizes, of its config.json or its paper.
PUBLISHED: dict[str, Any] = {
    "openai/clip-vit-base-patch32": clip.Config(),
    "openai/clip-vit-large-patch14": _CLIP_L(224),
    "openai/clip-vit-large-patch14-336": _CLIP_L(336),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _CLIP_H,
    "yuvalkirstain/PickScore_v1": _CLIP_H,
    "xswu/HPSv2": _CLIP_H,
    "google/siglip-base-patch16-224": siglip.Config(),
    "google/siglip2-base-patch16-224": siglip.Config(text_config=_SIGLIP_2),
    "google/siglip2-so400m-patch14-384": siglip.Config(
        text_config=_tower(siglip.TextConfig, 1152, 27, 16, 4304, vocab_size=256000),
        vision_config=_tower(siglip.VisionConfig, 1152, 27, 16, 4304, image_size=384, patch_size=14),
    ),
    "Salesforce/blip-itm-base-coco": _blip(),
    "Salesforce/blip-itm-large-coco": _BLIP_L,
    "Salesforce/blip-itm-base-flickr": _blip(),
    "Salesforce/blip-itm-large-flickr": _BLIP_L,
    "Salesforce/blip-image-captioning-base": _blip(),
    "Salesforce/blip-image-captioning-large": _BLIP_L,
    "Salesforce/blip-vqa-base": _blip(),
    "Salesforce/blip-vqa-capfilt-large": _blip(),
    "Salesforce/blip2-itm-vit-g": blip2.Config(),
    "Salesforce/blip2-itm-vit-g-coco": blip2.Config(),
    "THUDM/ImageReward": image_reward.Config(),
    "kakaobrain/align-base": align.Config(),
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3_vl(2048, 6144, 28, 16),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(2560, 9728, 36, 32),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(4096, 12288, 36, 32, is_large=True),
    "zhiqiulin/clip-flant5-xl": _clip_t5(2048, 32, 5120),
    "zhiqiulin/clip-flant5-xxl": _clip_t5(4096, 64, 10240),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedGenerator:
    """Sizes of a generator: its networks' configs by folder, and its schedule."""

    family: families.Family
    sizes: dict[str, Any]
    schedule: schedules.Schedule | schedules.FlowSchedule


_SCHEDULE = schedules.Schedule(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False
)
_CLIP_L_TEXT = _CLIP_L(224).text_config
_BIG_G_TEXT = _tower(clip.TextConfig, 1280, 32, 20, hidden_act="gelu", projection_dim=1280)
_SD = PublishedGenerator(
    family=families.FAMILIES["stable diffusion"],
    sizes={"text_encoder": _CLIP_L_TEXT, "unet": unet.Config(), "vae": vae.Config()},
    schedule=_SCHEDULE,
)
_SD_2 = dataclasses.replace(
    _SD,
    sizes={
        "text_encoder": _tower(clip.TextConfig, 1024, 23, 16, hidden_act="gelu"),
        "unet": unet.Config(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
        "vae": vae.Config(),
    },
)
_SDXL = PublishedGenerator(
    family=families.FAMILIES["sdxl"],
    sizes={
        "text_encoder": _CLIP_L_TEXT,
        "text_encoder_2": _BIG_G_TEXT,
        "unet": unet.Config(
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
            up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        "vae": vae.Config(scaling_factor=0.13025),
    },
    schedule=dataclasses.replace(_SCHEDULE, set_alpha_to_one=True),
)
_VAE_16 = dict(latent_channels=16, use_post_quant_conv=False)
_T5_XXL = t5.Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, tie_word_embeddings=False)
_SD3_5 = PublishedGenerator(
    family=families.FAMILIES["sd3"],
    sizes={
        "text_encoder": _tower(clip.TextConfig, 768, 12, 12, projection_dim=768),
        "text_encoder_2": _BIG_G_TEXT,
        "text_encoder_3": _T5_XXL,
        "transformer": sd3.Config(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        "vae": vae.Config(**_VAE_16, scaling_factor=1.5305, shift_factor=0.0609),
    },
    schedule=schedules.FlowSchedule(shift=3.0),
)
_SD3_LARGE = sd3.Config(
    num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"
)
_SD3_FIRST = sd3.Config(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)
_FLUX = PublishedGenerator(
    family=families.FAMILIES["flux"],
    sizes={
        "text_encoder": _CLIP_L_TEXT,
        "text_encoder_2": _T5_XXL,
        "transformer": flux.Config(),
        "vae": vae.Config(**_VAE_16, scaling_factor=0.3611, shift_factor=0.1159),
    },
    schedule=schedules.FlowSchedule(last_is_step=True),
)
_TURBO = dataclasses.replace(_SCHEDULE, timestep_spacing="trailing", set_alpha_to_one=True)
# Published checkpoint -> its sizes.
GENERATORS: dict[str, PublishedGenerator] = {
    config.Generator().checkpoint: _SD,
    "stabilityai/stable-diffusion-2-1": _SD_2,
    "stabilityai/sd-turbo": dataclasses.replace(_SD_2, schedule=_TURBO),
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
    "stabilityai/sdxl-turbo": dataclasses.replace(_SDXL, schedule=_TURBO),
    "stabilityai/stable-diffusion-3.5-medium": _SD3_5,
    "stabilityai/stable-diffusion-3.5-large": dataclasses.replace(
        _SD3_5, sizes=_SD3_5.sizes | {"transformer": _SD3_LARGE}
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": dataclasses.replace(
        _SD3_5, sizes=_SD3_5.sizes | {"transformer": _SD3_FIRST}
    ),
    "black-forest-labs/FLUX.1-schnell": _FLUX,
}
