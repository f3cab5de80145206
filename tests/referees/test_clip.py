"""CLIP as a referee against transformers' CLIPModel: losses, their image gradients, scores, and the near negatives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from referee_jax import config, prompts, referees
from tests.conftest import relative_l2
from tests.lazy import torch, transformers
from tests.referees import compiled

GROUPS = (("red", "blue", "green"), ("circle", "square"))


@pytest.fixture(scope="module")
def judge(checkpoints):
    spec = config.RefereeSpec(
        checkpoint=str(checkpoints[1]),
        losses={"cosine": 1.0, "contrastive": 1.0},
        negatives=("a photo",),
        near=4,
        exchange=GROUPS,
    )
    return referees.load_referee(spec)


def oracle(judge, views: np.ndarray, texts: list[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Losses `[V]` and d(their mean)/d(views) by torch."""
    network = transformers.CLIPModel.from_pretrained(judge.spec.checkpoint).eval()
    x = torch.from_numpy(views).requires_grad_()
    pixels = ((x - torch.tensor(judge.referee.mean)) / torch.tensor(judge.referee.std)).permute(0, 3, 1, 2)
    ids = torch.from_numpy(prompts.tokenize(judge.tokenizer, texts).astype(np.int64))
    logits = network(input_ids=ids, pixel_values=pixels).logits_per_image
    losses = {"cosine": 1 - logits[:, 0] / network.logit_scale.exp(), "contrastive": -logits.log_softmax(1)[:, 0]}
    gradients = {k: torch.autograd.grad(v.mean(), x, retain_graph=True)[0].numpy() for k, v in losses.items()}
    return {name: value.detach().numpy() for name, value in losses.items()}, gradients


@pytest.mark.parametrize("prompt", ["a red circle and a blue square", "a photo"])
def test_losses(judge, prompt):
    tokens = judge.tokenize(prompt)
    assert tokens["input_ids"].shape == (6, judge.tokenizer.model_max_length)
    text = compiled.encode(judge.referee, tokens)
    views = np.random.default_rng(0).uniform(size=(3, 32, 32, 3)).astype(np.float32)
    # "a photo" is its own only negative, and has no words to exchange: nothing is left to tell it from.
    texts = [prompt, *(n for n in judge.spec.negatives if n != prompt), *prompts.hard_negatives(prompt, GROUPS)[:4]]
    assert tokens["real"].sum() == len(texts) == (6 if "red" in prompt else 1)
    wanted, gradients = oracle(judge, views, texts)
    made = compiled.views_losses(judge.referee, jnp.asarray(views), text)
    for name in ("cosine", "contrastive"):
        np.testing.assert_allclose(made[name], wanted[name], atol=2e-5)
        gradient = jax.grad(lambda v, name=name: judge.referee.views_losses(v, text)[name].mean())(jnp.asarray(views))
        if len(texts) > 1 or name == "cosine":
            assert relative_l2(gradient, gradients[name]) < 1e-4
    if len(texts) > 1:
        assert wanted["contrastive"].std() > 0.01


def test_scores(judge):
    text = compiled.encode(judge.referee, judge.tokenize("a red circle and a blue square"))
    image = np.random.default_rng(1).uniform(size=(32, 32, 3)).astype(np.float32)
    scores = compiled.scores(judge.referee, compiled.fit(judge.referee, jnp.asarray(image)), text)
    losses = compiled.views_losses(judge.referee, jnp.asarray(image)[None], text)
    assert float(scores["cosine"]) == pytest.approx(1 - float(losses["cosine"][0]), abs=1e-6)
    assert float(scores["probability"]) == pytest.approx(float(jnp.exp(-losses["contrastive"][0])), abs=1e-6)
    large = jax.image.resize(jnp.asarray(image), (64, 64, 3), "nearest")
    assert (
        abs(
            float(compiled.scores(judge.referee, compiled.fit(judge.referee, large), text)["cosine"])
            - float(scores["cosine"])
        )
        < 0.05
    )


