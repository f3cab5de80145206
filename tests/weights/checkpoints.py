"""Edits of checkpoint directories, and assertions about the result."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from referee_jax.weights import load


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file, change):
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def fails(directory, message, kind="clip"):
    with pytest.raises(load.WeightsError, match=message) as caught:
        load.load(kind, directory)
    assert str(directory) in str(caught.value)
