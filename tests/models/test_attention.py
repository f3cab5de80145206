"""Which kernel attends, and that all give the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_stored_attention_is_not_recomputed(cuda):
    fn = lambda x: (attention.attend(x, x, x, CUDNN).astype(jnp.float32) ** 2).sum()
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
def test_a_tpu_attends_in_blocks(chip, query, blocks):
    """1 GiB of logits by 32 MiB; what fits on the chip, or does not divide, is one block."""
    hardware = chips.Hardware(attention_block=chip and chips.TPUS[chip].scores)
    text = str(jax.make_jaxpr(lambda x: attention.attend(x, x, x, hardware))(query))
    assert f"length={blocks}\n" in text if blocks > 1 else "scan[" not in text


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
