"""BLIP-2's image-text judge against transformers' torch class, with the same weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from referee_jax.models import blip2, layers
from referee_jax.weights import convert, load
from tests import conftest
from tests.lazy import torch, transformers
from tests.oracles import networks

# Each branch: what differs in vision_config and in qformer_config; what only our config says; the
# seed of the weights.
BRANCHES = {
    "EVA": ({}, {}, {}, 0),
    "other sizes": (
        {"image_size": 31, "patch_size": 7, "hidden_size": 30, "num_attention_heads": 5, "layer_norm_eps": 1e-2},
        {"num_hidden_layers": 3, "cross_attention_frequency": 3, "layer_norm_eps": 1e-2},
        {},
        0,
    ),
    "no bias, tanh, other last norm": (
        {"qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"},
        {"num_hidden_layers": 2, "cross_attention_frequency": 1, "hidden_act": "gelu_pytorch_tanh"},
        {"post_layernorm_eps": 1e-1},
        0,
    ),
    "CLIP": (
        {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        {},
        {"pre_layernorm": True, "patch_bias": False, "post_layernorm_eps": 1e-1},
        3,
    ),
}
IDS = np.array([[2, 7, 9, 12, 3, 0, 0], [2, 20, 8, 15, 21, 6, 3]])
MASK = (IDS != 0).astype(np.int32)


def build(branch, dtype=jnp.float32):
    """The oracle and our network with its weights."""
    vision, qformer, tower_changes, seed = BRANCHES[branch]
    oracle = networks.blip2(seed, vision, qformer)
    values = json.loads(oracle.config.to_json_string())
    values["vision_config"] |= tower_changes
    tower = oracle.vision_model
    if "post_layernorm_eps" in tower_changes:
        tower.post_layernorm.eps = tower_changes["post_layernorm_eps"]
    if not tower_changes.get("patch_bias", True):
        tower.embeddings.patch_embedding.bias.zero_()
    if tower_changes.get("pre_layernorm"):
        norm = torch.nn.LayerNorm(tower.config.hidden_size, eps=tower.config.layer_norm_eps)
        tower.embeddings.norm = networks.redraw(norm, seed + 1)
        tower.embeddings.register_forward_hook(lambda module, _, states: module.norm(states))
    return oracle, fill(oracle, load.KINDS["blip2"].config(values, where="config.json"), dtype)


def fill(oracle, config, dtype=jnp.float32):
    row = load.KINDS["blip2"]
    tensors = {name: x.numpy() for name, x in oracle.state_dict().items()}
    tensors = {name.replace("embeddings.norm.", "pre_layernorm."): x for name, x in tensors.items()}
    if not config.vision_config.patch_bias:
        assert not tensors.pop("vision_model.embeddings.patch_embedding.bias").any()
    module = nnx.eval_shape(lambda: row.network(config, rngs=nnx.Rngs(0)))
    return convert.fill(module, tensors, dtype=dtype, ignore=row.ignore, float32=row.float32)


def images(size, seed=0):
    return np.random.default_rng(seed).normal(size=(2, size, size, 3)).astype(np.float32)


def normal(shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous().requires_grad_()


def theirs(oracle, x, ids=IDS, mask=MASK):
    """ITM logits, cosines `[image, text]`, features of images and texts, and the pixels they depend on."""
    pixels, ids, mask = to_torch(x), torch.from_numpy(ids), torch.from_numpy(mask)
    ask = lambda head: oracle(pixels, ids, attention_mask=mask, use_image_text_matching_head=head)
    match, contrast = ask(True), ask(False)
    return match.logits_per_image, contrast.logits_per_image, contrast.image_embeds, contrast.text_embeds, pixels


@jax.jit
def ours(network, x, ids, mask):
    image, text = network.encode_image(x), network.encode_text(ids, mask)
    cosines = [network.contrast(image, jax.tree.map(lambda t, n=n: t[n : n + 1], text)) for n in range(len(ids))]
    return network.match(image, text), jnp.stack(cosines, 1), image.features, text.features


@jax.jit
def ours_with_gradients(network, x, ids, mask, cotangents):
    """`ours`, and the gradient of each output that depends on the image along its cotangent."""
    actual, pullback = jax.vjp(lambda x: ours(network, x, ids, mask), x)
    zeros = jax.tree.map(jnp.zeros_like, actual)
    one = [tuple(c if m == n else z for m, z in enumerate(zeros)) for n, c in enumerate(cotangents)]
    # One program for all of them, by vmap: compiling is what takes the time here.
    return actual, jax.vmap(pullback)(jax.tree.map(lambda *c: jnp.stack(c), *one))[0]


def check_parity(oracle, network, x, ids=IDS, mask=MASK, moves=0.1):
    """Every output and its gradient.

    And that the oracle sees image and text, without which agreeing means nothing:
    another one moves each output by `moves`, relative to it.
    """
    *expected, pixels = theirs(oracle, x, ids, mask)
    cotangents = [normal(y.shape) for y in expected[:3]]  # texts' features, the fourth, see no image
    actual, gradients = ours_with_gradients(network, x, ids, mask, cotangents)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == jnp.float32
        assert conftest.relative_l2(a, b.detach()) < 1e-4
    for a, b, cotangent in zip(gradients, expected, cotangents, strict=False):
        gradient = torch.autograd.grad((b * torch.from_numpy(cotangent)).sum(), pixels, retain_graph=True)[0]
        assert np.linalg.norm(gradient) > 1e-3
        assert conftest.relative_l2(a, gradient.permute(0, 2, 3, 1)) < 1e-4
    with torch.no_grad():
        other_image = theirs(oracle, x[::-1].copy(), ids, mask)
        other_text = theirs(oracle, x, ids[::-1].copy(), mask[::-1].copy())
    for n in (0, 1, 2):
        assert conftest.relative_l2(other_image[n], expected[n].detach()) > moves
    for n in (0, 1, 3):
        assert conftest.relative_l2(other_text[n], expected[n].detach()) > moves


@pytest.mark.parametrize("branch", BRANCHES)
def test_matches_transformers(branch):
    oracle, network = build(branch)
    check_parity(oracle, network, images(oracle.config.vision_config.image_size))


@pytest.mark.parametrize("size", [16, 40])
def test_other_image_sizes_match_transformers(size):
    oracle, network = build("EVA")
    x = images(size)
    pixels = to_torch(x)
    expected = oracle.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    cotangent = normal(expected.shape)
    actual, ours = jax.jit(_states)(network.vision_model, x, cotangent)
    gradient = torch.autograd.grad((expected * torch.from_numpy(cotangent)).sum(), pixels)[0].permute(0, 2, 3, 1)
    assert conftest.relative_l2(actual, expected.detach()) < 1e-4
    assert conftest.relative_l2(ours, gradient) < 1e-4
    with torch.no_grad():  # the positions matter here
        oracle.vision_model.embeddings.position_embedding.copy_(0 * oracle.vision_model.embeddings.position_embedding)
        assert (
            conftest.relative_l2(oracle.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state, actual)
            > 0.1
        )


def _states(vision_model, x, cotangent):
    actual, pullback = jax.vjp(vision_model, x)
    return actual, pullback(cotangent)[0]


@pytest.mark.parametrize("old, new", [(3, 5), (16, 26), (16, 7), (4, 4), (1, 3)])
def test_interpolated_positions_match_torch(old, new):
    table = normal((1 + old * old, 6))
    grid = torch.from_numpy(table[1:].reshape(1, old, old, 6)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    actual = layers.interpolate_positions(jnp.asarray(table), new, new)
    np.testing.assert_array_equal(actual[0], table[0])
    assert conftest.relative_l2(actual[1:], expected.permute(0, 2, 3, 1).reshape(new * new, 6)) < 1e-5


def test_padding_is_not_seen():
    _, network = build("EVA")
    x, ids, mask = images(24), IDS[:1], MASK[:1]
    other = np.where(mask, ids, 9)
    for a, b in zip(ours(network, x, ids, mask), ours(network, x, other, mask), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    seen = ours(network, x, other, np.ones_like(mask))
    assert conftest.relative_l2(seen[0], ours(network, x, ids, mask)[0]) > 0.1


def test_bfloat16_is_of_the_vision_transformer():
    _, half = build("EVA", jnp.bfloat16)
    dtypes = {name: x.dtype for name, x in convert.export(half).items()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("vision_model.")} == {np.dtype(jnp.bfloat16)}
    assert {dtype for name, dtype in dtypes.items() if not name.startswith("vision_model.")} == {np.dtype(np.float32)}


def test_wrong_inputs_are_refused():
    _, network = build("EVA")
    with pytest.raises(
        ValueError, match=r"\(1, 24, 32, 3\), but BLIP-2 takes \[B, S, S, 3\], S = 24 or a multiple of 8"
    ):
        network.encode_image(jnp.zeros((1, 24, 32, 3)))
    with pytest.raises(ValueError, match=r"\(1, 25, 25, 3\), but BLIP-2 takes"):
        network.encode_image(jnp.zeros((1, 25, 25, 3)))
    with pytest.raises(ValueError, match="41 tokens, but BLIP-2 has 40 positions"):
        network.encode_text(np.zeros((1, 41), int), np.ones((1, 41), int))


@pytest.mark.parametrize(
    "part, change, message",
    [
        (
            "qformer_config",
            {"use_qformer_text_input": False},
            "qformer_config: use_qformer_text_input=False is not impl",
        ),
        (
            "qformer_config",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key' is not",
        ),
        ("vision_config", {"hidden_act": "mish"}, "vision_config: hidden_act='mish' is not implemented; supported: "),
        ("vision_config", {"window": 7}, "the key window=7 is not known to referee_jax.models.blip2.VisionConfig"),
        (
            "qformer_config",
            {"cross_attention_frequency": 3},
            "num_hidden_layers=4 is not implemented; supported: multiples",
        ),
        ("vision_config", {"num_attention_heads": 5}, "hidden_size=32 does not divide into num_attention_heads=5"),
    ],
)
def test_configs_that_are_not_implemented(part, change, message):
    values = json.loads(networks.blip2().config.to_json_string())
    values[part] |= change
    with pytest.raises(load.WeightsError, match=message):
        load.KINDS["blip2"].config(values, where="config.json")


def test_loads_what_transformers_saves(tmp_path):
    oracle = networks.blip2()
    oracle.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_parity(oracle, load.load("blip2", tmp_path), images(24))


# Salesforce/blip2-itm-vit-g and -coco, and LAVIS' own files: transformers' defaults but for these.
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "pre_layernorm": True, "patch_bias": False}
PUBLISHED = {
    "Salesforce/blip2-itm-vit-g": {"image_size": 224},
    "Salesforce/blip2-itm-vit-g-coco": {"image_size": 364},
    "blip2_pretrained.pth": {"image_size": 224, "post_layernorm_eps": 1e-5},
    "blip2_pretrained_vitL.pth": {"image_size": 224, "post_layernorm_eps": 1e-5} | CLIP,
}


def published(name):
    vision = PUBLISHED[name] | {"model_type": "blip_2_vision_model"}
    qformer = {"vocab_size": 30523, "use_qformer_text_input": True, "model_type": "blip_2_qformer"}
    text = {"model_type": "opt"}
    config = transformers.Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text)
    values = json.loads(config.to_json_string()) | {"lm_head": name.endswith(".pth")}
    return config, load.KINDS["blip2"].config(values, where="config.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    """Names and shapes of all parameters are transformers', the numbers of the config those of the paper."""
    theirs, config = published(name)
    vision, qformer = config.vision_config, config.qformer_config
    sizes = (vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads, vision.intermediate_size)
    assert sizes == ((23, 1024, 16, 4096) if vision.pre_layernorm else (39, 1408, 16, 6144))
    assert (vision.image_size, vision.patch_size) == (PUBLISHED[name]["image_size"], 14)
    assert (qformer.num_hidden_layers, qformer.hidden_size, qformer.cross_attention_frequency) == (12, 768, 2)
    assert (config.num_query_tokens, config.image_text_hidden_size, qformer.vocab_size) == (32, 256, 30523)
    with torch.device("meta"):
        oracle = transformers.Blip2ForImageTextRetrieval(theirs)
    module = nnx.eval_shape(lambda: blip2.BLIP2(config, rngs=nnx.Rngs(0)))
    actual = {name: target.source_shape for target in convert.targets(module) for name in target.names}
    expected = {name: tuple(x.shape) for name, x in oracle.state_dict().items()}
    if vision.pre_layernorm:
        expected |= dict.fromkeys(("vision_model.pre_layernorm.weight", "vision_model.pre_layernorm.bias"), (1024,))
        del expected["vision_model.embeddings.patch_embedding.bias"]
    if config.lm_head:
        transform = "cls.predictions.transform"
        expected |= {f"{transform}.dense.weight": (768, 768), "cls.predictions.bias": (30523,)}
        names = (f"{transform}.dense.bias", f"{transform}.LayerNorm.weight", f"{transform}.LayerNorm.bias")
        expected |= dict.fromkeys(names, (768,))
    assert actual == expected
    assert module.dec_token_id == 30522
    size = vision.image_size
    shapes = jax.eval_shape(
        ours, module, jnp.zeros((2, size, size, 3)), jnp.zeros((2, 32), jnp.int32), jnp.ones((2, 32), jnp.int32)
    )
    assert [x.shape for x in shapes] == [(2, 2), (2, 2), (2, 32, 256), (2, 256)]


def test_what_older_transformers_wrote_is_harmless():
    values = json.loads(published("Salesforce/blip2-itm-vit-g")[0].to_json_string())
    older = {"projection_dim": 512, "num_channels": 3, "dropout": 0.0, "initializer_factor": 1.0, "is_decoder": False}
    old = {**values, "vision_config": values["vision_config"] | older}
    read = load.KINDS["blip2"].config
    assert read(old, where="config.json") == read(values, where="config.json")


@pytest.mark.slow
def test_full_size_matches_transformers():
    """ViT-g and Q-Former at their published size: 1.2 billion parameters on either side."""
    theirs, config = published("Salesforce/blip2-itm-vit-g")
    oracle = networks.redraw_blip2(transformers.Blip2ForImageTextRetrieval(theirs), seed=0)
    ids = np.random.default_rng(2).integers(5, 30522, (2, 32))
    # Another text moves the matching by 0.08 here.
    check_parity(oracle, fill(oracle, config), images(224), ids, np.ones_like(ids), moves=0.01)
