"""The bench on tiny networks: everything it promises is measured, and its table says so."""

import jax
import numpy as np

from referee_jax import bench, config, cost


def test_bench(checkpoints):
    sd, judge = map(str, checkpoints)
    settings = config.from_config(
        {
            "steps": 4, "chunk": 2, "image_size": 32, "generator": {"checkpoint": sd}, "views": {"count": 2, "keep": 2},
            "referees": ({"checkpoint": judge}, {"checkpoint": judge, "role": "held_out"}),
        }
    )  # fmt: skip
    found = bench.bench(settings, [2], least=0.0)
    names = [row["part"] for row in found["rows"]]
    expected = [part.name for part in cost.parts(cost.abstract_step(settings))]
    assert names == [*expected, "iteration"] and "clip: forward + backward" in names
    assert all(row["seconds"] > 0 and row["batch"] == 2 and row["compile"] > 0 for row in found["rows"])
    counted = cost.estimate(settings)
    whole = found["rows"][-1]
    np.testing.assert_allclose(whole["flops"], 2 * (counted.step + counted.look), rtol=1e-6)
    np.testing.assert_allclose(found["rows"][0]["flops"], 2 * counted.parts["U-Net"])
    assert whole["images_per_hour"] == 3600 * 2 / (4 * whole["seconds"]) and found["matmul"] > 1e8
    assert found["device"] == jax.devices()[0].device_kind
    table = bench.table(found)
    assert "| decoder + pullback, 2 |" in table and "| images at once |" in table
