"""Pictures to the square view that a referee reads, by the rules of its checkpoint's authors.

A `Fitting` holds the rules once, for files and for arrays of a compiled program. What Pillow does to a
picture of 8 bits, the program does with the same numbers: rows, then columns (Pillow 13 takes columns
first where a picture is more than twice as high as wide), each a sum of whole numbers, rounded to 8 bits.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax import Array

METHODS = (1, 2, 3)  # Pillow's numbers: Lanczos, linear, cubic
BITS = 22  # of Pillow's weights, behind the point
SQUASHED = "squashed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitting:
    """How a picture of any size becomes a view.

    Attributes:
        side: of the view, in pixels.
        resized: side of what the picture is resized to, of which the view is the middle.
        shape: what is done to one that is not square: "squashed" to a square; "rounded", its middle,
            as torchvision cuts it; "floored", as transformers cuts it, a pixel higher or
            further left for a quarter of all sizes; "letterboxed", black put beside it; "padded",
            `colour` put beside it before it is resized.
        method: Pillow's number of the filter.
        is_exact: whether pixels are not rounded to 8 bits.
        colour: of what is put beside a "padded" picture, 0 to 255.
    """

    side: int
    resized: int
    shape: str = SQUASHED
    method: int = PIL.Image.Resampling.BICUBIC
    is_exact: bool = False
    colour: tuple[int, int, int] = (0, 0, 0)

    def at(self, side: int) -> "Fitting":
        """The same for views of another size."""
        return dataclasses.replace(self, side=side, resized=round(side * self.resized / self.side))

    def __call__(self, image: Array) -> Array:
        """`[H, W, 3]` in [0, 1] to `[side, side, 3]`, in a program; one of the view's size stays as it is.

        Its gradient is that without rounding.
        """
        height, width = image.shape[:2]
        if self.shape == "padded" and height != width:
            colour = jnp.asarray(self.colour, jnp.float32) / 255
            left, top, length = self._margins(height, width)
            square = jnp.broadcast_to(colour, (length, length, 3))
            image = square.at[top : top + height, left : left + width].set(image)
        height, width = self.size(*image.shape[:2])
        for axis, length in ((1, width), (0, height)):
            if image.shape[axis] != length:
                image = _resampled(image, length, axis, self.method, self.is_exact)
        return self._square(image)

    def of_picture(self, picture: PIL.Image.Image) -> np.ndarray:
        """An RGB picture to float32 `[side, side, 3]` in [0, 1], by Pillow."""
        if self.shape == "padded":
            left, top, length = self._margins(picture.height, picture.width)
            square = PIL.Image.new("RGB", (length, length), self.colour)
            square.paste(picture, (left, top))
            picture = square
        height, width = self.size(picture.height, picture.width)
        if self.is_exact:  # Pillow does not round where a channel is a picture of floats
            bands = [band.convert("F").resize((width, height), self.method) for band in picture.split()]
            pixels = np.stack([np.asarray(band) for band in bands], axis=-1)
        else:
            pixels = np.asarray(picture.resize((width, height), self.method), np.float32)
        return self._square(pixels / np.float32(255))

    def _margins(self, height: int, width: int) -> tuple[int, int, int]:
        """Columns and rows before a picture in the middle of a square, and the square's side."""
        length = max(height, width)
        return (length - width) // 2, (length - height) // 2, length

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing."""
        if self.shape == SQUASHED:
            return self.resized, self.resized
        if self.shape == "letterboxed":
            return tuple(round(x * self.resized / max(height, width)) for x in (height, width))
        return tuple(x * self.resized // min(height, width) for x in (height, width))

    def _square(self, image: Any) -> Any:
        """The middle of an array `[h, w, 3]` of either kind, or all of it with black beside it."""
        if self.shape == "letterboxed":
            margins = [((self.side - x) // 2, (self.side - x + 1) // 2) for x in image.shape[:2]]
            return (jnp if isinstance(image, jax.Array) else np).pad(image, (*margins, (0, 0)))
        cut = (lambda x: round(x / 2)) if self.shape == "rounded" else (lambda x: x // 2)
        top, left = (cut(x - self.side) for x in image.shape[:2])
        return image[top : top + self.side, left : left + self.side]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole(Fitting):
    """All of a picture, in its ratio of sides: these become multiples of `factor`, as Qwen's `smart_resize` has it.

    Attributes:
        side: of the views of a run.
        factor: what both sides are multiples of.
        least, most: pixels of a picture.
    """

    factor: int
    least: int
    most: int

    def at(self, side: int) -> "Whole":
        """The same: sizes are those of the picture."""
        return self

    def size(self, height: int, width: int) -> tuple[int, int]:
        size = tuple(round(x / self.factor) * self.factor for x in (height, width))
        if math.prod(size) > self.most:
            scale = math.sqrt(height * width / self.most)
            return tuple(max(1, math.floor(x / scale / self.factor)) * self.factor for x in (height, width))
        if math.prod(size) < self.least:
            scale = math.sqrt(self.least / (height * width))
            return tuple(math.ceil(x * scale / self.factor) * self.factor for x in (height, width))
        return size

    def _square(self, image: Any) -> Any:
        return image


@functools.lru_cache
def _weights(old: int, new: int, method: int, one: float) -> tuple[np.ndarray, np.ndarray]:
    """What each of `new` pixels is made of, `[new, taps]`: places int32, and Pillow's weights, of an impulse of `one`."""
    impulses = np.eye(old, dtype=np.int32 if isinstance(one, int) else np.float32) * one
    matrix = np.asarray(PIL.Image.fromarray(impulses).resize((new, old), method)).T
    places = np.argsort(matrix == 0, axis=1, kind="stable")[:, : (matrix != 0).sum(1).max()].astype(np.int32)
    return places, np.take_along_axis(matrix, places, axis=1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _resampled(image: Array, new: int, axis: int, method: int, is_exact: bool) -> Array:
    """`[H, W, 3]` with `new` pixels along an axis."""
    if is_exact:
        return _exact(image, new, axis, method)
    places, weights = map(jnp.asarray, _weights(image.shape[axis], new, method, 1 << BITS))
    # In two halves, whose sums float32 holds exactly: no order of them and no device rounds otherwise.
    pixels, half = jnp.round(255 * image), BITS // 2
    parts = weights >> half, weights & ((1 << half) - 1)
    high, low = (_mixed(places, x, pixels, axis).astype(jnp.int32) for x in parts)
    whole = (high << half) + low + (1 << (BITS - 1))
    return jnp.clip(whole >> BITS, 0, 255).astype(jnp.float32) / 255


@_resampled.defjvp
def _resampled_jvp(new: int, axis: int, method: int, is_exact: bool, primals: tuple, tangents: tuple) -> tuple:
    return _resampled(*primals, new, axis, method, is_exact), _exact(*tangents, new, axis, method)


def _exact(image: Array, new: int, axis: int, method: int) -> Array:
    places, weights = map(jnp.asarray, _weights(image.shape[axis], new, method, 1.0))
    return _mixed(places, weights, image, axis)


def _mixed(places: Array, weights: Array, pixels: Array, axis: int) -> Array:
    # The matrix is made in the program: as a constant it would be most of it.
    here = places[:, :, None] == jnp.arange(pixels.shape[axis])
    matrix = jnp.where(here, weights[:, :, None], 0).sum(1, dtype=jnp.float32)
    return jnp.moveaxis(jnp.tensordot(matrix, pixels, axes=(1, axis), precision="highest"), 0, axis)


def fitting(preprocessing: Mapping, side: int, shape: str = SQUASHED, **other: Any) -> Fitting:
    """The rules of a preprocessor_config.json; where it is silent, those of transformers' class.

    Args:
        preprocessing: its contents.
        side: of the network's pictures, where it names no size.
        shape: of `Fitting`, where the ratio of sides is kept.
        other: `is_exact` and `colour` of `Fitting`.

    Raises ValueError for what is not implemented.
    """
    size, crop = preprocessing.get("size", side), preprocessing.get("crop_size")
    if isinstance(size, int):  # as transformers wrote it before 4.26
        size = {"height": size, "width": size} if shape == SQUASHED else {"shortest_edge": size}
    if size.keys() == {"shortest_edge"} and shape != SQUASHED:
        resized, is_cropped = size["shortest_edge"], preprocessing.get("do_center_crop", True)
    else:
        resized, is_cropped = _side("size", size), preprocessing.get("do_center_crop", False)
        # HPSv2 and VQAScore pad, whatever a file beside them says.
        shape = shape if shape in ("letterboxed", "padded") else SQUASHED
    side = _side("crop_size", crop) if is_cropped and crop else resized
    if side > resized:
        raise ValueError(f"preprocessor_config.json: crop_size={side} is more than size={resized}")
    return Fitting(side=side, resized=resized, shape=shape, method=_method(preprocessing), **other)


def whole(preprocessing: Mapping, factor: int, *, side: int, least: int, most: int) -> Whole:
    """The rules of a preprocessor_config.json with Qwen's limits.

    Args:
        preprocessing: its contents.
        factor: of `Whole`.
        side: of the views of a run, brought within the limits.
        least, most: pixels of a picture, where it names none.

    Raises ValueError for what is not implemented.
    """
    size = preprocessing.get("size") or {}
    least = preprocessing.get("min_pixels") or size.get("shortest_edge", least)
    most = preprocessing.get("max_pixels") or size.get("longest_edge", most)
    rules = Whole(side=side, resized=side, method=_method(preprocessing), factor=factor, least=least, most=most)
    side = rules.size(side, side)[0]
    return dataclasses.replace(rules, side=side, resized=side)


def _method(preprocessing: Mapping) -> int:
    method = preprocessing.get("resample", PIL.Image.Resampling.BICUBIC)
    if method not in METHODS:
        raise ValueError(f"preprocessor_config.json: resample={method} is not implemented; supported: {METHODS}")
    return method


def _side(name: str, size: Mapping | int) -> int:
    if isinstance(size, int):
        return size
    if size.keys() != {"height", "width"} or size["height"] != size["width"]:
        raise ValueError(f"preprocessor_config.json: {name}={size} is not implemented; supported: height = width")
    return size["height"]
