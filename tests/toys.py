"""Networks of a few parameters, for what an engine does around networks: batches, devices, seeds, state, numbers, files.

They depend on all that real ones depend on (latents, time, text; places and colours of pixels, every text that a referee reads)
but are compiled in a tenth of the time. They are differentiable, so that the method runs on them as it is.
"""

import types
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from referee_jax import config, referees
from referee_jax.engine import inverter
from referee_jax.models.diffusion.text import Text
from referee_jax.performance import abstract_networks
from referee_jax.weights import config_json
from referee_jax.weights.generators import Generator

VOCABULARY, WIDTH, LENGTH = 64, 6, 77
CELLS, FEATURES = 4, 5  # a referee sees the mean colours of 4 x 4 cells


class Words(abstract_networks.Words):
    """A word is a token by itself, with an id of its own as far as the vocabulary goes."""

    def __call__(self, texts: str | Sequence[str], **how: Any) -> dict[str, list]:
        encoded = super().__call__(texts, **how)
        if isinstance(texts, str):
            ids = [2 + zlib.crc32(word.encode()) % (VOCABULARY - 2) for word in texts.split()]
            return {"input_ids": [1, *ids, 1] if how.get("add_special_tokens", True) else ids}
        return encoded


class TextEncoder(struct.PyTreeNode):
    """Ids `[N, T]` of one tokenizer to states `[N, T, WIDTH]`."""

    table: Array

    def __call__(self, ids: Sequence[Array]) -> Text:
        return Text(self.table[ids[0]])


class UNet(struct.PyTreeNode):
    """z * scale + t * drift + sum(states) @ matrix."""

    scale: Array
    drift: Array
    matrix: Array

    def __call__(self, z: Array, t: Array, states: Array, pooled: None = None) -> Array:
        moved = (t / 1000)[:, None] * self.drift + states.sum(1) @ self.matrix / 4
        return z * self.scale + moved[:, None, None]


class Decoder(struct.PyTreeNode):
    """sigmoid(z @ matrix), each pixel of the latents four by four of the image."""

    matrix: Array
    config = types.SimpleNamespace(downscale=4, latent_channels=4)

    def decode(self, z: Array) -> Array:
        return jax.nn.sigmoid(jnp.repeat(jnp.repeat(z @ self.matrix, 4, 1), 4, 2))


class Referee(struct.PyTreeNode):
    """Losses by name: the mean square between features of the colours and of the words, less a fifth of that of all texts."""

    table: Array
    matrices: Array
    losses: tuple[str, ...] = struct.field(pytree_node=False)
    image_size: int = struct.field(pytree_node=False)
    questions: int = struct.field(pytree_node=False, default=0)
    network = types.SimpleNamespace(
        config=types.SimpleNamespace(text_config=types.SimpleNamespace(vocab_size=VOCABULARY))
    )

    def encode(self, tokens: dict[str, Array]) -> Array:
        """Features `[texts, FEATURES]`."""
        return self.table[jnp.atleast_2d(tokens["input_ids"])].sum(1) / 4

    def views_losses(self, views: Array, text: Array) -> dict[str, Array]:
        count, size, side = len(views), self.image_size // CELLS, CELLS
        cells = views.reshape(count, side, size, side, size, 3).mean((2, 4)).reshape(count, -1)
        features = jnp.tanh(jnp.einsum("vc,lcf->vlf", cells, self.matrices))
        distances = jnp.square(features[:, :, None] - text).mean(-1)
        losses = 1.2 * distances[..., 0] - 0.2 * distances.mean(-1)
        return dict(zip(self.losses, losses.T, strict=True))

    def fit(self, image: Array) -> Array:
        return jax.image.resize(image, (self.image_size, self.image_size, 3), "linear")

    def scores(self, view: Array, text: Array) -> dict[str, Array]:
        """exp(-loss) of each; of single questions the mean of their features."""
        scores = {name: jnp.exp(-loss[0]) for name, loss in self.views_losses(view[None], text).items()}
        return scores | {f"question_{n}": jax.nn.sigmoid(text[n].mean()) for n in range(self.questions)}


def prior(seed: int = 0) -> Generator:
    """With Stable Diffusion's schedule."""
    rng = np.random.default_rng(seed)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return Generator(
        text_encoder=TextEncoder(_table(rng, WIDTH)),
        denoiser=UNet(0.5 + 0.1 * _normal(rng, 4), _normal(rng, 4), _normal(rng, WIDTH, 4)),
        vae=Decoder(_normal(rng, 4, 3)),
        schedule=config_json.Schedule(**betas, steps_offset=1, set_alpha_to_one=False),
        tokenizers=(Words(LENGTH),),
    )


def judge(spec: config.RefereeSpec, seed: int = 1) -> referees.Judge:
    """In place of the referee of this name, with its losses; the texts are those that its family reads."""
    rng, names, size = np.random.default_rng(seed), config.LOSSES[spec.name], 32 if spec.name == "clip" else 24
    matrices = _normal(rng, len(names), CELLS * CELLS * 3, FEATURES)
    referee = Referee(_table(rng, FEATURES), matrices, losses=tuple(names), image_size=size, questions=spec.questions)
    return referees.Judge(spec, referees.REFEREES[spec.name], referee, Words(LENGTH))


def engine(settings: config.Settings, devices: Sequence[jax.Device] | None = None) -> inverter.Inverter:
    """In place of Inverter.from_config."""
    judges = [judge(spec, seed) for seed, spec in enumerate(settings.referees, 1)]
    return inverter.Inverter(settings, prior(), judges, devices)


def _table(rng: np.random.Generator, width: int) -> Array:
    """Of the words; nothing of padding."""
    return _normal(rng, VOCABULARY, width).at[0].set(0)


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)
