"""What a generator reads of a prompt: one or several text encoders, and what they make of it."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from referee_jax.models import clip
from referee_jax.models.flan_t5 import t5

T5_TOKENS = 256  # of a prompt, that SD3 and FLUX.1-schnell were trained with


class Text(NamedTuple):
    """A prompt as a generator's network reads it, the arguments after its timesteps.

    Attributes:
        states: of the tokens, `[B, T, D]`.
        pooled: of the whole text, `[B, P]`; None where the network reads none.
    """

    states: Array
    pooled: Array | None = None


class StableDiffusionText(nnx.Module):
    """Stable Diffusion's: the last states of one CLIP."""

    def __init__(self, text_encoder: clip.TextModel):
        self.text_encoder = text_encoder

    def __call__(self, ids: Sequence[Array]) -> Text:
        """`int32[B, T]` of one tokenizer."""
        return Text(self.text_encoder(ids[0]))


class SDXLText(nnx.Module):
    """SDXL's: the states of two CLIPs before their last blocks, side by side, and the second one's pooled text.

    With `zeros_for_empty`, an empty text is zeros, as the published pipelines take it where no negative prompt is given.
    """

    def __init__(
        self,
        text_encoder: clip.TextModel,
        text_encoder_2: clip.TextModelWithProjection,
        *,
        zeros_for_empty: bool = True,
    ):
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.zeros_for_empty = zeros_for_empty

    def __call__(self, ids: Sequence[Array]) -> Text:
        """`int32[B, T]` of each of the two tokenizers."""
        first, _ = self.text_encoder.text_model.penultimate(ids[0])
        second, pooled = self.text_encoder_2(ids[1])
        states = jnp.concatenate([first, second], axis=-1)
        if self.zeros_for_empty:
            says = (self.text_encoder.text_model.end(ids[0]) > 1)[:, None]
            states, pooled = states * says[..., None], pooled * says
        return Text(states, pooled)


class SD3Text(nnx.Module):
    """SD3's: the states of two CLIPs before their last blocks, side by side, then those of T5; both CLIPs' pooled texts.

    Without T5, as in the published pipeline, its states are zeros.
    """

    def __init__(
        self,
        text_encoder: clip.TextModelWithProjection,
        text_encoder_2: clip.TextModelWithProjection,
        text_encoder_3: t5.T5Encoder | None = None,
        *,
        width: int,
    ):
        self.text_encoder, self.text_encoder_2, self.text_encoder_3 = text_encoder, text_encoder_2, text_encoder_3
        self.width = width

    def __call__(self, ids: Sequence[Array]) -> Text:
        """`int32[B, T]` of each tokenizer, T5's last."""
        states, pooled = zip(self.text_encoder(ids[0]), self.text_encoder_2(ids[1]), strict=True)
        states, pooled = jnp.concatenate(states, axis=-1), jnp.concatenate(pooled, axis=-1)
        states = jnp.pad(states, ((0, 0), (0, 0), (0, self.width - states.shape[-1])))
        if self.text_encoder_3 is None:
            more = jnp.zeros((len(states), T5_TOKENS, self.width), states.dtype)
        else:  # padding attends and is attended, as in training
            more = self.text_encoder_3(ids[2]).astype(states.dtype)
        return Text(jnp.concatenate([states, more], axis=1), pooled)


class FluxText(nnx.Module):
    """FLUX's: the states of T5, and CLIP's end token after its final norm."""

    def __init__(self, text_encoder: clip.TextModel, text_encoder_2: t5.T5Encoder):
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2

    def __call__(self, ids: Sequence[Array]) -> Text:
        """`int32[B, T]` of CLIP's and of T5's tokenizer."""
        return Text(self.text_encoder_2(ids[1]), self.text_encoder.text_model(ids[0])[1])
