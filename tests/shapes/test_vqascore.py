"""The recipe of the shapes world's VQAScore: its questions are true or false as they say, and it is asked as it was taught."""

import functools
import shutil

import numpy as np
import pytest

from referee_jax import config, referees
from referee_jax.referees import questions
from referee_jax.shapes import batches, tokens, world
from referee_jax.weights import hub, load
from tests.conftest import relative_l2
from tests.lazy import recipes_vqascore, torch, train
from tests.referees import compiled

RED, BLUE = world.Object("circle", "red", x=16), world.Object("square", "blue", x=48)
SCENE = world.Scene((RED, BLUE))


@pytest.mark.parametrize(
    ("text", "exactly", "contains"),
    [
        ("a red circle and a blue square", True, True),
        ("a red circle on the left of a blue square", True, True),
        ("a blue square on the left of a red circle", False, False),
        ("a blue circle and a red square", False, False),
        ("a red circle", False, True),
        ("two red circles", False, False),
    ],
)
def test_answers(text, exactly, contains):
    prompt = world.parse(text)
    assert [batches.answer(form, prompt, SCENE) for form in batches.FORMS] == [exactly, contains]


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("a red circle on the left of a striped blue square", {"striped square": False}),
        ("a blue square on the left of a green circle", {"green circle": False, "square to the left of circle": False}),
        ("two red circles", {"two circles": False}),
        ("a red circle above a red star", {"star": False, "red star": False, "circle above star": False}),
        ("a red circle and a blue circle", {"blue circle": False}),
    ],
)
def test_answers_to_atoms(text, answers):
    """All but these are true of SCENE."""
    atoms = questions.atoms(text)
    assert answers.keys() <= {atom.text for atom in atoms}
    assert [batches.is_true(atom, SCENE) for atom in atoms] == [answers.get(atom.text, True) for atom in atoms]


def test_mirrors_and_turned_texts_make_a_relation_false():
    prompt = world.parse("a red circle on the left of a blue square")
    mirrored = batches.mirrored(SCENE, "x")
    asked = [(prompt, SCENE), (batches.turned(prompt), mirrored), (prompt, mirrored), (batches.turned(prompt), SCENE)]
    assert [batches.answer("exactly", text, scene) for text, scene in asked] == [True, True, False, False]
    assert [item.x for item in mirrored.objects] == [48, 16]


def test_centres_are_where_a_view_shows_the_objects():
    """At the nouns, behind a word of the template; turned as the picture is."""
    prompt = world.parse("a red circle and a green square")
    where = batches.centres(prompt, SCENE, None)
    np.testing.assert_allclose(where[3], [-0.5, 0])
    assert np.isnan(where[[0, 1, 2, 4, 5, 6, 7]]).all()  # there is no green square
    turn = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 4.0]])
    picture = world.draw(world.Scene((RED,)), view=turn)[0]
    rows, columns = np.nonzero(picture[..., 0] - picture[..., 2] > 0.5)
    seen = (np.array([columns.mean(), rows.mean()]) + 0.5) / 32 - 1
    np.testing.assert_allclose(batches.centres(prompt, world.Scene((RED,)), turn)[3], seen, atol=0.03)


def test_a_batch():
    batch = batches.vqascore_batch(np.random.default_rng(0), 6)
    words = {i: word for word, i in tokens.T5_WORDS.items()}
    texts = [" ".join(words[i] for i in row if i > 1) for row in batch["question_ids"]]
    captions = [text for text in texts if not text.endswith("?")]
    assert {text.split()[0] for text in captions} == set(batches.FORMS)
    assert not any(thing.is_unseen() for text in captions for thing in world.parse(text.partition(" ")[2]).things)
    assert len(texts) - len(captions) == 24 and batch["answers"][len(captions) :].mean() > 0.4
    assert 0.2 < batch["answers"].mean() < 0.5 and len(batch["image"]) > batch["pictures"].max() >= 12
    assert set(np.unique(batch["facts"])) == {-1, 0, 1}
    # All words of what is answered with yes are true.
    assert not (batch["facts"][batch["answers"]] == 0).any()
    assert (np.abs(batch["centres"][np.isfinite(batch["centres"])]) < 1.3).all()


def test_what_is_left_out(tmp_path):
    """A head without weight, data without mirrored scenes; a name that is none is told."""
    recipe = recipes_vqascore.Vqascore(tmp_path, without=("tower", "where"))
    assert recipe.weights == {"what": 3.0, "told": 3.0, "where": 0.0}
    draw = functools.partial(batches.vqascore_batch, size=6)
    whole, plain = (draw(np.random.default_rng(0), **x) for x in ({}, {"mirror": False, "crowd": False}))
    assert len(plain["image"]) == 12 < len(whole["image"])
    for name, part in (("vqascore", "where,what"), ("clip", "where")):
        with pytest.raises(ValueError, match=f"{name} has no {part} to leave out"):
            train.train(name, steps=1, seed=0, out=tmp_path, workdir=tmp_path, without=[part])


def test_it_is_asked_as_it_was_taught(tmp_path):
    """Three steps of training, saved in half precision, and asked as the referee asks: the same losses."""
    shutil.copytree(hub.ASSETS / "clip", tmp_path / "clip")
    figures = train.train("vqascore", steps=3, seed=0, out=tmp_path, workdir=tmp_path / "work", workers=0)
    assert 0 < figures["answer"] < 3
    recipe = recipes_vqascore.Vqascore(tmp_path)
    state = torch.load(tmp_path / "work" / "vqascore.pt", weights_only=True)["average"]
    recipe.trained.load_state_dict(state)
    recipe.trained.half().float()
    spec = config.RefereeSpec(name="vqascore", checkpoint=str(tmp_path / "vqascore"), losses={"vqa": 1.0})
    judge = referees.load_referee(spec)
    texts = ("a red circle and a blue square", "two striped stars")
    picture = world.draw(SCENE)[0].astype(np.float32)
    ids = torch.from_numpy(tokens.t5_words([f"exactly {text}" for text in texts])).long()
    with torch.no_grad():
        pixels = torch.from_numpy(2 * picture.transpose(2, 0, 1)[None] - 1)
        tower = recipe.trained["vision_tower"](pixels, output_hidden_states=True)
        logits, _ = recipe.answer(tower.hidden_states[-1][:, 1:].expand(2, -1, -1), ids[:, :12])
    words = logits.log_softmax(-1)
    expected = -(words[:, 0, recipes_vqascore.YES] + words[:, 1, recipes_vqascore.END]) / 2
    for text, loss in zip(texts, expected, strict=True):
        read = compiled.encode(judge.referee, judge.tokenize(text))
        assert relative_l2(compiled.views_losses(judge.referee, picture[None], read)["vqa"], loss[None]) < 1e-4
    network = load.load("clip_t5", tmp_path / "vqascore")
    assert network.config.tower.num_hidden_layers == 3
