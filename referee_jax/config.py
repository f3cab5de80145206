"""Settings: names, types, defaults and ranges, checked before any weights are loaded.

`default()` is an ml_collections ConfigDict for configs/*.py and `--config.x.y=`; `from_config`
turns it into frozen dataclasses. The ConfigDict, the checks and the messages are derived from
these. The defaults are those of "Referee Can Play" (arXiv 2402.16305) for Stable Diffusion 1.5.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import runpy
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import ml_collections

from referee_jax import prompts, schema
from referee_jax.method import augmentations, selection, views
from referee_jax.method.latent_losses import LATENT_LOSSES
from referee_jax.method.ways import guided, noise, optim
from referee_jax.schema import ConfigError, bounded, parse, wrong

# Referee -> its losses. Referees with one of CONTRASTS use negatives. BLIP-2 has itg only if
# its weights have a language head, which is known when they are loaded.
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
    "qwen3_vl": ("vqa",),
    "vqascore": ("vqa", "versus"),
}
CONTRASTS = {"contrastive", "versus"}  # losses that tell the prompt from other texts
# Referees that are asked where things are and how many, and the augmentations that make true answers false.
WHOLE = ("qwen3_vl", "vqascore")
ASKED = ("blip_vqa", "qwen3_vl", "vqascore")  # referees that answer the questions a prompt is taken apart into
MOVING = ("Af", "Er", "Hf", "Ro", "Et", "Ts", "Cr", "Re")
_WHY = 'is asked where things are, and these cut things off or turn "left of" round'

ENTRY_POINTS = "referee_jax.referees"  # the group of packages' own referees

WEBP_SIDE = 16383  # pixels, the largest side of a WebP

# Settings that do not change any image's pixels.
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
    revision: str = ""  # commit of a hub id; empty: the latest
    # Another U-Net in its place, such as one of few steps: hub id, local directory, or shapes/...; empty: its own.
    unet: str = ""
    unet_revision: str = ""  # commit of that hub id; empty: the latest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sds:
    """Score distillation; see method/ways/sds.py.

    `weight` and `t_max` follow a cosine to their final values over `weight_steps` iterations.
    """

    weight: float = bounded(800.0, low=0)  # of the prior's gradient; 0 with weight_final 0: no score distillation
    weight_final: float = bounded(400.0, low=0)  # of the cosine
    weight_steps: int = bounded(160, low=1)  # iterations of the cosines
    guidance: float = 30.0  # scale of classifier-free guidance
    t_min: int = bounded(50, low=0)  # the smallest timestep that is drawn
    t_max: int = bounded(950, low=2, high=1000)  # timesteps up to t_max - 2 are drawn
    t_max_final: int = bounded(950, low=2, high=1000)  # of the cosine
    alpha_power: float = 0.0  # a of w_t, see method/ways/sds.py
    sigma_power: float = 0.0  # b of w_t
    # {} is the prompt, {caption} the prompt in lower case without most marks. With neither, the
    # prior's text is the same for all prompts.
    prompt: str = "A photo exactly contains {caption}"
    negative_prompt: str = ""  # what guidance leads away from; empty: the empty text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guided:
    """The way of method = "guided", DDIM in the space of clean latents; see method/ways/guided.py."""

    guidance: float = 7.5  # scale of classifier-free guidance
    first: int = bounded(980, low=1, high=999)  # timestep of the first iteration
    last: int = bounded(20, low=0, high=998)  # of the last
    high: int = bounded(800, low=0, high=999)  # the referees pull at timesteps from high ...
    low: int = bounded(200, low=0, high=999)  # ... down to low
    travels: int = bounded(0, low=0)  # how often each stretch of `back` levels in this window is gone through again
    back: int = bounded(2, low=1)  # levels of a stretch
    eta: float = bounded(0.0, low=0, high=1)  # fresh noise at each level: 0 DDIM, 1 ancestral sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """The way of method = "noise", which moves a sampler's starting noise; see method/ways/noise.py."""

    rule: str = "reno"  # how it is moved: reno, sphere, gper, langevin, or a plugin's
    steps: int = bounded(1, low=1, high=50)  # of the sampler; each has a gradient
    first: int = bounded(999, low=99, high=999)  # timestep of its first step; 800 for Hyper-SD's one-step generators
    guidance: float = 1.0  # scale of the sampler's classifier-free guidance; 1: none
    lr: float = bounded(5.0, low=0)  # step size of reno, sphere and gper
    momentum: float = bounded(0.9, low=0, high=1)  # of reno and sphere
    clip: float = bounded(0.1, low=0)  # largest norm of the gradient (reno), largest element (gper); 0: none
    norm_weight: float = bounded(0.01, low=0)  # of the likelihood of the noise's length (reno)
    gamma: float = bounded(0.3, low=0, high=0.75)  # step size of langevin
    eta: float = bounded(0.8, low=0)  # the referees' weight in langevin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Referee:
    """The referees' common step in iterations `start` to `stop - 1`; see method/objective.py."""

    weight: float = bounded(2.0, low=0)  # length of the referees' step in steps of the prior
    weight_final: float = bounded(2.0, low=0)  # of the cosine from start to stop
    start: int = bounded(0, low=0)  # the first iteration with the referees
    stop: int = bounded(150, low=0)  # the first without them
    balance: bool = True  # scale the referees' gradient to the norm of the prior's
    balance_epsilon: float = bounded(0.0, low=0)  # norm below which the gradient is not scaled to the prior's
    normalise: bool = False  # scale each referee's gradient to a norm of its weight
    normalise_epsilon: float = bounded(0.0, low=0)  # norm below which a gradient is not scaled to its weight
    noise: float = bounded(0.2, low=0)  # standard deviation of the noise on views in [0, 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefereeSpec:
    """One vision-language model, which is optimised or held out."""

    name: str = "clip"  # kind of referee, of the table above; or your own "module:function", see referees.md
    # Hub id, local directory, or shapes/...; of a referee of your own whatever it reads, or empty.
    checkpoint: str = "openai/clip-vit-large-patch14"
    revision: str = ""  # commit of a hub id; empty: the latest
    losses: dict[str, float] = dataclasses.field(default_factory=lambda: {"cosine": 1.0})  # loss: weight
    weight: float = bounded(1.0, above=0)  # of all its losses in a mix
    views: int = bounded(0, low=0)  # number of its views; 0: views.count
    keep: int = bounded(0, low=0)  # number of hardest views with a gradient; 0: views.keep, or all
    augmentations: tuple[str, ...] = ()  # of its views; empty: views.augmentations; none for qwen3_vl, vqascore
    template: str = ""  # text with {} for the prompt; empty: the referee's own
    # The most questions that a prompt is taken apart into, each of one fact; 0: one question, about the whole prompt.
    # For blip_vqa, qwen3_vl and vqascore; see questions.md.
    questions: int = bounded(0, low=0)
    first_token: str = bounded("[ENC]", allowed=("[ENC]", "[CLS]"))  # of the text in blip_itm and blip_vqa
    truncate: bool = False  # cut a text that is too long, as its authors' code does, instead of refusing it
    negatives: tuple[str, ...] = ()  # texts to contrast the prompt with
    near: int = bounded(0, low=0)  # number of hard negatives made from the prompt; see prompts.hard_negatives
    exchange: tuple[tuple[str, ...], ...] = ()  # groups of interchangeable words in those
    image_size: int = bounded(0, low=0)  # side of the views; 0: the checkpoint's
    role: str = bounded("optimise", allowed=("optimise", "held_out"))  # held_out: evaluated, never in the gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    """The latents' update (method/ways/optim.py): `noise` while the referees act, `tail_noise` after."""

    name: str = "sgd"  # plain gradient descent, adam, or a plugin's
    lr: float = bounded(1.0, above=0)  # step size
    lr_final: float = bounded(0.5, low=0)  # of the referees' step, at the last iteration
    warmup: int = bounded(10, low=0)  # iterations in which the referees' step grows to lr
    noise: float = bounded(0.2, low=0)  # standard deviation, in latent units, while the referees act
    tail_noise: float = bounded(0.01, low=0)  # after that


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
    """Moving average of the latents, and restarts from it at `start`, `start + every`, ..."""

    decay: float = bounded(0.95, low=0, high=1)  # of the average, per iteration
    start: int = bounded(40, low=0)  # iteration of the first restart
    every: int = bounded(60, low=1)  # iterations between restarts
    alias: bool = False  # as in the authors' code: after a restart, average and latents are one tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views(augmentations.Settings):
    """Augmented views of the image; the augmentations' magnitudes are inherited."""

    count: int = bounded(10, low=1)  # number of views of each referee
    keep: int = bounded(10, low=1)  # number of hardest views with a gradient
    augmentations: tuple[str, ...] = views.DEFAULT  # in this order; names in method/augmentations.py
    shared_erase: bool = True  # one erased rectangle for all views
    resize: str = bounded(
        "pool", allowed=("pool", "fit")
    )  # to a referee's size: by the mean of average and maximum, or as the referee's authors do
    per_pass: int = bounded(0, low=0)  # views per microbatch, to save memory; 0: all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """How images are written; see storage/run_directory.py."""

    format: str = bounded("png", allowed=("png", "webp", "webdataset"))  # lossless files, or shards
    shard_size: int = bounded(10000, low=1)  # images per shard
    shard_images: str = bounded("png", allowed=("png", "webp"))  # format of images in shards
    trajectory: bool = False  # also write an animated WebP of each item
    stretch: bool = False  # stretch each image's values to the full range, as the authors do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """The device mesh of a process: groups that make different prompts and split their weights."""

    prompt: int = bounded(0, low=0)  # number of groups; 0: as many as the devices allow
    model: int = bounded(1, low=1)  # devices per group, for networks too large for one device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings."""

    steps: int = bounded(160, low=1)  # iterations
    image_size: int = bounded(512, low=8)  # side of the square image, in pixels
    precision: str = bounded("float32", allowed=("float32", "bfloat16"))  # of weights and activations
    batch_size: int = bounded(8, low=0)  # items per device (or group); 0: what an accelerator's memory holds
    # What each layer of BLIP, BLIP-2, ALIGN, Qwen3-VL and CLIP-FlanT5 keeps for the backward pass: full: its input; dots:
    # also products with weights; none: everything. auto: dots if it fits into the memory.
    remat: str = bounded("auto", allowed=("auto", "full", "dots", "none"))
    mesh: Mesh = _group(Mesh)
    chunk: int = bounded(10, low=1)  # iterations between two log lines and checks for a stop request
    checkpoint_seconds: float = bounded(60.0, above=0.0)  # between two checkpoints of a batch in flight
    stall_seconds: float = bounded(0.0, low=0.0)  # without progress before a run ends; 0: see recovery.Watchdog
    seed: int = bounded(0, low=0, high=2**32 - 1)  # with prompt and sample, it decides all that is random
    samples: int = bounded(1, low=1)  # images per prompt
    workdir: str = ""  # the run directory; empty: runs/<config>-<fingerprint>
    prompts: tuple[str, ...] = ()  # used where none are given on the command line
    plugins: tuple[str, ...] = ()  # modules of your own, imported before the settings are read; see plugins.md
    # How the picture is moved: sds, the clean latent by score distillation; guided, the clean latent of DDIM on its way
    # from noise; noise, the starting noise of a sampler. See method.md.
    method: str = bounded("sds", allowed=("sds", "guided", "noise"))
    generator: Generator = _group(Generator)
    sds: Sds = _group(Sds)
    guided: Guided = _group(Guided)
    noise: Noise = _group(Noise)
    referee: Referee = _group(Referee)
    referees: tuple[RefereeSpec, ...] = (RefereeSpec(),)
    # Name: weight of losses of the latents that plugins register; their gradients are added to the prior's.
    latent_losses: dict[str, float] = _group(dict)
    optim: Optim = _group(Optim)
    ema: Ema = _group(Ema)
    views: Views = _group(Views)
    output: str = bounded(
        "final", allowed=("final", "ema", "best", "best_held_out")
    )  # which latents are decoded: the last, their average, or those of the lowest loss
    look_every: int = bounded(10, low=1)  # iterations between two evaluations of the held-out referees
    patience: int = bounded(0, low=0)  # early stopping after so many evaluations without improvement; 0: never
    clamp: str = bounded(
        "hard", allowed=("hard", "straight_through")
    )  # gradient of the clamp to [0, 1], see method/objective.py
    init: str = bounded("noise", allowed=("noise", "sample"))  # start from noise, or from a DDIM sample
    init_steps: int = bounded(50, low=1, high=1000)  # of the sampler, if init="sample"
    init_guidance: float = 7.5  # of the sampler, if init="sample"
    init_candidates: int = bounded(1, low=1)  # samples, the best of which by the referees is the start
    particles: int = bounded(1, low=1)  # pictures of an item that are made beside each other; the best is the result
    select: str = bounded("none", allowed=selection.RULES)  # which of them go on, see method/selection.py
    select_every: int = bounded(10, low=1)  # iterations between two selections
    select_scale: float = bounded(10.0, low=0)  # lambda of "smc"
    outputs: Outputs = _group(Outputs)


