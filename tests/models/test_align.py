"""ALIGN against transformers' torch class, with the same weights, and as directories."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from referee_jax.models import align, layers
from referee_jax.weights import convert, load
from tests.conftest import relative_l2
from tests.lazy import torch, transformers
from tests.oracles import networks

# Two texts, the first of which is padded.
IDS = np.array([[2, 6, 8, 10, 3, 0, 0], [2, 5, 9, 9, 11, 7, 3]], np.int32)
MASK = IDS > 0

# Each branch: what differs in text_config, in vision_config, and height and width of the images.
# The three stages have blocks without an expansion (stride 1), with one and stride 2, and, behind
# the first of a stage, with residuals.
BRANCHES = {
    "odd": ({}, {}, (33, 33)),
    "even": ({}, {}, (32, 38)),
    "no stack": ({"type_vocab_size": 1}, {"depth_coefficient": 1.0, "num_block_repeats": [1, 1, 1]}, (33, 26)),
    "stride first": ({}, {"strides": [2, 1, 1], "expand_ratios": [2, 1, 3], "kernel_sizes": [5, 3, 7]}, (30, 31)),
    "square padding": ({}, {"depthwise_padding": [2, 5]}, (32, 33)),
    "channels rounded up, other eps, act and ratio": (
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-2},
        {"width_coefficient": 1.4, "depth_divisor": 12, "batch_norm_eps": 0.1, "hidden_act": "gelu"}
        | {"squeeze_expansion_ratio": 0.1},
        (33, 33),
    ),
}


def build(branch):
    """The oracle, its tensors, and our config of it."""
    text, vision, _ = BRANCHES[branch]
    width = 36 if vision.get("width_coefficient") else 24
    vision = vision | ({"out_channels": [8, 16, 24]} if width == 36 else {})
    config = networks.align_config(text=text, vision=vision, width=width)
    oracle = networks.redraw_align(transformers.AlignModel(config), seed=5)
    return oracle, tensors(oracle), ours(config)


def tensors(oracle):
    return {name: x.float().numpy() for name, x in oracle.state_dict().items()}


def ours(config):
    return load.KINDS["align"].config(json.loads(config.to_json_string()), where="config.json")


def fill(config, tensors, dtype=jnp.float32):
    row = load.KINDS["align"]
    module = nnx.eval_shape(lambda: align.ALIGN(config, rngs=nnx.Rngs(0)))
    return convert.fill(module, tensors, dtype=dtype, ignore=row.ignore, float32=row.float32)


def images(size, seed=0, count=2):
    """In [-1, 1], blots and noise."""
    rng = np.random.default_rng(seed)
    blots = jax.image.resize(rng.uniform(-0.5, 0.5, (count, 5, 5, 3)), (count, *size, 3), "linear")
    return np.float32(blots + rng.uniform(-0.5, 0.5, (count, *size, 3)))


def compare(oracle, network, x):
    """Outputs and image gradients agree with torch's in float64, and see their inputs."""
    oracle = oracle.double()
    pixels = torch.from_numpy(np.array(x)).double().permute(0, 3, 1, 2).contiguous().requires_grad_()
    theirs = oracle(
        input_ids=torch.from_numpy(IDS).long(), attention_mask=torch.from_numpy(MASK).long(), pixel_values=pixels
    )
    cotangent = np.random.default_rng(1).normal(size=theirs.image_embeds.shape).astype(np.float32)
    (theirs.image_embeds * torch.from_numpy(cotangent)).sum().backward()

    @jax.jit
    def call(network, x, cotangent):
        image, pullback = jax.vjp(network.encode_image, x)
        return image, pullback(cotangent)[0], *network.vision_model(x)

    image, gradient, states, pooled = call(network, jnp.asarray(x), jnp.asarray(cotangent))
    text = jax.jit(lambda n: n.encode_text(IDS, MASK))(network)
    pairs = {
        "image": (image, theirs.image_embeds),
        "image gradient": (gradient, pixels.grad.permute(0, 2, 3, 1)),
        "states": (states, theirs.vision_model_output.last_hidden_state.permute(0, 2, 3, 1)),
        "pooled": (pooled, theirs.vision_model_output.pooler_output),
        "text": (text, theirs.text_embeds),
        "logits": (network.logits(image @ text.T), theirs.logits_per_image),
    }
    errors = {name: relative_l2(actual, expected.detach()) for name, (actual, expected) in pairs.items()}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-4
    assert all(actual.dtype == jnp.float32 for actual, _ in pairs.values())
    # The oracle sees its inputs: otherwise agreeing with it means nothing.
    other = call(network, jnp.asarray(images(x.shape[1:3], seed=9, count=len(x))), jnp.asarray(cotangent))[0]
    print(relative_l2(other, image), relative_l2(text[:1], text[1:]))
    assert relative_l2(other, image) > 0.1
    assert relative_l2(text[:1], text[1:]) > 0.1


