"""Settings: what can be chosen, the paper's values, and the checks that come before any weight is loaded.

`default()` is an ml_collections ConfigDict for configs/*.py and `--config.x.y=`; `from_config` turns it, once, into
frozen dataclasses. These are the one place where names, types, defaults and ranges are written down: the ConfigDict,
the checks and the messages are derived from them. Defaults are those of "Referee Can Play" (arXiv 2402.16305), for
Stable Diffusion 1.5.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

import ml_collections

from referee_jax import prompts
from referee_jax.method import augmentations, optim, views
from referee_jax.schema import ConfigError, bounded, parse, wrong

# The referees that there are, and the losses of each. Those with the contrastive one read negatives; BLIP-2 has itg only
# where its weights have a language head, which is seen when they are loaded.
LOSSES = {
    "clip": ("cosine", "contrastive"),
    "siglip": ("cosine", "sigmoid", "contrastive"),
    "pickscore": ("cosine", "contrastive"),
    "hps": ("cosine",),
    "blip_itm": ("itm", "itc"),
    "blip_caption": ("caption",),
    "blip_vqa": ("vqa",),
    "blip2": ("itm", "itc", "itg"),
    "image_reward": ("reward",),
    "align": ("cosine", "contrastive"),
}

WEBP_SIDE = 16383  # pixels; the format has no larger images

# What decides which images are made, how they are stored or how fast, but not what any one of them looks like.
_NOT_OF_THE_IMAGE = (
    "prompts", "samples", "workdir", "batch_size", "remat", "mesh", "chunk", "checkpoint_seconds", "stall_seconds",
    "views.per_pass", "outputs.trajectory", "outputs.format", "outputs.shard_size", "outputs.shard_images",
)  # fmt: skip


def _group(cls: type) -> Any:
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """The image prior: a Stable Diffusion checkpoint in diffusers' layout."""

    checkpoint: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # hub id, local directory, or shapes/...
    revision: str = ""  # commit of a hub id; empty: the newest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sds:
    """The score distillation gradient; see sds.py. `weight` and `t_max` go along a cosine in `weight_steps` iterations."""

    weight: float = bounded(800.0, low=0)
    weight_final: float = bounded(400.0, low=0)
    weight_steps: int = bounded(160, low=1)
    guidance: float = 30.0
    t_min: int = bounded(50, low=0)
    t_max: int = bounded(950, low=2, high=1000)
    t_max_final: int = bounded(950, low=2, high=1000)
    alpha_power: float = 0.0
    sigma_power: float = 0.0
    # {} is the prompt, {caption} the same without capitals and most marks; with neither the prior is the same for all.
    prompt: str = "A photo exactly contains {caption}"
    negative_prompt: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Referee:
    """The referees' common step; see objective.py. They act in iterations `start` to `stop - 1`."""

    weight: float = bounded(2.0, low=0)
    weight_final: float = bounded(2.0, low=0)
    start: int = bounded(0, low=0)
    stop: int = bounded(150, low=0)
    balance: bool = True  # the referees' gradient takes the length of the prior's
    balance_epsilon: float = bounded(0.0, low=0)
    normalise: bool = False  # before they are added, each referee's gradient takes its weight as its length
    normalise_epsilon: float = bounded(0.0, low=0)
    noise: float = bounded(0.2, low=0)  # standard deviation added to the views, in [0, 1] units


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefereeSpec:
    """One vision-language model: one that is optimised against, or one that only scores."""

    name: str = bounded("clip", allowed=tuple(LOSSES))
    checkpoint: str = "openai/clip-vit-large-patch14"
    revision: str = ""
    losses: dict[str, float] = dataclasses.field(default_factory=lambda: {"cosine": 1.0})  # loss: weight
    weight: float = bounded(1.0, above=0)  # of all its losses in a mix
    views: int = bounded(0, low=0)  # how many it looks at; 0: views.count
    keep: int = bounded(0, low=0)  # so many of the hardest have a gradient; 0: views.keep, or all of its own
    template: str = ""  # text with {} in the prompt's place; empty: the referee's own
    first_token: str = bounded("[ENC]", allowed=("[ENC]", "[CLS]"))  # of what reads the image in blip_itm and blip_vqa
    negatives: tuple[str, ...] = ()  # texts that the contrastive loss tells the prompt from
    near: int = bounded(0, low=0)  # and so many made of the prompt itself; see prompts.near
    exchange: tuple[tuple[str, ...], ...] = ()  # groups of words that stand for one another in those
    image_size: int = bounded(0, low=0)  # side of the views; 0: the checkpoint's
    role: str = bounded("optimise", allowed=("optimise", "held_out"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    """The update of the latents; see optim.py. `noise` while the referees act, `tail_noise` after."""

    name: str = bounded("sgd", allowed=tuple(optim.OPTIMIZERS))
    lr: float = bounded(1.0, above=0)
    lr_final: float = bounded(0.5, low=0)
    warmup: int = bounded(10, low=0)
    noise: float = bounded(0.2, low=0)
    tail_noise: float = bounded(0.01, low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
    """The running average of the latents and the restarts from it, at `start`, `start + every`, ..."""

    decay: float = bounded(0.95, low=0, high=1)
    start: int = bounded(40, low=0)
    every: int = bounded(60, low=1)
    alias: bool = False  # as in the authors' code, where a restart makes latents and average one tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views(augmentations.Settings):
    """Augmented views of the image: how many, which augmentations, and (inherited) the magnitudes of all of them."""

    count: int = bounded(10, low=1)
    keep: int = bounded(10, low=1)  # so many of the hardest have a gradient
    augmentations: tuple[str, ...] = views.DEFAULT
    shared_erase: bool = True  # one erased rectangle for all views
    # So many at most have their gradient at once, the others after them, to save memory; 0: all.
    per_pass: int = bounded(0, low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """How images are written, and what besides them, scores and log; see outputs.py."""

    format: str = bounded("png", allowed=("png", "webp", "webdataset"))  # files, lossless both, or shards of many
    shard_size: int = bounded(10000, low=1)  # images in a shard
    shard_images: str = bounded("png", allowed=("png", "webp"))  # what they are there
    trajectory: bool = False  # an animated WebP of each item
    stretch: bool = False  # spread each image's values over the whole range, as the authors do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """How the devices of a process share the work: groups that make prompts of their own, and within each split weights."""

    prompt: int = bounded(0, low=0)  # groups; 0: as many as there are devices for
    model: int = bounded(1, low=1)  # devices of a group, for networks that are too large for one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be chosen."""

    steps: int = bounded(160, low=1)
    image_size: int = bounded(512, low=8)
    precision: str = bounded("float32", allowed=("float32", "bfloat16"))
    batch_size: int = bounded(8, low=0)  # items per device (or group of them); 0: what an accelerator's memory holds
    # What is kept of each layer of BLIP, BLIP-2 and ALIGN for the backward pass: its input, products with weights besides, or
    # all. auto: products, where an accelerator's memory allows.
    remat: str = bounded("auto", allowed=("auto", "full", "dots", "none"))
    mesh: Mesh = _group(Mesh)
    chunk: int = bounded(10, low=1)  # iterations between two looks at the clock, the log and the stop request
    checkpoint_seconds: float = bounded(60.0, above=0.0)  # between two checkpoints of what is in flight
    stall_seconds: float = bounded(0.0, low=0.0)  # in which nothing moves, then a run ends; 0: see trouble.Watchdog
    seed: int = bounded(0, low=0, high=2**32 - 1)
    samples: int = bounded(1, low=1)  # images per prompt
    workdir: str = ""  # the run directory; empty: runs/<config>-<fingerprint>
    prompts: tuple[str, ...] = ()
    generator: Generator = _group(Generator)
    sds: Sds = _group(Sds)
    referee: Referee = _group(Referee)
    referees: tuple[RefereeSpec, ...] = (RefereeSpec(),)
    optim: Optim = _group(Optim)
    ema: Ema = _group(Ema)
    views: Views = _group(Views)
    output: str = bounded("final", allowed=("final", "ema", "best", "best_held_out"))
    look_every: int = bounded(10, low=1)  # iterations between two looks of the held-out referees
    patience: int = bounded(0, low=0)  # an image stops after so many looks that find nothing better; 0: never
    clamp: str = bounded("hard", allowed=("hard", "straight_through"))
    init: str = bounded("noise", allowed=("noise", "sample"))
    init_steps: int = bounded(50, low=1, high=1000)  # of the sampler, if init="sample"
    init_guidance: float = 7.5
    init_candidates: int = bounded(1, low=1)  # samples, of which the referees choose the one to start from
    outputs: Outputs = _group(Outputs)


# --- ConfigDicts ------------------------------------------------------------------------------------------------------


def _config_dict(values: Any) -> Any:
    """Dictionaries, also those in a tuple, as locked ConfigDicts (a tuple's are left alone by ml_collections)."""
    if isinstance(values, Mapping):
        config = ml_collections.ConfigDict({key: _config_dict(value) for key, value in values.items()})
        return config.lock()
    return tuple(map(_config_dict, values)) if isinstance(values, tuple) else values


def default() -> ml_collections.ConfigDict:
    """The paper's values, typed and locked."""
    return _config_dict(dataclasses.asdict(Settings()))


def referee(**changes: Any) -> ml_collections.ConfigDict:
    """One entry of `config.referees`: the defaults with `changes`; ConfigError for an impossible key or value."""
    return _config_dict(dataclasses.asdict(parse(changes, RefereeSpec, "referee", {})))


def read(path: str | os.PathLike) -> ml_collections.ConfigDict:
    """What a config file says, as configs/shapes.py: Python with a function `get_config`. Another can begin with it."""
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"there is no config file {str(path)!r}")
    try:
        return runpy.run_path(str(path))["get_config"]()
    except ConfigError:
        raise
    except Exception as error:  # a file is code, and may raise anything
        why = "it has no function get_config" if str(error) == "'get_config'" else f"{type(error).__name__}: {error}"
        raise ConfigError(f"the config file {str(path)!r} fails: {why}") from error


def load(path: str | os.PathLike) -> Settings:
    """The checked settings of a config file."""
    return from_config(read(path))


def from_config(config: Settings | ml_collections.ConfigDict | Mapping) -> Settings:
    """The checked settings of a ConfigDict or a dictionary; what is left out has its default. Raises ConfigError."""
    settings = parse(config, Settings, "", {})
    _check(settings)
    return settings


def override(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings with `changes`, names as on the command line ("sds.guidance") to values. Raises ConfigError."""
    values = dataclasses.asdict(settings)
    for key, value in changes.items():
        *groups, name = key.split(".")
        inner = values
        for group in groups:
            inner = inner.get(group)
            if not isinstance(inner, dict):
                raise ConfigError(f"{key} is not a setting")
        inner[name] = value
    return from_config(values)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check(settings: Settings) -> None:
    """What fields must fulfil together, and the ranges that hold for all fields of a kind."""
    if settings.image_size % 8:
        raise wrong("image_size", settings.image_size, "a multiple of 8")
    is_webp = "webp" in (settings.outputs.format, settings.outputs.shard_images) or settings.outputs.trajectory
    if is_webp and settings.image_size > WEBP_SIDE:
        raise wrong("image_size", settings.image_size, f"at most {WEBP_SIDE}, as WebP files are asked for")
    # The last timestep drawn is t_max - 2.
    for key in ("t_max", "t_max_final"):
        if getattr(settings.sds, key) < settings.sds.t_min + 2:
            raise wrong(f"sds.{key}", getattr(settings.sds, key), f"at least sds.t_min + 2 = {settings.sds.t_min + 2}")
    if len(prompts.PLACES.findall(settings.sds.prompt)) > 1:
        raise wrong(
            "sds.prompt", settings.sds.prompt, "a text with one {} or {caption} where the prompt is put, or with none"
        )
    if settings.init_candidates > 1 and settings.init != "sample":
        raise wrong("init_candidates", settings.init_candidates, 'one, unless init = "sample"')
    _check_views(settings.views)
    _check_referees(settings)


def _check_views(settings: Views) -> None:
    if settings.keep > settings.count:
        raise wrong("views.keep", settings.keep, f"at most views.count = {settings.count}")
    try:
        views.check(settings.augmentations)
    except ValueError as error:
        raise ConfigError(f"views.augmentations = {settings.augmentations!r} is not possible: {error}") from error
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


def _check_referees(settings: Settings) -> None:
    for n, spec in enumerate(settings.referees):
        key = f"referees[{n}]"
        if spec.losses.keys() - set(LOSSES[spec.name]):
            known = ", ".join(LOSSES[spec.name])
            raise wrong(f"{key}.losses", spec.losses, f"a dictionary of weights of {spec.name}'s losses: {known}")
        if min(spec.losses.values(), default=0) < 0 or not any(spec.losses.values()):
            raise wrong(f"{key}.losses", spec.losses, "weights of at least 0, one of them more")
        if "contrastive" in spec.losses and not (spec.negatives or spec.near):
            raise wrong(
                f"{key}.negatives", spec.negatives, f"some texts, or {key}.near some number, for the contrastive loss"
            )
        if (spec.negatives or spec.near) and "contrastive" not in LOSSES[spec.name]:
            raise wrong(f"{key}.negatives", spec.negatives, f"empty, and {key}.near 0: {spec.name} reads none")
        if spec.template and spec.template.count("{}") != 1:
            raise wrong(f"{key}.template", spec.template, "empty, or a text with one {} where the prompt is put")
        if not spec.checkpoint:
            raise wrong(f"{key}.checkpoint", "", "a directory, a hub id, or shapes/...")
        count = spec.views or settings.views.count
        if spec.keep > count:
            raise wrong(f"{key}.keep", spec.keep, f"at most its number of views, {count}")
    if all(spec.role != "held_out" for spec in settings.referees):
        for key, asks in (("output", settings.output == "best_held_out"), ("patience", settings.patience > 0)):
            if asks:
                raise wrong(
                    key, getattr(settings, key), 'something else, unless one of the referees has role="held_out"'
                )
    acts = settings.referee.weight or settings.referee.weight_final or settings.init_candidates > 1
    if acts and all(spec.role != "optimise" for spec in settings.referees):
        raise wrong(
            "referees",
            settings.referees,
            'one with role="optimise" at least, unless referee.weight and weight_final are 0 and init_candidates is 1',
        )


# --- records ----------------------------------------------------------------------------------------------------------


def to_dict(settings: Settings) -> dict[str, Any]:
    """Plain values, as JSON has them: `from_config(to_dict(settings)) == settings`."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def to_json(settings: Settings) -> str:
    """`to_dict` as indented JSON with sorted keys."""
    return json.dumps(to_dict(settings), indent=2, sort_keys=True)


def image_settings(settings: Settings) -> dict[str, Any]:
    """The part of `to_dict` that decides what the image of a given prompt and sample looks like."""
    return image_part(to_dict(settings))


def image_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """`image_settings` of a dictionary, also of one that another version of this program wrote."""
    kept = {}
    for key, value in values.items():
        inner = [name.removeprefix(f"{key}.") for name in _NOT_OF_THE_IMAGE if name.startswith(f"{key}.")]
        if inner and isinstance(value, Mapping):
            value = {name: x for name, x in value.items() if name not in inner}
        if key not in _NOT_OF_THE_IMAGE:
            kept[key] = value
    return kept


def fingerprint(settings: Settings) -> str:
    """sha256, in hex, of `image_settings`. Checkpoints enter by name and revision, not by content."""
    return hashlib.sha256(json.dumps(image_settings(settings), sort_keys=True).encode()).hexdigest()


def diff(old: Settings | Mapping, new: Settings | Mapping) -> str:
    """The differences of two settings (or dictionaries of them), one line each: `sds.guidance: 30.0 -> 7.5`."""
    old, new = (_flat(x if isinstance(x, Mapping) else to_dict(x)) for x in (old, new))
    said = lambda values, key: json.dumps(values[key]) if key in values else "(absent)"
    keys = sorted(key for key in old.keys() | new.keys() if said(old, key) != said(new, key))
    return "\n".join(f"{key}: {said(old, key)} -> {said(new, key)}" for key in keys)


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}, "c": [{"d": 2}]}` to `{"a.b": 1, "c[0].d": 2}`."""
    if isinstance(values, Mapping):
        parts = [(f"{key}.{name}" if key else name, x) for name, x in values.items()]
    elif isinstance(values, list) and any(isinstance(x, Mapping) for x in values):
        parts = [(f"{key}[{n}]", x) for n, x in enumerate(values)]
    else:
        return {key: values}
    return {name: x for part, inner in parts for name, x in _flat(inner, part).items()}


def checkpoints(settings: Settings) -> list[tuple[str, str]]:
    """The checkpoints that settings name, each once, with its revision."""
    return list(dict.fromkeys((x.checkpoint, x.revision) for x in (settings.generator, *settings.referees)))


def pinned(settings: Settings, commits: Mapping[str, str]) -> Settings:
    """The settings with the commit of each checkpoint that names no revision, where `commits` has it."""
    pin = lambda x: dataclasses.replace(x, revision=x.revision or commits.get(x.checkpoint, ""))
    return dataclasses.replace(settings, generator=pin(settings.generator), referees=tuple(map(pin, settings.referees)))
