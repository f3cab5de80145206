"""Operations against arithmetic by hand and XLA's own analysis."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from referee_jax.models.diffusion import unet
from referee_jax.performance import flops


def abstract(make):
    """The module without weights."""
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))


def shape(*sizes: int, dtype="float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_by_hand():
    matrix, vectors = shape(5, 7), shape(3, 7)
    dot = 2 * 3 * 5 * 7
    assert flops.flops(lambda a, b: b @ a.T, matrix, vectors) == dot
    assert flops.flops(jax.vmap(lambda b, a: a @ b, in_axes=(0, None)), vectors, matrix) == dot
    assert flops.flops(lambda a, b: jax.lax.map(lambda x: x @ a.T, b), matrix, vectors) == dot
    branches = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: b @ a.T, lambda: b @ a.T @ a @ a.T)
    assert flops.flops(branches, matrix, vectors) == 3 * dot
    assert flops.flops(jax.grad(lambda b, a: (b @ a.T).sum()), vectors, matrix) in (dot, 2 * dot)
    remat = jax.grad(lambda b, a: jnp.square(jax.checkpoint(lambda b: jnp.sin(b @ a.T))(b)).sum())
    assert flops.flops(remat, vectors, matrix) == 3 * dot  # forward, forward again, backward


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_and_its_gradient(stride):
    """Both as many, whatever the stride: 3 x 3 weights, 4 channels to 6, at each of the places of the smaller side."""
    conv = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(stride, stride), padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    image, kernel = shape(2, 8, 8, 4), shape(3, 3, 4, 6)
    once = 2 * 2 * (8 // stride) ** 2 * 6 * 9 * 4
    assert flops.flops(conv, image, kernel) == once
    both = flops.flops(
        lambda x, k: jax.vjp(lambda x: conv(x, k), x)[1](jnp.ones((2, 8 // stride, 8 // stride, 6))), image, kernel
    )
    assert both == 2 * once


def test_xla_counts_as_much():
    """XLA counts additions and activations besides, which at these sizes are 10 %; loops it counts once."""
    config = unet.Config(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    module = abstract(functools.partial(unet.UNet, config))
    args = module, shape(2, 16, 16, 4), shape(2, dtype="int32"), shape(2, 20, 32)
    fn = lambda module, *args: module(*args)
    counted = jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]
    assert flops.flops(fn, *args) == pytest.approx(counted, rel=0.1)
