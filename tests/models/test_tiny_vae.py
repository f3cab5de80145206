"""The tiny decoders against diffusers' torch class, with the same weights, and as directories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax.hardware import chips
from referee_jax.models import layers
from referee_jax.models.diffusion import tiny_vae
from referee_jax.weights import convert, load
from tests.conftest import cosine, relative_l2
from tests.lazy import diffusers, torch
from tests.models import test_unet
from tests.oracles import networks
from tests.weights.checkpoints import edit_json, fails

BRANCHES = {
    "three levels": {},
    "sixteen channels": {"latent_channels": 16},
    "scaled and shifted, as none is published": {"scaling_factor": 0.5, "shift_factor": 0.25},
    "one level": {"decoder_block_out_channels": (8,), "num_decoder_blocks": (2,), "latent_channels": 3},
}


def saved(path, dtype=jnp.float32, **changes):
    """The oracle, and our network from its directory."""
    oracle = networks.tiny_vae(**changes)
    oracle.save_pretrained(path)
    return oracle, load.load("tiny_vae", path, dtype=dtype)


@jax.jit
def run(network, latents, cotangent):
    images, pullback = jax.vjp(network.decode, latents)
    return images, pullback(cotangent)[0]


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
@pytest.mark.parametrize("branch", BRANCHES)
def test_matches_torch(branch, size, tmp_path):
    oracle, network = saved(tmp_path, **BRANCHES[branch])
    # Large enough for the bend at 3 to be seen.
    latents = 3 * test_unet.draw(0, 2, *size, network.config.latent_channels)
    z = test_unet.to_torch(latents).requires_grad_()
    config = oracle.config
    images = oracle.decode(z / config.scaling_factor + config.shift_factor).sample / 2 + 0.5
    side = network.config.downscale
    cotangent = test_unet.draw(1, 2, side * size[0], side * size[1], 3)
    (images * test_unet.to_torch(cotangent)).sum().backward()

    ours, gradient = run(network, latents, cotangent)
    assert ours.dtype == gradient.dtype == jnp.float32
    assert relative_l2(ours, test_unet.to_numpy(images.detach())) < 1e-5
    assert relative_l2(gradient, test_unet.to_numpy(z.grad)) < 1e-4
    # Pictures depend on the latents, which are bent, and are not clamped.
    assert relative_l2(run(network, latents[::-1], cotangent)[0], ours) > 0.1
    assert relative_l2(run(network, np.clip(latents, -3, 3), cotangent)[0], ours) > 1e-3
    assert ours.min() < 0 and ours.max() > 1
    dense = layers.configured(network, hardware=chips.Hardware(dense=True))
    assert relative_l2(run(dense, latents, cotangent)[0], ours) < 1e-6


def test_bfloat16_gradient_points_the_same_way(tmp_path):
    latents, cotangent = test_unet.draw(0, 1, 6, 6, 4), test_unet.draw(1, 1, 24, 24, 3)
    full, half = (run(saved(tmp_path, dtype)[1], latents, cotangent) for dtype in (jnp.float32, jnp.bfloat16))
    # Where rounding moves a value across 0, a ReLU passes another gradient.
    for a, b, least in zip(full, half, (0.99, 0.95), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        assert cosine(a, b) > least
        assert relative_l2(b, a) > 1e-4  # bfloat16 was really used


# What the published config.json files say of the latents, and numbers of parameters.
PUBLISHED = {
    "madebyollin/taesd": ({}, 1_222_531),
    "madebyollin/taesdxl": ({}, 1_222_531),
    "madebyollin/taesd3": ({"latent_channels": 16, "shift_factor": 0.0}, 1_229_443),
    "madebyollin/taef1": ({"latent_channels": 16, "shift_factor": 0.0}, 1_229_443),
}
_COMMON = dict(
    _class_name="AutoencoderTiny", act_fn="relu", in_channels=3, out_channels=3, latent_channels=4, latent_magnitude=3,
    latent_shift=0.5, decoder_block_out_channels=[64] * 4, encoder_block_out_channels=[64] * 4, force_upcast=False,
    num_decoder_blocks=[3, 3, 3, 1], num_encoder_blocks=[1, 3, 3, 3], scaling_factor=1.0, upsampling_scaling_factor=2,
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    changes, count = PUBLISHED[name]
    with torch.device("meta"):
        oracle = diffusers.AutoencoderTiny.from_config(_COMMON | changes)
    row = load.KINDS["tiny_vae"]
    config = row.config(_COMMON | changes, where="config.json")
    assert config == row.config(oracle.config, where="config.json")  # as diffusers writes it anew
    module = load.unfilled(row, config)
    theirs = {f"decoder.{name}": tuple(x.shape) for name, x in oracle.decoder.state_dict().items()}
    assert {name: t.source_shape for t in convert.targets(module) for name in t.names} == theirs
    assert sum(x.size for x in jax.tree.leaves(module)) == count
    latents = jnp.zeros((1, 64, 48, config.latent_channels))
    assert jax.eval_shape(lambda network: network.decode(latents), module).shape == (1, 512, 384, 3)


def test_defaults_are_the_published():
    assert load.KINDS["tiny_vae"].config(_COMMON, where="config.json") == tiny_vae.Config()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"act_fn": "gelu"}, "act_fn='gelu' is not implemented; supported: 'relu'"),
        ({"upsample_fn": "bilinear"}, "upsample_fn='bilinear' is not implemented; supported: 'nearest'"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor=4 is not implemented; supported: 2"),
        ({"decoder_block_out_channels": [8, 8, 16]}, r"decoder_block_out_channels=\(8, 8, 16\) is not implemented"),
        ({"decoder_block_out_channels": [8, 8]}, r"decoder_block_out_channels=\(8, 8\) is not implemented; .* 3 times"),
        ({"_class_name": "AutoencoderKL"}, "_class_name='AutoencoderKL' is not implemented; supported: 'AutoencoderTiny'"),
        ({"num_decoder_blocks": [2, 1, 2]}, "parameters without a tensor: decoder.layers.10.conv.0.bias"),
        ({"num_decoder_blocks": [1, 1, 1]}, "tensors that no parameter takes: decoder"),
    ],
)  # fmt: skip
def test_directories_that_are_refused(change, message, tmp_path):
    saved(tmp_path)
    edit_json(tmp_path / "config.json", **change)
    fails(tmp_path, message, kind="tiny_vae")
