"""The networks of a config from their sizes: without weights, or with random ones. Nothing is downloaded.

Sizes come from config.json where a checkpoint is a local directory, else from PUBLISHED. A stand-in
replaces the tokenizer: what a program costs depends on the length of its texts, which is fixed.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from referee_jax import config, referees
from referee_jax.engine import builders
from referee_jax.models import align, blip, blip2, clip, image_reward, qwen3_vl, siglip
from referee_jax.models.diffusion import unet, vae
from referee_jax.models.flan_t5 import clip_t5
from referee_jax.weights import config_json, hub, load, tokenizers

_SD = {
    "clip_text": clip.TextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    "unet": unet.Config(),
    "vae_decoder": vae.Config(),
}
DRAWN = 4_194_301  # random numbers; a prime, so that no two rows or layers are equal


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
# In place of a preprocessor_config.json. Only ALIGN's network does not know the size of its pictures.
_PREPROCESSING = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_ALIGN_SIZES = {"do_center_crop": True, "size": 346, "crop_size": 289}


class Words:
    """A stand-in tokenizer: one token per word, all with the same id."""

    pad_token_id, unk_token_id, bos_token_id = 0, None, None

    def __init__(self, length: int):
        self.model_max_length = length

    def __len__(self) -> int:
        return 2  # the word, and what pads

    def get_vocab(self) -> dict[str, int]:
        """An empty vocabulary."""
        return {}

    def __call__(
        self, texts: str | Sequence[str], *, add_special_tokens: bool = True, max_length: int = 0, **_: Any
    ) -> dict[str, list]:
        """`input_ids` of a text or of several."""
        if isinstance(texts, str):
            return {"input_ids": [1] * (len(texts.split()) + 2 * add_special_tokens)}
        rows = [self(text)["input_ids"] for text in texts]
        return {"input_ids": [row + [self.pad_token_id] * (max_length - len(row)) for row in rows]}


@dataclasses.dataclass(frozen=True)
class Sized:
    """The networks of a config, as `weights.load` returns them.

    `assumed` has a sentence for each checkpoint whose sizes were taken from another one.
    """

    prior: load.StableDiffusion
    judges: tuple[referees.Judge, ...]
    assumed: tuple[str, ...]


def abstract(settings: config.Settings) -> Sized:
    """The networks of a config, each weight a jax.ShapeDtypeStruct of its dtype.

    Raises ConfigError, or WeightsError for a directory whose config.json does not fit.
    """
    dtype, assumed = builders.DTYPES[settings.precision], []
    prior = _prior(settings.generator, dtype, assumed)
    judges = tuple(_judge(spec, dtype, assumed) for spec in settings.referees)
    return Sized(prior, judges, tuple(assumed))


def at_random(sized: Sized) -> Sized:
    """The same with random weights, always the same: norms 1, all others normal with standard deviation 0.02.

    All weights share DRAWN numbers, each from its own offset: drawing billions would take a minute.
    """
    rng, prior = np.random.default_rng(0), sized.prior
    parts = {name: _drawn(rng, getattr(prior, name)) for name in ("text_encoder", "unet", "vae")}
    judges = [dataclasses.replace(judge, referee=_drawn(rng, judge.referee)) for judge in sized.judges]
    return dataclasses.replace(sized, prior=dataclasses.replace(prior, **parts), judges=tuple(judges))


def _drawn(rng: np.random.Generator, tree: Any) -> Any:
    drawn = 0.02 * rng.standard_normal(DRAWN, np.float32)

    def draw(path: Sequence, x: jax.ShapeDtypeStruct) -> jax.Array:
        # scales of norms, variances of batch norms
        if any(word in str(path) for word in ("scale", "running_var")):
            return jnp.ones(x.shape, x.dtype)
        return jnp.asarray(np.resize(np.roll(drawn, -rng.integers(DRAWN)), x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


def _prior(generator: config.Generator, dtype: Any, assumed: list[str]) -> load.StableDiffusion:
    checkpoint, directory = generator.checkpoint, hub.local_path(generator.checkpoint)
    schedule, sizes = config_json.Schedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), _SD
    if directory.is_dir():
        sizes = {kind: load.read_config(kind, directory / folder) for kind, folder in load.FOLDERS.items()}
        schedule = load.read_schedule(directory)
    elif checkpoint != config.Generator().checkpoint:
        assumed.append(f"{checkpoint} is not here: sizes are those of {config.Generator().checkpoint}")
    if generator.unet and (unet := hub.local_path(generator.unet)).is_dir():
        sizes = sizes | {"unet": load.read_config("unet", unet)}
    elif generator.unet:
        assumed.append(f"{generator.unet} is not here: its sizes are those of {checkpoint}")
    networks = {kind: load.abstract(kind, sizes[kind], dtype=dtype) for kind in load.FOLDERS}
    return load.StableDiffusion(
        text_encoder=networks["clip_text"],
        unet=networks["unet"],
        vae=networks["vae_decoder"],
        alphas_cumprod=jnp.asarray(schedule.alphas_cumprod()),
        prediction_type=schedule.prediction_type,
        tokenizer=Words(sizes["clip_text"].max_position_embeddings),
    )


def _judge(spec: config.RefereeSpec, dtype: Any, assumed: list[str]) -> referees.Judge:
    if config.own_referee(spec.name):  # nobody else knows its sizes
        judge = referees.load_referee(spec, dtype=dtype)
        return dataclasses.replace(judge, referee=jax.eval_shape(lambda: judge.referee))
    family, directory = referees.REFEREES[spec.name], hub.local_path(spec.checkpoint)
    preprocessing = _PREPROCESSING | (_ALIGN_SIZES if family.kind == "align" else {})
    if directory.is_dir():
        sizes = load.read_config(family.kind, directory)
        preprocessing = load.read_preprocessing(directory)
    else:
        stand_in = spec.checkpoint if spec.checkpoint in family.published else family.published[0]
        if stand_in != spec.checkpoint:
            assumed.append(f"{spec.checkpoint} is not here: sizes are those of {stand_in}")
        sizes = PUBLISHED[stand_in]
    if family.kind == "blip2":
        sizes = dataclasses.replace(sizes, lm_head="itg" in spec.losses)
    network, length = load.abstract(family.kind, sizes, dtype=dtype), load.text_config(sizes).max_position_embeddings
    if (file := directory / tokenizers.CONFIG).exists():
        length = min(length, config_json.read_json(file).get("model_max_length", length))
    return referees.build(spec, network, preprocessing, Words(length))
