"""What a generator reads of a prompt: one or several text encoders, and what they make of it."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from referee_jax.models import clip


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
        if self.zeros_for_empty:  # the end token follows the start token at once
            says = (ids[0][:, 1] != self.text_encoder.text_model.config.eos_token_id)[:, None]
            states, pooled = states * says[..., None], pooled * says
        return Text(states, pooled)
