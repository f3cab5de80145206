"""The paper's setting at its real size, with random weights: 512 px, ten views, Stable Diffusion 1.5, BLIP-2's first stage."""

import dataclasses
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from referee_jax import config, inverter, queue, referees
from referee_jax.models import blip2, clip, unet, vae
from referee_jax.referees import blip2 as blip2_referee
from referee_jax.weights import load
from tests.oracles import networks

PREPROCESSING = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


def at_random(rng, make):
    """The module that `make` makes, norms at one and other weights small."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(nnx.eval_shape(make))
    drawn = [
        jnp.ones(x.shape) if "scale" in str(path) else jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32))
        for path, x in leaves
    ]
    return jax.tree.unflatten(structure, drawn)


@pytest.mark.slow
def test_one_step():
    """One iteration of configs/paper.py, float32, on a CPU: every referee's loss is finite and the latents move.

    MEASURED
    """
    rng = np.random.default_rng(0)
    settings = config.load("configs/paper.py")
    settings = dataclasses.replace(settings, chunk=1, batch_size=1)
    text = clip.TextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    prior = load.StableDiffusion(
        text_encoder=at_random(rng, lambda: clip.TextModel(text, rngs=nnx.Rngs(0))),
        unet=at_random(rng, lambda: unet.UNet(unet.Config(), rngs=nnx.Rngs(0))),
        vae=at_random(rng, lambda: vae.AutoencoderKL(vae.Config(), encoder=False, rngs=nnx.Rngs(0))),
        alphas_cumprod=jnp.asarray(networks.scheduler().alphas_cumprod.numpy()),
        prediction_type="epsilon",
        tokenizer=networks.tokenizer(),
    )
    network = at_random(rng, lambda: blip2.BLIP2(blip2.Config(lm_head=True), rngs=nnx.Rngs(0)))
    words = networks.blip2_tokenizer()
    referee = blip2_referee.from_checkpoint(network, PREPROCESSING, dec_token_id=words.bos_token_id)
    judge = referees.Judge(settings.referees[0], referee, words)
    count = sum(x.size for x in jax.tree.leaves((prior.unet, prior.vae, network)))
    assert count > 2.0e9 and settings.image_size == 512 and settings.views.keep == settings.views.count == 10
    engine = inverter.Inverter(settings, prior, [judge], jax.devices()[:1])
    assert engine.plan.latent == (64, 64, 4)
    batch = engine.begin(queue.items(["a red circle and a blue square"], 1), 0)
    start, begin = np.asarray(batch.state.latents), time.monotonic()
    batch, metrics = engine.advance(batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{time.monotonic() - begin:.0f} s with compilation; peak {peak:.1f} GB; {metrics}")
    losses = {"itm", "itg", "loss"}
    assert losses <= metrics.keys() and all(np.isfinite(metrics[name]).all() for name in losses)
    assert metrics["referee_norm"][0, 0] > 0 and metrics["prior_norm"][0, 0] > 0
    assert np.abs(np.asarray(batch.state.latents) - start).max() > 0.01
