"""What the networks share: what is kept for the backward pass, and which kernel attends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from referee_jax.hardware import chips
from referee_jax.models import clip, layers
from referee_jax.performance import flops as flops_lib


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
    "layer": (lambda: layers.LayerNorm(8, epsilon=1e-5, rngs=nnx.Rngs(0)), torch.nn.LayerNorm(8, 1e-5)),
    "group": (lambda: layers.GroupNorm(4, 8, epsilon=1e-5, rngs=nnx.Rngs(0)), torch.nn.GroupNorm(4, 8, 1e-5)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", NORMS)
def test_norms(kind, dtype):
    """Values and gradients, also of weights, of inputs far from 0, against torch in float64."""
    build, oracle = NORMS[kind]
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 + rng.standard_normal((2, 5, 4, 8)), dtype)
    scale, bias, weights = (rng.standard_normal(shape).astype(np.float32) for shape in (8, 8, x.shape))
    norm, oracle = build(), oracle.double()
    norm.scale[...], norm.bias[...] = scale, bias
    for own, given in ((oracle.weight, scale), (oracle.bias, bias)):
        own.data = torch.from_numpy(given).double()
    graph, params = nnx.split(norm)

    def loss(params, x):
        y = nnx.merge(graph, params)(x)
        return (y.astype(jnp.float32) * weights).sum(), y

    (found, dx), y = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    theirs = torch.from_numpy(np.asarray(x, np.float64)).requires_grad_()
    made = oracle(theirs.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if kind == "group" else oracle(theirs)
    oracle.zero_grad()
    (made * torch.from_numpy(weights)).sum().backward()
    assert y.dtype == dx.dtype == dtype
    pairs = [
        (y, made),
        (dx, theirs.grad),
        (found["scale"][...], oracle.weight.grad),
        (found["bias"][...], oracle.bias.grad),
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
    asked = layers.with_remat(stack, policy)
    forward = lambda x: layers.scan_layers(asked, x, remat=True).sum()
    return flops_lib.flops(jax.grad(forward), X) / flops_lib.flops(forward, X)


def test_what_is_made_again(stack):
    """Forward and backward are two; who keeps inputs alone makes the first of the two products again. Gradients are equal."""
    assert {policy: passes(stack, policy) for policy in layers.POLICIES} == {"full": 2.5, "dots": 2, "none": 2}
    gradients = []
    for policy in layers.POLICIES:
        kept = layers.with_remat(stack, policy)
        gradients.append(jax.grad(lambda x, kept=kept: (layers.scan_layers(kept, x, remat=True) ** 2).sum())(X))
    for other in gradients[1:]:
        np.testing.assert_allclose(other, gradients[0], rtol=1e-5, atol=1e-6)


def test_with_remat_is_a_copy(stack):
    changed = layers.with_remat({"within": (stack, None)}, "dots")["within"][0]
    assert (stack.remat, changed.remat) == ("full", "dots")
    assert jax.tree.leaves(changed)[0] is jax.tree.leaves(stack)[0]


@pytest.fixture
def cuda(monkeypatch):
    """A machine with a GPU, as far as tracing asks."""
    device = type("Device", (), {"client": type("Client", (), {"platform_version": "PJRT C API\ncuda 13000"})})
    device.compute_capability, device.device_kind = "9.0", "NVIDIA H200"
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered(fn, *args):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("tokens", [(256, 256), (257, 257), (300, 257)])
def test_cudnn_attends(cuda, tokens):
    """Long attention and its gradient under vmap are cuDNN's, and counted."""
    own, others = (shaped(2, n, 16, 88) for n in tokens)
    loss = lambda q, k: (layers.attention(q, k, k).astype(jnp.float32) ** 2).sum()
    batched = [shaped(3, *x.shape) for x in (own, others)]
    text = lowered(jax.vmap(jax.grad(loss, argnums=(0, 1))), *batched)
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text
    out = jax.eval_shape(jax.vmap(lambda q, k: layers.attention(q, k, k)), *batched)
    assert out.shape == batched[0].shape and out.dtype == jnp.bfloat16
    even = [n + n % 2 for n in tokens]
    forward = 2 * 2 * 2 * 16 * 88 * even[0] * even[1]
    assert flops_lib.flops(loss, own, others) == forward
    assert flops_lib.flops(jax.grad(loss), own, others) == forward * 7 / 2


