"""Image files: lossless, with the settings they were made from."""

import numpy as np
import pytest
from PIL import Image

from referee_jax.storage import images
from tests import conftest

SETTINGS = {"text": 'the "café" / 🙂 \x00\ud800', "scores": {"x": float("nan"), "y": np.float32(0.5)}, "steps": 25}


@pytest.mark.parametrize("ending", images.ENCODERS)
def test_pixels_and_settings_come_back(tmp_path, ending):
    file, pixels = tmp_path / f"x.{ending}", images.to_uint8(conftest.picture())
    file.write_bytes(images.ENCODERS[ending](pixels, SETTINGS))
    np.testing.assert_array_equal(np.asarray(images.read_image(file)), pixels)
    assert images.read_settings(file) == SETTINGS | {"scores": {"x": None, "y": 0.5}}
    with Image.open(file) as image:
        assert (image.format, image.mode) == (ending.upper(), "RGB")


@pytest.mark.parametrize("ending", images.ENCODERS)
def test_a_png_of_any(tmp_path, ending):
    """For programs that read only PNGs."""
    file, pixels = tmp_path / f"x.{ending}", images.to_uint8(conftest.picture())
    file.write_bytes(images.ENCODERS[ending](pixels, SETTINGS))
    (tmp_path / "y.png").write_bytes(images.read_png(file))
    assert (tmp_path / "y.png").read_bytes() == images.encode_png(pixels, SETTINGS)


@pytest.mark.parametrize("ending", images.ENCODERS)
def test_images_of_others(tmp_path, ending):
    file = tmp_path / f"bare.{ending}"
    Image.new("RGB", (8, 8)).save(file)
    with pytest.raises(ValueError, match=rf"bare.{ending} was not written by referee_jax"):
        images.read_settings(file)


def test_what_is_no_image(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"x.png cannot be read as an image: cannot identify image file$"):
        images.read_image(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"y.png cannot be read as an image: No such file or directory"):
        images.read_image(tmp_path / "y.png")


def test_the_largest_webp():
    wide = np.zeros((1, 16383, 3), np.uint8)
    assert images.encode_webp(wide, {})
    with pytest.raises(ValueError):
        images.encode_webp(np.zeros((1, 16384, 3), np.uint8), {})


def test_stretch():
    image = np.array([[[0.25, 0.5, 0.75]]], np.float32)
    assert images.to_uint8(image).tolist() == [[[64, 128, 191]]]
    assert images.to_uint8(image, stretch=True).tolist() == [[[0, 128, 255]]]
    assert images.to_uint8(np.full((1, 1, 3), 0.5), stretch=True).tolist() == [[[0, 0, 0]]]
    assert images.to_uint8(np.array([[[-3, 2, np.inf]]])).tolist() == [[[0, 255, 0]]]


def test_animation(tmp_path):
    frames = [np.full((16, 16, 3), value, np.uint8) for value in (0, 100, 200)]
    file = tmp_path / "x.webp"
    file.write_bytes(images.encode_animation(frames))
    with Image.open(file) as image:
        assert (image.format, image.n_frames, image.size) == ("WEBP", 3, (16, 16))
        for n, value in enumerate((0, 100, 200)):
            image.seek(n)
            assert abs(np.asarray(image.convert("RGB"), int) - value).max() <= 3
    file.write_bytes(images.encode_animation(frames[:1]))
    assert Image.open(file).size == (16, 16)
