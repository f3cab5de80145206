"""Whole generators against diffusers' pipelines, from text to latents, and the method on each of them."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax import config, prompts
from referee_jax.engine import inverter as inverter_lib
from referee_jax.engine import parallel
from referee_jax.weights import generators, load
from tests import tiny
from tests.conftest import relative_l2
from tests.lazy import pipelines
from tests.oracles import networks

PROMPT = "a red circle and a blue square"


@pytest.fixture(scope="module")
def referee(tmp_path_factory):
    path = tmp_path_factory.mktemp("referee")
    networks.save_clip(path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name, of pipelines.PUBLISHED, to its directory and the pipeline."""
    root = tmp_path_factory.mktemp("generators")
    return functools.cache(lambda name: (root / name, pipelines.save(name, root / name)))


# Those with guidance: with a negative prompt, too.
USES = [(name, "") for name in ("Stable Diffusion 2", "SD-Turbo", "SDXL", "SDXL-Turbo", "SD3.5", "SD3.5 without T5")]
USES += [("FLUX.1-schnell", "")]
USES += [(name, "a green photo") for name in ("Stable Diffusion 2", "SDXL", "SD3.5")]


def build(directory, referee, devices=1, **changes):
    sds = {"prompt": "{}", "weight": 1.5, "weight_final": 0.75, "guidance": 1.5}
    settings = tiny.settings((directory, referee), image_size=8 * pipelines.SIDE, **{"sds": sds} | changes)
    return inverter_lib.Inverter.from_config(settings, jax.devices()[:devices])


def noise_of(engine, prompt=PROMPT):
    """That the sample of this prompt begins with."""
    batch = engine.begin([inverter_lib.items_lib.Item(prompt, 0)], 3)
    return np.asarray(engine._programs("noise")(batch.keys, jnp.int32(0))[0])


@pytest.mark.parametrize(("name", "negative"), USES)
def test_a_sample_is_the_pipelines(saved, referee, name, negative):
    (directory, pipeline), published = saved(name), pipelines.PUBLISHED[name]
    engine = build(directory, referee, sds={"prompt": "{}", "negative_prompt": negative, "guidance": 1.5})
    how = {"steps": published.steps, "guidance": published.guidance}
    theirs = pipelines.sampled(pipeline, noise_of(engine), PROMPT, **how, negative_prompt=negative or None)
    ours = engine.sample([PROMPT], seed=3, **how).latents[0]
    assert relative_l2(ours, theirs) < 1e-3
    other = pipelines.sampled(pipeline, noise_of(engine), "a green photo", **how)
    assert relative_l2(other, theirs) > 0.01


def test_text(saved):
    """SDXL's states and pooled text, of two tokenizers that pad otherwise; an empty text is zeros."""
    root, pipeline = saved("SDXL")
    parts = generators.load_generator(root)
    ids = [t([PROMPT, ""], padding="max_length", return_tensors="np").input_ids for t in parts.tokenizers]
    assert not np.array_equal(*ids)
    text = parts.text_encoder(ids)
    for n, prompt in enumerate((PROMPT, "")):
        states, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        if prompt:
            assert relative_l2(text.states[n], states[0].detach()) < 1e-5
            assert relative_l2(text.pooled[n], pooled[0].detach()) < 1e-5
        else:
            assert not np.any(text.states[n]) and not np.any(text.pooled[n])


def test_a_text_longer_than_clip_reads(saved, referee):
    """As in the pipelines, T5 reads all of it and CLIP its beginning; without a T5 it is refused."""
    (root, pipeline), text = saved("FLUX.1-schnell"), " ".join([PROMPT] * 20)
    engine = build(root, referee)
    ours = inverter_lib.builders.tokenize(engine.settings, engine.texts.tokenizers, (), (), text)["prior"]
    for tokenizer, tokens in zip((pipeline.tokenizer, pipeline.tokenizer_2), ours, strict=True):
        how = {"padding": "max_length", "truncation": True, "max_length": tokens.shape[1]}
        np.testing.assert_array_equal(tokens[:1], tokenizer([text], **how)["input_ids"])
    assert sum(ours[1][0] > 1) > 77 >= ours[0].shape[1]
    for name, words, limit in (("FLUX.1-schnell", text * 5, 256), ("SDXL", text, 77)):
        engine = build(saved(name)[0], referee)
        with pytest.raises(prompts.Unreadable, match=f"the prior reads {limit}"):
            inverter_lib.builders.tokenize(engine.settings, engine.texts.tokenizers, (), (), words)


