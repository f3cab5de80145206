"""Image files: lossless, with the settings they were made from."""

import numpy as np
import pytest
from PIL import ExifTags, Image

from referee_jax.storage import images
from tests import conftest
from tests.lazy import transformers

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


MODES = ("1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "I", "F")


@pytest.mark.parametrize("mode", MODES)
def test_all_modes_of_pillow(mode):
    """As the processors of checkpoints convert them."""
    through = {"PA": "P", "RGBa": "RGBA"}.get(mode, "RGB")
    image = Image.fromarray(images.to_uint8(conftest.picture())).convert(through)
    image = Image.merge("LAB", image.split()) if mode == "LAB" else image.convert(mode)
    assert image.mode == mode
    made = images.picture(image)
    np.testing.assert_array_equal(np.asarray(made), np.asarray(transformers.image_utils.load_image(image)))
    assert made.mode == "RGB" and np.ptp(np.asarray(made)) > 200


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_grey_of_16_bits(mode):
    """Scaled; what Pillow's conversion gives is white."""
    values = np.array([[0, 128, 129, 257], [30000, 65000, 65406, 65535]], np.uint16)
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (4, 2), values.astype(order).tobytes())
    wanted = [[0, 0, 1, 1], [117, 253, 254, 255]]
    np.testing.assert_array_equal(np.asarray(images.picture(image)), np.repeat(np.array(wanted)[..., None], 3, 2))


def test_grey_with_alpha_multiplied():
    image = Image.new("LA", (2, 2), (100, 255)).convert("La")
    assert images.picture(image).getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_right_way_up(tmp_path, turn, form):
    """A photograph is turned as its EXIF orientation says, as transformers' processors are given it."""
    exif, file = Image.Exif(), tmp_path / "x"
    exif[ExifTags.Base.Orientation] = turn
    Image.fromarray(images.to_uint8(conftest.picture(height=20, width=30))).save(file, form, exif=exif)
    wanted = transformers.image_utils.load_image(str(file))
    assert wanted.size == ((30, 20) if turn < 5 else (20, 30))
    np.testing.assert_array_equal(np.asarray(images.read_image(file)), np.asarray(wanted))


def test_pictures_of_all_kinds(tmp_path):
    pixels = images.to_uint8(conftest.picture())
    Image.fromarray(pixels).save(tmp_path / "x.png")
    for kind in (
        str(tmp_path / "x.png"),
        tmp_path / "x.png",
        pixels,
        Image.fromarray(pixels),
        pixels / np.float32(255),
    ):
        np.testing.assert_array_equal(np.asarray(images.picture(kind)), pixels)
    assert images.picture(pixels[..., 0]).getpixel((0, 0)) == (pixels[0, 0, 0],) * 3
    for wrong in (pixels.astype(np.int32), pixels[None], pixels[..., :2]):
        with pytest.raises(ValueError, match=r"an image of \w+ \[.*\]: give a file, a picture of Pillow, or an array"):
            images.picture(wrong)


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
