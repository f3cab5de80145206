"""VQAScore as a referee against torch, as its authors ask: prompt, tokens, losses, image gradients, scores, settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from referee_jax import config, prompts, referees
from referee_jax.engine import builders
from referee_jax.models.flan_t5 import clip_t5
from tests.conftest import picture, relative_l2
from tests.lazy import functional, t5_oracles, torch, transformers
from tests.oracles import networks
from tests.referees import compiled
from tests.weights.checkpoints import edit_json

PROMPT = "a red circle left of a blue square"
SWAPPED = "a blue square left of a red circle"
SPEC = config.RefereeSpec(name="vqascore", losses={"vqa": 1.0})
VERSUS = {"losses": {"vqa": 1.0, "versus": 1.0}}
# What t2v_metrics 3.0 asks, as its constants and templates spell it.
ASKED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. USER: <image>\n"
    'Does this figure show "a red circle"? Please answer yes or no. ASSISTANT: '
)


@pytest.fixture(scope="module")
def oracle():
    return t5_oracles.clip_t5()


@pytest.fixture(scope="module")
def directory(oracle, tmp_path_factory):
    return t5_oracles.save_clip_t5(oracle, tmp_path_factory.mktemp("vqascore"))


def load(directory, **changes):
    return referees.load_referee(dataclasses.replace(SPEC, checkpoint=str(directory), **changes))


def views(count=3):
    return np.random.default_rng(0).uniform(size=(count, 32, 32, 3)).astype(np.float32)


def log_yes(oracle, shown, *asked, texts=None):
    """Mean log-probability of the answer's tokens [V, question] by torch, as t2v_metrics has it."""
    texts = texts or t5_oracles.TEXTS
    words = t5_oracles.tokenizer()
    conversations = [texts["conversation"].replace("{}", texts["question"].replace("{}", text)) for text in asked]
    ids = [t5_oracles.token_ids(words, text) for text in conversations] * len(shown)
    labels = words(texts["answer"])["input_ids"]
    mean, std = torch.tensor(networks.CLIP_MEAN), torch.tensor(networks.CLIP_STD)
    pixels = ((shown - mean) / std).permute(0, 3, 1, 2).repeat_interleave(len(asked), 0)
    logits = oracle(pixels, ids, labels)[..., : len(words)]  # resize_token_embeddings(len(tokenizer))
    losses = [functional.cross_entropy(row, torch.tensor(labels)) for row in logits]
    return -torch.stack(losses).unflatten(0, (len(shown), len(asked)))


def test_losses(oracle, directory):
    judge = load(directory, near=1, **VERSUS)
    assert judge.referee.losses == ("vqa", "versus") and judge.referee.image_size == 32
    text = judge.tokenize(PROMPT)
    x = torch.from_numpy(views()).requires_grad_()
    answers = log_yes(oracle, x, PROMPT, SWAPPED)
    wanted = {"vqa": -answers[:, 0], "versus": -answers.log_softmax(1)[:, 0]}

    @jax.jit
    def both(referee, text, shown):
        losses, pullback = jax.vjp(lambda v: referee.views_losses(v, text), shown)
        alone = {k: {n: jnp.full(len(shown), float(n == k)) for n in losses} for k in losses}
        return losses, {k: pullback(c)[0] for k, c in alone.items()}

    losses, gradients = both(judge.referee, text, views())
    for name, loss in wanted.items():
        np.testing.assert_allclose(losses[name], loss.detach(), rtol=1e-4, atol=2e-5)
        exact = torch.autograd.grad(loss.sum(), x, retain_graph=True)[0]
        assert relative_l2(gradients[name], exact) < 1e-4
        assert np.ptp(losses[name]) > 1e-3 and exact.abs().max() > 1e-4
    # Of a text without a relation there is nothing to tell it from.
    without = judge.tokenize("a red circle")
    assert without["real"].tolist() == [True, False] and text["real"].all()
    losses, gradients = both(judge.referee, without, views())
    assert (losses["versus"] == 0).all() and (gradients["versus"] == 0).all()
    assert np.isfinite(gradients["vqa"]).all() and (losses["vqa"] > 0).all()


