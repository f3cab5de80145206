"""Qwen3-VL against transformers' torch class, with the same weights, and as directories."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from referee_jax.models import layers, qwen3_vl
from referee_jax.performance import abstract_networks
from referee_jax.weights import convert, load
from tests.conftest import gradient_memory, relative_l2
from tests.lazy import torch, transformers
from tests.oracles import networks
from tests.weights import checkpoints

BEFORE, LENGTH = 4, 7  # tokens before the picture, and of the longest question

# Each branch: what differs in text_config, in vision_config, elsewhere, and height and width of the images.
BRANCHES = {
    "tied, wide": ({}, {}, {}, (16, 40)),
    "untied, square, positions as they are": ({}, {}, {"tie_word_embeddings": False}, (24, 24)),
    "one block, layers left over, other sizes": (
        {"num_hidden_layers": 2, "num_key_value_heads": 4, "rms_norm_eps": 1e-2, "head_dim": 12}
        | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 2, 2]}},
        {"depth": 3, "num_heads": 2, "spatial_merge_size": 3, "deepstack_visual_indexes": [0, 2], "hidden_act": "gelu"},
        {},
        (12, 12),
    ),
    "no deepstack": ({}, {"depth": 2, "deepstack_visual_indexes": [], "temporal_patch_size": 1}, {}, (32, 24)),
}


def build(branch):
    """The oracle, its tensors, and our config of it."""
    text, vision, how, _ = BRANCHES[branch]
    config = networks.qwen3_vl_config(text=text, vision=vision, **how)
    oracle = networks.redraw_qwen3_vl(transformers.Qwen3VLForConditionalGeneration(config), seed=6)
    return oracle, tensors(oracle), ours(json.loads(config.to_json_string()))


def tensors(oracle):
    """As they are saved: without the copy of a tied table."""
    is_tied = oracle.config.tie_word_embeddings
    return {name: x.numpy() for name, x in oracle.state_dict().items() if not (is_tied and name == "lm_head.weight")}


def ours(values):
    return load.KINDS["qwen3_vl"].config(values, where="config.json")


def fill(config, tensors, dtype=jnp.float32):
    return convert.fill(load.unfilled(load.KINDS["qwen3_vl"], config), tensors, dtype=dtype)


def images(size, seed=0, count=2):
    """In [-1, 1], blots and noise."""
    rng = np.random.default_rng(seed)
    blots = jax.image.resize(rng.uniform(-0.5, 0.5, (count, 3, 3, 3)), (count, *size, 3), "linear")
    return np.float32(blots + rng.uniform(-0.5, 0.5, (count, *size, 3)))


def texts(vocabulary, seed=0, count=3):
    """What stands before the picture, questions padded to LENGTH, and the numbers of their last tokens."""
    rng = np.random.default_rng(seed)
    last = np.array([LENGTH - 1, 2, 4][:count])
    return rng.integers(0, vocabulary, BEFORE), rng.integers(0, vocabulary, (count, LENGTH)), last


def flattened(x, config):
    """Pixels as the processor hands them over: patches in blocks, each of channels, equal frames, rows and columns."""
    size, merge, frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    n, _, height, width = x.shape
    x = x.reshape(n, 3, height // size // merge, merge, size, width // size // merge, merge, size)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    return x.reshape(n * (height // size) * (width // size), -1)


def torch_logits(oracle, x, before, question, last):
    """Logits of what follows a question about each of the pictures `[B, H, W, 3]`, in a pass for this question alone."""
    vision, image_token = oracle.config.vision_config, oracle.config.image_token_id
    count, height, width = len(x), x.shape[1] // vision.patch_size, x.shape[2] // vision.patch_size
    tokens = height * width // vision.spatial_merge_size**2
    row = torch.cat(
        [torch.from_numpy(before), torch.full((tokens,), image_token), torch.from_numpy(question[: last + 1])]
    )
    ids = row.expand(count, -1)
    out = oracle(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(torch.arange(len(row)) >= len(before))
        .logical_and(row == image_token)
        .int()
        .expand(count, -1),
        pixel_values=flattened(x.permute(0, 3, 1, 2), vision),
        image_grid_thw=torch.tensor([[1, height, width]] * count),
    )
    return out.logits[:, -1]


def theirs(oracle, x, before, questions, last, cotangent):
    """Logits `[B, Q, V]`, and the gradient of their sum with `cotangent` by the pictures."""
    x = torch.tensor(x).to(next(oracle.parameters()).dtype).requires_grad_()
    rows = [torch_logits(oracle, x, before, *question) for question in zip(questions, last, strict=True)]
    logits = torch.stack(rows, 1)
    (logits * torch.from_numpy(cotangent)).sum().backward()
    return logits.detach().numpy(), x.grad.numpy()


@jax.jit
def logits_and_gradient(network, x, before, questions, last, cotangent):
    embedded = network.embed(before), network.embed(questions)
    logits, pullback = jax.vjp(lambda x: network.next_logits(x, *embedded, last), x)
    return logits, pullback(cotangent)[0]


def compare(oracle, network, x, before, questions, last):
    """Logits and image gradients agree with torch's, and see picture and question."""
    vocabulary = network.config.text_config.vocab_size
    shape = (len(x), len(questions), vocabulary)
    cotangent = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    wanted, wanted_gradient = theirs(oracle, x, before, questions, last, cotangent)
    logits, gradient = logits_and_gradient(network, x, before, questions, last, cotangent)
    errors = relative_l2(logits, wanted), relative_l2(gradient, wanted_gradient)
    print(f"logits {errors[0]:.1e}, image gradient {errors[1]:.1e}")
    assert max(errors) < 1e-4
    assert logits.dtype == gradient.dtype == jnp.float32
    # The oracle sees its inputs: otherwise agreeing with it means nothing.
    assert relative_l2(wanted[:1], wanted[1:]) > 0.1 and relative_l2(wanted[:, 0], wanted[:, 1]) > 0.1
    return wanted


