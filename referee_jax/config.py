"""Settings: what can be chosen, the paper's values, and the checks that come before any weight is loaded.

`default()` is an ml_collections ConfigDict for configs/*.py and `--config.x.y=`; `from_config` turns it, once, into
frozen dataclasses. These are the one place where names, types, defaults and ranges are written down: the ConfigDict,
the checks and the messages are derived from them. Defaults are those of "Referee Can Play" (arXiv 2402.16305), for
Stable Diffusion 1.5.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import numbers
import os
import pathlib
import runpy
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from referee_jax import augment, optim, prompts, views

ASSETS = pathlib.Path(__file__).parent / "shapes" / "assets"
EMBEDDED = "shapes/"  # checkpoints whose names begin so are part of the package
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
    "outputs.trajectory", "outputs.format", "outputs.shard_size", "outputs.shard_images",
)  # fmt: skip


class ConfigError(ValueError):
    """One sentence: which key, what was given, what is allowed."""


def _field(default: Any, *, low: float = None, above: float = None, high: float = None, allowed: tuple = None) -> Any:
    """A field with a range: at least `low`, more than `above`, at most `high`, one of `allowed`."""
    limits = {"low": low, "above": above, "high": high, "allowed": allowed}
    return dataclasses.field(default=default, metadata={name: x for name, x in limits.items() if x is not None})


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

    weight: float = _field(800.0, low=0)
    weight_final: float = _field(400.0, low=0)
    weight_steps: int = _field(160, low=1)
    guidance: float = 30.0
    t_min: int = _field(50, low=0)
    t_max: int = _field(950, low=2, high=1000)
    t_max_final: int = _field(950, low=2, high=1000)
    alpha_power: float = 0.0
    sigma_power: float = 0.0
    # {} is the prompt, {caption} the same without capitals and most marks; with neither the prior is the same for all.
    prompt: str = "A photo exactly contains {caption}"
    negative_prompt: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Referee:
    """The referees' common step; see objective.py. They act in iterations `start` to `stop - 1`."""

    weight: float = _field(2.0, low=0)
    weight_final: float = _field(2.0, low=0)
    start: int = _field(0, low=0)
    stop: int = _field(150, low=0)
    balance: bool = True  # the referees' gradient takes the length of the prior's
    balance_epsilon: float = _field(0.0, low=0)
    normalise: bool = False  # before they are added, each referee's gradient takes its weight as its length
    normalise_epsilon: float = _field(0.0, low=0)
    noise: float = _field(0.2, low=0)  # standard deviation added to the views, in [0, 1] units


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefereeSpec:
    """One vision-language model: one that is optimised against, or one that only scores."""

    name: str = _field("clip", allowed=tuple(LOSSES))
    checkpoint: str = "openai/clip-vit-large-patch14"
    revision: str = ""
    losses: dict[str, float] = dataclasses.field(default_factory=lambda: {"cosine": 1.0})  # loss: weight
    weight: float = _field(1.0, above=0)  # of all its losses in a mix
    views: int = _field(0, low=0)  # how many it looks at; 0: views.count
    keep: int = _field(0, low=0)  # so many of the hardest have a gradient; 0: views.keep, or all of its own
    template: str = ""  # text with {} in the prompt's place; empty: the referee's own
    first_token: str = _field("[ENC]", allowed=("[ENC]", "[CLS]"))  # of what reads the image in blip_itm and blip_vqa
    negatives: tuple[str, ...] = ()  # texts that the contrastive loss tells the prompt from
    near: int = _field(0, low=0)  # and so many made of the prompt itself; see prompts.near
    exchange: tuple[tuple[str, ...], ...] = ()  # groups of words that stand for one another in those
    image_size: int = _field(0, low=0)  # side of the views; 0: the checkpoint's
    role: str = _field("optimise", allowed=("optimise", "held_out"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    """The update of the latents; see optim.py. `noise` while the referees act, `tail_noise` after."""

    name: str = _field("sgd", allowed=tuple(optim.OPTIMIZERS))
    lr: float = _field(1.0, above=0)
    lr_final: float = _field(0.5, low=0)
    warmup: int = _field(10, low=0)
    noise: float = _field(0.2, low=0)
    tail_noise: float = _field(0.01, low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
    """The running average of the latents and the restarts from it, at `start`, `start + every`, ..."""

    decay: float = _field(0.95, low=0, high=1)
    start: int = _field(40, low=0)
    every: int = _field(60, low=1)
    alias: bool = False  # as in the authors' code, where a restart makes latents and average one tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views(augment.Settings):
    """Augmented views of the image: how many, which augmentations, and (inherited) the magnitudes of all of them."""

    count: int = _field(10, low=1)
    keep: int = _field(10, low=1)  # so many of the hardest have a gradient
    augmentations: tuple[str, ...] = views.DEFAULT
    shared_erase: bool = True  # one erased rectangle for all views


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """How images are written, and what besides them, scores and log; see outputs.py."""

    format: str = _field("png", allowed=("png", "webp", "webdataset"))  # files, lossless both, or shards of many
    shard_size: int = _field(10000, low=1)  # images in a shard
    shard_images: str = _field("png", allowed=("png", "webp"))  # what they are there
    trajectory: bool = False  # an animated WebP of each item
    stretch: bool = False  # spread each image's values over the whole range, as the authors do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """How the devices of a process share the work: groups that make prompts of their own, and within each split weights."""

    prompt: int = _field(0, low=0)  # groups; 0: as many as there are devices for
    model: int = _field(1, low=1)  # devices of a group, for networks that are too large for one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be chosen."""

    steps: int = _field(160, low=1)
    image_size: int = _field(512, low=8)
    precision: str = _field("float32", allowed=("float32", "bfloat16"))
    batch_size: int = _field(8, low=0)  # items per device (or group of them); 0: what an accelerator's memory holds
    # What is kept of each layer of BLIP, BLIP-2 and ALIGN for the backward pass: its input, products with weights besides, or
    # all. auto: products, where an accelerator's memory allows.
    remat: str = _field("auto", allowed=("auto", "full", "dots", "none"))
    mesh: Mesh = _group(Mesh)
    chunk: int = _field(10, low=1)  # iterations between two looks at the clock, the log and the stop request
    checkpoint_seconds: float = _field(60.0, above=0.0)  # between two checkpoints of what is in flight
    stall_seconds: float = _field(0.0, low=0.0)  # in which nothing moves, then a run ends; 0: see trouble.Watchdog
    seed: int = _field(0, low=0, high=2**32 - 1)
    samples: int = _field(1, low=1)  # images per prompt
    workdir: str = ""  # the run directory; empty: runs/<config>-<fingerprint>
    prompts: tuple[str, ...] = ()
    generator: Generator = _group(Generator)
    sds: Sds = _group(Sds)
    referee: Referee = _group(Referee)
    referees: tuple[RefereeSpec, ...] = (RefereeSpec(),)
    optim: Optim = _group(Optim)
    ema: Ema = _group(Ema)
    views: Views = _group(Views)
    output: str = _field("final", allowed=("final", "ema", "best", "best_held_out"))
    look_every: int = _field(10, low=1)  # iterations between two looks of the held-out referees
    patience: int = _field(0, low=0)  # an image stops after so many looks that find nothing better; 0: never
    clamp: str = _field("hard", allowed=("hard", "straight_through"))
    init: str = _field("noise", allowed=("noise", "sample"))
    init_steps: int = _field(50, low=1)  # of the sampler, if init="sample"
    init_guidance: float = 7.5
    init_candidates: int = _field(1, low=1)  # samples, of which the referees choose the one to start from
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
    return _config_dict(dataclasses.asdict(_parse(changes, RefereeSpec, "referee", {})))


def read(path: str | os.PathLike) -> ml_collections.ConfigDict:
    """What a config file says, as configs/shapes.py: Python with a function `get_config`. Another can begin with it."""
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"there is no config file {str(path)!r}")
    return runpy.run_path(str(path))["get_config"]()


def load(path: str | os.PathLike) -> Settings:
    """The checked settings of a config file."""
    return from_config(read(path))


def from_config(config: Settings | ml_collections.ConfigDict | Mapping) -> Settings:
    """The checked settings of a ConfigDict or a dictionary; what is left out has its default. Raises ConfigError."""
    settings = _parse(config, Settings, "", {})
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


def _wrong(key: str, value: Any, allowed: str) -> ConfigError:
    given = repr(value)
    return ConfigError(
        f"{key} = {given if len(given) <= 200 else given[:200] + '...'} is not possible: it must be {allowed}"
    )


def _parse(value: Any, hint: Any, key: str, limits: Mapping) -> Any:
    """`value` as type `hint` and within `limits`."""
    if dataclasses.is_dataclass(hint):
        return _parse_group(value, hint, key)
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is tuple:
        return _parse_tuple(value, inner, key)
    if kind is dict:
        if not isinstance(value, Mapping | ml_collections.ConfigDict):
            raise _wrong(key, value, "a dictionary of names and numbers")
        return {name: _parse(x, inner[1], f"{key}.{name}", {}) for name, x in sorted(value.items())}
    if kind is bool:
        if not isinstance(value, bool):
            raise _wrong(key, value, "True or False")
        return value
    if kind is str:
        if not isinstance(value, str):
            raise _wrong(key, value, "a text")
    else:
        number = numbers.Integral if kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, number) or not math.isfinite(value):
            raise _wrong(key, value, "a whole number" if kind is int else "a finite number")
        value = kind(value)
    return _within(value, key, limits)


def _within(value: Any, key: str, limits: Mapping) -> Any:
    if "allowed" in limits and value not in limits["allowed"]:
        raise _wrong(key, value, "one of " + ", ".join(map(repr, limits["allowed"])))
    for name, words, is_met in (
        ("low", "at least", lambda limit: value >= limit),
        ("above", "more than", lambda limit: value > limit),
        ("high", "at most", lambda limit: value <= limit),
    ):
        if name in limits and not is_met(limits[name]):
            raise _wrong(key, value, f"{words} {limits[name]}")
    return value


def _parse_tuple(value: Any, inner: tuple, key: str) -> tuple:
    is_open = inner[-1] is Ellipsis
    if not isinstance(value, list | tuple) or not (is_open or len(value) == len(inner)):
        length = "" if is_open else f" of {len(inner)}"
        raise _wrong(
            key,
            value,
            f"a tuple{length}, as in --config.{key}=\"('first', 'second')\"" if is_open else f"a tuple{length}",
        )
    hints = [inner[0]] * len(value) if is_open else inner
    return tuple(_parse(x, hint, f"{key}[{n}]", {}) for n, (x, hint) in enumerate(zip(value, hints, strict=True)))


def _parse_group(value: Any, cls: type, key: str) -> Any:
    if isinstance(value, cls):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(cls)}
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise _wrong(key or "the config", value, "a group of settings (a ConfigDict or a dictionary)")
    value, hints = dict(value.items()), typing.get_type_hints(cls)
    fields, prefix = {field.name: field for field in dataclasses.fields(cls)}, f"{key}." if key else ""
    for name in value:
        if name not in fields:
            raise ConfigError(unknown_key(f"{prefix}{name}", fields))
    return cls(**{name: _parse(x, hints[name], prefix + name, fields[name].metadata) for name, x in value.items()})


