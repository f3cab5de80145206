"""BLIP's three networks against transformers' torch classes, with the same weights, and as directories."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from referee_jax.models import blip, layers
from referee_jax.weights import convert, load
from tests.conftest import gradient_memory, relative_l2
from tests.lazy import torch, transformers
from tests.oracles import networks

CLASSES = {
    "itm": "BlipForImageTextRetrieval",
    "caption": "BlipForConditionalGeneration",
    "vqa": "BlipForQuestionAnswering",
}
IDS = np.array([[2, 6, 8, 10, 3, 0, 0], [2, 5, 9, 9, 16, 12, 3]], np.int32)
MASK = IDS > 0
ABSENT = object()
DEC = len(networks.BLIP_WORDS)


def oracle_class(task):
    """transformers' BLIP for a task."""
    return getattr(transformers, CLASSES[task])


def build(task, **text):
    """The oracle, its tensors, and our config of it."""
    oracle = networks.blip(oracle_class(task), **text)
    tensors = {name: x.numpy() for name, x in oracle.state_dict().items()}
    return (
        oracle,
        tensors,
        load.KINDS[f"blip_{task}"].config(json.loads(oracle.config.to_json_string()), where="config.json"),
    )


def fill(task, config, tensors, dtype=jnp.float32):
    row = load.KINDS[f"blip_{task}"]
    module = nnx.eval_shape(lambda: row.network(config, rngs=nnx.Rngs(0)))
    return convert.fill(module, tensors, dtype=dtype, ignore=(*row.ignore, *row.ties))


def images(size=(32, 32), seed=0):
    return np.random.default_rng(seed).normal(size=(2, *size, 3)).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous().requires_grad_()


def ours(task, smoothing=0.0):
    """`(network, images) -> the outputs that are used`."""
    if task == "itm":

        def call(network, x):
            states = network.vision_model(x)
            image, text = network.image_features(states), network.text_features(IDS, MASK)
            return {"match": network.match(states, IDS, MASK), "cosines": image @ text.T}

    elif task == "caption":
        ids = np.where(np.arange(7) == 0, DEC, IDS)

        def call(network, x):
            losses = network.token_losses(network.vision_model(x), ids, MASK, smoothing=smoothing)
            return {"loss": losses.mean(-1, where=MASK[:, 1:])}

    else:

        def call(network, x):
            states = network.vision_model(x)
            return {"answers": network.answer_logits(states, IDS, MASK)}

    return call


def theirs(task, oracle, pixels):
    """The same by transformers."""
    ids, mask = torch.from_numpy(IDS).long(), torch.from_numpy(MASK).long()
    both = dict(pixel_values=pixels, interpolate_pos_encoding=True)
    if task == "itm":
        call = lambda head: oracle(input_ids=ids, attention_mask=mask, use_itm_head=head, **both).itm_score
        return {"match": call(True), "cosines": call(False)}
    if task == "caption":
        labels = ids.masked_fill(ids == 0, -100)
        ids[:, 0] = DEC
        each = zip(ids, mask, labels, pixels, strict=True)
        rows = [
            oracle(p[None], i[None], m[None], labels=y[None], interpolate_pos_encoding=True).loss for i, m, y, p in each
        ]
        return {"loss": torch.stack(rows)}
    read = oracle.text_encoder(
        input_ids=ids,
        attention_mask=mask,
        encoder_hidden_states=oracle.vision_model(pixels, interpolate_pos_encoding=True)[0],
    )[0]
    # One at a time and without padding, which the decoder's cross-attention of transformers 5 would
    # read.
    start = torch.tensor([[DEC]])
    rows = [
        oracle.text_decoder(input_ids=start, encoder_hidden_states=r[m > 0][None]).logits[:, 0]
        for r, m in zip(read, mask, strict=True)
    ]
    return {"answers": torch.cat(rows)}


def compare(task, oracle, network, x, **how):
    """Outputs and image gradients agree; the oracle sees both its image and its text."""
    pixels = to_torch(x)
    expected = theirs(task, oracle, pixels)
    cotangents = {k: np.random.default_rng(1).normal(size=v.shape).astype(np.float32) for k, v in expected.items()}

    @jax.jit
    def both(network, x):
        actual, pullback = jax.vjp(lambda x: ours(task, **how)(network, x), x)
        # One output's gradient at a time, so that a small one is not hidden behind a large one.
        alone = {k: {n: (n == k) * jnp.asarray(c) for n, c in cotangents.items()} for k in cotangents}
        return actual, {k: pullback(c)[0] for k, c in alone.items()}

    actual, gradients = both(network, jnp.asarray(x))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_l2(actual[name], value.detach()) < 1e-4
        assert actual[name].dtype == jnp.float32
        total = (value * torch.from_numpy(cotangents[name])).sum()
        gradient = torch.autograd.grad(total, pixels, retain_graph=True)[0].permute(0, 2, 3, 1)
        assert relative_l2(gradients[name], gradient) < 1e-4
    return actual, gradients


