"""Time of an iteration for each further view, referee and image, beside the FLOPs of performance/cost.py.

    python -m tests.tools.slopes --out=slopes.json
    python -m tests.tools.slopes --config=configs/paper.py --precision=bfloat16 --out=slopes.json     # a GPU

Networks have the sizes of a config's, by default the shapes world's, and random weights. The slope of an axis is
that of seconds over FLOPs, by least squares; its inverse is the rate of the added work. A ratio of 1 means that
the added work is as fast as the whole last row of the axis; above 1 it is slower than its FLOPs suggest.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from referee_jax import bench, config, console
from referee_jax.engine import capacity
from referee_jax.hardware import chips, devices
from referee_jax.performance import abstract_networks, cost
from referee_jax.storage import run_directory
from referee_jax.weights import hub

COUNTS = (1, 2, 4, 8)
# Whether the config's generator is the shapes world's -> referees to add to those of the config.
REFEREES = {
    True: (
        config.RefereeSpec(name="blip_itm", checkpoint="shapes/blip_itm", losses={"itm": 1.0}),
        config.RefereeSpec(name="blip2", checkpoint="shapes/blip2", losses={"itm": 1.0}),
    ),
    False: (
        config.RefereeSpec(name="clip", checkpoint="openai/clip-vit-large-patch14", losses={"cosine": 1.0}),
        config.RefereeSpec(name="blip_itm", checkpoint="Salesforce/blip-itm-base-coco", losses={"itm": 1.0}),
    ),
}


def variants(settings: config.Settings, batch: int, counts: Sequence[int] = COUNTS) -> Iterator[tuple[str, str, Any]]:
    """Axis, name of the row, settings: `counts` of views and of images, then the config's referees and REFEREES.

    Where the number of images does not vary, it is `batch`. Held-out referees are left out.
    """
    optimised = tuple(spec for spec in settings.referees if spec.role == "optimise")
    settings = dataclasses.replace(settings, referees=optimised, batch_size=batch)
    for count in counts:
        views = dataclasses.replace(settings.views, count=count, keep=count)
        yield "views", str(count), dataclasses.replace(settings, views=views)
    for count in counts:
        yield "images at once", str(count), dataclasses.replace(settings, batch_size=count)
    more = REFEREES[hub.is_embedded(settings.generator.checkpoint)]
    for count in range(len(more) + 1):
        added = more[:count]
        name = " + ".join(["its own", *(spec.name for spec in added)])
        yield "referees", name, dataclasses.replace(settings, referees=optimised + added)


def measure(axis: str, name: str, settings: config.Settings, device: jax.Device) -> dict[str, Any]:
    """A row: seconds of an iteration of the whole batch, and the FLOPs of its program."""
    sized = abstract_networks.at_random(abstract_networks.abstract(settings))
    settings = capacity.fitting(settings, sized.prior, sized.judges, chips.memory_limit(device))
    flops = settings.batch_size * cost.estimate(settings).step
    seconds = bench.whole(settings, sized, device, settings.batch_size)["seconds"]
    return {"axis": axis, "row": name, "remat": settings.remat, "flops": flops, "seconds": seconds}


def slopes(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each axis: seconds per added FLOP (`slope`), per FLOP of its last row (`mean`), and their `ratio`."""
    results = {}
    for axis in dict.fromkeys(row["axis"] for row in rows):
        group = [row for row in rows if row["axis"] == axis]
        flops, seconds = (np.array([row[key] for row in group]) for key in ("flops", "seconds"))
        slope, mean = float(np.polyfit(flops, seconds, 1)[0]), float(seconds[-1] / flops[-1])
        is_monotone = bool((np.diff(seconds[np.argsort(flops)]) > 0).all())
        results[axis] = {"slope": slope, "mean": mean, "ratio": slope / mean, "monotone": is_monotone}
    return results


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows and slopes as Markdown."""
    cells = {
        f"{row['axis']}: {row['row']}": [
            f"{1e3 * row['seconds']:.4g}", f"{row['flops'] / 1e9:.4g}", f"{row['flops'] / row['seconds'] / 1e9:.4g}",
        ]
        for row in rows
    }  # fmt: skip
    summary = {
        axis: [
            f"{1e12 * x['slope']:.4g}",
            f"{1e12 * x['mean']:.4g}",
            f"{x['ratio']:.2f}",
            "yes" if x["monotone"] else "no",
        ]
        for axis, x in slopes(rows).items()
    }
    return "\n".join(
        [
            console.markdown(["an iteration of", "ms", "GFLOP", "GFLOP/s"], cells),
            console.markdown(["axis", "ms per GFLOP added", "of all of the last row", "ratio", "monotone"], summary),
        ]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/shapes_clip.py")
    parser.add_argument("--batch", type=int, default=4, help="images at once where something else varies")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    settings = dataclasses.replace(config.load(args.config), precision=args.precision)
    devices.choose()  # as a run does
    device, rows = jax.devices()[0], []
    with bench.empty_cache():
        for axis, name, varied in variants(settings, args.batch):
            rows.append(measure(axis, name, varied, device))
            print(f"{axis}, {name}: {rows[-1]['seconds']:.4f} s", flush=True)
    print(table(rows))
    if args.out:
        report = {
            "device": device.device_kind,
            "versions": run_directory.versions(),
            "rows": rows,
            "slopes": slopes(rows),
        }
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