@pytest.mark.parametrize("branch", BRANCHES)
def test_matches_transformers(branch):
    """Three questions in one packed pass, with torch's passes for each question alone, in float64."""
    oracle, weights, config = build(branch)
    network = fill(config, weights)
    compare(oracle.double(), network, images(BRANCHES[branch][3]), *texts(config.text_config.vocab_size))


def test_questions_do_not_see_each_other():
    """Each alone gives what it gives among others; so does one with other padding."""
    _, weights, config = build("tied, wide")
    network, x = fill(config, weights), images((16, 24), count=1)
    before, questions, last = texts(config.text_config.vocab_size)
    call = jax.jit(lambda network, questions, last: network.next_logits(x, network.embed(before), questions, last))
    embedded = network.embed(questions)
    together = call(network, embedded, last)
    for n in range(len(questions)):
        alone = call(network, embedded[n : n + 1], last[n : n + 1])
        assert relative_l2(together[:, n], alone[:, 0]) < 1e-5
    behind = np.arange(LENGTH) > last[:, None]
    padded = call(network, jnp.where(behind[..., None], 1.0, embedded), last)
    np.testing.assert_allclose(padded, together, atol=1e-6)
    assert relative_l2(call(network, embedded.at[0, 0].add(1.0), last)[:, 0], together[:, 0]) > 0.01


def test_packing():
    packing = qwen3_vl.pack(2, 1, 3, questions=2, length=2)
    np.testing.assert_array_equal(
        packing.positions,
        [[0, 1, 2, 2, 2, 5, 6, 5, 6], [0, 1, 2, 2, 2, 5, 6, 5, 6], [0, 1, 2, 3, 4, 5, 6, 5, 6]],
    )
    assert packing.image == slice(2, 5) and packing.owner.tolist() == [-1] * 5 + [0, 0, 1, 1]
    assert packing.allowed[:7, :7].tolist() == np.tri(7, dtype=bool).tolist()
    assert packing.allowed[7:].astype(int).tolist() == [[1] * 5 + [0, 0, 1, 0], [1] * 5 + [0, 0, 1, 1]]


