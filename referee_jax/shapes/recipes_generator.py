"""Recipes of the shapes world's generator: autoencoder and U-Net, torch modules with their loss and saving.

A recipe's `batch` draws one step's data from a Generator; `trained` holds the modules to train, and `forward`
returns the loss and the figures for the log.
"""

import copy
import math
import pathlib

import diffusers
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils import parametrize

from referee_jax.shapes import batches, tokens, world
from referee_jax.shapes.recipes_referees import TEXT, Batch

VAE = dict(
    block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=world.SIZE,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
)  # fmt: skip
UNET = dict(
    sample_size=world.SIZE // 4, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=4, cross_attention_dim=TEXT["hidden_size"], norm_num_groups=16,
)  # fmt: skip
LORA = "pytorch_lora_weights.safetensors"  # diffusers' name of a file with one
RANK = 24  # of the LoRA that makes the U-Net one of one step
TEACHER_STEPS, GUIDANCE = 12, 7.5  # of the sampler that the generator of one step learns from
REUSED = 6  # steps that each batch of the sampler's serves: sampling is most of the work
KEPT = 128  # batches, of which a step draws one
# As Stable Diffusion's.
SCHEDULER = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)


class Autoencoder(torch.nn.Module):
    """The KL-VAE; its KL term is strong enough for unit-scale latents, of which near ones decode to similar pictures."""

    steps, rate, batch, places = 4000, 2e-3, staticmethod(batches.vae_batch), ("stable-diffusion/vae",)

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
        """Writes it with the scaling factor that gives latents of training scenes unit variance."""
        images = torch.from_numpy(batches.vae_batch(np.random.default_rng(0), 256)["image"]) * 2 - 1
        with torch.no_grad():
            scale = 1 / trained["vae"].encode(images).latent_dist.sample().std().item()
        vae = copy.deepcopy(trained["vae"])
        vae.register_to_config(scaling_factor=round(scale, 5))
        vae.half().save_pretrained(out / self.places[0])


class UNet(torch.nn.Module):
    """The U-Net: noise prediction on scaled latents, between the frozen autoencoder and CLIP's frozen text tower.

    Errors at low noise, which are easy, have less weight (Min-SNR, arXiv 2303.09556, gamma 5). With `start`, it goes on
    from the U-Net and behind the text tower of that directory.
    """

    steps, rate, batch, places = 10000, 1e-3, staticmethod(batches.unet_batch), ("stable-diffusion/unet",)

    def __init__(self, out: pathlib.Path, start: pathlib.Path | None = None):
        super().__init__()
        network = diffusers.UNet2DConditionModel
        unet = network.from_pretrained(start / self.places[0]).float() if start else network(**UNET)
        self.trained = torch.nn.ModuleDict({"unet": unet.to(memory_format=torch.channels_last)})
        self.trained["unet"].set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
        self.vae = (
            diffusers.AutoencoderKL.from_pretrained(out / "stable-diffusion" / "vae").float().requires_grad_(False)
        )
        texts = start / "stable-diffusion" / "text_encoder" if start else out / "clip"
        self.text_encoder = transformers.CLIPTextModel.from_pretrained(texts).float().requires_grad_(False)
        self.scheduler = diffusers.DDIMScheduler(**SCHEDULER)

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
        """Writes all of Stable Diffusion but the autoencoder, which exists already."""
        out = out / "stable-diffusion"
        copy.deepcopy(trained["unet"]).half().save_pretrained(out / "unet")
        copy.deepcopy(self.text_encoder).half().save_pretrained(out / "text_encoder")
        tokens.save(out / "tokenizer")
        self.scheduler.save_pretrained(out / "scheduler")


