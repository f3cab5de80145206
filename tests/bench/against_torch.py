"""An iteration of the shapes config beside the same in torch (tests/oracles/inversion.py), on the same device, in one run.

    python -m tests.bench.against_torch --batch=8

Both have the same networks, the same number of prompts at once, and no held-out referee; a chunk of iterations of ours is
compiled, as in a run. Rows of torch: as it is, with its networks through torch.compile, and in the structure of the authors'
loop (one prompt after the other, three decodings, a pass that scores the views). A ratio below 1 means that ours is faster.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable

import diffusers
import jax
import torch
import transformers

from referee_jax import config, inverter, queue
from tests.oracles import inversion as oracle

PROMPT = "a red circle and a blue square"


def settings_of(path: str, batch: int) -> config.Settings:
    """Those of the file, without what only begins or watches a run."""
    settings = config.load(path)
    judges = tuple(spec for spec in settings.referees if spec.role == "optimise")
    return dataclasses.replace(settings, batch_size=batch, referees=judges, init="noise", init_candidates=1)


def ours(settings: config.Settings, runs: int) -> float:
    """Seconds of an iteration of the whole batch."""
    engine = inverter.Inverter.from_config(settings, jax.devices()[:1])
    batch, _ = engine.advance(engine.begin(queue.items([PROMPT], settings.batch_size), 0))
    times = []
    for _ in range(runs):
        start = time.monotonic()
        batch, _ = engine.advance(dataclasses.replace(batch, step=0))
        times.append(time.monotonic() - start)
    return statistics.median(times) / settings.chunk


def build(settings: config.Settings, device: str, **how) -> tuple[oracle.Oracle, oracle.Prompt]:
    """The oracle with the settings' numbers, and a batch of prompts."""
    (spec,), batch = settings.referees, settings.batch_size
    sd, judge = config.checkpoint_path(settings.generator.checkpoint), config.checkpoint_path(spec.checkpoint)
    numbers = oracle.Settings(
        steps=settings.steps, sds_guidance=settings.sds.guidance, referee_losses=dict(spec.losses),
        views_count=settings.views.count, views_keep=settings.views.keep, views_augmentations=settings.views.augmentations,
        referee_balance_epsilon=settings.referee.balance_epsilon, ema_start=settings.ema.start,
    )  # fmt: skip
    made = oracle.load(sd, judge, device=device, settings=numbers, **how)
    ids = lambda path, texts: oracle.tokens(path, texts).to(device)  # noqa: E731
    negatives = ids(judge, [PROMPT] * (len(spec.negatives) + spec.near))[None].expand(batch, -1, -1)
    prior = os.path.join(sd, "tokenizer")
    prompt = made.encode_text(ids(prior, [PROMPT] * batch), ids(prior, [""]), ids(judge, [PROMPT] * batch), negatives)
    return made, prompt


def theirs(settings: config.Settings, runs: int, device: str, *, as_published: bool = False, **how) -> float:
    """Seconds of an iteration of the whole batch."""
    made, prompt = build(settings, device, **how)
    side = settings.image_size // 2 ** (len(made.vae.config.block_out_channels) - 1)
    size, count = made.clip.config.vision_config.image_size, settings.batch_size
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda batch: oracle.draw(generator, made.settings, batch=batch, latent=(side, side), size=size)  # noqa: E731
    z = torch.randn(count, side, side, 4, generator=generator, device=device)

    def step() -> None:
        if not as_published:
            made.step(z, oracle.State(), 0, draw(count), prompt)
            return
        for n in range(count):
            one = oracle.Prompt(*(x[n : n + 1] for x in (prompt.cond, prompt.uncond, prompt.text, prompt.negatives)))
            noise, latents = draw(1), z[n : n + 1].clone().requires_grad_()
            for _ in range(2):  # two of three decodings change nothing in the result, nor does the scoring of views
                image = made.decode(latents)
            made.view_losses(
                oracle.render(image, noise["views"], size=size, names=made.settings.views_augmentations), one
            )
            made.step(z[n : n + 1], oracle.State(), 0, noise, one)

    return _median(step, runs, device)


def _median(step: Callable[[], None], runs: int, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    step()
    step()  # torch.compile makes a second program once it has seen the gradient
    times = []
    for _ in range(runs):
        wait()
        start = time.monotonic()
        step()
        wait()
        times.append(time.monotonic() - start)
    return statistics.median(times)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/shapes.py")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    settings, device = settings_of(args.config, args.batch), "cuda" if torch.cuda.is_available() else "cpu"
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = {
        "torch": {},
        "torch, channels last": {"channels_last": True},
        "torch.compile": {"compiled": True},
        "torch, as published": {"as_published": True},
    }
    found = {"ours": ours(settings, args.runs)}
    print(f"ours: {found['ours']:.3f} s for an iteration of {args.batch} prompts", flush=True)
    for name, how in rows.items():
        try:
            found[name] = theirs(settings, args.runs, device, **how)
        except Exception as error:  # torch.compile needs a C++ compiler, and raises whatever that makes it
            print(f"{name}: does not work here ({str(error).splitlines()[0][:120]})")
            continue
        print(f"{name}: {found[name]:.3f} s; ours takes {found['ours'] / found[name]:.2f} of it", flush=True)
    print(
        json.dumps({"batch": args.batch, "device": jax.devices()[0].device_kind, "version": torch.__version__} | found)
    )


if __name__ == "__main__":
    main()
