"""Tiny pipelines of diffusers with random weights, each with the layout and the sampler of a published one."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from tests.oracles import networks

SIDE = 8  # of the latents; pictures are eight times as wide
_BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
_VAE = dict(
    block_out_channels=(8, 8, 16, 16),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
_SDXL = dict(
    block_out_channels=(16, 24, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 3, 4),
    transformer_layers_per_block=(1, 2, 3),
    cross_attention_dim=32 + 40,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24 + 6 * 8,
    sample_size=SIDE,
)


def padded_with_zero(length: int = 77) -> transformers.CLIPTokenizer:
    """The tokenizer of SDXL's second tower, which pads with "!", its token 0."""
    vocab, merges = networks.vocabulary()
    first = next(iter(vocab))
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length, pad_token=first)


def projected_text_encoder(seed: int = 1, **overrides: Any) -> transformers.CLIPTextModelWithProjection:
    """SDXL's second tower, three layers."""
    config = networks.text_config(width=40, act="gelu") | dict(num_hidden_layers=3) | overrides
    return networks.redraw(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)), seed)


def sdxl_unet() -> diffusers.UNet2DConditionModel:
    """With small predictions: large ones of a random network make a sampler of many steps chaotic."""
    unet = networks.unet(**_SDXL)
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.03)
    return unet


def stable_diffusion(scheduler: Any) -> diffusers.StableDiffusionPipeline:
    """One text encoder, two levels."""
    return diffusers.StableDiffusionPipeline(
        vae=networks.vae(**_VAE), text_encoder=networks.text_encoder(), tokenizer=networks.tokenizer(),
        unet=networks.unet(sample_size=SIDE), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl(scheduler: Any) -> diffusers.StableDiffusionXLPipeline:
    """Two text encoders, three levels, the first without attention."""
    return diffusers.StableDiffusionXLPipeline(
        vae=networks.vae(**_VAE, scaling_factor=0.13025), text_encoder=networks.text_encoder(),
        text_encoder_2=projected_text_encoder(), tokenizer=networks.tokenizer(), tokenizer_2=padded_with_zero(),
        unet=sdxl_unet(), scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Published:
    """A pipeline, and how it is used."""

    build: Callable[[Any], diffusers.DiffusionPipeline]
    scheduler: Callable[[], Any]
    steps: int
    guidance: float


PUBLISHED = {
    "Stable Diffusion 2": Published(
        stable_diffusion,
        lambda: diffusers.DDIMScheduler(
            **_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
        ),
        steps=7,
        guidance=5.0,
    ),
    "SD-Turbo": Published(
        stable_diffusion,
        lambda: diffusers.EulerDiscreteScheduler(**_BETAS, timestep_spacing="trailing", steps_offset=1),
        steps=1,
        guidance=1.0,
    ),
    "SDXL": Published(
        sdxl,
        lambda: diffusers.EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading", steps_offset=1),
        steps=4,
        guidance=5.0,
    ),
    "SDXL-Turbo": Published(
        sdxl,
        lambda: diffusers.EulerAncestralDiscreteScheduler(**_BETAS, timestep_spacing="trailing", steps_offset=1),
        steps=1,
        guidance=1.0,
    ),
}


def save(name: str, root: pathlib.Path) -> diffusers.DiffusionPipeline:
    """A pipeline of PUBLISHED, written to a directory as diffusers does."""
    pipeline = PUBLISHED[name].build(PUBLISHED[name].scheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(root)
    return pipeline


def sampled(pipeline: Any, noise: np.ndarray, prompt: str, *, steps: int, guidance: float, **how: Any) -> np.ndarray:
    """Latents `[h, w, C]` that the pipeline makes of noise `[h, w, C]`."""
    start = torch.from_numpy(noise.transpose(2, 0, 1)[None].copy())
    side = 8 * noise.shape[0]
    made = pipeline(
        prompt, num_inference_steps=steps, guidance_scale=guidance, latents=start, height=side, width=side,
        output_type="latent", **how,
    )  # fmt: skip
    return made.images[0].numpy().transpose(1, 2, 0)