def unknown_key(key: str, known: typing.Iterable[str]) -> str:
    """What is said of a key that there is not, beside the `known` ones of its group."""
    *path, name = key.split(".")
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {'.'.join([*path, near[0]])}?" if near else f"there are {', '.join(sorted(known))}"
    return f"{key} is not a setting; {hint}"


def _check(settings: Settings) -> None:
    """What fields must fulfil together, and the ranges that hold for all fields of a kind."""
    if settings.image_size % 8:
        raise _wrong("image_size", settings.image_size, "a multiple of 8")
    is_webp = "webp" in (settings.outputs.format, settings.outputs.shard_images) or settings.outputs.trajectory
    if is_webp and settings.image_size > WEBP_SIDE:
        raise _wrong("image_size", settings.image_size, f"at most {WEBP_SIDE}, as WebP files are asked for")
    # The last timestep drawn is t_max - 2.
    for key in ("t_max", "t_max_final"):
        if getattr(settings.sds, key) < settings.sds.t_min + 2:
            raise _wrong(f"sds.{key}", getattr(settings.sds, key), f"at least sds.t_min + 2 = {settings.sds.t_min + 2}")
    if len(prompts.PLACES.findall(settings.sds.prompt)) > 1:
        raise _wrong(
            "sds.prompt", settings.sds.prompt, "a text with one {} or {caption} where the prompt is put, or with none"
        )
    if settings.init_candidates > 1 and settings.init != "sample":
        raise _wrong("init_candidates", settings.init_candidates, 'one, unless init = "sample"')
    _check_views(settings.views)
    _check_referees(settings)


