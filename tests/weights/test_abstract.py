"""Networks of shapes alone: as those that are loaded, and as the published ones."""

import jax
import jax.numpy as jnp
import pytest

from referee_jax import config, referees
from referee_jax.weights import abstract, load
from referee_jax.weights.convert import WeightsError

EMBEDDED = {"clip": "shapes/clip", "blip_itm": "shapes/blip_itm", "blip2": "shapes/blip2", "align": "shapes/align"}


def described(tree):
    """Shape and dtype of each leaf, with its path."""
    return {jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", EMBEDDED)
def test_as_loaded(name):
    """Of a checkpoint on disk: every leaf, dtypes included, and what the referee asks of its tokenizer."""
    path = config.checkpoint_path(EMBEDDED[name])
    there = load.load(name, path, dtype=jnp.bfloat16)
    assert described(abstract.network(name, path, dtype=jnp.bfloat16)) == described(there)
    losses = {config.LOSSES[name][0]: 1.0}
    spec = config.RefereeSpec(name=name, checkpoint=EMBEDDED[name], losses=losses)
    made, real = referees.abstract_referee(spec), referees.load_referee(spec)
    assert made.referee.losses == real.referee.losses
    assert described(made.tokenize("a red circle")) == described(real.tokenize("a red circle"))


def test_stable_diffusion_as_loaded():
    path = config.checkpoint_path("shapes/stable-diffusion")
    made, real = abstract.stable_diffusion(path), load.load_stable_diffusion(path)
    for part in ("text_encoder", "unet", "vae", "alphas_cumprod"):
        assert described(getattr(made, part)) == described(getattr(real, part)), part


def test_published():
    """What is known without a file: billions of parameters, and no byte of memory for them."""
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    prior = abstract.stable_diffusion("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=jnp.bfloat16)
    assert size(prior.unet) == 859_520_964 and size(prior.text_encoder) == 123_060_480
    assert size(abstract.network("clip", "openai/clip-vit-large-patch14")) == 427_616_513
    spec = config.RefereeSpec(name="blip2", checkpoint="checkpoints/blip2-stage1", losses={"itm": 1.0, "itg": 1.0})
    judge = referees.abstract_referee(spec, dtype=jnp.bfloat16)
    assert size(judge.referee.network) > 1.1e9
    assert judge.tokenize("anything")["input_ids"].shape == (32,)


def test_unknown_sizes_are_refused():
    with pytest.raises(WeightsError, match="someone/else is not a local directory"):
        abstract.network("clip", "someone/else")
    # The published files have no language head.
    with pytest.raises(ValueError, match="no loss itg"):
        referees.abstract_referee(
            config.RefereeSpec(name="blip2", checkpoint="Salesforce/blip2-itm-vit-g", losses={"itg": 1.0})
        )