def test_kept_attention_is_not_made_again(cuda):
    fn = lambda x: (layers.attention(x, x, x).astype(jnp.float32) ** 2).sum()
    x = shaped(2, 256, 16, 88)
    flops = {name: flops_lib.flops(jax.grad(jax.checkpoint(fn, policy=p)), x) for name, p in layers.POLICIES.items()}
    assert flops["dots"] == flops["none"] == flops["full"] * 7 / 9


@pytest.mark.parametrize(
    ("query", "how"),
    [
        (shaped(2, 256, 16, 88, dtype=jnp.float32), {}),
        (shaped(2, 64, 16, 88), {}),
        (shaped(2, 256, 2, 160), {}),
        (shaped(2, 256, 16, 88), {"key": jnp.zeros((2, 77, 16, 88), jnp.bfloat16)}),
        (shaped(2, 256, 2, 84), {}),
        (shaped(2, 256, 16, 88), {"bias": jnp.zeros((1, 1, 1, 256))}),
        (shaped(2, 256, 16, 88), {"is_causal": True}),
    ],
)
def test_xla_attends(cuda, query, how):
    """What cuDNN cannot do, or what is too short to matter."""
    ask = lambda x, key=None, **how: layers.attention(x, *[x if key is None else key] * 2, **how)
    assert "cudnn" not in lowered(lambda x: ask(x, **how), query)


@pytest.mark.parametrize(
    ("chip", "query", "blocks"),
    [
        ("v5e", shaped(2, 4096, 8, 40), 32), ("v4", shaped(2, 4096, 8, 40), 32), ("v5p", shaped(2, 4096, 8, 40), 1),
        ("v5e", shaped(1, 4096, 1, 512), 1), ("v5e", shaped(2, 1024, 8, 80), 1), ("v5e", shaped(10, 577, 16, 88), 1),
        (None, shaped(2, 4096, 8, 40), 1),
    ],
)  # fmt: skip
def test_a_tpu_asks_in_blocks(monkeypatch, chip, query, blocks):
    """Of a gibibyte of logits 32 MiB at a time; what is on the chip as it is, or does not divide, is left in one."""
    monkeypatch.setattr(chips, "chip", lambda: chip and chips.TPUS[chip])
    text = str(jax.make_jaxpr(lambda x: layers.attention(x, x, x))(query))
    assert f"length={blocks}\n" in text if blocks > 1 else "scan[" not in text


def test_blocks_attend_as_all_at_once(monkeypatch):
    """Outputs and gradients, of a batch by vmap, of fewer queries than keys."""
    ask = lambda q, k, v: (layers.attention(q, k, v) ** 2).sum()
    asked = jax.vmap(jax.value_and_grad(ask, argnums=(0, 1, 2)))
    keys = jax.random.split(jax.random.key(2), 3)
    x = [jax.random.normal(key, (2, 1, tokens, 2, 4)) for key, tokens in zip(keys, (256, 512, 512), strict=True)]
    whole = asked(*x)
    monkeypatch.setattr(chips, "chip", lambda: chips.TPUS["v5e"]._replace(scores=0.125))
    assert "length=8" in str(jax.make_jaxpr(asked)(*x))
    for ours, theirs in zip(jax.tree.leaves(asked(*x)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_what_is_made_again_is_within_a_loop(stack):
    """XLA:CPU keeps it, if there is no loop around it."""
    fn = lambda x: layers.scan_layers(stack, x, remat=True)
    assert "stablehlo.while" in jax.jit(fn).lower(X).as_text()
