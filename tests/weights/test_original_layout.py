"""Stable Diffusion in one file, by the names of its authors' code."""

import numpy as np
import pytest
import safetensors.numpy

from referee_jax.models import clip
from referee_jax.models.diffusion import unet, vae
from referee_jax.weights import config_json, convert, load, tensors
from referee_jax.weights.formats import original_layout
from tests.lazy import diffusers, torch, transformers
from tests.oracles import original

FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module", params=FAMILIES)
def file(request):
    """`(family, networks, tensors of the original file)` of a tiny Stable Diffusion."""
    parts = original.tiny(request.param)
    return request.param, parts, original.arrays(original.one_file(request.param, parts))


def expected(family, parts):
    """Part -> tensors that the split should give; Stable Diffusion 2 does not read its last block."""
    out = {name: original.text_names(x) if "text" in name else x.state_dict() for name, x in parts.items()}
    if family == "sd2":
        unread = ("text_model.encoder.layers.23.", "text_projection")
        out["text_encoder"] = {n: x for n, x in out["text_encoder"].items() if not n.startswith(unread)}
    return out


def test_the_parts_are_the_networks(file):
    family, parts, values = file
    assert original_layout.is_original(values) and original_layout.family(values) == family
    split = original_layout.split(values)
    assert set(split) == set(parts)
    for part, theirs in expected(family, parts).items():
        assert set(split[part]) == set(theirs)
        for name, x in theirs.items():
            np.testing.assert_array_equal(split[part][name], x.numpy(), err_msg=name)


def converted(family, parts, values):
    """What diffusers' own converters make of the file."""
    utils = diffusers.loaders.single_file_utils
    values = {name: torch.from_numpy(np.array(x)) for name, x in values.items()}
    out = {
        "unet": utils.convert_ldm_unet_checkpoint(values, dict(parts["unet"].config)),
        "vae": utils.convert_ldm_vae_checkpoint(values, dict(parts["vae"].config)),
    }
    for part, prefix in zip(("text_encoder", "text_encoder_2"), original.TEXTS[family], strict=False):
        if prefix.endswith("model."):
            out[part] = utils.convert_open_clip_checkpoint(parts[part], values, prefix=prefix)
        else:
            out[part] = utils.convert_ldm_clip_checkpoint(values)
            out[part].pop("text_model.embeddings.position_ids")
    return out


def test_the_parts_are_those_of_diffusers_converters(file):
    family, parts, values = file
    split, theirs = original_layout.split(values), converted(family, parts, values)
    assert set(split) == set(theirs)
    for part in theirs:
        assert set(split[part]) == set(theirs[part])
        for name, x in theirs[part].items():
            np.testing.assert_array_equal(split[part][name], x.numpy(), err_msg=name)


def made(part, config):
    """The library's network of a config.json, on the meta device."""
    with torch.device("meta"):
        if "_class_name" in config:
            return getattr(diffusers, config["_class_name"]).from_config(config)
        return getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))


@pytest.mark.parametrize("family", FAMILIES)
def test_published_sizes(family):
    """All names and shapes, none left over; and the libraries make these of the configs."""
    parts = original.published(family)
    values = original.arrays(original.one_file(family, parts))
    assert diffusers.loaders.single_file_utils.infer_diffusers_model_type(values) == {
        "sd1": "v1", "sd2": "v2", "sdxl": "xl_base",
    }[family]  # fmt: skip
    assert original_layout.family(values) == family
    split, configs = original_layout.split(values), original_layout.configs(values)
    assert set(configs) == {*split, "scheduler"} == {*parts, "scheduler"}
    for part, theirs in expected(family, parts).items():
        shapes = {name: tuple(x.shape) for name, x in theirs.items()}
        assert {name: x.shape for name, x in split[part].items()} == shapes
        network = made(part, configs[part])
        state = original.text_names(network) if "text" in part else network.state_dict()
        assert {name: tuple(x.shape) for name, x in state.items()} == shapes


