"""Recipes of the shapes world's generator: autoencoder and U-Net, torch modules with their loss and saving.

A recipe's `batch` draws one step's data from a Generator; `trained` holds the modules to train, and `forward`
returns the loss and the figures for the log.
"""

import copy
import pathlib

import diffusers
import numpy as np
import torch
import transformers

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
SCHEDULER = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)


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

    Errors at low noise, which are easy, have less weight (Min-SNR, arXiv 2303.09556, gamma 5).
    """

    steps, rate, batch, places = 10000, 1e-3, staticmethod(batches.unet_batch), ("stable-diffusion/unet",)

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
        """Writes all of Stable Diffusion but the autoencoder, which exists already."""
        out = out / "stable-diffusion"
        copy.deepcopy(trained["unet"]).half().save_pretrained(out / "unet")
        copy.deepcopy(self.text_encoder).half().save_pretrained(out / "text_encoder")
        tokens.save(out / "tokenizer")
        self.scheduler.save_pretrained(out / "scheduler")
