"""The programs that an engine compiles, each a function of one item.

`inverter.Inverter` adds the batch by vmap and the devices by shard_map.
"""

import jax
import jax.numpy as jnp
from jax import Array

from referee_jax.method import held_out, inversion
from referee_jax.method.state import Plan
from referee_jax.method.ways import ddim


def item_key(seed: int, prompt_id: int, sample: int) -> Array:
    """The key of all that is random for one item: of the seed, the prompt's text and the sample's number, nothing else."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt_id), sample)


def _noise(key, number, *, plan: Plan):
    # Iterations fold in 0, 1, ...; starts count down from what no iteration reaches.
    return jax.random.normal(jax.random.fold_in(key, 2**31 - 1 - number), plan.latent)


def _denoise(networks, prompt, latents, t, stride, guidance, *, plan: Plan):
    return ddim.step(networks.prior, latents, t, stride, cond=prompt.cond, uncond=prompt.uncond, guidance=guidance)


def _judge(networks, prompt, hyper, latents, *, plan: Plan):
    image = inversion.picture(networks, prompt, hyper, plan, latents)
    return inversion.clean_losses(networks, prompt, hyper, plan, image)


def _better(one, two, *, plan: Plan):
    """Of two candidates (latents, losses), the one with the lower loss of the optimised referees."""
    return jax.tree.map(lambda a, b: jnp.where(two[1][0] < one[1][0], b, a), one, two)


def _init(networks, latents, losses, hyper, *, plan: Plan):
    return inversion.init(networks, latents, plan, hyper, None if losses is None else held_out.begin(latents, losses))


def _step(networks, prompt, hyper, state, key, i, *, plan: Plan, referees_active: bool):
    noise = inversion.draw(key, networks, plan, hyper, i)
    return inversion.step(networks, prompt, hyper, plan, state, i, noise, referees_active=referees_active)


def _record_evaluation(state, losses, *, plan: Plan):
    return inversion.record_evaluation(plan, state, losses)


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
    "noise": (_noise, (True, False), ()),
    "denoise": (_denoise, (False, True, True, False, False, False), ()),
    "judge": (_judge, (False, True, "hyper", True), ()),
    "better": (_better, (True, True), ()),
    "init": (_init, (False, True, True, "hyper"), ()),
    "step": (_step, (False, True, "hyper", True, True, False), (3,)),
    "record_evaluation": (_record_evaluation, (True, True), (0,)),
    "finish": (_finish, (False, True, "hyper", True), ()),
}
