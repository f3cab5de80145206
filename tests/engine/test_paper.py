"""The paper's setting at its real size, with random weights: 512 px, ten views, Stable Diffusion 1.5, BLIP-2's first stage."""

import dataclasses
import resource
import time

import jax
import numpy as np
import pytest

from referee_jax import config, items
from referee_jax.engine import inverter
from referee_jax.performance import abstract_networks


@pytest.mark.slow
def test_one_step():
    """One iteration of configs/paper.py, float32, on a CPU: every referee's loss is finite and the latents move.

    198 s with its compilation on two CPU cores, and 21.4 GB of memory at the peak, of which weights are 8.8 (November 2026).
    """
    settings = dataclasses.replace(config.load("configs/paper.py"), chunk=1, batch_size=1)
    assert settings.image_size == 512 and settings.views.keep == settings.views.count == 10
    networks = abstract_networks.at_random(abstract_networks.abstract(settings))
    parts = networks.prior.denoiser, networks.prior.vae, networks.judges[0].referee
    assert sum(x.size for x in jax.tree.leaves(parts)) > 2.0e9
    engine = inverter.Inverter(settings, networks.prior, networks.judges, jax.devices()[:1])
    assert engine.plan.latent == (64, 64, 4)
    batch = engine.begin(items.expand(["a red circle and a blue square"], 1), 0)
    start, begin = np.asarray(batch.state.latents), time.monotonic()
    batch, metrics = engine.advance(batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{time.monotonic() - begin:.0f} s with compilation; peak {peak:.1f} GB; {metrics}")
    losses = {"itm", "itg", "loss"}
    assert losses <= metrics.keys() and all(np.isfinite(metrics[name]).all() for name in losses)
    assert metrics["referee_norm"][0, 0] > 0 and metrics["prior_norm"][0, 0] > 0
    assert np.abs(np.asarray(batch.state.latents) - start).max() > 0.01
