"""Trains the networks of the shapes world: `python -m referee_jax.shapes.train --network=vae|clip|unet|...`.

Training is the one thing here that is done with torch (extra `[train]`), on the very classes of transformers and diffusers
whose checkpoints the package reads: what is committed is a true Hugging Face checkpoint, and loading it is a test of its own.
On a CPU with bfloat16 matrix units it is several times faster than XLA besides.

Training is seeded and resumable: what is random in step n depends on (seed, n) alone, the state is kept in `--workdir`.
The order is vae, clip, then unet and blip (which read them from `--out`), and blip before blip2. Each network comes with a
card of its data, steps and final figures.
"""

import copy
import inspect
import json
import math
import pathlib
import time
from collections.abc import Callable

import numpy as np
import torch
from absl import app, flags, logging

from referee_jax.shapes import recipes_generator, recipes_referees
from referee_jax.shapes.recipes_referees import Batch

NETWORKS = {
    "vae": recipes_generator.Autoencoder,
    "clip": recipes_referees.Clip,
    "unet": recipes_generator.UNet,
    "clip_held_out": recipes_referees.HeldOutClip,
    "align": recipes_referees.Align,
    "blip": recipes_referees.Blip,
    "blip2": recipes_referees.Blip2,
}
SAVE_EVERY = 500


class Steps(torch.utils.data.Dataset):
    """Batch n of a recipe, drawn from (seed, n)."""

    def __init__(self, batch: Callable, seed: int):
        self.batch, self.seed = batch, seed

    def __getitem__(self, step: int) -> Batch:
        batch = self.batch(np.random.default_rng((self.seed, step)))
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in batch.items()}


def train(name: str, *, steps: int | None, seed: int, out: pathlib.Path, workdir: pathlib.Path) -> dict[str, float]:
    """Trains network `name`, going on from the checkpoint in `workdir`; writes it to `out`; returns the last figures."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Where a CPU has no bfloat16 units, torch's own loops take over, a hundred times slower.
    fast = device == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    network = NETWORKS[name](out).to(device)
    steps, trained = steps or network.steps, network.trained
    average = copy.deepcopy(trained).requires_grad_(False)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=network.rate, betas=(0.9, 0.99), weight_decay=0.02)
    warmup = min(200, 1 + steps // 5)
    shape = lambda i: min((i + 1) / warmup, 0.51 + 0.49 * math.cos(math.pi * i / steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    parts = {"trained": trained, "average": average, "optimizer": optimizer, "schedule": schedule}
    checkpoint, done = workdir / f"{name}.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        done = saved.pop("step")
        for key, part in parts.items():
            part.load_state_dict(saved[key])
        logging.info("%s: going on from step %d", name, done)
    workdir.mkdir(parents=True, exist_ok=True)
    # Spawned, not forked: the caller may have threads (JAX has), and a fork of those can hang.
    loader = torch.utils.data.DataLoader(
        Steps(network.batch, seed),
        sampler=range(done, steps),
        batch_size=None,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    begin, figures = time.monotonic(), {}
    for i, batch in enumerate(loader, done + 1):
        batch = {key: value.to(device) for key, value in batch.items()}
        torch.manual_seed(1_000_003 * seed + i)  # noise, too, is of (seed, step) alone
        with torch.autocast(device, dtype=torch.bfloat16, enabled=fast):
            loss, figures = network(batch)
        figures = {key: value.detach() for key, value in figures.items()}
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), trained.parameters(), strict=True):
                old.lerp_(new, max(0.003, 1 / i))
            for old, new in zip(average.buffers(), trained.buffers(), strict=True):
                old.copy_(new)  # statistics of batch norms, which are averages themselves
        if i % 100 == 0 or i == steps:
            pace = (time.monotonic() - begin) / (i - done)
            shown = {key: round(value.item(), 4) for key, value in figures.items()}
            logging.info("%s: step %d of %d, %.2f s each, %s", name, i, steps, pace, shown)
        if i % SAVE_EVERY == 0 or i == steps:
            state = {key: part.state_dict() for key, part in parts.items()} | {"step": i}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            network.save(average, out)
            for place in network.places:
                (out / place / "README.md").write_text(
                    card(name, network, step=i, steps=steps, seed=seed, figures=figures)
                )
    return {key: float(value) for key, value in figures.items()}


def card(name: str, network: torch.nn.Module, *, step: int, steps: int, seed: int, figures: dict) -> str:
    """What stands beside a trained network."""
    values = {key: round(float(value), 4) for key, value in figures.items()}
    return (
        f"# {name}\n\n{inspect.getdoc(type(network))}\n\n"
        f"Data: scenes of `referee_jax.shapes.world`, new in every step. {network.batch.__doc__.strip().splitlines()[0]}\n"
        f"No caption names an attribute pair of `world.UNSEEN`.\n\n"
        f"Trained by `python -m referee_jax.shapes.train --network={name} --seed={seed} --steps={steps}`, "
        f"{step} steps done; the weights are a running average. Figures of the last batch: {json.dumps(values)}\n"
    )


def main(argv: list[str]) -> None:
    """The command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    args = flags.FLAGS
    train(
        args.network,
        steps=args.steps,
        seed=args.seed,
        out=pathlib.Path(args.out),
        workdir=pathlib.Path(args.workdir),
    )


if __name__ == "__main__":
    flags.DEFINE_enum("network", None, list(NETWORKS), "which network to train", required=True)
    flags.DEFINE_integer("steps", None, "training steps; default: the network's", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of weights, data and noise")
    flags.DEFINE_string("out", "shapes_networks", "directory that the trained networks are written to")
    flags.DEFINE_string("workdir", "shapes_training", "directory of the training's checkpoints")
    app.run(main)
