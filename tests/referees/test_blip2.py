"""BLIP-2 as a referee: losses and their image gradients against transformers, and captions against LAVIS."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
from flax import nnx

from referee_jax import config, prompts, referees
from referee_jax.models import blip2
from referee_jax.weights import convert, load
from tests.conftest import relative_l2
from tests.lazy import torch, transformers
from tests.oracles import networks

FIXTURE = pathlib.Path(__file__).parents[1] / "models" / "fixtures" / "blip2_qformer.npz"
PROMPT = 'A "red circle" and a BLUE square!'


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("blip2")
    networks.save_blip2(path, lm_head=True, older=False)
    return path


def spec(path, *losses, **changes):
    return config.RefereeSpec(name="blip2", checkpoint=str(path), losses=dict.fromkeys(losses, 1.0), **changes)


@pytest.fixture(scope="module")
def judge(directory):
    return referees.load_referee(spec(directory, "itm", "itc", "itg"))


def views(count=3, size=24):
    return np.random.default_rng(0).uniform(size=(count, size, size, 3)).astype(np.float32)


@jax.jit
def losses_and_gradients(referee, views, text):
    """Losses `[V]`, and d(mean)/d(views) of each."""
    losses, pullback = jax.vjp(lambda v: referee.views_losses(v, text), views)
    return losses, _each(pullback, losses)


def _each(pullback, losses):
    """The gradients of the means of all losses: one program for all, by vmap."""
    share = {a: jnp.stack([jnp.full_like(x, (a == b) / len(x)) for b in losses]) for a, x in losses.items()}
    return dict(zip(losses, jax.vmap(pullback)(share)[0], strict=True))


# Compiled once for all tests; op by op would take longer.
encode = jax.jit(lambda referee, tokens: referee.encode(tokens))
scores_of = jax.jit(lambda referee, image, text: referee.scores(referee.fit(image), text))


def test_tokens(judge):
    tokens = judge.tokenize(PROMPT)
    vocabulary = [*networks.BLIP2_TOKENS, "[DEC]"]
    assert [vocabulary[n] for n in tokens["input_ids"][:9]] == "[CLS] a red circle and a blue square [SEP]".split()
    assert tokens["input_ids"].shape == tokens["attention_mask"].shape == (32,)
    assert tokens["attention_mask"].tolist() == [1] * 9 + [0] * 23
    assert judge.referee.network.dec_token_id == judge.tokenizer.bos_token_id == vocabulary.index("[DEC]")
    assert judge.tokenize("red " * 30)["attention_mask"].all()
    with pytest.raises(prompts.PromptError, match="red .*': 33 tokens, blip2 reads 32"):
        judge.tokenize("red " * 31)


@pytest.mark.parametrize("size", [24, 40], ids=["native", "interpolated"])
def test_match_and_contrast(directory, size):
    judge = referees.load_referee(spec(directory, "itm", "itc", image_size=0 if size == 24 else size))
    assert judge.referee.image_size == size
    oracle = transformers.Blip2ForImageTextRetrieval.from_pretrained(directory).eval()
    # The class itself does not hand this on to its vision model, but its vision model knows it.
    oracle.vision_model.forward = functools.partial(oracle.vision_model.forward, interpolate_pos_encoding=True)
    tokens, x = judge.tokenize(PROMPT), views(size=size)
    text = encode(judge.referee, tokens)
    made, gradients = losses_and_gradients(judge.referee, jnp.asarray(x), text)
    scores = scores_of(judge.referee, jnp.asarray(x[0]), text)

    x = torch.from_numpy(x).requires_grad_()
    pixels = ((x - torch.tensor(judge.referee.mean)) / torch.tensor(judge.referee.std)).permute(0, 3, 1, 2)
    ids, mask = (torch.from_numpy(tokens[name]).long().expand(3, -1) for name in ("input_ids", "attention_mask"))
    ask = lambda head: oracle(pixels, ids, attention_mask=mask, use_image_text_matching_head=head)
    wanted = {
        "itm": -ask(True).logits_per_image.log_softmax(-1)[:, 1],
        "itc": 1 - ask(False).logits_per_image[:, 0],
    }
    for name, loss in wanted.items():
        np.testing.assert_allclose(made[name], loss.detach(), atol=2e-5)
        gradient = torch.autograd.grad(loss.mean(), x, retain_graph=True)[0]
        assert relative_l2(gradients[name], gradient) < 1e-4
        assert loss.std() > 0.01
    assert float(scores["itm_probability"]) == pytest.approx(float(wanted["itm"][0].neg().exp().detach()), abs=1e-5)


def test_all_losses_match_lavis():
    """The whole Q-Former with its language head, gradients with respect to the vision transformer's states."""
    with np.load(FIXTURE) as file:
        arrays = dict(file)
    tensors = {name.removeprefix("weights/"): x for name, x in arrays.items() if name.startswith("weights/")}
    queries, patches = tensors["query_tokens"].shape[1], arrays["images"].shape[-1]
    settings = blip2.Config(
        vision_config=blip2.VisionConfig(
            hidden_size=patches, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=14
        ),
        qformer_config=blip2.QFormerConfig(
            vocab_size=40, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40,
            max_position_embeddings=12, use_qformer_text_input=True,
        ),
        num_query_tokens=queries, image_text_hidden_size=16, lm_head=True,
    )  # fmt: skip
    network = nnx.eval_shape(lambda: blip2.BLIP2(settings, rngs=nnx.Rngs(0)))
    shapes = {name: target.source_shape for target in convert.targets(network) for name in target.names}
    vision = {name: np.zeros(shape) for name, shape in shapes.items() if name.startswith("vision_model.")}
    row = load.KINDS["blip2"]
    network = convert.fill(
        network, vision | tensors, dtype=jnp.float32, renames=row.renames, ignore=(*row.ignore, *row.ties)
    )
    referee = referees.blip2.from_checkpoint(network, {"image_mean": (0, 0, 0), "image_std": (1, 1, 1)})

    @jax.jit
    def ask(referee, states, tokens):
        text = referee.encode(tokens)
        losses, pullback = jax.vjp(lambda x: referee.image_losses(referee.network.query_image(x), text), states)
        return losses, _each(pullback, losses)

    images = arrays["images"]
    for t, ids in enumerate(arrays["input_ids"].astype(np.int32)):
        losses, gradients = ask(referee, images, {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int32)})
        for n, name in enumerate(("itm", "itc", "itg")):
            assert relative_l2(losses[name], arrays["losses"][n, t]) < 1e-4
            assert relative_l2(gradients[name] * len(images), arrays["gradients"][n, t]) < 1e-4
    # LAVIS hears image and text.
    assert (np.ptp(arrays["losses"], axis=1) > 0.02).all() and (np.ptp(arrays["losses"], axis=2) > 0.05).all()


