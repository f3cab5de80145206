"""Three ways to move a picture, rows of WAYS; all else of an iteration is the same for all (inversion.py).

sds      the clean latent, by score distillation and the referees, with an average and restarts
guided   the clean latent of DDIM, on its way from noise, pulled by the referees (guided.py)
noise    the starting noise of a sampler, by the referees alone (noise.py)
"""

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import optax
from jax import Array

from referee_jax.method.ways import ddim, guided, noise, optim, sds


class Look(NamedTuple):
    """What the prior makes of the state: where the referees look, its gradient, and what is carried on."""

    at: Array
    gradient: Array
    carry: Any


class Way(Protocol):
    """Functions of one prompt and sample; types as in state.py.

    Latents are what is moved, `[h, w, C]`, which `render` turns into clean latents.
    """

    def begin(self, networks, hyper, plan, latents: Array) -> tuple[Array, Any]:
        """Latents and carry before the first iteration, from noise, or from a sample where that is the start."""

    def render(self, networks, prompt, hyper, plan, latents: Array) -> Array:
        """Clean latents, scaled, of which the picture is decoded."""

    def prior(self, networks, prompt, hyper, plan, state, i: Array, drawn) -> Look:
        """The prior's part of iteration `i`."""

    def move(self, hyper, plan, state, i: Array, drawn, found, pull: Array, active: Array) -> tuple[Array, Any]:
        """Latents and carry after iteration `i`.

        `found` are its gradients, `pull` that of the referees with its weight, 0 where they are not `active`.
        """


class _Sds:
    def begin(self, networks, hyper, plan, latents):
        return latents, _optimizer(hyper, plan).init(latents)

    def render(self, networks, prompt, hyper, plan, latents):
        return latents

    def prior(self, networks, prompt, hyper, plan, state, i, drawn):
        gradient = jnp.zeros_like(state.latents)
        if plan.use_sds:
            texts = {"cond": prompt.cond, "uncond": prompt.uncond}
            t = networks.prior.time(drawn.t)
            gradient = sds.gradient(networks.prior, state.latents, t=t, eps=drawn.eps, **texts, hyper=hyper.prior, i=i)
        return Look(state.latents, gradient, state.carry)

    def move(self, hyper, plan, state, i, drawn, found, pull, active):
        rate = optim.referee_rate(hyper.update, i, plan.steps)
        shake = jnp.where(active, -rate * hyper.update.noise * drawn.n1, 0.0)
        tail = jnp.where(active, hyper.update.noise, hyper.update.tail_noise) * drawn.n2
        descent = found.prior if found.latents is None else found.prior + found.latents
        updates, carry = _optimizer(hyper, plan).update(
            descent + rate / hyper.update.lr * pull,
            found.carry,
            state.latents,
            step=i,
            moved=-rate * pull + shake,
            noise=shake + tail,
        )
        return optax.apply_updates(state.latents, updates), carry


def _optimizer(hyper, plan) -> optax.GradientTransformationExtraArgs:
    return optim.build(hyper.update, stop=hyper.referee.stop, name=plan.optimizer, alias=plan.ema_alias)


class _Guided:
    def begin(self, networks, hyper, plan, latents):
        prior = networks.prior
        return guided.begin(latents, prior, prior.time(jnp.int32(plan.levels[0])))

    def render(self, networks, prompt, hyper, plan, latents):
        return latents

    def prior(self, networks, prompt, hyper, plan, state, i, drawn):
        levels, prior = jnp.asarray(plan.levels, jnp.int32), networks.prior
        before, t = prior.time(levels[jnp.maximum(i - 1, 0)]), prior.time(levels[i])
        k = guided.renoised(state.carry, prior, before, t, hyper.guided.eta, drawn.n1)
        texts = {"cond": prompt.cond, "uncond": prompt.uncond, "guidance": hyper.guided.guidance}
        moved, k = guided.prior_move(prior, state.latents, k, t, **texts)
        return Look(state.latents - moved, moved, k)

    def move(self, hyper, plan, state, i, drawn, found, pull, active):
        return found.at - pull, found.carry


class _Noise:
    def begin(self, networks, hyper, plan, latents):
        return latents, noise.RULES[plan.rule].start(latents)

    def render(self, networks, prompt, hyper, plan, latents):
        uncond = prompt.uncond if plan.is_guided else None
        texts = {"cond": prompt.cond, "uncond": uncond, "guidance": hyper.noise.guidance}
        noisy = networks.prior.levels(jnp.asarray(plan.levels[0]))[1] * latents
        return ddim.generate(networks.prior, noisy, plan.levels, **texts)

    def prior(self, networks, prompt, hyper, plan, state, i, drawn):
        return Look(state.latents, jnp.zeros_like(state.latents), state.carry)

    def move(self, hyper, plan, state, i, drawn, found, pull, active):
        loss = jnp.where(active, found.losses["loss"], 0.0)
        latents, carry = noise.RULES[plan.rule].move(hyper.noise, state.latents, pull, loss, found.carry, drawn.n1)
        return optax.tree.where(active, (latents, carry), (state.latents, found.carry))


# Setting `method` -> the way.
WAYS: dict[str, Way] = {"sds": _Sds(), "guided": _Guided(), "noise": _Noise()}
