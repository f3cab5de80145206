"""CLIP against transformers' torch classes, with the same weights."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from referee_jax.hardware import chips
from referee_jax.models import attention, blip, clip, layers, siglip
from referee_jax.weights import convert, load
from tests import conftest
from tests.lazy import torch, transformers
from tests.oracles import networks

TEXT = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
VISION = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4)
VISION |= dict(image_size=24, patch_size=8)
END = 40

# Each branch: what differs in text_config, in vision_config, and the token ids. Ids larger than the
# end token's stand before and after it: taking the largest, or the last, gives another state.
IDS = np.array([[38, 3, 45, END, END, 49], [38, END, 5, 44, 44, 1]])
BRANCHES = {
    "OpenAI": ({"eos_token_id": 2}, {}, IDS),
    "first end token": ({"eos_token_id": END}, {}, IDS),
    "LAION": (
        {"eos_token_id": END, "hidden_act": "gelu"},
        {"hidden_act": "gelu"},
        np.array([[38, 3, 45, END, 0, 0], [38, END, 0, 0, 0, 0]]),
    ),
    "tanh and other eps": (
        {"eos_token_id": END, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-2},
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-2},
        IDS,
    ),
    "odd sizes": (
        {"max_position_embeddings": 9, "num_attention_heads": 1, "eos_token_id": 2},
        {"image_size": 31, "patch_size": 7, "hidden_size": 30, "num_attention_heads": 5},
        IDS[:, :5],
    ),
}


def build(branch):
    """The oracle, its tensors, our config of it, and token ids."""
    text, vision, ids = BRANCHES[branch]
    config = transformers.CLIPConfig(text_config=TEXT | text, vision_config=VISION | vision, projection_dim=20)
    oracle = networks.redraw(transformers.CLIPModel(config), seed=0)
    tensors = {name: x.numpy() for name, x in oracle.state_dict().items()}
    ours = load.KINDS["clip"].config(json.loads(config.to_json_string()), where="config.json")
    return oracle, tensors, ours, ids


def fill(config, tensors, dtype=jnp.float32):
    return convert.fill(nnx.eval_shape(lambda: clip.CLIP(config, rngs=nnx.Rngs(0))), tensors, dtype=dtype)


def images(config, seed=0):
    size = config.vision_config.image_size
    return np.random.default_rng(seed).normal(size=(2, size, size, 3)).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("branch", BRANCHES)
def test_matches_transformers(branch):
    oracle, tensors, config, ids = build(branch)
    network, x = fill(config, tensors), images(config)
    assert config.vision_config.image_size == oracle.config.vision_config.image_size

    pixels = to_torch(x).requires_grad_()
    theirs = oracle(input_ids=torch.from_numpy(ids), pixel_values=pixels)
    cotangent = np.random.default_rng(1).normal(size=theirs.image_embeds.shape).astype(np.float32)
    (theirs.image_embeds * torch.from_numpy(cotangent)).sum().backward()

    image, gradient = jax.jit(jax.vjp, static_argnums=0)(clip.CLIP.encode_image, network, jnp.asarray(x))
    gradient = gradient(jnp.asarray(cotangent))[1]
    text = jax.jit(clip.CLIP.encode_text)(network, ids)
    states = jax.jit(lambda n, i: n.text_model(i)[0])(network, ids)

    assert conftest.relative_l2(image, theirs.image_embeds.detach()) < 1e-4
    assert conftest.relative_l2(gradient, pixels.grad.permute(0, 2, 3, 1)) < 1e-4
    assert conftest.relative_l2(text, theirs.text_embeds.detach()) < 1e-4
    assert conftest.relative_l2(states, theirs.text_model_output.last_hidden_state.detach()) < 1e-4
    assert image.dtype == text.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(image, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(network.logit_scale[...], oracle.logit_scale.item(), rtol=1e-6)

    # The oracle sees its inputs: otherwise agreeing with it means nothing.
    assert conftest.relative_l2(image[:1], image[1:]) > 0.1
    assert conftest.relative_l2(text[:1], text[1:]) > 0.1


def test_ways_of_finding_the_end_differ_on_these_ids():
    _, tensors, config, ids = build("OpenAI")
    first_end = dataclasses.replace(config, text_config=dataclasses.replace(config.text_config, eos_token_id=END))
    by_largest, by_end = (fill(c, tensors).encode_text(ids) for c in (config, first_end))
    assert conftest.relative_l2(by_largest, by_end) > 0.1


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_matches_transformers(prefix):
    """SD 1.x and 2.x: hidden states after the final norm; files with and without the old prefix."""
    config = transformers.CLIPTextConfig(**TEXT | {"hidden_act": "gelu", "num_hidden_layers": 3}, projection_dim=512)
    oracle = networks.redraw(transformers.CLIPTextModel(config), seed=3)
    row = load.KINDS["clip_text"]
    ours = row.config(json.loads(config.to_json_string()), where="config.json")
    tensors = {prefix + name: x.numpy() for name, x in oracle.state_dict().items()}
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(77)[None]
    module = nnx.eval_shape(lambda: row.network(ours, rngs=nnx.Rngs(0)))
    module = convert.fill(module, tensors, dtype=jnp.float32, renames=row.renames, ignore=row.ignore)
    theirs = oracle(torch.from_numpy(IDS)).last_hidden_state
    assert conftest.relative_l2(module(IDS), theirs.detach()) < 1e-4
    assert conftest.relative_l2(theirs[:1].detach(), theirs[1:].detach()) > 0.1


def test_too_many_tokens_and_wrong_image_size_are_refused():
    _, tensors, config, _ = build("OpenAI")
    network = fill(config, tensors)
    with pytest.raises(ValueError, match=r"78 tokens, but CLIP has 77 positions"):
        network.encode_text(np.zeros((1, 78), int))
    with pytest.raises(ValueError, match=r"\(1, 25, 24, 3\), but CLIP takes \[B, 24, 24, 3\]"):
        network.encode_image(jnp.zeros((1, 25, 24, 3)))


# The published config.json files, without the keys that transformers 4.16 wrote into all of them,
# which are in OLD.
OLD = {"_name_or_path": "", "add_cross_attention": False, "architectures": None, "attention_dropout": 0.0}
OLD |= {"bad_words_ids": None, "bos_token_id": 0, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None}
OLD |= {"decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False, "dropout": 0.0, "eos_token_id": 2}
OLD |= {"early_stopping": False, "encoder_no_repeat_ngram_size": 0, "finetuning_task": None, "prefix": None}
OLD |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "initializer_factor": 1.0, "initializer_range": 0.02}
OLD |= {"is_decoder": False, "is_encoder_decoder": False, "layer_norm_eps": 1e-05, "max_length": 20, "pad_token_id": 1}
OLD |= {"num_beams": 1, "pruned_heads": {}, "tie_word_embeddings": True, "top_k": 50, "torch_dtype": None, "top_p": 1.0}
OLD |= {"transformers_version": "4.16.0.dev0", "use_bfloat16": False, "torchscript": False, "return_dict": True}


def published(width, text, vision, dicts=(None, None)):
    text = OLD | {"model_type": "clip_text_model", "vocab_size": 49408, "max_position_embeddings": 77} | text
    vision = OLD | {"model_type": "clip_vision_model", "image_size": 224, "eos_token_id": None} | vision
    for tower in (text, vision):
        tower.setdefault("hidden_act", "quick_gelu")
    return {
        "_name_or_path": "openai/clip",
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": width,
        "text_config": text,
        "text_config_dict": dicts[0],
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": vision,
        "vision_config_dict": dicts[1],
    }


def tower(width, layers, heads, **other):
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads)
    return sizes | other


_H_TEXT, _H_VISION = tower(1024, 24, 16, hidden_act="gelu"), tower(1280, 32, 16, hidden_act="gelu", patch_size=14)
_L_TEXT = tower(768, 12, 12, projection_dim=768)
PUBLISHED = {
    "openai/clip-vit-base-patch32": published(512, tower(512, 12, 8), tower(768, 12, 12, patch_size=32)),
    "openai/clip-vit-base-patch16": published(512, tower(512, 12, 8), tower(768, 12, 12, patch_size=16)),
    "openai/clip-vit-large-patch14": published(768, _L_TEXT, tower(1024, 24, 16, patch_size=14)),
    "openai/clip-vit-large-patch14-336": published(768, _L_TEXT, tower(1024, 24, 16, patch_size=14, image_size=336)),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": published(1024, _H_TEXT, _H_VISION, (_H_TEXT, _H_VISION)),
}


def same_parameters(oracle, module, rename=lambda name: name):
    theirs = {rename(name): tuple(x.shape) for name, x in oracle.state_dict().items()}
    ours = {name: target.source_shape for target in convert.targets(module) for name in target.names}
    assert ours == theirs
    assert len(ours) > 100


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    """Names and shapes of all parameters, and every value of the config, are as transformers reads them."""
    config = load.KINDS["clip"].config(PUBLISHED[name], where="config.json")
    theirs = transformers.CLIPConfig.from_dict(PUBLISHED[name])
    for ours, other in (
        (config, theirs),
        (config.text_config, theirs.text_config),
        (config.vision_config, theirs.vision_config),
    ):
        for field in dataclasses.fields(ours):
            if not field.name.endswith("_config"):
                assert getattr(ours, field.name) == getattr(other, field.name), field.name
    with torch.device("meta"):
        oracle = transformers.CLIPModel(theirs)
    same_parameters(oracle, nnx.eval_shape(lambda: clip.CLIP(config, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize(
    "sizes",
    [tower(768, 12, 12, projection_dim=768), tower(1024, 23, 16, hidden_act="gelu", projection_dim=512)],
    ids=["SD 1.5", "SD 2.1"],
)
def test_published_text_encoder(sizes):
    values = OLD | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408} | sizes
    config = load.KINDS["clip_text"].config(values, where="config.json")
    with torch.device("meta"):
        oracle = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(values))
    module = nnx.eval_shape(lambda: clip.TextModel(config, rngs=nnx.Rngs(0)))
    same_parameters(oracle, module, lambda name: re.sub(r"^(?!text_model\.)", "text_model.", name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch32", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"])
def test_full_size_matches_transformers(name):
    """B/32, and H/14, which is PickScore's and HPSv2's."""
    published_config = PUBLISHED[name]
    oracle = networks.redraw(transformers.CLIPModel(transformers.CLIPConfig.from_dict(published_config)), seed=0)
    config = load.KINDS["clip"].config(published_config, where="config.json")
    network = fill(config, {name: x.numpy() for name, x in oracle.state_dict().items()})
    x, ids = images(config), np.random.default_rng(2).integers(0, 49408, (2, 77))
    pixels = to_torch(x).requires_grad_()
    theirs = oracle(input_ids=torch.from_numpy(ids), pixel_values=pixels)
    cotangent = np.random.default_rng(1).normal(size=theirs.image_embeds.shape).astype(np.float32)
    (theirs.image_embeds * torch.from_numpy(cotangent)).sum().backward()
    image, pullback = jax.vjp(network.encode_image, jnp.asarray(x))
    assert conftest.relative_l2(image, theirs.image_embeds.detach()) < 1e-4
    assert conftest.relative_l2(pullback(jnp.asarray(cotangent))[0], pixels.grad.permute(0, 2, 3, 1)) < 1e-4
    assert conftest.relative_l2(network.encode_text(ids), theirs.text_embeds.detach()) < 1e-4
    assert conftest.relative_l2(image[:1], image[1:]) > 0.1


@pytest.mark.parametrize("network", [clip, siglip])
def test_the_gradient_of_a_long_tower_keeps_what_is_asked(network):
    """All that a layer computes is 20 times its input; products are half of that. A short tower keeps all."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 32, 32, 3)), jnp.float32)

    def tower(depth, remat):
        sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": depth}
        config = network.VisionConfig(**sizes, image_size=32, patch_size=8)
        return layers.configured(network.VisionTransformer(config, rngs=nnx.Rngs(0)), remat=remat)

    def layer(remat, low, high):  # bytes of one more layer
        less, more = (conftest.gradient_memory(tower(depth, remat), x) for depth in (low, high))
        return (more - less) / (high - low)

    full, dots, everything = (layer(remat, 10, 18) for remat in layers.POLICIES)
    assert full * 4 < dots * 2 < everything
    assert layer("full", 3, 7) > dots
    gradients = [jax.grad(lambda x, remat=remat: tower(9, remat)(x).sum())(x) for remat in layers.POLICIES]
    assert max(conftest.relative_l2(gradient, gradients[0]) for gradient in gradients) < 1e-5


@pytest.mark.parametrize("tower", [clip.VisionTransformer, siglip.VisionTransformer, blip.VisionModel])
@pytest.mark.parametrize("size", [24, 96])
def test_tokens_in_tiles_change_nothing(tower, size, monkeypatch):
    """Of 10 and 145 tokens, of SigLIP 9 and 144; states and gradients."""
    monkeypatch.setattr(attention, "TILED", 0)
    kind = {clip.VisionTransformer: clip, siglip.VisionTransformer: siglip}.get(tower, blip).VisionConfig
    network = tower(kind(**VISION | {"image_size": size}), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, size, size, 3)), jnp.float32)

    def states(hardware):
        configured = layers.configured(network, remat="dots", hardware=hardware)
        y, back = jax.vjp(configured, x)
        return y, back(jnp.cos(y))[0]

    for ours, theirs in zip(states(chips.Hardware(rows=8)), states(chips.Hardware()), strict=True):
        assert conftest.relative_l2(ours, theirs) < 1e-5
