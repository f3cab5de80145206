"""CLIP-FlanT5 against torch's classes put together as the authors do, with the same weights, and as directories."""

import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from referee_jax.models import clip
from referee_jax.models.flan_t5 import clip_t5
from referee_jax.weights import convert, load
from tests.conftest import cosine, gradient_memory, relative_l2
from tests.lazy import safetensors_torch, t5_oracles, torch, transformers
from tests.models import test_t5
from tests.weights.checkpoints import edit_json, edit_tensors, same

BEFORE, ANSWER = [9, 4, 7, 1], [11, 1]
AFTER = np.array([[12, 5, 14, 6, 1, 0, 0], [13, 8, 1, 0, 0, 0, 0], [12, 5, 14, 6, 9, 10, 1]], np.int32)
LENGTHS = (5, 3, 7)


def build(**changes):
    """The oracle, its tensors, and our config of it."""
    oracle = t5_oracles.clip_t5(**changes)
    config = load.KINDS["clip_t5"].config(oracle.values(), where="config.json")
    return oracle, t5_oracles.numpy(oracle.tensors()), config


def fill(config, tensors, dtype=jnp.float32):
    row = load.KINDS["clip_t5"]
    ignore = (*row.ignore, *row.ties, *row.unread(config))
    return convert.fill(load.unfilled(row, config), tensors, dtype=dtype, renames=row.renames, ignore=ignore)


def images(size=32, count=3, seed=0):
    return np.random.default_rng(seed).normal(size=(count, size, size, 3)).astype(np.float32)


@jax.jit
def ours(network, x, after, cotangent):
    """Logits of the answer, and the gradient of one cotangent with respect to the pixels."""

    def logits(x):
        mask = after != 0
        return network.answer_logits(network.encode_image(x), jnp.array(BEFORE), after, mask, jnp.array(ANSWER))

    out, pullback = jax.vjp(logits, x)
    return out, pullback(cotangent)[0]


def compare(oracle, network, x, after=AFTER, lengths=LENGTHS):
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().requires_grad_()
    rows = [[*BEFORE, t5_oracles.IMAGE_ID, *row[:n].tolist()] for row, n in zip(after, lengths, strict=True)]
    expected = oracle(pixels, rows, ANSWER)
    cotangent = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    actual, gradient = ours(network, x, after, cotangent)
    exact = torch.autograd.grad((expected * torch.from_numpy(cotangent)).sum(), pixels)[0].permute(0, 2, 3, 1)
    print("logits", relative_l2(actual, expected.detach()), "gradient", relative_l2(gradient, exact))
    assert actual.dtype == jnp.float32 and relative_l2(actual, expected.detach()) < 1e-4
    assert relative_l2(gradient, exact) < 1e-4
    return actual, gradient, exact


def test_matches_torch():
    oracle, tensors, config = build()
    network, x = fill(config, tensors), images()
    actual, gradient, _ = compare(oracle, network, x)
    assert np.abs(gradient).max((0, 3)).min() > 0  # each pixel is seen
    other, _ = ours(network, x[::-1], AFTER, np.zeros_like(actual))
    assert relative_l2(other[0], actual[0]) > 0.1
    asked, _ = ours(network, x, AFTER[::-1], np.zeros_like(actual))
    assert relative_l2(asked[0], actual[0]) > 0.1


def test_the_tower_keeps_one_state_of_each_layer():
    def memory(depth):
        config = clip.VisionConfig(hidden_size=48, intermediate_size=96, num_attention_heads=4, num_hidden_layers=depth)
        encoder = clip.Encoder(config, is_causal=False, remat=True, rngs=test_t5.nnx.Rngs(0))
        return gradient_memory(encoder, x)

    x = jnp.zeros((64, 17, 48))
    assert (memory(10) - memory(2)) / 8 < 1.5 * x.nbytes


@pytest.mark.parametrize("layout", ["authors", "transformers 5", "bare"])
def test_directory(layout, tmp_path):
    """The tower under the prefixes of the authors' class, with or without those of CLIP's own."""
    oracle, tensors, _ = build()
    t5_oracles.save_clip_t5(oracle, tmp_path)
    prefix = {"authors": "vision_tower.vision_tower.vision_model.", "transformers 5": "vision_tower.vision_tower."}
    names = {
        n: n.replace("vision_tower.vision_tower.vision_model.", prefix.get(layout, "vision_tower.")) for n in tensors
    }
    safetensors.numpy.save_file({names[n]: x for n, x in tensors.items()}, tmp_path / "model.safetensors")
    network = load.load("clip_t5", tmp_path)
    same(network, fill(network.config, tensors))
    assert network.config.question == t5_oracles.TEXTS["question"]
    assert network.config.vision_config.num_hidden_layers == 3 == network.config.tower.num_hidden_layers + 1


def test_every_tensor_is_accounted_for(tmp_path):
    """Of the tower only the layers behind the one that is read, and its last norm, may be there for nothing."""
    oracle, _, _ = build()
    t5_oracles.save_clip_t5(oracle, tmp_path)
    file, tower = tmp_path / "model.safetensors", "vision_tower.vision_tower.vision_model.encoder.layers."
    edit_tensors(file, lambda x: x.update({f"{tower}3.mlp.fc1.bias": np.ones(3, np.float32)}))
    with pytest.raises(load.WeightsError, match=r"tensors that no parameter takes: .*layers\.3\.mlp\.fc1\.bias"):
        load.load("clip_t5", tmp_path)
    edit_tensors(file, lambda x: (x.pop(f"{tower}3.mlp.fc1.bias"), x.pop(f"{tower}1.mlp.fc1.bias")))
    with pytest.raises(load.WeightsError, match=r"parameters without a tensor: .*layers\.1\.mlp\.fc1\.bias"):
        load.load("clip_t5", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear' is not implemented; supported: 'mlp2x_gelu'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch' is not implemented"),
        ({"mm_vision_select_layer": -5}, "mm_vision_select_layer=-5 is not implemented; supported: -1 to -3"),
        ({"mm_vision_select_layer": 2}, "mm_vision_select_layer=2 is not implemented"),
        ({"conversation": "{} <image>"}, "conversation='{} <image>' is not a text with <image> and then one {}"),
        ({"conversation": "a {}"}, "is not a text with <image> and then one {}"),
        ({"question": "is it?"}, "question='is it\\?' is not a text with one {}"),
    ],
)
def test_configs_that_are_refused(change, message, tmp_path):
    t5_oracles.save_clip_t5(build()[0], tmp_path)
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(load.WeightsError, match=message):
        load.load("clip_t5", tmp_path)