def test_the_prompt_is_that_of_the_authors():
    sizes = clip_t5.Config()
    assert sizes.conversation.replace("{}", sizes.question.replace("{}", "a red circle")) == ASKED
    assert sizes.answer == "Yes"


def test_tokens(directory):
    """Each part by itself, so there are two ends; the image's place is between them."""
    judge, words = load(directory), t5_oracles.tokenizer()
    before, after = ("a photo USER: ", '\nDoes this show "a red circle"? ASSISTANT: ')
    ids = words(after)["input_ids"]
    text = judge.tokenize("a red circle")
    assert judge.referee.before == tuple(words(before)["input_ids"]) and judge.referee.before[-1] == 1 == ids[-1]
    assert judge.referee.answer == (words.convert_tokens_to_ids("▁Yes"), 1)
    assert text["input_ids"].shape == (1, judge.length) == (1, 64) and text["input_ids"].dtype == np.int32
    assert text["input_ids"][0, : len(ids)].tolist() == ids and text["mask"].sum() == len(ids)
    whole = t5_oracles.token_ids(words, before + "<image>" + after)
    assert whole == [*judge.referee.before, t5_oracles.IMAGE_ID, *ids]
    assert judge.referee.words == len(words) < 120 == judge.referee.network.config.vocab_size
    assert load(directory, template="is it {}?").text("red") == "is it red?"
    assert judge.text("a Cat's; “photo”") == 'Does this show "a Cat\'s; “photo”"?'  # nothing is cleaned


def test_the_published_words_are_read_as_sentencepiece_reads_them(tmp_path):
    """A directory as the authors', with spiece.model alone: line feeds and blanks at the ends are no tokens."""
    sentencepiece = pytest.importorskip("sentencepiece")
    training = dict(vocab_size=46, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    prefix = str(tmp_path / "spiece")
    lines = iter([ASKED, "a red circle and a blue square", "Yes"] * 20)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=prefix, **training)
    words = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    tokenizer = transformers.T5Tokenizer.from_pretrained(str(tmp_path), extra_ids=0)
    for text in (*ASKED.split("<image>"), "Yes", ""):
        assert tokenizer(text)["input_ids"] == [*words.encode(text), 1]


def test_negatives(directory):
    """Those of the settings, exchanged relations, then exchanged words; only where the settings ask for `versus`."""
    exchange = (("red", "green"),)
    judge = load(directory, near=3, negatives=("a photo",), exchange=exchange, **VERSUS)
    asked = [text.split('"')[1] for text in judge.family.texts(judge, PROMPT)]
    right, green = "a red circle right of a blue square", "a green circle left of a blue square"
    assert asked == [PROMPT, "a photo", SWAPPED, right, green]
    tokens = judge.tokenize("a red circle")
    assert tokens["input_ids"].shape == (5, 64) and tokens["real"].tolist() == [True, True, True, False, False]
    plain = load(directory, near=3, negatives=("a photo",))
    assert plain.tokenize(PROMPT)["input_ids"].shape == (1, 64) and plain.referee.losses == ("vqa",)


def test_scores(oracle, directory):
    judge = load(directory, near=1, **VERSUS)
    text, image = judge.tokenize(PROMPT), views(1)[0]
    scores = jax.jit(lambda r, i: r.scores(r.fit(i), text))(judge.referee, jnp.asarray(image))
    answers = log_yes(oracle, torch.from_numpy(image)[None], PROMPT, SWAPPED)[0]
    assert float(scores["vqascore"]) == pytest.approx(answers[0].exp().item(), abs=1e-5)
    assert float(scores["probability"]) == pytest.approx(answers.softmax(0)[0].item(), abs=1e-5)
    assert compiled.scores(load(directory).referee, jnp.asarray(image), load(directory).tokenize(PROMPT)).keys() == {
        "vqascore"
    }


