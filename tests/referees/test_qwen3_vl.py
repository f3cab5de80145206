"""Qwen3-VL as a referee against transformers' class and processor: conversation, losses, image gradients, scores, settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from referee_jax import config, prompts, referees
from referee_jax.engine import builders
from referee_jax.referees import qwen3_vl, resizing
from tests.conftest import picture, relative_l2
from tests.lazy import functional, torch, transformers
from tests.oracles import networks
from tests.referees import compiled

PROMPTS = ("a red circle and a blue square", "a green square", "red")
YES = ("Yes", "yes", " Yes", " yes")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return networks.save_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(scope="module")
def judge(directory):
    return load(directory)


@pytest.fixture(scope="module")
def oracle(directory):
    return transformers.Qwen3VLForConditionalGeneration.from_pretrained(directory).eval().requires_grad_(False)


def load(directory, **changes):
    spec = dict(name="qwen3_vl", checkpoint=str(directory), losses={"vqa": 1.0})
    return referees.load_referee(config.RefereeSpec(**spec | changes))


def pixels(height, width):
    return PIL.Image.fromarray(np.round(255 * picture(1, height, width)).astype(np.uint8))


def asked(image, prompt):
    """What the processor makes of a picture and GenEval 2's question."""
    question = f'Does this image show "{prompt}"? Answer the question with Yes or No.'
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    options = dict(tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return networks.qwen_processor().apply_chat_template([{"role": "user", "content": content}], **options)


def yes(oracle, read):
    """Probability of an answer that begins with a yes, as GenEval 2 sums it."""
    probabilities = oracle(**read).logits[0, -1].softmax(-1)
    return sum(probabilities[networks.qwen_tokenizer().encode(word)[0]] for word in YES)


# Several prompts as the questions of one.
def questions(judge, texts=PROMPTS):
    return jax.tree.map(lambda *x: np.concatenate(x), *map(judge.tokenize, texts))


encode = jax.jit(lambda referee, tokens: referee.encode(tokens))


@jax.jit
def loss_and_gradient(referee, text, views):
    losses, pullback = jax.vjp(lambda v: referee.views_losses(v, text)["vqa"], views)
    return losses, pullback(jnp.full(len(views), 1 / len(views)))[0]


def test_the_conversation_is_the_processors(judge):
    """Tokens before and after those of the picture, without what pads the questions."""
    tokens = questions(judge)
    text = jax.tree.map(np.asarray, encode(judge.referee, tokens))
    table = np.asarray(judge.referee.network.model.language_model.embed_tokens.embedding[...])
    for n, prompt in enumerate(PROMPTS):
        ids = asked(pixels(40, 40), prompt)["input_ids"][0].numpy()
        image = ids == judge.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        before, after = np.split(ids[~image], [np.argmax(image)])
        np.testing.assert_array_equal(text["before"], table[before])
        assert text["last"][n] == len(after) - 1
        np.testing.assert_array_equal(text["questions"][n, : len(after)], table[after])
    assert tokens["input_ids"].shape == (3, qwen3_vl.TOKENS) and text["real"].all()


def test_losses(judge, oracle):
    """The mean of -log p over questions in one pass, and its gradient, are those of torch's pass for each question."""
    side = judge.referee.image_size
    views = np.random.default_rng(0).uniform(size=(2, side, side, 3)).astype(np.float32)
    # A question without tokens is not asked.
    tokens = jax.tree.map(lambda x: np.pad(x, ((0, 1), (0, 0))), questions(judge))
    losses, gradient = loss_and_gradient(judge.referee, encode(judge.referee, tokens), views)
    x = torch.from_numpy(views).requires_grad_()
    wanted = []
    for view in x:
        reads = [asked(pixels(side, side), prompt) for prompt in PROMPTS]
        for read in reads:
            read["pixel_values"] = flattened((view - 0.5) / 0.5)
        wanted.append(-torch.stack([yes(oracle, read).log() for read in reads]).mean())
    torch.stack(wanted).mean().backward()
    wanted = torch.stack(wanted).detach().numpy()
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    print(losses, relative_l2(gradient, x.grad.numpy()))
    assert relative_l2(gradient, x.grad.numpy()) < 1e-4
    # Each question counts.
    alone = [loss_and_gradient(judge.referee, encode(judge.referee, judge.tokenize(p)), views)[0] for p in PROMPTS]
    np.testing.assert_allclose(np.mean(alone, 0), losses, rtol=1e-5)
    assert np.ptp(alone, axis=0).min() > 1e-2 and np.ptp(losses) > 1e-3


def flattened(view):
    """`[S, S, 3]` as the processor hands it over, for patches of 4 in blocks of 2 x 2, differentiable."""
    n = len(view) // 8
    x = view.reshape(n, 2, 4, n, 2, 4, 3).permute(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    return x.expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(4 * n * n, -1)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (30, 50), (12, 9), (100, 61), (200, 61), (16, 300)])
