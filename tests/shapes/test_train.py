"""The trainer at a few steps: it learns, goes on where it stopped, and writes what the package loads."""

import numpy as np
import pytest
import torch

from referee_jax.shapes import tokens, train, world
from referee_jax.weights import load
from tests.conftest import relative_l2


def test_tokenizer_is_the_one_of_training(tmp_path):
    """What is saved for users and what training encodes with agree on every caption of the world."""
    rng = np.random.default_rng(0)
    texts = [""]
    for category in world.CATEGORIES:
        for _ in range(40):
            texts.append(world.describe(rng, world.sample_scene(rng, category), category).text)
    tokens.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    tokenizer = load.load_tokenizer(tmp_path)
    ids = tokenizer(texts, padding="max_length", max_length=tokens.LENGTH)["input_ids"]
    np.testing.assert_array_equal(ids, tokens.encode(texts))
    assert {len(tokenizer.tokenize(word)) for word in tokens.WORDS} == {1}
    assert tokenizer.tokenize("Elk") == ["e", "l", "k</w>"]


def test_batches_say_what_they_show():
    rng = np.random.default_rng(1)
    batch = train.pair_batch(rng, 6)
    assert batch["image"].shape == (12 + 3, 3, 64, 64) and batch["image"].dtype == np.float32
    assert batch["input_ids"].shape == (12 * (1 + train.DISTRACTORS), tokens.LENGTH)
    assert batch["shown"].shape == (12 + 3, 64, train.LABELS)
    words = {i: piece.removesuffix("</w>") for piece, i in tokens.VOCABULARY.items()}
    for row, shown in zip(batch["input_ids"][:12], batch["shown"][:12], strict=True):
        said = {words[i] for i in row} & set(world.COLOURS)
        seen = {train.KINDS[k] for k in np.flatnonzero(shown.any(0))} & set(world.COLOURS)
        assert said <= seen


def test_captions_never_name_unseen_pairs():
    """Not as true captions, not as distractors, not as Stable Diffusion's exchanged ones."""
    pieces = {i: piece.removesuffix("</w>") for piece, i in tokens.VOCABULARY.items()}
    rng, swapped = np.random.default_rng(2), 0
    for batch in (train.pair_batch(rng, 40), train.unet_batch(rng, 200)):
        for row in batch["input_ids"]:
            text = " ".join(pieces[i] for i in row if i not in (tokens.START, tokens.END))
            if text:
                assert not any(thing.is_unseen() for thing in world.parse(text).things), text
                swapped += 1
    assert swapped > 300


def test_unet_sees_what_captions_leave_out(monkeypatch):
    """Unseen pairs are drawn about as often as others; of such a scene the caption says less than there is."""
    scenes = []
    draw = train.drawn
    monkeypatch.setattr(train, "drawn", lambda batch: scenes.extend(batch) or draw(batch))
    train.unet_batch(np.random.default_rng(3), 400)
    unseen = [any(item.is_unseen() for item in scene.objects) for scene in scenes]
    assert 0.15 < np.mean(unseen) < 0.35
    assert world.Thing("circle", "green", "striped").unsaid() == world.Thing("circle", None, "striped")
    assert world.Thing("ring", "red", "striped").unsaid() == world.Thing("ring", "red")
    assert world.Thing("ring", "red").unsaid() == world.Thing("ring", "red")


def trained(name: str, out, steps: int, workdir) -> dict[str, np.ndarray]:
    train.train(name, steps=steps, seed=3, out=out, workdir=workdir)
    state = torch.load(workdir / f"{name}.pt", weights_only=True)
    return {key: value.float().numpy() for key, value in state["trained"].items()}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The autoencoder and CLIP of three steps each."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("networks")
    for name in ("vae", "clip"):
        train.train(name, steps=3, seed=0, out=out, workdir=out / "work")
    return out


def test_resume_is_the_same_training(out, tmp_path, monkeypatch):
    """Two steps, then two more in a second call, equal four in one; the schedule's length is what is asked for last."""
    whole = trained("vae", out, 4, tmp_path / "whole")
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        interrupt_after(monkeypatch, 3, lambda: trained("vae", out, 4, tmp_path / "parts"))
    parts = trained("vae", out, 4, tmp_path / "parts")
    assert max(relative_l2(parts[key], whole[key]) for key in whole if np.linalg.norm(whole[key])) < 1e-6


def interrupt_after(monkeypatch, steps: int, run) -> None:
    """Runs with a Ctrl-C in the loss of step number `steps`."""
    forward, calls = train.Autoencoder.forward, []

    def failing(self, batch):
        calls.append(1)
        if len(calls) == steps:
            raise KeyboardInterrupt
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train.Autoencoder, "forward", failing)
        run()


def test_unet_makes_a_loadable_checkpoint(out):
    figures = train.train("unet", steps=3, seed=0, out=out, workdir=out / "work")
    assert 0.5 < figures["error"] < 2  # an untrained network predicts nothing of unit noise
    parts = load.load_stable_diffusion(out / "stable-diffusion", encoder=True)
    assert parts.prediction_type == "epsilon" and parts.alphas_cumprod.shape == (1000,)
    assert parts.unet.config.block_out_channels == (64, 128)
    network = load.load_clip(out / "clip")
    assert network.config.vision_config.image_size == world.SIZE
