"""Trains the networks of the shapes world: `python -m referee_jax.shapes.train --network=vae|clip|unet|...`.

Training alone uses torch (extra `[train]`), with the classes of transformers and diffusers whose checkpoints the
package reads: the committed assets are true Hugging Face checkpoints, and loading them is a test. On a CPU with
bfloat16 matrix units it is also several times faster than XLA.

Training is seeded and resumable: randomness in step n depends on (seed, n) alone, and the state is in `--workdir`.
The order is vae, clip, then unet, blip, blip2 and vqascore (which read them from `--out`). Each network gets a card
with its data, steps and final figures. `--size`, `--noise`, `--named` and `--epoch` train it on other data.
"""

import copy
import functools
import inspect
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from absl import flags, logging

from referee_jax import cli
from referee_jax.shapes import recipes_generator, recipes_referees, recipes_vqascore
from referee_jax.shapes.recipes_referees import Batch

NETWORKS = {
    "vae": recipes_generator.Autoencoder,
    "clip": recipes_referees.Clip,
    "unet": recipes_generator.UNet,
    "one_step": recipes_generator.OneStep,
    "clip_held_out": recipes_referees.HeldOutClip,
    "blip": recipes_referees.Blip,
    "blip2": recipes_referees.Blip2,
    "vqascore": recipes_vqascore.Vqascore,
    "vqascore_held_out": recipes_vqascore.HeldOutVqascore,
}
SAVE_EVERY = 500


class Steps(torch.utils.data.Dataset):
    """Batch n of a recipe, drawn from (seed, n); with `epoch`, that many batches repeat."""

    def __init__(self, batch: Callable, seed: int, epoch: int | None = None):
        self.batch, self.seed, self.epoch = batch, seed, epoch

    def __getitem__(self, step: int) -> Batch:
        batch = self.batch(np.random.default_rng((self.seed, step % self.epoch if self.epoch else step)))
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in batch.items()}


