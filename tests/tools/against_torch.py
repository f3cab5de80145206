"""An iteration of a config beside the same in torch (tests/oracles/inversion.py), on the same device, in one run.

    python -m tests.tools.against_torch --batch=8
    python -m tests.tools.against_torch --config=configs/paper.py --precision=bfloat16 --batch=4

Both have the same networks, the same number of prompts at once, and no held-out referee; a chunk of iterations of ours is
compiled, as in a run. Where the config's checkpoints are no directories here, both have random weights of the same sizes. Rows of
torch: as it is (`eager`), with its networks through torch.compile (`compile`), each also with channels last, and in the structure
of the authors' loop (`as-published`: one prompt after the other, three decodings, a pass that scores the views). A ratio below 1
means that ours is faster.
"""

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or torch has no room beside JAX; read at its import

import diffusers
import jax
import numpy as np
import torch
import transformers
from torch import nn

from referee_jax import config, items, referees
from referee_jax.engine import builders, inverter
from referee_jax.hardware import devices
from referee_jax.performance import abstract_networks
from referee_jax.weights import hub
from tests.oracles import inversion as oracle
from tests.oracles import judges

PROMPT = "a red circle and a blue square"
ROWS: dict[str, dict[str, bool]] = {
    "eager": {},
    "eager-channels-last": {"channels_last": True},
    "compile": {"compiled": True},
    "compile-channels-last": {"compiled": True, "channels_last": True},
    "as-published": {"as_published": True},
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of an iteration of the whole batch, and the most bytes of the device that were in use; None: not told."""

    seconds: float
    peak: int | None


def settings_of(path: str, batch: int, precision: str = "float32") -> config.Settings:
    """Those of the file, without what only begins or watches a run."""
    settings = dataclasses.replace(config.load(path), batch_size=batch, precision=precision)
    optimise = tuple(spec for spec in settings.referees if spec.role == "optimise")
    return dataclasses.replace(settings, referees=optimise, init="noise", init_candidates=1)


def is_here(settings: config.Settings) -> bool:
    """Whether all checkpoints are directories, so that nothing need be random."""
    names = [settings.generator.checkpoint, *(spec.checkpoint for spec in settings.referees)]
    return all(hub.local_path(name).is_dir() for name in names)


def ours(settings: config.Settings, runs: int) -> Measured:
    """The iteration in JAX."""
    device = jax.devices()[0]
    # On a CPU, JAX_NUM_CPU_DEVICES devices share the cores, and the batch.
    there = jax.devices() if device.platform == "cpu" else [device]
    settings = dataclasses.replace(settings, batch_size=-(-settings.batch_size // len(there)))
    if is_here(settings):
        engine = inverter.Inverter.from_config(settings, there)
    else:
        sized = abstract_networks.at_random(abstract_networks.abstract(settings))
        engine = inverter.Inverter(settings, sized.prior, sized.judges, there)
    batch, _ = engine.advance(engine.begin(items.expand([PROMPT], engine.batch_size), 0))
    times = []
    for _ in range(runs):
        start = time.monotonic()
        batch, _ = engine.advance(dataclasses.replace(batch, step=0))
        times.append(time.monotonic() - start)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return Measured(statistics.median(times) / min(settings.chunk, settings.steps), peak)


def build(settings: config.Settings, device: str, **how: bool) -> tuple[oracle.Oracle, oracle.Prompt]:
    """The oracle with the settings' numbers, and a batch of prompts."""
    sized, (spec,) = abstract_networks.abstract(settings), settings.referees
    numbers = oracle.Settings(
        steps=settings.steps, sds_guidance=settings.sds.guidance, referee_losses=dict(spec.losses),
        views_count=settings.views.count, views_keep=settings.views.keep, views_augmentations=settings.views.augmentations,
        referee_balance_epsilon=settings.referee.balance_epsilon, ema_start=settings.ema.start,
    )  # fmt: skip
    given = {"device": device, "dtype": getattr(torch, settings.precision), "settings": numbers, **how}
    if is_here(settings):
        referee = sized.judges[0].referee
        paths = (str(hub.local_path(x)) for x in (settings.generator.checkpoint, spec.checkpoint))
        made = oracle.load(*paths, mean=referee.mean, std=referee.std, **given)
    else:
        made = at_random(sized, **given)
    # Of a text only its length matters here.
    tokens = builders.tokenize(settings, sized.prior.tokenizer, sized.judges, (), PROMPT)
    cond, uncond = (_expand(ids, settings.batch_size, device) for ids in (tokens["prior"][0], tokens["prior"][-1]))
    (texts,) = tokens["referees"]
    texts = {name: _expand(x, settings.batch_size, device) for name, x in texts.items()}
    return made, made.encode_text(cond, uncond, *_judged(sized.judges[0], texts))


def _expand(x: np.ndarray, batch: int, device: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x)).long().to(device).expand(batch, *x.shape)


def _judged(judge: referees.Judge, texts: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    """What the judge's `encode` takes."""
    ids = texts["input_ids"]
    if judge.spec.name == "clip":
        return ids[:, 0], ids[:, 1:]
    return ids, texts["attention_mask"], judge.referee.dec_token_id


def at_random(sized: abstract_networks.Sized, *, device: str, dtype: torch.dtype, **how: Any) -> oracle.Oracle:
    """`oracle.load` of networks of these sizes, with weights drawn as `sizes.at_random` draws them."""
    prior, referee = sized.prior, sized.judges[0].referee
    make = {"clip": _clip, "blip2": _blip2}[sized.judges[0].spec.name]
    with torch.device(device):
        text_encoder = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(**dataclasses.asdict(prior.text_encoder.text_model.config))
        )
        unet = diffusers.UNet2DConditionModel(**dataclasses.asdict(prior.unet.config))
        vae = diffusers.AutoencoderKL(**dataclasses.asdict(prior.vae.config))
        judge = make(referee)
    for m in (text_encoder, unet, vae, judge):
        _draw(m)
    for m in (text_encoder, unet, vae, *judge.parts):
        m.to(device, dtype)
    alphas = torch.from_numpy(np.array(prior.alphas_cumprod))
    return oracle.Oracle(text_encoder, unet, vae, judge, alphas, prediction_type=prior.prediction_type, **how)


