"""The score command: against torch's classes behind their own processors, and what it says of bad input."""

import json
import subprocess

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from referee_jax import config, referees, score
from tests import programs
from tests.lazy import t5_oracles, torch, transformers
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
    pixels = torch.tensor(np.asarray(PIL.Image.open(images[file])) / np.float32(255)).permute(2, 0, 1)[None]
    height, width = {0: (24, 32), 1: (32, 19)}[file]
    # Its ToTensor comes first: what torchvision resizes are floats.
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    square = torch.zeros(1, 3, 32, 32)
    top, left = (32 - height) // 2, (32 - width) // 2
    square[:, :, top : top + height, left : left + width] = resized
    mean, std = (torch.tensor(x)[:, None, None] for x in (networks.CLIP_MEAN, networks.CLIP_STD))
    network = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        out = network(
            pixel_values=(square - mean) / std, **tokenizer(TEXTS[:1], padding="max_length", return_tensors="pt")
        )
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


# Published classes, behind the processors that their own save_pretrained left: absolute differences of what is printed.
TOLERANCE = 3e-5


def oracle(cls, path):
    """The class of a directory, and its processor, which resizes as PIL does."""
    return cls.from_pretrained(path).eval(), transformers.AutoProcessor.from_pretrained(path, backend="pil")


