"""Which kernel attends, and that all give the same."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from referee_jax.engine import parallel, peak_memory
from referee_jax.hardware import chips
from referee_jax.models import attention, layers
from referee_jax.performance import flops as flops_lib

CUDNN = chips.Hardware(cudnn=True)


@pytest.fixture
def cuda(monkeypatch):
    """A machine with a GPU, as far as JAX asks."""
    device = type("Device", (), {"compute_capability": "9.0", "device_kind": "NVIDIA H200"})
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
    query, key = (shaped(2, n, 16, 88) for n in tokens)
    loss = lambda q, k: (attention.attend(q, k, k, CUDNN).astype(jnp.float32) ** 2).sum()
    batched = [shaped(3, *x.shape) for x in (query, key)]
    text = lowered(jax.vmap(jax.grad(loss, argnums=(0, 1))), *batched)
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text
    out = jax.eval_shape(jax.vmap(lambda q, k: attention.attend(q, k, k, CUDNN)), *batched)
    assert out.shape == batched[0].shape and out.dtype == jnp.bfloat16
    even = [n + n % 2 for n in tokens]
    forward = 2 * 2 * 2 * 16 * 88 * even[0] * even[1]
    assert flops_lib.flops(loss, query, key) == forward
    assert flops_lib.flops(jax.grad(loss), query, key) == forward * 7 / 2


@pytest.mark.parametrize("hardware", [CUDNN, chips.Hardware(splash=True)], ids=["cudnn", "splash"])
def test_stored_attention_is_not_recomputed(cuda, hardware):
    fn = lambda x: (attention.attend(x, x, x, hardware).astype(jnp.float32) ** 2).sum()
    x = shaped(2, 1024, 16, 88)
    flops = {name: flops_lib.flops(jax.grad(jax.checkpoint(fn, policy=p)), x) for name, p in layers.POLICIES.items()}
    assert flops["dots"] == flops["none"] == pytest.approx(flops["full"] * 7 / 9, rel=1e-3)


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
        (shaped(2, 256, 16, 88), {"hardware": chips.Hardware()}),
    ],
)
def test_xla_attends(cuda, query, how):
    """What cuDNN cannot do, or is not there for, or what is too short to matter."""

    def attend(x, key=None, hardware=CUDNN, **how):
        return attention.attend(x, *[x if key is None else key] * 2, hardware, **how)

    assert "cudnn" not in lowered(lambda x: attend(x, **how), query)


@pytest.mark.parametrize(
    ("chip", "query", "blocks"),
    [
        ("v5e", shaped(2, 4096, 8, 40), 32), ("v4", shaped(2, 4096, 8, 40), 32), ("v5p", shaped(2, 4096, 8, 40), 1),
        ("v5e", shaped(1, 4096, 1, 512), 1), ("v5e", shaped(2, 1024, 8, 80), 1), ("v5e", shaped(10, 577, 16, 88), 1),
        (None, shaped(2, 4096, 8, 40), 1),
    ],
)  # fmt: skip
def test_a_tpu_without_the_kernel_attends_in_blocks(chip, query, blocks):
    """1 GiB of logits by 32 MiB; what fits on the chip, or does not divide, is one block."""
    hardware = chips.Hardware(attention_block=chip and chips.TPUS[chip].scores)
    text = str(jax.make_jaxpr(lambda x: attention.attend(x, x, x, hardware))(query))
    assert f"length={blocks}\n" in text if blocks > 1 else "scan[" not in text


@pytest.mark.parametrize(
    ("query", "keys", "is_kernel"),
    [
        (shaped(2, 4096, 8, 40), 4096, True), (shaped(2, 4429, 24, 64), 4429, True), (shaped(1, 4608, 24, 128), 4608, True),
        (shaped(2, 4096, 8, 40), 77, False), (shaped(1, 1024, 10, 64), 1024, False), (shaped(1, 4096, 1, 512), 4096, False),
        (shaped(2, 4096, 8, 40, dtype=jnp.float32), 4096, False),
    ],
)  # fmt: skip
def test_a_tpu_attends_by_its_kernel(query, keys, is_kernel):
    """Where the logits are more than stay on the chip; its work is counted, that of added tokens too."""
    key, hardware = shaped(query.shape[0], keys, *query.shape[2:], dtype=query.dtype), chips.Hardware(splash=True)
    loss = lambda q, k: (attention.attend(q, k, k, hardware).astype(jnp.float32) ** 2).sum()
    text = str(jax.make_jaxpr(loss)(query, key))
    assert ("pallas_call" in text) == is_kernel
    forward = 4 * math.prod(query.shape) * keys
    assert 1 <= flops_lib.flops(loss, query, key) / forward < 1.1
    assert 1 <= flops_lib.flops(jax.grad(loss), query, key) / forward / (7 / 2 if is_kernel else 2) < 1.1
    assert peak_memory.peak(jax.make_jaxpr(jax.grad(loss))(query, key).jaxpr) < 2**30 or not is_kernel


@pytest.mark.parametrize("tokens", [(1024, 1024), (600, 1100)])
def test_a_tpus_kernel_attends_as_xla(tokens, monkeypatch):
    """Outputs and gradients under vmap, nearer than 1 % to those in float32; lengths that are no blocks' too."""
    monkeypatch.setattr(attention, "KEPT", 0)
    interpreted = functools.partial(splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash, "make_splash_mha", interpreted)
    keys = jax.random.split(jax.random.key(3), 4)
    shapes = [(2, 1, n, 2, 40) for n in (*tokens, tokens[1], tokens[0])]
    *x, weights = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))

    def gradients(hardware):
        attend = lambda q, k, v: (
            out := attention.attend(q, k, v, hardware),
            (out.astype(jnp.float32) * weights[0]).sum(),
        )
        return jax.vmap(jax.grad(lambda *x: attend(*x)[::-1], argnums=(0, 1, 2), has_aux=True))

    ours = jax.jit(gradients(chips.Hardware(splash=True)))(*x)
    theirs = gradients(chips.Hardware())(*(part.astype(jnp.float32) for part in x))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


