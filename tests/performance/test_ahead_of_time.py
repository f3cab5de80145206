"""Compiling for machines that are not there: what is refused, what the report says, and, with libtpu, the real thing."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from referee_jax import config
from referee_jax.engine import capacity
from referee_jax.hardware import chips
from referee_jax.performance import ahead_of_time, cost
from referee_jax.weights import load
from tests.tools import hlo_surprises

ROOT = pathlib.Path(__file__).parents[2]
REPORT = ahead_of_time.Report(
    topology="v5e:2x4", chips=8, batch=2, fits=False, needed=None, weights=2**30, texts=2**29, flops=4e12, useful=2.955e14,
    floor=1.5, remat="full", most=3,
)  # fmt: skip


def test_text_encoders_may_be_too_much():
    """They stay on a chip, though an iteration reads none."""
    found = ahead_of_time.measured(dataclasses.replace(REPORT, texts=7 * 2**30), Compiled(), 5, chips.TPUS["v5e"], 60)
    assert not found.fits and "at least 17.00 GiB of the 16 GiB of a chip" in "\n".join(found.lines())


@pytest.mark.parametrize("name", ["v5e", "v5e:16", "h100:2x4", "v5e:2x4x", "../v5e:2x4"])
def test_what_is_no_slice(name):
    with pytest.raises(ahead_of_time.TopologyError, match="is no slice, as v5e:16x16"):
        ahead_of_time.devices(name)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ahead_of_time.TopologyError, match=r'not installed: pip install -e ".\[tpu\]"'):
        ahead_of_time.devices("v5e:2x4")


def test_peaks_and_clocks_agree():
    """Peak = matrix units x their multiply-adds x 2 x clock."""
    for name, units, side in (("v4", 8, 128), ("v5p", 8, 128), ("v5e", 4, 128), ("v6e", 4, 256)):
        chip = chips.TPUS[name]
        assert units * side**2 * 2 * chip.clock / 1e3 == pytest.approx(chip.rate, rel=0.01)


class Compiled:
    """A program of two images a chip, 3e9 cycles in its chunk."""

    def memory_analysis(self):
        sizes = {"argument": 5, "output": 2, "alias": 1, "temp": 3, "generated_code": 1}
        return type("Stats", (), {f"{name}_size_in_bytes": n * ahead_of_time.GIB for name, n in sizes.items()})

    def as_text(self):
        return 'ENTRY %main (a: f32[]) -> f32[] {\n  %c = f32[] copy(%a), backend_config={"estimated_cycles":"3000000000"}\n}\n'


def test_a_measured_program():
    """Five iterations of 3e9 cycles at 1.5 GHz are 10 s for the two images of a chip."""
    found = ahead_of_time.measured(REPORT, Compiled(), 5, chips.TPUS["v5e"], 60)
    assert (found.fits, found.needed, found.collectives, found.uncounted) == (True, 10.5 * ahead_of_time.GIB, [], 0)
    assert found.seconds == pytest.approx(5.0)
    text = "\n".join(found.lines())
    assert "10.50 GiB of the 16 GiB of a chip, weights 1.00 GiB: fits" in text
    assert "at most 3 images a chip fit, by the estimate of cost.py (remat=full)" in text
    assert "295.5 for an image without what remat makes again, at least 1.5 s of the chip" in text
    assert "collectives: none" in text and "5 s an image on each chip, 720 images an hour, 5760 in all" in text
    assert json.loads(json.dumps(found.to_dict()))["seconds"] == found.seconds


@pytest.mark.parametrize(
    ("said", "strays"),
    [
        ("[4,2]<=[8]", []),
        ("{{0,1},{2,3},{4,5},{6,7}}", []),
        ("[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("{{1,2}}", [(1, 2)]),
    ],
)
def test_a_program_of_groups(said, strays):
    """Two chips make an image; they exchange data with each other, and with no others."""

    class Split(Compiled):
        def as_text(self):
            line = f"  %r = f32[] all-reduce(%a), channel_id=1, replica_groups={said}, to_apply=%add"
            return super().as_text().replace("\n}", f"\n{line}\n}}")

    found = ahead_of_time.measured(dataclasses.replace(REPORT, model=2, batch=1), Split(), 5, chips.TPUS["v5e"], 60)
    text = "\n".join(found.lines())
    assert found.strays == strays and found.collectives == ["all-reduce"]
    assert ("NOT within a group: [" in text) == bool(strays)
    assert "8 chips, 1 images a group of 2 chips, 4 at once" in text
    assert "10 s an image on each group of 2 chips, 360 images an hour, 1440 in all" in text


def test_a_program_that_does_not_fit():
    refusal = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
    assert ahead_of_time._needed(refusal) == int(20.5 * ahead_of_time.GIB)
    assert ahead_of_time._needed("something else") is None
    later = "Ran out of memory on HBM, the total memory required for HLO temporaries (23.01G) exceeds available HBM (15.75G)."
    assert ahead_of_time._needed(later) == int(23.01 * ahead_of_time.GIB)
    text = "\n".join(dataclasses.replace(REPORT, needed=ahead_of_time._needed(refusal)).lines())
    assert "at least 20.50 GiB of the 16 GiB of a chip" in text and "does not fit" in text and "cycles" not in text


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (the extra [tpu]) is not installed")
def test_a_slice_of_v5e(tmp_path):
    """In a process of its own: a program spread over eight chips, without communication.

    Long attention is the kernel, whose logits are counted. And chips.OPTIONS has its effect: no weight is fetched long before
    it is needed.
    """
    script = tmp_path / "compile.py"
    script.write_text(
        "import jax, numpy, jax.numpy as jnp\n"
        "from referee_jax.engine import parallel\n"
        "from referee_jax.hardware import chips\n"
        "from referee_jax.models import attention\n"
        "from referee_jax.performance import ahead_of_time, hlo\n"
        "mesh = parallel.prompt_mesh(ahead_of_time.devices('v5e:2x4'))\n"
        "assert len(ahead_of_time.devices('v4:2x2x1')) == 4  # a chip of v4 has two cores and is one device\n"
        "step = lambda w, x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=5)[0]\n"
        "shape = lambda n, batched: parallel.place(jax.ShapeDtypeStruct((n, 512), 'float32'), mesh, batched=batched)\n"
        "fn = jax.jit(parallel.across_devices(step, mesh, (False, True)))\n"
        "compiled = fn.lower(shape(512, False), shape(2048, True)).compile()\n"
        "found = hlo.cycles(compiled.as_text())\n"
        "late = lambda w, v, x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ v), None), x, None, length=9)[0] @ w\n"
        "hardware = chips.traits(mesh.devices.flat[0])\n"
        "attend = jax.vmap(lambda x: attention.attend(x, x, x, hardware))\n"
        "tokens = parallel.place(jax.ShapeDtypeStruct((8, 1, 4096, 2, 64), 'bfloat16'), mesh, batched=True)\n"
        "text = jax.jit(parallel.across_devices(attend, mesh, [True])).lower(tokens).compile().as_text()\n"
        "kernel = hlo.cycles(text, (3.0, 6.0)).total - hlo.cycles(text).total\n"
        "assert kernel == round(2 * 4096**2 * 3 / 1000), kernel\n"
        "for options, count in ({}, 1), (chips.OPTIONS['tpu'], 0):\n"
        "    lowered = jax.jit(late, compiler_options=options).lower(*map(shape, (512, 512, 2048), (False, False, False)))\n"
        "    assert lowered.compile().as_text().count('cross_program_prefetch_index=') == count\n"
        "print(mesh.size, found.total, len(found.uncounted), hlo.collectives(compiled.as_text()))\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    size, total, uncounted, collectives = done.stdout.split()[-4:]
    # 256 rows x 512 x 512 multiply-adds a chip and trip, at 4 x 128 x 128 a cycle.
    assert (size, uncounted, collectives) == ("8", "0", "[]") and int(total) > 5 * 256 * 512 * 512 / (4 * 128 * 128)


def tiny(checkpoints):
    sd, clip = map(str, checkpoints)
    values = {"steps": 6, "chunk": 3, "image_size": 32, "batch_size": 1, "views": {"count": 2, "keep": 2}}
    return values | {"generator": {"checkpoint": sd}, "referees": ({"checkpoint": clip},)}


@pytest.mark.parametrize("chip", [None, chips.TPUS["v5e"]])
def test_programs_are_made_for_the_devices_of_the_mesh(monkeypatch, checkpoints, chip):
    """Where products are faster nothing is gathered, and every network knows it."""
    monkeypatch.setattr(chips, "of", lambda kind: chip)
    engine = ahead_of_time.unloaded(config.from_config(tiny(checkpoints)), jax.devices()[:1])
    lowered = engine.trace(engine.shapes()).lower()
    kinds = {surprise.kind for surprise in hlo_surprises.surprises(lowered.as_text("hlo"))}
    assert ({"gather", "scatter"} & kinds == set()) == (chip is not None)
    networks = jax.tree.leaves(engine.networks, is_leaf=lambda x: hasattr(x, "hardware"))
    assert {x.hardware for x in networks if hasattr(x, "hardware")} == {chips.traits()}


def test_devices_here_may_stand_for_a_slice(monkeypatch, checkpoints):
    """All of it but libtpu, with tiny networks: their config.json are read, their weights are not."""
    monkeypatch.setattr(ahead_of_time, "devices", lambda name: jax.devices()[:2])
    monkeypatch.setattr(load.Tensors, "__getitem__", None)
    values = tiny(checkpoints)
    # A U-Net would only take time to compile, and what fits is asked in test_cost.py.
    values |= {"sds": {"weight": 0.0, "weight_final": 0.0}, "remat": "full"}
    found = ahead_of_time.compile_for(config.from_config(values), "v5e:2x4")
    assert (found.chips, found.batch, found.fits, found.collectives, found.uncounted) == (2, 1, True, [], 0)
    assert found.needed > found.weights > found.texts > 1e4 and found.flops > 1e6
    assert found.floor == pytest.approx(found.useful / 197e12) and found.most == capacity.MOST
    # With its start and end, without what is made again.
    estimate = cost.estimate(config.from_config(values | {"remat": "none"}))
    assert found.useful == estimate.image > 6 * found.flops
    assert found.weights == sum(estimate.weights.values()) + 4 * 1000  # the schedule, as float32
