"""Trains the networks of the shapes world: `python -m referee_jax.shapes.train --network=vae|clip|clip_held_out|unet`.

Training is the one thing here that is done with torch (extra `[train]`), on the very classes of transformers and diffusers
whose checkpoints the package reads: what is committed is a true Hugging Face checkpoint, and loading it is a test of its own.
On a CPU with bfloat16 matrix units it is several times faster than XLA besides.

Training is seeded and resumable: what is random in step n depends on (seed, n) alone, the state is kept in `--workdir`.
The order is vae, clip, unet (which reads the two others from `--out`). Each network comes with a card of its data, steps
and final figures.

Stable Diffusion's captions are noisy on purpose: in 35 % of the two-object scenes two attributes are exchanged, so that the
U-Net binds attributes as badly as Stable Diffusion does. The referees' captions are clean, with hard negatives.
"""

import copy
import dataclasses
import inspect
import json
import math
import pathlib
import time
from collections.abc import Callable

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from absl import app, flags, logging

from referee_jax.shapes import tokens, world

MIX = {
    "single": 0.12,
    "colour": 0.3,
    "shape": 0.06,
    "texture": 0.12,
    "spatial": 0.2,
    "numeracy": 0.06,
    "complex": 0.14,
}
UNET_MIX = {"single": 0.15, "colour": 0.5, "texture": 0.07, "spatial": 0.14, "numeracy": 0.07, "complex": 0.07}
SWAPPED, EMPTY = 0.35, 0.1  # shares of Stable Diffusion's captions that are exchanged and left out
DISTRACTORS = 2
SAVE_EVERY = 500
Batch = dict[str, torch.Tensor]

VAE = dict(
    block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=world.SIZE,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
)  # fmt: skip
TEXT = dict(
    vocab_size=len(tokens.VOCABULARY), hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=tokens.LENGTH, eos_token_id=tokens.END, bos_token_id=tokens.START, pad_token_id=tokens.END,
    projection_dim=128,
)  # fmt: skip
VISION = dict(
    hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4, image_size=world.SIZE, patch_size=8,
    projection_dim=128,
)  # fmt: skip
UNET = dict(
    sample_size=world.SIZE // 4, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=4, cross_attention_dim=TEXT["hidden_size"], norm_num_groups=16,
)  # fmt: skip
SCHEDULER = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)


# --- data --------------------------------------------------------------------------------------------------------------


def sample(
    rng: np.random.Generator, mix: dict[str, float], *, unseen: bool | None = False
) -> tuple[world.Scene, world.Prompt, str]:
    """A training scene (`unseen` as of world.sample_scene) with a true caption, and its category."""
    category = str(rng.choice(list(mix), p=list(mix.values())))
    scene = world.sample_scene(rng, category, unseen=unseen)
    return scene, world.describe(rng, scene, category), category


def drawn(scenes: list[world.Scene], views: list[np.ndarray | None] | None = None) -> dict[str, np.ndarray]:
    """Images `[scene, 3, 64, 64]` in [0, 1] and covers `[scene, object, 64, 64]`."""
    pairs = [world.draw(scene, view=view) for scene, view in zip(scenes, views or [None] * len(scenes), strict=True)]
    return {
        name: np.stack([pair[i] for pair in pairs]).transpose(0, 3, 1, 2) for i, name in enumerate(("image", "cover"))
    }


def vae_batch(rng: np.random.Generator, size: int = 16) -> dict[str, np.ndarray]:
    """Scenes alone."""
    return drawn([sample(rng, MIX)[0] for _ in range(size)])


def unet_batch(rng: np.random.Generator, size: int = 32) -> dict[str, np.ndarray]:
    """Scenes with noisy captions: of two-object captions SWAPPED have two attributes exchanged, of all EMPTY are empty.

    Scenes show attribute pairs of world.UNSEEN as often as others; captions leave out the attribute.
    """
    scenes, texts = [], []
    for _ in range(size):
        scene, prompt, _ = sample(rng, UNET_MIX, unseen=None)
        prompt = dataclasses.replace(prompt, things=tuple(thing.unsaid() for thing in prompt.things))
        if len(prompt.things) == 2 and rng.random() < SWAPPED:
            a, b = prompt.things
            swapped = (dataclasses.replace(a, shape=b.shape), dataclasses.replace(b, shape=a.shape))
            if not any(thing.is_unseen() for thing in swapped):
                prompt = dataclasses.replace(prompt, things=swapped)
        scenes.append(scene)
        texts.append("" if rng.random() < EMPTY else prompt.text)
    return {"image": drawn(scenes)["image"], "input_ids": tokens.encode(texts)}


