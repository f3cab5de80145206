"""What configs cost, against the counts of published networks, the engine's own program and XLA's own analysis."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from referee_jax import config, doctor
from referee_jax.engine import capacity, inverter
from referee_jax.hardware import chips
from referee_jax.models import blip, blip2, clip, layers
from referee_jax.models.diffusion import unet, vae
from referee_jax.performance import abstract_networks, cost, flops
from tests.conftest import abstract_step


def abstract(make):
    """The module without weights."""
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))


def shape(*sizes: int, dtype="float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def pulled_back(fn):
    """A function and its gradient with respect to its second argument."""
    return lambda module, x: (lambda y, pull: pull(jax.tree.map(jnp.ones_like, y)))(
        *jax.vjp(lambda x: fn(module, x), x)
    )


PUBLISHED_SIZES = abstract_networks.PUBLISHED
# Network -> makes it, what is asked of it, and GF as counted layer by layer, within 2 %.
PUBLISHED = {
    "denoiser": (
        functools.partial(unet.UNet, unet.Config()),
        lambda module, x: module(x, jnp.zeros(1, int), jnp.zeros((1, 77, 768))), (1, 64, 64, 4), 803,
    ),
    "VAE's decoder": (
        functools.partial(vae.AutoencoderKL, vae.Config()),
        lambda module, x: module.decode(x), (1, 64, 64, 4), 2514,
    ),
    "VAE's decoder and its gradient": (
        functools.partial(vae.AutoencoderKL, vae.Config()),
        pulled_back(lambda module, x: module.decode(x)), (1, 64, 64, 4), 2514 + 2549,
    ),
    "ViT-g": (
        functools.partial(blip2.BLIP2, blip2.Config()),
        lambda module, x: module.vision_model(x), (1, 224, 224, 3), 521,
    ),
    "Q-Former": (
        functools.partial(blip2.BLIP2, blip2.Config()),
        lambda module, x: module.query_image(x), (1, 257, 1408), 12.7,
    ),
    "CLIP B/32": (
        functools.partial(clip.CLIP, clip.Config()),
        lambda module, x: module.encode_image(x), (1, 224, 224, 3), 8.8,
    ),
    "CLIP L/14": (
        functools.partial(clip.CLIP, PUBLISHED_SIZES["openai/clip-vit-large-patch14"]),
        lambda module, x: module.encode_image(x), (1, 224, 224, 3), 162,
    ),
    "CLIP L/14 and its gradient": (
        functools.partial(clip.CLIP, PUBLISHED_SIZES["openai/clip-vit-large-patch14"]),
        pulled_back(lambda module, x: module.encode_image(x)), (1, 224, 224, 3), 162 + 169,
    ),
    "CLIP H/14": (
        functools.partial(clip.CLIP, PUBLISHED_SIZES["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]),
        lambda module, x: module.encode_image(x), (1, 224, 224, 3), 335,
    ),
    "BLIP's large vision tower at 384": (
        functools.partial(blip.ImageTextRetrieval, PUBLISHED_SIZES["Salesforce/blip-itm-large-coco"]),
        lambda module, x: module.vision_model(x), (1, 384, 384, 3), 382,
    ),
    "BLIP's ViT-B/16 at 384": (
        functools.partial(blip.ImageTextRetrieval, blip.Config()),
        lambda module, x: module.vision_model(x), (1, 384, 384, 3), 111,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks(name):
    make, ask, sizes, counted = PUBLISHED[name]
    network = layers.configured(abstract(make), remat="none")
    assert flops.flops(ask, network, shape(*sizes)) / 1e9 == pytest.approx(counted, rel=0.02)


@pytest.fixture(scope="module")
def paper():
    return cost.estimate(config.override(config.load("configs/paper.py"), {"precision": "bfloat16"}))


def test_the_paper(paper):
    """The published parts within 2 %; BLIP-2 passes its vision transformer's layers but for their last product once more."""
    tera = {name: x / 1e12 for name, x in paper.parts.items()}
    assert tera["denoiser"] == pytest.approx(2 * 0.803, rel=0.02)
    assert tera["decoder + pullback"] == pytest.approx(2.514 + 2.549, rel=0.02)
    # Queries, matching and captions, whose keys and values of the image are computed once.
    assert tera["blip2: forward"] == pytest.approx(10 * (0.521 + 0.0127 + 0.0183 + 0.0070 - 0.0067), rel=0.02)
    blocks = 39 * 2 * 257 * 1408 * 6144 / 1e12  # the products that are not needed again
    again = 10 * (0.521 - blocks)
    assert tera["blip2: forward + backward"] == pytest.approx(10 * (0.521 + 0.535) + 0.77 + again, rel=0.02)
    assert paper.step / 1e12 == pytest.approx(18.0 + again, rel=0.02)
    assert paper.tail == paper.parts["denoiser"] and paper.evaluation == 0
    assert paper.image == pytest.approx(150 * paper.step + 10 * paper.tail + 2.514e12, rel=0.01)
    assert paper.seconds(chips.CHIPS[0]) == pytest.approx(paper.image / 790e12)


