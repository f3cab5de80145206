"""A second process finds what the first has traced, and nothing that another program has left."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from referee_jax import items as items_lib
from referee_jax.engine import traced
from referee_jax.hardware import chips, kept
from referee_jax.method import augmentations, inversion, latent_losses
from referee_jax.method.ways import noise, optim
from referee_jax.models import attention
from referee_jax.performance import cost
from tests import tiny, toys
from tests.engine import test_real_networks
from tests.models import test_attention

cuda = test_attention.cuda
LARGE = ("draw", "step", "clean_losses", "render")  # of inversion: what the programs that evaluate networks call


def keep(monkeypatch, place):
    """Has processes keep what they trace in this directory."""
    monkeypatch.setattr(kept, "directory", lambda: place)


@pytest.fixture
def place(monkeypatch, tmp_path):
    """The directory of what is traced, empty."""
    keep(monkeypatch, tmp_path / "traced")
    return tmp_path / "traced"


def made(checkpoints, devices: int = 2, **changes):
    """What a new process makes of three prompts, and the FLOPs it counts."""
    jax.clear_caches()
    engine = test_real_networks.build(checkpoints, devices, **{"batch_size": 2, "steps": 5} | changes)
    result = engine(tiny.PROMPTS[:3], seed=3)
    return result.images.tobytes(), result.latents.tobytes(), cost.running(engine, engine.shapes()).image


@pytest.fixture(scope="module")
def first(checkpoints, tmp_path_factory):
    """What a first process has kept and made."""
    place = tmp_path_factory.mktemp("programs") / "traced"
    with pytest.MonkeyPatch.context() as monkeypatch:
        keep(monkeypatch, place)
        return place, made(checkpoints)


@pytest.fixture
def second(first, monkeypatch):
    """A second process, which can trace no program that evaluates networks; what the first has kept and made."""
    keep(monkeypatch, first[0])
    for name in LARGE:
        monkeypatch.setattr(inversion, name, lambda *_, **__: pytest.fail("a program was traced"))
    return first


def test_a_second_process_traces_no_network(checkpoints, second):
    place, result = second
    before = sorted(place.iterdir())
    assert made(checkpoints) == result
    assert sorted(place.iterdir()) == before and len(before) > 4 and place.stat().st_mode & 0o777 == 0o700


def test_it_is_what_would_be_traced(checkpoints, first):
    assert made(checkpoints) == first[1]


@pytest.mark.parametrize(
    "change",
    [
        {"optim": {"name": "adam"}},  # the plan
        {"batch_size": 1},  # shapes
        {"devices": 1},
        {"remat": "none"},  # a static field of the networks
        {"output": "best"},  # a static argument
        "sources",
        "option",
    ],
    ids=str,
)
def test_another_program_is_traced(change, checkpoints, second, monkeypatch):
    if change == "sources":
        monkeypatch.setattr(kept, "_sources", lambda: "edited")
    with jax.numpy_dtype_promotion("strict") if change == "option" else contextlib.nullcontext():
        with pytest.raises(pytest.fail.Exception, match="a program was traced"):
            made(checkpoints, **change if isinstance(change, dict) else {})


def test_a_number_is_no_other_program(checkpoints, second):
    made(checkpoints, optim={"lr": 0.01}, chunk=2)


def test_networks_of_others_are_traced_each_time(place):
    """Their sources are not the package's: nothing would tell that they have changed."""
    engine = toys.engine(tiny.settings(), jax.devices()[:1])
    engine(tiny.PROMPTS[:2], seed=3)
    assert cost.running(engine, engine.shapes()).image > 0 and not list(place.glob("*"))


def test_descriptions_tell_arrays_apart(checkpoints):
    plan, structure = test_real_networks.build(checkpoints).plan, jax.tree.structure(0)
    arrays = [jax.ShapeDtypeStruct(*x) for x in (((2,), "float32"), ((2,), "int32"), ((3,), "float32"))]
    arrays += [1.0, np.float32(1), jax.random.key(0)]
    assert len({traced.described(plan, 0, structure, [x]) for x in arrays}) == len(arrays)


@pytest.mark.parametrize("change", ["optimizer", "latent_losses", "rule", "augmentations"])
def test_parts_of_a_users_are_traced_each_time(change, checkpoints, monkeypatch):
    plan = test_real_networks.build(checkpoints).plan
    assert traced.described(plan, 0, jax.tree.structure(0), [])
    for registry in (augmentations.AUGMENTATIONS, latent_losses.LATENT_LOSSES, noise.RULES, optim.OPTIMIZERS):
        monkeypatch.setattr(registry, "_sources", {"mine": ("my_parts", "mine")})
    assert traced.described(plan, 0, jax.tree.structure(0), [])
    if change == "augmentations":
        plan = plan.replace(views=(dataclasses.replace(plan.views[0], augmentations=("Af", "mine")),))
    else:
        plan = plan.replace(**{change: ("mine",) if change == "latent_losses" else "mine"})
    with pytest.raises(kept.Unknown, match="mine"):
        traced.described(plan, 0, jax.tree.structure(0), [])


def test_a_group_that_splits_weights_is_traced_each_time(checkpoints, place):
    engine = test_real_networks.build(checkpoints, 2, batch_size=2, mesh={"model": 2})
    engine.advance(engine.begin(items_lib.expand(tiny.PROMPTS[:2], 1), 3))
    assert not list(place.glob("*"))


def test_memory_is_given_on_as_ever(checkpoints, place):
    """An iteration's state takes the place of the one before it."""
    engine = test_real_networks.build(checkpoints)
    args = engine._arguments("step", engine.shapes())
    aliased = lambda program: program.lower(*args).compile().memory_analysis().alias_size_in_bytes
    before = aliased(engine._programs._jitted("step", False, {"referees_active": True}))
    assert aliased(engine._programs("step", referees_active=True)) == before > 8 * 8 * 8 * 4 * 4
    assert len(list(place.iterdir())) == 1


@pytest.mark.parametrize(("platform", "call"), [("cuda", "__cudnn$fmhaSoftmaxBackward"), ("tpu", "tpu_custom_call")])
def test_kernels_of_attention_can_be_kept(platform, call, cuda):
    hardware = chips.Hardware(cudnn=platform == "cuda", splash=platform == "tpu")
    fn = lambda x: (attention.attend(x, x, x, hardware).astype(jnp.float32) ** 2).sum()
    program = jax.jit(jax.vmap(jax.grad(fn)))
    kept = export.export(program, platforms=[platform], disabled_checks=traced.CHECKS)(
        test_attention.shaped(2, 1, 2048, 16, 88)
    )
    assert f"@{call}" in export.deserialize(kept.serialize()).mlir_module()


def test_names_of_programs_stay(checkpoints, place):
    programs = test_real_networks.build(checkpoints)._programs
    assert programs("judge").__name__ == programs._jitted("judge", False, {}).__name__
