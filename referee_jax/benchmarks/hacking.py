"""How often the warning of reward hacking is right, by ground truth in the shapes world.

    python -m referee_jax.benchmarks.hacking --out=runs/hacking

A picture is hacked if the optimised referees like it better than its start, and it is wrong, or right
but `WORSE` dB below a start that was right. Settings go from one that hacks (no prior) to one that does
not; whom the mark asks is the config's held-out referee. Prints precision and recall of
`held_out.is_hacked` by setting, and writes table.md, the pictures (start and end side by side) and one
JSON line per picture, with which an interrupted run continues.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from absl import flags
from ml_collections import config_flags

from referee_jax import cli, config, console, items
from referee_jax.benchmarks import methods
from referee_jax.engine import inverter
from referee_jax.method import held_out
from referee_jax.shapes import benchmark
from referee_jax.storage import files, images

WORSE = 1.0  # dB
LISTS = {"colour": 24, "numeracy": 12, "spatial": 12}  # category -> prompts of each split
# Name -> changes of configs/shapes_clip.py.
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one sample": {"init_candidates": 1},
    "one sample, without SDS": {
        "init_candidates": 1, "sds.weight": 0.0, "sds.weight_final": 0.0, "referee.balance": False,
    },
    "one sample, balanced as published": {"init_candidates": 1, "referee.balance_epsilon": 0.0},
    "from noise": {"init": "noise", "init_candidates": 1},
}  # fmt: skip


def prompts() -> list[str]:
    """Of each category and split of LISTS."""
    lists = [(c, s, count) for c, count in LISTS.items() for s in benchmark.splits(c)]
    return [text for category, split, count in lists for text in benchmark.prompts(category, split)[:count]]


def measure(engine: inverter.Inverter, part: Sequence[items.Item], out: Path) -> list[dict[str, Any]]:
    """Makes a batch, with its pictures in `out`: records of `losses`, and of `right` and `quality` at start and end."""
    batch = engine.begin(part, engine.settings.seed)
    starts = engine.preview(batch).astype(np.float32) / 255
    pictures, texts = methods.completed(engine, batch), [item.prompt for item in part]
    was_right, quality_before = benchmark.score(starts, texts)
    is_right, quality = benchmark.score([picture.image for picture in pictures], texts)
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for n, picture in enumerate(pictures):
        record = {"prompt": picture.item.prompt, "sample": picture.item.sample, "losses": picture.losses}
        record |= {"right": [bool(was_right[n]), bool(is_right[n])]}
        record |= {"quality": [float(quality_before[n]), float(quality[n])]}
        both = np.concatenate([starts[n], picture.image], axis=1)
        files.write_atomic(out / f"{picture.item.id}.png", images.encode_png(images.to_uint8(both), record))
        records.append(files.finite(record))
    return records


def is_worse(record: Mapping[str, Any]) -> bool:
    """Ground truth: wrong, or right but WORSE below a start that was right."""
    (was_right, is_right), (before, after) = record["right"], record["quality"]
    return not is_right or (was_right and after < before - WORSE)


def precision_and_recall(records: Sequence[Mapping[str, Any]], doubt: float) -> dict[str, float]:
    """Of the mark at the held-out loss `doubt`; NaN where nothing is marked, or hacked."""
    nan = lambda pair: [float("nan") if loss is None else loss for loss in pair]  # JSON has none
    losses = [{name: nan(pair) for name, pair in record["losses"].items()} for record in records]
    marked = np.array([held_out.is_hacked(x, doubt) for x in losses])
    hacked = np.array([x["referee"][1] < x["referee"][0] and is_worse(y) for x, y in zip(losses, records, strict=True)])
    both = float((marked & hacked).sum())
    ratio = lambda total: both / total if total else float("nan")
    return {
        "pictures": len(records), "right": float(np.mean([x["right"][1] for x in records])), "hacked": int(hacked.sum()),
        "marked": int(marked.sum()), "precision": ratio(marked.sum()), "recall": ratio(hacked.sum()),
    }  # fmt: skip


def compare(settings: config.Settings, out: Path, names: Sequence[str] = ()) -> str:
    """Measures the settings of these names (default: all) and returns the table.

    Raises:
        ValueError: where no held-out referee answers yes or no, and so nothing is ever marked.
    """
    doubt = held_out.doubt(spec.weighted for spec in settings.referees if spec.is_held_out)
    if doubt is None:
        raise ValueError(
            f"no held-out referee that answers yes or no ({', '.join(held_out.ANSWERS)}): nothing is marked"
        )
    base = dataclasses.replace(settings, samples=1)
    out.mkdir(parents=True, exist_ok=True)
    methods.keep(base, out)
    measured: dict[str, list[dict[str, Any]]] = {}
    for name in names or SETTINGS:
        file = out / f"{methods.slug(name)}.jsonl"
        files.mend(file)
        records = measured[name] = files.read_lines(file)
        done = {record["prompt"] for record in records}
        todo = [item for item in items.expand(prompts(), 1) if item.prompt not in done]
        engine = inverter.Inverter.from_config(config.override(base, SETTINGS[name])) if todo else None
        with tqdm.tqdm(total=len(todo), desc=name, unit="image", dynamic_ncols=True) as bar:
            for part in items.batches(todo, engine.batch_size) if engine else ():
                batch = measure(engine, part, out / "images" / file.stem)
                files.append(file, *batch)
                records += batch
                bar.update(len(part))
    measured["all"] = [record for records in list(measured.values()) for record in records]
    figures = {name: precision_and_recall(records, doubt) for name, records in measured.items()}
    rows = {name: [f"{value:.3g}" for value in row.values()] for name, row in figures.items()}
    text = console.markdown(["setting", *figures["all"]], rows)
    files.write_atomic(out / "table.md", text.encode())
    return text


def main(args: flags.FlagValues) -> str:
    """The command line."""
    cli.prepare(args.device)
    return compare(config.from_config(args.config), Path(args.out), args.setting)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", config.find("shapes_clip"), "config file, or the name of one")
    cli.define_device()
    flags.DEFINE_multi_enum("setting", [], list(SETTINGS), "only these; may be repeated")
    flags.DEFINE_string("out", "runs/hacking", "directory of records and pictures")
    cli.start(main)