@pytest.mark.parametrize(
    ("name", "method"),
    [("SDXL", "guided"), ("SDXL-Turbo", "noise"), ("SD3.5", "sds"), ("FLUX.1-schnell", "noise")],
)
def test_the_method_runs(saved, referee, name, method):
    """Each way to move a picture, and each kind of generator; a batch's items do not depend on each other."""
    root, _ = saved(name)
    engine = build(root, referee, method=method, steps=3, batch_size=2)
    result = engine([PROMPT, "a green square"], seed=3)
    assert np.isfinite(result.latents).all() and result.images.std() > 0.01
    other = engine(["a green square", "a green square"], seed=3)
    assert relative_l2(other.latents[1], result.latents[1]) < 1e-5
    assert not np.allclose(other.latents[0], result.latents[0], atol=1e-3)


def test_weights_go_where_they_stay(saved, referee, monkeypatch):
    """Split over a group as they are read: no device holds a copy of all, nor does the host once they are placed; T5 stays
    on the host. The pictures are those of one device."""
    root, _ = saved("FLUX.1-schnell")
    monkeypatch.setattr(parallel, "LARGE", 256)
    before, most = sum(x.nbytes for x in jax.live_arrays()), []
    place = parallel.place

    def watched(tree, mesh, *, batched):
        placed = place(tree, mesh, batched=batched)
        most.append(sum(x.nbytes for x in jax.live_arrays()) - before)
        return placed

    monkeypatch.setattr(parallel, "place", watched)
    settings = {"method": "noise", "steps": 2, "batch_size": 1}
    engine = build(root, referee, 2, mesh={"model": 2}, **settings)
    networks = engine.networks.prior.denoiser, engine.networks.vae, engine.text_encoder.text_encoder
    clip = engine.networks.referees
    size = sum(x.nbytes for x in jax.tree.leaves((networks, clip)))
    assert max(most) < 1.05 * size
    held = [
        sum(s.data.nbytes for x in jax.tree.leaves(networks[0]) for s in x.addressable_shards if s.device == device)
        for device in jax.devices()[:2]
    ]
    whole = sum(x.nbytes for x in jax.tree.leaves(networks[0]))
    assert max(held) < 0.6 * whole
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(engine.text_encoder.text_encoder_2))
    ours, alone = (e([PROMPT], seed=3).latents[0] for e in (engine, build(root, referee, **settings)))
    assert relative_l2(ours, alone) < 1e-3


def test_sizes_that_are_no_whole_tokens(saved, referee):
    root, _ = saved("SD3.5")
    with pytest.raises(config.ConfigError, match="image_size = 72 is not possible: .* takes multiples of 16"):
        inverter_lib.Inverter.from_config(tiny.settings((root, referee), image_size=72), jax.devices()[:1])


def test_a_flow_begins_at_noise(saved, referee):
    root, _ = saved("FLUX.1-schnell")
    with pytest.raises(config.ConfigError, match="noise.first = 800 is not possible: a rectified flow begins at noise"):
        build(root, referee, method="noise", noise={"first": 800})


def test_a_copy_without_its_t5(saved, tmp_path):
    """Its index names one: it is missing, and not left out."""
    root, _ = saved("SD3.5")
    shutil.copytree(root, tmp_path / "sd3")
    shutil.rmtree(tmp_path / "sd3" / "text_encoder_3")
    for look in (generators.check, generators.load_generator):
        with pytest.raises(load.WeightsError, match=r"text_encoder_3\S* is missing"):
            look(tmp_path / "sd3")


def test_networks_in_the_wrong_place(saved):
    root, _ = saved("SDXL")
    for part, message in (("unet", "vae_decoder, not unet"), ("vae", "unet, not vae_decoder or tiny_vae")):
        other = root / ("vae" if part == "unet" else "unet")
        with pytest.raises(load.WeightsError, match=f"is of another kind of network: {message}"):
            generators.load_generator(root, **{part: other})


def test_parts_that_do_not_fit(saved, tmp_path):
    root, _ = saved("SDXL")
    networks.unet(cross_attention_dim=72).save_pretrained(tmp_path)
    with pytest.raises(
        load.WeightsError, match="the pooled text's width=0 does not fit the other parts, which have 24"
    ):
        generators.load_generator(root, unet=tmp_path)


def test_a_pipeline_that_is_not_implemented(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(
        load.WeightsError, match="_class_name='KandinskyPipeline' is not implemented; supported: Stable"
    ):
        generators.check(tmp_path)
