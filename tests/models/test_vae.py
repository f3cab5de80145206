"""The decoder against diffusers' torch class, with the same weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from referee_jax.models.diffusion import vae
from referee_jax.weights import config_json, convert
from tests.lazy import diffusers, torch
from tests.oracles import networks

BRANCHES = {
    "three levels": {},
    "two blocks a level": {"block_out_channels": (8, 24), "layers_per_block": 2, "norm_num_groups": 8},
    "as SD3 and FLUX have it": {
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.7,
        "scaling_factor": 1.5305,
    },
    "one level": {"block_out_channels": (8,), "scaling_factor": 0.5, "latent_channels": 3},
}


def build(branch):
    """The oracle, its config.json as a Config, and its tensors."""
    kwargs = dict(BRANCHES[branch])
    if "block_out_channels" in kwargs:
        levels = len(kwargs["block_out_channels"])
        kwargs["down_block_types"] = ("DownEncoderBlock2D",) * levels
        kwargs["up_block_types"] = ("UpDecoderBlock2D",) * levels
    oracle = networks.vae(**kwargs)
    return oracle, read(oracle.config), tensors(oracle)


def read(config):
    return config_json.config_from_json(vae.Config, config)


def tensors(oracle):
    return {name: x.numpy() for name, x in oracle.state_dict().items()}


ENCODER = ("encoder.*", "quant_conv.*")


def load(config, weights, *, dtype=jnp.float32, renames=()):
    module = nnx.eval_shape(lambda: vae.AutoencoderKL(config, rngs=nnx.Rngs(0)))
    return convert.fill(module, weights, dtype=dtype, renames=renames, ignore=ENCODER)


def to_torch(x):
    return torch.from_numpy(np.array(x).transpose(0, 3, 1, 2).copy())


def to_numpy(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def error(ours, theirs):
    """Relative L2 error; shapes must agree, not just broadcast."""
    ours = np.asarray(ours, np.float32)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def cosine(a, b):
    a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def draw(seed, *shape, uniform=False):
    rng = np.random.default_rng(seed)
    return (rng.random(shape) if uniform else rng.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
@pytest.mark.parametrize("branch", BRANCHES)
def test_decoder_matches_torch(branch, size):
    oracle, config, weights = build(branch)
    network = load(config, weights)
    latents = draw(0, 2, *size, config.latent_channels)

    z = to_torch(latents).requires_grad_(True)
    images = oracle.decode(z / oracle.config.scaling_factor + (config.shift_factor or 0)).sample / 2 + 0.5
    a = draw(1, *to_numpy(images).shape)
    (images * to_torch(a)).sum().backward()

    @jax.jit
    def run(network, latents):
        ours, pullback = jax.vjp(network.decode, latents)
        return ours, pullback(a)[0]

    ours, gradient = run(network, latents)
    assert error(ours, to_numpy(images)) < 1e-4
    assert error(gradient, to_numpy(z.grad)) < 1e-4
    # The comparison means something: pictures depend on the latents and are not clamped.
    assert error(run(network, latents[::-1])[0], to_numpy(images)) > 0.1
    assert ours.min() < 0
    assert ours.max() > 1


def test_bfloat16_weights_give_the_same_direction():
    _, config, weights = build("three levels")
    latents, images = draw(0, 1, 6, 6, 4), draw(1, 1, 24, 24, 3, uniform=True)

    @jax.jit
    def gradient(network):
        return jax.grad(lambda z: (network.decode(z) * images).sum())(latents)

    full, half = (gradient(load(config, weights, dtype=dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    assert full.dtype == half.dtype == jnp.float32
    assert not np.array_equal(full, half)
    assert cosine(full, half) > 0.99


def test_old_attention_names_load():
    _, config, weights = build("three levels")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    older = {
        re.sub(r"attentions\.0\.(to_[qkv]|to_out\.0)\.", lambda m: f"attentions.0.{old[m[1]]}.", name): x
        for name, x in weights.items()
    }
    assert len(older.keys() - weights.keys()) == 16  # weight and bias of four layers in encoder and decoder
    ours, same = load(config, older, renames=vae.RENAMES), load(config, weights, renames=vae.RENAMES)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("channels, count", [(4, 83_653_863), (16, 83_819_683)])
def test_published_shapes(channels, count):
    """config.json of SD 1.5, 2.1, sd-vae-ft-mse, sd-turbo, SDXL: one architecture; and of SD3 and FLUX.1."""
    more = {"use_quant_conv": False, "use_post_quant_conv": False} if channels == 16 else {}
    with torch.device("meta"):
        oracle = diffusers.AutoencoderKL(
            act_fn="silu",
            block_out_channels=[128, 256, 512, 512],
            down_block_types=["DownEncoderBlock2D"] * 4,
            latent_channels=channels,
            layers_per_block=2,
            norm_num_groups=32,
            up_block_types=["UpDecoderBlock2D"] * 4,
            **more,
        )
    assert sum(x.numel() for x in oracle.parameters()) == count
    theirs = {name: tuple(x.shape) for name, x in oracle.state_dict().items()}
    theirs = {name: shape for name, shape in theirs.items() if not name.startswith(("encoder.", "quant_conv."))}
    module = nnx.eval_shape(lambda: vae.AutoencoderKL(read(oracle.config), rngs=nnx.Rngs(0)))
    assert {name: t.source_shape for t in convert.targets(module) for name in t.names} == theirs
    assert sum(x.size for x in jax.tree.leaves(module)) == sum(np.prod(shape) for shape in theirs.values())


@pytest.mark.slow
def test_full_size_matches_torch():
    """Stable Diffusion's decoder at 256 px, output and gradient. Measured: 6.9e-7 and 1.7e-6."""
    levels = 4
    oracle = networks.vae(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
    )  # fmt: skip
    network = load(read(oracle.config), tensors(oracle))
    latents, a = draw(1, 1, 32, 32, 4), draw(2, 1, 256, 256, 3)
    oracle = oracle.double()

    @jax.jit
    def run(network, latents):
        decoded, pullback = jax.vjp(network.decode, latents)
        return decoded, pullback(a)[0]

    ours = run(network, latents)
    z = to_torch(latents).double().requires_grad_(True)
    decoded = oracle.decode(z / oracle.config.scaling_factor).sample / 2 + 0.5
    (decoded * to_torch(a)).sum().backward()
    errors = [error(o, to_numpy(t)) for o, t in zip(ours, (decoded, z.grad), strict=True)]
    print("picture, its gradient:", errors)
    assert max(errors) < 1e-4
    assert error(network.decode(latents[:, ::-1]), to_numpy(decoded)) > 0.1


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 4)])
def test_double_is_torchs_nearest(shape, is_dense):
    x = draw(0, *shape)
    theirs = torch.nn.functional.interpolate(to_torch(x), scale_factor=2.0, mode="nearest")
    np.testing.assert_array_equal(vae.double(jnp.asarray(x), is_dense=is_dense), to_numpy(theirs))


@pytest.mark.parametrize(
    "key, value",
    [
        ("act_fn", "gelu"),
        ("mid_block_add_attention", False),
        ("latents_mean", [0.0, 0.0, 0.0, 0.0]),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("up_block_types", ["UpDecoderBlock2D"] * 3),
    ],
)
def test_config_value_that_is_not_implemented_is_named(key, value):
    with pytest.raises(ValueError, match=f"{key}=.*support") as raised:
        read({key: value})
    assert str(value).strip("[]") in str(raised.value)


def test_configs_read_from_json_are_hashable():
    assert hash(read({"block_out_channels": [8, 16]})) == hash(vae.Config(block_out_channels=(8, 16)))