@pytest.mark.parametrize("size", [(32, 32), (48, 24)], ids=["native", "resampled"])
@pytest.mark.parametrize("task", CLASSES)
def test_matches_transformers(task, size):
    oracle, tensors, config = build(task)
    network, x = fill(task, config, tensors), images(size)
    actual, _ = compare(task, oracle, network, x)
    # The oracle sees its inputs: otherwise agreeing with it means nothing.
    other = jax.jit(ours(task))(network, x[::-1] * 1.5)
    for name, value in actual.items():
        assert (relative_l2(other[name], value) if name == "cosines" else np.abs(other[name] - value).max()) > 0.1
    if task == "itm":
        match = jax.jit(lambda n, ids: n.match(n.vision_model(x), ids, MASK))
        assert np.abs(match(network, np.array(IDS[::-1])) - actual["match"]).max() > 0.1
        text = jax.jit(lambda n: n.text_features(IDS, MASK))(network)
        assert relative_l2(text[:1], text[1:]) > 0.1
    if task == "vqa":
        answers = jax.jit(lambda n, ids: n.answer_logits(n.vision_model(x), ids, MASK))
        assert relative_l2(answers(network, np.array(IDS[::-1])), actual["answers"]) > 0.1


def test_smoothed_caption():
    oracle, tensors, config = build("caption", label_smoothing=0.1)
    assert "label_smoothing" in oracle.config.text_config.to_dict()
    network, x = fill("caption", config, tensors), images()
    actual, _ = compare("caption", oracle, network, x, smoothing=0.1)
    without = jax.jit(ours("caption"))(network, x)
    assert np.abs(actual["loss"] - without["loss"]).max() > 0.01


@pytest.mark.parametrize(("old", "new"), [(4, 6), (24, 14), (24, 32), (5, 3), (24, 24)])
def test_bicubic_is_torchs(old, new):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, old, old + 1)).astype(np.float32))
    expected = torch.nn.functional.interpolate(x, size=(new, new + 2), mode="bicubic", align_corners=False)
    actual = np.einsum("hi,wj,ncij->nchw", layers.bicubic(old, new), layers.bicubic(old + 1, new + 2), x.numpy())
    assert relative_l2(actual, expected) < 1e-6
    keys = jax.image.resize(x.numpy(), (1, 3, new, new + 2), "bicubic", antialias=False)
    assert old == new or relative_l2(keys, expected) > 1e-2  # another kernel would not pass


def test_the_gradient_keeps_one_state_of_each_layer():
    def memory(depth):
        config = blip.VisionConfig(hidden_size=48, intermediate_size=96, num_attention_heads=4, num_hidden_layers=depth)
        return gradient_memory(blip.VisionEncoder(config, rngs=nnx.Rngs(0)), x)

    x = jnp.zeros((64, 17, 48))
    assert (memory(10) - memory(2)) / 8 < 1.5 * x.nbytes  # all of a layer's inner states are 16 times as much