def compare(lines, asked, *names):
    """`asked(PIL image, text)` against each of `lines`: `names` of its scores in order; and both images and texts count."""
    with torch.no_grad():
        theirs = np.array([asked(PIL.Image.open(line["image"]), line["text"]) for line in lines])
    made = np.array([[line[name] for name in names] for line in lines])
    print(names, np.abs(made - theirs).max(0), np.ptp(theirs, axis=0))
    assert made.shape == theirs.shape and np.abs(made - theirs).max() < TOLERANCE
    theirs = theirs.reshape(len(theirs) // len(TEXTS), len(TEXTS), -1)
    moves = [np.ptp(theirs, axis=axis).max(0).min() for axis in (0, 1)]
    assert min(moves) > 0.02


def test_blip2(images, tmp_path):
    """One softmax of the matching head, and the cosine of the nearest query; the class takes <image> off the text again."""
    networks.save_blip2(tmp_path, lm_head=False, older=False)
    values = json.loads((tmp_path / "config.json").read_text())
    words = values["qformer_config"]["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(values | {"image_token_index": words}))
    network, processor = oracle(transformers.Blip2ForImageTextRetrieval, tmp_path)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == words

    def asked(image, text):
        read = processor(images=image, text=text, return_tensors="pt")
        assert read["pixel_values"].shape == (1, 3, 24, 24) and read["input_ids"][0, :5].tolist() == [words] * 5
        match, contrast = (
            network(**read, use_image_text_matching_head=head).logits_per_image for head in (True, False)
        )
        return match.softmax(1)[0, 1].item(), contrast[0, 0].item()

    compare(scored(str(tmp_path), images, TEXTS), asked, "itm_probability", "cosine")


def test_blip_caption(images, tmp_path):
    """The mean log-likelihood of the tokens behind the template's, by the class's own loss, of which nothing is smoothed."""
    networks.save_blip(networks.blip(transformers.BlipForConditionalGeneration), tmp_path)
    network, processor = oracle(transformers.BlipForConditionalGeneration, tmp_path)

    def asked(image, text):
        read = processor(images=image, text="a picture of " + text, return_tensors="pt")
        read["input_ids"][:, 0] = network.config.text_config.bos_token_id
        behind = torch.arange(read["input_ids"].shape[1]) > 3  # [DEC] a picture of
        return [-network(**read, labels=read["input_ids"].where(behind, -100)).loss.item()]

    compare(scored(str(tmp_path), images, TEXTS), asked, "caption_log_likelihood")


@pytest.mark.parametrize("first", ["[CLS]", "[ENC]"])
def test_blip_vqa(images, tmp_path, first):
    """The probability of "yes" of the two answers, each by the class's own loss."""
    networks.save_blip(networks.blip(transformers.BlipForQuestionAnswering), tmp_path)
    network, processor = oracle(transformers.BlipForQuestionAnswering, tmp_path)
    begin = network.config.text_config.bos_token_id

    def asked(image, text):
        read = processor(images=image, text=text + "?", return_tensors="pt")
        if first == "[ENC]":
            read["input_ids"][:, 0] = begin + 1
        answers = [torch.tensor([[begin, networks.BLIP_WORDS.index(word)]]) for word in ("yes", "no")]
        yes, no = (network(**read, labels=answer).loss for answer in answers)
        return [(no - yes).sigmoid().item()]

    compare(scored(str(tmp_path), images, TEXTS, first_token=first), asked, "vqa_probability")


def test_questions(images, tmp_path):
    """Each fact of a text by itself, as of the referee that is asked it alone."""
    directory = networks.save_blip(networks.blip(transformers.BlipForQuestionAnswering), tmp_path / "blip")
    (line,) = score.score(str(directory), images[:1], ["a red circle"], questions=3).splitlines()
    found = json.loads(line)
    (alone,) = score.score(str(directory), images[:1], ["is the circle red"]).splitlines()
    assert found["questions"].keys() == {"Is there a circle?", "Is the circle red?"}
    assert found["questions"]["Is the circle red?"] == pytest.approx(json.loads(alone)["vqa_probability"], rel=1e-4)
    assert found["vqa_probability"] == pytest.approx(np.prod(list(found["questions"].values())) ** 0.5, rel=1e-5)
    networks.save_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="--questions: clip answers none; blip_vqa, qwen3_vl, vqascore do"):
        score.score(str(tmp_path / "clip"), images, ["a"], questions=1)


def test_vqascore(images, tmp_path):
    """exp of minus the mean cross-entropy of "Yes" and its end, of a picture padded with the mean colour to a square."""
    network = t5_oracles.clip_t5()
    t5_oracles.save_clip_t5(network, tmp_path)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(str(tmp_path))
    words = t5_oracles.tokenizer()
    labels = words("Yes")["input_ids"]

    def asked(image, text):
        side = max(image.size)
        square = PIL.Image.new("RGB", (side, side), tuple(int(255 * x) for x in processor.image_mean))
        square.paste(image, tuple((side - x) // 2 for x in image.size))
        conversation = f'a photo USER: <image>\nDoes this show "{text}"? ASSISTANT: '
        pixels = processor(images=square, return_tensors="pt")["pixel_values"]
        logits = network(pixels, [t5_oracles.token_ids(words, conversation)], labels)[0, :, : len(words)]
        return [(-torch.nn.functional.cross_entropy(logits, torch.tensor(labels))).exp().item()]

    compare(scored(str(tmp_path), images, TEXTS), asked, "vqascore")


@pytest.mark.parametrize("older", [True, False], ids=["published", "saved today"])
def test_siglip(images, tmp_path, older):
    """Cosine and probability of a match: Google's files, and the processor's own, which resizes otherwise."""
    networks.save_siglip(networks.siglip(), tmp_path)
    if not older:
        bicubic = transformers.SiglipImageProcessorPil(size={"height": 36, "width": 36})
        (tmp_path / "preprocessor_config.json").unlink()
        transformers.SiglipProcessor(bicubic, networks.gemma_tokenizer()).save_pretrained(tmp_path)
    network, processor = oracle(transformers.SiglipModel, tmp_path)

    def asked(image, text):
        read = processor(images=image, text=text, padding="max_length", max_length=64, return_tensors="pt")
        assert read["pixel_values"].shape == (1, 3, 36, 36) and read["input_ids"].shape == (1, 64)
        out = network(**read)
        return (out.image_embeds @ out.text_embeds.T).item(), out.logits_per_image.sigmoid().item()

    compare(scored(str(tmp_path), images, TEXTS), asked, "cosine", "probability")


def test_pickscore(images, tmp_path):
    """The cosine at the temperature, of a CLIP with exact GELUs saved with its processor, by its name."""
    networks.clip(act="gelu").save_pretrained(tmp_path)
    square = {"height": 32, "width": 32}
    preparing = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
    transformers.CLIPProcessor(preparing, networks.tokenizer()).save_pretrained(tmp_path)
    network, processor = oracle(transformers.CLIPModel, tmp_path)

    def asked(image, text):
        read = processor(images=image, text=text, padding="max_length", return_tensors="pt")
        assert read["pixel_values"].shape == (1, 3, 32, 32) and image.width != image.height
        return [network(**read).logits_per_image.item()]

    compare(scored(str(tmp_path), images, TEXTS, name="pickscore"), asked, "score")


ARCHITECTURES = {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "hps": "HPS",
    "blip_itm": "BlipForImageTextRetrieval",
    "blip_caption": "BlipForConditionalGeneration",
    "blip_vqa": "BlipForQuestionAnswering",
    "blip2": "Blip2ForImageTextRetrieval",
    "image_reward": "ImageReward",
    "align": "AlignModel",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "vqascore": "CLIPT5ForConditionalGeneration",
}


@pytest.mark.parametrize("name", referees.REFEREES)
def test_names_are_seen(name, tmp_path):
    """By what config.json says, but for pickscore, which is a CLIP by that; and by published ids."""
    if name != "pickscore":
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [ARCHITECTURES[name]]}))
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
    return programs.command("referee_jax.score", "--device=cpu", *arguments)


