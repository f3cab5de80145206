"""How many images fit into a device's memory at once."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core

from referee_jax import config
from referee_jax.engine import builders, peak_memory
from referee_jax.method import held_out as held_out_lib
from referee_jax.method import inversion
from referee_jax.method import state as state_lib
from referee_jax.referees.judge import Judge
from referee_jax.weights import generators
from referee_jax.weights.generators import Generator

UNKNOWN = 8  # images at once where the memory is not known
MOST = 64  # images at once: more are no faster
USABLE = 0.9  # of a chip's memory: the rest is the runtime's, and lost between buffers


@dataclasses.dataclass(frozen=True)
class Step:
    """What an iteration of one image reads: arrays, or jax.ShapeDtypeStructs."""

    settings: config.Settings
    networks: state_lib.Networks
    text_encoder: Any
    prompt: state_lib.Prompt
    hyper: state_lib.Hyperparameters
    plan: state_lib.Plan


def make_step(settings: config.Settings, prior: Generator, judges: Sequence[Judge]) -> Step:
    """An iteration over these networks; what depends on the text is abstract."""
    chosen_by = [judge for judge in judges if not judge.spec.is_held_out]
    held_out = [judge for judge in judges if judge.spec.is_held_out]
    remat = "full" if settings.remat == "auto" else settings.remat
    networks = builders.make_networks(prior, chosen_by, held_out, remat=remat)
    tokens = builders.tokenize(settings, prior.tokenizers, chosen_by, held_out, "a")
    prompt = jax.eval_shape(builders.encode, networks, prior.text_encoder, tokens)
    plan = builders.make_plan(settings, prior, chosen_by, held_out)
    hyper = builders.make_hyper(settings)
    return Step(settings, networks, prior.text_encoder, prompt, hyper, plan)


def fitting(settings: config.Settings, prior: Generator, judges: Sequence[Judge], limit: int | None) -> config.Settings:
    """`settings` with `remat` and `batch_size` decided by a memory of `limit` bytes (None: unknown).

    `remat` "auto" becomes "dots" if a batch then fits, else "full". `batch_size` 0 becomes the number
    of images that fit, at most MOST; UNKNOWN where `limit` is None.
    """
    is_open = settings.remat == "auto"
    if limit is None:
        remat = "full" if is_open else settings.remat
        return dataclasses.replace(settings, remat=remat, batch_size=settings.batch_size or UNKNOWN)
    if not is_open and settings.batch_size:
        return settings
    for remat in ("dots", "full") if is_open else (settings.remat,):
        tried = dataclasses.replace(settings, remat=remat)
        if batch := fitting_batch(tried, prior, judges, limit):
            return dataclasses.replace(tried, batch_size=batch)
    return dataclasses.replace(
        tried, batch_size=settings.batch_size or 1
    )  # too large by our estimate: the device decides


def fitting_batch(settings: config.Settings, prior: Generator, judges: Sequence[Judge], limit: int) -> int:
    """`settings.batch_size` if it fits, else 0; where it is 0, the largest that fits."""
    step = make_step(settings, prior, judges)
    free = USABLE * limit - sum(weights(step).values()) / settings.mesh.model  # of a group each holds its share
    at_least = passing(step) / settings.mesh.model
    needed = lambda batch: max(peak_memory.peak(traced(step, batch)), at_least)
    if settings.batch_size:
        return settings.batch_size if needed(settings.batch_size) <= free else 0
    least, most = needed(1), needed(2)
    return min(MOST, 1 + int((free - least) // max(most - least, 1))) if least <= free else 0


def one_step(plan: state_lib.Plan) -> Callable:
    """`fn(networks, prompt, hyper, z, key)`: an iteration of one image with its referees, from latents `z`."""

    def run(networks, prompt, hyper, z: Array, key: Array) -> tuple[Any, dict[str, Array]]:
        i = jnp.int32(0)
        noise = inversion.draw(key, networks, plan, hyper, i)
        measured = held_out_lib.begin(z, jnp.zeros(2)) if plan.held_out else None
        state = inversion.init(networks, z, plan, hyper).replace(held_out=measured)
        return inversion.step(networks, prompt, hyper, plan, state, i, noise)

    return run


def batched(fn: Callable, step: Step, shape: Sequence[int], batch: int) -> tuple[Callable, tuple]:
    """A function of one image, as `one_step`'s, over a batch; and its arguments, abstract where the step's are."""
    lead = lambda x: jax.ShapeDtypeStruct((batch, *x.shape), x.dtype)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    x = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    args = step.networks, jax.tree.map(lead, step.prompt), step.hyper, x, keys
    return jax.vmap(fn, in_axes=(None, 0, None, 0, 0)), args


def traced(step: Step, batch: int) -> core.Jaxpr:
    """The program of an iteration of a batch."""
    fn, args = batched(one_step(step.plan), step, step.plan.latent, batch)
    return jax.make_jaxpr(fn)(*args).jaxpr


def passing(step: Step) -> int:
    """Bytes of weights that are on a device while prompts are encoded: those of a T5."""
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return size(step.text_encoder) - size(generators.resident(step.text_encoder))


def weights(step: Step) -> dict[str, int]:
    """Bytes of each network that stays in a device's memory, by name."""
    networks = step.networks
    named = {
        "text encoder": generators.resident(step.text_encoder),
        "denoiser": networks.prior.denoiser,
        "decoder": networks.vae,
    }
    specs = sorted(step.settings.referees, key=lambda spec: spec.is_held_out)  # the others first, in their order
    for n, (spec, referee) in enumerate(zip(specs, (*networks.referees, *networks.held_out), strict=True)):
        part = {"choose": " (chooses)", "held_out": " (held out)"}.get(spec.role, "")
        named[f"{spec.name} {n}{part}" if len(specs) > 1 else spec.name] = referee
    return {name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for name, tree in named.items()}
