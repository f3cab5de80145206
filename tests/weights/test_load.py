"""Loading what transformers and diffusers write, and what is said of what cannot be loaded."""

import json
import re
import shutil
import subprocess
import sys

import diffusers
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from referee_jax.models import clip, unet, vae
from referee_jax.weights import configs, convert, load
from tests import conftest
from tests.oracles import networks


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """`(Stable Diffusion, CLIP)` directories as the libraries write them; not to be changed."""
    return networks.save(tmp_path_factory.mktemp("published"))


@pytest.fixture
def directory(published, tmp_path):
    """A CLIP directory to spoil."""
    return shutil.copytree(published[1], tmp_path / "clip")


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file, change):
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def fails(directory, message, kind="clip"):
    with pytest.raises(load.WeightsError, match=message) as caught:
        load.load(kind, directory)
    assert str(directory) in str(caught.value)


# What can be loaded.


def test_single_file_has_the_oracles_weights(published):
    network = load.load_clip(published[1])
    oracle = networks.clip(seed=1)
    exported = convert.export(network)
    assert set(exported) == set(oracle.state_dict())
    for name, x in oracle.state_dict().items():
        np.testing.assert_array_equal(exported[name], x.numpy())


def test_shards_hold_the_same(published, tmp_path):
    networks.clip(seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    same(load.load_clip(tmp_path), load.load_clip(published[1]))


def test_float16_file_is_cast_to_the_asked_dtype(published, tmp_path):
    networks.clip(seed=1).half().save_pretrained(tmp_path)
    exact = load.load_clip(published[1])
    for dtype in (jnp.float32, jnp.bfloat16):
        network = load.load_clip(tmp_path, dtype=dtype)
        for a, b in zip(jax.tree.leaves(network), jax.tree.leaves(exact), strict=True):
            assert a.dtype == (dtype if a.ndim else jnp.float32)
            rounding = 2**-11 if dtype == jnp.float32 else 2**-8 + 2**-11
            np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=rounding, atol=1e-7)


def test_text_encoder_with_and_without_the_old_prefix(published, tmp_path):
    networks.text_encoder(0).save_pretrained(tmp_path)
    names = [
        set(safetensors.numpy.load_file(p / "model.safetensors")) for p in (tmp_path, published[0] / "text_encoder")
    ]
    assert names[0].isdisjoint(names[1])
    same(load.load("clip_text", tmp_path), load.load("clip_text", published[0], subfolder="text_encoder"))


def test_stable_diffusion(published):
    parts = load.load_stable_diffusion(published[0])
    assert isinstance(parts.unet, unet.UNet) and isinstance(parts.vae, vae.AutoencoderKL)
    assert isinstance(parts.text_encoder, clip.TextModel)
    assert parts.vae.encoder is None and parts.vae.config.scaling_factor == 0.18215
    assert parts.prediction_type == "epsilon"
    assert parts.alphas_cumprod.shape == (1000,) and parts.alphas_cumprod.dtype == jnp.float32
    np.testing.assert_allclose(parts.alphas_cumprod, networks.scheduler().alphas_cumprod.numpy(), rtol=1e-5)

    ids = parts.tokenizer("a red circle", padding="max_length", return_tensors="np").input_ids
    assert ids.shape == (1, parts.tokenizer.model_max_length) == (1, 77)
    theirs = networks.text_encoder(0)(torch.from_numpy(ids)).last_hidden_state
    assert conftest.relative_l2(parts.text_encoder(ids), theirs) < 1e-4

    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    with_encoder = load.load_stable_diffusion(published[0], encoder=True).vae
    np.testing.assert_array_equal(with_encoder.decode(latents), parts.vae.decode(latents))
    assert with_encoder.encode(with_encoder.decode(latents))[0].shape == (1, 8, 8, 4)


def test_tiny_decoder(tmp_path):
    networks.redraw(diffusers.AutoencoderTiny(), 0).save_pretrained(tmp_path)
    exported = convert.export(load.load("vae_tiny", tmp_path))
    oracle = diffusers.AutoencoderTiny.from_pretrained(tmp_path).decoder.state_dict()
    assert set(exported) == {f"decoder.{name}" for name in oracle}
    np.testing.assert_array_equal(exported["decoder.layers.0.weight"], oracle["layers.0.weight"].numpy())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("shape", ["linear", "scaled_linear"])
