"""What the method takes (inversion.py), from settings, networks and a prompt: the plan, the numbers, what is encoded."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from referee_jax import config, prompts, referees
from referee_jax.engine import parallel
from referee_jax.method import augmentations, inversion, objective, optim, sds
from referee_jax.models import layers
from referee_jax.weights import load

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_mesh(settings: config.Settings, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh that the settings ask for. Raises ConfigError where the devices do not make one."""
    try:
        return parallel.prompt_mesh(devices, prompt=settings.mesh.prompt, model=settings.mesh.model)
    except ValueError as error:
        raise config.ConfigError(f"mesh: {error}") from error


def make_view_plan(settings: config.Settings, spec: config.RefereeSpec) -> objective.ViewPlan:
    """How a referee looks at the image; its own number of views, where it has one, wins."""
    count = spec.views or settings.views.count
    keep = spec.keep or (count if spec.views else settings.views.keep)
    return objective.ViewPlan(
        losses=tuple(sorted(spec.losses)), count=count, keep=keep, augmentations=tuple(settings.views.augmentations),
        passes=make_passes(keep, settings.views.per_pass),
    )  # fmt: skip


def make_passes(keep: int, most: int) -> int:
    """The fewest passes over so many views with at most so many (0: all) in each; a few more where the views then divide."""
    fewest = math.ceil(keep / most) if most else 1
    return next((passes for passes in range(fewest, 2 * fewest) if keep % passes == 0), fewest)


def make_weights(spec: config.RefereeSpec) -> objective.Weights:
    """What a referee's word counts, in the order of `make_looks`."""
    losses = (spec.weight * weight for _, weight in sorted(spec.losses.items()))
    return objective.Weights(tuple(map(float, losses)), share=float(spec.weight))


def make_networks(
    prior: load.StableDiffusion,
    judges: Sequence[referees.Judge],
    held_out: Sequence[referees.Judge] = (),
    *,
    remat: str = "full",
) -> inversion.Networks:
    """Everything with weights that an iteration asks; `remat` is of layers.POLICIES."""
    return inversion.Networks(
        unet=prior.unet,
        vae=prior.vae,
        alphas_cumprod=prior.alphas_cumprod,
        prediction_type=prior.prediction_type,
        referees=tuple(layers.with_remat(judge.referee, remat) for judge in judges),
        held_out=tuple(judge.referee for judge in held_out),
    )


def make_plan(
    settings: config.Settings,
    prior: load.StableDiffusion,
    judges: Sequence[referees.Judge],
    held_out: Sequence[referees.Judge] = (),
) -> inversion.Plan:
    """What is static of the settings."""
    side = settings.image_size // prior.vae.config.downscale
    return inversion.Plan(
        latent=(side, side, prior.vae.config.latent_channels),
        looks=tuple(make_view_plan(settings, judge.spec) for judge in judges),
        held_out=tuple(make_view_plan(settings, judge.spec) for judge in held_out),
        look_every=settings.look_every,
        patience=settings.patience,
        steps=settings.steps,
        clamp=settings.clamp,
        shared_erase=settings.views.shared_erase,
        optimizer=settings.optim.name,
        ema_alias=settings.ema.alias,
        use_sds=bool(settings.sds.weight or settings.sds.weight_final),
        use_balance=settings.referee.balance,
        normalise=settings.referee.normalise,
    )


def make_hyper(settings: config.Settings) -> inversion.Hyper:
    """What is a number of the settings, as float32 and int32 arrays."""

    def fill(kind: type, *sources: Any) -> Any:
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: getattr(source, name) for source in sources for name in names if hasattr(source, name)})

    ema = {f"ema_{name}": getattr(settings.ema, name) for name in ("decay", "start", "every")}
    hyper = inversion.Hyper(
        prior=fill(sds.Hyper, settings.sds),
        referee=fill(objective.Hyper, settings.referee),
        update=fill(optim.Hyper, settings.optim).replace(**ema),
        views=fill(augmentations.Settings, settings.views),
        weights=tuple(make_weights(spec) for spec in settings.referees if spec.role == "optimise"),
        held_out=tuple(make_weights(spec) for spec in settings.referees if spec.role == "held_out"),
    )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if isinstance(x, int) else jnp.float32), hyper)


# Group of the settings -> the numbers of it that a compiled program takes as arguments.
TRACED = {"sds": sds.Hyper, "referee": objective.Hyper, "optim": optim.Hyper, "views": augmentations.Settings}


def structure(settings: config.Settings) -> config.Settings:
    """The settings with all traced numbers at their defaults: where these are equal, one program serves both."""
    groups = {}
    for name, kind in TRACED.items():
        group = getattr(settings, name)
        fields = {field.name for field in dataclasses.fields(kind)} & {
            field.name for field in dataclasses.fields(group)
        }
        if name == "sds" and not (group.weight or group.weight_final):
            fields -= {"weight", "weight_final"}  # without score distillation it is another program
        defaults = type(group)()
        groups[name] = dataclasses.replace(group, **{field: getattr(defaults, field) for field in fields})
    ema = config.Ema(alias=settings.ema.alias)
    alike = [dataclasses.replace(x, weight=1.0, losses=dict.fromkeys(x.losses, 1.0)) for x in settings.referees]
    return dataclasses.replace(settings, **groups, ema=ema, referees=tuple(alike))


def tokenize(
    settings: config.Settings,
    tokenizer: Any,
    judges: Sequence[referees.Judge],
    held_out: Sequence[referees.Judge],
    prompt: str,
) -> dict[str, Any]:
    """A prompt as `encode` reads it."""
    template = settings.sds
    is_guided = template.prompt != template.negative_prompt
    texts = [prompts.fill(template.prompt, prompt), template.negative_prompt][: 2 if is_guided else 1]
    return {
        "prior": prompts.tokenize(tokenizer, texts),
        "referees": tuple(judge.tokenize(prompt) for judge in judges),
        "held_out": tuple(judge.tokenize(prompt) for judge in held_out),
    }


def encode(networks: inversion.Networks, text_encoder: Any, tokens: dict[str, Any]) -> inversion.Prompt:
    """All that depends on the text alone, of `tokenize`'s tokens."""
    states = text_encoder(tokens["prior"]).astype(jnp.float32)
    judged = lambda referees, key: tuple(r.encode(t) for r, t in zip(referees, tokens[key], strict=True))
    return inversion.Prompt(
        cond=states[0],
        uncond=states[1] if len(states) > 1 else None,
        texts=judged(networks.referees, "referees"),
        held_out=judged(networks.held_out, "held_out"),
    )