@pytest.mark.parametrize("name", ["pickscore", "hps"])
def test_referees_of_preference(name, checkpoints):
    """Scores are those of transformers' network with its own processor; losses are CLIP's."""
    losses = {"pickscore": ("cosine", "contrastive"), "hps": ("cosine",)}[name]
    how = {"negatives": ("a photo",)} if name == "pickscore" else {}
    path = str(checkpoints[1])
    judge = referees.load_referee(
        config.RefereeSpec(name=name, checkpoint=path, losses=dict.fromkeys(losses, 1.0), **how)
    )
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    texts = ["a red circle", *judge.spec.negatives]
    processor = transformers.AutoProcessor.from_pretrained(path)
    network = transformers.CLIPModel.from_pretrained(path).eval()
    inputs = processor(text=texts, images=Image.fromarray(pixels), padding="max_length", return_tensors="pt")
    with torch.no_grad():
        logits = network(**inputs).logits_per_image[0]
    cosine, share = logits[0] / network.logit_scale.exp(), logits.softmax(0)[0]

    image = jnp.asarray(pixels / 255.0, jnp.float32)
    text = compiled.encode(judge.referee, judge.tokenize("a red circle"))
    wanted = {"pickscore": {"score": logits[0], "probability": share}, "hps": {"score": cosine}}[name]
    scores = compiled.scores(judge.referee, compiled.fit(judge.referee, image), text)
    assert scores.keys() == wanted.keys()
    for key, value in wanted.items():
        assert float(scores[key]) == pytest.approx(float(value), abs=1e-4)
    assert abs(logits[0]) > 0.1 and abs(logits[0] - cosine) > 0.1
    made = compiled.views_losses(judge.referee, image[None], text)
    assert judge.referee.losses == losses and made.keys() == set(losses)
    assert float(made["cosine"][0]) == pytest.approx(1 - float(cosine), abs=1e-5)
    if name == "pickscore":
        assert float(made["contrastive"][0]) == pytest.approx(-float(share.log()), abs=1e-4)


@pytest.mark.parametrize("name", ["clip", "hps", "pickscore"])
def test_texts_are_repaired_as_their_authors_do(name, judge):
    """By OpenAI's and open_clip's own tokenizers; PickScore's authors ask transformers', which repairs nothing."""
    spec = config.RefereeSpec(name=name, checkpoint=judge.spec.checkpoint, losses={})
    reader = dataclasses.replace(judge, spec=spec, family=referees.REFEREES[name])
    for text, wanted in (("a \u201cred\u201d circle &amp; a", 'a "red" circle & a'), ("\uff52\uff45\uff44", "red")):
        read = [reader.tokenize(x)["input_ids"].tolist() for x in (text, wanted)]
        assert (read[0] == read[1]) == (name != "pickscore")


def test_names_agree_with_the_settings():
    assert list(config.LOSSES) == list(referees.REFEREES)
    for family in referees.REFEREES.values():
        assert family.published and all(name.count("/") == 1 for name in family.published)
    with pytest.raises(config.ConfigError, match=r"referees\[0\].negatives = .* empty, and .*near 0: hps reads none"):
        config.from_config({"referees": ({"name": "hps", "negatives": ("a photo",)},)})


def test_unknown_loss():
    """It is said before the checkpoint is looked for."""
    spec = config.RefereeSpec(checkpoint="nowhere", losses={"itm": 1.0})
    with pytest.raises(ValueError, match="referee clip: no loss itm; there are cosine, contrastive"):
        referees.load_referee(spec)


def test_near():
    texts = prompts.hard_negatives("a red circle and a blue square", GROUPS)
    assert texts[:4] == [
        "a blue circle and a red square",
        "a red square and a blue circle",
        "a red circle",
        "a blue square",
    ]
    assert "a green circle and a blue square" in texts and "a red circle and a blue circle" in texts
    assert len(texts) == len(set(texts)) == 4 + 4 + 2
    assert "a red circle and a blue square" not in texts
    assert prompts.hard_negatives("a red apple", (("red", "orange"),)) == ["an orange apple"]
    assert prompts.hard_negatives("nothing of the groups", GROUPS) == []