def _clip(referee: Any) -> judges.Clip:
    values = dataclasses.asdict(referee.network.config)
    return judges.Clip(transformers.CLIPModel(transformers.CLIPConfig(**values)), referee.mean, referee.std)


def _blip2(referee: Any) -> judges.Blip2:
    values = dataclasses.asdict(referee.network.config)
    network = transformers.Blip2ForImageTextRetrieval(transformers.Blip2Config(**values, attn_implementation="sdpa"))
    return judges.Blip2(network, referee.mean, referee.std)


@torch.no_grad()
def _draw(module: nn.Module) -> None:
    for m in module.modules():
        for name, p in m.named_parameters(recurse=False):
            if name == "weight" and isinstance(m, nn.LayerNorm | nn.GroupNorm) or not p.ndim:
                p.fill_(1.0)
            else:
                p.normal_(0.0, 0.02)


def theirs(settings: config.Settings, runs: int, device: str, *, as_published: bool = False, **how: bool) -> Measured:
    """The iteration in torch."""
    made, prompt = build(settings, device, **how)
    side = settings.image_size // 2 ** (len(made.vae.config.block_out_channels) - 1)
    size, count = made.judge.image_size, settings.batch_size
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda batch: oracle.draw(generator, made.settings, batch=batch, latent=(side, side), size=size)
    z = torch.randn(count, side, side, 4, generator=generator, device=device)

    def published(n: int) -> None:
        own = slice(n, n + 1)
        one = oracle.Prompt(prompt.cond[own], prompt.uncond[own], {name: x[own] for name, x in prompt.text.items()})
        noise = draw(1)
        with torch.no_grad():  # two of three decodings change nothing in the result, nor does the scoring of views
            for _ in range(2):
                image = made.decode(z[own])
            names = made.settings.views_augmentations
            made.view_losses(oracle.render(image, noise["views"], size=size, names=names), one)
        made.step(z[own], oracle.State(), 0, noise, one)

    def step() -> None:
        if as_published:
            for n in range(count):
                published(n)
        else:
            made.step(z, oracle.State(), 0, draw(count), prompt)

    return _measure(step, runs, device)


def _measure(step: Callable[[], None], runs: int, device: str) -> Measured:
    is_cuda = device == "cuda"
    wait = torch.cuda.synchronize if is_cuda else lambda: None
    step()
    step()  # torch.compile makes a second program once it has seen the gradient
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()  # what cuDNN tried in the first steps is no part of it
    times = []
    for _ in range(runs):
        wait()
        start = time.monotonic()
        step()
        wait()
        times.append(time.monotonic() - start)
    return Measured(statistics.median(times), torch.cuda.max_memory_allocated() if is_cuda else None)


def free() -> None:
    """Gives back what a row has left: its oracle is in cycles, and compiled programs hold on to weights."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(settings: config.Settings, rows: list[str], runs: int, device: str) -> dict[str, Measured]:
    """Each row that works here, told as it is found; ours comes last, for JAX keeps the memory that it has once had."""
    found = {}
    for name in sorted(rows, key="ours".__eq__):
        free()
        try:
            found[name] = ours(settings, runs) if name == "ours" else theirs(settings, runs, device, **ROWS[name])
        except Exception as error:  # torch.compile needs a C++ compiler, and raises whatever that makes it
            print(f"{name}: does not work here ({(str(error) or repr(error)).splitlines()[0][:120]})", flush=True)
            continue
        peak = found[name].peak
        memory = "" if peak is None else f", peak {peak / 1e9:.1f} GB"
        print(f"{name}: {found[name].seconds:.3f} s for {settings.batch_size} prompts{memory}", flush=True)
    return found


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["ours", *ROWS]
    parser.add_argument("--config", default="configs/shapes.py")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--precision", default="float32", choices=sorted(builders.DTYPES))
    parser.add_argument("--rows", default=",".join(names), help="which, of " + ", ".join(names))
    args = parser.parse_args()
    args.rows = args.rows.split(",")
    if unknown := set(args.rows) - set(names):
        parser.error(f"no rows {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return args


def main() -> None:
    """The command line."""
    args = arguments()
    settings = settings_of(args.config, args.batch, args.precision)
    devices.choose()  # as a run does
    known = {"clip": {"cosine", "contrastive"}, "blip2": {"itm", "itg"}}
    if len(settings.referees) != 1 or set(settings.referees[0].losses) - known.get(settings.referees[0].name, set()):
        sys.exit(f"error: {args.config}: torch has one referee here, with losses of {known}")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as JAX has it by itself
        torch.backends.cudnn.benchmark = True
    found = measure(settings, args.rows, args.runs, device)
    for name in [name for name in found if "ours" in found and name != "ours"]:
        print(f"ours takes {found['ours'].seconds / found[name].seconds:.2f} of {name}")
    told = {"config": args.config, "batch": args.batch, "precision": args.precision, "weights": "read"}
    if not is_here(settings):
        told["weights"] = "random"
    told |= {"device": jax.devices()[0].device_kind, "version": torch.__version__}
    print(json.dumps(told | {"rows": {name: dataclasses.asdict(row) for name, row in found.items()}}))


if __name__ == "__main__":
    main()
