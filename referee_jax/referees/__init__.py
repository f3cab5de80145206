"""Referees by name: `load_referee(spec)` gives a `Judge`, the host's handle on one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from referee_jax import config, prompts
from referee_jax.referees import base, clip
from referee_jax.weights import load


@dataclasses.dataclass(frozen=True)
class Judge:
    """A referee with its tokenizer and its part of the settings."""

    spec: config.RefereeSpec
    referee: base.Referee
    tokenizer: Any

    def tokenize(self, prompt: str) -> dict[str, np.ndarray]:
        """The prompt and its negatives as arrays of one shape for all prompts: `input_ids [1 + N, T]`, `real [1 + N]`.

        Negatives are the spec's own, and `spec.near` of the prompt's neighbours (prompts.near); where there are fewer, the
        prompt itself fills the rows, marked as not real.
        """
        near = prompts.near(prompt, self.spec.exchange)[: self.spec.near]
        texts = [prompt, *(text for text in self.spec.negatives if text != prompt), *near]
        count = 1 + len(self.spec.negatives) + self.spec.near
        real = np.arange(count) < len(texts)
        texts += [prompt] * (count - len(texts))
        return {"input_ids": prompts.tokenize(self.tokenizer, texts), "real": real}


def _load_clip(path: str, revision: str | None, dtype: Any) -> base.Referee:
    directory = load.resolve(path, revision, ["preprocessor_config.json"])
    preprocessing = load.read_json(directory / "preprocessor_config.json")
    return clip.from_checkpoint(load.load_clip(path, revision=revision, dtype=dtype), preprocessing)


# Name in the config -> (path or hub id, revision, dtype) -> referee.
REFEREES = {"clip": _load_clip}


def load_referee(spec: config.RefereeSpec, *, dtype: jax.typing.DTypeLike = jnp.float32) -> Judge:
    """Loads the referee that `spec` names (name, checkpoint, revision); WeightsError where it cannot be had."""
    path, revision = config.checkpoint_path(spec.checkpoint), spec.revision or None
    referee = REFEREES[spec.name](path, revision, dtype)
    if unknown := set(spec.losses) - set(referee.losses):
        raise ValueError(
            f"referee {spec.name}: no loss {', '.join(sorted(unknown))}; there are {', '.join(referee.losses)}"
        )
    return Judge(spec, referee, load.load_tokenizer(path, revision=revision))
