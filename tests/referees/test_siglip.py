"""SigLIP as a referee against transformers' SiglipModel and its processor: losses, image gradients, scores, texts."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from PIL import Image

from referee_jax import config, prompts, referees
from referee_jax.weights import load
from tests.conftest import relative_l2
from tests.lazy import torch, transformers
from tests.oracles import networks

PROMPT = "A red circle, and a BLUE square."
GROUPS = (("red", "blue", "green"), ("circle", "square"))
LENGTH, SIZE = 64, 36


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return networks.save_siglip(networks.siglip(), tmp_path_factory.mktemp("siglip"))


def load_judge(directory, **changes):
    losses = {"cosine": 1.0, "sigmoid": 1.0, "contrastive": 1.0}
    changes = {"negatives": ("a photo",), "near": 2, "exchange": GROUPS} | changes
    return referees.load_referee(config.RefereeSpec(name="siglip", checkpoint=str(directory), losses=losses, **changes))


@pytest.fixture(scope="module")
def judge(directory):
    return load_judge(directory)


def texts_of(judge, prompt):
    """The prompt and what it is told from, in lower case."""
    negatives = [text for text in judge.spec.negatives if text != prompt]
    return [t.lower() for t in (prompt, *negatives, *prompts.hard_negatives(prompt, GROUPS)[: judge.spec.near])]


def views(count=3):
    return np.random.default_rng(0).uniform(size=(count, SIZE, SIZE, 3)).astype(np.float32)


# Compiled once for all tests; op by op would take longer.
encode = jax.jit(lambda referee, tokens: referee.encode(tokens))


@jax.jit
def losses_and_gradients(referee, views, text):
    """Losses `[V]`, and d(mean)/d(views) of each."""
    losses, pullback = jax.vjp(lambda v: referee.views_losses(v, text), views)
    share = {a: jnp.stack([jnp.full_like(x, (a == b) / len(x)) for b in losses]) for a, x in losses.items()}
    return losses, dict(zip(losses, jax.vmap(pullback)(share)[0], strict=True))


def test_losses(judge, directory):
    text = encode(judge.referee, judge.tokenize(PROMPT))
    made, gradients = losses_and_gradients(judge.referee, jnp.asarray(views()), text)

    network = transformers.SiglipModel.from_pretrained(directory).eval()
    texts = texts_of(judge, PROMPT)
    assert len(texts) == 4
    ids = networks.gemma_tokenizer()(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")["input_ids"]
    x = torch.from_numpy(views()).requires_grad_()
    logits = network(input_ids=ids, pixel_values=((x - 0.5) / 0.5).permute(0, 3, 1, 2)).logits_per_image
    wanted = {
        "cosine": 1 - (logits[:, 0] - network.logit_bias) / network.logit_scale.exp(),
        "sigmoid": -torch.log(torch.sigmoid(logits[:, 0])),
        "contrastive": -torch.log(torch.softmax(logits, 1))[:, 0],
    }
    assert made.keys() == wanted.keys() == set(judge.referee.losses)
    other = losses_and_gradients(judge.referee, jnp.asarray(views()), encode(judge.referee, judge.tokenize("a circle")))
    for name, value in wanted.items():
        np.testing.assert_allclose(made[name], value.detach(), atol=2e-5)
        gradient = torch.autograd.grad(value.mean(), x, retain_graph=True)[0]
        print(name, relative_l2(made[name], value.detach()), relative_l2(gradients[name], gradient))
        assert relative_l2(gradients[name], gradient) < 1e-4
        # Both image and text are seen.
        assert np.ptp(made[name]) > 0.01
        assert np.abs(other[0][name] - made[name]).max() > 0.01


def test_sigmoid_of_a_hopeless_view_has_a_gradient(judge):
    """At the published temperature the probability of a match rounds to 0, but not its logarithm."""
    network = jax.tree.map(lambda x: x, judge.referee.network)
    network.logit_scale = network.logit_scale.replace(jnp.log(jnp.full(1, 117.0)))
    network.logit_bias = network.logit_bias.replace(jnp.full(1, -200.0))
    referee = judge.referee.replace(network=network)
    made, gradients = losses_and_gradients(referee, jnp.asarray(views()), encode(referee, judge.tokenize(PROMPT)))
    assert (made["sigmoid"] > 80).all() and np.isfinite(made["sigmoid"]).all()
    assert np.isfinite(gradients["sigmoid"]).all() and np.abs(gradients["sigmoid"]).max() > 1e-3


def test_scores_are_the_processors(directory):
    """An image file and a text through transformers' own processor and network."""
    judge = load_judge(directory, negatives=(), near=0)
    processor = transformers.AutoProcessor.from_pretrained(directory)
    assert isinstance(processor, transformers.SiglipProcessor)
    network = transformers.SiglipModel.from_pretrained(directory).eval()
    score = jax.jit(lambda referee, image, text: referee.scores(referee.fit(image), text))
    found = []
    for seed, prompt in ((0, "a red circle and a blue square."), (1, "a photo")):
        pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        inputs = processor(
            text=[prompt], images=Image.fromarray(pixels), padding="max_length", max_length=LENGTH, return_tensors="pt"
        )
        with torch.no_grad():
            logit = network(**inputs).logits_per_image[0, 0]
            cosine = (logit - network.logit_bias) / network.logit_scale.exp()
        text = encode(judge.referee, judge.tokenize(prompt))
        scores = score(judge.referee, jnp.asarray(pixels / 255.0, jnp.float32), text)
        assert scores.keys() == {"cosine", "probability"}
        assert float(scores["cosine"]) == pytest.approx(float(cosine), abs=1e-5)
        assert float(scores["probability"]) == pytest.approx(float(torch.sigmoid(logit)), abs=1e-5)
        found.append(scores)
    assert abs(float(found[0]["probability"] - found[1]["probability"])) > 0.01


