"""The bench on tiny networks: everything it promises is measured, and its table says so."""

import jax
import numpy as np

from referee_jax import bench, config, cost


def test_bench(checkpoints):
    sd, judge = map(str, checkpoints)
    settings = config.from_config(
        {
            "steps": 4, "chunk": 2, "image_size": 32, "generator": {"checkpoint": sd}, "views": {"count": 2, "keep": 2},
            "referees": ({"checkpoint": judge},),
        }
    )  # fmt: skip
    found = bench.bench(settings, [2], least=0.0)
    names = [row["part"] for row in found["rows"]]
    expected = [part.name for part in cost.parts(cost.abstract_step(settings))]
    assert names == [*expected, "iteration"] and "clip: forward + backward" in names
    assert all(row["seconds"] > 0 and row["batch"] == 2 and row["compile"] > 0 for row in found["rows"])
    whole = found["rows"][-1]
    work = {row["part"]: row["flops"] for row in found["rows"]}
    within = work["U-Net"] + work["decoder + pullback"] + work["clip: forward + backward"]
    np.testing.assert_allclose(whole["flops"], within, rtol=0.03)
    assert whole["images_per_hour"] == 3600 * 2 / (4 * whole["seconds"]) and found["matmul"] > 1e8
    assert found["device"] == jax.devices()[0].device_kind
    table = bench.table(found)
    assert "| decoder + pullback, 2 |" in table and "| images at once |" in table