# --- ConfigDicts ------------------------------------------------------------------------------------------------------


def _config_dict(values: Any) -> Any:
    """Dictionaries as locked ConfigDicts, also in tuples, which ml_collections leaves alone."""
    if isinstance(values, Mapping):
        config = ml_collections.ConfigDict({key: _config_dict(value) for key, value in values.items()})
        return config.lock()
    return tuple(map(_config_dict, values)) if isinstance(values, tuple) else values


def default() -> ml_collections.ConfigDict:
    """The paper's settings, typed and locked."""
    return _config_dict(dataclasses.asdict(Settings()))


def referee(**changes: Any) -> ml_collections.ConfigDict:
    """An entry of `config.referees`: the defaults with `changes`. Raises ConfigError.

    The checkpoint of a referee of one's own is by default empty.
    """
    spec = parse(changes, RefereeSpec, "referee", {})
    if "checkpoint" not in changes and own_referee(spec.name, "referee.name"):
        spec = dataclasses.replace(spec, checkpoint="")
    return _config_dict(dataclasses.asdict(spec))


def own_referee(name: str, key: str = "name") -> str:
    """The "module:function" of a referee that is not the package's: its name, or the entry point so called.

    Empty for one of LOSSES. Raises ConfigError for any other name, of the setting `key`.
    """
    if name in LOSSES:
        return ""
    points = {point.name: point.value for point in own_referees()}
    if name in points or ":" in name:
        return points.get(name, name)
    known = ", ".join(map(repr, [*LOSSES, *points]))
    raise wrong(key, name, f'one of {known}, or your own: "module:function", see docs/referees.md')


