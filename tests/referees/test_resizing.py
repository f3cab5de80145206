"""Pictures to views: like Pillow, transformers and torchvision, in files and in programs alike."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from referee_jax.referees import clip, image_reward, resizing
from tests.conftest import picture
from tests.lazy import transformers
from tests.oracles import networks

CLIP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "resample": 3}
OLDER = {"size": 32, "crop_size": 32, "do_center_crop": True, "resample": 3}  # as OpenAI's directories have it
SQUARE = {"size": {"height": 36, "width": 36}}
SIZES = [(64, 64), (61, 32), (40, 75), (31, 47), (20, 20)]


def photo(height, width):
    return PIL.Image.fromarray(np.round(255 * picture(height=height, width=width)).astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "settings", "shape"),
    [
        ("CLIPImageProcessorPil", CLIP, "floored"),
        ("CLIPImageProcessorPil", OLDER, "floored"),
        ("CLIPImageProcessorPil", CLIP | {"size": {"shortest_edge": 40}, "resample": 2}, "floored"),
        ("SiglipImageProcessorPil", SQUARE | {"resample": 2}, resizing.SQUASHED),
        ("BlipImageProcessorPil", SQUARE, resizing.SQUASHED),
        ("BlipImageProcessorPil", {"size": 36, "resample": 1}, resizing.SQUASHED),
        ("EfficientNetImageProcessorPil", networks.align_processor(33, 40).to_dict(), resizing.SQUASHED),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_as_the_checkpoints_processor(name, settings, shape, size):
    image, fitting = photo(*size), resizing.fitting(settings, 8, shape)
    processor = getattr(transformers, name)(**settings)
    plain = {"do_rescale": False, "do_normalize": False} | ({"include_top": False} if "Eff" in name else {})
    wanted = processor(image, return_tensors="np", **plain)["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(255 * fitting.of_picture(image), wanted, atol=1e-4)


@pytest.mark.parametrize("shape", ["squashed", "rounded", "floored", "letterboxed"])
@pytest.mark.parametrize("method", resizing.METHODS)
@pytest.mark.parametrize("is_exact", [False, True])
def test_a_program_sees_what_is_in_the_file(shape, method, is_exact):
    """Bit by bit where Pillow rounds."""
    fitting = resizing.Fitting(
        side=32, resized=36 if shape == "floored" else 32, shape=shape, method=method, is_exact=is_exact
    )
    for image in map(photo, *zip((50, 50), (40, 75), (24, 30), strict=True)):
        made = jax.jit(fitting)(np.asarray(image) / np.float32(255))
        wanted = fitting.of_picture(image)
        assert made.shape == wanted.shape == (32, 32, 3) and wanted.dtype == np.float32
        np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-6)


def test_a_view_stays_as_it_is():
    view = jnp.asarray(picture(height=32, width=32))
    for shape in ("squashed", "rounded", "floored", "letterboxed", "padded"):
        assert (resizing.Fitting(side=32, resized=32, shape=shape)(view) == view).all()


@pytest.mark.parametrize(
    ("size", "rounded", "floored"),
    [
        ((427, 640), (0, 56), (0, 55)),
        ((640, 427), (56, 0), (55, 0)),
        ((130, 100), (34, 0), (33, 0)),
        ((224, 231), (0, 4), (0, 3)),
        ((227, 224), (2, 0), (1, 0)),
        ((31, 47), (0, 58), (0, 57)),
        ((640, 429), (55, 0), (55, 0)),
        ((333, 500), (0, 56), (0, 56)),
        ((512, 511), (0, 0), (0, 0)),
    ],
)
def test_where_the_middle_is(size, rounded, floored):
    """torchvision rounds, which CLIP's, CLIPScore's and ImageReward's authors ask; transformers, PickScore's, cuts off."""
    short = min(size)
    height, width = (224 * x // short for x in size)
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    for shape, wanted in (("rounded", rounded), ("floored", floored)):
        fitting = resizing.Fitting(side=224, resized=224, shape=shape)
        assert tuple(fitting._square(places)[0, 0]) == wanted
    assert (clip.ClipReferee.shape, image_reward.Reward.shape, clip.PickScore.shape) == (
        "rounded",
        "rounded",
        "floored",
    )


def test_what_a_square_size_says():
    """Of CLIP's processor, to squash; HPSv2 knows no other way than its own."""
    shapes = {shape: resizing.fitting(SQUARE, 8, shape).shape for shape in ("rounded", "floored", "letterboxed")}
    assert shapes == {"rounded": "squashed", "floored": "squashed", "letterboxed": "letterboxed"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"height": 32, "width": 36}}, "size={'height': 32, 'width': 36} is not implemented"),
        ({"size": {"longest_edge": 36}}, "size={'longest_edge': 36} is not implemented"),
        ({"crop_size": 33}, "crop_size=33 is more than size=32"),
        ({"resample": 4}, "resample=4 is not implemented; supported: "),
    ],
)
def test_what_is_not_implemented(changes, message):
    with pytest.raises(ValueError, match=message):
        resizing.fitting(CLIP | changes, 32, "rounded")
