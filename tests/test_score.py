"""The score command: against torch's classes behind their own processors, and what it says of bad input."""

import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from referee_jax import config, referees, score
from tests.oracles import networks

TEXTS = ["a red circle and a blue square", "a photo"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two files, wide and high."""
    path, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    files = []
    for name, shape in (("wide.png", (3, 4, 3)), ("high.png", (5, 3, 3))):
        small = PIL.Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8))
        small.resize((20 * shape[1], 20 * shape[0])).save(path / name)
        files.append(str(path / name))
    return files


def scored(*arguments, **changes) -> list[dict]:
    return [json.loads(line) for line in score.score(*arguments, **changes).splitlines()]


def test_clip(images, tmp_path):
    """Cosines of all pairs, image by image, as transformers gives them."""
    networks.save_clip(tmp_path)
    lines = scored(str(tmp_path), images, TEXTS)
    assert [(line["image"], line["text"]) for line in lines] == [(i, t) for i in images for t in TEXTS]
    network = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = processor(images=[PIL.Image.open(image) for image in images], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 32, 32)
    with torch.no_grad():
        out = network(pixel_values=pixels, **tokenizer(TEXTS, padding="max_length", return_tensors="pt"))
    theirs = (out.image_embeds @ out.text_embeds.T).numpy()
    np.testing.assert_allclose([line["cosine"] for line in lines], theirs.ravel(), atol=1e-5)
    assert np.ptp(theirs) > 0.05


def test_blip(images, tmp_path):
    """The probability of a match and the cosine, [ENC] in its place."""
    module = networks.blip(transformers.BlipForImageTextRetrieval)
    networks.save_blip(module, tmp_path)
    lines = scored(str(tmp_path), images, TEXTS)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    tokenizer = networks.blip_tokenizer()
    for line in lines:
        pixels = processor(images=PIL.Image.open(line["image"]), return_tensors="pt")["pixel_values"]
        ids = torch.tensor(tokenizer(line["text"])["input_ids"])[None]
        with torch.no_grad():
            cosine = module(ids, pixels, use_itm_head=False).itm_score.item()
            ids[:, 0] = module.config.text_config.bos_token_id + 1
            match = module(ids, pixels).itm_score.softmax(1)[0, 1].item()
        np.testing.assert_allclose([line["cosine"], line["itm_probability"]], [cosine, match], atol=1e-5)
    assert np.ptp([line["itm_probability"] for line in lines]) > 0.01


def test_blip_as_transformers_asks_it(images, tmp_path):
    """[CLS] in [ENC]'s place, and a template: its own class, processor and tokenizer, untouched."""
    module = networks.blip(transformers.BlipForImageTextRetrieval)
    networks.save_blip(module, tmp_path)
    (line,) = scored(str(tmp_path), images[:1], ["star"], first_token="[CLS]", template="a red {}")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = processor(images=PIL.Image.open(images[0]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        match = module(torch.tensor(networks.blip_tokenizer()("a red star")["input_ids"])[None], pixels).itm_score
    assert abs(line["itm_probability"] - match.softmax(1)[0, 1].item()) < 1e-5
    (authors,) = scored(str(tmp_path), images[:1], ["star"], template="a red {}")
    assert abs(authors["itm_probability"] - line["itm_probability"]) > 1e-3


@pytest.mark.parametrize("file", [0, 1])
def test_hps_sees_the_whole_image(images, tmp_path, file):
    """HPSv2's own: the longer side is brought to the network's, and black put beside the shorter."""
    networks.save_clip(tmp_path)
    (line,) = scored(str(tmp_path), images[file : file + 1], TEXTS[:1], name="hps")
    image = PIL.Image.open(images[file])
    size = {0: (32, 24), 1: (19, 32)}[file]
    square = np.zeros((32, 32, 3), np.uint8)
    top, left = (32 - size[1]) // 2, (32 - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = image.resize(size, PIL.Image.Resampling.BICUBIC)
    network = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = processor(images=PIL.Image.fromarray(square), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = network(pixel_values=pixels, **tokenizer(TEXTS[:1], padding="max_length", return_tensors="pt"))
    assert abs(line["score"] - (out.image_embeds @ out.text_embeds.T).item()) < 1e-5
    (cropped,) = scored(str(tmp_path), images[file : file + 1], TEXTS[:1], name="clip")
    assert abs(cropped["cosine"] - line["score"]) > 1e-3


def test_align_is_resized_and_cropped_once(images, tmp_path):
    """What its processor gives is not cropped again."""
    module = networks.align()
    networks.save_align(module, tmp_path)
    line = scored(str(tmp_path), images[:1], TEXTS[:1])[0]
    pixels = networks.align_processor()(images=PIL.Image.open(images[0]), return_tensors="pt")["pixel_values"]
    ids = torch.tensor(networks.blip_tokenizer(64)(TEXTS[0])["input_ids"])[None]
    with torch.no_grad():
        out = module(input_ids=ids, pixel_values=pixels)
    assert abs(line["cosine"] - (out.image_embeds @ out.text_embeds.T).item()) < 1e-5


@pytest.mark.parametrize("name", [name for name, family in referees.REFEREES.items() if family.architecture])
def test_names_are_seen(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [referees.REFEREES[name].architecture]}))
    assert referees.name_of(str(tmp_path)) == name
    assert [referees.name_of(published) for published in referees.REFEREES[name].published] == [
        name for _ in referees.REFEREES[name].published
    ]


def test_a_name_that_is_said_wins(images, tmp_path):
    networks.save_clip(tmp_path)
    assert list(scored(str(tmp_path), images[:1], ["red"], name="pickscore")[0]) == ["image", "text", "score"]


def test_listing_has_every_referee_and_checkpoint():
    lines = score.listing().splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(config.LOSSES)
    told = [line.strip() for line in lines if line.startswith(" ")]
    families = referees.REFEREES.values()
    assert [x.split()[0] for x in told if "weights.lavis" not in x] == [x for own in families for x in own.published]
    assert [x for x in told if "weights.lavis" in x] == [
        f"python -m referee_jax.weights.lavis {file} OUT_DIR" for own in families for file in own.files
    ]


def command_line(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "referee_jax.score", "--device=cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command(images, tmp_path):
    networks.save_clip(tmp_path)
    done = command_line(f"--referee={tmp_path}", f"--image={images[0]}", "--text=a photo", "--text=a red circle")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["a photo", "a red circle"]
    wrong = command_line(f"--referee={tmp_path}", f"--image={images[0]}", "--text=a photo", "--template=a photo")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.strip() == "error: --template='a photo' is not a text with one {} where the prompt is put"


def test_bad_input(images, tmp_path):
    networks.save_clip(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    clip = str(tmp_path)
    for arguments, message in (
        ((clip, [], ["red"]), "nothing to score"),
        ((clip, images, []), "nothing to score"),
        ((clip, [str(tmp_path / "none.png")], ["red"]), "none.png cannot be read as an image: No such file"),
        ((clip, [str(tmp_path / "text.png")], ["red"]), "text.png cannot be read as an image"),
        ((clip, images, ["red " * 100]), "has 102 tokens, the text encoder reads 77"),
        ((str(tmp_path / "none"), images, ["red"]), "is not a directory"),
    ):
        with pytest.raises(ValueError, match=message):
            score.score(*arguments)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="which referee it is cannot be seen"):
        score.score(clip, images, ["red"])


def test_another_size_is_refused(images, tmp_path):
    networks.save_clip(tmp_path)
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    changed = values | {"crop_size": {"height": 24, "width": 24}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"clip reads 32 x 32 pixels, its image processor gives \(3, 24, 24\)"):
        score.score(str(tmp_path), images, ["red"])
