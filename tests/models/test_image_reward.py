"""ImageReward against transformers' BLIP trunk and the arithmetic of its head, written out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from referee_jax.models import image_reward
from referee_jax.weights import convert, load
from tests.conftest import relative_l2
from tests.lazy import torch
from tests.oracles import networks

IDS = np.array([[2, 6, 8, 10, 3, 0, 0], [2, 5, 9, 9, 16, 12, 3]], np.int32)
MASK = IDS > 0


def images(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 32, 32, 3)).astype(np.float32)


def theirs(oracle, mlp, pixels, ids=IDS, mask=MASK):
    """Rewards of torch."""
    states = oracle.vision_model(pixels).last_hidden_state
    ids, mask = torch.from_numpy(ids).long(), torch.from_numpy(mask)
    x = oracle.text_encoder(ids, attention_mask=mask, encoder_hidden_states=states, return_dict=True)
    x = x.last_hidden_state[:, 0]
    for matrix, bias in mlp:
        x = x @ matrix.T + bias
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def to_torch(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous().requires_grad_()


ours = jax.jit(lambda network, x, ids, mask: network.reward(network.vision_model(x), ids, mask))


def test_matches_transformers(tmp_path):
    oracle, mlp = networks.save_image_reward(tmp_path)
    network, x = load.load("image_reward", tmp_path), images()
    pixels = to_torch(x)
    expected = theirs(oracle, mlp, pixels)
    actual, pullback = jax.vjp(lambda x: ours(network, x, IDS, MASK), jnp.asarray(x))
    assert actual.dtype == jnp.float32
    assert relative_l2(actual, expected.detach()) < 1e-4
    for n in range(2):
        gradient = torch.autograd.grad(expected[n], pixels, retain_graph=True)[0].permute(0, 2, 3, 1)
        assert np.linalg.norm(gradient) > 1e-2
        (mine,) = pullback(jnp.eye(2)[n])
        assert relative_l2(mine, gradient) < 1e-4
        print(relative_l2(actual[n], expected[n].detach()), relative_l2(mine, gradient))
    # Image, text and padding count.
    assert np.abs(ours(network, x[::-1], IDS, MASK) - actual).max() > 0.1
    assert np.abs(ours(network, x, IDS[::-1], MASK[::-1]) - actual).max() > 0.1
    np.testing.assert_allclose(ours(network, x, np.where(MASK, IDS, 9), MASK), actual, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_not_of_the_head(tmp_path):
    networks.save_image_reward(tmp_path)
    half = load.load("image_reward", tmp_path, dtype=jnp.bfloat16)
    dtypes = {name: x.dtype for name, x in convert.export(half).items()}
    assert all((dtype == np.float32) == name.startswith("mlp.") for name, dtype in dtypes.items())


def test_published_sizes():
    """ImageReward-v1.0: ViT-L/16 at 224 pixels and BERT-base that reads it, as transformers shapes them; 768-1024-...-1."""
    config = load.KINDS["image_reward"].config({}, where="config.json")
    assert config == image_reward.Config()
    oracle = networks.blip_trunk(config)
    expected = {name: tuple(x.shape) for name, x in oracle.state_dict().items()}
    expected = {name: shape for name, shape in expected.items() if name.startswith(("vision_model.", "text_encoder."))}
    sizes = (768, 1024, 128, 64, 16, 1)
    expected |= {f"mlp.layers.{n}.weight": (sizes[n + 1], sizes[n]) for n in range(5)}
    expected |= {f"mlp.layers.{n}.bias": (sizes[n + 1],) for n in range(5)}
    module = nnx.eval_shape(lambda: image_reward.ImageReward(config, rngs=nnx.Rngs(0)))
    assert {name: target.source_shape for target in convert.targets(module) for name in target.names} == expected
    assert expected["vision_model.embeddings.position_embedding"] == (1, 197, 1024)
    ids = jnp.zeros((2, 35), jnp.int32)
    assert jax.eval_shape(ours, module, jnp.zeros((2, 224, 224, 3)), ids, ids > 0).shape == (2,)


@pytest.mark.slow
def test_full_size_matches_transformers():
    config = image_reward.Config()
    oracle = networks.redraw(networks.blip_trunk(config, device="cpu"), 0)
    generator = np.random.default_rng(0)
    sizes = (768, *config.mlp_sizes)
    mlp = [
        (generator.normal(size=(b, a)).astype(np.float32) / a**0.5, generator.normal(size=b).astype(np.float32))
        for a, b in zip(sizes, sizes[1:], strict=False)
    ]
    tensors = {name: x.numpy() for name, x in oracle.state_dict().items()}
    tensors |= {f"mlp.layers.{n}.weight": matrix for n, (matrix, _) in enumerate(mlp)}
    tensors |= {f"mlp.layers.{n}.bias": bias for n, (_, bias) in enumerate(mlp)}
    module = nnx.eval_shape(lambda: image_reward.ImageReward(config, rngs=nnx.Rngs(0)))
    ignore = ("vision_proj.*", "text_proj.*", "itm_head.*")
    network = convert.fill(module, tensors, dtype=jnp.float32, ignore=ignore)
    x = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    ids = np.random.default_rng(1).integers(5, 30522, (2, 35)).astype(np.int32)
    pixels = to_torch(x)
    expected = theirs(oracle, [tuple(map(torch.from_numpy, pair)) for pair in mlp], pixels, ids, ids > 0)
    actual, pullback = jax.vjp(lambda x: ours(network, x, ids, ids > 0), jnp.asarray(x))
    assert relative_l2(actual, expected.detach()) < 1e-4
    gradient = torch.autograd.grad(expected.sum(), pixels)[0].permute(0, 2, 3, 1)
    assert relative_l2(pullback(jnp.ones(2))[0], gradient) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "blip"}, "the key model_type='blip' is not known to referee_jax.models.image_reward.Config"),
        ({"mlp_sizes": 3}, "mlp_sizes=3 is of the wrong type"),
        ({"dropout_of_mlp": 0.2}, "the key dropout_of_mlp=0.2 is not known to"),
    ],
)
def test_configs_that_are_refused(changes, message):
    values = json.loads(json.dumps(dataclasses.asdict(image_reward.Config()))) | changes
    with pytest.raises(load.WeightsError, match=message):
        load.KINDS["image_reward"].config(values, where="config.json")
