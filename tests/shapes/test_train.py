"""The trainer at a few steps: it learns, goes on where it stopped, and writes what the package loads."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from referee_jax import config, referees
from referee_jax.engine import builders
from referee_jax.method.ways import ddim
from referee_jax.models.diffusion.text import Text
from referee_jax.shapes import batches, sampling, tokens, world
from referee_jax.weights import generators, hub, load
from tests.conftest import cosine, relative_l2
from tests.lazy import recipes_generator, recipes_referees, torch, train, transformers


def test_tokenizer_is_the_one_of_training(tmp_path):
    """What is saved for users and what training encodes with agree on every caption of the world."""
    rng = np.random.default_rng(0)
    texts = [""]
    for category in world.CATEGORIES:
        for _ in range(40):
            texts.append(sampling.describe(rng, sampling.sample_scene(rng, category), category).text)
    tokens.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    tokenizer = load.load_tokenizer(tmp_path)
    ids = tokenizer(texts, padding="max_length", max_length=tokens.LENGTH)["input_ids"]
    np.testing.assert_array_equal(ids, tokens.encode(texts))
    assert {len(tokenizer.tokenize(word)) for word in tokens.WORDS} == {1}
    assert tokenizer.tokenize("Elk") == ["e", "l", "k</w>"]


def test_wordpieces_are_the_ones_of_training(tmp_path):
    """So too for BERT's tokenizer, questions and the beginning of captions included."""
    tokens.save_wordpieces(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    tokenizer = load.load_tokenizer(tmp_path)
    texts = [f"{tokens.BEGINNING} two red stars", "a striped ring above a pink cross ?", ""]
    written = [text.replace(" ?", "?") for text in texts]
    read = tokenizer(written, padding="max_length", max_length=tokens.LENGTH)
    np.testing.assert_array_equal(read["input_ids"], tokens.wordpieces(texts))
    assert tokenizer.convert_ids_to_tokens(tokens.wordpieces(["yes"], first="[DEC]")[0, :3].tolist()) == [
        "[DEC]", "yes", "[SEP]",
    ]  # fmt: skip
    assert tokenizer.bos_token_id == tokens.WORDPIECES["[DEC]"] and tokenizer.model_max_length == tokens.LENGTH
    assert {len(tokenizer.tokenize(word)) for word in (*tokens.WORDS, "yes", "no")} == {1}
    assert tokenizer.tokenize("elk") == ["e", "##l", "##k"]


def test_batches_say_what_they_show():
    rng = np.random.default_rng(1)
    batch = batches.pair_batch(rng, 6)
    assert batch["image"].shape == (12 + 3, 3, 64, 64) and batch["image"].dtype == np.float32
    assert batch["input_ids"].shape == (12 * (1 + batches.DISTRACTORS), tokens.LENGTH)
    assert batch["shown"].shape == (12 + 3, 64, len(batches.KINDS))
    words = {i: piece.removesuffix("</w>") for piece, i in tokens.VOCABULARY.items()}
    for row, shown in zip(batch["input_ids"][:12], batch["shown"][:12], strict=True):
        said = {words[i] for i in row} & set(world.COLOURS)
        assert {batches.KINDS[k] for k in np.flatnonzero(shown.any(0))} & set(world.SHAPES)
        seen = {batches.KINDS[k] for k in np.flatnonzero(shown.any(0))} & set(world.COLOURS)
        assert said <= seen


def test_captions_never_name_unseen_pairs():
    """Not as true captions, not as distractors, not as Stable Diffusion's exchanged ones."""
    pieces = {i: piece.removesuffix("</w>") for piece, i in tokens.VOCABULARY.items()}
    rng, swapped = np.random.default_rng(2), 0
    for batch in (batches.pair_batch(rng, 40), batches.unet_batch(rng, 200)):
        for row in batch["input_ids"]:
            text = " ".join(pieces[i] for i in row if i not in (tokens.START, tokens.END))
            if text:
                assert not any(thing.is_unseen() for thing in world.parse(text).things), text
                swapped += 1
    assert swapped > 300


def captions(batch, count: int) -> list[world.Prompt]:
    pieces = {i: piece.removesuffix("</w>") for piece, i in tokens.VOCABULARY.items()}
    rows = [[pieces[i] for i in row if i not in (tokens.START, tokens.END)] for row in batch["input_ids"][:count]]
    return [world.parse(" ".join(row)) for row in rows]


def test_noise_exchanges_attributes_of_captions():
    """With all noise every caption of two things is of the exchanged ones, unless they name an unseen pair."""
    changed = 0
    for seed in range(60):
        kept, said = (captions(batches.pair_batch(np.random.default_rng(seed), 1, noise=x), 1)[0] for x in (0.0, 1.0))
        exchanged = kept.things
        if len(kept.things) == 2:
            a, b = kept.things
            exchanged = (dataclasses.replace(a, shape=b.shape), dataclasses.replace(b, shape=a.shape))
        if any(thing.is_unseen() for thing in exchanged):
            exchanged = kept.things
        assert said == dataclasses.replace(kept, things=exchanged)
        changed += said != kept
    assert changed > 20


def test_captions_may_name_unseen_pairs():
    prompts = captions(batches.pair_batch(np.random.default_rng(8), 60, named=True), 120)
    assert 0.1 < np.mean([any(thing.is_unseen() for thing in prompt.things) for prompt in prompts]) < 0.5


def test_an_epoch_comes_again():
    """Less data: after so many batches the first one is drawn again."""
    steps = train.Steps(lambda rng: batches.vae_batch(rng, 1), seed=2, epoch=3)
    assert torch.equal(steps[0]["image"], steps[3]["image"]) and torch.equal(steps[2]["image"], steps[5]["image"])
    assert not torch.equal(steps[0]["image"], steps[1]["image"])


def test_words_say_what_is_so():
    """By hand: shapes of things, the last word of a relation where both are there, numbers."""
    red, blue = world.Object("circle", "red", x=16), world.Object("square", "blue", x=48)
    scene, three = world.Scene((red, blue)), world.Scene((red, red, red))
    said = {
        "a red circle and a blue square": (scene, {"circle": 1, "square": 1}),
        "a blue circle and a red square": (scene, {"circle": 0, "square": 0}),
        "a circle on the left of a blue square": (scene, {"circle": 1, "of": 1, "square": 1}),
        "a blue square above a red circle": (scene, {"square": 1, "above": 0, "circle": 1}),
        "a red circle below a pink star": (scene, {"circle": 1, "star": 0}),
        "two red circles": (three, {"two": 0, "circles": 1}),
        "three red circles": (three, {"three": 1, "circles": 1}),
    }
    pieces = {i: piece for piece, i in tokens.WORDPIECES.items()}
    for text, (shown, expected) in said.items():
        facts = batches.facts(world.parse(text), shown)
        words = [pieces[i] for i in tokens.wordpieces([text])[0]]
        assert {words[i]: facts[i] for i in np.flatnonzero(facts >= 0)} == expected, text


def test_first_distractors_exchange_attributes():
    """All of them where that makes a false caption that names no unseen pair; none are true."""
    captioned = batches.caption(np.random.default_rng(9), 30, noise=0.0, named=False, swaps=1.0)
    exchanged = 0
    for own, (near, _), facts in zip(captioned.prompts, captioned.near, batches.true_words(captioned), strict=True):
        assert not any(thing.is_unseen() for thing in near.things)
        assert (facts[0] != 0).all()
        if len(own.things) == 2:
            things = {thing.shape for thing in own.things}, {thing.shape for thing in near.things}
            exchanged += things[0] == things[1] and near.relation == own.relation and (facts[2] == 0).any()
    assert exchanged > 20


def test_questions_ask_what_is_there():
    """About as many are true as false; half of those about two things name one, and of a false caption one that is missing."""
    rng = np.random.default_rng(10)
    captioned = batches.caption(rng, 60, noise=0.0, named=False)
    asked = batches.questions(rng, captioned)
    pieces = {i: piece for piece, i in tokens.WORDPIECES.items()}
    said = [[pieces[i] for i in row if i not in (tokens.WORDPIECES["[SEP]"], 0)] for row in asked["question_ids"]]
    assert all(row[-1] == "?" for row in said)
    parsed = [world.parse(" ".join(row[1:-1])) for row in said]
    pairs, shorter = 0, 0
    for i, prompt in enumerate(parsed):
        scene = captioned.scenes[i % 120]
        there = [any(map(thing.fits, scene.objects)) for thing in prompt.things]
        if prompt.count == 1 and not prompt.relation:
            assert asked["answers"][i] == all(there), (prompt.text, scene)
        if len(captioned.prompts[i % 120].things) == 2:
            pairs, shorter = pairs + 1, shorter + (len(prompt.things) == 1)
    assert asked["answers"][:120].all()
    assert 0.5 < asked["answers"].mean() < 0.65
    assert 0.35 < shorter / pairs < 0.65


def test_training_on_other_data(out, tmp_path):
    """The card says which; a checkpoint of other data is refused, and so is noise where there are no captions."""
    settings = dict(steps=1, seed=0, out=tmp_path, workdir=tmp_path / "work", workers=0)
    train.train("clip", **settings, noise=0.3, epoch=2)
    card = (tmp_path / "clip/README.md").read_text()
    assert "--network=clip --seed=0 --steps=1 --noise=0.3 --epoch=2" in card and "2 batches, again and again" in card
    with pytest.raises(ValueError, match=r"trained on data .*0\.3.*, not \{\}: choose another workdir"):
        train.train("clip", **settings)
    with pytest.raises(ValueError, match="what vae is trained on has no noise"):
        train.train("vae", **settings, noise=0.1)


def test_unet_sees_what_captions_leave_out(monkeypatch):
    """Unseen pairs are drawn about as often as others; of such a scene the caption says less than there is."""
    scenes = []
    draw = batches.drawn
    monkeypatch.setattr(batches, "drawn", lambda batch: scenes.extend(batch) or draw(batch))
    batches.unet_batch(np.random.default_rng(3), 400)
    unseen = [any(item.is_unseen() for item in scene.objects) for scene in scenes]
    assert 0.15 < np.mean(unseen) < 0.35
    assert world.Thing("circle", "green", "striped").unsaid() == world.Thing("circle", None, "striped")
    assert world.Thing("ring", "red", "striped").unsaid() == world.Thing("ring", "red")
    assert world.Thing("ring", "red").unsaid() == world.Thing("ring", "red")


def trained(name: str, out, steps: int, workdir, workers: int = 0) -> dict[str, np.ndarray]:
    train.train(name, steps=steps, seed=3, out=out, workdir=workdir, workers=workers)
    state = torch.load(workdir / f"{name}.pt", weights_only=True)
    return {key: value.float().numpy() for key, value in state["trained"].items()}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The autoencoder and CLIP of three steps each."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("networks")
    for name in ("vae", "clip"):
        train.train(name, steps=3, seed=0, out=out, workdir=out / "work", workers=0)
    return out


def test_resume_is_the_same_training(out, tmp_path, monkeypatch):
    """Two steps, with batches from another process, then two more in a second call equal four in one.

    The schedule's length is what is asked for last.
    """
    whole = trained("vae", out, 4, tmp_path / "whole")
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        interrupt_after(monkeypatch, 3, lambda: trained("vae", out, 4, tmp_path / "parts", workers=1))
    parts = trained("vae", out, 4, tmp_path / "parts")
    assert max(relative_l2(parts[key], whole[key]) for key in whole if np.linalg.norm(whole[key])) < 1e-6


def interrupt_after(monkeypatch, steps: int, run) -> None:
    """Runs with a Ctrl-C in the loss of step number `steps`."""
    forward, calls = recipes_generator.Autoencoder.forward, []

    def failing(self, batch):
        calls.append(1)
        if len(calls) == steps:
            raise KeyboardInterrupt
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(recipes_generator.Autoencoder, "forward", failing)
        run()


def test_unet_makes_a_loadable_checkpoint(out):
    figures = train.train("unet", steps=3, seed=0, out=out, workdir=out / "work", workers=0)
    assert 0.5 < figures["error"] < 2  # an untrained network predicts nothing of unit noise
    parts = generators.load_generator(out / "stable-diffusion")
    assert parts.schedule.prediction_type == "epsilon" and parts.schedule.alphas_cumprod().shape == (1000,)
    assert parts.denoiser.config.block_out_channels == (64, 128)
    network = load.load("clip", out / "clip")
    assert network.config.vision_config.image_size == world.SIZE


def test_a_unet_is_trained_on(tmp_path):
    """What it goes on from knows the noise already, behind its own text tower."""
    shutil.copytree(hub.ASSETS / "stable-diffusion" / "vae", tmp_path / "stable-diffusion" / "vae")
    options = dict(steps=1, seed=0, workdir=tmp_path / "work", workers=0, size=8)
    figures = train.train("unet", out=tmp_path, start=hub.ASSETS, **options)
    assert figures["error"] < 0.15  # 1 without
    towers = [load.load("clip_text", root / "stable-diffusion" / "text_encoder") for root in (tmp_path, hub.ASSETS)]
    assert jax.tree.all(jax.tree.map(np.array_equal, *map(nnx.state, towers)))
    with pytest.raises(ValueError, match="vae begins from random weights alone"):
        train.train("vae", out=tmp_path, start=hub.ASSETS, **options)


def test_the_generator_of_one_step(tmp_path, monkeypatch):
    """It learns from what our sampler makes of the same noise, and is a LoRA of the shapes world's U-Net."""
    for name in ("clip", "stable-diffusion"):
        shutil.copytree(hub.ASSETS / name, tmp_path / name)
    small = functools.partial(batches.prompt_batch, size=4)
    monkeypatch.setattr(recipes_generator.OneStep, "batch", staticmethod(functools.wraps(batches.prompt_batch)(small)))
    figures = train.train("one_step", steps=1, seed=0, out=tmp_path, workdir=tmp_path / "work", workers=0)
    assert 0.5 < figures["distance"] < 1.5  # before the first step it makes the mean of all pictures, of a spread of 1
    recipe, texts = recipes_generator.OneStep(tmp_path), ["a red circle", ""]
    states = recipe.text_encoder(torch.from_numpy(tokens.encode(texts))).last_hidden_state
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    levels, target = recipe.levels("cpu"), recipe.sampled(noise, states[:1])
    assert levels[0] == 999
    with torch.no_grad():
        for name, change in recipe.trained["unet"].named_parameters():
            if name.endswith(".up"):
                change.normal_(std=0.02)
        t = torch.tensor([999])
        at_once = recipe.clean(noise, t, recipe.trained["unet"](noise, t, states[:1]).sample)
    recipe.save(recipe.trained, tmp_path)
    saved = [(tmp_path / "one_step" / recipes_generator.LORA, 1.0)]
    cond, uncond = map(Text, states.numpy())
    ways = [
        ((), tuple(levels.tolist()), recipes_generator.GUIDANCE, target, 1e-3),
        (saved, (999,), 1.0, at_once, 1e-3),
        ([(f"shapes/one_step/{recipes_generator.LORA}", 1.0)], (999,), 1.0, target, 0.65),  # 0.82 without it
    ]
    for loras, timesteps, guidance, expected, tolerance in ways:
        prior = builders.make_prior(generators.load_generator("shapes/stable-diffusion", loras=loras))
        generate = jax.jit(functools.partial(ddim.generate, timesteps=timesteps))
        made = generate(prior, noise[0].permute(1, 2, 0).numpy(), cond=cond, uncond=uncond, guidance=guidance)
        assert relative_l2(made, expected[0].permute(1, 2, 0)) < tolerance


def test_relations_are_told_of_both_objects():
    """Patches of the object above say "above", those of the other "below", and nobody does in a crowd."""
    batch = batches.pair_batch(np.random.default_rng(4), 12)
    relations = batch["shown"][:, :, [batches.KINDS.index(relation) for relation in world.RELATIONS]]
    assert not relations[24:].any()
    whole = relations[:24].any(1)
    assert whole.sum() > 24  # most scenes have two objects
    for left, right in ((0, 1), (2, 3)):
        np.testing.assert_array_equal(whole[:, left], whole[:, right])
    rows = np.arange(64) // 8
    for shown in relations[:24]:
        if shown[:, 2].any():
            above, below = (np.average(rows, weights=shown[:, kind]) for kind in (2, 3))
            assert above < below


PICTURES, TEXTS = 3, ("a red circle and a blue square", "two striped stars", "a pink ring")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every recipe of a referee with BERT's words, untrained, as it is saved and as torch has it, both of half precision."""
    torch.manual_seed(5)
    out, recipes = tmp_path_factory.mktemp("referees"), {}
    for name in ("clip", "blip", "blip2"):
        recipes[name] = train.NETWORKS[name](out)
        with torch.no_grad():
            for parameter in recipes[name].trained.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(2)
        recipes[name].trained.half().float().eval()
        recipes[name].save(recipes[name].trained, out)
    return out, recipes


def losses(directory, name: str, *wanted: str) -> dict[str, np.ndarray]:
    """What the package's referee says of three pictures and the text of the same number: each loss, `[3]`."""
    judge = referees.load_referee(
        config.RefereeSpec(name=name, checkpoint=str(directory), losses=dict.fromkeys(wanted, 1.0))
    )
    run = jax.jit(lambda referee, view, tokens: referee.views_losses(view[None], referee.encode(tokens)))
    rows = [run(judge.referee, view, judge.tokenize(text)) for view, text in zip(pictures(), TEXTS, strict=True)]
    return {key: np.array([row[key][0] for row in rows]) for key in wanted}


def pictures() -> np.ndarray:
    return np.random.default_rng(6).uniform(size=(PICTURES, 64, 64, 3)).astype(np.float32)


def as_torch() -> "torch.Tensor":
    return torch.from_numpy(pictures()).permute(0, 3, 1, 2) * 2 - 1


def one_by_one(loss) -> list[float]:
    with torch.no_grad():
        return [float(loss(slice(i, i + 1))) for i in range(PICTURES)]


def test_blips_eye_begins_as_clips():
    """After three layers it says what CLIP's says after as many, up to the norm that it has not."""
    batch = train.Steps(lambda rng: batches.pair_batch(rng, 6), seed=0)[0]
    images = 2 * batch["image"] - 1
    with torch.no_grad():
        clip = transformers.CLIPModel.from_pretrained(hub.ASSETS / "clip", dtype=torch.float32)
        eye = recipes_referees.Blip(hub.ASSETS).trained["itm"].vision_model
        wanted = clip.vision_model(images, output_hidden_states=True).hidden_states[3]
        found = eye.encoder(eye.embeddings(images)).last_hidden_state
    assert cosine(found, wanted) > 0.85
    assert cosine(found, wanted.flip(0)) < 0.75


def test_blip_is_asked_as_it_was_taught(saved):
    """The losses of training are those of the referee: same words, same first tokens, same masks."""
    out, recipe = saved[0], saved[1]["blip"]
    readings = (tokens.wordpieces, batches.read_captions, batches.read_questions)
    ids, captions, questions = (torch.from_numpy(read(list(TEXTS))).long() for read in readings)
    with torch.no_grad():
        states = recipe.trained["itm"].vision_model(as_torch()).last_hidden_state
    ours = losses(out / "blip_itm", "blip_itm", "itm", "itc")
    itm = recipe.trained["itm"]
    asked = ids.index_fill(1, torch.tensor([0]), tokens.WORDPIECES["[ENC]"])
    with torch.no_grad():
        logits = itm.itm_head(itm.text_encoder(asked, asked != 0, encoder_hidden_states=states).last_hidden_state[:, 0])
    assert relative_l2(ours["itm"], -logits.log_softmax(1)[:, 1]) < 1e-4
    theirs = one_by_one(lambda i: recipe.caption(states[i], captions[i]))
    assert relative_l2(losses(out / "blip_caption", "blip_caption", "caption")["caption"], theirs) < 1e-4
    vqa = recipe.trained["vqa"]
    asked = questions.index_fill(1, torch.tensor([0]), tokens.WORDPIECES["[ENC]"])
    with torch.no_grad():
        read = vqa.text_encoder(asked, asked != 0, encoder_hidden_states=states).last_hidden_state
        logits = recipes_referees.first_answer(vqa, read, asked != 0)
    answers = logits[:, [tokens.WORDPIECES["yes"], tokens.WORDPIECES["no"]]].log_softmax(1)
    assert relative_l2(losses(out / "blip_vqa", "blip_vqa", "vqa")["vqa"], -answers[:, 0]) < 1e-4


def test_blip2_is_asked_as_it_was_taught(saved):
    out, recipe = saved[0], saved[1]["blip2"]
    ids = torch.from_numpy(tokens.wordpieces(list(TEXTS))).long()
    with torch.no_grad():
        states = recipe.trained["blip2"].vision_model(pixel_values=as_torch()).last_hidden_state
        match = -recipe.match(states, ids)[0].log_softmax(1)[:, 1]
    captions = ids.index_fill(1, torch.tensor([0]), tokens.WORDPIECES["[DEC]"])
    ours = losses(out / "blip2", "blip2", "itm", "itg")
    assert relative_l2(ours["itm"], match) < 1e-4
    assert relative_l2(ours["itg"], one_by_one(lambda i: recipe.caption(states[i], captions[i]))) < 1e-4


@pytest.mark.parametrize("name", ["blip", "blip2", "clip"])
def test_every_weight_is_taught(saved, name):
    """The loss of a small batch moves all of them."""
    torch.manual_seed(7)
    recipe = train.NETWORKS[name](saved[0])
    loader = train.Steps(lambda rng: recipe.batch(rng, 6), seed=0)
    loss, figures = recipe(loader[0])
    loss.backward()
    still = [n for n, p in recipe.trained.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # Nor have keys a use for a bias, or has a word that stands alone for queries and keys.
    useless = ("key.bias", "k_proj.bias", "self.key.", "self.query.")
    assert [n for n in still if not any(part in n for part in useless)] == []
    assert len(still) < 40
    assert all(torch.isfinite(value) for value in figures.values())
