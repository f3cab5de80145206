"""Image files: PNG and lossless WebP with the settings they were made from, and animations.

A PNG has its settings in a text chunk, a WebP in the EXIF user comment. `read_settings` reads both,
also from shards.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from referee_jax.storage import files, shards

CHUNK = "referee_jax"  # keyword of the PNG text chunk; EXIF software of a WebP
COMMENT = b"ASCII\0\0\0"  # prefix of an EXIF user comment

Picture = str | os.PathLike | np.ndarray | Image.Image  # what `picture` takes


def to_uint8(image: np.ndarray, *, stretch: bool = False) -> np.ndarray:
    """An image in [0, 1] as uint8, not finite values as 0. `stretch` maps its range to 0..255."""
    image = np.nan_to_num(np.asarray(image, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    if stretch:
        low, high = image.min(), image.max()
        image = (image - low) / max(high - low, 1e-12)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def encode_png(image: np.ndarray, settings: Mapping[str, Any]) -> bytes:
    """A PNG of uint8 `[H, W, 3]` with `settings` as JSON in its text chunk."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, json.dumps(files.finite(settings)))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def encode_webp(image: np.ndarray, settings: Mapping[str, Any]) -> bytes:
    """A lossless WebP of uint8 `[H, W, 3]`, sides up to 16383, with `settings` as JSON in EXIF."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = CHUNK
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = COMMENT + json.dumps(files.finite(settings)).encode()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, exif=exif)
    return buffer.getvalue()


ENCODERS = {"png": encode_png, "webp": encode_webp}  # by file name suffix


def encode_animation(frames: Sequence[np.ndarray]) -> bytes:
    """An animated WebP of uint8 frames `[H, W, 3]`; the last is shown for 1.5 s."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    durations = [100] * len(rest) + [1500]
    first.save(buffer, "WEBP", save_all=True, append_images=rest, duration=durations, loop=0, quality=90)
    return buffer.getvalue()


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any of Pillow's modes as RGB and the right way up, as viewers show it."""
    is_wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # Pillow 10 says I
    image = ImageOps.exif_transpose(image)
    if is_wide:  # Pillow would cut values at 255
        image = Image.fromarray(np.round(np.asarray(image, np.float32) / 257).astype(np.uint8))
    elif image.mode == "La":  # of this mode Pillow converts to no other
        image = image.convert("LA")
    return image.convert("RGB")


def picture(image: Picture) -> Image.Image:
    """A file or shard, an array or a picture of Pillow as RGB.

    An array is `[H, W]`, `[H, W, 3]` or `[H, W, 4]`, uint8 or floats in [0, 1]. Raises ValueError for
    another, and for a file that cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        return as_rgb(image)
    pixels = np.asarray(image)
    is_float = pixels.dtype.kind == "f" or pixels.dtype.name == "bfloat16"
    if not (is_float or pixels.dtype == np.uint8) or not (pixels.ndim == 2 or pixels.shape[2:] in ((3,), (4,))):
        raise ValueError(
            f"an image of {pixels.dtype} {list(pixels.shape)}: give a file, a picture of Pillow, or an array [H, W, 3] of "
            "uint8 or of floats in [0, 1]"
        )
    return as_rgb(Image.fromarray(to_uint8(pixels) if is_float else pixels))


def read_image(file: str | os.PathLike) -> Image.Image:
    """The image in a file or shard as RGB. ValueError if it cannot be read."""
    try:
        with Image.open(io.BytesIO(shards.read_bytes(Path(file)))) as image:
            return as_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # PIL's message names the buffer, not the file.
        reason = getattr(error, "strerror", None) or str(error).partition(" <_io.")[0]
        raise ValueError(f"{file} cannot be read as an image: {reason}") from error


def read_png(file: Path) -> bytes:
    """The image in a file or shard as a PNG with its settings."""
    data = shards.read_bytes(file)
    if file.suffix != ".webp":
        return data
    return encode_png(np.asarray(read_image(file)), read_settings(file))


def read_settings(file: str | os.PathLike) -> dict[str, Any]:
    """Prompt (`text`), sample, seed, scores, settings in an image file. ValueError if missing."""
    with Image.open(io.BytesIO(shards.read_bytes(Path(file)))) as image:
        text = getattr(image, "text", {}).get(CHUNK)
        exif = image.getexif() if image.format == "WEBP" else {}
        if exif.get(ExifTags.Base.Software) == CHUNK:
            text = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment].removeprefix(COMMENT)
    if text is None:
        raise ValueError(f"{file} was not written by referee_jax: it has no text chunk or comment {CHUNK!r}")
    return json.loads(text)