@pytest.mark.parametrize("branch", BRANCHES)
def test_matches_transformers(branch):
    oracle, weights, config = build(branch)
    compare(oracle, fill(config, weights), images(BRANCHES[branch][2]))


def test_running_statistics_and_padding_matter():
    """Were they all left out, or the padding the same on all sides, no branch above would agree."""
    _, weights, config = build("even")
    x = images((32, 38))
    encode = jax.jit(align.ALIGN.encode_image)
    image = encode(fill(config, weights), x)
    for name in ("running_mean", "running_var"):
        plain = {k: np.full_like(v, name == "running_var") if k.endswith(name) else v for k, v in weights.items()}
        assert relative_l2(encode(fill(config, plain), x), image) > 0.05
    vision = dataclasses.replace(config.vision_config, depthwise_padding=(2, 5))
    square = fill(dataclasses.replace(config, vision_config=vision), weights)
    assert relative_l2(encode(square, x), image) > 0.05
    texts = jax.jit(align.ALIGN.encode_text)
    masked, unmasked = (texts(fill(config, weights), IDS, mask) for mask in (MASK, np.ones_like(MASK)))
    assert relative_l2(masked[:1], unmasked[:1]) > 0.05


def test_bfloat16():
    """In both towers; statistics of batch norms stay exact."""
    _, weights, config = build("odd")
    half = fill(config, weights, jnp.bfloat16)
    towers = lambda network, x: (network.vision_model(x)[0], network.text_model(IDS))
    assert {x.dtype for x in jax.eval_shape(towers, half, images((33, 33)))} == {jnp.dtype(jnp.bfloat16)}
    assert layers.float_dtype(half.vision_model.embeddings.convolution) == jnp.bfloat16
    assert half.vision_model.embeddings.batchnorm.running_var[...].dtype == jnp.float32


def test_weights_survive_the_way_back():
    """Blocks alone and in stacks have the numbers that the checkpoint gives them."""
    _, weights, config = build("odd")
    actual = convert.export(fill(config, weights))
    expected = {name: x for name, x in weights.items() if not name.endswith("num_batches_tracked")}
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(actual[name], x)
    blocks = {name.split(".")[3] for name in expected if "encoder.blocks" in name}
    assert blocks == set("0123456")


@pytest.mark.parametrize("shards", ["20KB", "5GB"])
def test_directory(shards, tmp_path):
    oracle = networks.align()
    networks.save_align(oracle, tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "20KB")
    network = load.load("align", tmp_path)
    assert network.config == ours(oracle.config)
    jax.tree.map(np.testing.assert_array_equal, network, fill(network.config, tensors(oracle)))
    assert float(network.temperature[...]) == pytest.approx(0.1)


def test_what_is_not_an_image_is_refused():
    _, weights, config = build("odd")
    with pytest.raises(ValueError, match=r"\(33, 33, 3\), but ALIGN takes \[B, H, W, 3\]"):
        fill(config, weights).encode_image(jnp.zeros((33, 33, 3)))


