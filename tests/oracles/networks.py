"""Tiny random networks in the directory layout of the published checkpoints, so that both sides load the same files.

`save(root)` writes `root/stable-diffusion/{unet,vae,text_encoder,scheduler,tokenizer}` and `root/clip`. Weights are
drawn anew: libraries initialise towers so small that outputs hardly see their inputs, and a wrong port would agree.
"""

import json
import math
import os
import pathlib

import diffusers
import safetensors.torch
import torch
import transformers
from torch import nn

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_MERGED_WORDS = ("red", "blue", "green", "circle", "square", "and", "photo")


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """About 100 byte-pair tokens and their merges: letters, marks and digits, a few whole words, the specials last."""
    letters = "abcdefghijklmnopqrstuvwxyz,."
    tokens = [*letters, *(c + "</w>" for c in letters + "0123456789")]
    merges = []
    for word in _MERGED_WORDS:
        left, rest = word[0], [*word[1:-1], word[-1] + "</w>"]
        for right in rest:
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    # The end token has the largest id, as in CLIP: both ways of finding the end (largest id, end id) agree.
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def tokenizer(length: int = 77) -> transformers.CLIPTokenizer:
    """A working `CLIPTokenizer` over `vocabulary()`; pads with the end token to `length`."""
    vocab, merges = vocabulary()
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def text_config(width: int = 32, length: int = 77, act: str = "quick_gelu") -> dict:
    """Keyword arguments of a two-layer CLIP text tower over `vocabulary()`."""
    vocab, _ = vocabulary()
    return dict(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        hidden_act=act,
        projection_dim=24,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )


def text_encoder(seed: int = 0, **overrides) -> transformers.CLIPTextModel:
    """Stable Diffusion's text encoder, two layers."""
    return redraw(transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**text_config(), **overrides})), seed)


def clip(seed: int = 1, image_size: int = 32, act: str = "quick_gelu") -> transformers.CLIPModel:
    """A two-tower referee, two layers each, patches of 8."""
    vision = dict(
        hidden_size=40,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=8,
        hidden_act=act,
        projection_dim=24,
    )
    config = transformers.CLIPConfig(text_config=text_config(act=act), vision_config=vision, projection_dim=24)
    return redraw(transformers.CLIPModel(config), seed)


def unet(seed: int = 2, cross_attention_dim: int = 32, **overrides) -> diffusers.UNet2DConditionModel:
    """Two levels, Stable Diffusion 1 style: `attention_head_dim` is, as misnamed there, the number of heads."""
    config = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
    )
    return redraw(diffusers.UNet2DConditionModel(**{**config, **overrides}), seed)


def vae(seed: int = 3, **overrides) -> diffusers.AutoencoderKL:
    """KL autoencoder of three levels (f = 4); decoded values spread beyond [-1, 1], so that clamping has work to do."""
    config = dict(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.18215,
    )
    return redraw(diffusers.AutoencoderKL(**{**config, **overrides}), seed)


def scheduler(prediction_type: str = "epsilon") -> diffusers.DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def redraw(module: nn.Module, seed: int) -> nn.Module:
    """Draw every weight, norm and bias anew, with a spread at which outputs move with inputs; frozen, in eval mode.

    The temperature of a two-tower model is left alone: drawn at random it would saturate the contrastive loss.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)}
    embeddings = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 0:
                continue
            x = torch.randn(p.shape, generator=generator)
            if name in norms:
                p.copy_(1 + 0.3 * x)
            elif name in embeddings:
                p.copy_(0.7 * x)
            elif p.ndim == 1:
                p.copy_(0.3 * x)
            else:
                p.copy_(_gain(name) * x / math.sqrt(p[0].numel()))
    return module.eval().requires_grad_(False)


def _gain(name: str) -> float:
    """Spread of a matrix relative to 1/sqrt(inputs); peaked, loud attention, or text and image would whisper."""
    if any(part in name for part in ("q_proj", "k_proj", "to_q", "to_k")):
        return 2.0
    if any(part in name for part in ("attn2.to_v", "attn2.to_out", "self_attn.out_proj", "time_emb_proj")):
        return 3.0
    return 1.3


def save(
    root: str | os.PathLike,
    *,
    seed: int = 0,
    prediction_type: str = "epsilon",
    image_size: int = 32,
    latent_size: int = 8,
) -> tuple[pathlib.Path, pathlib.Path]:
    """Write the two checkpoints (float32 safetensors) and returns `(root/stable-diffusion, root/clip)`.

    `image_size` is the referee's input, `latent_size` the side of the latents (images are four times as wide).
    """
    sd, referee = pathlib.Path(root) / "stable-diffusion", pathlib.Path(root) / "clip"
    unet(seed + 2, sample_size=latent_size).save_pretrained(sd / "unet")
    vae(seed + 3, sample_size=4 * latent_size).save_pretrained(sd / "vae")
    scheduler(prediction_type).save_pretrained(sd / "scheduler")
    save_text_encoder(text_encoder(seed), sd / "text_encoder")
    save_tokenizer(sd / "tokenizer")
    clip(seed + 1, image_size).save_pretrained(referee)
    save_tokenizer(referee)
    (referee / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": image_size},
                "crop_size": {"height": image_size, "width": image_size},
                "image_mean": CLIP_MEAN,
                "image_std": CLIP_STD,
            }
        )
    )
    return sd, referee


def save_text_encoder(module: transformers.CLIPTextModel, path: pathlib.Path) -> None:
    """Write with the published names, `text_model.*`, which transformers 5 reads but no longer writes."""
    module.save_pretrained(path)
    file = path / "model.safetensors"
    tensors = {name.removeprefix("text_model."): x for name, x in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file({f"text_model.{k}": x for k, x in tensors.items()}, file, metadata={"format": "pt"})


def save_tokenizer(path: pathlib.Path, length: int = 77) -> None:
    """Write tokenizer.json and the older vocab.json and merges.txt, all of the same `vocabulary()`."""
    tokenizer(length).save_pretrained(path)
    vocab, merges = vocabulary()
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
