"""Tokenizers with missing parts, beside the networks that read their tokens."""

import contextlib
import json
import re
import shutil

import pytest

from referee_jax import config, prompts, referees
from referee_jax.models import clip as models_clip
from referee_jax.weights import generators, load, tokenizers
from tests.lazy import transformers
from tests.oracles import networks

SETTINGS = "tokenizer_config.json"
TEXT = "a red circle and a blue square"


def save_clip_words(path):
    """The files of words that CLIP's publishers write."""
    vocabulary, merges = networks.vocabulary()
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")


def save_wordpieces(path, words):
    (path / "tokenizer.json").unlink()
    (path / "vocab.txt").write_text("\n".join(words) + "\n")


def clip(path):
    networks.save(path)
    save_clip_words(path / "clip")
    return path / "clip"


def blip(path):
    networks.save_blip(networks.blip(transformers.BlipForImageTextRetrieval), path)
    save_wordpieces(path, networks.BLIP_WORDS)
    return path


def blip2(path):
    networks.save_blip2(path, lm_head=False, older=True)
    return path


def siglip(path):
    return networks.save_siglip(networks.siglip(), path)


def align(path):
    networks.save_align(networks.align(), path)
    save_wordpieces(path, networks.BLIP_WORDS)
    return path


def image_reward(path):
    path.mkdir()
    networks.save_image_reward(path)
    return path


def stable_diffusion(path):
    networks.save(path)
    save_clip_words(path / "stable-diffusion" / "tokenizer")
    return path / "stable-diffusion"


# Referee, or "" for Stable Diffusion -> what writes it, and the files of its words.
CHECKPOINTS = {
    "clip": (clip, ("vocab.json", "merges.txt")),
    "blip_itm": (blip, ("vocab.txt",)),
    "blip2": (blip2, ("tokenizer.json",)),
    "siglip": (siglip, ("tokenizer.json",)),
    "align": (align, ("vocab.txt",)),
    "image_reward": (image_reward, ("tokenizer.json",)),
    "": (stable_diffusion, ("vocab.json", "merges.txt")),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return {name: save(root / (name or "sd")) for name, (save, _) in CHECKPOINTS.items()}


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request, whole, tmp_path):
    """Name, a directory to spoil, the part of it with the tokenizer, and the files of its words."""
    directory = shutil.copytree(whole[request.param], tmp_path / "copy")
    folder = directory if request.param else directory / "tokenizer"
    return request.param, directory, folder, CHECKPOINTS[request.param][1]


def read(name, directory):
    """The tokenizer, and the config of the network that reads its tokens."""
    if not name:
        return generators.load_tokenizers(directory)[0], load.read_config("clip_text", directory / "text_encoder")
    kind = referees.REFEREES[name].kind
    return load.load_tokenizer(directory, kind=kind), load.text_config(load.read_config(kind, directory))


def start(name, directory):
    """As a run starts."""
    if not name:
        generators.load_generator(directory)
    else:
        referees.load_referee(config.RefereeSpec(name=name, checkpoint=str(directory), losses={}))


def check(name, directory):
    """What a start would find, without weights."""
    if not name:
        generators.check(directory)
    else:
        load.check(directory, referees.REFEREES[name].kind)


def refused(name, directory):
    """The message of a start, which is that of the check without weights."""
    with pytest.raises(load.WeightsError) as caught:
        start(name, directory)
    with pytest.raises(load.WeightsError) as checked:
        check(name, directory)
    assert str(checked.value) == str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_no_words(checkpoint):
    """Each family's: sizes of both where transformers makes a tokenizer of nothing, the files in any case."""
    name, directory, folder, files = checkpoint
    check(name, directory)
    words = read(name, directory)[1].vocab_size
    for file in files:
        (folder / file).unlink()
    message = refused(name, directory)
    assert re.search(rf"the tokenizer has \d words, the network {words}: ", message) or "can be read" in message
    assert "there is no tokenizer.json, nor vocab.json with merges.txt, nor vocab.txt, nor spiece.model" in message
    assert str(folder) in message and "copy the tokenizer's files from where the checkpoint is from" in message


def test_one_file_empty_or_missing(checkpoint):
    name, directory, folder, files = checkpoint
    for file in files:
        content = (folder / file).read_text()
        (folder / file).write_text("")
        assert f"{file} is empty" in refused(name, directory)
        if len(files) > 1:
            (folder / file).unlink()
            assert f"{file} is missing" in refused(name, directory)
        (folder / file).write_text(content)
    read(name, directory)


@pytest.mark.parametrize("name", ["clip", ""])
def test_half_the_merges(name, whole, tmp_path):
    """All words are there, but most would be spelt."""
    directory = shutil.copytree(whole[name], tmp_path / "copy")
    file = directory / ("" if name else "tokenizer") / "merges.txt"
    file.write_text("\n".join(file.read_text().splitlines()[:11]))
    assert re.search(r"merges\.txt: the tokenizer would spell words \(it makes 10 of the 25", refused(name, directory))


def test_another_networks_words(checkpoint):
    name, directory, folder, files = checkpoint
    for file in (*files, SETTINGS):
        (folder / file).unlink(missing_ok=True)
    transformers.BertTokenizer(vocab={str(n): n for n in range(400)} | {"[UNK]": 400}).save_pretrained(folder)
    assert re.search(r"the tokenizer has 40\d words, the network \d+: it is another", refused(name, directory))


@pytest.mark.parametrize(
    ("tokens", "words", "fits"),
    [
        (49408, 49408, True),
        (30522, 30524, True),  # BLIP
        (30524, 30523, True),  # BLIP-2, with <image>
        (30522, 30592, True),  # rounded up
        (30592, 30522, False),  # words without a row
        (49408, 30522, False),
        (30522, 49408, False),
    ],
)
def test_sizes_of_published_checkpoints(tokens, words, fits, whole, monkeypatch):
    monkeypatch.setattr(transformers.CLIPTokenizer, "__len__", lambda self: tokens)
    network = models_clip.TextConfig(vocab_size=words)
    with (
        contextlib.nullcontext() if fits else pytest.raises(load.WeightsError, match=f"{tokens} words.* {words}: it is")
    ):
        tokenizers.read(whole["clip"], network)


def test_a_whole_file_wins(whole, tmp_path):
    """As in transformers, what stands beside tokenizer.json is not read."""
    directory = shutil.copytree(whole["clip"], tmp_path / "copy")
    expected = load.load_tokenizer(directory, kind="clip")(TEXT)["input_ids"]
    networks.tokenizer().save_pretrained(directory)
    (directory / "merges.txt").write_text("")
    assert load.load_tokenizer(directory, kind="clip")(TEXT)["input_ids"] == expected


@pytest.mark.parametrize("settings", ["absent", "without a length", "with another"])
def test_length_of_texts(checkpoint, settings):
    """It is the network's positions where no file has it; ids and padding are as before."""
    name, directory, folder, _ = checkpoint
    whole, sizes = read(name, directory)
    file, positions = folder / SETTINGS, sizes.max_position_embeddings
    expected = prompts.tokenize(whole, [TEXT], 32)
    values = json.loads(file.read_text())
    values.pop("model_max_length", None)
    if settings == "with another":
        values["model_max_length"] = 4096
    file.write_text(json.dumps(values))
    if settings == "absent" and name != "siglip":  # SigLIP 1's and 2's are of two classes
        file.unlink()
    tokenizer = read(name, directory)[0]
    assert tokenizer.model_max_length == positions
    assert (prompts.tokenize(tokenizer, [TEXT], 32) == expected).all()
