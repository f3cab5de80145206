"""A referee on the host: its network, its tokenizer and its settings."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from referee_jax import config, prompts
from referee_jax.method.referee import Referee
from referee_jax.referees import base
from referee_jax.weights import load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of referee.

    Attributes:
        kind: what network it is, of `load.KINDS`.
        build: `(spec, network, settings of the image processor, tokenizer) -> referee`.
        tokenize: the host's half of it, from its own file.
        texts: all that is read for a prompt, templates included, as `tokenize` reads it.
        clean: what is done to the prompt before it is put into the template.
        template: text with one {} where the prompt is put, unless the settings have another.
        length: tokens of text that it reads; None: as many as the tokenizer says.
        published: hub ids of its checkpoints.
        architecture: what config.json calls such a checkpoint, where it is not what it calls others of its kind.
        files: originals of its authors that weights.lavis converts.
        is_converted: whether `published` holds nothing but such.
        squared: an image and the side of a square, to what the checkpoint's own preprocessing then reads.
        check: raises ValueError for a tokenizer that does not fit, before weights are read.
    """

    kind: str
    build: Callable[[config.RefereeSpec, Any, Mapping, Any], Referee]
    tokenize: base.Tokenize
    texts: Callable[["Judge", str], list[str]] = lambda judge, prompt: [judge.text(prompt)]
    clean: Callable[[str], str] = str
    template: str = "{}"
    length: int | None = None
    published: tuple[str, ...] = ()
    architecture: str = ""
    files: tuple[str, ...] = ()
    is_converted: bool = False
    squared: Callable[[PIL.Image.Image, int], PIL.Image.Image] = lambda image, side: image
    check: Callable[[Any], Any] = lambda tokenizer: None


@dataclasses.dataclass(frozen=True)
class Judge:
    """A referee with its tokenizer and its part of the settings."""

    spec: config.RefereeSpec
    family: Family
    referee: Referee
    tokenizer: Any

    @property
    def template(self) -> str:
        """Text with one {} where the prompt is put."""
        return self.spec.template or self.family.template

    def clean(self, prompt: str) -> str:
        """The prompt as the referee's texts were in training."""
        return self.family.clean(prompt)

    @property
    def length(self) -> int:
        """Tokens of text that it reads, both ends included."""
        limit = self.family.length
        return min(limit or self.tokenizer.model_max_length, self.tokenizer.model_max_length)

    def text(self, prompt: str) -> str:
        """What the referee reads for a prompt."""
        return self.template.replace("{}", self.clean(prompt))

    def count(self, prompt: str) -> int:
        """Tokens of that text, or of a longer one that it is compared with, both ends included; at most `length` fit."""
        return max(prompts.token_count(self.tokenizer, text) for text in self.family.texts(self, prompt))

    def unknown(self, prompt: str) -> str | None:
        """A token of that text that the network has no word for, as the tokenizer of a processor may add ("<image>")."""
        texts = self.family.texts(self, prompt)
        return self._unknown(np.concatenate([self.tokenizer(text)["input_ids"] for text in texts]))

    def _unknown(self, ids: np.ndarray) -> str | None:
        sizes = self.referee.network.config
        words = (getattr(sizes, "text_config", None) or sizes.qformer_config).vocab_size
        return self.tokenizer.convert_ids_to_tokens(int(ids.max())) if ids.max() >= words else None

    def tokenize(self, prompt: str) -> dict[str, np.ndarray]:
        """What `referee.encode` reads: arrays of one shape for all prompts. PromptError for what it cannot read."""
        tokens = self.family.tokenize(self, prompt)
        if token := self._unknown(tokens["input_ids"]):
            raise prompts.PromptError(
                f"the prompt {prompt[:60]!r} holds {token}, for which {self.spec.name} has no word"
            )
        return tokens

    def score(self, images: Sequence[PIL.Image.Image], texts: Sequence[str]) -> list[list[dict[str, float]]]:
        """The scores of each image with each text, behind the checkpoint's own preprocessing.

        Raises WeightsError where that cannot be had, ValueError where it does not give the size that the referee reads, and
        prompts.PromptError for a text that is too long.
        """
        look = self.preprocessing()
        tokens = jax.tree.map(lambda *x: np.stack(x), *map(self.tokenize, texts))
        read, found = _encode(self.referee, tokens), []
        for image in images:
            scores = _score(self.referee, jnp.asarray(look(image)), read)
            found.append([{name: float(x[n]) for name, x in scores.items()} for n in range(len(texts))])
        return found

    def preprocessing(self) -> Callable[[PIL.Image.Image], np.ndarray]:
        """The checkpoint's own: an image to the view float32 `[S, S, 3]` in [0, 1] that `referee.scores` reads.

        Raises WeightsError where that cannot be had; the function, ValueError where it does not give the referee's size.
        """
        processor = load.load_image_processor(self.spec.checkpoint, revision=self.spec.revision or None)
        side, mean, std = self.referee.image_size, np.asarray(self.referee.mean), np.asarray(self.referee.std)

        def look(image: PIL.Image.Image) -> np.ndarray:
            square = self.family.squared(image.convert("RGB"), side)
            pixels = np.asarray(processor(images=square, return_tensors="np")["pixel_values"][0])
            if pixels.shape != (3, side, side):
                raise ValueError(
                    f"referee {self.spec.name} reads {side} x {side} pixels, its image processor gives {pixels.shape}"
                )
            return (pixels.transpose(1, 2, 0) * std + mean).astype(np.float32)

        return look


# Of one image the vision tower's part is not repeated for each text: it does not depend on them.
_encode = jax.jit(jax.vmap(lambda referee, tokens: referee.encode(tokens), in_axes=(None, 0)))
_score = jax.jit(jax.vmap(lambda referee, view, text: referee.scores(view, text), in_axes=(None, None, 0)))
