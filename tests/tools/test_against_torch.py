"""The torch side of the bench with BLIP-2, in small: it computes what ours does, and its iteration runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax import config, referees
from tests.conftest import relative_l2
from tests.lazy import against_torch, judges, oracle, torch
from tests.oracles import networks

PROMPTS = ("a red circle and a blue square", "a green square")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("blip2")
    networks.save_blip2(path, lm_head=True)
    return path


def test_losses_are_ours(directory):
    """Both losses and their gradients, of two texts of different length at three views each."""
    spec = config.RefereeSpec(name="blip2", checkpoint=str(directory), losses={"itm": 1.0, "itg": 1.0})
    judge = referees.load_referee(spec)
    tokens = jax.tree.map(lambda *x: np.stack(x), *map(judge.tokenize, PROMPTS))
    views = np.random.default_rng(0).uniform(size=(2, 3, 24, 24, 3)).astype(np.float32)

    @jax.jit
    def ask(referee, views, tokens):
        def total(views):
            losses = jax.vmap(lambda v, t: referee.views_losses(v, referee.encode(t)))(views, tokens)
            return sum(losses[name].sum() for name in spec.losses), losses

        return jax.grad(total, has_aux=True)(views)

    gradient, made = ask(judge.referee, jnp.asarray(views), tokens)

    peer = judges.load(directory, judge.referee.mean, judge.referee.std).eval().requires_grad_(False)
    ids, mask = (torch.from_numpy(tokens[name]).long() for name in ("input_ids", "attention_mask"))
    x = torch.from_numpy(views).requires_grad_()
    losses = peer(x, peer.encode(ids, mask, judge.referee.dec_token_id), tuple(spec.losses))
    for name, loss in losses.items():
        np.testing.assert_allclose(made[name], loss.detach(), atol=1e-4)
        assert loss.std() > 0.01
    assert relative_l2(gradient, torch.autograd.grad(sum(losses.values()).sum(), x)[0]) < 1e-4


@pytest.mark.parametrize("is_here, precision", [(True, "float32"), (False, "bfloat16")], ids=["read", "random"])
def test_step(checkpoints, directory, monkeypatch, is_here, precision):
    settings = against_torch.settings_of("configs/paper.py", batch=2, precision=precision)
    (spec,), prior = settings.referees, config.Generator(checkpoint=str(checkpoints[0]))
    settings = dataclasses.replace(
        settings, generator=prior, image_size=32, referees=(dataclasses.replace(spec, checkpoint=str(directory)),)
    )
    assert against_torch.is_here(settings)
    monkeypatch.setattr(against_torch, "is_here", lambda settings: is_here)
    made, prompt = against_torch.build(settings, "cpu", channels_last=True)
    vision, qformer = made.judge.network.vision_model, made.judge.network.qformer
    assert (vision.dtype, qformer.dtype) == (getattr(torch, precision), torch.float32)
    assert {vision.config._attn_implementation, qformer.config._attn_implementation} == {"sdpa"}
    generator = torch.Generator().manual_seed(0)
    noise = oracle.draw(generator, made.settings, batch=2, latent=(8, 8), size=24)
    z = torch.randn(2, 8, 8, 4, generator=generator)
    moved, _, metrics = made.step(z, oracle.State(), 0, noise, prompt)
    assert moved.isfinite().all() and (moved - z).abs().amax(dim=(1, 2, 3)).min() > 0.01
    assert (metrics["gv"] > 0).all() and {"itm", "itg"} <= metrics.keys()
    found = against_torch.measure(settings, ["as-published"], 1, "cpu")
    assert found["as-published"].seconds > 0