def test_the_lean_paper(paper):
    """What has to be done, with the products of each layer kept: in the iterations with referees that is less."""
    settings = config.load("configs/tpu_pod.py")
    same = {"precision": "bfloat16", "batch_size": settings.batch_size}
    assert config.override(config.load("configs/paper.py"), same) == settings
    sized = abstract_networks.abstract(settings)
    step = capacity.make_step(dataclasses.replace(settings, remat="dots"), sized.prior, sized.judges)
    whole = flops.count(capacity.traced(step, 1))
    lean = dataclasses.replace(paper, step=whole, image=paper.image - 150 * (paper.step - whole))
    assert lean.step / 1e12 == pytest.approx(18.0, rel=0.02) and lean.image / 1e15 == pytest.approx(2.72, rel=0.02)
    assert lean.seconds(chips.TPUS["v5e"]) == pytest.approx(13.8, rel=0.02)


def test_the_memory_of_the_paper(paper):
    giga = {name: x / 1e9 for name, x in paper.weights.items()}
    assert giga["denoiser"] == pytest.approx(1.72, rel=0.02) and giga["text encoder"] == pytest.approx(0.25, rel=0.02)
    assert giga["decoder"] == pytest.approx(0.10, rel=0.02)
    # The Q-Former stays float32.
    assert giga["blip2"] == pytest.approx(1.97 + 2 * 0.38, rel=0.03)
    fitting = {chip.name: paper.fits(chip) for chip in chips.CHIPS}
    assert fitting["H200"] > fitting["H100 SXM"] > fitting["TPU v5e"] >= 1
    table = cost.table(paper)
    assert all(x in table for x in ("denoiser", "Memory is estimated", "checkpoints/blip2-stage1 is not here"))


def test_weights_that_are_split_over_a_group():
    """By hand: 25 GB of weights and 4 GB an image need four chips of 16 GiB, one of 32 GiB or 80 GB."""
    costs = cost.Estimate({"denoiser": 1e12}, 4e12, 1e12, 0.0, 100e12, {"t5": int(25e9)}, 0, int(4e9))
    chip = {chip.name: chip for chip in chips.CHIPS}
    v5e, v4, a100 = chip["TPU v5e"], chip["TPU v4"], chip["A100"]
    assert [costs.fits(v5e, n) for n in (1, 2, 4, 8)] == [0, 0, 2, 3]
    assert [costs.least_group(x) for x in (v5e, v4, a100)] == [4, 1, 1]
    split = dataclasses.replace(costs, model=4)
    assert split.fits(v5e) == 2 and split.seconds(v5e) == pytest.approx(costs.seconds(v5e) / 4)
    assert dataclasses.replace(costs, live=int(40e9)).least_group(v5e) is None
    shown = {line.split(" (")[0].strip("| "): line for line in cost.table(split).splitlines()}
    assert shown["TPU v5e"].endswith("| 0.127 | 2 | 4 |") and "On groups of 4 chips:" in shown
    assert "On groups" not in cost.table(costs)


def small(checkpoints, **changes) -> config.Settings:
    sd, judge = map(str, checkpoints)
    values = {
        "steps": 7, "chunk": 1, "image_size": 32, "batch_size": 2, "generator": {"checkpoint": sd}, "look_every": 3,
        "referee": {"start": 1, "stop": 5}, "views": {"count": 3, "keep": 2, "augmentations": ("Af",)},
        "referees": ({"checkpoint": judge}, {"checkpoint": judge, "role": "held_out"}),
    }  # fmt: skip
    return config.from_config(values | changes)


