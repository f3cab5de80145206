"""Time of a config's iteration beside the same in torch (tests/oracles/inversion.py), on the same device.

    python -m tests.tools.against_torch --batch=8
    python -m tests.tools.against_torch --config=configs/paper.py --precision=bfloat16 --batch=4

Both have the same networks, the same batch and no held-out referee; our iterations are compiled in chunks, as in a
run. If the config's checkpoints are no local directories, both have random weights of the same sizes. Rows of
torch: eager, with networks through torch.compile (`compile`), both also with channels last, and in the structure
of the authors' loop (`as-published`: one prompt after the other, three decodings, a pass that scores the views).
A ratio below 1 means that ours is faster.
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

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to torch; read when JAX is imported

import diffusers
import jax
import numpy as np
import torch
import transformers
from torch import nn

from referee_jax import config, items, referees
from referee_jax.engine import builders, inverter
from referee_jax.hardware import devices as devices_lib
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
    """Seconds of an iteration of the whole batch, and the device's peak memory in bytes, None if unknown."""

    seconds: float
    peak: int | None


def settings_of(path: str, batch: int, precision: str = "float32") -> config.Settings:
    """The settings of a file, without initial samples and held-out referees."""
    settings = dataclasses.replace(config.load(path), batch_size=batch, precision=precision)
    optimise = tuple(spec for spec in settings.referees if spec.role == "optimise")
    return dataclasses.replace(settings, referees=optimise, init="noise", init_candidates=1)


def is_here(settings: config.Settings) -> bool:
    """Whether all checkpoints are local directories, so that no weights are random."""
    names = [settings.generator.checkpoint, *(spec.checkpoint for spec in settings.referees)]
    return all(hub.local_path(name).is_dir() for name in names)