def test_bfloat16():
    _, weights, config = build("tied, wide")
    half = fill(config, weights, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    seen = jax.eval_shape(lambda network, x: network.model.visual(x), half, images((16, 40)))
    assert {x.dtype for x in jax.tree.leaves(seen)} == {jnp.dtype(jnp.bfloat16)}


def test_layers_are_recomputed():
    """What the backward pass keeps is as much as `remat` says."""
    _, weights, config = build("no deepstack")
    text = dataclasses.replace(config.text_config, num_hidden_layers=12)
    network = load.KINDS["qwen3_vl"].network(dataclasses.replace(config, text_config=text), rngs=nnx.Rngs(0))

    def needed(remat):
        before, questions = network.embed(jnp.zeros(BEFORE, int)), network.embed(jnp.zeros((1, LENGTH), int))
        copy = layers.configured(network, remat=remat)
        return gradient_memory(lambda x: copy.next_logits(x, before, questions, jnp.zeros(1, int)), images((32, 32)))

    full, dots, everything = map(needed, ("full", "dots", "none"))
    print(full, dots, everything)
    assert full < dots < everything


@pytest.mark.parametrize("shards", ["20KB", "5GB"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_directory(shards, is_tied, tmp_path):
    oracle = networks.qwen3_vl(tie_word_embeddings=is_tied)
    networks.save_qwen3_vl(tmp_path, oracle, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "20KB")
    network = load.load("qwen3_vl", tmp_path)
    assert network.config == ours(json.loads(oracle.config.to_json_string())) and (network.lm_head is None) == is_tied
    exported, expected = convert.export(network), tensors(oracle)
    assert exported.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(exported[name], x)


def test_a_tied_table_may_be_stored_twice(tmp_path):
    """Its copy is compared with it; a table of its own is never taken for one."""
    networks.save_qwen3_vl(tmp_path)
    words = "model.language_model.embed_tokens.weight"
    checkpoints.edit_tensors(tmp_path / "model.safetensors", lambda x: x.update({"lm_head.weight": x[words]}))
    assert load.load("qwen3_vl", tmp_path).lm_head is None
    checkpoints.edit_tensors(tmp_path / "model.safetensors", lambda x: x.update({"lm_head.weight": 2 * x[words]}))
    checkpoints.fails(tmp_path, f"lm_head.weight differs from {words}, which it should repeat", "qwen3_vl")
    checkpoints.edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    np.testing.assert_array_equal(
        load.load("qwen3_vl", tmp_path).lm_head.kernel[...].T, 2 * networks.qwen3_vl().lm_head.weight.numpy()
    )
    checkpoints.edit_tensors(tmp_path / "model.safetensors", lambda x: x.pop("lm_head.weight"))
    checkpoints.fails(tmp_path, "parameters without a tensor: lm_head.weight", "qwen3_vl")


def test_what_is_not_an_image_is_refused():
    _, weights, config = build("tied, wide")
    for shape in ((2, 16, 20, 3), (16, 16, 3), (2, 16, 16, 4)):
        with pytest.raises(ValueError, match=r"but Qwen3-VL takes \[B, H, W, 3\], H and W multiples of 8"):
            fill(config, weights).model.visual(jnp.zeros(shape))


def published(text, vision, *, tied):
    """A config.json as Qwen wrote it."""
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    text = dict(
        attention_bias=False, attention_dropout=0.0, bos_token_id=151643, dtype="bfloat16", eos_token_id=151645,
        head_dim=128, hidden_act="silu", initializer_range=0.02, max_position_embeddings=262144,
        model_type="qwen3_vl_text", num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=rope, rope_theta=5000000,
        tie_word_embeddings=tied, use_cache=True, vocab_size=151936, **text,
    )  # fmt: skip
    vision = dict(
        hidden_act="gelu_pytorch_tanh", in_channels=3, initializer_range=0.02, model_type="qwen3_vl", num_heads=16,
        num_position_embeddings=2304, out_hidden_size=text["hidden_size"], patch_size=16, spatial_merge_size=2,
        temporal_patch_size=2, **vision,
    )  # fmt: skip
    ids = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)
    return dict(
        architectures=["Qwen3VLForConditionalGeneration"], model_type="qwen3_vl", text_config=text, vision_config=vision,
        tie_word_embeddings=tied, transformers_version="4.57.0.dev0", **ids,
    )  # fmt: skip


_TOWER = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
_LARGE_TOWER = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])


def _text(width, hidden, depth, heads):
    return dict(hidden_size=width, intermediate_size=hidden, num_hidden_layers=depth, num_attention_heads=heads)


# Checkpoint -> its config.json, and billions of parameters.
PUBLISHED = {
    "Qwen/Qwen3-VL-2B-Instruct": (published(_text(2048, 6144, 28, 16), _TOWER, tied=True), 2.13),
    "Qwen/Qwen3-VL-4B-Instruct": (published(_text(2560, 9728, 36, 32), _TOWER, tied=True), 4.44),
    "Qwen/Qwen3-VL-8B-Instruct": (published(_text(4096, 12288, 36, 32), _LARGE_TOWER, tied=False), 8.77),
}