def test_the_authors_directory_alone_is_not_enough(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["CLIPT5ForConditionalGeneration"]}))
    with pytest.raises(
        load.WeightsError, match=r"no vision_config, .*python -m referee_jax.weights.lavis DIRECTORY OUT"
    ):
        load.load("clip_t5", tmp_path)


# The published config.json files (transformers 4.31), and the tower's sizes.
AUTHORS = {"architectures": ["CLIPT5ForConditionalGeneration"], "dense_act_fn": "gelu_new", "is_gated_act": True}
AUTHORS |= {"freeze_mm_mlp_adapter": False, "image_aspect_ratio": "pad", "image_grid_pinpoints": None}
AUTHORS |= {"mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False}
AUTHORS |= {"mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2}
AUTHORS |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "model_type": "clip_t5", "torch_dtype": "float32"}
AUTHORS |= {"tune_mm_mlp_adapter": False, "use_mm_proj": True, "vocab_size": 32128}
L14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
L14 |= {"image_size": 336, "patch_size": 14, "model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
PUBLISHED = {
    name.replace("google/flan-t5", "zhiqiulin/clip-flant5"): values | AUTHORS
    for name, values in test_t5.PUBLISHED.items()
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    """Names and shapes of all parameters are those of the torch classes, put together."""
    row = load.KINDS["clip_t5"]
    config = row.config(PUBLISHED[name] | {"vision_config": L14}, where="config.json")
    with torch.device("meta"):
        text, vision = transformers.T5Config.from_dict(PUBLISHED[name]), transformers.CLIPVisionConfig.from_dict(L14)
        oracle = t5_oracles.ClipT5(text, vision)
    expected = {n: tuple(x.shape) for n, x in oracle.tensors().items()}
    module = load.unfilled(row, config)
    kept = convert.matched(
        expected, {n for t in convert.targets(module) for n in t.names}, row.renames, (*row.ties, *row.unread(config))
    )
    for target in convert.targets(module):
        for n in target.names:
            assert target.source_shape == expected[kept[n]], n
    assert config.tower.num_hidden_layers == 23 and config.output_scale == 1.0
    assert config == clip_t5.Config(
        **{f: getattr(config, f) for f in ("d_model", "d_ff", "num_heads", "num_layers", "num_decoder_layers")},
        vision_config=config.vision_config, tie_word_embeddings=False, lm_head=True,
    )  # fmt: skip


def save_in_parts(oracle, path):
    """`save_clip_t5` with a file for each part of the network, so that not all of it is copied at once."""
    tensors = {name: x for name, x in oracle.tensors().items() if "embed_tokens" not in name}
    files = {name: f"model-{name.partition('.')[0]}.safetensors" for name in tensors}
    for file in set(files.values()):
        safetensors_torch.save_file({name: tensors[name] for name in files if files[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (path / "config.json").write_text(json.dumps(oracle.values()))


@pytest.mark.slow
def test_full_size_matches_torch(tmp_path):
    """CLIP-FlanT5-XL at 336 pixels in bfloat16: random weights go through a file, and each side is freed.

    Measured on a CPU: relative L2 error of the logits 0.015, cosine of the image gradients 0.9998; three minutes, 9.4 GiB.
    """
    values = PUBLISHED["zhiqiulin/clip-flant5-xl"]
    with torch.device("meta"):
        text, vision = transformers.T5Config.from_dict(values), transformers.CLIPVisionConfig.from_dict(L14)
        oracle = t5_oracles.ClipT5(text, vision).bfloat16()
    oracle = oracle.to_empty(device="cpu")
    t5_oracles.draw_gently(oracle)
    save_in_parts(oracle, tmp_path)
    x, after = images(336, 1), np.arange(40, dtype=np.int32)[None] % 30 + 3
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).bfloat16().requires_grad_()
    expected = oracle(pixels, [[*BEFORE, t5_oracles.IMAGE_ID, *after[0].tolist()]], ANSWER).float()
    cotangent = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    exact = torch.autograd.grad((expected * torch.from_numpy(cotangent)).sum(), pixels)[0]
    exact, expected = exact.float().permute(0, 2, 3, 1).numpy(), expected.detach().numpy()
    del oracle, pixels
    network = load.load("clip_t5", tmp_path, dtype=jnp.bfloat16)
    # XLA:CPU computes in float32, and would make that of all layers' weights before their loop.
    options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    program = ours.lower(network, x, after, cotangent).compile(compiler_options=options)
    actual, gradient = program(network, x, after, cotangent)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"logits {relative_l2(actual, expected):.4f}, gradient {cosine(gradient, exact):.5f}, {peak:.1f} GiB")
    # Either side rounds to 8 bits, each in its own places.
    assert relative_l2(actual, expected) < 0.05 and cosine(gradient, exact) > 0.99
    assert peak < 11.1  # 12 GB
