"""T2I-CompBench's measures against the official protocol, written plainly in torch."""

import math
import re

import numpy as np
import PIL.Image
import pytest

from referee_jax import config, referees
from referee_jax.benchmarks import measures, noun_phrases, t2i_compbench
from tests.lazy import torch, transformers
from tests.oracles import networks
from tests.referees import compiled

SIZE = 480
LONG = f"a {'red blue green ' * 13}square"
# Prompt -> all its noun phrases, and how many of them are asked about.
PHRASES = {
    "two": (["a red circle", "a blue square"], ["a red circle", "a blue square"]),
    "marks": (["The (green) ring", "a photo"], ["The (green) ring", "a photo"]),
    "one twice": (["a red square", "the left", "a red square"], ["a red square", "a red square"]),
    "many": (
        ["red", "top", *(f"a {c} {s}" for c in ("red", "blue", "green") for s in ("circle", "square", "photo"))],
        ["red", *(f"a {c} {s}" for c in ("red", "blue") for s in ("circle", "square", "photo")), "a green circle"],
    ),
    "long": ([LONG, "yes"], [LONG, "yes"]),
    "none": ([], []),
}  # fmt: skip


@pytest.fixture(scope="module")
def vqa(tmp_path_factory):
    """A random BLIP that answers at 480 pixels, and its directory."""
    path = tmp_path_factory.mktemp("vqa")
    vision = {"image_size": SIZE, "patch_size": 48}
    module = networks.blip(transformers.BlipForQuestionAnswering, vision=vision)
    networks.save_blip(module, path)
    return module.eval(), path


@pytest.fixture(scope="module")
def images():
    rng, made = np.random.default_rng(0), []
    for side in (64, 300, 480, 512, 700, 90):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8))
        made.append(coarse.resize((side, side + 20), PIL.Image.Resampling.BICUBIC))
    return made


