"""What the method takes (inversion.py), from settings, networks and a prompt: the plan, the numbers, what is encoded."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from referee_jax import config, prompts, referees
from referee_jax.engine import parallel
from referee_jax.hardware import chips
from referee_jax.method import augmentations, objective
from referee_jax.method import state as state_lib
from referee_jax.method.ways import ddim, guided, noise, optim, sds
from referee_jax.method.ways import prior as prior_lib
from referee_jax.models import layers
from referee_jax.referees.questions import Atom
from referee_jax.weights.generators import Generator

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_mesh(settings: config.Settings, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh that the settings ask for. Raises ConfigError where the devices do not make one."""
    try:
        return parallel.prompt_mesh(devices, prompt=settings.mesh.prompt, model=settings.mesh.model)
    except ValueError as error:
        raise config.ConfigError(f"mesh: {error}") from error


def make_view_plan(settings: config.Settings, spec: config.RefereeSpec, *, dense: bool = False) -> objective.ViewPlan:
    """How a referee's views are made; its own number of views and augmentations, where it has some, win.

    One that is not optimised sees the image as it is.
    """
    common = () if spec.name in config.WHOLE else settings.views.augmentations
    if not spec.is_optimised:
        spec, common = dataclasses.replace(spec, views=1, keep=1, augmentations=()), ()
    count = spec.views or settings.views.count
    keep = spec.keep or (count if spec.views else settings.views.keep)
    return objective.ViewPlan(
        losses=tuple(sorted(spec.losses)),
        count=count,
        keep=keep,
        augmentations=tuple(spec.augmentations or common),
        passes=make_passes(keep, settings.views.per_pass),
        is_fitted=settings.views.resize == "fit",
        dense=dense,
        has_gradient=spec.is_optimised,
    )


def make_passes(keep: int, most: int) -> int:
    """The fewest microbatches of at most `most` views (0: no limit); a few more where they then have equal sizes."""
    fewest = math.ceil(keep / most) if most else 1
    return next((passes for passes in range(fewest, 2 * fewest) if keep % passes == 0), fewest)


def make_weights(spec: config.RefereeSpec) -> objective.Weights:
    """Loss weights of a referee, in the order of `make_view_plan`."""
    return objective.Weights(tuple(spec.weighted.values()), referee=float(spec.weight))


def make_networks(
    prior: Generator,
    judges: Sequence[referees.Judge],
    held_out: Sequence[referees.Judge] = (),
    *,
    remat: str = "full",
    hardware: chips.Hardware | None = None,
) -> state_lib.Networks:
    """Everything with weights that an iteration evaluates.

    `remat`, of layers.POLICIES, is for the optimised referees; `hardware` is what is compiled for, by default the device
    that JAX uses.
    """
    hardware = hardware or chips.traits()
    configured = functools.partial(layers.configured, hardware=hardware)
    return state_lib.Networks(
        prior=make_prior(prior, configured),
        vae=configured(prior.vae),
        referees=tuple(configured(judge.referee, remat=remat) for judge in judges),
        held_out=tuple(configured(judge.referee) for judge in held_out),
    )


def make_prior(generator: Generator, configured: Callable = lambda network: network) -> prior_lib.Prior:
    """The generator's diffusion model; `configured` sets static fields of its network."""
    schedule, denoiser = generator.schedule, configured(generator.denoiser)
    alphas_cumprod = jax.tree.map(jnp.asarray, schedule.alphas_cumprod())
    return prior_lib.Prior(denoiser, alphas_cumprod, schedule.prediction_type, shift=schedule.shift)


