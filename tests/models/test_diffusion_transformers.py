"""SD3's and FLUX's transformers against diffusers' torch classes, with the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from referee_jax.models.diffusion import flux, sd3
from referee_jax.weights import config_json, convert, load
from tests.conftest import cosine, relative_l2
from tests.lazy import diffusers, torch
from tests.oracles import networks

TOKENS, TEXT, POOLED = 5, 20, 12  # of a text
_SD3 = dict(
    sample_size=8, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4,
    joint_attention_dim=TEXT, caption_projection_dim=32, pooled_projection_dim=POOLED, pos_embed_max_size=9,
)  # fmt: skip
_FLUX = dict(
    in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=TEXT, pooled_projection_dim=POOLED, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
BRANCHES = {
    "sd3": ("sd3", _SD3),
    "sd3.5-large": ("sd3", _SD3 | {"qk_norm": "rms_norm"}),
    "sd3.5-medium": ("sd3", _SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}),
    "sd3.5, all blocks dual but the last": ("sd3", _SD3 | {"num_layers": 3, "dual_attention_layers": (0, 1)}),
    "flux schnell": ("flux", _FLUX),
    "flux dev": ("flux", _FLUX | {"guidance_embeds": True}),
}
CLASSES = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}

_SD3_PUBLISHED = dict(attention_head_dim=64, joint_attention_dim=4096, pooled_projection_dim=2048)
# config.json of the published checkpoints, what differs from diffusers' own defaults, and their numbers of parameters.
PUBLISHED = {
    "stable-diffusion-3-medium": (
        "sd3",
        _SD3_PUBLISHED
        | dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192),
        2_028_328_000,
    ),
    "stable-diffusion-3.5-medium": (
        "sd3",
        _SD3_PUBLISHED
        | dict(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
            qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
        ),
        2_243_171_520,
    ),
    "stable-diffusion-3.5-large": (
        "sd3",
        _SD3_PUBLISHED
        | dict(
            num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192,
            qk_norm="rms_norm",
        ),
        8_056_627_520,
    ),
    "FLUX.1-schnell": ("flux", {}, 11_891_178_560),
    "FLUX.1-dev": ("flux", {"guidance_embeds": True}, 11_901_408_320),
}  # fmt: skip


def build(kind, values, seed=0):
    """The oracle and our network of its config.json and weights."""
    oracle = networks.redraw(getattr(diffusers, CLASSES[kind])(**values), seed)
    if not oracle.config.get(
        "qk_norm", True
    ):  # attention by random weights is else so sharp that gradients are chaotic
        for name, p in oracle.named_parameters():
            p.data.mul_(0.3 if name.endswith(("to_q.weight", "add_q_proj.weight")) else 1.0)
    tensors = {name: x.numpy() for name, x in oracle.state_dict().items()}
    return oracle.eval(), fill(kind, oracle.config, tensors)


def fill(kind, values, tensors, dtype=jnp.float32):
    row = load.KINDS[kind]
    module = load.unfilled(row, row.config(values, where="config.json"))
    return convert.fill(module, tensors, dtype=dtype, float32=row.float32)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs(height, width, seed=0):
    """Latents, timesteps, states and pooled text of two pictures."""
    return (
        draw(seed, 2, height, width, 4),
        np.array([37.5, 951.0], np.float32),
        draw(1, 2, TOKENS, TEXT),
        draw(2, 2, POOLED),
    )


def theirs(oracle, latents, timesteps, states, pooled):
    """The oracle's prediction of tensors in our layout."""
    x, h, w = latents.permute(0, 3, 1, 2), *latents.shape[1:3]
    if isinstance(oracle, diffusers.SD3Transformer2DModel):
        return oracle(x, states, pooled, timesteps).sample.permute(0, 2, 3, 1)
    pipeline = diffusers.FluxPipeline
    packed = pipeline._pack_latents(x, len(x), x.shape[1], h, w)
    places = pipeline._prepare_latent_image_ids(len(x), h // 2, w // 2, x.device, x.dtype)
    text = torch.zeros(states.shape[1], 3, dtype=x.dtype)
    guidance = torch.full((len(x),), 3.5, dtype=x.dtype) if oracle.config.guidance_embeds else None
    out = oracle(packed, states, pooled, timesteps / 1000, places, text, guidance).sample
    return pipeline._unpack_latents(out, 8 * h, 8 * w, 8).permute(0, 2, 3, 1)


@jax.jit
def run(network, cotangent, latents, timesteps, *text):
    """Output and the gradients with respect to latents and text."""
    ours, pullback = jax.vjp(lambda z, *text: network(z, timesteps, *text), latents, *text)
    return ours, *pullback(cotangent)


@pytest.mark.parametrize("branch", BRANCHES)
def test_matches_torch(branch):
    oracle, network = build(*BRANCHES[branch])
    given, cotangent = inputs(6, 8), draw(4, 2, 6, 8, 4)
    tensors = [torch.from_numpy(x).double().requires_grad_() for x in given]
    wanted = theirs(networks.exact(oracle, oracle.time_text_embed.time_proj), *tensors)
    (wanted * torch.from_numpy(cotangent)).sum().backward()
    ours, *gradients = run(network, cotangent, *given)
    assert relative_l2(ours, wanted.detach()) < 1e-4
    for gradient, x in zip(gradients, (tensors[0], *tensors[2:]), strict=True):
        assert relative_l2(gradient, x.grad) < 1e-4
    # The comparison means something: the output depends on all inputs.
    for n in range(4):
        other = [x[::-1] if i == n else x for i, x in enumerate(given)]
        assert relative_l2(run(network, cotangent, *other)[0], wanted.detach()) > 0.02


def test_guidance_is_seen():
    _, network = build(*BRANCHES["flux dev"])
    given = inputs(4, 4)
    assert relative_l2(network(*given, guidance=1.0), network(*given)) > 1e-3
    np.testing.assert_array_equal(network(*given, guidance=jnp.full(2, 3.5)), network(*given))


@pytest.mark.parametrize("branch", ["sd3.5-medium", "flux schnell"])
def test_bfloat16_points_the_same_way(branch):
    kind, values = BRANCHES[branch]
    oracle, network = build(kind, values)
    half = fill(kind, oracle.config, {name: x.numpy() for name, x in oracle.state_dict().items()}, jnp.bfloat16)
    given, cotangent = inputs(6, 8), draw(4, 2, 6, 8, 4)
    for a, b in zip(run(half, cotangent, *given), run(network, cotangent, *given), strict=True):
        assert a.dtype == jnp.float32 and cosine(a, b) > 0.99


@pytest.mark.parametrize("branch", ["sd3.5-medium", "flux schnell"])
def test_a_directory(branch, tmp_path):
    kind, values = BRANCHES[branch]
    oracle, network = build(kind, values)
    oracle.save_pretrained(tmp_path)
    loaded = load.load(kind, tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, network))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    kind, values, count = PUBLISHED[name]
    with torch.device("meta"):
        oracle = getattr(diffusers, CLASSES[kind])(**values)
    shapes = {name: tuple(x.shape) for name, x in oracle.state_dict().items()}
    row = load.KINDS[kind]
    module = load.unfilled(row, row.config(oracle.config, where="config.json"))
    assert {name: t.source_shape for t in convert.targets(module) for name in t.names} == shapes
    buffers = sum(x.size for x in jax.tree.leaves(module)) - sum(x.numel() for x in oracle.parameters())
    assert buffers == (oracle.pos_embed.pos_embed.numel() if kind == "sd3" else 0)
    assert sum(x.numel() for x in oracle.parameters()) == count