@pytest.mark.parametrize(
    "cls", [diffusers.PNDMScheduler, diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.DDPMScheduler]
)
def test_noise_schedules(cls, shape, prediction, tmp_path):
    theirs = cls(beta_schedule=shape, beta_start=0.00085, beta_end=0.012, prediction_type=prediction)
    theirs.save_pretrained(tmp_path)
    schedule = configs.config_from_json(configs.Schedule, configs.read_json(tmp_path / "scheduler_config.json"))
    np.testing.assert_allclose(schedule.alphas_cumprod(), theirs.alphas_cumprod.numpy(), rtol=2e-5)
    assert schedule.prediction_type == prediction


# What we write.


def test_transformers_reads_what_we_write(published, tmp_path):
    network = load.load_clip(published[1])
    load.save_directory(tmp_path, network, configs.read_json(published[1] / "config.json"))
    oracle, info = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, x in networks.clip(seed=1).state_dict().items():
        np.testing.assert_array_equal(oracle.state_dict()[name].numpy(), x.numpy())
    same(load.load_clip(tmp_path), network)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_parts_are_written_for_their_library(part, published, tmp_path):
    kind, cls = {
        "text_encoder": ("clip_text", transformers.CLIPTextModel),
        "unet": ("unet", diffusers.UNet2DConditionModel),
        "vae": ("vae", diffusers.AutoencoderKL),
    }[part]
    network = load.load(kind, published[0], subfolder=part)
    load.save_directory(tmp_path, network, configs.read_json(published[0] / part / "config.json"), dtype=jnp.float16)
    file = next(tmp_path.glob("*.safetensors"))
    assert {x.dtype for x in safetensors.numpy.load_file(file).values()} == {np.dtype(np.float16)}
    oracle, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = load.load(kind, tmp_path)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(network), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-11, atol=1e-7)
    assert sum(x.numel() for x in oracle.parameters()) == sum(x.size for x in jax.tree.leaves(network))


# How images are prepared.


def blip_directory(path, size=32):
    """What is read of a checkpoint besides its network."""
    path.mkdir()
    networks.save_blip_processor(path, size)
    return path


def older_file(path, **changes):
    """Adds what transformers 4 would have written beside."""
    networks.blip_image_processor(32).save_pretrained(path)
    edit_json(path / "preprocessor_config.json", **changes)


def test_preprocessing_of_a_processor_saved_today(tmp_path):
    """It is one part of one file, as the processor itself reads it."""
    path = blip_directory(tmp_path / "blip", 48)
    assert not (path / "preprocessor_config.json").exists()
    settings = load.read_preprocessing(path)
    assert settings["size"] == {"height": 48, "width": 48} and settings["image_mean"] == list(networks.CLIP_MEAN)
    processor = load.load_image_processor(path)
    assert processor.to_dict() == transformers.BlipProcessor.from_pretrained(path).image_processor.to_dict()


def test_preprocessing_in_a_file_of_its_own(tmp_path):
    """As published checkpoints have it; beside it, their processor_config.json says other things, or nothing is there."""
    path = blip_directory(tmp_path / "blip")
    older_file(path, size={"height": 40, "width": 40})
    (path / "processor_config.json").write_text('{"num_query_tokens": 32, "processor_class": "Blip2Processor"}')
    for _ in range(2):
        assert load.read_preprocessing(path)["size"] == {"height": 40, "width": 40}
        assert dict(load.load_image_processor(path).size) == {"height": 40, "width": 40}
        (path / "processor_config.json").unlink(missing_ok=True)


