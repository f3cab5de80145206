"""Conditions on several settings, and ranges of whole groups of them."""

import dataclasses

from referee_jax import prompts, schema
from referee_jax.config.known_referees import ASKED, CONTRASTS, LOSSES, MOVING, WHOLE, WHY, own_referee
from referee_jax.config.settings import RefereeSpec, Settings, Views
from referee_jax.method import augmentations, views
from referee_jax.method.latent_losses import LATENT_LOSSES
from referee_jax.method.ways import guided, noise, optim
from referee_jax.schema import ConfigError, wrong

WEBP_SIDE = 16383  # pixels, the largest side of a WebP


def check(settings: Settings) -> None:
    """Checks conditions on several fields, and ranges of whole groups of fields."""
    if settings.image_size % 8:
        raise wrong("image_size", settings.image_size, "a multiple of 8")
    is_webp = "webp" in (settings.outputs.format, settings.outputs.shard_images) or settings.outputs.trajectory
    if is_webp and settings.image_size > WEBP_SIDE:
        raise wrong("image_size", settings.image_size, f"at most {WEBP_SIDE}, as WebP files are asked for")
    # The largest timestep drawn is t_max - 2.
    for key in ("t_max", "t_max_final"):
        if getattr(settings.sds, key) < settings.sds.t_min + 2:
            raise wrong(f"sds.{key}", getattr(settings.sds, key), f"at least sds.t_min + 2 = {settings.sds.t_min + 2}")
    if len(prompts.PLACES.findall(settings.sds.prompt)) > 1:
        raise wrong(
            "sds.prompt", settings.sds.prompt, "a text with one {} or {caption} where the prompt is put, or with none"
        )
    if settings.init_candidates > 1 and settings.init != "sample" and settings.method != "noise":
        raise wrong("init_candidates", settings.init_candidates, 'one, unless init = "sample" or method = "noise"')
    if settings.particles > settings.init_candidates > 1:
        raise wrong("particles", settings.particles, f"1, or at most init_candidates = {settings.init_candidates}")
    if settings.select == "smc" and settings.particles == 2:
        raise wrong("particles", 2, 'more for select = "smc", which of two never drops one')
    if settings.method != "sds":
        _check_way(settings)
    if settings.optim.name not in optim.OPTIMIZERS:
        raise wrong("optim.name", settings.optim.name, f"one of {optim.OPTIMIZERS.known()}")
    for n, lora in enumerate(settings.generator.loras):
        if not lora.file.endswith(".safetensors"):
            raise wrong(f"generator.loras[{n}].file", lora.file, "a file of safetensors")
    if settings.latent_losses.keys() - LATENT_LOSSES:
        known = f"a dictionary of weights of {LATENT_LOSSES.known()}"
        raise wrong("latent_losses", settings.latent_losses, known)
    _check_views(settings.views)
    _check_referees(settings)


def _check_way(settings: Settings) -> None:
    """Checks what "guided" and "noise" cannot have."""
    for key, value, possible in (("init", settings.init, "noise"), ("latent_losses", settings.latent_losses, {})):
        if value != possible:
            raise wrong(key, value, f'{possible!r}, unless method = "sds"')
    if settings.output == "ema":
        raise wrong("output", "ema", 'final, best or best_held_out, unless method = "sds"')
    if settings.noise.rule not in noise.RULES:
        raise wrong("noise.rule", settings.noise.rule, f"one of {noise.RULES.known()}")
    if settings.guided.last >= settings.guided.first or settings.guided.low > settings.guided.high:
        raise wrong("guided", dataclasses.asdict(settings.guided), "last < first and low <= high")
    if settings.method == "guided":
        try:
            levels = guided_levels(settings)
        except ValueError as error:
            raise ConfigError(f"guided.travels = {settings.guided.travels} is not possible: {error}") from error
        window, acts = settings.guided, settings.referee
        is_active = (acts.weight or acts.weight_final) and acts.stop > acts.start
        if is_active and not guided_window(settings):
            nearest = min(levels, key=lambda t: max(window.low - t, t - window.high))
            raise wrong(
                "guided.low",
                window.low,
                f"a window (to guided.high) with one of the timesteps, of which {nearest} is nearest",
            )


def guided_levels(settings: Settings) -> tuple[int, ...]:
    """The timestep of each iteration of method = "guided"."""
    s = settings.guided
    how = {"travels": s.travels, "back": s.back, "low": s.low, "high": s.high}
    return tuple(map(int, guided.levels(settings.steps, s.first, s.last, **how)))


def guided_window(settings: Settings) -> list[int]:
    """The iterations of method = "guided" at whose timesteps the referees may pull."""
    s = settings.guided
    return [i for i, t in enumerate(guided_levels(settings)) if s.low <= t <= s.high]


