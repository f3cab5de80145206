"""Files of weights: types of numbers, and files under other names."""

import json

import ml_dtypes
import numpy as np
import pytest

from referee_jax.weights import load, tensors
from tests.lazy import torch


def write(file, kind, data, shape):
    """A safetensors file of the tensor `w`, and one before it."""
    header = {"v": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    header["w"] = {"dtype": kind, "shape": shape, "data_offsets": [3, 3 + len(data)]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"abc" + data)
    return tensors.Tensors(file.parent, file.stem)


@pytest.mark.parametrize("kind", tensors.NARROW)
def test_floats_of_a_byte(kind, tmp_path):
    """All values of each type, as torch reads them; what is not finite stays so."""
    data = bytes(range(256))
    x = write(tmp_path / "model.safetensors", kind, data, [16, 16])["w"]
    name = tensors.NARROW[kind].__name__
    exact = torch.frombuffer(bytearray(data), dtype=getattr(torch, name)).float().numpy().reshape(16, 16)
    np.testing.assert_array_equal(x, exact)
    assert x.dtype == np.float32 and np.isnan(x).any()


@pytest.mark.parametrize(
    ("kind", "bits", "known"),
    [("F4", 4, True), ("F6_E2M3", 6, True), ("F6_E3M2", 6, True), ("F8_E8M0", 8, True), ("F3_NEW", 8, False)],
)
def test_types_that_are_not_read(kind, bits, known, tmp_path):
    """One sentence with file, tensor, type and remedy; also for a type that is newer than the library."""
    file = tmp_path / "model.safetensors"
    with pytest.raises(load.WeightsError) as caught:
        write(file, kind, bytes(2 * bits), [4, 4])["w"]
    reason = "not read; " if known else "the library safetensors does not know: update it, or "
    message = f"{file}: w is of the type {kind}, which {'is ' if known else ''}{reason}save the checkpoint in float32"
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_network_in_floats_of_a_byte(directory, published):
    file = directory / "model.safetensors"
    source = load.Tensors(published[1], "model")
    header, data = {}, b""
    for name, x in source.items():
        part = x.astype(ml_dtypes.float8_e4m3fn).tobytes()
        header[name] = {"dtype": "F8_E4M3", "shape": x.shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    network, exact = load.load("clip", directory), load.load("clip", published[1])
    a, b = network.visual_projection.kernel, exact.visual_projection.kernel
    np.testing.assert_array_equal(a[...], np.asarray(b[...]).astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