@pytest.mark.parametrize(("task", "shards"), [("itm", "200KB"), ("caption", "5GB"), ("vqa", "5GB")])
def test_directory(task, shards, tmp_path):
    oracle, tensors, config = build(task)
    networks.save_blip(oracle, tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (task == "itm")
    network = load.load(f"blip_{task}", tmp_path)
    assert network.config == config
    jax.tree.map(np.testing.assert_array_equal, network, fill(task, config, tensors))


def test_tied_weights_and_buffers_in_the_file(tmp_path):
    """Older files have both; a copy that differs from its original is refused."""
    oracle, tensors, config = build("caption")
    networks.save_blip(oracle, tmp_path)
    file = tmp_path / "model.safetensors"
    copy = "text_decoder.cls.predictions.decoder.weight"
    assert copy in tensors and copy not in safetensors.numpy.load_file(file)
    tensors = {name: np.array(x) for name, x in tensors.items()}
    tensors["text_decoder.bert.embeddings.position_ids"] = np.arange(80)[None]
    safetensors.numpy.save_file(tensors, file)
    jax.tree.map(np.testing.assert_array_equal, load.load("blip_caption", tmp_path), fill("caption", config, tensors))
    tensors[copy][3, 3] += 1
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(
        load.WeightsError, match=r"decoder.weight differs from .*word_embeddings.weight, which it should"
    ):
        load.load("blip_caption", tmp_path)


def test_sizes_that_do_not_fit_are_refused():
    _, tensors, config = build("itm")
    with pytest.raises(ValueError, match=r"\(1, 30, 32, 3\), but BLIP takes \[B, H, W, 3\] in patches of 8 pixels"):
        fill("itm", config, tensors).vision_model(jnp.zeros((1, 30, 32, 3)))
    other = dataclasses.replace(config, vision_config=dataclasses.replace(config.vision_config, hidden_size=64))
    with pytest.raises(ValueError, match="text_config.hidden_size=48 is not implemented for questions"):
        nnx.eval_shape(lambda: blip.QuestionAnswering(other, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("text_config", {"is_decoder": False}, r"text_config: is_decoder=False is not implemented; supported: True"),
        ("text_config", {"tie_word_embeddings": False}, r"tie_word_embeddings=False is not implemented"),
        ("text_config", {"position_embedding_type": "relative"}, r"position_embedding_type='relative' is not known to"),
        ("text_config", {"num_attention_heads": 8}, r"num_attention_heads=8 \(8 if absent\) .* is 12; .*#22625"),
        (
            "text_config",
            {"num_attention_heads": ABSENT},
            r'=8 .*#22625\): write "num_attention_heads": 12 into text_con',
        ),
        ("vision_config", {"hidden_act": "tanh"}, r"vision_config: hidden_act='tanh' is not implemented"),
        ("vision_config", {"num_channels": 4}, r"num_channels=4 is not implemented; supported: 3"),
    ],
)
def test_configs_that_are_refused(where, change, message):
    values = published(768)
    values[where] = {key: x for key, x in (values[where] | change).items() if x is not ABSENT}
    with pytest.raises(load.WeightsError, match=message):
        load.KINDS["blip_itm"].config(values, where="config.json")


# The published config.json files, without most of the keys that transformers 4.26 wrote into all of
# them.
OLD = {"_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None, "top_k": 50}
OLD |= {"chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "exponential_decay_length_penalty": None}
OLD |= {"initializer_factor": 1.0, "initializer_range": 0.02, "is_encoder_decoder": False, "pruned_heads": {}}
OLD |= {"tf_legacy_loss": False, "tie_encoder_decoder": False, "tie_word_embeddings": True, "torchscript": False}
OLD |= {"transformers_version": "4.26.0.dev0", "typical_p": 1.0, "use_bfloat16": False, "return_dict": True}


def published(vision_width):
    text = {"attention_probs_dropout_prob": 0.0, "bos_token_id": 30522, "eos_token_id": 2, "hidden_act": "gelu"}
    text |= {"hidden_dropout_prob": 0.0, "hidden_size": 768, "intermediate_size": 3072, "is_decoder": True}
    text |= {"layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "blip_text_model"}
    text |= {"num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "projection_dim": 768}
    text |= {"sep_token_id": 102, "use_cache": True, "vocab_size": 30524}
    vision = {"attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "gelu", "hidden_size": vision_width}
    vision |= {"image_size": 384, "intermediate_size": 4 * vision_width, "is_decoder": False, "layer_norm_eps": 1e-5}
    vision |= {"model_type": "blip_vision_model", "num_attention_heads": vision_width // 64, "num_channels": 3}
    vision |= {"num_hidden_layers": 24 if vision_width == 1024 else 12, "patch_size": 16, "projection_dim": 512}
    return {
        "_commit_hash": None,
        "architectures": ["BlipForImageTextRetrieval"],
        "image_text_hidden_size": 256,
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "blip",
        "projection_dim": 512,
        "text_config": OLD | text,
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": OLD | vision,
    }


PUBLISHED = {
    "Salesforce/blip-itm-base-coco": ("itm", 768),
    "Salesforce/blip-itm-large-coco": ("itm", 1024),
    "Salesforce/blip-itm-base-flickr": ("itm", 768),
    "Salesforce/blip-itm-large-flickr": ("itm", 1024),
    "Salesforce/blip-image-captioning-base": ("caption", 768),
    "Salesforce/blip-image-captioning-large": ("caption", 1024),
    "Salesforce/blip-vqa-base": ("vqa", 768),
    "Salesforce/blip-vqa-capfilt-large": ("vqa", 768),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    """Names and shapes of all parameters, and every value of the config, are as transformers reads them."""
    task, width = PUBLISHED[name]
    row = load.KINDS[f"blip_{task}"]
    config = row.config(published(width), where="config.json")
    theirs = transformers.BlipConfig.from_dict(published(width))
    for mine, other in (
        (config, theirs),
        (config.text_config, theirs.text_config),
        (config.vision_config, theirs.vision_config),
    ):
        for field in dataclasses.fields(mine):
            if not field.name.endswith("_config"):
                assert getattr(mine, field.name) == getattr(other, field.name), field.name
    with torch.device("meta"):
        oracle = oracle_class(task)(theirs)
    expected = {n: tuple(x.shape) for n, x in oracle.state_dict().items() if n not in row.ties}
    module = nnx.eval_shape(lambda: row.network(config, rngs=nnx.Rngs(0)))
    actual = {n: target.source_shape for target in convert.targets(module) for n in target.names}
    assert actual == expected
    assert len(actual) > 400


@pytest.mark.slow
@pytest.mark.parametrize("task", CLASSES)
def test_full_size_matches_transformers(task):
    """ViT-B/16 at 384 px and BERT-base.

    All three take seven minutes on one core.
    """
    config = transformers.BlipConfig.from_dict(published(768))
    oracle = networks.redraw(oracle_class(task)(config), seed=0)
    network = fill(
        task,
        load.KINDS[f"blip_{task}"].config(published(768), where="config.json"),
        {name: x.numpy() for name, x in oracle.state_dict().items()},
    )
    compare(task, oracle, network, images((384, 384)))