@pytest.fixture(scope="module")
def tiny(checkpoints):
    return cost.estimate(small(checkpoints))


def test_an_iteration_is_its_parts(checkpoints, tiny):
    within = (
        "denoiser",
        "decoder + pullback",
        "clip: views + pullback",
        "clip: forward + backward",
        "clip: choice of views",
    )
    assert sum(tiny.parts[name] for name in within) == pytest.approx(tiny.step, rel=0.02)
    assert tiny.parts["clip: choice of views"] == pytest.approx(1.5 * tiny.parts["clip: forward"], rel=0.01)
    sd, judge = checkpoints
    files = [sd / part / "diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]
    assert (
        0 < tiny.weights["denoiser"] <= files[0].stat().st_size
        and 0 < tiny.weights["decoder"] < files[1].stat().st_size
    )
    assert tiny.weights["clip 0"] == tiny.weights["clip 1 (held out)"] <= (judge / "model.safetensors").stat().st_size


def test_an_image_is_its_iterations_start_and_end(checkpoints, tiny):
    """Four iterations with referees, three without, two evaluations; all candidates are sampled and judged."""
    judged = tiny.parts["decoder"] + 2 * tiny.parts["clip: forward"] / 2  # by both, of one view
    assert tiny.evaluation == pytest.approx(judged, rel=1e-3)
    body = 4 * tiny.step + 3 * tiny.tail + 2 * judged
    end = 2 * judged  # scores, then losses as at the start
    assert tiny.image == pytest.approx(body + judged + end, rel=1e-3)
    chosen = cost.estimate(dataclasses.replace(small(checkpoints), init="sample", init_steps=5, init_candidates=4))
    start = 4 * (5 * tiny.parts["denoiser"] + judged)
    assert chosen.image == pytest.approx(body + start + end, rel=1e-3)


def test_a_run_the_doctor_and_the_estimate_tell_one_number(checkpoints):
    """With all that is easily forgotten: the start and its candidates, evaluations, iterations without referees, the end."""
    settings = dataclasses.replace(small(checkpoints), init="sample", init_steps=5, init_candidates=3, remat="full")
    estimated = cost.estimate(settings)
    engine = inverter.Inverter.from_config(settings, jax.devices()[:2])
    batch = engine.shapes()  # as a run's batch, to the letter: tests/engine/test_real_networks.py
    found = cost.running(engine, batch)
    one = engine.at_once(1)
    assert cost.running(one, one.shapes()).image == pytest.approx(estimated.image, rel=1e-6)
    # A batch shares what depends on the samplers' timesteps alone.
    assert 0.999 * estimated.image < found.image < estimated.image and found.chip is None
    assert found.image > 1.5 * settings.steps * estimated.step  # which a run told once
    assert found.weights == sum(estimated.weights.values())
    assert found.batch == pytest.approx(estimated.fixed + 2 * estimated.live, rel=0.01)
    mega = found.image / 1e6
    assert found.line(10).startswith(f"{mega:.3g} MFLOP for an image, {mega / 100:.3g} GFLOP for all 10; ")
    assert f"| **image** | {estimated.image / 1e6:.3g} |" in cost.table(estimated)
    (told,) = doctor.price(types.SimpleNamespace(settings=settings))
    assert f"{estimated.image / 1e12:.3g} for all" in told.text


def test_the_least_time_on_a_chip_of_the_table():
    found = cost.Running(1, 2, chips.of("TPU v5 lite"), count=lambda: 19.7e12)
    assert found.line(1).endswith("; at least 0.1 s an image on TPU v5e")
    assert "at least" not in dataclasses.replace(found, chip=None).line(1)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB", "A100"), ("NVIDIA A100 80GB PCIe", "A100"), ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("TPU v4", "TPU v4"), ("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v6 lite", "TPU v6e"), ("cpu", None),
    ],
)  # fmt: skip
def test_kinds_of_devices(kind, name):
    found = chips.of(kind)
    assert (found and found.name) == name