def test_more_patches_than_positions():
    _, network = build(*BRANCHES["sd3"])
    with pytest.raises(ValueError, match="10 x 4 patches, but SD3 has 9 x 9 positions"):
        network(*inputs(20, 8))


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("sd3", "dual_attention_layers", [1, 2]),
        ("sd3", "dual_attention_layers", list(range(18))),
        ("sd3", "qk_norm", "layer_norm"),
        ("sd3", "caption_projection_dim", 1536),
        ("sd3", "patch_sizes", 2),
        ("flux", "patch_size", 2),
        ("flux", "out_channels", 16),
        ("flux", "axes_dims_rope", [16, 56]),
        ("flux", "axes_dims_rope", [15, 57, 56]),
        ("flux", "_class_name", "Flux2Transformer2DModel"),
    ],
)
def test_config_value_that_is_not_implemented_is_named(kind, key, value):
    with pytest.raises(convert.WeightsError, match=f"{key}="):
        load.KINDS[kind].config({key: value}, where="config.json")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable-diffusion-3.5-medium", "FLUX.1-schnell"])
def test_full_width_matches_torch(name):
    """The published widths: a dual, a plain and the last block of SD3.5-medium; two double and two single ones of FLUX.

    Measured: output, gradients by latents, states and pooled text: SD3.5 3.3e-6, 2.9e-6, 4.8e-6, 3.8e-6; FLUX 3.5e-6, 5.8e-6,
    6.4e-6, 5.7e-6; a minute each, 10 GB.
    """
    kind, values, _ = PUBLISHED[name]
    few = {"num_layers": 3, "dual_attention_layers": (0,), "pos_embed_max_size": 32}
    oracle, network = build(kind, values | (few if kind == "sd3" else {"num_layers": 2, "num_single_layers": 2}))
    given = draw(0, 1, 16, 16, 16), np.array([421.0], np.float32), draw(1, 1, 64, 4096)
    given = (*given, draw(2, 1, oracle.config.pooled_projection_dim))
    cotangent = draw(3, 1, 16, 16, 16)
    tensors = [torch.from_numpy(x).double().requires_grad_() for x in given]
    wanted = theirs(networks.exact(oracle, oracle.time_text_embed.time_proj), *tensors)
    (wanted * torch.from_numpy(cotangent)).sum().backward()
    ours = run(network, cotangent, *given)
    exact = wanted.detach(), tensors[0].grad, tensors[2].grad, tensors[3].grad
    errors = [relative_l2(a, b) for a, b in zip(ours, exact, strict=True)]
    print(name, "output, gradients by latents, states and pooled text:", errors)
    assert max(errors) < 1e-4


