"""BLIP as three referees against transformers: losses, their image gradients, scores, texts and settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from referee_jax import config, prompts, referees
from tests.conftest import relative_l2
from tests.lazy import torch, transformers
from tests.models.test_blip import CLASSES, DEC, oracle_class
from tests.oracles import networks
from tests.referees import compiled

ENC, LENGTH = DEC + 1, 64
PROMPT = "a red circle and a blue square"
TEXTS = {"itm": PROMPT, "caption": "a picture of " + PROMPT, "vqa": PROMPT + "?"}
LOSSES = {"itm": ("itm", "itc"), "caption": ("caption",), "vqa": ("vqa",)}
YES, NO = (networks.BLIP_WORDS.index(word) for word in ("yes", "no"))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("blip")
    made = {}
    for task in CLASSES:
        made[task] = networks.save_blip(networks.blip(oracle_class(task)), root / task)
    return made


def load(directories, task, dtype=jnp.float32, **changes):
    losses = dict.fromkeys(LOSSES[task], 1.0)
    spec = config.RefereeSpec(name=f"blip_{task}", checkpoint=str(directories[task]), losses=losses, **changes)
    return referees.load_referee(spec, dtype=dtype)


def views(size=32, count=3):
    return np.random.default_rng(0).uniform(size=(count, size, size, 3)).astype(np.float32)


def normalised(x):
    mean, std = torch.tensor(networks.CLIP_MEAN), torch.tensor(networks.CLIP_STD)
    return ((x - mean) / std).permute(0, 3, 1, 2)


def caption_loss(network, ids, pixels, **how):
    """Mean cross-entropy `[V]` of the tokens after "[DEC] a picture of", by torch."""
    ids = torch.where(torch.arange(ids.shape[1]) == 0, DEC, ids)
    states = network.vision_model(pixels, interpolate_pos_encoding=True)[0]
    logits = network.text_decoder(ids.expand(len(pixels), -1), encoder_hidden_states=states).logits
    return torch.stack([torch.nn.functional.cross_entropy(x[3:-1], ids[0, 4:], **how) for x in logits])


def oracle(task, directory, judge, shown, first):
    """Losses `[V]` and d(their mean)/d(views) by torch; texts are not padded, and read one by one."""
    network = oracle_class(task).from_pretrained(directory).eval()
    x = torch.from_numpy(shown).requires_grad_()
    pixels = normalised(x)
    ids = torch.tensor(judge.tokenizer(TEXTS[task])["input_ids"])[None]
    reading = ids.clone()
    if first is not None:
        reading[:, 0] = first
    both = dict(pixel_values=pixels, interpolate_pos_encoding=True)
    if task == "itm":
        match = network(input_ids=reading.expand(len(x), -1), **both).itm_score.log_softmax(1)[:, 1]
        losses = {"itm": -match, "itc": 1 - network(input_ids=ids, use_itm_head=False, **both).itm_score[:, 0]}
    elif task == "caption":
        losses = {"caption": caption_loss(network, ids, pixels, label_smoothing=0.1)}
    else:
        states = network.vision_model(pixels, interpolate_pos_encoding=True)[0]
        read = network.text_encoder(reading.expand(len(x), -1), encoder_hidden_states=states)[0]
        start = torch.full((len(x), 1), DEC)
        logits = network.text_decoder(start, encoder_hidden_states=read).logits[:, 0]
        losses = {"vqa": -(logits[:, YES].exp() / (logits[:, YES].exp() + logits[:, NO].exp())).log()}
    gradients = {k: torch.autograd.grad(v.mean(), x, retain_graph=True)[0].numpy() for k, v in losses.items()}
    return {name: value.detach().numpy() for name, value in losses.items()}, gradients


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("itm", {}),
        ("itm", {"first_token": "[CLS]", "image_size": 48}),
        ("caption", {}),
        ("vqa", {"image_size": 24}),
    ],
)
def test_losses(directories, task, changes):
    judge = load(directories, task, **changes)
    assert judge.referee.image_size == changes.get("image_size", 32)
    shown = views(judge.referee.image_size)
    first = None if "first_token" in changes else ENC
    wanted, gradients = oracle(task, directories[task], judge, shown, first)
    encode = jax.jit(lambda r, t: r.encode(t))
    text = encode(judge.referee, judge.tokenize(PROMPT))

    @jax.jit
    def both(referee, text, shown):
        losses, pullback = jax.vjp(lambda v: referee.views_losses(v, text), shown)
        share = jnp.full(len(shown), 1 / len(shown))
        alone = {k: {n: (n == k) * share for n in losses} for k in losses}
        return losses, {k: pullback(c)[0] for k, c in alone.items()}

    made, ours = both(judge.referee, text, jnp.asarray(shown))
    assert set(made) == set(judge.referee.losses) == set(wanted)
    other = judge.tokenize("a green square")
    assert {k: v.shape for k, v in other.items()} == {k: v.shape for k, v in judge.tokenize(PROMPT).items()}
    differently = both(judge.referee, encode(judge.referee, other), jnp.asarray(shown))[0]
    for name in wanted:
        np.testing.assert_allclose(made[name], wanted[name], rtol=1e-4, atol=2e-5)
        assert relative_l2(ours[name], gradients[name]) < 1e-4
        # Both image and text are seen.
        assert np.ptp(wanted[name]) > 0.01
        assert np.abs(differently[name] - made[name]).max() > 0.01


def test_first_token_matters(directories):
    shown = jnp.asarray(views())
    made = []
    for first in ("[ENC]", "[CLS]"):
        judge = load(directories, "itm", first_token=first)
        text = compiled.encode(judge.referee, judge.tokenize(PROMPT))
        made.append(jax.jit(lambda r, t: r.views_losses(shown, t))(judge.referee, text))
    assert np.abs(made[0]["itm"] - made[1]["itm"]).max() > 0.01
    np.testing.assert_allclose(made[0]["itc"], made[1]["itc"], atol=1e-6)  # where the text reads no image


def test_tokens(directories):
    judge = load(directories, "caption")
    tokens = judge.tokenize(PROMPT)
    count = 3 + 7 + 2
    assert tokens["input_ids"].shape == (LENGTH,) and tokens["input_ids"].dtype == np.int32
    assert tokens["mask"].tolist() == [True] * count + [False] * (LENGTH - count)
    assert tokens["scored"].tolist() == [False] * 4 + [True] * (count - 4) + [False] * (LENGTH - count)
    assert compiled.encode(judge.referee, jax.tree.map(jnp.asarray, tokens))["input_ids"][0] == DEC
    assert load(directories, "caption", template="{}").tokenize(PROMPT)["scored"].sum() == 7 + 1
    judge = load(directories, "vqa")
    question = judge.tokenize(PROMPT)
    assert judge.referee.answers == (YES, NO)
    assert question["input_ids"][0, 8] == networks.BLIP_WORDS.index("?")
    with pytest.raises(prompts.PromptError, match="red .*': 66 tokens, blip_itm reads 64"):
        load(directories, "itm").tokenize("red " * 64)


@pytest.mark.parametrize(("task", "text"), TEXTS.items())
def test_texts_are_cleaned_as_in_training(directories, task, text):
    judge = load(directories, task)
    assert judge.text('A "red" circle, and a BLUE square.') == text.replace(" and", ", and")
    wordy = "A (red) circle and a blue square!"
    assert judge.text(wordy) == text
    assert prompts.token_count(judge.tokenizer, text) == judge.tokenize(wordy)["mask"].sum()


def test_answers_must_be_single_tokens(directories, tmp_path):
    words = ["n" if word == "no" else word for word in networks.BLIP_WORDS] + ["##o"]
    (tmp_path / "config.json").write_text((directories["vqa"] / "config.json").read_text())
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path)
    # There are no weights here: it is said before they are looked for.
    with pytest.raises(ValueError, match=f"{tmp_path}: the answer 'no' is 'n ##o', not one token of its own"):
        load({"vqa": tmp_path}, "vqa")
    words.remove("n")
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the answer 'no' is '\[UNK\]', not one token"):
        load({"vqa": tmp_path}, "vqa")


def test_tokenizer_with_its_own_enc_token(directories, tmp_path):
    network = oracle_class("itm").from_pretrained(directories["itm"])
    networks.save_blip(network, tmp_path)
    tokenizer = networks.blip_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]", "[DEC]"]})
    tokenizer.save_pretrained(tmp_path)
    assert load({"itm": tmp_path}, "itm").referee.first_token == DEC
    assert load(directories, "itm").referee.first_token == ENC


def likelihood(directory, judge, image):
    """The caption loss of an image without smoothing."""
    ids = torch.tensor(judge.tokenizer(TEXTS["caption"])["input_ids"])[None]
    pixels = normalised(torch.from_numpy(np.array(image))[None])
    return caption_loss(oracle_class("caption").from_pretrained(directory).eval(), ids, pixels)[0].detach()


@pytest.mark.parametrize("task", CLASSES)
def test_scores(directories, task):
    judge = load(directories, task)
    text = compiled.encode(judge.referee, judge.tokenize(PROMPT))
    image = jnp.asarray(views(count=1)[0])
    score = jax.jit(lambda r, i: r.scores(r.fit(i), text))
    losses, scores = compiled.views_losses(judge.referee, image[None], text), score(judge.referee, image)
    expected = {
        "itm": lambda: {"itm_probability": np.exp(-losses["itm"][0]), "cosine": 1 - losses["itc"][0]},
        "caption": lambda: {"caption_log_likelihood": -likelihood(directories[task], judge, image)},
        "vqa": lambda: {"vqa_probability": np.exp(-losses["vqa"][0])},
    }[task]()
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert float(scores[name]) == pytest.approx(float(value), abs=1e-5)
    if task == "caption":  # the loss is smoothed
        assert abs(float(scores["caption_log_likelihood"] + losses["caption"][0])) > 1e-3
    if task == "vqa":
        assert 0.01 < scores["vqa_probability"] < 0.99
    # An image of another size is brought to that of the views.
    large = jnp.asarray(views(size=48, count=1)[0])
    large = jnp.round(255 * large) / 255
    small = PIL.Image.fromarray(np.asarray(255 * large).round().astype(np.uint8)).resize((32, 32), PIL.Image.BICUBIC)
    small = jnp.asarray(np.asarray(small) / np.float32(255))
    of_large, of_small = (score(judge.referee, i) for i in (large, small))
    for name in scores:
        assert float(of_large[name]) == pytest.approx(float(of_small[name]), abs=1e-4)
        assert abs(float(of_large[name] - scores[name])) > 1e-3


def test_settings_that_are_refused(directories, checkpoints):
    with pytest.raises(ValueError, match="referee blip_vqa: no loss cosine; there are vqa"):
        referees.load_referee(dataclasses.replace(load(directories, "vqa").spec, losses={"cosine": 1.0}))
    with pytest.raises(ValueError, match="referee clip: image_size = 48, but it reads 32"):
        referees.load_referee(config.RefereeSpec(checkpoint=str(checkpoints[1]), image_size=48))
    for spec, message in (
        ({"name": "blip_itm", "losses": {"itm": 1.0}, "near": 2}, r"near 0: blip_itm reads none"),
        ({"template": "a photo"}, r"referees\[0\].template = 'a photo' is not possible: it must be empty, or a text"),
        ({"first_token": "[DEC]"}, r"first_token = '\[DEC\]' is not possible: it must be one of '\[ENC\]', '\[CLS\]'"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            config.from_config({"referees": (spec,)})


def test_template_of_clip(checkpoints):
    plain, photo = (
        referees.load_referee(config.RefereeSpec(checkpoint=str(checkpoints[1]), template=template, negatives=("red",)))
        for template in ("", "photo {}")
    )
    np.testing.assert_array_equal(
        photo.tokenize("a circle")["input_ids"], prompts.tokenize(plain.tokenizer, ["photo a circle", "photo red"])
    )
    assert plain.text("a circle") == "a circle"
