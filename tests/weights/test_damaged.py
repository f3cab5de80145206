"""Error messages for checkpoints that cannot be loaded."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax.models.diffusion import vae
from referee_jax.weights import config_json, generators, load
from tests.lazy import torch, transformers
from tests.oracles import networks
from tests.weights.checkpoints import edit_json, edit_tensors, fails, same

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
        removed = {}
        edit_tensors(
            path / "model.safetensors", lambda t, name=name, removed=removed: removed.update({name: t.pop(name)})
        )
        fails(path, rf"{kind}/model\.safetensors: parameters without a tensor: {re.escape(name)}$", kind)
        edit_tensors(path / "model.safetensors", lambda t, removed=removed: t.update(removed))
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


@pytest.mark.parametrize("other", FAMILIES)
def test_checkpoint_of_another_kind(family, other):
    """One sentence that names both; BLIPs, too, whose model_type is the same."""
    kind, path = family
    if other == kind:
        load.load(kind, path)
        return
    fails(path, rf"{kind}/config\.json is of another kind of network: {kind} \(\w+\), not {other}$", other)


def test_checkpoint_that_does_not_say_its_kind(saved, tmp_path):
    """It loads as a kind if its tensors fit; so does one of an unknown architecture."""
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
    same(load.load("clip", directory), load.load("clip", published[1]))


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
    """Each is reported, or changes nothing (a space between two entries)."""
    file, rng = directory / "model.safetensors", np.random.default_rng(0)
    whole, exact = file.read_bytes(), load.load("clip", published[1])
    length = 8 + int.from_bytes(whole[:8], "little")
    reported = 0
    for at in (*range(8), *rng.integers(8, length, 60)):
        spoilt = bytearray(whole)
        spoilt[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(spoilt)
        try:
            network = load.load("clip", directory)
        except load.WeightsError as error:
            reported += str(file) in str(error) and "\n" not in str(error)
        else:
            same(network, exact)
            reported += 1
    assert reported == 68


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
    assert load.load("clip", directory).text_model.final_layer_norm.bias[0] == 65504


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
    config = config_json.config_from_json(vae.Config, {"scaling_factor": 1, "block_out_channels": [8, 16]})
    assert config.scaling_factor == 1.0 and isinstance(config.scaling_factor, float)
    assert config.block_out_channels == (8, 16)
    assert hash(config) == hash(
        config_json.config_from_json(vae.Config, {"scaling_factor": 1.0, "block_out_channels": (8, 16)})
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
        ({"use_flow_sigmas": True, "flow_shift": 3.0}, r"use_flow_sigmas=True is not implemented; supported: False"),
    ],
)
def test_unknown_schedule(published, tmp_path, changes, message):
    directory = shutil.copytree(published[0], tmp_path / "sd")
    edit_json(directory / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(load.WeightsError, match=r"scheduler_config\.json: " + message):
        generators.load_generator(directory)


def test_parts_of_different_checkpoints(published, tmp_path):
    directory = shutil.copytree(published[0], tmp_path / "sd")
    networks.unet(cross_attention_dim=16).save_pretrained(directory / "unet")
    with pytest.raises(load.WeightsError, match=r"cross_attention_dim=16 does not fit the other parts, which have 32"):
        generators.load_generator(directory)


def test_damaged_tokenizer(published, tmp_path):
    directory = shutil.copytree(published[0] / "tokenizer", tmp_path / "tokenizer")
    for file in directory.iterdir():
        file.write_text("{")
    with pytest.raises(load.WeightsError, match=r"tokenizer: no tokenizer can be read here \("):
        load.load_tokenizer(directory)


# Where the files come from.