@pytest.mark.slow
def test_full_size_sd35_medium_matches_torch(tmp_path):
    """The published network, all 24 blocks, at 16 x 16 latents in float32, one side after the other for the memory.

    Measured: output, gradients by latents, states and pooled text 4.1e-6, 5.4e-6, 7.4e-6, 6.2e-6; some minutes, 12 GB.
    """
    _, values, _ = PUBLISHED["stable-diffusion-3.5-medium"]
    oracle = networks.redraw(diffusers.SD3Transformer2DModel(**values), seed=0)
    given = draw(0, 1, 16, 16, 16), np.array([421.0], np.float32), draw(1, 1, 64, 4096), draw(2, 1, 2048)
    cotangent = draw(3, 1, 16, 16, 16)
    tensors = [torch.from_numpy(x).requires_grad_() for x in given]
    wanted = theirs(oracle, *tensors)
    (wanted * torch.from_numpy(cotangent)).sum().backward()
    exact = [x.detach().numpy() for x in (wanted, tensors[0].grad, tensors[2].grad, tensors[3].grad)]
    oracle.save_pretrained(tmp_path)
    del oracle, wanted
    ours = run(load.load("sd3", tmp_path), cotangent, *given)
    errors = [relative_l2(a, b) for a, b in zip(ours, exact, strict=True)]
    print("output, gradients by latents, states and pooled text:", errors)
    assert max(errors) < 1e-4


def test_configs_are_hashable():
    for kind, cls in (("sd3", sd3.Config), ("flux", flux.Config)):
        values = {"dual_attention_layers": [0, 1]} if kind == "sd3" else {"axes_dims_rope": [16, 56, 56]}
        config = config_json.config_from_json(cls, values)
        assert hash(config) == hash(dataclasses.replace(config))
        assert isinstance(
            nnx.eval_shape(lambda c=config, k=kind: load.KINDS[k].network(c, rngs=nnx.Rngs(0))), nnx.Module
        )
