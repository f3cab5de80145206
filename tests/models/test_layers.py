"""What the networks share: activations, norms, and what is kept for the backward pass."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from referee_jax.hardware import chips
from referee_jax.models import clip, layers
from referee_jax.performance import flops as flops_lib
from tests.lazy import torch


class Layer(nnx.Module):
    """Pre-norm network of two products, one of which feeds a nonlinearity."""

    def __init__(self, width, *, rngs):
        self.norm = layers.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.mlp = clip.MLP(width, 4 * width, "gelu", rngs=rngs)

    def __call__(self, x):
        return x + self.mlp(self.norm(x))


@pytest.fixture(scope="module")
def stack():
    return layers.stack(lambda rngs: Layer(8, rngs=rngs), 5, nnx.Rngs(0))


X = jax.random.normal(jax.random.key(1), (3, 8))


def test_gelu():
    x = np.linspace(-8, 8, 999, dtype=np.float32)
    np.testing.assert_allclose(
        layers.exact_gelu(x), torch.nn.functional.gelu(torch.from_numpy(x)), rtol=1e-5, atol=1e-6
    )
    assert layers.exact_gelu(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16


NORMS = {
    "layer": (lambda: layers.LayerNorm(8, epsilon=1e-5, rngs=nnx.Rngs(0)), lambda: torch.nn.LayerNorm(8, 1e-5)),
    "group": (lambda: layers.GroupNorm(4, 8, epsilon=1e-5, rngs=nnx.Rngs(0)), lambda: torch.nn.GroupNorm(4, 8, 1e-5)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", NORMS)
def test_norms(kind, dtype):
    """Values and gradients, also of weights, of inputs far from 0, against torch in float64."""
    build, oracle = NORMS[kind]
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 + rng.standard_normal((2, 5, 4, 8)), dtype)
    scale, bias, weights = (rng.standard_normal(shape).astype(np.float32) for shape in (8, 8, x.shape))
    norm, oracle = build(), oracle().double()
    norm.scale[...], norm.bias[...] = scale, bias
    for parameter, array in ((oracle.weight, scale), (oracle.bias, bias)):
        parameter.data = torch.from_numpy(array).double()
    graph, params = nnx.split(norm)

    def loss(params, x):
        y = nnx.merge(graph, params)(x)
        return (y.astype(jnp.float32) * weights).sum(), y

    (gradients, dx), y = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    theirs = torch.from_numpy(np.asarray(x, np.float64)).requires_grad_()
    oracle_y = oracle(theirs.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if kind == "group" else oracle(theirs)
    oracle.zero_grad()
    (oracle_y * torch.from_numpy(weights)).sum().backward()
    assert y.dtype == dx.dtype == dtype
    pairs = [
        (y, oracle_y),
        (dx, theirs.grad),
        (gradients["scale"][...], oracle.weight.grad),
        (gradients["bias"][...], oracle.bias.grad),
    ]
    for ours, expected in pairs:
        expected = expected.detach().numpy()
        error = np.linalg.norm(np.asarray(ours, np.float64) - expected) / np.linalg.norm(expected)
        assert error < (1e-5 if dtype == "float32" else 4e-3)


def test_a_norm_keeps_its_input_alone():
    """Besides means and rates."""
    norm, x = NORMS["group"][0](), jnp.ones((2, 5, 4, 8), jnp.bfloat16)
    _, back = jax.vjp(norm, x)
    assert sum(x.nbytes for x in jax.tree.leaves(back) if x.ndim == 4) == x.nbytes + 2 * 2 * 8 * 4


def passes(stack, policy):
    """Products of a gradient, in those of a forward pass."""
    configured = layers.configured(stack, remat=policy)
    forward = lambda x: layers.scan_layers(configured, x, remat=True).sum()
    return flops_lib.flops(jax.grad(forward), X) / flops_lib.flops(forward, X)


def test_what_is_recomputed(stack):
    """Of a forward pass's products "full", which stores inputs alone, repeats half.

    Gradients are equal.
    """
    assert {policy: passes(stack, policy) for policy in layers.POLICIES} == {"full": 2.5, "dots": 2, "none": 2}
    gradients = []
    for policy in layers.POLICIES:
        configured = layers.configured(stack, remat=policy)
        loss = lambda x, configured=configured: (layers.scan_layers(configured, x, remat=True) ** 2).sum()
        gradients.append(jax.grad(loss)(X))
    for other in gradients[1:]:
        np.testing.assert_allclose(other, gradients[0], rtol=1e-5, atol=1e-6)


def test_a_product_is_stored_with_its_bias(capsys):
    """Once, and not the product alone, to which the bias would be added again going back."""
    linear = layers.Linear(3, 5, rngs=nnx.Rngs(0))
    stored = jax.checkpoint(lambda x: jnp.sin(linear(x)), policy=layers.POLICIES["dots"])
    jax.ad_checkpoint.print_saved_residuals(lambda x: stored(x).sum(), jnp.ones((2, 3)))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("f32[2,5]")]
    assert "named 'kept'" in line


def test_configured_is_a_copy(stack):
    changed = layers.configured({"within": (stack, None)}, remat="dots")["within"][0]
    assert (stack.remat, changed.remat) == ("full", "dots")
    assert jax.tree.leaves(changed)[0] is jax.tree.leaves(stack)[0]


def test_hardware_is_set_in_every_attention():
    """Also within stacks of layers; without an argument it stays as it is."""
    build = lambda rngs: clip.Attention(8, 2, rngs=rngs)
    tree = {"one": build(nnx.Rngs(0)), "stack": layers.stack(build, 2, nnx.Rngs(0))}
    hardware = chips.Hardware(cudnn=True)
    changed = layers.configured(tree, hardware=hardware)
    assert changed["one"].hardware == changed["stack"].layer.hardware == hardware
    assert tree["one"].hardware == tree["stack"].layer.hardware == chips.Hardware()
    again = layers.configured(changed, remat="none")
    assert (again["stack"].layer.hardware, again["stack"].remat, changed["stack"].remat) == (hardware, "none", "full")


def test_parts_are_set_within_others():
    """A stack of modules that have stacks, and modules with hardware that have others."""

    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.hardware = chips.Hardware()
            self.attention = clip.Attention(8, 2, rngs=rngs)
            self.stack = layers.stack(lambda rngs: clip.Attention(8, 2, rngs=rngs), 2, rngs)

    hardware = chips.Hardware(rows=8)
    changed = layers.configured(layers.stack(Outer, 2, nnx.Rngs(0)), remat="none", hardware=hardware)
    outer = changed.layer
    assert changed.remat == outer.stack.remat == "none"
    assert outer.hardware == outer.attention.hardware == outer.stack.layer.hardware == hardware


def test_networks_store_their_products_with_biases():
    files = pathlib.Path(layers.__file__).parent.rglob("*.py")
    assert [file.name for file in files if "nnx.Linear(" in file.read_text()] == []


def test_recomputed_layers_are_in_a_loop(stack):
    """Without a loop XLA:CPU would store their states."""
    fn = lambda x: layers.scan_layers(stack, x, remat=True)
    assert "stablehlo.while" in jax.jit(fn).lower(X).as_text()
