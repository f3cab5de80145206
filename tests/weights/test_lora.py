"""LoRAs by all their names, merged into weights."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from referee_jax.weights import convert
from referee_jax.weights.formats import lora, original_layout
from tests.lazy import diffusers, torch
from tests.oracles import original

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
TEXT = "text_model.encoder.layers.1"
ZERO = np.zeros((2, 32), np.float32)
# Linear layers, convolutions of one pixel and of nine.
MODULES = [
    f"{ATTENTION}.attn1.to_q",
    f"{ATTENTION}.attn2.to_out.0",
    f"{ATTENTION}.ff.net.0.proj",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.1.conv1",
    "up_blocks.0.upsamplers.0.conv",
    "time_embedding.linear_1",
    "conv_in",
]


@pytest.fixture(scope="module")
def sd1():
    """Part -> tensors of a tiny Stable Diffusion 1."""
    parts = original.tiny("sd1")
    names = {name: original.text_names(x) if "text" in name else x.state_dict() for name, x in parts.items()}
    return {part: original.arrays(values) for part, values in names.items()}


def kohya(prefix, module):
    name = prefix + module.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def peft(prefix, module):
    return f"{prefix}{module}.lora_A.weight", f"{prefix}{module}.lora_B.weight", f"{prefix}{module}.alpha"


def older(prefix, module, word="lora"):
    return f"{prefix}{module}.{word}.down.weight", f"{prefix}{module}.{word}.up.weight", f"{prefix}{module}.alpha"


def processor(prefix, module):
    """As diffusers' attention processors once were saved; other layers had none."""
    if ".attn" not in module:
        return older(prefix, module)
    owner, name = module.removesuffix(".0").rsplit(".", 1)
    return f"{prefix}{owner}.processor.{name}_lora.down.weight", f"{prefix}{owner}.processor.{name}_lora.up.weight", ""


# Which of the older text encoders' layers have which names.
OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def old_text(prefix, module):
    for new, old in OLD_TEXT.items():
        module = module.replace(f"self_attn.{new}", f"self_attn.{old}_lora")
    return f"{prefix}{module}.down.weight", f"{prefix}{module}.up.weight", ""


SCHEMES = {
    "kohya": (kohya, "lora_unet_"),
    "PEFT": (peft, "unet."),
    "PEFT without a part": (peft, ""),
    "PEFT's own": (peft, "base_model.model."),
    "diffusers": (older, "unet."),
    "older diffusers": (processor, "unet."),
    "older diffusers without a part": (processor, ""),
}


def pair(rng, weight, rank, kernel=True):
    """A and B for a weight; `kernel` as for a convolution."""
    outputs, *inputs = weight.shape
    down, up = rng.standard_normal((rank, *inputs), np.float32), rng.standard_normal((outputs, rank), np.float32)
    if len(inputs) > 1:
        return (down, up[:, :, None, None]) if kernel else (down[:, :, 0, 0], up)
    return down, up


def by_hand(weight, down, up, scale):
    """W + scale B A, for a convolution one product for each pixel of the kernel."""
    outputs, *inputs = weight.shape
    up = up.reshape(outputs, -1)
    if len(inputs) == 1:
        return weight + scale * up @ down.reshape(-1, *inputs)
    return weight + scale * np.einsum("or,rihw->oihw", up, down.reshape(-1, *inputs))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_naming(scheme, sd1):
    """Linear layers and convolutions; other weights stay as they are."""
    names, prefix = SCHEMES[scheme]
    rng, values, expected = np.random.default_rng(0), {}, {}
    for n, module in enumerate(MODULES):
        weight = sd1["unet"][f"{module}.weight"]
        down, up, alpha = names(prefix, module)
        values[down], values[up] = pair(rng, weight, 2 + n)
        scale = 1.0
        if alpha:
            values[alpha], scale = np.float32(3.0), 3.0 / (2 + n)
        expected[f"{module}.weight"] = by_hand(weight, values[down], values[up], 0.5 * scale)
    lora.check([values], sd1)
    merged = lora.merged(sd1["unet"], [(values, 0.5)], "unet")
    assert set(merged) == set(sd1["unet"]) and set(merged.changes) == set(expected)
    for name, x in merged.items():
        if name in expected:
            assert x.dtype == np.float32
            np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-5)
        else:
            assert x is sd1["unet"][name]
    for part in ("vae", "text_encoder"):
        assert not lora.merged(sd1[part], [(values, 0.5)], part).changes


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (kohya, "lora_te_"),
        (kohya, "lora_te1_"),
        (peft, "text_encoder."),
        (old_text, "text_encoder."),
        (lambda *x: older(*x, word="lora_linear_layer"), "text_encoder."),
    ],
)
def test_text_encoders(names, prefix, prefixed, sd1):
    """Whether or not the network's names begin with text_model, as transformers 5 writes them or as published."""
    rng, network = np.random.default_rng(1), sd1["text_encoder"]
    cut = lambda name: name if prefixed else name.removeprefix("text_model.")
    modules = [f"{TEXT}.self_attn.{x}" for x in OLD_TEXT]
    modules += [] if names is old_text else [f"{TEXT}.mlp.fc1"]
    values, expected = {}, {}
    for module in modules:
        weight = network[f"{module}.weight"]
        down, up, _ = names(prefix, module)
        values[down], values[up] = pair(rng, weight, 3)
        expected[cut(f"{module}.weight")] = by_hand(weight, values[down], values[up], 2.0)
    merged = lora.merged({cut(n): x for n, x in network.items()}, [(values, 2.0)], "text_encoder")
    assert set(merged.changes) == set(expected)
    for name, x in expected.items():
        np.testing.assert_allclose(merged[name], x, rtol=1e-5, atol=1e-5)