# Keys of the published config.json.
PUBLISHED = {
    "sd1": {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64, "use_linear_projection": False},
    "sd2": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": {
        "transformer_layers_per_block": [1, 2, 10], "addition_time_embed_dim": 256, "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": 2816, "attention_head_dim": [5, 10, 20], "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_published_configs(family):
    configs = original_layout.configs(original.arrays(original.one_file(family, original.published(family))))
    assert PUBLISHED[family].items() <= configs["unet"].items()
    # All that shapes do not say is as in the published networks.
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(original.UNETS[family] | {"sample_size": None})
        ours = diffusers.UNet2DConditionModel.from_config(configs["unet"] | {"sample_size": None})
    assert plain(ours.config) == plain(theirs.config)
    assert configs["vae"]["scaling_factor"] == (0.13025 if family == "sdxl" else 0.18215)
    for part, values in zip(("text_encoder", "text_encoder_2"), original.TEXT_CONFIGS[family], strict=False):
        unread = {"num_hidden_layers": 23} if family == "sd2" else {}
        assert (values | unread).items() <= configs[part].items()


def plain(config):
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}


def test_our_networks_are_filled(tmp_path):
    """From a file, whose tensors are not read before they are needed."""
    parts = original.tiny("sd1")
    safetensors.numpy.save_file(
        {n: np.ascontiguousarray(x) for n, x in original.arrays(original.one_file("sd1", parts)).items()},
        tmp_path / "sd.safetensors",
    )
    opened = tensors.Tensors(tmp_path, "sd")
    split, configs = original_layout.split(opened), original_layout.configs(opened)
    for part, kind in (("unet", "unet"), ("vae", "vae_decoder"), ("text_encoder", "clip_text")):
        row = load.KINDS[kind]
        network = load.unfilled(row, row.config(configs[part], where=part))
        network = convert.fill(network, split[part], dtype=np.float32, renames=row.renames, ignore=row.ignore)
        theirs = expected("sd1", parts)[part]
        for name, x in convert.export(network).items():
            np.testing.assert_array_equal(x, theirs[name].numpy(), err_msg=name)
    schedule = config_json.schedule(configs["scheduler"], where="scheduler")
    assert schedule.prediction_type == "epsilon" and schedule.beta_schedule == "scaled_linear"


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_configs_are_ours(family):
    """Those of all published sizes that the package knows."""
    configs = original_layout.configs(original.arrays(original.one_file(family, original.published(family))))
    for part, cls in (("unet", unet.Config), ("vae", vae.Config), ("text_encoder", clip.TextConfig)):
        config_json.config_from_json(cls, configs[part], where=part)


class Counted(dict):
    """Tensors that count how often each is read."""

    def __init__(self, values):
        super().__init__(values)
        self.reads = []

    def __getitem__(self, name):
        self.reads.append(name)
        return super().__getitem__(name)


def test_tensors_are_read_when_asked(file):
    values = Counted(file[2])
    split = original_layout.split(values)
    assert not values.reads
    split["unet"]["conv_in.weight"]
    assert values.reads == ["model.diffusion_model.input_blocks.0.0.weight"]


def test_without_text_encoders(file):
    """The width of the texts' states says the family; the tiny ones' are of none."""
    family, parts, values = file
    values = {n: x for n, x in values.items() if not n.startswith(("cond_stage_model.", "conditioner."))}
    with pytest.raises(
        convert.WeightsError, match="are not those of Stable Diffusion 1, 2 or XL in one file: the texts'"
    ):
        original_layout.split(values)
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    keys = [name for name in values if name.endswith("attn2.to_k.weight")]
    widened = values | {name: np.zeros((64, original_layout.LAYOUTS[family].context)) for name in keys}
    assert key in keys and original_layout.family(widened) == family
    assert set(original_layout.split(widened)) == {"unet", "vae"}


def test_older_names_of_the_text_encoder():
    parts = original.tiny("sd1")
    values = original.arrays(original.one_file("sd1", parts))
    older = {
        n.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): x
        for n, x in values.items()
    }
    a, b = original_layout.split(values)["text_encoder"], original_layout.split(older)["text_encoder"]
    assert set(a) == set(b) and len(a) > 30
    both = values | older
    with pytest.raises(convert.WeightsError, match=r"cond_stage_model\S+ and cond_stage_model\S+ are the same part"):
        original_layout.split(both)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.1.0.in_layers.1.weight",
        "model.diffusion_model.input_blocks.99.0.in_layers.0.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.lora.weight",
        "first_stage_model.decoder.mid.attn_2.q.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc3.bias",
        "model.diffusion_model.label_emb.0.0.weight",
        "something.else",
    ],
)
def test_unknown_tensors_are_named(name):
    values = original.arrays(original.one_file("sd1", original.tiny("sd1"))) | {name: np.zeros(3)}
    with pytest.raises(convert.WeightsError, match=r"tensors that a sd1 in one file does not have: ") as caught:
        original_layout.split(values)
    assert str(caught.value).endswith(f": {name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conditioner.embedders.0.model.ln_final.bias", "SDXL's refiner"),
        ("edm_mean", "Playground v2.5"),
        ("edm_vpred.sigma_max", "a v-prediction of EDM"),
        ("control_model.time_embed.0.weight", "a ControlNet"),
    ],
)
def test_similar_files_are_refused(name, message):
    with pytest.raises(convert.WeightsError, match=f"{name} is of {message}"):
        original_layout.split({name: np.zeros(1), "model.diffusion_model.out.2.bias": np.zeros(4)})