def test_pictures_are_read_as_by_the_processor(judge, height, width):
    """Bit by bit: all of them, in their ratio, within the limits of the number of pixels."""
    image = pixels(height, width)
    read = networks.qwen_image_processor()(image, return_tensors="pt")
    views = [judge.preprocess(image)]
    if height <= 2 * width:  # or Pillow takes columns first, see referees.resizing
        views.append(np.asarray(compiled.fit(judge.referee, jnp.asarray(np.asarray(image) / np.float32(255)))))
    for view in views:
        _, rows, columns = read["image_grid_thw"][0].tolist()
        assert view.shape == (4 * rows, 4 * columns, 3)
        patches = read["pixel_values"].numpy().reshape(rows // 2, columns // 2, 2, 2, 3, 2, 4, 4)
        seen = patches[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4).reshape(view.shape)
        np.testing.assert_allclose(255 * view, 127.5 * (seen + 1), atol=1e-2)


def test_the_gradient_goes_through_the_resizing(judge):
    """As through torch's bicubic resizing: the rounding to 8 bits stops nothing."""
    image = 0.2 + 0.6 * picture(1, 61, 83)  # far from where Pillow clips
    cotangent = (
        np.random.default_rng(0).normal(size=compiled.fit(judge.referee, jnp.asarray(image)).shape).astype(np.float32)
    )
    gradient = jax.grad(lambda x: (judge.referee.fit(x) * cotangent).sum())(jnp.asarray(image))
    x = torch.from_numpy(image).requires_grad_()
    size = cotangent.shape[:2]
    resized = functional.interpolate(x.permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)[0]
    (resized.permute(1, 2, 0) * torch.from_numpy(cotangent)).sum().backward()
    assert size != image.shape[:2] and relative_l2(gradient, x.grad.numpy()) < 1e-4


def test_scores(judge, oracle):
    """The same as of torch's class behind its processor."""
    images = [pixels(40, 40), pixels(61, 40)]
    scores = judge.score(images, list(PROMPTS[:2]))
    for image, row in zip(images, scores, strict=True):
        for prompt, score in zip(PROMPTS, row, strict=False):
            assert score == {"vqa_probability": pytest.approx(yes(oracle, asked(image, prompt)).item(), rel=1e-4)}
    values = [score["vqa_probability"] for row in scores for score in row]
    assert np.ptp(values) > 0.05 * np.mean(values)


@pytest.mark.parametrize("height, width", [(512, 512), (448, 448), (100, 200), (5000, 3000), (1000, 33)])
def test_sizes_are_those_of_smart_resize(height, width):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    whole = resizing.whole({}, 32, side=448, least=qwen3_vl.LEAST, most=qwen3_vl.MOST)
    assert whole.size(height, width) == smart_resize(height, width, 32, qwen3_vl.LEAST, qwen3_vl.MOST)
    assert whole.side == 448 and whole.at(512) is whole


def test_a_prompt_may_not_hold_marks_of_the_conversation(judge):
    with pytest.raises(prompts.Unreadable) as error:
        judge.read("a red <|im_end|> circle")
    assert error.value.reason == "it holds <|im_end|>, which qwen3_vl takes for a mark of the conversation"
    assert judge.read("a red <circle>|")["mask"].any()


def test_image_size(directory, judge):
    assert judge.referee.image_size == 40  # of 448, what the checkpoint's limit leaves
    other = load(directory, image_size=16)
    assert other.referee.image_size == other.referee.fitting.side == 16
    with pytest.raises(config.ConfigError, match="referee qwen3_vl: image_size = 20 is not a multiple of 8"):
        load(directory, image_size=20)


def test_preprocessing_that_does_not_fit_the_network(judge):
    build = lambda **changes: qwen3_vl.from_checkpoint(
        judge.referee.network, networks.qwen_image_processor().to_dict() | changes, judge.tokenizer
    )
    assert build() == judge.referee
    for changes, message in (
        ({"patch_size": 14}, "patch_size=14, but the network has 4"),
        ({"merge_size": 1}, "merge_size=1, but the network has 2"),
        ({"resample": 4}, "resample=4 is not implemented"),
    ):
        with pytest.raises(ValueError, match=f"preprocessor_config.json: {message}"):
            build(**changes)
    assert build(max_pixels=24**2).image_size == 24
    assert build(size={"shortest_edge": 64, "longest_edge": 32**2}).fitting.most == 32**2


def test_tokenizers_that_are_refused(judge):
    qwen3_vl.check(judge.tokenizer)
    thinking = networks.qwen_tokenizer()
    thinking.chat_template = thinking.chat_template.replace("assistant\n", "assistant\n<think>\n")
    for tokenizer, message in (
        (networks.tokenizer(), r"the tokenizer has no <\|im_start\|>; is it Qwen3-VL's\?"),
        (thinking, r"an answer begins behind '.*<think>\\n', not .* before it answers; take the Instruct checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            qwen3_vl.check(tokenizer)


def test_views_of_its_own(directory):
    """None of the common augmentations, unless it asks for some itself; what moves things is refused."""
    settings = config.load("configs/qwen3_vl.py")
    (spec,) = settings.referees
    settings = dataclasses.replace(settings, views=dataclasses.replace(settings.views, augmentations=("Hf", "Af")))
    assert builders.make_view_plan(settings, spec).augmentations == ()
    other = dataclasses.replace(spec, augmentations=("Ji",))
    assert builders.make_view_plan(settings, other).augmentations == ("Ji",)
    clip = config.RefereeSpec(augmentations=("Ji",)), config.RefereeSpec()
    assert [builders.make_view_plan(settings, x).augmentations for x in clip] == [("Ji",), ("Hf", "Af")]
    for names in (("Hf",), ("Ji", "Cr"), ("Re",)):
        with pytest.raises(config.ConfigError) as error:
            config.override(settings, {"referees": (dataclasses.replace(spec, augmentations=names),)})
        assert str(error.value) == (
            f"referees[0].augmentations = {names!r} is not possible: it must be without Af, Er, Hf, Ro, Et, Ts, Cr, Re: "
            'qwen3_vl is asked where things are, and these cut things off or turn "left of" round'
        )
    with pytest.raises(config.ConfigError, match=r"referees\[0\].augmentations = \('Xy',\) is not possible"):
        config.override(settings, {"referees": (config.RefereeSpec(augmentations=("Xy",)),)})


def test_tokenizer_and_network_are_compared(tmp_path):
    """Qwen's table has hundreds of rows to spare, but not any number."""
    networks.save_qwen3_vl(tmp_path, networks.qwen3_vl(text={"vocab_size": len(networks.qwen_tokenizer()) + 267}))
    assert load(tmp_path).length == qwen3_vl.TOKENS
    networks.save_qwen3_vl(tmp_path, networks.qwen3_vl(text={"vocab_size": len(networks.qwen_tokenizer()) + 1000}))
    with pytest.raises(ValueError, match="the tokenizer has 351 words, the network 1351"):
        load(tmp_path)
