"""All settings with types, defaults and ranges; those of "Referee Can Play" (arXiv 2402.16305) for Stable Diffusion 1.5."""

import dataclasses
from typing import Any

from referee_jax.method import augmentations, selection, views
from referee_jax.schema import bounded


def _group(cls: type) -> Any:
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA, which is merged into the generator's weights as they are read."""

    file: str = ""  # path of a file of safetensors, from the working directory
    weight: float = 1.0  # of its change


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """The image prior: a checkpoint of Stable Diffusion, SDXL, SD3 or FLUX.1-schnell in diffusers' layout."""

    # Hub id, local directory, shapes/..., or a file of Stable Diffusion 1, 2 or XL in the authors' layout (.safetensors).
    checkpoint: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    revision: str = ""  # commit of a hub id; empty: the latest
    # Another network in the place of its U-Net or transformer, such as one of few steps: hub id, local directory, or
    # shapes/...; empty: its own.
    unet: str = ""
    unet_revision: str = ""  # commit of that hub id; empty: the latest
    vae: str = ""  # another decoder in the place of its own, such as a tiny one; as `unet`
    vae_revision: str = ""  # commit of that hub id; empty: the latest
    loras: tuple[Lora, ...] = ()  # merged into its weights, below
    # What the U-Net of a file predicts, where it does not say it itself: those of Stable Diffusion 2.
    prediction: str = bounded("", allowed=("", "epsilon", "v_prediction"))


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
    negative_prompt: str = ""  # what guidance leads away from; empty: the empty text, of SDXL zeros


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
    # Timestep of its first step; 800 for Hyper-SD's one-step generators. SD3 and FLUX begin at noise.
    first: int = bounded(999, low=99, high=999)
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
    """One vision-language model, which is optimised, helps to choose, or is held out."""

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
    # choose: never in the gradient, but in the choice among starts and particles, beside those that are optimised;
    # held_out: in neither, evaluated alone.
    role: str = bounded("optimise", allowed=("optimise", "choose", "held_out"))

    @property
    def is_optimised(self) -> bool:
        """Whether it has part in the gradient."""
        return self.role == "optimise"

    @property
    def is_held_out(self) -> bool:
        """Whether it has part neither in the gradient nor in a choice."""
        return self.role == "held_out"

    @property
    def weighted(self) -> dict[str, float]:
        """The weight of each loss times the referee's own, by name."""
        return {name: float(self.weight * weight) for name, weight in sorted(self.losses.items())}


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
    # In this order: Af affine, Pe perspective, Ji colour jitter, Er erasing, Hf flip, Sh sharpness, Gn Gaussian noise, Ro
    # rotation, Et elastic, Ts thin-plate spline, Cr crop, Re resized crop; or a plugin's.
    augmentations: tuple[str, ...] = views.DEFAULT
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
    # What each layer of CLIP, SigLIP, BLIP, BLIP-2, ALIGN, Qwen3-VL and CLIP-FlanT5 keeps for the backward pass: full: its
    # input; dots: also products with weights; none: everything. auto: dots if it fits into the memory.
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
    init_guidance: float = 7.5  # of the sampler, if init="sample"; 1: none, as generators of few steps want it
    init_candidates: int = bounded(1, low=1)  # samples, the best of which by the referees is the start
    particles: int = bounded(1, low=1)  # pictures of an item that are made beside each other; the best is the result
    select: str = bounded("none", allowed=selection.RULES)  # which of them go on, see method/selection.py
    select_every: int = bounded(10, low=1)  # iterations between two selections
    select_scale: float = bounded(10.0, low=0)  # lambda of "smc"
    outputs: Outputs = _group(Outputs)
