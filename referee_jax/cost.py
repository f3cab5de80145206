"""What a config costs: operations, bytes and the least time on some chips, from the sizes of its networks alone.

    print(cost.table(cost.estimate(config.load("configs/paper.py"))))

Operations are counted from the program of an iteration (program.py), what is computed twice to save memory twice; live memory
is estimated from the same program (memory.py). No weights, no device, no compilation.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core

from referee_jax import assembly, config, console, memory, program, sizes
from referee_jax.hardware import chips
from referee_jax.method import held_out as held_out_lib
from referee_jax.method import inversion, sds, views

UNKNOWN, MOST = 8, 64  # images at once where the memory is not known, and where it is: more are no faster
USABLE = 0.9  # of a chip's memory: the rest is the runtime's, and lost between buffers


@dataclasses.dataclass(frozen=True)
class Step:
    """What an iteration of one image reads: arrays, or jax.ShapeDtypeStructs in their place."""

    settings: config.Settings
    networks: inversion.Networks
    text_encoder: Any
    prompt: inversion.Prompt
    hyper: inversion.Hyper
    plan: inversion.Plan
    assumed: tuple[str, ...] = ()


class Part(NamedTuple):
    """A piece of an iteration of one image: `fn(networks, prompt, hyper, x, key)`, with `x` float32 of that `shape`."""

    name: str
    fn: Callable[..., Any]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a config costs; operations are of one image, bytes are bytes.

    Attributes:
        parts: operations of each part of an iteration; a referee's "forward" is within its "forward + backward".
        step: of an iteration with all parts; `tail` of one without referees, `look` of a look of the held-out referees.
        image: of a whole image, with its start and its end.
        weights: bytes of each network; `fixed` is what an iteration needs besides them whatever the batch, and `live` for each
            image of a batch.
        assumed: sentences on sizes that were taken from elsewhere.
    """

    parts: dict[str, float]
    step: float
    tail: float
    look: float
    image: float
    weights: dict[str, int]
    fixed: int
    live: int
    assumed: tuple[str, ...] = ()

    def seconds(self, chip: chips.Chip) -> float:
        """The least that an image takes, if the chip did nothing but multiply."""
        return self.image / (chip.rate * 1e12)

    def fits(self, chip: chips.Chip) -> int:
        """Images of a batch on one chip."""
        free = USABLE * chip.bytes - sum(self.weights.values()) - self.fixed
        return max(0, int(free // self.live))


class Work(NamedTuple):
    """Operations of one image, as Estimate has them."""

    step: float
    tail: float
    look: float
    image: float


@dataclasses.dataclass(frozen=True)
class Running:
    """What an engine's program costs: operations of an `image`, bytes on each device of `weights` and of a batch besides them.

    `chip` is the kind of device, None where it is not in the table.
    """

    image: float
    weights: int
    batch: int
    chip: chips.Chip | None

    def line(self, images: int) -> str:
        """For reading, of so many images that are to be made."""
        each, total = (_amount(n * self.image, "FLOP") for n in (1, images))
        weights, batch = (_amount(n, "B") for n in (self.weights, self.batch))
        least = (
            f"; at least {self.image / self.chip.rate / 1e12:.3g} s an image on {self.chip.name}" if self.chip else ""
        )
        return f"{each} for an image, {total} for all {images}; {weights} of weights, {batch} for a batch{least}"


def abstract_step(settings: config.Settings) -> Step:
    """An iteration of a config without weights. Raises what `sizes.abstract` does."""
    return make_step(settings, sizes.abstract(settings))


def make_step(settings: config.Settings, sized: sizes.Sized) -> Step:
    """An iteration over these networks; what depends on the text is abstract."""
    judges = [judge for judge in sized.judges if judge.spec.role == "optimise"]
    held_out = [judge for judge in sized.judges if judge.spec.role == "held_out"]
    remat = "full" if settings.remat == "auto" else settings.remat
    networks = assembly.make_networks(sized.prior, judges, held_out, remat=remat)
    tokens = assembly.tokenize(settings, sized.prior.tokenizer, judges, held_out, "a")
    prompt = jax.eval_shape(assembly.encode, networks, sized.prior.text_encoder, tokens)
    plan = assembly.make_plan(settings, sized.prior, judges, held_out)
    hyper = assembly.make_hyper(settings)
    return Step(settings, networks, sized.prior.text_encoder, prompt, hyper, plan, sized.assumed)


def fitting(settings: config.Settings, sized: sizes.Sized, limit: int | None) -> config.Settings:
    """`settings` with what they leave open decided by memory of `limit` bytes (None: unknown).

    `remat` "auto" becomes "dots" if a batch then fits, else "full"; `batch_size` 0 the images that fit, at most MOST, or UNKNOWN
    where the memory is.
    """
    is_open = settings.remat == "auto"
    if limit is None:
        remat = "full" if is_open else settings.remat
        return dataclasses.replace(settings, remat=remat, batch_size=settings.batch_size or UNKNOWN)
    if not is_open and settings.batch_size:
        return settings
    for remat in ("dots", "full") if is_open else (settings.remat,):
        tried = dataclasses.replace(settings, remat=remat)
        if batch := fitting_batch(tried, sized, limit):
            return dataclasses.replace(tried, batch_size=batch)
    return dataclasses.replace(tried, batch_size=settings.batch_size or 1)  # the device will say


def fitting_batch(settings: config.Settings, sized: sizes.Sized, limit: int) -> int:
    """The batch that is asked for, if it fits, else 0; where none is, the largest that does."""
    step = make_step(settings, sized)
    free = USABLE * limit - sum(_weights(step).values())
    needed = lambda batch: memory.peak(_traced(step, batch))  # noqa: E731
    if settings.batch_size:
        return settings.batch_size if needed(settings.batch_size) <= free else 0
    least, most = needed(1), needed(2)
    return min(MOST, 1 + int((free - least) // (most - least))) if least <= free else 0


def parts(step: Step) -> list[Part]:
    """The pieces of an iteration."""
    plan = step.plan
    side = step.settings.image_size
    found = [
        Part("U-Net", _unet, plan.latent),
        Part("decoder", lambda networks, prompt, hyper, z, key: inversion.decode(networks, z, plan), plan.latent),
        Part("decoder + pullback", _decoder(plan), plan.latent),
    ]
    specs = [spec for spec in step.settings.referees if spec.role == "optimise"]
    for n, (spec, looks, referee) in enumerate(zip(specs, plan.looks, step.networks.referees, strict=True)):
        name, size = spec.name if len(specs) == 1 else f"{spec.name} {n}", referee.image_size
        found += [
            Part(f"{name}: views + pullback", _views(looks, size, plan.shared_erase), (side, side, 3)),
            Part(f"{name}: forward", _forward(n, looks), (looks.keep, size, size, 3)),
            Part(f"{name}: forward + backward", _backward(n, looks), (looks.keep, size, size, 3)),
        ]
        if looks.keep < looks.count:
            found.append(Part(f"{name}: choice of views", _forward(n, looks), (looks.count, size, size, 3)))
    return found


def _unet(networks, prompt, hyper, z: Array, key: Array) -> Array:
    t = sds.sample_timestep(key, hyper.prior, jnp.int32(0), len(networks.alphas_cumprod))
    return sds.gradient(
        networks.unet, z, t=t, eps=z, cond=prompt.cond, uncond=prompt.uncond, hyper=hyper.prior, i=jnp.int32(0),
        alphas_cumprod=networks.alphas_cumprod, prediction_type=networks.prediction_type,
    )  # fmt: skip


def _decoder(plan: inversion.Plan) -> Callable:
    def decode(networks, prompt, hyper, z: Array, key: Array) -> Array:
        image, pullback = jax.vjp(lambda z: inversion.decode(networks, z, plan), z)
        return pullback(image)[0]

    return decode


def _views(looks: Any, size: int, shared_erase: bool) -> Callable:
    def look(networks, prompt, hyper, image: Array, key: Array) -> Array:
        names = looks.augmentations
        drawn = views.sample(key, hyper.views, names=names, count=looks.keep, size=size, shared_erase=shared_erase)
        shown, pullback = jax.vjp(lambda image: views.apply(image, drawn, size=size, names=names), image)
        return pullback(shown)[0]

    return look


def _forward(n: int, looks: Any) -> Callable:
    def forward(networks, prompt, hyper, shown: Array, key: Array) -> Array:
        losses = networks.referees[n].views_losses(shown, prompt.texts[n])
        return hyper.weights[n].total(looks, losses).mean()

    return forward


def _backward(n: int, looks: Any) -> Callable:
    return lambda networks, prompt, hyper, shown, key: jax.value_and_grad(
        lambda shown: _forward(n, looks)(networks, prompt, hyper, shown, key)
    )(shown)


def one_step(plan: inversion.Plan) -> Callable:
    """`fn(networks, prompt, hyper, z, key)`: an iteration of one image with its referees, from latents `z`."""

    def run(networks, prompt, hyper, z: Array, key: Array) -> tuple[Any, dict[str, Array]]:
        i = jnp.int32(0)
        noise = inversion.draw(key, networks, plan, hyper, i)
        watched = held_out_lib.begin(z, jnp.zeros(2)) if plan.held_out else None
        return inversion.step(networks, prompt, hyper, plan, inversion.init(z, plan, hyper, watched), i, noise, True)

    return run


def batched(fn: Callable, step: Step, shape: Sequence[int], batch: int) -> tuple[Callable, tuple]:
    """A part's or `one_step`'s function over a batch of images, and its arguments, abstract where the step's are."""
    lead = lambda x: jax.ShapeDtypeStruct((batch, *x.shape), x.dtype)  # noqa: E731
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    x = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    args = step.networks, jax.tree.map(lead, step.prompt), step.hyper, x, keys
    return jax.vmap(fn, in_axes=(None, 0, None, 0, 0)), args


def estimate(settings: config.Settings) -> Estimate:
    """What a config costs. Raises ConfigError, or WeightsError for a directory whose config.json is not understood."""
    step = abstract_step(settings)
    found = {part.name: _asked(step, part.fn, part.shape) for part in parts(step)}
    one, two = (_traced(step, batch) for batch in (1, 2))
    least, most = memory.peak(one), memory.peak(two)
    return Estimate(
        parts=found,
        **_work(step, program.count(one), found["U-Net"])._asdict(),
        weights=_weights(step),
        fixed=max(0, 2 * least - most),
        live=most - least,
        assumed=step.assumed,
    )


def running(engine: Any, batch: Any) -> Running:
    """What an inverter's program of a batch costs; what is not of that program is traced besides, nothing is compiled."""
    traced, device = engine.trace(batch).jaxpr.jaxpr, engine.mesh.devices.flat[0]
    prompt = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch.prompt)
    step = Step(engine.settings, engine.networks, engine.text_encoder, prompt, engine.hyper, engine.plan)
    whole, unet = program.count(traced) / engine.settings.batch_size, _asked(step, _unet, step.plan.latent)
    return Running(
        image=_work(step, whole, unet).image,
        weights=sum(_weights(step).values()),
        batch=memory.peak(traced),
        chip=chips.of(device.device_kind),
    )


def _work(step: Step, whole: float, unet: float) -> Work:
    """What an image takes, where an iteration takes `whole` and the U-Net within `unet`."""
    settings, plan = step.settings, step.plan
    look = _asked(step, _looked(plan, ("held_out",)), plan.latent) if plan.held_out else 0.0
    start, end = _ends(step, unet)
    on = max(0, min(settings.referee.stop, settings.steps) - settings.referee.start) if plan.looks else 0
    tail = unet if plan.use_sds else 0.0
    image = start + on * whole + (settings.steps - on) * tail + settings.steps // plan.look_every * look + end
    return Work(whole, tail, look, image)


def _asked(step: Step, fn: Callable, shape: Sequence[int]) -> float:
    """Operations of a part's function, of one image."""
    fn, args = batched(fn, step, shape, 1)
    return program.flops(fn, *args)


def _traced(step: Step, batch: int) -> core.Jaxpr:
    """The program of an iteration of a batch."""
    fn, args = batched(one_step(step.plan), step, step.plan.latent, batch)
    return jax.make_jaxpr(fn)(*args).jaxpr


def _looked(plan: inversion.Plan, who: Sequence[str]) -> Callable:
    """A decoded image judged as it is by `referees` or `held_out` ones."""
    fields = {"referees": "looks", "held_out": "held_out"}
    kept = plan.replace(**{fields[name]: () for name in fields if name not in who})

    def look(networks, prompt, hyper, z: Array, key: Array) -> Array:
        networks = networks.replace(**{name: () for name in fields if name not in who})
        prompt = prompt.replace(**{text: () for name, text in _TEXTS.items() if name not in who})
        hyper = hyper.replace(**{weights: () for name, weights in _WEIGHTS.items() if name not in who})
        return inversion.verdicts(networks, prompt, hyper, kept, inversion.decode(networks, z, kept))

    return look


_TEXTS = {"referees": "texts", "held_out": "held_out"}
_WEIGHTS = {"referees": "weights", "held_out": "held_out"}


def _ends(step: Step, unet: float) -> tuple[float, float]:
    """Operations of an image's start, the choice among candidates included, and of its last decoding and scoring."""
    settings, plan = step.settings, step.plan
    judged = _asked(step, _looked(plan, ("referees", "held_out")), plan.latent)
    start = settings.init_steps * unet if settings.init == "sample" else 0.0
    if settings.init_candidates > 1 or plan.held_out:
        start += judged
    # All judges score the result; where some are held out, all look at it once more.
    return settings.init_candidates * start, judged


def _weights(step: Step) -> dict[str, int]:
    networks = step.networks
    named = {"text encoder": step.text_encoder, "U-Net": networks.unet, "decoder": networks.vae}
    specs = [spec for role in ("optimise", "held_out") for spec in step.settings.referees if spec.role == role]
    for n, (spec, referee) in enumerate(zip(specs, (*networks.referees, *networks.held_out), strict=True)):
        held_out = " (held out)" if spec.role == "held_out" else ""
        named[f"{spec.name} {n}{held_out}" if len(specs) > 1 else spec.name] = referee
    return {name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for name, tree in named.items()}


def table(found: Estimate, *, precision: str = "") -> str:
    """An estimate as Markdown, which a terminal shows as well."""
    work = {name: x for name, x in found.parts.items() if x}
    work |= {"**iteration**": found.step, "iteration without referees": found.tail}
    work |= {"look of the held-out referees": found.look} if found.look else {}
    work["**image**"] = found.image
    kept = found.weights | {"**weights**": sum(found.weights.values()), "program": found.fixed}
    kept["**each image at once**"] = found.live
    shown = {
        f"{chip.name} ({chip.rate:g}, {chip.memory:g})": [f"{found.seconds(chip):.3g}", str(found.fits(chip))]
        for chip in chips.CHIPS
    }
    return "\n".join(
        [
            *(f"({sentence})" for sentence in found.assumed),
            _scaled("operations", "FLOP", work),
            "A decoder or a forward pass alone is within the row that goes back as well.\n",
            _scaled(f"memory, {precision}" if precision else "memory", "B", kept),
            "Memory is estimated: of the paper's sizes an H200 and the compiler for v5e take 0.7 to 0.8; a CPU takes more.\n",
            console.markdown(["chip (bfloat16 TFLOP/s, GB, of TPUs GiB)", "least s/image", "images at once"], shown),
        ]
    )


def _amount(x: float, unit: str) -> str:
    """A number in the largest unit in which it is at least 1."""
    scale, prefix = max((pair for pair in (*_PREFIXES, (1e15, "P")) if x >= pair[0]), default=_PREFIXES[0])
    return f"{x / scale:.3g} {prefix}{unit}"


def _scaled(what: str, unit: str, values: dict[str, float]) -> str:
    """A table of numbers in the largest unit in which the largest of them is at least 1."""
    scale, prefix = max(((s, p) for s, p in _PREFIXES if max(values.values()) >= s), default=_PREFIXES[0])
    return console.markdown([what, prefix + unit], {name: [f"{x / scale:.3g}"] for name, x in values.items()})


_PREFIXES = ((1e6, "M"), (1e9, "G"), (1e12, "T"))