TILES = chips.Hardware(rows=8)


def attended(hardware, padded):
    """The sum, weighted, of attention among tokens of `[B, T, N * D]` that are padded behind or not, and its gradient."""

    def loss(weights, *x):
        tokens = x[0].shape[1]
        out = attention.among(*(attention.in_tiles(y, 2, padded) for y in x), 2, hardware, tokens)[:, :tokens]
        return (out.astype(jnp.float32) * weights).sum(), out

    return jax.jit(jax.vmap(jax.grad(loss, argnums=(1, 2, 3), has_aux=True)))


@pytest.mark.parametrize("tokens", [1, 5, 50, 120, 126, 129, 197, 257, 577])
def test_tokens_in_tiles_attend_as_they_are(tokens, monkeypatch):
    """Outputs and gradients under vmap; one more tile than 128 tokens or not."""
    monkeypatch.setattr(attention, "TILED", 0)
    keys = jax.random.split(jax.random.key(5), 4)
    x = [jax.random.normal(key, (2, 2, tokens, 16)) for key in keys]
    ours, theirs = (attended(hardware, hardware)(*x) for hardware in (TILES, chips.Hardware()))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("shape", "heads", "filled"),
    [((10, 257, 1408), 16, 264), ((4, 257, 1408), 16, 257), ((10, 256, 1408), 16, 256), ((10, 577, 1024), 16, 584)],
)
def test_many_tokens_fill_tiles(shape, heads, filled):
    """Where the logits of all views are more than a chip keeps; on other devices never."""
    x = jnp.ones(shape, jnp.bfloat16)
    assert attention.in_tiles(x, heads, TILES).shape == (shape[0], filled, shape[2])
    assert attention.in_tiles(x, heads, chips.Hardware()).shape == shape