@pytest.mark.parametrize("size", [(40, 24), (21, 40), (32, 32), (50, 50)])
def test_pictures_are_padded_with_the_mean_colour(directory, size):
    """As the authors' expand2square, then CLIP's own processor; in a program, too."""
    judge = load(directory)
    pixels = (255 * picture(0, size[1], size[0])).astype(np.uint8)
    image = PIL.Image.fromarray(pixels)
    side = max(size)
    square = PIL.Image.new("RGB", (side, side), tuple(int(255 * x) for x in networks.CLIP_MEAN))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    processor = transformers.CLIPImageProcessorPil.from_pretrained(str(directory))
    expected = processor(images=square, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    mean, std = np.array(judge.referee.mean), np.array(judge.referee.std)
    view = judge.preprocess(image)
    np.testing.assert_allclose((view - mean) / std, expected, atol=1e-5)
    fitted = compiled.fit(judge.referee, jnp.asarray(pixels / np.float32(255)))
    np.testing.assert_array_equal(np.round(255 * fitted), np.round(255 * view))
    assert np.abs(fitted - view).max() < 1e-6


def test_texts_are_the_checkpoints(oracle, directory, tmp_path):
    """A network of another template, as a tiny one has: question, place of the image and answer."""
    texts = {"conversation": "<image>{}", "question": "show {}", "answer": "or no"}
    t5_oracles.save_clip_t5(oracle, tmp_path, texts=texts)
    judge, shown = load(tmp_path), views(1)
    assert judge.referee.before == (1,) and judge.text("a circle") == "show a circle"
    loss = compiled.views_losses(judge.referee, shown, judge.tokenize("a circle"))["vqa"]
    exact = -log_yes(oracle, torch.from_numpy(shown), "a circle", texts=texts)[:, 0]
    np.testing.assert_allclose(loss, exact, rtol=1e-4)


def asked(common=None, **changes):
    spec = {"name": "vqascore", "checkpoint": "x", "losses": {"vqa": 1.0}} | changes
    return config.from_config({"referees": (spec,)} | ({"views": {"augmentations": common}} if common else {}))


@pytest.mark.parametrize("name", ["Af", "Er", "Hf", "Ro", "Et", "Ts", "Cr", "Re"])
def test_views_that_move_things_are_refused(name):
    """Asked for by the referee's settings, or by those of all views where there is no other referee."""
    reason = "must be without Af, Er, Hf, Ro, Et, Ts, Cr, Re: vqascore is asked where things are, and these cut things off or"
    for key, settings in (
        (r"referees\[0\].augmentations", {"augmentations": ("Ji", name)}),
        (r"views.augmentations", {"common": ("Ji", name)}),
    ):
        with pytest.raises(
            config.ConfigError, match=rf"^{key} = \('Ji', '{name}'\) is not possible: it {reason} turn \"left of"
        ):
            asked(**settings)


def test_views_of_its_own():
    """None, or its own; other referees have those of all where they have none of their own."""
    for names in ((), ("Pe", "Ji", "Sh", "Gn")):
        settings = asked(augmentations=names)
        assert builders.make_view_plan(settings, settings.referees[0]).augmentations == names
    mix = config.from_config({"referees": ({"augmentations": ("Cr",)}, {}, dataclasses.asdict(SPEC))})
    plans = [builders.make_view_plan(mix, spec).augmentations for spec in mix.referees]
    assert plans == [("Cr",), mix.views.augmentations, ()]
    with pytest.raises(config.ConfigError, match=r"referees\[0\].augmentations = \('Xx',\) is not possible: .*unknown"):
        config.from_config({"referees": ({"augmentations": ("Xx",)},)})


def test_versus_wants_something_to_tell_the_prompt_from():
    with pytest.raises(config.ConfigError, match=r"or referees\[0\].near some number, for the versus loss"):
        asked(augmentations=(), losses={"versus": 1.0})
    assert asked(augmentations=(), losses={"versus": 1.0}, near=1)


def test_too_long_is_refused(directory):
    with pytest.raises(prompts.PromptError, match="show .red .*': 83 tokens, vqascore reads 64"):
        load(directory).tokenize("red " * 70)


def test_a_size_that_is_not_the_networks(oracle, tmp_path):
    t5_oracles.save_clip_t5(oracle, tmp_path)
    edit_json(tmp_path / "preprocessor_config.json", crop_size={"height": 24, "width": 24})
    with pytest.raises(ValueError, match=r"vqascore reads 32 x 32 pixels, its image processor gives \(3, 24, 24\)"):
        load(tmp_path).preprocess(PIL.Image.new("RGB", (40, 40)))
