"""Referees that are asked a prompt's atoms: losses, gradients, scores and reasons, beside each question asked alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax import config, prompts, referees
from referee_jax.referees import questions
from tests.conftest import relative_l2
from tests.referees.test_contract import DIRECTORIES

PROMPT = "a red circle and two blue squares"
ASKED = ["Is there a circle?", "Is the circle red?", "Are there exactly two squares?", "Are the squares blue?"]
# A template that asks the text itself, as an atom is asked.
ALONE = {"blip_vqa": "{}?", "qwen3_vl": "{} Answer in one word.", "vqascore": "{}"}
SCORES = {"blip_vqa": "vqa_probability", "qwen3_vl": "vqa_probability", "vqascore": "vqascore"}


@pytest.fixture(scope="module", params=config.ASKED)
def load(request, tmp_path_factory):
    DIRECTORIES[request.param](path := tmp_path_factory.mktemp("asked"))
    spec = {"name": request.param, "checkpoint": str(path), "losses": {"vqa": 1.0}}
    return lambda **changes: referees.load_referee(config.RefereeSpec(**spec | changes))


@pytest.fixture(scope="module")
def judge(load):
    return load(questions=6)


@pytest.fixture(scope="module")
def views(judge):
    size = judge.referee.image_size
    return np.random.default_rng(0).uniform(size=(2, size, size, 3)).astype(np.float32)


@jax.jit
def loss_and_gradient(referee, tokens, views):
    text = referee.encode(tokens)
    losses, pullback = jax.vjp(lambda v: referee.views_losses(v, text)["vqa"], views)
    return losses, pullback(jnp.full(len(views), 1 / len(views)))[0], referee.scores(views[0], text)


def test_a_prompt_is_its_atoms(load, judge, views):
    """The mean of -log p over questions, two of the six asked for nothing, and what each question gives alone."""
    assert [atom.question for atom in judge.atoms(PROMPT)] == ASKED
    alone = load(template=ALONE[judge.spec.name])
    texts = [text.rstrip("?") if judge.spec.name == "blip_vqa" else text for text in ASKED]
    each = [loss_and_gradient(alone.referee, alone.tokenize(text), views) for text in texts]
    losses, gradient, scores = loss_and_gradient(judge.referee, judge.tokenize(PROMPT), views)
    np.testing.assert_allclose(losses, np.mean([x for x, _, _ in each], axis=0), rtol=2e-5)
    assert relative_l2(gradient, np.mean([x for _, x, _ in each], axis=0)) < 1e-4
    assert np.ptp([x for x, _, _ in each], axis=0).min() > 1e-3
    name = SCORES[judge.spec.name]
    np.testing.assert_allclose(scores[name], np.exp(-losses[0]), rtol=1e-5)
    singles = [scores[f"question_{n}"] for n in range(6)]
    np.testing.assert_allclose(singles[:4], [x[name] for _, _, x in each], rtol=1e-4)
    assert np.isnan(singles[4:]).all()
    row = judge.score([np.zeros((40, 40, 3), np.uint8)], [PROMPT])[0][0]
    assert row.keys() == {name, *(f"question_{n}" for n in range(4))} and not np.isnan(list(row.values())).any()


def test_answers_with_their_questions(judge):
    scores = {"a": 1.0, **{f"held_out_0/question_{n}": n / 8 for n in range(6)}}
    rows = judge.answered(scores, PROMPT, prefix="held_out_0/")
    assert scores == {"a": 1.0}
    assert rows[2] == {"question": ASKED[2], "kind": "number", "answer": "yes", "probability": 0.25}
    assert [row["question"] for row in rows] == ASKED


def test_the_users_questions_are_asked_instead(judge):
    given = questions.given([["How many squares are in the image?", "two"], "Is it round?"], ["count", "shape"])
    tokens, plain = judge.tokenize(PROMPT, given), judge.tokenize(PROMPT)
    assert jax.tree.map(np.shape, tokens) == jax.tree.map(np.shape, plain)
    if judge.spec.name == "qwen3_vl":
        ids = lambda *words: sorted({judge.tokenizer(x, add_special_tokens=False)["input_ids"][0] for x in words})
        assert tokens["mask"].any(-1).tolist() == [True, True] + [False] * 4
        rows = [[x for x in row if x >= 0] for row in tokens["answers"].tolist()]
        assert rows[:2] == [ids("two", "Two", "2", " two", " Two", " 2"), ids("yes", "Yes", " yes", " Yes")]
        assert judge.texts(PROMPT, given)[0] == "How many squares are in the image? Answer in one word."
    else:
        assert tokens["real"].tolist() == [True, True] + [False] * 4
        assert "xactly two squares?" in judge.texts(PROMPT, given)[0]
        with pytest.raises(prompts.Unreadable, match="the answer to 'What is it.' is 'red', and it answers yes or no"):
            judge.tokenize(PROMPT, questions.given([["What is it?", "red"]]))


def test_too_many_and_none(load, judge):
    few = load(questions=3)
    with pytest.raises(prompts.Unreadable, match=f"4 questions, {few.spec.name} is asked 3 "):
        few.tokenize(PROMPT)
    assert len(load(questions=3, truncate=True).atoms(PROMPT)) == 3
    assert judge.atoms("of it") == () and jax.tree.map(np.shape, judge.tokenize("of it")) == jax.tree.map(
        np.shape, judge.tokenize(PROMPT)
    )
    whole = judge.texts("of it", ())
    assert whole == load().texts("of it", ()) and len(whole) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "clip", "losses": {"cosine": 1.0}}, "questions = 4 .* clip answers none"),
        ({"name": "vqascore", "losses": {"versus": 1.0}, "near": 1}, "without the versus loss"),
    ],
)
def test_settings(changes, message):
    with pytest.raises(config.ConfigError, match=message):
        config.from_config({"referees": [{"questions": 4, **changes}]})