def test_other_files():
    assert not original_layout.is_original(["unet.conv_in.weight", "conv_in.weight"])
    with pytest.raises(convert.WeightsError, match=r"in one file: there is no model\.diffusion_model\.\*\.attn2"):
        original_layout.family({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": np.zeros((3, 3))})


def test_a_shape_that_does_not_fit():
    values = original.arrays(original.one_file("sd1", original.tiny("sd1")))
    name = "first_stage_model.decoder.mid.attn_1.q.weight"
    values[name] = np.zeros((64, 64, 3, 3), np.float32)
    with pytest.raises(convert.WeightsError, match=rf"{name} has shape \(64, 64, 3, 3\), which decoder\.mid"):
        original_layout.split(values)["vae"]["decoder.mid_block.attentions.0.to_q.weight"]


def test_a_missing_tensor_is_named():
    values = original.arrays(original.one_file("sd1", original.tiny("sd1")))
    del values["model.diffusion_model.input_blocks.0.0.weight"]
    with pytest.raises(convert.WeightsError, match=r"unet: there is no conv_in\.weight, which says how large"):
        original_layout.configs(values)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "model.diffusion_model.input_blocks.0.0.weight"),
        ("vae", "first_stage_model.decoder.conv_in.weight"),
        ("text_encoder", "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"),
    ],
)
def test_a_tensor_of_too_few_axes(part, name):
    values = original.arrays(original.one_file("sd1", original.tiny("sd1"))) | {name: np.zeros(3)}
    with pytest.raises(convert.WeightsError, match=f"{part}: a tensor has too few axes"):
        original_layout.configs(values)


# What the U-Net predicts.


@pytest.mark.parametrize(
    ("family", "extra", "metadata", "told"),
    [
        ("sd1", {}, None, "epsilon"),
        ("sdxl", {}, None, "epsilon"),
        ("sdxl", {"v_pred": np.zeros(0)}, None, "v_prediction"),
        ("sd2", {}, None, ""),
        ("sd2", {}, {"format": "pt"}, ""),
        ("sd2", {}, {"modelspec.prediction_type": "v"}, "v_prediction"),
        ("sd2", {}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ("sd2", {"global_step": np.array(875000)}, None, "epsilon"),
        ("sd2", {"global_step": np.array(110000)}, None, "v_prediction"),
    ],
)
def test_prediction_type(family, extra, metadata, told):
    values = {f"{original.TEXTS[family][-1]}ln_final.bias": np.zeros(3), **extra}
    assert original_layout.prediction_type(values, metadata) == told


def test_prediction_in_the_configs():
    """What is said counts more than what the file says, and that more than the default."""
    values = original.arrays(original.one_file("sd2", original.tiny("sd2")))
    said = lambda values, **how: original_layout.configs(values, **how)["scheduler"]["prediction_type"]
    assert said(values) == "epsilon" and said(values, prediction="v_prediction") == "v_prediction"
    stepped = values | {"global_step": np.array(110000)}
    assert said(stepped) == "v_prediction" and said(stepped, prediction="epsilon") == "epsilon"
    assert original_layout.configs(stepped)["unet"]["sample_size"] == 96
    assert original_layout.configs(values)["unet"]["sample_size"] == 64


def test_a_terminal_signal_of_zero_is_not_implemented():
    values = original.arrays(original.one_file("sdxl", original.tiny("sdxl")))
    configs = original_layout.configs(values | {"v_pred": np.zeros(0), "ztsnr": np.zeros(0)})
    with pytest.raises(convert.WeightsError, match="rescale_betas_zero_snr=True is not implemented"):
        config_json.schedule(configs["scheduler"], where="scheduler")