@pytest.mark.parametrize("saved_again", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name, saved_again):
    """Names and shapes of all parameters, and every value of the config, are as transformers reads them.

    Also after transformers has read and written the file anew.
    """
    values, billions = PUBLISHED[name]
    theirs = transformers.Qwen3VLConfig.from_dict(values)
    config = ours(json.loads(theirs.to_json_string(use_diff=False)) if saved_again else values)
    assert config == abstract_networks.PUBLISHED[name]
    for mine, other in ((config.text_config, theirs.text_config), (config.vision_config, theirs.vision_config)):
        for field in dataclasses.fields(mine):
            value = other.rope_parameters.get(field.name, getattr(other, field.name, None))
            assert getattr(mine, field.name) == (tuple(value) if isinstance(value, list) else value), field.name
    if saved_again:
        return
    with torch.device("meta"):
        oracle = transformers.Qwen3VLForConditionalGeneration(theirs)
    expected = {n: tuple(x.shape) for n, x in oracle.state_dict().items()}
    module = load.unfilled(load.KINDS["qwen3_vl"], config)
    actual = {n: target.source_shape for target in convert.targets(module) for n in target.names}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert actual == expected
    assert sum(x.size for x in jax.tree.leaves(module)) == pytest.approx(1e9 * billions, rel=0.002)


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("text_config", {"rope_scaling": {"rope_type": "yarn"}}, "text_config: rope_type='yarn' of the rotary positions"),
        ("text_config", {"rope_scaling": {"mrope_interleaved": False}}, "mrope_interleaved=False of the rotary"),
        ("text_config", {"rope_scaling": {"factor": 2.0}}, "text_config: the key factor=2.0 is not known to"),
        ("text_config", {"rope_scaling": {"mrope_section": [24, 20]}}, r"mrope_section=\(24, 20\) are not three that add"),
        ("text_config", {"attention_bias": True}, "attention_bias=True is not implemented; supported: False"),
        ("text_config", {"num_key_value_heads": 3}, "num_attention_heads=16 is not a multiple of num_key_value_heads=3"),
        ("text_config", {"num_experts": 8}, "the key num_experts=8 is not known to"),
        ("text_config", {"num_hidden_layers": 2}, r"deepstack_visual_indexes=\(5, 11, 17\) are more than num_hidden_layers=2"),
        ("vision_config", {"in_channels": 4}, "vision_config: in_channels=4 is not implemented; supported: 3"),
        ("vision_config", {"hidden_act": "tanh"}, "vision_config: hidden_act='tanh' is not implemented"),
        ("vision_config", {"num_heads": 48}, "hidden_size=1024 does not divide into num_heads=48"),
        ("vision_config", {"num_position_embeddings": 50}, "num_position_embeddings=50 is not a square"),
        ("vision_config", {"deepstack_visual_indexes": [5, 24]}, "are not rising numbers of depth=24 layers"),
        ("vision_config", {"out_hidden_size": 64}, "out_hidden_size=64 is not text_config.hidden_size=2048"),
        ("", {"model_type": "qwen2_5_vl"}, "config.json: model_type='qwen2_5_vl' is not implemented"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(where, change, message):
    values, _ = PUBLISHED["Qwen/Qwen3-VL-2B-Instruct"]
    values = values | change if not where else values | {where: values[where] | change}
    with pytest.raises(load.WeightsError, match=message):
        ours(values)


@pytest.mark.slow
def test_full_size_matches_transformers(tmp_path):
    """2B, two questions about 96 x 64 pixels; the weights go through a directory, as both networks take 9 GB.

    Relative L2 errors measured on a CPU: logits 2.5e-6, image gradient 6.0e-6; four minutes, 11.4 GB.
    """
    values, _ = PUBLISHED["Qwen/Qwen3-VL-2B-Instruct"]
    oracle = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig.from_dict(values)).float()
    networks.redraw_qwen3_vl(oracle, seed=0).save_pretrained(tmp_path)
    x, (before, questions, last) = images((96, 64), count=1), texts(151643, count=2)
    cotangent = np.random.default_rng(1).normal(size=(1, 2, 151936)).astype(np.float32)
    wanted, wanted_gradient = theirs(oracle, x, before, questions, last, cotangent)
    del oracle
    network = load.load("qwen3_vl", tmp_path)
    logits, gradient = logits_and_gradient(network, x, before, questions, last, cotangent)
    errors = relative_l2(logits, wanted), relative_l2(gradient, wanted_gradient)
    print(f"logits {errors[0]:.1e}, image gradient {errors[1]:.1e}")
    assert max(errors) < 1e-4
    assert relative_l2(wanted[:, 0], wanted[:, 1]) > 0.1
