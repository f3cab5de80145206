"""Networks from sizes alone are those that loading gives, and a config without its checkpoints has a size too."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax import config, referees
from referee_jax.performance import abstract_networks
from referee_jax.weights import generators, hub
from referee_jax.weights.convert import WeightsError
from tests.oracles import networks

SMALL = {"generator": {"checkpoint": "shapes/stable-diffusion"}, "precision": "bfloat16"}


def shapes(tree) -> list:
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


# The package's own checkpoints: referee -> loss.
EMBEDDED = {
    "clip": "cosine",
    "blip_itm": "itm",
    "blip_caption": "caption",
    "blip_vqa": "vqa",
    "blip2": "itg",
    "vqascore": "vqa",
}


@pytest.mark.parametrize("name", [*EMBEDDED, "align"])
def test_referees_are_as_they_are_loaded(name, tmp_path):
    """The package's own, and one that it has not."""
    checkpoint = f"shapes/{name}" if name in EMBEDDED else str(networks.save_align(networks.align(), tmp_path))
    spec = config.RefereeSpec(name=name, checkpoint=checkpoint, losses={EMBEDDED.get(name, "cosine"): 1.0})
    (judge,) = abstract_networks.abstract(config.from_config(SMALL | {"referees": (spec,)})).judges
    loaded = referees.load_referee(spec, dtype=jnp.bfloat16)
    assert shapes(judge.referee) == shapes(loaded.referee)
    assert judge.referee.image_size == loaded.referee.image_size and judge.length == loaded.length
    # So are the tokens of a prompt, and thus what compiled programs are made for.
    ours, theirs = (shapes(x.tokenize("a red circle")) for x in (judge, loaded))
    assert ours == theirs


def test_the_prior_is_as_it_is_loaded():
    sized = abstract_networks.abstract(config.from_config(SMALL))
    loaded = generators.load_generator("shapes/stable-diffusion", dtype=jnp.bfloat16)
    for name in ("text_encoder", "denoiser", "vae"):
        assert shapes(getattr(sized.prior, name)) == shapes(getattr(loaded, name)), name
    assert sized.prior.schedule == loaded.schedule and not sized.assumed
    lengths = [[x.model_max_length for x in prior.tokenizers] for prior in (sized.prior, loaded)]
    assert lengths[0] == lengths[1]


def test_another_unet(tmp_path):
    unet = tmp_path / "unet"
    unet.mkdir()
    sizes = json.loads((hub.ASSETS / "stable-diffusion" / "unet" / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps(sizes | {"block_out_channels": [32, 64]}))
    changes = {"generator": {"checkpoint": "shapes/stable-diffusion", "unet": str(unet)}}
    sized = abstract_networks.abstract(config.from_config(SMALL | changes))
    assert sized.prior.denoiser.config.block_out_channels == (32, 64) and not sized.assumed
    changes["generator"]["unet"] = "someone/fast"
    sized = abstract_networks.abstract(config.from_config(SMALL | changes))
    assert (
        sized.prior.denoiser.config.block_out_channels == (64, 128) and "someone/fast is not here" in sized.assumed[0]
    )


@pytest.mark.parametrize("name", referees.REFEREES)
def test_every_published_checkpoint_has_a_size(name):
    assert set(referees.REFEREES[name].published) <= set(abstract_networks.PUBLISHED)


def test_random_weights(tmp_path):
    align = {
        "name": "align",
        "checkpoint": str(networks.save_align(networks.align(), tmp_path)),
        "losses": {"cosine": 1.0},
    }
    sized = abstract_networks.abstract(config.override(config.load("shapes_clip"), {"referees": (align,)}))
    tracemalloc.start()
    drawn = abstract_networks.at_random(sized)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    prior = drawn.prior
    weights = jax.tree.leaves((prior.text_encoder, prior.denoiser, prior.vae, drawn.judges[0].referee))
    assert held < 1.2 * sum(x.nbytes for x in weights)  # no array keeps a larger one
    assert shapes(drawn.prior.denoiser) == shapes(sized.prior.denoiser)
    again = jax.tree.leaves(abstract_networks.at_random(sized).prior.denoiser)
    for x, y in zip(jax.tree.leaves(drawn.prior.denoiser), again, strict=True):
        np.testing.assert_array_equal(x, y)
    norm, batch_norm = (
        drawn.prior.denoiser.conv_norm_out,
        drawn.judges[0].referee.network.vision_model.embeddings.batchnorm,
    )
    assert (norm.scale[...] == 1).all() and (batch_norm.running_var[...] == 1).all()
    assert drawn.prior.denoiser.conv_in.kernel[...].std() == pytest.approx(0.02, rel=0.1)


def test_a_checkpoint_that_is_not_here():
    """Its family's first is taken, and that is said; a directory that is not understood is an error."""
    spec = config.referee(name="blip2", checkpoint="checkpoints/mine", losses={"itg": 1.0})
    sized = abstract_networks.abstract(config.from_config(SMALL | {"referees": (spec,)}))
    assert sized.assumed == ("checkpoints/mine is not here: sizes are those of Salesforce/blip2-itm-vit-g",)
    assert sized.judges[0].referee.losses == ("itm", "itc", "itg")
    assert sum(x.size for x in jax.tree.leaves(sized.judges[0].referee.network.vision_model)) == pytest.approx(
        986e6, rel=0.01
    )


def test_a_directory_that_is_not_understood(tmp_path):
    (tmp_path / "config.json").write_text('{"unheard_of": 1}')
    spec = config.referee(checkpoint=str(tmp_path))
    with pytest.raises(WeightsError, match="unheard_of"):
        abstract_networks.abstract(config.from_config(SMALL | {"referees": (spec,)}))
