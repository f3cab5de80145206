"""Networks alone, each with its tokenizers and with how its authors prepare a picture.

    from referee_jax import networks
    clip = networks.load_clip("openai/clip-vit-large-patch14")
    images = clip.network.encode_image(clip.pixels([image]))       # a picture of Pillow, or an array
    texts = clip.network.encode_text(clip.tokens(["a red circle"]))

The networks are Flax NNX modules, which are pytrees: pass them as arguments to jax.jit, grad and vmap. Their methods say
what they take and give: referee_jax.models.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from referee_jax import config, prompts, referees
from referee_jax.storage import images
from referee_jax.weights import generators, load

Where = str | Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A network that reads texts.

    Attributes:
        network: see its class in referee_jax.models.
        tokenizer: transformers'.
    """

    network: Any
    tokenizer: Any

    def tokens(self, texts: Sequence[str]) -> Array:
        """Token ids, int32 `[text, T]`, padded. Raises prompts.Unreadable for a text that is too long."""
        return jnp.asarray(prompts.tokenize(self.tokenizer, texts))

    def mask(self, ids: Array) -> Array:
        """bool `[text, T]`: False on padding. Of tokenizers that pad with the end token, on it, too."""
        return ids != self.tokenizer.pad_token_id


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vision(Text):
    """A network that reads pictures and texts.

    Attributes:
        judge: what prepares its pictures; also the network as a referee.
    """

    judge: referees.Judge

    def pixels(self, pictures: Sequence[images.Picture]) -> Array:
        """Files, pictures of Pillow, or arrays (uint8, or floats in [0, 1]), to what the network reads: `[B, S, S, 3]`.

        Resized, cropped and normalised as its authors do.
        """
        views = np.stack([self.judge.preprocess(images.picture(picture)) for picture in pictures])
        return (views - jnp.asarray(self.judge.referee.mean)) / jnp.asarray(self.judge.referee.std)


def _vision(name: str, path_or_id: Where, *, revision: str = "", dtype: jax.typing.DTypeLike = jnp.float32) -> Vision:
    """Returns the network of a local directory or hub id, its weights cast to `dtype`; `revision` is for hub ids.

    Raises WeightsError where it cannot be had, or is another kind of network.
    """
    spec = config.RefereeSpec(name=name, checkpoint=str(path_or_id), revision=revision, losses={})
    judge = referees.load_referee(spec, dtype=dtype)
    return Vision(network=judge.referee.network, tokenizer=judge.tokenizer, judge=judge)


def _loader(name: str, referee: str) -> Callable[..., Vision]:
    def load_vision(path_or_id: Where, *, revision: str = "", dtype: jax.typing.DTypeLike = jnp.float32) -> Vision:
        return _vision(referee, path_or_id, revision=revision, dtype=dtype)

    load_vision.__name__ = load_vision.__qualname__ = name
    load_vision.__doc__ = _vision.__doc__
    return load_vision


load_clip = _loader("load_clip", "clip")
load_siglip = _loader("load_siglip", "siglip")
load_align = _loader("load_align", "align")
load_blip_itm = _loader("load_blip_itm", "blip_itm")
load_blip_caption = _loader("load_blip_caption", "blip_caption")
load_blip_vqa = _loader("load_blip_vqa", "blip_vqa")
load_blip2 = _loader("load_blip2", "blip2")
load_image_reward = _loader("load_image_reward", "image_reward")
load_qwen3_vl = _loader("load_qwen3_vl", "qwen3_vl")
load_clip_flant5 = _loader("load_clip_flant5", "vqascore")


def load_t5(path_or_id: Where, *, revision: str = "", dtype: jax.typing.DTypeLike = jnp.float32) -> Text:
    """Returns a T5 v1.1 or Flan-T5, encoder and decoder. Raises WeightsError where it cannot be had."""
    network = load.load("t5", path_or_id, revision=revision or None, dtype=dtype)
    return Text(network=network, tokenizer=load.load_tokenizer(path_or_id, revision=revision or None, kind="t5"))


# The parts of a generator, see generators.load_generator.
load_stable_diffusion = functools.partial(generators.load_generator, family="stable diffusion")
load_sdxl = functools.partial(generators.load_generator, family="sdxl")
load_sd3 = functools.partial(generators.load_generator, family="sd3")
load_flux = functools.partial(generators.load_generator, family="flux")
