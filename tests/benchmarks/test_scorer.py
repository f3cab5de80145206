"""Many images with texts of their own give what each gives by itself."""

import numpy as np
import PIL.Image
import pytest

from referee_jax import config, referees
from referee_jax.benchmarks import scorer as scorer_lib
from tests.oracles import networks

TEXTS = (("a red circle", "a blue square"), ("a green square",), ("a red square", "a photo"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    networks.save_clip(path)
    return referees.load_referee(config.RefereeSpec(checkpoint=str(path), losses={}))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    sizes = ((50, 40), (32, 32), (33, 70))
    return [PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def test_as_one_by_one(judge, images):
    scorer = scorer_lib.Scorer(judge, texts=2, batch_size=1)
    assert scorer.batch_size == 8  # devices
    made = scorer(images, TEXTS)
    wanted = [judge.score([image], texts)[0] for image, texts in zip(images, TEXTS, strict=True)]
    assert [len(own) for own in made] == [2, 1, 2]
    flat = lambda rows: [score["cosine"] for own in rows for score in own]
    np.testing.assert_allclose(flat(made), flat(wanted), atol=1e-5)
    assert np.ptp(flat(made)) > 1e-2


def test_what_does_not_fit_is_refused(judge, images):
    scorer = scorer_lib.Scorer(judge, batch_size=2, devices=None)
    for number, texts, message in (
        (1, [("a", "b")], "2 texts for an image, 1 to 1 are possible"),
        (1, [()], "0 texts"),
        (2, [("a",)], "2 images and 1 lists"),
        (0, [], "0 images"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer(images[:number], texts)
