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

from referee_jax import config, console
from referee_jax.engine import capacity, inverter, peak_memory
from referee_jax.hardware import chips
from referee_jax.method import inversion, sds, views
from referee_jax.performance import abstract_networks, flops


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
        free = capacity.USABLE * chip.bytes - sum(self.weights.values()) - self.fixed
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


def parts(step: capacity.Step) -> list[Part]:
    """The pieces of an iteration."""
    plan = step.plan
    side = step.settings.image_size
    found = [
        Part("U-Net", _unet, plan.latent),
        Part("decoder", lambda networks, prompt, hyper, z, key: inversion.decode(networks, z, plan), plan.latent),
        Part("decoder + pullback", _decoder(plan), plan.latent),
    ]
    specs = [spec for spec in step.settings.referees if spec.role == "optimise"]
    for n, (spec, looks, referee) in enumerate(zip(specs, plan.views, step.networks.referees, strict=True)):
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
    t = sds.sample_timestep(key, hyper.prior, jnp.int32(0), len(networks.prior.alphas_cumprod))
    how = {"cond": prompt.cond, "uncond": prompt.uncond, "hyper": hyper.prior, "i": jnp.int32(0)}
    return sds.gradient(networks.prior, z, t=t, eps=z, **how)


def _decoder(plan: inversion.Plan) -> Callable:
    def decode(networks, prompt, hyper, z: Array, key: Array) -> Array:
        image, pullback = jax.vjp(lambda z: inversion.decode(networks, z, plan), z)
        return pullback(image)[0]

    return decode


def _views(looks: Any, size: int, shared_erase: bool) -> Callable:
    def look(networks, prompt, hyper, image: Array, key: Array) -> Array:
        names = looks.augmentations
        drawn = views.sample(key, hyper.views, names=names, count=looks.keep, size=size, shared_erase=shared_erase)
        shown, pullback = jax.vjp(
            lambda image: views.apply(image, drawn, size=size, names=names, dense=looks.dense), image
        )
        return pullback(shown)[0]

    return look


def _forward(n: int, looks: Any) -> Callable:
    def forward(networks, prompt, hyper, shown: Array, key: Array) -> Array:
        losses = networks.referees[n].views_losses(shown, prompt.texts[n])
        return hyper.weights[n].total(looks.losses, losses).mean()

    return forward


def _backward(n: int, looks: Any) -> Callable:
    return lambda networks, prompt, hyper, shown, key: jax.value_and_grad(
        lambda shown: _forward(n, looks)(networks, prompt, hyper, shown, key)
    )(shown)


def estimate(settings: config.Settings) -> Estimate:
    """What a config costs. Raises ConfigError, or WeightsError for a directory whose config.json is not understood."""
    sized = abstract_networks.abstract(settings)
    step = capacity.make_step(settings, sized.prior, sized.judges)
    found = {part.name: _asked(step, part.fn, part.shape) for part in parts(step)}
    one, two = (capacity.traced(step, batch) for batch in (1, 2))
    least, most = peak_memory.peak(one), peak_memory.peak(two)
    return Estimate(
        parts=found,
        **_work(step, flops.count(one), found["U-Net"])._asdict(),
        weights=capacity.weights(step),
        fixed=max(0, 2 * least - most),
        live=most - least,
        assumed=sized.assumed,
    )


def step_flops(engine: inverter.Inverter, batch: inverter.Batch) -> float:
    """FLOPs of one image in an iteration with active referees; nothing is compiled."""
    return flops.count(engine.trace(batch).jaxpr.jaxpr) / engine.settings.batch_size


def running(engine: inverter.Inverter, batch: inverter.Batch) -> Running:
    """What an inverter's program of a batch costs; what is not of that program is traced besides, nothing is compiled."""
    traced, device = engine.trace(batch).jaxpr.jaxpr, engine.mesh.devices.flat[0]
    prompt = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch.prompt)
    step = capacity.Step(engine.settings, engine.networks, engine.text_encoder, prompt, engine.hyper, engine.plan)
    whole, unet = flops.count(traced) / engine.settings.batch_size, _asked(step, _unet, step.plan.latent)
    return Running(
        image=_work(step, whole, unet).image,
        weights=sum(capacity.weights(step).values()),
        batch=peak_memory.peak(traced),
        chip=chips.of(device.device_kind),
    )


def _work(step: capacity.Step, whole: float, unet: float) -> Work:
    """What an image takes, where an iteration takes `whole` and the U-Net within `unet`."""
    settings, plan = step.settings, step.plan
    look = _asked(step, _looked(plan, ("held_out",)), plan.latent) if plan.held_out else 0.0
    start, end = _ends(step, unet)
    on = max(0, min(settings.referee.stop, settings.steps) - settings.referee.start) if plan.views else 0
    tail = unet if plan.use_sds else 0.0
    image = start + on * whole + (settings.steps - on) * tail + settings.steps // plan.evaluate_every * look + end
    return Work(whole, tail, look, image)


def _asked(step: capacity.Step, fn: Callable, shape: Sequence[int]) -> float:
    """Operations of a part's function, of one image."""
    fn, args = capacity.batched(fn, step, shape, 1)
    return flops.flops(fn, *args)


def _looked(plan: inversion.Plan, who: Sequence[str]) -> Callable:
    """A decoded image judged as it is by `referees` or `held_out` ones."""
    fields = {"referees": "views", "held_out": "held_out"}
    kept = plan.replace(**{fields[name]: () for name in fields if name not in who})

    def look(networks, prompt, hyper, z: Array, key: Array) -> Array:
        networks = networks.replace(**{name: () for name in fields if name not in who})
        prompt = prompt.replace(**{text: () for name, text in _TEXTS.items() if name not in who})
        hyper = hyper.replace(**{weights: () for name, weights in _WEIGHTS.items() if name not in who})
        return inversion.clean_losses(networks, prompt, hyper, kept, inversion.decode(networks, z, kept))

    return look


_TEXTS = {"referees": "texts", "held_out": "held_out"}
_WEIGHTS = {"referees": "weights", "held_out": "held_out"}


def _ends(step: capacity.Step, unet: float) -> tuple[float, float]:
    """Operations of an image's start, the choice among candidates included, and of its last decoding and scoring."""
    settings, plan = step.settings, step.plan
    judged = _asked(step, _looked(plan, ("referees", "held_out")), plan.latent)
    start = settings.init_steps * unet if settings.init == "sample" else 0.0
    if settings.init_candidates > 1 or plan.held_out:
        start += judged
    # All judges score the result; where some are held out, all look at it once more.
    return settings.init_candidates * start, judged


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
