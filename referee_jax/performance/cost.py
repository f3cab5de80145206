"""What a config costs: FLOPs, bytes and the least time on some chips, from the sizes of its networks.

    print(cost.table(cost.estimate(config.load("configs/paper.py"))))

FLOPs are counted in the program of an iteration (flops.py), rematerialised ones included; live memory
is estimated from the same program (engine/peak_memory.py). No weights, no device, no compilation.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from referee_jax import config, console
from referee_jax.engine import builders, capacity, inverter, particles, peak_memory, programs, results, traced
from referee_jax.hardware import chips
from referee_jax.method import inversion, views
from referee_jax.method import state as state_lib
from referee_jax.method.ways import sds
from referee_jax.performance import abstract_networks, flops


class Part(NamedTuple):
    """Part of an iteration of one image: `fn(networks, prompt, hyper, x, key)`, `x` float32 of `shape`."""

    name: str
    fn: Callable[..., Any]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a config costs: FLOPs of one image, and bytes.

    Attributes:
        parts: FLOPs of each part of an iteration; "forward + backward" includes "forward".
        step: FLOPs of an iteration with all parts.
        tail: FLOPs of an iteration without referees.
        evaluation: FLOPs of an evaluation of the held-out referees.
        image: FLOPs of a whole image, its start and its end included.
        weights: bytes of each network.
        fixed: further bytes of an iteration, for any batch.
        live: further bytes for each image of a batch.
        assumed: sentences on sizes that were taken from another checkpoint.
        model: devices of a group, over which the weights are split (`config.mesh.model`).
        passing: bytes of weights that are there while prompts are encoded, and not later.
    """

    parts: dict[str, float]
    step: float
    tail: float
    evaluation: float
    image: float
    weights: dict[str, int]
    fixed: int
    live: int
    assumed: tuple[str, ...] = ()
    model: int = 1
    passing: int = 0

    def seconds(self, chip: chips.Chip) -> float:
        """The least time of an image: its FLOPs at the peak of the chips of a group."""
        return self.image / (chip.rate * 1e12 * self.model)

    def fits(self, chip: chips.Chip, model: int | None = None) -> int:
        """The largest batch on a group of `model` chips (default: the config's); 0 if the weights alone do not fit.

        Weights are split over a group; all else is taken to be whole on each of its chips.
        """
        model = model or self.model
        free = capacity.USABLE * chip.bytes - sum(self.weights.values()) / model
        return max(0, int((free - self.fixed) // self.live)) if self.passing / model <= free else 0

    def least_group(self, chip: chips.Chip) -> int | None:
        """The smallest group of chips, a power of two, on which an image fits; None where none of up to 64 will do."""
        return next((2**n for n in range(7) if self.fits(chip, 2**n)), None)


class Work(NamedTuple):
    """FLOPs of one image, as in Estimate."""

    step: float
    tail: float
    evaluation: float
    image: float


@dataclasses.dataclass(frozen=True)
class Running:
    """What an engine's program costs.

    Attributes:
        weights: bytes of the networks on each device.
        batch: further bytes on each device for a batch.
        chip: the kind of device, None where it is not in the table.
        count: returns `image`, for which programs are traced.
    """

    weights: int
    batch: int
    chip: chips.Chip | None
    count: Callable[[], float]

    @functools.cached_property
    def image(self) -> float:
        """FLOPs of a whole image."""
        return self.count()

    def line(self, images: int) -> str:
        """One line for people, for a run of so many `images`."""
        each, total = (amount(n * self.image, "FLOP") for n in (1, images))
        weights, batch = (amount(n, "B") for n in (self.weights, self.batch))
        least = (
            f"; at least {self.image / self.chip.rate / 1e12:.3g} s an image on {self.chip.name}" if self.chip else ""
        )
        return f"{each} for an image, {total} for all {images}; {weights} of weights, {batch} for a batch{least}"


def parts(step: capacity.Step) -> list[Part]:
    """The parts of an iteration."""
    plan = step.plan
    side = step.settings.image_size
    decoder = "sampler and decoder" if plan.method == "noise" else "decoder"
    pieces = [
        Part("denoiser", _denoiser, plan.latent),
        Part(decoder, _picture(plan), plan.latent),
        Part(f"{decoder} + pullback", _pulled(plan), plan.latent),
    ]
    specs = [spec for spec in step.settings.referees if not spec.is_held_out]
    for n, (spec, view_plan, referee) in enumerate(zip(specs, plan.views, step.networks.referees, strict=True)):
        if not view_plan.has_gradient:
            continue
        name, size = spec.name if len(specs) == 1 else f"{spec.name} {n}", referee.image_size
        pieces += [
            Part(f"{name}: views + pullback", _views(view_plan, size, plan.shared_erase), (side, side, 3)),
            Part(f"{name}: forward", _forward(n, view_plan), (view_plan.keep, size, size, 3)),
            Part(f"{name}: forward + backward", _backward(n, view_plan), (view_plan.keep, size, size, 3)),
        ]
        if view_plan.keep < view_plan.count:
            pieces.append(Part(f"{name}: choice of views", _forward(n, view_plan), (view_plan.count, size, size, 3)))
    return pieces


def _denoiser(networks, prompt, hyper, z: Array, key: Array) -> Array:
    t = sds.sample_timestep(key, hyper.prior, jnp.int32(0), networks.prior.timesteps)
    how = {"cond": prompt.cond, "uncond": prompt.uncond, "hyper": hyper.prior, "i": jnp.int32(0)}
    return sds.gradient(networks.prior, z, t=t, eps=z, **how)


def _denoise(plan: state_lib.Plan, is_guided: bool) -> Callable:
    denoise = functools.partial(programs.PROGRAMS["denoise"][0], plan=plan, is_guided=is_guided)
    return lambda networks, prompt, hyper, z, key: denoise(networks, prompt, z, 1.0, jnp.int32(1), jnp.int32(0), 1.0)


def _picture(plan: state_lib.Plan) -> Callable:
    return lambda networks, prompt, hyper, z, key: inversion.picture(networks, prompt, hyper, plan, z)


def _pulled(plan: state_lib.Plan) -> Callable:
    def pulled(networks, prompt, hyper, z: Array, key: Array) -> Array:
        image, pullback = jax.vjp(lambda z: _picture(plan)(networks, prompt, hyper, z, key), z)
        return pullback(image)[0]

    return pulled


def _views(view_plan: Any, size: int, shared_erase: bool) -> Callable:
    def view(networks, prompt, hyper, image: Array, key: Array) -> Array:
        names = view_plan.augmentations
        params = views.sample(key, hyper.views, names=names, count=view_plan.keep, size=size, shared_erase=shared_erase)
        cutouts, pullback = jax.vjp(
            lambda image: views.apply(image, params, size=size, names=names, dense=view_plan.dense), image
        )
        return pullback(cutouts)[0]

    return view


def _forward(n: int, view_plan: Any) -> Callable:
    def forward(networks, prompt, hyper, cutouts: Array, key: Array) -> Array:
        losses = networks.referees[n].views_losses(cutouts, prompt.texts[n])
        return hyper.weights[n].total(view_plan.losses, losses).mean()

    return forward


def _backward(n: int, view_plan: Any) -> Callable:
    return lambda networks, prompt, hyper, cutouts, key: jax.value_and_grad(
        lambda cutouts: _forward(n, view_plan)(networks, prompt, hyper, cutouts, key)
    )(cutouts)


def estimate(settings: config.Settings) -> Estimate:
    """What a config costs. Raises ConfigError, or WeightsError for a config.json that does not fit."""
    sized = abstract_networks.abstract(settings)
    step = capacity.make_step(settings, sized.prior, sized.judges)
    plan, counts = step.plan, {part.name: _flops(step, part.fn, part.shape) for part in parts(step)}
    tail = counts["denoiser"] if plan.method == "guided" or plan.method == "sds" and plan.use_sds else 0.0
    is_guided = settings.init_guidance != 1
    start = _flops(step, _denoise(plan, is_guided), plan.latent) if settings.init == "sample" else 0.0
    one, two = (capacity.traced(step, batch) for batch in (1, 2))
    least, most = peak_memory.peak(one), peak_memory.peak(two)
    return Estimate(
        parts=counts,
        **_work(step, flops.count(one), tail, start, _flops(step, _judged(plan), plan.latent))._asdict(),
        weights=capacity.weights(step),
        fixed=max(0, 2 * least - most),
        live=most - least,
        assumed=sized.assumed,
        model=settings.mesh.model,
        passing=capacity.passing(step),
    )


def step_flops(engine: inverter.Inverter, batch: results.Batch, name: str = "step", *, active: bool = True) -> float:
    """FLOPs of one image in an iteration, or in another program of `engine.trace`; nothing is compiled."""
    return _counted(engine, batch, flops.count, name, active) / engine.settings.batch_size


def _counted(
    engine: inverter.Inverter, batch: results.Batch, count: Callable, name: str = "step", active: bool = True
) -> float:
    """What `count` finds in a program of `engine.trace`, which is traced where no other process has counted it."""
    settings, mesh = engine.settings, dict(engine.mesh.shape)
    static = (count, name, active, settings.init_guidance != 1, settings.output, mesh)
    args = engine.networks, batch.prompt, batch.hyper, batch.state
    return traced.count(engine.plan, static, args, lambda: count(engine.trace(batch, name, active=active).jaxpr.jaxpr))


def running(engine: inverter.Inverter, batch: results.Batch) -> Running:
    """What an inverter costs for a batch; nothing is compiled, and for FLOPs nothing traced that will not run."""
    device = engine.mesh.devices.flat[0]
    prompt = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch.prompt)
    step = capacity.Step(engine.settings, engine.networks, engine.text_encoder, prompt, engine.hyper, engine.plan)

    def count() -> float:
        each = functools.partial(step_flops, engine, batch)
        tail = each(active=False) if _active(step) < step.settings.steps else 0.0
        start = each("denoise") if step.settings.init == "sample" else 0.0
        # What scores the result costs as much as a judge, which not every run has.
        return _work(step, each(), tail, start, each("judge" if engine.is_judged else "finish")).image

    weights, live = sum(capacity.weights(step).values()), int(_counted(engine, batch, peak_memory.peak))
    return Running(weights, live, chips.of(device.device_kind), count)


def _active(step: capacity.Step) -> int:
    """In how many iterations the referees move an image."""
    acts, steps = builders.make_referee(step.settings, step.settings.referee), step.settings.steps
    return max(0, min(acts.stop, steps) - acts.start) if any(x.has_gradient for x in step.plan.views) else 0


def _work(step: capacity.Step, whole: float, tail: float, denoise: float, judged: float) -> Work:
    """FLOPs of an image.

    An iteration takes `whole` or, without referees, `tail`; a step of the sampler `denoise`, and a look `judged`.
    """
    settings, plan = step.settings, step.plan
    start = settings.init_steps * denoise
    if settings.init_candidates > 1 or plan.held_out:
        start += judged
    active = _active(step)
    evaluation = judged if plan.held_out else 0.0
    # At the end the result is scored, and where there are held-out referees judged as at the start.
    # Of the particles that are still there, and what is looked at to choose among them.
    counts = [particles.survivors(settings, i) for i in range(settings.steps)]
    looks = sum(counts[i - 1] for i in range(1, settings.steps) if particles.is_selected(settings, i))
    looks += counts[-1] if counts[-1] > 1 else 0
    iterations = active * whole + (settings.steps - active) * tail + settings.steps // plan.evaluate_every * evaluation
    image = max(settings.init_candidates, settings.particles) * start + sum(counts) / settings.steps * iterations
    image += (1 + looks) * judged + evaluation
    return Work(whole, tail, evaluation, image)


def _flops(step: capacity.Step, fn: Callable, shape: Sequence[int]) -> float:
    """FLOPs of a part's function, of one image."""
    fn, args = capacity.batched(fn, step, shape, 1)
    return flops.flops(fn, *args)


def _judged(plan: state_lib.Plan) -> Callable:
    """Latents decoded, and the clean losses of all referees on the image."""

    def judge(networks, prompt, hyper, z: Array, key: Array) -> Array:
        image = inversion.picture(networks, prompt, hyper, plan, z)
        return inversion.clean_losses(networks, prompt, hyper, plan, image)

    return judge


def table(costs: Estimate, *, precision: str = "") -> str:
    """An estimate as Markdown, which a terminal shows as well."""
    work = {name: x for name, x in costs.parts.items() if x}
    work |= {"**iteration**": costs.step, "iteration without referees": costs.tail}
    work |= {"evaluation of the held-out referees": costs.evaluation} if costs.evaluation else {}
    work["**image**"] = costs.image
    memory = costs.weights | {"**weights**": sum(costs.weights.values()), "program": costs.fixed}
    memory["**each image at once**"] = costs.live
    memory |= {"T5, while prompts are read": costs.passing} if costs.passing else {}
    rows = {}
    for chip in chips.CHIPS:
        row = [f"{costs.seconds(chip):.3g}", str(costs.fits(chip)), str(costs.least_group(chip) or "-")]
        rows[f"{chip.name} ({chip.rate:g}, {chip.memory:g})"] = row
    columns = ["chip (bfloat16 TFLOP/s, GB, of TPUs GiB)", "least s/image", "images at once", "least mesh.model"]
    return "\n".join(
        [
            *(f"({sentence})" for sentence in costs.assumed),
            _scaled("operations", "FLOP", work),
            "Forward-only rows are included in the rows with a backward pass.\n",
            _scaled(f"memory, {precision}" if precision else "memory", "B", memory),
            "Memory is estimated: of the paper's sizes an H200 and the compiler for v5e take 0.7 to 0.8; a CPU takes more.\n",
            *([f"On groups of {costs.model} chips:\n"] if costs.model > 1 else []),
            console.markdown(columns, rows),
        ]
    )


def amount(x: float, unit: str) -> str:
    """A number in the largest unit in which it is at least 1."""
    scale, prefix = max((pair for pair in (*_PREFIXES, (1e15, "P")) if x >= pair[0]), default=_PREFIXES[0])
    return f"{x / scale:.3g} {prefix}{unit}"


def _scaled(what: str, unit: str, values: dict[str, float]) -> str:
    """A table of numbers in the largest unit in which the largest of them is at least 1."""
    scale, prefix = max(((s, p) for s, p in _PREFIXES if max(values.values()) >= s), default=_PREFIXES[0])
    return console.markdown([what, prefix + unit], {name: [f"{x / scale:.3g}"] for name, x in values.items()})


_PREFIXES = ((1e6, "M"), (1e9, "G"), (1e12, "T"))