def test_scores(judge):
    text = encode(judge.referee, judge.tokenize(PROMPT))
    image = jnp.asarray(views()[0])
    scores = scores_of(judge.referee, image, text)
    losses, _ = losses_and_gradients(judge.referee, jnp.asarray(views()), text)
    assert float(scores["itm_probability"]) == pytest.approx(float(jnp.exp(-losses["itm"][0])), abs=1e-6)
    assert float(scores["cosine"]) == pytest.approx(1 - float(losses["itc"][0]), abs=1e-6)
    # The caption once more, from logits by torch: smoothed for the loss, plain for the score.
    network, referee = judge.referee.network, judge.referee
    caption = jax.jit(lambda network, pixels, text: network.caption(network.encode_image(pixels), text)[0])
    logits = caption(network, (image[None] - jnp.asarray(referee.mean)) / jnp.asarray(referee.std), text["text"])
    logits = torch.from_numpy(np.array(logits))
    labels = torch.from_numpy(np.where(text["real"], text["targets"], -100)).long()
    loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert float(losses["itg"][0]) == pytest.approx(float(loss), rel=1e-5)
    plain = torch.nn.functional.cross_entropy(logits, labels)
    assert float(scores["caption_log_likelihood"]) == pytest.approx(-float(plain), rel=1e-5)
    # A larger image is shrunk first.
    large = jnp.repeat(jnp.repeat(jnp.round(255 * image) / 255, 2, 0), 2, 1)
    shrunk = referee.fitting.of_picture(PIL.Image.fromarray(np.asarray(255 * large).round().astype(np.uint8)))
    wanted = scores_of(referee, jnp.asarray(shrunk), text)["cosine"]
    assert float(scores_of(referee, large, text)["cosine"]) == pytest.approx(float(wanted), abs=1e-5)