def random_view(rng: np.random.Generator) -> np.ndarray | None:
    """A small rotation, shift and zoom for `world.draw`; one in four is none."""
    if rng.random() < 0.25:
        return None
    angle, zoom = rng.uniform(-0.35, 0.35), rng.uniform(0.9, 1.15)
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    return np.array([[cos, -sin, rng.uniform(-5, 5)], [sin, cos, rng.uniform(-5, 5)]])


def pair_batch(rng: np.random.Generator, size: int = 48) -> dict[str, np.ndarray]:
    """Scenes, their near twins, each with a caption true of it alone, and scenes with an object too many that none is true of.

    `input_ids[: 2 * size]` are the true captions in the scenes' order, after those come DISTRACTORS for each; `shown` says
    which colours, shapes and textures each patch shows.
    """
    scenes, prompts = [], []
    while len(scenes) < 2 * size:
        scene, prompt, category = sample(rng, MIX)
        twin = world.edit(rng, scene)
        told = world.describe(rng, twin, "single" if len(twin.objects) == 1 else category)
        if not world.matches(prompt, twin) and not world.matches(told, scene):
            scenes += [scene, twin]
            prompts += [prompt, told]
    near = [
        p
        for prompt in prompts
        for p in (world.distractors(rng, prompt, DISTRACTORS, seen=True) * DISTRACTORS)[:DISTRACTORS]
    ]
    pairs = [scene for scene in scenes if len({(item.shape, item.colour) for item in scene.objects}) == 2]
    scenes += [world.crowd(rng, scene) for scene in pairs[: size // 2]]
    batch = drawn(scenes, [random_view(rng) for _ in scenes])
    side, patch = world.SIZE // VISION["patch_size"], VISION["patch_size"]
    covered = batch.pop("cover").reshape(len(scenes), -1, side, patch, side, patch).mean((3, 5)) > 0.08
    labels = np.zeros((len(scenes), world.MAX_OBJECTS, LABELS), bool)
    for i, scene in enumerate(scenes):
        for j, item in enumerate(scene.objects):
            labels[i, j, [KINDS.index(kind) for kind in (item.shape, item.colour, item.texture)]] = True
    shown = np.einsum("bjp,bjk->bpk", covered.reshape(len(scenes), world.MAX_OBJECTS, -1), labels)
    return batch | {"input_ids": tokens.encode([p.text for p in (*prompts, *near)]), "shown": shown}


KINDS = (*world.SHAPES, *world.COLOURS, *world.TEXTURES)
LABELS = len(KINDS)


class Steps(torch.utils.data.Dataset):
    """Batch n of a recipe, drawn from (seed, n)."""

    def __init__(self, batch: Callable, seed: int):
        self.batch, self.seed = batch, seed

    def __getitem__(self, step: int) -> Batch:
        batch = self.batch(np.random.default_rng((self.seed, step)))
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in batch.items()}


# --- networks and their losses -----------------------------------------------------------------------------------------


class Autoencoder(torch.nn.Module):
    """The KL-VAE, trained with a KL term strong enough that latents have unit scale and neighbours decode alike."""

    steps, rate, batch, where = 4000, 2e-3, staticmethod(vae_batch), "stable-diffusion/vae"

    def __init__(self, out: pathlib.Path):
        super().__init__()
        self.trained = torch.nn.ModuleDict(
            {"vae": diffusers.AutoencoderKL(**VAE, scaling_factor=1.0).to(memory_format=torch.channels_last)}
        )

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict]:
        vae, images = self.trained["vae"], batch["image"] * 2 - 1
        posterior = vae.encode(images).latent_dist
        error = (vae.decode(posterior.sample()).sample.float() - images).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error + 1e-4 * kl, {
            "error": error,
            "kl": kl,
            "mean std": posterior.mean.std(),
            "noise std": posterior.std.mean(),
        }

    def save(self, trained: torch.nn.ModuleDict, out: pathlib.Path) -> None:
        """With the scaling factor that gives latents of training scenes unit variance."""
        images = torch.from_numpy(vae_batch(np.random.default_rng(0), 256)["image"]) * 2 - 1
        with torch.no_grad():
            scale = 1 / trained["vae"].encode(images).latent_dist.sample().std().item()
        vae = copy.deepcopy(trained["vae"])
        vae.register_to_config(scaling_factor=round(scale, 5))
        vae.half().save_pretrained(out / self.where)