def test_two_loras_and_their_weights(sd1):
    """One of them by its own rank, alpha and weight, and neither depends on the order; half precision is cast first."""
    rng, name = np.random.default_rng(2), f"{ATTENTION}.attn1.to_v.weight"
    network = {n: x.astype(np.float16) for n, x in sd1["unet"].items()}
    loras, expected = [], network[name].astype(np.float32)
    for rank, alpha, weight, names in ((4, 1.0, 0.7, kohya), (2, 8.0, -0.3, peft)):
        down, up, key = names("lora_unet_" if names is kohya else "unet.", name.removesuffix(".weight"))
        a, b = pair(rng, network[name], rank)
        values = {down: a.astype(ml_dtypes.bfloat16), up: b.astype(np.float16), key: np.array([alpha], np.float16)}
        loras.append((values, weight))
        expected = expected + weight * alpha / rank * values[up].astype(np.float32) @ values[down].astype(np.float32)
    for order in (loras, loras[::-1]):
        x = lora.merged(network, order, "unet")[name]
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - network[name]).max() > 0.1


def test_a_convolution_of_one_pixel_as_a_linear_layer_and_back(sd1):
    """Stable Diffusion 1 has convolutions where the newer ones, and some LoRAs, have linear layers."""
    rng, name = np.random.default_rng(3), "down_blocks.0.attentions.0.proj_out.weight"
    weight = sd1["unet"][name]
    assert weight.ndim == 4
    a, b = pair(rng, weight, 2, kernel=False)
    down, up, _ = kohya("lora_unet_", name.removesuffix(".weight"))
    expected = by_hand(weight, a, b, 1.0)
    x = lora.merged(sd1["unet"], [({down: a, up: b}, 1.0)], "unet")[name]
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)
    linear = sd1["unet"] | {name: weight[:, :, 0, 0]}
    x = lora.merged(linear, [({down: a[:, :, None, None], up: b[:, :, None, None]}, 1.0)], "unet")[name]
    np.testing.assert_allclose(x, expected[:, :, 0, 0], rtol=1e-5, atol=1e-5)


# Names of whole networks.


def originals(family, network):
    """Original names of a U-Net's matrices -> ours, by the memory that they share."""
    found = {}
    original.unet_names(found, network)
    ours = {x.data_ptr(): name for name, x in network.state_dict().items()}
    names = {n.removeprefix("model.diffusion_model."): ours[x.data_ptr()] for n, x in found.items() if x.ndim > 1}
    assert len(names) == len(set(names.values())) == sum(x.ndim > 1 for x in network.parameters())
    return names


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_all_weights_by_the_blocks_of_either_code(family):
    network = original.tiny(family)["unet"]
    tensors = original.arrays(network.state_dict())
    ours = {name: name for name, x in tensors.items() if x.ndim > 1}
    for names in (originals(family, network), ours):
        keys = {kohya("lora_unet_", name.removesuffix(".weight")): target for name, target in names.items()}
        values = {x: np.zeros((1, 1)) for key in keys for x in key}
        lora.check([values], {"unet": tensors})
        changes = lora.merged(tensors, [(values, 1.0)], "unet").changes
        assert {change[0][2].down: name for name, change in changes.items()} == {k[0]: x for k, x in keys.items()}


