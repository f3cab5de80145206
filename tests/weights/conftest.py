"""Directories as transformers and diffusers write them."""

import shutil

import pytest

from tests.oracles import networks


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """`(Stable Diffusion, CLIP)` directories as the libraries write them; not to be changed."""
    return networks.save(tmp_path_factory.mktemp("published"))


@pytest.fixture
def directory(published, tmp_path):
    """A CLIP directory to spoil."""
    return shutil.copytree(published[1], tmp_path / "clip")