def train(
    name: str,
    *,
    steps: int | None,
    seed: int,
    out: pathlib.Path,
    workdir: pathlib.Path,
    epoch: int | None = None,
    workers: int = 1,
    start: pathlib.Path | None = None,
    without: Sequence[str] = (),
    **data: float,
) -> dict[str, float]:
    """Trains a network, from its checkpoint in `workdir` if there is one, and writes it to `out`.

    Args:
        name: of NETWORKS.
        steps: of the whole training; by default the network's.
        seed: of weights, data and noise.
        out: directory of the trained networks.
        workdir: directory of the training's checkpoints.
        epoch: the number of batches, which repeat; by default all are new.
        workers: processes that draw batches; 0: this one does.
        start: directory of networks whose one is trained on; of the U-Net alone, by default random weights.
        without: ingredients of the recipe that are left out; of VQAScore alone.
        **data: arguments of the batches (size, noise, named; of VQAScore mirror, crowd).

    Returns:
        The figures of the last batch.

    Raises:
        ValueError: for arguments that the batches do not take, or a checkpoint of other data.
    """
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Where a CPU has no bfloat16 units, torch's own loops take over, a hundred times slower.
    fast = device == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    if unknown := data.keys() - inspect.signature(NETWORKS[name].batch).parameters.keys():
        raise ValueError(f"what {name} is trained on has no {', '.join(sorted(unknown))}")
    if wrong := set(without) - set(getattr(NETWORKS[name], "ingredients", ())):
        raise ValueError(f"{name} has no {', '.join(sorted(wrong))} to leave out")
    if start and "start" not in inspect.signature(NETWORKS[name]).parameters:
        raise ValueError(f"{name} begins from random weights alone")
    network = NETWORKS[name](out, **{key: x for key, x in (("start", start), ("without", without)) if x}).to(device)
    others = {"epoch": epoch, "start": start and str(start), "without": ",".join(without)}
    data_settings = data | {key: value for key, value in others.items() if value}
    steps, trained = steps or network.steps, network.trained
    average = copy.deepcopy(trained).requires_grad_(False)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=network.rate, betas=(0.9, 0.99), weight_decay=0.02)
    warmup = min(200, 1 + steps // 5)
    shape = lambda i: min((i + 1) / warmup, 0.51 + 0.49 * math.cos(math.pi * i / steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    parts = {"trained": trained, "average": average, "optimizer": optimizer, "schedule": schedule}
    checkpoint = workdir / f"{name}.pt"
    done = resume(checkpoint, parts, data_settings)
    workdir.mkdir(parents=True, exist_ok=True)
    # Spawned, not forked: the caller may have threads (JAX has), and a fork of those can hang.
    loader = torch.utils.data.DataLoader(
        Steps(functools.partial(network.batch, **data), seed, epoch),
        sampler=range(done, steps),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    begin, figures = time.monotonic(), {}
    for i, batch in enumerate(loader, done + 1):
        batch = {key: value.to(device) for key, value in batch.items()}
        torch.manual_seed(1_000_003 * seed + i)  # noise, too, depends on (seed, step) alone
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
                old.copy_(new)  # statistics of batch norms are averages already
        if i % 100 == 0 or i == steps:
            pace = (time.monotonic() - begin) / (i - done)
            shown = {key: round(value.item(), 4) for key, value in figures.items()}
            logging.info("%s: step %d of %d, %.2f s each, %s", name, i, steps, pace, shown)
        if i % SAVE_EVERY == 0 or i == steps:
            state = {key: part.state_dict() for key, part in parts.items()} | {"step": i, "data": data_settings}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            network.save(average, out)
            settings = {"network": name, "seed": seed, "steps": steps} | data_settings
            for place in network.places:
                (out / place / "README.md").write_text(card(network, settings, step=i, figures=figures))
    return {key: float(value) for key, value in figures.items()}


def resume(checkpoint: pathlib.Path, parts: dict, data: dict) -> int:
    """Loads the parts' states from a checkpoint, if there is one; returns its number of steps, or 0."""
    if not checkpoint.exists():
        return 0
    saved = torch.load(checkpoint, weights_only=True)
    if (before := saved.get("data", {})) != data:
        raise ValueError(f"{checkpoint} was trained on data {before}, not {data}: choose another workdir")
    for key, part in parts.items():
        part.load_state_dict(saved[key])
    logging.info("%s: going on from step %d", checkpoint.stem, saved["step"])
    return saved["step"]


def card(network: torch.nn.Module, settings: dict, *, step: int, figures: dict) -> str:
    """The README.md of a network trained with the flags `settings`."""
    values = {key: round(float(value), 4) for key, value in figures.items()}
    arguments = " ".join(f"--{key}={value}" for key, value in settings.items())
    new = f"{settings['epoch']} batches, again and again." if "epoch" in settings else "new in every step."
    named = settings.get("named", getattr(network, "named", False))
    names = "Captions name" if named else "No caption names"
    return (
        f"# {settings['network']}\n\n{inspect.getdoc(type(network))}\n\n"
        f"Data: scenes of `referee_jax.shapes.world`, {new} {network.batch.__doc__.strip().splitlines()[0]}\n"
        f"{names} an attribute pair of `world.UNSEEN`.\n\n"
        f"Trained by `python -m referee_jax.shapes.train {arguments}`, "
        f"{step} steps done; the weights are a running average. Figures of the last batch: {json.dumps(values)}\n"
    )


def main(args: flags.FlagValues) -> str:
    """The command line."""
    data = {name: args[name].value for name in ("size", "noise", "named", "mirror", "crowd") if args[name].present}
    out, workdir = pathlib.Path(args.out), pathlib.Path(args.workdir)
    others = {"epoch": args.epoch, "workers": args.workers, "without": args.without}
    others["start"] = pathlib.Path(args.start) if args.start else None
    train(args.network, steps=args.steps, seed=args.seed, out=out, workdir=workdir, **others, **data)
    return f"{args.network} is in {out}"


if __name__ == "__main__":
    flags.DEFINE_enum("network", None, list(NETWORKS), "which network to train", required=True)
    flags.DEFINE_integer("steps", None, "training steps; default: the network's", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of weights, data and noise")
    flags.DEFINE_integer("size", None, "scenes, or pairs of them, in a batch; default: the network's", lower_bound=1)
    flags.DEFINE_float("noise", None, "share of two-object captions with swapped attributes", 0.0, 1.0)
    flags.DEFINE_bool("named", False, "whether captions may name the unseen attribute pairs")
    flags.DEFINE_integer("epoch", None, "number of batches, which repeat; default: all are new", lower_bound=1)
    flags.DEFINE_bool("mirror", True, "of vqascore: whether there are mirrored scenes")
    flags.DEFINE_bool("crowd", True, "of vqascore: whether there are scenes with an object too many")
    flags.DEFINE_string("start", None, "of unet: directory of networks whose U-Net is trained on")
    flags.DEFINE_list(
        "without", [], f"of vqascore: what is left out of {', '.join(recipes_vqascore.Vqascore.ingredients)}"
    )
    flags.DEFINE_integer("workers", 1, "processes that draw batches, a tenth of a second each", lower_bound=1)
    flags.DEFINE_string("out", "shapes_networks", "directory that the trained networks are written to")
    flags.DEFINE_string("workdir", "shapes_training", "directory of the training's checkpoints")
    cli.start(main)