def with_diffusers_names(values, config):
    """Our names of modules, as diffusers' converters see them -> the tensors' names in the file."""
    utils = diffusers.loaders.lora_conversion_utils
    values = {name: torch.full((1, 1), float(n)) for n, name in enumerate(values)}
    numbered = {n: name for n, name in enumerate(values)}
    mapped = utils._maybe_map_sgm_blocks_to_diffusers(dict(values), config)
    converted, _ = utils._convert_non_diffusers_lora_to_diffusers(mapped)
    state = diffusers.utils.state_dict_utils
    unet = {k.removeprefix("unet."): x for k, x in converted.items() if k.startswith("unet.")}
    text = {k: x for k, x in converted.items() if not k.startswith("unet.")}
    unet = state.convert_unet_state_dict_to_peft(unet)
    text = state.convert_state_dict_to_peft(text) if text else {}
    return {
        part: {k.removesuffix(".lora_A.weight"): numbered[int(x)] for k, x in some.items() if ".lora_A." in k}
        for part, some in (("unet", unet), ("text_encoder", text))
    }


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_all_weights_of_the_published_sizes(family):
    """No two of them have the same name with underscores for dots."""
    split = original_layout.split(original.arrays(original.one_file(family, original.published(family))))
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
    values, expected = {}, {}
    for part, prefix in prefixes.items():
        for name in (n for n in split.get(part, ()) if n.endswith(".weight")):
            keys = kohya(prefix, name.removesuffix(".weight"))
            values |= dict.fromkeys(keys, ZERO)
            expected[part, name] = keys[0]
    lora.check([values], split)
    merged = {part: lora.merged(split[part], [(values, 1.0)], part).changes for part in prefixes if part in split}
    assert {(part, name): x[0][2].down for part, some in merged.items() for name, x in some.items()} == expected


# Names that diffusers' converters give to layers, and that no network has: an upsampling without a transformer
# before it, and the linear layers for the sizes of images.
MISNAMED = {
    ("sd1", "original"): {"up_blocks.0.attentions.2.conv"},
    ("sd2", "original"): {"up_blocks.0.attentions.1.conv"},
    ("sdxl", "diffusers"): {"add.embedding.linear"},
}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("blocks", ["diffusers", "original"])
def test_names_are_those_of_diffusers_converters(family, blocks):
    network = original.tiny(family)["unet"]
    tensors = original.arrays(network.state_dict())
    names = originals(family, network) if blocks == "original" else {n: n for n, x in tensors.items() if x.ndim > 1}
    keys = [kohya("lora_unet_", name.removesuffix(".weight"))[:2] for name in names]
    values = {x: np.zeros((1, 1)) for key in keys for x in key}
    theirs = with_diffusers_names(values, network.config)["unet"]
    changes = lora.merged(tensors, [(values, 1.0)], "unet").changes
    ours = {name.removesuffix(".weight"): change[0][2].down for name, change in changes.items()}
    strange = {name for name in theirs if f"{name}.weight" not in tensors}
    assert strange == MISNAMED.get((family, blocks), set())
    theirs = {name: x for name, x in theirs.items() if name not in strange}
    assert len(theirs) > 30 and {name: ours.get(name) for name in theirs} == theirs


def test_names_of_text_encoders_are_those_of_diffusers_converters(sd1):
    tensors = sd1["text_encoder"]
    modules = [n.removesuffix(".weight") for n, x in tensors.items() if x.ndim > 1 and "embeddings" not in n]
    values = {x: np.zeros((1, 1)) for module in modules for x in kohya("lora_te_", module)[:2]}
    theirs = with_diffusers_names(values, None)["text_encoder"]
    changes = lora.merged(tensors, [(values, 1.0)], "text_encoder").changes
    ours = {f"text_encoder.{n.removesuffix('.weight')}": change[0][2].down for n, change in changes.items()}
    assert ours == theirs and len(ours) == 12


def test_onto_an_original_file():
    """Tensors of the file and of the LoRA are read when they are asked for."""
    parts = original.tiny("sdxl")
    split = original_layout.split(original.arrays(original.one_file("sdxl", parts)))
    rng, values, names = np.random.default_rng(4), {}, {}
    for prefix, part, module in (
        ("lora_unet_", "unet", "input_blocks.3.1.transformer_blocks.1.attn1.to_k"),
        ("lora_te1_", "text_encoder", f"{TEXT}.mlp.fc2"),
        ("lora_te2_", "text_encoder_2", f"{TEXT}.self_attn.v_proj"),
        ("lora_te2_", "text_encoder_2", "text_projection"),
    ):
        name = module.replace("input_blocks.3.1", "down_blocks.1.attentions.0")
        down, up, _ = kohya(prefix, module)
        values[down], values[up] = pair(rng, split[part][f"{name}.weight"], 2)
        names[part, f"{name}.weight"] = down, up
    lora.check([values], split)
    for (part, name), (down, up) in names.items():
        x = lora.merged(split[part], [(values, 1.0)], part)[name]
        np.testing.assert_allclose(x, split[part][name] + values[up] @ values[down], rtol=1e-5, atol=1e-5)