# The published config.json, without most of the keys that transformers 4.27 wrote into all of them.
# Its vision_config was made from google/efficientnet-b7's.
OLD = {"_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None, "top_k": 50}
OLD |= {"chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "exponential_decay_length_penalty": None}
OLD |= {"is_decoder": False, "is_encoder_decoder": False, "output_attentions": False, "pruned_heads": {}, "top_p": 1.0}
OLD |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "temperature": 1.0}
OLD |= {"tf_legacy_loss": False, "tie_encoder_decoder": False, "tie_word_embeddings": True, "torchscript": False}
OLD |= {"transformers_version": "4.27.0.dev0", "typical_p": 1.0, "use_bfloat16": False, "return_dict": True}


def published():
    text = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768}
    text |= {"initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "pad_token_id": 0}
    text |= {"max_position_embeddings": 512, "model_type": "align_text_model", "num_attention_heads": 12}
    text |= {"num_hidden_layers": 12, "position_embedding_type": "absolute", "type_vocab_size": 2, "use_cache": True}
    text |= {"vocab_size": 30522, "bos_token_id": None, "eos_token_id": None}
    vision = {"batch_norm_eps": 0.001, "batch_norm_momentum": 0.99, "depth_coefficient": 3.1, "depth_divisor": 8}
    vision |= {"depthwise_padding": [], "drop_connect_rate": 0.2, "dropout_rate": 0.5, "hidden_act": "swish"}
    vision |= {"expand_ratios": [1, 6, 6, 6, 6, 6, 6], "hidden_dim": 640, "image_size": 289, "initializer_range": 0.02}
    vision |= {"in_channels": [32, 16, 24, 40, 80, 112, 192], "out_channels": [16, 24, 40, 80, 112, 192, 320]}
    vision |= {"kernel_sizes": [3, 3, 5, 3, 5, 5, 3], "model_type": "align_vision_model", "num_channels": 3}
    vision |= {"num_block_repeats": [1, 2, 2, 3, 3, 4, 1], "num_hidden_layers": 64, "pooling_type": "mean"}
    vision |= {"squeeze_expansion_ratio": 0.25, "strides": [1, 2, 2, 2, 1, 2, 1], "width_coefficient": 2.0}
    return {
        "_commit_hash": None,
        "architectures": ["AlignModel"],
        "initializer_range": 0.02,
        "model_type": "align",
        "projection_dim": 640,
        "temperature_init_value": 1.0,
        "text_config": OLD | text,
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": OLD | vision,
    }


@pytest.mark.parametrize("values", [published(), {"model_type": "align"}], ids=["kakaobrain/align-base", "defaults"])
def test_published_config(values):
    """Names and shapes of all parameters, and every value of the config, are as transformers reads them."""
    row = load.KINDS["align"]
    config, theirs = row.config(values, where="config.json"), transformers.AlignConfig.from_dict(values)
    for mine, other in (
        (config, theirs),
        (config.text_config, theirs.text_config),
        (config.vision_config, theirs.vision_config),
    ):
        for field in dataclasses.fields(mine):
            if not field.name.endswith("_config"):
                value, expected = getattr(mine, field.name), getattr(other, field.name)
                assert value == (tuple(expected) if isinstance(expected, list) else expected), field.name
    with torch.device("meta"):
        oracle = transformers.AlignModel(theirs)
    expected = {name: tuple(x.shape) for name, x in oracle.state_dict().items() if "num_batches" not in name}
    module = nnx.eval_shape(lambda: row.network(config, rngs=nnx.Rngs(0)))
    actual = {name: target.source_shape for target in convert.targets(module) for name in target.names}
    assert actual == expected
    assert len(actual) > 1000
    image = jax.ShapeDtypeStruct((1, 289, 289, 3), jnp.float32)
    states, pooled = jax.eval_shape(lambda n, x: n.vision_model(x), module, image)
    assert (states.shape, pooled.shape) == ((1, 9, 9, 640), (1, 640))


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("text_config", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not impl"),
        ("text_config", {"hidden_act": "tanh"}, "text_config: hidden_act='tanh' is not implemented"),
        ("text_config", {"num_attention_heads": 7}, "hidden_size=768 does not divide into num_attention_heads=7"),
        ("vision_config", {"hidden_act": "mish"}, "vision_config: hidden_act='mish' is not implemented"),
        ("vision_config", {"pooling_type": "max"}, "pooling_type='max' is not implemented; supported: 'mean'"),
        ("vision_config", {"num_channels": 4}, "num_channels=4 is not implemented; supported: 3"),
        ("vision_config", {"strides": [1, 2, 2, 2, 1, 3, 1]}, r"strides=.* is not implemented; supported: 1 and 2"),
        ("vision_config", {"kernel_sizes": [3, 3, 5, 4, 5, 5, 3]}, r"kernel_sizes=.* supported: odd sizes"),
        ("vision_config", {"expand_ratios": [1, 6]}, r"expand_ratios=\(1, 6\) is not .* as many as out_channels, 7"),
        ("vision_config", {"in_channels": [32, 16, 24, 40, 80, 112, 8]}, r"in_channels=.* supported: \(32, 16, .*192\)"),
        ("vision_config", {"stem": 3}, "the key stem=3 is not known to referee_jax.models.align.VisionConfig"),
        (None, {"projection_dim": 512}, "projection_dim=512 is not implemented; supported: 640, the image tower's width"),
        (None, {"model_type": "clip"}, "model_type='clip' is not implemented; supported: 'align'"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(where, change, message):
    values = published()
    (values[where] if where else values).update(change)
    with pytest.raises(load.WeightsError, match=message):
        load.KINDS["align"].config(values, where="config.json")


@pytest.mark.slow
def test_full_size_matches_transformers():
    """align-base at 289 px, one image.

    Measured against torch in float64: image 6.9e-6, its gradient 4.1e-5, text 1.2e-6. torch's own
    gradient in float32 is 4.2e-5 away.
    """
    config = transformers.AlignConfig.from_dict(published())
    oracle = networks.redraw_align(transformers.AlignModel(config), seed=0)
    network = fill(ours(config), tensors(oracle))
    compare(oracle, network, images((289, 289), count=1))
