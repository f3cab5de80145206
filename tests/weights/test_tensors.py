"""Files of weights: types of numbers, and files under other names."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from referee_jax.weights import generators, load, tensors
from tests.lazy import torch
from tests.oracles import networks
from tests.weights.checkpoints import edit_json, fails, same


def write(file, kind, data, shape):
    """A safetensors file of the tensor `w`, and one before it."""
    header = {"v": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    header["w"] = {"dtype": kind, "shape": shape, "data_offsets": [3, 3 + len(data)]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"abc" + data)
    return tensors.Tensors(file.parent, file.stem)


@pytest.mark.parametrize("kind", tensors.NARROW)
def test_floats_of_a_byte(kind, tmp_path):
    """All values of each type, as torch reads them; what is not finite stays so."""
    data = bytes(range(256))
    x = write(tmp_path / "model.safetensors", kind, data, [16, 16])["w"]
    name = tensors.NARROW[kind].__name__
    exact = torch.frombuffer(bytearray(data), dtype=getattr(torch, name)).float().numpy().reshape(16, 16)
    np.testing.assert_array_equal(x, exact)
    assert x.dtype == np.float32 and np.isnan(x).any()


@pytest.mark.parametrize(
    ("kind", "bits", "known"),
    [("F4", 4, True), ("F6_E2M3", 6, True), ("F6_E3M2", 6, True), ("F8_E8M0", 8, True), ("F3_NEW", 8, False)],
)
def test_types_that_are_not_read(kind, bits, known, tmp_path):
    """One sentence with file, tensor, type and remedy; also for a type that is newer than the library."""
    file = tmp_path / "model.safetensors"
    with pytest.raises(load.WeightsError) as caught:
        write(file, kind, bytes(2 * bits), [4, 4])["w"]
    reason = "not read; " if known else "the library safetensors does not know: update it, or "
    message = f"{file}: w is of the type {kind}, which {'is ' if known else ''}{reason}save the checkpoint in float32"
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_network_in_floats_of_a_byte(directory, published):
    file = directory / "model.safetensors"
    source = load.Tensors(published[1], "model")
    header, data = {}, b""
    for name, x in source.items():
        part = x.astype(ml_dtypes.float8_e4m3fn).tobytes()
        header[name] = {"dtype": "F8_E4M3", "shape": x.shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    network, exact = load.load("clip", directory), load.load("clip", published[1])
    a, b = network.visual_projection.kernel, exact.visual_projection.kernel
    np.testing.assert_array_equal(a[...], np.asarray(b[...]).astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


# Files under other names.


def half(network):
    """Its weights as float16 and back, which a variant holds."""
    with torch.no_grad():
        for x in network.parameters():
            x.copy_(x.half())
    return network


@pytest.mark.parametrize("variant", tensors.VARIANTS)
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize(
    ("kind", "network"), [("clip", networks.clip), ("unet", networks.unet), ("vae_decoder", networks.vae)]
)
def test_a_variant_alone(kind, network, shards, variant, tmp_path):
    """As transformers and diffusers save it; the whole weights are preferred where they are there."""
    half(network()).save_pretrained(tmp_path / "whole")
    half(network()).half().save_pretrained(tmp_path / "variant", variant=variant, **shards)
    assert not list((tmp_path / "variant").glob("*model.safetensors"))
    same(load.load(kind, tmp_path / "variant"), load.load(kind, tmp_path / "whole"))
    for file in (tmp_path / "whole").glob("*.safetensors"):
        shutil.copy(file, tmp_path / "variant")
        assert load.Tensors(tmp_path / "variant", load.KINDS[kind].stem).source.name == file.name


def test_shards_of_a_variant_by_the_older_names(tmp_path):
    """The number before the variant: what is read is what the index names."""
    half(networks.unet()).save_pretrained(tmp_path / "whole")
    networks.unet().half().save_pretrained(tmp_path / "old", variant="fp16", max_shard_size="20KB")
    index = next((tmp_path / "old").glob("*.index.fp16.json"))
    rename = lambda name: re.sub(r"\.fp16(-\d+-of-\d+)", r"\1.fp16", name)
    for file in (tmp_path / "old").glob("*.safetensors"):
        file.rename(file.with_name(rename(file.name)))
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={name: rename(file) for name, file in weight_map.items()})
    same(load.load("unet", tmp_path / "old"), load.load("unet", tmp_path / "whole"))


LORA = {"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": np.zeros((2, 2), np.float32)}
WHOLE = {"model.diffusion_model.out.2.bias": np.zeros(4, np.float32)}
# What is there instead -> files and their tensors; the rest of the message.
OTHERS = {
    "LoRA": ({"pytorch_lora_weights.safetensors": LORA}, "is a LoRA: one of a generator is named in generator.loras"),
    "LoRA by another name": ({"style.safetensors": LORA}, "style.safetensors is a LoRA: one of"),
    "one file": ({"v1-5-pruned.safetensors": WHOLE}, "a checkpoint is a directory .*authors. file with all networks"),
    "another variant": (
        {"model.ema.safetensors": WHOLE},
        "if model.ema.safetensors has the weights that are meant, rename",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("config", [True, False])
def test_other_files_instead_of_a_referees(case, config, directory):
    files, message = OTHERS[case]
    (directory / "model.safetensors").unlink()
    if not config:
        (directory / "config.json").unlink()
    for name, values in files.items():
        safetensors.numpy.save_file(values, directory / name)
        fails(directory, rf"model\.safetensors is missing \(there is {name}\); .*{message}[^\n]*$")
        with pytest.raises(load.WeightsError) as caught:
            load.load_tokenizer(directory, kind="clip") if not config else load.check(directory, "clip")
        assert message.partition(".*")[0] in str(caught.value) and "pickle" not in str(caught.value)


@pytest.mark.parametrize("case", ["LoRA", "LoRA by another name", "one file"])
def test_other_files_instead_of_a_generators(case, tmp_path):
    files, message = OTHERS[case]
    for name, values in files.items():
        safetensors.numpy.save_file(values, tmp_path / name)
        for look in (generators.load_generator, generators.check):
            with pytest.raises(
                load.WeightsError, match=rf"has none of the directories text_encoder, unet, vae .*{message}"
            ):
                look(tmp_path)
        what = "is not a directory: " + message.partition("LoRA: ")[2] if "LoRA" in case else "is wide|attn2"
        with pytest.raises(load.WeightsError, match=rf"{name}.*({what})"):
            generators.load_generator(tmp_path / name)


def test_pickles_are_named_where_they_are(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    fails(
        directory,
        r"model\.safetensors is missing \(there is pytorch_model\.bin\); only safetensors are read, as pickled",
    )
    (directory / "pytorch_model.bin").unlink()
    fails(directory, r"model\.safetensors is missing; only safetensors are read, and there are none$")


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_checkpoint_of_torch_is_turned_by_the_command_in_the_message(wrapped, tmp_path):
    """As given by its path, and where it is all that there is; the tensors are the same, shared ones, too."""
    x = torch.arange(6.0).reshape(2, 3)
    state = {"a.weight": x, "shared": x, "turned": x.T, "half": x.half(), "step": 3}
    file = tmp_path / "it's v1.ckpt"
    torch.save({"state_dict": state, "global_step": 5} if wrapped else state, file)
    for path, start in ((file, f"{file} is not a directory: "), (tmp_path, f"{tmp_path} has none of the directories ")):
        with pytest.raises(
            load.WeightsError, match="only safetensors are read, as pickled files can run code"
        ) as caught:
            generators.load_generator(path)
        message = str(caught.value)
        assert message.startswith(start) and "\n" not in message
    command = shlex.split(message.partition("run: ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True)
    opened = tensors.Tensors(tmp_path, file.stem)
    assert set(opened) == set(state) - {"step"}
    for name in opened:
        np.testing.assert_array_equal(opened[name], state[name].numpy())