class LowRank(torch.nn.Module):
    """A weight and a learnt change of low rank, which begins as zero: a LoRA (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        outputs, inputs = len(weight), weight[0].numel()
        rank = min(RANK, outputs, inputs)
        self.down = torch.nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.up = torch.nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).view_as(weight)


class OneStep(torch.nn.Module):
    """A LoRA that makes the U-Net one of one step, as SD-Turbo: of noise comes what a guided sampler makes of it in twelve.

    What was sampled lately is kept, and used again; a training that goes on begins to keep anew.
    """

    steps, rate, batch, places = 1500, 2e-3, staticmethod(batches.prompt_batch), ("one_step",)
    named = True  # pairs of world.UNSEEN

    def __init__(self, out: pathlib.Path):
        super().__init__()
        load = diffusers.UNet2DConditionModel.from_pretrained
        self.teacher = load(out / "stable-diffusion" / "unet").float().to(memory_format=torch.channels_last)
        self.teacher.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
        self.teacher.requires_grad_(False)
        self.trained = torch.nn.ModuleDict({"unet": copy.deepcopy(self.teacher)})
        for module in list(self.trained["unet"].modules()):
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                parametrize.register_parametrization(module, "weight", LowRank(module.weight))
        texts = out / "stable-diffusion" / "text_encoder"
        self.text_encoder = transformers.CLIPTextModel.from_pretrained(texts).float().requires_grad_(False)
        self.scheduler = diffusers.DDIMScheduler(**SCHEDULER)
        self.kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # states, noise, clean latents
        self.drawn = 0
        self.register_buffer("empty", torch.from_numpy(tokens.encode([""])))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict]:
        count, device = len(batch["input_ids"]), batch["input_ids"].device
        if self.drawn % REUSED == 0:
            with torch.no_grad():
                states = self.text_encoder(batch["input_ids"]).last_hidden_state
                noise = torch.randn(count, 4, *2 * [UNET["sample_size"]], device=device)
                self.kept = [*self.kept[1 - KEPT :], (states, noise, self.sampled(noise, states))]
        self.drawn += 1
        states, noise, target = self.kept[int(torch.randint(len(self.kept), ()))]
        t = torch.full((len(noise),), 999, device=device)
        made = self.clean(noise, t, self.trained["unet"](noise, t, states).sample.float())
        error = F.smooth_l1_loss(made, target, beta=0.3)
        return error, {"error": error, "distance": (made - target).square().mean().sqrt()}

    @staticmethod
    def levels(device: torch.device) -> torch.Tensor:
        """The sampler's timesteps."""
        return torch.linspace(999, 20, TEACHER_STEPS, device=device).round().long()

    def sampled(self, noise: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The clean latents that DDIM makes of noise."""
        levels = self.levels(noise.device)
        both, x = torch.cat([self.text_encoder(self.empty).last_hidden_state.expand_as(states), states]), noise
        abar = self.scheduler.alphas_cumprod.to(noise.device)
        for t, following in zip(levels, [*levels[1:], None], strict=True):
            uncond, cond = self.teacher(torch.cat([x, x]), t, both).sample.float().chunk(2)
            e = uncond + GUIDANCE * (cond - uncond)
            clean = self.clean(x, t.expand(len(x)), e)
            if following is not None:
                x = abar[following].sqrt() * clean + (1 - abar[following]).sqrt() * e
        return clean

    def clean(self, x: torch.Tensor, t: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """The clean latents of noisy ones, by the noise in them."""
        abar = self.scheduler.alphas_cumprod.to(x.device)[t][:, None, None, None]
        return (x - (1 - abar).sqrt() * e) / abar.sqrt()

    def save(self, trained: torch.nn.ModuleDict, out: pathlib.Path) -> None:
        """Writes the LoRA under PEFT's names; all else is the shapes world's Stable Diffusion."""
        directory, tensors = out / self.places[0], {}
        directory.mkdir(parents=True, exist_ok=True)
        for name, module in trained["unet"].named_modules():
            if parametrize.is_parametrized(module):
                change, weight = module.parametrizations.weight[0], module.weight
                ones = (1,) * (weight.dim() - 2)
                tensors[f"unet.{name}.lora_A.weight"] = change.down.view(-1, *weight.shape[1:])
                tensors[f"unet.{name}.lora_B.weight"] = change.up.view(*change.up.shape, *ones)
        halves = {name: x.detach().half().contiguous() for name, x in tensors.items()}
        safetensors.torch.save_file(halves, directory / LORA, metadata={"format": "pt"})
