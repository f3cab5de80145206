"""T2I-CompBench's measures against the official protocol, written plainly in torch."""

import math
import re

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from referee_jax import config, referees
from referee_jax.benchmarks import scoring, t2i_compbench
from tests.oracles import networks

SIZE = 480
PHRASES = {
    "a red circle and a blue square": ["a red circle", "a blue square"],
    "The (green) ring, a photo": ["The (green) ring", "a photo"],
    "a red square and a red square": ["a red square", "a red square"],
    "over there": [],
}


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


def probability(module, tokenizer, image, phrase):
    """Of "yes", by the official protocol: BLIP's cleaning of questions, [ENC], one decoding step from [DEC]."""
    pixels = np.asarray(image.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC), np.float32) / 255
    pixels = (pixels - np.float32(networks.CLIP_MEAN)) / np.float32(networks.CLIP_STD)
    question = re.sub(r"""([.!"()*#:;~])""", "", f"{phrase}?".lower()).rstrip(" ")
    ids = torch.tensor(tokenizer(question, truncation=True, max_length=35)["input_ids"])[None]
    decoded_from = module.config.text_config.bos_token_id
    ids[:, 0] = decoded_from + 1
    with torch.no_grad():
        states = module.vision_model(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
        read = module.text_encoder(ids, encoder_hidden_states=states)[0]
        logits = module.text_decoder(torch.tensor([[decoded_from]]), encoder_hidden_states=read).logits[0, 0]
    yes, no = logits.softmax(-1)[tokenizer.convert_tokens_to_ids(["yes", "no"])]
    return (yes / (yes + no)).item()


def test_blip_vqa(vqa, images):
    module, path = vqa
    judge = referees.load_referee(config.RefereeSpec(name="blip_vqa", checkpoint=str(path), losses={}))
    scorer = scoring.Scorer(judge, texts=3, batch_size=1)
    products = []
    for prompt, phrases in PHRASES.items():
        made = t2i_compbench.blip_vqa(scorer, images, [phrases] * len(images))
        for image, scores in zip(images, made, strict=True):
            sure = [round(probability(module, judge.tokenizer, image, phrase), 4) for phrase in phrases]
            assert abs(scores["blip_vqa"] - math.prod(sure)) <= 2e-3, prompt
            assert set(scores["questions"]) == set(phrases)
            products.append(scores["blip_vqa"])
    assert products[-6:] == [1.0] * 6
    # They differ between images and prompts, or the agreement would say nothing.
    assert np.ptp(products[:6]) > 0.02 and abs(np.mean(products[:6]) - np.mean(products[12:18])) > 0.01


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
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none holds none of T2I-CompBench's \*_val.txt files"):
        t2i_compbench.read_lists(tmp_path / "none")


def test_who_is_measured_by_what():
    measured = lambda *parts: [  # noqa: E731
        name for name in ("blip_vqa", "clip", "clip_without_adjectives") if t2i_compbench.is_measured(parts, name)
    ]
    assert measured("color", "color, seen") == ["blip_vqa"]
    assert measured("complex", "complex, action") == ["blip_vqa", "clip_without_adjectives"]
    assert measured("non_spatial") == ["clip"] and measured("spatial") == []