def _check_views(settings: Views) -> None:
    if settings.keep > settings.count:
        raise wrong("views.keep", settings.keep, f"at most views.count = {settings.count}")
    _check_augmentations("views.augmentations", settings.augmentations)
    for field in dataclasses.fields(augmentations.Settings):
        key, value = field.name, getattr(settings, field.name)
        amounts = value if isinstance(value, tuple) else (value,)
        if key.endswith("_p") and not 0 <= value <= 1:
            raise wrong(f"views.{key}", value, "a probability, 0 to 1")
        if min(amounts) < 0:
            raise wrong(f"views.{key}", value, "at least 0")
        if key.endswith(("_area", "_ratio")) and not 0 < amounts[0] <= amounts[1]:
            raise wrong(f"views.{key}", value, "(low, high) with 0 < low <= high")
        if key.endswith("_area") and amounts[1] > 1:
            raise wrong(f"views.{key}", value, "shares of the view, at most 1")
    if settings.elastic_sigma == 0:
        raise wrong("views.elastic_sigma", 0.0, "more than 0")


def _check_augmentations(key: str, names: tuple[str, ...]) -> None:
    try:
        views.check(names)
    except ValueError as error:
        raise ConfigError(f"{key} = {names!r} is not possible: {error}") from error


def _check_referees(settings: Settings) -> None:
    for n, spec in enumerate(settings.referees):
        key = f"referees[{n}]"
        if build := own_referee(spec.name, f"{key}.name"):
            schema.function(build, f"{key}.name")  # what it reads, and which losses it has, is seen when it is built
            if spec.questions:
                raise wrong(f"{key}.questions", spec.questions, "0: a referee of your own is asked none")
        else:
            _check_known_referee(spec, key)
        if min(spec.losses.values(), default=0) < 0 or not any(spec.losses.values()):
            raise wrong(f"{key}.losses", spec.losses, "weights of at least 0, one of them more")
        _check_augmentations(f"{key}.augmentations", spec.augmentations)
        if spec.name in WHOLE and set(spec.augmentations) & set(MOVING):
            raise wrong(f"{key}.augmentations", spec.augmentations, f"without {', '.join(MOVING)}: {spec.name} {WHY}")
        if spec.template and spec.template.count("{}") != 1:
            raise wrong(f"{key}.template", spec.template, "empty, or a text with one {} where the prompt is put")
        count = spec.views or settings.views.count
        if spec.keep > count:
            raise wrong(f"{key}.keep", spec.keep, f"at most its number of views, {count}")
    shared, judges = settings.views.augmentations, [spec for spec in settings.referees if spec.is_optimised]
    if shared != views.DEFAULT and set(shared) & set(MOVING) and judges and all(x.name in WHOLE for x in judges):
        raise wrong("views.augmentations", shared, f"without {', '.join(MOVING)}: {judges[0].name} {WHY}")
    if not any(spec.is_held_out for spec in settings.referees):
        for key, is_needed in (("output", settings.output == "best_held_out"), ("patience", settings.patience > 0)):
            if is_needed:
                raise wrong(
                    key, getattr(settings, key), 'something else, unless one of the referees has role="held_out"'
                )
    if (settings.output == "best_held_out" or settings.patience) and settings.look_every > settings.steps:
        raise wrong("look_every", settings.look_every, f"at most steps = {settings.steps}, or nothing is evaluated")
    is_pulled, roles = settings.referee.weight or settings.referee.weight_final, {x.role for x in settings.referees}
    if is_pulled and "optimise" not in roles:
        raise wrong(
            "referees",
            settings.referees,
            'one with role="optimise" at least, unless referee.weight and weight_final are 0',
        )
    if settings.init_candidates > 1 and roles <= {"held_out"}:
        raise wrong("referees", settings.referees, 'one with role="optimise" or "choose", unless init_candidates is 1')


def _check_known_referee(spec: RefereeSpec, key: str) -> None:
    known = LOSSES[spec.name]
    if spec.losses.keys() - set(known):
        text = f"a dictionary of weights of {spec.name}'s losses: {', '.join(known)}"
        raise wrong(f"{key}.losses", spec.losses, text)
    for loss in sorted(CONTRASTS & spec.losses.keys()):
        if not (spec.negatives or spec.near):
            text = f"some texts, or {key}.near some number, for the {loss} loss"
            raise wrong(f"{key}.negatives", spec.negatives, text)
    if spec.questions and spec.name not in ASKED:
        raise wrong(
            f"{key}.questions", spec.questions, f"0: {spec.name} answers none; those that do are {', '.join(ASKED)}"
        )
    if spec.questions and CONTRASTS & spec.losses.keys():
        raise wrong(f"{key}.questions", spec.questions, "0, or without the versus loss, which asks about whole prompts")
    if (spec.negatives or spec.near) and not CONTRASTS & set(known):
        raise wrong(f"{key}.negatives", spec.negatives, f"empty, and {key}.near 0: {spec.name} reads none")
    if not spec.checkpoint:
        raise wrong(f"{key}.checkpoint", "", "a directory, a hub id, or shapes/...")
