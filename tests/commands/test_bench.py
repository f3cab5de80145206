"""The bench on tiny networks: everything it promises is measured, and its table says so."""

import dataclasses
import json
import types

import jax
import pytest

from referee_jax import bench, config
from referee_jax.performance import abstract_networks, ahead_of_time, cost
from tests.conftest import abstract_step


@pytest.fixture
def keep_cache():
    """The bench has a cache of its own."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def arguments(settings, batches, out=None, slice=None):
    values = {"config": settings, "batches": batches, "seconds": 0.0, "out": out, "compile-for": slice}
    return types.SimpleNamespace(**values)


def test_bench(checkpoints, tmp_path, keep_cache):
    sd, judge = map(str, checkpoints)
    values = {
        "steps": 4, "chunk": 2, "image_size": 32, "generator": {"checkpoint": sd}, "referees": ({"checkpoint": judge},),
        "views": {"count": 2, "keep": 2, "augmentations": ("Af",)},
    }  # fmt: skip
    out, settings = tmp_path / "bench.json", config.from_config(values)
    table = bench.main(arguments(settings, ["2"], out))
    found = json.loads(out.read_text())
    rows = {row["part"]: row for row in found["rows"]}
    expected = [part.name for part in cost.parts(abstract_step(settings))]
    assert list(rows) == [*expected, "iteration"] and "clip: forward + backward" in rows
    assert all(row["seconds"] > 0 and row["batch"] == 2 and row["compile"] > 0 for row in found["rows"])
    whole = rows["iteration"]
    within = sum(rows[name]["flops"] for name in ("denoiser", "decoder + pullback", "clip: forward + backward"))
    assert whole["flops"] == pytest.approx(within, rel=0.03)
    assert whole["images_per_hour"] == pytest.approx(3600 * 2 / (4 * whole["seconds"])) and found["matmul"] > 1e8
    assert whole["warm"] >= 0 and "peak" in whole and whole["remat"] == "full"
    assert found["device"] == jax.devices()[0].device_kind and found["versions"]["jax"] == jax.__version__
    assert "| decoder + pullback, 2 |" in table and "| images at once |" in table and "| full |" in table
    for batches in ([], ["0"], ["x"]):
        with pytest.raises(ValueError, match="numbers of images are needed"):
            bench.main(arguments(settings, batches))


def test_what_is_made_again_is_no_progress(monkeypatch):
    """Operations are those of a config without remat, of networks in which it makes a fifth again."""
    settings = config.override(config.load("configs/shapes_blip.py"), {"remat": "full", "views.augmentations": ("Af",)})
    settings = dataclasses.replace(settings, referees=settings.referees[:1])
    monkeypatch.setattr(abstract_networks, "at_random", lambda sized: sized)
    monkeypatch.setattr(bench, "part", lambda *_: {"seconds": 1.0, "compile": 1.0})
    monkeypatch.setattr(bench, "whole", lambda *_: {"seconds": 1.0, "compile": 1.0, "warm": 1.0})
    rows = {row["part"]: row for row in bench.bench(settings, [4], least=0.0)["rows"]}
    lean, full = (cost.estimate(dataclasses.replace(settings, remat=name)) for name in ("none", "full"))
    assert rows["iteration"]["flops"] == 4 * lean.step < 3.9 * full.step and rows["iteration"]["remat"] == "full"
    name = "blip_itm: forward + backward"
    assert rows[name]["flops"] == 4 * lean.parts[name] < 3.9 * full.parts[name]


def test_a_slice_is_compiled_for(monkeypatch, tmp_path):
    """The report that doctor prints; nothing is run."""
    report = ahead_of_time.Report(
        topology="v5e:2x4", chips=8, batch=2, fits=True, needed=2**30, weights=1, texts=0, flops=1.0, useful=2.0, floor=1.5,
        remat="full", most=3,
    )  # fmt: skip
    asked = []
    monkeypatch.setattr(ahead_of_time, "compile_for", lambda *of: asked.append(of) or report)
    settings, out = config.load("configs/shapes_clip.py"), tmp_path / "report.json"
    assert bench.main(arguments(settings, ["1"], out, "v5e:2x4")) == "\n".join(report.lines())
    assert json.loads(out.read_text()) == report.to_dict() and asked == [(settings, "v5e:2x4")]