def test_captions_need_the_language_head(tmp_path):
    networks.save_blip2(tmp_path, lm_head=False, older=False)
    judge = referees.load_referee(spec(tmp_path, "itm", "itc"))
    text = encode(judge.referee, judge.tokenize(PROMPT))
    image = jnp.asarray(views(1)[0])
    assert set(jax.eval_shape(judge.referee.views_losses, image[None], text)) == {"itm", "itc"}
    assert set(jax.eval_shape(judge.referee.scores, image, text)) == {"itm_probability", "cosine"}
    with pytest.raises(ValueError, match="referee blip2: no loss itg; there are itm, itc"):
        referees.load_referee(dataclasses.replace(judge.spec, losses={"itg": 1.0}))
    edit_json(tmp_path / "config.json", lm_head=True)
    with pytest.raises(load.WeightsError, match=r"parameters without a tensor: cls\.predictions\.bias, cls\."):
        load.load("blip2", tmp_path)


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_word_that_the_network_does_not_have(tmp_path):
    """Today's processor adds one to the tokenizer: it would have no embedding, and losses be NaN."""
    networks.save_blip2(tmp_path, lm_head=False)
    judge = referees.load_referee(str(tmp_path))
    judge.read("a dog")
    with pytest.raises(
        prompts.PromptError, match="'an <image> of a dog': it holds <image>, for which blip2 has no word"
    ):
        judge.tokenize("an <image> of a dog")


def test_padded_table_of_words(judge, directory, tmp_path):
    """[DEC] is where the tokenizer has it, not the last row; without one in the tokenizer, it is the last."""
    path = shutil.copytree(directory, tmp_path / "padded")
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    name, head = "embeddings.word_embeddings.weight", "cls.predictions.decoder"
    tensors[name] = tensors[f"{head}.weight"] = np.pad(tensors[name], ((0, 5), (0, 0)))
    # So unlikely that they do not change the likelihood of the others.
    tensors[f"{head}.bias"] = np.pad(tensors[f"{head}.bias"], (0, 5), constant_values=-1e4)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    values = json.loads((path / "config.json").read_text())
    words = values["qformer_config"]["vocab_size"]
    edit_json(path / "config.json", qformer_config=values["qformer_config"] | {"vocab_size": words + 5})

    padded = referees.load_referee(spec(path, "itg"))
    assert padded.referee.dec_token_id == judge.referee.dec_token_id == words - 1
    image, scores = jnp.asarray(views()[0]), []
    for made in (judge, padded, dataclasses.replace(padded, referee=padded.referee.replace(dec_token_id=words + 4))):
        text = encode(made.referee, made.tokenize(PROMPT))
        scores.append(float(scores_of(made.referee, image, text)["caption_log_likelihood"]))
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert abs(scores[0] - scores[2]) > 1e-3

    network, preprocessing = padded.referee.network, {"image_mean": (0, 0, 0), "image_std": (1, 1, 1)}
    assert referees.blip2.from_checkpoint(network, preprocessing).dec_token_id == words + 4
    with pytest.raises(ValueError, match=f"id of \\[DEC\\] is 99, but this BLIP-2 has {words + 5} words"):
        referees.blip2.from_checkpoint(network, preprocessing, dec_token_id=99)


def test_untied_language_head_is_refused(directory, tmp_path):
    path = shutil.copytree(directory, tmp_path / "untied")
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = tensors["cls.predictions.decoder.weight"] + 1
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    with pytest.raises(load.WeightsError, match=r"decoder\.weight differs from embeddings\.word_embeddings\.weight"):
        load.load("blip2", path)