def own_referees() -> metadata.EntryPoints:
    """The referees of installed packages: their entry points."""
    return metadata.entry_points(group=ENTRY_POINTS)


def find(config: str | os.PathLike) -> str:
    """The path of a config: a name, as "shapes", is one of the package's. Raises ConfigError.

    Modules beside a file of the user's can be imported from then on.
    """
    name = os.fspath(config)
    package = pathlib.Path(__file__).parent
    if not re.fullmatch(r"[\w-]+", name) or pathlib.Path(name).is_file():
        directory = pathlib.Path(name).absolute().parent
        # Last, so that it hides no other module; the package's own configs have names of others ("clip").
        if directory not in (package / "configs", package.parent / "configs") and str(directory) not in sys.path:
            sys.path.append(str(directory))
        return name
    # An installed package has them inside, a checkout beside it.
    paths = sorted(package.glob("configs/*.py")) or sorted(package.parent.glob("configs/*.py"))
    files = {path.stem: str(path) for path in paths}
    if name not in files:
        raise ConfigError(f"there is no config {name!r}; there are {', '.join(files)}, or give a file (with .py)")
    return files[name]


def read(path: str | os.PathLike) -> ml_collections.ConfigDict:
    """The result of `get_config` in a config file, by path or name (see `find`). Raises ConfigError."""
    path = find(path)
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"there is no config file {str(path)!r}")
    try:
        return runpy.run_path(str(path))["get_config"]()
    except ConfigError:
        raise
    except Exception as error:  # a config file is code, and may raise anything
        reason = "it has no function get_config" if str(error) == "'get_config'" else f"{type(error).__name__}: {error}"
        raise ConfigError(f"the config file {str(path)!r} fails: {reason}") from error


