"""Referees by name: `load_referee(spec)` gives a `Judge`, the host's handle on one.

judge = load_referee(config.RefereeSpec(name="blip_itm", checkpoint="Salesforce/blip-itm-base-coco", losses={}))
judge.score([PIL.Image.open("a.png")], ["a red book"])  # [[{"itm_probability": ..., "cosine": ...}]]
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import PIL.Image

from referee_jax import config, prompts
from referee_jax.method.referee import Referee
from referee_jax.referees import align, blip, blip2, clip, image_reward
from referee_jax.referees.judge import Family, Judge
from referee_jax.weights import config_json, hub, load


def _clip_referee(
    kind: type[clip.ClipReferee], spec: config.RefereeSpec, network: Any, preprocessing: Mapping, tokenizer: Any
) -> Referee:
    return clip.from_checkpoint(network, preprocessing, kind)


def _blip_referee(
    kind: type[blip.BlipReferee], spec: config.RefereeSpec, network: Any, preprocessing: Mapping, tokenizer: Any
) -> Referee:
    own = {"answers": blip.answer_tokens(tokenizer)} if kind is blip.Vqa else {}
    first = None
    if spec.first_token == "[ENC]":
        # The authors' tokenizer adds [DEC], then [ENC]; the published directories have BERT's, without either.
        first = tokenizer.get_vocab().get("[ENC]", network.config.text_config.bos_token_id + 1)
    return blip.from_checkpoint(kind, network, preprocessing, image_size=spec.image_size, first_token=first, **own)


def _blip2_referee(spec: config.RefereeSpec, network: Any, preprocessing: Mapping, tokenizer: Any) -> Referee:
    # The word that begins a caption: LAVIS' tokenizer has it as bos_token, BERT's own has none.
    return blip2.from_checkpoint(
        network, preprocessing, image_size=spec.image_size, dec_token_id=tokenizer.bos_token_id
    )


def _image_reward_referee(spec: config.RefereeSpec, network: Any, preprocessing: Mapping, tokenizer: Any) -> Referee:
    return blip.from_checkpoint(image_reward.Reward, network, preprocessing, image_size=spec.image_size)


def _align_referee(spec: config.RefereeSpec, network: Any, preprocessing: Mapping, tokenizer: Any) -> Referee:
    return align.from_checkpoint(network, preprocessing, image_size=spec.image_size)


def _clip(kind: str, referee: type[clip.ClipReferee], **other: Any) -> Family:
    build = functools.partial(_clip_referee, referee)
    return Family(kind=kind, build=build, tokens=clip.tokens, texts=clip.texts, **other)


def _letterboxed(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """The whole image in a square, its longer side filling it, black beside it: HPSv2's own way (open_clip's ResizeMaxSize)."""
    size = [round(x * side / max(image.size)) for x in image.size]
    square = PIL.Image.new("RGB", (side, side))
    resized = image.resize(size, PIL.Image.Resampling.BICUBIC)
    square.paste(resized, tuple((side - x) // 2 for x in size))
    return square


# BLIP was trained on texts of 35 to 40 wordpieces, but its table of positions is BERT's, of 512.
_blip = functools.partial(Family, length=64, clean=prompts.caption)

# Name in the config -> what it is; its losses are in config.LOSSES. BLIP's captions were trained with this beginning; the
# question is T2I-CompBench's.
REFEREES = {
    "clip": _clip(
        "clip",
        clip.ClipReferee,
        published=(
            "openai/clip-vit-base-patch32",
            "openai/clip-vit-large-patch14",
            "openai/clip-vit-large-patch14-336",
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        ),
    ),
    # The tokenizer_config.json of SigLIP 2 asks for lower case, of which transformers 5 knows nothing; nor do its files say
    # how long texts are. SigLIP 1's tokenizer does both, and drops punctuation.
    "siglip": _clip(
        "siglip",
        clip.SiglipReferee,
        length=64,
        clean=str.lower,
        published=(
            "google/siglip-base-patch16-224",
            "google/siglip2-base-patch16-224",
            "google/siglip2-so400m-patch14-384",
        ),
    ),
    "pickscore": _clip("clip", clip.PickScore, published=("yuvalkirstain/PickScore_v1",)),
    "hps": _clip(
        "clip",
        clip.Hps,
        published=("xswu/HPSv2",),
        files=("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"),
        is_converted=True,
        architecture="HPS",
        squared=_letterboxed,
    ),
    "blip_itm": _blip(
        kind="blip_itm",
        build=functools.partial(_blip_referee, blip.Itm),
        tokens=blip.tokens,
        published=(
            "Salesforce/blip-itm-base-coco",
            "Salesforce/blip-itm-large-coco",
            "Salesforce/blip-itm-base-flickr",
            "Salesforce/blip-itm-large-flickr",
        ),
        files=(
            "model_base_retrieval_coco.pth",
            "model_large_retrieval_coco.pth",
            "model_base_retrieval_flickr.pth",
            "model_large_retrieval_flickr.pth",
        ),
    ),
    "blip_caption": _blip(
        kind="blip_caption",
        build=functools.partial(_blip_referee, blip.Caption),
        texts=blip.caption_texts,
        tokens=blip.caption_tokens,
        template="a picture of {}",
        published=("Salesforce/blip-image-captioning-base", "Salesforce/blip-image-captioning-large"),
        files=("model_base_caption_capfilt_large.pth", "model_large_caption.pth"),
    ),
    "blip_vqa": _blip(
        kind="blip_vqa",
        check=blip.answer_tokens,
        build=functools.partial(_blip_referee, blip.Vqa),
        tokens=blip.tokens,
        clean=prompts.question,
        template="{}?",
        published=("Salesforce/blip-vqa-base", "Salesforce/blip-vqa-capfilt-large"),
        files=("model_base_vqa_capfilt_large.pth",),  # at 480 pixels, as T2I-CompBench asks it
    ),
    "blip2": Family(
        kind="blip2",
        build=_blip2_referee,
        tokens=blip2.tokens,
        clean=prompts.caption,
        length=blip2.TOKENS,
        published=("Salesforce/blip2-itm-vit-g", "Salesforce/blip2-itm-vit-g-coco"),
        files=("blip2_pretrained.pth eva_vit_g.pth",),  # the first stage, which captions
    ),
    "image_reward": Family(
        kind="image_reward",
        build=_image_reward_referee,
        tokens=blip.tokens,
        length=image_reward.TOKENS,
        published=("THUDM/ImageReward",),
        files=("ImageReward.pt",),
        is_converted=True,
    ),
    "align": Family(
        kind="align",
        build=_align_referee,
        tokens=align.tokens,
        texts=clip.texts,
        length=align.TOKENS,
        published=("kakaobrain/align-base",),
    ),
}


def name_of(path_or_id: str, revision: str | None = None) -> str:
    """The name of a checkpoint's referee: of a published id, or else of the architecture in its config.json.

    ValueError where neither tells.
    """
    for name, family in REFEREES.items():
        if path_or_id in family.published:
            return name
    directory = hub.resolve(path_or_id, revision, ["config.json"])
    said = config_json.read_json(directory / "config.json").get("architectures") or ["none"]
    for name, family in REFEREES.items():  # of those that are called the same, the first
        if said[0] == (family.architecture or load.KINDS[family.kind].architecture):
            return name
    raise ValueError(f"{path_or_id}: which referee it is cannot be seen (architecture {said[0]}); say so by its name")


def load_referee(spec: config.RefereeSpec | str, *, dtype: jax.typing.DTypeLike = jnp.float32) -> Judge:
    """Loads the referee that `spec` names (name, checkpoint, revision), or, to score with, that of a directory or hub id.

    Raises WeightsError where it cannot be had, and ValueError for a loss that it does not have, before any weight is read where
    the name alone tells.
    """
    if isinstance(spec, str):
        spec = config.RefereeSpec(name=name_of(spec), checkpoint=spec, losses={})
    _check_losses(spec, config.LOSSES[spec.name])
    directory = load.fetch_referee(spec.checkpoint, revision=spec.revision or None)
    tokenizer = load.load_tokenizer(directory)
    REFEREES[spec.name].check(tokenizer)
    preprocessing = load.read_preprocessing(directory)
    network = load.load(REFEREES[spec.name].kind, directory, dtype=dtype)
    try:
        return build(spec, network, preprocessing, tokenizer)
    except config.ConfigError:
        raise
    except ValueError as error:
        raise load.WeightsError(f"{directory}: {error}") from error


def build(spec: config.RefereeSpec, network: Any, preprocessing: Mapping, tokenizer: Any) -> Judge:
    """The referee of a network, real or abstract, and its image processor's settings; ValueError where `spec` does not fit."""
    referee = REFEREES[spec.name].build(spec, network, preprocessing, tokenizer)
    _check_losses(spec, referee.losses)
    if spec.image_size not in (0, referee.image_size):
        raise config.ConfigError(
            f"referee {spec.name}: image_size = {spec.image_size}, but it reads {referee.image_size}"
        )
    return Judge(spec, REFEREES[spec.name], referee, tokenizer)


def _check_losses(spec: config.RefereeSpec, known: tuple[str, ...]) -> None:
    if unknown := set(spec.losses) - set(known):
        raise config.ConfigError(
            f"referee {spec.name}: no loss {', '.join(sorted(unknown))}; there are {', '.join(known)}"
        )
