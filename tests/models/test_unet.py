"""The U-Net against diffusers' torch class, with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from referee_jax.models.diffusion import unet
from referee_jax.weights import config_json, convert
from referee_jax.weights import load as loading
from tests.lazy import diffusers, torch
from tests.oracles import networks

BRANCHES = {
    "stable diffusion 1": {},
    "stable diffusion 2": {
        "block_out_channels": (16, 32, 24),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4, 3),
        "layers_per_block": 2,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "attention at the bottom only": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 2,
        "cross_attention_dim": 20,
    },
    "no attention but in the middle": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_eps": 1e-2,
        "norm_num_groups": 4,
    },
    "sdxl": {
        "spread": 0.8,
        "block_out_channels": (16, 32, 24),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 3),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    },
    "one level, sines first": {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "center_input_sample": True,
        "in_channels": 5,
        "out_channels": 3,
    },
}

# config.json of the published checkpoints, what differs from diffusers' own defaults, and their
# numbers of parameters.
PUBLISHED = {
    "stable-diffusion-v1-5": ({"cross_attention_dim": 768, "attention_head_dim": 8}, 859_520_964),
    "stable-diffusion-2-1": (
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,
            "dual_cross_attention": False,
            "num_class_embeds": None,
            "only_cross_attention": False,
        },
        865_910_724,
    ),
    "sd-turbo": (
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": None,
            "transformer_layers_per_block": 1,
            "attention_type": "default",
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "resnet_out_scale_factor": 1.0,
            "resnet_skip_time_act": False,
        },
        865_910_724,
    ),
    "stable-diffusion-xl-base-1.0": (
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2_567_463_684,
    ),
}


def build(branch):
    """The oracle, its config.json as a Config, and its tensors."""
    oracle = networks.unet(**BRANCHES[branch])
    return oracle, read(oracle.config), {name: x.numpy() for name, x in oracle.state_dict().items()}


def read(config):
    return config_json.config_from_json(unet.Config, config)


def load(config, weights, dtype=jnp.float32):
    return convert.fill(nnx.eval_shape(lambda: unet.UNet(config, rngs=nnx.Rngs(0))), weights, dtype=dtype)


def to_torch(x):
    return torch.from_numpy(np.array(x).transpose(0, 3, 1, 2).copy())


def to_numpy(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def error(ours, theirs):
    """Relative L2 error; shapes must agree, not just broadcast."""
    ours = np.asarray(ours, np.float32)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def doubled(*arrays):
    return [torch.from_numpy(x).double() for x in arrays]


def added(texts, size):
    """What SDXL reads besides states: pooled text, and the sizes of a whole picture."""
    if len(texts) == 1:
        return None
    height, width = (8 * n for n in size)
    sizes = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(texts[1]), -1)
    return {"text_embeds": texts[1], "time_ids": sizes}


@jax.jit
def predict(network, latents, timesteps, *text):
    return network(latents, timesteps, *text)


@jax.jit
def run(network, latents, timesteps, cotangent, *text):
    """Output and the gradients with respect to latents and what is read of the text."""
    ours, pullback = jax.vjp(lambda z, *h: network(z, timesteps, *h), latents, *text)
    return ours, *pullback(cotangent)


@pytest.mark.parametrize("branch, size", [*((name, (7, 9)) for name in BRANCHES), ("stable diffusion 2", (8, 4))])
def test_matches_torch(branch, size):
    oracle, config, weights = build(branch)
    network = load(config, weights)
    latents, text = draw(0, 2, *size, config.in_channels), draw(1, 2, 5, config.cross_attention_dim)
    timesteps = np.array([37, 951])
    cotangent = draw(2, 2, *size, config.out_channels)

    texts = (text, draw(3, 2, config.pooled_width)) if config.pooled_width else (text,)

    z, h = to_torch(latents).double().requires_grad_(True), [x.requires_grad_(True) for x in doubled(*texts)]
    theirs = networks.exact(oracle, oracle.time_proj)(
        z, torch.from_numpy(timesteps), h[0], added_cond_kwargs=added(h, size)
    ).sample
    (theirs * to_torch(cotangent)).sum().backward()

    ours, by_latents, *by_texts = run(network, latents, timesteps, cotangent, *texts)
    theirs = to_numpy(theirs)
    assert error(ours, theirs) < 1e-4
    assert error(by_latents, to_numpy(z.grad)) < 1e-4
    for gradient, x in zip(by_texts, h, strict=True):
        assert error(gradient, x.grad.numpy()) < 1e-4

    # The comparison means something: the output depends on all inputs.
    inputs = [latents, timesteps, cotangent, *texts]
    for n in (0, 1, *range(3, len(inputs))):
        other = [x[::-1] if i == n else x for i, x in enumerate(inputs)]
        assert error(run(network, *other)[0], theirs) > 0.1


def test_sizes_of_a_picture():
    """SDXL is told of a crop; by default of none."""
    oracle, config, weights = build("sdxl")
    network, timesteps = load(config, weights), np.array([500])
    latents, text, pooled = draw(0, 1, 4, 6, 4), draw(1, 1, 5, 32), draw(2, 1, config.pooled_width)
    whole, cropped = (np.array([sizes], np.float32) for sizes in ([32, 48, 0, 0, 32, 48], [64, 96, 8, 16, 32, 48]))
    for sizes in (whole, cropped):
        conditions = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(sizes)}
        theirs = oracle(
            to_torch(latents), torch.from_numpy(timesteps), torch.from_numpy(text), added_cond_kwargs=conditions
        ).sample
        assert error(predict(network, latents, timesteps, text, pooled, sizes), to_numpy(theirs)) < 1e-4
    ours = predict(network, latents, timesteps, text, pooled)
    np.testing.assert_array_equal(ours, predict(network, latents, timesteps, text, pooled, whole))
    assert error(ours, to_numpy(theirs)) > 0.01


def test_fractional_timesteps_match_torch():
    oracle, config, weights = build("stable diffusion 1")
    latents, text, timesteps = draw(0, 2, 4, 4, 4), draw(1, 2, 5, 32), np.array([0.25, 600.5], np.float32)
    theirs = to_numpy(oracle(to_torch(latents), torch.from_numpy(timesteps), torch.from_numpy(text)).sample)
    network = load(config, weights)
    assert error(predict(network, latents, timesteps, text), theirs) < 1e-4
    assert error(predict(network, latents, timesteps.round(), text), theirs) > 1e-3


def test_bfloat16_weights_give_the_same_prediction():
    """The output only: the gradient of a loud random network is chaotic in bfloat16, in torch too, and is not used."""
    _, config, weights = build("stable diffusion 1")
    latents, text, timesteps = draw(0, 1, 8, 8, 4), draw(1, 1, 5, 32), np.array([500])
    a, b = (predict(load(config, weights, dtype), latents, timesteps, text) for dtype in (jnp.float32, jnp.bfloat16))
    assert a.dtype == b.dtype == jnp.float32
    assert not np.array_equal(a, b)
    assert np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.99


def test_what_a_generator_of_one_step_multiplies_is_not_rounded():
    """By 15 at timestep 999: the last convolution is in float32, also of bfloat16 weights."""
    _, config, weights = build("sdxl")
    given = draw(0, 1, 8, 8, 4), np.array([999]), draw(1, 1, 5, 32), draw(2, 1, config.pooled_width)
    out = predict(load(config, weights, jnp.bfloat16), *given)
    rounded = np.asarray(out.astype(jnp.bfloat16).astype(jnp.float32))
    assert out.dtype == jnp.float32 and np.mean(out != rounded) > 0.9


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_features_match_torch(flip, shift):
    timesteps = np.array([0, 1, 50, 999])
    theirs = diffusers.models.embeddings.get_timestep_embedding(torch.from_numpy(timesteps), 320, flip, shift).numpy()
    ours = unet.timestep_features(jnp.asarray(timesteps), 320, flip_sin_to_cos=flip, freq_shift=shift)
    assert ours.dtype == jnp.float32
    assert error(ours, theirs) < 2e-5


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    changes, count = PUBLISHED[name]
    with torch.device("meta"):
        oracle = diffusers.UNet2DConditionModel(**changes)
    theirs = {name: tuple(x.shape) for name, x in oracle.state_dict().items()}
    module = nnx.eval_shape(lambda: unet.UNet(read(oracle.config), rngs=nnx.Rngs(0)))
    assert {name: t.source_shape for t in convert.targets(module) for name in t.names} == theirs
    assert sum(x.size for x in jax.tree.leaves(module)) == sum(x.numel() for x in oracle.parameters()) == count


def test_published_network_runs_abstractly():
    """Levels, skips and heads of the full network fit together at the published size of 64 x 64 latents."""

    def forward():
        network = unet.UNet(unet.Config(), rngs=nnx.Rngs(0))
        return network(jnp.zeros((2, 64, 64, 4)), jnp.zeros(2), jnp.zeros((2, 77, 768)))

    assert jax.eval_shape(forward).shape == (2, 64, 64, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable-diffusion-v1-5", "stable-diffusion-2-1"])
def test_full_size_matches_torch(name):
    """The published networks at 32x32 latents, output and gradients.

    Measured: output and gradients by latents and text: 1.5 1.4e-5, 6.1e-5, 5.6e-5;
    2.1 1.5e-5, 8.2e-5, 8.3e-5.
    """
    changes, _ = PUBLISHED[name]
    oracle = networks.redraw(diffusers.UNet2DConditionModel(**changes), seed=0)
    config = read(oracle.config)
    network = load(config, {name: x.numpy() for name, x in oracle.state_dict().items()})
    latents, text = draw(0, 1, 32, 32, 4), draw(1, 1, 77, config.cross_attention_dim)
    timesteps, cotangent = np.array([421]), draw(2, 1, 32, 32, 4)
    ours = run(network, latents, timesteps, cotangent, text)
    other = predict(network, latents, timesteps, draw(3, *text.shape))

    z, h = to_torch(latents).double().requires_grad_(True), torch.from_numpy(text).double().requires_grad_(True)
    theirs = networks.exact(oracle, oracle.time_proj)(z, torch.from_numpy(timesteps), h).sample
    (theirs * to_torch(cotangent)).sum().backward()
    errors = [error(a, b) for a, b in zip(ours, (to_numpy(theirs), to_numpy(z.grad), h.grad.numpy()), strict=True)]
    print(name, "output, gradients by latents and text:", errors)
    assert max(errors) < 1e-4
    assert error(other, to_numpy(theirs)) > 0.1


@pytest.mark.slow
def test_full_size_sdxl_matches_torch(tmp_path):
    """The published network at 16 x 16 latents in float32, output and gradients, one side after the other for the memory.

    Measured: output 1.7e-6, gradients by latents, states and pooled text 4.6e-6, 5.0e-6, 5.1e-6; three minutes, 12 GB.
    """
    changes, _ = PUBLISHED["stable-diffusion-xl-base-1.0"]
    oracle = networks.redraw(diffusers.UNet2DConditionModel(**changes), seed=0)
    config = read(oracle.config)
    given = draw(0, 1, 16, 16, 4), np.array([421]), draw(1, 1, 77, config.cross_attention_dim), draw(2, 1, 1280)
    cotangent, size = draw(3, 1, 16, 16, 4), (16, 16)
    z, h, pooled = to_torch(given[0]).requires_grad_(), *(torch.from_numpy(x).requires_grad_() for x in given[2:])
    # Its 70 blocks attend by random weights so sharply that a rounding error would change all that follows.
    for name, p in oracle.named_parameters():
        p.requires_grad_(False).mul_(0.2 if name.endswith("to_q.weight") else 1.0)
    theirs = oracle(z, torch.from_numpy(given[1]), h, added_cond_kwargs=added([h, pooled], size)).sample
    (theirs * to_torch(cotangent)).sum().backward()
    exact = [to_numpy(theirs), to_numpy(z.grad), h.grad.numpy(), pooled.grad.numpy()]
    oracle.save_pretrained(tmp_path)
    del oracle, theirs
    ours = run(loading.load("unet", tmp_path), given[0], given[1], cotangent, *given[2:])
    errors = [error(a, b) for a, b in zip(ours, exact, strict=True)]
    print("output, gradients by latents, states and pooled text:", errors)
    assert max(errors) < 1e-4


@pytest.mark.parametrize(
    "key, value",
    [
        ("act_fn", "gelu"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("mid_block_scale_factor", 2.0),
        ("downsample_padding", 0),
        ("only_cross_attention", True),
        ("dual_cross_attention", True),
        ("attention_type", "gated"),
        ("encoder_hid_dim", 1024),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 1000),
        ("addition_embed_type", "text_image"),
        ("resnet_time_scale_shift", "scale_shift"),
        ("time_embedding_type", "fourier"),
        ("time_cond_proj_dim", 256),
        ("conv_in_kernel", 1),
        ("layers_per_block", [2, 2, 2, 2]),
        ("transformer_layers_per_block", [1, 2, 10]),
        ("cross_attention_dim", [768, 768, 768, 768]),
        ("down_block_types", ["AttnDownBlock2D"] * 4),
        ("up_block_types", ["UpBlock2D"] * 3),
        ("attention_head_dim", [5, 10, 20]),
        ("attention_head_dim", 7),
    ],
)
def test_config_value_that_is_not_implemented_is_named(key, value):
    with pytest.raises(ValueError, match=f"{key}=") as raised:
        read({key: value})
    assert str(value).strip("[]") in str(raised.value)


def test_configs_read_from_json_are_hashable():
    assert hash(read({"attention_head_dim": [5, 10, 20, 20]})) == hash(unet.Config(attention_head_dim=(5, 10, 20, 20)))