def make_plan(
    settings: config.Settings,
    prior: Generator,
    judges: Sequence[referees.Judge],
    held_out: Sequence[referees.Judge] = (),
    *,
    dense: bool = False,
) -> state_lib.Plan:
    """What is static of the settings; `dense` as of objective.ViewPlan."""
    side = settings.image_size // prior.vae.config.downscale
    patch = getattr(getattr(prior.denoiser, "config", None), "latents_a_token", 1)
    if side % patch:
        multiple = patch * prior.vae.config.downscale
        raise config.ConfigError(
            f"image_size = {settings.image_size} is not possible: {settings.generator.checkpoint} takes multiples of {multiple}"
        )
    return state_lib.Plan(
        latent=(side, side, prior.vae.config.latent_channels),
        views=tuple(make_view_plan(settings, judge.spec, dense=dense) for judge in judges),
        held_out=tuple(make_view_plan(settings, judge.spec, dense=dense) for judge in held_out),
        evaluate_every=settings.look_every,
        patience=settings.patience,
        steps=settings.steps,
        clamp=settings.clamp,
        shared_erase=settings.views.shared_erase,
        optimizer=settings.optim.name,
        ema_alias=settings.ema.alias,
        use_sds=bool(settings.sds.weight or settings.sds.weight_final),
        use_balance=settings.referee.balance,
        normalise=settings.referee.normalise,
        latent_losses=tuple(sorted(settings.latent_losses)),
        method=settings.method,
        levels=make_levels(settings, prior.schedule),
        rule=settings.noise.rule,
        is_guided=settings.noise.guidance != 1,
    )


def make_levels(settings: config.Settings, schedule: Any) -> tuple[float, ...]:
    """`Plan.levels`; a rectified flow's sampler of "noise" goes through its published timesteps."""
    if settings.method == "guided":
        return config.guided_levels(settings)
    if settings.method != "noise":
        return ()
    if schedule.prediction_type == "flow":
        if settings.noise.first != config.Noise().first:
            raise config.ConfigError(
                f"noise.first = {settings.noise.first} is not possible: a rectified flow begins at noise, {config.Noise().first}"
            )
        return tuple(schedule.timesteps(settings.noise.steps)[:-1])
    return ddim.trailing(settings.noise.first, settings.noise.steps)


# Numbers of the method -> the groups of the settings that they are from: field `name` of the numbers is field
# `name` of a group, without the prefix.
SOURCES = {
    sds.Hyper: {"": "sds"},
    guided.Hyper: {"": "guided"},
    noise.Hyper: {"": "noise"},
    objective.Hyper: {"": "referee"},
    optim.Hyper: {"": "optim", "ema_": "ema"},
    augmentations.Settings: {"": "views"},
}


def sources(kind: type) -> dict[str, tuple[str, str]]:
    """Of each field of some numbers, the group of the settings and the field of it that it is from.

    Raises TypeError for a field that has no source, or two: it would silently stay at its default.
    """
    found = {}
    groups = {prefix: type(getattr(config.Settings(), group)) for prefix, group in SOURCES[kind].items()}
    for field in dataclasses.fields(kind):
        places = [
            (SOURCES[kind][prefix], field.name.removeprefix(prefix))
            for prefix, group in groups.items()
            if field.name.startswith(prefix) and field.name.removeprefix(prefix) in group.__dataclass_fields__
        ]
        if len(places) != 1:
            raise TypeError(f"{kind.__module__}.{kind.__name__}.{field.name} has {len(places)} sources: {places}")
        found[field.name] = places[0]
    return found


def make_hyper(settings: config.Settings) -> state_lib.Hyperparameters:
    """What is a number of the settings, as float32 and int32 arrays."""

    def fill(kind: type) -> Any:
        return kind(**{name: getattr(getattr(settings, group), key) for name, (group, key) in sources(kind).items()})

    hyper = state_lib.Hyperparameters(
        prior=fill(sds.Hyper),
        guided=fill(guided.Hyper),
        noise=fill(noise.Hyper),
        referee=make_referee(settings, fill(objective.Hyper)),
        update=fill(optim.Hyper),
        views=fill(augmentations.Settings),
        weights=tuple(make_weights(spec) for spec in settings.referees if not spec.is_held_out),
        held_out=tuple(make_weights(spec) for spec in settings.referees if spec.is_held_out),
        latent_losses=tuple(weight for _, weight in sorted(settings.latent_losses.items())),
    )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if isinstance(x, int) else jnp.float32), hyper)


