"""ALIGN as a referee: CLIP's two losses, its own preprocessing, texts whose padding is masked."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from referee_jax import config
from referee_jax.models import align
from referee_jax.referees import clip, resizing
from referee_jax.referees.judge import Family, Judge

TOKENS = 64  # both ends included, as ALIGN was trained
RESIZED = 346  # where a preprocessor_config.json does not say it


class AlignReferee(clip.ClipReferee):
    """CLIP's losses."""

    losses = config.LOSSES["align"]


def from_checkpoint(network: align.ALIGN, preprocessing: Mapping, *, image_size: int = 0) -> AlignReferee:
    """The referee of a loaded network and its preprocessor_config.json.

    `image_size` is the side of the views, 0 the checkpoint's; an image to be scored is cropped by the
    checkpoint's ratio. Raises ValueError where sizes are not of squares or the crop is the larger.
    """
    fitting = resizing.fitting(preprocessing, RESIZED)
    image_size = image_size or fitting.side
    black, white = (_pixel(value, preprocessing) for value in (0.0, 255.0))
    return AlignReferee(
        network=network,
        image_size=image_size,
        fitting=fitting,
        mean=tuple((-black / (white - black)).tolist()),
        std=tuple((1 / (white - black)).tolist()),
    )


def _pixel(value: float, preprocessing: Mapping) -> np.ndarray:
    """A pixel's value, 0 to 255, as the network reads it in each channel.

    Absent keys have the defaults of transformers' `EfficientNetImageProcessor`.
    """
    factor, offset = preprocessing.get("rescale_factor", 1 / 255), preprocessing.get("rescale_offset", False)
    value = np.full(3, value * factor - offset)
    if preprocessing.get("do_normalize", True):
        value = (value - preprocessing["image_mean"]) / preprocessing["image_std"]
    return value / preprocessing["image_std"] if preprocessing.get("include_top", True) else value


def tokens(judge: Judge, ids: np.ndarray) -> dict[str, np.ndarray]:
    """CLIP's, and `mask [1 + N, T]`: False on padding."""
    rows = clip.tokens(judge, ids)
    return rows | {"mask": rows["input_ids"] != judge.tokenizer.pad_token_id}


def _build(spec: config.RefereeSpec, network: align.ALIGN, preprocessing: Mapping, tokenizer: Any) -> AlignReferee:
    return from_checkpoint(network, preprocessing, image_size=spec.image_size)


FAMILY = Family(
    kind="align",
    build=_build,
    texts=clip.texts,
    tokens=tokens,
    length=TOKENS,
    published=("kakaobrain/align-base",),
)