def ours(settings: config.Settings, runs: int) -> Measured:
    """The iteration in JAX."""
    device = jax.devices()[0]
    # On a CPU, the devices that a run would make share the batch, or JAX_NUM_CPU_DEVICES.
    devices = jax.devices() if device.platform == "cpu" else [device]
    settings = dataclasses.replace(settings, batch_size=-(-settings.batch_size // len(devices)))
    if is_here(settings):
        engine = inverter.Inverter.from_config(settings, devices)
    else:
        sized = abstract_networks.at_random(abstract_networks.abstract(settings))
        engine = inverter.Inverter(settings, sized.prior, sized.judges, devices)
    batch, _ = engine.advance(engine.begin(items.expand([PROMPT], engine.batch_size), 0))
    times = []
    for _ in range(runs):
        start = time.monotonic()
        batch, _ = engine.advance(dataclasses.replace(batch, step=0))
        times.append(time.monotonic() - start)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return Measured(statistics.median(times) / min(settings.chunk, settings.steps), peak)


def build(settings: config.Settings, device: str, **how: bool) -> tuple[oracle.Oracle, oracle.Prompt]:
    """The oracle with the settings' numbers, and a batch of encoded prompts."""
    sized, (spec,) = abstract_networks.abstract(settings), settings.referees
    numbers = oracle.Settings(
        steps=settings.steps, sds_guidance=settings.sds.guidance, referee_losses=dict(spec.losses),
        views_count=settings.views.count, views_keep=settings.views.keep, views_augmentations=settings.views.augmentations,
        referee_balance_epsilon=settings.referee.balance_epsilon, ema_start=settings.ema.start,
    )  # fmt: skip
    options = {"device": device, "dtype": getattr(torch, settings.precision), "settings": numbers, **how}
    if is_here(settings):
        referee = sized.judges[0].referee
        paths = (str(hub.local_path(x)) for x in (settings.generator.checkpoint, spec.checkpoint))
        network = oracle.load(*paths, mean=referee.mean, std=referee.std, **options)
    else:
        network = at_random(sized, **options)
    # Only the length of a text matters here.
    tokens = builders.tokenize(settings, sized.prior.tokenizers, sized.judges, (), PROMPT)
    cond, uncond = (
        _expand(ids, settings.batch_size, device) for ids in (tokens["prior"][0][0], tokens["prior"][0][-1])
    )
    (texts,) = tokens["referees"]
    texts = {name: _expand(x, settings.batch_size, device) for name, x in texts.items()}
    return network, network.encode_text(cond, uncond, *_text_inputs(sized.judges[0], texts))


def _expand(x: np.ndarray, batch: int, device: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x)).long().to(device).expand(batch, *x.shape)


def _text_inputs(judge: referees.Judge, texts: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    """The arguments of the oracle judge's `encode`."""
    ids = texts["input_ids"]
    if judge.spec.name == "clip":
        return ids[:, 0], ids[:, 1:]
    return ids, texts["attention_mask"], judge.referee.dec_token_id


def at_random(sized: abstract_networks.Sized, *, device: str, dtype: torch.dtype, **how: Any) -> oracle.Oracle:
    """As `oracle.load`, of networks of these sizes, with weights distributed as in abstract_networks.at_random."""
    prior, referee = sized.prior, sized.judges[0].referee
    make = {"clip": _clip, "blip2": _blip2}[sized.judges[0].spec.name]
    with torch.device(device):
        text_encoder = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(**dataclasses.asdict(prior.text_encoder.text_encoder.text_model.config))
        )
        unet = diffusers.UNet2DConditionModel(**dataclasses.asdict(prior.denoiser.config))
        vae = diffusers.AutoencoderKL(**dataclasses.asdict(prior.vae.config))
        judge = make(referee)
    for m in (text_encoder, unet, vae, judge):
        _draw(m)
    for m in (text_encoder, unet, vae, *judge.parts):
        m.to(device, dtype)
    schedule = prior.schedule
    alphas = torch.from_numpy(schedule.alphas_cumprod())
    return oracle.Oracle(text_encoder, unet, vae, judge, alphas, prediction_type=schedule.prediction_type, **how)


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
    network, prompt = build(settings, device, **how)
    side = settings.image_size // 2 ** (len(network.vae.config.block_out_channels) - 1)
    size, count = network.judge.image_size, settings.batch_size
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda batch: oracle.draw(generator, network.settings, batch=batch, latent=(side, side), size=size)
    z = torch.randn(count, side, side, 4, generator=generator, device=device)

    def published(n: int) -> None:
        row = slice(n, n + 1)
        one = oracle.Prompt(prompt.cond[row], prompt.uncond[row], {name: x[row] for name, x in prompt.text.items()})
        noise = draw(1)
        with torch.no_grad():  # extra decodings and scores, without effect on the result
            for _ in range(2):
                image = network.decode(z[row])
            names = network.settings.views_augmentations
            network.view_losses(oracle.render(image, noise["views"], size=size, names=names), one)
        network.step(z[row], oracle.State(), 0, noise, one)

    def step() -> None:
        if as_published:
            for n in range(count):
                published(n)
        else:
            network.step(z, oracle.State(), 0, draw(count), prompt)

    return _measure(step, runs, device)


def _measure(step: Callable[[], None], runs: int, device: str) -> Measured:
    is_cuda = device == "cuda"
    wait = torch.cuda.synchronize if is_cuda else lambda: None
    step()
    step()  # torch.compile makes a second program for the gradient
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()  # without what cuDNN tried in the first steps
    times = []
    for _ in range(runs):
        wait()
        start = time.monotonic()
        step()
        wait()
        times.append(time.monotonic() - start)
    return Measured(statistics.median(times), torch.cuda.max_memory_allocated() if is_cuda else None)


def free() -> None:
    """Frees the memory of a row: its oracle has reference cycles, and compiled programs hold weights."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(settings: config.Settings, rows: list[str], runs: int, device: str) -> dict[str, Measured]:
    """Measures and prints each row that works here; ours is last, since JAX does not return memory."""
    results = {}
    for name in sorted(rows, key="ours".__eq__):
        free()
        try:
            results[name] = ours(settings, runs) if name == "ours" else theirs(settings, runs, device, **ROWS[name])
        except Exception as error:  # torch.compile needs a C++ compiler, and raises whatever that makes it
            print(f"{name}: does not work here ({(str(error) or repr(error)).splitlines()[0][:120]})", flush=True)
            continue
        peak = results[name].peak
        memory = "" if peak is None else f", peak {peak / 1e9:.1f} GB"
        print(f"{name}: {results[name].seconds:.3f} s for {settings.batch_size} prompts{memory}", flush=True)
    return results


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["ours", *ROWS]
    parser.add_argument("--config", default="configs/shapes_clip.py")
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
    is_small = hub.are_embedded(config.checkpoints(settings))
    devices_lib.split_cpu("auto", args.batch if is_small else 1)  # as a run does
    devices_lib.choose()
    known = {"clip": {"cosine", "contrastive"}, "blip2": {"itm", "itg"}}
    if len(settings.referees) != 1 or set(settings.referees[0].losses) - known.get(settings.referees[0].name, set()):
        sys.exit(f"error: {args.config}: torch has one referee here, with losses of {known}")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.set_num_threads(devices_lib.cores())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, JAX's default
        torch.backends.cudnn.benchmark = True
    results = measure(settings, args.rows, args.runs, device)
    for name in [name for name in results if "ours" in results and name != "ours"]:
        print(f"ours takes {results['ours'].seconds / results[name].seconds:.2f} of {name}")
    report = {"config": args.config, "batch": args.batch, "precision": args.precision, "weights": "read"}
    if not is_here(settings):
        report["weights"] = "random"
    report |= {"device": jax.devices()[0].device_kind, "version": torch.__version__}
    print(json.dumps(report | {"rows": {name: dataclasses.asdict(row) for name, row in results.items()}}))


if __name__ == "__main__":
    main()