def load(path: str | os.PathLike) -> Settings:
    """The checked settings of a config file. Raises ConfigError."""
    return from_config(read(path))


def from_config(config: Settings | ml_collections.ConfigDict | Mapping) -> Settings:
    """The checked settings of a ConfigDict or dictionary, with defaults; imports their plugins. Raises ConfigError."""
    if isinstance(config, Mapping | ml_collections.ConfigDict):
        for n, name in enumerate(parse(config.get("plugins", ()), tuple[str, ...], "plugins", {})):
            schema.imported(name, f"plugins[{n}]")
    settings = parse(config, Settings, "", {})
    _check(settings)
    return settings


def recorded(values: Mapping) -> Settings:
    """The settings of a record that others may have written: imports nothing and checks types and ranges alone."""
    return parse(values, Settings, "", {})


def override(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings with `changes`, such as {"sds.guidance": 7.5}. Raises ConfigError."""
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
    if settings.method != "sds":
        _check_way(settings)
    if settings.optim.name not in optim.OPTIMIZERS:
        raise wrong("optim.name", settings.optim.name, f"one of {optim.OPTIMIZERS.known()}")
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
            guided_levels(settings)
        except ValueError as error:
            raise ConfigError(f"guided.travels = {settings.guided.travels} is not possible: {error}") from error


def guided_levels(settings: Settings) -> tuple[int, ...]:
    """The timestep of each iteration of method = "guided"."""
    s = settings.guided
    how = {"travels": s.travels, "back": s.back, "low": s.low, "high": s.high}
    return tuple(map(int, guided.levels(settings.steps, s.first, s.last, **how)))


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
        else:
            _check_known_referee(spec, key)
        if min(spec.losses.values(), default=0) < 0 or not any(spec.losses.values()):
            raise wrong(f"{key}.losses", spec.losses, "weights of at least 0, one of them more")
        _check_augmentations(f"{key}.augmentations", spec.augmentations)
        if spec.name in WHOLE and set(spec.augmentations) & set(MOVING):
            raise wrong(f"{key}.augmentations", spec.augmentations, f"without {', '.join(MOVING)}: {spec.name} {_WHY}")
        if spec.template and spec.template.count("{}") != 1:
            raise wrong(f"{key}.template", spec.template, "empty, or a text with one {} where the prompt is put")
        count = spec.views or settings.views.count
        if spec.keep > count:
            raise wrong(f"{key}.keep", spec.keep, f"at most its number of views, {count}")
    shared, judges = settings.views.augmentations, [spec for spec in settings.referees if spec.role == "optimise"]
    if shared != views.DEFAULT and set(shared) & set(MOVING) and judges and all(x.name in WHOLE for x in judges):
        raise wrong("views.augmentations", shared, f"without {', '.join(MOVING)}: {judges[0].name} {_WHY}")
    if all(spec.role != "held_out" for spec in settings.referees):
        for key, is_needed in (("output", settings.output == "best_held_out"), ("patience", settings.patience > 0)):
            if is_needed:
                raise wrong(
                    key, getattr(settings, key), 'something else, unless one of the referees has role="held_out"'
                )
    is_needed = settings.referee.weight or settings.referee.weight_final or settings.init_candidates > 1
    if is_needed and all(spec.role != "optimise" for spec in settings.referees):
        raise wrong(
            "referees",
            settings.referees,
            'one with role="optimise" at least, unless referee.weight and weight_final are 0 and init_candidates is 1',
        )


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


# --- records ----------------------------------------------------------------------------------------------------------


def to_dict(settings: Settings) -> dict[str, Any]:
    """JSON values: `from_config(to_dict(settings)) == settings`."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def to_json(settings: Settings) -> str:
    """`to_dict` as indented JSON with sorted keys."""
    return json.dumps(to_dict(settings), indent=2, sort_keys=True)


def image_settings(settings: Settings) -> dict[str, Any]:
    """The part of `to_dict` that the pixels of a given prompt and sample depend on."""
    return image_part(to_dict(settings))


def image_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """`image_settings` of a dictionary, perhaps written by another version."""
    part = {}
    for key, value in values.items():
        inner = [name.removeprefix(f"{key}.") for name in _NOT_OF_THE_IMAGE if name.startswith(f"{key}.")]
        if inner and isinstance(value, Mapping):
            value = {name: x for name, x in value.items() if name not in inner}
        if key not in _NOT_OF_THE_IMAGE:
            part[key] = value
    return part


def fingerprint(settings: Settings) -> str:
    """SHA-256 of `image_settings` and of the source of modules of one's own, in hex.

    Checkpoints count by name and revision, not content.
    """
    names = {*settings.plugins, *(own_referee(spec.name).partition(":")[0] for spec in settings.referees)} - {""}
    files = [getattr(schema.imported(name, "plugins"), "__file__", None) for name in sorted(names)]
    code = [hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest() for file in files if file]
    values = image_settings(settings) | ({"code": code} if code else {})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def diff(old: Settings | Mapping, new: Settings | Mapping) -> str:
    """The differences of two settings (or dictionaries), by line: `sds.guidance: 30.0 -> 7.5`."""
    old, new = (_flat(x if isinstance(x, Mapping) else to_dict(x)) for x in (old, new))
    text = lambda values, key: json.dumps(values[key]) if key in values else "(absent)"
    keys = sorted(key for key in old.keys() | new.keys() if text(old, key) != text(new, key))
    return "\n".join(f"{key}: {text(old, key)} -> {text(new, key)}" for key in keys)


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """Flattens `{"a": {"b": 1}, "c": [{"d": 2}]}` to `{"a.b": 1, "c[0].d": 2}`."""
    if isinstance(values, Mapping):
        parts = [(f"{key}.{name}" if key else name, x) for name, x in values.items()]
    elif isinstance(values, list) and any(isinstance(x, Mapping) for x in values):
        parts = [(f"{key}[{n}]", x) for n, x in enumerate(values)]
    else:
        return {key: values}
    return {name: x for part, inner in parts for name, x in _flat(inner, part).items()}


def checkpoints(settings: Settings) -> list[tuple[str, str]]:
    """(name, revision) of each checkpoint in the settings, once."""
    generator = settings.generator
    named = [(generator.checkpoint, generator.revision), (generator.unet, generator.unet_revision)]
    named += [(spec.checkpoint, spec.revision) for spec in settings.referees]
    return list(dict.fromkeys(pair for pair in named if pair[0]))


def pinned(settings: Settings, commits: Mapping[str, str]) -> Settings:
    """The settings, with `commits` (by checkpoint) in place of empty revisions."""
    pin = lambda x: dataclasses.replace(x, revision=x.revision or commits.get(x.checkpoint, ""))
    generator = pin(settings.generator)
    revision = generator.unet_revision or commits.get(generator.unet, "")
    generator = dataclasses.replace(generator, unet_revision=revision)
    return dataclasses.replace(settings, generator=generator, referees=tuple(map(pin, settings.referees)))
