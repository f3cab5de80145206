"""The load test, in small: it runs, and its figures mean something."""

import pytest

from tests.tools import load_test


@pytest.mark.parametrize("form", ["png", "webdataset"])
def test_measure(tmp_path, form):
    found = load_test.measure(60, engine="fake", form=form, image_size=None, shard_size=25, workdir=tmp_path / "run")
    assert (found["code"], found["done"]) == (0, 60)
    assert found["images_per_second"] > 1 and min(found["peak_megabytes"]) > 10
    assert len(list((tmp_path / "run" / "shards").glob("*.tar"))) == (3 if form == "webdataset" else 0)