# Files.


def save(file, values, **metadata):
    safetensors.numpy.save_file(values, file, metadata=metadata or None)
    return lora.File(file)


def one(rng, weight, rank=4, prefix="unet.", module=f"{ATTENTION}.attn1.to_q"):
    down, up, _ = peft(prefix, module)
    return dict(zip((down, up), pair(rng, weight, rank), strict=True))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
        ({"text_encoder.r": 4, "text_encoder.lora_alpha": 8}, 1.0),
        ({"r": 4, "lora_alpha": 6}, 1.5),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"unet.r": 1, "unet.rank_pattern": {"attn1.to_q": 4}, "unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 12, "to_q": 1}}, 3.0),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {f"^{ATTENTION}.attn1.to_q": 12}}, 3.0),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"o_q": 12}}, 2.0),
    ],
)
def test_alphas_of_peft(settings, scale, sd1, tmp_path):
    """In the header, as diffusers keeps them."""
    name = f"{ATTENTION}.attn1.to_q.weight"
    values = one(np.random.default_rng(5), sd1["unet"][name])
    file = save(tmp_path / "lora.safetensors", values, **({"lora_adapter_metadata": json.dumps(settings)}))
    expected = by_hand(sd1["unet"][name], *values.values(), scale)
    lora.check([file], sd1)
    assert len(file) == len(list(file))
    np.testing.assert_allclose(lora.merged(sd1["unet"], [(file, 1.0)], "unet")[name], expected, rtol=1e-5, atol=1e-5)


def test_alphas_beside_the_file_of_peft_itself(sd1, tmp_path):
    name = f"{ATTENTION}.attn1.to_q.weight"
    values = one(np.random.default_rng(5), sd1["unet"][name], prefix="base_model.model.")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2, "peft_type": "LORA"}))
    file = save(tmp_path / "adapter_model.safetensors", values)
    expected = by_hand(sd1["unet"][name], *values.values(), 0.5)
    np.testing.assert_allclose(lora.merged(sd1["unet"], [(file, 1.0)], "unet")[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"lora_adapter_metadata in its header is not valid JSON"),
        ("[1]", r"lora_adapter_metadata in its header does not hold a JSON object"),
        ('{"unet.lora_alpha": 4, "unet.use_dora": true}', r"unet\.\S+\.lora_A\.weight is of DoRA"),
        ('{"unet.lora_alpha": "x"}', r"unet\.lora_alpha='x' and unet\.alpha_pattern={} give unet\.\S+ no number"),
        (
            '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 1}}',
            r"unet\.lora_alpha=4 and unet\.alpha_pattern={'\(': 1} give",
        ),
        (
            '{"unet.lora_alpha": 4, "unet.use_rslora": true}',
            r"unet\.r=None and unet\.rank_pattern={} give unet\.\S+ no",
        ),
    ],
)
def test_settings_of_peft_that_are_not_read(text, message, sd1, tmp_path):
    values = one(np.random.default_rng(6), sd1["unet"][f"{ATTENTION}.attn1.to_q.weight"])
    with pytest.raises(convert.WeightsError, match=rf"lora\.safetensors: {message}"):
        save(tmp_path / "lora.safetensors", values, lora_adapter_metadata=text)


def test_files_that_are_not_read(tmp_path):
    with pytest.raises(convert.WeightsError, match=r"style\.pt: only safetensors are read, .* run: python -c "):
        lora.File(tmp_path / "style.pt")
    with pytest.raises(convert.WeightsError, match=r"the LoRA \S+style\.safetensors is not here"):
        lora.File(tmp_path / "style.safetensors")


# What is wrong in a LoRA, by file and tensor.


def changed(values, **changes):
    return {name: x for name, x in (values | changes).items() if x is not None}