def _check_views(settings: Views) -> None:
    if settings.keep > settings.count:
        raise _wrong("views.keep", settings.keep, f"at most views.count = {settings.count}")
    try:
        views.check(settings.augmentations)
    except ValueError as error:
        raise ConfigError(f"views.augmentations = {settings.augmentations!r} is not possible: {error}") from error
    for field in dataclasses.fields(augment.Settings):
        key, value = field.name, getattr(settings, field.name)
        amounts = value if isinstance(value, tuple) else (value,)
        if key.endswith("_p") and not 0 <= value <= 1:
            raise _wrong(f"views.{key}", value, "a probability, 0 to 1")
        if min(amounts) < 0:
            raise _wrong(f"views.{key}", value, "at least 0")
        if key.endswith(("_area", "_ratio")) and not 0 < amounts[0] <= amounts[1]:
            raise _wrong(f"views.{key}", value, "(low, high) with 0 < low <= high")
        if key.endswith("_area") and amounts[1] > 1:
            raise _wrong(f"views.{key}", value, "shares of the view, at most 1")
    if settings.elastic_sigma == 0:
        raise _wrong("views.elastic_sigma", 0.0, "more than 0")


def _check_referees(settings: Settings) -> None:
    for n, spec in enumerate(settings.referees):
        key = f"referees[{n}]"
        if spec.losses.keys() - set(LOSSES[spec.name]):
            known = ", ".join(LOSSES[spec.name])
            raise _wrong(f"{key}.losses", spec.losses, f"a dictionary of weights of {spec.name}'s losses: {known}")
        if min(spec.losses.values(), default=0) < 0 or not any(spec.losses.values()):
            raise _wrong(f"{key}.losses", spec.losses, "weights of at least 0, one of them more")
        if "contrastive" in spec.losses and not (spec.negatives or spec.near):
            raise _wrong(
                f"{key}.negatives", spec.negatives, f"some texts, or {key}.near some number, for the contrastive loss"
            )
        if (spec.negatives or spec.near) and "contrastive" not in LOSSES[spec.name]:
            raise _wrong(f"{key}.negatives", spec.negatives, f"empty, and {key}.near 0: {spec.name} reads none")
        if spec.template and spec.template.count("{}") != 1:
            raise _wrong(f"{key}.template", spec.template, "empty, or a text with one {} where the prompt is put")
        if not spec.checkpoint:
            raise _wrong(f"{key}.checkpoint", "", "a directory, a hub id, or shapes/...")
        count = spec.views or settings.views.count
        if spec.keep > count:
            raise _wrong(f"{key}.keep", spec.keep, f"at most its number of views, {count}")
    if all(spec.role != "held_out" for spec in settings.referees):
        for key, asks in (("output", settings.output == "best_held_out"), ("patience", settings.patience > 0)):
            if asks:
                raise _wrong(
                    key, getattr(settings, key), 'something else, unless one of the referees has role="held_out"'
                )
    acts = settings.referee.weight or settings.referee.weight_final or settings.init_candidates > 1
    if acts and all(spec.role != "optimise" for spec in settings.referees):
        raise _wrong(
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
    said = lambda values, key: json.dumps(values[key]) if key in values else "(absent)"  # noqa: E731
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
    pin = lambda x: dataclasses.replace(x, revision=x.revision or commits.get(x.checkpoint, ""))  # noqa: E731
    return dataclasses.replace(settings, generator=pin(settings.generator), referees=tuple(map(pin, settings.referees)))


def checkpoint_path(name: str) -> str:
    """The local directory of one of the package's own checkpoints (`shapes/...`); any other name as it is.

    Raises ConfigError where the package holds no such checkpoint.
    """
    if not name.startswith(EMBEDDED):
        return name
    path = ASSETS / name.removeprefix(EMBEDDED)
    if ".." in path.parts or not path.is_dir():
        held = ", ".join(sorted(EMBEDDED + x.name for x in ASSETS.glob("*") if x.is_dir())) or "none"
        raise ConfigError(f"the checkpoint {name!r} is not in the package; it holds {held}")
    return str(path)