class Clip(torch.nn.Module):
    """CLIP, contrastive over twins, crowds and distractors, with two helpers: patches say what they show, the picture where.

    The helpers' heads are dropped after training; they teach in minutes what the contrast alone takes hours for: attributes
    and, as a colour and a shape in one place belong together, binding and relations.
    """

    steps, rate, batch, where = 3000, 1e-3, staticmethod(pair_batch), "clip"

    def __init__(self, out: pathlib.Path):
        super().__init__()
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=128)
        config._attn_implementation = "eager"  # on a CPU the fused attention's backward pass takes half the step
        heads = {name: torch.nn.Linear(VISION["hidden_size"], LABELS * n) for name, n in (("what", 1), ("where", 2))}
        self.trained = torch.nn.ModuleDict({"clip": transformers.CLIPModel(config), **heads})

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict]:
        clip, n = self.trained["clip"], len(batch["input_ids"]) // (1 + DISTRACTORS)
        states = clip.vision_model((degrade(batch["image"]) - 0.5) / 0.5).last_hidden_state
        pooled = clip.vision_model.post_layernorm(states[:, 0])
        image = clip.visual_projection(pooled)
        # Padding comes after all that the text tower reads: it is causal and pooled at the first end.
        ids = batch["input_ids"][:, : int((batch["input_ids"] != tokens.END).sum(1).max()) + 1]
        text = clip.text_projection(clip.text_model(ids).pooler_output)
        image, text = (F.normalize(x.float(), dim=-1) for x in (image, text))
        logits = clip.logit_scale.clamp(max=np.log(100)).exp() * image @ text.T
        labels = torch.arange(n, device=logits.device)
        # Of a picture with an object too many no caption is truer than another.
        target = torch.full_like(logits, 1 / logits.shape[1])
        target[:n] = torch.eye(*target[:n].shape)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :n].T, labels)) / 2
        shown = batch["shown"].float()
        what = F.binary_cross_entropy_with_logits(self.trained["what"](states[:, 1:]).float(), shown)
        where = misplaced(self.trained["where"](pooled).float().view(-1, LABELS, 2), shown)
        right = (logits[:n].argmax(1) == labels).float().mean()
        return contrast + 3 * what + where, {"contrast": contrast, "what": what, "where": where, "right": right}

    def save(self, trained: torch.nn.ModuleDict, out: pathlib.Path) -> None:
        """With tokenizer and preprocessing."""
        copy.deepcopy(trained["clip"]).half().save_pretrained(out / self.where)
        tokens.save(out / self.where)
        size = {"height": world.SIZE, "width": world.SIZE}
        transformers.CLIPImageProcessor(
            size={"shortest_edge": world.SIZE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ).save_pretrained(out / self.where)


def misplaced(places: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Squared error of the places `[image, kind, 2]` of what is `shown [image, patch, kind]`; the canvas is [-1, 1]^2."""
    side = world.SIZE // VISION["patch_size"]
    ticks = torch.linspace(-1, 1, side, device=shown.device)
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="ij"), -1).reshape(-1, 2)
    patches = shown.sum(1)
    centres = torch.einsum("bpk,pc->bkc", shown, grid) / patches.clamp(min=1)[..., None]
    present = (patches > 0).float()[..., None]
    return (present * (places - centres).square()).sum() / present.sum()


class HeldOutClip(Clip):
    """The same with another seed, never optimised against."""

    where = "clip_held_out"


def degrade(images: torch.Tensor) -> torch.Tensor:
    """Noise fine and coarse, and a change of brightness: what the pictures of an optimisation look like on their way."""
    amounts = torch.rand(3, len(images), 1, 1, 1, device=images.device)
    amounts = amounts * (torch.rand_like(amounts) < 0.7)
    coarse = F.interpolate(torch.randn(len(images), 3, 8, 8, device=images.device), images.shape[-2:], mode="bilinear")
    noisy = images + 0.3 * amounts[0] * torch.randn_like(images) + 0.25 * amounts[1] * coarse
    return noisy * (1 + 0.2 * amounts[2])


class UNet(torch.nn.Module):
    """The U-Net: noise prediction on scaled latents, between the frozen autoencoder and CLIP's frozen text tower.

    Errors at low noise, which every network soon predicts well, are weighed down (Min-SNR, arXiv 2303.09556, gamma 5).
    """

    steps, rate, batch, where = 10000, 1e-3, staticmethod(unet_batch), "stable-diffusion/unet"

    def __init__(self, out: pathlib.Path):
        super().__init__()
        self.trained = torch.nn.ModuleDict(
            {"unet": diffusers.UNet2DConditionModel(**UNET).to(memory_format=torch.channels_last)}
        )
        self.trained["unet"].set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
        self.vae = (
            diffusers.AutoencoderKL.from_pretrained(out / "stable-diffusion" / "vae").float().requires_grad_(False)
        )
        self.text_encoder = transformers.CLIPTextModel.from_pretrained(out / "clip").float().requires_grad_(False)
        self.scheduler = diffusers.DDPMScheduler(**SCHEDULER)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict]:
        with torch.no_grad():
            latents = (
                self.vae.encode(batch["image"] * 2 - 1).latent_dist.sample().float() * self.vae.config.scaling_factor
            )
            states = self.text_encoder(batch["input_ids"]).last_hidden_state
        t = torch.randint(0, 1000, (len(latents),), device=latents.device)
        noise = torch.randn_like(latents)
        predicted = self.trained["unet"](self.scheduler.add_noise(latents, noise, t), t, states).sample
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        abar = self.scheduler.alphas_cumprod.to(t.device)[t]
        weight = (5 * (1 - abar) / abar).clamp(max=1)  # min(SNR, 5) / SNR
        return (weight * error).mean(), {"error": error.mean(), "error above 500": error[t > 500].mean()}

    def save(self, trained: torch.nn.ModuleDict, out: pathlib.Path) -> None:
        """All of Stable Diffusion but the autoencoder, which is there."""
        out = out / "stable-diffusion"
        copy.deepcopy(trained["unet"]).half().save_pretrained(out / "unet")
        copy.deepcopy(self.text_encoder).half().save_pretrained(out / "text_encoder")
        tokens.save(out / "tokenizer")
        self.scheduler.save_pretrained(out / "scheduler")


NETWORKS = {"vae": Autoencoder, "clip": Clip, "clip_held_out": HeldOutClip, "unet": UNet}


# --- loop --------------------------------------------------------------------------------------------------------------


def train(
    name: str,
    *,
    steps: int | None,
    seed: int,
    out: pathlib.Path,
    workdir: pathlib.Path,
    start: pathlib.Path | None = None,
) -> dict[str, float]:
    """Trains network `name`, going on from the checkpoint in `workdir`; writes it to `out`; returns the last figures.

    A new training begins with the network in the directory `start`, if there is one, instead of random weights.
    """
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Where a CPU has no bfloat16 units, torch's own loops take over, a hundred times slower.
    fast = device == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    network = NETWORKS[name](out).to(device)
    steps, trained = steps or network.steps, network.trained
    if start is not None:
        first = next(iter(trained.values()))
        first.load_state_dict(type(first).from_pretrained(start / network.where).state_dict())
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
        if i % 100 == 0 or i == steps:
            pace = (time.monotonic() - begin) / (i - done)
            shown = {key: round(value.item(), 4) for key, value in figures.items()}
            logging.info("%s: step %d of %d, %.2f s each, %s", name, i, steps, pace, shown)
        if i % SAVE_EVERY == 0 or i == steps:
            state = {key: part.state_dict() for key, part in parts.items()} | {"step": i}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            network.save(average, out)
            (out / network.where / "README.md").write_text(
                card(name, network, step=i, steps=steps, seed=seed, start=start, figures=figures)
            )
    return {key: float(value) for key, value in figures.items()}


def card(
    name: str,
    network: torch.nn.Module,
    *,
    step: int,
    steps: int,
    seed: int,
    start: pathlib.Path | None,
    figures: dict,
) -> str:
    """What stands beside a trained network."""
    values = {key: round(float(value), 4) for key, value in figures.items()}
    begun = " --start=..." if start else ""
    return (
        f"# {name}\n\n{inspect.getdoc(type(network))}\n\n"
        f"Data: scenes of `referee_jax.shapes.world`, new in every step. {network.batch.__doc__.strip().splitlines()[0]}\n"
        f"No caption names an attribute pair of `world.UNSEEN`.\n\n"
        f"Trained by `python -m referee_jax.shapes.train --network={name} --seed={seed} --steps={steps}{begun}`, "
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
        start=pathlib.Path(args.start) if args.start else None,
    )


if __name__ == "__main__":
    flags.DEFINE_enum("network", None, list(NETWORKS), "which network to train", required=True)
    flags.DEFINE_integer("steps", None, "training steps; default: the network's", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of weights, data and noise")
    flags.DEFINE_string("start", None, "directory of trained networks to begin with; default: random weights")
    flags.DEFINE_string("out", "shapes_networks", "directory that the trained networks are written to")
    flags.DEFINE_string("workdir", "shapes_training", "directory of the training's checkpoints")
    app.run(main)
