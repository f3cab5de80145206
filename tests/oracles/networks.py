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

BLIP_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_MERGED_WORDS, *"a ? . yes no picture of ##s".split()]


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


def blip_config(**text) -> transformers.BlipConfig:
    """Three layers of text, two of vision, patches of 8; text and vision of one width, as question answering needs."""
    sizes = dict(hidden_size=48, intermediate_size=80, num_attention_heads=4)
    ids = dict(bos_token_id=len(BLIP_WORDS), sep_token_id=BLIP_WORDS.index("[SEP]"), eos_token_id=2)
    return transformers.BlipConfig(
        text_config=sizes
        | ids
        | dict(vocab_size=len(BLIP_WORDS) + 2, num_hidden_layers=3, max_position_embeddings=80)
        | text,
        vision_config=sizes | dict(num_hidden_layers=2, image_size=32, patch_size=8),
        image_text_hidden_size=20,
    )


def blip(kind: type[transformers.PreTrainedModel], seed: int = 4, **text) -> transformers.PreTrainedModel:
    """One of the three BLIPs. Its words are about equally likely: "yes" would else be certain, without a gradient."""
    network = redraw(kind(blip_config(**text)), seed)
    for name, p in network.named_parameters():
        if "predictions.transform.LayerNorm" in name:
            p.mul_(0.2)
    return network


def blip_tokenizer() -> transformers.BertTokenizer:
    """Wordpieces over `BLIP_WORDS`. As in the published directories, [DEC] and [ENC] have ids but no entries."""
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(BLIP_WORDS)}, model_max_length=512)


def save_blip(module: transformers.PreTrainedModel, path: pathlib.Path, **how) -> pathlib.Path:
    """Write network, tokenizer and preprocessor_config.json; `how` is for save_pretrained."""
    module.save_pretrained(path, **how)
    blip_tokenizer().save_pretrained(path)
    size = module.config.vision_config.image_size
    preprocessing = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "size": {"height": size, "width": size}}
    (path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "BlipImageProcessor"} | preprocessing)
    )
    return path


BLIP2_TOKENS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *_MERGED_WORDS,
    *"abcdefghij",
    *(f"##{c}" for c in "abcdefghij"),
)


def blip2_tokenizer() -> transformers.BertTokenizer:
    """A working BERT tokenizer over `BLIP2_TOKENS`, and [DEC] behind them."""
    return transformers.BertTokenizer(vocab={token: n for n, token in enumerate(BLIP2_TOKENS)}, bos_token="[DEC]")


def blip2(
    seed: int = 0, vision: dict | None = None, qformer: dict | None = None
) -> transformers.Blip2ForImageTextRetrieval:
    """BLIP-2's image-text judge: three and four layers, patches of 8, five queries; `vision` and `qformer` change configs."""
    sizes = dict(
        hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=8
    )
    bert = dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3, max_position_embeddings=40
    )
    bert |= dict(vocab_size=len(BLIP2_TOKENS) + 1, use_qformer_text_input=True)
    config = transformers.Blip2Config(
        vision_config=sizes | (vision or {}),
        qformer_config=bert | (qformer or {}),
        num_query_tokens=5,
        image_text_hidden_size=16,
    )
    return redraw_blip2(transformers.Blip2ForImageTextRetrieval(config), seed)


def redraw_blip2(module: nn.Module, seed: int) -> nn.Module:
    """`redraw`, with tables that are no Embeddings as loud as those that are, and the image heard in the queries."""
    redraw(module, seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith(("query_tokens", "position_embedding", "class_embedding")):
                p.copy_(0.7 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
            elif name.endswith("crossattention.output.dense.weight"):
                p.mul_(5)
    return module


def save_blip2(path: pathlib.Path, *, lm_head: bool, seed: int = 0) -> None:
    """Write `blip2()`, tokenizer and preprocessing; `lm_head` adds what only stage-1 weights have."""
    module = blip2(seed)
    module.save_pretrained(path)
    blip2_tokenizer().save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": CLIP_MEAN, "image_std": CLIP_STD}))
    if not lm_head:
        return
    width, vocab = module.config.qformer_config.hidden_size, module.config.qformer_config.vocab_size
    transform = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width)})
    predictions = nn.ModuleDict({"transform": transform, "decoder": nn.Linear(width, vocab)})
    head = redraw(nn.ModuleDict({"predictions": predictions}), seed + 1)
    file = path / "model.safetensors"
    tensors = safetensors.torch.load_file(file) | {f"cls.{name}": x for name, x in head.state_dict().items()}
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | {"lm_head": True}))


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
            elif p.ndim == 3:  # tables that are no nn.Embedding: [1, tokens, width]
                p.copy_(0.7 * x)
            else:
                p.copy_(_gain(name) * x / math.sqrt(p[0].numel()))
    return module.eval().requires_grad_(False)


# Spread of a matrix relative to 1/sqrt(inputs); peaked, loud attention, or text and image would whisper.
_GAINS = {
    "q_proj": 2.0, "k_proj": 2.0, "to_q": 2.0, "to_k": 2.0, "self.query": 2.0, "self.key": 2.0, "qkv": 2.0,
    "attn2.to_v": 3.0, "attn2.to_out": 3.0, "self_attn.out_proj": 3.0, "time_emb_proj": 3.0, "self.value": 3.0,
    "crossattention.output.dense": 2.0, "attention.output.dense": 4.0,
}  # fmt: skip


def _gain(name: str) -> float:
    return next((gain for part, gain in _GAINS.items() if part in name), 1.3)


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
    save_clip(referee, seed=seed + 1, image_size=image_size)
    return sd, referee


def save_clip(path: pathlib.Path, *, seed: int = 1, image_size: int = 32) -> None:
    """Write `clip()`, tokenizer and preprocessing."""
    clip(seed, image_size).save_pretrained(path)
    save_tokenizer(path)
    (path / "preprocessor_config.json").write_text(
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