def test_of_two_preprocessings_the_one_that_transformers_takes(tmp_path):
    path = blip_directory(tmp_path / "blip")
    older_file(path, size={"height": 40, "width": 40}, image_mean=[0.0, 0.0, 0.0])
    settings, processor = load.read_preprocessing(path), load.load_image_processor(path)
    assert settings["size"] == dict(processor.size) == {"height": 32, "width": 32}
    assert settings["image_mean"] == list(processor.image_mean) == list(networks.CLIP_MEAN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            None,
            r"preprocessor_config\.json is missing, and there is no processor_config\.json that says how an image is",
        ),
        (
            "{}",
            r"preprocessor_config\.json is missing, and there is no processor_config\.json that says how an image is",
        ),
        (
            '{"image_processor": null}',
            r"preprocessor_config\.json is missing, and there is no processor_config\.json that says how an image is",
        ),
        ("[]", r"processor_config\.json does not hold a JSON object$"),
        ("{", r"processor_config\.json is not valid JSON"),
        ('{"image_processor": [1]}', r"processor_config\.json: image_processor does not hold a JSON object$"),
    ],
)
def test_without_preprocessing(tmp_path, text, message):
    path = blip_directory(tmp_path / "blip")
    (path / "processor_config.json").unlink()
    if text is not None:
        (path / "processor_config.json").write_text(text)
    for read in (load.read_preprocessing, load.load_image_processor):
        with pytest.raises(load.WeightsError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# Tensors and files that do not fit, of each family of referees.

# Kind -> writes a tiny directory of it.
FAMILIES = {
    "clip": lambda path: networks.clip().save_pretrained(path),
    "siglip": lambda path: networks.siglip().save_pretrained(path),
    "blip_itm": lambda path: networks.blip(transformers.BlipForImageTextRetrieval).save_pretrained(path),
    "blip_caption": lambda path: networks.blip(transformers.BlipForConditionalGeneration).save_pretrained(path),
    "blip_vqa": lambda path: networks.blip(transformers.BlipForQuestionAnswering).save_pretrained(path),
    "blip2": lambda path: networks.blip2().save_pretrained(path),
    "align": lambda path: networks.align().save_pretrained(path),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Kind -> its directory, as transformers writes it; not to be changed."""
    root = tmp_path_factory.mktemp("families")
    for kind, save in FAMILIES.items():
        save(root / kind)
    return {kind: root / kind for kind in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request, saved, tmp_path):
    """A kind, and a directory of it to spoil."""
    return request.param, shutil.copytree(saved[request.param], tmp_path / request.param)


def test_dropped_tensor(family):
    kind, path = family
    names = set(load.Tensors(path, load.TRANSFORMERS))
    for part in ("text_model", "vision_model", "text_encoder", "qformer", "text_decoder"):
        name = min((n for n in names if n.startswith(part) and n.endswith("bias")), default=None)
        if name is None:
            continue
        kept = {}
        edit_tensors(path / "model.safetensors", lambda t, name=name, kept=kept: kept.update({name: t.pop(name)}))
        fails(path, rf"{kind}/model\.safetensors: parameters without a tensor: {re.escape(name)}$", kind)
        edit_tensors(path / "model.safetensors", lambda t, kept=kept: t.update(kept))
    load.load(kind, path)


def test_added_tensor(family):
    kind, path = family
    edit_tensors(path / "model.safetensors", lambda t: t.update(classifier=np.zeros(2)))
    fails(path, rf"{kind}/model\.safetensors: tensors that no parameter takes: classifier$", kind)


@pytest.mark.parametrize("keep", [4, -1])
def test_truncated_file(family, keep):
    kind, path = family
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    fails(path, r"model\.safetensors is damaged or not a safetensors file", kind)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_pickled_files_are_not_opened(family, name):
    kind, path = family
    (path / "model.safetensors").rename(path / name)
    fails(path, rf"model\.safetensors is missing \(there is {name}\); only safetensors.*save_pretrained", kind)


def test_pickle_by_the_name_of_another_kind_of_file(family):
    kind, path = family
    tensors = {"logit_scale": torch.zeros(())}
    torch.save(tensors, path / "model.safetensors")
    fails(path, r"model\.safetensors is damaged or not a safetensors file", kind)


@pytest.mark.parametrize("said", FAMILIES)
def test_checkpoint_of_another_kind(family, said):
    """One sentence that names both; BLIPs, too, whose model_type is the same."""
    kind, path = family
    if said == kind:
        load.load(kind, path)
        return
    fails(path, rf"{kind}/config\.json is of another kind of network: {kind} \(\w+\), not {said}$", said)


def test_checkpoint_that_does_not_say_its_kind(saved, tmp_path):
    """It is what it is taken for, if its tensors are; so is one of an architecture that is not known."""
    path = shutil.copytree(saved["blip_itm"], tmp_path / "blip")
    for architectures in (None, [], ["BlipModel"], "BlipForQuestionAnswering", {"a": 1}):
        edit_json(path / "config.json", architectures=architectures)
        same(load.load("blip_itm", path), load.load("blip_itm", saved["blip_itm"]))
        fails(path, r"model\.safetensors: parameters without a tensor: ", "blip_vqa")


# Tensors that do not fit in other ways.


def test_old_buffers_are_no_weights(directory, published):
    edit_tensors(
        directory / "model.safetensors", lambda t: t.update({"vision_model.embeddings.position_ids": np.zeros(2)})
    )
    same(load.load_clip(directory), load.load_clip(published[1]))


def test_wrong_shape(directory):
    name = "visual_projection.weight"
    edit_tensors(directory / "model.safetensors", lambda t: t.update({name: t[name].T.copy()}))
    fails(directory, r"visual_projection\.weight has shape \(40, 24\), but visual_projection\.weight takes \(24, 40\)")


def test_config_of_another_depth(directory):
    edit_json(directory / "config.json", vision_config={**vision_config(directory), "num_hidden_layers": 3})
    fails(directory, r"without a tensor: vision_model\.encoder\.layers\.2\.layer_norm1\.bias, .*layers\.2")


def vision_config(directory):
    return json.loads((directory / "config.json").read_text())["vision_config"]


# Files that are missing or damaged.


@pytest.mark.parametrize("keep", [0, 200])
def test_file_that_ends_in_its_header(directory, keep):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    fails(directory, r"model\.safetensors is damaged or not a safetensors file")


OTHER_KINDS = {
    "pickle": b"\x80\x04garbage" * 100,
    "zip": b"PK\x03\x04" + bytes(500),
    "page": b"<!DOCTYPE html>\n<html><body>Please log in</body></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 598641023\n",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_file_of_another_kind(directory, kind):
    (directory / "model.safetensors").write_bytes(OTHER_KINDS[kind])
    fails(directory, r"model\.safetensors is damaged or not a safetensors file")


def test_flipped_bits_of_the_header(directory, published):
    """Each is told, or changes nothing (a blank between two entries)."""
    file, rng = directory / "model.safetensors", np.random.default_rng(0)
    whole, exact = file.read_bytes(), load.load_clip(published[1])
    length = 8 + int.from_bytes(whole[:8], "little")
    told = 0
    for at in (*range(8), *rng.integers(8, length, 60)):
        spoilt = bytearray(whole)
        spoilt[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(spoilt)
        try:
            network = load.load_clip(directory)
        except load.WeightsError as error:
            told += str(file) in str(error) and "\n" not in str(error)
        else:
            same(network, exact)
            told += 1
    assert told == 68


def test_floats_that_became_integers(directory):
    """One bit of the header; sizes and names are all as they were."""
    file = directory / "model.safetensors"
    name = "visual_projection.weight"
    at = file.read_bytes().index(name.encode())
    head, tail = file.read_bytes()[:at], file.read_bytes()[at:]
    file.write_bytes(head + tail.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    fails(directory, r"model\.safetensors: visual_projection\.weight holds int32, which are no weights$")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(directory, dtype, value):
    name = "text_model.final_layer_norm.bias"
    spoilt = np.zeros(32, dtype)
    spoilt[-1] = value
    edit_tensors(directory / "model.safetensors", lambda t: t.update({name: spoilt}))
    fails(directory, r"model\.safetensors: text_model\.final_layer_norm\.bias holds NaN or infinity$")


def test_the_largest_number_is_one(directory):
    largest = np.full(32, np.finfo(np.float16).max, np.float16)
    edit_tensors(directory / "model.safetensors", lambda t: t.update({"text_model.final_layer_norm.bias": largest}))
    assert load.load_clip(directory).text_model.final_layer_norm.bias[0] == 65504


def test_missing_file(directory):
    (directory / "model.safetensors").unlink()
    fails(directory, r"model\.safetensors is missing; only safetensors are read")


@pytest.fixture
def shards(tmp_path):
    networks.clip(seed=1).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    return tmp_path / "shards"


def test_missing_shard(shards):
    victim = sorted(shards.glob("model-*.safetensors"))[1]
    victim.unlink()
    fails(shards, rf"{victim.name} is missing$")


def test_shard_of_another_checkpoint(shards):
    victim = sorted(shards.glob("model-*.safetensors"))[1]
    edit_tensors(victim, lambda t: t.update(stranger=np.zeros(1)))
    fails(shards, rf"{victim.name} does not hold what the index says: stranger")


@pytest.mark.parametrize("target", ["../clip/model.safetensors", "/etc/passwd", "", 3])
def test_index_names_files_beside_it_only(shards, target):
    edit_json(shards / "model.safetensors.index.json", weight_map={"logit_scale": target})
    fails(shards, r"index\.json puts logit_scale into .*, which is not the name of a file beside it")


@pytest.mark.parametrize("weight_map", [{}, None, ["a"]])
def test_index_without_a_map(shards, weight_map):
    edit_json(shards / "model.safetensors.index.json", weight_map=weight_map)
    fails(shards, r"index\.json has no weight_map")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"model_type": "clip"', r"config\.json is not valid JSON \(.*line 1"),
        (b"\xff\xfe\x00", r"config\.json is not valid JSON"),
        (b"[1, 2]", r"config\.json does not hold a JSON object$"),
        (None, r"config\.json is missing$"),
    ],
)
def test_garbage_config(directory, text, message):
    file = directory / "config.json"
    file.unlink()
    if text is not None:
        file.write_bytes(text)
    fails(directory, message)


# Configs that are not implemented.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip"}, r"model_type='siglip' is not implemented; supported: 'clip'$"),
        ({"rope_theta": 10000}, r"the key rope_theta=10000 is not known to referee_jax\.models\.clip\.Config$"),
        ({"projection_dim": "24"}, r"projection_dim='24' is of the wrong type; expected int$"),
        ({"projection_dim": True}, r"projection_dim=True is of the wrong type"),
        ({"text_config": [1]}, r"text_config=\[1\] is of the wrong type"),
        ({"vision_config": {"num_channels": 4}}, r"vision_config: num_channels=4 is not implemented; supported: 3$"),
        (
            {"vision_config": {"hidden_act": "mish"}},
            r"vision_config: hidden_act='mish' is not implemented; supp.*quick_gelu",
        ),
        ({"text_config": {"eos_token_id": [1, 2]}}, r"text_config: eos_token_id=\[1, 2\] is of the wrong type"),
        (
            {"text_config": {"hidden_size": 30}},
            r"text_config: hidden_size=30 does not divide into num_attention_heads=8",
        ),
        ({"text_config": {"is_decoder": True}}, r"text_config: is_decoder=True is not implemented"),
    ],
)
def test_unknown_config(directory, changes, message):
    edit_json(directory / "config.json", **changes)
    fails(directory, r"config\.json: " + message)


def test_unknown_config_of_diffusers(published, tmp_path):
    directory = shutil.copytree(published[0] / "unet", tmp_path / "unet")
    edit_json(directory / "config.json", class_embed_type="timestep")
    fails(directory, r"config\.json: class_embed_type='timestep' is not implemented", kind="unet")


def test_config_takes_integers_for_floats_and_lists_for_tuples():
    config = configs.config_from_json(vae.Config, {"scaling_factor": 1, "block_out_channels": [8, 16]})
    assert config.scaling_factor == 1.0 and isinstance(config.scaling_factor, float)
    assert config.block_out_channels == (8, 16)
    assert hash(config) == hash(
        configs.config_from_json(vae.Config, {"scaling_factor": 1.0, "block_out_channels": (8, 16)})
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prediction_type": "sample"},
            r"prediction_type='sample' is not implemented; supported: epsilon, v_prediction",
        ),
        (
            {"beta_schedule": "squaredcos_cap_v2"},
            r"beta_schedule='squaredcos_cap_v2' is not implemented; .*scaled_linear",
        ),
        ({"trained_betas": [0.1]}, r"trained_betas=\[0\.1\] is not implemented"),
        ({"rescale_betas_zero_snr": True}, r"rescale_betas_zero_snr=True is not implemented"),
        ({"beta_start": "small"}, r"beta_start='small' is of the wrong type; expected float"),
        ({"shift": 3.0}, r"the key shift=3\.0 is not known"),
    ],
)
def test_unknown_schedule(published, tmp_path, changes, message):
    directory = shutil.copytree(published[0], tmp_path / "sd")
    edit_json(directory / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(load.WeightsError, match=r"scheduler_config\.json: " + message):
        load.load_stable_diffusion(directory)


def test_parts_of_different_checkpoints(published, tmp_path):
    directory = shutil.copytree(published[0], tmp_path / "sd")
    networks.unet(cross_attention_dim=16).save_pretrained(directory / "unet")
    with pytest.raises(load.WeightsError, match=r"cross_attention_dim=16 does not fit the other parts, which have 32"):
        load.load_stable_diffusion(directory)


def test_damaged_tokenizer(published, tmp_path):
    directory = shutil.copytree(published[0] / "tokenizer", tmp_path / "tokenizer")
    for file in directory.iterdir():
        file.write_text("{")
    with pytest.raises(load.WeightsError, match=r"tokenizer: no tokenizer can be read here \("):
        load.load_tokenizer(directory)


# Where the files come from.


def test_hub_id_that_is_not_there_offline():
    """The message is one line with the exact command for another machine."""
    with pytest.raises(load.WeightsError) as caught:
        load.load_clip("openai/clip-vit-base-patch32", revision="3d74acf9")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        "openai/clip-vit-base-patch32 is not a local directory, and getting it from the Hugging Face hub"
    )
    assert message.endswith(
        "run: hf download openai/clip-vit-base-patch32 --revision 3d74acf9 --include config.json "
        "--include model.safetensors --include model.safetensors.index.json --include 'model-*-of-*.safetensors'"
    )


@pytest.mark.parametrize("name", ["/no/such/place", "./clip", "a/b/c", "two words", "~/nothing here", ""])
def test_path_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(load.WeightsError, match="is not a directory, nor the id of a repository on the hub$"):
        load.load_clip(name)


def test_file_for_a_directory(directory):
    with pytest.raises(load.WeightsError, match=r"model\.safetensors is not a directory$"):
        load.load_clip(directory / "model.safetensors")


def test_hub_is_asked_for_the_needed_files_at_the_revision(published, monkeypatch):
    asked = []

    def download(name, **kwargs):
        asked.append((name, kwargs))
        return str(published[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load.load_stable_diffusion("someone/some-model", revision="abc")
    ((name, kwargs),) = asked
    assert name == "someone/some-model" and kwargs["revision"] == "abc"
    patterns = kwargs["allow_patterns"]
    wanted = [
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/config.json",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    ]
    unwanted = [
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.safetensors",
        "feature_extractor/preprocessor_config.json",
    ]
    filtered = list(huggingface_hub.utils.filter_repo_objects([*wanted, *unwanted], allow_patterns=patterns))
    assert filtered == wanted


def test_either_file_of_preprocessing_is_fetched(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **how: asked.append(how["allow_patterns"]) or str(tmp_path)
    )
    networks.save_blip_processor(tmp_path, 32)
    load.fetch_referee("someone/some-model")
    load.load_image_processor("someone/some-model")
    files = ["preprocessor_config.json", "processor_config.json"]
    for patterns in asked:
        assert list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=patterns)) == files
    assert len(asked) == 2


LOAD = """
import json, resource, sys, time
import jax.numpy as jnp
from referee_jax.weights import load
start = time.monotonic()
network = load.load_blip2(sys.argv[1], dtype=jnp.bfloat16)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
dtype = str(network.vision_model.post_layernorm.bias.dtype)
print(json.dumps({"seconds": time.monotonic() - start, "peak": peak, "dtype": dtype}))
"""


@pytest.mark.slow
def test_full_size_blip2_is_read_tensor_by_tensor(tmp_path):
    """ViT-g and Q-Former, 1.17 billion random parameters, float32 on disk -> bfloat16 and float32 in memory, in a fresh process.

    Measured on one core beside other work: 28 s, peak 5.3 GB of resident memory.
    """
    config = transformers.Blip2Config(
        qformer_config={"vocab_size": 30523, "use_qformer_text_input": True},
        image_text_hidden_size=256,
        num_query_tokens=32,
    )
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in transformers.Blip2ForImageTextRetrieval(config).state_dict().items()}
    rng, directory = np.random.default_rng(0), tmp_path / "blip2"
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    values = json.loads(config.to_json_string()) | {"architectures": ["Blip2ForImageTextRetrieval"]}
    load.save_directory(directory, tensors, values)
    size = sum(x.nbytes for x in tensors.values())
    assert size > 4.5e9
    del tensors
    done = subprocess.run([sys.executable, "-c", LOAD, directory], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    print(figures)
    assert figures["dtype"] == "bfloat16"
    # The file's pages and the weights together would be more.
    assert figures["peak"] < 7e9