def make_referee(settings: config.Settings, acts: Any) -> Any:
    """Numbers with a `start` and a `stop` of the referees; of "guided" they act in its window of timesteps alone."""
    if settings.method != "guided":
        return acts
    inside = config.guided_window(settings)
    if not inside:
        return dataclasses.replace(acts, start=0, stop=0)
    stop = min(acts.stop, inside[-1] + 1)
    return dataclasses.replace(acts, start=min(max(acts.start, inside[0]), stop), stop=stop)


def structure(settings: config.Settings) -> config.Settings:
    """The settings with all traced numbers at their defaults: where these are equal, one program serves both."""
    defaults, changes = config.Settings(), {}
    for group, key in (place for kind in SOURCES for place in sources(kind).values()):
        changes.setdefault(group, {})[key] = getattr(getattr(defaults, group), key)
    if not (settings.sds.weight or settings.sds.weight_final):
        # Without score distillation it is another program.
        changes["sds"] |= {"weight": settings.sds.weight, "weight_final": settings.sds.weight_final}
    changes["noise"]["guidance"] = 1.0 if settings.noise.guidance == 1 else 2.0  # another program, too
    groups = {name: dataclasses.replace(getattr(settings, name), **fields) for name, fields in changes.items()}
    alike = [dataclasses.replace(x, weight=1.0, losses=dict.fromkeys(x.losses, 1.0)) for x in settings.referees]
    terms = dict.fromkeys(settings.latent_losses, 1.0)
    return dataclasses.replace(settings, **groups, referees=tuple(alike), latent_losses=terms)


def tokenize(
    settings: config.Settings,
    tokenizers: Sequence[Any],
    judges: Sequence[referees.Judge],
    held_out: Sequence[referees.Judge],
    prompt: str,
    questions: Sequence[Atom] = (),
    *,
    negative: str | None = None,
) -> dict[str, Any]:
    """A prompt as `encode` reads it, with the user's questions about it. Raises prompts.Unreadable.

    A `negative` prompt of its own takes the place of the settings'.

    The tokenizers of a generator that read fewer tokens than another of its own, as CLIP's beside T5's, cut the text.
    """
    template = settings.sds
    is_guided = template.prompt != template.negative_prompt
    if negative is not None and not is_guided:
        raise prompts.Unreadable(
            prompt, "it has a negative prompt, and the config no guidance: sds.prompt is sds.negative_prompt"
        )
    led_from = template.negative_prompt if negative is None else negative
    texts = [prompts.fill(template.prompt, prompt), led_from][: 2 if is_guided else 1]
    texts = list(map(prompts.repaired, texts))
    longest = max(tokenizer.model_max_length for tokenizer in tokenizers)
    read = lambda tokenizer: prompts.tokenize(
        tokenizer, texts, reader="the prior", truncate=tokenizer.model_max_length < longest
    )
    return {
        "prior": tuple(map(read, tokenizers)),
        "referees": tuple(judge.read(prompt, questions) for judge in judges),
        "held_out": tuple(judge.read(prompt, questions) for judge in held_out),
    }


def encode(networks: state_lib.Networks, text_encoder: Any, tokens: dict[str, Any]) -> state_lib.Prompt:
    """All that depends on the text alone, of `tokenize`'s tokens."""
    text = jax.tree.map(lambda x: x.astype(jnp.float32), text_encoder(tokens["prior"]))
    count = len(text.states)
    judged = lambda referees, key: tuple(r.encode(t) for r, t in zip(referees, tokens[key], strict=True))
    return state_lib.Prompt(
        cond=jax.tree.map(lambda x: x[0], text),
        uncond=jax.tree.map(lambda x: x[1], text) if count > 1 else None,
        texts=judged(networks.referees, "referees"),
        held_out=judged(networks.held_out, "held_out"),
    )