def test_tokens(judge, directory):
    tokens = judge.tokenize(PROMPT)
    assert tokens["input_ids"].shape == (4, LENGTH) and tokens["input_ids"].dtype == np.int32
    assert tokens["real"].tolist() == [True] * 4
    said = networks.gemma_tokenizer().convert_ids_to_tokens(tokens["input_ids"][0])
    assert "".join(said[: said.index("<eos>")]) == PROMPT.lower().replace(" ", "▁")
    assert "▁blue" in said and set(said[said.index("<eos>") + 1 :]) == {"<pad>"}
    # As the processor gives it.
    processor = transformers.AutoProcessor.from_pretrained(directory)
    theirs = processor(text=texts_of(judge, PROMPT), padding="max_length", max_length=LENGTH, return_tensors="np")
    assert theirs.keys() == {"input_ids"}
    np.testing.assert_array_equal(tokens["input_ids"], theirs["input_ids"])
    # Fewer negatives than rows: the rest is marked.
    assert judge.tokenize("a photo")["real"].tolist() == [True, False, False, False]
    with pytest.raises(prompts.PromptError, match="zz': 71 tokens, siglip reads 64"):
        judge.tokenize("z" * 70)


def test_text_is_encoded_once(judge):
    """What is judged again and again needs the text's features only."""
    text = encode(judge.referee, judge.tokenize(PROMPT))
    network = jax.tree.map(lambda x: x, judge.referee.network)
    network.text_model = None
    without = judge.referee.replace(network=network)
    made = jax.jit(lambda r, t: r.views_losses(jnp.asarray(views()), t))
    jax.tree.map(np.testing.assert_array_equal, made(without, text), made(judge.referee, text))


def test_under_jit_vmap_grad_and_scan(judge):
    """Two prompts by vmap, two steps down the gradient by scan, as one program: the same as one by one."""
    tokens = [judge.tokenize(p) for p in (PROMPT, "a green square")]
    images = jnp.asarray(views(count=4).reshape(2, 2, SIZE, SIZE, 3))

    def descend(referee, tokens, images):
        text = referee.encode(tokens)
        total = lambda x: sum(v.mean() for v in referee.views_losses(x, text).values())

        def step(x, _):
            loss, gradient = jax.value_and_grad(total)(x)
            return x - 0.05 * gradient / jnp.linalg.norm(gradient), loss

        return jax.lax.scan(step, images, length=2)

    together = jax.tree.map(lambda *x: jnp.stack(x), *tokens)
    x, losses = jax.jit(jax.vmap(descend, in_axes=(None, 0, 0)))(judge.referee, together, images)
    assert losses.shape == (2, 2) and np.isfinite(losses).all()
    alone = jax.jit(descend)
    for n in range(2):
        x_n, losses_n = alone(judge.referee, jax.tree.map(jnp.asarray, tokens[n]), images[n])
        np.testing.assert_allclose(losses[n], losses_n, rtol=1e-4)
        assert relative_l2(x[n] - images[n], x_n - images[n]) < 1e-3
    assert (losses[:, 1] < losses[:, 0]).all()


def save_siglip1_tokenizer(path):
    """Wordpieces of a sentencepiece model learned from a few words, in the files that SigLIP 1 has."""
    draw = random.Random(0)
    words = "red blue green circle square and a photo of the".split()
    lines = [" ".join(draw.choices(words, k=5)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path / "spiece"), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    transformers.SiglipTokenizer(str(path / "spiece.model"), model_input_names=["input_ids"]).save_pretrained(path)


def test_tokens_of_siglip_1(tmp_path):
    save_siglip1_tokenizer(tmp_path)
    networks.siglip(text={"vocab_size": 80}).save_pretrained(tmp_path)
    networks.save_siglip_preprocessing(tmp_path, SIZE)
    judge = load_judge(tmp_path)
    assert isinstance(judge.tokenizer, transformers.SiglipTokenizer)
    tokens = judge.tokenize(PROMPT)["input_ids"]
    said = judge.tokenizer.convert_ids_to_tokens(tokens[0].tolist())
    assert said[:9] == ["▁a", "▁red", "▁circle", "▁and", "▁a", "▁blue", "▁square", "</s>", "</s>"]
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path)(text=PROMPT, padding="max_length")
    np.testing.assert_array_equal(tokens[:1], np.asarray(theirs["input_ids"]).reshape(1, LENGTH))
    assert np.isfinite(encode(judge.referee, judge.tokenize(PROMPT))["features"]).all()


def test_what_cannot_be_had(directory, tmp_path):
    with pytest.raises(ValueError, match="referee siglip: no loss itm; there are cosine, sigmoid, contrastive"):
        referees.load_referee(config.RefereeSpec(name="siglip", checkpoint=str(directory), losses={"itm": 1.0}))
    networks.siglip().save_pretrained(tmp_path)
    with pytest.raises(load.WeightsError, match="no tokenizer can be read here"):
        load_judge(tmp_path)
    networks.gemma_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(load.WeightsError, match="preprocessor_config.json is missing"):
        load_judge(tmp_path)
