"""SigLIP against transformers' torch class, with the same weights, and as a directory."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from referee_jax.models import layers, siglip
from referee_jax.weights import convert, load
from tests.conftest import relative_l2
from tests.lazy import torch, transformers
from tests.oracles import networks

# Each branch: what differs in text_config and in vision_config. All images leave a remainder beside
# their patches but one.
SHORT = {"max_position_embeddings": 8}
BRANCHES = {
    "published": (SHORT, {}),
    "no remainder": (SHORT, {"image_size": 32}),
    "projection of another width": (SHORT | {"hidden_size": 24, "projection_size": 32, "num_attention_heads": 3}, {}),
    "other activation, eps and heads": (
        SHORT | {"hidden_act": "gelu", "layer_norm_eps": 1e-2},
        {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-2, "num_attention_heads": 1},
    ),
}
IDS = np.random.default_rng(3).integers(0, 30, (3, 8))


def build(branch="published"):
    """The oracle, its tensors, and our config of it."""
    text, vision = BRANCHES[branch]
    oracle = networks.siglip(text=text, vision=vision)
    tensors = {name: x.numpy() for name, x in oracle.state_dict().items()}
    return oracle, tensors, load.KINDS["siglip"].config(json.loads(oracle.config.to_json_string()), where="config.json")


def fill(config, tensors, dtype=jnp.float32):
    row = load.KINDS["siglip"]
    module = nnx.eval_shape(lambda: row.network(config, rngs=nnx.Rngs(0)))
    return convert.fill(module, tensors, dtype=dtype, ignore=row.ignore, float32=row.float32)


def images(config, seed=0):
    size = config.vision_config.image_size
    return np.random.default_rng(seed).normal(size=(2, size, size, 3)).astype(np.float32)


@jax.jit
def ours(network, x, ids, cotangents):
    """Features of images and texts, their logits, and the image gradients of the first and the last."""

    def both(x):
        image = network.encode_image(x)
        return image, network.logits(image @ network.encode_text(ids).T)

    (image, logits), pullback = jax.vjp(both, x)
    zeros = jax.tree.map(jnp.zeros_like, cotangents)
    gradients = pullback((cotangents[0], zeros[1]))[0], pullback((zeros[0], cotangents[1]))[0]
    return {"image": image, "text": network.encode_text(ids), "logits": logits}, gradients


def compare(oracle, network, x, ids):
    """Outputs and image gradients agree; the oracle sees both image and text."""
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().requires_grad_()
    theirs = oracle(input_ids=torch.from_numpy(ids), pixel_values=pixels)
    expected = {"image": theirs.image_embeds, "text": theirs.text_embeds, "logits": theirs.logits_per_image}
    rng = np.random.default_rng(1)
    cotangents = tuple(rng.normal(size=expected[k].shape).astype(np.float32) for k in ("image", "logits"))
    actual, gradients = ours(network, x, ids, cotangents)
    for name, value in expected.items():
        print(name, relative_l2(actual[name], value.detach()))
        assert relative_l2(actual[name], value.detach()) < 1e-4
        assert actual[name].dtype == jnp.float32
    for name, cotangent, gradient in zip(("image", "logits"), cotangents, gradients, strict=True):
        total = (expected[name] * torch.from_numpy(cotangent)).sum()
        exact = torch.autograd.grad(total, pixels, retain_graph=True)[0].permute(0, 2, 3, 1)
        print("gradient of", name, relative_l2(gradient, exact))
        assert relative_l2(gradient, exact) < 1e-4
        assert exact.abs().max() > 1e-4
    for name in ("image", "text"):
        assert relative_l2(actual[name][:1], actual[name][1:2]) > 0.1
    assert np.ptp(actual["logits"], axis=0).max() > 0.1 and np.ptp(actual["logits"], axis=1).max() > 0.1
    return actual, gradients


@pytest.mark.parametrize("branch", BRANCHES)
def test_matches_transformers(branch):
    oracle, tensors, config = build(branch)
    network, x = fill(config, tensors), images(config)
    actual, gradients = compare(oracle, network, x, IDS)
    np.testing.assert_allclose(np.linalg.norm(actual["image"], axis=-1), 1, rtol=1e-5)
    # Only what is left over beside the patches is not seen.
    left = config.vision_config.image_size % 8
    assert (left == 0) == (branch == "no remainder")
    seen = np.abs(gradients[0]).max((0, 3)) > 0
    assert seen[: len(seen) - left, : len(seen) - left].all() and seen.sum() == (len(seen) - left) ** 2


def test_padding_is_read_as_text():
    """No mask and no causality: another first token, or another number of padding tokens, is another text."""
    _, tensors, config = build()
    encode = jax.jit(siglip.SigLIP.encode_text)
    texts = np.array([[7, 8, 1, 0, 0, 0, 0, 0], [9, 8, 1, 0, 0, 0, 0, 0], [7, 8, 1, 1, 0, 0, 0, 0]])
    features = encode(fill(config, tensors), texts)
    assert relative_l2(features[1], features[0]) > 0.1 and relative_l2(features[2], features[0]) > 0.1


def test_scalars_stay_exact():
    _, tensors, config = build()
    network = fill(config, tensors, jnp.bfloat16)
    assert network.logit_scale[...].dtype == network.logit_bias[...].dtype == jnp.float32
    assert layers.float_dtype(network.vision_model) == jnp.bfloat16


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_directory(shards, tmp_path):
    oracle, tensors, config = build()
    oracle.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shards == "20KB")
    network = load.load("siglip", tmp_path)
    assert network.config == config
    jax.tree.map(np.testing.assert_array_equal, network, fill(config, tensors))
    exported = convert.export(network)
    assert set(exported) == set(tensors)
    for name, x in tensors.items():
        np.testing.assert_array_equal(exported[name], x)


def test_what_early_versions_wrote(tmp_path):
    """Tables of position numbers among the weights, and CLIP's keys in the config, change nothing."""
    oracle, tensors, config = build()
    oracle.save_pretrained(tmp_path)
    tables = {f"{tower}_model.embeddings.position_ids": np.arange(8)[None] for tower in ("text", "vision")}
    safetensors.numpy.save_file({k: np.array(x) for k, x in (tensors | tables).items()}, tmp_path / "model.safetensors")
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"projection_dim": 512, "logit_scale_init_value": 2.6592}
    (tmp_path / "config.json").write_text(json.dumps(values))
    jax.tree.map(np.testing.assert_array_equal, load.load("siglip", tmp_path), fill(config, tensors))