def test_the_command(images, tmp_path):
    networks.save_clip(tmp_path)
    done = command_line(f"--referee={tmp_path}", f"--image={images[0]}", "--text=a photo", "--text=a red circle")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["a photo", "a red circle"]
    wrong = command_line(f"--referee={tmp_path}", f"--image={images[0]}", "--text=a photo", "--template=a photo")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.strip() == "error: --template='a photo' is not a text with one {} where the prompt is put"


def test_pictures_of_all_kinds_and_none(images, tmp_path):
    """Files, arrays and Pillow's pictures have one score; nothing gives nothing."""
    networks.save_clip(tmp_path)
    judge = referees.load_referee(str(tmp_path))
    image = PIL.Image.open(images[0])
    kinds = [images[0], image, np.asarray(image), np.asarray(image) / np.float32(255), jnp.asarray(image) / 255]
    (first, *others) = judge.score(kinds, ["red"])
    assert others == [first] * 4 and 0 < abs(first[0]["cosine"]) < 1
    assert judge.score([], ["red"]) == [] and judge.score(kinds[:2], []) == [[], []] and judge.score([], []) == []
    for arguments, message in (
        ((images[0], ["red"]), r"images is one of its kind; give a list: \['.*wide.png'\]"),
        ((kinds, "red"), r"texts is one of its kind; give a list: \['red'\]"),
        (([None], ["red"]), "an image of object"),
    ):
        with pytest.raises(ValueError, match=message):
            judge.score(*arguments)


def test_bad_input(images, tmp_path):
    networks.save_clip(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    clip = str(tmp_path)
    for arguments, message in (
        ((clip, [], ["red"]), "nothing to score"),
        ((clip, images, []), "nothing to score"),
        ((clip, [str(tmp_path / "none.png")], ["red"]), "none.png cannot be read as an image: No such file"),
        ((clip, [str(tmp_path / "text.png")], ["red"]), "text.png cannot be read as an image"),
        ((clip, images, ["red " * 100]), "red .*': 102 tokens, clip reads 77"),
        ((str(tmp_path / "none"), images, ["red"]), "is not a directory"),
    ):
        with pytest.raises(ValueError, match=message):
            score.score(*arguments)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="which referee it is cannot be seen"):
        score.score(clip, images, ["red"])


def test_what_cannot_be_read_is_named_and_the_rest_is_there(images, tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(score.logging, "warning", lambda text, *given: warned.append(text % given))
    networks.save_clip(tmp_path)
    files, long = [images[0], str(tmp_path / "none.png"), images[1]], "red " * 100
    lines = scored(str(tmp_path), files, [long, "red"])
    assert lines == scored(str(tmp_path), images, ["red"])
    assert len(warned) == 2 and warned[0].startswith(f"not scored: {files[1]} cannot be read as an image")
    assert warned[1].endswith("red ': 102 tokens, clip reads 77")
    warned.clear()
    longest = "red " * 75
    (cut, whole) = scored(str(tmp_path), images[:1], [long, longest], truncate=True)
    assert cut["cosine"] == whole["cosine"] and len(warned) == 1 and "is cut to 77 tokens, as by" in warned[0]


def test_another_size_is_refused(images, tmp_path):
    networks.save_clip(tmp_path)
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    changed = values | {"crop_size": {"height": 24, "width": 24}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"clip reads 32 x 32 pixels, its image processor gives \(3, 24, 24\)"):
        score.score(str(tmp_path), images, ["red"])