def probability(module, tokenizer, image, phrase, **cut):
    """Of "yes", by the official protocol: BLIP's cleaning of questions, [ENC], one decoding step from [DEC]."""
    pixels = np.asarray(image.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC), np.float32) / 255
    pixels = (pixels - np.float32(networks.CLIP_MEAN)) / np.float32(networks.CLIP_STD)
    question = re.sub(r"""([.!"()*#:;~])""", "", f"{phrase}?".lower()).rstrip(" ")
    ids = torch.tensor(tokenizer(question, **cut)["input_ids"])[None]
    decoded_from = module.config.text_config.bos_token_id
    ids[:, 0] = decoded_from + 1
    with torch.no_grad():
        states = module.vision_model(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
        read = module.text_encoder(ids, encoder_hidden_states=states)[0]
        logits = module.text_decoder(torch.tensor([[decoded_from]]), encoder_hidden_states=read).logits[0, 0]
    yes, no = logits.softmax(-1)[tokenizer.convert_tokens_to_ids(["yes", "no"])]
    return (yes / (yes + no)).item()


CUT = {"truncation": True, "max_length": 35}


def test_blip_vqa(vqa, images, monkeypatch):
    """Every question's probability, and which are asked and multiplied, by a tokenizer that is not ours."""
    module, path = vqa
    tokenizer = transformers.BertTokenizer.from_pretrained(path)
    monkeypatch.setattr(noun_phrases, "find", lambda prompts, kind: ("by hand", {x: PHRASES[x][0] for x in prompts}))
    _, score = measures.blip_vqa(str(path), PHRASES, batch_size=1).build()
    products = {}
    for prompt, (_, asked) in PHRASES.items():
        made = score(images, [prompt] * len(images))
        for image, scores in zip(images, made, strict=True):
            sure = {phrase: probability(module, tokenizer, image, phrase, **CUT) for phrase in asked}
            assert scores["questions"] == pytest.approx(sure, abs=1e-4), prompt
            assert scores["blip_vqa"] == pytest.approx(math.prod(round(sure[x], 4) for x in asked), rel=2e-3), prompt
        products[prompt] = [scores["blip_vqa"] for scores in made]
    assert products.pop("none") == [1.0] * len(images)
    # They differ between images and prompts, or the agreement would say nothing.
    assert min(np.ptp(own) / np.mean(own) for own in products.values()) > 0.02
    means = sorted(np.mean(own) for own in products.values())
    assert min(np.diff(means)) > 1e-3
    # A question that is not cut has another answer.
    whole, cut = (probability(module, tokenizer, images[0], LONG, **how) for how in ({}, CUT))
    assert abs(whole - cut) > 5e-3


def test_a_long_question_is_cut_as_by_torch(vqa):
    module, path = vqa
    judge = referees.load_referee(config.RefereeSpec(name="blip_vqa", checkpoint=str(path), losses={}))
    theirs = transformers.BertTokenizer.from_pretrained(path)
    for phrase in ("a red circle", LONG):
        wanted = theirs(f"{phrase}?", padding="max_length", **CUT)
        made = {name: rows[0] for name, rows in judge.cutting().tokenize(phrase).items()}
        assert made["input_ids"].tolist() == wanted["input_ids"] and made["input_ids"].dtype == np.int32
        assert made["mask"].tolist() == [bool(x) for x in wanted["attention_mask"]]
    assert made["mask"].all() and made["input_ids"][-1] == theirs.sep_token_id
    read = compiled.encode(judge.referee, made)["input_ids"]
    assert read[0] == module.config.text_config.bos_token_id + 1 and read[1:].tolist() == wanted["input_ids"][1:]


PROMPTS = {
    "The red square and the blue circle.": "The square and the circle .",
    "a green photo": "a photo",
    "and a photo": "and a photo",
}


def test_clip_score(tmp_path, images, monkeypatch):
    """The cosine of the whole prompt, and of the words that are no adjectives, against torch."""
    networks.save_clip(tmp_path)
    words = {prompt: bare.split() for prompt, bare in PROMPTS.items()}
    monkeypatch.setattr(noun_phrases, "find", lambda prompts, kind: ("by hand", {x: words[x] for x in prompts}))
    images = images[:5]  # of the last one transformers crops another row than torchvision, with as many above as below
    module = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)

    def cosine(image, text):
        width, height = (max(32, 32 * side // min(image.size)) for side in image.size)
        left, top = (round((side - 32) / 2) for side in (width, height))
        cropped = image.resize((width, height), PIL.Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
        pixels = np.asarray(cropped, np.float32) / 255
        pixels = (pixels - np.float32(networks.CLIP_MEAN)) / np.float32(networks.CLIP_STD)
        with torch.no_grad():
            found = module(
                pixel_values=torch.from_numpy(pixels).permute(2, 0, 1)[None],
                input_ids=torch.tensor([tokenizer(text)["input_ids"]]),
            )
        return torch.cosine_similarity(found.image_embeds, found.text_embeds).item()

    found = {}
    whole = measures.clip_score(str(tmp_path), batch_size=1)
    for measure in (whole, measures.clip_without_adjectives(str(tmp_path), PROMPTS, batch_size=1)):
        name, (_, score) = measure.name, measure.build()
        for prompt, bare in PROMPTS.items():
            made = [own[name] for own in score(images, [prompt] * len(images))]
            wanted = [cosine(image, prompt if measure is whole else bare) for image in images]
            assert made == pytest.approx(wanted, abs=1e-5) and np.ptp(wanted) > 0.02
            found[name, prompt] = np.array(made)
    first, _, last = PROMPTS
    assert np.abs(found["clip", first] - found["clip_without_adjectives", first]).max() > 0.02
    assert found["clip", last] == pytest.approx(found["clip_without_adjectives", last], abs=1e-6)


def test_three_in_one():
    scores = {"blip_vqa": 0.5, "clip_without_adjectives": 0.3, "unidet_2d": 0.1}
    assert t2i_compbench.three_in_one(["complex", "complex, spatial"], scores) == pytest.approx(0.3)
    assert t2i_compbench.three_in_one(["complex", "complex, action"], scores) == pytest.approx(0.4)
    assert t2i_compbench.three_in_one(["complex", "complex, spatialaction"], scores) == pytest.approx(0.3)
    assert t2i_compbench.three_in_one(["color", "color, seen"], scores) is None
    del scores["unidet_2d"]
    assert t2i_compbench.three_in_one(["complex", "complex, spatial"], scores) is None
    assert t2i_compbench.three_in_one(["complex", "complex, action"], scores) == pytest.approx(0.4)


def test_lists(tmp_path):
    for name, lines in {
        "color_val": ["a red dog", "a blue cat", ""],
        "color_val_seen": ["a red dog"],
        "color_val_unseen": ["a blue cat"],
        "complex_val": ["The red dog sits."],
        "complex_val_action": ["The red dog sits."],
        "color": ["never read"],
    }.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    assert t2i_compbench.read_lists(tmp_path) == {
        "a red dog": ["color", "color, seen"],
        "a blue cat": ["color", "color, unseen"],
        "The red dog sits.": ["complex", "complex, action"],
    }
    assert t2i_compbench.read_list_of(tmp_path, {"a blue cat"}) == ("color", ["a red dog", "a blue cat"])
    for asked, category in (({"a blue cat", "The red dog sits."}, None), ({"a blue cat"}, "complex")):
        with pytest.raises(ValueError, match="_val.txt of .* has all"):
            t2i_compbench.read_list_of(tmp_path, asked, category=category)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none holds none of T2I-CompBench's \*_val.txt files"):
        t2i_compbench.read_lists(tmp_path / "none")


def test_who_is_measured_by_what():
    measured = lambda *parts: [
        name for name in ("blip_vqa", "clip", "clip_without_adjectives") if t2i_compbench.is_measured(parts, name)
    ]
    assert measured("color", "color, seen") == ["blip_vqa"]
    assert measured("complex", "complex, action") == ["blip_vqa", "clip_without_adjectives"]
    assert measured("non_spatial") == ["clip"] and measured("spatial") == []


def test_what_an_official_result_is_of():
    assert t2i_compbench.name_of_result("clip", ["complex", "complex, action"]) == "clip_without_adjectives"
    assert t2i_compbench.name_of_result("clip", ["non_spatial"]) == "clip"
    assert t2i_compbench.name_of_result("blip_vqa", ["complex"]) == "blip_vqa"