def test_too_few_tokens_and_wrong_image_size_are_refused():
    _, tensors, config = build()
    network = fill(config, tensors)
    with pytest.raises(ValueError, match=r"7 tokens, but SigLIP reads texts padded to 8"):
        network.encode_text(IDS[:, :7])
    with pytest.raises(ValueError, match=r"\(1, 36, 32, 3\), but SigLIP takes \[B, 36, 36, 3\]"):
        network.encode_image(jnp.zeros((1, 36, 32, 3)))


def published(text, vision, old=True):
    """A config.json as Google wrote it: what transformers has as default is left out."""
    values = {"architectures": ["SiglipModel"], "torch_dtype": "float32"} if old else {}
    return values | {
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model"} | text,
        "transformers_version": "4.37.0.dev0" if old else "4.49.0.dev0",
        "vision_config": {"model_type": "siglip_vision_model"} | vision,
    }


_BASE = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
_SO400M = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=27)
_SO400M_VISION = _SO400M | {"image_size": 384, "patch_size": 14}
PUBLISHED = {
    "google/siglip-base-patch16-224": published(_BASE | {"vocab_size": 32000}, _BASE | {"patch_size": 16}),
    "google/siglip-so400m-patch14-384": published(_SO400M, _SO400M_VISION),
    "google/siglip2-base-patch16-224": published({"vocab_size": 256000}, {}, old=False),
    "google/siglip2-so400m-patch14-384": published(
        _SO400M | {"projection_size": 1152, "vocab_size": 256000}, _SO400M_VISION, old=False
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("saved_again", [False, True])
def test_published_config(name, saved_again):
    """Names and shapes of all parameters, and every value of the config, are as transformers reads them.

    Also after transformers has read and written the file anew, which adds all keys that it has
    today.
    """
    theirs = transformers.SiglipConfig.from_dict(PUBLISHED[name])
    values = json.loads(theirs.to_json_string(use_diff=False)) if saved_again else PUBLISHED[name]
    row = load.KINDS["siglip"]
    config = row.config(values, where="config.json")
    for mine, other in ((config.text_config, theirs.text_config), (config.vision_config, theirs.vision_config)):
        for field in dataclasses.fields(mine):
            value = getattr(mine, field.name)
            if field.name == "projection_size" and value is None:
                value = mine.hidden_size
            assert value == getattr(other, field.name), field.name
    with torch.device("meta"):
        oracle = transformers.SiglipModel(theirs)
    module = nnx.eval_shape(lambda: row.network(config, rngs=nnx.Rngs(0)))
    actual = {n: target.source_shape for target in convert.targets(module) for n in target.names}
    assert actual == {n: tuple(x.shape) for n, x in oracle.state_dict().items()}
    assert len(actual) > 400


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("vision_config", {"vision_use_head": False}, r"vision_config: vision_use_head=False is not implemented"),
        ("vision_config", {"hidden_act": "tanh"}, r"vision_config: hidden_act='tanh' is not implemented"),
        ("vision_config", {"num_channels": 4}, r"num_channels=4 is not implemented; supported: 3"),
        ("vision_config", {"image_size": [224, 224]}, r"image_size=\[224, 224\] is of the wrong type; expected int"),
        ("vision_config", {"num_patches": 256}, r"vision_config: the key num_patches=256 is not known to"),
        ("text_config", {"num_attention_heads": 7}, r"hidden_size=768 does not divide into num_attention_heads=7"),
        ("text_config", {"projection_size": 512}, r"text_config.projection_size=512 is not implemented with another"),
        ("text_config", {"no_head": True}, r"text_config: the key no_head=True is not known to"),
        ("text_config", {"model_type": "siglip2_text_model"}, r"model_type='siglip2_text_model' is not implemented"),
        ("", {"model_type": "siglip2"}, r"config.json: model_type='siglip2' is not implemented; supported: 'siglip'"),
    ],
)
def test_configs_that_are_refused(where, change, message):
    values = published({}, {})
    values = values | change if not where else values | {where: values[where] | change}
    with pytest.raises(load.WeightsError, match=message):
        load.KINDS["siglip"].config(values, where="config.json")


@pytest.mark.slow
def test_full_size_matches_transformers():
    """B/16 at 224 px.

    Relative L2 errors measured on a CPU: image features 2.1e-6, text 2.8e-6, logits 8.7e-7; image
    gradients 1.5e-5 of both features and logits.
    """
    values = PUBLISHED["google/siglip-base-patch16-224"]
    oracle = networks.redraw_siglip(transformers.SiglipModel(transformers.SiglipConfig.from_dict(values)), seed=0)
    oracle.logit_scale.fill_(4.7)  # cosines of so many dimensions are small: about the published temperature
    oracle.logit_bias.fill_(-12.0)
    config = load.KINDS["siglip"].config(values, where="config.json")
    network = fill(config, {name: x.numpy() for name, x in oracle.state_dict().items()})
    compare(oracle, network, images(config), np.random.default_rng(2).integers(0, 32000, (3, 64)))