BASE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
WRONG = {
    "without what goes up": ({f"{BASE}.lora_up.weight": None}, rf"{BASE}\.\S+ is there, but not what goes up"),
    "without what goes down": ({f"{BASE}.lora_down.weight": None}, rf"{BASE}\.\S+ is there, but not what goes down"),
    "an alpha alone": (
        {"lora_te_x.alpha": np.array(1, np.float32)},
        r"lora_te_x\.alpha is there, but not what goes down",
    ),
    "no LoRA": ({"emb_params": ZERO}, "emb_params is not known to be of a LoRA"),
    "no weight": (
        {"lora_unet_conv_inn.lora_down.weight": ZERO, "lora_unet_conv_inn.lora_up.weight": ZERO},
        r"lora_unet_conv_inn\.lora_down\.weight is for no weight of the unet",
    ),
    "no part": (
        {"lora_te2_x.lora_down.weight": ZERO, "lora_te2_x.lora_up.weight": ZERO},
        r"lora_te2_x\.lora_down\.weight is for a text_encoder_2, which this checkpoint does not have",
    ),
    "twice": (
        {f"unet.{ATTENTION}.attn1.to_q.lora.up.weight": ZERO},
        rf"{BASE}\.lora_up\.weight and unet\.\S+ are the same part of the LoRA",
    ),
    "twice, by other blocks": (
        {f"lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_{x}.weight": ZERO for x in ("up", "down")},
        rf"{BASE}\.lora_down\.weight and lora_unet_input\S+ are for the same weight of the unet",
    ),
    "DoRA": ({f"{BASE}.dora_scale": ZERO}, rf"{BASE}\.dora_scale is of DoRA, which also scales"),
    "DoRA of PEFT": ({"unet.conv_in.lora_magnitude_vector": ZERO}, r"unet\.conv_in\.lora_magnitude_vector is of DoRA"),
    "LoHa": ({f"{BASE}.hada_w1_a": ZERO}, r"\S+\.hada_w1_a is of LoHa"),
    "LoKr": ({f"{BASE}.lokr_w1": ZERO}, r"\S+\.lokr_w1 is of LoKr"),
    "Tucker": ({f"{BASE}.lora_mid.weight": ZERO}, r"\S+\.lora_mid\.weight is of a LoRA with a Tucker decomposition"),
    "biases": ({"unet.conv_in.lora_B.bias": ZERO}, r"\S+\.lora_B\.bias is of a LoRA with biases"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case, sd1, tmp_path):
    changes, message = WRONG[case]
    down, up, alpha = kohya("lora_unet_", f"{ATTENTION}.attn1.to_q")
    good = {down: ZERO, up: np.zeros((32, 2), np.float32), alpha: np.array(1, np.float32)}
    lora.check([good], sd1)
    file = save(tmp_path / "style.safetensors", changed(good, **changes))
    with pytest.raises(convert.WeightsError, match=rf"style\.safetensors: {message}") as caught:
        lora.check([good, file], sd1)
    assert "\n" not in str(caught.value)
    if case != "no part":
        with pytest.raises(convert.WeightsError, match=message):
            lora.merged(sd1["unet"], [(file, 1.0)], "unet")


@pytest.mark.parametrize(
    ("down", "up", "alpha"),
    [((2, 31), (32, 2), ()), ((2, 32), (31, 2), ()), ((2, 32), (32, 3), ()), ((0, 32), (32, 0), ()), ((32,), (32,), ())]
    + [((2, 32, 3, 3), (32, 2, 1, 1), ()), ((2, 32), (32, 2, 3, 3), ())],
)
def test_shapes_that_do_not_fit(down, up, alpha, sd1):
    values = dict(zip(kohya("lora_unet_", f"{ATTENTION}.attn1.to_q"), map(np.zeros, (down, up, alpha)), strict=True))
    lora.check([values], sd1)
    merged = lora.merged(sd1["unet"], [(values, 1.0)], "unet")
    with pytest.raises(
        convert.WeightsError, match=rf"LoRA 0: {BASE}\.lora_down\.weight .* do not fit the weight \(32, 32\)"
    ):
        merged[f"{ATTENTION}.attn1.to_q.weight"]


def test_an_alpha_that_is_no_number(sd1):
    values = dict(
        zip(kohya("lora_unet_", f"{ATTENTION}.attn1.to_q"), map(np.zeros, ((2, 32), (32, 2), 3)), strict=True)
    )
    with pytest.raises(convert.WeightsError, match=r"its alpha has shape \(3,\) instead of a number"):
        lora.merged(sd1["unet"], [(values, 1.0)], "unet")[f"{ATTENTION}.attn1.to_q.weight"]
