"""The programs that an engine compiles, each a function of one item.

`inverter.Inverter` adds the batch by vmap and the devices by shard_map.
"""

import jax
import jax.numpy as jnp
from jax import Array

from referee_jax.method import held_out, inversion, selection
from referee_jax.method.state import Plan
from referee_jax.method.ways import ddim


def item_key(seed: int | Array, prompt_id: int | Array, sample: int | Array, particle: int = 0) -> Array:
    """The key of all that is random for one particle of an item: of the seed, the prompt's text and two numbers, nothing else."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt_id), sample)
    return jax.random.fold_in(key, 2**30 + particle) if particle else key  # of no iteration and no start


def _keys(seed, prompt_id, sample, *, plan: Plan, particles: int):
    return [item_key(seed, prompt_id, sample, particle) for particle in range(particles)]


def _noise(key, number, *, plan: Plan):
    # Iterations fold in 0, 1, ...; starts count down from what no iteration reaches.
    return jax.random.normal(jax.random.fold_in(key, 2**31 - 1 - number), plan.latent)


def _denoise(networks, prompt, latents, scale, t, after, guidance, *, plan: Plan, is_guided: bool):
    uncond = prompt.uncond if is_guided else None
    return ddim.step(networks.prior, scale * latents, t, after, cond=prompt.cond, uncond=uncond, guidance=guidance)


def _judge(networks, prompt, hyper, latents, *, plan: Plan):
    image = inversion.picture(networks, prompt, hyper, plan, latents)
    return inversion.clean_losses(networks, prompt, hyper, plan, image)


def _init(networks, latents, losses, hyper, *, plan: Plan):
    state = inversion.init(networks, latents, plan, hyper)
    return state if losses is None else state.replace(held_out=held_out.begin(state.latents, losses))


def _take(states, parent, *, plan: Plan):
    """The state of number `parent` of several."""
    return jax.tree.map(lambda *x: jnp.stack(x)[parent], *states)


def _resampled(values, before, log_w, key, scale, i, *, plan: Plan):
    key = jax.random.fold_in(jax.random.fold_in(key, i), 2**31 - 1)  # of no iteration's draw
    return selection.resampled(values, before, log_w, key, scale)


def _step(networks, prompt, hyper, state, key, i, *, plan: Plan, referees_active: bool):
    noise = inversion.draw(key, networks, plan, hyper, i)
    return inversion.step(networks, prompt, hyper, plan, state, i, noise, referees_active=referees_active)


def _record_evaluation(state, losses, *, plan: Plan):
    return inversion.record_evaluation(plan, state, losses)


def _output(state, *, plan: Plan, output: str):
    return inversion.output(state, output)


def _finish(networks, prompt, hyper, state, *, plan: Plan, output: str):
    latents = inversion.output(state, output)
    clean = inversion.render(networks, prompt, hyper, plan, latents)
    image = inversion.decode(networks, clean, plan)
    judged, scores = inversion.as_saved(image), {}
    for role, group, texts in (
        ("referee", networks.referees, prompt.texts),
        ("held_out", networks.held_out, prompt.held_out),
    ):
        for n, (referee, text) in enumerate(zip(group, texts, strict=True)):
            named = referee.scores(referee.fit(judged), text)
            scores |= {f"{role}_{n}/{name}": value for name, value in named.items()}
    return latents, clean, image, scores


# Name -> the function, which of its arguments have an axis of items ("hyper": in a sweep), and which are donated.
PROGRAMS = {
    "keys": (_keys, (True, True, True), ()),
    "noise": (_noise, (True, False), ()),
    "denoise": (_denoise, (False, True, True, False, False, False, False), ()),
    "judge": (_judge, (False, True, "hyper", True), ()),
    "init": (_init, (False, True, True, "hyper"), ()),
    "take": (_take, (True, True), ()),
    "resampled": (_resampled, (True, True, True, True, False, False), ()),
    "step": (_step, (False, True, "hyper", True, True, False), (3,)),
    "record_evaluation": (_record_evaluation, (True, True), (0,)),
    "output": (_output, (True,), ()),
    "finish": (_finish, (False, True, "hyper", True), ()),
}
RARE = {"finish"}  # run once a batch, and to look: compiling takes longer
LARGE = {"denoise", "judge", "step", "finish"}  # evaluate networks: tracing takes seconds