def test_xla_counts_as_many_operations():
    """A whole iteration of the shapes world: within 3 % (measured: 0.98 of ours).

    XLA leaves out the products with what a convolution pads, which is much at the sides of small images, and counts elementwise
    operations; without either the two would be equal.
    """
    settings = config.load("configs/shapes_clip.py")
    settings = dataclasses.replace(settings, referees=settings.referees[:1])
    step = abstract_step(settings)
    fn, args = capacity.batched(capacity.one_step(step.plan), step, step.plan.latent, 2)
    told = jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]
    assert 2 * cost.estimate(settings).step == pytest.approx(told, rel=0.03)


def test_xla_needs_as_much_memory(checkpoints, tiny):
    """A whole iteration of tiny networks: within a third (measured: 0.69 of XLA's on a CPU, which copies more)."""
    step = abstract_step(small(checkpoints))
    fn, args = capacity.batched(capacity.one_step(step.plan), step, step.plan.latent, 6)
    told = jax.jit(fn).lower(*args).compile().memory_analysis()
    needed = told.temp_size_in_bytes + told.output_size_in_bytes
    assert tiny.fixed + 6 * tiny.live == pytest.approx(needed, rel=0.33)


def test_what_is_left_to_the_memory(monkeypatch):
    """What works least is taken where it fits, and is no more than what a batch and all weights need; so are batches."""
    settings = config.override(config.load("configs/shapes_blip.py"), {"batch_size": 4, "views.augmentations": ("Af",)})
    settings = dataclasses.replace(settings, referees=settings.referees[:1])
    sized = abstract_networks.abstract(settings)
    # Steps and their programs, which take seconds, depend on nothing else that varies here.
    steps, programs, trace = {}, {}, capacity.traced
    for remat in ("full", "dots", "none"):
        steps[remat] = capacity.make_step(dataclasses.replace(settings, remat=remat), sized.prior, sized.judges)

    def traced(step, batch):
        key = step.settings.remat, batch
        programs[key] = programs.get(key) or trace(step, batch)
        return programs[key]

    monkeypatch.setattr(capacity, "make_step", lambda settings, *networks: steps[settings.remat])
    monkeypatch.setattr(capacity, "traced", traced)

    def fitting(limit, **how):
        found = capacity.fitting(dataclasses.replace(settings, **how), sized.prior, sized.judges, limit)
        return found.remat, found.batch_size

    kept = {name: cost.estimate(dataclasses.replace(settings, remat=name)) for name in ("full", "dots")}
    assert kept["dots"].step < kept["full"].step and kept["dots"].live > kept["full"].live
    needed = lambda found, batch: (sum(found.weights.values()) + found.fixed + batch * found.live) / capacity.USABLE
    four = needed(kept["dots"], 4)
    assert fitting(None) == fitting(int(0.95 * four)) == ("full", 4) and fitting(int(1.05 * four)) == ("dots", 4)
    assert fitting(None, remat="none") == fitting(10**6, remat="none") == ("none", 4)
    assert fitting(None, batch_size=0) == ("full", capacity.UNKNOWN) and fitting(10**6, batch_size=0) == ("full", 1)
    assert fitting(10**12, batch_size=0) == ("dots", capacity.MOST)
    assert fitting(int(needed(kept["full"], 5.5)), remat="full", batch_size=0) == ("full", 5)
    saved = sum(kept["full"].weights.values()) / 2 / capacity.USABLE  # by each device of a group of two
    pair = dict(remat="full", batch_size=0, mesh=config.Mesh(model=2))
    assert fitting(int(needed(kept["full"], 5.5) - saved), **pair) == ("full", 5)


@pytest.mark.parametrize(("memory", "remat"), [(None, "full"), (10**6, "full"), (10**12, "dots")])
def test_an_inverter_keeps_what_fits(monkeypatch, memory, remat):
    """By the memory of the first of its devices, whatever is loaded."""
    settings = config.override(config.load("configs/shapes_blip.py"), {"batch_size": 1, "views.augmentations": ("Af",)})
    sized = abstract_networks.abstract(settings)
    monkeypatch.setattr(chips, "memory_limit", lambda device: memory)
    engine = inverter.Inverter(settings, sized.prior, sized.judges, jax.devices()[:1])
    stacks = jax.tree.leaves(engine.networks.referees, is_leaf=lambda x: isinstance(x, layers.Stack))
    assert {stack.remat for stack in stacks if isinstance(stack, layers.Stack)} == {remat}