def test_no_token_attends_to_what_fills_a_tile():
    """Whatever is there, with a bias or by the order of tokens, too."""
    q, k = (jax.random.normal(jax.random.key(n), (1, 8, 2, 4)) for n in (6, 7))
    other = k.at[:, 5:].set(100.0)
    bias = jax.random.normal(jax.random.key(8), (1, 1, 8, 8))
    for how in ({}, {"bias": bias}, {"is_causal": True}, {"scale": 1.0}, {"hardware": CUDNN}):
        attend = lambda k, how=how: attention.attend(q, k, k, **{"hardware": TILES} | how, tokens=5)
        np.testing.assert_array_equal(attend(k), attend(other))
        assert not np.allclose(attend(k)[:, 6:], attention.attend(q, k, k, **{"hardware": TILES} | how)[:, 6:])


def test_a_tpus_kernel_attends_to_tokens_in_tiles(monkeypatch):
    monkeypatch.setattr(attention, "TILED", 0)
    monkeypatch.setattr(attention, "KEPT", 0)
    interpreted = functools.partial(splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash, "make_splash_mha", interpreted)
    keys = jax.random.split(jax.random.key(9), 4)
    x = [jax.random.normal(key, (1, 1, 577, 80), jnp.bfloat16) for key in keys]
    kernel = chips.Hardware(splash=True, rows=8)
    assert "pallas_call" in str(jax.make_jaxpr(attended(kernel, kernel))(*x))
    ours = attended(kernel, kernel)(*x)
    theirs = attended(chips.Hardware(), chips.Hardware())(*(y.astype(jnp.float32) for y in x))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


def test_a_group_splits_the_kernels_heads(monkeypatch):
    """As one device would attend, within the engine's shard_map; work is that of the group. An odd number of heads is XLA's."""
    monkeypatch.setattr(attention, "KEPT", 0)
    interpreted = functools.partial(splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash, "make_splash_mha", interpreted)
    mesh = parallel.prompt_mesh(jax.devices()[:4], model=2)
    x = jax.random.normal(jax.random.key(4), (2, 1, 640, 2, 40), jnp.bfloat16)

    def gradients(hardware):
        return jax.vmap(jax.grad(lambda x: (attention.attend(x, x, x, hardware).astype(jnp.float32) ** 2).sum()))

    split = parallel.across_devices(gradients(chips.Hardware(splash=True, group=2)), mesh, [True])
    alone = jax.jit(gradients(chips.Hardware(splash=True)))
    placed = parallel.place(x, mesh, batched=True)
    ours, whole = (np.asarray(y, np.float32) for y in (jax.jit(split)(placed), alone(x)))
    assert np.linalg.norm(ours - whole) < 5e-3 * np.linalg.norm(whole)
    assert flops_lib.flops(split, placed) == flops_lib.flops(alone, x) / 2  # two groups with an item each
    three = shaped(1, 640, 3, 40)
    text = str(jax.make_jaxpr(lambda x: attention.attend(x, x, x, chips.Hardware(splash=True, group=2)))(three))
    assert "pallas_call" not in text


def test_blocks_attend_as_all_at_once():
    """Outputs and gradients, of a batch by vmap, of fewer queries than keys."""

    def gradients(hardware):
        loss = lambda q, k, v: (attention.attend(q, k, v, hardware) ** 2).sum()
        return jax.vmap(jax.value_and_grad(loss, argnums=(0, 1, 2)))

    keys = jax.random.split(jax.random.key(2), 3)
    x = [jax.random.normal(key, (2, 1, tokens, 2, 4)) for key, tokens in zip(keys, (256, 512, 512), strict=True)]
    whole, in_blocks = gradients(chips.Hardware()), gradients(chips.Hardware(attention_block=0.125))
    assert "length=8" in str(jax.make_jaxpr(in_blocks)(*x))
    for ours, theirs in zip(jax.tree.leaves(in_blocks(*x)), jax.tree.leaves(whole(*x)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
