"""The weight engine: both directions, and each of the four checks."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from referee_jax.models import layers
from referee_jax.weights import convert
from tests.lazy import torch


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.norm = layers.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.fc = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.fc(self.norm(x))


class Net(nnx.Module):
    """One leaf of each kind, a list, a stack, a stack of stacks, a scalar."""

    def __init__(self, width, depth, kernel, *, rngs):
        self.embed = nnx.Embed(5, width, rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 2, width)))
        self.scale = nnx.Param(jnp.zeros(()))
        first, second = nnx.Conv(3, width, (kernel, kernel + 1), rngs=rngs), nnx.Conv(width, 2, (1,), rngs=rngs)
        self.convs = nnx.List([first, second])
        self.norm = layers.GroupNorm(1, width, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(width, 3, rngs=rngs)
        self.absent = None
        self.layers = layers.stack(lambda rngs: Block(width, rngs=rngs), depth, rngs)
        inner = lambda rngs: Pair(width, rngs=rngs)
        self.pairs = layers.stack(inner, depth, rngs)


class Pair(nnx.Module):
    def __init__(self, width, *, rngs):
        self.two = layers.stack(lambda rngs: Block(width, rngs=rngs), 2, rngs)


def abstract(width=4, depth=3, kernel=2):
    return nnx.eval_shape(lambda: Net(width, depth, kernel, rngs=nnx.Rngs(0)))


def drawn(module, seed=0):
    """`module` with every leaf drawn from a normal distribution."""
    leaves, structure = jax.tree.flatten(module)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves])


@pytest.fixture
def tensors():
    return convert.export(drawn(abstract()))


def test_names_and_shapes_are_the_checkpoints(tensors):
    shapes = {name: x.shape for name, x in tensors.items()}
    blocks = {f"layers.{n}" for n in range(3)} | {f"pairs.{n}.two.{m}" for n in range(3) for m in range(2)}
    expected = {
        "embed.weight": (5, 4),
        "token": (1, 2, 4),
        "scale": (),
        "convs.0.weight": (4, 3, 2, 3),
        "convs.0.bias": (4,),
        "convs.1.weight": (2, 4, 1),
        "convs.1.bias": (2,),
        "norm.weight": (4,),
        "norm.bias": (4,),
        "head.weight": (3, 4),
        "head.bias": (3,),
    }
    for block in blocks:
        expected |= {f"{block}.norm.weight": (4,), f"{block}.norm.bias": (4,), f"{block}.fc.weight": (4, 4)}
    assert shapes == expected


def test_layouts_compute_what_torch_computes(tensors):
    module = convert.fill(abstract(), tensors, dtype=jnp.float32)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 6, 7, 3)).astype(np.float32)
    weight, bias = (torch.from_numpy(tensors[f"convs.0.{n}"]) for n in ("weight", "bias"))
    theirs = torch.nn.functional.conv2d(torch.from_numpy(x).permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)
    ours = module.convs[0](x)[:, :5, 1:6]  # without the borders, which "SAME" pads
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)

    x = rng.normal(size=(2, 4)).astype(np.float32)
    weight, bias = (torch.from_numpy(tensors[f"head.{n}"]) for n in ("weight", "bias"))
    theirs = torch.nn.functional.linear(torch.from_numpy(x), weight, bias)
    np.testing.assert_allclose(module.head(x), theirs.numpy(), rtol=1e-5, atol=1e-5)

    theirs = torch.from_numpy(x)
    for n in range(3):
        norm = [torch.from_numpy(tensors[f"layers.{n}.norm.{name}"]) for name in ("weight", "bias")]
        normed = torch.nn.functional.layer_norm(theirs, (4,), *norm, eps=1e-5)
        theirs = theirs + torch.nn.functional.linear(normed, torch.from_numpy(tensors[f"layers.{n}.fc.weight"]))
    np.testing.assert_allclose(layers.scan_layers(module.layers, jnp.asarray(x)), theirs.numpy(), rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9))
def test_export_and_fill_are_inverse(width, depth, kernel, seed):
    module = drawn(abstract(width, depth, kernel), seed)
    back = convert.fill(abstract(width, depth, kernel), convert.export(module), dtype=jnp.float32)
    assert jax.tree.structure(back) == jax.tree.structure(module)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(module), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dtype_is_cast_and_scalars_stay_float32(tensors):
    half = {name: x.astype(np.float16) for name, x in tensors.items()}
    module = convert.fill(abstract(), half, dtype=jnp.bfloat16)
    assert module.scale.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(module) if x.ndim} == {jnp.dtype(jnp.bfloat16)}
    assert layers.float_dtype(module) == jnp.bfloat16
    np.testing.assert_array_equal(module.token[...], half["token"].astype(ml_dtypes.bfloat16))
    assert convert.export(module)["token"].dtype == jnp.bfloat16


def test_each_tensor_is_read_once(tensors):
    reads = []

    class Lazy(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    convert.fill(abstract(), Lazy(tensors), dtype=jnp.float32)
    assert sorted(reads) == sorted(tensors)


def test_missing_tensor_is_named(tensors):
    del tensors["layers.1.fc.weight"]
    with pytest.raises(convert.WeightsError, match=r"^parameters without a tensor: layers\.1\.fc\.weight$"):
        convert.fill(abstract(), tensors, dtype=jnp.float32)


def test_surplus_tensor_is_named_unless_ignored(tensors):
    tensors["embed.position_ids"] = np.arange(3)
    with pytest.raises(convert.WeightsError, match=r"^tensors that no parameter takes: embed\.position_ids$"):
        convert.fill(abstract(), tensors, dtype=jnp.float32)
    module = convert.fill(abstract(), tensors, dtype=jnp.float32, ignore=["*.position_ids"])
    np.testing.assert_array_equal(module.embed.embedding[...], tensors["embed.weight"])


def test_layer_beyond_the_depth_is_surplus(tensors):
    with pytest.raises(convert.WeightsError, match=r"no parameter takes: .*layers\.2\.fc\.weight"):
        convert.fill(abstract(depth=2), tensors, dtype=jnp.float32)


def test_two_sources_of_one_parameter_are_named(tensors):
    tensors["old.head.bias"] = tensors["head.bias"]
    message = r"^parameters filled twice: head\.bias from head\.bias and old\.head\.bias$"
    with pytest.raises(convert.WeightsError, match=message):
        convert.fill(abstract(), tensors, dtype=jnp.float32, renames=[(r"^old\.", "")])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("head.weight", (4, 3), r"^head\.weight has shape \(4, 3\), .* takes \(3, 4\) \(\(4, 3\) in the network\)$"),
        ("convs.0.weight", (4, 3, 3, 2), r"has shape \(4, 3, 3, 2\), .* takes \(4, 3, 2, 3\) \(\(2, 3, 3, 4\) in the"),
        ("layers.2.norm.bias", (1,), r"^layers\.2\.norm\.bias has shape \(1,\), but .* takes \(4,\)"),
        ("scale", (1,), r"^scale has shape \(1,\), but scale takes \(\)"),
    ],
)
def test_wrong_shape_is_named_with_both_shapes(tensors, name, shape, message):
    tensors[name] = np.zeros(shape, np.float32)
    with pytest.raises(convert.WeightsError, match=message):
        convert.fill(abstract(), tensors, dtype=jnp.float32)


def test_renames_apply_in_order(tensors):
    source = {"tower." + name.replace("head.", "classifier."): x for name, x in tensors.items()}
    source["other.weight"] = np.zeros(2)
    renames = [(r"classifier\.", "top."), (r"\.top\.", ".head."), (r"^tower\.", "")]
    module = convert.fill(abstract(), source, dtype=jnp.float32, renames=renames, ignore=["other.*"])
    for name, x in convert.export(module).items():
        np.testing.assert_array_equal(x, tensors[name])
