"""Images to the size that a referee reads."""

import jax
import jax.numpy as jnp
from jax import Array


def resized(image: Array, side: int) -> Array:
    """`[H, W, 3]` to `[side, side, 3]`, smoothed where it shrinks."""
    size = (side, side, 3)
    return image if image.shape == size else jax.image.resize(image, size, "bilinear", antialias=True)


def cropped(image: Array, side: int) -> Array:
    """`[H, W, 3]` with its shorter side brought to `side`, then the middle square.

    As torchvision's Resize and CenterCrop. Bicubic as PIL's: rows, then columns, each kept within [0, 1].
    """
    short = min(image.shape[:2])
    height, width = (side * x // short for x in image.shape[:2])
    if short != side:
        for size in ((image.shape[0], width, 3), (height, width, 3)):
            image = jnp.clip(jax.image.resize(image, size, "cubic", antialias=True), 0, 1)
    top, left = (round((x - side) / 2) for x in (height, width))
    return image[top : top + side, left : left + side]


def middle(image: Array, side: int) -> Array:
    """The middle square of `[H, W, 3]`; an odd pixel is cut from the end."""
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return image[top : top + side, left : left + side]
