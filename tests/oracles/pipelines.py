"""Tiny pipelines of diffusers with random weights, each with the layout and the sampler of a published one."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from tests.oracles import networks, t5

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


_VAE_16 = dict(
    **_VAE,
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=1.5305,
    shift_factor=0.0609,
)
_T5_WIDTH = 64  # at least that of both CLIPs' states beside each other


def t5_encoder() -> transformers.T5EncoderModel:
    """The third text encoder of SD3, and the second of FLUX."""
    return t5.t5_encoder(d_model=_T5_WIDTH, vocab_size=len(t5.tokenizer()))


def sd3(scheduler: Any, has_t5: bool = True) -> diffusers.StableDiffusion3Pipeline:
    """Two CLIPs and a T5; four blocks, of which two attend twice."""
    clips = [projected_text_encoder(seed=0, hidden_size=24, projection_dim=20), projected_text_encoder()]
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIDE, in_channels=16, out_channels=16, num_layers=4, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=_T5_WIDTH, caption_projection_dim=32, pooled_projection_dim=20 + 24, pos_embed_max_size=9,
        qk_norm="rms_norm", dual_attention_layers=(0, 1),
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=small(networks.redraw(transformer, 2)), scheduler=scheduler, vae=networks.vae(**_VAE_16),
        text_encoder=clips[0], tokenizer=networks.tokenizer(), text_encoder_2=clips[1], tokenizer_2=padded_with_zero(),
        text_encoder_3=t5_encoder() if has_t5 else None, tokenizer_3=t5.tokenizer(length=512) if has_t5 else None,
    )  # fmt: skip


def flux(scheduler: Any) -> diffusers.FluxPipeline:
    """CLIP and T5; two blocks of two streams, two of one."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=_T5_WIDTH, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=small(networks.redraw(transformer, 2)), scheduler=scheduler, vae=networks.vae(**_VAE_16),
        text_encoder=networks.text_encoder(), tokenizer=networks.tokenizer(), text_encoder_2=t5_encoder(),
        tokenizer_2=t5.tokenizer(length=512),
    )  # fmt: skip


def small(transformer: Any) -> Any:
    """With small predictions, as `sdxl_unet`."""
    with torch.no_grad():
        transformer.proj_out.weight.mul_(0.2)
    return transformer


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
    "SD3.5": Published(sd3, lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), steps=5, guidance=4.5),
    "SD3.5 without T5": Published(
        functools.partial(sd3, has_t5=False),
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        steps=3,
        guidance=4.5,
    ),
    "FLUX.1-schnell": Published(
        flux, lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0), steps=4, guidance=1.0
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
    start, count = torch.from_numpy(noise.transpose(2, 0, 1)[None].copy()), noise.shape[0]
    side = 8 * count
    if isinstance(pipeline, diffusers.FluxPipeline):
        start = pipeline._pack_latents(start, 1, start.shape[1], count, count)
        guidance = 0.0  # not read
    if isinstance(pipeline, diffusers.FluxPipeline | diffusers.StableDiffusion3Pipeline):
        how["max_sequence_length"] = 256
    made = pipeline(
        prompt, num_inference_steps=steps, guidance_scale=guidance, latents=start, height=side, width=side,
        output_type="latent", **how,
    )  # fmt: skip
    latents = made.images
    if isinstance(pipeline, diffusers.FluxPipeline):
        latents = pipeline._unpack_latents(latents, side, side, 8)
    return latents[0].detach().numpy().transpose(1, 2, 0)
